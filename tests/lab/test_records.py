"""Records, the tables that are made of them, and the file in which an experiment's are kept."""

import io
import json
import subprocess
import sys

import pytest
from rich.console import Console
from sample_records import LOSSES, compressed, record

from fastkd.compress import tables as of_compression
from fastkd.compress.record import CompressRecord
from fastkd.distill import tables as of_distillation
from fastkd.distill.record import DistillRecord
from fastkd.lab import cells as cells_module
from fastkd.lab import record as records
from fastkd.lab.cells import Cells, experiments
from fastkd.lab.record import DamagedError, Record, Scores, UnknownSchemaError
from fastkd.lab.rows import Row, Section
from fastkd.lab.settings import ConfigError
from fastkd.lab.table import Column, Table, short
from fastkd.runtime.checkpoint import CheckpointError, alone
from fastkd.runtime.measure import PeakMemory

# --- records -----------------------------------------------------------------------------------------


def test_a_record_is_what_was_written():
    for content in (record(90.0, 3, LOSSES["kd + lsp"], picture=True), compressed()):
        content["new"] = {"key": [1]}  # of a newer version
        parsed = Record.parse(content)
        assert parsed.content() == content
        assert Record.parse(json.loads(json.dumps(parsed.content()))) == parsed
    assert isinstance(parsed, CompressRecord) and parsed.seed == 0


def test_a_record_that_is_made_here_has_schema_and_kind():
    for kind, content in ((DistillRecord, record(90.0, 0, {})), (CompressRecord, compressed())):
        bare = {key: value for key, value in content.items() if key not in ("schema", "kind")}
        assert kind.model_validate(bare).content() == content


@pytest.mark.parametrize("content", [record(90.25, 3, LOSSES["kd + lsp"], picture=True), compressed()])
def test_what_tables_and_pictures_need_is_kept(content):
    full = Record.parse(content)
    short = Record.parse(json.loads(json.dumps(full.shortened())))
    assert short.shortened() == full.shortened()
    assert len(json.dumps(full.shortened())) < 0.8 * len(json.dumps(content))
    assert (short.test, short.val, short.config, short.environment) == (
        full.test,
        full.val,
        full.config,
        full.environment,
    )
    if isinstance(short, DistillRecord):
        looks = [(look.epoch, look.loss, look.val, look.terms) for look in short.student.history]
        assert looks == [
            (
                look.epoch,
                pytest.approx(look.loss, rel=1e-5),
                pytest.approx(look.val, rel=1e-5),
                pytest.approx(look.terms, rel=1e-5),
            )
            for look in full.student.history
        ]
        assert short.picture == full.picture and not short.teacher.history
        one, other = (of_distillation.results(Section("a", "A", [Row("r", [r])])) for r in (short, full))
        assert one == other
        assert "seconds" not in json.dumps(full.shortened()["student"]["history"])
        later = Record.parse({**content, "seed": 4})
        assert "picture" in full.shortened([later]) and "picture" not in later.shortened([full])
    else:
        assert [look.mask for look in short.search.history] == [look.mask for look in full.search.history]
        assert short.search.individuals.id == full.search.individuals.id
        assert short.search.individuals.quality == pytest.approx(full.search.individuals.quality, rel=1e-5)
        assert [look.val for look in short.compact.history] == [look.val for look in full.compact.history]


def test_losses_that_come_and_go():
    looks = [{"epoch": 0, "terms": {"task": 1.0}}, {"epoch": 1, "terms": {"task": 0.5, "lsp": 0.123456789}}]
    columns = records.columns(looks, ("epoch", "terms", "lr"))
    assert columns == {"epoch": [0, 1], "terms": {"task": [1, 0.5], "lsp": [None, 0.123457]}}
    assert records.looks(columns) == [
        {"epoch": 0, "terms": {"task": 1}},
        {"epoch": 1, "terms": {"task": 0.5, "lsp": 0.123457}},
    ]
    assert records.looks(records.columns([], ("epoch",))) == []
    bare = [{"epoch": 3, "terms": {}}]
    assert records.looks(records.columns(bare, ("epoch", "terms"))) == [{"epoch": 3}]
    with pytest.raises(ValueError, match="columns of different lengths: 1, 2"):
        records.looks({"epoch": [0, 1], "val": [1.0]})


def test_fine_tuning_that_diverged():
    content = compressed()
    content["compact"]["history"][1]["loss"] = float("nan")
    short = Record.parse(content).shortened()
    assert short["compact"]["history"]["loss"][1] is None
    assert "NaN" not in json.dumps(short)
    assert Record.parse(short).compact.history[1].loss is None


DAMAGE = {
    "empty": (b"", "it is empty"),
    "cut": (json.dumps(record(80.0, 0, {})).encode()[:-300], "Expecting|Unterminated|delimiter"),
    "not UTF-8": (b'{"schema": 1, "name": "\xff"}', "utf-8"),
    "a list": (b"[1, 2]", "a list instead of a mapping"),
    "deep": (b'{"schema": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "it is nested too deep"),
    "infinity": (json.dumps(record(float("inf"), 0, {})).encode(), "test = inf: .*finite number"),
    "nan": (json.dumps(compressed(test=float("nan"))).encode(), "finite number"),
    "no schema": (b"{}", "no schema"),
    "no seed": (json.dumps({**record(80.0, 0, {}), "seed": None}).encode(), "seed = None"),
    "a word": (json.dumps({**record(80.0, 0, {}), "student": "high"}).encode(), "student = 'high'"),
    "another kind": (
        json.dumps({**record(80.0, 0, {}), "kind": "prune"}).encode(),
        "kind = 'prune' is that of no study",
    ),
    "no configuration": (json.dumps({**record(80.0, 0, {}), "config": {}}).encode(), "config"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files(tmp_path, name):
    text, reason = DAMAGE[name]
    file = tmp_path / "result.json"
    file.write_bytes(text)
    with pytest.raises(DamagedError, match=reason) as error:
        records.read(file)
    assert len(str(error.value)) < 400 and "\n" not in str(error.value)


def test_another_version():
    with pytest.raises(
        UnknownSchemaError, match=r"a\.json is a record of schema 2, and this version of fastkd knows 1"
    ):
        Record.parse({**record(80.0, 0, {}), "schema": 2}, "a.json")


def test_another_version_is_refused_every_time(tmp_path):
    file = tmp_path / "cora.jsonl"
    file.write_text("".join(json.dumps({"row": "a", **record(80.0, k, {}), "schema": k + 1}) + "\n" for k in range(2)))
    cells = Cells(tmp_path, "cora")
    for _ in range(2):
        with pytest.raises(UnknownSchemaError, match=r"cora\.jsonl, line 2, is a record of schema 2"):
            cells.rows()


# --- the file of an experiment -----------------------------------------------------------------------


def made(seed, test=80.0):
    return Record.parse(record(test, seed, {}))


def test_cells(tmp_path):
    cells = Cells(tmp_path / "cells", "cora")
    assert cells.rows() == {} and cells.find("KD + LSP", 0) is None
    for seed in (1, 0):
        cells.append("KD + LSP", made(seed, 80.0 + seed))
    cells.append("student alone", made(0))
    assert cells.file == tmp_path / "cells" / "cora.jsonl" and len(cells.file.read_bytes().splitlines()) == 3
    lines = [json.loads(line) for line in cells.file.read_text().splitlines()]
    assert [(line["row"], line["seed"]) for line in lines] == [("KD + LSP", 1), ("KD + LSP", 0), ("student alone", 0)]
    again = Cells(tmp_path / "cells", "cora")
    assert [(r.seed, r.test) for r in again.row("kd, LSP")] == [(0, 80.0), (1, 81.0)]  # the same but for punctuation
    assert list(again.rows()) == ["kd-lsp", "student-alone"] and again.name("kd-lsp") == "KD + LSP"
    assert again.find("KD + LSP", 1).test == 81.0 and again.find("KD + LSP", 2) is None
    cells.append("kd lsp", made(2))
    assert again.find("KD + LSP", 2) is not None, "what another process wrote is not seen"
    assert experiments(tmp_path / "cells") == ["cora"] and not again.notices


def test_the_later_one_counts_and_replacing_touches_no_other(tmp_path):
    cells = Cells(tmp_path, "cora")
    for test in (80.0, 81.0):
        cells.append("a", made(0, test))
    cells.append("b", made(0))
    assert cells.find("a", 0).test == 81.0
    before = cells.file.read_text().splitlines()
    cells.replace("a", made(0, 90.0))
    after = cells.file.read_text().splitlines()
    assert cells.find("a", 0).test == 90.0 and after[1:] == before[2:] and len(after) == 2
    cells.replace("c", made(5))
    assert cells.find("c", 5) is not None and len(cells.file.read_text().splitlines()) == 3


def test_older_files_are_read_beside_it(tmp_path):
    for seed in (0, 1):
        file = tmp_path / "cora" / "kd-lsp" / f"{seed}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(record(70.0 + seed, seed, {})))
    cells = Cells(tmp_path, "cora")
    assert experiments(tmp_path) == ["cora"] and cells.name("kd-lsp") == "kd lsp"
    cells.append("KD + LSP", made(1, 90.0))
    assert [r.test for r in cells.row("KD + LSP")] == [70.0, 90.0]
    (tmp_path / "cora" / "kd-lsp" / "2.json").write_text("{")
    with pytest.warns(UserWarning, match=r"2\.json is left out: .*delete it and run the same command again"):
        assert len(Cells(tmp_path, "cora").row("KD + LSP")) == 2


def test_a_line_that_a_crash_has_cut(tmp_path):
    cells = Cells(tmp_path, "cora")
    for seed in (0, 1):
        cells.append("a", made(seed))
    whole = cells.file.read_bytes()
    cells.file.write_bytes(whole[:-100])
    with pytest.warns(UserWarning, match=r"cora\.jsonl: its last line is left out: it was cut"):
        assert [r.seed for r in cells.row("a")] == [0]
    assert len(cells.notices) == 1
    cells.append("a", made(1))
    assert cells.file.read_bytes() == whole and not cells.notices + Cells(tmp_path, "cora").notices
    cells.file.write_bytes(whole[:-1])  # whole, but for its end
    cells.append("b", made(0))
    assert [len(of) for of in cells.rows().values()] == [2, 1] and not cells.notices


@pytest.mark.parametrize("name", [name for name in DAMAGE if name != "empty"])
def test_a_damaged_line_is_told_and_left(tmp_path, name):
    cells = Cells(tmp_path, "cora")
    cells.append("a", made(0))
    damaged = DAMAGE[name][0].replace(b'{"schema"', b'{"row": "b", "schema"') + b"\n"
    cells.file.write_bytes(damaged + cells.file.read_bytes())
    with pytest.warns(UserWarning, match=r"cora\.jsonl, line 1, is left out: .*delete the line and run it again"):
        assert [r.seed for r in cells.row("a")] == [0]
    cells.append("a", made(1))
    cells.replace("a", made(0, 85.0))
    assert [r.test for r in cells.row("a")] == [85.0, 80.0]
    assert cells.file.read_bytes().startswith(damaged), "a line was lost that could have been mended"


@pytest.mark.parametrize("name", ["../../x", "a/b", "", ".hidden", "a\\b", "a\nb", " a"])
def test_names_that_are_no_files(tmp_path, name):
    with pytest.raises(ConfigError, match="an experiment's name is that of a file"):
        Cells(tmp_path, name)
    assert Cells(tmp_path, "resnet20 (19.1 M), tuned").file.name == "resnet20 (19.1 M), tuned.jsonl"


def test_processes_append_in_turn(tmp_path, monkeypatch):
    code = """
import json, sys
from fastkd.distill.record import DistillRecord
from fastkd.lab.cells import Cells
from pathlib import Path
content = json.loads(sys.stdin.read())
cells = Cells(Path(sys.argv[1]), "cora")
for k in range(20):
    cells.append("a", DistillRecord.model_validate({**content, "seed": int(sys.argv[2]) + k}))
"""
    text = json.dumps(record(80.0, 0, LOSSES["lsp"]))
    found = [
        subprocess.Popen([sys.executable, "-c", code, tmp_path, str(100 * k)], stdin=subprocess.PIPE, text=True)
        for k in range(2)
    ]
    for process in found:
        process.stdin.write(text)
        process.stdin.close()
    assert [process.wait(300) for process in found] == [0, 0]
    cells = Cells(tmp_path, "cora")
    assert [r.seed for r in cells.row("a")] == [*range(20), *range(100, 120)] and not cells.notices

    monkeypatch.setattr(cells_module, "PATIENCE", 0.1)
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys, time; from pathlib import Path; from fastkd.runtime.checkpoint import alone\n"
         "with alone(Path(sys.argv[1])): print(1, flush=True); time.sleep(60)", tmp_path], stdout=subprocess.PIPE
    )  # fmt: skip
    assert holder.stdout.readline()
    try:
        with pytest.raises(CheckpointError, match="another process is at work there"):
            cells.append("a", made(50))
    finally:
        holder.kill()
        holder.wait()
    with alone(tmp_path):  # one's own hold is no other's
        cells.append("a", made(50))


def test_a_full_disk(tmp_path, monkeypatch):
    cells = Cells(tmp_path, "cora")
    cells.append("a", made(0))

    def full(handle):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(CheckpointError, match=r"cora\.jsonl could not be written .*No space left"):
            cells.append("a", made(1))
    assert [r.seed for r in cells.row("a")][:1] == [0]


# --- tables ------------------------------------------------------------------------------------------

COLUMNS = [
    Column(None, lambda row: row.label, always=True),
    Column("score, %", lambda row: f"{row.test.mean:.1f}", missing="not yet run"),
    Column("note", lambda row: ""),
    Column("more", lambda row: None),
]
ROWS = [Row("a & <b>", [Scores(test=1.0, val=1.0)]), Row("c", [])]


def table(rows=ROWS, **options):
    return Table.of(COLUMNS, rows, **options)


def shown(terminal, width=80):
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(terminal)
    return console.export_text()


def test_three_renderings():
    assert list(table().markdown()) == [
        "| | score, % | note | more |",
        "|---|---:|---:|---:|",
        "| a & <b> | 1.0 |  | |",
        "| c | not yet run | | |",
    ]
    html = "\n".join(table(best="a & <b>", note="Student's <t>").html())
    assert '<tr class="best"><td>a &amp; &lt;b&gt;</td><td>1.0</td><td></td><td></td></tr>' in html
    assert "<tr><td>c</td><td>not yet run</td>" in html and "Student's &lt;t&gt;</p>" in html
    text = shown(table(title="T").terminal())
    assert "a & <b>" in text and "not yet run" in text and "score, %" in text and " T " in text


@pytest.mark.parametrize("name", ["lsp [/x]", "[bold]", "[link=x]a[/link]", ":warning:", "[/]", "\\[red]"])
def test_markup_in_names_is_text(name):
    """In every table for the terminal: in cells, headings, titles and captions."""
    assert shown(table([Row(name, ROWS[0].records)], title=name, note=name).terminal()).count(name) == 3
    assert name in shown(Table([name], [], title=None).terminal())
    row = Row(name, [Record.parse(record(90.0, 0, {}))], 1)
    assert shown(of_distillation.overview(Section("a", name, [row])).terminal(), 120).count(name) == 2
    content = compressed()
    content["config"] = {**content["config"], "budget": {}, "model": {"name": name, "args": {}}}
    small = Record.parse(content)
    assert shown(of_compression.overview(Section("a", name, [Row(name, [small])])).terminal(), 120).count(name) == 2
    assert name in shown(of_compression.before_and_after([small]).terminal(box=None), 120)


def test_a_name_is_one_cell_of_markdown():
    lines = list(table([Row("a|b\nc", ROWS[0].records)]).markdown())
    assert lines[2] == r"| a\|b c | 1.0 |  | |"


def test_short():
    assert [short(x) for x in (1234.5, 0.01234, 12.345, None)] == ["1,234", "0.0123", "12.3", "–"]


# --- memory ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("taken", "mb"), [(-112, None), (0, None), (20, None), (256, None), (1024, 1.0)])
def test_a_peak_below_what_can_be_measured_is_none(monkeypatch, taken, mb):
    import torch

    memory = PeakMemory(torch.device("cpu"))
    if memory._before is None:
        pytest.skip("/proc/self/clear_refs cannot be written")
    monkeypatch.setattr("fastkd.runtime.measure._status", lambda key: memory._before + taken)
    assert memory.mb() == mb


def test_a_peak_that_is_none_is_shown_as_a_dash():
    content = record(90.0, 0, {})
    content["student"]["peak_memory_mb"] = None
    section = Section("a", "A", [Row("r", [Record.parse(content)], 1)])
    assert of_distillation.overview(section).lines[1][1][-1] == "-"
    assert of_distillation.report(section).lines[1][1][-2] == "–"
