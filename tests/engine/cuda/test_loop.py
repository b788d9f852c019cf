"""The device's loop gives the tokens of the host's; both run on the processor."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from threading import Event, RLock
from time import sleep
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.engine import Completion, Engine, SamplingParams
from pipeline.engine.cuda.kernel import Rows
from pipeline.engine.cuda.loop import DeviceLoop
from pipeline.engine.cuda.rows import DEVICE_FIELDS, TAGS
from pipeline.engine.memory import Buffer, HostMemory
from pipeline.engine.scheduler import Scheduler

PROMPTS = [[5, 6, 7], [], [11] * 20, [40, 41], [9, 8, 7, 6, 5, 4], [12], [13, 14], [250, 3], [77] * 40, [1, 2]]
LAG = 3
PATIENCE_S = 30
THREADS = 2

Launch = Callable[[Rows, int, int], None]


class LaggingMemory(HostMemory):
    """Memory in which a peek is some looks late, as on a GPU with steps in its queue."""

    def __init__(self) -> None:
        self.seen: deque[NDArray[Any]] = deque(maxlen=LAG)

    def peek(self, buffer: Buffer, row: int, count: int) -> NDArray[Any]:
        self.seen.append(self.read(buffer, row, count))
        return self.seen[0]


def load(folder: Path, launch: Launch | None, memory: HostMemory | None = None) -> Engine:
    """Load an engine; `launch` draws for it, if given."""
    engine = Engine.load(folder, provider="cpu", precision="float16", threads=1)
    if memory is not None:
        engine.session.memory = memory
    if launch is not None:
        engine.session.draw = lambda rows, count: launch(rows, count, THREADS)
    engine.scheduler = Scheduler(engine.session)
    return engine


@pytest.fixture(scope="module")
def by_host(tiny_engine_folder: Path) -> Engine:
    return load(tiny_engine_folder, None)


@pytest.fixture(scope="module")
def by_device(tiny_engine_folder: Path, launch: Launch) -> Engine:
    return load(tiny_engine_folder, launch)


@pytest.fixture
def late(tiny_engine_folder: Path, launch: Launch) -> Engine:
    """An engine with a host that is always some steps behind."""
    return load(tiny_engine_folder, launch, LaggingMemory())


def steps_of(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by the number of rows of each step of the device."""
    asked: list[int] = []
    loop = engine.scheduler._loop
    assert loop is not None
    step = loop.step

    def counted(slots: int) -> None:
        asked.append(slots)
        step(slots)

    monkeypatch.setattr(loop, "step", counted)
    return asked


SETTINGS: list[SamplingParams] = [
    SamplingParams(temperature=0, max_new_tokens=12, ignore_eos=True),
    SamplingParams(seed=3, top_k=40, top_p=0.95, repetition_penalty=1.2, max_new_tokens=30),
    SamplingParams(seed=4, temperature=1.3, min_p=0.05, max_new_tokens=70, ignore_eos=True),
    SamplingParams(seed=5, temperature=0.7, presence_penalty=0.6, frequency_penalty=0.2, max_new_tokens=25),
    SamplingParams(seed=6, top_k=20, stop_token_ids=tuple(range(100, 106)), max_new_tokens=60),
    SamplingParams(seed=7, n=3, top_k=60, logit_bias={9: 4.0}, banned_token_ids=(5, 6), max_new_tokens=9),
    SamplingParams(seed=8, allowed_token_ids=tuple(range(50, 90)), top_p=0.8, max_new_tokens=15),
    SamplingParams(seed=9, top_p=0.9999, temperature=3.0, max_new_tokens=8, ignore_eos=True),
    SamplingParams(seed=10, top_k=30, context_overflow="slide", max_new_tokens=90, ignore_eos=True),
    SamplingParams(seed=11, temperature=0.3, repetition_detection=(8, 2), max_new_tokens=50, ignore_eos=True),
    SamplingParams(seed=12, top_k=50, min_new_tokens=4, max_new_tokens=20),
    SamplingParams(seed=13, temperature=2.0, top_n_sigma=3.0, eta_cutoff=0.002, max_new_tokens=20),
]


def test_every_parameter_that_the_device_supports_is_tried() -> None:
    tried = {name for params in SETTINGS for name in params.active_fields()}
    # The engine reads ids, and refuses what needs texts.
    assert tried == DEVICE_FIELDS - {"stop", "best_of"}


@pytest.mark.parametrize("params", SETTINGS)
@pytest.mark.parametrize("which", ["by_device", "late"])
def test_the_same_continuations(
    params: SamplingParams, which: str, by_host: Engine, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine: Engine = request.getfixturevalue(which)
    asked = steps_of(engine, monkeypatch)
    assert engine.generate(PROMPTS, params) == by_host.generate(PROMPTS, params)
    assert asked
    assert engine.scheduler.running == engine.scheduler.waiting == 0


@pytest.mark.parametrize("which", ["by_device", "late"])
def test_each_its_own_parameters_and_some_that_the_host_must_draw(
    which: str, by_host: Engine, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine: Engine = request.getfixturevalue(which)
    asked = steps_of(engine, monkeypatch)
    each = [SETTINGS[index % len(SETTINGS)] for index in range(len(PROMPTS))]
    each[2] = replace(each[2], logprobs=2, max_new_tokens=5)
    each[4] = replace(each[4], no_repeat_ngram_size=2, max_new_tokens=7)
    each[6] = replace(each[6], min_new_tokens=4)
    each[8] = replace(each[8], max_verbatim_tokens=1, max_new_tokens=20)
    for own in (engine, by_host):
        monkeypatch.setattr(own.session, "followers", lambda run: list(range(run[-1] % 7, 300, 7)))
    found, expected = engine.generate(PROMPTS, each), by_host.generate(PROMPTS, each)
    assert found == expected
    assert 0 < len(asked) < 200


@pytest.mark.parametrize("which", ["by_device", "late"])
def test_tags_begin_again_once_an_entry_has_no_room_for_more(
    which: str, by_host: Engine, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine: Engine = request.getfixturevalue(which)
    monkeypatch.setattr(engine.scheduler._loop, "_joins", TAGS - 3)
    params = SamplingParams(seed=3, top_k=2**63, temperature=1e39, max_new_tokens=12, ignore_eos=True)
    assert engine.generate(PROMPTS, params) == by_host.generate(PROMPTS, params)
    assert engine.scheduler._loop is not None
    assert engine.scheduler._loop._joins > TAGS


@pytest.mark.parametrize("which", ["by_device", "late"])
def test_streams_join_and_leave(which: str, by_host: Engine, request: pytest.FixtureRequest) -> None:
    engine: Engine = request.getfixturevalue(which)
    params = SamplingParams(seed=21, top_k=50, max_new_tokens=20, ignore_eos=True)
    expected = [tokens_of(done) for done in by_host.generate(PROMPTS[:3], params)]
    first, second = engine.stream(PROMPTS[0], params), engine.stream(PROMPTS[1], params)
    heads = [next(first).token_id for _ in range(4)]
    other = [next(second).token_id for _ in range(6)]
    second.close()  # type: ignore[attr-defined]
    third = [token.token_id for token in engine.stream(PROMPTS[2], params)]
    assert [*heads, *(token.token_id for token in first)] == expected[0]
    assert other == expected[1][:6]
    assert third == expected[2]
    assert engine.scheduler.running == 0


def test_a_long_prompt_is_not_written_over_while_it_is_read(by_host: Engine, by_device: Engine) -> None:
    params = SamplingParams(seed=31, top_k=50, max_new_tokens=12, ignore_eos=True)
    long = [(7 * index) % 250 for index in range(45)]

    def run(engine: Engine) -> list[list[int]]:
        requests = engine.submit([9, 9], params)
        for _ in range(3):
            engine.scheduler.step(prefill_tokens=4)
        requests += engine.submit(long, params)
        while any(request.finish_reason is None for request in requests):
            engine.scheduler.step(prefill_tokens=4)
        return [request.continuation.output_ids for request in requests]

    assert run(by_device) == run(by_host)


def test_scoring_beside_a_running_row(by_device: Engine) -> None:
    text = [(5 * index) % 250 for index in range(30)]
    expected = by_device.score([text])[0]
    stream = by_device.stream([3], SamplingParams(seed=1, top_k=20, max_new_tokens=20, ignore_eos=True))
    next(stream)
    next(stream)
    np.testing.assert_allclose(by_device.score([text])[0], expected)
    assert len(list(stream)) == 18


def tokens_of(done: Completion) -> list[int]:
    return done.token_ids


class HeldMemory(HostMemory):
    """Memory of a device that a thread can hold."""

    def __init__(self) -> None:
        self.lock = RLock()

    def held(self) -> AbstractContextManager[object]:
        return self.lock


def test_nothing_runs_while_another_thread_captures(
    tiny_engine_folder: Path, launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A capture holds the device of all engines of the process, as ONNX Runtime captures in CUDA's global mode."""
    memory = HeldMemory()
    serving = load(tiny_engine_folder, launch, memory)
    (request,) = serving.submit([5], SamplingParams(seed=1, max_new_tokens=30, ignore_eos=True))
    serving.scheduler.step()
    coming = load(tiny_engine_folder, launch, memory)
    capturing, captured = Event(), Event()

    def capture(self: DeviceLoop, slots: int) -> None:
        capturing.set()
        assert captured.wait(PATIENCE_S)

    monkeypatch.setattr(coming.session, "provider", "cuda")
    monkeypatch.setattr(DeviceLoop, "step", capture)
    with ThreadPoolExecutor(2) as pool:
        loading = pool.submit(Scheduler, coming.session)
        assert capturing.wait(PATIENCE_S)
        monkeypatch.undo()
        steps = [pool.submit(serving.score, [[5, 6, 7]]), pool.submit(serving.scheduler.step)]
        for work in (lambda: serving.scheduler.cancel(request), serving.scheduler.step):
            assert not memory.lock.acquire(blocking=False)
            steps.append(pool.submit(work))
        sleep(0.1)
        assert not any(step.done() for step in steps)
        captured.set()
        for step in (loading, *steps):
            step.result(PATIENCE_S)
    assert request.finish_reason == "cancelled"
