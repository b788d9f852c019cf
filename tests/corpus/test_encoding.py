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
        codecs.BOM_UTF16_LE + b"\x00\xd8",  # half of a surrogate pair
        codecs.BOM_UTF16_LE + "One.\n".encode("utf-16-le") + b"\xe9",  # half of a character
        codecs.BOM_UTF32_LE + "text".encode("utf-32-le")[:-1],
        "UTF-16 without a mark".encode("utf-16-le"),
    ],
)
def test_binary_file_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.txt: not a text file"):
        detect_encoding(path)


def test_nul_is_refused_by_line(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"text\na row\na r\0w\n")
    with pytest.raises(
        UserError, match=r"a\.csv: not a text file \(binary data: a NUL character on line 3\); remove it"
    ):
        detect_encoding(path)


ENGLISH = "“Stop,” he said. “It’s not the café.” And they left… for the sea — and Zoë’s house."
RUSSIAN = "Жил-был царь, и было у него три сына. Он шёл по берегу моря, и ветер бил ему в лицо. Где же вы, дети?"
POLISH = "Zażółć gęślą jaźń. Był raz stary rybak, który mieszkał nad morzem, i miał żonę. Źle się działo, więc poszedł."
CZECH = "Příliš žluťoučký kůň úpěl ďábelské ódy. Něco se děje, řekl starý rybář, a šel k moři."
HUNGARIAN = (
    "Élt egyszer egy öreg halász a tenger mellett. Hűvös volt az idő, és erősen fújt a szél. Őt várta a felesége."
)
GERMAN = "Die Straße führt über die Brücke zum Müller; die Kühe schlafen schön. Äpfel gab es für fünf Groschen."
FRENCH = "L’été, à la mer, les élèves mangeaient des crêpes près de la forêt ; ça va, Noël approchait. Où est l’île ?"
SPANISH = "El niño comió piñas y el señor habló de España. ¿Qué pasó después? Nadie lo sabía; la mañana llegó."
TURKISH = "Çok güzel bir gün; deniz kıyısında yaşlı bir balıkçı yaşardı. Ağaçların altında ışık vardı. İyi geceler!"
GREEK = "Ένας γέρος ψαράς ζούσε δίπλα στη θάλασσα. Άνεμος φυσούσε όλη τη νύχτα, και το πρωί βγήκε ο ήλιος."
HEBREW = "היה היה דייג זקן שגר ליד הים. בכל בוקר הוא יצא לים עם הרשת שלו, ובכל ערב חזר הביתה."
ARABIC = "كان هناك صياد عجوز يعيش بجانب البحر. في كل صباح يخرج إلى البحر مع شبكته ويعود في المساء."
JAPANESE = (
    "昔々、あるところにおじいさんとおばあさんがいました。おじいさんは山へ柴刈りに、おばあさんは川へ洗濯に行きました。"
)
SIMPLIFIED = "从前有一个老渔夫，他住在海边的小屋里。每天早上他都出海打鱼，晚上才回家。"
TRADITIONAL = "從前有一個老漁夫，他住在海邊的小屋裡。每天早上他都出海打魚，晚上才回家。"
KOREAN = "옛날에 바닷가에 늙은 어부가 살았습니다. 어부는 아침마다 바다로 나가서 저녁에 집으로 돌아왔습니다."
UKRAINIAN = "Жив собі старий рибалка біля моря. Щоранку він виходив у море, і їжа була проста, але ґазда не скаржився."
OLD = [
    (ENGLISH, "windows-1252"),
    (GERMAN, "windows-1252"),
    (GERMAN, "iso-8859-1"),
    (FRENCH, "windows-1252"),
    (SPANISH, "windows-1252"),
    (SPANISH, "iso-8859-1"),
    (RUSSIAN, "windows-1251"),
    (RUSSIAN, "koi8-r"),
    (RUSSIAN, "cp866"),
    (RUSSIAN, "iso-8859-5"),
    (UKRAINIAN, "windows-1251"),
    (POLISH, "windows-1250"),
    (POLISH, "iso-8859-2"),
    (CZECH, "windows-1250"),
    (CZECH, "iso-8859-2"),
    (HUNGARIAN, "windows-1250"),
    (HUNGARIAN, "iso-8859-2"),
    (TURKISH, "windows-1254"),
    (GREEK, "windows-1253"),
    (GREEK, "iso-8859-7"),
    (HEBREW, "windows-1255"),
    (ARABIC, "windows-1256"),
    (JAPANESE, "shift_jis"),
    (JAPANESE, "euc-jp"),
    (SIMPLIFIED, "gb18030"),
    (SIMPLIFIED, "gb2312"),
    (TRADITIONAL, "big5"),
    (KOREAN, "euc-kr"),
]


@pytest.mark.parametrize(("text", "encoding"), OLD)
@pytest.mark.parametrize(
    "layout", ["{}\n", 'title,text\nOne,"{}"\n', '{{"text": "{}"}}\n', "# Title\n\nNo accent.\n\n{}"]
)
def test_code_pages_are_found(tmp_path: Path, text: str, encoding: str, layout: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(layout.format(text).encode(encoding))
    assert path.read_text(encoding=detect_encoding(path)) == layout.format(text)


@pytest.mark.parametrize(("text", "encoding"), [*OLD, *product([ENGLISH, GERMAN, FRENCH], ["mac-roman", "cp850"])])
@pytest.mark.parametrize("characters", [16, 25, 40, 60])
def test_short_text_is_right_or_refused(tmp_path: Path, text: str, encoding: str, characters: int) -> None:
    path = tmp_path / "a.txt"
    content = text[:characters].encode(encoding, errors="ignore")
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
        (b"One.\nTw\x81o.\n", r"2: byte 3 of the line, 0x81, .* \(unknown\)"),
        (GERMAN.encode("cp850"), r"1: byte 9 of the line, 0xe1, .* \(unknown\)"),
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
    path.write_bytes(f"{GERMAN}\n".encode("windows-1252") * 999 + b"a\x81b")
    with pytest.raises(
        UserError, match=r"a\.txt:1000: byte 2 of the line, 0x81, is not windows-1252, as which the rest"
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
        UserError, match=r"a\.txt:2: byte 1 of the line, 0xc6, is not utf-8, which prepare\.encoding names"
    ):
        find_encoding(path, "a.txt", "utf-8")
    path.write_bytes(codecs.BOM_UTF8 + b"One.")
    assert find_encoding(path, "a.txt", "utf-8") == "utf-8-sig"
    path.write_bytes("One.".encode("utf-16-le"))
    assert find_encoding(path, "a.txt", "utf-16-le") == "utf-16-le"
