"""One table, three renderings: for the terminal (rich), for RESULTS.md (Markdown) and for the report (HTML)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any, Generic

from rich import table as rich
from rich.text import Text

from .rows import R, Row

__all__ = ["Cell", "Column", "Table", "short"]

Cell = str | None
"""None: there is nothing that could be said; in Markdown such a cell takes no room."""


@dataclass(frozen=True)
class Column(Generic[R]):
    heading: Cell
    cell: Callable[[Row[R]], Cell]
    missing: Cell = None
    """What is said of a row that has no records yet."""
    always: bool = False
    """`cell` knows what to say of a row without records."""


@dataclass
class Table:
    """Cells in lines. The first column is aligned at its left, the others, numbers, at their right."""

    headings: Sequence[Cell]
    lines: list[tuple[str, Sequence[Cell]]] = field(default_factory=list)
    """Kind (the class in HTML) and cells."""
    title: str | None = None
    note: str | None = None
    """What is said below the table."""

    @classmethod
    def of(
        cls,
        columns: Sequence[Column[R]],
        rows: Sequence[Row[R]],
        best: str | None = None,
        title: str | None = None,
        note: str | None = None,
    ) -> Table:
        """The table of rows.

        Args:
            best: label of the row that is set off.
        """
        table = cls([c.heading for c in columns], title=title, note=note)
        for row in rows:
            kind = "teacher" if row.reference else "best" if row.label == best else ""
            cells = [c.cell(row) if row.records or c.always else c.missing for c in columns]
            table.lines.append((kind, cells))
        return table

    def markdown(self) -> Iterator[str]:
        yield _markdown(self.headings)
        yield "|---|" + "---:|" * (len(self.headings) - 1)
        for _, cells in self.lines:
            yield _markdown(cells)

    def html(self) -> Iterator[str]:
        headings = "".join(f"<th>{_html(h)}</th>" for h in self.headings)
        yield f'<div class="wide"><table><thead><tr>{headings}</tr></thead><tbody>'
        for kind, cells in self.lines:
            start = f'<tr class="{kind}">' if kind else "<tr>"
            yield start + "".join(f"<td>{_html(cell)}</td>" for cell in cells) + "</tr>"
        yield "</tbody></table></div>"
        if self.note:
            yield f'<p class="small">{escape(self.note, quote=False)}</p>'

    def terminal(self, **style: Any) -> rich.Table:
        """For rich's console; what looks like markup in names is text.

        Args:
            style: of :class:`rich.table.Table`.
        """
        table = rich.Table(
            title=None if self.title is None else Text(self.title, "table.title"),
            caption=None if self.note is None else Text(self.note, "table.caption"),
            **style,
        )
        for k, heading in enumerate(self.headings):
            table.add_column(Text(heading or ""), justify="right" if k else "left", no_wrap=k == 0)
        for _, cells in self.lines:
            table.add_row(*(Text(cell or "") for cell in cells))
        return table


def short(value: float | None, none: str = "–") -> str:
    """Three digits; thousands in full."""
    if value is None:
        return none
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _markdown(cells: Sequence[Cell]) -> str:
    return "|" + "".join(" |" if cell is None else f" {_one_line(cell)} |" for cell in cells)


def _one_line(cell: str) -> str:
    """A name with a bar or a line break is still one cell."""
    return " ".join(cell.splitlines()).replace("|", r"\|") if set(cell) & set("|\n\r") else cell


def _html(cell: Cell) -> str:
    return escape(cell or "").replace("\xa0", "&nbsp;")
