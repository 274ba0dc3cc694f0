"""The page: one file that needs no network, on a phone or on paper, light or dark."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from html import escape

import yaml

from . import compression
from .compression import Comparison
from .estimates import short
from .plots import Picture
from .records import Network, Row, Saved, Section, median, ratio

__all__ = ["page"]

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


def page(saved: Saved, pictures: dict[str, list[Picture]]) -> str:
    """All of it.

    Args:
        pictures: by the section's name.
    """
    return "\n".join(_page(saved, pictures)) + "\n"


def _page(saved: Saved, pictures: dict[str, list[Picture]]) -> Iterator[str]:
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
        yield (
            "<ul>"
            + "".join(
                f'<li><a href="#section{i}">{escape(section.title)}</a></li>'
                for i, section in enumerate(saved.sections)
            )
            + "</ul>"
        )
    for i, section in enumerate(saved.sections):
        if len(saved.sections) > 1:
            yield f'<h2 id="section{i}">{escape(section.title)}</h2>'
        if section.note:
            yield f"<p>{escape(section.note)}</p>"
        if isinstance(section, Comparison):
            yield f"<p>{escape(compression.summary(section))}</p>"
            yield from compression.tables(section)
        else:
            yield f"<p>{escape(summary(section))}</p>"
            yield from _table(section)
        for picture in pictures[section.name]:
            yield from _figure(picture)
        yield from _configuration(section)
    yield from _environment(saved)
    yield "</html>"


def summary(section: Section) -> str:
    """What the numbers say, and what they do not."""
    rows, alone, best = section.done, section.alone, section.best
    teachers = section.teachers()
    out = []
    if len(teachers) == 1:
        networks = teachers["teacher"]
        sizes = sorted({row.runs[0].student.parameters for row in rows})
        size = f"{sizes[0]:,}" + (f" to {sizes[-1]:,}" if len(sizes) > 1 else "")
        share = f" ({ratio(networks[0].parameters / sizes[0])} of the teacher's)" if len(sizes) == 1 else ""
        out.append(
            f"The teacher reaches {statistics.mean(n.test for n in networks):.2f} % on the test part with "
            f"{networks[0].parameters:,} parameters; the students have {size}{share}."
        )
    if alone is None:
        out.append(f"{_result(best, 'The best row')}. There is no run of the student alone to compare it with.")
    elif len(rows) == 1:
        out.append(f"{_result(alone, 'The student')}. There is no distilled student to compare it with.")
    elif best is alone:
        second = max((row for row in rows if row is not alone), key=lambda row: row.test.mean)
        out.append(
            f"No distilled student is better on average than {alone.label} ({alone.test} %); next is "
            f"{second.label} with {second.test} %. {_verdict(second, alone)}"
        )
    else:
        difference = best.test.mean - alone.test.mean
        out.append(
            f"{_result(best, f'Best of {len(rows)} rows')}, {difference:.2f} points above {alone.label} "
            f"({alone.test} %). {_verdict(best, alone)}"
        )
        several = [row for row in rows if row.test.half is not None and row is not alone]
        if best.test.half is None and alone.test.half is not None and several:
            sure = max(several, key=lambda row: row.test.mean)
            out.append(f"Of the rows with several seeds, {_result(sure, 'the best')}. {_verdict(sure, alone)}")
    near = [row.label for row in rows if row not in (best, alone) and row.test.overlaps(best.test)]
    if near and best is not alone:
        out.append(f"The interval of {best.label} also overlaps with {_and(near)}.")
    if len(rows) > 1:
        chosen = max(rows, key=lambda row: row.val.mean)
        out.append(
            f"{best.label} is also the best by validation score."
            if chosen is best
            else f"By validation score the best is {chosen.label}, with {chosen.test} % on the test part."
        )
    return " ".join(out)


def _result(row: Row, what: str) -> str:
    test, n = row.test, len(row.runs)
    how = "a single seed" if n == 1 else f"mean and 95 % interval of {n} seeds"
    return f"{what} is {row.label} with {test} % ({how})"


def _verdict(a: Row, b: Row) -> str:
    overlap = a.test.overlaps(b.test)
    if overlap is None:
        return "With a single seed there is no interval, so nothing can be said about chance."
    return (
        "The two 95 % intervals overlap: the difference may be chance."
        if overlap
        else "The two 95 % intervals are separated."
    )


def _and(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _table(section: Section) -> Iterator[str]:
    headings = (
        "",
        "test,&nbsp;%",
        "validation,&nbsp;%",
        "seeds",
        "parameters",
        "MACs,&nbsp;M",
        "latency,&nbsp;ms",
        "peak memory,&nbsp;MB",
        "training,&nbsp;s",
    )
    yield '<div class="wide"><table><thead><tr>' + "".join(f"<th>{h}</th>" for h in headings) + "</tr></thead><tbody>"
    for label, networks in section.teachers().items():
        yield _cells(
            "teacher",
            label,
            f"{statistics.mean(n.test for n in networks):.2f}",
            f"{statistics.mean(n.val for n in networks):.2f}",
            str(len(networks)),
            *_costs(networks),
        )
    for row in section.rows:
        if not row.runs:
            yield _cells("", row.label, "not yet run", "", f"0 of {row.planned}", *[""] * 5)
            continue
        n = len(row.runs)
        seeds = f"{n} of {row.planned}" if row.planned is not None and n < row.planned else str(n)
        yield _cells(
            "best" if row is section.best else "",
            row.label,
            str(row.test),
            str(row.val),
            seeds,
            *_costs([run.student for run in row.runs]),
        )
    yield "</tbody></table></div>"
    yield (
        '<p class="small">Mean ± half the 95 % interval of the mean (Student\'s t over seeds); bold: the best '
        "student. Scores are accuracy, or micro-F1 where nodes have several labels, at the epoch best on the "
        "validation part. MACs and latency are of a forward pass over one batch of the test part, medians over "
        "seeds; MACs count dense products and convolutions alone. Peak memory is the largest of training, beyond "
        "what the process held before. Training seconds are a mean.</p>"
    )


def _cells(kind: str, *values: str) -> str:
    return (f'<tr class="{kind}">' if kind else "<tr>") + "".join(f"<td>{escape(v)}</td>" for v in values) + "</tr>"


def _costs(networks: list[Network]) -> list[str]:
    peaks = [n.peak_memory_mb for n in networks if n.peak_memory_mb is not None]
    measured = [
        median(networks, "mmacs"),
        median(networks, "latency_ms"),
        max(peaks) if peaks else None,
        statistics.mean(n.seconds for n in networks),
    ]
    return [f"{networks[0].parameters:,}", *("–" if value is None else short(value) for value in measured)]


def _figure(picture: Picture) -> Iterator[str]:
    yield (
        f'<h3>{escape(picture.title)}</h3>\n<figure><div class="wide{" paper" if picture.on_paper else ""}">'
        f"{picture.svg}</div>\n<figcaption>{escape(picture.caption)} "
        f"<code>pictures/{escape(picture.name)}.png</code></figcaption></figure>"
    )


def _configuration(section: Section | Comparison) -> Iterator[str]:
    yield "<h3>Configuration</h3>"
    for row in section.done:
        seeds = f"seed{'s' if len(row.runs) > 1 else ''} {', '.join(str(run.seed) for run in row.runs)}"
        text = yaml.safe_dump(row.runs[0].config, sort_keys=False, default_flow_style=None, width=100)
        yield (f"<details><summary>{escape(row.label)}, {seeds}</summary><pre>{escape(text)}</pre></details>")


def _environment(saved: Saved) -> Iterator[str]:
    """Of all runs: a value that is not the same everywhere is shown with all it was."""
    values: dict[str, dict[str, None]] = {}
    for section in saved.sections:
        for row in section.done:
            for run in row.runs:
                for key, value in run.environment.items():
                    text = value if isinstance(value, str) else json.dumps(value)
                    values.setdefault(key, {})[text] = None
    if not values:
        return
    yield '<h2>Environment</h2>\n<div class="wide"><table class="environment"><tbody>'
    for key, found in values.items():
        yield f"<tr><td>{escape(key)}</td><td>{escape(' / '.join(sorted(found)))}</td></tr>"
    yield "</tbody></table></div>"
