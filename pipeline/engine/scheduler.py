"""Continuous batching: requests join and leave the running batch at any step, each with its own parameters and seed.

A request has a slot of the session's cache while it runs. A step of the scheduler first gives free slots to waiting
requests, then feeds a part of the prompts that are not yet read, then feeds every other running request one token and
draws its next. What is drawn for a request does not depend on its neighbours but through rounding.
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pipeline.decoding import SamplingParams
from pipeline.engine.cuda.loop import DeviceLoop, rows_run
from pipeline.engine.cuda.rows import ASKS_HOST, LOGGED, STEP_BITS, TAG_BITS, can_be_drawn, row_of
from pipeline.engine.filters import token_logprobs
from pipeline.engine.sampler import Continuation
from pipeline.engine.session import Session
from pipeline.errors import UserError

STEPS_AHEAD = 4
"""Steps that a device may be asked for before the token of the first is taken: the host's work hides behind them."""
POLLS = 100_000
"""Looks at the log, some ten microseconds each, before waiting for all that is queued."""
PREFILL_CHUNK_TOKENS = {"cpu": 32, "cuda": 128}
"""Tokens of prompts read in one step while others decode. On two cores 32 take the time of two steps, and longer parts
are read a tenth faster at most (GPT-2 Medium's shape, int8); on a GPU this was not measured."""

FinishReason = Literal["stop", "length", "repetition", "cancelled", "error"]
"""`stop`: end-of-text or a stop id was drawn. `length`: `max_new_tokens` or the end of the context was reached.
`repetition`: the continuation ends in a loop as `repetition_detection` describes."""


@dataclass(frozen=True, slots=True)
class Token:
    """A step of a continuation. The last one carries the finish reason; without a `token_id` nothing was added."""

    token_id: int | None
    logprob: float | None = None
    """Natural log-probability before any filter, where `SamplingParams.logprobs` asks for it."""
    top_logprobs: dict[int, float] | None = None
    finish_reason: FinishReason | None = None


@dataclass(eq=False, slots=True)
class Request:
    """One continuation, from the moment it is submitted; `tokens` fills as it goes on."""

    continuation: Continuation
    context: list[int]
    """What the model has been or is to be fed, the newest tokens last; never empty."""
    group: int | None
    """Requests of a group continue the same prompt; none once the cache no longer begins with it."""
    prompt_tokens: int
    cached: int = 0
    """How many of `context` its slot holds."""
    slot: int | None = None
    read: int | None = None
    """How many of the tokens that the device draws by itself were taken; none where the host draws."""
    tag: int = 0
    """What is added to them in the log."""
    queued: int = 0
    """Steps that were queued for it meanwhile."""
    tokens: deque[Token] = field(default_factory=deque)
    """Not yet taken by whoever asked."""
    finish_reason: FinishReason | None = None
    error: Exception | None = None
    """What ended it, where the finish reason is `error`."""

    @property
    def params(self) -> SamplingParams:
        return self.continuation.params

    @property
    def unread(self) -> int:
        """Tokens of the context that are not in the cache; one is fed by decoding, more by prefill."""
        return len(self.context) - self.cached


class Scheduler:
    """The requests that wait and run on one session."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._waiting: deque[Request] = deque()
        self._running: list[Request | None] = [None] * session.slots
        self._groups = 0
        self._tag = 0
        self._loop = None if session.draw is None else DeviceLoop(session, session.draw)

    @property
    def running(self) -> int:
        """Requests that have a slot."""
        return sum(request is not None for request in self._running)

    @property
    def waiting(self) -> int:
        """Requests that have none yet."""
        return len(self._waiting)

    def submit(self, context: Sequence[int], params: SamplingParams, seed: int) -> list[Request]:
        """Queue the `n` continuations of a prompt, which has at least one token and leaves room in the context."""
        manifest = self._session.manifest
        end_of_text = manifest.end_of_text_id
        prompt = list(context[1:] if context[0] == end_of_text else context)
        self._groups += 1
        requests = [
            Request(
                Continuation(
                    params, seed, choice, prompt, end_of_text, manifest.vocabulary_size, self._session.followers
                ),
                list(context),
                group=self._groups,
                prompt_tokens=len(context),
            )
            for choice in range(params.n)
        ]
        self._waiting.extend(requests)
        return requests

    def cancel(self, request: Request) -> None:
        """End a request, and free its slot at once; does nothing to one that has ended."""
        if request.finish_reason is None:
            self._finish(request, "cancelled")

    def step(self, prefill_tokens: float | None = None) -> None:
        """Let every running request go on by a token.

        Of prompts at most `prefill_tokens` are read while others decode, all of them where it is infinite; by default
        what is `PREFILL_CHUNK_TOKENS` here.
        """
        self._admit()
        self._close_gaps()
        self._prefill(PREFILL_CHUNK_TOKENS[self._session.provider] if prefill_tokens is None else prefill_tokens)
        self._decode()

    def _admit(self) -> None:
        for slot, occupant in enumerate(self._running):
            if occupant is not None:
                continue
            if not self._waiting:
                return
            request = self._waiting[0]
            # The last token of a prompt is fed anew: the first draw needs its logits.
            shared = request.prompt_tokens - 1
            relatives = [other for other in self._active() if other.group == request.group] if shared else []
            source = next((other.slot for other in relatives if other.cached >= shared), None)
            if relatives and source is None:
                # The prompt is being read for another choice; this one takes it over from there.
                return
            self._waiting.popleft()
            self._running[slot] = request
            request.slot = slot
            if source is not None:
                self._session.copy(source, slot, shared)
                request.cached = shared

    def _close_gaps(self) -> None:
        """Move the last running request into a free slot below it: rows up to the last one are computed.

        A device computes as many as the next power of two, so there it is done only where that shrinks.
        """
        for gap in range(self._session.slots):
            last = max((slot for slot, request in enumerate(self._running) if request is not None), default=-1)
            if gap >= last or (self._loop is not None and rows_run(last + 1) == rows_run(self.running)):
                return
            request = self._running[last]
            if self._running[gap] is None and request is not None:
                self._recall([request])
                if request.finish_reason is not None:
                    continue
                self._session.copy(last, gap, request.cached)
                self._running[gap], self._running[last] = request, None
                request.slot = gap

    def _prefill(self, prefill_tokens: float) -> None:
        room = prefill_tokens if any(request.unread == 1 for request in self._active()) else math.inf
        for request in list(self._active()):
            if request.unread == 1 or request.slot is None:
                continue
            if room == 0:
                return
            end = int(min(len(request.context), request.cached + room))
            self._session.prefill(request.slot, request.context[request.cached : end], request.cached)
            room -= end - request.cached
            request.cached = end
            if request.unread == 0:
                self._draw(request, request.slot)
                # From now on somebody waits for every step.
                room = min(room, prefill_tokens)

    def _decode(self) -> None:
        decoding = [request for request in self._active() if request.unread == 1]
        if not decoding:
            return
        if self._loop is not None:
            if all(can_be_drawn(request.continuation) for request in decoding):
                self._decode_on_device(self._loop, decoding)
                return
            self._recall(decoding)
            decoding = [request for request in decoding if request.finish_reason is None and request.unread == 1]
            if not decoding:
                return
        count = 1 + max(request.slot for request in decoding if request.slot is not None)
        fed = [self._fed(request) for request in self._running[:count]]
        self._session.decode([token_id for token_id, _ in fed], [position for _, position in fed])
        for request in decoding:
            request.cached += 1
            if request.slot is not None:
                self._draw(request, request.slot)

    def _decode_on_device(self, loop: DeviceLoop, decoding: list[Request]) -> None:
        """Queue a step, and take the tokens that have come by now: they may lag some steps behind."""
        context_length = self._session.manifest.context_length
        for slot, request in enumerate(self._running):
            if request is None or request.read is not None:
                continue
            if request.unread != 1:
                # Its prompt is being read: its row must not write over that.
                loop.park(slot, request.cached)
                continue
            left = context_length - len(request.context)
            if request.params.max_new_tokens is not None:
                left = min(left, request.params.max_new_tokens - len(request.continuation.output_ids))
            self._tag += 1 << TAG_BITS
            request.tag = self._tag
            token_id = request.context[-1]
            loop.join(slot, row_of(request.continuation, token_id, request.cached, left, request.tag, context_length))
            request.read = request.queued = 0
        loop.step(1 + max(request.slot for request in decoding if request.slot is not None))
        for request in decoding:
            request.queued += 1
        for poll in range(POLLS):
            self._take(loop, decoding, wait=poll == POLLS - 1)
            if not any(
                request.read is not None and request.queued > request.read + STEPS_AHEAD for request in decoding
            ):
                return

    def _take(self, loop: DeviceLoop, requests: list[Request], *, wait: bool) -> None:
        """Go on by what the device has logged of these requests, by now or at the end of all that is queued."""
        log = loop.log(self._session.slots, wait=wait)
        for request in requests:
            while request.slot is not None and request.read is not None:
                slot = request.slot
                entry = int(log[slot, request.read % LOGGED]) - request.tag - (request.read << STEP_BITS)
                if not 0 <= entry <= ASKS_HOST:
                    break
                request.cached += 1
                if entry == ASKS_HOST:
                    # The row rests: its logits are those of any step since.
                    request.read = None
                    self._session.logits[slot] = loop.logits(slot)
                    self._draw(request, slot)
                    break
                request.read += 1
                self._go_on(request, slot, entry)

    def _recall(self, requests: list[Request]) -> None:
        """Let the host draw for these requests from now on; some may have ended by then."""
        recalled = [request for request in requests if request.read is not None]
        if self._loop is None or not recalled:
            return
        self._take(self._loop, recalled, wait=True)
        for request in recalled:
            if request.slot is not None and request.read is not None:
                self._loop.rest(request.slot)
                request.read = None

    def _fed(self, request: Request | None) -> tuple[int, int]:
        """Token and position of a row; one that has nothing to say writes where its next token will be written over."""
        if request is None:
            return 0, 0
        return request.context[request.cached], request.cached

    def _draw(self, request: Request, slot: int) -> None:
        """Go on by the token that is drawn after what the slot was fed last."""
        session = self._session
        try:
            token_id = request.continuation.draw(session.logits[slot], session.top_logits[slot], session.top_ids[slot])
        except (UserError, ArithmeticError) as error:
            # No token is left, or the model gave NaN: this request ends, the others go on.
            request.error = error
            self._finish(request, "error")
        else:
            self._go_on(request, slot, token_id)

    def _go_on(self, request: Request, slot: int, token_id: int) -> None:
        """Append what was drawn, or end the request."""
        params, continuation = request.params, request.continuation
        if token_id in continuation.ending_ids:
            self._finish(request, "stop")
            return
        logprob, top = None, None
        if params.logprobs is not None:
            logprob, top = token_logprobs(self._session.logits[slot], token_id, params.logprobs)
        continuation.append(token_id)
        request.context.append(token_id)
        full = len(request.context) == self._session.manifest.context_length
        reason: FinishReason | None = None
        if len(continuation.output_ids) == params.max_new_tokens or (full and params.context_overflow == "end"):
            reason = "length"
        elif continuation.is_looping:
            reason = "repetition"
        request.tokens.append(Token(token_id, logprob, top, reason))
        if reason is not None:
            # What a device has drawn beyond it meanwhile is not taken.
            self._finish(request, reason, told=True)
        elif full:
            # The newest half is read again, from position 0.
            request.context = request.context[-(len(request.context) // 2) :]
            request.cached = 0
            request.group = None
            request.read = None

    def _finish(self, request: Request, reason: FinishReason, *, told: bool = False) -> None:
        request.finish_reason = reason
        if not told:
            request.tokens.append(Token(None, finish_reason=reason))
        if request.slot is None:
            self._waiting.remove(request)
            return
        if self._loop is not None and request.read is not None:
            self._loop.rest(request.slot)
        self._running[request.slot] = None
        request.slot = None

    def _active(self) -> Iterator[Request]:
        return (request for request in self._running if request is not None)
