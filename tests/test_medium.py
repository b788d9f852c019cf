"""Rehearsal of GPT-2 Medium: its true shape with random weights and its own tokenizer, through the stages."""

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from changed_params import write_changed_params
from transformers import GPT2Config, GPT2LMHeadModel, set_seed

from pipeline.files import read_json, write_jsonl

ROOT = Path(__file__).parents[1]
TOKENIZER = ROOT.parent / "shared" / "gpt2-tokenizer"
TALES = ROOT / "data" / "volume-4.txt"
MEMORY_GIB = 24
CHANGES = {
    "base": {"source": "medium"},
    "finetune": {
        "context_length": 512,
        "batch_tokens": 512,
        "epochs": 1,
        "evaluations": 1,
        "learning_rate": 3e-5,
        "samples": {"max_new_tokens": 8},
    },
    # As many samples as documents, long enough to fill the cache.
    "tune": {"trials": 2, "finalists": 1, "max_new_tokens": 100},
    # With random weights no token is much likelier than the next: rounding decides which comes first.
    "export": {"parity": {"int8": {"min_next_token_agreement": 0.01}}},
}


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_gpt2_medium_is_fine_tuned_exported_and_keeps_parity(tmp_path: Path) -> None:
    for needed in (TOKENIZER, TALES):
        if not needed.exists():
            pytest.skip(f"{needed} is not here")
    write_medium(tmp_path / "medium")
    write_documents(tmp_path / "out" / "prepare")
    write_changed_params(tmp_path / "params.yaml", CHANGES)

    run_stage(tmp_path, "base", "out/prepare/train.jsonl", "out/base")
    run_stage(tmp_path, "tokenize", "out/prepare", "out/base", "out/tokenize")
    run_stage(tmp_path, "finetune", "out/tokenize", "out/base", "out/finetune")
    run_stage(tmp_path, "export", "out/finetune/checkpoint", "out/base", "out/tokenize", "out/export")
    searched = ("out/export", "out/prepare/validation.jsonl", "out/tokenize/train", "out/finetune")
    run_stage(tmp_path, "tune", *searched, "out/tune")

    assert read_json(tmp_path / "out/base/source.json")["parameters"] == 354_823_168
    assert read_json(tmp_path / "out/finetune/details.json")["steps"] == 2
    parity = read_json(tmp_path / "out/export/parity.json")
    assert parity["float32"]["greedy_agreement_tokens"] == parity["float32"]["greedy_tokens"] == 64
    assert parity["int8"]["positions"] >= 2000
    assert [trial["prompts"] for trial in read_json(tmp_path / "out/tune/trials.json")] == [5, 5]
    peak_gib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"peak memory of a stage: {peak_gib:.1f} GiB; parity: {parity}")
    assert peak_gib < MEMORY_GIB


def write_medium(folder: Path) -> None:
    set_seed(0)
    GPT2LMHeadModel(GPT2Config(n_embd=1024, n_layer=24, n_head=16)).save_pretrained(folder)
    for file in TOKENIZER.iterdir():
        shutil.copy(file, folder)


def write_documents(folder: Path) -> None:
    """Three tales to train on, in two steps, and five to validate on: over 1,000 tokens."""
    folder.mkdir(parents=True)
    texts = [text.strip() for text in TALES.read_text(encoding="utf-8-sig").split("***")]
    splits = {"train": texts[:3], "validation": texts[3:8], "test": texts[8:9]}
    for name, own in splits.items():
        rows = [{"id": str(index), "title": "", "text": text, "source": "tales"} for index, text in enumerate(own)]
        write_jsonl(folder / f"{name}.jsonl", rows)


def run_stage(folder: Path, stage: str, *arguments: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "DVC_"))}
    done = subprocess.run(
        [sys.executable, "-m", f"pipeline.stages.{stage}", *arguments],
        cwd=folder,
        env=environment | {"DVC_ROOT": str(folder), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
