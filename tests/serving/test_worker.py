"""The engine's thread: what jobs gain, and what happens to jobs that end early."""

import queue
import threading
from collections.abc import Iterator
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from served_model import PATIENCE_S, SLOTS, wait_for

from pipeline.decoding import SamplingParams
from pipeline.engine import Token
from pipeline.engine.generator import SCORING_CHUNK_TOKENS
from pipeline.engine.scheduler import PREFILL_CHUNK_TOKENS
from pipeline.engine.text import Choice, Piece, TextGenerator
from pipeline.errors import UserError
from pipeline.serving.worker import Delivery, Job, Prompt, QueueFullError, Worker, run_job
from pipeline.tokens import prompt_ids

SEEDED = SamplingParams(max_new_tokens=16, seed=3, ignore_eos=True)
ENDLESS = SamplingParams(max_new_tokens=100_000, context_overflow="slide", ignore_eos=True, seed=1)


class Client:
    """A client that waits for a job."""

    def __init__(self, worker: Worker, prompt: str, params: SamplingParams, **options: Any) -> None:
        self.got: queue.SimpleQueue[Delivery | Exception] = queue.SimpleQueue()
        ids = prompt_ids(worker.generator.tokenizer, prompt)
        self.job = Job([Prompt(ids, prompt, has_context=True)], params, self.got.put, **options)
        worker.submit(self.job)

    def pieces(self) -> list[Piece]:
        """Return all pieces, up to the end of the last choice."""
        pieces: list[Piece] = []
        while True:
            got = self.got.get(timeout=PATIENCE_S)
            if isinstance(got, Exception):
                raise got
            pieces += got.pieces
            for piece in got.pieces:
                if piece.error is not None:
                    raise piece.error
            ended = sum(piece.finish_reason is not None for piece in pieces)
            assert got.is_last == (ended == self.job.choices)
            if got.is_last:
                return pieces

    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces())


@pytest.fixture
def worker(tiny_engine_folder: Path) -> Iterator[Worker]:
    made = Worker(
        lambda: TextGenerator.load(tiny_engine_folder, precision="float32", provider="cpu", threads=1, slots=SLOTS),
        max_queue=4,
    )
    made.start()
    yield made
    made.stop()


def test_a_job_gives_what_the_generator_gives(worker: Worker, tiny_engine_folder: Path) -> None:
    own = TextGenerator.load(tiny_engine_folder, precision="float32", provider="cpu", threads=1)
    for params in (SEEDED, SamplingParams(max_new_tokens=30, seed=8, stop=("e", "th"))):
        (expected,) = own.complete(["The lamp"], [params])
        pieces = Client(worker, "The lamp", params).pieces()
        assert "".join(piece.text for piece in pieces) == expected.text
        assert pieces[-1].finish_reason == expected.finish_reason
        assert sum(piece.token_count for piece in pieces) == len(expected.token_ids)


def test_neighbours_change_nothing(worker: Worker) -> None:
    alone = [Client(worker, prompt, SEEDED).text() for prompt in ("The lamp", "A cat", "", "They say")]
    together = [Client(worker, prompt, SEEDED) for prompt in ("The lamp", "A cat", "", "They say")]
    assert [client.text() for client in together] == alone


def test_the_offset_of_a_token_is_where_its_text_begins(worker: Worker) -> None:
    params = SamplingParams(max_new_tokens=24, seed=5, logprobs=2, ignore_eos=True)
    pieces = Client(worker, "The lamp", params).pieces()
    text, tokens = "".join(piece.text for piece in pieces), [token for piece in pieces for token in piece.tokens]
    assert len(tokens) == 24
    for token in tokens:
        if not token.text.startswith("bytes:"):
            assert text.startswith(token.text, token.offset)
        assert token.logprob is not None
        assert token.top_logprobs is not None
        assert len(token.top_logprobs) == 2


def test_an_echo_is_scored_as_the_engine_scores(worker: Worker, tiny_engine_folder: Path) -> None:
    own = TextGenerator.load(tiny_engine_folder, precision="float32", provider="cpu", threads=1)
    prompt = "The lamp on Gull Rock went out."
    ids = prompt_ids(own.tokenizer, prompt)
    expected = own.engine.echo(ids, 0, len(ids), 1)[1:]
    for draws in (False, True):
        params = SamplingParams(max_new_tokens=1, seed=1, logprobs=1, n=2)
        pieces = Client(worker, prompt, params, echo=True, draws=draws).pieces()
        for index in range(2):
            mine = [piece for piece in pieces if piece.index == index]
            assert mine[0].text == prompt
            assert [token.logprob for token in mine[0].tokens] == [token.logprob for token in expected]
            assert "".join(token.text for token in mine[0].tokens) == prompt
            assert sum(piece.token_count for piece in mine) == (1 if draws else 0)


def test_a_job_that_is_cancelled_frees_its_slots_before_the_next_step(worker: Worker) -> None:
    client = Client(worker, "The lamp", ENDLESS)
    client.got.get(timeout=PATIENCE_S)
    worker.cancel(client.job)
    assert len(Client(worker, "A cat", SEEDED).text()) > 0
    wait_for(lambda: worker.running == 0 and worker.waiting == 0)


def test_a_job_that_waits_can_be_cancelled(worker: Worker) -> None:
    running = [Client(worker, "The lamp", ENDLESS) for _ in range(SLOTS)]
    waiting = Client(worker, "A cat", SEEDED)
    scoring = Client(worker, "A cat", SamplingParams(logprobs=1, max_new_tokens=5), echo=True)
    for client in (waiting, scoring, *running):
        worker.cancel(client.job)
    wait_for(lambda: worker.running == 0 and worker.waiting == 0)


def test_a_full_queue_takes_no_more_until_something_ends(worker: Worker) -> None:
    clients = [Client(worker, "The lamp", ENDLESS) for _ in range(SLOTS + 4)]
    with pytest.raises(QueueFullError) as refusal:
        Client(worker, "A cat", SEEDED)
    assert 1 <= refusal.value.retry_after_seconds <= 60
    with pytest.raises(UserError, match=r"^n: 9 continuations are more than the 8 that the server takes at a time$"):
        Client(worker, "A cat", SamplingParams(n=9, max_new_tokens=2))
    for client in clients:
        worker.cancel(client.job)
    wait_for(lambda: worker.running == 0 and worker.waiting == 0)
    assert Client(worker, "A cat", SEEDED).text()


def test_a_job_without_a_token_to_draw_fails_alone(worker: Worker) -> None:
    other = Client(worker, "The lamp", SEEDED)
    with pytest.raises(UserError, match="leave no token to draw"):
        Client(worker, "A cat", SamplingParams(max_new_tokens=4, banned_token_ids=tuple(range(300)))).pieces()
    assert other.text()
    wait_for(lambda: worker.running == 0 and worker.waiting == 0)


def test_a_choice_that_fails_leaves_the_others(worker: Worker) -> None:
    """Both allowed tokens stand in the first prompt, and no n-gram of one token may come again."""
    params = SamplingParams(
        allowed_token_ids=(5, 6), no_repeat_ngram_size=1, min_new_tokens=2, max_new_tokens=2, seed=1, n=2
    )
    got: queue.SimpleQueue[Delivery | Exception] = queue.SimpleQueue()
    worker.submit(Job([Prompt(ids, "", has_context=False) for ids in ([5, 6], [7])], params, got.put))
    pieces: list[Piece] = []
    is_last = False
    while not is_last:
        delivery = got.get(timeout=PATIENCE_S)
        assert isinstance(delivery, Delivery)
        pieces += delivery.pieces
        is_last = delivery.is_last
    ends = {piece.index: piece for piece in pieces if piece.finish_reason is not None}
    assert [ends[index].finish_reason for index in range(4)] == ["error", "error", "length", "length"]
    assert [isinstance(ends[index].error, UserError) for index in range(4)] == [True, True, False, False]
    for index in (2, 3):
        drawn = [token_id for piece in pieces if piece.index == index for token_id in piece.token_ids]
        assert sorted(drawn) == [5, 6]
    wait_for(lambda: worker.running == 0 and worker.waiting == 0)


@pytest.mark.parametrize(
    ("place", "options", "logprobs"),
    [
        ("begin", {}, None),
        ("begin", {"echo": True}, None),
        ("begin", {"echo": True}, 1),
        ("engine.echo", {"echo": True}, 1),
        ("engine.check_text", {"echo": True, "draws": False}, 1),
    ],
)
def test_an_error_that_nobody_foresaw_ends_its_job_alone(
    place: str, options: dict[str, Any], logprobs: int | None, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Client(worker, "The lamp", SamplingParams(max_new_tokens=40, seed=3, ignore_eos=True))
    other.got.get(timeout=PATIENCE_S)
    path, _, name = f"generator.{place}".rpartition(".")

    def fail(*_: object) -> None:
        raise LookupError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(attrgetter(path)(worker), name, fail)
        with pytest.raises(LookupError, match="a bug"):
            Client(worker, "A cat", SamplingParams(max_new_tokens=4, logprobs=logprobs), **options).pieces()
        if not options:
            with pytest.raises(LookupError, match="a bug"):
                list(run_job(worker, [Prompt([5], "", has_context=False)], SEEDED))
    assert other.text()
    assert Client(worker, "A cat", SEEDED).text()
    wait_for(lambda: worker.running == 0 and worker.waiting == 0)


def test_an_error_while_a_text_is_read_ends_its_job_alone(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    take = Choice.take

    def fail(self: Choice) -> Piece | None:
        if self.request.params.seed == 8:
            raise LookupError("a bug")
        return take(self)

    monkeypatch.setattr(Choice, "take", fail)
    other = Client(worker, "The lamp", SEEDED)
    with pytest.raises(LookupError, match="a bug"):
        Client(worker, "A cat", SamplingParams(max_new_tokens=40, seed=8, n=2)).pieces()
    assert other.text()
    wait_for(lambda: worker.running == 0 and worker.waiting == 0)


def test_a_client_that_takes_nothing_ends_no_other(worker: Worker, caplog: pytest.LogCaptureFixture) -> None:
    other = Client(worker, "The lamp", SEEDED)

    def refuse(_: object) -> None:
        raise RuntimeError("the event loop is closed")

    worker.submit(Job([Prompt([5], "", has_context=False)], replace(SEEDED, n=2), refuse))
    assert other.text()
    wait_for(lambda: worker.running == 0 and worker.waiting == 0)
    assert "the event loop is closed" in caplog.text
    assert not worker.ended


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_score_that_is_no_number_is_an_error(bad: float, worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    session = worker.generator.engine.session
    shape = (6, session.manifest.vocabulary_size)
    monkeypatch.setattr(session, "read", lambda ids, past: (np.full(shape, bad, np.float32)[: len(ids)], None))
    scored = SamplingParams(max_new_tokens=1, logprobs=2)
    with pytest.raises(ArithmeticError, match="the model's logits are not finite"):
        Client(worker, "The lamp", scored, echo=True, draws=False).pieces()


def test_a_share_of_more_than_all_is_all(tiny_engine_folder: Path) -> None:
    worker = Worker(
        lambda: TextGenerator.load(tiny_engine_folder, precision="float32", provider="cpu", threads=1, slots=SLOTS),
        max_queue=8,
        slots_per_client=4 * SLOTS,
    )
    worker.start()
    with pytest.raises(UserError, match=r"^n: 20 continuations are more than the 12 that the server takes at a time$"):
        Client(worker, "A cat", SamplingParams(n=20, max_new_tokens=2), client="me")
    worker.stop()


def test_a_text_is_scored_in_small_parts_while_others_run(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = worker.generator.engine
    parts: list[int] = []
    echo = engine.echo

    def noted(text: list[int], start: int, end: int, top_count: int) -> list[Token]:
        parts.append(end - start)
        return echo(text, start, end, top_count)

    monkeypatch.setattr(engine, "echo", noted)
    scored = SamplingParams(max_new_tokens=1, logprobs=2)
    text = "The lamp on Gull Rock went out, and it was dark. " * 2
    alone = Client(worker, text, scored, echo=True, draws=False).pieces()[0].tokens
    running = Client(worker, "The lamp", ENDLESS)
    running.got.get(timeout=PATIENCE_S)
    beside = Client(worker, text, scored, echo=True, draws=False).pieces()[0].tokens
    worker.cancel(running.job)
    assert parts == [SCORING_CHUNK_TOKENS] + [PREFILL_CHUNK_TOKENS["cpu"]] * (len(parts) - 1)
    assert len(parts) > 2
    assert [(token.text, token.offset) for token in beside] == [(token.text, token.offset) for token in alone]
    for one, other in zip(beside[1:], alone[1:], strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


def test_the_texts_of_jobs_take_turns(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """One job with many texts to score must not keep another from its one."""
    engine = worker.generator.engine
    read: list[int] = []
    begun, go_on = threading.Event(), threading.Event()
    check_text = engine.check_text

    def noted(text: list[int], name: str) -> None:
        begun.set()
        assert go_on.wait(PATIENCE_S)
        read.append(text[0])
        check_text(text, name)

    monkeypatch.setattr(engine, "check_text", noted)
    done: queue.SimpleQueue[Delivery | Exception] = queue.SimpleQueue()
    for firsts in ([11, 12, 13], [21]):
        prompts = [Prompt([first, 7], "", has_context=False) for first in firsts]
        worker.submit(Job(prompts, SamplingParams(logprobs=0, max_new_tokens=1), done.put, echo=True, draws=False))
        assert begun.wait(PATIENCE_S)
    go_on.set()
    for _ in range(2):
        assert isinstance(done.get(timeout=PATIENCE_S), Delivery)
    # The second came when the first had its turn.
    assert read == [11, 12, 21, 13]


def test_a_client_has_its_share_of_slots_and_queue(tiny_engine_folder: Path) -> None:
    def load() -> TextGenerator:
        return TextGenerator.load(tiny_engine_folder, precision="float32", provider="cpu", threads=1, slots=SLOTS)

    worker = Worker(load, max_queue=8, slots_per_client=1)
    worker.start()
    mine = [Client(worker, "The lamp", ENDLESS, client="me") for _ in range(3)]
    with pytest.raises(QueueFullError, match=r"^this client's share of the queue is full; try again in \d+ s$"):
        Client(worker, "A cat", SEEDED, client="me")
    with pytest.raises(UserError, match=r"^n: 4 continuations are more than the 3 that the server takes at a time$"):
        Client(worker, "A cat", SamplingParams(n=4, max_new_tokens=2), client="other")
    assert Client(worker, "A cat", SEEDED, client="other").text()
    assert worker.running == 1
    for client in mine:
        worker.cancel(client.job)
    wait_for(lambda: worker.running == 0 and worker.waiting == 0)
    worker.stop()


def test_a_folder_without_an_engine_is_refused(tmp_path: Path) -> None:
    worker = Worker(lambda: TextGenerator.load(tmp_path))
    with pytest.raises(UserError, match="holds no engine"):
        worker.start()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_breaks_ends_every_job(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    deaths = []
    monkeypatch.setattr(worker, "_on_death", lambda: deaths.append(True))

    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(worker.generator.engine.scheduler, "step", fail)
    client = Client(worker, "The lamp", SEEDED)
    with pytest.raises(RuntimeError, match="the engine has ended"):
        client.pieces()
    wait_for(lambda: bool(deaths))
    with pytest.raises(RuntimeError, match="the engine has ended"):
        Client(worker, "The lamp", SEEDED)
