"""The results of a run, and the text that shows them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from contenders import SAMPLED, Contender
from worker import Start

from pipeline.files import whole_file

REFERENCE = "transformers-float32"
"""The contender that the greedy tokens of the others are compared with."""


def publish(text: str, out: Path | None) -> None:
    """Print a result, and write it to a file if one is given."""
    print(text, end="")
    if out is not None:
        with whole_file(out) as partial:
            partial.write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class Group:
    """The size of a timed batch: rows, tokens per prompt, and new tokens per row."""

    batch: int
    prompt_tokens: int
    new_tokens: int

    @property
    def room(self) -> int:
        """Return the tokens per row at the end."""
        return self.prompt_tokens + self.new_tokens

    def __str__(self) -> str:
        return f"batch {self.batch}, prompts of {self.prompt_tokens} tokens, {self.new_tokens} new"


@dataclass
class Measurement:
    """One contender in one group: seconds of each round."""

    one_token_s: list[float] = field(default_factory=list)
    """The time from the prompts to one new token per row."""
    all_tokens_s: list[float] = field(default_factory=list)
    """The time from prompts of the same lengths to all new tokens."""
    peak_bytes: int = 0

    def prefill_rate(self, group: Group) -> float:
        """Return the median prompt tokens per second, including the draw of the first new token."""
        return group.batch * group.prompt_tokens / median(self.one_token_s)

    def decode_rate(self, group: Group) -> float:
        """Return the median new tokens per second after the first, all rows together."""
        return _decode_rate(group, median(self._decode_s()))

    def decode_range(self, group: Group) -> tuple[float, float]:
        """Return the rates of the slowest and the fastest round."""
        seconds = self._decode_s()
        return _decode_rate(group, max(seconds)), _decode_rate(group, min(seconds))

    def _decode_s(self) -> list[float]:
        return [every - one for every, one in zip(self.all_tokens_s, self.one_token_s, strict=True)]


@dataclass
class Entry:
    """A contender that started, and its results."""

    contender: Contender
    weight_bytes: int
    """The bytes of weights read per step, for a batch of any size."""
    start: Start
    greedy_token_ids: list[int]
    """The most likely tokens after a prompt that is the same for all."""
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
    """Return the whole text.

    `facts` describes run and machine, `left_out` has the reason per missing contender, bandwidth is in bytes/s.
    """
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
    header = ("contender", "MB per step", "limit, steps/s", "imports, s", "first token, s", "MiB, start", "MiB, peak",
              "greedy as PyTorch")  # fmt: skip
    return "Start and memory\n" + table(header, rows)


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
    return f"{str(group).capitalize()}\n" + table(header, rows)


def _engine_of_same_bits(entry: Entry, entries: Sequence[Entry], group: Group) -> Measurement | None:
    """Return the engine's measurement at the peer's bits per weight; None for the engine itself."""
    if entry.contender.family == "engine":
        return None
    for other in entries:
        if other.contender.family == "engine" and other.contender.bits == entry.contender.bits:
            return other.measurements.get(group)
    return None


def _notes() -> str:
    return f"""How to read this
decode         new tokens per second, all rows together, after the first token of each: the difference of two timed
               calls of a round, all tokens minus one token. Median of the rounds; then the slowest and fastest round.
prefill        prompt tokens per second in the call that draws one token; first token, ms: that call.
engine / it    the engine's rate divided by the peer's, at the same bits per weight; above 1 the engine is faster.
MB per step    weights that one step must read, for any number of rows: all but the embeddings looked up by row.
limit          steps per second if they are read at the machine's bandwidth; of limit: the share of it that was
               reached. Keys and values do not count; weights that stay in the caches can lift it above 100 %.
first token, s from the start of the process, imports included, to the first token of a prompt of eight; measured once,
               with the files in the page cache.
MiB            peak of resident memory, mapped files included: during the start, the whole run, or a group.
greedy         how many of the most likely tokens agree with {REFERENCE} before the first that does not. With
               random weights, no token is much more likely than the next, so only 32 bits can be expected to agree.
sampling       temperature {SAMPLED.temperature}, top_k {SAMPLED.top_k}, top_p {SAMPLED.top_p}, \
repetition_penalty {SAMPLED.repetition_penalty}, each with the library's own sampler;
               end-of-text never ends a row. CTranslate2 penalizes only new tokens, all others also the prompt's.
llama.cpp      with its defaults: keys and values in float16, and in a q4_0 file the head in q6_K."""


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
    return f"Seconds per round, one token/all tokens: {group}\n" + table(("contender", "rounds"), rows)


def _decode_rate(group: Group, seconds: float) -> float:
    # For a very small model, noise can exceed the difference: it has no rate.
    return group.batch * (group.new_tokens - 1) / seconds if seconds > 0 else math.nan


def _figure(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens agree before the first that does not."""
    pairs = list(zip(first, second, strict=True))
    return next((index for index, (one, other) in enumerate(pairs) if one != other), len(pairs))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a table: the first column aligned left, the others right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for row in (header, ["-" * width for width in widths], *rows):
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join([first.strip().ljust(widths[0]), *others]).rstrip())
    return "\n".join(lines)
