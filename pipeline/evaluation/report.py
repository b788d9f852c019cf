"""What a fine-tuning came to, as one HTML page that needs neither scripts nor a network.

`report.html` beside this module is its template, and escapes whatever it is given; what is not to be escaped are the
charts.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, StrictUndefined

from pipeline.charts import DATA, MARK, MODEL, NARROW_INCHES, inline_chart, new_chart
from pipeline.decoding import SamplingParams
from pipeline.quality.distance import LEAST_SCALE, LOGARITHMS, PENALTIES, SHARE_OF_HUMAN

TEMPLATE = Path(__file__).with_name("report.html")
NONE = "–"
NEAR_STEPS, OFF_STEPS = 1.0, 3.0
"""Up to which a figure counts as near people's, and as off; beyond, it is far."""
WALL = ("human", "untuned_base", "hand_set", "tuned")
"""Systems whose samples stand side by side."""
OPEN_PROMPTS = 6
"""Prompts whose samples are unfolded."""
FRONT_MARGIN = 2.0
"""The plot of trials ends at so many times the worst of the front: one trial that babbles would press all others into
a corner."""
LABEL_POINTS = 13
"""Height of a label in that plot."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a page is made of."""

    metrics: Mapping[str, Any]
    """`metrics.json` of the evaluation."""
    samples: Sequence[Mapping[str, Any]]
    """Rows of its `samples.jsonl`: each system's in the order of the prompts."""
    trials: Sequence[Mapping[str, Any]]
    """Of the search of decoding parameters; empty where there was none."""
    train_losses: Sequence[tuple[int, float]]
    """Optimizer step, nats a token."""
    validation_losses: Sequence[tuple[int, float]]
    lineage: Mapping[str, str]
    """`tracking.lineage()`, and as `run` the id of the run in MLflow."""


class System(NamedTuple):
    label: str
    meaning: str


SYSTEMS = {
    "human": System("People", "what the authors wrote"),
    "hand_set": System("Hand-set", "decoding set by hand"),
    "tuned": System("Tuned", "decoding found by the search"),
    "guarded": System("Guarded", "tuned; copies ≤ {guard_tokens} tokens"),
    "greedy": System("Greedy", "always the likeliest token"),
    "sampling": System("Sampling", "pure, without filters"),
    "untuned_base": System("Base", "not fine-tuned; hand-set"),
}


class Column(NamedTuple):
    """A figure of the table of scores."""

    name: str
    label: str
    decimals: int
    meaning: str
    term: str | None = None
    """The figure of the distance that it is compared as, where that has another name."""


DISTANCE = Column(
    "distance",
    "distance",
    2,
    "From people's texts: the sum of how far off the other figures are. The smaller, the nearer. Below it stands the "
    "95 % interval over prompts.",
)
COLUMNS = {
    "": [DISTANCE],
    "repetition": [
        Column("rep_2", "rep-2", 3, "Share of a sample's 2-grams of tokens that stand in it before."),
        Column("rep_3", "rep-3", 3, "Of its 3-grams."),
        Column("rep_4", "rep-4", 3, "Of its 4-grams."),
        Column("looping_share", "loops", 3, "Share of samples that end in a loop."),
    ],
    "variety": [
        Column("distinct_1", "dist-1", 3, "Different tokens over all tokens, of all samples together."),
        Column("distinct_2", "dist-2", 3, "The same of 2-grams."),
        Column("distinct_3", "dist-3", 3, "Of 3-grams."),
        Column("zipf", "Zipf", 3, "Zipf's coefficient: higher where the same few words are said."),
        Column("self_bleu", "self-BLEU", 3, "How much the samples resemble each other."),
    ],
    "likeness": [
        Column("base_perplexity", "perplexity", 1, "Of the samples under the base: how hard to predict.", "perplexity"),
        Column("mauve", "MAUVE", 3, "How alike samples and people's texts are to a model; 1 is alike."),
    ],
    "copies": [
        Column("mean_copy_tokens", "mean", 1, "Longest verbatim run of the training text in a sample, in tokens, on "
               "average."),
        Column("longest_copy_tokens", "longest", 0, "Of all samples, in tokens.", "mean_copy_tokens"),
    ],
    "shape": [
        Column("mean_tokens", "tokens", 1, "Length of a sample, on average."),
        Column("finished_share", "ended", 3, "Share of samples that ended by themselves, not at the limit of tokens."),
        Column("form_share", "form", 3, "Share of samples in the form of a text of the data."),
    ],
}  # fmt: skip
"""By what they tell."""


class Cell(NamedTuple):
    text: str
    verdict: str = ""
    """`near`, `off` or `far` from people's; empty where there is nothing to compare."""
    mark: str = ""
    """The same without colour: arrows to the side on which it lies."""
    interval: str = ""


class Part(NamedTuple):
    """A piece of a sample that is marked in one way."""

    text: str
    copied: bool
    repeated: bool


def render_report(report: Report) -> str:
    """The page as HTML; the same report gives the same text."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    metrics, protocol = report.metrics, report.metrics["protocol"]
    decodings = _decodings(report.samples)
    return page.render(
        learnt=_learnt_told(metrics),
        decoding=decoding_told(metrics.get("choice")),
        facts=_facts(metrics),
        systems={name: System(label, meaning.format_map(protocol)) for name, (label, meaning) in _shown(metrics)},
        kept=_kept(metrics),
        columns=COLUMNS,
        scores={name: _cells(metrics, name) for name, _ in _shown(metrics)},
        protocol={name: _value(value) for name, value in protocol.items()},
        losses=_loss_chart(report.train_losses, report.validation_losses),
        best=_best_told(report.validation_losses),
        search=_search_chart(report.trials) if report.trials else None,
        searched=_searched_told(report.trials) if report.trials else None,
        decodings=decodings,
        parameters=_parameters(decodings),
        prompts=_prompts(report.samples),
        open_prompts=OPEN_PROMPTS,
        lineage=_lineage(report.lineage),
    )


def _shown(metrics: Mapping[str, Any]) -> list[tuple[str, System]]:
    return [(name, system) for name, system in SYSTEMS.items() if name in metrics]


def _kept(metrics: Mapping[str, Any]) -> str:
    """The system whose decoding goes with the model."""
    choice = metrics.get("choice")
    return str(choice["kept"]) if choice else "hand_set"


def _learnt_told(metrics: Mapping[str, Any]) -> str:
    before, after = (metrics[name]["bits_per_byte"] for name in ("base", "finetuned"))
    figures = f"from {before:.3f} to {after:.3f} bits a byte of text that it has not seen"
    change = after / before - 1
    if change < 0:
        return f"Fine-tuning took the model {figures}: {-100 * change:.1f}\u00a0% less."
    return f"Fine-tuning did not help: it took the model {figures}, {100 * change:.1f}\u00a0% more."


def decoding_told(choice: Mapping[str, Any] | None) -> str:
    """Which decoding goes with the model, and why, in a sentence; `choice` is that of `metrics.json`."""
    if choice is None:
        return "Its samples are drawn with the decoding set by hand; no other was searched for."
    difference, low, high = choice["difference"], choice.get("difference_low"), choice.get("difference_high")
    gap = f"{abs(difference):.2f} {'nearer to' if difference < 0 else 'farther from'} people’s texts"
    interval = "" if low is None or high is None else f" (95\u00a0% interval: {_range_told(low, high)})"
    if choice["kept"] == "tuned":
        return f"The tuned decoding is kept: its samples are {gap} than those of the one set by hand{interval}."
    chance = ", which may be chance" if difference < 0 else ""
    return f"The decoding set by hand is kept: samples of the tuned one are {gap}{chance}{interval}."


def _range_told(low: float, high: float) -> str:
    """An interval of differences, of which those below 0 are nearer to people."""
    if high <= 0:
        return f"{-high:.2f} to {-low:.2f} nearer"
    if low >= 0:
        return f"{low:.2f} to {high:.2f} farther"
    return f"{-low:.2f} nearer to {high:.2f} farther"


def _facts(metrics: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """What it is, the figures, and what they are of."""
    before, after, kept = metrics["base"], metrics["finetuned"], _kept(metrics)
    facts = [
        (label, f"{before[name]:.{decimals}f} → {after[name]:.{decimals}f}", "base → fine-tuned")
        for name, label, decimals in (
            ("bits_per_byte", "bits a byte, test split", 3),
            ("perplexity", "perplexity a token, test split", 1),
        )
    ]
    if "untuned_base" in metrics and kept in metrics:
        gaps = " → ".join(_distance_cell(metrics[name]).text for name in ("untuned_base", kept))
        facts.append(("distance from people’s texts", gaps, f"base → fine-tuned, {SYSTEMS[kept].label.lower()}"))
    if "human" in metrics and kept in metrics:
        own, human = (metrics[name]["longest_copy_tokens"] for name in (kept, "human"))
        facts.append(("longest verbatim copy", f"{own} tokens", f"in people’s texts: {human}"))
    return facts


def _cells(metrics: Mapping[str, Any], system: str) -> dict[str, Cell]:
    """A system's row of the table, by the name of the figure."""
    own, scales = metrics[system], metrics["human_scales"]
    # What is taken against people's texts they have not themselves: there they are 0 apart, and as alike as 1.
    if system == "human":
        own, human = {**own, "distance": 0.0}, {}
    else:
        human = {**metrics.get("human", {}), "mauve": 1.0}
    return {
        column.name: _cell(column, own.get(column.name), human.get(column.name), scales)
        for group in COLUMNS.values()
        for column in group
        if column is not DISTANCE
    } | {DISTANCE.name: _distance_cell(own)}


def _cell(column: Column, own: float | None, human: float | None, scales: Mapping[str, float]) -> Cell:
    if own is None:
        return Cell(NONE)
    text = f"{own:.{column.decimals}f}"
    if human is None:
        return Cell(text)
    steps = steps_off(column, own, human, scales)
    arrow = "↑" if steps > 0 else "↓"
    if abs(steps) <= NEAR_STEPS:
        return Cell(text, "near")
    return Cell(text, "off", arrow) if abs(steps) <= OFF_STEPS else Cell(text, "far", arrow * 2)


def _distance_cell(own: Mapping[str, Any]) -> Cell:
    if own.get("distance") is None:
        return Cell(NONE)
    low, high = own.get("distance_low"), own.get("distance_high")
    interval = "" if low is None or high is None else f"{low:.2f} – {high:.2f}"
    return Cell(f"{own['distance']:.2f}", interval=interval)


def steps_off(column: Column, own: float, human: float, scales: Mapping[str, float]) -> float:
    """How far a figure lies above people's (below it: negative), in the scale that the distance has for it.

    That of a figure which is no part of the distance is a tenth of people's own.
    """
    term = column.term or column.name
    place = LOGARITHMS.get(term, float)
    gap = place(own) - place(human)
    side = PENALTIES.get(term, 0)
    if gap * side < 0:
        gap = 0.0
    return gap / scales.get(term, max(SHARE_OF_HUMAN * abs(human), LEAST_SCALE))


def _loss_chart(train: Sequence[tuple[int, float]], validation: Sequence[tuple[int, float]]) -> str | None:
    if not train and not validation:
        return None
    figure, axes = new_chart("", "optimizer step", "loss, nats a token", NARROW_INCHES)
    if train:
        axes.plot(*zip(*train, strict=True), color=DATA, alpha=0.6, linewidth=1, label="training")
    label = f"Training loss, {len(train)} points"
    if validation:
        axes.plot(*zip(*validation, strict=True), "o-", color=MODEL, markersize=4, label="validation")
        step, loss = _best(validation)
        axes.plot(step, loss, "o", color=MARK, markersize=10, fillstyle="none", label=f"lowest, {loss:.3f}")
        label = f"Training and validation loss; the lowest validation loss is {loss:.3f}, at step {step}"
    figure.legend(loc="outside lower center", ncols=3, frameon=False, labelcolor=MARK)
    return inline_chart(figure, "loss", label)


def _best(validation: Sequence[tuple[int, float]]) -> tuple[int, float]:
    """The first of the lowest, as the checkpoint that is kept."""
    return min(validation, key=lambda point: point[1])


def _best_told(validation: Sequence[tuple[int, float]]) -> str:
    if not validation:
        return "No validation losses were recorded."
    (step, loss), last = _best(validation), validation[-1][0]
    if step == 0:
        return f"The validation loss was never below that of the base, {loss:.3f}: nothing was learnt."
    end = "the last one taken: it was still falling" if step == last else f"of {last}: more steps made it worse"
    return f"The validation loss is lowest, {loss:.3f}, at step {step}, {end}. The checkpoint of that step is kept."


def _search_chart(trials: Sequence[Mapping[str, Any]]) -> str:
    figure, axes = new_chart("", "too wild: babbling", "too tame: repetitive, predictable", NARROW_INCHES)
    limits = _limits(trials)
    axes.set(xlim=(0, limits[0]), ylim=(0, limits[1]))
    front = sorted(_places(trial for trial in trials if trial["on_front"]))
    dots: dict[str, Any] = {"marker": "o", "linestyle": "", "markersize": 5, "markeredgewidth": 0}
    for state, color, alpha in (("pruned", MARK, 0.25), ("complete", DATA, 0.7)):
        if places := _places(trial for trial in trials if trial["state"] == state):
            axes.plot(*zip(*places, strict=True), color=color, alpha=alpha, label=state, **dots)
    if front:
        axes.plot(*zip(*front, strict=True), "o-", color=MODEL, markersize=6, label="the front")
    presets = sorted((trial for trial in trials if trial["preset"] is not None), key=lambda trial: -trial["too_wild"])
    for height, trial in enumerate(presets):
        axes.annotate(
            trial["preset"],
            (trial["too_wild"], trial["too_tame"]),
            # One above the other, for presets may lie close together.
            xytext=(12, 6 + LABEL_POINTS * height),
            textcoords="offset points",
            color=MARK,
            arrowprops={"arrowstyle": "-", "color": MARK, "linewidth": 0.7},
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
        )
    figure.legend(loc="outside lower center", ncols=3, frameon=False, labelcolor=MARK)
    told = "; ".join(
        f"{trial['preset']}: too wild {trial['too_wild']:.2f}, too tame {trial['too_tame']:.2f}" for trial in presets
    )
    return inline_chart(figure, "search", f"Trials of the search by their two faults. {told}")


def _places(trials: Iterable[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """Of trials in the plot: too wild, too tame."""
    return [(trial["too_wild"], trial["too_tame"]) for trial in trials]


def _limits(trials: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Where the axes of the plot end."""
    all_places = _places(trials)
    front = _places(trial for trial in trials if trial["on_front"]) or all_places
    ends = [
        min(FRONT_MARGIN * max(of_front), 1.1 * max(of_all)) or 1.0
        for of_front, of_all in zip(zip(*front, strict=True), zip(*all_places, strict=True), strict=True)
    ]
    return ends[0], ends[1]


def _searched_told(trials: Sequence[Mapping[str, Any]]) -> str:
    pruned = sum(trial["state"] == "pruned" for trial in trials)
    limits = _limits(trials)
    beyond = sum(wild > limits[0] or tame > limits[1] for wild, tame in _places(trials))
    told = [
        f"{len(trials)} trials, of which {pruned} pruned, after fewer prompts than the others.",
        "No trial is better than one of the front in both faults.",
    ]
    if beyond:
        told.append(f"Beyond the plot: {beyond}.")
    return " ".join(told)


def _decodings(samples: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """How each of the two systems that compete was decoded, seeds aside."""
    return {
        system: {name: value for name, value in row["decoding"].items() if name != "seed"}
        for system in ("hand_set", "tuned")
        for row in islice((row for row in samples if row["system"] == system), 1)
    }


def _parameters(decodings: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[tuple[str, bool]]]]:
    """Names of the parameters that any decoding sets; of each, what it is in every decoding, and whether it is set."""
    neutral = SamplingParams()
    return [
        (
            field.name,
            [
                (_value(decoding.get(field.name, getattr(neutral, field.name))), field.name in decoding)
                for decoding in decodings.values()
            ],
        )
        for field in fields(SamplingParams)
        if any(field.name in decoding for decoding in decodings.values())
    ]


def _value(value: Any) -> str:
    if value is None:
        return NONE
    if isinstance(value, str):
        return value
    return f"{value:g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


def _prompts(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Prompt by prompt, the samples that stand side by side. Raises `ValueError` where systems had other prompts."""
    rows = {name: [row for row in samples if row["system"] == name] for name in WALL}
    rows = {name: own for name, own in rows.items() if own}
    prompts = []
    for samples_of_prompt in zip(*rows.values(), strict=True):
        if len(found := {row["prompt"] for row in samples_of_prompt}) > 1:
            raise ValueError(f"samples of different prompts: {sorted(found)}")
        seeds = {row["seed"] for row in samples_of_prompt if row["seed"] is not None}
        prompts.append(
            {
                "prompt": found.pop(),
                "seed": ", ".join(map(str, sorted(seeds))),
                "samples": [
                    {**row, "parts": mark_spans(row["text"], row["copied_spans"], row["repeated_spans"])}
                    for row in samples_of_prompt
                ],
            }
        )
    return prompts


def mark_spans(text: str, copied: Sequence[Sequence[int]], repeated: Sequence[Sequence[int]]) -> list[Part]:
    """The text in pieces, cut wherever one of the half-open ranges of its characters starts or ends."""
    ends = sorted({0, len(text), *(end for span in (*copied, *repeated) for end in span)})
    return [
        Part(
            text[start:end],
            any(first <= start < last for first, last in copied),
            any(first <= start < last for first, last in repeated),
        )
        for start, end in pairwise(ends)
    ]


LINEAGE_LABELS = {
    "git.commit": "commit",
    "git.dirty": "uncommitted changes",
    "dvc.experiment": "experiment",
    "dvc.data_md5": "data, md5",
    "dvc.base_md5": "base, md5",
    "run": "run in MLflow",
    "machine.cpu": "processor",
    "machine.gpu": "GPU",
    "machine.platform": "operating system",
    "machine.python": "Python",
}
LIBRARY = "library."


def _lineage(lineage: Mapping[str, str]) -> list[tuple[str, str]]:
    shown = [(label, lineage[name]) for name, label in LINEAGE_LABELS.items() if name in lineage]
    libraries = [
        f"{name.removeprefix(LIBRARY)} {version}" for name, version in lineage.items() if name.startswith(LIBRARY)
    ]
    return [*shown, ("libraries", ", ".join(libraries))] if libraries else shown
