"""Copies of people's texts with faults at rising doses, and with changes that should not matter.

The doses of a text are nested: what is changed at a lower dose is changed in the same way at each higher one. A dose is
a share of the words, sentences or names of a text. Where that is not a whole number, chance rounds it once per text, so
that the mean over the texts is the dose.
"""

import math
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from pipeline.decoding import SamplingParams
from pipeline.engine.text import TextGenerator
from pipeline.evaluation.samples import SLOTS
from pipeline.progress import progress
from pipeline.quality.lexicon import core, words_of

DOSES = (0.05, 0.1, 0.2, 0.4)
SAMPLED = "words"
"""The corruption that draws its words from the model."""
TEMPERATURE = 1.3
REPLACEMENT_TOKENS = 6
"""The most tokens drawn for a word; of longer words the beginning is taken."""
TYPO_SHARE = 0.01
TYPO_LETTERS = 4
"""The fewest letters of a word that gets a typo."""

_SENTENCE_BREAK = re.compile(r"[.!?…][\"“”„«»’')]*\s+|\n+")
_QUOTATION_MARK = re.compile(r"[\"“”„«»]")


@dataclass(frozen=True)
class Text:
    """A continuation of a prompt."""

    prompt: str
    text: str
    finished: bool


Item = TypeVar("Item")
Spans = list[tuple[int, int]]
Edits = dict[tuple[int, int], str]
"""The replacement of each changed part of a text."""


def corrupt(texts: Sequence[Text], generator: TextGenerator, seed: int) -> dict[str, dict[float, list[Text]]]:
    """Return the corrupted copies by the name of the corruption and the dose."""
    drawn = draw_words(texts, generator, seed)
    names, sentences = [names_of(text) for text in texts], [sentences_of(text.text) for text in texts]
    all_names = sorted({name for own in names for name in own.values()})
    all_sentences = [[text.text[start:end] for start, end in own] for text, own in zip(texts, sentences, strict=True)]

    def swap_names(index: int, dose: float, chance: random.Random) -> Edits:
        others = [name for name in all_names if name not in set(names[index].values())]
        picks = {span: chance.choice(others) for span in _order(names[index], chance)} if others else {}
        return dict(list(picks.items())[: _count(dose, len(names[index]), chance)])

    def splice(index: int, dose: float, chance: random.Random) -> Edits:
        others = [sentence for other, own in enumerate(all_sentences) if other != index for sentence in own]
        picks = {span: chance.choice(others) for span in _order(sentences[index], chance)} if others else {}
        return dict(list(picks.items())[: _count(dose, len(sentences[index]), chance)])

    def shuffle(index: int, dose: float, chance: random.Random) -> Edits:
        order = _order(sentences[index], chance)
        pairs = list(zip(order[::2], order[1::2], strict=False))
        text = texts[index].text
        swaps = pairs[: _count(dose, len(pairs), chance)]
        return {here: text[there[0] : there[1]] for pair in swaps for here, there in (pair, pair[::-1])}

    def take_drawn(index: int, dose: float, chance: random.Random) -> Edits:
        count = _count(dose, len(re.findall(r"\S+", texts[index].text)), chance)
        return dict(list(drawn[index].items())[:count])

    makers: Mapping[str, Callable[[int, float, random.Random], Edits]] = {
        SAMPLED: take_drawn,
        "names": swap_names,
        "splice": splice,
        "shuffle": shuffle,
    }
    return {
        name: {
            dose: [
                replace(text, text=_edit(text.text, maker(index, dose, random.Random(f"{seed} {name} {index}"))))
                for index, text in enumerate(texts)
            ]
            for dose in DOSES
        }
        for name, maker in makers.items()
    }


def change_harmlessly(texts: Sequence[Text], generator: TextGenerator, seed: int) -> dict[str, list[Text]]:
    """Return copies with changes that should not matter, by name: half the length, and a few typos."""
    tokenizer = generator.tokenizer
    halves = []
    for text in texts:
        ids = tokenizer.encode(text.text).ids
        halves.append(Text(text.prompt, tokenizer.decode(ids[: math.ceil(len(ids) / 2)]), finished=False))
    typos = [
        replace(text, text=_edit(text.text, _typos(text.text, random.Random(f"{seed} typos {index}"))))
        for index, text in enumerate(texts)
    ]
    return {"half": halves, "typos": typos}


def draw_words(texts: Sequence[Text], generator: TextGenerator, seed: int) -> list[Edits]:
    """Replace the words of each text that the highest dose takes, in random order, by what the model draws there.

    The model reads the text as it was up to the word. What is drawn is replaced with its punctuation; the first word,
    which may be half in the prompt, stays.
    """
    places: list[tuple[int, tuple[int, int]]] = []
    for index, text in enumerate(texts):
        spans = [match.span() for match in re.finditer(r"\S+", text.text)]
        order = _order(spans[1:], random.Random(f"{seed} places {index}"))
        places += [(index, span) for span in order[: math.ceil(max(DOSES) * len(spans))]]
    params = SamplingParams(
        temperature=TEMPERATURE, max_new_tokens=REPLACEMENT_TOKENS, ignore_eos=True, context_overflow="slide"
    )
    edits: list[Edits] = [{} for _ in texts]
    with progress(total=len(places), description="words", unit="word") as bar:
        for first in range(0, len(places), SLOTS):
            batch = places[first : first + SLOTS]
            prompts = [texts[index].prompt + texts[index].text[:start].rstrip(" ") for index, (start, _) in batch]
            each = [replace(params, seed=seed + first + offset) for offset in range(len(batch))]
            for (index, span), done in zip(batch, generator.complete(prompts, each), strict=True):
                found = re.search(r"\S+", done.text)
                edits[index][span] = found.group() if found else texts[index].text[slice(*span)]
            bar.update(len(batch))
    return edits


def names_of(text: Text) -> dict[tuple[int, int], str]:
    """Return where the names of a text are, without an apostrophe and what follows it, and each name.

    A name is a word that has a capital within a sentence and is never written small.
    """
    words = words_of(text.prompt + text.text)
    small = {core(word.text) for word in words if word.is_small}
    named = {core(word.text) for word in words if word.is_capitalized and not word.starts_sentence} - small
    offset = len(text.prompt)
    found = {}
    for word in words:
        name = re.split("['’ʼ]", word.text)[0]
        if word.start >= offset and len(name) > 1 and word.is_capitalized and core(word.text) in named:
            found[word.start - offset, word.start - offset + len(name)] = name
    return found


def sentences_of(text: str) -> Spans:
    """Return where the sentences of a text are, without its first, which the prompt may have begun, and headings.

    Sentences of one quotation are one part: moving them never leaves a quotation open.
    """
    ends = [(match.start() + len(match.group().rstrip()), match.end()) for match in _SENTENCE_BREAK.finditer(text)]
    spans: Spans = []
    start = 0
    for end, following in [*ends, (len(text), len(text))]:
        is_open = len(_QUOTATION_MARK.findall(text, start, end)) % 2 == 1
        if is_open and "\n" not in text[end:following] and following < len(text):
            continue
        if text[start:end].strip() and not is_open and not text.startswith("#", start):
            spans.append((start, end))
        start = following
    return spans[1:]


def _typos(text: str, chance: random.Random) -> Edits:
    """Swap, drop or replace a letter in a few words."""
    words = [word for word in words_of(text) if len(word.text) >= TYPO_LETTERS and word.text.isalpha()]
    edits: Edits = {}
    for word in _order(words, chance)[: _count(TYPO_SHARE, len(words_of(text)), chance)]:
        place = chance.randrange(1, len(word.text) - 1)
        before, letters, after = word.text[:place], word.text[place : place + 2], word.text[place + 2 :]
        kinds = (letters[::-1], letters[1], chance.choice("abcdefghijklmnopqrstuvwxyz") + letters[1])
        edits[word.start, word.end] = before + chance.choice(kinds) + after
    return edits


def _order(items: Iterable[Item], chance: random.Random) -> list[Item]:
    ordered = list(items)
    chance.shuffle(ordered)
    return ordered


def _count(dose: float, total: int, chance: random.Random) -> int:
    return min(total, int(dose * total + chance.random()))


def _edit(text: str, edits: Edits) -> str:
    parts, end = [], 0
    for (start, own_end), new in sorted(edits.items()):
        parts += [text[end:start], new]
        end = own_end
    return "".join([*parts, text[end:]])
