"""The page: one file that needs no network, on a phone or on paper, light or dark."""

from __future__ import annotations

import json
from collections.abc import Iterator
from html import escape
from typing import Any

import yaml

from ..lab.rows import Section
from .plots import Drawing
from .records import Saved
from .studies import study_of

__all__ = ["figure", "page"]

CSS = """
:root { color-scheme: light dark; --ground: #fff; --ink: #1b1b1e; --soft: #5c5c66; --rule: #d9d9de; --tint: #f5f5f7; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #16171a; --ink: #e6e6ea; --soft: #a2a2ad; --rule: #3a3b42; --tint: #1f2025; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 66rem; background: var(--ground); color: var(--ink);
  font: 1rem/1.55 system-ui, sans-serif; }
h1, h2, h3 { line-height: 1.2; margin: 2.2em 0 .6em; } h1 { margin-top: .5em; }
h2 { border-top: 1px solid var(--rule); padding-top: 1em; } h3 { font-size: 1.05rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .35em .5em; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--rule); }
th { font-weight: 600; vertical-align: bottom; white-space: normal; }
td:first-child, th:first-child { text-align: left; padding-left: 0; }
thead th { border-bottom: 1.5px solid var(--ink); } tr.teacher td { color: var(--soft); }
tr.best td { font-weight: 700; } .environment { width: auto; }
figure { margin: 0; } figure .wide > svg { display: block; width: 100%; min-width: 36rem; height: auto; }
.paper { background: #fff; color: #1b1b1e; border-radius: 4px; }
figcaption, .small { color: var(--soft); font-size: .85rem; }
.notice { background: var(--tint); border-left: 3px solid #d55e00; padding: .6em 1em; margin: 1em 0; }
.notice p { margin: .2em 0; overflow-wrap: anywhere; }
details { margin: .5em 0; } summary { cursor: pointer; }
pre { background: var(--tint); padding: 1em; overflow-x: auto; font-size: .82rem; line-height: 1.4; }
@media print { body { max-width: none; } figure { break-inside: avoid; } }
""".strip()


def page(saved: Saved, figures: dict[str, list[str]]) -> str:
    """All of it.

    Args:
        figures: by the section's name.
    """
    return "\n".join(_page(saved, figures)) + "\n"


def figure(drawing: Drawing) -> str:
    return (
        f'<h3>{escape(drawing.title)}</h3>\n<figure><div class="wide{" paper" if drawing.on_paper else ""}">'
        f"{drawing.svg()}</div>\n<figcaption>{escape(drawing.caption)} "
        f"<code>pictures/{escape(drawing.name)}.png</code></figcaption></figure>"
    )


def _page(saved: Saved, figures: dict[str, list[str]]) -> Iterator[str]:
    title = saved.sections[0].title if len(saved.sections) == 1 else saved.name
    yield f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>
{CSS}
</style>
<h1>{escape(title)}</h1>"""
    if saved.notices:
        yield '<div class="notice">' + "".join(f"<p>{escape(notice)}</p>" for notice in saved.notices) + "</div>"
    if len(saved.sections) > 1:
        links = (f'<a href="#section{i}">{escape(section.title)}</a>' for i, section in enumerate(saved.sections))
        yield "<ul>" + "".join(f"<li>{link}</li>" for link in links) + "</ul>"
    for i, section in enumerate(saved.sections):
        if len(saved.sections) > 1:
            yield f'<h2 id="section{i}">{escape(section.title)}</h2>'
        if section.note:
            yield f"<p>{escape(section.note)}</p>"
        study = study_of(section)
        yield f"<p>{escape(study.summary(section))}</p>"
        yield from study.table(section).html()
        yield from figures[section.name]
        yield from _configuration(section)
    yield from _environment(saved)
    yield "</html>"


def _configuration(section: Section[Any]) -> Iterator[str]:
    yield "<h3>Configuration</h3>"
    for row in section.done:
        seeds = f"seed{'s' if len(row.records) > 1 else ''} {', '.join(str(record.seed) for record in row.records)}"
        text = yaml.safe_dump(row.records[0].config, sort_keys=False, default_flow_style=None, width=100)
        yield f"<details><summary>{escape(row.label)}, {seeds}</summary><pre>{escape(text)}</pre></details>"


def _environment(saved: Saved) -> Iterator[str]:
    """Of all runs: a value that is not the same everywhere is shown with all it was."""
    values: dict[str, dict[str, None]] = {}
    for section in saved.sections:
        for record in section.records:
            for key, value in record.environment.items():
                text = value if isinstance(value, str) else json.dumps(value)
                values.setdefault(key, {})[text] = None
    if not values:
        return
    yield '<h2>Environment</h2>\n<div class="wide"><table class="environment"><tbody>'
    for key, found in values.items():
        yield f"<tr><td>{escape(key)}</td><td>{escape(' / '.join(sorted(found)))}</td></tr>"
    yield "</tbody></table></div>"
