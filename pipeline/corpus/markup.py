"""Recognize HTML, and remove its tags.

Angle brackets are nicks in chat logs, generics and comparisons in code, and much else. So tags are removed only from a
document that is markup (`is_markup`). Entities are decoded there and in an escaped text (`is_escaped`), after the tags
are gone, so that `&lt;p&gt;` remains a visible `<p>`.
"""

import re
from collections import Counter

_BLOCK_NAMES = (
    "address|article|aside|blockquote|body|caption|center|dd|details|dialog|dir|div|dl|dt|fieldset|figcaption|figure|"
    "footer|form|h[1-6]|head|header|hgroup|hr|html|legend|li|main|menu|nav|ol|optgroup|option|p|pre|search|section|"
    "summary|table|tbody|td|tfoot|th|thead|title|tr|ul"
)
_INLINE_NAMES = (
    "a|abbr|acronym|area|audio|b|base|basefont|bdi|bdo|big|button|canvas|cite|code|col|colgroup|data|datalist|del|dfn|"
    "em|embed|font|frame|frameset|i|iframe|img|input|ins|kbd|label|link|map|mark|meta|meter|noframes|noscript|object|"
    "output|param|picture|progress|q|rp|rt|ruby|s|samp|select|slot|small|source|span|strike|strong|sub|sup|svg|"
    "template|textarea|time|track|tt|u|var|video|wbr"
)
_LONE_ATTRIBUTES = (
    "allowfullscreen|async|autofocus|autoplay|checked|compact|controls|default|defer|disabled|hidden|ismap|loop|"
    "multiple|muted|nomodule|noshade|novalidate|nowrap|open|readonly|required|reversed|selected"
)
_DATA_NAMES = frozenset((
    "a", "article", "caption", "cite", "code", "data", "dialog", "dir", "footer", "form", "header", "input", "label",
    "legend", "main", "map", "menu", "meta", "object", "option", "output", "param", "q", "s", "samp", "section",
    "select", "slot", "source", "summary", "template", "time", "title", "var",
))  # fmt: skip
"""The names that chats, prompts and XML use as well: `<q>…</q><a>…</a>`, `<s>[INST] … </s>`. Without an attribute, such
an element says nothing."""
_ALONE = ("br", "hr", "wbr")
"""The elements without an end tag that need no attribute. A bare `<link>` or `<source>` may be a nick."""
_OPEN_ENDED = frozenset((
    "body", "caption", "colgroup", "dd", "dt", "head", "html", "li", "optgroup", "option", "p", "rp", "rt", "tbody",
    "td", "tfoot", "th", "thead", "tr",
))  # fmt: skip
"""The elements of which the end tag may be left out."""
# An attribute needs a value, or a name that is valid without one: `a <b and c> d` is not a tag.
_ATTRIBUTE = rf"""\s+(?:[a-z][\w:.-]*\s*=\s*(?:"[^"]*"|'[^']*'|[^\s"'<>=`]+)|(?:{_LONE_ATTRIBUTES})\b)"""
_TAG = re.compile(
    rf"<(?P<end>/?)(?P<name>(?P<block>{_BLOCK_NAMES})|(?P<line>br)|{_INLINE_NAMES})(?P<attributes>(?:{_ATTRIBUTE})*)"
    r"\s*(?P<closed>/?)>",
    re.IGNORECASE,
)
_UNSEEN_START = re.compile(r"<!--|<!doctype\b[^<>]*>|<(?P<name>script|style)\b[^<>]*>", re.IGNORECASE)

_DOCUMENT = re.compile(
    r"\s*(?:<\?xml\b[^>]*>\s*)?(?:<!--.*?-->\s*)*+<(?:!doctype\s+html|html)\b", re.IGNORECASE | re.DOTALL
)
# Elements of other vocabularies with an end tag or a namespace, and addresses in angle brackets say nothing.
_ELEMENT = re.compile(r"<([a-z][\w.-]*)(?:\s[^<>]*)?>", re.IGNORECASE)
_NEUTRAL = re.compile(r"</?[a-z][\w.-]*:[^<>]*>|<[^<>@\s]+@[^<>\s]+>", re.IGNORECASE)
_QUOTES = "\"'`"
_IN_CALL = re.compile(r"[=(+\[{]\s?[a-z]?[\"'`]$")
_CODE_LINE = re.compile(r"(?:[;{}]|[)}\]]|[\w)\]\"']:)[ \t]*$", re.MULTILINE)
_CODE_PROOF = re.compile(
    r"\{[ \t]*$|^[ \t]*(?:def|class) \w+.*:[ \t]*$|^[ \t]*#include\b|^(?:import|from) [\w.]+(?: import .*)?;?$",
    re.MULTILINE,
)
_CODE_START = re.compile(r"<(?P<name>pre|code|textarea)\b[^<>]*>", re.IGNORECASE)
_MIN_CODE_SHARE = 0.2
_ENTITY = re.compile(r"&#?\w{1,24};")


def is_markup(text: str) -> bool:
    """Check whether a document is HTML: it begins as such, or most of its angle brackets are HTML, and it is no code.

    These tags are HTML: one with an end tag (except of `_DATA_NAMES`) or attributes, `<br>`, `<hr>`, and a `<p>` that
    begins a line; so are comments and scripts. Other tags are not: `<Mark>` before each line of a chat log, what only
    resembles one (`<anna>`, `List<String>`, `a < b`), and tags in the strings of a program. Start tags that HTML lets
    one leave open count for neither side. A text is code if a fifth of its lines, `<pre>` aside, end as statements do,
    and one of them opens a block or imports something.
    """
    if "<" not in text:
        return False
    if _DOCUMENT.match(text):
        return True
    seen, unseen = _cut(_UNSEEN_START, text)
    html, other = _count_tags(seen)
    rest = _NEUTRAL.sub("", _TAG.sub("", seen))
    other += rest.count("<") - _count_elements(rest)
    return html + 2 * unseen > other and not _is_code(_cut(_CODE_START, seen)[0])


def is_escaped(text: str) -> bool:
    """Check whether the entities of a document that is no markup stand for characters: most of its `&` begin one."""
    return "&" in text and "<" not in text and 2 * len(_ENTITY.findall(text)) > text.count("&") and not _is_code(text)


def _count_tags(text: str) -> tuple[int, int]:
    """Return how many tags of HTML elements have the structure of HTML, and how many have not."""
    html = other = 0
    unclosed: list[tuple[str, bool]] = []
    names: Counter[str] = Counter()
    for tag in _TAG.finditer(text):
        name = tag["name"].lower()
        start, end = tag.span()
        before, after = text[max(0, start - 4) : start], text[end : end + 1]
        if before and before[-1] in _QUOTES and ((after and after in _QUOTES) or _IN_CALL.search(before)):
            other += 1
        elif not tag["end"] and (tag["closed"] or name in _ALONE):
            html += 1
        elif not tag["end"]:
            begins_line = not after.isspace() and not before.split("\n")[-1].strip()
            unclosed.append((name, bool(tag["attributes"]) or (name == "p" and begins_line)))
            names[name] += 1
        elif not names[name]:
            other += 1
        else:
            inner, is_html = unclosed.pop()
            while inner != name:
                names[inner] -= 1
                html += is_html
                other += not is_html and inner not in _OPEN_ENDED
                inner, is_html = unclosed.pop()
            names[name] -= 1
            html += 2 * (is_html or name not in _DATA_NAMES)
    html += sum(is_html for _, is_html in unclosed)
    return html, other + sum(not is_html and name not in _OPEN_ENDED for name, is_html in unclosed)


def _count_elements(text: str) -> int:
    """Return the number of tags of elements that are not HTML's but have an end tag."""
    names = [match[1] for match in _ELEMENT.finditer(text)]
    ends = Counter(re.findall(r"</([A-Za-z][\w.-]*)\s*>", text))
    return sum(2 * min(count, ends[name]) for name, count in Counter(names).items())


def _is_code(text: str) -> bool:
    lines = sum(not line.isspace() for line in text.splitlines() if line)
    return len(_CODE_LINE.findall(text)) >= _MIN_CODE_SHARE * lines and _CODE_PROOF.search(text) is not None


def strip_tags(text: str) -> str:
    """Replace tags of HTML elements by a paragraph break (block), a line break (`<br>`) or nothing (inline).

    Comments, scripts and style sheets are removed with their content. What is not an HTML element stays: `a < b`, `<3`,
    `<name>`.
    """
    return _TAG.sub(_replace_tag, _cut(_UNSEEN_START, text)[0])


def _cut(start: re.Pattern[str], text: str) -> tuple[str, int]:
    """Remove what begins with a match of `start`, to the end of its element or comment; return how many were removed.

    What has no end stays. Not one regular expression, which would search the whole text for the end of each start.
    """
    parts: list[str] = []
    done = count = 0
    endless: set[str] = set()
    for match in start.finditer(text):
        name = (match["name"] or match[0]).lower()
        if match.start() < done or name in endless:
            continue
        end = match.end()
        if name == "<!--" or match["name"]:
            found = re.compile("-->" if name == "<!--" else rf"</{name}\s*>", re.IGNORECASE).search(text, end)
            if found is None:
                endless.add(name)
                continue
            end = found.end()
        parts.append(text[done : match.start()])
        done = end
        count += 1
    return "".join([*parts, text[done:]]), count


def _replace_tag(tag: re.Match[str]) -> str:
    return "\n\n" if tag["block"] else "\n" if tag["line"] else ""
