"""Training with the LSP loss from end to end: time per epoch, peak memory and the share of LSP, with fastkd
and with the same training on PyG's own layers.

``python -m bench.end_to_end [CASE ...]`` writes results/end_to_end.json and .md, on the CPU.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader
from torch_geometric.nn import EdgeConv, GATConv, GCNConv
from torch_geometric.utils import coalesce, scatter, softmax

from fastkd import Graph, data
from fastkd.data import Task
from fastkd.data.graphs import SETS, to_task
from fastkd.distill import Distiller, LossConfig, load_config, runs
from fastkd.distill.batches import batches
from fastkd.distill.config import RunConfig
from fastkd.models.gnn import GATLayer

from .cases import SEED, Absent, _random
from .memory import _ROOT, _Process
from .peers import available
from .report import number, table
from .test_lsp import environment, seconds

RESULTS = _ROOT / "bench" / "results" / "end_to_end.json"
SECONDS, LEAST = 60, 3  # for the pairs of a case, about; and the fewest pairs


def load(recipe: str) -> RunConfig:
    """A recipe with the RBF kernel at its middle layers, which is what the peer computes."""
    config = load_config(recipe)
    layers = {"GAT": ("layers.2", "layers.1"), "GCN": ("layers.0", "layers.0"), "DGCNN": ("layers.2", "layers.3")}
    student, teacher = layers[config.student.model.name.split("_")[0].upper()]
    lsp = LossConfig(
        weight=100,
        student_layer=student,
        teacher_layer=teacher,
        args={"kernel": "rbf", "kernel_args": {"sigma": 1.0, "scale": "mean"}},
    )
    return config.model_copy(update={"losses": {"lsp": lsp}})


# --- what is trained ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    recipe: str
    task: Callable[[], Task]
    scale: float = 1.0  # steps of an epoch / steps of the task
    val_scale: float = 1.0  # the same of the validation part
    tolerance: float = 1e-4  # of the first step's loss, relative
    needs: float = 0.0  # bytes of a plain step, roughly: the E x D temporaries alive at its peak


def _real(name: str) -> Callable[[], Task]:
    def load() -> Task:
        file = Path(os.environ.get("FASTKD_DATA", "")) / "graphs" / f"{name}.npz"
        if not file.is_file():
            raise Absent(f"{name}: no file graphs/{name}.npz in $FASTKD_DATA")
        return data.load(name)

    return load


def _ppi_size() -> Task:
    """24 graphs with the counts of PPI, of which 2 for training: one step."""
    generator = torch.Generator().manual_seed(SEED)
    bounds = torch.linspace(0, 56_944, 25).long()
    sizes, pairs = bounds.diff().tolist(), torch.linspace(0, 818_716, 25).long().diff().tolist()
    edges = [
        _random(n, 2 * e, 0.3, True)(generator)[0] + start
        for n, e, start in zip(sizes, pairs, bounds.tolist(), strict=False)
    ]
    n = int(bounds[-1])
    arrays = {
        "x": torch.randn(n, 50, generator=generator),
        "edge_index": torch.cat(edges, 1),
        "graph_ptr": bounds,
        "y": (torch.rand(n, 121, generator=generator) < 0.3).long(),
        "train_graphs": torch.arange(20),
        "val_graphs": torch.arange(20, 22),
        "test_graphs": torch.arange(22, 24),
    }
    task = to_task("ppi_size", SETS["ppi"], {key: x.numpy() for key, x in arrays.items()}, "generated")
    task.graphs["train"] = task.graphs["train"][:2]
    return task


def _modelnet40_size() -> Task:
    """Random clouds of 1,024 points: one step of 32 for training, one for validation, one to test."""
    generator = torch.Generator().manual_seed(SEED)
    points = {
        part: F.normalize(torch.randn(32, 1024, 3, generator=generator), dim=2) for part in ("train", "val", "test")
    }
    return Task(
        "modelnet40_size",
        "shapes",
        3,
        40,
        False,
        True,
        {},
        "generated",
        points,
        {part: torch.randint(40, (32,), generator=generator) for part in points},
    )


CASES = {
    "coauthor_cs": Case("coauthor_cs", _real("coauthor_cs")),
    "proteins_inductive": Case("proteins_inductive", _real("proteins_inductive")),
    "ppi_size": Case("ppi", _ppi_size, 10, needs=3 * 4 * 1024 * 2 * 2 * 818_716 / 24),
    # 9,843 official training shapes, a tenth of them to validate; unions of up to 30 edges per point. Of points at
    # almost the same distance the two sides may take different ones as neighbours.
    "modelnet40_size": Case(
        "modelnet40", _modelnet40_size, 9_843 * 0.9 / 32, 9_843 * 0.1 / 32, 1e-3, 3 * 4 * 256 * 32 * 1024 * 30
    ),
}


# --- the two sides: what both can do --------------------------------------------------------------


class Fast:
    """The Distiller, as `fastkd distill` runs it."""

    def __init__(self, case: Case, task: Task) -> None:
        config = load(case.recipe)
        self.teacher = runs.build(config.teacher, task, 0)
        self.student = runs.build(config.student, task, 1)
        self.distiller = Distiller(self.student, self.teacher, task, losses=config.losses, train=config.student.train)

    def epoch(self) -> None:
        self.distiller.step(0)

    def first(self) -> Tensor:
        self.student.train()
        return self.distiller.loss(next(self.distiller._batches("train", True)), 0)[0]

    def parts(self) -> dict[str, Callable[[], object]]:
        """Of a step, with the first batch: the teacher's part, if it has one; LSP forward and backward."""
        d, config = self.distiller, self.distiller.terms["lsp"]
        batch = next(d._batches("train", True))
        with torch.no_grad():
            d._call(self.student, batch)
        s = d._taps_s[config.student_layer].detach().requires_grad_()
        out = d._teacher_outputs(batch)
        loss, t = d.losses["lsp"], out[config.teacher_layer]
        graph, teacher_graph = batch.graph, None
        if batch.key is not None:
            t = loss.prepare(t, graph)
        elif graph is None:
            graph, teacher_graph = self.student.graph(config.student_layer), out["graphs"][config.teacher_layer]
        edges = None if graph is None or batch.key is not None or teacher_graph else graph.edge_index

        def lsp() -> object:  # a new batch's graph is sorted anew
            own = graph if edges is None else Graph.from_edge_index(edges, len(s))
            return torch.autograd.grad(loss(s, t, own, None, teacher_graph), s)

        return {"lsp": lsp} | ({} if batch.key is not None else {"teacher": lambda: d._teacher_outputs(batch)})


class Plain:
    """The same weights in PyG's layers, LSP by gather and scatter. What an able author of a script would keep
    is kept: of a graph that stays the same, the teacher's distribution and GCNConv's normalisation."""

    def __init__(self, case: Case, task: Task, networks: Fast) -> None:
        config = load(case.recipe)
        self.task, self.config, self.lsp = task, config.student.train, config.losses["lsp"]
        self.student = plain_network(networks.student)
        self.teacher = plain_network(networks.teacher).eval().requires_grad_(False)
        self.kept: dict[str, Tensor] = {}
        for side, model in (("student", self.student), ("teacher", self.teacher)):
            layer = model.get_submodule(getattr(self.lsp, f"{side}_layer"))
            layer.register_forward_hook(lambda _, args, out, side=side: self.kept.update({side: out}))
        c, parameters = self.config, self.student.parameters()
        self.optimizer = (
            torch.optim.SGD(parameters, c.lr, c.momentum, weight_decay=c.weight_decay)
            if c.optimizer == "sgd"
            else torch.optim.Adam(parameters, c.lr, weight_decay=c.weight_decay)
        )
        self.generator = torch.Generator().manual_seed(0)
        self.static = task.kind == "nodes" and c.batch_size is None
        self.graphs = [Data(x=g.x, y=g.y, edge_index=g.edge_index) for g in task.graphs.get("train", [])]

    def batches(self) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
        """(what the networks are called with, labels)"""
        if self.task.kind == "shapes":  # no graphs yet: there is nothing to do better or worse
            shapes = batches(self.task, "train", self.config, self.generator, torch.device("cpu"), {})
            return ((batch.inputs, batch.y) for batch in shapes)
        loader = (
            self.graphs
            if self.static
            else DataLoader(self.graphs, self.config.batch_size, shuffle=True, generator=self.generator)
        )
        return (((g.x, g.edge_index), g.y) for g in loader)

    def look_up_teacher(self, inputs: tuple[Tensor, ...]) -> None:
        if "target" not in self.kept:
            with torch.no_grad():
                self.teacher(*inputs)

    def log_prob(self, x: Tensor, edges: Tensor) -> Tensor:
        """[E] of every edge's similarity among those of its destination."""
        distance = (x.index_select(0, edges[1]) - x.index_select(0, edges[0])).pow(2).sum(1)
        args = {"sigma": 100.0, **self.lsp.args.get("kernel_args", {})}
        width = x.shape[1] if args.get("scale") == "mean" else 1
        return softmax(torch.exp(-distance / (2 * args["sigma"] * width)), edges[1], num_nodes=len(x)).log()

    def divergence(self, student: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        if self.task.kind == "shapes":  # the union of both networks' neighbourhoods
            edges = coalesce(
                torch.cat((self.student.edges[self.lsp.student_layer], self.teacher.edges[self.lsp.teacher_layer]), 1)
            )
        else:
            edges = inputs[1]
        target = self.kept.get("target")
        if target is None:
            target = self.log_prob(self.kept["teacher"], edges)
            if self.static:
                self.kept["target"] = target
        log_prob = self.log_prob(student, edges)
        return scatter(log_prob.exp() * (log_prob - target), edges[1], 0, len(student), "sum").mean()

    def loss(self, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
        logits = self.student(*inputs)
        self.look_up_teacher(inputs)
        structure = self.divergence(self.kept["student"], inputs)
        if not self.task.inductive:
            mask = self.task.graphs["train"][0].train_mask
            logits, y = logits[mask], y[mask]
        own = F.binary_cross_entropy_with_logits if self.task.multilabel else F.cross_entropy
        return own(logits, y) + self.lsp.weight * structure

    def first(self) -> Tensor:
        return self.loss(*next(self.batches()))

    def epoch(self) -> None:
        self.student.train()
        for batch in self.batches():
            self.optimizer.zero_grad()
            self.loss(*batch).backward()
            self.optimizer.step()

    def parts(self) -> dict[str, Callable[[], object]]:
        inputs, _ = next(self.batches())
        with torch.no_grad():
            self.student(*inputs)
        s = self.kept["student"].detach().requires_grad_()
        out: dict[str, Callable[[], object]] = {"lsp": lambda: torch.autograd.grad(self.divergence(s, inputs), s)}
        return out if self.static else {**out, "teacher": lambda: self.look_up_teacher(inputs)}


class Skip(nn.Module):
    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.conv(x, edge_index) + x


class PlainDGCNN(nn.Module):
    """PyG's DynamicEdgeConv, written out: torch-cluster's knn is torch.cdist and topk here, and the activation,
    which increases, comes after the maximum rather than at every edge."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.k = model.k
        weights = copy.deepcopy(model.layers.state_dict())
        self.layers = nn.ModuleList(EdgeConv(nn.Sequential(layer.lin, layer.norm), "max") for layer in model.layers)
        model.layers.load_state_dict(weights)  # EdgeConv has drawn new ones
        self.emb, self.head = model.emb, model.head

    def forward(self, points: Tensor) -> Tensor:
        clouds, size, _ = points.shape
        x, self.edges, features = points.reshape(-1, 3), {}, []
        for i, layer in enumerate(self.layers):
            edges = self.edges[f"layers.{i}"] = nearest(x.detach().view(clouds, size, -1), self.k)
            x = F.leaky_relu(layer(x, edges), 0.2)
            features.append(x)
        x = self.emb(torch.cat(features, 1)).view(clouds, size, -1)
        return self.head(torch.cat((x.max(1).values, x.mean(1)), 1))


def nearest(x: Tensor, k: int) -> Tensor:
    """x [B, P, D] -> edge_index [2, B * P * k]"""
    clouds, size, _ = x.shape
    near = torch.cdist(x, x).topk(k, largest=False).indices + size * torch.arange(clouds)[:, None, None]
    return torch.stack((near.flatten(), torch.arange(clouds * size).repeat_interleave(k)))


def plain_network(model: nn.Module) -> nn.Module:
    """The same weights in PyG's layers."""
    model = copy.deepcopy(model)
    if not hasattr(model.layers[0], "in_channels"):
        return PlainDGCNN(model)
    for i, layer in enumerate(model.layers):
        if isinstance(layer, GATLayer):
            conv = GATConv(
                layer.in_channels, layer.out_channels, layer.heads, layer.concat, residual=layer.res is not None
            )
        else:
            conv = GCNConv(layer.in_channels, layer.out_channels, cached=True)
        conv.load_state_dict(layer.state_dict())
        model.layers[i] = Skip(conv) if getattr(layer, "identity", False) else conv
    return model


def make(case: Case, side: str, task: Task | None = None) -> Fast | Plain:
    task = task or case.task()
    fast = Fast(case, task)
    return fast if side == "fastkd" else Plain(case, task, fast)


# --- measuring ------------------------------------------------------------------------------------


def check(case: Case, sides: dict[str, Fast | Plain]) -> dict[str, float]:
    """Relative differences of the first step's loss and gradient: both do the same work."""
    losses, gradients = [], []
    for side in sides.values():
        torch.manual_seed(0)  # of dropout
        side.student.train()
        loss = side.first()
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in side.student.parameters()]))
    off = {
        "loss": abs(losses[1] / losses[0] - 1),
        "gradient": float((gradients[1] - gradients[0]).norm() / gradients[0].norm()),
    }
    assert off["loss"] <= case.tolerance, f"{case.recipe}: losses {losses}"
    return off


def measure(name: str) -> dict[str, Any]:
    case = CASES[name]
    task = case.task()
    sides: dict[str, Fast | Plain] = {"fastkd": Fast(case, task)}
    out: dict[str, Any] = {"recipe": case.recipe, "scale": case.scale}
    if case.needs > 0.9 * available(torch.device("cpu")):
        out["absent"] = f"needs {case.needs / 1e9:.0f} GB"
    else:
        sides["plain"] = Plain(case, task, sides["fastkd"])
        out["difference"] = check(case, sides)
    once = sum(seconds(made.epoch) for made in sides.values())  # also warms up
    parts = {side: made.parts() for side, made in sides.items()}
    times: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for _ in range(min(15, max(LEAST, math.ceil(SECONDS / once)))):
        for side, made in sides.items():
            times[side].append({"epoch": seconds(made.epoch)})
        for side in sides:
            times[side][-1] |= {part: seconds(call) for part, call in parts[side].items()}
    out["pairs"] = len(times["fastkd"])
    steps = len(list(sides["fastkd"].distiller._batches("train", True)))
    for side, rounds in times.items():
        out[side] = {
            "epoch_s": case.scale * statistics.median(r["epoch"] for r in rounds),
            **{
                f"{part}_share": statistics.median(steps * r[part] / r["epoch"] for r in rounds) for part in parts[side]
            },
            **memory(name, side),
        }
    if "plain" in sides:
        ratios = [p["epoch"] / f["epoch"] for p, f in zip(times["plain"], times["fastkd"], strict=True)]
        out["ratio"], out["ratio_range"] = statistics.median(ratios), [min(ratios), max(ratios)]
    if case.scale > 1:
        out["predicted"] = predict(name, case, task, sides["fastkd"], out["fastkd"])
    return out


def predict(name: str, case: Case, task: Task, fast: Fast, measured: dict[str, Any]) -> dict[str, float]:
    """Of the whole recipe: hours for teacher and student with all their epochs, and the larger one's memory."""
    config = load(case.recipe)
    own = Distiller(copy.deepcopy(fast.teacher).requires_grad_(), None, task, train=config.teacher.train)
    epoch = {
        "teacher": case.scale * min(seconds(lambda: own.step(0)) for _ in range(3)),
        "student": measured["epoch_s"],
    }
    out = {}
    for side, network, distiller in (("teacher", config.teacher, own), ("student", config.student, fast.distiller)):
        distiller.evaluate("val")
        validation = case.val_scale * seconds(lambda d=distiller: d.evaluate("val"))
        epochs = network.train.epochs
        out |= {
            f"{side}_epochs": epochs,
            f"{side}_epoch_s": epoch[side],
            f"{side}_val_s": validation,
            f"{side}_h": epochs * (epoch[side] + validation / network.train.eval_every) / 3600,
        }
    return out | {"teacher_bytes": memory(name, "teacher").get("process_bytes", 0)}


def memory(name: str, side: str) -> dict[str, int]:
    """Bytes: of the second epoch beyond what is held before it, and of the whole process, a fresh one."""
    command = [sys.executable, "-m", "bench.end_to_end", "--memory", name, side]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True)
    if done.returncode:
        print(f"memory of {side} on {name}: {done.stderr[-500:]}", file=sys.stderr)
        return {}
    return json.loads(done.stdout.splitlines()[-1])


def own_memory(name: str, side: str) -> dict[str, int]:
    case = CASES[name]
    _Process.reset()  # not available: fails here
    if side == "teacher":  # trained by itself
        task, config = case.task(), load(case.recipe)
        epoch = Distiller(runs.build(config.teacher, task, 0), None, task, train=config.teacher.train).step
        run = lambda: epoch(0)
    else:
        run = make(case, side).epoch
    run()
    held = _Process.reset()
    run()
    return {"step_bytes": _Process.peak() - held, "process_bytes": _Process.peak()}


# --- the report -----------------------------------------------------------------------------------


def row(name: str, r: dict[str, Any]) -> list[str]:
    plain = r.get("plain", {})

    def both(key: str, show: Callable[[float], str]) -> list[str]:
        return [show(x[key]) if key in x else "–" for x in (r["fastkd"], plain)]

    low, high = r.get("ratio_range", (0, 0))
    ratio = f"**{number(r['ratio'], 2)}x** ({number(low, 2)} to {number(high, 2)})" if plain else r["absent"]
    return [
        name,
        *both("epoch_s", lambda x: number(x)),
        ratio,
        *both("lsp_share", lambda x: f"{x:.0%}"),
        *both("teacher_share", lambda x: f"{x:.0%}"),
        *both("step_bytes", lambda x: f"{x / 1e6:,.0f}"),
    ]


def predicted(r: dict[str, Any]) -> str:
    p = r["predicted"]
    size = max(p["teacher_bytes"], r["fastkd"].get("process_bytes", 0)) / 1e9

    def part(side: str) -> str:
        return (
            f"{side} {p[f'{side}_h']:.1f} h ({p[f'{side}_epochs']} epochs of {number(p[f'{side}_epoch_s'])} s, "
            f"a look at the validation part {number(p[f'{side}_val_s'])} s)"
        )

    return f"- `{r['recipe']}`: {part('teacher')}, {part('student')}; {size:.1f} GB for the process."


def report(results: dict[str, Any]) -> str:
    info, cases = results["environment"], results["cases"]
    done = {name: r for name, r in cases.items() if "fastkd" in r}
    head = [
        "case",
        "fastkd, s / epoch",
        "PyG, s / epoch",
        "PyG / fastkd",
        "LSP's share",
        "in PyG",
        "teacher's share",
        "in PyG",
        "fastkd, MB",
        "PyG, MB",
    ]
    return (
        "\n\n".join(
            [
                f"# An epoch of distillation, end to end, on {info['cpu']}",
                f"{info['threads']} threads, instruction set {info['isa']}; fastkd {info['fastkd']}, torch {info['torch']}, "
                f"torch-geometric {info['torch_geometric']} ({info['torch_scatter']}), Python {info['python']}.",
                table(head, [row(name, r) for name, r in done.items()]),
                "Times are medians, ratios the median (and range) of neighbouring pairs. What the sides and columns are: "
                "[bench/README.md](../README.md#end-to-end). An epoch of the cases named *size* is one step on generated "
                "data, scaled: "
                + ", ".join(f"{name} {number(r['scale'])} steps" for name, r in done.items() if r["scale"] > 1)
                + ".",
                *(f"{name}: not run, {r['absent']}." for name, r in cases.items() if "fastkd" not in r),
                "## What the recipes will take",
                "Predicted from generated data of the same size, not run on the real data; with fastkd, on this machine, "
                "for all epochs, without stopping early.",
                "\n".join(predicted(r) for r in done.values() if "predicted" in r),
            ]
        )
        + "\n"
    )


def main(names: list[str]) -> None:
    import torch_geometric

    info = environment(torch.device("cpu"))
    with_scatter = torch_geometric.typing.WITH_TORCH_SCATTER
    info |= {
        "torch_geometric": torch_geometric.__version__,
        "torch_scatter": "with torch-scatter" if with_scatter else "without torch-scatter",
    }
    known = json.loads(RESULTS.read_text())["cases"] if names and RESULTS.exists() else {}
    results: dict[str, Any] = {"environment": info, "cases": {name: known[name] for name in CASES if name in known}}
    for name in names or CASES:  # named ones replace those in the file
        try:
            results["cases"][name] = measure(name)
        except Absent as why:
            results["cases"][name] = {"absent": str(why).split(": ", 1)[1]}
        print(name, json.dumps(results["cases"][name]), flush=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        RESULTS.with_suffix(".md").write_text(report(results))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--memory"]:
        print(json.dumps(own_memory(*sys.argv[2:])))
    else:
        parser = argparse.ArgumentParser(description=__doc__)
        parser.add_argument("case", nargs="*", help=f"{', '.join(CASES)}; all of them if none is named")
        names = parser.parse_args().case
        if unknown := set(names) - set(CASES):
            parser.error(f"no case {', '.join(sorted(unknown))}: there are {', '.join(CASES)}")
        main(names)
