import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import GPT2LMHeadModel, set_seed

from pipeline.errors import UserError
from pipeline.params import FinetuneParams, SamplesParams
from pipeline.tokens import TokenArrays, load_tokens, write_tokens
from pipeline.training import trainer
from pipeline.training.packing import PackedRows
from pipeline.training.resume import ResumeState
from pipeline.training.samples import generate_samples
from pipeline.training.trainer import Curves, finetune_model, training_arguments

pytestmark = pytest.mark.usefixtures("one_thread")

CONTEXT_LENGTH = 48
SAMPLES = SamplesParams(prompts=["", "The lamp"], temperature=0.8, top_p=0.95, max_new_tokens=8, seed=3)
TRAINING_TEXTS = ["The lamp on Gull Rock.", "Nobody said so.", "The tide, the lamp, the rock.", "A second oven."]
VALIDATION_TEXTS = ["The lamp on the rock, and the tide that nobody had seen. They say it took her.", "N", "Gull Rock."]


class Recorder:
    """A log of metrics that keeps them."""

    def __init__(self) -> None:
        self.metrics: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, values: dict[str, float], step: int) -> None:
        self.metrics.append((step, values))


@pytest.fixture(autouse=True)
def float32_on_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever machine this is: losses are compared more closely than bfloat16 holds them."""
    monkeypatch.setattr(trainer, "supports_bfloat16", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def packed(tiny_tokenizer: Tokenizer, tmp_path: Path) -> Callable[[Sequence[str]], PackedRows]:
    """Texts as packed rows, in a folder of the test's own."""

    def pack(texts: Sequence[str]) -> PackedRows:
        folder = tmp_path / f"tokens{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        write_tokens(folder, texts, tiny_tokenizer, "digest")
        return PackedRows(load_tokens(folder, "digest"), context_length=CONTEXT_LENGTH, row_tokens=CONTEXT_LENGTH)

    return pack


def finetune_params(**changes: Any) -> FinetuneParams:
    values: dict[str, Any] = {
        "seed": 1,
        "context_length": CONTEXT_LENGTH,
        "row_tokens": CONTEXT_LENGTH,
        "batch_rows": 1,
        "gradient_accumulation_steps": 1,
        "epochs": 5.0,
        "learning_rate": 0.01,
        "warmup_share": 0.1,
        "weight_decay": 0.1,
        "optimizer": "adamw",
        "dropout": None,
        "attention_dropout": None,
        "max_grad_norm": 1.0,
        "evaluations": 3,
        "early_stopping_patience": 10,
        "samples": SAMPLES,
    }
    return FinetuneParams(**{**values, **changes})


def run(
    model: GPT2LMHeadModel,
    train: PackedRows,
    validation: PackedRows,
    folder: Path,
    params: FinetuneParams,
    on_evaluation: Callable[[GPT2LMHeadModel, int], None] = lambda model, step: None,
    resume_from: Path | None = None,
) -> tuple[Curves, Recorder]:
    log = Recorder()
    curves = finetune_model(
        model,
        train,
        validation,
        params,
        end_of_text_id=0,
        work_folder=folder / "work",
        log=log,
        on_evaluation=on_evaluation,
        resume_from=resume_from,
    )
    return curves, log


class Killed(BaseException):
    """Stands in for a signal that cannot be caught."""


@pytest.mark.parametrize("killed_at", [1, 8, 9, 13, 24])
def test_an_interrupted_training_ends_as_if_it_had_not_been(
    killed_at: int,
    tiny_model: GPT2LMHeadModel,
    packed: Callable[[Sequence[str]], PackedRows],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With dropout, early stopping's patience and the order of rows; killed before, at and after checkpoints."""
    train, validation = packed(TRAINING_TEXTS * 2), packed(VALIDATION_TEXTS)
    params = finetune_params(epochs=12.0, evaluations=3, dropout=0.1)
    start = {name: weight.clone() for name, weight in tiny_model.state_dict().items()}
    curves, log = run(tiny_model, train, validation, tmp_path / "whole", params)
    expected = {name: weight.clone() for name, weight in tiny_model.state_dict().items()}
    assert [step for step, _ in curves.validation] == [0, 8, 16, 24]

    tiny_model.load_state_dict(start)
    step = trainer.PackedTrainer.training_step
    steps = 0

    def training_step(self: Any, *arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == killed_at:
            raise Killed
        return step(self, *arguments)

    monkeypatch.setattr(trainer.PackedTrainer, "training_step", training_step)
    with pytest.raises(Killed):
        run(tiny_model, train, validation, tmp_path / "parts", params)
    monkeypatch.setattr(trainer.PackedTrainer, "training_step", step)
    state = ResumeState(tmp_path / "parts" / "work")
    assert (state.checkpoint is None) == (killed_at <= 8)

    # Whatever is in the model by then, the checkpoint has the weights.
    tiny_model.load_state_dict(start)
    set_seed(99 if state.checkpoint else params.seed)
    found, rest = run(tiny_model, train, validation, tmp_path / "parts", params, resume_from=state.checkpoint)
    assert found == curves
    for name, weight in tiny_model.state_dict().items():
        assert torch.equal(weight, expected[name]), name
    assert [step for step, _ in rest.metrics] == [step for step, _ in log.metrics][-len(rest.metrics) :]


def loss_by_hand(model: GPT2LMHeadModel, tokens: TokenArrays) -> float:
    """Mean over all labels of all documents, each run alone."""
    losses = []
    model.eval()
    with torch.inference_mode():
        for index in range(len(tokens)):
            ids = torch.from_numpy(tokens.document(index).astype(np.int64))
            assert len(ids) <= CONTEXT_LENGTH
            logits = model(ids[None], use_cache=False).logits[0]
            losses.append(torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none"))
    return torch.cat(losses).mean().item()


def test_training_memorises_a_toy_set_and_keeps_curves(
    tiny_model: GPT2LMHeadModel, packed: Callable[[Sequence[str]], PackedRows], tmp_path: Path
) -> None:
    train = packed(TRAINING_TEXTS)
    curves, log = run(tiny_model, train, train, tmp_path, finetune_params(epochs=20.0, evaluations=4))
    steps = 20 * len(train)
    assert [step for step, _ in curves.validation] == [0, steps // 4, steps // 2, 3 * steps // 4, steps]
    assert curves.best_validation[1] < 0.5 * curves.validation[0][1]
    assert curves.train[-1][0] == steps
    logged = [(step, values["validation_loss"]) for step, values in log.metrics if "validation_loss" in values]
    assert logged == curves.validation
    assert all(
        values["validation_perplexity"] == pytest.approx(math.exp(values["validation_loss"]))
        for _, values in log.metrics
        if "validation_loss" in values
    )


@pytest.mark.parametrize("evaluations", [1, 3, 4, 7, 10])
def test_the_validation_split_is_scored_as_often_as_asked_and_at_the_end(
    evaluations: int, tiny_model: GPT2LMHeadModel, packed: Callable[[Sequence[str]], PackedRows], tmp_path: Path
) -> None:
    train = packed(["N"])
    curves, _ = run(tiny_model, train, train, tmp_path, finetune_params(epochs=10.0, evaluations=evaluations))
    steps = [step for step, _ in curves.validation]
    assert steps[0] == 0
    assert len(steps) == 1 + evaluations
    assert steps[-1] == 10
    gaps = {after - before for before, after in pairwise(steps)}
    assert max(gaps) - min(gaps) <= 1


def test_validation_loss_weighs_every_token_alike(
    tiny_model: GPT2LMHeadModel, packed: Callable[[Sequence[str]], PackedRows], tmp_path: Path
) -> None:
    validation = packed(VALIDATION_TEXTS)
    assert len(validation) > 1
    expected = loss_by_hand(tiny_model, validation.tokens)
    curves, _ = run(tiny_model, packed(["N"]), validation, tmp_path, finetune_params(epochs=1.0, evaluations=1))
    assert curves.validation[0][1] == pytest.approx(expected, rel=1e-5)
    assert curves.validation[-1][1] == pytest.approx(loss_by_hand(tiny_model, validation.tokens), rel=1e-5)


def test_the_best_checkpoints_weights_are_left_in_the_model(
    tiny_model: GPT2LMHeadModel, packed: Callable[[Sequence[str]], PackedRows], tmp_path: Path
) -> None:
    validation = packed(VALIDATION_TEXTS)
    # A rate so high that what is learned first is lost again.
    params = finetune_params(epochs=12.0, evaluations=12, learning_rate=0.05, warmup_share=0.0)
    curves, _ = run(tiny_model, packed(TRAINING_TEXTS[:1]), validation, tmp_path, params)
    step, loss = curves.best_validation
    assert step < curves.validation[-1][0]
    assert loss < curves.validation[-1][1]
    assert loss_by_hand(tiny_model, validation.tokens) == pytest.approx(loss, rel=1e-5)


def test_training_stops_when_validation_no_longer_improves(
    tiny_model: GPT2LMHeadModel, packed: Callable[[Sequence[str]], PackedRows], tmp_path: Path
) -> None:
    params = finetune_params(
        epochs=40.0, evaluations=40, learning_rate=0.05, warmup_share=0.0, early_stopping_patience=2
    )
    curves, _ = run(tiny_model, packed(TRAINING_TEXTS[:1]), packed(VALIDATION_TEXTS), tmp_path, params)
    best_step, _ = curves.best_validation
    assert curves.validation[-1][0] == best_step + 2 < 40


def test_the_same_seed_gives_the_same_weights(
    tiny_checkpoint: Path, packed: Callable[[Sequence[str]], PackedRows], tmp_path: Path
) -> None:
    train, validation = packed(TRAINING_TEXTS), packed(VALIDATION_TEXTS)
    weights: list[torch.Tensor] = []
    for seed in (1, 1, 2):
        model = GPT2LMHeadModel.from_pretrained(tiny_checkpoint, attn_implementation="sdpa", resid_pdrop=0.3)
        run(model, train, validation, tmp_path / str(len(weights)), finetune_params(epochs=3.0, seed=seed))
        weights.append(torch.cat([weight.detach().flatten() for weight in model.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_samples_while_training_change_nothing_of_it(
    tiny_checkpoint: Path, tiny_tokenizer: Tokenizer, packed: Callable[[Sequence[str]], PackedRows], tmp_path: Path
) -> None:
    train = packed(TRAINING_TEXTS)
    weights: list[torch.Tensor] = []
    for sampled in (False, True):
        model = GPT2LMHeadModel.from_pretrained(tiny_checkpoint, attn_implementation="sdpa", resid_pdrop=0.3)
        taken: list[int] = []

        def take(model: GPT2LMHeadModel, step: int, sampled: bool = sampled, taken: list[int] = taken) -> None:
            if sampled:
                generate_samples(model, tiny_tokenizer, SAMPLES)
                taken.append(step)

        run(model, train, train, tmp_path / str(sampled), finetune_params(epochs=2.0, evaluations=2), take)
        weights.append(torch.cat([weight.detach().flatten() for weight in model.parameters()]))
    assert len(taken) == 3
    assert torch.equal(weights[0], weights[1])


def test_training_and_scoring_run_without_cache_or_mask(
    tiny_model: GPT2LMHeadModel, packed: Callable[[Sequence[str]], PackedRows], tmp_path: Path
) -> None:
    """Or packed documents would attend to each other: see `test_packing.py`."""
    seen: list[tuple[bool, bool, bool]] = []

    def look(module: torch.nn.Module, arguments: Any, keywords: dict[str, Any], output: Any) -> None:
        seen.append((module.training, "attention_mask" in keywords, output.past_key_values is not None))
        assert keywords["position_ids"] is not None

    tiny_model.register_forward_hook(look, with_kwargs=True)
    train = packed(TRAINING_TEXTS)
    run(tiny_model, train, train, tmp_path, finetune_params(epochs=1.0, evaluations=1))
    assert set(seen) == {(True, False, False), (False, False, False)}
    assert tiny_model.config.use_cache


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_told(
    weight: float, tiny_model: GPT2LMHeadModel, packed: Callable[[Sequence[str]], PackedRows], tmp_path: Path
) -> None:
    rows = packed(TRAINING_TEXTS)
    with torch.no_grad():
        tiny_model.transformer.ln_f.bias[0] = weight
    with pytest.raises(UserError, match=r"^finetune: the (training|validation) loss is nan at step \d; lower finetune"):
        run(tiny_model, rows, rows, tmp_path, finetune_params())


def test_a_validation_loss_beyond_any_perplexity_is_told(
    tiny_model: GPT2LMHeadModel, packed: Callable[[Sequence[str]], PackedRows], tmp_path: Path
) -> None:
    rows = packed(TRAINING_TEXTS)
    with torch.no_grad():
        tiny_model.transformer.ln_f.weight *= 10_000
    curves, log = run(tiny_model, rows, rows, tmp_path, finetune_params(epochs=1.0, evaluations=1))
    assert curves.validation[0][1] > 1000
    assert log.metrics[0][1]["validation_perplexity"] == math.inf


def test_more_evaluations_than_steps_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^finetune\.evaluations: 7 evaluations do not fit in 6 optimizer steps"):
        training_arguments(
            finetune_params(evaluations=7, epochs=3.0, batch_rows=2, gradient_accumulation_steps=2),
            train_rows=7,
            work_folder=tmp_path,
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU")
def test_fine_tuning_takes_bfloat16_and_the_fused_optimizer(tmp_path: Path) -> None:
    arguments = training_arguments(finetune_params(), train_rows=1000, work_folder=tmp_path)
    assert arguments.bf16 == trainer.supports_bfloat16()
    assert arguments.optim == "adamw_torch_fused"
    assert not arguments.use_cpu
    if torch.cuda.get_device_capability() >= (8, 0):
        assert torch.backends.cuda.matmul.allow_tf32
