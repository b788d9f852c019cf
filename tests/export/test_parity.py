"""Parity holds with the true reference, and each promise breaks on its own."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import GPT2LMHeadModel

from pipeline.engine import Engine
from pipeline.errors import UserError
from pipeline.export.parity import Parity, Reference, broken_promises, measure_parity
from pipeline.export.reference import TorchReference
from pipeline.params.export import ParityParams
from pipeline.tokens import prompt_ids

TOLERANCE = ParityParams(
    max_logit_difference=0.002,
    min_next_token_agreement=0.999,
    max_kl_divergence=1e-6,
    max_perplexity_rise=0.001,
    min_greedy_tokens=64,
)
HELD = Parity(
    max_logit_difference_empty_past=0.0001,
    max_logit_difference_real_past=0.0002,
    max_batch_difference=0.0001,
    max_cache_difference=0.0001,
    positions=2000,
    next_token_agreement=1.0,
    kl_divergence=1e-12,
    perplexity_positions=2000,
    perplexity_pytorch=20.0,
    perplexity_onnxruntime=20.001,
    greedy_tokens=64,
    greedy_agreement_tokens=64,
)
PROMISES = (
    *("with empty past", "with real past", "the next token agrees", "the distributions diverge"),
    *("perplexity", "greedy continuations"),
)


@dataclass
class Spoiled:
    """A reference that differs in one place: row `row` of any text's logits, or a greedy token."""

    reference: Reference
    row: int | None = None
    value: float = 0.0
    greedy_token: int | None = None

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        logits = self.reference.logits(ids)
        if self.row is not None and self.row < len(logits):
            logits = logits.copy()
            logits[self.row, 7] = self.value
        return logits

    def greedy(self, ids: Sequence[int], new_tokens: int) -> list[int]:
        output = self.reference.greedy(ids, new_tokens)
        return output if self.greedy_token is None else [*output[:-1], self.greedy_token]


@pytest.fixture
def reference(tiny_model: GPT2LMHeadModel) -> TorchReference:
    return TorchReference(tiny_model)


@pytest.fixture(scope="module")
def texts(tiny_tokenizer: Tokenizer) -> list[list[int]]:
    """Beginnings of documents of unequal lengths, some shorter than the prompts that parity takes."""
    sentence = "Nobody on the rock had seen the lamp go out, and nobody said so. "
    return [prompt_ids(tiny_tokenizer, (sentence * 3)[start : start + length])[:64]
            for start, length in ((0, 180), (9, 30), (20, 4), (30, 90))]  # fmt: skip


def parity_of(
    engine: Engine, reference: Reference, texts: list[list[int]], more: Sequence[list[int]] = (), positions: int = 1
) -> Parity:
    found = measure_parity({"own": engine}, reference, texts, more, positions=positions, show_progress=False)
    return found["own"]


def test_parity_with_the_true_reference_holds(
    tiny_engine: Engine, reference: TorchReference, texts: list[list[int]]
) -> None:
    parity = parity_of(tiny_engine, reference, texts)
    assert broken_promises(parity, TOLERANCE) == []
    assert parity.max_logit_difference_real_past < 1e-4
    assert max(parity.max_batch_difference, parity.max_cache_difference) < 1e-4
    assert 0 <= parity.kl_divergence < 1e-9
    assert (parity.next_token_agreement, parity.greedy_agreement_tokens) == (1.0, parity.greedy_tokens)
    assert parity.positions == sum(len(text) - 1 for text in texts)
    scores = np.concatenate(tiny_engine.score(texts))
    assert parity.perplexity_onnxruntime == pytest.approx(np.exp(-scores.mean()), rel=1e-6)


def test_a_short_validation_split_is_filled_up_with_other_text(
    tiny_engine: Engine, reference: TorchReference, texts: list[list[int]]
) -> None:
    own = sum(len(text) - 1 for text in texts)
    parity = parity_of(tiny_engine, reference, texts, more=[texts[3], texts[0], texts[0]], positions=own + 70)
    assert (parity.positions, parity.perplexity_positions) == (own + 70, own)
    assert parity.perplexity_pytorch == parity_of(tiny_engine, reference, texts).perplexity_pytorch


def test_too_little_text_is_refused(tiny_engine: Engine, reference: TorchReference, texts: list[list[int]]) -> None:
    with pytest.raises(
        UserError, match=r"^parity: .* hold \d+ tokens, fewer than the 1000 to be compared; add text, or"
    ):
        parity_of(tiny_engine, reference, texts, more=texts, positions=1000)


def test_greedy_prompts_are_unequal_and_of_different_texts(
    tiny_engine: Engine, reference: TorchReference, texts: list[list[int]]
) -> None:
    asked: list[list[int]] = []

    class Watched(Spoiled):
        def greedy(self, ids: Sequence[int], new_tokens: int) -> list[int]:
            asked.append(list(ids))
            return super().greedy(ids, new_tokens)

    assert parity_of(tiny_engine, Watched(reference), [texts[0], texts[3], [0, *texts[0][5:]]])
    assert [len(prompt) for prompt in asked] == [3, 17, 32]
    assert len({tuple(prompt[:3]) for prompt in asked}) > 1


def test_greedy_text_of_the_reference_is_that_of_generate(reference: TorchReference) -> None:
    output = reference.model.generate(
        torch.tensor([[0, 40, 41]]), attention_mask=torch.ones(1, 3), do_sample=False, max_new_tokens=20, pad_token_id=0
    )
    expected = output[0, 3:].tolist()
    assert reference.greedy([0, 40, 41], 20)[: len(expected)] == expected


def test_other_weights_break_every_promise(
    tiny_engine: Engine, reference: TorchReference, texts: list[list[int]]
) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in reference.model.parameters():
            weight += 0.1 * torch.randn_like(weight)
    broken = broken_promises(parity_of(tiny_engine, reference, texts), TOLERANCE)
    # Perplexity may fall by chance.
    assert [promise for promise in PROMISES if any(promise in line for line in broken)] in (
        [*PROMISES],
        [promise for promise in PROMISES if promise != "perplexity"],
    )


def test_weights_off_by_little_break_the_promise_on_logits(
    tiny_engine: Engine, reference: TorchReference, texts: list[list[int]]
) -> None:
    with torch.no_grad():
        reference.model.transformer.ln_f.bias[0] += 0.01
    broken = broken_promises(parity_of(tiny_engine, reference, texts), TOLERANCE)
    assert ["with empty past" in broken[0], "with real past" in broken[1]] == [True, True]


@pytest.mark.parametrize(("row", "promise"), [(10, "with empty past"), (19, "with real past")])
def test_a_nan_anywhere_breaks_the_promise_on_logits(
    row: int, promise: str, tiny_engine: Engine, reference: TorchReference, texts: list[list[int]]
) -> None:
    # The second prompt of the batch has 17 tokens: its row 19 is compared with a real past alone.
    broken = broken_promises(parity_of(tiny_engine, Spoiled(reference, row, np.nan), [texts[0][:30]] * 2), TOLERANCE)
    assert any(line.startswith("a logit is off by nan") and promise in line for line in broken)
    assert any(line.startswith("perplexity") for line in broken)


def test_another_greedy_token_breaks_its_promise_alone(
    tiny_engine: Engine, reference: TorchReference, texts: list[list[int]]
) -> None:
    parity = parity_of(tiny_engine, Spoiled(reference, greedy_token=299), texts)
    assert broken_promises(parity, TOLERANCE) == [
        "greedy continuations differ after 46 tokens; the first 47 must agree"
    ]


@pytest.mark.parametrize("bad", [float("nan"), 0.01])
@pytest.mark.parametrize("past", ["empty", "real"])
def test_the_promise_on_logits_is_named(bad: float, past: str) -> None:
    changes: dict[str, Any] = {f"max_logit_difference_{past}_past": bad}
    line = f"a logit is off by {bad:.2g} with {past} past; at most 0.002 is allowed"
    assert broken_promises(replace(HELD, **changes), TOLERANCE) == [line]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"next_token_agreement": 0.9985},
            "the next token agrees at 99.850% of 2000 positions; at least 99.900% is required",
        ),
        (
            {"perplexity_onnxruntime": 20.03},
            "perplexity is 20.0300 against 20.0000 in PyTorch; it may rise by 0.10%",
        ),
        (
            {"perplexity_onnxruntime": float("nan")},
            "perplexity is nan against 20.0000 in PyTorch; it may rise by 0.10%",
        ),
        (
            {"greedy_agreement_tokens": 12},
            "greedy continuations differ after 12 tokens; the first 64 must agree",
        ),
        (
            {"kl_divergence": 0.5},
            "the distributions diverge by 0.5 nats; at most 1e-06 is allowed",
        ),
        (
            {"max_batch_difference": 0.01},
            "a logit is off by 0.01 between a batch and the same text alone; at most 0.002 is allowed",
        ),
        (
            {"max_cache_difference": float("nan")},
            "a logit is off by nan between a text with and without a cache; at most 0.002 is allowed",
        ),
    ],
)
def test_each_promise_is_named_with_what_was_found(changes: dict[str, Any], line: str) -> None:
    assert broken_promises(HELD, TOLERANCE) == []
    assert broken_promises(replace(HELD, **changes), TOLERANCE) == [line]


def test_a_perplexity_that_falls_breaks_nothing() -> None:
    assert broken_promises(replace(HELD, perplexity_onnxruntime=19.0), TOLERANCE) == []


def test_each_precision_is_compared_with_the_same_reference(
    tiny_engine_folder: Path, tiny_engine: Engine, reference: TorchReference, texts: list[list[int]]
) -> None:
    engines = {"float32": tiny_engine, "int8": Engine.load(tiny_engine_folder, precision="int8", provider="cpu")}
    parity = measure_parity(engines, reference, texts, (), positions=1, show_progress=False)
    assert parity["float32"] == parity_of(tiny_engine, reference, texts)
    assert parity["int8"].perplexity_pytorch == parity["float32"].perplexity_pytorch
    assert parity["int8"].kl_divergence > 1e-6
    # KL divergence of hand: the mean over positions of sum p (ln p - ln q).
    total, count = 0.0, 0
    for text in texts:
        wanted, found = (
            torch.from_numpy(np.asarray(logits)).double().log_softmax(-1)[:-1]
            for logits in (reference.logits(text), engines["int8"].session.read(text, 0)[0])
        )
        total += float(torch.nn.functional.kl_div(found, wanted, log_target=True, reduction="sum"))
        count += len(wanted)
    assert parity["int8"].kl_divergence == pytest.approx(total / count, rel=1e-6)


def test_texts_too_short_to_compare_are_refused(tiny_engine: Engine, reference: TorchReference) -> None:
    with pytest.raises(UserError, match=r"^parity: no text of the validation split has more than 9 tokens"):
        parity_of(tiny_engine, reference, [[0, 5, 6, 0]])
