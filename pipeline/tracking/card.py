"""The model card: the description, in Markdown, of a version in the registry."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.decoding import ModelDecoding, read_decoding
from pipeline.engine.manifest import measure_megabytes, read_manifest
from pipeline.files import read_json
from pipeline.params.register import RegisterParams
from pipeline.tracking.lineage import shorten
from pipeline.tracking.notes import join_links, number, table

LONGEST = 5000
"""The most characters that MLflow's store takes."""
LONGEST_PROMPT = 80
"""The most characters of a prompt that the card's example shows."""
SAMPLE_FIGURES = {
    "excess": ("faults above people's level", 1),
    "invented_words": ("invented words per 1,000", 1),
    "rep_4": ("repeated 4-grams", 3),
    "longest_copy_tokens": ("longest verbatim copy, tokens", 0),
    "distance": ("distance from human text", 1),
}
"""The figures of samples on the card, with their labels and decimal places."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a card says."""

    params: RegisterParams
    version: int | str
    parameters: Mapping[str, Any]
    """The parsed `params.yaml`."""
    details: Mapping[str, Any]
    """The contents of the evaluation's `details.json`."""
    parity: Mapping[str, Mapping[str, Any]]
    """The contents of `parity.json`."""
    megabytes: Mapping[str, float]
    """The size of each precision's files, without those that are left out."""
    decoding: ModelDecoding
    holds_text: bool
    """Whether the version contains the training text."""
    again: str
    """How to make it again."""
    links: Mapping[str, str]
    """The addresses of pages, by their titles."""


def read_card(
    params: RegisterParams,
    version: int | str,
    parameters: Mapping[str, Any],
    export: Path,
    evaluate: Path,
    *,
    again: str,
    links: Mapping[str, str],
) -> Card:
    """Return the card of the version with the files of the export and evaluate stages."""
    parity = read_json(export / "parity.json")
    return Card(
        params=params,
        version=version,
        parameters=parameters,
        details=read_json(evaluate / "details.json"),
        parity=parity,
        megabytes={
            precision: measure_megabytes(export / "engine", precision)
            for precision, found in parity.items()
            if "left_out" not in found
        },
        decoding=read_decoding(evaluate / "decoding.json", evaluate / "presets.json"),
        holds_text=read_manifest(export / "engine").holds_index,
        again=again,
        links=links,
    )


def render_card(card: Card) -> str:
    """Return the card."""
    prompt = next((prompt for prompt in card.parameters["finetune"]["samples"]["prompts"] if prompt), "Once")
    parts = [
        card.params.about or "Nobody has said what this model is for: set `register.about`.",
        join_links(card.links),
        "### Scores\n\n" + _scores(card.details),
        f"What it writes after {card.details['protocol']['samples']} beginnings of the test split:",
        _samples(card.details),
        "### Use\n\n" + _use(f"models:/{card.params.name}/{card.version}", prompt.strip()[:LONGEST_PROMPT]),
        _presets(card.decoding),
        "Each precision compared with PyTorch:",
        _precisions(card.parity, card.megabytes),
        "### Made from\n\n" + _sources(card.parameters, card.details) + "\n\n" + card.again,
        "### Limits\n\n" + _limits(card),
    ]
    text = "\n\n".join(part for part in parts if part)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def _scores(details: Mapping[str, Any]) -> str:
    documents = details["documents"]
    rows = [
        [label, *(number(documents[model][name], places) for model in ("base", "finetuned"))]
        for name, label, places in (("bits_per_byte", "bits per byte", 3), ("perplexity", "perplexity per token", 1))
    ]
    return table([f"test split, {details['protocol']['documents']} documents", "base", "fine-tuned"], rows)


def _samples(details: Mapping[str, Any]) -> str:
    systems, kept = details["systems"], details["choice"]["kept"]
    shown = {"people": systems["human"], "this model": systems[kept], "the base": systems["untuned_base"]}
    # People have no faults above their own level, and no distance from themselves.
    of_people = {"excess": 0.0, "distance": 0.0}
    rows = [
        [label, *(number(system.get(name, of_people.get(name)), places) for system in shown.values())]
        for name, (label, places) in SAMPLE_FIGURES.items()
    ]
    return table(["samples", *shown], rows)


def _use(uri: str, prompt: str) -> str:
    return (
        "```python\n"
        "import mlflow\n\n"
        f'model = mlflow.pyfunc.load_model("{uri}")\n'
        f'model.predict([{json.dumps(prompt, ensure_ascii=False)}], params={{"preset": "balanced", "seed": 7}})\n'
        "```\n\n"
        f"`python -m pipeline serve --model {shlex.quote(uri)}` serves it with OpenAI's API."
    )


def _presets(decoding: ModelDecoding) -> str:
    rows = [
        [name, ", ".join(f"{key} {shorten(value)}" for key, value in preset.to_mapping().items())]
        for name, preset in {"(default)": decoding.default, **decoding.presets}.items()
    ]
    return table(["preset", "decoding"], rows)


def _precisions(parity: Mapping[str, Mapping[str, Any]], megabytes: Mapping[str, float]) -> str:
    rows = [
        [
            precision,
            number(megabytes[precision], 1) if precision in megabytes else "left out",
            f"{found['kl_divergence']:.1e}",
            f"{found['next_token_agreement']:.2%}",
        ]
        for precision, found in parity.items()
    ]
    return table(["precision", "MB", "KL divergence", "same next token"], rows)


def _sources(parameters: Mapping[str, Any], details: Mapping[str, Any]) -> str:
    base, finetune = parameters["base"], parameters["finetune"]
    revision = f" at `{base['revision']}`" if base.get("revision") else ""
    return (
        f"Base `{base['source']}`{revision}, fine-tuned for {finetune['epochs']} epochs with a learning rate of "
        f"{finetune['learning_rate']:g}; the context is {details['protocol']['window_tokens']:,} tokens."
    )


def _limits(card: Card) -> str:
    copied = card.details["systems"][card.details["choice"]["kept"]]["longest_copy_tokens"]
    lines = [
        "It continues texts of the kind that it was trained on, and follows no instructions. What it says is invented.",
        f"It can quote its training text: the longest copy in the samples is {copied} tokens.",
        *(
            f"It has no {precision}, which differs too much from PyTorch: {found['left_out']}."
            for precision, found in card.parity.items()
            if "left_out" in found
        ),
        "The version contains the training text, for `max_verbatim_tokens`." if card.holds_text else "",
        f"Licence: {card.params.licence or 'not stated (`register.licence`)'}.",
    ]
    return "\n".join(f"- {line}" for line in lines if line)
