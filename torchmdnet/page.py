"""One look for the pages and plots that are written: colours, styles, and the pieces of a page."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "BLUE",
    "COLOURS",
    "CSS",
    "GREY",
    "ORANGE",
    "STYLE",
    "cards",
    "cloud",
    "document",
    "escape",
    "grid",
    "image",
    "new_figure",
    "png",
    "table",
]

BLUE, ORANGE, GREY = "#2f6fb0", "#d9822b", "#8a8f98"
#: Of the curves of a panel, in this order.
COLOURS = (BLUE, ORANGE, "#3f9b57", "#a2478f", "#7a6a4f", GREY)

#: Above this many points a cloud is drawn as its density.
MANY_POINTS = 3_000

STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e8eb",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.edgecolor": "#5a6069",
    "legend.frameon": False,
    "figure.facecolor": "white",
}

CSS = """
:root { color-scheme: light dark;
  --ink: #1d2126; --dim: #5d6570; --line: #dfe3e8; --paper: #fff; --card: #f5f7f9; --accent: #2f6fb0 }
@media (prefers-color-scheme: dark) { :root {
  --ink: #e7eaee; --dim: #a2abb6; --line: #3a414a; --paper: #16191d; --card: #1f242a; --accent: #7fb2e6 } }
* { box-sizing: border-box }
body { font: 15px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  margin: 0 auto; max-width: 1080px; padding: 2rem 1.2rem 4rem }
h1 { font-size: 1.6rem; margin: 0 }
h2 { font-size: 1.1rem; margin: 2.4rem 0 .7rem }
p.sub { color: var(--dim); margin: .2rem 0 1.4rem }
.cards { display: flex; flex-wrap: wrap; gap: .8rem }
.card { background: var(--card); border-radius: 10px; padding: .8rem 1.1rem; min-width: 11rem; flex: 1 }
.card b { display: block; font-size: 1.35rem }
.card span { color: var(--dim); font-size: .85rem }
table { border-collapse: collapse; width: 100% }
td, th { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top }
th { color: var(--dim); font-weight: 600 }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
tr.set td:first-child { font-weight: 600; color: var(--accent) }
img { max-width: 100%; border-radius: 8px; background: #fff; border: 1px solid var(--line) }
pre { background: var(--card); padding: .9rem 1.1rem; border-radius: 8px; overflow-x: auto; font-size: .88rem }
code { font-size: .9em; overflow-wrap: anywhere }
details summary { cursor: pointer; color: var(--dim) }
.scroll { overflow-x: auto }
"""


def png(figure: Figure) -> bytes:
    """A figure as PNG."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def new_figure(panels: int, width: float, height: float, columns: int = 3) -> tuple[Figure, list[Axes]]:
    """A figure of several panels in rows; two rows where one would be too wide."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = -(-panels // columns)
    columns = -(-panels // rows)
    figure = Figure(figsize=(width * columns, height * rows), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(np.atleast_1d(figure.subplots(rows, columns)).flat)


def escape(value: Any) -> str:
    """Text as it stands in a page."""
    return html.escape(str(value))


def document(title: str, parts: Iterable[str]) -> str:
    """A page that needs no other file."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def table(rows: Iterable[tuple[Any, Any]]) -> str:
    """Names and values."""
    body = "".join(f"<tr><td>{escape(key)}</td><td>{escape(value)}</td></tr>" for key, value in rows)
    return f'<div class="scroll"><table>{body}</table></div>'


def grid(header: Iterable[Any], rows: Iterable[Iterable[Any]], numbers_from: int | None = None) -> str:
    """A table with a row of headings; columns from ``numbers_from`` on are aligned to the right."""

    def cell(tag: str, number: int, value: Any) -> str:
        kind = ' class="n"' if numbers_from is not None and number >= numbers_from else ""
        return f"<{tag}{kind}>{escape(value)}</{tag}>"

    head = "".join(cell("th", number, word) for number, word in enumerate(header))
    body = "".join(
        "<tr>" + "".join(cell("td", number, value) for number, value in enumerate(row)) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def cards(pairs: Iterable[tuple[Any, Any]]) -> str:
    """Large numbers with what they are."""
    inside = "".join(
        f'<div class="card"><b>{escape(big)}</b><span>{escape(small)}</span></div>' for big, small in pairs
    )
    return f'<div class="cards">{inside}</div>'


def image(png: bytes, title: str) -> str:
    """A picture inside the page."""
    data = base64.b64encode(png).decode()
    return f'<img alt="{escape(title)}" src="data:image/png;base64,{data}">'


def cloud(axis: Axes, reference: np.ndarray, predicted: np.ndarray) -> None:
    """Predictions against references on equal axes: points, or their density where there are many.

    Args:
        axis: Where to draw.
        reference: (P,).
        predicted: (P,); pairs that are no numbers are left out.
    """
    fine = np.isfinite(reference) & np.isfinite(predicted)
    reference, predicted = reference[fine], predicted[fine]
    if not len(reference):
        return
    low, high = min(reference.min(), predicted.min()), max(reference.max(), predicted.max())
    margin = 0.03 * (high - low) or 1.0
    limits = (float(low - margin), float(high + margin))
    if len(reference) > MANY_POINTS:
        cloud = axis.hexbin(
            reference, predicted, gridsize=90, extent=(*limits, *limits), bins="log", mincnt=1, cmap="viridis",
            linewidths=0.1,
        )  # fmt: skip
        axis.figure.colorbar(cloud, ax=axis, label="number of points", shrink=0.7, pad=0.02)
    else:
        axis.scatter(reference, predicted, s=12, alpha=0.5, color=BLUE, edgecolors="none")
    axis.plot(limits, limits, color="black", linewidth=0.8, linestyle="--", zorder=3)
    axis.set_xlim(limits)
    axis.set_ylim(limits)
    axis.set_aspect("equal")
    axis.locator_params(nbins=6)
