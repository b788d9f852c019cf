"""Progress bars on a terminal."""

import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def progress(
    items: Iterable[Item] | None = None,
    *,
    description: str | None,
    unit: str = "it",
    total: int | None = None,
    initial: int = 0,
    unit_scale: bool = False,
) -> "tqdm[Item]":
    """Return a progress bar on stderr, which shows nothing if stderr is not a terminal or `description` is None.

    Iterate over it, or without `items` enter it as a context and call `update(count)`. `total` is the number of items
    if `items` does not know it, and `initial` how many were done before. `unit_scale` shortens large numbers (1.2M).
    """
    return tqdm(
        items,
        desc=description,
        unit=unit,
        unit_scale=unit_scale,
        total=total,
        initial=initial,
        disable=description is None or not sys.stderr.isatty(),
    )
