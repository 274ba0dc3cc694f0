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
from ..lab.settings import ConfigError
from ..runtime import checkpoint as files
from ..runtime.stopping import Stopped, stop_requests
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
    told: Callable[[int, dict[str, Any]], object] | None = None,
    tick: Callable[[], object] = lambda: None,
) -> list[dict[str, Any]]:
    """Trains, and leaves the weights of the epoch of the best score.

    Can be stopped or killed, and called again: the epochs that `file` knows are not run again, and the result
    is bit for bit that of an unbroken run.

    Args:
        parts: of the data, all images of which are taken once per epoch, in an order drawn anew.
        file: the checkpoint after every epoch. Its deletion is left to the caller.
        score: of the validation part, larger is better.
        teacher: for knowledge distillation, with a :class:`FinetuneConfig`.
        told: after every epoch, with its number (from 1) and its record.
        tick: called at least once per step.

    Returns:
        A record per epoch: epoch (from 0), loss, val (the score), lr.

    Raises:
        ConfigError: data without labels, and no teacher to learn from.
        CheckpointError: the file is of another configuration, or cannot be written or read.
        FloatingPointError: a loss that is not finite; the checkpoint of the epoch before is whole.
        Stopped: Ctrl-C or SIGTERM came; the epoch was finished, and the checkpoint written.
    """
    kd = config.kd if isinstance(config, FinetuneConfig) and teacher is not None else 0.0
    parts = list(parts)
    labelled = all(part in data.labels for part in parts)
    if not labelled and not kd:
        raise ConfigError(
            f"data {data.name} has no labels: nothing can be trained without kd, the weight of the full "
            "network's knowledge"
        )
    device = next(model.parameters()).device
    low = partial(torch.autocast, device.type, torch.bfloat16, enabled=config.precision == "bfloat16")
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    model.to(memory_format=layout)  # type: ignore[call-overload]
    if kd:
        assert teacher is not None
        teacher = copy.deepcopy(teacher).to(memory_format=layout)  # type: ignore[call-overload]
    images = torch.cat([data.images[part] for part in parts]).to(device)
    labels = torch.cat([data.labels[part] for part in parts]).to(device) if labelled else None
    steps = -(-len(images) // config.batch_size)
    optimizer = _optimizer(model, config)
    identity = {
        "train": config.model_dump(),
        "seed": seed,
        "images": len(images),
        "shapes": {name: list(x.shape) for name, x in model.state_dict().items()},
    }
    history: list[dict[str, Any]] = []
    best = copy.deepcopy(model.state_dict())
    if file.exists():
        tensors, state = files.load(file)
        if differences := files.differences(state["identity"], identity):
            raise files.CheckpointError(
                f"{file} belongs to another configuration: "
                + "; ".join(differences)
                + ". Take another directory, or the configuration of the checkpoint"
            )
        history = state["history"]
        model.load_state_dict({name: tensors[f"model.{name}"] for name in best})
        best = {name: tensors[f"best.{name}"] for name in best}
        _restore(optimizer, tensors)
    with stop_requests(True) as stop:
        for epoch in range(len(history), config.epochs):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            torch.manual_seed(seed * 1_000_003 + epoch)  # of dropout
            order = torch.randperm(len(images), generator=generator).to(device)
            model.train()
            total = torch.zeros((), device=device)
            for step, rows in enumerate(order.split(config.batch_size)):
                if len(rows) < 2 < len(images):
                    continue  # one image alone has no statistics
                for group in optimizer.param_groups:
                    group["lr"] = _rate(config, epoch * steps + step, config.epochs * steps)
                batch = images[rows]
                x = data.normalised(_augmented(batch, generator) if config.augment else batch)
                x = x.contiguous(memory_format=layout)
                with low():
                    logits = model(x).float()
                loss = F.cross_entropy(logits, labels[rows]) if labels is not None else logits.new_zeros(())
                if kd:
                    assert teacher is not None and isinstance(config, FinetuneConfig)
                    with torch.no_grad(), low():
                        theirs = teacher(x).float()
                    t = config.temperature
                    loss = loss + kd * t * t * F.kl_div(
                        F.log_softmax(logits / t, 1),
                        F.log_softmax(theirs / t, 1),
                        reduction="batchmean",
                        log_target=True,
                    )
                optimizer.zero_grad()
                loss.backward()
                if config.clip_norm is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
                optimizer.step()
                total += loss.detach() * len(rows)
                tick()
            model.eval()
            mean = float(total) / len(images)
            if not math.isfinite(mean):
                raise FloatingPointError(
                    f"the loss of epoch {epoch} is {mean}: lr = {config.lr} may be too large, or "
                    f"clip_norm ({config.clip_norm}) too loose"
                )
            history.append({"epoch": epoch, "loss": mean, "val": score(model), "lr": optimizer.param_groups[0]["lr"]})
            if history[-1]["val"] > max((look["val"] for look in history[:-1]), default=-math.inf):
                best = copy.deepcopy(model.state_dict())
            own = model.state_dict()
            files.save(
                file,
                {
                    **{f"model.{name}": x for name, x in own.items()},
                    **{f"best.{name}": x for name, x in best.items()},
                    **_saved(optimizer),
                },
                {"identity": identity, "history": history},
            )
            if told is not None:
                told(epoch + 1, history[-1])
            if stop.is_set() and epoch + 1 < config.epochs:
                raise Stopped(f"stopped after epoch {epoch + 1} of training; the same command goes on from there")
    model.load_state_dict(best)
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    model.eval()
    return history


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


def _optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if config.optimizer == "adam":
        return torch.optim.Adam(parameters, config.lr, weight_decay=config.weight_decay)
    return torch.optim.SGD(parameters, config.lr, momentum=config.momentum, weight_decay=config.weight_decay)


def _saved(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {f"optimizer.{i}.{key}": x for i, own in state.items() for key, x in own.items() if isinstance(x, Tensor)}


def _restore(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state = optimizer.state_dict()
    for name, x in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "optimizer":
            i, _, key = rest.partition(".")
            state["state"].setdefault(int(i), {})[key] = x
    optimizer.load_state_dict(state)


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
