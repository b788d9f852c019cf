"""The engine in a thread of its own: jobs come from any thread, and what they gain is delivered step by step.

A job is one request of a client: prompts, each continued `n` times, optionally after its own tokens are scored
(`echo`). The thread's loop handles new messages, scores a part of a text, lets every running continuation draw a token,
and delivers. Nothing else touches the engine. What goes wrong with a job ends that job, and the loop goes on.
"""

import logging
import math
import os
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace

from pipeline.decoding import SamplingParams
from pipeline.engine import Engine
from pipeline.engine.generator import SCORING_CHUNK_TOKENS
from pipeline.engine.scheduler import PREFILL_CHUNK_TOKENS
from pipeline.engine.text import Asked, Choice, Detokenizer, Piece, TextGenerator, TokenText, begun_character
from pipeline.errors import UserError
from pipeline.tokens import prompt_ids

OnTokens = Callable[[int, float, int | None], None]
"""The callback after each step of a continuation: (new tokens, seconds since the last, and with the first ones the
number of the prompt's tokens that were not read because a slot held them, else None)."""

WARM_UP_TOKENS = 4
MEMORY_OF_DURATIONS = 0.9
"""The share of the mean duration of continuations that is kept when another one ends."""
LONGEST_RETRY_SECONDS = 60
_OF_PARENTS: list["Worker"] = []

logger = logging.getLogger(__name__)


class QueueFullError(Exception):
    """The queue, or a client's share of it, is full; a client should try again after `retry_after_seconds`."""

    def __init__(self, full: str, retry_after_seconds: int) -> None:
        super().__init__(f"{full} is full; try again in {retry_after_seconds} s")
        self.retry_after_seconds = retry_after_seconds


@dataclass(frozen=True, slots=True)
class Delivery:
    """What a job has gained in a step."""

    pieces: list[Piece]
    is_last: bool
    """Whether every choice of the job has ended."""


@dataclass(frozen=True)
class Prompt:
    """A prompt to continue."""

    ids: list[int]
    text: str
    """The text that `echo` returns."""
    has_context: bool
    """Whether the first id is the end-of-text before a document, which is not part of the text."""


@dataclass(eq=False)
class Job:
    """A client's request; choice j of prompt i has the index `i * n + j`."""

    prompts: list[Prompt]
    params: SamplingParams
    deliver: Callable[[Delivery | Exception], None]
    """Called in the engine's thread with what each step gives, or with the error that ends the job."""
    echo: bool = False
    draws: bool = True
    """Whether tokens are drawn; if not, the prompts are only echoed or scored."""
    client: str | None = None
    """Whose job it is, for the limit of each client."""
    began: float = field(default_factory=time.perf_counter)

    @property
    def choices(self) -> int:
        return len(self.prompts) * self.params.n

    @property
    def continuations(self) -> int:
        """The continuations that are drawn: more than there are choices if the best are chosen."""
        return len(self.prompts) * self.params.candidates


@dataclass(frozen=True, slots=True)
class _Begin:
    job: Job


@dataclass(frozen=True, slots=True)
class _Cancel:
    job: Job


@dataclass(frozen=True, slots=True)
class _Stop:
    pass


class Worker:
    """An engine's thread. Jobs wait for free slots, at most `max_queue` continuations of them.

    With `slots_per_client`, one client has at most that many slots, and the same share of the queue.
    """

    def __init__(
        self,
        load: Callable[[], TextGenerator],
        *,
        max_queue: int = sys.maxsize,
        slots_per_client: int | None = None,
        on_tokens: OnTokens = lambda count, seconds, reused: None,
        on_death: Callable[[], None] = lambda: None,
    ) -> None:
        self._load = load
        self._max_queue = max_queue
        self._slots_per_client = slots_per_client
        self._on_tokens = on_tokens
        self._on_death = on_death
        self._messages: queue.SimpleQueue[_Begin | _Cancel | _Stop] = queue.SimpleQueue()
        self._loading: Future[TextGenerator] = Future()
        self._lock = threading.Lock()
        self._open: dict[Job, int] = {}
        """The number of continuations of each job that have not ended."""
        self._mean_seconds = 1.0
        self._scoring: deque[_Scoring] = deque()
        self._running: dict[Job, dict[Choice, float | None]] = {}
        """The choices of each job that have not ended, with the time of their last token, None before the first."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._process = os.getpid()
        self.ended = False
        """Whether the thread takes no more jobs: it was stopped, or an error ended it."""

    def start(self) -> None:
        """Load the engine and draw a few tokens. Raises what loading raises, `UserError` for a wrong folder."""
        self._thread.start()
        error = self._loading.exception()
        if error is not None:
            self._thread.join()
            raise error

    def stop(self) -> None:
        """End the thread; jobs that are not done end with an error."""
        self._messages.put(_Stop())
        self._thread.join()

    def abandon(self) -> None:
        """Stop a worker that nobody uses any more, without waiting for it: this may run in any thread.

        In a forked process it stays in memory: to destroy its engine would wait for threads that this process lacks.
        """
        if os.getpid() == self._process:
            self._messages.put(_Stop())
        else:
            _OF_PARENTS.append(self)

    @property
    def generator(self) -> TextGenerator:
        """The engine with its tokenizer, once `start` has loaded it."""
        return self._loading.result()

    @property
    def slots(self) -> int:
        return self.generator.engine.session.slots

    @property
    def running(self) -> int:
        """The continuations that have a slot."""
        return self.generator.engine.scheduler.running

    @property
    def waiting(self) -> int:
        """The continuations and the texts to score that wait for their turn."""
        with self._lock:
            return max(0, sum(self._open.values()) - self.running)

    @property
    def most(self) -> int:
        """The most continuations that may run and wait together."""
        return self.slots + self._max_queue

    @property
    def most_per_client(self) -> int:
        """The most of them that may be one client's."""
        if self._slots_per_client is None:
            return self.most
        return min(self.most, self._slots_per_client + self._max_queue * self._slots_per_client // self.slots)

    def check(self, prompts: int, params: SamplingParams) -> None:
        """Raise `UserError`, naming the field, if a job has more continuations than could ever be taken."""
        most = self.most_per_client
        if prompts > most:
            raise UserError(f"prompt: {prompts} prompts are more than the {most} that the server takes at a time")
        if prompts * params.candidates > most:
            name = "best_of" if params.best_of > params.n else "n"
            raise UserError(
                f"{name}: {prompts * params.candidates} continuations are more than the {most} that the server takes "
                "at a time"
            )

    def check_process(self) -> None:
        """Raise `RuntimeError` in a forked process, which has none of its parent's threads and would wait for ever."""
        if os.getpid() != self._process:
            raise RuntimeError("the engine runs in the process that this one was forked from; load it here, too")

    def submit(self, job: Job) -> None:
        """Queue a job. Raises `QueueFullError`, `RuntimeError` if the engine has ended, and what the checks raise."""
        self.check_process()
        self.check(len(job.prompts), job.params)
        with self._lock:
            if self.ended:
                raise RuntimeError("the engine has ended")
            taken = sum(self._open.values())
            own = sum(count for other, count in self._open.items() if other.client == job.client)
            is_over_share = self._slots_per_client is not None and own + job.continuations > self.most_per_client
            if is_over_share or taken + job.continuations > self.most:
                seconds = math.ceil(max(1.0, taken / self.slots * self._mean_seconds))
                full = "this client's share of the queue" if is_over_share else "the queue"
                raise QueueFullError(full, min(seconds, LONGEST_RETRY_SECONDS))
            self._open[job] = job.continuations
            self._messages.put(_Begin(job))

    def cancel(self, job: Job) -> None:
        """End a job before the next step and free its slots; does nothing if it has ended."""
        self._messages.put(_Cancel(job))

    def _run(self) -> None:
        try:
            generator = self._load()
            if self._slots_per_client is not None:
                generator.engine.scheduler.slots_per_client = self._slots_per_client
            _warm_up(generator.engine)
            self._loading.set_result(generator)
        except (UserError, OSError) as error:
            self._loading.set_exception(error)
            return
        finally:
            if not self._loading.done():
                self._loading.set_exception(UserError("the engine does not load; the log says why"))
        self._work()

    def _work(self) -> None:
        """Work until a stop message. An error that no request caused ends the thread and is shown."""
        stopped = False
        try:
            while self._take():
                self._score()
                self._step()
            stopped = True
        finally:
            with self._lock:
                self.ended = True
            self._fail(RuntimeError("the engine has ended"))
            if not stopped:
                self._on_death()

    def _take(self) -> bool:
        """Handle new messages, waiting for one if nothing runs. Return whether to continue."""
        while True:
            try:
                message = self._messages.get(block=not (self._running or self._scoring))
            except queue.Empty:
                return True
            match message:
                case _Begin(job):
                    self._begin(job)
                case _Cancel(job):
                    self._cancel(job)
                case _Stop():
                    return False

    def _begin(self, job: Job) -> None:
        with self._ending_at_error(job):
            if job.echo and job.params.logprobs is not None:
                self._scoring.append(_Scoring(self.generator, job))
            else:
                self._draw(job, [Piece(0, prompt.text) for prompt in job.prompts] if job.echo else [])

    def _score(self) -> None:
        """Score the next part of a text, a short one if continuations wait for it. The texts of jobs take turns."""
        if not self._scoring:
            return
        scoring = self._scoring[0]
        provider = self.generator.engine.session.provider
        with self._ending_at_error(scoring.job):
            if not scoring.advance(PREFILL_CHUNK_TOKENS[provider] if self._running else SCORING_CHUNK_TOKENS):
                return
            # The engine reads one text at a time, and this one is done.
            self._scoring.popleft()
            if scoring.is_done:
                self._draw(scoring.job, scoring.pieces)
            else:
                self._scoring.append(scoring)

    def _draw(self, job: Job, echoed: list[Piece]) -> None:
        """Deliver the echo of a job, a piece per prompt if it has one, and submit its continuations."""
        n = job.params.n
        lengths = [len(echoed[index].text) if echoed else 0 for index in range(len(job.prompts))]
        heads = [replace(echoed[index // n], index=index) for index in range(job.choices)] if echoed else []
        if not job.draws:
            ends = [Piece(index, finish_reason="length") for index in range(job.choices)]
            self._close(job)
            self._deliver(job, Delivery(heads + ends, is_last=True))
            return
        asked = [
            Asked(prompt.ids, prompt.text, job.params, length)
            for prompt, length in zip(job.prompts, lengths, strict=True)
        ]
        choices = self.generator.begin(asked, job.client)
        self._running[job] = dict.fromkeys(choices)
        if heads:
            self._deliver(job, Delivery(heads, is_last=False))

    def _step(self) -> None:
        """Draw a token for every running continuation, and deliver what each job has gained."""
        if not self._running:
            return
        self.generator.engine.scheduler.step()
        now = time.perf_counter()
        for job, choices in list(self._running.items()):
            with self._ending_at_error(job):
                pieces = [
                    piece for choice in list(choices) for piece in choice.sift(self._advance(job, choices, choice, now))
                ]
                if pieces or not choices:
                    self._deliver(job, Delivery(pieces, is_last=not choices))
            if not choices:
                self._running.pop(job, None)

    def _advance(self, job: Job, choices: dict[Choice, float | None], choice: Choice, now: float) -> Piece | None:
        """Take what a choice has gained, and remove it from `choices` if it has ended."""
        piece = choice.take()
        if piece is None:
            return None
        if piece.token_count:
            last = choices[choice]
            reused = choice.request.reused if last is None else None
            self._on_tokens(piece.token_count, now - (job.began if last is None else last), reused)
            choices[choice] = now
        if piece.finish_reason is not None:
            # A stop text ends the text, but not yet the request that draws it.
            self.generator.engine.scheduler.cancel(choice.request)
            del choices[choice]
            self._close(job, 1)
            self._mean_seconds += (1 - MEMORY_OF_DURATIONS) * (now - job.began - self._mean_seconds)
        return piece

    @contextmanager
    def _ending_at_error(self, job: Job) -> Iterator[None]:
        """End a job by whatever goes wrong with it in a block: other jobs must not end by it."""
        try:
            yield
        except Exception as error:  # noqa: BLE001
            self._cancel(job)
            self._deliver(job, error)

    def _deliver(self, job: Job, delivery: Delivery | Exception) -> None:
        """Deliver to a client, and end its job if it does not take it, as when its event loop is closed."""
        try:
            job.deliver(delivery)
        except Exception:
            logger.exception("what a job gained could not be delivered")
            self._cancel(job)

    def _cancel(self, job: Job) -> None:
        """Free what a job holds; does nothing if it has ended."""
        self._scoring = deque(scoring for scoring in self._scoring if scoring.job is not job)
        for choice in self._running.pop(job, {}):
            self.generator.engine.scheduler.cancel(choice.request)
        self._close(job)

    def _close(self, job: Job, count: int | None = None) -> None:
        """Take note that continuations of a job have ended, by default all that were left."""
        with self._lock:
            left = self._open.pop(job, 0)
            if count is not None and left > count:
                self._open[job] = left - count

    def _fail(self, error: Exception) -> None:
        """End every open job with an error, as nobody will continue it."""
        with self._lock:
            jobs = list(self._open)
        for job in jobs:
            with suppress(Exception):
                job.deliver(error)


def _warm_up(engine: Engine) -> None:
    tokens = min(WARM_UP_TOKENS, engine.context_length - 1)
    engine.generate([[engine.end_of_text_id]] * engine.session.slots, SamplingParams(max_new_tokens=tokens, seed=0))


def run_job(worker: Worker, prompts: list[Prompt], params: SamplingParams) -> Iterator[Piece]:
    """Run a job in the caller's thread, and yield its pieces as they come; closing the iterator cancels it.

    Raises what `Worker.submit` raises, at the first piece, and the error that ended the job.
    """
    deliveries: queue.SimpleQueue[Delivery | Exception] = queue.SimpleQueue()
    job = Job(prompts, params, deliveries.put)
    worker.submit(job)
    is_last = False
    try:
        while not is_last:
            worker.check_process()
            delivery = deliveries.get()
            if isinstance(delivery, Exception):
                raise delivery
            for piece in delivery.pieces:
                if piece.error is not None:
                    raise piece.error
                yield piece
            is_last = delivery.is_last
    finally:
        worker.cancel(job)


def text_prompt(generator: TextGenerator, text: str) -> Prompt:
    """Return a text as the beginning of a document."""
    return Prompt(prompt_ids(generator.tokenizer, text), text, has_context=True)


def ids_prompt(generator: TextGenerator, ids: list[int]) -> Prompt:
    """Return token ids, taken as they are. Raises `UserError` for one outside the vocabulary.

    A character that they leave incomplete is part of the continuation, which completes it.
    """
    generator.engine.check_ids("prompt", ids)
    # Unlike `decode`, this lets other threads run.
    (text,) = generator.tokenizer.decode_batch([ids], skip_special_tokens=False)
    return Prompt(ids, text[:-1] if begun_character(generator.tokenizer, ids) else text, has_context=False)


class _Scoring:
    """A job whose prompts are being scored."""

    def __init__(self, generator: TextGenerator, job: Job) -> None:
        self.job = job
        self.pieces: list[Piece] = []
        """The pieces of the prompts that are done."""
        self._generator = generator
        self._read = 0
        """The tokens of the next prompt that are scored; what they gave is below."""
        self._tokens: list[TokenText] = []
        self._length = 0
        self._detokenizer = Detokenizer(generator.tokenizer)

    @property
    def is_done(self) -> bool:
        """Whether all prompts are done."""
        return len(self.pieces) == len(self.job.prompts)

    def advance(self, tokens: int) -> bool:
        """Score the next tokens of a prompt. Return whether it is done. Raises `UserError` if it does not fit."""
        prompt, engine = self.job.prompts[len(self.pieces)], self._generator.engine
        if self._read == 0:
            engine.check_text(prompt.ids, "prompt")
        scored = engine.echo(prompt.ids, self._read, self._read + tokens, self.job.params.logprobs or 0)
        for token in scored[1:] if prompt.has_context and self._read == 0 else scored:
            begin = self._length
            if token.token_id is not None:
                self._length += len(self._detokenizer.feed(token.token_id))
            self._tokens.append(self._generator.token_texts.describe(token, begin, self._length))
        self._read += tokens
        if self._read < len(prompt.ids):
            return False
        self.pieces.append(Piece(0, prompt.text, tokens=self._tokens))
        self._read, self._tokens, self._length = 0, [], 0
        self._detokenizer = Detokenizer(self._generator.tokenizer)
        return True
