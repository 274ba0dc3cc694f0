"""Plans: what they may say, which cells run, and the tables that are made of the cells; the demo's tables."""

import io
import json
import sys

import pytest
import torch
import yaml
from rich.console import Console
from typer.testing import CliRunner

from fastkd import cli, compress, demo
from fastkd.compress import tables
from fastkd.lab import plan as grid
from fastkd.lab.settings import ConfigError

pytestmark = pytest.mark.usefixtures("one_thread")

DISTIL = """
experiments:
  small:
    title: A small one
    recipe: digits
    seeds: 2
    base: {teacher: {model: {args: {hidden: 16}}, train: {epochs: 2}}, student: {train: {epochs: 2}}}
    rows:
      student alone: {losses: {lsp: null}}
      LSP: {}
"""
COMPRESS = """
experiments:
  lenet:
    title: A LeNet
    compress: digits
    seeds: 2
    rows:
      ECS: {}
      uniform L1: {algorithm: {name: l1}}
"""


def plan_of(folder, text):
    (folder / "plan.yaml").write_text(text)
    return grid.Plan(folder / "plan.yaml")


def records_of(folder, experiment):
    """Row -> records, by seed."""
    out = {}
    for line in (folder / "cells" / f"{experiment}.jsonl").read_text().splitlines():
        out.setdefault(json.loads(line)["row"], []).append(json.loads(line))
    return {row: sorted(found, key=lambda record: record["seed"]) for row, found in out.items()}


def table_of(folder, title):
    """Row -> heading -> text, of one experiment."""
    (part,) = [p for p in (folder / "RESULTS.md").read_text().split("## ") if p.startswith(title)]
    head, rule, *rows = [
        [c.strip() for c in line[1:-1].split("|")] for line in part.splitlines() if line.startswith("|")
    ]
    assert {len(r) for r in (rule, *rows)} == {len(head)}
    return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}


# --- distillation -------------------------------------------------------------------------------


def test_a_plan_of_distillation(tmp_path, monkeypatch):
    for name in ("fastkd.compress", "fastkd.compress.config"):
        monkeypatch.setitem(sys.modules, name, None)  # not importable, nor needed
    plan = plan_of(tmp_path, DISTIL)
    order = [(c.row, c.seed) for c in plan.cells()]
    assert order == [("student alone", 0), ("LSP", 0), ("student alone", 1), ("LSP", 1)]
    assert grid.run(plan, tmp_path / "work", limit=3) == 3
    table = table_of(tmp_path, "A small one")
    assert [table[row]["seeds"] for row in ("teacher", "student alone", "LSP")] == ["1", "2 of 2", "1 of 2"]
    lines = (tmp_path / "cells/small.jsonl").read_bytes()
    assert len(lines.splitlines()) == 3
    assert grid.run(plan, tmp_path / "work") == 1
    assert (tmp_path / "cells/small.jsonl").read_bytes().startswith(lines)
    assert sum(not c.done for c in plan_of(tmp_path, DISTIL.replace("seeds: 2", "seeds: 3")).cells()) == 2
    tests = [record["student"]["test"] for record in records_of(tmp_path, "small")["LSP"]]
    half = 12.706 * abs(tests[0] - tests[1]) / 2
    assert table_of(tmp_path, "A small one")["LSP"]["test, %"] == f"{sum(tests) / 2:.2f} ± {half:.2f}"


# --- compression --------------------------------------------------------------------------------


def record(config, seed):
    """As of fastkd.compress; numbers depend on the algorithm and the seed."""
    plain = config.algorithm.name == "ecs"
    stages = {"masked": {"val": 60.0, "test": 50.0}, "recalibrated": {"val": 91.0, "test": 90.0 + seed}}
    if config.finetune.epochs:
        stages["finetuned"] = {"val": 97.0, "test": 96.0 + 2 * seed}
    shared = {"peak_memory_mb": {"1": 1.0, "64": 2.0}, "bytes": 1, "seconds": 1.0, "history": []}
    return {
        "schema": 1,
        "kind": "compress",
        "seed": seed,
        "config": config.model_dump(),
        "score": "accuracy",
        "environment": {"threads": 1},
        "dense": {
            "val": 98.5,
            "test": 99.0 - seed,
            "parameters": 431_080,
            "macs": 2_290_000,
            "latency_ms": {"1": 3.0, "64": 60.0},
            **shared,
        },
        "compact": {
            **list(stages.values())[-1],
            "parameters": 43_108 if plain else 86_216,
            "macs": 229_000,
            "latency_ms": {"1": 2.0, "64": 15.0},
            "stages": stages,
            **shared,
        },
        "search": {
            "evaluations": 1000 + 500 * seed if plain else 1,
            "seconds": 4.0 + 4 * seed if plain else 0.1,
            "algorithm": config.algorithm.name,
            "quality": "accuracy",
            "chosen": "b",
            "individuals": {"id": ["a", "b"], "quality": [0.5, 0.875 if plain else 0.75], "cost": [1, 2]},
            "front": {"quality": [0.5], "cost": [1]},
            "l1": {"quality": [0.5], "cost": [1]},
            "cost": "macs",
            "full_quality": 0.9,
            "full_cost": 3,
            "mask": "80",
            "history": [],
        },
        "layers": [{"name": "conv", "size": 2, "kept": 1}],
    }


@pytest.fixture
def calls(monkeypatch):
    """Of fastkd.compress.compress, which only tells and returns a record."""
    out = []

    def fake(config, seed, directory, *, shared, progress, device):
        out.append((config.algorithm.name, seed, directory, shared))
        assert device == torch.device("cpu")
        if progress is not None:
            progress("search", 1, 2, {"generation": 1, "best": 0.5, "evaluations": 7})
        return record(config, seed)

    monkeypatch.setattr(compress, "compress", fake)
    return out


def test_a_plan_of_compression(tmp_path, calls):
    plan, told = plan_of(tmp_path, COMPRESS), []
    grid.write_table(plan)
    assert {r["seeds"] for r in table_of(tmp_path, "A LeNet").values()} == {"0 of 2"}
    assert grid.run(plan, tmp_path / "work", lambda cell, *a: told.append((cell.row, cell.seed, *a)), limit=3) == 3
    work = tmp_path / "work"
    assert calls == [
        ("ecs", 0, work / "lenet/ecs/0", work / "compress"),
        ("l1", 0, work / "lenet/uniform-l1/0", work / "compress"),
        ("ecs", 1, work / "lenet/ecs/1", work / "compress"),
    ]
    assert told[2] == ("ECS", 1, "search", 1, 2, {"generation": 1, "best": 0.5, "evaluations": 7})
    assert table_of(tmp_path, "A LeNet") == {
        "full network": {
            "test recalibrated, %": "98.50 ± 6.35",
            "test fine-tuned, %": "98.50 ± 6.35",
            "fitness": "",
            "validation, %": "98.50 ± 0.00",
            "seeds": "2",
            "MACs, %": "2.29 M",
            "parameters, %": "431,080",
            "faster": "",
            "evaluations": "",
            "search, s": "",
        },
        "ECS": {
            "test recalibrated, %": "90.50 ± 6.35",
            "test fine-tuned, %": "97.00 ± 12.71",
            "fitness": "87.50 ± 0.00",
            "validation, %": "97.00 ± 0.00",
            "seeds": "2 of 2",
            "MACs, %": "10.0",
            "parameters, %": "10.0",
            "faster": "1.50x / 4.00x",
            "evaluations": "1,250",
            "search, s": "6",
        },
        "uniform L1": {
            "test recalibrated, %": "90.00",
            "test fine-tuned, %": "96.00",
            "fitness": "75.00",
            "validation, %": "97.00",
            "seeds": "1 of 2",
            "MACs, %": "10.0",
            "parameters, %": "20.0",
            "faster": "1.50x / 4.00x",
            "evaluations": "1",
            "search, s": "0",
        },
    }
    assert grid.run(plan, work) == 1 and grid.run(plan, work) == 0


def test_a_changed_row_is_run_again_and_not_averaged(tmp_path, calls):
    """A cell counts as done where its record is of the configuration that the plan has now."""
    plan = plan_of(tmp_path, COMPRESS)
    assert grid.run(plan, tmp_path / "work") == 4
    changed = plan_of(tmp_path, COMPRESS.replace("ECS: {}", "ECS: {k_min: 2}"))
    assert [(c.row, c.seed) for c in changed.missing()] == [("ECS", 0), ("ECS", 1)]
    grid.write_table(changed)
    assert table_of(tmp_path, "A LeNet")["ECS"]["seeds"] == "0 of 2"
    assert grid.run(changed, tmp_path / "work", limit=1) == 1
    assert table_of(tmp_path, "A LeNet")["ECS"]["seeds"] == "1 of 2"
    assert [(c.row, c.seed) for c in changed.missing()] == [("ECS", 1)]
    (back,) = plan_of(tmp_path, COMPRESS).experiments
    assert [r.seed for r in back.records("ECS")] == [1], "the record of seed 0 is of the other configuration now"


def test_what_changes_nothing_is_no_other_configuration(tmp_path):
    (experiment,) = plan_of(tmp_path, DISTIL).experiments
    config = experiment.rows["LSP"]
    written = json.loads(json.dumps(config.model_dump()))
    idle = {
        "weight": 0.0,
        "student_layer": None,
        "teacher_layer": None,
        "start": 0,
        "stop": None,
        "ramp": 0,
        "args": {},
    }
    assert experiment.study.same({**written, "losses": {**written["losses"], "kd": idle}}, config)
    del written["teacher_seed"]  # of a version that did not know the key
    assert experiment.study.same(written, config)
    assert not experiment.study.same({**written, "task_weight": 2.0}, config)
    assert not experiment.study.same({"data": "digits"}, config)


def test_a_table_without_fine_tuning(tmp_path, calls):
    plan = plan_of(tmp_path, COMPRESS.replace("seeds: 2", "seeds: 1\n    base: {finetune: {epochs: 0}}"))
    grid.run(plan, tmp_path / "work", limit=1)
    table = table_of(tmp_path, "A LeNet")
    assert table["ECS"]["test, %"] == "90.00" and table["full network"]["test, %"] == "99.00"
    assert table["uniform L1"]["test, %"] == "not yet run" and table["uniform L1"]["seeds"] == "0 of 1"


def test_agreement_is_called_so(tmp_path, calls, monkeypatch):
    monkeypatch.setattr(
        compress, "compress", lambda config, seed, *_, **__: {**record(config, seed), "score": "agreement"}
    )
    grid.run(plan_of(tmp_path, COMPRESS), tmp_path / "work", limit=1)
    assert table_of(tmp_path, "A LeNet")["ECS"]["agreement fine-tuned, %"] == "96.00"


def test_a_real_compression_needs_nothing_of_distillation(tmp_path, monkeypatch):
    for name in ("fastkd.distill", "fastkd.distill.config", "torch_geometric"):
        monkeypatch.setitem(sys.modules, name, None)  # not importable
    plan = yaml.safe_load(COMPRESS)
    plan["experiments"]["lenet"] |= {
        "seeds": 1,
        "base": {
            "train": {"epochs": 1},
            "fitness": {"images": 20, "calibration_images": 20, "calibration_batch": 20},
            "algorithm": {"population": 3, "generations": 2},
            "finetune": {"epochs": 1},
            "export": {"onnx": False, "int8": False},
        },
    }
    assert grid.run(plan_of(tmp_path, yaml.safe_dump(plan, sort_keys=False)), tmp_path / "work", limit=1) == 1
    table, found = table_of(tmp_path, "A LeNet"), records_of(tmp_path, "lenet")["ECS"][0]
    assert table["ECS"]["test fine-tuned, %"] == f"{found['compact']['test']:.2f}"
    assert 0 < float(table["ECS"]["MACs, %"]) <= 25, "the recipe's budget"
    assert {p.name.split("-")[0] for p in (tmp_path / "work/compress").iterdir()} == {"dense", "search"}


# --- both ---------------------------------------------------------------------------------------


def test_the_header_is_of_the_kinds_that_are_there(tmp_path):
    both = {"experiments": {**yaml.safe_load(DISTIL)["experiments"], **yaml.safe_load(COMPRESS)["experiments"]}}
    for text, scores, faster in ((DISTIL, 1, 0), (COMPRESS, 0, 1), (yaml.safe_dump(both), 1, 1)):
        header = grid.write_table(plan_of(tmp_path, text)).read_text().split("## ")[0]
        assert (header.count("Scores are"), header.count("Compressed networks, ")) == (scores, faster)
        assert header.count("# Results") == 1


def test_a_recipe_beside_the_plan(tmp_path):
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"data": "digits", "model": {"name": "lenet"}, "k_min": 3}))
    plan = plan_of(tmp_path, COMPRESS.replace("compress: digits", "compress: own.yaml"))
    assert {row: (c.k_min, c.algorithm.name) for row, c in plan.experiments[0].rows.items()} == {
        "ECS": (3, "ecs"),
        "uniform L1": (3, "l1"),
    }


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("compress: digits", "compress: digits\n    recipe: digits"), "lenet: one of recipe .* is needed, got both"),
        (("compress: digits", ""), "lenet: one of recipe .* is needed, got neither"),
        (("compress: digits", "compress: digtis"), "lenet: no recipe or file 'digtis'.*did you mean 'digits'"),
        (("name: l1", "nam: l1"), "lenet, row 'uniform L1': unknown key 'algorithm.nam'.*did you mean 'name'"),
        (("seeds: 2", "seeds: 0"), "lenet: seeds = 0: .*greater than or equal to 1"),
        (("seeds: 2", "sedes: 2"), "lenet: unknown key 'sedes'.*did you mean 'seeds'"),
        (("ECS: {}", "ECS: 3"), "lenet: rows.ECS = 3: .*dictionary"),
        (("ECS: {}", "uniform-l1: {}"), "lenet, row 'uniform L1': .*'uniform-l1'.*more than case and punctuation"),
        (("    rows:", "    cells:"), "(?s:lenet: .*missing key 'rows')"),
        (("experiments:", "experiment:"), "must hold a mapping 'experiments'"),
        (("{}", "{"), "is not YAML"),
    ],
)
def test_a_wrong_plan(tmp_path, change, told):
    assert change[0] in COMPRESS
    with pytest.raises(ConfigError, match=rf"plan.yaml.*(?:{told})"):
        plan_of(tmp_path, COMPRESS.replace(*change))


def test_no_plan(tmp_path):
    with pytest.raises(ConfigError, match=r"no plan .*none.yaml"):
        grid.Plan(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="no experiment 'lent': there are lenet"):
        grid.run(plan_of(tmp_path, COMPRESS), tmp_path, only="lent")


@pytest.mark.parametrize("text", [COMPRESS, DISTIL])
def test_a_cell_that_cannot_be_run_is_named(tmp_path, text):
    content = yaml.safe_load(text)
    ((name, experiment),) = content["experiments"].items()
    experiment["rows"] = {"wrong": {"data": "digitz"}}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(content))
    out = CliRunner().invoke(cli.app, ["grid", str(tmp_path / "plan.yaml"), "--work", str(tmp_path / "work")])
    assert out.exit_code == 2
    assert f"plan.yaml: {name}, row 'wrong', seed 0: " in out.output and "did you mean 'digits'?" in out.output


# --- the demo -----------------------------------------------------------------------------------


def test_the_demos_plan(tmp_path):
    plan = demo.prepare(tmp_path, epochs=2, seeds=1)
    assert [(e.kind, e.seeds) for e in plan.experiments] == [("recipe", 1), ("recipe", 1), ("compress", 1)]
    lenet = plan.experiments[2].rows
    assert {c.algorithm.name for c in lenet.values()} == {"ecs", "random", "l1"}
    assert {(c.train.epochs, c.finetune.epochs) for c in lenet.values()} == {(2, 2)}
    with pytest.raises(ConfigError, match="another demo"):
        demo.prepare(tmp_path, epochs=3, seeds=1)


def test_the_demos_table_of_compression(tmp_path, calls):
    plan = plan_of(tmp_path, COMPRESS)
    grid.run(plan, tmp_path / "work", limit=3)
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(tables.overview(plan.experiments[0].section()).terminal())
    rows = {
        cells[1].strip(): [c.strip() for c in cells[2:-1]]
        for line in console.export_text().splitlines()
        if len(cells := line.replace("┃", "│").split("│")) > 3
    }
    assert rows["full network"] == ["431,080", "98.50 ± 6.35", "2.29", "1.0x / 1.0x"]
    assert rows["ECS"] == ["43,108", "97.00 ± 12.71", "0.23", "1.5x / 4.0x"]
    assert rows["uniform L1"] == ["86,216", "96.00", "0.23", "1.5x / 4.0x"]
