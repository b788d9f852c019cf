import math
import threading
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer
from transformers import GPT2LMHeadModel, TrainerState, set_seed

from pipeline.curves import Curves
from pipeline.errors import UserError
from pipeline.params.finetune import FinetuneParams, TrainingSamplesParams
from pipeline.tokens import TokenArrays, load_tokens, write_tokens
from pipeline.training import trainer
from pipeline.training.attention import padded_attention
from pipeline.training.model import load_trainable
from pipeline.training.objective import ScoredGPT2
from pipeline.training.packing import PackedSteps
from pipeline.training.processes import join_processes
from pipeline.training.samples import generate_samples
from pipeline.training.state import TrainingState, step_of
from pipeline.training.stopping import Stopped, is_finished
from pipeline.training.trainer import finetune_model, training_arguments

pytestmark = pytest.mark.usefixtures("one_thread")

CONTEXT_LENGTH = 48
SAMPLES = TrainingSamplesParams(prompts=["", "The lamp"], temperature=0.8, top_p=0.95, max_new_tokens=8, seed=3)
TRAINING_TEXTS = ["The lamp on Gull Rock.", "Nobody said so.", "The tide, the lamp, the rock.", "A second oven."]
VALIDATION_TEXTS = ["The lamp on the rock, and the tide that nobody had seen. They say it took her.", "N", "Gull Rock."]


class Recorder:
    """A metrics log that keeps what it gets."""

    def __init__(self) -> None:
        self.metrics: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, values: dict[str, float], step: int) -> None:
        self.metrics.append((step, values))

    def log_checkpoint(self, step: int, scores: dict[str, float]) -> None:
        self.log_metrics(scores, step)


@pytest.fixture(autouse=True)
def float32_on_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use float32 on any machine: losses are compared more closely than bfloat16 holds them."""
    monkeypatch.setattr(trainer, "supports_bfloat16", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def tokenized(tiny_tokenizer: Tokenizer, tmp_path: Path) -> Callable[[Sequence[str]], TokenArrays]:
    """Turn texts into token arrays, in a folder of the test's own."""

    def tokenize(texts: Sequence[str]) -> TokenArrays:
        folder = tmp_path / f"tokens{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        write_tokens(folder, texts, tiny_tokenizer, "digest")
        return load_tokens(folder, "digest")

    return tokenize


@pytest.fixture
def model(tiny_checkpoint: Path) -> ScoredGPT2:
    return trainable(tiny_checkpoint)


def trainable(checkpoint: Path, **changes: Any) -> ScoredGPT2:
    loaded = load_trainable(checkpoint, finetune_params(**changes))
    assert isinstance(loaded, ScoredGPT2)
    return loaded


def finetune_params(**changes: Any) -> FinetuneParams:
    values: dict[str, Any] = {
        "seed": 1,
        "context_length": CONTEXT_LENGTH,
        "train_share": 1.0,
        "batch_tokens": CONTEXT_LENGTH,
        "device_batch_tokens": None,
        "gradient_checkpointing": False,
        "epochs": 5.0,
        "learning_rate": 0.01,
        "warmup_share": 0.1,
        "weight_decay": 0.1,
        "optimizer": "adamw",
        "layer_decay": 1.0,
        "frozen_layers": 0,
        "lora": None,
        "dropout": None,
        "attention_dropout": None,
        "label_smoothing": 0.0,
        "unlikelihood": 0.0,
        "max_grad_norm": 1.0,
        "fsdp": False,
        "evaluations": 3,
        "early_stopping_patience": 10,
        "samples": SAMPLES,
    }
    return FinetuneParams(**{**values, **changes})


def steps_of(train: TokenArrays, params: FinetuneParams, parts: int = 1) -> PackedSteps:
    return PackedSteps(
        train,
        context_length=CONTEXT_LENGTH,
        batch_tokens=params.batch_tokens,
        epochs=params.epochs,
        seed=params.seed,
        parts=parts,
    )


def run(
    model: GPT2LMHeadModel | PeftModel,
    train: TokenArrays,
    validation: TokenArrays,
    folder: Path,
    params: FinetuneParams,
    on_evaluation: Callable[[GPT2LMHeadModel, int], None] = lambda model, step: None,
    resume_from: Path | None = None,
    parts: int = 1,
    stop: threading.Event | None = None,
) -> tuple[Curves, Recorder]:
    log = Recorder()
    set_seed(params.seed)
    curves = finetune_model(
        model,
        steps_of(train, params, parts),
        PackedSteps(validation, context_length=CONTEXT_LENGTH, batch_tokens=CONTEXT_LENGTH),
        params,
        processes=join_processes(),
        work_folder=folder / "work",
        log=log,
        on_evaluation=on_evaluation,
        resume_from=resume_from,
        stop=stop,
    )
    return curves, log


class Killed(BaseException):
    """Replaces a signal that cannot be caught."""


@pytest.mark.parametrize(
    ("killed_at", "optimizer"),
    [
        (9, "muon"),
        (13, "adamw"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [(1, "adamw"), (8, "adamw"), (13, "muon"), (24, "adamw")]
        ),
    ],
)
def test_an_interrupted_training_ends_like_an_uninterrupted_one(
    killed_at: int,
    optimizer: str,
    tiny_checkpoint: Path,
    tokenized: Callable[[Sequence[str]], TokenArrays],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With dropout, early stopping and the order of windows; killed before, at and after checkpoints."""
    train, validation = tokenized(TRAINING_TEXTS * 2), tokenized(VALIDATION_TEXTS)
    params = finetune_params(epochs=8.0, evaluations=3, dropout=0.1, optimizer=optimizer, batch_tokens=32)
    model = trainable(tiny_checkpoint, dropout=0.1)
    start = {name: weight.clone() for name, weight in model.state_dict().items()}
    curves, log = run(model, train, validation, tmp_path / "whole", params)
    expected = {name: weight.clone() for name, weight in model.state_dict().items()}
    assert [step for step, _ in curves.validation] == [0, 8, 16, 24]

    model.load_state_dict(start)
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
        run(model, train, validation, tmp_path / "parts", params)
    monkeypatch.setattr(trainer.PackedTrainer, "training_step", step)
    state = TrainingState(tmp_path / "parts" / "work")
    assert (state.checkpoint is None) == (killed_at <= 8)

    # Whatever the model holds now, the checkpoint has the weights.
    model.load_state_dict(start)
    found, rest = run(model, train, validation, tmp_path / "parts", params, resume_from=state.checkpoint)
    assert found == curves
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, expected[name]), name
    assert computed(rest) == computed(log)


def computed(log: Recorder) -> list[tuple[int, dict[str, float]]]:
    """Return what a training logged, without what differs from one process to the next."""
    measured = ("tokens_per_second", "peak_memory_mib")
    same = [(step, {name: values[name] for name in values if name not in measured}) for step, values in log.metrics]
    return [(step, values) for step, values in same if values]


def on_step(monkeypatch: pytest.MonkeyPatch, step: int, do: Callable[[ScoredGPT2], None]) -> None:
    """Call `do` with the model after the forward and backward pass of a step, counted from 1."""
    training_step, steps = trainer.PackedTrainer.training_step, 0

    def training_step_then(self: Any, model: ScoredGPT2, *arguments: Any) -> Any:
        nonlocal steps
        loss = training_step(self, model, *arguments)
        steps += 1
        if steps == step:
            do(model)
        return loss

    monkeypatch.setattr(trainer.PackedTrainer, "training_step", training_step_then)


@pytest.mark.parametrize("stopped_at", [2, 12, *(pytest.param(step, marks=pytest.mark.slow) for step in (11, 16))])
def test_a_stopped_training_has_the_curves_of_an_uninterrupted_one(
    stopped_at: int,
    tiny_checkpoint: Path,
    tokenized: Callable[[Sequence[str]], TokenArrays],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped between two points of the training curve, at one, and at an evaluation."""
    monkeypatch.setattr(trainer, "LOGGED_POINTS", 4)
    train, validation = tokenized(TRAINING_TEXTS * 2), tokenized(VALIDATION_TEXTS)
    params = finetune_params(epochs=8.0, evaluations=3, dropout=0.1, batch_tokens=32)
    model = trainable(tiny_checkpoint, dropout=0.1)
    start = {name: weight.clone() for name, weight in model.state_dict().items()}
    curves, log = run(model, train, validation, tmp_path / "whole", params)
    expected = {name: weight.clone() for name, weight in model.state_dict().items()}
    assert [step for step, _ in curves.train] == [6, 8, 12, 16, 18, 24]

    model.load_state_dict(start)
    stop = threading.Event()
    on_step(monkeypatch, stopped_at, lambda _: stop.set())
    with pytest.raises(Stopped, match=f"^{stopped_at}$"):
        run(model, train, validation, tmp_path / "parts", params, stop=stop)
    checkpoint = TrainingState(tmp_path / "parts" / "work").checkpoint
    assert checkpoint is not None
    assert step_of(checkpoint) == stopped_at

    model.load_state_dict(start)
    found, rest = run(model, train, validation, tmp_path / "parts", params, resume_from=checkpoint)
    assert found == curves
    assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())
    assert computed(rest) == computed(log)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda model: model.transformer.ln_f.weight.data.fill_(math.nan), "the training loss is nan at step 11,"),
        (lambda model: model.transformer.ln_f.weight.grad.fill_(math.nan), "the weights are not finite after step 10,"),
    ],
    ids=["loss", "gradient"],
)
def test_what_is_not_finite_is_never_saved(
    spoil: Callable[[ScoredGPT2], None],
    message: str,
    model: ScoredGPT2,
    tokenized: Callable[[Sequence[str]], TokenArrays],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trainer, "LOGGED_POINTS", 1)
    tokens = tokenized(TRAINING_TEXTS * 2)
    params = finetune_params(epochs=8.0, evaluations=3, batch_tokens=32)
    stop = threading.Event()
    on_step(monkeypatch, 10, spoil)
    on_step(monkeypatch, 10 if "10" in message else 11, lambda _: stop.set())
    with pytest.raises(UserError, match=f"^finetune: {message} which learns from .*checkpoint-8$"):
        run(model, tokens, tokens, tmp_path, params, stop=stop)
    checkpoint = TrainingState(tmp_path / "work").checkpoint
    assert checkpoint is not None
    assert step_of(checkpoint) == 8


def test_no_more_than_two_checkpoints_exist_and_one_is_whole(
    model: ScoredGPT2,
    tokenized: Callable[[Sequence[str]], TokenArrays],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A rate so high that the best is not the newest.
    params = finetune_params(epochs=12.0, evaluations=12, learning_rate=0.05, warmup_share=0.0)
    save_random_state = trainer.PackedTrainer._save_rng_state
    counts: list[tuple[int, int]] = []

    def save_random_state_and_count(self: Any, folder: str) -> None:
        save_random_state(self, folder)
        counts.append(tuple(len(list((tmp_path / "work").glob(name))) for name in ("checkpoint-*", "*/whole")))

    monkeypatch.setattr(trainer.PackedTrainer, "_save_rng_state", save_random_state_and_count)
    curves, _ = run(model, tokenized(TRAINING_TEXTS[:1]), tokenized(VALIDATION_TEXTS), tmp_path, params)
    assert curves.best_validation[0] < 12
    assert counts == [(1, 0)] + [(2, 1)] * (len(curves.validation) - 2)


def loss_by_hand(model: GPT2LMHeadModel, tokens: TokenArrays) -> float:
    """Return the mean over all labels of all documents, each run alone."""
    losses = []
    model.eval()
    with torch.inference_mode(), padded_attention(model):
        for index in range(len(tokens)):
            ids = torch.from_numpy(tokens.document(index).astype(np.int64))
            assert len(ids) <= CONTEXT_LENGTH
            logits = model(ids[None], use_cache=False).logits[0]
            losses.append(torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none"))
    return torch.cat(losses).mean().item()


def test_training_memorises_a_toy_set_and_keeps_curves(
    model: ScoredGPT2, tokenized: Callable[[Sequence[str]], TokenArrays], tmp_path: Path
) -> None:
    train = tokenized(TRAINING_TEXTS)
    curves, log = run(model, train, train, tmp_path, finetune_params(epochs=20.0, evaluations=4))
    steps = steps_of(train, finetune_params(epochs=20.0)).steps
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
    evaluations: int, model: ScoredGPT2, tokenized: Callable[[Sequence[str]], TokenArrays], tmp_path: Path
) -> None:
    train = tokenized(["N"])
    curves, _ = run(model, train, train, tmp_path, finetune_params(epochs=10.0, evaluations=evaluations))
    steps = [step for step, _ in curves.validation]
    assert steps[0] == 0
    assert len(steps) == 1 + evaluations
    assert steps[-1] == 10
    gaps = {after - before for before, after in pairwise(steps)}
    assert max(gaps) - min(gaps) <= 1


def test_validation_loss_weighs_every_token_alike(
    model: ScoredGPT2, tokenized: Callable[[Sequence[str]], TokenArrays], tmp_path: Path
) -> None:
    validation = tokenized(VALIDATION_TEXTS)
    assert len(validation) > 1
    expected = loss_by_hand(model, validation)
    curves, _ = run(model, tokenized(["N"]), validation, tmp_path, finetune_params(epochs=1.0, evaluations=1))
    assert curves.validation[0][1] == pytest.approx(expected, rel=1e-5)
    assert curves.validation[-1][1] == pytest.approx(loss_by_hand(model, validation), rel=1e-5)


def test_the_best_checkpoints_weights_are_left_in_the_model(
    model: ScoredGPT2, tokenized: Callable[[Sequence[str]], TokenArrays], tmp_path: Path
) -> None:
    validation = tokenized(VALIDATION_TEXTS)
    # A rate so high that the model loses what it learned first.
    params = finetune_params(epochs=12.0, evaluations=12, learning_rate=0.05, warmup_share=0.0)
    curves, _ = run(model, tokenized(TRAINING_TEXTS[:1]), validation, tmp_path, params)
    step, loss = curves.best_validation
    assert step < curves.validation[-1][0]
    assert loss < curves.validation[-1][1]
    assert loss_by_hand(model, validation) == pytest.approx(loss, rel=1e-5)


def test_training_stops_when_validation_no_longer_improves(
    model: ScoredGPT2, tokenized: Callable[[Sequence[str]], TokenArrays], tmp_path: Path
) -> None:
    params = finetune_params(
        epochs=40.0, evaluations=40, learning_rate=0.05, warmup_share=0.0, early_stopping_patience=2
    )
    curves, _ = run(model, tokenized(TRAINING_TEXTS[:1]), tokenized(VALIDATION_TEXTS), tmp_path, params)
    best_step, _ = curves.best_validation
    assert curves.validation[-1][0] == best_step + 2 < 40


def test_used_up_patience_stays_so(
    tiny_checkpoint: Path, tokenized: Callable[[Sequence[str]], TokenArrays], tmp_path: Path
) -> None:
    """Killed or stopped after the last evaluation, training has nothing left to do but load the best weights."""
    train, validation = tokenized(TRAINING_TEXTS[:1]), tokenized(VALIDATION_TEXTS)
    params = finetune_params(
        epochs=40.0, evaluations=40, learning_rate=0.05, warmup_share=0.0, early_stopping_patience=2
    )
    model = trainable(tiny_checkpoint)
    start = {name: weight.clone() for name, weight in model.state_dict().items()}
    last = 0
    stop = threading.Event()

    def stop_at_the_last_evaluation(model: GPT2LMHeadModel, step: int) -> None:
        if step == last:
            stop.set()

    expected, whole = run(model, train, validation, tmp_path / "whole", params)
    last = expected.validation[-1][0]
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}

    model.load_state_dict(start)
    stopped, _ = run(model, train, validation, tmp_path / "parts", params, stop_at_the_last_evaluation, stop=stop)
    assert stop.is_set()
    assert stopped == expected
    checkpoint = TrainingState(tmp_path / "parts" / "work").checkpoint
    assert checkpoint is not None
    assert step_of(checkpoint) == last < 40

    model.load_state_dict(start)
    resumed, log = run(model, train, validation, tmp_path / "parts", params, resume_from=checkpoint)
    assert resumed == expected
    assert computed(log) == computed(whole)
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize(
    ("losses", "finished"),
    [
        ([], False),
        ([1.0], False),
        ([1.0, 9.0, 8.0], False),
        ([1.0, 9.0, 9.0, 9.0], True),
        ([1.0, 9.0, 8.0, 9.0, 9.0], True),
        ([1.0, 9.0, 9.5, 8.0, 9.0], False),
    ],
)
def test_training_is_finished_without_a_lower_loss_for_as_long_as_patience(losses: list[float], finished: bool) -> None:
    history = [{"step": step, "eval_loss": loss} for step, loss in enumerate(losses)]
    state = TrainerState(global_step=len(losses), max_steps=40, log_history=history)
    assert is_finished(state, patience=2) == finished
    assert is_finished(TrainerState(global_step=40, max_steps=40, log_history=history), patience=2)


def test_the_same_seed_gives_the_same_weights(
    tiny_checkpoint: Path, tokenized: Callable[[Sequence[str]], TokenArrays], tmp_path: Path
) -> None:
    train, validation = tokenized(TRAINING_TEXTS), tokenized(VALIDATION_TEXTS)
    weights: list[torch.Tensor] = []
    for seed in (1, 1, 2):
        model = trainable(tiny_checkpoint, dropout=0.3)
        run(model, train, validation, tmp_path / str(len(weights)), finetune_params(epochs=3.0, seed=seed))
        weights.append(torch.cat([weight.detach().flatten() for weight in model.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_samples_while_training_do_not_change_it(
    tiny_checkpoint: Path, tiny_tokenizer: Tokenizer, tokenized: Callable[[Sequence[str]], TokenArrays], tmp_path: Path
) -> None:
    train = tokenized(TRAINING_TEXTS)
    weights: list[torch.Tensor] = []
    for sampled in (False, True):
        model = trainable(tiny_checkpoint, dropout=0.3)
        taken: list[int] = []

        def take(model: GPT2LMHeadModel, step: int, sampled: bool = sampled, taken: list[int] = taken) -> None:
            if sampled:
                generate_samples(model, tiny_tokenizer, SAMPLES)
                taken.append(step)

        run(model, train, train, tmp_path / str(sampled), finetune_params(epochs=2.0, evaluations=2), take)
        weights.append(torch.cat([weight.detach().flatten() for weight in model.parameters()]))
    assert len(taken) == 3
    assert torch.equal(weights[0], weights[1])


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_a_base_without_a_finite_loss_is_an_error(
    weight: float, model: ScoredGPT2, tokenized: Callable[[Sequence[str]], TokenArrays], tmp_path: Path
) -> None:
    tokens = tokenized(TRAINING_TEXTS)
    with torch.no_grad():
        model.transformer.ln_f.bias[0] = weight
    with pytest.raises(UserError, match=r"^finetune: the validation loss is nan at step 0; lower finetune"):
        run(model, tokens, tokens, tmp_path, finetune_params())


@pytest.mark.parametrize(("spoiled", "shown"), [(math.nan, "nan"), (1e4, "")])
def test_a_loss_that_explodes_is_an_error_with_its_step_and_the_last_good_checkpoint(
    spoiled: float,
    shown: str,
    model: ScoredGPT2,
    tokenized: Callable[[Sequence[str]], TokenArrays],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokens = tokenized(TRAINING_TEXTS)
    params = finetune_params(epochs=5.0, evaluations=5)
    steps, training_step, batches = steps_of(tokens, params, parts=2), trainer.PackedTrainer.training_step, 0
    last = steps.steps

    def training_step_spoiled(self: Any, model: ScoredGPT2, *arguments: Any) -> Any:
        nonlocal batches
        batches += 1
        if batches == 2 * last:
            with torch.no_grad():
                model.transformer.ln_f.weight *= spoiled
        return training_step(self, model, *arguments)

    monkeypatch.setattr(trainer.PackedTrainer, "training_step", training_step_spoiled)
    documents = sorted({window.document + 1 for window in steps.step_windows(last - 1)})
    with pytest.raises(UserError) as caught:
        run(model, tokens, tokens, tmp_path, params, parts=2)
    message = str(caught.value)
    assert message.startswith(f"finetune: the training loss is {shown}")
    assert f" at step {last}, which learns from training documents " in message
    assert f"documents {', '.join(map(str, documents))}; lower finetune.learning_rate" in message
    kept = TrainingState(tmp_path / "work").checkpoint
    assert kept is not None
    assert message.endswith(f"the last good checkpoint is kept in {kept}")


def test_the_loss_that_is_judged_is_that_of_the_whole_step(
    tiny_checkpoint: Path, tokenized: Callable[[Sequence[str]], TokenArrays], tmp_path: Path
) -> None:
    """One batch of six has all labels of a step: six times its loss is no loss of any step."""
    tokens = tokenized(TRAINING_TEXTS)
    params = finetune_params(epochs=2.0, evaluations=1, batch_tokens=1)
    assert steps_of(tokens, params).steps_per_epoch == len(TRAINING_TEXTS)
    curves = []
    for parts in (1, 6):
        model = trainable(tiny_checkpoint, dropout=0.0, attention_dropout=0.0)
        curves.append(run(model, tokens, tokens, tmp_path / str(parts), params, parts=parts)[0])
    assert [loss for _, loss in curves[1].train] == pytest.approx([loss for _, loss in curves[0].train], rel=1e-4)


def test_a_validation_loss_beyond_any_perplexity_is_logged(
    model: ScoredGPT2, tokenized: Callable[[Sequence[str]], TokenArrays], tmp_path: Path
) -> None:
    rows = tokenized(TRAINING_TEXTS)
    with torch.no_grad():
        model.transformer.ln_f.weight *= 10_000
    curves, log = run(model, rows, rows, tmp_path, finetune_params(epochs=1.0, evaluations=1))
    assert curves.validation[0][1] > 1000
    assert log.metrics[0][1]["validation_perplexity"] == math.inf


def test_more_evaluations_than_steps_are_refused(
    tokenized: Callable[[Sequence[str]], TokenArrays], tmp_path: Path
) -> None:
    params = finetune_params(evaluations=7, epochs=6.0)
    with pytest.raises(UserError, match=r"^finetune\.evaluations: 7 evaluations do not fit in 6 optimizer steps"):
        training_arguments(params, steps_of(tokenized(["N"]), params), work_folder=tmp_path, processes=join_processes())


@pytest.mark.parametrize("parts", [2, 3])
def test_cutting_a_step_into_batches_changes_nothing_but_rounding(
    parts: int, tiny_checkpoint: Path, tokenized: Callable[[Sequence[str]], TokenArrays], tmp_path: Path
) -> None:
    train, validation = tokenized(TRAINING_TEXTS * 2), tokenized(VALIDATION_TEXTS)
    params = finetune_params(epochs=6.0, batch_tokens=64, learning_rate=0.001)
    curves = []
    for count in (1, parts):
        model = trainable(tiny_checkpoint, dropout=0.0, attention_dropout=0.0)
        curves.append(run(model, train, validation, tmp_path / str(count), params, parts=count)[0])
    for name in ("train", "validation"):
        expected, found = (getattr(each, name) for each in curves)
        assert [step for step, _ in found] == [step for step, _ in expected]
        assert [loss for _, loss in found] == pytest.approx([loss for _, loss in expected], rel=1e-4)


def test_gradient_checkpointing_changes_nothing_but_rounding(
    tiny_checkpoint: Path, tokenized: Callable[[Sequence[str]], TokenArrays], tmp_path: Path
) -> None:
    train, validation = tokenized(TRAINING_TEXTS), tokenized(VALIDATION_TEXTS)
    losses = []
    for checkpointing in (False, True):
        params = finetune_params(epochs=4.0, gradient_checkpointing=checkpointing, dropout=0.1, learning_rate=0.001)
        model = trainable(tiny_checkpoint, dropout=0.1)
        curves, _ = run(model, train, validation, tmp_path / str(checkpointing), params)
        losses.append([loss for _, loss in curves.validation])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU")
def test_fine_tuning_takes_bfloat16_and_tf32(tokenized: Callable[[Sequence[str]], TokenArrays], tmp_path: Path) -> None:
    params = finetune_params()
    steps = steps_of(tokenized(TRAINING_TEXTS), params)
    arguments = training_arguments(params, steps, work_folder=tmp_path, processes=join_processes())
    assert arguments.bf16 == trainer.supports_bfloat16()
    assert not arguments.use_cpu
    if torch.cuda.get_device_capability() >= (8, 0):
        assert torch.backends.cuda.matmul.allow_tf32
