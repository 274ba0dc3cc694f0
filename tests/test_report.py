"""The report, from records that are made here."""

import json
import math
import re
import statistics
import struct
import subprocess
import sys

import pytest

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
pytest.importorskip("yaml", reason="PyYAML is not installed")

import fastkd.report
from fastkd.report import html, records

TESTS = {"student-alone": [90.1, 90.4, 89.7], "lsp": [92.0, 92.3, 91.9], "kd + lsp": [91.25]}
LSP = {"weight": 100.0, "student_layer": "layers.0", "teacher_layer": "layers.1", "args": {}}
LOSSES = {"student-alone": {}, "lsp": {"lsp": LSP}, "kd + lsp": {"kd": {"weight": 1.0}, "lsp": LSP}}
T95 = {2: 12.7062, 3: 4.30265}  # Student's t, by the number of seeds


def network(test, seed, losses=(), parameters=1234, epochs=20):
    history = [{"epoch": e, "loss": 2.0 / (e + 1), "val": test - 40 / (e + 1) + 0.1 * seed, "seconds": 0.01 * e,
                "terms": {"task": 1.0 / (e + 1), **{name: 0.1 / (e + 1) for name in losses}}} for e in range(epochs)]
    return {"test": test, "val": history[-1]["val"], "best_epoch": epochs - 1, "epochs": epochs, "seconds": 3.0 + seed,
            "parameters": parameters, "peak_memory_mb": 10.0 + seed, "history": history,
            "cost": {"parameters": parameters, "mmacs": parameters / 100, "latency_ms": 0.5 + seed, "threads": 2,
                     "peak_memory_mb": None}}


def record(test, seed, losses, data="cora", picture=False, hidden=8):
    model = lambda hidden: {"model": {"name": "gcn", "args": {"hidden": hidden}}, "train": {"epochs": 20}}
    out = {"schema": 1, "seed": seed, "student": network(test, seed, losses), "teacher": network(95.5, 0, (), 98765),
           "config": {"data": data, "teacher": model(64), "student": model(hidden), "task_weight": 1.0,
                      "losses": losses, "teacher_seed": 0},
           "environment": {"fastkd": "9.8.7", "torch": "2.13.0", "threads": 2}}
    if picture:
        points = [[math.cos(i), math.sin(2 * i), 0.1 * (i % 3)] for i in range(60)]
        distance = [i / 59 for i in range(60)]
        out["picture"] = {"points": points, "at": 0, "teacher": distance, "student": distance[::-1],
                          "teacher_layer": "layers.1", "student_layer": "layers.0"}
    return out


def save(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for row, tests in TESTS.items():
        for seed, test in enumerate(tests):
            save(folder / row / f"seed{seed}" / "result.json",
                 record(test, seed, LOSSES[row], picture=seed == 0 and row != "kd + lsp"))
    save(folder / "lsp" / "seed7" / "result.json", json.dumps(record(1.0, 7, LOSSES["lsp"]))[:-300])
    return folder


@pytest.fixture(scope="module")
def page(runs):
    with pytest.warns(UserWarning, match="seed7.result.json is left out"):
        path = fastkd.report.write(runs)
    assert path == runs / "report.html"
    return path.read_text()


def rows_of(text):
    """The cells of every table row, by the first."""
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr[^>]*>(.*?)</tr>", text)]
    return {cells[0]: cells[1:] for cells in rows if cells}


def test_the_table_has_the_figures(page):
    rows = rows_of(page)
    assert list(rows)[:4] == ["teacher", "student-alone", "kd + lsp", "lsp"]
    for row, tests in TESTS.items():
        n = len(tests)
        val = [network(test, seed)["val"] for seed, test in enumerate(tests)]
        for cell, values in zip(rows[row], (tests, val), strict=False):
            mean = f"{sum(values) / n:.2f}"
            if n > 1:
                mean += f" ± {T95[n] * statistics.stdev(values) / n ** 0.5:.2f}"
            assert cell == mean
        seconds = 3.0 + (n - 1) / 2
        assert rows[row][2:] == [str(n), "1,234", "12.3", f"{0.5 + (n - 1) / 2:.3g}", f"{10 + n - 1}", f"{seconds:.3g}"]
    assert rows["teacher"][:4] == ["95.50", "93.50", "1", "98,765"]
    assert re.findall(r'<tr class="best"><td>(.*?)</td>', page) == ["lsp"]


def test_the_summary(page):
    mean, alone = (statistics.mean(TESTS[row]) for row in ("lsp", "student-alone"))
    assert (f"Best of 3 rows is lsp with {mean:.2f} ± 0.52 % (mean and 95 % interval of 3 seeds), {mean - alone:.2f} points "
            "above student-alone") in page
    assert "The two 95 % intervals are separated." in page


def test_everything_else_is_there(page):
    for heading in ("Validation score over training", "Training losses", "Local structure preserving loss per layer",
                    "Test scores, seed by seed", "Distances between features on one shape", "Cost of a forward pass",
                    "Configuration", "Environment"):
        assert heading in page
    assert "lsp/seed7/result.json is left out" in page
    assert "teacher_layer: layers.1" in page and "9.8.7" in page


def test_the_page_is_self_contained(page):
    assert page.count("<svg") == 6
    links = re.findall(r'(?:src|href)\s*=\s*["\']?([^"\'\s>]*)', page)
    assert links and all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    assert not re.search(r"https?://|<script|<link|@import|<iframe", page)
    ids = set(re.findall(r'\bid="([^"]*)"', page))
    assert {link[1:] for link in links if link.startswith("#")} <= ids
    assert set(re.findall(r"url\(#([^)]*)\)", page)) <= ids
    assert "currentColor" in page and "#1b1b1e" in page  # text of the pictures takes the page's colour


def test_the_pictures_are_for_paper(runs, page):
    from matplotlib.image import imread

    names = {"validation", "losses", "lsp", "scores", "features", "cost"}
    assert {p.stem for p in (runs / "pictures").iterdir()} == names
    for name in names:
        content = (runs / "pictures" / f"{name}.png").read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", content[16:24])
        assert 1200 <= width <= 2400 and 300 <= height <= 2400
        dots = struct.unpack(">I", content[content.index(b"pHYs") + 4:][:4])[0] * 0.0254
        assert dots > 150
        pixels = imread(runs / "pictures" / f"{name}.png")[..., :3]
        assert pixels.mean() > 0.5 and pixels.std() > 0.02
        assert (pixels[[0, -1]] > 0.99).all() and (pixels[:, [0, -1]] > 0.99).all()  # nothing is cut off


def test_same_records_same_report(runs, page, tmp_path):
    with pytest.warns(UserWarning):
        again = fastkd.report.write(runs, tmp_path / "out")
    assert again == tmp_path / "out" / "report.html"
    assert again.read_text() == page
    for picture in (tmp_path / "out" / "pictures").iterdir():
        assert picture.read_bytes() == (runs / "pictures" / picture.name).read_bytes()


def test_cells_with_their_plan(tmp_path):
    for row, tests in {"alone": [80.0, 81.0], "with-lsp-100": [80.5, 81.5]}.items():
        for seed, test in enumerate(tests):
            save(tmp_path / "cells" / "first" / row / f"{seed}.json",
                 record(test, seed, {} if row == "alone" else {"lsp": LSP}))
    save(tmp_path / "cells" / "second" / "kd" / "0.json", record(70.0, 0, {"kd": {"weight": 1.0}}, data="ppi"))
    save(tmp_path / "plan.yaml", """
experiments:
  later: {recipe: cora, rows: {kd: {}}}
  second: {title: "PPI & more", recipe: ppi, priority: 2, rows: {kd: {}}}
  first: {title: Citations, recipe: cora, seeds: 3, note: Of papers.,
          rows: {"with LSP, 100": {}, alone: {}, "never <run>": {}}}
""")
    text = fastkd.report.write(tmp_path).read_text()
    assert re.findall(r"<h2 id.*?>(.*?)</h2>", text) == ["Citations", "PPI &amp; more"]
    rows = rows_of(text)
    assert rows["with LSP, 100"][0] == f"81.00 ± {T95[2] * 0.5:.2f}" and rows["with LSP, 100"][2] == "2 of 3"
    assert rows["never &lt;run&gt;"][:3] == ["not yet run", "", "0 of 3"]
    assert "Of papers." in text and "Not yet run: later." in text
    assert "0.50 points above alone" in text and "intervals overlap: the difference may be chance" in text
    assert "There is no run of the student alone" in text  # of the second
    names = {p.name for p in (tmp_path / "pictures").iterdir()}
    assert {"first-lsp.png", "first-scores.png", "second-scores.png"} <= names and "second-lsp.png" not in names
    ids = re.findall(r'<clipPath id="(.*?)"', text)
    assert len(ids) == len(set(ids))


def read(folder, **content):
    for name, value in content.items():
        save(folder / name / "result.json", value)
    return records.read(folder)


def test_labels_without_row_folders(tmp_path):
    saved = read(tmp_path, seed0=record(80.0, 0, LOSSES["kd + lsp"]), seed1=record(81.0, 1, LOSSES["kd + lsp"]))
    assert [(row.label, len(row.runs)) for row in saved.sections[0].rows] == [("kd + lsp", 2)]
    assert saved.sections[0].title == "cora, gcn to gcn"
    save(tmp_path / "seed0" / "result.json", record(80.0, 0, {"kd": {"weight": 0.0}}))
    assert records.read(tmp_path / "seed0").sections[0].rows[0].label == "student alone"


def test_data_sets_and_configurations_are_not_mixed(tmp_path):
    saved = read(tmp_path, seed0=record(80.0, 0, {}), seed1=record(81.0, 1, {}, hidden=16),
                 other=record(50.0, 0, {}, data="ppi"))
    assert [len(section.rows) for section in saved.sections] == [2, 1]
    assert [row.label[-17:] for row in saved.sections[0].rows] == ["(configuration 1)", "(configuration 2)"]
    assert any("2 configurations" in notice for notice in saved.notices)


def test_folders_above_all_rows_name_no_row(tmp_path):
    files = {f"cora/new/{row}/seed{seed}": record(80.0, seed, LOSSES[row]) for row in ("kd + lsp", "lsp") for seed in (0, 1)}
    saved = read(tmp_path, **files, **{"ppi/seed0": record(50.0, 0, {}, data="ppi")})
    assert [[row.label for row in section.rows] for section in saved.sections] == [["kd + lsp", "lsp"], ["ppi"]]


def test_what_a_single_seed_cannot_say(tmp_path):
    saved = read(tmp_path, a=record(80.0, 0, {}), b=record(90.0, 0, {"lsp": LSP}))
    assert "nothing can be said about chance" in html.summary(saved.sections[0])
    saved = read(tmp_path, b=record(79.0, 0, {"lsp": LSP}))
    assert "No distilled student is better on average than a" in html.summary(saved.sections[0])


@pytest.mark.parametrize("damage", [
    lambda r: "", lambda r: "[1, 2]", lambda r: {**r, "student": None}, lambda r: {**r, "config": {}},
    lambda r: {**r, "student": {**r["student"], "test": float("nan")}},
    lambda r: {k: v for k, v in r.items() if k != "teacher"}, lambda r: {**r, "picture": {"points": [[0, 0]]}},
])
def test_damaged_files_are_named_and_left_out(tmp_path, damage):
    save(tmp_path / "seed1" / "result.json", damage(record(80.0, 1, {}, picture=True)))
    with pytest.warns(UserWarning, match=r"seed1.result\.json"):
        saved = read(tmp_path, seed0=record(80.0, 0, {}))
    assert [len(row.runs) for row in saved.sections[0].rows] == [1]
    assert saved.notices[0].startswith("seed1/result.json is left out")


def test_same_intervals_and_folders_as_the_grid():
    grid = pytest.importorskip("fastkd.grid", reason="fastkd.grid cannot be imported", exc_type=ImportError)
    for n in range(1, 30):
        values = [float(i * i % 7) for i in range(n)]
        assert records.Estimate.of(values).half == grid.interval(values)
    for name in ("with LSP, 100", "kd + lsp", "A_b-"):
        assert records._slug(name) == grid._slug(name)


@pytest.mark.parametrize("name", ["matplotlib", "yaml"])
def test_what_is_missing_is_named(monkeypatch, tmp_path, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf'needs {name}: pip install "fastkd\[distill\]"'):
        fastkd.report.write(tmp_path)


def test_no_networks_and_no_data_are_needed(runs, tmp_path):
    code = """
import sys, fastkd.report
fastkd.report.write(sys.argv[1], sys.argv[2])
loaded = {"fastkd.distill", "fastkd.models", "fastkd.data", "torch_geometric", "pydantic", "matplotlib.pyplot"}
assert not loaded & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, runs / "student-alone", tmp_path],
                          capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.filterwarnings("error")
def test_what_is_not_there_is_left_out(tmp_path):
    """No history, no cost, one epoch: a section less, but no crash."""
    bare, short = record(80.0, 0, {}), record(81.0, 0, {"lsp": LSP}, picture=True)
    for name in ("student", "teacher"):
        bare[name] |= {"history": [], "cost": None, "peak_memory_mb": None}
        short[name]["history"] = short[name]["history"][:1]
    for name, content in {"bare": bare, "short": short}.items():
        save(tmp_path / name / name / "result.json", content)
    text = fastkd.report.write(tmp_path / "bare").read_text()
    assert {p.stem for p in (tmp_path / "bare" / "pictures").iterdir()} == {"scores", "cost"}
    assert rows_of(text)["bare"] == ["80.00", "78.00", "1", "1,234", "–", "–", "–", "3"]
    text = fastkd.report.write(tmp_path / "short").read_text()
    assert "There is no run of the student alone" in text and len(list((tmp_path / "short" / "pictures").iterdir())) == 6


def test_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        fastkd.report.write(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"result\.json at any depth.*cells/<experiment>/<row>/<seed>\.json"):
        fastkd.report.write(tmp_path)
    save(tmp_path / "seed3" / "result.json", {**record(80.0, 3, {}), "schema": 77})
    with pytest.raises(ValueError, match=r"seed3.result\.json.*schema 77.*knows 1"):
        fastkd.report.write(tmp_path)
    assert not (tmp_path / "report.html").exists()
