"""The Distiller: trains a network on labels and on what a teacher knows, and can be stopped at any moment.

Teacher outputs of a static graph are computed once. Selection looks at the validation part alone; the
test part is looked at once, with the selected weights. Everything that is random comes from
one seed, and a checkpoint holds the state of every generator, so that a run that was killed and
resumed ends with bit for bit the weights of one that was not. Several processes share the work of a
step, see `distributed`.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import Task
from ..runtime import checkpoint, measure
from ..runtime.stopping import Stopped, stop_requests
from ..runtime.world import RankLost, World, usable
from . import losses
from .batches import Batch, batches, check_sampler
from .config import LossConfig, TrainConfig
from .distributed import LSPPart
from .taps import Taps

__all__ = ["Distiller", "Result"]

SCHEMA = 1  # of checkpoints and results


@dataclass
class Result:
    """What a training run gave. All scores are in percent: accuracy, or micro-F1 for several labels."""

    test: float
    val: float
    best_epoch: int
    epochs: int
    seconds: float
    parameters: int
    peak_memory_mb: float | None
    """Taken by training beyond what the process held before (CPU), or allocated on the device."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """One record per look at the validation part: epoch, loss, terms (unweighted), val, seconds, lr."""


class Distiller:
    """Trains `student` on a task; with a teacher and losses, distils the teacher into it.

    >>> task = fastkd.data.load("cora")
    >>> teacher = fastkd.models.build("gcn", task.num_features, task.num_classes, hidden=256)
    >>> Distiller(teacher, None, task).fit()
    >>> student = fastkd.models.build("gcn", task.num_features, task.num_classes, hidden=8)
    >>> lsp = LossConfig(weight=100, student_layer="layers.0", teacher_layer="layers.0")
    >>> result = Distiller(student, teacher, task, losses={"lsp": lsp}, directory="runs/cora").fit()

    Args:
        student: any module that is called as ``student(x, adj)``, or ``student(points)`` for shapes.
        teacher: likewise, or None. Put in eval mode; it gets no gradient.
        task: from :func:`fastkd.data.load`, or your own :class:`fastkd.data.Task`.
        losses: by name of ``fastkd.distill.losses.LOSSES``.
        train: epochs, optimizer and so on.
        task_weight: of the labels' loss, cross-entropy or binary cross-entropy.
        seed: of dropout, batches, sampling. The initial weights are the modules' own.
        directory: for checkpoints; None: none are written. If it holds one of the same configuration,
            training goes on from there.
        device: to which everything is moved.
        world: the processes that train together; None: this one alone.

    Raises:
        ValueError: a layer or a loss that does not exist (the message lists all), losses without a
            teacher, teacher and student on different nodes.
        CheckpointError: the directory holds a checkpoint of another configuration (the message lists
            the differences), or a damaged one.
        ImportError: PyG lacks what it samples neighbours with (train.neighbors).
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        task: Task,
        *,
        losses: dict[str, LossConfig] | None = None,
        train: TrainConfig | None = None,
        task_weight: float = 1.0,
        seed: int = 0,
        directory: str | Path | None = None,
        device: torch.device | str = "cpu",
        identity: dict[str, Any] | None = None,
        world: World | None = None,
    ) -> None:
        self.world = world or World()
        self.device = usable(device)
        self.student = student.to(self.device)
        self.teacher = None if teacher is None else teacher.to(self.device).eval().requires_grad_(False)
        self.task = task
        self.train = train or TrainConfig()
        check_sampler(self.train)
        self.task_weight = task_weight
        self.seed = seed
        self.directory = None if directory is None else Path(directory)
        self.terms = {name: c for name, c in (losses or {}).items() if c.weight > 0}
        if self.terms and teacher is None:
            raise ValueError(f"losses {', '.join(self.terms)} need a teacher, got None")
        self.identity = {
            "schema": SCHEMA,
            "task": task.name,
            "train": self.train.model_dump(),
            "task_weight": task_weight,
            "losses": {name: c.model_dump() for name, c in self.terms.items()},
            "seed": seed,
            "student": _shapes(student),
            "teacher": None if teacher is None else _fingerprint(teacher),
            **(identity or {}),
        }

        torch.manual_seed(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self._taps_s = Taps(self.student, self._layers("student"), "student")
        self._taps_t = Taps(self.teacher or nn.Module(), self._layers("teacher"), "teacher")
        self._whole: dict[int, Batch] = {}
        self._kept: dict[Any, dict[str, Any]] = {}  # the teacher's outputs of static graphs
        self._prepared: dict[Any, Any] = {}
        try:
            self.losses = self._build_losses()
        except BaseException:
            self.close()
            raise
        self.losses.to(self.device)
        self.parameters = [p for module in (self.student, self.losses) for p in module.parameters() if p.requires_grad]
        self.optimizer = self._build_optimizer()
        self.epoch = 0
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Tensor] = {}
        self.best_epoch, self.best_val = -1, -1.0
        self.seconds = 0.0

    # --- the parts ------------------------------------------------------------------------------

    def _layers(self, side: str) -> list[str]:
        names = [getattr(c, f"{side}_layer") for c in self.terms.values()]
        return list(dict.fromkeys(name for name in names if name))

    def _build_losses(self) -> nn.ModuleDict:
        """Also runs both networks once, on the first batch, to learn the widths of what is tapped."""
        kinds = {name: losses.kind(name) for name in self.terms}
        for name, config in self.terms.items():
            if kinds[name].uses != "features":
                continue
            for side, model in (("student", self.student), ("teacher", self.teacher)):
                if model is not None and getattr(config, f"{side}_layer") is None:
                    known = ", ".join(n for n, _ in model.named_modules() if n)
                    raise ValueError(
                        f"losses.{name}.{side}_layer is missing: the loss {name!r} compares "
                        f"features, and the {side} has the layers {known}"
                    )
        dims: dict[str, tuple[int, int]] = {}
        if self.teacher is not None and any(kind.uses == "features" for kind in kinds.values()):
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                batch = next(iter(self._batches("train", False)))
                self.student.eval()  # batch normalisation learns nothing from this
                self._call(self.student, batch)
                self._call(self.teacher, batch)
            for name, config in self.terms.items():
                if kinds[name].uses != "features":
                    continue
                s, t = self._taps_s[config.student_layer], self._taps_t[config.teacher_layer]
                if len(s) != len(t):
                    raise ValueError(
                        f"losses.{name}: the student's {config.student_layer!r} has {len(s)} rows, the "
                        f"teacher's {config.teacher_layer!r} {len(t)}: both must be on the same nodes"
                    )
                dims[name] = (s.shape[1], t.shape[1])
        out = nn.ModuleDict()
        for name, config in self.terms.items():
            student_dim, teacher_dim = dims.get(name, (None, None))
            out[name] = losses.build(name, student_dim=student_dim, teacher_dim=teacher_dim, **config.args)
        return out

    def _build_optimizer(self) -> torch.optim.Optimizer:
        c = self.train
        if c.optimizer == "sgd":
            return torch.optim.SGD(self.parameters, c.lr, momentum=c.momentum, weight_decay=c.weight_decay)
        kind = torch.optim.AdamW if c.optimizer == "adamw" else torch.optim.Adam
        return kind(self.parameters, c.lr, weight_decay=c.weight_decay)

    def _batches(self, split: str, training: bool) -> Iterator[Batch]:
        return batches(
            self.task, split, self.train, self.generator if training else None, self.device, self._whole, self.world
        )

    def _call(self, model: nn.Module, batch: Batch) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.train.amp):
            logits = model(*batch.inputs).float()
        if len(logits) != len(batch.y):
            who = "teacher" if model is self.teacher else "student"
            raise ValueError(
                f"the {who} gives {len(logits)} rows of logits, but the task has {len(batch.y)} nodes or "
                "shapes: teacher and student must both be on these"
            )
        return logits

    # --- one step -------------------------------------------------------------------------------

    def _teacher_outputs(self, batch: Batch) -> dict[str, Any]:
        if batch.key is not None and batch.key in self._kept:
            return self._kept[batch.key]
        teacher = self.teacher
        assert teacher is not None  # without one there are no losses
        out: dict[str, Any] = {}
        logits = any(self.terms[name].weight > 0 and loss.uses == "logits" for name, loss in self.losses.items())
        self._taps_t.clear()
        with torch.no_grad():
            with contextlib.nullcontext() if logits else self._taps_t.stopping():
                out["logits"] = self._call(teacher, batch)
            for layer in self._layers("teacher"):
                out[layer] = self._taps_t[layer].detach()
            out["graphs"] = {layer: batch.graph or _own_graph(teacher, layer) for layer in self._layers("teacher")}
        self._taps_t.clear()
        if batch.key is not None:
            self._kept[batch.key] = out
        return out

    def weight(self, name: str, epoch: int) -> float:
        """Of a loss in an epoch, by its schedule."""
        c = self.terms[name]
        if epoch < c.start or (c.stop is not None and epoch >= c.stop):
            return 0.0
        return c.weight * min(1.0, (epoch - c.start + 1) / c.ramp) if c.ramp else c.weight

    def loss(self, batch: Batch, epoch: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum, and every term without its weight; of several ranks, this one's part of them."""
        logits = self._call(self.student, batch)
        terms = {"task": self._task_loss(logits, batch)}
        active = {name: w for name in self.terms if (w := self.weight(name, epoch)) > 0}
        teacher = self._teacher_outputs(batch) if active else {}
        for name in active:
            loss, config = self.losses[name], self.terms[name]
            if loss.uses == "logits":
                s, t = logits, teacher["logits"]
                if batch.seeds is not None:
                    s, t = s[: batch.seeds], t[: batch.seeds]
                terms[name] = self._part(loss, batch, s, t)
            else:
                terms[name] = self._feature_loss(name, loss, config, batch, teacher)
        if batch.share is not None:
            terms = {name: batch.share * term for name, term in terms.items()}
        total = self.task_weight * terms["task"]
        for name, weight in active.items():
            total = total + weight * terms[name]
        self._taps_s.clear()
        return total, terms

    def _feature_loss(
        self, name: str, loss: nn.Module, config: LossConfig, batch: Batch, teacher: dict[str, Any]
    ) -> Tensor:
        layer_s, layer_t = config.student_layer, config.teacher_layer
        assert layer_s is not None and layer_t is not None  # the constructor has seen to it
        s: Any = self._taps_s[layer_s].float()
        t: Any = teacher[layer_t]
        graph, teacher_graph = batch.graph, None
        if graph is None:
            graph, teacher_graph = _own_graph(self.student, layer_s), teacher["graphs"][layer_t]
        if batch.seeds is not None:
            # Only the first rows have all their in-edges: these are the destinations.
            n = batch.seeds
            s, t = ((s, s[:n]), (t, t[:n])) if isinstance(loss, losses.LSP) else (s[:n], t[:n])
        elif batch.key is not None:  # what depends on the teacher alone is done once
            key = (name, batch.key)
            if key not in self._prepared:
                assert isinstance(loss, losses.DistillationLoss)
                if isinstance(loss, losses.LSP) and graph is not None and self.world.size > 1:
                    own = self.world.range(graph.num_dst)
                    self._prepared[key] = LSPPart(loss, t, graph, own, self.generator)
                else:
                    self._prepared[key] = loss.prepare(t, graph, self.generator)
            t = self._prepared[key]
            if isinstance(t, LSPPart):
                return t(s)
        return self._part(loss, batch, s, t, graph, teacher_graph)

    def _part(
        self, loss: nn.Module, batch: Batch, s: Any, t: Any, graph: Any = None, teacher_graph: Any = None
    ) -> Tensor:
        """A loss; where every rank has the whole batch, this rank's part of it."""
        assert isinstance(loss, losses.DistillationLoss)
        generator = self.generator
        if batch.share is not None and loss.max_nodes is not None:
            generator = self.world.own_generator(generator)  # ranks draw from different numbers of rows
        call = lambda s, t: loss(s, t, graph, generator, teacher_graph)
        if self.world.size == 1 or batch.share is not None:
            return call(s, t)
        return self.world.part_of_mean(call, s, t) if loss.rowwise else call(s, t) / self.world.size

    def _task_loss(self, logits: Tensor, batch: Batch) -> Tensor:
        logits, y = batch.labelled(logits)
        loss: Callable[..., Tensor] = F.binary_cross_entropy_with_logits if self.task.multilabel else F.cross_entropy
        return loss(logits, y) if batch.share is not None else self.world.part_of_mean(loss, logits, y)

    def step(self, epoch: int) -> dict[str, float]:
        """One pass over the training part; the terms' means over its batches."""
        self.student.train()
        self.losses.train()
        sums: dict[str, Tensor] = {}
        count = 0
        for batch in self._batches("train", True):
            self.optimizer.zero_grad(set_to_none=True)
            total, terms = self.loss(batch, epoch)
            total.backward()
            values = self.world.sum_gradients(self.parameters, {"loss": total, **terms})
            if self.train.clip_norm is not None:
                nn.utils.clip_grad_norm_(self.parameters, self.train.clip_norm)
            self.optimizer.step()
            for name, value in values.items():
                sums[name] = sums.get(name, 0) + value.detach()
            count += 1
        # Of batch normalisation: where ranks have different batches, they have seen different ones.
        self.world.broadcast([x for x in self.student.buffers() if x.is_floating_point()])
        out = {name: float(value) / count for name, value in sums.items()}
        if not all(torch.isfinite(torch.tensor(list(out.values())))):
            raise FloatingPointError(
                f"epoch {epoch}: the loss is not finite ({out}); lower train.lr = "
                f"{self.train.lr}, or set train.clip_norm"
            )
        return out

    @torch.no_grad()
    def evaluate(self, split: str) -> float:
        """Accuracy, or micro-F1, of the student on a part, in percent."""
        self.student.eval()
        counts = torch.zeros(3, dtype=torch.int64)
        for batch in itertools.islice(self._batches(split, False), self.world.rank, None, self.world.size):
            logits, y = batch.labelled(self._call(self.student, batch), split)
            if self.task.multilabel:
                told, true = _told(logits, y, self.task.known_counts), y > 0.5
                counts += torch.stack(((told & true).sum(), (told & ~true).sum(), (~told & true).sum())).cpu()
            else:
                right = logits.argmax(1) == y
                counts += torch.stack((right.sum(), (~right).sum(), right.new_zeros(()).sum())).cpu()
        self._taps_s.clear()
        hits, wrong, missed = self.world.sum(counts).tolist()
        if self.task.multilabel:
            return 200.0 * hits / max(2 * hits + wrong + missed, 1)
        return 100.0 * hits / max(hits + wrong, 1)

    # --- the run --------------------------------------------------------------------------------

    def fit(self, progress: Callable[[int, dict[str, Any]], None] | None = None) -> Result:
        """Trains to the end, or from a checkpoint on.

        Args:
            progress: called after every epoch with its number and the latest record.

        Raises:
            Stopped: Ctrl-C or SIGTERM came; the epoch was finished and a checkpoint written.
            CheckpointError: another process is at work in the directory, or the disk is full.
            FloatingPointError: the loss is no number any more.
            RankLost: another of several ranks has ended.
            ValueError: ranks differ in configuration or initial weights.
        """
        file = None if self.directory is None else self.directory / "checkpoint.safetensors"
        try:
            with self.world.alone(self.directory):
                return self._fit(file, progress)
        except RankLost as error:
            remedy = (
                "no checkpoint had been written yet: start anew"
                if file is None or not file.exists()
                else f"the checkpoint {file} is whole: the same command, or --resume, goes on from there, with any "
                "number of processes"
            )
            raise RankLost(f"{error}; {remedy}") from None
        finally:
            self.close()

    def _fit(self, file: Path | None, progress: Callable[[int, dict[str, Any]], None] | None) -> Result:
        if self.world.size > 1:
            self.world.same(
                "configuration and initial weights",
                {
                    **self.identity,
                    "writes checkpoints": file is not None,
                    "student's weights": _fingerprint(self.student),
                    "losses' weights": _fingerprint(self.losses),
                },
            )
        if file is not None and self.world.first(file.exists):
            self._restore(file)
        else:
            torch.manual_seed(self.seed)  # of dropout: what ran since the constructor does not matter
        saved = time.monotonic()
        memory = measure.PeakMemory(self.device)
        with stop_requests(file is not None) as stop:
            while not self._finished():
                begin = time.perf_counter()
                self._epoch()
                self.seconds += time.perf_counter() - begin
                if progress is not None:
                    progress(self.epoch, self.history[-1] if self.history else {})
                stopping = self.world.any(stop.is_set())
                if file is not None and (stopping or time.monotonic() - saved >= self.train.save_every):
                    self._save(file)
                    saved = time.monotonic()
                if stopping:
                    self.world.any(True)  # torchrun ends all ranks with the first: not before the file is whole
                    raise Stopped(f"stopped after epoch {self.epoch}; the same command goes on from there")
        peak = memory.mb()
        if file is not None:
            self._save(file)
        self.student.load_state_dict(self.best)
        return Result(
            self.evaluate("test"),
            self.best_val,
            self.best_epoch,
            self.epoch,
            self.seconds,
            sum(p.numel() for p in self.student.parameters()),
            peak,
            self.history,
        )

    def _epoch(self) -> None:
        epoch, c = self.epoch, self.train
        if c.schedule == "cosine":
            for group in self.optimizer.param_groups:
                group["lr"] = 0.5 * c.lr * (1 + torch.cos(torch.tensor(torch.pi * epoch / c.epochs)).item())
        terms = self.step(epoch)
        if (epoch + 1) % c.eval_every == 0 or epoch + 1 == c.epochs:
            val = self.evaluate("val")
            total = terms.pop("loss")
            self.history.append(
                {
                    "epoch": epoch,
                    "loss": total,
                    "terms": terms,
                    "val": val,
                    "seconds": self.seconds,
                    "lr": self.optimizer.param_groups[0]["lr"],
                }
            )
            if val > self.best_val:
                self.best_val, self.best_epoch = val, epoch
                self.best = {name: x.detach().clone() for name, x in self.student.state_dict().items()}
        self.epoch = epoch + 1

    def _finished(self) -> bool:
        patience = self.train.patience
        waited = self.epoch - 1 - self.best_epoch
        return self.epoch >= self.train.epochs or (patience is not None and self.best_epoch >= 0 and waited >= patience)

    # --- checkpoints ----------------------------------------------------------------------------

    def _save(self, file: Path) -> None:
        if self.world.rank > 0:
            return
        tensors = {f"student.{k}": v for k, v in self.student.state_dict().items()}
        tensors |= {f"losses.{k}": v for k, v in self.losses.state_dict().items()}
        tensors |= {f"best.{k}": v for k, v in self.best.items()}
        scalars: dict[str, dict[str, Any]] = {}
        for index, entries in self.optimizer.state_dict()["state"].items():
            for key, value in entries.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{index}.{key}"] = value
                else:
                    scalars.setdefault(str(index), {})[key] = value
        tensors["rng.torch"] = torch.get_rng_state()
        tensors["rng.own"] = self.generator.get_state()
        if self.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        state = {
            "identity": self.identity,
            "epoch": self.epoch,
            "history": self.history,
            "optimizer": scalars,
            "best_epoch": self.best_epoch,
            "best_val": self.best_val,
            "seconds": self.seconds,
        }
        checkpoint.save(file, tensors, state)

    def _read(self, file: Path) -> tuple[dict[str, Tensor], Any]:
        tensors, state = checkpoint.load(file)
        differences = checkpoint.differences(state["identity"], json.loads(json.dumps(self.identity)))
        if differences:
            raise checkpoint.CheckpointError(
                f"{file} belongs to another configuration: "
                + "; ".join(differences)
                + ". Take another directory, or the configuration of the checkpoint"
            )
        return tensors, state

    def _restore(self, file: Path) -> None:
        tensors, state = self.world.first(lambda: self._read(file))

        def part(prefix: str) -> dict[str, Tensor]:
            return {k[len(prefix) + 1 :]: v for k, v in tensors.items() if k.startswith(prefix + ".")}

        self.student.load_state_dict(part("student"))
        self.losses.load_state_dict(part("losses"))
        self.best = {k: v.to(self.device) for k, v in part("best").items()}
        optimizer = self.optimizer.state_dict()
        entries: dict[int, dict[str, Any]] = {}
        for key, value in part("optimizer").items():
            index, name = key.split(".", 1)
            entries.setdefault(int(index), {})[name] = value
        for index, values in state["optimizer"].items():
            entries.setdefault(int(index), {}).update(values)
        self.optimizer.load_state_dict({"state": entries, "param_groups": optimizer["param_groups"]})
        self.epoch, self.history = state["epoch"], state["history"]
        self.best_epoch, self.best_val, self.seconds = state["best_epoch"], state["best_val"], state["seconds"]
        torch.set_rng_state(tensors["rng.torch"])
        self.generator.set_state(tensors["rng.own"])
        if self.device.type == "cuda" and "rng.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng.cuda"], self.device)

    def close(self) -> None:
        """Takes the hooks off both networks."""
        self._taps_s.remove()
        self._taps_t.remove()


def _told(logits: Tensor, y: Tensor, known_counts: bool) -> Tensor:
    """[N, L] bool: which labels the network claims."""
    if not known_counts:
        return logits > 0
    rank = logits.argsort(stable=True, dim=1, descending=True).argsort(1)
    return rank < y.sum(1, keepdim=True)


def _own_graph(model: nn.Module, layer: str) -> Any:
    """The graph that a dynamic model made for a layer in its last forward pass."""
    make = getattr(model, "graph", None)
    if not callable(make):
        raise ValueError(
            f"{type(model).__name__} makes no graphs of its own and the task has none: a loss over "
            "neighbourhoods needs model.graph(layer), as in fastkd.models.DGCNN"
        )
    return make(layer)


def _shapes(model: nn.Module) -> dict[str, list[int]]:
    return {name: list(x.shape) for name, x in model.state_dict().items()}


def _fingerprint(model: nn.Module) -> str:
    """Of the weights' values."""
    digest = hashlib.sha256()
    for name, x in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
