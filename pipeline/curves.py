"""Loss curves: the points of a fine-tuning, and the CSV files that hold them."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.files import write_csv

Point = tuple[int, float]
"""An optimizer step, and the loss there in nats per token."""


@dataclass
class Curves:
    """The losses of one fine-tuning."""

    train: list[Point] = field(default_factory=list)
    validation: list[Point] = field(default_factory=list)

    @property
    def best_validation(self) -> Point:
        """The step and loss of the best checkpoint; the untrained base, at step 0, is not one."""
        return min(self.validation[1:], key=lambda point: point[1])


def write_curve(path: Path, points: Sequence[Point]) -> None:
    """Write a CSV file with the columns `step` and `loss`."""
    write_csv(path, [("step", "loss"), *points])


def read_curve(path: Path) -> list[Point]:
    """Return the points that `write_curve` wrote to a file."""
    return parse_curve(path.read_text(encoding="utf-8"))


def parse_curve(text: str) -> list[Point]:
    """Return the points in the text of such a file."""
    return [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(text.splitlines())]
