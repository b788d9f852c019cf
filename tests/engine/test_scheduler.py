"""Requests that join, leave, share and slide: each gives the tokens that it gives alone."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.engine import Engine, SamplingParams
from pipeline.engine.sampler import Continuation
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


def note_prefills(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by the tokens of each part of a prompt that is read."""
    fed: list[int] = []
    prefill = engine.session.prefill
    monkeypatch.setattr(
        engine.session, "prefill", lambda slot, ids, past: (fed.append(len(ids)), prefill(slot, ids, past))
    )
    return fed


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
    sizes = note_prefills(engine, monkeypatch)
    engine.submit([index % 300 for index in range(40)], params(2))
    engine.scheduler.step(prefill_tokens=8)
    assert sizes == [40]


def test_choices_share_one_prefill(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    fed = note_prefills(engine, monkeypatch)
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


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_any_temperature_draws_a_token_of_the_vocabulary(precision: str, tiny_engine_folder: Path) -> None:
    engine = Engine.load(tiny_engine_folder, precision=precision, provider="cpu", threads=1)
    for temperature in (1e39, 1e308):
        hot = params(1, temperature=temperature, ignore_eos=False, min_new_tokens=8, no_repeat_ngram_size=2)
        (done,) = engine.generate([[50]], hot)
        assert len(done.token_ids) >= 8
        assert set(done.token_ids) <= set(range(1, engine.manifest.vocabulary_size))


@pytest.mark.parametrize("place", ["draw", "append", "__init__"])
def test_an_error_that_nobody_foresaw_ends_its_request_alone(
    place: str, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = engine.generate([[50]], params(1))[0].token_ids
    own = getattr(Continuation, place)

    def fail(self: Continuation, *arguments: Any) -> Any:
        of = arguments[0] if place == "__init__" else self.params
        if of.seed == 2 and (place == "__init__" or len(self.output_ids) == 1):
            raise IndexError("no such place")
        return own(self, *arguments)

    monkeypatch.setattr(Continuation, place, fail)
    (good,) = engine.submit([50], params(1))
    (bad,) = engine.submit([60], params(2))
    (next_one,) = engine.submit([50], params(1))
    while engine.scheduler.running or engine.scheduler.waiting:
        engine.scheduler.step()
    assert (bad.finish_reason, repr(bad.error)) == ("error", "IndexError('no such place')")
    assert drawn(bad) == drawn(bad)[: 0 if place == "__init__" else 1]
    assert drawn(good) == drawn(next_one) == whole


def test_prompts_are_read_in_the_order_of_their_arrival(engine: Engine) -> None:
    """A stream of new requests that get lower slots must not keep an older one from being read."""
    long_prompt = [index % 300 for index in range(50)]
    (first,) = engine.submit([50], params(1, max_new_tokens=2))
    (running,) = engine.submit([51], params(9, max_new_tokens=40))
    (old,) = engine.submit(long_prompt, params(2, max_new_tokens=3))
    while not drawn(old):
        engine.scheduler.step(prefill_tokens=4)
        # Each takes the lowest slot, and has a prompt that fills a part.
        if engine.scheduler.running < 3:
            engine.submit([7] * 5, params(1, max_new_tokens=1))
        assert len(drawn(running)) < 20
    assert first.finish_reason == "length"


def test_choices_that_wait_for_their_prompt_leave_free_slots_to_others(engine: Engine) -> None:
    (running,) = engine.submit([51], params(9, max_new_tokens=40))
    engine.scheduler.step(prefill_tokens=4)
    choices = engine.submit([index % 300 for index in range(50)], params(3, n=3, max_new_tokens=4))
    (other,) = engine.submit([50], params(1, max_new_tokens=3))
    for _ in range(5):
        engine.scheduler.step(prefill_tokens=4)
    assert other.finish_reason == "length"
    assert not any(drawn(choice) for choice in choices)
    while engine.scheduler.running or engine.scheduler.waiting:
        engine.scheduler.step(prefill_tokens=4)
    expected = engine.generate([choices[0].context[:50]], params(3, n=3, max_new_tokens=4))
    assert [drawn(choice) for choice in choices] == [done.token_ids for done in expected]
    assert drawn(running) == engine.generate([[51]], params(9, max_new_tokens=40))[0].token_ids


def test_choices_share_a_prompt_even_if_the_first_ends_at_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    fed = note_prefills(engine, monkeypatch)
    prompt = [index % 300 for index in range(30)]
    short = engine.generate([prompt], params(3, n=3, max_new_tokens=1))
    assert fed == [30]
    longer = engine.generate([prompt], params(3, n=3, max_new_tokens=2))
    assert [done.token_ids for done in short] == [done.token_ids[:1] for done in longer]


def test_a_client_has_its_slots_and_no_more(engine: Engine) -> None:
    engine.scheduler.slots_per_client = 2
    one = engine.submit_all([([50 + index], params(4)) for index in range(4)], "one")
    other = engine.submit_all([([60], params(1))], "other")
    nobodys = engine.submit_all([([61], params(1))])
    engine.scheduler.step()
    assert [request.slot is not None for request in (*one, *other, *nobodys)] == [True, True, False, False, True, False]
    for request in one:
        engine.scheduler.cancel(request)
    engine.scheduler.step()
    assert [request.slot is not None for request in (*other, *nobodys)] == [True, True]
    for request in (*other, *nobodys):
        engine.scheduler.cancel(request)


def test_requests_that_wait_take_little_memory(engine: Engine) -> None:
    """What the sampler keeps, as wide as the vocabulary, is made only for those that run."""
    biases = dict.fromkeys(range(300), 1.0)
    waiting = engine.submit([50], params(1, n=1000, logit_bias=biases))
    engine.scheduler.step()
    assert sum(hasattr(request, "continuation") for request in waiting) == 3
    assert len({id(request.context) for request in waiting[3:]}) == 1
    for request in waiting:
        engine.scheduler.cancel(request)


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
