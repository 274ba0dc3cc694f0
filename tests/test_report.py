"""The report, from records that are made here."""

import json
import math
import random
import re
import statistics
import struct
import subprocess
import sys

import pytest

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
pytest.importorskip("yaml", reason="PyYAML is not installed")

import fastkd.report
from fastkd._text import slug
from fastkd.compress.record import CompressRecord
from fastkd.distill.tables import summary
from fastkd.lab.estimate import Estimate
from fastkd.report import records

TESTS = {"student-alone": [90.1, 90.4, 89.7], "lsp": [92.0, 92.3, 91.9], "kd + lsp": [91.25]}
LSP = {"weight": 100.0, "student_layer": "layers.0", "teacher_layer": "layers.1", "args": {}}
LOSSES = {"student-alone": {}, "lsp": {"lsp": LSP}, "kd + lsp": {"kd": {"weight": 1.0}, "lsp": LSP}}
T95 = {2: 12.7062, 3: 4.30265}  # Student's t, by the number of seeds


def network(test, seed, losses=(), parameters=1234, epochs=20):
    history = [
        {
            "epoch": e,
            "loss": 2.0 / (e + 1),
            "val": test - 40 / (e + 1) + 0.1 * seed,
            "seconds": 0.01 * e,
            "terms": {"task": 1.0 / (e + 1), **{name: 0.1 / (e + 1) for name in losses}},
        }
        for e in range(epochs)
    ]
    return {
        "test": test,
        "val": history[-1]["val"],
        "best_epoch": epochs - 1,
        "epochs": epochs,
        "seconds": 3.0 + seed,
        "parameters": parameters,
        "peak_memory_mb": 10.0 + seed,
        "history": history,
        "cost": {
            "parameters": parameters,
            "mmacs": parameters / 100,
            "latency_ms": 0.5 + seed,
            "threads": 2,
            "peak_memory_mb": None,
        },
    }


def record(test, seed, losses, data="cora", picture=False, hidden=8):
    model = lambda hidden: {"model": {"name": "gcn", "args": {"hidden": hidden}}, "train": {"epochs": 20}}
    out = {
        "schema": 1,
        "seed": seed,
        "student": network(test, seed, losses),
        "teacher": network(95.5, 0, (), 98765),
        "config": {
            "data": data,
            "teacher": model(64),
            "student": model(hidden),
            "task_weight": 1.0,
            "losses": losses,
            "teacher_seed": 0,
        },
        "environment": {"fastkd": "9.8.7", "torch": "2.13.0", "threads": 2},
    }
    if picture:
        points = [[math.cos(i), math.sin(2 * i), 0.1 * (i % 3)] for i in range(60)]
        distance = [i / 59 for i in range(60)]
        out["picture"] = {
            "points": points,
            "at": 0,
            "teacher": distance,
            "student": distance[::-1],
            "teacher_layer": "layers.1",
            "student_layer": "layers.0",
        }
    return out


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


def compressed(algorithm="ecs", seed=0, test=91.0, tuned=True, genes=(6, 10), score="accuracy", int8=True):
    rng = random.Random(seed)
    size = sum(genes)

    def costs(share):
        return {
            "parameters": round(1000 * share),
            "macs": round(40000 * share),
            "filters": 10,
            "bytes": round(4000 * share),
            "latency_ms": {"1": 0.5 * share, "64": 9.0 * share},
            "peak_memory_mb": {"1": share, "64": 20 * share},
        }

    searched = algorithm not in ("l1", "torch-pruning")
    n = 40 if searched else 1
    ids = [f"{rng.randrange(16**12):012x}" for _ in range(n)]
    columns = {"quality": [rng.random() for _ in ids], "cost": [rng.randrange(1, 16000) for _ in ids]}
    mask = lambda: bytes(rng.randrange(256) for _ in range(-(-size // 8))).hex()
    stages = {"masked": {"test": 50.0, "val": 51.0}, "recalibrated": {"test": test - 3, "val": 89.0}}
    stages |= {"finetuned": {"test": test, "val": 92.5}} if tuned else {}
    history = [{"epoch": e, "loss": 1 / (e + 1), "val": 90 + e, "lr": 0.1} for e in range(3)] if tuned else []
    last = list(stages.values())[-1]
    return {
        "schema": 1,
        "kind": "compress",
        "seed": seed,
        "score": score,
        "environment": {"fastkd": "9.8.7", "threads": 2},
        "config": {"data": "mnist", "model": {"name": "lenet", "args": {}}, "algorithm": {"name": algorithm}},
        "dense": {**costs(1.0), "test": 93.25 + seed, "val": 94.0, "seconds": 5.0, "history": []},
        "compact": {**costs(0.25), **last, "stages": stages, "seconds": 3.0, "history": history},
        "int8": {"test": 90.5, "val": 90.0, "bytes": 500, "latency_ms": {"1": 0.05, "64": 1.0}} if int8 else None,
        "onnx": None,
        "layers": [{"name": f"conv{k}", "size": g, "kept": g // 2} for k, g in enumerate(genes)],
        "search": {
            "algorithm": algorithm,
            "quality": "accuracy",
            "cost": "macs",
            "full_quality": 0.97,
            "full_cost": 40000,
            "evaluations": n,
            "seconds": 12.5,
            "chosen": ids[-1],
            "mask": mask(),
            "history": [
                {
                    "generation": g + 1,
                    "best": 0.8 + g / 100,
                    "quality": 0.8,
                    "cost": 9000,
                    "mean": 0.7,
                    "diversity": 0.4,
                    "hypervolume": 0.5 + g / 100,
                    "evaluations": 10 * g,
                    "seconds": g,
                    "mask": mask(),
                }
                for g in range(4)
            ]
            if searched
            else [],
            "individuals": {"id": ids, **columns},
            "front": {"id": ids[:2], **{k: v[:2] for k, v in columns.items()}},
            "l1": {"density": [0.5, 1.0], "quality": [0.6, 0.97], "cost": [11000, 40000]},
        },
    }


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
