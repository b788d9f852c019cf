"""Make the files that a contender loads, and count the bytes of weights that it reads per token.

Runs in its own process for each contender, so that the benchmark itself loads none of the libraries.
"""

import argparse
import json
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import onnx
from contenders import Contender, parse_contender

from pipeline.errors import UserError, report_errors
from pipeline.files import read_json, whole_folder

ROOT = Path(__file__).parents[1]
GGUF_FILE = "model.gguf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contender")
    parser.add_argument("provider")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path, help="the files that the contender loads; made if missing")
    parser.add_argument("threads", type=int)
    arguments = parser.parse_args()
    contender = parse_contender(arguments.contender, arguments.provider)
    with report_errors():
        if not arguments.folder.exists():
            with whole_folder(arguments.folder) as partial:
                convert(contender, arguments.checkpoint, partial, arguments.threads)
        # The last line, because the libraries may print lines before it.
        print(json.dumps({"weight_bytes": weight_bytes(contender, arguments.folder, arguments.checkpoint)}))


def export_engine(checkpoint: Path, folder: Path, precisions: Sequence[str]) -> None:
    """Export `checkpoint` with this project's command. Raises `UserError` with its last line if it fails."""
    command = ["-m", "pipeline", "export", str(checkpoint.resolve()), str(folder.resolve())]
    run_python([*command, "--precision", ",".join(precisions)])


def run_python(arguments: Sequence[str]) -> str:
    """Run Python in the repository's root and return its output. Raises `UserError` with its last line if it fails."""
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UserError(last_line(done.stderr) or f"ended with exit code {done.returncode}")
    return done.stdout


def last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2].removeprefix("error: ")


def convert(contender: Contender, checkpoint: Path, folder: Path, threads: int) -> None:
    """Write the files that a peer loads to `folder`."""
    if contender.family == "optimum":
        from optimum.exporters.onnx import main_export

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            main_export(
                str(checkpoint),
                folder,
                task="text-generation-with-past",
                dtype="fp16" if contender.precision == "float16" else "fp32",
                device=contender.provider,
                do_validation=False,
            )
    elif contender.family == "ctranslate2":
        from ctranslate2.converters import TransformersConverter

        converter = TransformersConverter(str(checkpoint))
        converter.convert(str(folder), quantization=contender.precision, force=True)
    elif contender.family == "llama.cpp":
        import gpt2_gguf

        gpt2_gguf.write_float32(checkpoint, folder / GGUF_FILE)
        if contender.precision in gpt2_gguf.FILE_TYPES:
            float32 = (folder / GGUF_FILE).rename(folder / "float32.gguf")
            gpt2_gguf.quantize(float32, folder / GGUF_FILE, contender.precision, threads)
            float32.unlink()


def weight_bytes(contender: Contender, folder: Path, checkpoint: Path) -> int:
    """Return the bytes of weights read per token: all but the embeddings looked up by row, so the head counts.

    Keys and values do not count.
    """
    if contender.family == "engine":
        graphs = list((folder / contender.precision).glob("*.onnx"))
        if not graphs:
            raise UserError(f"the engine holds no {contender.precision}")
        return max(map(graph_weight_bytes, graphs))
    if contender.family == "optimum":
        return graph_weight_bytes(folder / "model.onnx")
    if contender.family == "llama.cpp":
        import gpt2_gguf

        return gpt2_gguf.weight_bytes(folder / GGUF_FILE)
    config = read_json(checkpoint / "config.json")
    width, inner = config["n_embd"], config.get("n_inner") or 4 * config["n_embd"]
    if contender.family == "ctranslate2":
        # The position embeddings stay in float32, and are the only table that is not read whole.
        return (folder / "model.bin").stat().st_size - 4 * config["n_positions"] * width
    # Per layer: four matrices of width x width in attention, two of width x inner in the MLP, biases of 3, 1 and 1
    # widths and of inner, and two normalizations.
    layer = 4 * width * width + 2 * width * inner + 9 * width + inner
    parameters = config["n_layer"] * layer + 2 * width + config["vocab_size"] * width
    return int(parameters * contender.bits // 8)


def graph_weight_bytes(file: Path) -> int:
    """Return the bytes of the initializers that a graph reads whole, that is, by nodes other than look-ups."""
    graph = onnx.load(file, load_external_data=False).graph
    read = {name for node in graph.node if not node.op_type.startswith("Gather") for name in node.input}
    return sum(tensor_bytes(tensor) for tensor in graph.initializer if tensor.name in read)


def tensor_bytes(tensor: onnx.TensorProto) -> int:
    size = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    for length in tensor.dims:
        size *= length
    return size


if __name__ == "__main__":
    main()
