"""Words are counted, cut and compared in every script."""

import re
import unicodedata
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.corpus.words import _COMPARED, count_words, digest, join_words, leading_words, word_starts

UNSPACED = [
    ("我们去了北京。", "我 们 去 了 北 京"),
    ("ラーメンを食べた。", "ラーメン を 食 べ た"),
    ("ﾗｰﾒﾝと らーめん", "ﾗｰﾒﾝ と らー め ん"),
    ("葛\U000e0100城と𠮷野家", "葛\U000e0100 城 と 𠮷 野 家"),
    ("ภาษาไทยน่ารัก", "ภา ษา ไท ย น่า รั ก"),
    ("เป็นของเขา", "เป็ น ข อ ง เขา"),
    ("ສະບາຍດີ", "ສະ ບາ ຍ ດີ"),
    ("ភាសាខ្មែរ", "ភា សា ខ្មែ រ"),
    ("မြန်မာနိုင်ငံ၊ မင်္ဂလာပါ။", "မြန် မာ နိုင် ငံ မင်္ဂ လာ ပါ"),
    ("བོད་སྐད་ཡིག།", "བོད སྐད ཡིག"),
    ("用Python3.14写的,don't也行", "用 Python3.14 写 的 don't 也 行"),
]
each_unspaced = pytest.mark.parametrize(("text", "words"), UNSPACED)


def words_of(text: str) -> list[str]:
    return join_words(text).decode().split(" ") if join_words(text) else []


@each_unspaced
def test_words_without_spaces_are_counted(text: str, words: str) -> None:
    assert count_words(text) == len(words.split())


@each_unspaced
def test_words_begin_where_the_script_begins_them(text: str, words: str) -> None:
    starts = list(word_starts(text))
    assert [text.startswith(word, start) for start, word in zip(starts, words.split(), strict=True)] == [True] * len(
        starts
    )


@each_unspaced
def test_a_prompt_ends_at_a_words_end_and_the_text_continues_it(text: str, words: str) -> None:
    for count, word in enumerate(words.split(), start=1):
        prompt = leading_words(text, count)
        assert text.startswith(prompt)
        assert prompt.endswith(word)
        assert count_words(prompt) == count
        assert not unicodedata.category(text[len(prompt) :][:1] or " ").startswith("M")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("It's — well, naïve; 3.14 and so-so…", 7),
        ("वह मंदिर के पास आता है।", 6),
        ("한국어 문장입니다.", 2),
        ("שָׁלוֹם עֲלֵיכֶם", 2),
        ("Она сказала: «Да».", 3),
        ("Hello 世界, he said.", 5),
        ("「」 …", 2),
        ("", 0),
    ],
)
def test_between_spaces_is_one_word_in_other_scripts(text: str, words: int) -> None:
    assert count_words(text) == words


@pytest.mark.parametrize(
    ("text", "count", "leading"),
    [
        ("one two  three four", 3, "one two  three"),
        ("# A Lamp\n\nIt went out", 4, "# A Lamp\n\nIt"),
        ("one two", 3, "one two"),
        ("one two", 0, ""),
        ("", 3, ""),
        ("「我们」说。", 2, "「我们"),
        ("他说。\n\n我们", 3, "他说。\n\n我"),
        ("好。", 6, "好。"),
    ],
)
def test_a_prompt_is_words_with_what_stands_between_them(text: str, count: int, leading: str) -> None:
    assert leading_words(text, count) == leading


ODD = st.text(alphabet="abÉİßµªÿ²Σςœ’—…\u0301\u200dЖЯя中 _.'\x1c\xa0\u2003\u2329\ufb2a", max_size=30)
LATIN = st.text(alphabet=[chr(code) for code in range(256)], max_size=30)
WIDE = st.text(alphabet=[chr(code) for code in (*range(32, 0x530), 0x1F642, 0x10400)], max_size=30)


@given(ODD | LATIN | WIDE | st.text(max_size=30))
def test_words_for_comparisons_are_those_that_a_regular_expression_finds(text: str) -> None:
    spaced = re.sub("[‘’“”–—…]", " ", text)  # before a letter that ends a word is another one: ς
    plain = unicodedata.normalize("NFC", spaced.lower()).replace("\u200c", "").replace("\u200d", "")
    assert words_of(text) == _COMPARED.findall(plain)
    assert join_words(text) == " ".join(words_of(text)).encode()


@given(st.text(alphabet="ab é\x1c\x85\xa0\u2003\u2028\r\f\ud800", max_size=30))
def test_any_white_space_divides_words(text: str) -> None:
    assert count_words(text) == len(text.split())


@given(st.text(alphabet="ab é’—.'\n\t_7Жß", max_size=60), st.integers(0, 8))
def test_spaced_scripts_keep_the_plain_rules(text: str, count: int) -> None:
    assert count_words(text) == len(text.split())
    assert words_of(text) == re.findall(r"[^\W_]+", text.lower())
    found = re.match(rf"(?:\s*\S+){{0,{count}}}", text)
    assert found is not None
    assert leading_words(text, count) == found.group()


@given(st.text(max_size=40), st.integers(0, 9))
def test_any_text_has_prompts(text: str, count: int) -> None:
    prompt = leading_words(text, count)
    assert text.startswith(prompt)
    assert count_words(prompt) <= count


@pytest.mark.parametrize(
    "forms",
    [
        ("आता", "आती", "आते"),
        ("কর", "করি", "করে"),
        ("ਕਰ", "ਕਰੋ"),
        ("કર", "કરો"),
        ("கல", "கலி", "கல்"),
        ("పద", "పదం"),
        ("ಮನ", "ಮನೆ"),
        ("മല", "മലി"),
        ("ගස", "ගසේ"),
        ("ปา", "ป้า", "ป่า"),
        ("ကာ", "ကား"),
        ("דָּבָר", "דֶּבֶר", "דבר"),
        ("كَتَبَ", "كُتِبَ", "كتب"),
        ("resume", "résumé"),
        ("か", "が"),
    ],
)
def test_marks_tell_words_apart(forms: tuple[str, ...]) -> None:
    for first, second in combinations(forms, 2):
        for form in ("NFC", "NFD"):
            words = [join_words(unicodedata.normalize(form, word)) for word in (first, second)]
            assert digest(words[0]) != digest(words[1])


@pytest.mark.parametrize("text", ["Café déjà vu", "İstanbul", "한국어", "が", "Ấn Độ", "क़लम", "שָׁלוֹם", "e\u0323\u0302"])
def test_composed_and_decomposed_letters_are_the_same(text: str) -> None:
    composed, decomposed = (unicodedata.normalize(form, text) for form in ("NFC", "NFD"))
    assert words_of(composed) == words_of(decomposed)
    assert all(any(map(str.isalpha, word)) for word in words_of(decomposed))


def test_marks_and_joiners_do_not_end_a_word() -> None:
    assert words_of("मंदिर में") == ["मंदिर", "में"]
    assert words_of("می\u200cخواهم") == words_of("میخواهم") == ["میخواهم"]
    assert words_of("क्\u200dष") == words_of("क्ष")
    assert words_of("cafe\u0301s") == ["cafés"]
