"""Measure how well a text that was decoded with a code page fits the languages of that page."""

import re
from collections import Counter
from collections.abc import Callable
from functools import cache

_WESTERN = "windows-1252", "iso-8859-15", "mac-roman"
_CENTRAL = "windows-1250", "iso-8859-2"
_BALTIC = ("windows-1257",)
_TURKISH = ("windows-1254",)
_CYRILLIC = "windows-1251", "koi8-r", "cp866", "iso-8859-5", "mac-cyrillic"
_GREEK = "windows-1253", "iso-8859-7"
_HEBREW = ("windows-1255",)
_ARABIC = ("windows-1256",)

_LETTERS = {
    # language: the letters beyond ASCII, and the pages that have them
    "French": ("àâæçéèêëîïôœùûüÿ", _WESTERN),
    "German": ("äöüß", (*_WESTERN, *_CENTRAL)),
    "Spanish": ("áéíñóúü", _WESTERN),
    "Portuguese": ("áâãàçéêíóôõúü", _WESTERN),
    "Italian": ("àèéìîòóù", _WESTERN),
    "Dutch": ("áèéëêïíóöúü", _WESTERN),
    "Swedish": ("åäöé", _WESTERN),
    "Danish": ("æøåé", _WESTERN),
    "Icelandic": ("áæðéíóöþúý", _WESTERN),
    "Catalan": ("àçèéíïòóúü", _WESTERN),
    "Polish": ("ąćęłńóśźż", (*_CENTRAL, *_BALTIC)),
    "Czech": ("áčďéěíňóřšťúůýž", _CENTRAL),
    "Slovak": ("áäčďéíľňóôšťúýž", _CENTRAL),
    "Hungarian": ("áéíóöőúüű", _CENTRAL),
    "Croatian": ("čćđšž", _CENTRAL),
    "Romanian": ("ăâîşţ", _CENTRAL),
    "Estonian": ("äõöšüž", _BALTIC),
    "Latvian": ("āčēģīķļņšūž", _BALTIC),
    "Lithuanian": ("ąčęėįšųūž", _BALTIC),
    "Turkish": ("âçğıİîöşûü", _TURKISH),
    "Russian": ("абвгдеёжзийклмнопрстуфхцчшщъыьэюя", _CYRILLIC),
    "Bulgarian": ("абвгдежзийклмнопрстуфхцчшщъьюя", _CYRILLIC),
    "Ukrainian": ("абвгґдеєжзиіїйклмнопрстуфхцчшщьюя", ("windows-1251", "koi8-u", "iso-8859-5", "mac-cyrillic")),
    "Belarusian": ("абвгдеёжзійклмнопрстуўфхцчшыьэюя", ("windows-1251", "iso-8859-5", "mac-cyrillic")),
    "Serbian": ("абвгдђежзијклљмнњопрстћуфхцчџш", ("windows-1251", "iso-8859-5", "mac-cyrillic")),
    "Macedonian": ("абвгдѓежзѕијклљмнњопрстќуфхцчџш", ("windows-1251", "iso-8859-5", "mac-cyrillic")),
    "Greek": ("αβγδεζηθικλμνξοπρσςτυφχψωάέήίόύώϊϋΐΰ", _GREEK),
    "Hebrew": ("אבגדהוזחטיךכלםמןנסעףפץצקרשת", _HEBREW),
    "Arabic": ("ءآأؤإئابةتثجحخدذرزسشصضطظعغـفقكلمنهوىيًٌٍَُِّْ", _ARABIC),
    "Persian": ("ءآأئابپتثجچحخدذرزژسشصضطظعغفقکكگلمنهويیى", ("windows-1256",)),
}
_PUNCTUATION = frozenset("“”‘’‚„‹›«»–—―…•·§°©®™€£¥¢ªº½¼¾×¡¿†‡\u00a0\u00ad\u200c\u200d")
_INSIDE_WORDS = frozenset("’‘·–—…\u00a0\u00ad\u200c\u200d")
_SYMBOLS = frozenset("¶¹²³±¤¦¬µ´¨¸¯")
_FULL_WIDTH = re.compile("[“”‘’—…·×÷°§\u2190-\u266f\u3000-\u303f\u30fb\u30fc\uff01-\uff60]")
_WIDE = re.compile("[^\\0-\x7f]+")
_MIN_KANA_SHARE = 0.1
_MIN_HANGUL_SHARE = 0.6
_MIN_WORD_SHARE = 0.1
_MAX_BORROWED_SHARE = 0.01
_THAI_FAULT = re.compile(
    "(?<![\u0e01-\u0e4e])[\u0e30-\u0e3a\u0e45\u0e47-\u0e4e]|[\u0e40-\u0e44](?![\u0e01-\u0e2e])"
    "|[\u0e03\u0e05\u0e06\u0e0c\u0e0f\u0e11\u0e12\u0e26]|[A-Za-z][\u0e01-\u0e4e]|[\u0e01-\u0e4e][A-Za-z]"
)
_FINAL_LETTERS = frozenset("ςךםןףץ")


def measure_fit(text: str, encoding: str) -> float:
    """Return the share of the characters beyond ASCII that a language of the code page explains, from 0 to 1."""
    if encoding in _ASIAN:
        return _ASIAN[encoding](text)
    kinds = _count_kinds(text)
    total = sum(kinds.values())
    faults = kinds.pop("", 0)
    letters = {character: count for character, count in kinds.items() if character not in _PUNCTUATION}
    alphabets = _alphabets(encoding)
    if encoding in _WESTERN and _share_words(text, _ENGLISH) > _MIN_WORD_SHARE:  # English borrows from all
        alphabets = [frozenset().union(*alphabets)]
    foreign = min(sum(count for letter, count in letters.items() if letter not in alphabet) for alphabet in alphabets)
    return 1 - (faults + foreign) / total if total else 1.0


def _count_kinds(text: str) -> Counter[str]:
    """Count the characters beyond ASCII in lower case; those that cannot be where they are count as ''."""
    kinds = Counter(character.lower()[0] for character in "".join(_WIDE.findall(text)))
    for fault in _FAULT.finditer(text.translate(_SHAPES)):
        kinds[text[fault.start()].lower()[0]] -= 1
        kinds[""] += 1
    return kinds


class _Shapes(dict[int, str]):
    """The shape of each character, for `str.translate`."""

    def __missing__(self, code: int) -> str:
        self[code] = shape = _find_shape(chr(code))
        return shape


def _find_shape(character: str) -> str:
    if character in ",.!?":
        return ","
    if character in _FINAL_LETTERS:
        return "f"
    if character.isalpha():
        latin, greek = character <= "\u024f", "\u0370" <= character <= "\u03ff"
        shape = "a" if character.isascii() else "x" if latin else "g" if greek else "s"
        return shape.upper() if character.isupper() else shape if character.islower() or not latin else "i"
    if character in _PUNCTUATION:
        low = character in "‚„"
        return "l" if low else "q" if character == "’" else "i" if character in _INSIDE_WORDS else "p"
    return "y" if character in _SYMBOLS else "-" if character.strip() else " "


_SHAPES = _Shapes()
# In shapes: a is ASCII, x other Latin letters, g Greek, s of another script, f final letters.
_LETTER = "[aAxXgGsSf]"
_FAULT = re.compile(
    rf"(?<={_LETTER})p(?={_LETTER})"  # a quotation mark inside a word
    rf"|(?<={_LETTER})[yl]|y(?={_LETTER})"  # a low quotation mark opens
    r"|(?<![^ ])q(?=[gG])"  # the quotation mark that one Greek page has in the place of the other's Ά
    rf"|f(?={_LETTER})"
    r"|(?<=[axgsf,])[XGS]|(?<![aAxXgGsSf])[XGS](?=[AXGS][axgsf])|(?<=[AXGS])[xgs](?=[AXGS])"  # odd capitals
    r"|[gGsSf](?=[aA])|(?<=[aA])[gGsSf]"  # two scripts in a word
)


@cache
def _alphabets(encoding: str) -> list[frozenset[str]]:
    return [frozenset(letters.lower()) for letters, pages in _LETTERS.values() if encoding in pages]


def _share(text: str, is_good: Callable[[str], bool]) -> float:
    wide = Counter("".join(_WIDE.findall(text)))
    good = sum(count for character, count in wide.items() if is_good(character) or _FULL_WIDTH.match(character))
    return good / wide.total() if wide else 1.0


def _is_kana(character: str) -> bool:
    return "\u3041" <= character <= "\u30fa"


def _fit_japanese(text: str) -> float:
    if _share_kana(text) < _MIN_KANA_SHARE:
        return 0.0
    return _share(text, lambda character: _is_kana(character) or _is_frequent(character, "euc_jp", 0xB0, 0xCF))


def _share_kana(text: str) -> float:
    wide = "".join(_WIDE.findall(text))
    return sum(map(_is_kana, wide)) / len(wide) if wide else 0.0


def _fit_korean(text: str) -> float:
    hangul = _share(text, lambda c: "\uac00" <= c <= "\ud7a3" and _is_frequent(c, "euc_kr", 0xB0, 0xC8))
    if hangul < _MIN_HANGUL_SHARE:  # Chinese text that is read as Korean has both, in equal parts
        return hangul
    return _share(text, lambda c: _is_frequent(c, "euc_kr", 0xB0, 0xFD))


def _fit_simplified(text: str) -> float:
    if _share_kana(text) > _MIN_KANA_SHARE:
        return 0.0
    return _share(text, lambda c: _is_frequent(c, "gb2312", 0xB0, 0xD7) or _is_frequent(c, "big5", 0xA4, 0xC5))


def _fit_traditional(text: str) -> float:
    return _share(text, lambda c: _is_frequent(c, "big5", 0xA4, 0xC5))


def _fit_thai(text: str) -> float:
    wide = "".join(_WIDE.findall(text))
    # A vowel or tone mark follows a consonant or a mark, a leading vowel precedes a consonant.
    faults = len(_THAI_FAULT.findall(text)) + sum(
        not ("\u0e01" <= character <= "\u0e4e" or character in _PUNCTUATION) for character in wide
    )
    return max(0.0, 1 - faults / len(wide)) if wide else 1.0


@cache
def _is_frequent(character: str, encoding: str, first_lead: int, last_lead: int) -> bool:
    try:
        lead, *trail = character.encode(encoding)
    except UnicodeEncodeError:
        return False
    return len(trail) == 1 and first_lead <= lead <= last_lead


_ASIAN: dict[str, Callable[[str], float]] = {
    "cp932": _fit_japanese,
    "euc-jp": _fit_japanese,
    "gb18030": _fit_simplified,
    "cp950": _fit_traditional,
    "cp949": _fit_korean,
    "cp874": _fit_thai,
}
CODE_PAGES = (*dict.fromkeys(page for _, pages in _LETTERS.values() for page in pages), *_ASIAN)

_ENGLISH = "the and of that was for with his her you not said they had she he it in is this from"
_WESTERN_WORDS = f"""
{_ENGLISH} der die und das ist nicht ein eine mit zu sich auf les des une est dans pour qui elle pas el los las del por
con para como di che il della os uma het een dat niet voor och att det som inte af er ikke
"""  # words that are rare in the languages of other pages


def reads_as_western(text: str) -> bool:
    """Check whether a text in windows-1252 has a Western European language: by its words, or as it is nearly ASCII."""
    letters = sum(character.isalpha() for character in "".join(_WIDE.findall(text)))
    return letters < _MAX_BORROWED_SHARE * len(text) or _share_words(text, _WESTERN_WORDS) > _MIN_WORD_SHARE


def _share_words(text: str, language: str) -> float:
    words = frozenset(language.split())
    found = re.findall(r"[a-z]+", text.lower())
    return sum(word in words for word in found) / len(found) if found else 0.0
