"""The engine's thread: what jobs gain, and what happens to jobs that end early."""

import queue
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from served_model import PATIENCE_S, SLOTS, wait_for

from pipeline.decoding import SamplingParams
from pipeline.engine.text import Piece, TextGenerator
from pipeline.errors import UserError
from pipeline.serving.worker import Delivery, Job, Prompt, QueueFullError, Worker
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
