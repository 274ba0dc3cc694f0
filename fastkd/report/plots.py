"""What the report's pictures share: PNG for papers, SVG that takes on the page's colours, a style per row."""

from __future__ import annotations

import contextlib
import io
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot nothing but Agg and SVG is ever used

from ..lab.rows import Section

__all__ = [
    "DASHED",
    "GREY",
    "INK",
    "PALETTE",
    "RING",
    "WIDTH",
    "Drawing",
    "Style",
    "axes",
    "name_of",
    "settings",
    "styles",
]

INK = "#1b1b1e"  # in the SVG: the page's own text colour
GREY = "#858585"  # what the others are compared with; readable on light and on dark
# Okabe and Ito's, told apart by colour-blind eyes, without those too pale on white.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.5, 1.2, 1.5)))
DASHED = (0, (2, 2))  # of a teacher, or a full network
WIDTH = 7.0  # inches: a page's text width
SETTINGS: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "lines.linewidth": 1.4,
    "axes.grid": True,
    "grid.color": GREY,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.titlelocation": "left",
    "figure.constrained_layout.use": True,
    "svg.fonttype": "path",
}

Style = dict[str, Any]
RING: Style = {"markersize": 9, "markerfacecolor": "none", "markeredgecolor": PALETTE[1], "markeredgewidth": 1.8}


@dataclass
class Drawing:
    """What a study draws; it is drawn, and rendered, under :func:`settings`."""

    name: str
    """Of its file, without .png."""
    title: str
    figure: Figure
    caption: str
    texts: list[str] = field(default_factory=list)
    """What is said over the points of the collection whose gid is "points"."""
    on_paper: bool = False
    """Its colours are for a white ground, in dark mode too."""

    def png(self) -> bytes:
        file = io.BytesIO()
        self.figure.savefig(file, format="png", dpi=300, facecolor="white")
        return file.getvalue()

    def svg(self) -> str:
        """An element for an HTML page: no XML header, no name spaces, no fixed size, the text in its colour."""
        # Ids of clip paths are unique on the page and the same in every run.
        matplotlib.rcParams["svg.hashsalt"] = self.name
        file = io.StringIO()
        self.figure.savefig(file, format="svg", dpi=200, transparent=True, metadata={"Date": None})
        text = file.getvalue()
        text = text[text.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
        text = re.sub(r' id="(?:figure|axes|axis|patch|line2d|text|xtick|ytick|matplotlib\.axis|legend)_\d+"', "", text)
        if self.texts:
            text = _titled(text, iter(self.texts))
        head, body = text.split(">", 1)
        box = re.search(r'viewBox="[^"]+"', head)
        assert box is not None
        text = f'<svg {box[0]} role="img" aria-label="{self.title}">{body}'
        return re.sub(r"\n\s*\n+", "\n", text).replace(INK, "currentColor").strip()


@contextlib.contextmanager
def settings() -> Iterator[None]:
    """The report's, whatever the user's are."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(SETTINGS)
        yield


def axes(
    height: float, lines: int = 1, columns: int = 1, width: float = WIDTH, sharex: bool = False, sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    """A new figure, and its axes line by line."""
    figure = Figure(figsize=(width, height))
    return figure, list(figure.subplots(lines, columns, squeeze=False, sharex=sharex, sharey=sharey).flat)


def styles(sections: Sequence[Section[Any]]) -> dict[str, Style]:
    """Colour and dashes of every row, by its label: the same in all pictures."""
    out: dict[str, Style] = {}
    unused = ({"color": color, "linestyle": dashes} for dashes in itertools.cycle(DASHES) for color in PALETTE)
    for row in (row for section in sections for row in section.rows):
        if row.label not in out:
            plain = row.records and row.records[0].plain
            out[row.label] = {"color": GREY, "linestyle": "-"} if plain else next(unused)
    return out


def name_of(label: str) -> str:
    """A label that is never so long that it leaves no room for what it names, and never a formula."""
    return (label if len(label) <= 28 else f"{label[:17]}…{label[-10:]}").replace("$", r"\$")


def _titled(text: str, titles: Iterator[str]) -> str:
    """Every point of the collection gets a title, which a browser shows when it is hovered over."""
    start = text.index('<g id="points">')
    end = text.index("</g>\n   </g>", start) if "</g>\n   </g>" in text[start:] else text.index("</g>", start)
    points = re.sub(
        r"(<use [^>]*?)/>", lambda use: f"{use[1]}><title>{escape(next(titles))}</title></use>", text[start:end]
    )
    return text[:start] + points.replace(' id="points"', "") + text[end:]
