"""Progress bars on a terminal, and elsewhere a line per minute."""

import math
import sys
from collections.abc import Callable, Iterable
from typing import TextIO, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

LINE_S = 60
"""The seconds until a first line, and between lines."""


class _Lines(tqdm):
    """A bar that is printed as lines, for logs."""

    @staticmethod
    def status_printer(file: TextIO) -> Callable[[str], None]:
        return lambda line: print(line, file=file, flush=True)

    def close(self) -> None:
        self.delay = math.inf  # nothing is to be cleared
        super().close()


def progress(
    items: Iterable[Item] | None = None,
    *,
    description: str | None,
    unit: str = "it",
    total: int | None = None,
    initial: int = 0,
    unit_scale: bool = False,
) -> "tqdm[Item]":
    """Return a progress bar on stderr; if that is not a terminal, it is a line per minute. None describes no bar.

    Iterate over it, or without `items` enter it as a context and call `update(count)`. `total` is the number of items
    if `items` does not know it, and `initial` how many were done before. `unit_scale` shortens large numbers (1.2M).
    """
    options = {"desc": description, "unit": unit, "unit_scale": unit_scale, "total": total, "initial": initial}
    if description is None or sys.stderr.isatty():
        return tqdm(items, disable=description is None, **options)
    form = "{desc}: {n_fmt} of {total_fmt} {unit}, {rate_fmt}, {remaining} left{postfix}"
    return _Lines(items, bar_format=form, delay=LINE_S, mininterval=LINE_S, maxinterval=LINE_S, miniters=1, **options)
