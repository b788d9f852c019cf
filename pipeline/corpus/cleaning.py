"""Rules that repair text: characters, markup, page marks, notices, wrapped lines, blank lines."""

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

import ftfy
from ftfy.badness import BADNESS_RE, MOJIBAKE_CATEGORIES
from ftfy.fixes import unescape_html

from pipeline.corpus.fences import split_code
from pipeline.corpus.markup import is_escaped, is_markup, strip_tags
from pipeline.corpus.pieces import ends_sentence
from pipeline.corpus.wrapping import find_joint, join_wrapped

# Joiners belong to the word between letters of non-Latin scripts, after a virama and inside emoji. A space of no width
# divides words between letters of Thai, Lao, Khmer and Myanmar. Elsewhere they are leftovers.
_DIVIDED = "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\ua9e0-\ua9ff\uaa60-\uaadf]"
_VIRAMA = "[\u094d\u09cd\u0a4d\u0acd\u0b4d\u0bcd\u0c4d\u0ccd\u0d4d\u0dca]"
_INVISIBLE = re.compile(
    "[\u00ad\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff]"
    f"|(?<!{_DIVIDED})\u200b|\u200b(?!{_DIVIDED})"
    f"|(?<![^\\0-\u024f])[\u200c\u200d]|(?<!{_VIRAMA})[\u200c\u200d](?![^\\0-\u024f])"
)
_ODD_SPACE = re.compile("[\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]")
_PLAIN = bytes([*b"\t", *range(0x21, 0x7F)])
_REMOVED = re.compile("[\u00a0\u00ad\u1680\u2000-\u200f\u2028-\u202f\u205f-\u2069\u3000\ufeff]")
"""Holds all characters of `_INVISIBLE` and `_ODD_SPACE`, and a few more."""
# ftfy looks for mojibake longer than all other rules take together, and what it finds are rare neighbours. Most texts
# have only these, which are never found: quotes and dashes next to each other and to ASCII, and letters of one kind.
_QUIET = "‘’“”–—…"
_ACCENTED = "ß-öø-ÿ"
_CAPITAL = "ÀÁÄ-ÍÏÑ-ÕÙ-Þ"
_LETTER = "\u0386\u0388-\u038a\u038c\u038e-\u03ce\u0401\u0403-\u045f"  # Greek and Cyrillic; not Ђ, of "вЂ"
_SEARCHED = "".join({*MOJIBAKE_CATEGORIES.values(), *re.findall("[^\0-\x7f]", BADNESS_RE.pattern)})
_RARE = f"(?![{_QUIET}{_ACCENTED}{_LETTER}])[{_SEARCHED}]"
_BROKEN = (
    # The first line is what ftfy finds alone: control characters, ligatures, line separators, halves of characters.
    "[\0-\x08\x0b-\x1f\x7f-\x9fÃÂĲĳŉǄ-ǌǱ-ǳﬀ-ﬆ\u2028\u2029\u206a-\u206f\ud800-\udfff\ufeff\ufff9-\ufffc]"
    f"|{_RARE}[{_SEARCHED}]|[”{_ACCENTED}{_LETTER}]{_RARE}|[{_QUIET}](?![{_CAPITAL}]){_RARE}"
    f"|[{_LETTER}][{_ACCENTED}]|[{_ACCENTED}][{_LETTER}]|”[{_ACCENTED}]|[ВГРСΒΓΞΟ][{_QUIET}][ВГРСΒΓΞΟ]"
)
_MAY_BE_BROKEN = re.compile(rf"{_BROKEN}|[Œœ]|[{_ACCENTED}][“”‘]")
_BROKEN_BEFORE_ASCII = re.compile(rf"{_BROKEN}|[Œœ](?![A-Za-z])|[{_ACCENTED}][“”‘][\w“‘]")
"""The same where ASCII is seen, too."""
_STRAIGHT = dict.fromkeys("\u02bc\u2018\u2019\u201a\u201b", "'") | dict.fromkeys("\u201c\u201d\u201e\u201f", '"')
"""What ftfy makes of curly quotes."""
_PAGE = r"(?:(?:p|pp|pg|page)\.?\s*\d{1,4}|(?:pp?\.|pg\.?|page)\s+[ivxlc]{1,8})"
_PAGE_MARK = rf"\[\s*{_PAGE}\s*\]|\(\s*{_PAGE}\s*\)|\{{\s*(?:{_PAGE}|\d{{1,4}})\s*\}}|[-–—]\s*\d{{1,4}}\s*[-–—]"
_PAGE_MARK += r"|page\s+\d{1,4}(?:\s+of\s+\d{1,4})?"
_PAGE_MARK_LINE = re.compile(rf"^[ \t]*(?:{_PAGE_MARK})$", re.IGNORECASE | re.MULTILINE)
_PAGE_BREAK = re.compile(rf"\n*(?:{_PAGE_MARK_LINE.pattern}\n*)+", re.IGNORECASE | re.MULTILINE)
# How a line with a page mark begins. White space within a mark may be a line end.
_PAGE_MARK_HINT = re.compile(r"[ \t]*(?:[\[({]\s*(?:p|\d|$)|[-–—]\s*(?:\d|$)|page(?:\s|$))", re.IGNORECASE)
_CREDIT_WORDS = b"produced", b"prepared", b"scanned"
_MAX_CREDIT_BYTES = 8 + 40 * 4 + 3
"""The most bytes in UTF-8 from a word of `_CREDIT_WORDS` to the end of "by"."""
_NOTICE_HINT = re.compile(r"transcriber|\b(?:produced|prepared|transcribed|scanned)\b.{0,40}\bby\b", re.IGNORECASE)
_TRANSCRIBER = r"Transcriber['’]?s?['’]?\s+Notes?\b"
_BRACKETED_NOTE = re.compile(
    rf"^[ \t]*\[\s*{_TRANSCRIBER}(?:[^\[\]]++|\[[^\[\]]*+\])*+\]", re.IGNORECASE | re.MULTILINE
)
_PLAIN_NOTE = re.compile(rf"\s*{_TRANSCRIBER}\s*:\s*\S", re.IGNORECASE)
_CREDIT = re.compile(
    r"\s*(?:Credits: )?(?:(?:This )?(?:[Ee]-?[Tt]ext|[Ee]-?[Bb]ook|[Tt]ext|[Ff]ile)(?: was)? )?"
    r"(?:[Pp]roduced|[Pp]repared|[Tt]ranscribed|[Ss]canned)(?: and proofread)? by "
)
_CREDITED = re.compile(r"proofread|gutenberg|pgdp|https?://|www\.|\be-?text\b|\be-?book\b", re.IGNORECASE)
_NAMES = re.compile(r"(?:\s*(?:[A-Z][\w.'’-]*+|and|the|of|from|for|with|de|van|von)[,;]?)+\.?\s*")
_MAX_CREDIT_LINES = 6


Repair = Literal["markup", "repaired_characters", "space", "notices", "page_marks", "line_breaks"]


@dataclass(slots=True)
class Repairs:
    """The counts of what was repaired."""

    page_marks: int = 0
    notices: int = 0
    joined_breaks: int = 0
    removed: Counter[Repair] = field(default_factory=Counter)
    """The number of characters by which each repair shortened the text; below 0 if it lengthened it."""

    def add(self, other: "Repairs") -> None:
        """Add the counts of another text."""
        self.page_marks += other.page_marks
        self.notices += other.notices
        self.joined_breaks += other.joined_breaks
        self.removed.update(other.removed)


def clean(text: str, *, wrap_columns: int | None, straighten_quotes: bool, strip_markup: bool) -> tuple[str, Repairs]:
    """Repair a section's text. `wrap_columns` is the column at which its file wraps lines; None if it does not."""
    plain = remove_markup(text) if strip_markup else text
    repaired = repair_characters(plain, straighten_quotes=straighten_quotes)
    tidy = tidy_space(repaired)
    without_notices, notices = remove_notices(tidy)
    without_marks, page_marks = remove_page_marks(without_notices, wrapped=wrap_columns is not None)
    tidy_again = tidy_space(without_marks)
    joined, joined_breaks = (tidy_again, 0) if wrap_columns is None else join_wrapped(tidy_again, wrap_columns)
    final = tidy_space(joined)
    forms: list[tuple[Repair, str]] = [
        ("markup", plain),
        ("repaired_characters", repaired),
        ("space", tidy),
        ("notices", without_notices),
        ("page_marks", without_marks),
        ("space", tidy_again),
        ("line_breaks", joined),
        ("space", final),
    ]
    removed: Counter[Repair] = Counter()
    characters = len(text)
    for repair, form in forms:
        removed[repair] += characters - len(form)
        characters = len(form)
    return final, Repairs(page_marks, notices, joined_breaks, removed)


def remove_markup(text: str) -> str:
    """Remove HTML tags and decode entities if the text is HTML or escaped; code between fences and backticks stays."""
    if "<" not in text and "&" not in text:
        return text
    parts = list(split_code(text))
    prose = "".join(part for part, is_code in parts if not is_code)
    if is_markup(prose):
        return "".join(part if is_code else unescape_html(strip_tags(part)) for part, is_code in parts)
    if is_escaped(prose):
        return "".join(part if is_code else unescape_html(part) for part, is_code in parts)
    return text


def repair_characters(text: str, *, straighten_quotes: bool) -> str:
    """Repair mojibake (ftfy), line ends, control and invisible characters, odd spaces, curly quotes if asked; NFC."""
    text = text.replace("\r\n", "\n").replace("\f", "\n")
    odd = _find_odd(text)
    if _is_sound(text, odd):
        text = _straighten(text, odd) if straighten_quotes else text
        if not _REMOVED.search(odd):
            return text
    else:
        config = ftfy.TextFixerConfig(
            unescape_html=False,
            uncurl_quotes=straighten_quotes,
            fix_character_width=False,
            normalization="NFC",
            explain=False,
        )
        text = "\n".join(_fix_line(line, config) for line in text.split("\n"))
    return _ODD_SPACE.sub(" ", _INVISIBLE.sub("", text))


def _fix_line(line: str, config: ftfy.TextFixerConfig) -> str:
    odd = _find_odd(line)
    if not _is_sound(line, odd) and (_BROKEN_BEFORE_ASCII.search(line) or not unicodedata.is_normalized("NFC", line)):
        return str(ftfy.fix_text(line, config))
    return _straighten(line, odd) if config.uncurl_quotes else line


def _find_odd(text: str) -> str:
    """Return the characters beyond printable ASCII; those of different words have white space between them."""
    odd = text.encode(errors="surrogatepass").translate(None, _PLAIN)
    for spaces in (b" " * 16, b" " * 4, b" " * 2):
        odd = odd.replace(spaces, b" ")
    return odd.decode(errors="surrogatepass")


def _is_sound(text: str, odd: str) -> bool:
    """Check whether ftfy would change nothing but curly quotes."""
    return _MAY_BE_BROKEN.search(odd) is None and unicodedata.is_normalized("NFC", text)


def _straighten(text: str, odd: str) -> str:
    for curly, straight in _STRAIGHT.items():
        if curly in odd:
            text = text.replace(curly, straight)
    return text


def tidy_space(text: str) -> str:
    """Remove spaces at line ends, blank lines at both ends, and all but one of several blank lines in a row."""
    if " \n" in text or "\t\n" in text or text.endswith((" ", "\t")):
        # Not a regular expression: it would search a run of spaces inside a line from each of them.
        text = "\n".join(line.rstrip(" \t") for line in text.split("\n"))
    if "\n\n\n" in text:
        text = re.sub(r"\n{3,}", "\n\n", text)
    return text.strip("\n")


def remove_page_marks(text: str, *, wrapped: bool) -> tuple[str, int]:
    """Remove page numbers on their own lines, such as `[page 11]`, `{12}` and `- 13 -`; return the text and the count.

    If a page number had split a paragraph (no sentence ends before it, and lower case follows), the halves are joined:
    by a line break if lines are wrapped or a half has several lines, else as one line. Expects tidy space.
    """

    def mend(mark: re.Match[str]) -> str:
        start, end = mark.span()
        if start == 0 or end == len(text):
            return ""
        line_start = text.rfind("\n", 0, start) + 1
        before = text[line_start:start]
        if not text[end].islower() or ends_sentence(before) or before.startswith("#"):
            return "\n\n" if mark[0].startswith("\n\n") or mark[0].endswith("\n\n") else "\n"
        line_end = text.find("\n", end)
        after_line = text[line_end : line_end + 2] if line_end >= 0 else ""
        before_line = text[max(0, line_start - 2) : line_start]
        has_neighbour = before_line.strip("\n") or after_line.strip("\n")
        return "\n" if wrapped or has_neighbour else find_joint(before, text[end])

    if not any(map(_PAGE_MARK_HINT.match, text.split("\n"))):
        return text, 0
    return _PAGE_BREAK.sub(mend, text), len(_PAGE_MARK_LINE.findall(text))


def remove_notices(text: str) -> tuple[str, int]:
    """Remove what transcribers say about their work; return the text and the count of such notices.

    Notices are `[Transcriber's Note: …]`, a paragraph `Transcriber's Note: …`, and a short paragraph `Produced by …`
    that contains only names of people, or their project. Expects tidy space.
    """
    if not _may_have_notice(text) or not _NOTICE_HINT.search(text):
        return text, 0
    text, notices = _BRACKETED_NOTE.subn("", text)
    paragraphs = text.split("\n\n")
    kept = [paragraph for paragraph in paragraphs if not (_PLAIN_NOTE.match(paragraph) or _is_credit(paragraph))]
    return "\n\n".join(kept), notices + len(paragraphs) - len(kept)


def _may_have_notice(text: str) -> bool:
    """Check whether `_NOTICE_HINT` may match, in a tenth of the time."""
    lower = text.encode(errors="surrogatepass").lower()
    if b"transcribe" in lower or any(letter in text for letter in "ſıİ"):  # for `re`, they equal letters of ASCII
        return True
    for word in _CREDIT_WORDS:
        start = lower.find(word)
        while start >= 0:
            if b"by" in lower[start : start + _MAX_CREDIT_BYTES]:
                return True
            start = lower.find(word, start + 1)
    return False


def _is_credit(paragraph: str) -> bool:
    credit = _CREDIT.match(paragraph)
    if credit is None or paragraph.count("\n") >= _MAX_CREDIT_LINES:
        return False
    return bool(_CREDITED.search(paragraph) or _NAMES.fullmatch(paragraph, credit.end()))
