"""What the description of a run says, in Markdown: a section per stage, with figures and links."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.tracking.tags import COMMIT_TAG, DIRTY_TAG, EXPERIMENT_TAG, RESTORED_TAG

GAP = "\u00a0" * 2
"""Ends each cell of a table, as MLflow's page of a version puts no space between columns."""


def set_section(note: str, heading: str, text: str) -> str:
    """Return the note with the text under the heading, in place of the text that was there; all else stays."""
    above, *parts = re.split(r"^## (.+)\n", note, flags=re.MULTILINE)
    sections = [(name, body.strip()) for name, body in zip(parts[::2], parts[1::2], strict=True)]
    place = next((index for index, (name, _) in enumerate(sections) if name == heading), len(sections))
    sections[place : place + 1] = [(heading, text.strip())]
    written = [f"## {name}\n\n{body}" for name, body in sections]
    return "\n\n".join([above.strip(), *written] if above.strip() else written)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table; line ends in a cell become spaces."""
    cells = [[" ".join(str(cell).split()).replace("|", "\\|") + GAP for cell in line] for line in (header, *rows)]
    cells.insert(1, ["---"] * len(header))
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def number(value: float | None, places: int = 3) -> str:
    """Return a figure with commas and this many decimal places; None becomes a dash."""
    return "–" if value is None else f"{value:,.{places}f}"


def how_to_make_again(tags: Mapping[str, str]) -> str:
    """Return how to make again what a run with these tags recorded."""
    commit = tags.get(COMMIT_TAG)
    if RESTORED_TAG in tags:
        return "Recorded again from its files, in a store that lacked it."
    if commit is None:
        return "Made outside of git: which code made it is unknown."
    if EXPERIMENT_TAG in tags:
        # It holds all that was changed.
        return f"`git checkout {commit} && dvc exp apply {tags[EXPERIMENT_TAG]} && dvc repro` makes it again."
    if tags.get(DIRTY_TAG) == "true":
        return f"Made from commit `{commit}` with changes that were not committed."
    return f"`git checkout {commit} && dvc repro` makes it again."


def describe_finetuning(details: Mapping[str, Any], changes: str, again: str) -> str:
    """Describe a fine-tuning by the figures that `finetune` wrote."""
    perplexity = details.get("validation_perplexity")
    lines = [
        f"Validation loss {number(details.get('base_validation_loss'))} of the base → "
        f"**{number(details['validation_loss'])}** (perplexity {number(perplexity, 1)}), at step "
        f"{details.get('best_step', '–')} of {details['steps']}.",
        f"Changed since the last commit of `dvc.lock`: {changes}." if changes else "",
        again,
    ]
    return "\n\n".join(line for line in lines if line)


def describe_search(trials: Sequence[Mapping[str, Any]], scores: Mapping[str, float], winner: Mapping[str, Any]) -> str:
    """Describe a search for decoding parameters: its trials, the figures of the winner, and its parameters."""
    pruned = sum(trial["state"] == "pruned" for trial in trials)
    found = ", ".join(f"{name} {value:g}" for name, value in winner.items())
    return (
        f"{len(trials)} trials, of which {pruned} were ended early. The winner: {found}. On the validation prompts it "
        f"has {number(scores.get('validation_excess'), 1)} faults above people's level; its distance from their texts "
        f"is {number(scores.get('validation_distance'), 1)}."
    )


def join_links(links: Mapping[str, str]) -> str:
    """Return links in a line; `links` has their addresses by their titles."""
    return " · ".join(f"[{title}]({page})" for title, page in links.items())


def describe_evaluation(details: Mapping[str, Any], links: Mapping[str, str]) -> str:
    """Describe an evaluation; `links` are its pages."""
    documents, kept = details["documents"], details["choice"]["kept"]
    system = details["systems"][kept]
    rows = [
        [name.replace("_", " "), *(number(documents[model].get(name)) for model in ("base", "finetuned"))]
        for name in ("bits_per_byte", "perplexity")
    ]
    return "\n\n".join(
        [
            table(["test split", "base", "fine-tuned"], rows),
            f"The decoding that is kept is the {kept.replace('_', '-')} one: {number(system.get('excess'), 1)} faults "
            f"above people's level, {number(system.get('invented_words'), 1)} invented words per 1,000, "
            f"distance from human text {number(system.get('distance'), 1)}.",
            join_links(links),
        ]
    )


def describe_registration(name: str, version: int | str, page: str) -> str:
    """Describe a registration; `page` is the address of the version's page, which shows its aliases."""
    return f"[{name} version {version}]({page})"
