"""EleutherAI's harness through the server: token-id prompts, `echo`, `logprobs`, and at most one token drawn."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from served_model import running_server
from tiny_gpt2 import SENTENCES
from transformers import GPT2LMHeadModel

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")

from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.models.openai_completions import LocalCompletionsAPI  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

TASK = """
task: tides
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{begins}}}}"
doc_to_choice: "{{{{ends}}}}"
doc_to_target: 0
metric_list:
  - metric: acc
"""


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))


@pytest.fixture
def tasks(tmp_path: Path) -> TaskManager:
    """A task of four questions: how a sentence continues."""
    halves = [(text[: len(text) // 2], text[len(text) // 2 :]) for text in SENTENCES]
    rows = [{"begins": begin, "ends": [end, *(other for _, other in halves if other != end)]} for begin, end in halves]
    (tmp_path / "tides.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tides.yaml").write_text(TASK.format(file=tmp_path / "tides.jsonl"))
    return TaskManager(include_path=str(tmp_path), include_defaults=False)


@pytest.fixture
def served(tiny_engine_folder: Path, tiny_checkpoint: Path) -> Iterator[LocalCompletionsAPI]:
    with running_server(tiny_engine_folder, max_queue=256) as running:
        yield LocalCompletionsAPI(
            base_url=f"{running.url}/v1/completions",
            model="engine",
            tokenizer=str(tiny_checkpoint),
            tokenizer_backend="huggingface",
            max_length=63,
            batch_size=4,
        )


def log_likelihoods(model: Any, tasks: TaskManager) -> list[float]:
    found = lm_eval.simple_evaluate(
        model=model, tasks=["tides"], task_manager=tasks, bootstrap_iters=0, log_samples=True, random_seed=0
    )
    samples = sorted(found["samples"]["tides"], key=lambda sample: sample["doc_id"])
    return [float(response[0][0]) for sample in samples for response in sample["resps"]]


def test_a_task_is_scored_as_pytorch_scores_it(
    served: LocalCompletionsAPI, tasks: TaskManager, tiny_model: GPT2LMHeadModel, tiny_checkpoint: Path
) -> None:
    from transformers import AutoTokenizer

    own = HFLM(
        pretrained=tiny_model.to(torch.float32), tokenizer=AutoTokenizer.from_pretrained(tiny_checkpoint), max_length=63
    )
    expected = log_likelihoods(own, tasks)
    found = log_likelihoods(served, tasks)
    assert len(found) == 16
    assert found == pytest.approx(expected, abs=1e-3)
