"""Requests that join, leave, share and slide: each gives the tokens that it gives alone."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from pipeline.engine import Engine, SamplingParams
from pipeline.engine.scheduler import Request
from pipeline.errors import UserError

PROMPTS = [[0, 40, 41, 42], [50], [60, 61, 62, 63, 64, 65, 66], [0], [70, 71]]


@pytest.fixture
def engine(tiny_engine_folder: Path) -> Engine:
    """Three slots, so that requests wait."""
    return Engine.load(tiny_engine_folder, precision="float32", provider="cpu", threads=1, slots=3)


def params(seed: int, **changes: object) -> SamplingParams:
    values: dict[str, object] = {"seed": seed, "ignore_eos": True, "max_new_tokens": 6 + 3 * seed}
    return SamplingParams.from_mapping(values | changes)


def drawn(request: Request) -> list[int]:
    return [token.token_id for token in request.tokens if token.token_id is not None]


def test_more_requests_than_slots_say_what_each_says_alone(engine: Engine) -> None:
    each = [params(seed) for seed in range(len(PROMPTS))]
    alone = [engine.generate([prompt], own)[0] for prompt, own in zip(PROMPTS, each, strict=True)]
    assert engine.generate(PROMPTS, each) == alone
    assert engine.scheduler.running == engine.scheduler.waiting == 0


def test_requests_join_and_leave_at_any_step(engine: Engine) -> None:
    alone = [engine.generate([prompt], params(seed))[0].token_ids for seed, prompt in enumerate(PROMPTS)]
    requests: list[Request] = []
    for seed, prompt in enumerate(PROMPTS):
        requests += engine.submit(prompt, params(seed))
        for _ in range(seed + 1):
            engine.scheduler.step(prefill_tokens=2)
    while engine.scheduler.running or engine.scheduler.waiting:
        engine.scheduler.step(prefill_tokens=2)
    assert [drawn(request) for request in requests] == alone
    assert {request.finish_reason for request in requests} == {"length"}


def test_a_cancelled_request_frees_its_slot_at_once(engine: Engine) -> None:
    first, *others = [engine.submit(prompt, params(9))[0] for prompt in PROMPTS[:4]]
    engine.scheduler.step()
    assert (engine.scheduler.running, engine.scheduler.waiting) == (3, 1)
    engine.scheduler.cancel(first)
    assert (first.finish_reason, engine.scheduler.running) == ("cancelled", 2)
    engine.scheduler.cancel(first)
    engine.scheduler.cancel(others[-1])
    assert engine.scheduler.waiting == 0
    while engine.scheduler.running:
        engine.scheduler.step()
    for prompt, request in zip(PROMPTS[1:3], others, strict=False):
        assert drawn(request) == engine.generate([prompt], params(9))[0].token_ids


def test_rows_stay_dense_when_a_request_ends(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    decode = engine.session.decode

    def counted(token_ids: list[int], positions: list[int]) -> None:
        counts.append(len(token_ids))
        decode(token_ids, positions)

    monkeypatch.setattr(engine.session, "decode", counted)
    short, *long = [engine.submit(PROMPTS[0], params(0, max_new_tokens=count))[0] for count in (3, 12, 20)]
    while engine.scheduler.running or engine.scheduler.waiting:
        engine.scheduler.step()
    assert short.finish_reason == "length"
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == 1
    expected = engine.generate([PROMPTS[0]], params(0, max_new_tokens=20))[0].token_ids
    assert [drawn(request) for request in long] == [expected[:12], expected]


def test_a_long_prompt_stalls_the_others_for_one_chunk(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    fed: list[tuple[str, int]] = []
    prefill, decode = engine.session.prefill, engine.session.decode

    def noted_prefill(slot: int, token_ids: list[int], past_tokens: int) -> None:
        fed.append(("prefill", len(token_ids)))
        prefill(slot, token_ids, past_tokens)

    def noted_decode(token_ids: list[int], positions: list[int]) -> None:
        fed.append(("decode", len(token_ids)))
        decode(token_ids, positions)

    monkeypatch.setattr(engine.session, "prefill", noted_prefill)
    monkeypatch.setattr(engine.session, "decode", noted_decode)
    long_prompt = [index % 300 for index in range(40)]
    (running,) = engine.submit([50], params(1, max_new_tokens=30))
    engine.scheduler.step(prefill_tokens=8)
    (joining,) = engine.submit(long_prompt, params(2, max_new_tokens=5))
    for _ in range(7):
        engine.scheduler.step(prefill_tokens=8)
    kinds = [kind for kind, _ in fed]
    assert max(size for kind, size in fed if kind == "prefill") == 8
    assert all(pair != ("prefill", "prefill") for pair in pairwise(kinds))
    assert len(drawn(running)) == 8
    while engine.scheduler.running:
        engine.scheduler.step()
    assert drawn(joining) == engine.generate([long_prompt], params(2, max_new_tokens=5))[0].token_ids


def test_alone_a_prompt_is_read_in_one_pass(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    prefill = engine.session.prefill
    monkeypatch.setattr(
        engine.session, "prefill", lambda slot, ids, past: (sizes.append(len(ids)), prefill(slot, ids, past))
    )
    engine.submit([index % 300 for index in range(40)], params(2))
    engine.scheduler.step(prefill_tokens=8)
    assert sizes == [40]


def test_choices_share_one_prefill(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    fed: list[int] = []
    prefill = engine.session.prefill
    monkeypatch.setattr(
        engine.session, "prefill", lambda slot, ids, past: (fed.append(len(ids)), prefill(slot, ids, past))
    )
    prompt = [index % 300 for index in range(30)]
    choices = engine.generate([prompt], params(3, n=3))
    assert fed == [30]
    assert len({tuple(choice.token_ids) for choice in choices}) == 3
    # More choices than slots: those that start later take the prompt over from one that still runs.
    assert engine.generate([prompt], params(3, n=5))[:3] == choices


def test_a_request_without_a_token_left_ends_alone(engine: Engine) -> None:
    (good,) = engine.submit([50], params(1))
    (bad,) = engine.submit([60], params(1, banned_token_ids=list(range(300))))
    while engine.scheduler.running or engine.scheduler.waiting:
        engine.scheduler.step()
    assert bad.finish_reason == "error"
    assert isinstance(bad.error, UserError)
    assert drawn(good) == engine.generate([[50]], params(1))[0].token_ids
    with pytest.raises(UserError, match="leave no token to draw"):
        engine.generate([[60]], params(1, banned_token_ids=list(range(300))))


def test_streams_may_be_read_in_turn(engine: Engine) -> None:
    streams = [engine.stream(prompt, params(seed)) for seed, prompt in enumerate(PROMPTS[:3])]
    found: list[list[int]] = [[], [], []]
    for _ in range(4):
        for own, stream in zip(found, streams, strict=True):
            token_id = next(stream).token_id
            assert token_id is not None
            own.append(token_id)
    for own, stream in zip(found, streams, strict=True):
        own += [token.token_id for token in stream if token.token_id is not None]
    assert found == [engine.generate([prompt], params(seed))[0].token_ids for seed, prompt in enumerate(PROMPTS[:3])]


def test_a_text_is_scored_while_others_run(engine: Engine) -> None:
    text = [5, 6, 7, 8, 9]
    expected = engine.score([text])[0]
    whole = engine.generate([[50]], params(4))[0].token_ids
    (request,) = engine.submit([50], params(4))
    while engine.scheduler.running or engine.scheduler.waiting:
        engine.scheduler.step()
        np.testing.assert_array_equal(engine.score([text])[0], expected)
    assert drawn(request) == whole


def test_at_the_end_of_the_context_the_newest_half_continues(engine: Engine) -> None:
    """A slide is followed by what follows the newest half as a prompt, with the same random numbers."""
    context_length = engine.context_length
    sliding = params(5, context_overflow="slide", max_new_tokens=100, repetition_penalty=1.0)
    prompt = [40, 41, 42]
    whole = engine.generate([prompt], sliding)[0]
    assert (len(whole.token_ids), whole.finish_reason) == (100, "length")
    before = context_length - len(prompt)
    ending = engine.generate([prompt], params(5, max_new_tokens=100))[0]
    assert ending.token_ids == whole.token_ids[:before]
    half = [*prompt, *whole.token_ids[:before]][-(context_length // 2) :]
    greedy = params(5, context_overflow="slide", max_new_tokens=100, temperature=0)
    slid = engine.generate([prompt], greedy)[0].token_ids
    half = [*prompt, *slid[:before]][-(context_length // 2) :]
    follower = engine.generate([half], params(5, temperature=0, max_new_tokens=1))[0].token_ids
    assert slid[before : before + 1] == follower


def test_a_long_prompt_may_slide_too(engine: Engine) -> None:
    prompt = [index % 300 for index in range(100)]
    with pytest.raises(UserError, match="100 tokens leave no room in the context of 64; shorten it, or set"):
        engine.generate([prompt], params(1))
    sliding = params(1, context_overflow="slide", temperature=0)
    assert engine.generate([prompt], sliding) == engine.generate([prompt[-32:]], sliding)


def test_a_single_slot_is_enough(tiny_engine_folder: Path, engine: Engine) -> None:
    single = Engine.load(tiny_engine_folder, provider="cpu", threads=1, slots=1)
    each = [params(seed) for seed in range(len(PROMPTS))]
    assert single.generate(PROMPTS, each) == engine.generate(PROMPTS, each)
    with pytest.raises(UserError, match=r"^slots: 0 is out of range"):
        Engine.load(tiny_engine_folder, slots=0)
