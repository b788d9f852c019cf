"""The benchmark runs from end to end on a tiny model; what it measures there means nothing."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from changed_params import write_changed_params
from tokenizers import Tokenizer
from toy_project import TEXTS, make_project

from benchmarks.corruptions import DOSES, Text, corrupt, names_of, sentences_of
from pipeline.checkpoint import load_checkpoint
from pipeline.engine.cuda import driver
from pipeline.engine.text import TextCompletion
from pipeline.export.build import build_engine
from pipeline.export.verbatim import write_index
from pipeline.files import write_jsonl
from pipeline.params.section import PARAMS_FILE
from pipeline.tokens import load_tokenizer, tokenizer_sha256, write_tokens

ROOT = Path(__file__).parents[1]


def run(command: list[str], folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """A benchmark as a process, by default from the repository's root."""
    return subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads memory and processor time from /proc")
def test_decode_compares_the_engine_with_its_peers(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/decode.py", "--checkpoint", "tiny", "--rounds", "1", "--new-tokens", "4"]
    command += ["--contenders", "engine-float32,engine-int8,transformers-float32,optimum-float32"]
    command += [
        "--batch",
        "1,2",
        "--contexts",
        "8",
        "--work",
        str(tmp_path / "work"),
        "--out",
        str(tmp_path / "result"),
    ]
    done = run(command)
    assert done.returncode == 0, done.stderr
    result = (tmp_path / "result").read_text()
    assert result == done.stdout
    for name in ("engine-float32", "engine-int8", "transformers-float32", "optimum-float32"):
        assert name in result
    assert str(tmp_path) not in result


@pytest.mark.slow
def test_many_prompts_writes_what_the_engine_generates(tmp_path: Path) -> None:
    # Where `finetune` writes: without --checkpoint, its model is read.
    checkpoint = tmp_path / "out" / "finetune" / "checkpoint"
    made = run([sys.executable, "benchmarks/random_gpt2.py", "tiny", str(checkpoint)])
    assert made.returncode == 0, made.stderr
    command = [sys.executable, str(ROOT / "benchmarks" / "many_prompts.py"), "--precision", "float32", "--rows", "6"]
    done = run([*command, "--slots", "2", "--rounds", "2", "--out", str(tmp_path / "result")], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "command / complete: " in done.stdout
    assert done.stdout == (tmp_path / "result").read_text()


@pytest.mark.slow
def test_a_beginning_that_is_shared_is_read_once(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "reuse.py"), "--checkpoint", "tiny", "--work", str(tmp_path)]
    done = run([*command, "--precision", "float32", "--rounds", "2", "--out", str(tmp_path / "result")], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "first / second: " in done.stdout
    assert done.stdout == (tmp_path / "result").read_text()


@pytest.mark.slow
def test_what_outliers_cost_is_shown(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/outliers.py", "--shape", "tiny", "--precisions", "float32,int8"]
    done = run([*command, "--out", str(tmp_path / "result.txt")])
    assert done.returncode == 0, done.stderr
    table, records = (tmp_path / "result.txt").read_text().split("parity.json\n")
    rows = [line.split("  ")[0] for line in table.splitlines() if line.endswith(("kept", "broken"))]
    parity = json.loads(records)
    assert rows == ["float32", *["int8"] * (len(parity["int8"]["too_coarse"]) + 1)]
    assert parity["int8"]["more_exact"]


@pytest.mark.slow
def test_prepare_finds_what_was_planted(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    sentences = (f"The number {number} bell of pier {number % 97} rang {number % 89} times." for number in range(9000))
    (tmp_path / "texts" / "bells.txt").write_text(" ".join(sentences))
    done = run([sys.executable, "benchmarks/prepare.py", str(tmp_path / "texts"), "--megabytes", "1"])
    assert done.returncode == 0, done.stderr
    found = re.findall(r"([\d,]+) exact and ([\d,]+) near", done.stdout)
    assert len(found) == 2
    assert found[0] == found[1]


@pytest.fixture
def tokens(tiny_tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """What `dvc repro tokenize` writes."""
    for split, count in (("train", 60), ("validation", 2)):
        folder = tmp_path / "tokens" / split
        folder.mkdir(parents=True)
        write_tokens(folder, ["The lamp on Gull Rock went out. " * 20] * count, tiny_tokenizer, "digest")
    return tmp_path / "tokens"


@pytest.mark.slow
def test_batches_compares_the_same_steps_in_more_and_fewer(tokens: Path, tiny_checkpoint: Path) -> None:
    command = [sys.executable, "benchmarks/batches.py", "--base", str(tiny_checkpoint), "--tokens", str(tokens)]
    done = run([*command, "--batch-tokens", "256", "--parts", "4,1", "--steps", "2"])
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[-2:]]
    assert [row[:2] for row in rows] == [["4", "64"], ["1", "256"]]
    assert all(float(value) > 0 for row in rows for value in row[2:])


@pytest.mark.slow
def test_finetune_compares_training_with_transformers_recipe(tokens: Path, tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/finetune.py", "--shape", "tiny", "--steps", "3", "--documents", "1"]
    done = run([*command, "--tokens", str(tokens), "--out", str(tmp_path / "result")])
    assert done.returncode == 0, done.stderr
    result = (tmp_path / "result").read_text()
    assert result == done.stdout
    assert "ours / run_clm: " in result
    assert str(tmp_path) not in result


@pytest.fixture(scope="module")
def servers_compared(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The result of `serve.py`, with llama-server where there is one."""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads memory from /proc")
    folder = tmp_path_factory.mktemp("serve")
    command = [sys.executable, "benchmarks/serve.py", "--checkpoint", "tiny", "--precision", "float32"]
    command += ["--threads", "1", "--streams", "1,2", "--requests", "4", "--rounds", "1"]
    done = run([*command, "--work", str(folder / "work"), "--out", str(folder / "result")])
    assert done.returncode == 0, done.stderr
    result = (folder / "result").read_text()
    assert result == done.stdout
    assert str(folder) not in result
    return result


@pytest.mark.slow
def test_serve_compares_the_server_with_the_engine_alone(servers_compared: str) -> None:
    assert "2 streams, server / engine alone: " in servers_compared
    assert_whole(servers_compared, "engine-float32")


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("llama-server") is None,
    reason="llama-server is not on the PATH (docs/serving.md says how to build it)",
)
def test_serve_compares_the_server_with_llama_server(servers_compared: str) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (the extra bench)")
    assert "2 streams, server / llama.cpp-f32: " in servers_compared
    assert_whole(servers_compared, "llama.cpp-f32")


def assert_whole(result: str, name: str) -> None:
    """Check that a contender has a row per number of streams, and lost no request."""
    rows = [line.split() for line in result.splitlines() if f" {name} " in line and "/" not in line]
    assert [(row[0], row[-1]) for row in rows] == [("1", "0"), ("2", "0")]
    assert all(len(row) == 9 for row in rows)


def test_a_program_that_is_not_there_is_reported_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/serve.py", "--checkpoint", "tiny", "--llama-server", str(tmp_path / "none")]
    done = run(command)
    assert done.returncode == 2
    assert done.stderr.startswith("error: llama-server: ")


@pytest.mark.slow
def test_every_request_of_the_benchmark_of_traces_has_one(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/traces.py", "--checkpoint", "tiny", "--precision", "float32", "--texts"]
    command += ["--threads", "1", "--streams", "2", "--requests", "3", "--rounds", "2"]
    done = run([*command, "--work", str(tmp_path / "work"), "--out", str(tmp_path / "result")])
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "result").read_text() == done.stdout
    assert "traces received: 9, with texts" in done.stdout


@pytest.mark.slow
def test_a_soak_leaves_the_server_as_it_was(tiny_engine_folder: Path) -> None:
    command = [sys.executable, "benchmarks/soak.py", "--engine", str(tiny_engine_folder), "--precision", "float32"]
    done = run([*command, "--seconds", "6", "--clients", "8", "--longest-wait-s", "60"])
    assert done.returncode == 0, done.stderr
    assert "in use at the end: nothing" in done.stdout


@pytest.mark.skipif(not driver.obstacles(), reason="CUDA runs here")
def test_a_gpu_that_is_not_there_is_reported_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/decode.py", "--checkpoint", "tiny", "--provider", "cuda"]
    done = run([*command, "--contexts", "8", "--new-tokens", "4", "--work", str(tmp_path)])
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: provider: CUDA does not run here: ")


def test_settings_are_compared_with_none(tiny_checkpoint: Path, tmp_path: Path) -> None:
    index = tmp_path / "index"
    write_index(index, np.array([0, 7, 8, 9, 10, 7, 8, 9, 11, 0], np.uint16), np.array([0, 9]))
    lexicon = frozenset({"lamp"})
    build_engine(
        load_checkpoint(tiny_checkpoint), tiny_checkpoint, tmp_path / "engine", ["int8"], index=index, lexicon=lexicon
    )
    command = [sys.executable, "benchmarks/price.py", "--engine", str(tmp_path / "engine")]
    done = run([*command, "--rounds", "2", "--requests", "2", "--tokens", "6"])
    assert done.returncode == 0, done.stderr
    names = [line.split("  ")[0].split(" +")[0].split(" -")[0] for line in done.stdout.splitlines()[2:]]
    assert names == [
        "none again",
        *(f"max_verbatim_tokens {limit}" for limit in (4, 8, 15, 30)),
        *("min_p 0.08", "top_n_sigma 3", "eta_cutoff 0.0005"),
        *("no filter", "top_n_sigma 3 alone", "eta_cutoff 0.0005 alone"),
        "repetition_penalty 1.1",
        *(f"best_of {candidates}" for candidates in (2, 4, 8)),
    ]


@pytest.mark.slow
def test_figures_are_tried_on_corrupted_texts(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = make_project(tmp_path, tiny_checkpoint).out
    write_changed_params(tmp_path / PARAMS_FILE, {"tune": {"max_new_tokens": 40}}, tmp_path / PARAMS_FILE)
    tale = '# A tale\n\nThe lamp of {0} went out. "Who lit it?" asked {0}. Nobody knew. Then the tide came.'
    for split, names in (("validation", ("Oswin", "Maudie", "Tobias")), ("test", ("Perrin", "Greta", "Judd"))):
        write_jsonl(out / "prepare" / f"{split}.jsonl", [{"text": tale.format(name)} for name in names])
    tokens = out / "tokenize" / "train"
    tokens.mkdir(parents=True)
    write_tokens(tokens, TEXTS["train"], load_tokenizer(tiny_checkpoint), tokenizer_sha256(tiny_checkpoint))
    for folder in (out / "export" / "engine", out / "export" / "base" / "engine"):
        build_engine(load_checkpoint(tiny_checkpoint), tiny_checkpoint, folder, ["float32"])
    command = [sys.executable, "benchmarks/figures.py", "--project", str(tmp_path), "--samples", "3", "--sets", "2"]
    command += ["--out", str(tmp_path / "result")]
    done = run(command)
    assert done.returncode == 0, done.stderr
    result = (tmp_path / "result").read_text()
    assert result == done.stdout
    assert "6 texts of people" in done.stderr
    for name in ("mauve", "self_bleu", "invented_words", "empty_share"):
        assert f"\n{name} " in result
        assert f"\n| {name} |" in result
    assert str(tmp_path) not in result


@dataclass
class Draws:
    """Continues every text with the same word, and keeps what it has read."""

    read: list[str] = field(default_factory=list)

    def complete(self, prompts: Sequence[str], params: object) -> list[TextCompletion]:
        self.read += prompts
        return [TextCompletion("  drawn, and more", [], "length") for _ in prompts]


TALES = [
    Text(
        "# A tale\n\nOnce",
        f' {name} saw it. He met {name} there! "So. It fell," said {name}. No.\n\nGo {number}.',
        True,
    )
    for number, name in enumerate(("Oswin", "Maudie", "Perrin"))
]


def test_corruptions_change_as_much_as_the_dose_says_and_more_at_each() -> None:
    draws = Draws()
    copies = corrupt(TALES * 20, draws, seed=1)  # type: ignore[arg-type]
    assert list(copies) == ["words", "names", "splice", "shuffle"]
    words = [sum(own.text.count("drawn,") for own in dose) for dose in copies["words"].values()]
    total = sum(len(text.text.split()) for text in TALES * 20)
    assert np.array(words) == pytest.approx(np.array(DOSES) * total, abs=0.03 * total)
    assert words[-1] <= len(draws.read)
    assert all(any((text.prompt + text.text).startswith(prompt) for text in TALES) for prompt in draws.read)
    for doses in copies.values():
        assert list(doses) == list(DOSES)
        changed = [
            {index for index, (own, text) in enumerate(zip(dose, TALES * 20, strict=True)) if own.text != text.text}
            for dose in doses.values()
        ]
        assert all(low <= high for low, high in pairwise(changed))
        assert changed[-1]
    for own, text in zip(copies["shuffle"][0.4], TALES * 20, strict=True):
        assert sorted(own.text) == sorted(text.text)
    for own, text in zip(copies["names"][0.4], TALES * 20, strict=True):
        assert own.text.split()[1:3] == text.text.split()[1:3]


def test_sentences_and_names_of_a_tale() -> None:
    tale = TALES[0]
    parts = [tale.text[start:end] for start, end in sentences_of(tale.text)]
    assert parts == ["He met Oswin there!", '"So. It fell," said Oswin.', "No.", "Go 0."]
    assert [tale.text[start:end] for start, end in names_of(tale)] == ["Oswin"] * 3
