"""Whether an engine says what the reference model says: logits, next tokens, perplexity, greedy text."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pipeline.decoding import SamplingParams
from pipeline.engine.generator import Engine
from pipeline.engine.sampling import log_softmax
from pipeline.engine.session import empty_cache, pad_left, positions, run_step
from pipeline.errors import UserError
from pipeline.params import ParityParams

GREEDY_TOKENS = 64
PROMPT_TOKENS = (3, 17, 40, 64)
"""Prompts of these lengths make the batches whose rows are unequal."""
CONTINUED_TOKENS = 8
"""Tokens fed one at a time onto a real past."""


class Reference(Protocol):
    """The model to agree with, run without padding and without a cache."""

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits `[tokens, vocabulary]` of one text."""
        ...

    def greedy(self, ids: Sequence[int], new_tokens: int) -> list[int]:
        """The likeliest continuation, on past end-of-text."""
        ...


@dataclass(frozen=True, kw_only=True)
class Parity:
    """What was found; `broken_promises` judges it."""

    max_logit_difference_empty_past: float
    max_logit_difference_real_past: float
    positions: int
    next_token_agreement: float
    perplexity_positions: int
    """The whole validation split."""
    perplexity_pytorch: float
    perplexity_onnxruntime: float
    greedy_tokens: int
    greedy_identical: bool


def measure_parity(
    engine: Engine,
    reference: Reference,
    validation: Sequence[Sequence[int]],
    more: Iterable[Sequence[int]],
    *,
    positions: int,
    show_progress: bool,
) -> Parity:
    """Compare on real texts, each of which opens with end-of-text and fits in the context.

    Next tokens and perplexity are compared over all of `validation`; where it has fewer than `positions`, next tokens
    over texts of `more` too. Logits are compared on a batch of unequal prompts, each row against the reference run
    alone, first with an empty past and then token by token; greedy text on prompts of those lengths in one batch.
    Raises `UserError` where there are too few positions, or every text is too short for a past.
    """
    wanted = _at_least(validation, more, positions)
    empty_past, real_past = _logit_differences(engine, reference, wanted)
    scored, agreed = 0, 0
    losses, validation_positions = np.zeros(2), sum(len(text) - 1 for text in validation)
    total = sum(len(text) - 1 for text in wanted)
    with tqdm(total=total, desc="parity", unit="token", disable=not show_progress) as bar:
        for text in wanted:
            ids = np.asarray(text)
            expected = reference.logits(text)[:-1]
            found = _logits_alone(engine, ids)[:-1]
            agreed += int((expected.argmax(axis=1) == found.argmax(axis=1)).sum())
            if scored < validation_positions:
                rows = np.arange(len(ids) - 1)
                losses -= [log_softmax(logits)[rows, ids[1:]].sum() for logits in (expected, found)]
            scored += len(ids) - 1
            bar.update(len(ids) - 1)
    greedy_tokens, greedy_identical = _compare_greedy(engine, reference, wanted)
    return Parity(
        max_logit_difference_empty_past=empty_past,
        max_logit_difference_real_past=real_past,
        positions=scored,
        next_token_agreement=agreed / scored,
        perplexity_positions=validation_positions,
        perplexity_pytorch=math.exp(losses[0] / validation_positions),
        perplexity_onnxruntime=math.exp(losses[1] / validation_positions),
        greedy_tokens=greedy_tokens,
        greedy_identical=greedy_identical,
    )


def _at_least(
    validation: Sequence[Sequence[int]], more: Iterable[Sequence[int]], positions: int
) -> list[Sequence[int]]:
    """All of `validation`, and of `more` so much that there are `positions`."""
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
            "that are compared; add text, or lower export.parity.positions"
        )
    return texts


def _compare_greedy(engine: Engine, reference: Reference, texts: Sequence[Sequence[int]]) -> tuple[int, bool]:
    """How many tokens were continued greedily from each of a batch of unequal prompts, and whether all are the same."""
    room = engine.context_length // 2
    texts = sorted(texts, key=len, reverse=True)[: len(PROMPT_TOKENS)]
    prompts = [list(text[: min(tokens, room)]) for tokens, text in zip(PROMPT_TOKENS, texts, strict=False)]
    new_tokens = min(GREEDY_TOKENS, engine.context_length - max(len(prompt) for prompt in prompts))
    continued = engine.generate(prompts, SamplingParams(temperature=0, ignore_eos=True, max_new_tokens=new_tokens))
    return new_tokens, all(
        completion.token_ids == reference.greedy(prompt, new_tokens)
        for prompt, completion in zip(prompts, continued, strict=True)
    )


def broken_promises(parity: Parity, tolerance: ParityParams) -> list[str]:
    """Each promise that does not hold, with what was found and what is allowed; none where parity holds."""
    broken = [
        f"a logit is off by {found:.2g} with {past} past; at most {tolerance.max_logit_difference:g} is allowed"
        for past, found in (
            ("empty", parity.max_logit_difference_empty_past),
            ("real", parity.max_logit_difference_real_past),
        )
        # Written so that NaN breaks the promise.
        if not found <= tolerance.max_logit_difference
    ]
    if not parity.next_token_agreement >= tolerance.min_next_token_agreement:
        broken.append(
            f"the next token agrees at {parity.next_token_agreement:.3%} of {parity.positions} positions; "
            f"at least {tolerance.min_next_token_agreement:.3%} is asked for"
        )
    rise = abs(parity.perplexity_onnxruntime / parity.perplexity_pytorch - 1)
    if not rise <= tolerance.max_perplexity_rise:
        broken.append(
            f"perplexity is {parity.perplexity_onnxruntime:.4f} against {parity.perplexity_pytorch:.4f} in PyTorch; "
            f"it may differ by {tolerance.max_perplexity_rise:.2%}"
        )
    if not parity.greedy_identical:
        broken.append(f"greedy continuations of {parity.greedy_tokens} tokens differ")
    return broken


def _logit_differences(engine: Engine, reference: Reference, texts: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Largest absolute difference of a logit with an empty and with a real past."""
    room = engine.context_length - CONTINUED_TOKENS
    usable = [list(text) for text in texts if len(text) > CONTINUED_TOKENS + 1]
    if not usable:
        raise UserError(
            f"parity: no text of the validation split has more than {CONTINUED_TOKENS + 1} tokens; add longer documents"
        )
    prompts = []
    for index, tokens in enumerate(PROMPT_TOKENS):
        text = usable[index % len(usable)]
        prompts.append(text[: min(tokens, room, len(text) - CONTINUED_TOKENS)])
    texts = [usable[index % len(usable)][: len(prompt) + CONTINUED_TOKENS] for index, prompt in enumerate(prompts)]
    expected = [reference.logits(text) for text in texts]
    input_ids, mask = pad_left(prompts, engine.end_of_text_id)
    position_ids = positions(mask)
    logits, cache = run_step(engine.session, input_ids, position_ids, mask, empty_cache(engine.session, len(prompts)))
    empty_past = [
        np.abs(logits[row, -len(prompt) :] - expected[row][: len(prompt)]).max() for row, prompt in enumerate(prompts)
    ]
    real_past = []
    for step in range(CONTINUED_TOKENS):
        input_ids = np.array([[text[len(prompt) + step]] for text, prompt in zip(texts, prompts, strict=True)])
        position_ids = position_ids[:, -1:] + 1
        mask = np.concatenate([mask, np.ones((len(prompts), 1), dtype=np.int64)], axis=1)
        logits, cache = run_step(engine.session, input_ids, position_ids, mask, cache)
        real_past += [
            np.abs(logits[row, 0] - expected[row][len(prompt) + step]).max() for row, prompt in enumerate(prompts)
        ]
    # NumPy's maximum, unlike the language's, is NaN where any value is.
    return float(np.max(empty_past)), float(np.max(real_past))


def _logits_alone(engine: Engine, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    mask = np.ones((1, len(ids)), dtype=np.int64)
    batch = ids[None].astype(np.int64)
    logits, _ = run_step(engine.session, batch, positions(mask), mask, empty_cache(engine.session, 1))
    return logits[0]
