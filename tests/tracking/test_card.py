"""The model card: what it says, and that the registry takes it."""

from dataclasses import replace
from typing import Any

import pytest
from changed_params import ROOT

from pipeline.decoding import ModelDecoding, SamplingParams
from pipeline.params.register import RegisterParams
from pipeline.params.section import PARAMS_FILE, read_yaml
from pipeline.tracking.card import LONGEST, Card, render_card
from pipeline.tracking.notes import GAP

PARAMETERS: dict[str, Any] = read_yaml(ROOT / PARAMS_FILE)
FOUND = {"kl_divergence": 8.086e-4, "next_token_agreement": 0.97848}
SYSTEM = {"excess": 2.03, "invented_words": 3.1, "rep_4": 0.0244, "longest_copy_tokens": 15, "distance": 25.14}
HUMAN = {"invented_words": 3.09, "rep_4": 0.0092, "longest_copy_tokens": 12}
PRESETS = {
    "balanced": SamplingParams(temperature=0.9, min_p=0.08),
    "faithful": SamplingParams(temperature=0.85, top_k=50),
}


@pytest.fixture
def card() -> Card:
    details = {
        "protocol": {"documents": 43, "samples": 40, "window_tokens": 1024},
        "documents": {
            "base": {"bits_per_byte": 1.741, "perplexity": 75.88},
            "finetuned": {"bits_per_byte": 1.478, "perplexity": 39.48},
        },
        "systems": {"human": HUMAN, "tuned": SYSTEM, "untuned_base": {**SYSTEM, "excess": 57.1}},
        "choice": {"kept": "tuned"},
    }
    return Card(
        params=RegisterParams(name="harbour-tales", about="Tales of a town.", licence="CC0-1.0"),
        version=3,
        parameters=PARAMETERS,
        details=details,
        parity={"float32": {"kl_divergence": 2.2e-12, "next_token_agreement": 1.0}, "int8": FOUND},
        megabytes={"float32": 28.0, "int8": 7.7},
        decoding=ModelDecoding(PRESETS["balanced"], PRESETS),
        holds_text=True,
        again="`git checkout c0ffee && dvc repro` makes it again.",
        links={"Report": "#/report", "Fine-tuning": "#/run"},
    )


def test_a_card_says_what_the_model_is_and_how_good(card: Card) -> None:
    lines = render_card(card).replace(GAP, "").splitlines()
    assert lines[0] == "Tales of a town."
    assert "[Report](#/report) · [Fine-tuning](#/run)" in lines
    assert "| bits per byte | 1.741 | 1.478 |" in lines
    assert "| perplexity per token | 75.9 | 39.5 |" in lines
    assert "| samples | people | this model | the base |" in lines
    assert "| faults above people's level | 0.0 | 2.0 | 57.1 |" in lines
    assert "| repeated 4-grams | 0.009 | 0.024 | 0.024 |" in lines
    assert "| int8 | 7.7 | 8.1e-04 | 97.85% |" in lines
    assert "| faithful | temperature 0.85, top_k 50 |" in lines
    assert "`git checkout c0ffee && dvc repro` makes it again." in lines
    assert "- Licence: CC0-1.0." in lines
    assert any("longest copy in the samples is 15 tokens" in line for line in lines)
    assert any("contains the training text" in line for line in lines)


def test_a_card_says_why_a_precision_is_missing(card: Card) -> None:
    reason = "the distributions diverge by 0.5 nats; at most 0.01 is allowed"
    parity = {**card.parity, "int8": {**FOUND, "left_out": reason}}
    lines = render_card(replace(card, parity=parity, megabytes={"float32": 28.0})).replace(GAP, "").splitlines()
    assert "| int8 | left out | 8.1e-04 | 97.85% |" in lines
    assert f"- It has no int8, which differs too much from PyTorch: {reason}." in lines


def test_the_code_on_a_card_is_python(card: Card) -> None:
    prompts = {"finetune": {**PARAMETERS["finetune"], "samples": {"prompts": ["", 'Say "yes"\n\\']}}}
    text = render_card(replace(card, parameters={**PARAMETERS, **prompts}))
    code = text.partition("```python\n")[2].partition("```")[0]
    compile(code, "card", "exec")
    assert 'load_model("models:/harbour-tales/3")' in code


def test_a_card_says_what_nobody_has_said(card: Card) -> None:
    text = render_card(replace(card, params=RegisterParams(name="t", about=None, licence=None), holds_text=False))
    assert text.startswith("Nobody has said what this model is for: set `register.about`.")
    assert "- Licence: not stated (`register.licence`)." in text
    assert "contains the training text" not in text


def test_the_registry_takes_a_long_card(card: Card) -> None:
    presets = {f"preset-{number}": PRESETS["balanced"] for number in range(200)}
    assert len(render_card(replace(card, decoding=ModelDecoding(SamplingParams(), presets)))) == LONGEST
