"""Text around the engine: whole characters, stop texts, and prompts with their own parameters."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_gpt2 import write_tokenizer
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel
from tokenizers.models import BPE

from pipeline.decoding import SamplingParams
from pipeline.engine import Engine, Token
from pipeline.engine.sampler import Continuation
from pipeline.engine.text import Detokenizer, TextGenerator, begun_character, detokenize
from pipeline.errors import UserError
from pipeline.tokens import load_tokenizer


@pytest.fixture
def generator(tiny_engine: Engine, tiny_tokenizer: Tokenizer) -> TextGenerator:
    return TextGenerator(tiny_engine, tiny_tokenizer)


@pytest.fixture(scope="module")
def pieces_only(tmp_path_factory: pytest.TempPathFactory) -> "PiecesOf":
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return PiecesOf(load_tokenizer(folder))


class PiecesOf:
    """The pieces in which given tokens are streamed, without an engine."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def ids(self, token_ids: Iterable[int], stop: Sequence[str] = ()) -> list[str]:
        return list(detokenize((Token(token_id) for token_id in token_ids), Detokenizer(self.tokenizer, stop)))

    def text(self, text: str, stop: Sequence[str] = ()) -> list[str]:
        return self.ids(self.tokenizer.encode(text).ids, stop)

    def characters(self, text: str, stop: Sequence[str] = ()) -> list[str]:
        """Return the pieces of an ASCII text with one token per character."""
        return self.ids((self.tokenizer.encode(character).ids[0] for character in text), stop)


def test_pieces_come_as_soon_as_they_are_whole(pieces_only: PiecesOf) -> None:
    assert pieces_only.characters("Rock") == ["R", "o", "c", "k"]


@pytest.mark.parametrize("text", ["héllo 🙂 wörld", "🙂🙃", "a\n\nb", "", "日本"])
def test_characters_of_several_bytes_are_never_cut(text: str, pieces_only: PiecesOf) -> None:
    pieces = pieces_only.text(text)
    assert "".join(pieces) == text
    assert not any("�" in piece or piece == "" for piece in pieces)


@given(st.text() | st.text("abé🙂\n"), st.lists(st.text("abé🙂\n", min_size=1, max_size=4), max_size=3))
def test_pieces_together_are_the_text_up_to_the_stop_that_is_first_complete(
    pieces_only: PiecesOf, text: str, stop: list[str]
) -> None:
    # The mark for bytes that are not a character holds a piece back until the next one comes.
    text = text.replace("�", "")
    complete = [(text.index(entry) + len(entry), text.index(entry)) for entry in stop if entry in text]
    pieces = pieces_only.text(text, stop)
    assert "".join(pieces) == text[: min(complete)[1] if complete else len(text)]
    assert "" not in pieces


@given(st.lists(st.integers(0, 299), max_size=40))
def test_any_tokens_give_what_the_tokenizer_decodes_but_unfinished_bytes_at_the_end(
    pieces_only: PiecesOf, token_ids: list[int]
) -> None:
    whole = pieces_only.tokenizer.decode(token_ids, skip_special_tokens=False)
    pieced = "".join(pieces_only.ids(token_ids))
    assert whole.startswith(pieced)
    assert set(whole[len(pieced) :]) <= {"�"}


def test_an_unfinished_last_character_is_left_out(pieces_only: PiecesOf) -> None:
    ids = pieces_only.tokenizer.encode("so 🙂").ids
    assert "".join(pieces_only.ids(ids[:-1])) == "so "


def test_a_stop_text_is_cut_where_it_spans_tokens(pieces_only: PiecesOf) -> None:
    assert pieces_only.characters("ab\n\ncd", ["\n\n"]) == ["a", "b"]


def test_a_stop_text_inside_a_token_is_cut(pieces_only: PiecesOf) -> None:
    long_token = max(range(300), key=lambda token_id: len(pieces_only.tokenizer.decode([token_id])))
    text = pieces_only.tokenizer.decode([long_token])
    assert len(text) >= 3
    assert pieces_only.ids([long_token, long_token], [text[1:]]) == [text[0]]


def test_a_stop_text_at_once_gives_nothing(pieces_only: PiecesOf) -> None:
    assert pieces_only.characters("abc", ["a"]) == []
    assert pieces_only.characters("abc", ["ab"]) == []


def test_what_may_begin_a_stop_text_is_held_back_until_it_is_known(pieces_only: PiecesOf) -> None:
    assert pieces_only.characters("xaab!", ["aac"]) == ["x", "aab", "!"]
    assert pieces_only.characters("xaaac!", ["aac"]) == ["x", "a"]
    assert pieces_only.characters("xaa", ["aac"]) == ["x", "aa"]


def test_of_several_stop_texts_the_first_complete_counts(pieces_only: PiecesOf) -> None:
    assert "".join(pieces_only.characters("one two three", ["three", "two"])) == "one "
    assert "".join(pieces_only.characters("abcd", ["bcd", "c"])) == "ab"
    assert "".join(pieces_only.characters("abcd", ["bc", "c"])) == "a"


def test_no_token_is_read_after_a_stop_text(pieces_only: PiecesOf) -> None:
    asked = []

    def tokens() -> Iterable[int]:
        for character in "ab|cd":
            asked.append(character)
            yield pieces_only.tokenizer.encode(character).ids[0]

    assert pieces_only.ids(tokens(), ["|"]) == ["a", "b"]
    assert asked == ["a", "b", "|"]


@pytest.mark.parametrize("stop", [(), ("a", "e"), ("\n",)])
def test_the_pieces_of_a_stream_make_the_whole_text(generator: TextGenerator, stop: tuple[str, ...]) -> None:
    for seed in range(4):
        params = SamplingParams(seed=seed, stop=stop, max_new_tokens=40)
        pieces = list(generator.stream("The lamp", params))
        assert "".join(pieces) == generator.complete(["The lamp"], [params])[0].text
        assert not any(entry in "".join(pieces) for entry in stop)


def test_text_is_what_the_engine_gives_for_the_prompt_read_as_a_documents_beginning(
    generator: TextGenerator, tiny_engine: Engine, tiny_tokenizer: Tokenizer
) -> None:
    params = SamplingParams(seed=5, n=2, max_new_tokens=10, logit_bias=dict.fromkeys(range(80, 256), -100.0))
    prompts = ["The lamp", "", "N"]
    ids = [[tiny_engine.end_of_text_id, *tiny_tokenizer.encode(prompt).ids] for prompt in prompts]
    expected = [tiny_tokenizer.decode(completion.token_ids) for completion in tiny_engine.generate(ids, params)]
    assert [done.text for done in generator.complete(prompts, [params] * 3)] == expected


def test_a_stop_text_frees_the_place_of_its_continuation_at_once(
    generator: TextGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SamplingParams(seed=3, ignore_eos=True, max_new_tokens=40)
    whole = generator.complete(["The lamp"], [params])[0].text
    stop = whole[4:6]
    fed: list[int] = []
    decode = generator.engine.session.decode
    monkeypatch.setattr(
        generator.engine.session, "decode", lambda ids, places: (fed.append(len(ids)), decode(ids, places))
    )
    (done,) = generator.complete(["The lamp"], [replace(params, stop=(stop,))])
    assert (done.text, done.finish_reason) == (whole[: whole.index(stop)], "stop")
    assert len(fed) < 20
    assert generator.engine.scheduler.running == 0


def test_each_prompt_has_its_own_parameters(generator: TextGenerator) -> None:
    each = [SamplingParams(seed=seed, max_new_tokens=4 + seed) for seed in (1, 2)]
    found = generator.complete(["The lamp", "N"], each)
    assert found == [
        generator.complete([prompt], [own])[0] for prompt, own in zip(["The lamp", "N"], each, strict=True)
    ]


def test_end_of_text_in_a_prompt_is_ordinary_characters(generator: TextGenerator) -> None:
    with pytest.raises(UserError, match=r"^prompt: \d+ tokens leave no room"):
        generator.complete(["<|endoftext|>" * 10], [SamplingParams()])


def test_generator_loads_engine_and_tokenizer_from_one_folder(
    tiny_engine_folder: Path, generator: TextGenerator
) -> None:
    params = SamplingParams(seed=6, max_new_tokens=10)
    loaded = TextGenerator.load(tiny_engine_folder, precision="float32", provider="cpu")
    assert loaded.complete(["N"], [params]) == generator.complete(["N"], [params])


def test_a_text_that_is_held_back_comes_once_while_others_run(generator: TextGenerator) -> None:
    ended = SamplingParams(max_new_tokens=3, seed=1, ignore_eos=True)
    (alone,) = generator.complete(["The"], [ended])
    held = replace(ended, stop=(alone.text[-1] + "\0",))
    together = generator.complete(["The", "The"], [held, replace(ended, max_new_tokens=20)])
    assert together[0].text == alone.text


@pytest.mark.parametrize("text", ["a€", "über 🙂", "日", "xyé", "🙂"])
def test_a_prompt_that_ends_inside_a_character_is_completed(text: str, pieces_only: PiecesOf) -> None:
    """Whatever the last bytes are cut off, the continuation that brings them begins with the whole character."""
    tokenizer = pieces_only.tokenizer
    ids = tokenizer.encode(text).ids
    prompts = [ids[:count] for count in range(1, len(ids)) if tokenizer.decode(ids[:count]).endswith("�")]
    assert prompts
    for prompt in prompts:
        begun = begun_character(tokenizer, prompt)
        read = tokenizer.decode(prompt)[:-1]
        tokens = [Token(token_id) for token_id in (*ids[len(prompt) :], *tokenizer.encode("!").ids)]
        pieces = list(detokenize(iter(tokens), Detokenizer(tokenizer, begun=begun)))
        assert read + "".join(pieces) == text + "!"
        assert pieces[0][0] == text[len(read)]


def test_a_prompt_that_nothing_completes_leaves_a_mark_to_its_continuation(pieces_only: PiecesOf) -> None:
    tokenizer = pieces_only.tokenizer
    ids = tokenizer.encode("€").ids[:2]
    tokens = iter([Token(token_id) for token_id in tokenizer.encode("abc").ids])
    begun = begun_character(tokenizer, ids)
    assert "".join(detokenize(tokens, Detokenizer(tokenizer, begun=begun))) == "�abc"


@given(st.text(), st.integers(0, 8))
def test_a_prompt_and_its_continuation_are_one_text_wherever_it_is_cut(
    pieces_only: PiecesOf, text: str, back: int
) -> None:
    tokenizer = pieces_only.tokenizer
    # The mark itself cannot be told from the mark for bytes that are not a character.
    ids = tokenizer.encode(text.replace("�", "")).ids
    prompt, rest = ids[: max(0, len(ids) - back)], ids[max(0, len(ids) - back) :]
    begun = begun_character(tokenizer, prompt)
    read = tokenizer.decode(prompt, skip_special_tokens=False)
    assert bool(begun) == read.endswith("�")
    pieces = detokenize((Token(token_id) for token_id in rest), Detokenizer(tokenizer, begun=begun))
    assert (read[:-1] if begun else read) + "".join(pieces) == text.replace("�", "")


def test_a_token_with_whole_characters_before_the_open_one_gives_only_what_is_new() -> None:
    tokenizer = Tokenizer(BPE({"Ġcaf": 0, "Ã": 1, "ĠcafÃ": 2, "©": 3, "!": 4}, [("Ġcaf", "Ã")]))
    tokenizer.decoder = ByteLevel()
    begun = begun_character(tokenizer, [4, 2])
    assert begun == b"\xc3"
    assert list(detokenize(iter([Token(3), Token(4)]), Detokenizer(tokenizer, begun=begun))) == ["é", "!"]
    # Bytes that are no beginning of a character are not its business.
    assert begun_character(tokenizer, [3]) == begun_character(tokenizer, [2, 3]) == b""


def test_a_stop_text_counts_only_once_the_least_tokens_are_there(pieces_only: PiecesOf) -> None:
    """As in vLLM: one that is complete within them is text, one that ends after them may begin among them."""
    ids = [pieces_only.tokenizer.encode(character).ids[0] for character in "ababxaby"]

    def read(stop: Sequence[str], min_tokens: int) -> str:
        detokenizer = Detokenizer(pieces_only.tokenizer, stop, min_tokens=min_tokens)
        return "".join(detokenize((Token(token_id) for token_id in ids), detokenizer))

    assert read(["ab"], 0) == ""
    assert read(["ab"], 1) == ""
    assert read(["ab"], 2) == read(["ab"], 3) == "ab"
    assert read(["ab"], 4) == read(["ab"], 6) == "ababx"
    assert read(["ab"], 7) == read(["ab"], 8) == "ababxaby"
    # The first "b" is held back, because "bab" may follow, but does not stop the text when that came too early.
    assert read(["b", "bab"], 3) == "a"
    assert read(["b", "babxa"], 4) == "a"
    assert read(["bx", "abxaby"], 5) == "ab"


@pytest.mark.parametrize("min_tokens", [0, 3, 6])
def test_a_whole_text_and_a_stream_stop_at_the_same_place(min_tokens: int, generator: TextGenerator) -> None:
    free = SamplingParams(max_new_tokens=20, seed=5, ignore_eos=True)
    (text,) = (done.text for done in generator.complete(["The lamp"], [free]))
    stopping = replace(free, stop=(text[1],), min_new_tokens=min_tokens)
    (done,) = generator.complete(["The lamp"], [stopping])
    assert "".join(generator.stream("The lamp", stopping)) == done.text
    assert len(done.token_ids) > min_tokens


def test_bytes_that_make_no_character_are_read_once(pieces_only: PiecesOf) -> None:
    """The marks for them come at once, and are those of the tokenizer: nothing is kept to be decoded again."""
    (lone,) = {token_id for token_id in range(300) if pieces_only.tokenizer.id_to_token(token_id) == "©"}
    assert pieces_only.ids([lone] * 50) == ["�"] * 50
    assert "".join(pieces_only.ids([lone] * 50)) == pieces_only.tokenizer.decode([lone] * 50)


def test_an_added_token_is_its_text(tiny_tokenizer: Tokenizer) -> None:
    tokenizer = Tokenizer.from_str(tiny_tokenizer.to_str())
    tokenizer.add_tokens(["<a b>", "日"])
    ids = [tokenizer.token_to_id(text) for text in ("<a b>", "日", "<|endoftext|>")]
    detokenizer = Detokenizer(tokenizer)
    expected = tokenizer.decode(ids, skip_special_tokens=False)
    assert "".join(detokenizer.feed(token_id) for token_id in ids) == expected == "<a b>日<|endoftext|>"


def test_a_stream_that_fails_during_the_step_of_another_says_so(
    generator: TextGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = Continuation.append

    def fail(self: Continuation, token_id: int) -> None:
        if self.params.seed == 8 and len(self.output_ids) == 3:
            raise LookupError("a bug")
        append(self, token_id)

    monkeypatch.setattr(Continuation, "append", fail)
    params = SamplingParams(max_new_tokens=8, ignore_eos=True)
    good, bad = (generator.stream("The", replace(params, seed=seed)) for seed in (7, 8))
    next(bad)
    assert len("".join(good)) > 0
    with pytest.raises(LookupError, match="a bug"):
        list(bad)
