"""`evaluate`: its figures agree with PyTorch and with the samples, and its choice is what the model ships."""

import csv
import math
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy_project import Project
from transformers import GPT2LMHeadModel

from pipeline.corpus.words import leading_words
from pipeline.decoding import ModelDecoding, SamplingParams, read_decoding
from pipeline.engine import Engine
from pipeline.engine.cuda import driver
from pipeline.evaluation import systems
from pipeline.evaluation.documents import POSITION_BIN_TOKENS, score_documents
from pipeline.evaluation.systems import choose_decoding
from pipeline.files import read_json, read_jsonl, sha256_file
from pipeline.params.section import PARAMS_FILE, read_yaml
from pipeline.quality.comparison import Comparison
from pipeline.quality.distance import Distance, SetFigures
from pipeline.stages.evaluate import evaluate
from pipeline.tokens import TokenArrays, load_tokenizer, load_tokens, tokenizer_sha256
from pipeline.tracking import store

FILES = {
    *("metrics.json", "details.json", "samples.jsonl", "loss_by_position.csv", "copies.csv"),
    *("decoding.json", "presets.json", "report.html"),
}
OF_SAMPLES = {
    *("rep_2", "rep_3", "rep_4", "distinct_1", "distinct_2", "distinct_3", "zipf", "self_bleu", "base_perplexity"),
    *("invented_words", "lone_names", "joined_words", "doubled_words", "broken_quotes", "broken_sentences"),
    *(
        "empty_share",
        "looping_share",
        "longest_copy_tokens",
        "mean_copy_tokens",
        "mean_tokens",
        "finished_share",
    ),
    "mauve",
}
OF_DISTANCE = {"excess", "distance", "distance_low", "distance_high", "too_tame", "too_wild"}
DECODINGS = ("hand_set", "tuned", "guarded", "greedy", "sampling", "untuned_base")
SYSTEMS = ("human", *DECODINGS)
CHECKPOINTS = {"base": "base", "finetuned": "finetune/checkpoint"}


@pytest.fixture
def details(project: Project) -> dict[str, Any]:
    return dict(read_json(project.out / "evaluate" / "details.json"))


@pytest.fixture
def figures(details: dict[str, Any]) -> dict[str, dict[str, float]]:
    return dict(details["systems"])


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


def test_every_figure_is_there(project: Project, details: dict[str, Any], figures: dict[str, dict[str, float]]) -> None:
    assert {file.name for file in (project.out / "evaluate").iterdir()} == FILES
    assert set(details) == {"protocol", "documents", "systems", "scales", "choice"}
    assert set(details["documents"]) == {"base", "finetuned"}
    assert all(set(losses) == {"perplexity", "bits_per_byte"} for losses in details["documents"].values())
    assert set(figures) == set(SYSTEMS)
    # No text of 12 tokens has the form of a tale, so `form_share` is left out.
    assert set(figures["human"]) == OF_SAMPLES
    assert "form_share" not in details["scales"]
    assert "form_share" not in (project.out / "evaluate" / "report.html").read_text(encoding="utf-8")
    for name in DECODINGS:
        assert set(figures[name]) == OF_SAMPLES | OF_DISTANCE
        assert figures[name]["distance_low"] <= figures[name]["distance"] <= figures[name]["distance_high"]


def test_the_metrics_are_few_numbers_to_compare(project: Project, details: dict[str, Any]) -> None:
    parity = read_json(project.out / "export" / "parity.json")["float32"]
    files = (project.out / "export" / "engine" / "float32").iterdir()
    kept = details["systems"][details["choice"]["kept"]]
    assert read_json(project.out / "evaluate" / "metrics.json") == {
        "base_test_bits_per_byte": details["documents"]["base"]["bits_per_byte"],
        "test_bits_per_byte": details["documents"]["finetuned"]["bits_per_byte"],
        "base_test_perplexity": details["documents"]["base"]["perplexity"],
        "test_perplexity": details["documents"]["finetuned"]["perplexity"],
        "test_excess": kept["excess"],
        "test_distance": kept["distance"],
        "invented_words": kept["invented_words"],
        "longest_copy_tokens": kept["longest_copy_tokens"],
        "kl_divergence": parity["kl_divergence"],
        "engine_megabytes": round(sum(file.stat().st_size for file in files) / 1e6, 1),
    }


def test_the_protocol_says_how_the_figures_were_taken(
    project: Project, details: dict[str, Any], tokens: TokenArrays, texts: list[str]
) -> None:
    assert details["protocol"] == {
        "split": "test",
        "documents": len(texts),
        "scored_tokens": len(tokens.tokens) - 1,
        "text_bytes": sum(len(text.encode()) for text in texts),
        "window_tokens": 64,
        "stride_tokens": project.params.evaluate.stride_tokens,
        "tokenizer_sha256": tokenizer_sha256(project.out / "base"),
        "provider": "cpu" if driver.obstacles() else "cuda",
        "precision": "float32",
        # Fewer documents than samples were asked for.
        "samples": len(texts),
        "guard_tokens": project.params.evaluate.guard_tokens,
        "copy_tokens": systems.COPY_TOKENS,
        "repeat_tokens": systems.REPEAT_TOKENS,
    }


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_perplexity_and_bits_per_byte_are_those_of_pytorch(
    name: str, project: Project, details: dict[str, Any], tokens: TokenArrays, texts: list[str]
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
    found = details["documents"][name]
    assert found["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(sum(losses) / math.log(2) / text_bytes, rel=1e-5)


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
    assert [row["system"] for row in rows] == [name for name in SYSTEMS for _ in texts]
    prompts = [leading_words(text, project.params.samples.prompt_words) for text in texts]
    by_system = {name: [row for row in rows if row["system"] == name] for name in SYSTEMS}
    for own in by_system.values():
        assert [row["prompt"] for row in own] == prompts
        assert all(row["tokens"] <= params.decoding.max_new_tokens for row in own)
        assert {row["finish_reason"] for row in own} <= {"stop", "length"}
    for row, text in zip(by_system["human"], texts, strict=True):
        assert text.startswith(row["prompt"] + row["text"].rstrip("�"))
        assert (row["seed"], row["decoding"]) == (None, None)
    for name in DECODINGS:
        assert [row["seed"] for row in by_system[name]] == [params.seed + index for index in range(len(texts))]


def test_each_system_is_decoded_as_its_name_says(project: Project, rows: list[dict[str, Any]]) -> None:
    hand_set, found = project.params.evaluate.decoding, read_json(project.out / "tune" / "found.json")["balanced"]
    given = {row["system"]: SamplingParams.from_mapping(row["decoding"]) for row in rows if row["decoding"] is not None}
    tuned = replace(hand_set, **found)
    assert given == {
        "hand_set": hand_set,
        "tuned": tuned,
        "guarded": replace(tuned, max_verbatim_tokens=project.params.evaluate.guard_tokens),
        "greedy": SamplingParams(temperature=0, max_new_tokens=hand_set.max_new_tokens),
        "sampling": SamplingParams(max_new_tokens=hand_set.max_new_tokens),
        "untuned_base": hand_set,
    }


def test_without_an_index_nothing_is_guarded(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    params = project.params.evaluate
    assert "guarded" not in systems.decodings_of(params, {}, holds_index=False)
    assert "evaluate.guard_tokens: left out, as the engine holds no index" in capsys.readouterr().err
    assert "guarded" not in systems.decodings_of(params.model_copy(update={"guard_tokens": None}), {}, holds_index=True)
    assert capsys.readouterr().err == ""


def test_marks_stand_where_a_sample_copies_or_repeats(project: Project, rows: list[dict[str, Any]]) -> None:
    tokenizer = load_tokenizer(project.out / "base")
    train = load_tokens(project.out / "tokenize" / "train", tokenizer_sha256(project.out / "base")).tokens
    trained = " ".join(map(str, train.tolist()))
    (long,) = (row for row in rows if row["system"] == "human" and row["prompt"].startswith("Nobody"))
    # Its one sentence comes again and again, up to the limit of tokens.
    assert long["copied_spans"] == []
    for row in rows:
        for start, end in row["copied_spans"]:
            copied = tokenizer.encode(row["text"][start:end]).ids
            assert " ".join(map(str, copied[1:-1])) in trained
        for kind in ("copied_spans", "repeated_spans"):
            edges = [edge for span in row[kind] for edge in span]
            assert edges == sorted(set(edges))
            assert all(0 <= edge <= len(row["text"]) for edge in edges)


def test_figures_of_a_system_are_those_of_its_samples(
    figures: dict[str, dict[str, float]], rows: list[dict[str, Any]]
) -> None:
    for name in SYSTEMS:
        own = [row for row in rows if row["system"] == name]
        assert figures[name]["mean_tokens"] == pytest.approx(np.mean([row["tokens"] for row in own]))
        copies = [row["longest_copy_tokens"] for row in own]
        assert figures[name]["mean_copy_tokens"] == pytest.approx(np.mean(copies))
        assert figures[name]["longest_copy_tokens"] == max(copies)
        assert figures[name]["looping_share"] == pytest.approx(np.mean([row["looping"] for row in own]))
        stopped = [row["finish_reason"] == "stop" for row in own]
        assert figures[name]["finished_share"] == pytest.approx(np.mean(stopped))


def test_the_same_inputs_give_the_same_bytes(project: Project, tmp_path: Path) -> None:
    out = project.out
    folders = (out / name for name in ("export", "prepare", "tokenize", "finetune", "tune"))
    with project.entered():
        evaluate(*folders, tmp_path / "out", project.params.evaluate, project.params.samples)
    for name in FILES:
        assert sha256_file(tmp_path / "out" / name) == sha256_file(out / "evaluate" / name), name


def comparison(*distances: float, excess: float = 0.0) -> Comparison:
    """A set of samples at these distances without each of its prompts, and at their mean."""
    scores = SetFigures(**dict.fromkeys((field.name for field in fields(SetFigures)), 1.0))
    total = float(np.mean(distances))
    return Comparison(scores, Distance(total, {}, 0.0, 0.0, excess, {}), np.array(distances))


def test_the_tuned_decoding_is_kept_where_it_is_nearer_beyond_chance() -> None:
    hand_set = comparison(9.0, 9.1, 9.2, 8.9)
    near, about = comparison(5.0, 5.1, 5.2, 4.9), comparison(5.0, 13.0, 5.0, 5.0)
    assert choose_decoding(near, hand_set) == {
        "kept": "tuned",
        "tuned_excess": 0.0,
        "hand_set_excess": 0.0,
        "difference": pytest.approx(-4.0),
        "difference_low": pytest.approx(-4.0),
        "difference_high": pytest.approx(-4.0),
    }
    chance = choose_decoding(about, hand_set)
    assert chance["kept"] == "hand_set"
    assert chance["difference_low"] < chance["difference"] < 0 < chance["difference_high"]
    assert choose_decoding(hand_set, near)["kept"] == "hand_set"
    assert choose_decoding(hand_set, hand_set)["kept"] == "hand_set"


def test_fewer_faults_are_kept_whatever_is_nearer() -> None:
    far, near = comparison(9.0, 9.1, 9.2, 8.9), comparison(5.0, 5.1, 5.2, 4.9, excess=0.5)
    assert choose_decoding(far, near)["kept"] == "tuned"
    assert choose_decoding(near, far)["kept"] == "hand_set"
    worse = comparison(5.0, 5.1, 5.2, 4.9, excess=1.5)
    assert choose_decoding(near, worse)["kept"] == "tuned"


def test_what_was_chosen_is_what_the_model_brings(project: Project, details: dict[str, Any]) -> None:
    hand_set, tune = project.params.evaluate.decoding, project.out / "tune"
    presets = {name: replace(hand_set, **values) for name, values in read_json(tune / "found.json").items()}
    kept = {"hand_set": hand_set, "tuned": presets["balanced"]}[details["choice"]["kept"]]
    out = project.out / "evaluate"
    assert read_decoding(out / "decoding.json", out / "presets.json") == ModelDecoding(kept, presets)


def test_the_report_is_of_this_evaluation(
    project: Project, details: dict[str, Any], figures: dict[str, dict[str, float]]
) -> None:
    page = (project.out / "evaluate" / "report.html").read_text()
    assert f"{details['documents']['finetuned']['bits_per_byte']:.3f} bits per byte" in page
    assert f"{figures['tuned']['distance']:.2f}" in page
    with project.entered():
        # An id would differ from one machine to the next.
        assert project.run_of("finetune") not in page


def test_loss_by_position_averages_to_the_loss(project: Project, details: dict[str, Any], tokens: TokenArrays) -> None:
    rows = table(project.out / "evaluate" / "loss_by_position.csv")
    width = POSITION_BIN_TOKENS
    counts = np.zeros(len(rows))
    for length in tokens.document_tokens():
        counts += np.clip(length - 1 - width * np.arange(len(rows)), 0, width)
    assert [int(row["position"]) for row in rows] == [width * index + width // 2 for index in range(len(rows))]
    for name in CHECKPOINTS:
        mean = np.average([float(row[name]) for row in rows], weights=counts)
        assert math.exp(mean) == pytest.approx(details["documents"][name]["perplexity"])


def test_copies_come_longest_first(
    project: Project, figures: dict[str, dict[str, float]], rows: list[dict[str, Any]]
) -> None:
    ranked = table(project.out / "evaluate" / "copies.csv")
    for name in SYSTEMS:
        lengths = [int(row[name]) for row in ranked]
        copies = [row["longest_copy_tokens"] for row in rows if row["system"] == name]
        assert lengths == sorted(copies, reverse=True)
        assert lengths[0] == figures[name]["longest_copy_tokens"]


def test_scores_and_samples_are_in_a_child_of_the_run(
    project: Project, details: dict[str, Any], figures: dict[str, dict[str, float]]
) -> None:
    with project.entered():
        client = store.connect()
        child = project.run_of("evaluate")
        run = client.get_run(child)
        assert run.data.tags["mlflow.parentRunId"] == project.run_of("finetune")
        artifacts = {file.path for file in client.list_artifacts(child)}
        table = client.load_table(store.experiment_id(client), "decodings.json", run_ids=[child])
    for name in CHECKPOINTS:
        assert run.data.metrics[f"{name}/bits_per_byte"] == details["documents"][name]["bits_per_byte"]
    assert run.data.params["evaluate.seed"] == str(read_yaml(project.root / PARAMS_FILE)["evaluate"]["seed"])
    assert artifacts == FILES | {"decodings.json", "parity.json"}
    assert set(table["system"]) == set(SYSTEMS)
    # MLflow writes ten digits.
    assert table.set_index("system")["zipf"].to_dict() == pytest.approx(
        {name: figures[name]["zipf"] for name in SYSTEMS}
    )
    assert run.data.tags["decoding.kept"] == details["choice"]["kept"]
    assert run.data.metrics["tuned/distance"] == figures["tuned"]["distance"]
    assert run.data.metrics["parity.float32/next_token_agreement"] == 1.0
