"""One page and its pictures from saved results: for a look, and for a paper."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from .._text import installs
from ..runtime import atomic

__all__ = ["write"]


def write(directory: str | Path, out: str | Path | None = None) -> Path:
    """Writes report.html, which is whole in itself, and its pictures as pictures/*.png beside it.

    Needs the saved JSON alone, neither networks nor data. A file that is there is replaced as a whole; where it is a
    symbolic link, the link is, and not what it points to.

    Args:
        directory: of `fastkd distill` or `fastkd compress` (every result.json below it, ``<row>/seed<k>/result.json``
            or ``seed<k>/result.json``), or of `fastkd grid` (``cells/<experiment>.jsonl``).
        out: the folder to write to; None: the same.

    Returns:
        The path of report.html.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no record, or one of a schema that this version does not know; `out`'s pictures/ is a
            symbolic link.
        ImportError: matplotlib, PyYAML or pydantic is not installed.

    A record that cannot be read is left out, with a warning that names it, here and in the report.
    """
    try:
        import matplotlib  # noqa: F401
        import pydantic  # noqa: F401
        import yaml  # noqa: F401
    except ImportError as error:
        raise ImportError(f"fastkd.report needs {error.name}: {installs('distill')}") from error
    from . import html, plots, records
    from .studies import study_of

    saved = records.read(directory)
    out = Path(directory if out is None else out)
    folder = out / "pictures"
    if folder.is_symlink():
        raise ValueError(
            f"{folder} is a symbolic link, and nothing is written through it: delete it, or take another --out"
        )
    styles = plots.styles(saved.sections)
    figures: dict[str, list[str]] = {}
    for section in saved.sections:
        # One section's pictures need no name in front.
        prefix = f"{section.name}-" if len(saved.sections) > 1 else ""
        figures[section.name] = []
        with plots.settings():
            for drawing in study_of(section).pictures(section, styles):
                drawing.name = prefix + drawing.name
                figures[section.name].append(html.figure(drawing))
                atomic.replace(folder / f"{drawing.name}.png", partial(Path.write_bytes, data=drawing.png()))
    page = out / "report.html"
    atomic.replace(page, lambda path: path.write_text(html.page(saved, figures), encoding="utf-8"))
    return page
