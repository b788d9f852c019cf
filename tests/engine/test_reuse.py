"""What slots hold is copied instead of read again, and is what the slots are said to hold."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from held_slots import OTHER, SYSTEM, check_events, check_held, drawn, finish
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.engine import Engine, SamplingParams
from pipeline.engine.scheduler import SHARED_TOKENS, Request

SLOTS = 3


@pytest.fixture
def engine(tiny_engine_folder: Path) -> Engine:
    return load(tiny_engine_folder)


def load(folder: Path, precision: str = "float32") -> Engine:
    return Engine.load(folder, precision=precision, provider="cpu", threads=1, slots=SLOTS)


def params(seed: int = 1, **changes: Any) -> SamplingParams:
    return SamplingParams(**{"seed": seed, "ignore_eos": True, "max_new_tokens": 4} | changes)


def run(engine: Engine, prompt: list[int], own: SamplingParams | None = None) -> Request:
    (request,) = engine.submit(prompt, own or params())
    finish(engine)
    return request


def alone(folder: Path, prompt: list[int], own: SamplingParams) -> list[int]:
    return load(folder).generate([prompt], own)[0].token_ids


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


def test_conversations_that_share_a_system_prompt_each_go_on_where_they_were(engine: Engine) -> None:
    texts = [[0, *SYSTEM, *[index] * 10] for index in (40, 50)]
    for round_number in range(3):
        for index, text in enumerate(texts):
            request = run(engine, text)
            if round_number > 0:
                assert request.reused >= len(text) - 3
            texts[index] = [*text, *drawn(request), 60, 61]


def test_a_prompt_of_one_token_leaves_what_its_slot_held(engine: Engine) -> None:
    run(engine, [0, *SYSTEM, 40])
    run(engine, [5])
    assert run(engine, [0, *SYSTEM, 50]).reused == 1 + len(SYSTEM)


def test_a_request_that_slides_keeps_what_others_left(engine: Engine) -> None:
    run(engine, [0, *SYSTEM, 40])
    run(engine, [0, *OTHER, 40])
    run(engine, [7], params(max_new_tokens=200, context_overflow="slide"))
    assert run(engine, [0, *OTHER, 50]).reused == 1 + len(OTHER)


def test_the_choices_of_a_prompt_count_once(engine: Engine) -> None:
    run(engine, [0, *SYSTEM, 40])
    choices = engine.submit([0, *SYSTEM, 50, 51], params(n=3))
    finish(engine)
    assert [choice.reused for choice in choices] == [1 + len(SYSTEM), 0, 0]


def test_a_pass_that_fails_leaves_nothing_that_is_taken_for_held(
    engine: Engine, tiny_engine_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(engine, [0, *SYSTEM, 40])
    graph = engine.session.graph

    class Failing:
        def __getattr__(self, name: str) -> Any:
            return getattr(graph, name)

        def run_with_iobinding(self, *arguments: Any) -> None:
            graph.run_with_iobinding(*arguments)
            raise RuntimeError("out of memory")

    monkeypatch.setattr(engine.session, "graph", Failing())
    for feed in (
        lambda: engine.session.prefill(0, [9, 9, 9], 2),
        lambda: engine.session.decode([9], [1]),
        lambda: engine.session.read([9, 9], 0),
    ):
        with pytest.raises(RuntimeError, match="out of memory"):
            feed()
    monkeypatch.undo()
    assert engine.session.held[0] == [0]
    assert engine.session.held[SLOTS] == []
    check_held(engine.session, load(tiny_engine_folder).session, 1e-4)


@settings(max_examples=40)
@given(st.data())
def test_whatever_happens_slots_hold_what_they_are_said_to_hold(tiny_engine_folder: Path, data: st.DataObject) -> None:
    """And each request gives what it gives alone."""
    engine, reader = load(tiny_engine_folder), load(tiny_engine_folder)
    asked = check_events(data, engine, reader, lambda: check_held(engine.session, reader.session, 1e-4))
    for prompt, own, requests in asked:
        whole = reader.generate([prompt], own)
        for request, done in zip(requests, whole, strict=True):
            if request.finish_reason != "cancelled":
                assert drawn(request) == done.token_ids


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
