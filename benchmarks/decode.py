"""Compare the engine with its peers: the same prompts, lengths, sampling and threads, each in its own process.

Each contender runs once per round, so that other work on the machine affects all of them alike. Peers that are not
installed are left out, with the reason; `pip install --editable '.[bench]'` installs them.
"""

import argparse
import importlib.util
import json
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import onnx
import psutil
from contenders import DEFAULTS, MODULES, PACKAGES, PEER_LIBRARIES, Contender, parse_contender
from conversion import ROOT, export_engine, run_python
from report import Entry, Group, Measurement, publish, report
from worker import Answer, Start, Worker

from pipeline import doctor, machine
from pipeline.cores import usable_cores
from pipeline.engine.manifest import GRAPH_FILE
from pipeline.errors import UserError, report_errors
from pipeline.files import read_json, sha256_file
from pipeline.tokens import end_of_text_id, load_tokenizer

HERE = Path(__file__).parent
BANDWIDTH_OF = {"cpu": "read by that many threads", "cuda": "of the GPU's memory, read and written"}
RANDOM = ("medium", "tiny")
PAUSE_S = 0.5
"""The pause before each run, after which threads that spin while they wait for work have gone to sleep."""
MEMORY_LEFT = 0.5
"""The share of the machine's memory to leave for the next contender: what the largest needs on top of its weights."""
GREEDY_GROUP = Group(batch=1, prompt_tokens=32, new_tokens=32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint",
        default="medium",
        help="a GPT-2 checkpoint's folder, or random weights: medium (the shape of GPT-2 Medium) or tiny (to try the "
        "benchmark itself) (default: %(default)s)",
    )
    parser.add_argument("--provider", choices=tuple(DEFAULTS), default="cpu", help="default: %(default)s")
    shown = "; ".join(f"on {provider}: {','.join(names)}" for provider, names in DEFAULTS.items())
    parser.add_argument("--contenders", metavar="NAMES", help=f"default {shown}")
    parser.add_argument("--batch", metavar="NUMBERS", type=_numbers, default="1,8", help="default: %(default)s")
    parser.add_argument(
        "--contexts",
        metavar="NUMBERS",
        type=_numbers,
        default="64,900",
        help="tokens per prompt (default: %(default)s)",
    )
    parser.add_argument("--new-tokens", metavar="NUMBER", type=_number, default=64, help="default: %(default)s")
    parser.add_argument("--rounds", metavar="NUMBER", type=_number, default=5, help="default: %(default)s")
    parser.add_argument("--threads", metavar="NUMBER", type=_number, help="default: the number of physical cores")
    parser.add_argument(
        "--work",
        metavar="FOLDER",
        type=Path,
        default=Path("out") / "benchmarks",
        help="folder that keeps the peers' files for the next run; 9 GB for GPT-2 Medium (default: %(default)s)",
    )
    parser.add_argument("--out", metavar="FILE", type=Path, help="also write the result to this file")
    arguments = parser.parse_args()
    with report_errors():
        if sys.platform != "linux":
            raise UserError("the benchmark reads the memory of its contenders from /proc; run it on Linux")
        names = arguments.contenders.split(",") if arguments.contenders else DEFAULTS[arguments.provider]
        text = benchmark(
            arguments.checkpoint,
            [parse_contender(name, arguments.provider) for name in names],
            [Group(batch, tokens, arguments.new_tokens) for batch in arguments.batch for tokens in arguments.contexts],
            rounds=arguments.rounds,
            threads=arguments.threads or usable_cores(),
            work=arguments.work,
            command=_shown_command(arguments, parser),
        )
        publish(text, arguments.out)


def benchmark(
    source: str,
    contenders: Sequence[Contender],
    groups: Sequence[Group],
    *,
    rounds: int,
    threads: int,
    work: Path,
    command: str,
) -> str:
    """Make the contenders' files, run all contenders, and return the result as text."""
    began = datetime.now(UTC)
    checkpoint = find_checkpoint(source, work)
    prompts = Prompts(checkpoint)
    for group in (GREEDY_GROUP, *groups):
        prompts.check(group)
    provider = contenders[0].provider
    bandwidth = read_bandwidth(provider, threads)
    left_out: dict[str, str] = {}
    prepared = prepare(checkpoint, contenders, threads, work / _digest(checkpoint), left_out)
    entries = []
    with Field() as field:
        for contender, (folder, weight_bytes) in prepared.items():
            _log(f"starting {contender.name}")
            starter = partial(Worker, contender, folder, threads, work / f"{contender.name}.log")
            try:
                start = field.start(contender, starter)
                greedy = field.greedy(contender, GREEDY_GROUP, prompts)
            except UserError as error:
                left_out[contender.name] = f"did not start: {error}"
                field.end(contender)
                continue
            entries.append(Entry(contender, weight_bytes, start, greedy))
        if not entries:
            raise UserError("; ".join(f"{name}: {reason}" for name, reason in left_out.items()))
        for group in groups:
            left_out |= measure(field, entries, group, prompts, rounds)
    # Measured again, because the machine may be quieter now: the limit is the best that it can do.
    bandwidth = max(bandwidth, read_bandwidth(provider, threads))
    minutes = (datetime.now(UTC) - began).total_seconds() / 60
    builds = {entry.contender.family: entry.start.build for entry in entries if entry.start.build}
    facts = {
        "command": command,
        "date": f"{began:%Y-%m-%d %H:%M} UTC, {minutes:.0f} minutes",
        "model": describe_model(source, checkpoint),
        **machine.describe(PEER_LIBRARIES),
        **{f"{family} build": build for family, build in builds.items()},
        "threads": str(threads),
        "bandwidth": f"{bandwidth / 1e9:.1f} GB/s {BANDWIDTH_OF[provider]}",
        **({"kernels per step": kernels_per_step(work / _digest(checkpoint) / "engine")} if provider == "cuda" else {}),
        "rounds": f"{rounds}, each contender once per round, in turns",
        "idle": f"while one ran, the others used {field.idle_share:.1%} of a core",
        "restarts": f"{field.restarts}, to free memory or after a failure; each new process is warmed up",
    }
    text = report(facts, entries, left_out, groups, bandwidth)
    # Reasons may name files; their folders mean nothing to a reader.
    for folder in (work.resolve(), checkpoint.resolve().parent, ROOT):
        text = text.replace(f"{folder}/", "")
    return text


def read_bandwidth(provider: str, threads: int) -> float:
    """Return the bandwidth, in bytes per second, of the memory that holds the weights."""
    if provider == "cpu":
        return doctor.read_bandwidth(threads)
    from pipeline.engine.cuda import driver
    from pipeline.engine.memory import CudaMemory

    if obstacles := driver.obstacles():
        raise UserError(f"provider: CUDA does not run here: {obstacles[0]}")
    return doctor.gpu_bandwidth(CudaMemory())


def kernels_per_step(engine: Path) -> str:
    """Return the nodes in the engine's graph of one step; each is one kernel or a few, and one more kernel draws."""
    counts = {
        file.parent.name: len(onnx.load(file, load_external_data=False).graph.node)
        for file in sorted(engine.glob(f"*/{GRAPH_FILE}"))
    }
    return "; ".join(f"{name}: {nodes} nodes and the draw" for name, nodes in counts.items())


def find_checkpoint(source: str, work: Path) -> Path:
    """Return the folder of a checkpoint; random weights are made if they are missing."""
    if source in RANDOM:
        folder = work / source
        if not folder.exists():
            _log(f"making {folder}")
            run_python([str(HERE / "random_gpt2.py"), source, str(folder.resolve())])
        return folder
    folder = Path(source)
    if not (folder / "config.json").is_file():
        raise UserError(f"checkpoint: {source} is neither {' nor '.join(RANDOM)} nor a folder with a config.json")
    kind = read_json(folder / "config.json").get("model_type")
    if kind != "gpt2":
        raise UserError(f"checkpoint: {source} holds a model of type {kind}, not gpt2")
    return folder


class Prompts:
    """Random tokens without end-of-text, the same for all contenders.

    No two calls of a round get the same prompts, so that a contender with a prefix cache gains nothing.
    """

    def __init__(self, checkpoint: Path) -> None:
        config = read_json(checkpoint / "config.json")
        self._vocabulary_size: int = config["vocab_size"]
        self._context_length: int = config["n_positions"]
        self._end_of_text = end_of_text_id(load_tokenizer(checkpoint))

    def check(self, group: Group) -> None:
        if group.new_tokens < 2:
            raise UserError("new-tokens: decoding starts with the second token; ask for at least 2")
        if group.room > self._context_length:
            raise UserError(
                f"contexts: {group.prompt_tokens} and {group.new_tokens} new tokens do not fit in the context of "
                f"{self._context_length}"
            )

    def draw(self, group: Group, *key: int) -> list[list[int]]:
        shape = (group.batch, group.prompt_tokens)
        generator = np.random.default_rng([*shape, *key])
        ids = generator.integers(self._vocabulary_size - 1, size=shape)
        rows: list[list[int]] = (ids + (ids >= self._end_of_text)).tolist()
        return rows


def prepare(
    checkpoint: Path, contenders: Sequence[Contender], threads: int, files: Path, left_out: dict[str, str]
) -> dict[Contender, tuple[Path, int]]:
    """Return the folder that each contender loads and the bytes of its weights.

    If a contender cannot take part, `left_out` gets the reason. Peers' files are kept under `files`. The engine is
    exported again every time, because its code is what changes.
    """
    files.mkdir(parents=True, exist_ok=True)
    engine = files / "engine"
    engine_obstacle = None
    if precisions := [contender.precision for contender in contenders if contender.family == "engine"]:
        _log("exporting the engine")
        shutil.rmtree(engine, ignore_errors=True)
        try:
            export_engine(checkpoint, engine, precisions)
        except UserError as error:
            engine_obstacle = f"could not be exported: {error}"
    prepared = {}
    versions = machine.versions(tuple(PACKAGES.values()))
    for contender in contenders:
        version = versions.get(PACKAGES[contender.family], "")
        folders = {"engine": engine, **dict.fromkeys(("transformers", "compiled", "vllm"), checkpoint)}
        folder = folders.get(contender.family, files / f"{contender.name}-{version}")
        if obstacle := _missing(contender) or (engine_obstacle if contender.family == "engine" else None):
            left_out[contender.name] = obstacle
            continue
        _log(f"preparing {contender.name}")
        arguments = [contender.name, contender.provider, str(checkpoint.resolve()), str(folder.resolve()), str(threads)]
        try:
            output = run_python([str(HERE / "conversion.py"), *arguments])
        except UserError as error:
            left_out[contender.name] = f"could not be converted: {error}"
            continue
        prepared[contender] = folder, int(json.loads(output.splitlines()[-1])["weight_bytes"])
    return prepared


class Field:
    """The contenders that started, each in its process; one of them computes at a time. Ends all of them on exit.

    A contender that leaves too little memory after its turn is ended, and started again for its next turn: some
    libraries never give memory back. Methods raise `UserError` if a contender fails.
    """

    def __init__(self) -> None:
        self.restarts = 0
        self._starters: dict[Contender, Callable[[], Worker]] = {}
        self._workers: dict[Contender, Worker] = {}
        self._warm: dict[Contender, Group] = {}
        self._idle_cpu_s = 0.0
        self._run_s = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for contender in tuple(self._workers):
            self.end(contender)

    @property
    def idle_share(self) -> float:
        """Return the processor time of idle contenders as a share of the time that others ran."""
        return self._idle_cpu_s / self._run_s

    def start(self, contender: Contender, starter: Callable[[], Worker]) -> Start:
        self._starters[contender] = starter
        self._workers[contender] = starter()
        start = self._workers[contender].start
        self._make_room(contender)
        return start

    def end(self, contender: Contender) -> None:
        self._warm.pop(contender, None)
        if worker := self._workers.pop(contender, None):
            worker.stop()

    def greedy(self, contender: Contender, group: Group, prompts: Prompts) -> list[int]:
        """Return the most likely tokens of the first row."""
        answer = self._run(contender, group, prompts.draw(group), group.new_tokens, greedy=True)
        self._make_room(contender)
        return answer.token_ids[0]

    def take_turn(self, contender: Contender, group: Group, prompts: Prompts, number: int) -> tuple[Answer, Answer]:
        """Time the first token alone, then all tokens; a process that is new to the group first runs once untimed."""
        if self._warm.get(contender) != group:
            self._run(contender, group, prompts.draw(group, 0), group.new_tokens)
            self._warm[contender] = group
        first = self._run(contender, group, prompts.draw(group, number, 1), 1)
        every = self._run(contender, group, prompts.draw(group, number, 2), group.new_tokens)
        self._make_room(contender)
        return first, every

    def _run(
        self,
        contender: Contender,
        group: Group,
        prompts: Sequence[Sequence[int]],
        new_tokens: int,
        *,
        greedy: bool = False,
    ) -> Answer:
        if contender not in self._workers:
            self._workers[contender] = self._starters[contender]()
            self.restarts += 1
        others = [worker for other, worker in self._workers.items() if other != contender]
        time.sleep(PAUSE_S)
        idle_s = sum(worker.cpu_seconds() for worker in others)
        answer = self._workers[contender].run(prompts, new_tokens, room=group.room, greedy=greedy)
        self._idle_cpu_s += sum(worker.cpu_seconds() for worker in others) - idle_s
        self._run_s += answer.seconds
        return answer

    def _make_room(self, contender: Contender) -> None:
        memory = psutil.virtual_memory()
        if memory.available < MEMORY_LEFT * memory.total:
            self.end(contender)


def measure(field: Field, entries: Sequence[Entry], group: Group, prompts: Prompts, rounds: int) -> dict[str, str]:
    """Time each contender once per round, each round beginning with the next one. Return the reason per failure."""
    present, failed = list(entries), {}
    for index in range(rounds):
        _log(f"{group}: round {index + 1} of {rounds}")
        begin = index % max(1, len(present))
        for entry in (*present[begin:], *present[:begin]):
            try:
                first, every = field.take_turn(entry.contender, group, prompts, index + 1)
            except UserError as error:
                failed[entry.contender.name] = f"failed at {group}: {error}"
                field.end(entry.contender)
                entry.measurements.pop(group, None)
                present.remove(entry)
                continue
            measurement = entry.measurements.setdefault(group, Measurement())
            measurement.one_token_s.append(first.seconds)
            measurement.all_tokens_s.append(every.seconds)
            measurement.peak_bytes = max(measurement.peak_bytes, first.peak_bytes, every.peak_bytes)
    return failed


def describe_model(source: str, checkpoint: Path) -> str:
    config: dict[str, Any] = read_json(checkpoint / "config.json")
    shape = (
        f"{config['n_layer']} layers, width {config['n_embd']}, {config['n_head']} heads, vocabulary "
        f"{config['vocab_size']}, context {config['n_positions']}"
    )
    return f"{'random weights' if source in RANDOM else checkpoint.resolve().name}: {shape}"


def _missing(contender: Contender) -> str | None:
    for module in MODULES[contender.family]:
        package = module.partition(".")[0]
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed (pip install --editable '.[bench]')"
    return None


def _digest(checkpoint: Path) -> str:
    """Return a name for the content of a checkpoint."""
    files = sorted(file for file in checkpoint.iterdir() if file.is_file())
    return sha256("".join(f"{file.name} {sha256_file(file)}\n" for file in files).encode()).hexdigest()[:12]


def _shown_command(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> str:
    """Return the command line without the options that name folders of this machine and change no result."""
    shown = ["python", "benchmarks/decode.py"]
    for name, value in vars(arguments).items():
        given = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        if name not in ("work", "out") and given != str(parser.get_default(name)):
            shown += [f"--{name.replace('_', '-')}", Path(given).resolve().name if name == "checkpoint" else given]
    return shlex.join(shown)


def _number(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _numbers(text: str) -> list[int]:
    return [_number(part) for part in text.split(",")]


def _log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
