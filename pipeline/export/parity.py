"""Compare an engine with the reference model: logits, next tokens, distributions, perplexity, greedy text."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pipeline.decoding import SamplingParams
from pipeline.engine.filters import gather_logprobs, log_softmax
from pipeline.engine.generator import Engine
from pipeline.errors import UserError
from pipeline.params.export import ParityParams

GREEDY_TOKENS = 64
PROMPT_TOKENS = (3, 17, 40, 64)
"""The lengths of the prompts that make batches of unequal rows."""
CONTINUED_TOKENS = 8
"""The number of tokens fed one at a time after a real past."""
COMPARED_ROWS = 128
"""The number of positions at a time at which whole distributions are compared, in float64."""

Logits = NDArray[np.float32]
Read = Callable[[Sequence[int]], Logits]
"""Returns the logits of one text, `[tokens, vocabulary]`."""


class Reference(Protocol):
    """The model to compare with, in float32, run without padding and without a cache."""

    def logits(self, ids: Sequence[int]) -> Logits:
        """Return the logits of one text, `[tokens, vocabulary]`."""
        ...

    def greedy(self, ids: Sequence[int], new_tokens: int) -> list[int]:
        """Return the greedy continuation, past any end-of-text."""
        ...


@dataclass(frozen=True, kw_only=True)
class Closeness:
    """How close a model's distributions are to those of the reference."""

    positions: int
    next_token_agreement: float
    kl_divergence: float
    """The mean over the positions of the model's divergence from the reference, in nats."""
    perplexity_positions: int
    reference_perplexity: float
    perplexity: float


@dataclass(frozen=True, kw_only=True)
class Parity:
    """The figures of one precision; `broken_promises` judges them."""

    max_logit_difference_empty_past: float
    max_logit_difference_real_past: float
    max_batch_difference: float
    """The largest difference of a logit between a row in a batch and the same row alone."""
    max_cache_difference: float
    """The largest difference of a logit between tokens fed one at a time and the whole text at once."""
    positions: int
    next_token_agreement: float
    kl_divergence: float
    """The mean over the positions of the engine's divergence from the reference, in nats."""
    perplexity_positions: int
    """The number of positions of the whole validation split."""
    perplexity_pytorch: float
    perplexity_onnxruntime: float
    greedy_tokens: int
    greedy_agreement_tokens: int
    """The number of tokens for which every greedy continuation is the reference's."""


def measure_parity(
    engines: Mapping[str, Engine],
    reference: Reference,
    validation: Sequence[Sequence[int]],
    more: Iterable[Sequence[int]],
    *,
    positions: int,
    show_progress: bool,
) -> dict[str, Parity]:
    """Compare each engine on real texts, each of which opens with end-of-text and fits in the context.

    Next tokens, distributions and perplexity are compared over all of `validation`; if it has fewer than `positions`,
    the first two over texts of `more`, too. Logits are compared on unequal prompts, each with the reference run alone:
    first with an empty past, then token by token in a batch. Greedy text is compared on prompts of those lengths in one
    batch. Raises `UserError` if there are too few positions, or every text is too short for a past.
    """
    texts = _take_positions(validation, more, positions)
    closeness = measure_closeness(
        {name: engine_reader(engine) for name, engine in engines.items()},
        reference.logits,
        texts,
        scored_texts=len(validation),
        show_progress=show_progress,
    )
    prompts = _prompts(texts, min(engine.context_length for engine in engines.values()))
    new_tokens = min(GREEDY_TOKENS, *(engine.context_length - max(map(len, prompts)) for engine in engines.values()))
    greedy = [reference.greedy(prompt, new_tokens) for prompt in prompts]
    continued = _split_texts(texts, min(engine.context_length for engine in engines.values()))
    expected_rows = [reference.logits(text) for _, text in continued]
    return {
        name: Parity(
            **_logit_differences(engine, continued, expected_rows),
            positions=closeness[name].positions,
            next_token_agreement=closeness[name].next_token_agreement,
            kl_divergence=closeness[name].kl_divergence,
            perplexity_positions=closeness[name].perplexity_positions,
            perplexity_pytorch=closeness[name].reference_perplexity,
            perplexity_onnxruntime=closeness[name].perplexity,
            greedy_tokens=new_tokens,
            greedy_agreement_tokens=_greedy_agreement(engine, prompts, greedy, new_tokens),
        )
        for name, engine in engines.items()
    }


def measure_closeness(
    readers: Mapping[str, Read],
    reference: Read,
    texts: Sequence[Sequence[int]],
    *,
    scored_texts: int | None = None,
    show_progress: bool,
) -> dict[str, Closeness]:
    """Compare distributions and perplexity over texts, each of which opens with end-of-text and fits in the context.

    Perplexity is that of the first `scored_texts`, by default of all. Raises `UserError` if there is no token to score.
    """
    scored_texts = len(texts) if scored_texts is None else scored_texts
    total, scored = (sum(len(text) - 1 for text in some) for some in (texts, texts[:scored_texts]))
    if scored == 0:
        raise UserError("parity: the texts to compare on hold no token; take a split that has some")
    tallies = {name: _Tally() for name in readers}
    expected_loss = 0.0
    with tqdm(total=total, desc="parity", unit="token", disable=not show_progress) as bar:
        for index, text in enumerate(texts):
            expected = reference(text)[:-1]
            is_scored = index < scored_texts
            if is_scored:
                expected_loss += _loss(expected, text)
            for name, read in readers.items():
                tallies[name].add(read(text)[:-1], expected, text, is_scored)
            bar.update(len(expected))
    return {
        name: Closeness(
            positions=total,
            next_token_agreement=tally.agreed / total,
            kl_divergence=tally.divergence / total,
            perplexity_positions=scored,
            reference_perplexity=_exp(expected_loss / scored),
            perplexity=_exp(tally.loss / scored),
        )
        for name, tally in tallies.items()
    }


def engine_reader(engine: Engine) -> Read:
    """Return what reads a text with an engine."""
    return lambda text: engine.session.read(text, 0)[0]


def broken_promises(parity: Parity, tolerance: ParityParams) -> list[str]:
    """Return each promise that does not hold, with what was found and what is allowed; empty if parity holds."""
    broken = [
        f"a logit is off by {found:.2g} {where}; at most {tolerance.max_logit_difference:g} is allowed"
        for where, found in (
            ("with empty past", parity.max_logit_difference_empty_past),
            ("with real past", parity.max_logit_difference_real_past),
            ("between a batch and the same text alone", parity.max_batch_difference),
            ("between a text with and without a cache", parity.max_cache_difference),
        )
        # Negated so that NaN breaks the promise.
        if not found <= tolerance.max_logit_difference
    ]
    if not parity.next_token_agreement >= tolerance.min_next_token_agreement:
        broken.append(
            f"the next token agrees at {parity.next_token_agreement:.3%} of {parity.positions} positions; "
            f"at least {tolerance.min_next_token_agreement:.3%} is required"
        )
    if not parity.kl_divergence <= tolerance.max_kl_divergence:
        broken.append(
            f"the distributions diverge by {parity.kl_divergence:.2g} nats; "
            f"at most {tolerance.max_kl_divergence:g} is allowed"
        )
    rise = parity.perplexity_onnxruntime / parity.perplexity_pytorch - 1
    if not rise <= tolerance.max_perplexity_rise:
        broken.append(
            f"perplexity is {parity.perplexity_onnxruntime:.4f} against {parity.perplexity_pytorch:.4f} in PyTorch; "
            f"it may rise by {tolerance.max_perplexity_rise:.2%}"
        )
    wanted = min(tolerance.min_greedy_tokens, parity.greedy_tokens)
    if not parity.greedy_agreement_tokens >= wanted:
        broken.append(f"greedy continuations differ after {parity.greedy_agreement_tokens} tokens; "
                      f"the first {wanted} must agree")  # fmt: skip
    return broken


class _Tally:
    """A model's sums over the positions of the texts."""

    def __init__(self) -> None:
        self.agreed = 0
        self.divergence = 0.0
        self.loss = 0.0

    def add(self, found: Logits, expected: Logits, text: Sequence[int], is_scored: bool) -> None:
        self.agreed += int((expected.argmax(axis=1) == found.argmax(axis=1)).sum())
        for start in range(0, len(found), COMPARED_ROWS):
            rows = slice(start, start + COMPARED_ROWS)
            logprobs, wanted = log_softmax(found[rows]), log_softmax(expected[rows])
            self.divergence += float((np.exp(wanted) * (wanted - logprobs)).sum())
        if is_scored:
            self.loss += _loss(found, text)


def _loss(logits: Logits, text: Sequence[int]) -> float:
    """Return the negative log-likelihood of the text's tokens after the first, in nats."""
    followers = text[1:]
    starts = range(0, len(logits), COMPARED_ROWS)
    parts = (slice(start, start + COMPARED_ROWS) for start in starts)
    return -sum(float(gather_logprobs(logits[part], followers[part]).sum()) for part in parts)


def _exp(value: float) -> float:
    """Return the exponential; infinity where `math.exp` would raise."""
    return float(np.exp(np.float64(min(value, 1e4)))) if not math.isnan(value) else value


def _take_positions(
    validation: Sequence[Sequence[int]], more: Iterable[Sequence[int]], positions: int
) -> list[Sequence[int]]:
    """Return all of `validation`, and as much of `more` as makes `positions`."""
    texts = list(validation)
    missing = positions - sum(len(text) - 1 for text in texts)
    for text in more:
        if missing <= 0:
            break
        texts.append(text[: missing + 1])
        missing -= len(texts[-1]) - 1
    if missing > 0:
        raise UserError(
            f"parity: the training and validation splits hold {positions - missing} tokens, fewer than the {positions} "
            "to be compared; add text, or lower export.parity.positions"
        )
    return texts


def _prompts(texts: Sequence[Sequence[int]], context_length: int) -> list[list[int]]:
    """Return beginnings, of unequal lengths, of the longest texts."""
    longest = sorted(texts, key=len, reverse=True)[: len(PROMPT_TOKENS)]
    room = context_length // 2
    return [list(text[: min(tokens, room)]) for tokens, text in zip(PROMPT_TOKENS, longest, strict=False)]


def _greedy_agreement(engine: Engine, prompts: list[list[int]], expected: list[list[int]], new_tokens: int) -> int:
    params = SamplingParams(temperature=0, ignore_eos=True, max_new_tokens=new_tokens)
    completions = engine.generate(prompts, params)
    return min(
        next((step for step, pair in enumerate(zip(done.token_ids, wanted, strict=True)) if pair[0] != pair[1]),
             new_tokens)
        for done, wanted in zip(completions, expected, strict=True)
    )  # fmt: skip


def _split_texts(texts: Sequence[Sequence[int]], context_length: int) -> list[tuple[int, list[int]]]:
    """Return texts of unequal lengths, each with the length of its prompt; the rest is fed a token at a time."""
    room = context_length - CONTINUED_TOKENS
    usable = [list(text) for text in texts if len(text) > CONTINUED_TOKENS + 1]
    if not usable:
        raise UserError(
            f"parity: no text of the validation split has more than {CONTINUED_TOKENS + 1} tokens; add longer documents"
        )
    continued = []
    for index, tokens in enumerate(PROMPT_TOKENS):
        text = usable[index % len(usable)]
        prompt = min(tokens, room, len(text) - CONTINUED_TOKENS)
        continued.append((prompt, text[: prompt + CONTINUED_TOKENS]))
    return continued


def _logit_differences(
    engine: Engine, continued: list[tuple[int, list[int]]], expected: list[Logits]
) -> dict[str, float]:
    """Return the largest absolute differences of a logit."""
    session = engine.session
    empty_past, real_past, of_batch, of_cache = [], [], [], []
    at_once = [session.read(text, 0)[0] for _, text in continued]
    together = _feed_one_at_a_time(engine, continued)
    for row, (prompt, text) in enumerate(continued):
        (alone,) = _feed_one_at_a_time(engine, [(prompt, text)])
        empty_past.append(np.abs(at_once[row][:prompt] - expected[row][:prompt]).max())
        real_past.append(np.abs(together[row] - expected[row][prompt:]).max())
        of_batch.append(np.abs(together[row] - alone).max())
        of_cache.append(np.abs(alone - at_once[row][prompt:]).max())
    # NumPy's maximum, unlike Python's, is NaN if any value is.
    return {
        "max_logit_difference_empty_past": float(np.max(empty_past)),
        "max_logit_difference_real_past": float(np.max(real_past)),
        "max_batch_difference": float(np.max(of_batch)),
        "max_cache_difference": float(np.max(of_cache)),
    }


def _feed_one_at_a_time(engine: Engine, continued: list[tuple[int, list[int]]]) -> list[Logits]:
    """Feed the texts as rows of a batch, and return their logits after the prompt, `[CONTINUED_TOKENS, vocabulary]`."""
    session = engine.session
    for slot, (prompt, text) in enumerate(continued):
        session.prefill(slot, text[:prompt], 0)
    found = []
    for step in range(CONTINUED_TOKENS):
        places = [prompt + step for prompt, _ in continued]
        session.decode([text[place] for place, (_, text) in zip(places, continued, strict=True)], places)
        found.append(session.logits[: len(continued)].copy())
    return list(np.stack(found, axis=1))
