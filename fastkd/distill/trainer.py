"""The Distiller: trains a network on labels and on what a teacher knows, and can be stopped at any moment.

Teacher outputs of a static graph are computed once. Selection looks at the validation part alone; the
test part is looked at once, with the selected weights. Everything that is random comes from
one seed, and a checkpoint holds the state of every generator, so that a run that was killed and
resumed ends with bit for bit the weights of one that was not. Several processes share the work of a
step, see `distributed`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import Task
from ..lab.loop import Loop, optimizer_of
from ..runtime import fingerprint, measure
from ..runtime.world import RankLost, World, usable
from .batches import Batch, batches, check_sampler
from .config import LossConfig, TrainConfig
from .terms import DistillationTerms

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

    >>> from fastkd import data, models
    >>> from fastkd.distill import Distiller, LossConfig, TrainConfig
    >>> task = data.load("digits")
    >>> teacher = models.build("gcn", task.num_features, task.num_classes, hidden=32)
    >>> trained = Distiller(teacher, None, task, train=TrainConfig(epochs=2)).fit()
    >>> student = models.build("gcn", task.num_features, task.num_classes, hidden=8)
    >>> lsp = LossConfig(weight=100, student_layer="layers.0", teacher_layer="layers.0")
    >>> result = Distiller(student, teacher, task, losses={"lsp": lsp}, train=TrainConfig(epochs=2)).fit()
    >>> result.epochs, sorted(result.history[0]["terms"])
    (2, ['lsp', 'task'])

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
        identity: what else must be the same where a checkpoint is gone on with, for JSON.
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
        self.directory = None if directory is None else Path(directory)
        configs = {name: c for name, c in (losses or {}).items() if c.weight > 0}
        if configs and teacher is None:
            raise ValueError(f"losses {', '.join(configs)} need a teacher, got None")
        self._identity = {
            "schema": SCHEMA,
            "task": task.name,
            "train": self.train.model_dump(),
            "task_weight": task_weight,
            "losses": {name: c.model_dump() for name, c in configs.items()},
            "seed": seed,
            "student": {name: list(x.shape) for name, x in student.state_dict().items()},
            "teacher": None if teacher is None else fingerprint.of_weights(teacher),
            **(identity or {}),
        }

        torch.manual_seed(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self._graphs: dict[int, Batch] = {}
        self.terms = DistillationTerms(
            self.student,
            self.teacher,
            configs,
            self._call,
            lambda: next(iter(self._batches("train", False))),
            self.world,
            self.generator,
        )
        self.losses = self.terms.losses.to(self.device)
        self.parameters = [p for module in (self.student, self.losses) for p in module.parameters() if p.requires_grad]
        self.optimizer = optimizer_of(self.parameters, self.train)
        self.loop = Loop(
            {"student": self.student, "losses": self.losses},
            self.optimizer,
            epochs=self.train.epochs,
            identity=self._identity,
            file=None if self.directory is None else self.directory / "checkpoint.safetensors",
            seed=seed,
            generator=self.generator,
            device=self.device,
            world=self.world,
            eval_every=self.train.eval_every,
            patience=self.train.patience,
            save_every=self.train.save_every,
        )

    @property
    def best(self) -> dict[str, Tensor]:
        """The student's weights that were best on the validation part."""
        return self.loop.best

    def _batches(self, split: str, training: bool) -> Iterator[Batch]:
        generator = self.generator if training else None
        return batches(self.task, split, self.train, generator, self.device, self._graphs, self.world)

    def _call(self, model: nn.Module, batch: Batch) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.train.amp):
            logits: Tensor = model(*batch.inputs).float()
        if len(logits) != len(batch.y):
            who = "teacher" if model is self.teacher else "student"
            raise ValueError(
                f"the {who} gives {len(logits)} rows of logits, but the task has {len(batch.y)} nodes or "
                "shapes: teacher and student must both be on these"
            )
        return logits

    # --- an epoch -------------------------------------------------------------------------------

    def weight(self, name: str, epoch: int) -> float:
        """The weight of a loss in an epoch, by its schedule."""
        return self.terms.weight(name, epoch)

    def loss(self, batch: Batch, epoch: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum, and every term without its weight; of several ranks, this one's part of them."""
        logits = self._call(self.student, batch)
        weights = {name: w for name in self.terms.configs if (w := self.weight(name, epoch)) > 0}
        terms = {"task": self._task_loss(logits, batch), **self.terms(batch, logits, weights)}
        if batch.share is not None:
            terms = {name: batch.share * term for name, term in terms.items()}
        total = self.task_weight * terms["task"]
        for name, weight in weights.items():
            total = total + weight * terms[name]
        return total, terms

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
                predicted, true = _predicted_labels(logits, y, self.task.known_counts), y > 0.5
                hits, wrong, missed = predicted & true, predicted & ~true, ~predicted & true
            else:
                hits = logits.argmax(1) == y
                wrong, missed = ~hits, torch.zeros_like(hits)
            counts += torch.stack((hits.sum(), wrong.sum(), missed.sum())).cpu()
        self.terms.student_taps.clear()
        right, false, left_out = (int(count) for count in self.world.sum(counts))
        if self.task.multilabel:
            return 200.0 * right / max(2 * right + false + left_out, 1)
        return 100.0 * right / max(right + false, 1)

    # --- the run --------------------------------------------------------------------------------

    def fit(self, progress: Callable[[int, dict[str, Any]], object] | None = None) -> Result:
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
        file = self.loop.file
        try:
            with self.world.alone(self.directory):
                return self._fit(progress)
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

    def _fit(self, progress: Callable[[int, dict[str, Any]], object] | None) -> Result:
        if self.world.size > 1:
            self.world.same(
                "configuration and initial weights",
                {
                    **self._identity,
                    "writes checkpoints": self.loop.file is not None,
                    "student's weights": fingerprint.of_weights(self.student),
                    "losses' weights": fingerprint.of_weights(self.losses),
                },
            )
        memory, loop = measure.PeakMemory(self.device), self.loop
        loop.run(self._epoch, lambda: self.evaluate("val"), progress)
        peak = memory.mb()
        self.student.load_state_dict(loop.best)
        parameters = sum(p.numel() for p in self.student.parameters())
        return Result(
            self.evaluate("test"),
            loop.best_score,
            loop.best_epoch,
            loop.epoch,
            loop.seconds,
            parameters,
            peak,
            loop.history,
        )

    def _epoch(self, epoch: int) -> dict[str, Any]:
        c = self.train
        if c.schedule == "cosine":
            for group in self.optimizer.param_groups:
                group["lr"] = 0.5 * c.lr * (1 + torch.cos(torch.tensor(torch.pi * epoch / c.epochs)).item())
        terms = self.step(epoch)
        total = terms.pop("loss")
        lr = self.optimizer.param_groups[0]["lr"]
        return {"loss": total, "terms": terms, "seconds": self.loop.seconds, "lr": lr}

    def close(self) -> None:
        """Takes the hooks off both networks."""
        self.terms.close()


def _predicted_labels(logits: Tensor, y: Tensor, known_counts: bool) -> Tensor:
    """[N, L] bool: which labels the network claims."""
    if not known_counts:
        return logits > 0
    rank = logits.argsort(stable=True, dim=1, descending=True).argsort(1)
    return rank < y.sum(1, keepdim=True)
