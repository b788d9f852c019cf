"""Checks of the fields of a body that may be long: texts, token ids, and lists of either.

A schema looks at every element of a list by itself and keeps an error for each, for a prompt once per shape that it may
have: two megabytes of wrong elements take it many seconds, in which no other request is answered. These look at all
elements at once, and name the first bad one.
"""

import re
import reprlib
from collections.abc import Callable, Sequence
from typing import Annotated, Any

from pydantic import WrapValidator
from pydantic_core import PydanticCustomError

MOST_PROMPTS = 4096
"""Far more than a server takes at a time, which depends on its slots and its queue."""
MOST_IDS = 2**16
"""The most token ids in one list: more than GPT-2's vocabulary, and many times its context."""
MOST_STOPS = 64
MOST_STOP_CHARACTERS = 1024
"""The most characters in all stop texts together. Every one may have to be looked for at each token."""
MOST_STOP_IDS = 1024
MOST_BIASES = 1024
LONGEST_QUOTE = 80
"""The most characters of a value that a message quotes."""
HIGHEST_ID = 2**31 - 1
CHECKED_AT_ONCE = 10_000

_ID = re.compile(r"[0-9]{1,10}")


def check_text(value: Any, place: str = "") -> str:
    """Return a text. Raises for another type, and for half of a surrogate pair: JSON can spell it, UTF-8 cannot."""
    if not isinstance(value, str):
        raise _refuse(f"expected a text, got {_show(value)}", place)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise _refuse("contains half of a surrogate pair, which is not a character", place) from None
    return value


def check_ids(value: Any, place: str = "") -> list[int]:
    """Return a list of token ids, each in [0, 2**31)."""
    if not isinstance(value, list):
        raise _refuse(f"expected token ids, got {_show(value)}", place)
    for start in range(0, min(len(value), MOST_IDS), CHECKED_AT_ONCE):
        part = value[start : start + CHECKED_AT_ONCE]
        if set(map(type, part)) != {int} or min(part) < 0 or max(part) > HIGHEST_ID:
            index = next(i for i, one in enumerate(part) if type(one) is not int or not 0 <= one <= HIGHEST_ID)
            raise _refuse(f"expected a token id, got {_show(part[index])}", f"{place}[{start + index}]")
    _check_count(value, MOST_IDS, "ids", place)
    return value


def check_prompt(value: Any) -> str | list[str] | list[int] | list[list[int]]:
    """Return a prompt in one of its four shapes, which the first element tells; null is an empty text."""
    if value is None:
        return ""
    if isinstance(value, str):
        return check_text(value)
    if not isinstance(value, list):
        raise _refuse(f"expected a text, token ids, or a list of either, got {_show(value)}")
    if not value:
        raise _refuse("the list is empty; give a prompt, '' to start from nothing")
    if isinstance(value[0], str | list):
        _check_count(value, MOST_PROMPTS, "prompts")
    match value[0]:
        case str():
            return [check_text(one, f"[{index}]") for index, one in enumerate(value)]
        case list():
            return [check_ids(one, f"[{index}]") for index, one in enumerate(value)]
        case _:
            return check_ids(value)


def check_stop(value: Any) -> list[str] | None:
    """Return stop texts; one alone may come without a list, and an empty one alone is as none given."""
    if value is None or value == "":
        return None
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        raise _refuse(f"expected a text or a list of texts, got {_show(value)}")
    _check_count(value, MOST_STOPS, "texts")
    texts = [check_text(one, f"[{index}]") for index, one in enumerate(value)]
    characters = sum(map(len, texts))
    if characters > MOST_STOP_CHARACTERS:
        raise _refuse(f"the texts have {characters:,} characters together; at most {MOST_STOP_CHARACTERS:,} are taken")
    return list(dict.fromkeys(texts))


def check_id_set(value: Any) -> list[int] | None:
    """Return token ids, each once."""
    return None if value is None else list(dict.fromkeys(check_ids(value)))


def check_stop_ids(value: Any) -> list[int] | None:
    ids = check_id_set(value)
    _check_count(ids or [], MOST_STOP_IDS, "ids")
    return ids


def check_biases(value: Any) -> dict[int, float] | None:
    """Return biases by token id, which is a text in JSON. Their range is that of `SamplingParams`."""
    if value is None:
        return None
    if not isinstance(value, dict):
        raise _refuse(f"expected an object of token ids and their biases, got {_show(value)}")
    _check_count(value, MOST_BIASES, "biases")
    biases = {}
    for name, bias in value.items():
        if not _ID.fullmatch(name):
            raise _refuse(f"{_show(name)} is not a token id")
        if type(bias) not in (int, float):
            raise _refuse(f"expected a number, got {_show(bias)}", f".{name}")
        biases[int(name)] = bias
    return biases


def _check_count(values: Sequence[Any] | dict[str, Any], most: int, name: str, place: str = "") -> None:
    if len(values) > most:
        raise _refuse(f"{len(values):,} {name} are more than the {most:,} that are taken", place)


def _refuse(message: str, place: str = "") -> PydanticCustomError:
    """Return the error of a field, or of the element of it at `place`."""
    return PydanticCustomError("shape", "{message}", {"message": message, "place": place})


def shorten(text: str) -> str:
    """Return a text of a client for a message, which would else be as long as what it sent."""
    return text if len(text) <= LONGEST_QUOTE else text[:LONGEST_QUOTE] + "..."


def _show(value: Any) -> str:
    return shorten(reprlib.repr(value))


def _checked_by(check: Callable[[Any], Any]) -> WrapValidator:
    """Check a field by a function instead of its schema, which /docs still shows."""
    return WrapValidator(lambda value, _: check(value))


Text = Annotated[str, _checked_by(check_text)]
Prompt = Annotated[str | list[str] | list[int] | list[list[int]], _checked_by(check_prompt)]
TokenIds = Annotated[list[int], _checked_by(check_ids)]
TokenIdSet = Annotated[list[int] | None, _checked_by(check_id_set)]
StopTexts = Annotated[str | list[str] | None, _checked_by(check_stop)]
StopIds = Annotated[list[int] | None, _checked_by(check_stop_ids)]
Biases = Annotated[dict[str, float] | None, _checked_by(check_biases)]
