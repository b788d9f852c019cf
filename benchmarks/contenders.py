"""The contenders, and how each of them samples."""

from dataclasses import dataclass

from pipeline.errors import UserError

BITS = {"float32": 32, "f32": 32, "bfloat16": 16, "float16": 16, "int8": 8, "int8_float16": 8, "q8_0": 8, "int4": 4,
        "q4_0": 4}  # fmt: skip
"""Bits per weight, by precision; contenders with the same number are compared with each other."""

MODULES = {
    "engine": ("pipeline.engine",),
    "transformers": ("transformers",),
    "compiled": ("transformers",),
    "vllm": ("vllm",),
    "optimum": ("optimum.onnxruntime",),
    "ctranslate2": ("ctranslate2",),
    "llama.cpp": ("llama_cpp",),
}
"""The modules that a family of contenders imports."""

PACKAGES = {
    "engine": "onnxruntime-gpu",
    "transformers": "transformers",
    "compiled": "torch",
    "vllm": "vllm",
    "optimum": "optimum-onnx",
    "ctranslate2": "ctranslate2",
    "llama.cpp": "llama-cpp-python",
}
"""The package of a family; its version is in the names of the files made for the family."""

PEER_LIBRARIES = ("ctranslate2", "llama-cpp-python", "vllm")
"""The distributions that only benchmarks use; their versions go with the results."""

CPU_DEFAULT = (
    "engine-float32",
    "engine-int8",
    "engine-int4",
    "transformers-float32",
    "transformers-bfloat16",
    "optimum-float32",
    "ctranslate2-float32",
    "ctranslate2-int8",
    "llama.cpp-f32",
    "llama.cpp-q8_0",
    "llama.cpp-q4_0",
)
CUDA_DEFAULT = (
    "engine-float16",
    "engine-int8_float16",
    "transformers-float16",
    "compiled-float16",
    "optimum-float16",
    "vllm-float16",
)
"""`compiled` is transformers with its static cache and torch.compile."""
DEFAULTS = {"cpu": CPU_DEFAULT, "cuda": CUDA_DEFAULT}


@dataclass(frozen=True)
class Contender:
    """A library and the precision of its weights."""

    family: str
    precision: str
    provider: str
    """`cpu` or `cuda`."""

    @property
    def name(self) -> str:
        return f"{self.family}-{self.precision}"

    @property
    def bits(self) -> int:
        return BITS[self.precision]


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn, in the order penalty, temperature, top-k, top-p; 0 takes the most likely token."""

    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float


SAMPLED = Sampling(temperature=0.8, top_k=50, top_p=0.95, repetition_penalty=1.2)
GREEDY = Sampling(temperature=0.0, top_k=1, top_p=1.0, repetition_penalty=1.0)


def parse_contender(name: str, provider: str) -> Contender:
    """Parse a name such as `engine-int8`. Raises `UserError` if the family or the precision is unknown."""
    family, _, precision = name.rpartition("-")
    if family not in MODULES or precision not in BITS:
        raise UserError(f"contenders: {name!r} is none of {', '.join(DEFAULTS[provider])}")
    return Contender(family, precision, provider)
