"""Remove HTML tags. Entities stay, and are decoded afterwards, so that `&lt;p&gt;` remains a visible `<p>`."""

import re

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
# An attribute needs a value, or a name that is valid without one: `a <b and c> d` is not a tag.
_ATTRIBUTE = rf"""\s+(?:[a-z][\w:.-]*\s*=\s*(?:"[^"]*"|'[^']*'|[^\s"'<>=`]+)|(?:{_LONE_ATTRIBUTES})\b)"""
_TAG = re.compile(
    rf"</?(?:(?P<block>{_BLOCK_NAMES})|(?P<line>br)|{_INLINE_NAMES})(?:{_ATTRIBUTE})*\s*/?>", re.IGNORECASE
)
_UNSEEN = re.compile(r"<!--.*?-->|<!doctype\b[^>]*>|<(script|style)\b[^>]*>.*?</\1\s*>", re.IGNORECASE | re.DOTALL)


def strip_markup(text: str) -> str:
    """Replace tags of HTML elements by a paragraph break (block), a line break (`<br>`) or nothing (inline).

    Comments, scripts and style sheets are removed with their content. What is not an HTML element stays: `a < b`, `<3`,
    `<name>`.
    """
    if "<" not in text:
        return text
    return _TAG.sub(_replace_tag, _UNSEEN.sub("", text))


def _replace_tag(tag: re.Match[str]) -> str:
    return "\n\n" if tag["block"] else "\n" if tag["line"] else ""
