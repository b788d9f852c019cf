"""Encodings are detected, and binary files, damaged files and uncertain guesses refused."""

import codecs
import contextlib
from itertools import product
from pathlib import Path

import pytest

from pipeline.corpus.encoding import detect_encoding, find_encoding
from pipeline.errors import UserError

TEXT = "“Naïve café,” she said — twice.\n"


@pytest.mark.parametrize(
    ("content", "encoding"),
    [
        (b"", "utf-8"),
        (TEXT.encode(), "utf-8"),
        (codecs.BOM_UTF8 + TEXT.encode(), "utf-8-sig"),
        (codecs.BOM_UTF16_LE + TEXT.encode("utf-16-le"), "utf-16"),
        (codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"), "utf-16"),
        (codecs.BOM_UTF32_LE + TEXT.encode("utf-32-le"), "utf-32"),
        (codecs.BOM_UTF32_BE + TEXT.encode("utf-32-be"), "utf-32"),
        (TEXT.encode("windows-1252"), "windows-1252"),
    ],
)
def test_encoding_is_found_and_reads_the_text(tmp_path: Path, content: bytes, encoding: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    assert detect_encoding(path) == encoding
    assert path.read_text(encoding=encoding) == (TEXT if content else "")


def test_bytes_after_the_first_chunk_count(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"word " * 300_000 + "é".encode("windows-1252"))
    assert detect_encoding(path) == "windows-1252"


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (TEXT.encode() * 3 + b"caf\xe9\n" + TEXT.encode(), r"4: byte 4 of the line, 0xe9, is not UTF-8"),
        (TEXT.encode() * 3 + b"\x81\n", r"4: byte 1 of the line, 0x81, is not UTF-8"),
        (codecs.BOM_UTF8 + b"One.\n\xff\xff", r"2: byte 1 of the line, 0xff, is not UTF-8"),
        (TEXT.encode() * 100_000 + "“".encode()[:2], r"100001: byte 1 of the line, 0xe2, is not UTF-8"),
    ],
)
def test_bad_byte_is_named_by_file_line_and_value(tmp_path: Path, content: bytes, place: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.txt:{place}; correct it, or save the file as UTF-8$"):
        detect_encoding(path)


@pytest.mark.parametrize(
    "content",
    [
        b"text\0text",
        b"\x89PNG\r\n\x1a\n" + bytes(range(1, 32)) * 20,
        b"ok \x1b\x02\x03",
        "UTF-16 without a mark".encode("utf-16-le"),
    ],
)
def test_binary_file_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.txt: not a text file"):
        detect_encoding(path)


@pytest.mark.parametrize(
    ("content", "encoding"),
    [
        (codecs.BOM_UTF16_LE + b"\x00\xd8", "utf-16"),  # half of a surrogate pair
        (codecs.BOM_UTF16_LE + "One.\n".encode("utf-16-le") + b"\xe9", "utf-16"),  # half of a character
        (codecs.BOM_UTF32_LE + "text".encode("utf-32-le")[:-1], "utf-32"),
    ],
)
def test_damage_after_a_byte_order_mark_is_named(tmp_path: Path, content: bytes, encoding: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.txt: bytes that are not {encoding}; name another encoding in prepare"):
        detect_encoding(path)


def test_utf_16_without_a_mark_says_which_name_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("One.\n".encode("utf-16-le"))
    with pytest.raises(UserError, match=r"bytes that are not utf-16; .*utf-16-le or utf-16-be without"):
        find_encoding(path, "a.txt", "utf-16")
    assert find_encoding(path, "a.txt", "utf-16-le") == "utf-16-le"


def test_japanese_in_seven_bits_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    text = "From: Anna\n\n灯台の明かりは夜通し燃えていた。\n"
    path.write_bytes(text.encode("iso-2022-jp"))
    assert path.read_text(encoding=detect_encoding(path)) == text


def test_nul_is_refused_by_line(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"text\na row\na r\0w\n")
    with pytest.raises(
        UserError, match=r"a\.csv: not a text file \(binary data: a NUL character on line 3\); remove it"
    ):
        detect_encoding(path)


ENGLISH = (
    "“Stop,” he said. “It’s not the café.” And they left… for the sea — and Zoë’s house. The old man sat on the beach–"
    "he didn’t sleep—and mended his nets until the moon rose above the hills. “Nobody,” he thought, “will ever know.” "
)
RUSSIAN = (
    "Все люди рождаются свободными и равными в своём достоинстве и правах. Они наделены разумом и совестью и должны "
    "поступать в отношении друг друга в духе братства. Жил-был царь, и было у него три сына. Он шёл по берегу моря, и "
    "ветер бил ему в лицо. Где же вы, дети? "
)
POLISH = (
    "Wszyscy ludzie rodzą się wolni i równi pod względem swej godności i swych praw. Są oni obdarzeni rozumem i "
    "sumieniem i powinni postępować wobec innych w duchu braterstwa. Był raz stary rybak, który mieszkał nad morzem, i "
    "miał żonę. Źle się działo, więc poszedł do lasu. "
)
HUNGARIAN = (
    "Minden emberi lény szabadon születik és egyenlő méltósága és joga van. Az emberek, ésszel és lelkiismerettel "
    "bírván, egymással szemben testvéri szellemben kell hogy viseltessenek. Hűvös volt az idő, és fújt a szél. "
)
GERMAN = (
    "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft und Gewissen begabt und "
    "sollen einander im Geist der Brüderlichkeit begegnen. Die Straße führte über die Brücke zum Müller. „Äpfel“, "
    "sagte er, „gibt es heute für fünf Groschen.“ "
)
FRENCH = (
    "Tous les êtres humains naissent libres et égaux en dignité et en droits. Ils sont doués de raison et de "
    "conscience et doivent agir les uns envers les autres dans un esprit de fraternité. L’été, à la mer, "
    "les élèves mangeaient des crêpes près de la forêt ; le goût leur en restait. "
)
SPANISH = (
    "Todos los seres humanos nacen libres e iguales en dignidad y derechos y, dotados como están de razón y "
    "conciencia, deben comportarse fraternalmente los unos con los otros. "
    "El niño comió piñas. ¿Qué pasó después? Nadie lo sabía. "
)
PORTUGUESE = (
    "Todos os seres humanos nascem livres e iguais em dignidade e em direitos. Dotados de razão e de consciência, "
    "devem agir uns para com os outros em espírito de fraternidade. "
    "As canções não são tristes, disse a avó ao pescador. "
)
GREEK = (
    "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα. Είναι προικισμένοι με λογική "
    "και συνείδηση, και οφείλουν να συμπεριφέρονται μεταξύ τους με πνεύμα αδελφοσύνης. "
)
TURKISH = (
    "Bütün insanlar hür, haysiyet ve haklar bakımından eşit doğarlar. Akıl ve vicdana sahiptirler ve birbirlerine "
    "karşı kardeşlik zihniyeti ile hareket etmelidirler. Deniz kıyısında yaşlı bir balıkçı yaşardı. "
)
JAPANESE = (
    "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。人間は、理性と良心とを授けられており、"
    "互いに同胞の精神をもって行動しなければならない。昔々、あるところにおじいさんとおばあさんがいました。"
)
SIMPLIFIED = (
    "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。"
    "从前有一个老渔夫，他住在海边的小屋里。每天早上他都出海打鱼，晚上才回家。"
)
TRADITIONAL = (
    "人人生而自由，在尊嚴和權利上一律平等。他們賦有理性和良心，並應以兄弟關係的精神相對待。"
    "從前有一個老漁夫，他住在海邊的小屋裡。每天早上他都出海打魚，晚上才回家。"
)
KOREAN = (
    "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다. 인간은 천부적으로 이성과 양심을 부여받았으며 "
    "서로 형제애의 정신으로 행동하여야 한다. 옛날에 바닷가에 늙은 어부가 살았습니다. "
)
FOUND = [
    *product([ENGLISH, GERMAN, FRENCH, SPANISH, PORTUGUESE], ["windows-1252"]),
    (SPANISH, "iso-8859-1"),
    (PORTUGUESE, "iso-8859-1"),
    *product([RUSSIAN], ["windows-1251", "koi8-r", "cp866", "iso-8859-5"]),
    (POLISH, "windows-1250"),
    (POLISH, "iso-8859-2"),
    (JAPANESE, "shift_jis"),
    (JAPANESE, "euc-jp"),
    (SIMPLIFIED, "gb18030"),
    (SIMPLIFIED, "gb2312"),
    (TRADITIONAL, "big5"),
    (KOREAN, "euc-kr"),
]
SIMILAR = [
    (HUNGARIAN, "windows-1250"),
    (HUNGARIAN, "iso-8859-2"),
    (GREEK, "windows-1253"),
    (GREEK, "iso-8859-7"),
    (TURKISH, "windows-1254"),
]
OLD = [
    *product([GERMAN, FRENCH, SPANISH, PORTUGUESE], ["mac-roman", "cp850"]),
    *product([POLISH, HUNGARIAN], ["cp852"]),
    *product([RUSSIAN], ["mac-cyrillic", "cp855"]),
]
LAYOUTS = "{}\n", 'title,text\nOne,"{}"\n', '{{"text": "{}"}}\n', "# Title\n\nNo accent.\n\n{}"


def encode(text: str, encoding: str) -> bytes:
    return text.encode(encoding, errors="ignore")  # old pages have no curly quotes


@pytest.mark.parametrize(("text", "encoding"), FOUND)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("characters", [500, 1500])
def test_code_pages_are_found(tmp_path: Path, text: str, encoding: str, layout: str, characters: int) -> None:
    path = tmp_path / "a.txt"
    content = encode(layout.format((text * 30)[:characters]), encoding)
    path.write_bytes(content)
    assert path.read_bytes().decode(detect_encoding(path)) == content.decode(encoding)


@pytest.mark.parametrize(
    ("characters", "text", "encoding"),
    [
        *((characters, *case) for characters, case in product([16, 25, 40, 60, 100, 200, 1500], [*FOUND, *SIMILAR])),
        *((1500, *case) for case in OLD),
    ],
)
def test_text_is_right_or_refused(tmp_path: Path, text: str, encoding: str, characters: int) -> None:
    path = tmp_path / "a.txt"
    content = encode((text * 30)[:characters], encoding)
    path.write_bytes(content)
    found = encoding
    with contextlib.suppress(UserError):
        found = detect_encoding(path)
    assert content.decode(found) == content.decode(encoding)


@pytest.mark.parametrize(
    "text", ["The old man said “no”.", "It’s late, isn’t it? – yes", "the café", "said Zoë’s friend"]
)
def test_few_words_of_english_are_windows_1252(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode("windows-1252"))
    assert detect_encoding(path) == "windows-1252"


@pytest.mark.parametrize("separator", ["\n", " "])
def test_the_whole_of_a_large_file_counts(tmp_path: Path, separator: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(separator.join([ENGLISH, *[RUSSIAN] * 1000]).encode("windows-1251", errors="ignore"))
    assert path.stat().st_size > 50_000
    assert detect_encoding(path) == "windows-1251"


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ("он шел по берегу моря".encode("windows-1251"), r"1: byte 1 of the line, 0xee, .* \(.*windows-1251.*\)"),
        (b"One.\nTw\x81o.\n", r"2: byte 3 of the line, 0x81, .* \(cp949 or .*\)"),
        (encode(GERMAN, "cp850"), r"1: byte 40 of the line, 0x81, .* \(.*cp850.*\)"),
        (bytes(range(128, 256)), r"1: byte 1 of the line, 0x80, .* \(unknown\)"),
    ],
)
def test_uncertain_encoding_is_refused_with_the_parameter(tmp_path: Path, content: bytes, place: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(
        UserError, match=rf"a\.txt:{place}; name its encoding in prepare\.encoding, or save it as UTF-8$"
    ):
        detect_encoding(path)


def test_byte_that_the_code_page_lacks_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(f"{GERMAN}\n".encode("windows-1252") * 998 + b"a\x81b")
    with pytest.raises(
        UserError, match=r"a\.txt:999: byte 2 of the line, 0x81, is not windows-1252, as which the rest"
    ):
        detect_encoding(path)


@pytest.mark.parametrize(
    ("encodings", "name", "encoding"),
    [
        ("koi8-r", "a.txt", "koi8-r"),
        ({"*.txt": "cp1253", "a.txt": "koi8-r"}, "a.txt", "koi8-r"),
        ({"*.csv": "cp1253", "b/*": "koi8-r", "*": "cp1250"}, "b/c/a.txt", "koi8-r"),
        ({"*.csv": "cp1253"}, "a.txt", "windows-1251"),
        (None, "a.txt", "windows-1251"),
    ],
)
def test_parameter_names_the_encoding(
    tmp_path: Path, encodings: str | dict[str, str] | None, name: str, encoding: str
) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(RUSSIAN.encode("windows-1251"))
    assert find_encoding(path, name, encodings) == encoding


def test_named_encoding_that_cannot_read_the_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"One.\n" + RUSSIAN.encode("windows-1251"))
    with pytest.raises(
        UserError, match=r"a\.txt:2: byte 1 of the line, 0xc2, is not utf-8, which prepare\.encoding names"
    ):
        find_encoding(path, "a.txt", "utf-8")
    path.write_bytes(codecs.BOM_UTF8 + b"One.")
    assert find_encoding(path, "a.txt", "utf-8") == "utf-8-sig"
    path.write_bytes("One.".encode("utf-16-le"))
    assert find_encoding(path, "a.txt", "utf-16-le") == "utf-16-le"
