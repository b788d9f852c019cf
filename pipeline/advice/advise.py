"""The command `python -m pipeline advise`: recommend what to do next, from fine-tunings on shares of the text."""

import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.advice.experiments import read_output, run_experiment
from pipeline.advice.learning_curve import LEAST_SIZES, PowerLaw, can_be_fitted, fit_power_law, spread
from pipeline.charts import DATA, MARK, MODEL, new_chart, save_chart
from pipeline.curves import parse_curve
from pipeline.errors import UserError
from pipeline.files import whole_folder, write_csv, write_json

SHARES = (0.125, 0.25, 0.5, 1.0)
WORTHWHILE_NATS = 0.02
"""The least fall of the loss per token that is worth advising: 2 % of perplexity."""
LATE = 0.75
"""The share of the training after which a fall of the loss calls for more epochs."""
EARLY = 0.5
"""The share of the training up to which a best checkpoint counts as early."""
FACTORS = (2, 4)
"""The multiples of the text, each twice the one before, for which a loss is predicted. A law through a few points is
not reliable further out."""
MOST_NATS = 700.0
"""The loss beyond which a perplexity overflows."""

FINETUNE = Path("out") / "finetune"


@dataclass(frozen=True)
class Point:
    """A fine-tuning on a share of the training documents."""

    share: float
    tokens: int
    """The tokens that it learned from per epoch."""
    curve: list[tuple[int, float]]
    """The validation loss, in nats per token, by optimizer step; step 0 is the base."""

    @property
    def base_loss(self) -> float:
        return self.curve[0][1]

    @property
    def best_step(self) -> int:
        return min(self.curve[1:], key=lambda point: point[1])[0]

    @property
    def best_loss(self) -> float:
        return min(loss for _, loss in self.curve[1:])

    @property
    def steps(self) -> int:
        return self.curve[-1][0]

    @property
    def best_evaluation(self) -> int:
        """Return the number of the best evaluation, from 1."""
        return [step for step, _ in self.curve].index(self.best_step)

    @property
    def late_fall(self) -> float:
        """Return the fall of the loss from `LATE` of the training to its end, on straight lines between evaluations.

        It is 0 if there is one evaluation: the line from the base says nothing about the end.
        """
        steps, losses = zip(*self.curve[1:], strict=True)
        return float(np.interp(LATE * self.steps, steps, losses)) - losses[-1]


@dataclass(frozen=True)
class Prediction:
    """The loss to expect from more text."""

    factor: int
    tokens: int
    loss: float
    spread: tuple[float, float] | None
    """The lowest and highest prediction with one share omitted; None if too few shares are left."""


@dataclass(frozen=True)
class Advice:
    """What to do next, and why."""

    action: str
    """`change the training`, `more epochs`, `more data`, `stop`, or `more shares` if too few determine no law."""
    sentences: list[str]
    law: PowerLaw | None
    predictions: list[Prediction]


def advise(points: Sequence[Point], evaluations: int) -> Advice:
    """Recommend what to do next.

    The last of the `points` is the training on all the text; `evaluations` is how often a full training is evaluated.
    The first rule that applies decides:

    - *Change the training*: with all the text, the best checkpoint is no better than the base.
    - *More epochs*: that checkpoint is from the last evaluation, and the loss fell by `WORTHWHILE_NATS` or more in the
      last quarter of the training (`LATE`). Part of that fall comes from the learning rate's decay to zero, so this is
      a hint, which the next fine-tuning confirms or refutes.
    - *More shares*: the points are too few to determine a law.
    - *More data*: by the law, twice the text lowers the loss by `WORTHWHILE_NATS` or more; four times the text if the
      second doubling is worth as much too.
    - *Stop*: neither helps much.

    Adds a remark if the best checkpoint came early (`EARLY`): the model memorized the text.
    """
    whole = points[-1]
    tokens, losses = [point.tokens for point in points], [point.best_loss for point in points]
    law = fit_power_law(tokens, losses) if can_be_fitted(tokens) else None
    predictions = [] if law is None else [_predict(law, tokens, losses, factor) for factor in FACTORS]
    action, sentences = _choose(whole, law, predictions)
    if whole.best_evaluation <= EARLY * evaluations:
        sentences.append(
            f"The best checkpoint came early, at evaluation {whole.best_evaluation} of {evaluations}: after it "
            "the model memorized the text. Fewer epochs, more dropout, frozen layers or LoRA may prevent that."
        )
    return Advice(action, sentences, law, predictions)


def _predict(law: PowerLaw, tokens: Sequence[int], losses: Sequence[float], factor: int) -> Prediction:
    wanted = factor * tokens[-1]
    return Prediction(factor, wanted, float(law.loss(wanted)), spread(tokens, losses, wanted))


def _choose(whole: Point, law: PowerLaw | None, predictions: Sequence[Prediction]) -> tuple[str, list[str]]:
    if whole.best_loss >= whole.base_loss:
        return "change the training", [
            f"Change the training: the loss of the best checkpoint is {whole.best_loss:.3f}, and the base's is "
            f"{whole.base_loss:.3f}. Lower finetune.learning_rate; python -m pipeline find-learning-rate suggests one."
        ]
    furthest = None if law is None else _furthest_worthwhile(law, whole, predictions)
    of_data = _predict_in_words(law, whole, furthest or predictions[0]) if law else "Nothing is known about more data."
    if whole.best_step == whole.steps and whole.late_fall >= WORTHWHILE_NATS:
        return "more epochs", [
            "More epochs: with all the text the last checkpoint was the best, and the loss still fell by "
            f"{whole.late_fall:.3f} in the last quarter of the training. Raise finetune.epochs and compare.",
            of_data,
        ]
    if law is None:
        return "more shares", [
            f"More shares: a learning curve needs at least {LEAST_SIZES} different amounts of text. {of_data} "
            "Name more shares with --shares."
        ]
    if furthest is None:
        return "stop", [f"Stop: neither more epochs nor more data helps much. {of_data}"]
    return "more data", [f"More data: {of_data}"]


def _furthest_worthwhile(law: PowerLaw, whole: Point, predictions: Sequence[Prediction]) -> Prediction | None:
    """Return the last prediction up to which every doubling is worth it; None if not even the first is."""
    furthest, before = None, float(law.loss(whole.tokens))
    for prediction in predictions:
        if before - prediction.loss < WORTHWHILE_NATS:
            break
        furthest, before = prediction, prediction.loss
    return furthest


def _predict_in_words(law: PowerLaw, whole: Point, prediction: Prediction) -> str:
    fall = float(law.loss(whole.tokens)) - prediction.loss
    return (
        f"{prediction.factor} times the text, {prediction.tokens:,} tokens, should lower the loss by {fall:.3f} to "
        f"{prediction.loss:.3f}, a perplexity of {_perplexity(prediction.loss):,.1f}."
    )


def run_advise(out: Path, shares: Iterable[float], evaluations: int) -> str:
    """Fine-tune on each share and on the whole, write `curve.csv`, `curve.svg` and `advice.json`, and return the text.

    Raises `UserError` if an experiment fails.
    """
    wanted = sorted({*shares, 1.0})
    if wrong := [share for share in wanted if not 0 < share <= 1]:
        raise UserError(f"--shares: {wrong[0]} is out of range, must be in (0, 1]")
    for number, share in enumerate(wanted, start=1):
        print(f"share {share}, {number} of {len(wanted)}:", file=sys.stderr)
        run_experiment(experiment_name(share), "finetune", {"finetune.train_share": share})
    points = [read_point(share) for share in wanted]
    advice = advise(points, evaluations)
    with whole_folder(out) as partial:
        write_table(partial / "curve.csv", points, advice)
        write_json(partial / "advice.json", _to_json(points, advice))
        draw_curve(partial / "curve.svg", points, advice)
    return render(points, advice, out)


def experiment_name(share: float) -> str:
    return f"advise-{share}"


def read_point(share: float) -> Point:
    """Read the result of the experiment on a share. Raises `UserError` if DVC no longer has it."""
    details, curve = (
        read_output(experiment_name(share), FINETUNE / file) for file in ("details.json", "loss_validation.csv")
    )
    return Point(share, int(json.loads(details)["train_tokens"]), parse_curve(curve))


def write_table(path: Path, points: Sequence[Point], advice: Advice) -> None:
    """Write a CSV row per share and per prediction; the `share` of a prediction is more than 1."""

    def fitted(tokens: int) -> float | None:
        return None if advice.law is None else float(advice.law.loss(tokens))

    rows: list[Sequence[object]] = [
        ("share", "train_tokens", "validation_loss", "best_step", "steps", "fitted_loss"),
        *(
            (point.share, point.tokens, point.best_loss, point.best_step, point.steps, fitted(point.tokens))
            for point in points
        ),
        *((predicted.factor, predicted.tokens, None, None, None, predicted.loss) for predicted in advice.predictions),
    ]
    write_csv(path, rows)


def _to_json(points: Sequence[Point], advice: Advice) -> dict[str, Any]:
    return {
        "action": advice.action,
        "sentences": advice.sentences,
        "law": None if advice.law is None else asdict(advice.law),
        "predictions": [asdict(prediction) for prediction in advice.predictions],
        "points": [
            {
                "experiment": experiment_name(point.share),
                "share": point.share,
                "train_tokens": point.tokens,
                "validation_loss": point.best_loss,
                "base_validation_loss": point.base_loss,
                "best_step": point.best_step,
                "steps": point.steps,
            }
            for point in points
        ],
    }


def draw_curve(path: Path, points: Sequence[Point], advice: Advice) -> None:
    figure, axes = new_chart(
        f"Advice: {advice.action}",
        "tokens of the training text, and below them the multiple of all of it",
        "validation loss, nats per token",
    )
    axes.set_xscale("log")
    tokens = [point.tokens for point in points]
    axes.plot(tokens, [point.best_loss for point in points], "o", color=DATA, label="fine-tuned", zorder=3)
    if advice.law is not None:
        furthest = advice.predictions[-1].tokens
        measured, beyond = np.geomspace(tokens[0], tokens[-1], 50), np.geomspace(tokens[-1], furthest, 50)
        axes.plot(measured, advice.law.loss(measured), color=MODEL, label=_formula(advice.law))
        axes.plot(beyond, advice.law.loss(beyond), color=MODEL, linestyle="--", label="predicted")
    for prediction in advice.predictions:
        low, high = prediction.spread or (prediction.loss, prediction.loss)
        axes.errorbar(
            prediction.tokens,
            prediction.loss,
            yerr=[[max(0.0, prediction.loss - low)], [max(0.0, high - prediction.loss)]],
            fmt="o",
            color=MODEL,
            markerfacecolor="white",
            capsize=3,
        )
    ticks = [(point.tokens, f"{point.tokens:,}\n{point.share:g}") for point in points]
    ticks += [(prediction.tokens, f"{prediction.tokens:,}\n{prediction.factor}") for prediction in advice.predictions]
    axes.set_xticks([position for position, _ in ticks], [label for _, label in ticks])
    axes.minorticks_off()
    axes.legend(frameon=False, labelcolor=MARK)
    save_chart(figure, path)


def _formula(law: PowerLaw) -> str:
    return f"{law.floor:.2f} + {law.scale:,.3g} · tokens^-{law.exponent:.3f}"


def render(points: Sequence[Point], advice: Advice, out: Path) -> str:
    """Render a table of the shares, the law and its predictions, and the advice."""
    lines = [f"{'share':>7}  {'tokens':>12}  {'loss':>7}  {'perplexity':>10}  best step"]
    lines.append(f"{'base':>7}  {'':>12}  {points[-1].base_loss:7.3f}  {_perplexity(points[-1].base_loss):10,.1f}")
    lines += [
        f"{point.share:7g}  {point.tokens:12,}  {point.best_loss:7.3f}  {_perplexity(point.best_loss):10,.1f}  "
        f"{point.best_step} of {point.steps}"
        for point in points
    ]
    if advice.law is not None:
        worst = max(abs(float(advice.law.loss(point.tokens)) - point.best_loss) for point in points)
        lines.append(f"fitted: loss = {_formula(advice.law)}, off by {worst:.3f} at most")
    for prediction in advice.predictions:
        between = "" if prediction.spread is None else " ({:.3f} to {:.3f} with one omitted)".format(*prediction.spread)
        lines.append(
            f"{prediction.factor:7g}  {prediction.tokens:12,}  {prediction.loss:7.3f}  "
            f"{_perplexity(prediction.loss):10,.1f}  predicted{between}"
        )
    return "\n".join([*lines, *advice.sentences, f"{out / 'curve.svg'} shows it"])


def _perplexity(loss: float) -> float:
    """Return the perplexity of a loss; infinity if it would overflow, as for a base that has never seen such text."""
    return math.exp(loss) if loss < MOST_NATS else math.inf
