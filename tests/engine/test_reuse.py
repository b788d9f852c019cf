"""What slots hold is copied instead of read again, and is what the slots are said to hold."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.engine import Engine, SamplingParams
from pipeline.engine.scheduler import SHARED_TOKENS, Request
from pipeline.engine.session import Session

SYSTEM = [(7 * index) % 290 + 5 for index in range(SHARED_TOKENS + 4)]
OTHER = [(11 * index) % 290 + 5 for index in range(SHARED_TOKENS + 4)]
SLOTS = 3


@pytest.fixture
def engine(tiny_engine_folder: Path) -> Engine:
    return load(tiny_engine_folder)


def load(folder: Path, precision: str = "float32") -> Engine:
    return Engine.load(folder, precision=precision, provider="cpu", threads=1, slots=SLOTS)


def params(seed: int = 1, **changes: Any) -> SamplingParams:
    return SamplingParams(**{"seed": seed, "ignore_eos": True, "max_new_tokens": 4} | changes)


def finish(engine: Engine) -> None:
    while engine.scheduler.running or engine.scheduler.waiting:
        engine.scheduler.step()


def run(engine: Engine, prompt: list[int], own: SamplingParams | None = None) -> Request:
    (request,) = engine.submit(prompt, own or params())
    finish(engine)
    return request


def drawn(request: Request) -> list[int]:
    return [token.token_id for token in request.tokens if token.token_id is not None]


def alone(folder: Path, prompt: list[int], own: SamplingParams) -> list[int]:
    return load(folder).generate([prompt], own)[0].token_ids


def caches(session: Session) -> Iterator[np.ndarray]:
    for buffer in session._cache.values():
        assert buffer.array is not None
        yield buffer.array


def check_held(session: Session, reader: Session, tolerance: float = 1e-4) -> None:
    """Compare what each slot is said to hold with what another session makes of the same tokens."""
    for slot, held in enumerate(session.held):
        if held:
            reader.prefill(0, held, 0)
            for own, fresh in zip(caches(session), caches(reader), strict=True):
                np.testing.assert_allclose(
                    own[slot, :, : len(held)].astype(np.float32),
                    fresh[0, :, : len(held)].astype(np.float32),
                    atol=tolerance,
                )


def test_a_second_prompt_is_read_from_where_it_differs(engine: Engine, tiny_engine_folder: Path) -> None:
    assert run(engine, [0, *SYSTEM, 40, 41]).reused == 0
    second = run(engine, [0, *SYSTEM, 50, 51])
    assert second.reused == 1 + len(SYSTEM)
    assert drawn(second) == alone(tiny_engine_folder, [0, *SYSTEM, 50, 51], params())


def test_the_last_token_is_read_even_if_all_is_held(engine: Engine, tiny_engine_folder: Path) -> None:
    first, second = (run(engine, [0, *SYSTEM]) for _ in range(2))
    assert second.reused == len(SYSTEM)
    assert drawn(first) == drawn(second)
    # What was drawn is held, too: a conversation goes on.
    whole = [0, *SYSTEM, *drawn(second)]
    third = run(engine, [*whole, 60])
    assert third.reused == len(whole) - 1
    assert drawn(third) == alone(tiny_engine_folder, [*whole, 60], params())


def test_two_beginnings_in_turn_are_both_kept(engine: Engine) -> None:
    for beginning in (SYSTEM, OTHER):
        assert run(engine, [0, *beginning, 40]).reused < SHARED_TOKENS
    for round_number in range(3):
        for beginning in (SYSTEM, OTHER):
            assert run(engine, [0, *beginning, 50 + round_number]).reused == 1 + len(beginning)


def test_the_beginning_that_was_used_least_recently_is_dropped(engine: Engine) -> None:
    beginnings = [[(step * index) % 290 + 5 for index in range(SHARED_TOKENS)] for step in (7, 11, 13, 17)]
    for beginning in beginnings:
        run(engine, [*beginning, 1])
    assert [run(engine, [*beginnings[index], 2]).reused for index in (2, 3)] == [SHARED_TOKENS] * 2
    assert run(engine, [*beginnings[0], 2]).reused < SHARED_TOKENS


def test_prompts_that_arrive_together_share_what_the_first_has_read(engine: Engine) -> None:
    requests = [engine.submit([0, *SYSTEM, 40 + index], params())[0] for index in range(SLOTS)]
    finish(engine)
    assert [request.reused for request in requests] == [0, 1 + len(SYSTEM), 1 + len(SYSTEM)]


def test_a_text_that_was_scored_is_continued_without_reading_it_again(engine: Engine) -> None:
    engine.score([[0, *SYSTEM, 40]])
    assert run(engine, [0, *SYSTEM, 40]).reused == 1 + len(SYSTEM)


def test_few_tokens_are_not_copied(engine: Engine) -> None:
    (held,) = engine.submit([*SYSTEM[: SHARED_TOKENS - 1], 40], params(max_new_tokens=30))
    engine.scheduler.step()
    (other,) = engine.submit([*SYSTEM[: SHARED_TOKENS - 1], 50], params())
    finish(engine)
    assert (held.reused, other.reused) == (0, 0)


def test_calls_of_the_library_do_not_depend_on_earlier_ones(engine: Engine) -> None:
    run(engine, [0, *SYSTEM, 40])
    engine.generate([[0, *SYSTEM, 50]], params())
    (request,) = engine.submit([0, *SYSTEM, 40], params())
    engine.session.forget()
    finish(engine)
    assert request.reused == 0


def test_a_slot_fed_by_others_is_not_taken_for_more_than_it_holds(engine: Engine) -> None:
    run(engine, [0, *SYSTEM, 40])
    engine.session.prefill(0, [1, 2, 3], 0)
    assert engine.session.held[0] == [1, 2, 3]
    engine.session.prefill(0, [9], 30)
    assert engine.session.held[0] == []
    assert run(engine, [0, *SYSTEM, 40]).reused == 0


@settings(max_examples=40)
@given(st.data())
def test_whatever_happens_slots_hold_what_they_are_said_to_hold(tiny_engine_folder: Path, data: st.DataObject) -> None:
    """Requests begin, end, are cancelled and slide, and each gives what it gives alone."""
    engine, reader = load(tiny_engine_folder), load(tiny_engine_folder)
    requests: list[tuple[list[int], SamplingParams, Request]] = []
    for _ in range(data.draw(st.integers(1, 12), label="events")):
        event = data.draw(st.sampled_from(["submit", "submit", "step", "step", "cancel", "score"]), label="event")
        beginning = data.draw(st.sampled_from([SYSTEM, OTHER, []]), label="beginning")
        prompt = [0, *beginning, *data.draw(st.lists(st.integers(1, 3), max_size=3), label="rest")]
        if event == "submit":
            own = params(
                data.draw(st.integers(0, 2), label="seed"),
                n=data.draw(st.integers(1, 2), label="n"),
                max_new_tokens=data.draw(st.sampled_from([1, 3, 70]), label="most"),
                context_overflow="slide",
            )
            requests += [(prompt, own, request) for request in engine.submit(prompt, own)]
        elif event == "step":
            engine.scheduler.step(prefill_tokens=data.draw(st.sampled_from([1, 5, 100]), label="part"))
        elif event == "cancel" and requests:
            engine.scheduler.cancel(data.draw(st.sampled_from(requests), label="which")[2])
        else:
            engine.score([prompt])
        check_held(engine.session, reader.session)
    finish(engine)
    check_held(engine.session, reader.session)
    for prompt, own, request in requests:
        if request.finish_reason != "cancelled":
            whole = [done.token_ids for done in reader.generate([prompt], own)]
            assert drawn(request) in whole


def test_eight_bits_hold_the_same_whether_read_at_once_or_in_parts(tiny_engine_folder: Path) -> None:
    engine, reader = (load(tiny_engine_folder, "int8") for _ in range(2))
    text = [(17 * index) % 300 for index in range(40)]
    engine.session.prefill(0, text[:20], 0)
    for position in range(20, 23):
        engine.session.decode([text[position]], [position])
    engine.session.prefill(0, text[23:], 23)
    # Rounding to whole numbers may fall either way.
    check_held(engine.session, reader.session, tolerance=1)
    np.testing.assert_allclose(
        engine.session.logits[0], reader.session.logits[0], atol=0.05 * np.ptp(reader.session.logits[0])
    )
