"""The best of several candidates: their order, and what each surface returns of them."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from tokenizers import Tokenizer

from pipeline.decoding import SamplingParams
from pipeline.engine import Engine
from pipeline.engine.best import Candidate, badness
from pipeline.engine.sampler import Continuation
from pipeline.engine.text import Asked, Piece, TextGenerator
from pipeline.errors import UserError
from pipeline.quality.lexicon import Lexicon
from pipeline.tokens import prompt_ids

LEXICON = Lexicon({"the", "lamp", "was", "lit", "and", "they", "slept"})
PARAMS = SamplingParams(max_new_tokens=12, seed=5, ignore_eos=True)


def candidate(text: str, mean_logprob: float = -1.0, *, finished: bool = True) -> Candidate:
    return Candidate(text, list(range(len(text))), finished, mean_logprob)


def best_first(prompt: str, candidates: Sequence[Candidate], lexicon: Lexicon) -> list[int]:
    return sorted(range(len(candidates)), key=lambda index: badness(prompt, candidates[index], lexicon))


def test_fewer_faults_per_word_are_better() -> None:
    texts = ["The lamp was lit.", "The lomp was lit.", "The lomp wus lit.", ""]
    assert best_first("", [candidate(text) for text in reversed(texts)], LEXICON) == [3, 2, 1, 0]


def test_of_equally_many_faults_the_likeliest_is_better() -> None:
    candidates = [candidate("They slept.", logprob) for logprob in (-2.0, -0.5, -1.0)]
    assert best_first("", candidates, LEXICON) == [1, 2, 0]


def test_of_equal_candidates_the_first_is_better() -> None:
    assert best_first("", [candidate("They slept.")] * 3, LEXICON) == [0, 1, 2]


def test_a_loop_is_the_worst_but_for_nothing_at_all() -> None:
    loop = Candidate("They slept. " * 4, [1, 2, 3] * 4, False, 0.0)
    assert best_first("", [loop, candidate("Thoy slopt und.")], LEXICON) == [1, 0]


def test_a_word_that_is_cut_is_not_judged() -> None:
    texts = [candidate("Tho", finished=False), candidate("", finished=False), candidate("Tho lomp", finished=False)]
    assert best_first("", texts, LEXICON) == [0, 2, 1]


@pytest.fixture
def generator(tiny_engine: Engine, tiny_tokenizer: Tokenizer) -> TextGenerator:
    return TextGenerator(tiny_engine, tiny_tokenizer, LEXICON)


@pytest.mark.parametrize("n", [1, 2])
def test_the_best_are_of_the_texts_of_n(generator: TextGenerator, n: int) -> None:
    prompts = ["The lamp", "They"]
    every = generator.complete(prompts, [replace(PARAMS, n=4, logprobs=0)] * 2)
    best = generator.complete(prompts, [replace(PARAMS, n=n, best_of=4)] * 2)
    for index in range(2):
        own, drawn = best[n * index : n * index + n], every[4 * index : 4 * index + 4]
        assert len(own) == n
        assert {done.text for done in own} <= {done.text for done in drawn}


def test_prompts_with_and_without_candidates_keep_their_order(generator: TextGenerator) -> None:
    params = [replace(PARAMS, n=2), replace(PARAMS, best_of=3), PARAMS]
    together = generator.complete(["The", "They", "A"], params)
    alone = [done for prompt, own in zip(["The", "They", "A"], params, strict=True)
             for done in generator.complete([prompt], [own])]  # fmt: skip
    assert [done.text for done in together] == [done.text for done in alone]


def test_a_stream_gets_the_text_whole(generator: TextGenerator) -> None:
    params = replace(PARAMS, best_of=3)
    assert list(generator.stream("The lamp", params)) == [generator.complete(["The lamp"], [params])[0].text]


def test_candidates_report_tokens_only_if_asked(generator: TextGenerator) -> None:
    for logprobs in (None, 2):
        params = replace(PARAMS, best_of=2, logprobs=logprobs)
        choices = generator.begin([Asked(prompt_ids(generator.tokenizer, "The"), "The", params)])
        generator.engine.run([choice.request for choice in choices], lambda _: False)
        pieces = [piece for choice in choices for piece in choice.sift(choice.take())]
        assert [piece.index for piece in pieces] == [0]
        assert bool(pieces[0].tokens) == (logprobs is not None)
        assert len(pieces[0].token_ids) == 12


def test_an_engine_without_a_lexicon_refuses(tiny_engine: Engine, tiny_tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="best_of: this engine holds no lexicon"):
        TextGenerator(tiny_engine, tiny_tokenizer).complete(["The"], [replace(PARAMS, best_of=2)])


def test_the_engine_alone_refuses(tiny_engine: Engine) -> None:
    with pytest.raises(UserError, match="best_of: judges texts"):
        tiny_engine.generate([[1]], replace(PARAMS, best_of=2))


def test_fewer_candidates_than_choices_are_refused() -> None:
    with pytest.raises(UserError, match=r"best_of: 2 is out of range, must be at least n \(3\), or 1"):
        SamplingParams(n=3, best_of=2)
    assert SamplingParams(n=3).candidates == 3
    assert SamplingParams(n=2, best_of=5).candidates == 5


def test_a_candidate_that_fails_is_the_worst(generator: TextGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    append = Continuation.append

    def fail(self: Continuation, token_id: int) -> None:
        if self._choice in failing:
            raise LookupError("a bug")
        append(self, token_id)

    monkeypatch.setattr(Continuation, "append", fail)
    texts: list[list[Piece]] = []
    failing: set[int] = set()
    for chosen in ({1, 2}, {0, 1, 2}):
        failing.update(chosen)
        choices = generator.begin([Asked([5], "", replace(PARAMS, best_of=3, n=2))])
        pieces: list[Piece] = []
        while any(choice.finish_reason is None for choice in choices):
            generator.engine.scheduler.step()
            pieces += [piece for choice in choices for piece in choice.sift(choice.take())]
        texts.append(pieces)
    assert [[piece.finish_reason for piece in pieces] for pieces in texts] == [["length", "error"], ["error"] * 2]
    assert [isinstance(piece.error, LookupError) for piece in texts[0]] == [False, True]
