"""The training loop of all studies: epoch after epoch, with a checkpoint, a look at the validation part, and the best
weights so far.

It can be stopped or killed at any moment; the same call goes on from the checkpoint and ends bit for bit where the
unbroken run does.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..runtime import checkpoint
from ..runtime.stopping import Stopped, stop_requests
from ..runtime.world import World
from .stage import some

__all__ = ["Loop", "Optimization", "optimizer_of"]

Look = dict[str, Any]
"""What is recorded at an epoch: its number, the loss, the validation score and more."""


class Optimization(Protocol):
    """The keys of a configuration that :func:`optimizer_of` reads."""

    optimizer: Any
    lr: float
    momentum: float
    weight_decay: float


def optimizer_of(parameters: list[nn.Parameter], config: Optimization) -> torch.optim.Optimizer:
    """The optimizer that a configuration names: "adam", "adamw" or "sgd"."""
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(parameters, config.lr, weight_decay=config.weight_decay)


class Loop:
    """A training from the first epoch, or from a checkpoint, to the last.

    Args:
        modules: what is trained, by name; the best weights are those of the first one.
        optimizer: of their parameters.
        epochs: how many there are.
        identity: what must be the same where a checkpoint is gone on with, for JSON.
        file: the checkpoint; None: none is written, and the training cannot be stopped.
        seed: of torch's global generator at the beginning.
        generator: another one that the training draws from; its state is in the checkpoint, too.
        device: where the modules are.
        world: the processes that train together; rank 0 writes.
        eval_every: epochs between looks at the validation part.
        patience: epochs without a better score after which the training ends; None: never.
        save_every: seconds between checkpoints; 0: one after every epoch.

    Attributes:
        epoch: how many epochs are done.
        history: the looks.
        best, best_epoch, best_score: weights, epoch and score of the best look; -1 where there was none.
        seconds: of all epochs, also of those before the checkpoint.
    """

    def __init__(
        self,
        modules: dict[str, nn.Module],
        optimizer: torch.optim.Optimizer,
        *,
        epochs: int,
        identity: dict[str, Any],
        file: Path | None,
        seed: int,
        generator: torch.Generator | None = None,
        device: torch.device | None = None,
        world: World | None = None,
        eval_every: int = 1,
        patience: int | None = None,
        save_every: float = 0.0,
    ) -> None:
        self.modules, self.optimizer, self.epochs, self.file = modules, optimizer, epochs, file
        self.identity: dict[str, Any] = json.loads(json.dumps(identity))
        self.seed, self.generator, self.device = seed, generator, device or torch.device("cpu")
        self.world = world or World()
        self.eval_every, self.patience, self.save_every = eval_every, patience, save_every
        self.epoch = 0
        self.history: list[Look] = []
        self.best: dict[str, Tensor] = {}
        self.best_epoch, self.best_score = -1, -1.0
        self.seconds = 0.0

    def run(
        self,
        train: Callable[[int], Look],
        score: Callable[[], float],
        progress: Callable[[int, Look], object] | None = None,
        saved: Callable[[int, Look], object] | None = None,
    ) -> None:
        """Trains to the end; the modules then have the weights of the last epoch.

        Args:
            train: one epoch, by its number from 0; returns what is recorded beside epoch and score ("val").
            score: of the validation part, larger is better.
            progress: called after every epoch, with how many are done and the latest look (empty before the first).
            saved: called likewise, once the checkpoint is written where one is due.

        Raises:
            Stopped: Ctrl-C or SIGTERM came; the epoch was finished, and the checkpoint written.
            CheckpointError: the file is of another configuration, or it cannot be read or written.
        """
        file = self.file
        if file is not None and self.world.first(file.exists):
            self._restore(file)
        else:
            torch.manual_seed(self.seed)  # of dropout: what ran before does not matter
        at = time.monotonic()
        with stop_requests(file is not None) as stop:
            while not self._ended():
                self._advance(train, score)
                if progress is not None:
                    progress(self.epoch, self.history[-1] if self.history else {})
                stopping = self.world.any(stop.is_set())
                due = stopping or self._ended() or time.monotonic() - at >= self.save_every
                if file is not None and due:
                    self._save(file)
                    at = time.monotonic()
                if saved is not None:
                    saved(self.epoch, self.history[-1] if self.history else {})
                if stopping or (self._ended() and self.world.any(stop.is_set())):  # none after the last is forgotten
                    self.world.any(True)  # torchrun ends all ranks with the first: not before the file is whole
                    raise Stopped(f"stopped after epoch {self.epoch}; the same command goes on from there")

    def _advance(self, train: Callable[[int], Look], score: Callable[[], float]) -> None:
        begin, epoch = time.perf_counter(), self.epoch
        look = train(epoch)
        if (epoch + 1) % self.eval_every == 0 or epoch + 1 == self.epochs:
            value = score()
            self.history.append({"epoch": epoch, **look, "val": value})
            if self.best_epoch < 0 or value > self.best_score:
                self.best_score, self.best_epoch = value, epoch
                state = next(iter(self.modules.values())).state_dict()
                self.best = {name: x.detach().clone() for name, x in state.items()}
        self.epoch = epoch + 1
        self.seconds += time.perf_counter() - begin

    def _ended(self) -> bool:
        waited = self.epoch - 1 - self.best_epoch
        return self.epoch >= self.epochs or (
            self.patience is not None and self.best_epoch >= 0 and waited >= self.patience
        )

    # --- checkpoints ----------------------------------------------------------------------------

    def _save(self, file: Path) -> None:
        if self.world.rank > 0:
            return
        tensors = {f"best.{key}": x for key, x in self.best.items()}
        for name, module in self.modules.items():
            tensors |= {f"{name}.{key}": x for key, x in module.state_dict().items()}
        scalars: dict[str, dict[str, Any]] = {}
        for index, entries in self.optimizer.state_dict()["state"].items():
            for key, value in entries.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{index}.{key}"] = value
                else:
                    scalars.setdefault(str(index), {})[key] = value
        tensors["rng.torch"] = torch.get_rng_state()
        if self.generator is not None:
            tensors["rng.own"] = self.generator.get_state()
        if self.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        state = {
            "identity": self.identity,
            "epoch": self.epoch,
            "history": self.history,
            "optimizer": scalars,
            "best_epoch": self.best_epoch,
            "best_val": self.best_score,
            "seconds": self.seconds,
        }
        checkpoint.save(file, tensors, state)

    def _read(self, file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, state = checkpoint.load(file)
        if found := checkpoint.differences(state["identity"], self.identity):
            raise checkpoint.CheckpointError(
                f"{file} belongs to another configuration: {some(found)}. Take another directory, or the configuration "
                "of the checkpoint"
            )
        return tensors, state

    def _restore(self, file: Path) -> None:
        tensors, state = self.world.first(lambda: self._read(file))

        def part(prefix: str) -> dict[str, Tensor]:
            return {key.removeprefix(f"{prefix}."): x for key, x in tensors.items() if key.startswith(f"{prefix}.")}

        for name, module in self.modules.items():
            module.load_state_dict(part(name))
        self.best = {key: x.to(self.device) for key, x in part("best").items()}
        entries: dict[int, dict[str, Any]] = {}
        for name, x in part("optimizer").items():
            index, key = name.split(".", 1)
            entries.setdefault(int(index), {})[key] = x
        for index, scalars in state.get("optimizer", {}).items():
            entries.setdefault(int(index), {}).update(scalars)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": entries, "param_groups": groups})
        self.history = state["history"]
        self.epoch = state.get("epoch", len(self.history))  # of 0.1's compressions: every epoch had a look
        scores = [look["val"] for look in self.history]
        self.best_score = state.get("best_val", max(scores, default=-1.0))
        self.best_epoch = state["best_epoch"] if "best_epoch" in state else scores.index(self.best_score)
        self.seconds = state.get("seconds", 0.0)
        if "rng.torch" in tensors:
            torch.set_rng_state(tensors["rng.torch"])
        if self.generator is not None and "rng.own" in tensors:
            self.generator.set_state(tensors["rng.own"])
        if self.device.type == "cuda" and "rng.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng.cuda"], self.device)
