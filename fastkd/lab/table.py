"""One table, three renderings: for the terminal (rich), for RESULTS.md (Markdown) and for the report (HTML)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any, Generic, TypeVar

from rich import table as rich
from rich.text import Text

__all__ = ["Column", "Table", "short"]

L = TypeVar("L")
Cell = str | None
"""None: there is nothing that could be said; in Markdown such a cell takes no room."""


@dataclass(frozen=True)
class Column(Generic[L]):
    heading: Cell
    cell: Callable[[L], Cell]
    """Of a line: a row of records, a network, or whatever else the table is about."""
    left: bool = False
    whole: bool = False
    """Not broken where the terminal is narrow."""
    missing: Cell = None
    """What is said of a line that has no records yet."""
    always: bool = False
    """`cell` knows what to say of a line without records."""


@dataclass
class Table:
    columns: Sequence[Column[Any]]
    lines: list[tuple[str, Sequence[Cell]]] = field(default_factory=list)
    """Kind (the class in HTML) and cells."""
    title: str | None = None
    note: str | None = None
    """What is said below the table."""

    @classmethod
    def of(
        cls,
        columns: Sequence[Column[L]],
        lines: Sequence[L],
        *,
        kind: Callable[[L], str] = lambda line: "",
        empty: Callable[[L], bool] = lambda line: False,
        title: str | None = None,
        note: str | None = None,
    ) -> Table:
        """The table of lines.

        Args:
            kind: of a line.
            empty: whether a line has no records yet.
        """
        cells = [[c.missing if empty(line) and not c.always else c.cell(line) for c in columns] for line in lines]
        return cls(columns, list(zip(map(kind, lines), cells, strict=True)), title, note)

    def markdown(self) -> Iterator[str]:
        yield _markdown([column.heading for column in self.columns])
        yield "|" + "".join("---|" if column.left else "---:|" for column in self.columns)
        for _, cells in self.lines:
            yield _markdown(cells)

    def html(self) -> Iterator[str]:
        headings = "".join(f"<th>{_html(column.heading)}</th>" for column in self.columns)
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
        for c in self.columns:
            table.add_column(Text(c.heading or ""), justify="left" if c.left else "right", no_wrap=c.whole)
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
