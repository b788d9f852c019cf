"""What benchmarks of one exported engine share: their options, and the way from a checkpoint to a published result."""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

from conversion import export_engine
from decode import find_checkpoint
from report import publish

from pipeline.cores import usable_cores
from pipeline.errors import report_errors


def add_options(parser: argparse.ArgumentParser) -> None:
    checkpoint = "out/finetune/checkpoint"
    parser.add_argument("--checkpoint", default=checkpoint, help="a folder, medium or tiny (default: %(default)s)")
    parser.add_argument("--precision", default="int8", help="default: %(default)s")
    parser.add_argument("--threads", type=int, help="default: the number of physical cores")
    parser.add_argument("--work", type=Path, default=Path("out") / "benchmarks", help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="also write the result to this file")


def run(arguments: argparse.Namespace, benchmark: Callable[[argparse.Namespace, Path, int], str]) -> None:
    """Publish what `benchmark` returns for the options, an engine in a temporary folder, and a number of threads."""
    with report_errors():
        checkpoint = find_checkpoint(arguments.checkpoint, arguments.work)
        with tempfile.TemporaryDirectory() as folder:
            engine = Path(folder) / "engine"
            export_engine(checkpoint, engine, [arguments.precision])
            text = benchmark(arguments, engine, arguments.threads or usable_cores())
        publish(text, arguments.out)
