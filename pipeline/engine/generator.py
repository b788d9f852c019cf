"""The engine: token ids in, token ids out."""

import math
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from pipeline.decoding import SamplingParams
from pipeline.engine.filters import check_token_ids, gather_logprobs, token_logprobs
from pipeline.engine.scheduler import FinishReason, Request, Scheduler, Token
from pipeline.engine.session import Session, load_session
from pipeline.errors import UserError

SLOTS = 8
"""The default number of continuations that run at once. The memory of a slot is taken when it is first used."""
SCORING_CHUNK_TOKENS = 128
"""The most tokens scored at a time: their logits over GPT-2's vocabulary take 26 MB."""
_LOADING = Lock()


@dataclass(slots=True)
class Completion:
    """One continuation, without the token that ended it."""

    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason = "length"
    logprobs: list[float] | None = None
    top_logprobs: list[dict[int, float]] | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    """What a model computes for a given text."""

    logprobs: NDArray[np.float64]
    """The natural log-probability of each token except the first, float64 `[tokens - 1]`."""
    mean_state: NDArray[np.float64]
    """The mean over the tokens of the last hidden state, from which the logits are computed: float64 `[width]`; `[0]`
    if it was not asked for."""


class Engine:
    """GPT-2 on ONNX Runtime. `Engine.load` makes one.

    Not safe to use from two threads at once. On a GPU, use it from the thread that loaded it, as that captured its
    graphs.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.manifest = session.manifest
        self.scheduler = Scheduler(session)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        precision: str = "auto",
        provider: str = "auto",
        threads: int | None = None,
        slots: int = SLOTS,
    ) -> "Engine":
        """Load an exported engine.

        `precision` is one that the folder holds, or `auto`. `provider` is `auto`, `cpu` or `cuda`; one that cannot run
        is an error. `threads` is how many cores an operator may use, by default all, or what a container's quota
        leaves. `slots` is how many continuations run at once; others wait. Raises `UserError`.
        """
        if slots < 1:
            raise UserError(f"slots: {slots} is out of range, must be at least 1")
        # One at a time, because on a GPU each captures graphs.
        with _LOADING:
            session = load_session(Path(folder), precision=precision, provider=provider, threads=threads, slots=slots)
            return cls(session)

    @property
    def end_of_text_id(self) -> int:
        return self.manifest.end_of_text_id

    @property
    def context_length(self) -> int:
        return self.manifest.context_length

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Completion]:
        """Continue every prompt, as many at once as there are slots; choice j of prompt i is element `i * n + j`.

        `params` is for all prompts, or one per prompt. An empty prompt starts from end-of-text. A prompt's opening
        end-of-text is context: penalties and n-grams do not count it. What is drawn for a prompt depends on its
        neighbours only through rounding in their shared computation. Raises `UserError` for a prompt that leaves no
        room in the context, or ids outside the vocabulary.
        """
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        requests = self.submit_all(zip(prompts, each, strict=True))
        self.run(requests, lambda _: False)
        return [_completion(request) for request in requests]

    def run(self, requests: Sequence[Request], is_done: Callable[[Request], bool]) -> None:
        """Run requests to their end, or until `is_done`, which is called for each after every step, returns true.

        Raises the error of the first that fails, and cancels the others. What earlier calls left in the slots is not
        used, so that equal calls give equal tokens.
        """
        self.session.forget()
        try:
            while any(request.finish_reason is None for request in requests):
                # No caller waits for a first token: read each prompt as soon as it has a slot.
                self.scheduler.step(prefill_tokens=math.inf)
                for request in requests:
                    if request.error is not None:
                        raise request.error
                    if is_done(request):
                        self.scheduler.cancel(request)
        finally:
            for request in requests:
                self.scheduler.cancel(request)

    def stream(self, prompt: Sequence[int], params: SamplingParams) -> Iterator[Token]:
        """Continue one prompt, and yield each token as it comes; closing the iterator cancels. `params.n` must be 1.

        Several streams may be read in turn: they share the batch.
        """
        if params.n != 1:
            raise UserError(f"n: a stream is one continuation, got {params.n}")
        self._check_params(params)
        # Checked now, but queued only when it is read: an iterator that is never started cannot clean up.
        return self._stream(self._context(prompt, params), params)

    def submit(self, prompt: Sequence[int], params: SamplingParams) -> list[Request]:
        """Queue the continuations of a prompt; `scheduler.step` runs them. Raises `UserError` as `generate` does."""
        return self.submit_all([(prompt, params)])

    def submit_all(
        self, prompts: Iterable[tuple[Sequence[int], SamplingParams]], client: str | None = None
    ) -> list[Request]:
        """Queue the continuations of prompts in their order. If one prompt is refused, none is queued.

        `client` is as in `Scheduler.submit`.
        """
        each = list(prompts)
        for params in {id(params): params for _, params in each}.values():
            self._check_params(params)
        checked = [(self._context(prompt, params), params) for prompt, params in each]
        return [
            request
            for context, params in checked
            for request in self.scheduler.submit(context, params, _seed(params), client)
        ]

    def score(self, texts: Sequence[Sequence[int]]) -> list[NDArray[np.float64]]:
        """Return the natural log-probability of each token except the first, float64 `[tokens - 1]` per text.

        Raises `UserError` for a text without tokens, longer than the context, or with ids outside the vocabulary.
        """
        return [reading.logprobs for reading in self.read(texts, states=False)]

    def read(self, texts: Sequence[Sequence[int]], *, states: bool = True) -> list[Reading]:
        """Score texts and, with `states`, average each text's hidden states. Raises `UserError` as `score` does."""
        for ids in texts:
            self.check_text(ids)
        readings = []
        for ids in texts:
            logprobs, total = [], np.zeros(self.manifest.width if states else 0)
            for logits, found, followers in self._read_chunks(ids, states=states):
                logprobs.append(gather_logprobs(logits[: len(followers)], followers))
                total += found.sum(axis=0, dtype=np.float64)
            readings.append(Reading(np.concatenate(logprobs), total / len(ids)))
        return readings

    def echo(self, text: Sequence[int], start: int, end: int, top_count: int) -> list[Token]:
        """Return tokens of a text that `check_text` takes, each with its log-probability and the `top_count` likeliest.

        The first has neither, as nothing precedes it. A text is read in parts, from the first on; other requests may
        run between them, but only one text is read at a time.
        """
        first = [Token(text[0])] if start == 0 else []
        fed = text[max(0, start - 1) : min(end, len(text)) - 1]
        if not fed:
            return first
        logits, _ = self.session.read(fed, max(0, start - 1))
        return first + [
            Token(token_id, *token_logprobs(row, token_id, top_count))
            for row, token_id in zip(logits, text[max(1, start) : end], strict=True)
        ]

    def check(self, prompts: Iterable[Sequence[int]], params: SamplingParams) -> None:
        """Raise `UserError` if `submit` would refuse a prompt. Safe to call from any thread."""
        self._check_params(params)
        for prompt in prompts:
            self._context(prompt, params)

    def check_text(self, text: Sequence[int], name: str = "text") -> None:
        """Raise `UserError` if `score` would refuse a text. Safe to call from any thread."""
        self.check_ids(name, text)
        if len(text) == 0:
            raise UserError(f"{name}: has no tokens; give at least one, such as end-of-text")
        if len(text) > self.context_length:
            raise UserError(f"{name}: {len(text)} tokens do not fit in the context of {self.context_length}")

    def _stream(self, context: list[int], params: SamplingParams) -> Iterator[Token]:
        (request,) = self.scheduler.submit(context, params, _seed(params))
        try:
            while request.finish_reason is None or request.tokens:
                while request.tokens:
                    token = request.tokens.popleft()
                    if request.error is not None and token.finish_reason == "error":
                        raise request.error
                    yield token
                if request.finish_reason is None:
                    self.scheduler.step()
        finally:
            self.scheduler.cancel(request)

    def _read_chunks(
        self, ids: Sequence[int], *, states: bool = False
    ) -> Iterator[tuple[NDArray[np.float32], NDArray[np.floating], Sequence[int]]]:
        """Read a text in parts: what `Session.read` returns for each, and the tokens that follow those of the part.

        The last token of the text has no follower.
        """
        for start in range(0, len(ids), SCORING_CHUNK_TOKENS):
            end = start + SCORING_CHUNK_TOKENS
            yield *self.session.read(ids[start:end], start, states=states), ids[start + 1 : end + 1]

    def _check_params(self, params: SamplingParams) -> None:
        """Raise `UserError` if parameters do not fit this engine."""
        check_token_ids(params, self.manifest.vocabulary_size)
        if params.stop:
            raise UserError("stop: holds texts, but the engine reads token ids; use pipeline.engine.text")
        if params.best_of > 1:
            raise UserError("best_of: judges texts, but the engine reads token ids; use pipeline.engine.text")
        if params.max_verbatim_tokens and self.session.followers is None:
            raise UserError(
                "max_verbatim_tokens: this engine holds no index of its training text; export it again with "
                "export.verbatim_index set to true, or by `python -m pipeline export` with --verbatim-index"
            )

    def _context(self, prompt: Sequence[int], params: SamplingParams) -> list[int]:
        """Return what is read of a prompt. Raises `UserError` if that does not fit."""
        if len(prompt) >= self.context_length:
            if params.context_overflow != "slide":
                raise UserError(
                    f"prompt: {len(prompt)} tokens leave no room in the context of {self.context_length}; shorten it, "
                    "or set context_overflow to slide"
                )
            prompt = prompt[-(self.context_length // 2) :]
        self.check_ids("prompt", prompt)
        return list(prompt) or [self.end_of_text_id]

    def check_ids(self, name: str, ids: Sequence[int]) -> None:
        """Raise `UserError` if a token id is outside the vocabulary. Safe to call from any thread."""
        size = self.manifest.vocabulary_size
        if len(ids) > 0 and (min(ids) < 0 or max(ids) >= size):
            wrong = next(token_id for token_id in ids if not 0 <= token_id < size)
            raise UserError(f"{name}: token id {wrong} is not in [0, {size})")


def _seed(params: SamplingParams) -> int:
    return secrets.randbits(63) if params.seed is None else params.seed


def _completion(request: Request) -> Completion:
    if request.finish_reason is None:
        raise ValueError("the request has not ended")
    tokens = [token for token in request.tokens if token.token_id is not None]
    reported = request.params.logprobs is not None
    return Completion(
        token_ids=[token.token_id for token in tokens if token.token_id is not None],
        finish_reason=request.finish_reason,
        logprobs=[token.logprob for token in tokens if token.logprob is not None] if reported else None,
        top_logprobs=[token.top_logprobs for token in tokens if token.top_logprobs is not None] if reported else None,
    )
