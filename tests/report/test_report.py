"""The report, from records that are made here."""

import itertools
import json
import re
import statistics
import struct
import subprocess
import sys

import pytest

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
pytest.importorskip("yaml", reason="PyYAML is not installed")

from sample_records import LOSSES, LSP, compressed, network, record

import fastkd.report
from fastkd._text import slug
from fastkd.compress.record import CompressRecord
from fastkd.distill.tables import summary
from fastkd.lab.cells import Cells
from fastkd.lab.record import Record
from fastkd.lab.rows import Estimate
from fastkd.report import records

TESTS = {"student-alone": [90.1, 90.4, 89.7], "lsp": [92.0, 92.3, 91.9], "kd + lsp": [91.25]}
T95 = {2: 12.7062, 3: 4.30265}  # Student's t, by the number of seeds


def save(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for row, tests in TESTS.items():
        for seed, test in enumerate(tests):
            save(
                folder / row / f"seed{seed}" / "result.json",
                record(test, seed, LOSSES[row], picture=seed == 0 and row != "kd + lsp"),
            )
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
                mean += f" ± {T95[n] * statistics.stdev(values) / n**0.5:.2f}"
            assert cell == mean
        seconds = 3.0 + (n - 1) / 2
        assert rows[row][2:] == [str(n), "1,234", "12.3", f"{0.5 + (n - 1) / 2:.3g}", f"{10 + n - 1}", f"{seconds:.3g}"]
    assert rows["teacher"][:4] == ["95.50", "93.50", "1", "98,765"]
    assert re.findall(r'<tr class="best"><td>(.*?)</td>', page) == ["lsp"]


def test_the_summary(page):
    mean, alone = (statistics.mean(TESTS[row]) for row in ("lsp", "student-alone"))
    assert (
        f"Best of 3 rows is lsp with {mean:.2f} ± 0.52 % (mean and 95 % interval of 3 seeds), {mean - alone:.2f} points "
        "above student-alone"
    ) in page
    assert "The two 95 % intervals are separated." in page


def test_everything_else_is_there(page):
    for heading in (
        "Validation score over training",
        "Training losses",
        "Local structure preserving loss per layer",
        "Test scores, seed by seed",
        "Distances between features on one shape",
        "Cost of a forward pass",
        "Configuration",
        "Environment",
    ):
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
        dots = struct.unpack(">I", content[content.index(b"pHYs") + 4 :][:4])[0] * 0.0254
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
            save(
                tmp_path / "cells" / "first" / row / f"{seed}.json",
                record(test, seed, {} if row == "alone" else {"lsp": LSP}),
            )
    save(tmp_path / "cells" / "second" / "kd" / "0.json", record(70.0, 0, {"kd": {"weight": 1.0}}, data="ppi"))
    save(
        tmp_path / "plan.yaml",
        """
experiments:
  later: {recipe: cora, rows: {kd: {}}}
  second: {title: "PPI & more", recipe: ppi, priority: 2, rows: {kd: {}}}
  first: {title: Citations, recipe: cora, seeds: 3, note: Of papers.,
          rows: {"with LSP, 100": {}, alone: {}, "never <run>": {}}}
""",
    )
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
    assert [(row.label, len(row.records)) for row in saved.sections[0].rows] == [("kd + lsp", 2)]
    assert saved.sections[0].title == "cora, gcn to gcn"
    save(tmp_path / "seed0" / "result.json", record(80.0, 0, {"kd": {"weight": 0.0}}))
    assert records.read(tmp_path / "seed0").sections[0].rows[0].label == "student alone"


def test_data_sets_and_configurations_are_not_mixed(tmp_path):
    saved = read(
        tmp_path, seed0=record(80.0, 0, {}), seed1=record(81.0, 1, {}, hidden=16), other=record(50.0, 0, {}, data="ppi")
    )
    assert [len(section.rows) for section in saved.sections] == [2, 1]
    assert [row.label[-17:] for row in saved.sections[0].rows] == ["(configuration 1)", "(configuration 2)"]
    assert any("2 configurations" in notice for notice in saved.notices)


def test_folders_above_all_rows_name_no_row(tmp_path):
    files = {
        f"cora/new/{row}/seed{seed}": record(80.0, seed, LOSSES[row]) for row in ("kd + lsp", "lsp") for seed in (0, 1)
    }
    saved = read(tmp_path, **files, **{"ppi/seed0": record(50.0, 0, {}, data="ppi")})
    assert [[row.label for row in section.rows] for section in saved.sections] == [["kd + lsp", "lsp"], ["ppi"]]


def test_what_a_single_seed_cannot_say(tmp_path):
    saved = read(tmp_path, a=record(80.0, 0, {}), b=record(90.0, 0, {"lsp": LSP}))
    assert "nothing can be said about chance" in summary(saved.sections[0])
    saved = read(tmp_path, b=record(79.0, 0, {"lsp": LSP}))
    assert "No distilled student is better on average than a" in summary(saved.sections[0])


@pytest.mark.parametrize(
    "damage",
    [
        lambda r: "",
        lambda r: "[1, 2]",
        lambda r: {**r, "student": None},
        lambda r: {**r, "config": {}},
        lambda r: {**r, "student": {**r["student"], "test": float("nan")}},
        lambda r: {k: v for k, v in r.items() if k != "teacher"},
        lambda r: {**r, "picture": {"points": [[0, 0]]}},
    ],
)
def test_damaged_files_are_named_and_left_out(tmp_path, damage):
    save(tmp_path / "seed1" / "result.json", damage(record(80.0, 1, {}, picture=True)))
    with pytest.warns(UserWarning, match=r"seed1.result\.json"):
        saved = read(tmp_path, seed0=record(80.0, 0, {}))
    assert [len(row.records) for row in saved.sections[0].rows] == [1]
    assert saved.notices[0].startswith("seed1/result.json is left out")


def test_intervals_and_folders():
    """The same for the grid's tables and the report's, which once had one each."""
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    assert Estimate.of([7.0]) == Estimate(7.0, None) and str(Estimate.of([7.0])) == "7.00"
    for n in range(2, 30):
        values = [float(i * i % 7) for i in range(n)]
        half = stats.t.ppf(0.975, n - 1) * statistics.stdev(values) / n**0.5
        assert Estimate.of(values).half == pytest.approx(half, rel=3e-3)
    for name, folder in {"with LSP, 100": "with-lsp-100", "kd + lsp": "kd-lsp", "A_b-": "a-b"}.items():
        assert slug(name) == folder


@pytest.mark.parametrize("name", ["matplotlib", "yaml", "pydantic"])
def test_what_is_missing_is_named(monkeypatch, tmp_path, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf'needs {name}: pip install "fastkd\[distill\]"'):
        fastkd.report.write(tmp_path)


def test_no_networks_and_no_data_are_needed(runs, tmp_path):
    code = """
import sys, fastkd.report
fastkd.report.write(sys.argv[1], sys.argv[2])
loaded = {"fastkd.distill.trainer", "fastkd.distill.config", "fastkd.compress.run", "fastkd.models", "fastkd.data",
          "torch_geometric", "matplotlib.pyplot"}
assert not loaded & set(sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, runs / "student-alone", tmp_path],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
    )
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
    assert (
        "There is no run of the student alone" in text and len(list((tmp_path / "short" / "pictures").iterdir())) == 6
    )


def test_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        fastkd.report.write(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"result\.json at any depth.*cells/<experiment>/<row>/<seed>\.json"):
        fastkd.report.write(tmp_path)
    save(tmp_path / "seed3" / "result.json", {**record(80.0, 3, {}), "schema": 77})
    with pytest.raises(ValueError, match=r"seed3.result\.json.*schema 77.*knows 1"):
        fastkd.report.write(tmp_path)
    assert not (tmp_path / "report.html").exists()


# --- compressed networks -----------------------------------------------------------------------------------


def test_a_compressed_network(tmp_path):
    own = compressed()
    save(tmp_path / "seed0" / "result.json", own)
    text = fastkd.report.write(tmp_path).read_text()
    rows = rows_of(text)
    assert rows["full"] == ["93.25", "94.00", "1,000", "0.04", "4", "0.50 / 9.00", "1.00 / 20.00"]
    assert rows["smaller, as found"][:2] == ["50.00", "51.00"] and rows["statistics recalibrated"][0] == "88.00"
    assert rows["fine-tuned"] == ["91.00", "92.50", "250", "0.01", "1", "0.12 / 2.25", "0.25 / 5.00"]
    assert rows["int8, onnxruntime"][0] == "90.50"
    assert rows["less, or faster"][2:] == ["4.00x"] * 3 + ["4.00x / 4.00x"] * 2
    assert "The smaller one reaches 91.00 % (a single seed), with 4.00x fewer parameters" in text
    for name, quality, cost in zip(*(own["search"]["individuals"][k] for k in ("id", "quality", "cost")), strict=True):
        assert f"<title>{name}: accuracy {100 * quality:.4g} %, {100 * cost / 40000:.1f} % of the MACs</title>" in text
    for name in ("front", "convergence", "masks", "layers", "finetuning"):
        assert (tmp_path / "pictures" / f"{name}.png").stat().st_size > 5000
    assert not re.search(r"https?://|<script|<link|@import|<iframe", text) and "9.8.7" in text


def test_the_raster_is_the_masks():
    from fastkd.report import compression

    own = CompressRecord.model_validate(compressed(genes=(3, 8)))
    [image] = compression._masks(own, "ecs").figure.axes[0].images
    for row, look in zip(image.get_array().tolist(), own.search.history, strict=True):
        bits = "".join(f"{byte:08b}" for byte in bytes.fromhex(look.mask))[:11]
        assert row == [int(bit) for bit in bits]


def test_methods_of_a_plan(tmp_path):
    tests = {"ecs": [91.0, 91.2, 91.1], "random-search": [89.0, 89.2, 89.1], "uniform-l1": [91.0, 91.3]}
    names = {"ecs": "ecs", "random-search": "random", "uniform-l1": "l1"}
    for row, values in tests.items():
        for seed, test in enumerate(values):
            save(tmp_path / "cells" / "lenet" / row / f"{seed}.json", compressed(names[row], seed, test, int8=False))
    for seed in range(2):  # beside one of distillation
        save(tmp_path / "cells" / "cora" / "lsp" / f"{seed}.json", record(92.0 + seed, seed, LOSSES["lsp"]))
    save(
        tmp_path / "plan.yaml",
        """experiments:
  lenet:
    {title: LeNet made small, compress: lenet-mnist, seeds: 3, note: To a quarter.,
     rows: {ECS: {}, random search: {}, uniform L1: {}, Torch-Pruning: {}}}
  cora: {title: Cora, recipe: cora, seeds: 2, rows: {lsp: {}}}""",
    )
    text = fastkd.report.write(tmp_path).read_text()
    rows = rows_of(text)
    assert rows["ECS"][:4] == ["88.10 ± 0.25", "91.10 ± 0.25", "92.50 ± 0.00", "3"]
    assert rows["ECS"][4:] == ["25.0", "25.0", "4.00x / 4.00x", "40", "12.5"]
    assert rows["uniform L1"][3] == "2 of 3" and rows["uniform L1"][-2] == "1"
    assert rows["Torch-Pruning"][0] == "not yet run" and rows["Torch-Pruning"][3] == "0 of 3"
    assert rows["Torch-Pruning"] == ["not yet run", "", "", "0 of 3", "", "", "", "", ""]
    assert rows["full network"][:2] == ["94.25 ± 2.48"] * 2
    assert re.findall(r'<tr class="best"><td>(.*?)</td>', text)[0] == "uniform L1"
    assert "Best of 3 methods is uniform L1, with 91.15" in text and "It overlaps with ECS" in text
    assert "LeNet made small" in text and "To a quarter." in text and "Cora" in text
    names = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert {"lenet-methods.png", "lenet-front.png", "lenet-masks.png", "cora-validation.png"} <= names


def test_separated_methods(tmp_path):
    for row, values in {"ecs": [91.0, 91.2, 91.1], "random": [80.0, 80.2, 80.1]}.items():
        for seed, test in enumerate(values):
            save(tmp_path / row / f"seed{seed}" / "result.json", compressed(row, seed, test, tuned=False))
    text = fastkd.report.write(tmp_path).read_text()
    assert "Its 95 % interval is separated from random." in text
    assert "mnist, lenet made smaller" in text and "finetuning" not in text


@pytest.mark.parametrize(
    "damage",
    [
        lambda r: r.pop("score"),
        lambda r: r["dense"].pop("macs"),
        lambda r: r["compact"].update(test="high"),
        lambda r: r["search"]["front"]["cost"].pop(),
        lambda r: r["search"]["history"][0].update(mask="ff"),
        lambda r: r["search"]["history"][0].update(best=float("nan")),
        lambda r: r["layers"][0].pop("kept"),
    ],
)
def test_a_record_of_compression_that_is_not_whole(tmp_path, damage):
    save(tmp_path / "a" / "result.json", compressed())
    broken = compressed()
    damage(broken)
    save(tmp_path / "b" / "result.json", broken)
    with pytest.warns(UserWarning, match="b.result.json is left out"):
        assert "b/result.json is left out" in fastkd.report.write(tmp_path).read_text()


def test_agreement_is_called_so(tmp_path):
    save(tmp_path / "result.json", compressed("nsga2", score="agreement", tuned=False))
    text = fastkd.report.write(tmp_path).read_text()
    assert "<th>agreement, %</th>" in text and "class is the full network&#x27;s" in text


# --- what must not happen --------------------------------------------------------------------------------


def test_nothing_is_written_through_links(tmp_path):
    """A link in the folder is replaced, and what it points to stays; a folder that is a link is refused."""
    save(tmp_path / "runs" / "seed0" / "result.json", record(80.0, 0, {}))
    (tmp_path / "precious").write_text("precious")
    for name in ("report.html", "pictures/scores.png"):
        link = tmp_path / "runs" / name
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(tmp_path / "precious")
    fastkd.report.write(tmp_path / "runs")
    assert (tmp_path / "precious").read_text() == "precious"
    for name in ("report.html", "pictures/scores.png"):
        assert not (tmp_path / "runs" / name).is_symlink() and (tmp_path / "runs" / name).stat().st_size > 5000
    assert not list(tmp_path.rglob(".*")), "a temporary file is left"

    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "pictures").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"out/pictures is a symbolic link, and nothing is written through it"):
        fastkd.report.write(tmp_path / "runs", tmp_path / "out")
    assert not list((tmp_path / "elsewhere").iterdir()) and not (tmp_path / "out" / "report.html").exists()


def test_a_page_that_cannot_be_made_leaves_the_one_before(tmp_path, monkeypatch):
    save(tmp_path / "seed0" / "result.json", record(80.0, 0, {}))
    before = fastkd.report.write(tmp_path).read_text()

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        fastkd.report.write(tmp_path)
    assert (tmp_path / "report.html").read_text() == before and not list(tmp_path.rglob(".*"))


def test_a_plan_of_nested_aliases(tmp_path):
    """838 bytes that stand for a thousand million words."""
    names = "abcdefghi"
    lines = [f"a: &a [{', '.join(['lol'] * 9)}]"]
    lines += [f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in itertools.pairwise(names)]
    text = "\n".join([*lines, "experiments: {first: {title: *i, note: *i, seeds: *i, priority: *i, rows: {kd: *i}}}"])
    (tmp_path / "plan.yaml").write_text(text)
    save(tmp_path / "cells" / "first" / "kd" / "0.json", record(70.0, 0, {}))
    code = "import sys, fastkd.report; fastkd.report.write(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "report.html").stat().st_size < 1e6


def test_the_kept_form_gives_the_same_report(tmp_path):
    """Old files of cells, and the file of an experiment that is made of them."""
    content = {("student-alone", s): record(80.0 + s, s, {}) for s in range(2)}
    content |= {("lsp", s): record(81.5 + s, s, LOSSES["lsp"], picture=s == 0) for s in range(2)}
    content |= {("ecs", s): compressed("ecs", s, 91.0 + s) for s in range(2)}
    for (row, seed), one in content.items():
        experiment = "lenet" if row == "ecs" else "cora"
        save(tmp_path / "old" / "cells" / experiment / row / f"{seed}.json", one)
        Cells(tmp_path / "new" / "cells", experiment).append(row.replace("-", " "), Record.parse(one))
    old, new = (fastkd.report.write(tmp_path / form).read_text() for form in ("old", "new"))
    without = lambda text: re.sub(r"<svg.*?</svg>|<title>.*?</title>|<h1>.*?</h1>", "", text, flags=re.DOTALL)
    assert without(old) == without(new)
    assert {p.name for p in (tmp_path / "old/pictures").iterdir()} == {
        p.name for p in (tmp_path / "new/pictures").iterdir()
    }


def test_damaged_lines_are_named_and_left_out(tmp_path):
    cells = Cells(tmp_path / "cells", "cora")
    cells.append("kd", Record.parse(record(80.0, 0, {})))
    with open(cells.file, "a") as file:
        file.write('{"row": "kd", "schema": 1}\n' + '{"row": "kd", "schema": 1, "se')
    with pytest.warns(UserWarning):
        saved = records.read(tmp_path)
    assert [len(row.records) for row in saved.sections[0].rows] == [1]
    assert saved.notices[0].startswith("cells/cora.jsonl, line 2, is left out: it is no whole record (no seed)")
    assert saved.notices[1].startswith("cells/cora.jsonl: its last line is left out")


def test_lab_knows_no_study(tmp_path):
    code = """
import sys, fastkd.lab.cells, fastkd.lab.table
assert not [m for m in sys.modules if m.startswith(("fastkd.distill", "fastkd.compress", "fastkd.report"))]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_records_of_two_studies_without_a_plan(tmp_path):
    cells = Cells(tmp_path / "cells", "mixed")
    for row, content in {"kd": record(80.0, 0, {}), "small": compressed()}.items():
        cells.append(row, Record.parse(content))
    assert "mixed: its records are of two studies; those of the second are left out." in records.read(tmp_path).notices
    assert rows_of(fastkd.report.write(tmp_path).read_text())["small"][0] == "not yet run"
