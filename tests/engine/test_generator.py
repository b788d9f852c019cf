"""The engine against the same checkpoint in PyTorch, without padding and without a cache."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import GPT2LMHeadModel

from pipeline.engine import Completion, Engine, SamplingParams, Token, generator
from pipeline.engine.filters import log_softmax, sample
from pipeline.errors import UserError
from pipeline.quality.repetition import is_looping

TEXTS = ("The lamp", "The baker lit her second oven before the morning tide.", "N", "Nobody said so, nobody")
LOGIT_TOLERANCE = 1e-4

PARAMETER_SETS = {
    "neutral": SamplingParams(seed=3, max_new_tokens=24),
    "truncated": SamplingParams(seed=4, temperature=0.7, top_k=20, top_p=0.9, max_new_tokens=24),
    "penalised": SamplingParams(
        seed=5, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.3, max_new_tokens=24
    ),
    "no repeats": SamplingParams(seed=6, temperature=0.3, no_repeat_ngram_size=2, max_new_tokens=24),
    "long": SamplingParams(seed=7, logit_bias={0: 6.0}, min_new_tokens=5, max_new_tokens=24),
    "min-p and typical-p": SamplingParams(seed=8, temperature=1.5, min_p=0.02, typical_p=0.9, max_new_tokens=24),
    "top-n-sigma and eta": SamplingParams(
        seed=8, temperature=1.5, top_n_sigma=2.5, eta_cutoff=0.002, max_new_tokens=24
    ),
    "two stop ids": SamplingParams(seed=9, stop_token_ids=(257, 215), ignore_eos=True, max_new_tokens=24),
}


@pytest.fixture(scope="module")
def prompts(tiny_tokenizer: Tokenizer, tiny_engine: Engine) -> list[list[int]]:
    """Prompts of unequal lengths, the first two with the end-of-text that opens a document."""
    ids = [tiny_tokenizer.encode(text).ids for text in TEXTS]
    return [[tiny_engine.end_of_text_id, *row] if index < 2 else row for index, row in enumerate(ids)]


def torch_logits(model: GPT2LMHeadModel, ids: list[int]) -> NDArray[np.float32]:
    """Return the logits `[tokens, vocabulary]` of one text run as a whole."""
    with torch.inference_mode():
        return np.asarray(model(torch.tensor([ids]), use_cache=False).logits[0].numpy())


def assert_drawn_from_pytorch(
    completion: Completion, model: GPT2LMHeadModel, prompt: list[int], params: SamplingParams, choice: int = 0
) -> None:
    """Check that sampling from the logits of a whole run gives every token, and that the end is where it must be.

    One run of prompt and output gives the logits of every step, as a token sees only those before it.
    """
    end_of_text, context_length = model.config.eos_token_id, model.config.n_positions
    context = prompt or [end_of_text]
    history = context[1:] if context[0] == end_of_text else context
    endings = {*params.stop_token_ids, *(() if params.ignore_eos else (end_of_text,))}
    output = completion.token_ids
    steps = len(output) + (completion.finish_reason == "stop")
    logits = torch_logits(model, context + output)[len(context) - 1 :]
    assert params.seed is not None
    drawn = [
        sample(logits[step], params, history, output[:step], end_of_text, params.seed, choice) for step in range(steps)
    ]
    assert drawn[: len(output)] == output
    assert endings.isdisjoint(output)
    if completion.finish_reason == "stop":
        assert drawn[-1] in endings
    else:
        assert len(output) == min(params.max_new_tokens or context_length, context_length - len(context))


def likeliest_first(engine: Engine, prompt: list[int]) -> list[int]:
    """Return the greedy continuation, past any end-of-text."""
    return engine.generate([prompt], SamplingParams(temperature=0, ignore_eos=True, max_new_tokens=12))[0].token_ids


def test_logits_with_empty_past_match_pytorch(
    tiny_engine: Engine, tiny_model: GPT2LMHeadModel, prompts: list[list[int]]
) -> None:
    for prompt in prompts:
        logits = tiny_engine.session.read(prompt, 0)[0]
        np.testing.assert_allclose(logits, torch_logits(tiny_model, prompt), atol=LOGIT_TOLERANCE, rtol=0)


def test_logits_with_real_past_match_pytorch(
    tiny_engine: Engine, tiny_model: GPT2LMHeadModel, prompts: list[list[int]]
) -> None:
    session, texts = tiny_engine.session, [list(prompt) for prompt in prompts]
    for slot, text in enumerate(texts):
        session.prefill(slot, text, 0)
    for step in range(6):
        positions = [len(text) for text in texts]
        for row, text in enumerate(texts):
            text.append((7 * step + 11 * row) % 300)
        session.decode([text[-1] for text in texts], positions)
        for row, text in enumerate(texts):
            expected = torch_logits(tiny_model, text)[-1]
            np.testing.assert_allclose(session.logits[row], expected, atol=LOGIT_TOLERANCE, rtol=0)


@pytest.mark.parametrize("parts", [[20], [1, 19], [7, 7, 6], [1] * 20])
def test_a_prompt_read_in_parts_is_the_prompt(
    parts: list[int], tiny_engine: Engine, tiny_model: GPT2LMHeadModel
) -> None:
    text = [(13 * index) % 300 for index in range(sum(parts))]
    read = 0
    for part in parts:
        tiny_engine.session.prefill(2, text[read : read + part], read)
        read += part
    expected = torch_logits(tiny_model, text)[-1]
    np.testing.assert_allclose(tiny_engine.session.logits[2], expected, atol=LOGIT_TOLERANCE, rtol=0)


def test_greedy_tokens_match_transformers_generate(
    tiny_engine: Engine, tiny_model: GPT2LMHeadModel, prompts: list[list[int]]
) -> None:
    params = SamplingParams(temperature=0, max_new_tokens=30)
    batched = tiny_engine.generate(prompts, params)
    for prompt, completion in zip(prompts, batched, strict=True):
        ids = torch.tensor([prompt])
        output = tiny_model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=30, pad_token_id=0
        )
        expected = output[0, len(prompt) :].tolist()
        if expected[-1] == tiny_engine.end_of_text_id:
            expected.pop()
        assert completion.token_ids == expected
        assert tiny_engine.generate([prompt], params)[0].token_ids == expected


@pytest.mark.parametrize("name", PARAMETER_SETS)
def test_sampled_tokens_match_sampling_from_pytorch_logits(
    name: str, tiny_engine: Engine, tiny_model: GPT2LMHeadModel, prompts: list[list[int]]
) -> None:
    params = PARAMETER_SETS[name]
    for prompt, completion in zip(prompts, tiny_engine.generate(prompts, params), strict=True):
        assert_drawn_from_pytorch(completion, tiny_model, prompt, params)


def test_a_request_gives_the_same_tokens_alone_and_in_any_batch(tiny_engine: Engine, prompts: list[list[int]]) -> None:
    requests = [(prompts[index % len(prompts)], params) for index, params in enumerate(PARAMETER_SETS.values())]
    alone = [tiny_engine.generate([prompt], params)[0] for prompt, params in requests]
    for order in (range(len(requests)), reversed(range(len(requests))), (2, 5)):
        picked = list(order)
        together = tiny_engine.generate([requests[i][0] for i in picked], [requests[i][1] for i in picked])
        assert together == [alone[i] for i in picked]


@pytest.mark.parametrize("name", PARAMETER_SETS)
def test_stream_gives_what_generate_gives(name: str, tiny_engine: Engine, prompts: list[list[int]]) -> None:
    for prompt in prompts[:2]:
        tokens = list(tiny_engine.stream(prompt, PARAMETER_SETS[name]))
        whole = tiny_engine.generate([prompt], PARAMETER_SETS[name])[0]
        assert [token.token_id for token in tokens if token.token_id is not None] == whole.token_ids
        assert [token.finish_reason for token in tokens] == [None] * (len(tokens) - 1) + [whole.finish_reason]


def test_choices_are_distinct_in_order_and_begin_with_that_of_one(
    tiny_engine: Engine, tiny_model: GPT2LMHeadModel, prompts: list[list[int]]
) -> None:
    params = SamplingParams(seed=11, n=3, max_new_tokens=10)
    completions = tiny_engine.generate(prompts[:2], params)
    for i, prompt in enumerate(prompts[:2]):
        choices = completions[3 * i : 3 * i + 3]
        for choice, completion in enumerate(choices):
            assert_drawn_from_pytorch(completion, tiny_model, prompt, params, choice)
        assert len({tuple(completion.token_ids) for completion in choices}) == 3
        assert tiny_engine.generate([prompt], SamplingParams(seed=11, max_new_tokens=10)) == choices[:1]


def test_without_a_seed_each_call_draws_afresh(tiny_engine: Engine) -> None:
    params = SamplingParams(max_new_tokens=20)
    # 20 tokens of more than two bits each: two calls agree by chance once in more than 2**40.
    assert tiny_engine.generate([[5]], params) != tiny_engine.generate([[5]], params)


def test_no_prompts_give_no_completions(tiny_engine: Engine) -> None:
    assert tiny_engine.generate([], SamplingParams()) == []


def test_an_empty_prompt_starts_from_end_of_text(tiny_engine: Engine) -> None:
    params = SamplingParams(seed=12, repetition_penalty=1.5, max_new_tokens=20)
    assert tiny_engine.generate([[]], params) == tiny_engine.generate([[tiny_engine.end_of_text_id]], params)


def test_the_opening_end_of_text_is_context_and_not_penalised(tiny_engine: Engine, prompts: list[list[int]]) -> None:
    end = tiny_engine.end_of_text_id
    # So likely that it comes next, unless the penalty divides it.
    params = SamplingParams(temperature=0, logit_bias={end: 60.0}, repetition_penalty=50.0)
    opened = tiny_engine.generate([[end, 40, 41]], params)[0]
    assert (opened.token_ids, opened.finish_reason) == ([], "stop")
    repeated = tiny_engine.generate([[40, end, 41]], params)[0]
    assert repeated.token_ids


def test_end_of_text_stops_and_is_no_part_of_the_output(tiny_engine: Engine) -> None:
    params = SamplingParams(temperature=0, logit_bias={tiny_engine.end_of_text_id: 100.0}, max_new_tokens=8)
    assert tiny_engine.generate([[40]], params) == [Completion([], "stop")]
    assert list(tiny_engine.stream([40], params)) == [Token(None, finish_reason="stop")]


def test_a_request_that_ends_at_once_does_not_end_its_neighbours(tiny_engine: Engine) -> None:
    ended = SamplingParams(temperature=0, logit_bias={tiny_engine.end_of_text_id: 100.0})
    going = SamplingParams(temperature=0, ignore_eos=True, max_new_tokens=8)
    together = tiny_engine.generate([[40], [41, 42]], [ended, going])
    assert together == [Completion([], "stop"), *tiny_engine.generate([[41, 42]], going)]


def test_ignore_eos_continues_past_end_of_text(tiny_engine: Engine) -> None:
    end = tiny_engine.end_of_text_id
    params = SamplingParams(temperature=0, logit_bias={end: 100.0}, ignore_eos=True, max_new_tokens=8)
    assert tiny_engine.generate([[40]], params) == [Completion([end] * 8, "length")]


def test_a_stop_id_stops_as_end_of_text_does(tiny_engine: Engine, prompts: list[list[int]]) -> None:
    greedy = likeliest_first(tiny_engine, prompts[0])
    stop = next(after for before, after in pairwise(greedy) if after != before)
    params = SamplingParams(temperature=0, ignore_eos=True, stop_token_ids=(stop,), max_new_tokens=12)
    assert tiny_engine.generate([prompts[0]], params) == [Completion(greedy[: greedy.index(stop)], "stop")]


def test_min_new_tokens_come_before_any_stop(tiny_engine: Engine) -> None:
    end = tiny_engine.end_of_text_id
    params = SamplingParams(
        temperature=0, logit_bias={end: 100.0, 9: 100.0}, stop_token_ids=(9,), min_new_tokens=6, max_new_tokens=12
    )
    completion = tiny_engine.generate([[40]], params)[0]
    assert len(completion.token_ids) == 6
    assert completion.finish_reason == "stop"


def test_max_new_tokens_finish_by_length(tiny_engine: Engine) -> None:
    params = SamplingParams(temperature=0, ignore_eos=True, max_new_tokens=5)
    completion = tiny_engine.generate([[40]], params)[0]
    assert (len(completion.token_ids), completion.finish_reason) == (5, "length")


def test_a_loop_finishes_by_repetition(tiny_engine: Engine) -> None:
    # So likely that nothing else is drawn.
    params = SamplingParams(temperature=0, logit_bias={9: 100.0}, repetition_detection=(2, 4), max_new_tokens=12)
    assert tiny_engine.generate([[9, 9, 9]], params) == [Completion([9] * 4, "repetition")]
    last = list(tiny_engine.stream([40], params))[-1]
    assert (last.token_id, last.finish_reason) == (9, "repetition")
    # A run of two at least, and not before the least that is asked for; the greatest number comes first.
    assert tiny_engine.generate([[40]], replace(params, repetition_detection=(2, 4, 2)))[0].token_ids == [9] * 8
    assert tiny_engine.generate([[40]], replace(params, min_new_tokens=7)) == [Completion([9] * 7, "repetition")]
    assert tiny_engine.generate([[40]], replace(params, max_new_tokens=4)) == [Completion([9] * 4, "length")]


def test_what_a_loop_ends_is_what_is_drawn_without_it(tiny_engine: Engine, prompts: list[list[int]]) -> None:
    longest, repeats = 6, 2
    for seed in range(8):
        free = SamplingParams(seed=seed, temperature=0.4, ignore_eos=True, max_new_tokens=30)
        ended = replace(free, repetition_detection=(longest, repeats))
        pairs = zip(tiny_engine.generate(prompts, free), tiny_engine.generate(prompts, ended), strict=True)
        for whole, cut in pairs:
            ids = whole.token_ids
            end = next((n for n in range(1, len(ids)) if is_looping(ids[:n], longest, repeats)), None)
            assert cut == (whole if end is None else Completion(ids[:end], "repetition"))


def test_an_engine_without_its_text_refuses_a_limit_on_copies(tiny_engine: Engine) -> None:
    with pytest.raises(UserError, match=r"^max_verbatim_tokens: this engine holds no index of its training text; exp"):
        tiny_engine.generate([[5]], SamplingParams(max_verbatim_tokens=8))


def test_the_end_of_the_context_finishes_by_length_and_is_never_passed(
    tiny_engine: Engine, tiny_model: GPT2LMHeadModel
) -> None:
    context_length = tiny_engine.context_length
    params = SamplingParams(seed=13, ignore_eos=True, max_new_tokens=1000)
    # Together they need more columns than the context has positions: the short row continues after the long one ends.
    prompts = [[index % 290 for index in range(context_length - 1)], [40, 41, 42]]
    completions = tiny_engine.generate(prompts, params)
    for prompt, completion in zip(prompts, completions, strict=True):
        assert len(prompt) + len(completion.token_ids) == context_length
        assert completion.finish_reason == "length"
        assert_drawn_from_pytorch(completion, tiny_model, prompt, params)
    endless = SamplingParams(seed=13, ignore_eos=True)
    assert tiny_engine.generate(prompts, endless) == completions


def test_a_prompt_that_leaves_no_room_is_refused_with_numbers(tiny_engine: Engine) -> None:
    with pytest.raises(UserError, match=r"^prompt: 64 tokens leave no room in the context of 64; shorten it, or"):
        tiny_engine.generate([[1], [1] * 64], SamplingParams())


@pytest.mark.parametrize("token_id", [-1, 300])
def test_an_id_outside_the_vocabulary_is_refused(tiny_engine: Engine, token_id: int) -> None:
    with pytest.raises(UserError, match=rf"^prompt: token id {token_id} is not in \[0, 300\)$"):
        tiny_engine.generate([[5, token_id]], SamplingParams())
    with pytest.raises(UserError, match=rf"^text: token id {token_id} is not in \[0, 300\)$"):
        tiny_engine.score([[5, token_id]])
    with pytest.raises(UserError, match=r"^(banned_token_ids: no token has the id 300|banned_token_ids: -1)"):
        tiny_engine.generate([[5]], SamplingParams(banned_token_ids=(token_id,)))


def test_a_stream_is_one_continuation_and_says_so_before_it_starts(tiny_engine: Engine) -> None:
    with pytest.raises(UserError, match=r"^n: a stream is one continuation, got 2$"):
        tiny_engine.stream([5], SamplingParams(n=2))


def test_a_stream_can_be_closed_early(tiny_engine: Engine) -> None:
    params = SamplingParams(seed=14, max_new_tokens=20)
    whole = tiny_engine.generate([[40]], params)
    tokens = tiny_engine.stream([40], params)
    next(tokens)
    tokens.close()  # type: ignore[attr-defined]
    assert list(tokens) == []
    assert tiny_engine.generate([[40]], params) == whole


def test_logprobs_are_those_of_the_model_before_any_filter(
    tiny_engine: Engine, tiny_model: GPT2LMHeadModel, prompts: list[list[int]]
) -> None:
    params = SamplingParams(seed=15, temperature=0.5, top_k=5, logit_bias={7: 3.0}, logprobs=3, max_new_tokens=6)
    completion = tiny_engine.generate([prompts[1]], params)[0]
    assert completion.logprobs is not None
    assert completion.top_logprobs is not None
    assert len(completion.logprobs) == len(completion.top_logprobs) == len(completion.token_ids) > 0
    logits = torch.from_numpy(torch_logits(tiny_model, prompts[1] + completion.token_ids))
    expected = torch.log_softmax(logits.double(), dim=-1)[len(prompts[1]) - 1 :]
    for step, token_id in enumerate(completion.token_ids):
        assert completion.logprobs[step] == pytest.approx(expected[step, token_id].item(), abs=LOGIT_TOLERANCE)
        values, ids = expected[step].topk(3)
        assert list(completion.top_logprobs[step]) == ids.tolist()
        assert list(completion.top_logprobs[step].values()) == pytest.approx(values.tolist(), abs=LOGIT_TOLERANCE)


def test_logprobs_are_left_out_where_nobody_asks(tiny_engine: Engine) -> None:
    completion = tiny_engine.generate([[40]], SamplingParams(temperature=0, max_new_tokens=2))[0]
    assert completion.logprobs is None
    assert completion.top_logprobs is None


@pytest.mark.parametrize("chunk_tokens", [1, 7, 256])
def test_score_is_pytorchs_cross_entropy_of_each_token(
    tiny_engine: Engine, tiny_model: GPT2LMHeadModel, monkeypatch: pytest.MonkeyPatch, chunk_tokens: int
) -> None:
    monkeypatch.setattr(generator, "SCORING_CHUNK_TOKENS", chunk_tokens)
    rng = np.random.default_rng(0)
    texts = [rng.integers(300, size=tokens).tolist() for tokens in (5, 64, 1, 2, 30, 31, 7)]
    scores = tiny_engine.score(texts)
    for text, score in zip(texts, scores, strict=True):
        assert score.dtype == np.float64
        logits = torch.from_numpy(torch_logits(tiny_model, text))
        losses = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(text[1:]).long(), reduction="none")
        np.testing.assert_allclose(score, -losses.numpy(), atol=LOGIT_TOLERANCE)


def test_a_text_is_read_in_parts_as_it_is_scored(
    tiny_engine: Engine, tiny_model: GPT2LMHeadModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.engine.generator.SCORING_CHUNK_TOKENS", 7)
    texts = [[3], [(17 * index) % 300 for index in range(40)]]
    for text, reading, scored in zip(texts, tiny_engine.read(texts), tiny_engine.score(texts), strict=True):
        with torch.inference_mode():
            states = tiny_model.transformer(torch.tensor([text])).last_hidden_state[0].double()
        np.testing.assert_array_equal(reading.logprobs, scored)
        assert reading.mean_state.dtype == np.float64
        np.testing.assert_allclose(reading.mean_state, states.mean(dim=0).numpy(), atol=1e-5)
    with pytest.raises(UserError, match="fit in the context"):
        tiny_engine.read([[1] * 65])


def test_score_refuses_what_it_cannot_score(tiny_engine: Engine) -> None:
    with pytest.raises(UserError, match=r"^text: 65 tokens do not fit in the context of 64$"):
        tiny_engine.score([[1] * 65])
    with pytest.raises(UserError, match=r"^text: has no tokens"):
        tiny_engine.score([[1, 2], []])


def test_score_of_a_continuation_is_its_logprobs(tiny_engine: Engine, prompts: list[list[int]]) -> None:
    params = SamplingParams(seed=16, logprobs=0, ignore_eos=True, max_new_tokens=10)
    completion = tiny_engine.generate([prompts[0]], params)[0]
    score = tiny_engine.score([prompts[0] + completion.token_ids])[0]
    assert completion.logprobs == pytest.approx(score[len(prompts[0]) - 1 :].tolist(), abs=LOGIT_TOLERANCE)


def test_echo_gives_each_token_its_probability(tiny_engine: Engine, prompts: list[list[int]]) -> None:
    tokens = tiny_engine.echo(prompts[1], 0, len(prompts[1]), 2)
    assert [token.token_id for token in tokens] == prompts[1]
    assert (tokens[0].logprob, tokens[0].top_logprobs) == (None, None)
    assert [token.logprob for token in tokens[1:]] == pytest.approx(tiny_engine.score([prompts[1]])[0].tolist())
    for token in tokens[1:]:
        assert token.top_logprobs is not None
        assert len(token.top_logprobs) == 2
        assert max(token.top_logprobs.values()) >= (token.logprob or 0)


def test_stop_texts_are_for_whoever_knows_the_tokenizer(tiny_engine: Engine) -> None:
    with pytest.raises(UserError, match=r"^stop: holds texts, but the engine reads token ids; use pipeline\.engine"):
        tiny_engine.generate([[5]], SamplingParams(stop=("x",)))


def test_the_tiny_model_tells_positions_apart(tiny_model: GPT2LMHeadModel) -> None:
    """Without this, the tests above would pass with wrong positions."""
    ids = torch.tensor([[40, 41, 42]])
    with torch.inference_mode():
        logits = [tiny_model(ids, position_ids=torch.arange(3)[None] + start).logits for start in (0, 1)]
    assert (log_softmax(logits[0].numpy()) - log_softmax(logits[1].numpy())).std() > 0.1
