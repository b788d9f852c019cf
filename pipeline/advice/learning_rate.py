"""The command `python -m pipeline find-learning-rate`: suggest a learning rate by a short range test."""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from transformers import logging

from pipeline.advice.range_test import Floats, even_out, has_diverged, rate_well_down, rising_rates, smooth, span_of
from pipeline.charts import DATA, MARK, MODEL, new_chart, save_chart
from pipeline.errors import UserError
from pipeline.files import whole_folder, write_csv
from pipeline.params.finetune import FinetuneParams
from pipeline.progress import progress
from pipeline.tokens import load_tokens, tokenizer_sha256
from pipeline.training.checks import check_vocabulary, window_length
from pipeline.training.memory import parts_of_step
from pipeline.training.model import load_trainable
from pipeline.training.optimizer import build_optimizer
from pipeline.training.packing import PackedSteps
from pipeline.training.precision import autocast
from pipeline.training.randomness import fix_randomness

SHOWN_STEPS = 10
"""The lines of the table, and of the progress if stderr is not a terminal."""
LEAST_STEPS = 20


@dataclass(frozen=True)
class RangeTest:
    """The result of each step, all arrays `[steps]`; losses are in nats per token."""

    rates: Floats
    losses: Floats
    base_losses: Floats
    """The losses of the base on the same text."""
    span: int
    """The span of the moving average, in steps."""
    is_diverged: bool

    @property
    def averages(self) -> Floats:
        return smooth(even_out(self.losses, self.base_losses), self.span)

    @property
    def suggestion(self) -> float | None:
        """Return the rate to fine-tune at, in two digits; None if the loss falls nowhere."""
        rate = rate_well_down(self.rates, self.averages, self.span)
        return None if rate is None else float(f"{rate:.2g}")


def find_learning_rate(
    tokens: Path, base: Path, out: Path, params: FinetuneParams, *, lowest: float, highest: float, steps: int
) -> str:
    """Test the rates from `lowest` to `highest`, write `curve.csv` and `curve.svg` to `out`, and return a summary.

    Raises `UserError` if an input is missing, an option is out of range, or no rate can be suggested.
    """
    for folder in (tokens, base):
        if not folder.is_dir():
            raise UserError(f"{folder}: is missing; run `dvc repro tokenize` first")
    if not 0 < lowest < highest < math.inf:
        raise UserError(f"--lowest: {lowest:g} must be more than 0 and less than --highest, {highest:g}")
    if steps < LEAST_STEPS:
        raise UserError(f"--steps: {steps} are too few; take at least {LEAST_STEPS}")
    test = run_range_test(tokens, base, params, rising_rates(lowest, highest, steps))
    with whole_folder(out) as partial:
        write_table(partial / "curve.csv", test)
        draw_curve(partial / "curve.svg", test)
    return render(test, out)


def run_range_test(tokens: Path, base: Path, params: FinetuneParams, rates: Floats) -> RangeTest:
    """Train at one rate after another, otherwise as `params` says, in this process on one device.

    Raises `UserError` if the base itself has no finite loss.
    """
    logging.set_verbosity_error()
    train = load_tokens(tokens / "train", tokenizer_sha256(base))
    fix_randomness(params.seed)
    model = load_trainable(base, params)
    context_length = window_length(params, model.config.n_positions)
    check_vocabulary(train, model.config.vocab_size)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    steps = PackedSteps(
        train,
        context_length=context_length,
        batch_tokens=params.batch_tokens,
        # Every epoch has at least one step, so this many epochs suffice.
        epochs=len(rates),
        seed=params.seed,
        parts=parts_of_step(model, params, context_length=context_length, processes=1),
        share=params.train_share,
    )
    if params.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = build_optimizer(model, params)
    # With layer_decay, the layers' rates differ.
    factors = [group["lr"] / params.learning_rate for group in optimizer.param_groups]
    # With dropout, as in training.
    model.train()
    with torch.no_grad():
        base_losses = [step_loss(model, steps, step) for step in _with_bar(len(rates), "base")]
    if not all(map(math.isfinite, base_losses)):
        raise UserError(f"{base}: its loss is not finite before any training; its weights are broken")
    span = span_of(len(rates))
    losses: list[float] = []
    for step in _with_bar(len(rates), "rising rate"):
        for group, factor in zip(optimizer.param_groups, factors, strict=True):
            group["lr"] = float(rates[step]) * factor
        losses.append(take_step(model, steps, step, optimizer, params))
        if not sys.stderr.isatty() and len(losses) % max(1, len(rates) // SHOWN_STEPS) == 0:
            print(f"step {len(losses)} of {len(rates)}: rate {rates[step]:.1e}, loss {losses[-1]:.3f}", file=sys.stderr)
        is_diverged = has_diverged(smooth(even_out(losses, base_losses[: len(losses)]), span))
        if is_diverged:
            break
    taken = sum(map(math.isfinite, losses))
    return RangeTest(rates[:taken], np.array(losses[:taken]), np.array(base_losses[:taken]), span, is_diverged)


def take_step(model: nn.Module, steps: PackedSteps, step: int, optimizer: Optimizer, params: FinetuneParams) -> float:
    """Take an optimizer step as the Trainer does, and return the loss before it."""
    loss = step_loss(model, steps, step)
    nn.utils.clip_grad_norm_(model.parameters(), params.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return loss


def step_loss(model: nn.Module, steps: PackedSteps, step: int) -> float:
    """Return the mean loss over all labels of a step, in nats per token; adds to the gradients if they are enabled."""
    device = next(model.parameters()).device
    # A window's first token is no label.
    labels = sum(window.tokens - 1 for window in steps.step_windows(step))
    total = 0.0
    for part in range(steps.parts):
        batch = steps[step * steps.parts + part]
        inputs = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
        with autocast(device):
            loss = model(**inputs, num_items_in_batch=labels).loss
        if loss.requires_grad:
            loss.backward()
        total += loss.item()
    return total


def _with_bar(steps: int, name: str) -> Iterator[int]:
    """Yield the numbers of the steps, with a progress bar on a terminal."""
    yield from progress(range(steps), description=name, unit="step")


def write_table(path: Path, test: RangeTest) -> None:
    columns = (column.tolist() for column in (test.rates, test.losses, test.base_losses, test.averages))
    rows = [(step, *row) for step, row in enumerate(zip(*columns, strict=True), start=1)]
    write_csv(path, [("step", "learning_rate", "loss", "base_loss", "smoothed_loss"), *rows])


def draw_curve(path: Path, test: RangeTest) -> None:
    figure, axes = new_chart("Training loss at a rising learning rate", "learning rate", "loss, nats per token")
    axes.set_xscale("log")
    each = even_out(test.losses, test.base_losses)
    axes.plot(test.rates, each, color=DATA, alpha=0.35, linewidth=1, label="each step, corrected for its text")
    axes.plot(test.rates, test.averages, color=DATA, linewidth=2, label="smoothed")
    if test.suggestion is not None:
        axes.axvline(test.suggestion, color=MODEL, linestyle="--", label=f"three quarters down: {test.suggestion:g}")
    axes.legend(frameon=False, labelcolor=MARK)
    save_chart(figure, path)


def render(test: RangeTest, out: Path) -> str:
    """Render a table of some steps, the suggestion, and the command to run. Raises `UserError` without a suggestion."""
    if test.suggestion is None:
        raise UserError(
            f"the loss does not fall at any rate from {test.rates[0]:.2g} to {test.rates[-1]:.2g} "
            f"({out / 'curve.csv'}); lower --lowest, or check whether the base has already learned this text"
        )
    averages = test.averages
    shown = np.unique(np.linspace(0, len(averages) - 1, SHOWN_STEPS + 1).round().astype(int))
    lines = [f"{'rate':>8}  {'loss':>7}  {'smoothed':>8}"]
    lines += [f"{test.rates[step]:8.1e}  {test.losses[step]:7.3f}  {averages[step]:8.3f}" for step in shown]
    lowest, last = test.rates[averages.argmin()], test.rates[-1]
    lines += [
        f"the smoothed loss is three quarters down at {test.suggestion:g} and lowest at {lowest:.2g}; it "
        f"{'diverges at' if test.is_diverged else 'does not diverge up to'} {last:.2g}",
        f"{out / 'curve.svg'} shows it",
        f"dvc exp run -S finetune.learning_rate={test.suggestion:g}",
    ]
    return "\n".join(lines)
