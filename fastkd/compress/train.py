"""Training of a network, and its statistics and scores."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import Images
from ..lab.loop import Loop, optimizer_of
from ..lab.settings import ConfigError
from .config import FinetuneConfig, TrainConfig

__all__ = ["accuracy", "fit", "predictions", "recalibrate"]

EVALUATED = 500  # images of a forward pass without gradients


def fit(
    model: nn.Module,
    data: Images,
    parts: Iterable[str],
    config: TrainConfig,
    seed: int,
    file: Path,
    score: Callable[[nn.Module], float],
    *,
    teacher: nn.Module | None = None,
    progress: Callable[[int, dict[str, Any]], object] | None = None,
    heartbeat: Callable[[], object] = lambda: None,
) -> list[dict[str, Any]]:
    """Trains, and leaves the weights of the epoch of the best score.

    Can be stopped or killed, and called again: the epochs that `file` knows are not run again, and the result
    is bit for bit that of an unbroken run.

    Args:
        parts: of the data, all images of which are taken once per epoch, in an order drawn anew.
        file: the checkpoint after every epoch. Its deletion is left to the caller.
        score: of the validation part, larger is better.
        teacher: for knowledge distillation, with a :class:`FinetuneConfig`.
        progress: called after every epoch, with its number (from 1) and its record.
        heartbeat: called at least once per step.

    Returns:
        A record per epoch: epoch (from 0), loss, val (the score), lr.

    Raises:
        ConfigError: data without labels, and no teacher to learn from.
        CheckpointError: the file is of another configuration, or cannot be written or read.
        FloatingPointError: a loss that is not finite; the checkpoint of the epoch before is whole.
        Stopped: Ctrl-C or SIGTERM came; the epoch was finished, and the checkpoint written.
    """
    epoch = _Epoch(model, data, list(parts), config, seed, teacher, heartbeat)
    loop = Loop(
        {"model": model},
        epoch.optimizer,
        epochs=config.epochs,
        identity={
            "train": config.model_dump(),
            "seed": seed,
            "images": len(epoch.images),
            "shapes": {name: list(x.shape) for name, x in model.state_dict().items()},
        },
        file=file,
        seed=seed,
        device=epoch.images.device,
    )
    loop.run(epoch, lambda: score(model), saved=progress)
    model.load_state_dict(loop.best)
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    model.eval()
    return loop.history


class _Epoch:
    """One pass over all images: cross entropy, and distillation from a teacher."""

    def __init__(
        self,
        model: nn.Module,
        data: Images,
        parts: list[str],
        config: TrainConfig,
        seed: int,
        teacher: nn.Module | None,
        heartbeat: Callable[[], object],
    ) -> None:
        self.model, self.data, self.config, self.seed, self.heartbeat = model, data, config, seed, heartbeat
        self.kd = config.kd if isinstance(config, FinetuneConfig) and teacher is not None else 0.0
        labelled = all(part in data.labels for part in parts)
        if not labelled and not self.kd:
            raise ConfigError(
                f"data {data.name} has no labels: nothing can be trained without kd, the weight of the full "
                "network's knowledge"
            )
        device = next(model.parameters()).device
        self.layout = torch.channels_last if config.channels_last else torch.contiguous_format
        model.to(memory_format=self.layout)  # type: ignore[call-overload]
        self.teacher = teacher
        if self.kd:
            self.teacher = copy.deepcopy(teacher).to(memory_format=self.layout)  # type: ignore[union-attr, call-overload]
        self.images = torch.cat([data.images[part] for part in parts]).to(device)
        self.labels = torch.cat([data.labels[part] for part in parts]).to(device) if labelled else None
        self.optimizer = optimizer_of([p for p in model.parameters() if p.requires_grad], config)

    def __call__(self, epoch: int) -> dict[str, Any]:
        config, images = self.config, self.images
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        torch.manual_seed(self.seed * 1_000_003 + epoch)  # of dropout
        order = torch.randperm(len(images), generator=generator).to(images.device)
        steps = -(-len(images) // config.batch_size)
        self.model.train()
        total = torch.zeros((), device=images.device)
        for step, rows in enumerate(order.split(config.batch_size)):
            if len(rows) < 2 < len(images):
                continue  # one image alone has no statistics
            for group in self.optimizer.param_groups:
                group["lr"] = _rate(config, epoch * steps + step, config.epochs * steps)
            batch = images[rows]
            x = self.data.normalised(_augmented(batch, generator) if config.augment else batch)
            loss = self._loss(x.contiguous(memory_format=self.layout), rows)
            self.optimizer.zero_grad()
            loss.backward()
            if config.clip_norm is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm)
            self.optimizer.step()
            total += loss.detach() * len(rows)
            self.heartbeat()
        self.model.eval()
        mean = float(total) / len(images)
        if not math.isfinite(mean):
            raise FloatingPointError(
                f"the loss of epoch {epoch} is {mean}: lr = {config.lr} may be too large, or "
                f"clip_norm ({config.clip_norm}) too loose"
            )
        return {"loss": mean, "lr": self.optimizer.param_groups[0]["lr"]}

    def _loss(self, x: Tensor, rows: Tensor) -> Tensor:
        low = partial(torch.autocast, x.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16")
        with low():
            logits = self.model(x).float()
        loss = F.cross_entropy(logits, self.labels[rows]) if self.labels is not None else logits.new_zeros(())
        if self.kd:
            assert self.teacher is not None and isinstance(self.config, FinetuneConfig)
            with torch.no_grad(), low():
                target = self.teacher(x).float()
            t = self.config.temperature
            loss = loss + self.kd * t * t * F.kl_div(
                F.log_softmax(logits / t, 1), F.log_softmax(target / t, 1), reduction="batchmean", log_target=True
            )
        return loss


@torch.no_grad()
def predictions(model: nn.Module, x: Tensor) -> Tensor:
    """int64 [N], the classes of normalised images, on the CPU."""
    device = next(model.parameters()).device
    return torch.cat([model(piece.to(device)).argmax(1).cpu() for piece in x.split(EVALUATED)])


def accuracy(given: Tensor, labels: Tensor) -> float:
    """Percent of int64 [N] that agree."""
    return 100 * int((given == labels).sum()) / len(labels)


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Batch normalisation takes the mean statistics of the batches, as bn="recalibrate" of
    :class:`fastkd.PopulationEvaluator` does."""
    norms = [m for m in model.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)) and m.track_running_stats]
    before = [m.momentum for m in norms]
    for m in norms:
        m.reset_running_stats()
        m.momentum = None
        m.train()
    for x in batches:
        model(x)
    for m, momentum in zip(norms, before, strict=True):
        m.momentum = momentum
        m.eval()


def _rate(config: TrainConfig, step: int, steps: int) -> float:
    return config.lr * (0.5 * (1 + math.cos(math.pi * step / steps)) if config.schedule == "cosine" else 1.0)


def _augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """uint8 [n, C, H, W]: each shifted by up to an eighth, zeros beyond its border, and half of them mirrored."""
    n, _, height, width = images.shape
    pad = (height // 8, width // 8)
    shifts = [torch.randint(2 * p + 1, (n,), generator=generator).to(images.device) for p in pad]
    flip = (torch.rand(n, generator=generator) < 0.5).to(images.device)
    padded = F.pad(images, (pad[1], pad[1], pad[0], pad[0]))
    rows = shifts[0][:, None] + torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device)
    columns = shifts[1][:, None] + torch.where(flip[:, None], columns.flip(0), columns)
    at = torch.arange(n, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[at, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


def pieces(x: Tensor, size: int) -> Iterator[Tensor]:
    """Batches of equal size, but a last one of a single image, which has no statistics."""
    for piece in x.split(size):
        if len(piece) > 1:
            yield piece
