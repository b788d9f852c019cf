import csv
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy_project import Project
from transformers import GPT2LMHeadModel

from pipeline import tracking
from pipeline.decoding import ModelDecoding, read_decoding
from pipeline.engine import Engine, cuda
from pipeline.files import read_json, read_jsonl, sha256_file
from pipeline.params import PARAMS_FILE, read_yaml
from pipeline.stages import evaluate as stage
from pipeline.stages.evaluate import evaluate, leading_words, score_documents
from pipeline.tokens import TokenArrays, load_tokenizer, load_tokens, tokenizer_sha256

FILES = {"metrics.json", "samples.jsonl", "loss_by_position.csv", "copies.csv", "decoding.json", "presets.json"}
OF_SAMPLES = {
    *("rep_2", "rep_3", "rep_4", "distinct_1", "distinct_2", "distinct_3", "looping_share", "longest_copy_tokens"),
    *("mean_longest_copy_tokens", "form_share", "mean_tokens", "finished_share"),
}
CHECKPOINTS = {"base": "base", "finetuned": "finetune/checkpoint"}


@pytest.fixture
def metrics(project: Project) -> dict[str, Any]:
    return dict(read_json(project.out / "evaluate" / "metrics.json"))


@pytest.fixture
def rows(project: Project) -> list[dict[str, Any]]:
    return list(read_jsonl(project.out / "evaluate" / "samples.jsonl"))


@pytest.fixture
def tokens(project: Project) -> TokenArrays:
    return load_tokens(project.out / "tokenize" / "test", tokenizer_sha256(project.out / "base"))


@pytest.fixture
def texts(project: Project) -> list[str]:
    return [row["text"] for row in read_jsonl(project.out / "prepare" / "test.jsonl")]


def reference_losses(model: GPT2LMHeadModel, document: list[int], stride: int) -> list[float]:
    """Loss in nats of every token but the first, each predicted by PyTorch from the tokens its window holds.

    A window of the whole context moves on by `stride`; a token counts in the first one that reaches it.
    """
    context_length = model.config.n_positions

    @cache
    def logprobs(start: int, end: int) -> torch.Tensor:
        with torch.inference_mode():
            return torch.log_softmax(model(torch.tensor([document[start:end]])).logits[0].double(), dim=-1)

    losses = []
    for position in range(1, len(document)):
        moves = max(0, math.ceil((position + 1 - context_length) / stride))
        end = min(len(document), context_length + moves * stride)
        start = max(0, end - context_length)
        losses.append(-float(logprobs(start, end)[position - 1 - start, document[position]]))
    return losses


def table(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_every_figure_is_there(project: Project, metrics: dict[str, Any]) -> None:
    assert {file.name for file in (project.out / "evaluate").iterdir()} == FILES
    assert set(metrics) == {"protocol", "human", "base", "finetuned"}
    assert set(metrics["human"]) == OF_SAMPLES
    assert set(metrics["base"]) == set(metrics["finetuned"]) == OF_SAMPLES | {"perplexity", "bits_per_byte"}


def test_the_protocol_says_how_the_figures_were_taken(
    project: Project, metrics: dict[str, Any], tokens: TokenArrays, texts: list[str]
) -> None:
    assert metrics["protocol"] == {
        "split": "test",
        "documents": len(texts),
        "scored_tokens": len(tokens.tokens) - 1,
        "text_bytes": sum(len(text.encode()) for text in texts),
        "window_tokens": 64,
        "stride_tokens": project.params.evaluate.stride_tokens,
        "tokenizer_sha256": tokenizer_sha256(project.out / "base"),
        "provider": "cpu" if cuda.obstacles() else "cuda",
        "precision": "float32",
        "samples": project.params.evaluate.samples,
    }


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_perplexity_and_bits_a_byte_are_those_of_pytorch(
    name: str, project: Project, metrics: dict[str, Any], tokens: TokenArrays, texts: list[str]
) -> None:
    model = GPT2LMHeadModel.from_pretrained(project.out / CHECKPOINTS[name]).eval()
    documents = [tokens.document(index).tolist() for index in range(len(tokens))]
    assert max(map(len, documents)) > model.config.n_positions + project.params.evaluate.stride_tokens
    losses = [
        loss
        for document in documents
        for loss in reference_losses(model, document, project.params.evaluate.stride_tokens)
    ]
    text_bytes = sum(len(text.encode()) for text in texts)
    assert metrics[name]["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    assert metrics[name]["bits_per_byte"] == pytest.approx(sum(losses) / math.log(2) / text_bytes, rel=1e-5)


@pytest.mark.parametrize("stride_tokens", [1, 17, 63])
def test_every_token_of_a_long_document_is_scored_once(
    stride_tokens: int, tokens: TokenArrays, tiny_engine: Engine
) -> None:
    losses = score_documents(tiny_engine, tokens, stride_tokens)
    assert [len(own) for own in losses] == [length - 1 for length in tokens.document_tokens()]
    assert all((own > 0).all() for own in losses)


def test_samples_of_models_and_people_stand_side_by_side(
    project: Project, rows: list[dict[str, Any]], texts: list[str]
) -> None:
    params = project.params.evaluate
    assert [row["model"] for row in rows] == [
        name for name in ("human", "base", "finetuned") for _ in range(params.samples)
    ]
    by_model = {name: [row for row in rows if row["model"] == name] for name in ("human", "base", "finetuned")}
    prompts = [leading_words(text, params.prompt_words) for text in texts]
    for own in by_model.values():
        # More samples than documents: they come round again.
        assert [row["prompt"] for row in own] == [prompts[index % len(texts)] for index in range(params.samples)]
        assert all(row["tokens"] <= params.decoding.max_new_tokens for row in own)
        assert {row["finish_reason"] for row in own} <= {"stop", "length"}
    for row, text in zip(by_model["human"], texts, strict=False):
        assert text.startswith(row["prompt"] + row["text"].rstrip("�"))
        assert (row["seed"], row["decoding"]) == (None, None)
    for name in ("base", "finetuned"):
        assert [row["seed"] for row in by_model[name]] == [params.seed + index for index in range(params.samples)]
        assert all(row["decoding"] == params.decoding.to_mapping() for row in by_model[name])


def test_samples_do_not_depend_on_their_batches(
    project: Project, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = [row for row in rows if row["model"] == "finetuned"]
    tokenizer = load_tokenizer(project.out / "export" / "engine")
    engine = Engine.load(project.out / "export" / "engine", provider="cpu")
    monkeypatch.setattr(stage, "BATCH_SAMPLES", 2)
    samples = stage.generate(engine, tokenizer, [row["prompt"] for row in own], project.params.evaluate, "finetuned")
    assert [sample.text for sample in samples] == [row["text"] for row in own]


def test_the_same_inputs_give_the_same_bytes(project: Project, tmp_path: Path) -> None:
    out = project.out
    evaluate(out / "export", out / "prepare", out / "tokenize", tmp_path / "out", project.params.evaluate)
    for name in FILES:
        assert sha256_file(tmp_path / "out" / name) == sha256_file(out / "evaluate" / name), name


def test_the_decoding_that_was_measured_is_what_the_model_brings(project: Project) -> None:
    out = project.out / "evaluate"
    assert read_decoding(out / "decoding.json", out / "presets.json") == ModelDecoding(project.params.evaluate.decoding)


def test_loss_by_position_averages_to_the_loss(project: Project, metrics: dict[str, Any], tokens: TokenArrays) -> None:
    rows = table(project.out / "evaluate" / "loss_by_position.csv")
    width = stage.POSITION_BIN_TOKENS
    counts = np.zeros(len(rows))
    for length in tokens.document_tokens():
        counts += np.clip(length - 1 - width * np.arange(len(rows)), 0, width)
    assert [int(row["position"]) for row in rows] == [width * index + width // 2 for index in range(len(rows))]
    for name in CHECKPOINTS:
        mean = np.average([float(row[name]) for row in rows], weights=counts)
        assert math.exp(mean) == pytest.approx(metrics[name]["perplexity"])


def test_copies_stand_longest_first(project: Project, metrics: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    ranked = table(project.out / "evaluate" / "copies.csv")
    for name in ("human", "base", "finetuned"):
        lengths = [int(row[name]) for row in ranked]
        copies = [row["longest_copy_tokens"] for row in rows if row["model"] == name]
        assert lengths == sorted(copies, reverse=True)
        assert lengths[0] == metrics[name]["longest_copy_tokens"]


def test_scores_and_samples_are_in_a_child_of_the_run(project: Project, metrics: dict[str, Any]) -> None:
    with project.entered():
        client = tracking.connect()
        parent = read_json(project.out / "finetune" / "run.json")["run_id"]
        child = tracking.find_child(client, parent, "evaluate")
        assert child is not None
        run = client.get_run(child)
        artifacts = {file.path for file in client.list_artifacts(child)}
    for name in CHECKPOINTS:
        assert run.data.metrics[f"{name}/bits_per_byte"] == metrics[name]["bits_per_byte"]
    assert run.data.params["evaluate.seed"] == str(read_yaml(project.root / PARAMS_FILE)["evaluate"]["seed"])
    assert artifacts == FILES | {"samples.json", "parity.json"}
    assert run.data.metrics["parity.float32/next_token_agreement"] == 1.0


@pytest.mark.parametrize(
    ("text", "count", "leading"),
    [
        ("one two  three four", 3, "one two  three"),
        ("# A Lamp\n\nIt went out", 4, "# A Lamp\n\nIt"),
        ("one two", 3, "one two"),
        ("one two", 0, ""),
        ("", 3, ""),
    ],
)
def test_a_prompt_is_words_with_what_stands_between_them(text: str, count: int, leading: str) -> None:
    assert leading_words(text, count) == leading
