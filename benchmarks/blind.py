"""Compare decodings by reading, without knowing which is which.

`prepare` writes a sheet of samples under letters, a file for the answers, and a key that is kept elsewhere. A person or
a program reads the sheet and writes the letters from best to worst. `score` says which system was preferred.
"""

import argparse
import csv
import hashlib
import json
import random
import re
import string
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import binomtest, kendalltau, spearmanr

from pipeline.errors import UserError, report_errors
from pipeline.files import read_json, whole_file, whole_folder, write_csv, write_json
from pipeline.quality.jackknife import Interval, jackknife_interval

SHEET = "sheet.md"
ANSWERS = "answers.csv"
COLUMNS = ("item", "order")

Samples = dict[str, list[str]]
"""The samples of a system by prompt, in the order of the file."""


@dataclass(frozen=True)
class Item:
    """Samples of one prompt, to be put in order."""

    item: int
    prompt: str
    sample: int
    """Which of each system's samples of the prompt, from 0."""
    order: tuple[str, ...]
    """The systems under the letters A, B, ..."""

    @property
    def letters(self) -> str:
        return string.ascii_uppercase[: len(self.order)]


class Reading(NamedTuple):
    """The answer to an item: the rank of each system, 1 for the best; tied systems share the mean of their ranks."""

    prompt: str
    ranks: dict[str, float]


class Wins(NamedTuple):
    """How often one system was preferred to another."""

    wins: int
    ties: int
    losses: int

    def share(self) -> Interval:
        """Return the share of wins among the items without a tie, with its Clopper-Pearson interval of 95 %."""
        test = binomtest(self.wins, self.wins + self.losses)
        low, high = test.proportion_ci(0.95, method="exact")
        return Interval(test.statistic, float(low), float(high))

    def sign_test(self) -> float:
        """Return the two-sided p-value of the sign test, which leaves ties out."""
        decided = self.wins + self.losses
        return float(binomtest(self.wins, decided).pvalue) if decided else 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)

    prepare_parser = commands.add_parser("prepare", help="write a sheet, a file for the answers, and the key")
    prepare_parser.add_argument("out", type=Path, metavar="OUT", help=f"a new folder for {SHEET} and {ANSWERS}")
    prepare_parser.add_argument("--samples", nargs="+", required=True, metavar="FILE[:SYSTEM]",
                                help="out/evaluate/samples.jsonl and a system in it; all systems in it if unset. "
                                "Two systems make pairs, more make sets to be ranked")  # fmt: skip
    prepare_parser.add_argument("--key", type=Path, required=True, metavar="FILE",
                                help="the file for the key, outside OUT")  # fmt: skip
    size = prepare_parser.add_mutually_exclusive_group()
    size.add_argument("--pairs", type=int, default=30, metavar="N",
                      help="pairs (or sets); a prompt comes again, with other samples, if there are fewer prompts "
                      "(default: %(default)s)")  # fmt: skip
    size.add_argument("--prompts", type=int, metavar="N", help="prompts, each of which comes once")
    prepare_parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    prepare_parser.set_defaults(run=run_prepare)

    score_parser = commands.add_parser("score", help="count which system was preferred")
    score_parser.add_argument("answers", type=Path, metavar="ANSWERS", help=f"the {ANSWERS} that was filled in")
    score_parser.add_argument("key", type=Path, metavar="KEY", help="the key that prepare wrote")
    score_parser.add_argument("--against", metavar="NAME=VALUE,...",
                              help="numbers by system, smaller is better, whose order is compared with the reader's; "
                              "takes three systems")  # fmt: skip
    score_parser.set_defaults(run=run_score)

    arguments = parser.parse_args()
    with report_errors():
        arguments.run(arguments)


def run_prepare(arguments: argparse.Namespace) -> None:
    repeats = arguments.prompts is None
    prepare(arguments.out, arguments.samples, arguments.key, count=arguments.pairs if repeats else arguments.prompts,
            repeats=repeats, seed=arguments.seed)  # fmt: skip


def run_score(arguments: argparse.Namespace) -> None:
    items = read_key(arguments.key)
    readings = read_answers(arguments.answers, items)
    print(f"{len(readings)} of {len(items)} items answered")
    systems = sorted(items[0].order)
    if len(systems) == 2:
        if arguments.against is not None:
            raise UserError("--against: a rank correlation takes three systems; this key has two")
        lines = describe_pair(readings, *systems)
    else:
        numbers = None if arguments.against is None else read_numbers(arguments.against, systems)
        lines = describe_ranking(readings, systems, numbers)
    print("\n".join(lines))


# prepare


def prepare(out: Path, sources: Sequence[str], key: Path, *, count: int, repeats: bool, seed: int) -> None:
    """Write the sheet and the file for the answers into `out`, and the key elsewhere.

    Raises `UserError` if anything would be overwritten, or the key would be in `out`.
    """
    if count < 1:
        raise UserError(f"{'--pairs' if repeats else '--prompts'}: must be at least 1, not {count}")
    if key.resolve().is_relative_to(out.resolve()):
        raise UserError(f"--key: {key} is in {out}, where the reader would find it; name a file elsewhere")
    if key.exists():
        raise UserError(f"--key: {key} exists already; name another file")
    if out.exists():
        raise UserError(f"{out} exists already; name a new folder")
    samples = read_systems(sources)
    generator = random.Random(seed)
    chosen = choose_samples(list(samples.values()), count, generator, repeats=repeats)
    if not chosen:
        raise UserError(f"--samples: {', '.join(samples)} have no prompt in common")
    orders = draw_orders(list(samples), len(chosen), generator)
    items = [
        Item(number, prompt, sample, order)
        for number, ((prompt, sample), order) in enumerate(zip(chosen, orders, strict=True), start=1)
    ]
    with whole_folder(out) as folder:
        with whole_file(folder / SHEET) as partial:
            partial.write_text(write_sheet(items, samples), encoding="utf-8", newline="\n")
        write_csv(folder / ANSWERS, [COLUMNS, *((each.item, "") for each in items)])
        write_json(key, {"sheet": identify(items), "items": [asdict(each) for each in items]})
    kind = "pairs" if len(samples) == 2 else f"sets of {len(samples)}"
    if len(items) < count:
        print(f"only {len(items)} {kind}, not {count}: the systems share no more "
              f"{'samples of the same prompt' if repeats else 'prompts'}", file=sys.stderr)  # fmt: skip
    print(f"{len(items)} {kind} of {len({each.prompt for each in items})} prompts: read {out / SHEET}, "
          f"fill in {out / ANSWERS}, keep {key} for the score")  # fmt: skip


def read_systems(sources: Sequence[str]) -> dict[str, Samples]:
    """Return the samples of each `FILE[:SYSTEM]`, by the system's name.

    If two files have systems of one name, their names are `FILE:SYSTEM`.
    """
    found: list[tuple[str, str, Samples]] = []
    for source in sources:
        file, _, name = (source, "", "") if Path(source).is_file() else source.rpartition(":")
        held = read_samples(Path(file or source))
        if name and name not in held:
            raise UserError(f"--samples: {file} holds no system {name!r}; it holds {', '.join(held)}")
        found += [(file, each, held[each]) for each in ([name] if name else held)]
    names = [name for _, name, _ in found]
    systems: dict[str, Samples] = {}
    for file, name, samples in found:
        label = name if names.count(name) == 1 else f"{file}:{name}"
        if label in systems:
            raise UserError(f"--samples: {label} comes twice")
        systems[label] = samples
    if not 2 <= len(systems) <= len(string.ascii_uppercase):
        raise UserError(f"--samples: takes 2 to {len(string.ascii_uppercase)} systems, there are {len(systems)}")
    return systems


def read_samples(path: Path) -> dict[str, Samples]:
    """Return the samples in a `samples.jsonl`, by system. Raises `UserError` for a row that is no sample."""
    systems: dict[str, Samples] = {}
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                system, prompt, text = (str(row[name]) for name in ("system", "prompt", "text"))
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(f"{path}, line {number}: is no JSON object with system, prompt and text") from error
            systems.setdefault(system, {}).setdefault(prompt, []).append(text)
    if not systems:
        raise UserError(f"{path}: is empty")
    return systems


def choose_samples(
    systems: Sequence[Samples], count: int, generator: random.Random, *, repeats: bool
) -> list[tuple[str, int]]:
    """Return at most `count` prompts that all systems have, each with the place of its samples.

    In random order; with `repeats`, a prompt comes again, with the next samples, when all prompts have come.
    """
    held = {prompt: min(len(own.get(prompt, ())) for own in systems) for prompt in systems[0]}
    chosen: list[tuple[str, int]] = []
    for sample in range(max(held.values(), default=0) if repeats else 1):
        turn = [(prompt, sample) for prompt, size in held.items() if size > sample]
        generator.shuffle(turn)
        chosen += turn
    return chosen[:count]


def draw_orders(systems: Sequence[str], count: int, generator: random.Random) -> list[tuple[str, ...]]:
    """Return `count` random orders of the systems, in which each is at each place equally often, give or take one.

    Readers like what they read first, or last; so no system may have that place more often.
    """
    orders: list[tuple[str, ...]] = []
    while len(orders) < count:
        first = generator.sample(systems, len(systems))
        orders += [(*first[turn:], *first[:turn]) for turn in range(len(systems))]
    orders = orders[:count]
    generator.shuffle(orders)
    return orders


def write_sheet(items: Sequence[Item], samples: Mapping[str, Samples]) -> str:
    """Return the sheet: each prompt, and its samples under letters."""
    letters = items[0].letters
    parts = [
        title_of(items),
        f"Each item is the beginning of a text and {len(letters)} continuations of it. Write the letters of the "
        f"continuations, from best to worst, into {ANSWERS}: `{letters[::-1]}` if {letters[-1]} is best and "
        f"{letters[0]} worst. `=` is between letters that are equally good: `{'='.join(letters)}`.",
    ]
    for item in items:
        parts += [f"## {item.item}", quote(item.prompt)]
        for letter, system in zip(item.letters, item.order, strict=True):
            parts += [f"### {item.item} {letter}", quote(samples[system][item.prompt][item.sample])]
    return "\n\n".join(parts) + "\n"


def quote(text: str) -> str:
    """Return a text as a quotation in Markdown, so that nothing in it looks like a part of the sheet."""
    return "\n".join(f"> {line}" for line in re.split(r"\r\n|[\n\r]", text)) if text.strip() else "(no text)"


def title_of(items: Sequence[Item]) -> str:
    return f"# Sheet {identify(items)}"


def identify(items: Sequence[Item]) -> str:
    """Return a short name by which a sheet and its key are recognized."""
    return hashlib.sha256(json.dumps([asdict(each) for each in items]).encode()).hexdigest()[:8]


# score


def read_key(path: Path) -> list[Item]:
    """Return the items in a key. Raises `UserError` if the file is no key."""
    try:
        key: Any = read_json(path)
        items = [Item(**{**row, "order": tuple(row["order"])}) for row in key["items"]]
        is_key = len(items) > 0 and identify(items) == key["sheet"]
    except (ValueError, TypeError, KeyError):
        is_key = False
    if not is_key:
        raise UserError(f"{path}: is no key that `prepare` wrote")
    return items


def read_answers(path: Path, items: Sequence[Item]) -> list[Reading]:
    """Return the answers in the order of the file, without the empty ones.

    Raises `UserError` for an answer that is no order, an item that is missing, unknown or there twice, and a sheet next
    to the answers that is not the one of the key.
    """
    check_sheet(path.with_name(SHEET), items)
    by_number = {str(item.item): item for item in items}
    readings: list[Reading] = []
    for place, number, order in read_orders(path):
        item = by_number.pop(number, None)
        if item is None:
            raise UserError(f"{place}: item {number!r} is not in the key, or is here twice")
        if not order:
            continue
        try:
            readings.append(Reading(item.prompt, read_ranks(order, item.order)))
        except UserError as error:
            raise UserError(f"{place}: item {number}: {error}") from error
    if by_number:
        raise UserError(f"{path}: misses the rows of the items {', '.join(by_number)}; leave the order of a row empty "
                        "if there is no answer")  # fmt: skip
    if not readings:
        raise UserError(f"{path}: no item is answered; write the letters from best to worst into the column order")
    return readings


def check_sheet(path: Path, items: Sequence[Item]) -> None:
    """Raise `UserError` if there is a sheet, and it is not the one of the key."""
    if path.is_file():
        with path.open(encoding="utf-8") as lines:
            title = lines.readline().strip()
        if title != title_of(items):
            raise UserError(f"{path}: begins with {title!r}, the key is of {title_of(items)!r}; name the key of this "
                            "sheet")  # fmt: skip


def read_orders(path: Path) -> Iterator[tuple[str, str, str]]:
    """Yield the place, the item and the order of each row. Spreadsheets may have put a byte-order mark before them."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        if not set(COLUMNS) <= set(rows.fieldnames or ()):
            raise UserError(f"{path}: the first line must be `{','.join(COLUMNS)}`")
        for row in rows:
            item, order = ((row[name] or "").strip() for name in COLUMNS)
            yield f"{path}, line {rows.line_num}", item, order


def read_ranks(answer: str, order: Sequence[str]) -> dict[str, float]:
    """Return the rank of each system from an answer such as `BA` or `A=B`; `order` has the systems by letter."""
    letters = string.ascii_uppercase[: len(order)]
    groups = re.findall(r"[A-Z](?:=[A-Z])*", written := re.sub(r"[\s>]", "", answer).upper())
    if "".join(groups) != written or sorted(written.replace("=", "")) != list(letters):
        raise UserError(f"{answer!r} is no order; expected the letters {', '.join(letters)}, once each, from best to "
                        "worst, with = between equal ones")  # fmt: skip
    ranks: dict[str, float] = {}
    for group in groups:
        tied = [order[letters.index(letter)] for letter in group.split("=")]
        ranks |= dict.fromkeys(tied, len(ranks) + (len(tied) + 1) / 2)
    return ranks


def read_numbers(text: str, systems: Sequence[str]) -> dict[str, float]:
    """Return the numbers by system in `NAME=VALUE,...`. Raises `UserError` for fewer than three, or an unknown name."""
    numbers: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.strip().rpartition("=")
        if name not in systems:
            raise UserError(f"--against: {part!r}: expected NAME=VALUE with one of {', '.join(systems)}")
        try:
            numbers[name] = float(value)
        except ValueError as error:
            raise UserError(f"--against: {name}: {value!r} is no number") from error
        if not np.isfinite(numbers[name]):
            raise UserError(f"--against: {name}: {value} is not finite")
    if len(numbers) < 3:
        raise UserError(f"--against: a rank correlation takes three systems at least, there are {len(numbers)}")
    return numbers


def count_wins(readings: Sequence[Reading], one: str, other: str) -> Wins:
    """Return how often `one` was preferred to `other`, was equally good, and was not preferred."""
    differences = [ranks[one] - ranks[other] for _, ranks in readings]
    return Wins(sum(each < 0 for each in differences), differences.count(0), sum(each > 0 for each in differences))


def mean_rank(readings: Sequence[Reading], system: str) -> float:
    return float(np.mean([ranks[system] for _, ranks in readings]))


def rank_interval(readings: Sequence[Reading], system: str) -> Interval:
    """Return the mean rank of a system, with the jackknife's interval of 95 %, which leaves each prompt out once."""
    prompts = dict.fromkeys(prompt for prompt, _ in readings)
    if len(prompts) < 2:
        raise UserError("the interval of a mean rank takes answers for two prompts at least, there is one")
    without = [mean_rank([each for each in readings if each.prompt != prompt], system) for prompt in prompts]
    return jackknife_interval(mean_rank(readings, system), np.array(without))


def rank_correlations(means: Mapping[str, float], numbers: Mapping[str, float]) -> tuple[float, float]:
    """Return Spearman's and Kendall's (tau-b) rank correlation of the mean ranks with the numbers of the same systems.

    1 if the reader orders the systems as the numbers do. Raises `UserError` if all are equal on either side.
    """
    pairs = [(means[name], number) for name, number in numbers.items()]
    readers, others = zip(*pairs, strict=True)
    if len(set(readers)) == 1 or len(set(others)) == 1:
        raise UserError("--against: there is no rank correlation if all numbers, or all mean ranks, are equal")
    return float(spearmanr(readers, others).statistic), float(kendalltau(readers, others).statistic)


def describe_pair(readings: Sequence[Reading], one: str, other: str) -> list[str]:
    """Return the lines that say which of two systems was preferred."""
    found = count_wins(readings, one, other)
    decided = found.wins + found.losses
    lines = [f"{one} preferred: {found.wins}, {other} preferred: {found.losses}, ties: {found.ties}"]
    if decided:
        share, low, high = found.share()
        lines.append(f"{one} preferred in {100 * share:.1f} % of the {decided} without a tie "
                     f"(95 % interval {100 * low:.1f} to {100 * high:.1f} %, Clopper-Pearson)")  # fmt: skip
    lines.append(f"sign test, two-sided, without ties: p = {found.sign_test():.3g}")
    if again := len(readings) - len({prompt for prompt, _ in readings}):
        lines.append(f"{again} answers are to prompts that come again; interval and test take them as independent")
    return lines


def describe_ranking(
    readings: Sequence[Reading], systems: Sequence[str], numbers: Mapping[str, float] | None
) -> list[str]:
    """Return the lines that say how the systems were ranked, best first."""
    intervals = {system: rank_interval(readings, system) for system in systems}
    ordered = sorted(systems, key=lambda system: intervals[system].estimate)
    lines = ["", "mean rank (95 % interval, jackknife over prompts)"]
    lines += align([[name, "{:.2f} ({:.2f} to {:.2f})".format(*intervals[name])] for name in ordered])
    lines += ["", "how often the row was preferred to the column (the rest are losses and ties)"]
    wins = [
        [name, *("-" if name == other else str(count_wins(readings, name, other).wins) for other in ordered)]
        for name in ordered
    ]
    lines += align([["", *ordered], *wins])
    if numbers is not None:
        means = {system: intervals[system].estimate for system in systems}
        spearman, kendall = rank_correlations(means, numbers)
        lines += ["", f"rank correlation of the mean ranks with the numbers, {len(numbers)} systems: "
                  f"Spearman {spearman:.2f}, Kendall {kendall:.2f}"]  # fmt: skip
    return lines


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table; its first column is aligned on the left, the others on the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]


if __name__ == "__main__":
    main()
