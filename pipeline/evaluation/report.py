"""The report of a fine-tuning: one HTML page that needs neither scripts nor a network.

The template is `report.html` in this folder. It escapes everything but the charts.
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
from pipeline.quality.distance import BETTER_ABOVE, FAULTS, LEAST_SCALE, LOGARITHMS, SHARE_OF_HUMAN

TEMPLATE = Path(__file__).with_name("report.html")
NONE = "–"
MEANING = "base → fine-tuned"
NEAR_STEPS, OFF_STEPS = 1.0, 3.0
"""The largest gaps from people's figure that count as near, and as off; a larger gap is far."""
WALL = ("human", "untuned_base", "hand_set", "tuned")
"""The systems whose samples are shown side by side."""
LEAD_SAMPLES = 2
"""The number of samples that the page begins with: those of the first test prompts, whatever they are."""
OPEN_PROMPTS = 6
"""The number of prompts whose samples are unfolded."""
FRONT_MARGIN = 2.0
"""The plot of trials ends at this multiple of the front's worst trial: one trial that babbles would otherwise squeeze
all others into a corner."""
LABEL_POINTS = 13
"""The height of a label in that plot."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """The contents of the page."""

    details: Mapping[str, Any]
    """The contents of `details.json`."""
    samples: Sequence[Mapping[str, Any]]
    """The rows of `samples.jsonl`, each system's in the order of the prompts."""
    trials: Sequence[Mapping[str, Any]]
    """The rows of the search's `trials.json`."""
    train_losses: Sequence[tuple[int, float]]
    """The optimizer step and the loss, in nats per token, of each point."""
    validation_losses: Sequence[tuple[int, float]]
    data_md5: str | None
    """DVC's hash of the text; None if DVC does not track it."""
    base_md5: str | None


class Label(NamedTuple):
    label: str
    meaning: str


LABELS = {
    "human": Label("People", "what the authors wrote"),
    "hand_set": Label("Hand-set", "decoding set by hand"),
    "tuned": Label("Tuned", "decoding found by the search"),
    "guarded": Label("Guarded", "tuned; copies ≤ {guard_tokens} tokens"),
    "greedy": Label("Greedy", "always the likeliest token"),
    "sampling": Label("Sampling", "pure, without filters"),
    "untuned_base": Label("Base", "not fine-tuned; hand-set"),
}


class Column(NamedTuple):
    """A column of the table of scores."""

    name: str
    label: str
    decimals: int
    meaning: str
    term: str | None = None
    """The name of the figure in the distance, if that is another."""


DISTANCE = Column(
    "distance",
    "distance",
    2,
    "Distance from people's texts: the sum of how far off the other figures are; smaller is nearer. Below it, the 95 % "
    "interval over prompts.",
)
EXCESS = Column(
    "excess",
    "excess",
    1,
    "Faults above people’s level: the sum of how far each is above the limit that chance allows people; 0 passes. It "
    "decides before the distance does.",
)
COLUMNS = {
    "": [EXCESS, DISTANCE],
    "faults": [
        Column("invented_words", "invented", 1, "Words per 1,000 that neither the training text nor the base’s lexicon "
               "has, except names that the text keeps."),
        Column("doubled_words", "doubled", 1, "Words per 1,000 that follow themselves."),
        Column("broken_quotes", "quotes", 3, "Share of paragraphs with a quotation mark that lacks its partner."),
        Column("broken_sentences", "sentences", 3, "Broken sentences per paragraph: without an end, or begun with a "
               "small letter."),
        Column("empty_share", "empty", 3, "Share of samples without a word."),
        Column("rep_4", "repeats", 3, "Share of a sample's 4-grams of tokens that occur earlier in it."),
        Column("looping_share", "loops", 3, "Share of samples that end in a loop."),
        Column("form_share", "form", 3, "Share of samples that have the form of a text of the data."),
        Column("mean_copy_tokens", "copied", 1, "Longest verbatim run of the training text in a sample, in tokens; the "
               "average."),
    ],
    "variety": [
        Column("rep_2", "rep-2", 3, "Share of a sample's 2-grams of tokens that occur earlier in it."),
        Column("distinct_2", "dist-2", 3, "Different 2-grams divided by all 2-grams, over all samples together."),
        Column("self_bleu", "self-BLEU", 3, "How much the samples resemble each other."),
    ],
    "likeness": [
        Column("base_perplexity", "perplexity", 1, "Of the samples, computed by the base.", "perplexity"),
        Column("mauve", "MAUVE", 3, "How alike samples and people's texts are to a model; 1 is alike."),
    ],
    "shape": [
        Column("mean_tokens", "tokens", 1, "Average length of a sample."),
        Column("finished_share", "ended", 3, "Share of samples that ended by themselves, not at the token limit."),
        Column("longest_copy_tokens", "copy", 0, "Longest verbatim run of the training text in all samples, in tokens.",
               "mean_copy_tokens"),
    ],
}  # fmt: skip
"""The columns, by group."""


class Cell(NamedTuple):
    text: str
    verdict: str = ""
    """`near`, `off` or `far` from people's figure; empty if there is nothing to compare with."""
    mark: str = ""
    """The verdict without colour: arrows that point to the side on which the figure is."""
    interval: str = ""


class Part(NamedTuple):
    """A piece of a sample with one kind of mark."""

    text: str
    copied: bool
    repeated: bool


def render_report(report: Report) -> str:
    """Return the page as HTML; the same report gives the same text."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    details, protocol = report.details, report.details["protocol"]
    systems, choice = details["systems"], details["choice"]
    decodings = _decodings(report.samples)
    return page.render(
        lead=[row for row in report.samples if row["system"] == choice["kept"]][:LEAD_SAMPLES],
        learned=_describe_learning(details["documents"]),
        decoding=describe_choice(choice),
        facts=_facts(details),
        systems={name: Label(label, meaning.format_map(protocol)) for name, (label, meaning) in _shown(systems)},
        kept=choice["kept"],
        columns=_columns(systems),
        lacks_form="form_share" not in systems["human"],
        scores={name: _cells(systems, name, details["scales"]) for name, _ in _shown(systems)},
        protocol={name: _value(value) for name, value in protocol.items()},
        losses=_loss_chart(report.train_losses, report.validation_losses),
        best=_describe_best(report.validation_losses),
        search=_search_chart(report.trials),
        searched=_describe_search(report.trials),
        decodings=decodings,
        parameters=_parameters(decodings),
        prompts=_prompts(report.samples),
        open_prompts=OPEN_PROMPTS,
        hashes=[(label, md5) for label, md5 in (("data", report.data_md5), ("base", report.base_md5)) if md5],
    )


def _shown(systems: Mapping[str, Any]) -> list[tuple[str, Label]]:
    return [(name, label) for name, label in LABELS.items() if name in systems]


def _describe_learning(documents: Mapping[str, Mapping[str, float]]) -> str:
    before, after = (documents[name]["bits_per_byte"] for name in ("base", "finetuned"))
    change = after / before - 1
    figures = f"{before:.3f} to {after:.3f} bits per byte of unseen text, {100 * abs(change):.1f}\u00a0%"
    if change < 0:
        return f"Fine-tuning improved the model from {figures} less."
    return f"Fine-tuning did not help: the model went from {figures} more."


def describe_choice(choice: Mapping[str, Any]) -> str:
    """Return a sentence that says which decoding goes with the model, and why; `choice` is that of `details.json`."""
    tuned, hand_set = choice["tuned_excess"], choice["hand_set_excess"]
    if tuned != hand_set:
        kept, more, less = ("tuned", hand_set, tuned) if tuned < hand_set else ("hand-set", tuned, hand_set)
        other = "hand-set" if kept == "tuned" else "tuned"
        level = "no more faults than people’s" if less == 0 else f"faults {less:.1f} above people’s level"
        return f"The {kept} decoding is kept: its samples have {level}, those of the {other} one {more:.1f} above it."
    difference, low, high = choice["difference"], choice["difference_low"], choice["difference_high"]
    gap = f"{abs(difference):.2f} {'nearer to' if difference < 0 else 'farther from'} people’s texts"
    interval = f" (95\u00a0% interval: {_describe_range(low, high)})"
    if choice["kept"] == "tuned":
        return f"The tuned decoding is kept: its samples are {gap} than those of the hand-set decoding{interval}."
    chance = ", which may be chance" if difference < 0 else ""
    return f"The hand-set decoding is kept: samples of the tuned one are {gap}{chance}{interval}."


def _describe_range(low: float, high: float) -> str:
    """Describe an interval of differences; below 0 is nearer to people."""
    if high <= 0:
        return f"{-high:.2f} to {-low:.2f} nearer"
    if low >= 0:
        return f"{low:.2f} to {high:.2f} farther"
    return f"{-low:.2f} nearer to {high:.2f} farther"


def _facts(details: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return label, figures and meaning of each headline figure."""
    documents, systems, kept = details["documents"], details["systems"], details["choice"]["kept"]
    facts = [
        (label, f"{documents['base'][name]:.{decimals}f} → {documents['finetuned'][name]:.{decimals}f}", MEANING)
        for name, label, decimals in (("bits_per_byte", "bits per byte, test split", 3),)
    ]
    for name, label, form in (
        ("invented_words", "invented words", "{:.1f} per 1,000"),
        ("broken_sentences", "broken sentences", "{:.2f} per paragraph"),
        ("longest_copy_tokens", "longest verbatim copy", "{} tokens"),
    ):
        own, human = (form.format(systems[system][name]) for system in (kept, "human"))
        facts.append((label, own, f"in people’s texts: {human}"))
    return facts


def _columns(systems: Mapping[str, Any]) -> dict[str, list[Column]]:
    """Return the columns by group, without the form of the data if people's texts do not have it."""
    left_out = {"form_share"} - set(systems["human"])
    return {group: [column for column in own if column.name not in left_out] for group, own in COLUMNS.items()}


def _cells(systems: Mapping[str, Any], system: str, scales: Mapping[str, float]) -> dict[str, Cell]:
    """Return a system's row of the table, by name of the figure."""
    # People's texts have distance 0 from themselves and MAUVE 1 with themselves; neither is in their figures.
    if system == "human":
        own, human = {**systems[system], "distance": 0.0, "excess": 0.0}, {}
    else:
        own, human = systems[system], {**systems["human"], "mauve": 1.0}
    return {
        column.name: _cell(column, own.get(column.name), human.get(column.name), scales)
        for group in _columns(systems).values()
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
    """Return how far a figure is above people's (negative if below), in units of its scale in the distance.

    A figure that is not part of the distance has a tenth of people's figure as its scale.
    """
    term = column.term or column.name
    place = LOGARITHMS.get(term, float)
    gap = place(own) - place(human)
    if term in FAULTS and (gap > 0) == (term in BETTER_ABOVE):
        gap = 0.0
    return gap / scales.get(term, max(SHARE_OF_HUMAN * abs(human), LEAST_SCALE))


def _loss_chart(train: Sequence[tuple[int, float]], validation: Sequence[tuple[int, float]]) -> str | None:
    if not train and not validation:
        return None
    figure, axes = new_chart("", "optimizer step", "loss, nats per token", NARROW_INCHES)
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
    """Return the first of the lowest points: that checkpoint is kept."""
    return min(validation, key=lambda point: point[1])


def _describe_best(validation: Sequence[tuple[int, float]]) -> str:
    if not validation:
        return "No validation losses were recorded."
    (step, loss), last = _best(validation), validation[-1][0]
    if step == 0:
        return f"The validation loss was never below that of the base, {loss:.3f}: the model learned nothing."
    end = "the last evaluation: it was still falling" if step == last else f"of {last}: more steps made it worse"
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
            # One above the other, because presets may be close together.
            xytext=(12, 6 + LABEL_POINTS * height),
            textcoords="offset points",
            color=MARK,
            arrowprops={"arrowstyle": "-", "color": MARK, "linewidth": 0.7},
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
        )
    figure.legend(loc="outside lower center", ncols=3, frameon=False, labelcolor=MARK)
    described = "; ".join(
        f"{trial['preset']}: too wild {trial['too_wild']:.2f}, too tame {trial['too_tame']:.2f}" for trial in presets
    )
    return inline_chart(figure, "search", f"Trials of the search by their two faults. {described}")


def _places(trials: Iterable[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """Return the places of trials in the plot: too wild, too tame."""
    return [(trial["too_wild"], trial["too_tame"]) for trial in trials]


def _limits(trials: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Return where the axes of the plot end."""
    all_places = _places(trials)
    front = _places(trial for trial in trials if trial["on_front"]) or all_places
    ends = [
        min(FRONT_MARGIN * max(of_front), 1.1 * max(of_all)) or 1.0
        for of_front, of_all in zip(zip(*front, strict=True), zip(*all_places, strict=True), strict=True)
    ]
    return ends[0], ends[1]


def _describe_search(trials: Sequence[Mapping[str, Any]]) -> str:
    pruned = sum(trial["state"] == "pruned" for trial in trials)
    limits = _limits(trials)
    beyond = sum(wild > limits[0] or tame > limits[1] for wild, tame in _places(trials))
    sentences = [
        f"{len(trials)} trials, of which {pruned} were pruned after fewer prompts than the others.",
        "No trial beats a trial of the front in both faults.",
    ]
    winner = next((trial for trial in trials if "balanced" in (trial["preset"] or "")), None)
    if winner is not None and winner["edges"]:
        sentences.append(f"The winner is at the end of the range that was tried: {', '.join(winner['edges'])}.")
    if beyond:
        sentences.append(f"Outside the plot: {beyond}.")
    return " ".join(sentences)


def _decodings(samples: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the decoding of each of the two competing systems, without seeds."""
    return {
        system: {name: value for name, value in row["decoding"].items() if name != "seed"}
        for system in ("hand_set", "tuned")
        for row in islice((row for row in samples if row["system"] == system), 1)
    }


def _parameters(decodings: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[tuple[str, bool]]]]:
    """Return the parameters that any decoding sets: name, and per decoding the value and whether it is set."""
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
    """Return the samples side by side, prompt by prompt. Raises `ValueError` if the systems had different prompts."""
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
    """Return the text in pieces, cut wherever one of the half-open ranges of its characters starts or ends."""
    ends = sorted({0, len(text), *(end for span in (*copied, *repeated) for end in span)})
    return [
        Part(
            text[start:end],
            any(first <= start < last for first, last in copied),
            any(first <= start < last for first, last in repeated),
        )
        for start, end in pairwise(ends)
    ]
