"""Saved results, read into sections of rows of runs."""

from __future__ import annotations

import itertools
import json
import re
import statistics
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..lab.reader import ConfigError, parse_file
from .compression import Comparison, Compressed, Method, parse
from .estimates import Estimate, number

__all__ = ["Network", "Row", "Run", "Saved", "Section", "read"]

SCHEMAS = (1,)
COSTS = ("mmacs", "latency_ms", "peak_memory_mb", "threads")


@dataclass(frozen=True)
class Network:
    """What a trained network reached (scores in percent) and what it costs."""

    test: float
    val: float
    seconds: float
    parameters: int
    epochs: int
    peak_memory_mb: float | None
    history: list[dict[str, Any]]
    cost: dict[str, float | None]
    """Of a forward pass, by :func:`fastkd.runtime.measure.cost`; None: not measured."""


@dataclass(frozen=True)
class Run:
    seed: int
    config: dict[str, Any]
    student: Network
    teacher: Network
    environment: dict[str, Any]
    picture: dict[str, Any] | None

    @property
    def losses(self) -> dict[str, dict[str, Any]]:
        """Those that count."""
        return {name: loss for name, loss in self.config["losses"].items() if loss["weight"] > 0}

    @property
    def group(self) -> tuple[str, str]:
        """Of those that can be compared: data, and whatever else must be the same."""
        return self.config["data"], _teacher(self.config)

    @property
    def label(self) -> str:
        return " + ".join(self.losses) or "student alone"

    @property
    def title(self) -> str:
        models = (self.config[role]["model"]["name"] for role in ("teacher", "student"))
        return f"{self.config['data']}, {' to '.join(models)}"


@dataclass
class Row:
    """The runs of one configuration, by seed."""

    label: str
    runs: list[Run]
    planned: int | None = None
    """Seeds of the plan, if there is one."""

    @property
    def alone(self) -> bool:
        """A student that learns from labels only."""
        return bool(self.runs) and not self.runs[0].losses

    @property
    def lsp(self) -> bool:
        return bool(self.runs) and any(is_lsp(name) for name in self.runs[0].losses)

    @property
    def test(self) -> Estimate:
        return Estimate.of([run.student.test for run in self.runs])

    @property
    def val(self) -> Estimate:
        return Estimate.of([run.student.val for run in self.runs])


@dataclass
class Section:
    """Rows that can be compared: of one experiment, or of one data set and teacher."""

    name: str
    title: str
    rows: list[Row]
    note: str = ""

    @property
    def done(self) -> list[Row]:
        return [row for row in self.rows if row.runs]

    @property
    def alone(self) -> Row | None:
        return next((row for row in self.done if row.alone), None)

    @property
    def best(self) -> Row:
        """By the mean test score."""
        return max(self.done, key=lambda row: row.test.mean)

    def teachers(self) -> dict[str, list[Network]]:
        """By label; several if rows differ in theirs. Runs of equal scores share one teacher."""
        rows: dict[str, list[str]] = {}
        found: dict[str, dict[tuple[float, float], Network]] = {}
        for row in self.done:
            for run in row.runs:
                key = _teacher(run.config)
                if row.label not in rows.setdefault(key, []):
                    rows[key].append(row.label)
                found.setdefault(key, {}).setdefault((run.teacher.test, run.teacher.val), run.teacher)
        if len(found) == 1:
            return {"teacher": list(next(iter(found.values())).values())}
        return {f"teacher of {', '.join(rows[key])}": list(networks.values()) for key, networks in found.items()}


@dataclass
class Saved:
    name: str
    sections: list[Section | Comparison]
    notices: list[str] = field(default_factory=list)
    """What the reader must know: files left out, cells not yet run."""


def is_lsp(loss: str) -> bool:
    return loss == "lsp" or loss.startswith("lsp_")


def median(networks: list[Network], cost: str) -> float | None:
    """Of a cost, over the networks that have it."""
    values = [value for network in networks if (value := network.cost[cost]) is not None]
    return statistics.median(values) if values else None


def ratio(value: float) -> str:
    """How much smaller something is than the teacher's."""
    return f"1/{value:.3g}" if value >= 1 else f"{1 / value:.3g}×"


def read(directory: str | Path) -> Saved:
    """All results below a folder; see :func:`fastkd.report.write`."""
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"there is no folder {directory}")
    files = sorted(directory.glob("cells/*/*/*.json"))
    grid = bool(files)
    files = files or sorted(directory.rglob("result.json"))
    saved = Saved(directory.resolve().name, [])
    found: list[tuple[Path, Run | Compressed]] = []
    for file in files:
        path = file.relative_to(directory)
        try:
            found.append((path, _run(json.loads(file.read_text(encoding="utf-8")), file)))
        except _UnknownSchemaError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error)
            saved.notices.append(f"{path.as_posix()} is left out: it is no whole record ({reason}).")
            warnings.warn(f"{file} is left out of the report: it is no whole record ({reason})", stacklevel=3)
    if not found:
        raise ValueError(
            f"{directory} holds no results: looked for result.json at any depth, which fastkd distill "
            "and fastkd compress write, and for cells/<experiment>/<row>/<seed>.json, which fastkd grid "
            f"writes; {len(files)} such files could not be read"
        )
    if grid:
        _from_cells(saved, found, _plans(directory, saved))
    else:
        _from_runs(saved, found)
    return saved


class _UnknownSchemaError(ValueError):
    """A record of another version of fastkd: no damage, so never left out in silence."""


def _run(content: Any, file: Path) -> Run | Compressed:
    if not isinstance(content, dict):
        raise ValueError(f"a {type(content).__name__} instead of a mapping")
    if content["schema"] not in SCHEMAS:
        raise _UnknownSchemaError(
            f"{file} is a record of schema {content['schema']!r}, and this version of fastkd knows "
            f"{', '.join(map(str, SCHEMAS))}: take the version that wrote it, or a newer one"
        )
    if content.get("kind") == "compress":
        return parse(content)
    run = Run(
        int(content["seed"]),
        content["config"],
        _network(content["student"]),
        _network(content["teacher"]),
        dict(content.get("environment") or {}),
        _picture(content.get("picture")),
    )
    # What is asked of a configuration later is looked at here, so that later nothing is missing.
    _ = run.losses, run.title, run.group
    return run


def _network(content: dict[str, Any]) -> Network:
    history = [
        {
            "epoch": int(look["epoch"]),
            "loss": number(look["loss"]),
            "val": number(look["val"]),
            "terms": {name: number(value) for name, value in look["terms"].items()},
        }
        for look in content["history"]
    ]
    parameters = int(content["parameters"])
    measured = content.get("cost") or {}
    cost = {"parameters": parameters, **{name: _optional(measured.get(name)) for name in COSTS}}
    return Network(
        number(content["test"]),
        number(content["val"]),
        number(content["seconds"]),
        parameters,
        int(content["epochs"]),
        _optional(content.get("peak_memory_mb")),
        history,
        cost,
    )


def _picture(content: dict[str, Any] | None) -> dict[str, Any] | None:
    if not content:
        return None
    out = {**content, "points": [[number(x) for x in point] for point in content["points"]]}
    n = len(out["points"])
    for name in ("teacher", "student"):
        out[name] = [number(x) for x in content[name]]
        if len(out[name]) != n:
            raise ValueError(f"a picture of {n} points and {len(out[name])} distances")
    if not 0 <= int(content["at"]) < n or any(len(point) != 3 for point in out["points"]):
        raise ValueError("a picture that is no 3-D cloud with one of its points")
    return out


def _optional(x: Any) -> float | None:
    return None if x is None else number(x)


def _slug(name: str) -> str:
    """The folder of a row, as fastkd grid names it."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _key(x: Any) -> str:
    return json.dumps(x, sort_keys=True)


def _teacher(config: dict[str, Any]) -> str:
    return _key([config["teacher"], config.get("teacher_seed")])


def _from_runs(saved: Saved, found: list[tuple[Path, Run | Compressed]]) -> None:
    """A section per data set and teacher, a row per folder above seed<k>."""
    groups: dict[tuple[str, str], dict[str, list[Run | Compressed]]] = {}
    for path, run in found:
        parts = list(path.parent.parts)
        if parts and re.fullmatch(r"(seed)?\d+", parts[-1]):
            parts.pop()
        groups.setdefault(run.group, {}).setdefault("/".join(parts) or run.label, []).append(run)
    names: dict[str, int] = {}
    for (data, _), rows in sorted(groups.items(), key=lambda item: item[0]):
        names[data] = names.get(data, 0) + 1
        name = _slug(data) + (f"-{names[data]}" if names[data] > 1 else "")
        title = next(iter(rows.values()))[0].title
        above = zip(*(label.split("/")[:-1] for label in rows), strict=False)
        shared = len(list(itertools.takewhile(lambda names: len(set(names)) == 1, above)))  # folders of all rows
        split = [row for label, runs in rows.items() for row in _rows("/".join(label.split("/")[shared:]), runs, saved)]
        split.sort(key=_by_name)
        saved.sections.append(_section(name, title, split))


def _from_cells(saved: Saved, found: list[tuple[Path, Run | Compressed]], plans: dict[str, Any]) -> None:
    """A section per experiment; titles, names and order of rows from the plan, if it lies there."""
    groups: dict[str, dict[str, list[Run | Compressed]]] = {}
    for path, run in found:
        _, experiment, row, _ = path.parts
        groups.setdefault(experiment, {}).setdefault(row, []).append(run)
    for name in (*(name for name in plans if name in groups), *sorted(set(groups) - set(plans))):
        plan = plans.get(name) or {}
        planned = _whole(plan.get("seeds"), 3)  # as fastkd grid has it
        labels = {_slug(str(label)): str(label) for label in plan.get("rows") or {}}
        rows: list[Any] = []
        row_of = Method if isinstance(next(iter(groups[name].values()))[0], Compressed) else Row
        for slug in (*labels, *sorted(set(groups[name]) - set(labels))):
            label = labels.get(slug, slug.replace("-", " "))
            split = _rows(label, groups[name].get(slug, []), saved) or [row_of(label, [])]
            if slug in labels:
                split = [replace(row, planned=planned) for row in split]
            rows += split
        if not plan:
            rows.sort(key=_by_name)
        saved.sections.append(_section(name, str(plan.get("title") or name), rows, str(plan.get("note") or "").strip()))
    missing = [name for name in plans if name not in groups]
    if missing:
        saved.notices.append(f"Not yet run: {', '.join(missing)}.")


def _section(name: str, title: str, rows: list[Any], note: str = "") -> Section | Comparison:
    return (Comparison if isinstance(rows[0], Method) else Section)(name, title, rows, note)


def _by_name(row: Row | Method) -> tuple[bool, list[str | int]]:
    """The student alone first; numbers in names by their values."""
    return not row.alone, [int(x) if x.isdecimal() else x for x in re.split(r"(\d+)", row.label)]


def _rows(label: str, runs: list[Run | Compressed], saved: Saved) -> list[Any]:
    """One, or several if the runs differ in their configurations: no mean is taken over those."""
    groups: dict[str, list[Any]] = {}
    for run in runs:
        groups.setdefault(_key(run.config), []).append(run)
    if len(groups) > 1:
        saved.notices.append(f"Row {label}: its runs have {len(groups)} configurations, each shown as a row.")
    for group in groups.values():
        if len({run.seed for run in group}) < len(group):
            saved.notices.append(f"Row {label}: a seed is there more than once, so its interval is too narrow.")
    row_of: Any = Method if runs and isinstance(runs[0], Compressed) else Row
    return [
        row_of(label if len(groups) == 1 else f"{label} (configuration {i})", sorted(group, key=lambda r: r.seed))
        for i, group in enumerate(groups.values(), 1)
    ]


def _plans(directory: Path, saved: Saved) -> dict[str, dict[str, Any]]:
    """The experiments of all plan files beside cells/, by priority."""
    out: dict[str, dict[str, Any]] = {}
    for file in sorted(directory.glob("*.yaml")):
        try:
            content = parse_file(file)
        except (OSError, ConfigError) as error:
            saved.notices.append(f"{file.name} is no YAML, so titles and names of rows in it are not known ({error}).")
            continue
        experiments = content.get("experiments") if isinstance(content, dict) else None
        if isinstance(experiments, dict):
            out |= {str(name): plan for name, plan in experiments.items() if isinstance(plan, dict)}
    return dict(sorted(out.items(), key=lambda item: _whole(item[1].get("priority"), 1)))


def _whole(x: Any, default: int) -> int:
    return x if isinstance(x, int) else default
