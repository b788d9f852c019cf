"""The engine: batches of requests through prefill and decode, a token drawn for each row and step."""

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.decoding import SamplingParams
from pipeline.engine.sampling import check_token_ids, log_softmax, sample, token_logprobs
from pipeline.engine.session import Session, empty_cache, load_session, pad_left, positions, run_step
from pipeline.errors import UserError

FinishReason = Literal["stop", "length"]
"""`stop`: end-of-text or a stop id was drawn. `length`: `max_new_tokens` or the end of the context was reached."""

BATCH_TOKENS = 4096
"""The graph gives logits at every position: 0.8 GB for so many tokens of GPT-2's vocabulary."""


@dataclass(frozen=True, slots=True)
class Token:
    """A step of a stream. The last one carries the finish reason; its `token_id` is None where it ended by `stop`."""

    token_id: int | None
    logprob: float | None = None
    """Natural log-probability before any filter, where `SamplingParams.logprobs` asks for it."""
    top_logprobs: dict[int, float] | None = None
    finish_reason: FinishReason | None = None


@dataclass(slots=True)
class Completion:
    """One continuation, without the token that ended it."""

    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason = "length"
    logprobs: list[float] | None = None
    top_logprobs: list[dict[int, float]] | None = None


@dataclass(slots=True)
class _Row:
    """A continuation in the making."""

    context: list[int]
    """What the model is fed before the first new token; never empty."""
    params: SamplingParams
    seed: int
    choice: int
    history: list[int]
    """The prompt as the filters see it."""
    output: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None


def bounded_batches(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Cut rows of these lengths, in order, into batches (start, end) whose logits fit in memory.

    A batch holds at most `BATCH_TOKENS` tokens, padding included, or one row.
    """
    start, longest = 0, 0
    for index, length in enumerate(lengths):
        longest = max(longest, length)
        if start < index and (index + 1 - start) * longest > BATCH_TOKENS:
            yield start, index
            start, longest = index, length
    if start < len(lengths):
        yield start, len(lengths)


class Engine:
    """GPT-2 on ONNX Runtime. `Engine.load` makes one; safe to use from one thread at a time."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.manifest = session.manifest

    @classmethod
    def load(
        cls, folder: str | Path, *, precision: str = "auto", provider: str = "auto", threads: int | None = None
    ) -> "Engine":
        """Load an exported engine.

        `precision` is one that the folder holds; `provider` is `auto`, `cpu` or `cuda`, and one that cannot run is an
        error; `threads` is how many cores one operator may use, all of them by default. Raises `UserError`.
        """
        return cls(load_session(Path(folder), precision=precision, provider=provider, threads=threads))

    @property
    def end_of_text_id(self) -> int:
        return self.manifest.end_of_text_id

    @property
    def context_length(self) -> int:
        return self.manifest.context_length

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Completion]:
        """Continue every prompt, in batches; choice j of prompt i stands at `i * n + j`.

        `params` is for all prompts, or one for each. An empty prompt starts from end-of-text. A prompt's opening
        end-of-text is context: penalties and n-grams do not count it. What is drawn for a prompt does not depend on
        its neighbours but through rounding of their shared computation. Raises `UserError` for a prompt that leaves
        no room in the context, or ids outside the vocabulary.
        """
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        rows = [row for prompt, own in zip(prompts, each, strict=True) for row in self._rows(prompt, own)]
        completions = [
            Completion(
                logprobs=None if row.params.logprobs is None else [],
                top_logprobs=None if row.params.logprobs is None else [],
            )
            for row in rows
        ]
        batches = bounded_batches([len(row.context) for row in rows])
        tokens = ((start + index, token) for start, end in batches for index, token in self._run(rows[start:end]))
        for index, token in tokens:
            completion = completions[index]
            if token.token_id is not None:
                completion.token_ids.append(token.token_id)
                if completion.logprobs is not None and completion.top_logprobs is not None:
                    completion.logprobs.append(token.logprob or 0.0)
                    completion.top_logprobs.append(token.top_logprobs or {})
            if token.finish_reason is not None:
                completion.finish_reason = token.finish_reason
        return completions

    def stream(self, prompt: Sequence[int], params: SamplingParams) -> Iterator[Token]:
        """Continue one prompt, a token at a time; closing the iterator cancels. `params.n` must be 1."""
        if params.n != 1:
            raise UserError(f"n: a stream is one continuation, got {params.n}")
        return (token for _, token in self._run(self._rows(prompt, params)))

    def score(self, texts: Sequence[Sequence[int]]) -> list[NDArray[np.float64]]:
        """Natural log-probability of each token of each text but its first: float64 `[tokens - 1]` a text.

        Raises `UserError` for a text without tokens, longer than the context, or with ids outside the vocabulary.
        """
        for ids in texts:
            self._check_ids("text", ids)
            if len(ids) == 0:
                raise UserError("text: has no tokens; give at least one, such as end-of-text")
            if len(ids) > self.context_length:
                raise UserError(f"text: {len(ids)} tokens do not fit in the context of {self.context_length}")
        logprobs: list[NDArray[np.float64]] = [np.zeros(0)] * len(texts)
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        while order:
            longest = len(texts[order[-1]])
            batch = [order.pop() for _ in range(min(len(order), max(1, BATCH_TOKENS // longest)))]
            # Padding stands on the right: no token attends to what follows it.
            input_ids = np.full((len(batch), longest), self.end_of_text_id, dtype=np.int64)
            for row, index in enumerate(batch):
                input_ids[row, : len(texts[index])] = texts[index]
            mask = np.ones_like(input_ids)
            cache = empty_cache(self.session, len(batch))
            logits, _ = run_step(self.session, input_ids, positions(mask), mask, cache)
            for row, index in enumerate(batch):
                count = len(texts[index]) - 1
                rows = log_softmax(logits[row, :count])
                logprobs[index] = rows[np.arange(count), input_ids[row, 1 : count + 1]]
        return logprobs

    def _rows(self, prompt: Sequence[int], params: SamplingParams) -> list[_Row]:
        self._check_ids("prompt", prompt)
        check_token_ids(params, self.manifest.vocabulary_size)
        context = list(prompt) or [self.end_of_text_id]
        if len(context) >= self.context_length:
            raise UserError(
                f"prompt: {len(context)} tokens leave no room in the context of {self.context_length}; shorten it"
            )
        history = context[1:] if context[0] == self.end_of_text_id else context
        seed = secrets.randbits(63) if params.seed is None else params.seed
        return [_Row(context, params, seed, choice, history) for choice in range(params.n)]

    def _check_ids(self, name: str, ids: Sequence[int]) -> None:
        for token_id in ids:
            if not 0 <= token_id < self.manifest.vocabulary_size:
                raise UserError(f"{name}: token id {token_id} is not in [0, {self.manifest.vocabulary_size})")

    def _run(self, rows: list[_Row]) -> Iterator[tuple[int, Token]]:
        """Prefill, then decode until every row has finished; yields the row's index with each of its tokens."""
        if not rows:
            return
        input_ids, mask = pad_left([row.context for row in rows], self.end_of_text_id)
        position_ids = positions(mask)
        cache = empty_cache(self.session, len(rows))
        while True:
            logits, cache = run_step(self.session, input_ids, position_ids, mask, cache)
            for index, row in enumerate(rows):
                if row.finish_reason is None:
                    yield index, self._draw(row, logits[index, -1])
            if all(row.finish_reason is not None for row in rows):
                return
            # A finished row goes on with padding until the last one ends: it costs its share of a step, no more.
            input_ids = np.array([[row.output[-1] if row.output else self.end_of_text_id] for row in rows])
            position_ids = np.minimum(position_ids[:, -1:] + 1, self.context_length - 1)
            mask = np.concatenate([mask, np.ones((len(rows), 1), dtype=np.int64)], axis=1)

    def _draw(self, row: _Row, logits: NDArray[np.float32]) -> Token:
        params = row.params
        token_id = sample(logits, params, row.history, row.output, self.end_of_text_id, row.seed, row.choice)
        if token_id in params.stop_token_ids or (token_id == self.end_of_text_id and not params.ignore_eos):
            row.finish_reason = "stop"
            return Token(None, finish_reason="stop")
        row.output.append(token_id)
        room = self.context_length - len(row.context) - len(row.output)
        if room == 0 or len(row.output) == params.max_new_tokens:
            row.finish_reason = "length"
        logprob, top = None, None
        if params.logprobs is not None:
            logprob, top = token_logprobs(logits, token_id, params.logprobs)
        return Token(token_id, logprob, top, row.finish_reason)
