"""Configurations: the YAML that is read, the arguments that names take, names that become folders, the reference."""

import json
import time
from pathlib import Path
from typing import get_args

import pytest
import torch

pytest.importorskip("pydantic")
pytest.importorskip("torch_geometric")

import fastkd.report.studies  # noqa: F401  the records' types
from fastkd import compress, distill
from fastkd.compress import config as compression
from fastkd.distill import config as distillation
from fastkd.evolve import ALGORITHMS, QUALITIES
from fastkd.lab import arguments, plan, reader, settings
from fastkd.lab.settings import ConfigError
from fastkd.models import CNNS, MODELS
from fastkd.report import records

RESULTS = Path(__file__).parents[2] / "results"
MAKERS = {
    "networks": distillation._networks,
    "losses": distillation._losses,
    "cnns": compression._networks,
    "algorithms": compression._algorithms,
}


def one_line(call, *parts):
    with pytest.raises(ConfigError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and len(text) < 1000
    for part in parts:
        assert part in text
    return text


# --- YAML -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3), ("5e-1", 0.5), ("1E5", 1e5), ("1.e3", 1000.0), ("+1e3", 1000.0), ("-.5", -0.5), ("2.0e+1", 20.0),
        ("1.0", 1.0), ("7", 7), ("-3", -3), ("0", 0), ("1_000", 1000), ("0x1F", 31), ("0o17", 15),
        (".inf", float("inf")), ("-.INF", float("-inf")), ("null", None), ("~", None), ("", None),
        ("yes", True), ("off", False), ("true", True), ("False", False),
        ("1e", "1e"), ("e3", "e3"), (".", "."), ("1:30", "1:30"), ("010", "010"), ("2001-01-01", "2001-01-01"), ("'1e-3'", "1e-3"),
        ("1" * 5000, "1" * 5000),
        ("{a: [1, b], no: 2}", {"a": [1, "b"], "no": 2}),
        ("1: x", {"1": "x"}),
    ],
)  # fmt: skip
def test_values(text, value):
    found = settings.parse(text, "x")
    assert found == value and type(found) is type(value)


BOMB = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10))


@pytest.mark.parametrize(
    ("text", "line", "told"),
    [
        (BOMB, 1, "anchors and aliases"),
        ("a: 1\nb: *a\n", 2, "anchors and aliases"),
        ("a: 1\nb: 2\na: 3\n", 3, "the key 'a' is there twice"),
        ("a: {b: 1, b: 2}\n", 1, "the key 'b' is there twice"),
        ("a: !!python/object:os.system x\n", 1, "tags such as"),
        ("a: !!int x\n", 1, "tags such as"),
        ("a: 1\n[a, b]: 1\n", 2, "a key must be"),
        ("[" * 100_000, 1, "30 levels"),
        ("{a: " * 31, 1, "30 levels"),
        ("a: [1\n", 2, "is not YAML"),
        ("a: b: c\n", 1, "is not YAML"),
        ("a: 'x\n", 2, "is not YAML"),
        ("a: 1\n--- \nb: 2\n", 2, "is not YAML"),
        ("a: \x00\n", None, "is not YAML"),
    ],
)
def test_what_is_refused(tmp_path, text, line, told):
    path, start = tmp_path / "a.yaml", time.monotonic()
    path.write_text(text)
    for call in (lambda: distill.load_config(path), lambda: compress.load_config(path), lambda: plan.Plan(path)):
        one_line(call, str(path), told, "" if line is None else f"line {line}")
    one_line(lambda: distill.load_config("digits", [f"data={text}"]), told)
    assert time.monotonic() - start < 10


def test_files_that_are_no_text_or_too_large(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_bytes(b"a: \xff\n")
    one_line(lambda: distill.load_config(path), "a.yaml is not YAML", "UTF-8")
    path.write_bytes(b"#" * (reader.LARGEST + 1))
    one_line(lambda: distill.load_config(path), "a.yaml must have at most 1,000,000 bytes")
    one_line(lambda: settings.parse("#" * (reader.LARGEST + 1), "x"), "x must have at most")


def test_the_report_does_not_hang(tmp_path):
    record = next((RESULTS / "cells").rglob("*.jsonl"))
    cell = tmp_path / record.relative_to(RESULTS)
    cell.parent.mkdir(parents=True)
    cell.write_bytes(record.read_bytes())
    (tmp_path / "plan.yaml").write_text(BOMB)
    start = time.monotonic()
    assert any("plan.yaml" in notice for notice in records.read(tmp_path).notices)
    assert time.monotonic() - start < 10


def test_a_null_removes_a_key_at_any_depth():
    assert settings.merged({"a": 1}, {"b": {"c": None, "d": {"e": None, "f": 2}}}) == {"a": 1, "b": {"d": {"f": 2}}}
    assert settings.merged({"a": 1}, {"a": {"c": None}}) == {"a": {}}


# --- overrides ------------------------------------------------------------------------------------


def test_overrides_that_are_right():
    config = distill.load_config(
        "digits",
        ["losses.lsp.args.kernel_args.sigma=1e-3", "student.model.args.dropout=5e-1", "student.train.epochs=1e2"],
    )
    assert config.losses["lsp"].args["kernel_args"]["sigma"] == 1e-3
    assert config.student.model.args["dropout"] == 0.5 and config.student.train.epochs == 100


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("student.model.args.hidden=abc", ["student.model.args.hidden", "an integer", "'abc'"]),
        ("student.model.args.hidden=1e3", ["student.model.args.hidden", "an integer", "1000.0"]),
        ("student.model.args.hidden=0", ["student.model.args", "hidden must be at least 1, got 0"]),
        ("student.model.args.dropout=1.5", ["student.model.args", "dropout must be in [0, 1), got 1.5"]),
        ("student.model.args.norm=bach", ["student.model.args", "norm must be None, 'batch' or 'layer', got 'bach'"]),
        ("student.model.args.hiden=8", ["student.model.args", "unknown key 'hiden' (did you mean 'hidden'?)", "dropout"]),
        ("student.model.name=gcm", ["student.model.name", "graphsage", "'gcm' (did you mean 'gcn'?)"]),
        ("student.model.name=os:system", ["student.model.name", "'os:system'"]),
        ("student.train.lr=1e30", ["student.train.lr = 1e+30", "less than or equal"]),
        ("student.train.lr=.inf", ["student.train.lr = inf", "finite"]),
        ("student.train.epochs=yes", ["student.train.epochs", "got true"]),
        ("task_weight=.nan", ["task_weight = nan"]),
        ("teacher_seed=99999999999999999999", ["teacher_seed"]),
        ("losses.lspp.weight=1", ["losses", "gcrd", "'lspp' (did you mean 'lsp'?)"]),
        ("losses.../x.weight=1", ["losses"]),
        ("losses.lsp.args.foo=1", ["losses.lsp.args", "unknown key 'foo'", "kernel_args"]),
        ("losses.lsp.args.kernel=rbff", ["losses.lsp.args", "kernel must be one of rbf", "'rbff'"]),
        ("losses.lsp.args.reduction=men", ["losses.lsp.args.reduction", "'mean_edges'", "'men'"]),
        ("losses.lsp.args.shuffle=1", ["losses.lsp.args.shuffle", "true or false"]),
        ("losses.lsp.args.kernel_args.sigma=x", ["losses.lsp.args.kernel_args.sigma", "a number", "'x'"]),
        ("losses.lsp.args.kernel_args.sigma=-1", ["losses.lsp.args", "sigma must be finite", "-1"]),
        ("losses.lsp.args.kernel_args.sigma=0", ["losses.lsp.args.kernel_args = {'scale'", "sigma must be finite"]),
        ("losses.lsp.args.kernel_args.sigam=1", ["losses.lsp.args.kernel_args", "'sigam' (did you mean 'sigma'?)", "rbf"]),
        ("losses.lsp.args.kernel=poly", ["losses.lsp.args.kernel_args", "unknown key 'sigma'", "degree"]),
        ("losses.kd.args.temperature=0", ["losses.kd.args", "temperature must be a number in (0, inf), got 0"]),
    ],
)  # fmt: skip
def test_overrides_that_are_wrong(override, told):
    one_line(lambda: distill.load_config("digits", [override]), *told)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("algorithm.args.denisty=1", ["algorithm.args", "'denisty' (did you mean 'density'?)", "mutation_by"]),
        ("algorithm.args.density=2", ["algorithm.args", "density must be in [0, 1], got 2"]),
        ("algorithm.args.density=rand", ["algorithm.args.density", "'random'", "'rand'"]),
        ("algorithm.args.elites=1.5", ["algorithm.args.elites", "an integer", "1.5"]),
        ("algorithm.args.selection=best", ["algorithm.args", "selection must be one of roulette", "'best'"]),
        ("algorithm.args.copy=0.5", ["algorithm.args", "copy + crossover + mutation must be 1"]),
        ("algorithm.name=pymoo", ["algorithm.name", "torch-pruning", "'pymoo'"]),
        ("model.name=lenett", ["model.name", "'lenett' (did you mean 'lenet'?)", "module:function"]),
        ("model.args.num_classes=0", ["model.args", "num_classes must be at least 1, got 0"]),
        ("model.args.classes=3", ["model.args", "unknown key 'classes'", "num_classes"]),
        ("fitness.quality=acuracy", ["fitness.quality", "'acuracy' (did you mean 'accuracy'?)"]),
        ("budget.flops=0.5", ["budget", "macs", "'flops'"]),
        ("budget.macs=0", ["budget.macs", "(0, 1]"]),
        ("budget.macs=1e-1000", ["budget.macs", "(0, 1]"]),
    ],
)  # fmt: skip
def test_overrides_of_a_compression_that_are_wrong(override, told):
    one_line(lambda: compress.load_config("digits", [override]), *told)


# --- arguments ------------------------------------------------------------------------------------


def test_every_name_has_a_maker():
    found = {kind: list(makers()) for kind, makers in MAKERS.items()}
    assert found["networks"] == list(MODELS) and found["cnns"] == list(CNNS)
    assert found["losses"] == list(distill.config.losses.LOSSES)
    assert found["algorithms"] == [*ALGORITHMS, "l1", "torch-pruning"]


@pytest.mark.parametrize("kind", MAKERS)
def test_arguments_are_those_of_the_signature(kind):
    for name, maker in MAKERS[kind]().items():
        defaults = {key: default for key, (_, default, _) in maker.keys.items()}
        assert maker.problems(defaults, name) == []
        assert not {"in_dim", "out_dim", "student_dim", "teacher_dim", "self"} & defaults.keys()
        ((_, text, _),) = maker.problems({"beta": 1}, name)
        assert all(key in text for key in maker.keys) and "'beta'" in text
        for key in maker.keys:
            ((at, text, _),) = maker.problems({key: {"x": object()}}, name)
            assert key in (*at, *text.split()), text


@pytest.mark.parametrize("name", ["l1", "torch-pruning"])
def test_a_control_takes_and_ignores_the_options_of_an_algorithm(name):
    config = compress.load_config("digits", [f"algorithm.name={name}", "algorithm.args.mutation=0.9"])
    assert config.algorithm.args == {"density": "random", "mutation": 0.9}
    one_line(lambda: compress.load_config("digits", [f"algorithm.name={name}", "algorithm.args.x=0.9"]), "'x'")


def test_a_network_of_the_user_has_free_arguments():
    config = compress.load_config("digits", ["model.name=nets:small", "model.args.depth=[3, x]"])
    assert config.model.model_dump() == {"name": "nets:small", "args": {"depth": [3, "x"]}}


def test_arguments_are_dumped_as_they_were_given():
    args = {"num_layers": 2, "dropout": 0, "hidden": 8}
    config = distill.ModelConfig(name="gcn", args=args)
    assert json.dumps(config.model_dump()) == json.dumps({"name": "gcn", "args": args})
    with pytest.raises(ValueError, match="unknown key 'num_layers'"):
        config.name = "gat"


def test_looking_at_a_configuration_draws_no_random_numbers():
    for makers in MAKERS.values():
        for maker in makers().values():
            maker.known.clear()
    state = torch.get_rng_state()
    for name in distillation.recipes():
        distill.load_config(name, ["losses.gcrd.weight=1", "losses.fitnet.weight=1", "losses.rsd.weight=1"])
    for name in compression.recipes():
        compress.load_config(name)
    assert torch.equal(torch.get_rng_state(), state)


# --- records and plans ----------------------------------------------------------------------------


def contains(whole, part):
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(k in whole and contains(whole[k], v) for k, v in part.items())
    return whole == part and type(whole) is type(part)


@pytest.mark.skipif(not RESULTS.is_dir(), reason="not in the repository")
def test_the_records_of_the_repository_are_read():
    read = [(file, json.loads(line)) for file in RESULTS.rglob("*.jsonl") for line in file.read_text().splitlines()]
    assert len(read) > 100
    for file, record in read:
        engine = compress if record.get("kind") == "compress" else distill
        dumped = json.loads(json.dumps(engine.load_config(record["config"]).model_dump()))
        assert contains(dumped, record["config"]), file
        for before, after in zip(parts(record["config"]), parts(dumped), strict=True):
            assert json.dumps(before["args"]) == json.dumps(after["args"])


def parts(config):
    """All that have args."""
    if isinstance(config, dict):
        if "args" in config:
            yield config
        for value in config.values():
            yield from parts(value)


@pytest.mark.skipif(not RESULTS.is_dir(), reason="not in the repository")
def test_the_plans_of_the_repository_are_valid():
    for file in RESULTS.rglob("plan.yaml"):
        assert plan.Plan(file).experiments


@pytest.mark.parametrize(
    "name", ["../../x", "a/b", "", ".", "..", ".a", " a", "a\\b", "/etc", "a\nb", "x" * 101, "a\0"]
)
def test_names_that_are_no_folders(tmp_path, name):
    path = tmp_path / "plan.yaml"
    path.write_text(json.dumps({"experiments": {name: {"recipe": "digits", "rows": {"a": {}}}}}))
    one_line(lambda: plan.Plan(path), "plan.yaml", "must be the name of a folder")


@pytest.mark.parametrize("name", ["/", "", "...", "x" * 201])
def test_rows_without_a_folder(tmp_path, name):
    path = tmp_path / "plan.yaml"
    path.write_text(json.dumps({"experiments": {"a": {"recipe": "digits", "rows": {name: {}}}}}))
    one_line(lambda: plan.Plan(path), "plan.yaml", "must have a letter a-z or a digit")


# --- the reference --------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [distillation.RunConfig, compression.CompressConfig])
def test_every_key_is_described(model):
    entries = arguments.reference(model)
    for entry in entries:
        assert entry.text and entry.type and entry.default is not None, entry
    assert len({(e.key, e.of) for e in entries}) == len(entries)


def test_the_reference():
    of = {(e.key, e.of): e for e in arguments.reference(distillation.RunConfig)}
    assert of["student.train.lr", ""][1:3] == ("a number", "0.01")
    assert of["data", ""].default == "required"
    assert of["student.model.args.heads", "gat_student"][1:3] == ("a list of integers", "[2, 2, 2, 2, 2]")
    assert of["losses.<name>.args.kernel_args.degree", "lsp with poly"].default == "2"
    of = {(e.key, e.of): e for e in arguments.reference(compression.CompressConfig)}
    assert of["algorithm.args.mutation_by", "ecs"].default == '"segment"'


def test_qualities_are_those_of_evolve():
    assert get_args(compression.FitnessConfig.model_fields["quality"].annotation) == tuple(QUALITIES)
