"""What slots are said to hold while a device draws by itself; it runs on the processor."""

from collections.abc import Callable
from pathlib import Path

from held_slots import OTHER, SYSTEM, check_events, check_held, drawn, finish
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.engine import Engine, SamplingParams
from pipeline.engine.cuda.kernel import Rows
from pipeline.engine.scheduler import Scheduler

Launch = Callable[[Rows, int, int], None]
HALF = 0.05
"""The tolerance for float16."""


def load(folder: Path, launch: Launch | None) -> Engine:
    engine = Engine.load(folder, provider="cpu", precision="float16", threads=1, slots=4)
    if launch is not None:
        engine.session.draw = lambda rows, count: launch(rows, count, 2)
    engine.scheduler = Scheduler(engine.session)
    return engine


@settings(max_examples=60)
@given(st.data())
def test_whatever_happens_slots_hold_what_they_are_said_to_hold(
    tiny_engine_folder: Path, launch: Launch, data: st.DataObject
) -> None:
    engine, reader = load(tiny_engine_folder, launch), load(tiny_engine_folder, None)
    check_events(data, engine, reader, lambda: check_held(engine.session, reader.session, HALF))


def test_a_row_that_never_drew_does_not_spoil_what_it_holds(tiny_engine_folder: Path, launch: Launch) -> None:
    engine, reader = load(tiny_engine_folder, launch), load(tiny_engine_folder, None)
    for token_id in (20, 30, 40):
        engine.submit([7, *OTHER, token_id], SamplingParams(seed=1, ignore_eos=True, max_new_tokens=30))
    (once,) = engine.submit([9, *SYSTEM], SamplingParams(seed=1, ignore_eos=True, max_new_tokens=1))
    for _ in range(5):
        engine.scheduler.step()
    check_held(engine.session, reader.session, HALF)
    params = SamplingParams(seed=1, ignore_eos=True, max_new_tokens=4)
    (request,) = engine.submit([9, *SYSTEM, 50], params)
    finish(engine)
    assert len(drawn(once)) == 1
    assert request.reused == 1 + len(SYSTEM)
    assert drawn(request) == reader.generate([[9, *SYSTEM, 50]], params)[0].token_ids


def test_a_prompt_that_is_half_read_survives_that_all_is_forgotten(tiny_engine_folder: Path, launch: Launch) -> None:
    engine, reader = load(tiny_engine_folder, launch), load(tiny_engine_folder, None)
    engine.submit([7], SamplingParams(seed=1, ignore_eos=True, max_new_tokens=40))
    engine.scheduler.step()
    params = SamplingParams(seed=1, ignore_eos=True, max_new_tokens=4)
    (request,) = engine.submit([9, *SYSTEM, 50], params)
    for _ in range(3):
        engine.scheduler.step(prefill_tokens=5)
        engine.session.forget()
    finish(engine)
    assert drawn(request) == reader.generate([[9, *SYSTEM, 50]], params)[0].token_ids
