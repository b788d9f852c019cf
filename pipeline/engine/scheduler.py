"""Continuous batching: requests join and leave the running batch at any step, each with its own parameters and seed.

A running request has a slot of the session's cache. A step first gives free slots to waiting requests, then reads a
part of the prompts that are not read yet, in the order of their arrival, then feeds every other running request one
token and draws its next. What is drawn for a request depends on its neighbours only through rounding, and an error in
its draw ends it alone.

A slot keeps what its cache holds when its request ends. So a prompt that begins as another slot's text does, running or
ended, is read from where they differ: the beginning is copied.
"""

import math
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from pipeline.decoding import SamplingParams
from pipeline.engine.cuda.loop import DeviceLoop
from pipeline.engine.cuda.rows import ASKS_HOST, can_be_drawn, round_up_rows
from pipeline.engine.filters import token_logprobs
from pipeline.engine.sampler import Continuation
from pipeline.engine.session import Session

PREFILL_CHUNK_TOKENS = {"cpu": 32, "cuda": 128}
"""The number of prompt tokens read per step while others decode. On two cores 32 take the time of two steps, and longer
parts are at most a tenth faster per token (GPT-2 Medium's shape, int8); on a GPU this was not measured."""

SHARED_TOKENS = 8
"""The fewest tokens at the beginning of a prompt that are copied from another slot, as a copy takes time, too."""

FinishReason = Literal["stop", "length", "repetition", "cancelled", "error"]
"""`stop`: end-of-text or a stop id was drawn. `length`: `max_new_tokens` or the end of the context was reached.
`repetition`: the continuation ends in a loop as `repetition_detection` describes."""


@dataclass(frozen=True, slots=True)
class Token:
    """A step of a continuation. The last one carries the finish reason; without a `token_id` it adds nothing."""

    token_id: int | None
    logprob: float | None = None
    """The natural log-probability before any filter, if `SamplingParams.logprobs` asks for it."""
    top_logprobs: dict[int, float] | None = None
    finish_reason: FinishReason | None = None


@dataclass(eq=False, slots=True)
class Request:
    """One continuation, from the moment it is submitted; `tokens` fills as it runs."""

    params: SamplingParams
    begin: Callable[[], Continuation]
    """Makes `continuation`."""
    context: list[int]
    """The tokens that the model has been fed or will be, the newest last; never empty. Requests that wait share that of
    their group, and copy it when they get a slot."""
    group: int
    """The number of the prompt in the order of arrival; the requests of a group continue the same one."""
    prompt_tokens: int
    client: str | None = None
    """Whose request it is, if clients are limited."""
    continuation: Continuation = field(init=False)
    """Made when it gets a slot, because thousands may wait."""
    holds_prompt: bool = True
    """Whether its cache begins with the prompt, as far as that is read."""
    cached: int = 0
    """The number of tokens of `context` that its slot holds; 0 until the prompt's turn to be read."""
    leads: bool = True
    """Whether it is the first choice of its prompt."""
    reused: int = 0
    """The number of tokens of the prompt that were not read because a slot held them. Only that of the first choice is
    counted, as the others copy what that has read."""
    slot: int | None = None
    tokens: deque[Token] = field(default_factory=deque)
    """The tokens that the caller has not taken yet."""
    finish_reason: FinishReason | None = None
    error: Exception | None = None
    """The error that ended it, if the finish reason is `error`."""

    @property
    def shared_tokens(self) -> int:
        """The tokens of the prompt that others of the group copy: all but the last, whose logits a first draw needs."""
        return self.prompt_tokens - 1

    @property
    def unread(self) -> int:
        """The number of context tokens that are not in the cache: decoding feeds one, prefill reads more."""
        return len(self.context) - self.cached


class Scheduler:
    """The requests that wait and run on one session."""

    slots_per_client: float = math.inf
    """The most slots that the requests of one client hold."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._waiting: deque[Request] = deque()
        self._running: list[Request | None] = [None] * session.slots
        """By slot; None if it is free."""
        self._last_used = [0] * (session.slots + 1)
        """By slot, the number of the last use of what it holds; 0 if that is of no use."""
        self._uses = 0
        self._groups = 0
        self._loop = None if session.draw is None else DeviceLoop(session, session.draw)

    @property
    def running(self) -> int:
        """The number of requests that have a slot."""
        return sum(request is not None for request in self._running)

    @property
    def waiting(self) -> int:
        """The number of requests that have no slot yet."""
        return len(self._waiting)

    def submit(self, context: list[int], params: SamplingParams, seed: int, client: str | None = None) -> list[Request]:
        """Queue the `n` continuations of a prompt, which has at least one token and leaves room in the context.

        `client` says whose they are, for `slots_per_client`; those of nobody are not limited.
        """
        manifest = self._session.manifest
        end_of_text = manifest.end_of_text_id
        prompt = context[1:] if context[0] == end_of_text else context
        self._groups += 1
        requests = [
            Request(
                params,
                partial(
                    Continuation,
                    params,
                    seed,
                    choice,
                    prompt,
                    end_of_text,
                    manifest.vocabulary_size,
                    self._session.followers,
                ),
                context,
                group=self._groups,
                prompt_tokens=len(context),
                client=client,
                leads=choice == 0,
            )
            for choice in range(params.n)
        ]
        self._waiting.extend(requests)
        return requests

    def cancel(self, request: Request) -> None:
        """End a request and free its slot at once; do nothing if it has ended."""
        if request.finish_reason is None:
            with self._session.memory.held():
                self._finish(request, "cancelled")

    def step(self, prefill_tokens: float | None = None) -> None:
        """Continue every running request by a token.

        While others decode, at most `prefill_tokens` of prompts are read, or all if it is infinite. The default is
        `PREFILL_CHUNK_TOKENS` of this provider.
        """
        with self._session.memory.held():
            self._admit()
            self._close_gaps()
            self._prefill(PREFILL_CHUNK_TOKENS[self._session.provider] if prefill_tokens is None else prefill_tokens)
            self._decode()

    def _admit(self) -> None:
        """Give free slots to waiting requests."""
        for slot, occupant in enumerate(self._running):
            if occupant is not None:
                continue
            if (request := self._take_waiting()) is None:
                return
            self._running[slot] = request
            request.slot = slot
            request.context = list(request.context)
            try:
                request.continuation = request.begin()
            except Exception as error:  # noqa: BLE001
                self._fail(request, error)

    def _take_waiting(self) -> Request | None:
        """Take the first waiting request that may have a slot now; None if all must wait.

        A choice whose prompt is being read for another one waits, to copy it from there.
        """
        if not self._waiting:
            return None
        held = Counter(request.client for request in self._active())
        read = {request.group for request in self._sharing()}
        reading = {request.group for request in self._active() if request.holds_prompt} - read
        for request in self._waiting:
            has_room = request.client is None or held[request.client] < self.slots_per_client
            if has_room and request.group not in reading:
                self._waiting.remove(request)
                return request
        return None

    def _sharing(self) -> Iterator[Request]:
        """Return the running requests from whose cache others of their group can copy the prompt."""
        return (one for one in self._active() if one.holds_prompt and one.cached >= one.shared_tokens)

    def _begin_reading(self, request: Request, slot: int) -> None:
        """Take over the beginning of a context from the slot that holds most of it, if its own does not."""
        # The last token is always read: the first draw needs its logits.
        context, held = request.context[:-1], self._session.held
        shared = [_shared_beginning(context, tokens) for tokens in held]
        source = max(range(len(shared)), key=lambda other: (shared[other], other == slot))
        # A request that slides reads again, and what its own slot holds is its past.
        if request.holds_prompt and len(held[slot]) - shared[slot] >= SHARED_TOKENS:
            self._move_aside(slot, kept=source)
        if shared[source] >= SHARED_TOKENS:
            if source != slot:
                self._session.copy(source, slot, shared[source])
            request.cached = shared[source]
            self._use(source)
            if request.leads:
                request.reused += shared[source]
        self._use(slot)

    def _move_aside(self, slot: int, kept: int) -> None:
        """Copy what a slot holds to another free slot, unless all of them hold what was used later. `kept` stays."""
        held = self._session.held
        free = [other for other, one in enumerate(self._running) if one is None and other not in (slot, kept)]
        if not free:
            return
        target = min(free, key=lambda other: self._last_used[other])
        if self._last_used[target] < self._last_used[slot]:
            self._session.copy(slot, target, len(held[slot]))
            self._last_used[target] = self._last_used[slot]
            self._rest(target)

    def _use(self, slot: int) -> None:
        self._uses += 1
        self._last_used[slot] = self._uses

    def _close_gaps(self) -> None:
        """Move the last running request into a free slot below it, because every row up to the last one is computed.

        A device computes as many rows as the next power of two, so there a request moves only if that shrinks.
        """
        for gap in range(self._session.slots):
            last = max((slot for slot, request in enumerate(self._running) if request is not None), default=-1)
            if gap >= last or (self._loop is not None and round_up_rows(last + 1) == round_up_rows(self.running)):
                return
            request = self._running[last]
            if self._running[gap] is None and request is not None:
                if self._loop is not None:
                    self._advance(self._loop.recall([last]))
                if request.finish_reason is not None:
                    continue
                if request.cached:
                    self._move_aside(gap, kept=last)
                    self._session.copy(last, gap, request.cached)
                    self._last_used[gap], self._last_used[last] = self._last_used[last], 0
                self._running[gap], self._running[last] = request, None
                request.slot = gap

    def _prefill(self, prefill_tokens: float) -> None:
        """Read prompts, and draw the first token of each that is read to its end."""
        room = prefill_tokens if any(request.unread == 1 for request in self._active()) else math.inf
        for request in sorted(self._active(), key=lambda one: one.group):
            if request.slot is None or (request.unread == 1 and request.cached > 0):
                continue
            if request.unread == 1:
                self._begin_reading(request, request.slot)
                continue
            if room == 0:
                return
            if request.cached == 0:
                self._begin_reading(request, request.slot)
                if request.unread == 1:
                    room = min(room, prefill_tokens)
                    continue
            end = int(min(len(request.context), request.cached + room))
            self._session.prefill(request.slot, request.context[request.cached : end], request.cached)
            room -= end - request.cached
            request.cached = end
            if request.unread == 0:
                # Before its first token, which may be its last: other choices copy the prompt from it.
                self._admit()
                self._continue(request, request.slot, ASKS_HOST)
                # This request decodes now, so the rest of this step reads fewer prompt tokens.
                room = min(room, prefill_tokens)

    def _decode(self) -> None:
        """Feed each decoding request a token and continue it; the device does both by itself if it can draw for all."""
        loop, decoding = self._loop, self._decoding()
        if loop is not None and decoding:
            if all(can_be_drawn(request.continuation) for _, request in decoding):
                self._join_all(loop)
                loop.step(1 + decoding[-1][0])
                # These may lag some steps behind.
                self._advance(loop.tokens())
                return
            self._advance(loop.recall(slot for slot, _ in decoding))
            # Some may have ended.
            decoding = self._decoding()
        if decoding:
            self._feed(1 + decoding[-1][0])
            self._advance((slot, ASKS_HOST) for slot, _ in decoding)

    def _decoding(self) -> list[tuple[int, Request]]:
        """Return slot and request of those that are fed one token next, in the order of the slots."""
        return [(slot, one) for slot, one in enumerate(self._running) if one is not None and one.unread == 1]

    def _feed(self, rows: int) -> None:
        """Feed a token to each of the first rows; one without a request that reads or decodes is fed its last again."""
        fed = []
        for slot, one in enumerate(self._running[:rows]):
            held = self._session.held[slot] or [0]
            begun = one is not None and (one.cached > 0 or one.unread == 1)
            fed.append((one.context[one.cached], one.cached) if one and begun else (held[-1], len(held) - 1))
        self._session.decode([token_id for token_id, _ in fed], [position for _, position in fed])

    def _join_all(self, loop: DeviceLoop) -> None:
        """Let the device draw for every decoding request, without writing over a prompt that is being read."""
        for slot, request in enumerate(self._running):
            if request is None or loop.is_drawing(slot):
                continue
            if request.unread == 1:
                left = self._session.manifest.context_length - len(request.context)
                if request.params.max_new_tokens is not None:
                    left = min(left, request.params.max_new_tokens - len(request.continuation.output_ids))
                try:
                    loop.join(slot, request.continuation, request.context[-1], request.cached, left)
                except (ArithmeticError, LookupError, TypeError, ValueError) as error:
                    self._fail(request, error)
            else:
                self._rest(slot)

    def _advance(self, steps: Iterator[tuple[int, int]]) -> None:
        """Continue requests by slot and token; for `ASKS_HOST` the token is drawn here."""
        for slot, token_id in steps:
            request = self._running[slot]
            if request is None:
                raise ValueError(f"slot {slot} has no request")
            request.cached += 1
            self._continue(request, slot, token_id)

    def _continue(self, request: Request, slot: int, token_id: int) -> None:
        """Continue a request by a token; for `ASKS_HOST` it is drawn from what the slot was fed last.

        Whatever goes wrong, as when no token is left or the model gave NaN, ends this request, and the others go on.
        """
        session, context_length = self._session, self._session.manifest.context_length
        try:
            if token_id == ASKS_HOST:
                token_id = request.continuation.draw(
                    session.logits[slot], session.top_logits[slot], session.top_ids[slot]
                )
            token = self._append(request, slot, token_id)
        except Exception as error:  # noqa: BLE001
            self._fail(request, error)
            return
        if token.finish_reason is not None:
            self._finish(request, token.finish_reason, token)
            return
        request.tokens.append(token)
        if len(request.context) == context_length:
            # The newest half is read again, from position 0.
            request.context = list(request.context[-(context_length // 2) :])
            request.cached = 0
            request.holds_prompt = False
            self._rest(slot)

    def _append(self, request: Request, slot: int, token_id: int) -> Token:
        """Append a token that was drawn, unless it ends the request, and return the step."""
        params, continuation = request.params, request.continuation
        if token_id in continuation.ending_ids:
            return Token(None, finish_reason="stop")
        logprob, top = None, None
        if params.logprobs is not None:
            logprob, top = token_logprobs(self._session.logits[slot], token_id, params.logprobs)
        continuation.append(token_id)
        request.context.append(token_id)
        is_full = len(request.context) == self._session.manifest.context_length
        reason: FinishReason | None = None
        if len(continuation.output_ids) == params.max_new_tokens or (is_full and params.context_overflow == "end"):
            reason = "length"
        elif continuation.is_looping:
            reason = "repetition"
        return Token(token_id, logprob, top, reason)

    def _fail(self, request: Request, error: Exception) -> None:
        request.error = error
        self._finish(request, "error")

    def _finish(self, request: Request, reason: FinishReason, token: Token | None = None) -> None:
        """End a request with its last token, if it has one, and free its slot."""
        request.finish_reason = reason
        request.tokens.append(token or Token(None, finish_reason=reason))
        if request.slot is None:
            self._waiting.remove(request)
            return
        self._rest(request.slot)
        self._use(request.slot)
        self._running[request.slot] = None
        request.slot = None

    def _rest(self, slot: int) -> None:
        """Stop the device's own drawing for a slot; what it has drawn beyond the last token taken is dropped.

        Each step feeds the row a token anyway, which must not spoil what the slot holds, or has read of a prompt.
        """
        if self._loop is not None:
            request, held = self._running[slot], self._session.held[slot]
            del held[self._session.manifest.context_length - 1 :]
            self._loop.park(slot, max(len(held), 0 if request is None else request.cached))

    def _active(self) -> Iterator[Request]:
        return (request for request in self._running if request is not None)


def _shared_beginning(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the number of tokens with which both begin."""
    same, most = 0, min(len(first), len(second))
    while same < most:
        middle = (same + most + 1) // 2
        if first[same:middle] == second[same:middle]:
            same = middle
        else:
            most = middle - 1
    return same
