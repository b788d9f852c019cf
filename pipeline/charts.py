"""Charts as SVG files, drawn without a display."""

from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

SIZE_INCHES = (7.2, 4.2)
DATA, MODEL, MARK = "#1f5f8b", "#c8553d", "#3c3c3c"
"""Colours: of what was measured, of what is made of it, and of what a chart points at."""


def new_chart(title: str, x_label: str, y_label: str) -> tuple[Figure, Axes]:
    """An empty chart, and the axes to draw on."""
    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize="medium")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def save_chart(figure: Figure, path: Path) -> None:
    """Write an SVG; the same chart gives the same bytes."""
    with rc_context({"svg.hashsalt": path.name}):
        figure.savefig(path, format="svg", metadata={"Date": None})
