"""Charts as SVG, for files or inside an HTML page, drawn without a display."""

import re
from html import escape
from io import StringIO
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

SIZE_INCHES = (7.2, 4.2)
NARROW_INCHES = (4.4, 3.6)
"""The size of a chart that stays legible on a phone, where it is as wide as the screen."""
POINTS_PER_INCH = 72
DATA, MODEL, MARK = "#1f5f8b", "#c8553d", "#3c3c3c"
"""The colours of measurements, of what is fitted to them, and of what a chart points out."""


def new_chart(
    title: str, x_label: str, y_label: str, size_inches: tuple[float, float] = SIZE_INCHES
) -> tuple[Figure, Axes]:
    """Return an empty chart and its axes."""
    figure = Figure(figsize=size_inches, layout="constrained")
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


def inline_chart(figure: Figure, name: str, label: str) -> str:
    """Return an `<svg>` element for an HTML page, without a background; the same chart gives the same text.

    `name` must be unique in the page; `label` describes the chart for screen readers. The page sets size and font.
    """
    drawn = StringIO()
    with rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(drawn, format="svg", transparent=True, metadata=nothing)
    # Declarations and namespaces are for files only, and a size would keep the chart from shrinking.
    content = drawn.getvalue().partition("<svg ")[2].partition(">")[2]
    content = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", content)
    width, height = figure.get_size_inches() * POINTS_PER_INCH
    return f'<svg role="img" aria-label="{escape(label)}" viewBox="0 0 {width:g} {height:g}">{content.strip()}'
