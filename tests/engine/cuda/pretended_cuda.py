"""Stand-ins for the libraries of CUDA: they answer, keep memory on the host, and compute nothing.

With them ONNX Runtime's CUDA provider starts on any machine, takes the nodes for which it has kernels, and captures.
Our own calls of the runtime, the driver and the compiler are made with their real arguments. Nothing is computed, so no
result means anything. Every function that a library needs and that is not written out here returns 0.
"""

import re
import shutil
import subprocess
from pathlib import Path

import onnxruntime

from pipeline import machine

TOOLS = ("cc", "nm")

RUNTIME = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
static int capturing;
static long kernels, copies;
/* What a stream that is captured forbids. */
static int refused(void) { return capturing ? 900 : 0; }
int cudaMalloc(void **place, size_t size) { *place = malloc(size); return refused(); }
int cudaFree(void *place) { return refused(); }
int cudaDeviceSynchronize(void) { return refused(); }
int cudaStreamSynchronize(void *stream) { return refused(); }
int cudaMallocHost(void **place, size_t size) { return cudaMalloc(place, size); }
int cudaHostAlloc(void **place, size_t size) { return cudaMalloc(place, size); }
int cudaMemcpyAsync(void *to, void *from, size_t size, int kind) {
    copies += capturing;
    memcpy(to, from, size);
    return 0;
}
int cudaMemcpy(void *to, void *from, size_t size, int kind) {
    cudaMemcpyAsync(to, from, size, kind);
    return refused();
}
int cudaMemcpy2DAsync(char *to, size_t to_pitch, char *from, size_t from_pitch, size_t width, size_t height) {
    for (size_t row = 0; row < height; row++) memcpy(to + row * to_pitch, from + row * from_pitch, width);
    return 0;
}
int cudaMemsetAsync(void *to, int value, size_t size) { memset(to, value, size); return 0; }
int cudaMemset(void *to, int value, size_t size) { memset(to, value, size); return 0; }
int cudaMemGetInfo(size_t *available, size_t *total) { *available = *total = (size_t)1 << 34; return 0; }
int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaGetDevice(int *device) { *device = 0; return 0; }
/* The fields that ONNX Runtime looks at, where CUDA 13 has them: an H100's. */
int cudaGetDeviceProperties(char *found) {
    memset(found, 0, 512);
    *(size_t *)(found + 288) = (size_t)1 << 36;
    *(size_t *)(found + 296) = 49152;
    *(int *)(found + 304) = 65536;
    *(int *)(found + 308) = 32;
    *(int *)(found + 320) = *(int *)(found + 324) = *(int *)(found + 328) = 1024;
    *(int *)(found + 336) = 2147483647;
    *(int *)(found + 360) = 9;
    *(int *)(found + 384) = 132;
    return 0;
}
int cudaStreamCreate(void **stream) { *stream = (void *)16; return 0; }
int cudaStreamCreateWithFlags(void **stream) { return cudaStreamCreate(stream); }
int cudaEventCreate(void **event) { return cudaStreamCreate(event); }
int cudaEventCreateWithFlags(void **event) { return cudaStreamCreate(event); }
int cudaStreamBeginCapture(void) { capturing = 1; kernels = copies = 0; return 0; }
int cudaStreamEndCapture(void *stream, void **graph) {
    capturing = 0;
    printf("captured: %ld kernels, %ld copies\n", kernels, copies);
    fflush(stdout);
    *graph = (void *)48;
    return 0;
}
int cudaGraphInstantiate(void **run) { *run = (void *)56; return 0; }
int cudaGraphLaunch(void) { printf("replayed\n"); fflush(stdout); return 0; }
int __cudaLaunchKernel(void) { kernels += capturing; return 0; }
int cudaLaunchKernel(void) { return __cudaLaunchKernel(); }
int cudaLaunchKernelExC(void) { return __cudaLaunchKernel(); }
void **__cudaRegisterFatBinary(void) { static void *handle; return &handle; }
const char *cudaGetErrorString(int code) { return "pretended"; }
const char *cudaGetErrorName(int code) { return "pretended"; }
"""

DRIVER = r"""
#include <stdio.h>
#include <string.h>
int cuDeviceGet(int *device) { *device = 0; return 0; }
int cuDeviceGetAttribute(int *value, int attribute) { *value = attribute == 75 ? 9 : 0; return 0; }
int cuDeviceGetName(char *name) { strcpy(name, "a pretended GPU"); return 0; }
int cuInit(int flags) { return flags; }
int cuModuleLoadData(void **module, char *image) { *module = image; return strcmp(image, "image of sm_90"); }
int cuModuleGetFunction(void **function, void *module, char *name) { *function = module; return strcmp(name, "draw"); }
int cuLaunchKernel(void *function, int rows, int y, int z, int threads, int v, int w, int shared, void *stream,
                   void **arguments, void **extra) {
    /* Where the logits lie is the first thing in the only argument. */
    int is_right = threads == 1024 && y * z * v * w == 1 && !shared && !extra && **(void ***)arguments;
    printf("drawn: %d rows\n", rows);
    fflush(stdout);
    return !is_right;
}
int cuGetErrorString(int code, const char **text) { *text = "pretended"; return 0; }
int cuTensorMapEncodeTiled(void) { return 0; }
"""

COMPILER = r"""
#include <string.h>
static const char *wanted = "image of sm_90";
int nvrtcCreateProgram(void **program, char *source, char *name) {
    *program = (void *)8;
    return strcmp(name, "sampler.cu") || !strstr(source, "void __launch_bounds__");
}
int nvrtcCompileProgram(void *program, int count, char **options) {
    return count != 2 || strcmp(options[0], "--fmad=false") || strcmp(options[1], "--gpu-architecture=sm_90");
}
int nvrtcGetProgramLogSize(void *program, size_t *size) { *size = 1; return 0; }
int nvrtcGetProgramLog(void *program, char *log) { *log = 0; return 0; }
int nvrtcGetCUBINSize(void *program, size_t *size) { *size = strlen(wanted) + 1; return 0; }
int nvrtcGetCUBIN(void *program, char *image) { strcpy(image, wanted); return 0; }
"""

# Looked up by name as it is opened, and not on the list of what the provider wants.
CUDNN = "int cudnnCreate(void **made) { *made = (void *)64; return 0; } int cudnnSetStream(void) { return 0; }\n"

LIBRARIES = {
    "libcudart.so.13": (RUNTIME, r"(?:__)?cuda[A-Z]\w*"),
    "libcuda.so.1": (DRIVER, "cu[A-Z]\\w*"),
    "libcublas.so.13": ("", "cublas(?!Lt)\\w*"),
    "libcublasLt.so.13": ("", "cublasLt\\w*"),
    "libcurand.so.10": ("", "curand\\w*"),
    "libcudnn.so.9": (CUDNN, "cudnn\\w*"),
    "libnvrtc.so.13": (COMPILER, "nvrtc\\w*"),
}
"""The source of each library, and a pattern of its functions' names."""


def obstacle() -> str | None:
    """Return what is missing to make the stand-ins."""
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"{' and '.join(missing)} is needed to make stand-ins for CUDA's libraries"
    if not provider_library().is_file():
        return "this onnxruntime has no CUDA provider"
    if machine.versions(["nvidia-cuda-runtime"]):
        return "the real libraries of CUDA are installed, which onnxruntime takes first"
    return None


def provider_library() -> Path:
    return Path(onnxruntime.__file__).with_name("capi") / "libonnxruntime_providers_cuda.so"


def build(folder: Path) -> None:
    """Compile every library into `folder`, which then goes to `LD_LIBRARY_PATH`."""
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", provider_library()], capture_output=True, text=True, check=True
    ).stdout
    wanted = {line.split()[-1].partition("@")[0] for line in listed.splitlines()}
    for name, (source, pattern) in LIBRARIES.items():
        written = set(re.findall(r"\b(\w+)\(", source))
        for function in sorted(wanted - written):
            if re.fullmatch(pattern, function):
                made = "void **made" if "Create" in function else "void"
                gives = "*made = (void *)64; " if "Create" in function else ""
                source += f"int {function}({made}) {{ {gives}return 0; }}\n"
        (folder / "library.c").write_text(source)
        (folder / "versions").write_text(f"{name} {{ global: *; }};\n")
        flags = ["-w", "-shared", "-fPIC", f"-Wl,-soname,{name}", f"-Wl,--version-script={folder / 'versions'}"]
        subprocess.run(["cc", *flags, folder / "library.c", "-o", folder / name], check=True)
