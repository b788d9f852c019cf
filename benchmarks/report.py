"""The figures of a run, and the text that shows them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from contenders import SAMPLED, Contender
from worker import Start

REFERENCE = "transformers-float32"
"""Whose greedy tokens the others are compared with."""


@dataclass(frozen=True)
class Group:
    """What is timed together: rows, tokens of each prompt, and new tokens of each row."""

    batch: int
    prompt_tokens: int
    new_tokens: int

    @property
    def room(self) -> int:
        """Tokens of a row in the end."""
        return self.prompt_tokens + self.new_tokens

    def __str__(self) -> str:
        return f"batch {self.batch}, prompts of {self.prompt_tokens} tokens, {self.new_tokens} new"


@dataclass
class Measurement:
    """One contender in one group: seconds of each round."""

    one_token_s: list[float] = field(default_factory=list)
    """From the prompts to one new token a row."""
    all_tokens_s: list[float] = field(default_factory=list)
    """From prompts of the same lengths to all new tokens."""
    peak_bytes: int = 0

    def prefill_rate(self, group: Group) -> float:
        """Tokens of the prompts a second, drawing the first new token included; the median."""
        return group.batch * group.prompt_tokens / median(self.one_token_s)

    def decode_rate(self, group: Group) -> float:
        """New tokens a second, all rows together, after the first; the median."""
        return _decode_rate(group, median(self._decode_s()))

    def decode_range(self, group: Group) -> tuple[float, float]:
        """The slowest and the fastest round."""
        seconds = self._decode_s()
        return _decode_rate(group, max(seconds)), _decode_rate(group, min(seconds))

    def _decode_s(self) -> list[float]:
        return [every - one for every, one in zip(self.all_tokens_s, self.one_token_s, strict=True)]


@dataclass
class Entry:
    """A contender that came up."""

    contender: Contender
    weight_bytes: int
    """Read for one token, whatever the batch."""
    start: Start
    greedy_token_ids: list[int]
    """The likeliest tokens of a prompt that is the same for all."""
    measurements: dict[Group, Measurement] = field(default_factory=dict)

    @property
    def peak_bytes(self) -> int:
        return max([self.start.peak_bytes, *(measured.peak_bytes for measured in self.measurements.values())])


def report(
    facts: Mapping[str, str],
    entries: Sequence[Entry],
    left_out: Mapping[str, str],
    groups: Sequence[Group],
    bandwidth: float,
) -> str:
    """The whole text. `facts` describes run and machine, `left_out` says why who is missing; bandwidth in bytes/s."""
    entries = sorted(entries, key=lambda entry: -entry.contender.bits)
    width = max(map(len, facts))
    parts = ["GPT-2 decoding, side by side", "\n".join(f"{name:<{width}}  {value}" for name, value in facts.items())]
    if left_out:
        parts.append("\n".join(["Left out:", *(f"  {name}: {reason}" for name, reason in left_out.items())]))
    parts.append(_starts(entries, bandwidth))
    parts += [_rates(group, entries, bandwidth) for group in groups]
    parts.append(_notes())
    parts += [_raw(group, entries) for group in groups]
    return "\n\n".join(parts) + "\n"


def _starts(entries: Sequence[Entry], bandwidth: float) -> str:
    reference = next((entry.greedy_token_ids for entry in entries if entry.contender.name == REFERENCE), [])
    rows = [
        (
            entry.contender.name,
            f"{entry.weight_bytes / 1e6:,.1f}",
            f"{bandwidth / entry.weight_bytes:,.1f}",
            f"{entry.start.imported_s:.2f}",
            f"{entry.start.first_token_s:.2f}",
            f"{entry.start.peak_bytes / 2**20:,.0f}",
            f"{entry.peak_bytes / 2**20:,.0f}",
            f"{_common(entry.greedy_token_ids, reference)} of {len(reference)}" if reference else "-",
        )
        for entry in entries
    ]
    header = ("contender", "MB a step", "limit, steps/s", "imports, s", "first token, s", "MiB, start", "MiB, peak",
              "greedy as PyTorch")  # fmt: skip
    return "Start and memory\n" + _table(header, rows)


def _rates(group: Group, entries: Sequence[Entry], bandwidth: float) -> str:
    rows = []
    for entry in sorted(
        (entry for entry in entries if group in entry.measurements),
        key=lambda entry: (
            -entry.contender.bits,
            entry.contender.family != "engine",
            median(entry.measurements[group].all_tokens_s),
        ),
    ):
        measured = entry.measurements[group]
        engine = _engine_of_same_bits(entry, entries, group)
        decode, prefill = measured.decode_rate(group), measured.prefill_rate(group)
        low, high = measured.decode_range(group)
        rows.append(
            (
                entry.contender.name,
                str(entry.contender.bits),
                _figure(decode, ",.1f"),
                f"{_figure(low, ',.1f')} to {_figure(high, ',.1f')}",
                _figure(engine.decode_rate(group) / decode, ".2f") if engine else "-",
                _figure(decode / group.batch * entry.weight_bytes / bandwidth, ".0%"),
                f"{prefill:,.0f}",
                f"{engine.prefill_rate(group) / prefill:.2f}" if engine else "-",
                f"{1000 * median(measured.one_token_s):,.0f}",
                f"{measured.peak_bytes / 2**20:,.0f}",
            )
        )
    header = ("contender", "bits", "decode, tok/s", "rounds", "engine / it", "of limit", "prefill, tok/s",
              "engine / it", "first token, ms", "MiB")  # fmt: skip
    return f"{str(group).capitalize()}\n" + _table(header, rows)


def _engine_of_same_bits(entry: Entry, entries: Sequence[Entry], group: Group) -> Measurement | None:
    """What a peer is compared with: the engine's measurement in its class; none for the engine itself."""
    if entry.contender.family == "engine":
        return None
    for other in entries:
        if other.contender.family == "engine" and other.contender.bits == entry.contender.bits:
            return other.measurements.get(group)
    return None


def _notes() -> str:
    return f"""How to read this
decode         new tokens a second of all rows together, after the first token of each: the difference of two timed
               calls of a round, all tokens less one token. Median of the rounds; beside it slowest and fastest.
prefill        tokens of the prompts a second, in the call that draws one token; first token, ms: that call.
engine / it    the engine's rate divided by the peer's, at the same bits a weight; above 1 the engine is faster.
MB a step      weights that one step must read, for any number of rows: all but the embeddings looked up by row.
limit          steps a second at which they are read at the machine's bandwidth; of limit: the share of it that was
               reached. Keys and values are not counted; what the caches keep of the weights can lift it above 100 %.
first token, s from the start of the process, imports included, to the first token of a prompt of eight; read once,
               with the files in the page cache.
MiB            high-water mark of resident memory, mapped files included: in the start, in the whole run, in a group.
greedy         how many of the likeliest tokens agree with {REFERENCE} before the first that does not. With
               random weights, where no token is much likelier than the next, only 32 bits can be expected to.
sampling       temperature {SAMPLED.temperature}, top_k {SAMPLED.top_k}, top_p {SAMPLED.top_p}, \
repetition_penalty {SAMPLED.repetition_penalty}, each with the library's own sampler,
               end-of-text never ending a row. CTranslate2 penalizes the new tokens only, all others the prompt's too.
llama.cpp      as it comes: keys and values in float16, and in a q4_0 file the head in q6_K."""


def _raw(group: Group, entries: Sequence[Entry]) -> str:
    rows = [
        (
            entry.contender.name,
            " ".join(
                f"{one:.4f}/{every:.4f}" for one, every in zip(measured.one_token_s, measured.all_tokens_s, strict=True)
            ),
        )
        for entry in entries
        if (measured := entry.measurements.get(group))
    ]
    return f"Seconds of each round, one token/all tokens: {group}\n" + _table(("contender", "rounds"), rows)


def _decode_rate(group: Group, seconds: float) -> float:
    # A model so small that the difference drowns in noise has no rate.
    return group.batch * (group.new_tokens - 1) / seconds if seconds > 0 else math.nan


def _figure(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens agree before the first that does not."""
    pairs = list(zip(first, second, strict=True))
    return next((index for index, (one, other) in enumerate(pairs) if one != other), len(pairs))


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they must be: the first to the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for row in (header, ["-" * width for width in widths], *rows):
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join([first.strip().ljust(widths[0]), *others]).rstrip())
    return "\n".join(lines)
