"""One page and its pictures from saved results: for a look, and for a paper."""

from __future__ import annotations

from pathlib import Path

__all__ = ["write"]


def write(directory: str | Path, out: str | Path | None = None) -> Path:
    """Writes report.html, which is whole in itself, and its pictures as pictures/*.png beside it.

    Needs the saved JSON alone, neither networks nor data.

    Args:
        directory: of `fastkd distill` (every result.json below it: ``<row>/seed<k>/result.json`` or
            ``seed<k>/result.json``) or of `fastkd grid` (``cells/<experiment>/<row>/<seed>.json``).
        out: the folder to write to; None: the same.

    Returns:
        The path of report.html.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no record, or one of a schema that this version does not know.
        ImportError: matplotlib or PyYAML is not installed.

    A file that cannot be read is left out, with a warning that names it, here and in the report.
    """
    try:
        import matplotlib  # noqa: F401
        import yaml  # noqa: F401
    except ImportError as error:
        raise ImportError(f'fastkd.report needs {error.name}: pip install "fastkd[distill]"') from error
    from . import html, plots, records

    saved = records.read(directory)
    out = Path(directory if out is None else out)
    (out / "pictures").mkdir(parents=True, exist_ok=True)
    styles = plots.styles(saved.sections)
    pictures = {}
    for section in saved.sections:
        # One section's pictures need no name in front.
        prefix = f"{section.name}-" if len(saved.sections) > 1 else ""
        pictures[section.name] = plots.draw(section, styles, prefix)
        for picture in pictures[section.name]:
            (out / "pictures" / f"{picture.name}.png").write_bytes(picture.png)
    page = out / "report.html"
    page.write_text(html.page(saved, pictures), encoding="utf-8")
    return page
