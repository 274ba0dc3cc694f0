"""From a configuration to trained networks and a record of what they reached."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import models
from ..config import environment
from ..data import Task
from ..data import load as load_data
from ..runtime import checkpoint, measure
from ..runtime.world import World
from .batches import batches, check_sampler
from .config import NetworkConfig, RunConfig, TrainConfig
from .taps import Taps
from .trainer import SCHEMA, Distiller, Result

__all__ = ["build", "distil", "teacher_of"]

Progress = Callable[[str, int, int, dict[str, Any]], None]
"""(what is trained, epoch, epochs, latest record)"""


def build(network: NetworkConfig, task: Task, seed: int) -> nn.Module:
    """A network with the initial weights of a seed."""
    torch.manual_seed(seed)
    return models.build(network.model.name, task.num_features, task.num_classes, **network.model.args)


def teacher_of(
    config: RunConfig,
    task: Task,
    directory: Path,
    progress: Progress | None = None,
    device: torch.device | str = "cpu",
    world: World | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """The trained teacher, and its record; trained only if the directory does not hold it."""
    identity = {"network": config.teacher.model_dump(), "seed": config.teacher_seed, "data": config.data}
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    folder = directory / f"teacher-{key}"
    model = build(config.teacher, task, config.teacher_seed)
    weights = folder / "weights.safetensors"
    world = world or World()

    def trained() -> tuple[dict[str, Tensor], Any]:
        distiller = Distiller(
            model,
            None,
            task,
            train=config.teacher.train,
            seed=config.teacher_seed,
            directory=folder,
            device=device,
            identity={"model": config.teacher.model.model_dump()},
            world=world,
        )
        result = distiller.fit(_told(progress, "teacher", config.teacher.train, world))

        def write() -> tuple[dict[str, Tensor], Any]:
            checkpoint.save(weights, model.state_dict(), _record(result, model, task, config.teacher.train))
            (folder / "checkpoint.safetensors").unlink(missing_ok=True)
            return checkpoint.load(weights)

        return world.first(write)

    tensors, record = world.once(folder, lambda: checkpoint.load(weights) if weights.exists() else None, trained)
    model.load_state_dict(tensors)
    return model, record


def distil(
    config: RunConfig,
    seed: int,
    directory: Path,
    *,
    task: Task | None = None,
    progress: Progress | None = None,
    device: torch.device | str = "cpu",
    teachers: Path | None = None,
    world: World | None = None,
) -> dict[str, Any]:
    """Trains one student, after its teacher if need be; returns, and writes, the record.

    In `directory`: result.json, weights.safetensors, and while it runs checkpoint.safetensors. If
    result.json is there already, it is returned as it is.

    Args:
        teachers: where trained teachers are kept for several students; None: beside `directory`.
        world: the processes that train together, see `distributed`; None: this one alone.
    """
    world = world or World()
    file = directory / "result.json"
    own = json.loads(json.dumps(config.model_dump()))
    world.same("configuration", {**own, "seed": seed})

    def found() -> dict[str, Any] | None:
        record = checkpoint.result(file, own, seed)
        if record is None:
            check_sampler(config.student.train)  # the teacher's training may take long
        return record

    def trained() -> dict[str, Any]:
        data = task or load_data(config.data)
        teacher, teacher_record = teacher_of(config, data, teachers or directory.parent, progress, device, world)
        student = build(config.student, data, seed)
        distiller = Distiller(
            student,
            teacher if config.losses else None,
            data,
            losses=config.losses,
            train=config.student.train,
            task_weight=config.task_weight,
            seed=seed,
            directory=directory,
            device=device,
            identity={"model": config.student.model.model_dump()},
            world=world,
        )
        result = distiller.fit(_told(progress, f"student, seed {seed}", config.student.train, world))

        def write() -> dict[str, Any]:
            record = {
                "schema": SCHEMA,
                "seed": seed,
                "config": own,
                "student": _record(result, student, data, config.student.train),
                "teacher": teacher_record,
                "environment": {**environment(distiller.device), "processes": world.size},
            }
            if data.kind == "shapes" and (picture := _picture(config, teacher, student, data)) is not None:
                record["picture"] = picture
            checkpoint.save(directory / "weights.safetensors", student.state_dict(), {"config": own, "seed": seed})
            checkpoint.write_json(file, record)
            (directory / "checkpoint.safetensors").unlink(missing_ok=True)
            return record

        return world.first(write)

    return world.once(directory, found, trained)


def _told(progress: Progress | None, what: str, train: TrainConfig, world: World) -> Any:
    return None if progress is None or world.rank else lambda epoch, latest: progress(what, epoch, train.epochs, latest)


def _record(result: Result, model: nn.Module, task: Task, train: TrainConfig) -> dict[str, Any]:
    """What a network reached and what it costs: of a forward pass over one batch of the test part."""
    device = next(model.parameters()).device
    batch = next(iter(batches(task, "test", train, None, device, {})))
    out = dict(vars(result))
    out["cost"] = measure.cost(model, batch.inputs)
    return out


def _picture(config: RunConfig, teacher: nn.Module, student: nn.Module, task: Task) -> dict[str, Any] | None:
    """The paper's figure: over one test shape, the distance of every point's features to those of one
    point, for teacher and student at the layers of the LSP loss, also where its weight is 0."""
    lsp = config.losses.get("lsp")
    if lsp is None or lsp.student_layer is None or lsp.teacher_layer is None:
        return None
    # A shape with limbs, from the tip of the longest: features of a ball or a stick show little.
    centred = task.points["test"] - task.points["test"].mean(1, keepdim=True)
    radius, axes = centred.norm(dim=2), torch.linalg.svdvals(centred)
    shape = int((radius.std(1) / radius.mean(1) * (axes[:, 1] > 0.5 * axes[:, 0])).argmax())
    at = int(radius[shape].argmax())
    points = task.points["test"][shape : shape + 1]
    out: dict[str, Any] = {"points": _rounded(points[0]), "at": at}
    for name, model, layer in (("teacher", teacher, lsp.teacher_layer), ("student", student, lsp.student_layer)):
        taps = Taps(model, [layer], name)
        try:
            with torch.no_grad():
                model.eval()
                model(points.to(next(model.parameters()).device))
            z = taps[layer].float().cpu()
        finally:
            taps.remove()
        distance = (z - z[at]).norm(dim=1)
        out[name] = _rounded(distance / distance.max().clamp(min=1e-12))
        out[f"{name}_layer"] = layer
    return out


def _rounded(x: Tensor) -> Any:
    return torch.round(x.double(), decimals=4).tolist()
