"""From a configuration to trained networks and a record of what they reached."""

from __future__ import annotations

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
from ..lab.stage import finished, stage, trained_network
from ..lab.study import Progress
from ..runtime import checkpoint, fingerprint, measure
from ..runtime.world import World
from .batches import batches, check_sampler
from .config import ConfigError, NetworkConfig, RunConfig, TrainConfig
from .taps import Taps
from .trainer import SCHEMA, Distiller, Result

__all__ = ["build", "check", "distil", "teacher_of"]


def build(network: NetworkConfig, task: Task, seed: int) -> nn.Module:
    """A network with the initial weights of a seed."""
    torch.manual_seed(seed)
    return models.build(network.model.name, task.num_features, task.num_classes, **network.model.args)


def check(config: RunConfig, task: Task, device: torch.device | str = "cpu") -> None:
    """Finds what is wrong before anything long begins: networks, layers, losses and samplers that do not fit.

    Raises:
        ValueError, TypeError, ImportError: as for :class:`Distiller`, with the part of the configuration.
    """
    networks = {}
    for role in ("teacher", "student"):
        network: NetworkConfig = getattr(config, role)
        check_sampler(network.train)
        try:
            networks[role] = build(network, task, 0)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(f"{role}.model: {error}") from None
    _distiller(config, 0, networks["student"], networks["teacher"], task, None, device, World()).close()


def teacher_of(
    config: RunConfig,
    task: Task,
    directory: Path,
    progress: Progress | None = None,
    device: torch.device | str = "cpu",
    world: World | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """The trained teacher, and its record; trained only if the directory does not hold it."""
    seed, network, world = config.teacher_seed, config.teacher, world or World()
    identity = {"network": network.model_dump(), "seed": seed, "data": config.data}
    folder = directory / f"teacher-{fingerprint.of_config(identity)}"
    model = build(network, task, seed)

    def train() -> dict[str, Any]:
        distiller = Distiller(
            model,
            None,
            task,
            train=network.train,
            seed=seed,
            directory=folder,
            device=device,
            identity={"model": network.model.model_dump()},
            world=world,
        )
        result = distiller.fit(_every_epoch(progress, "teacher", network.train, world))
        return world.first(lambda: _record(result, model, task, network.train))

    return model, trained_network(folder, model, train, world)


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
        task: the data set of the configuration, if it is loaded already.
        progress: called as the networks are trained, on rank 0.
        teachers: where trained teachers are kept for several students; None: beside `directory`.
        world: the processes that train together, see `distributed`; None: this one alone.

    Raises:
        ConfigError, ValueError, TypeError, ImportError: what cannot be run, before anything long begins.
        CheckpointError, Stopped, RankLost: as for :meth:`Distiller.fit`.
    """
    world = world or World()
    file = directory / "result.json"
    identity = json.loads(json.dumps(config.model_dump()))
    world.same("configuration", {**identity, "seed": seed})

    def find() -> dict[str, Any] | None:
        record = finished(file, identity, seed)
        if record is None:
            check_sampler(config.student.train)  # before the folder is made
        return record

    def compute() -> dict[str, Any]:
        data = task or load_data(config.data)
        check(config, data, device)
        teacher, teacher_record = teacher_of(config, data, teachers or directory.parent, progress, device, world)
        student = build(config.student, data, seed)
        distiller = _distiller(config, seed, student, teacher, data, directory, device, world)
        result = distiller.fit(_every_epoch(progress, f"student, seed {seed}", config.student.train, world))

        def write() -> dict[str, Any]:
            record = {
                "schema": SCHEMA,
                "seed": seed,
                "config": identity,
                "student": _record(result, student, data, config.student.train),
                "teacher": teacher_record,
                "environment": {**environment(distiller.device), "processes": world.size},
            }
            if data.kind == "shapes" and (picture := _picture(config, teacher, student, data)) is not None:
                record["picture"] = picture
            checkpoint.save(directory / "weights.safetensors", student.state_dict(), {"config": identity, "seed": seed})
            checkpoint.write_json(file, record)
            (directory / "checkpoint.safetensors").unlink(missing_ok=True)
            return record

        return world.first(write)

    return stage(world, directory, find, compute)


def _distiller(
    config: RunConfig,
    seed: int,
    student: nn.Module,
    teacher: nn.Module,
    task: Task,
    directory: Path | None,
    device: torch.device | str,
    world: World,
) -> Distiller:
    return Distiller(
        student,
        teacher if config.losses else None,
        task,
        losses=config.losses,
        train=config.student.train,
        task_weight=config.task_weight,
        seed=seed,
        directory=directory,
        device=device,
        identity={"model": config.student.model.model_dump()},
        world=world,
    )


def _every_epoch(
    progress: Progress | None, what: str, train: TrainConfig, world: World
) -> Callable[[int, dict[str, Any]], None] | None:
    if progress is None or world.rank:
        return None
    return lambda epoch, latest: progress(what, epoch, train.epochs, latest)


def _record(result: Result, model: nn.Module, task: Task, train: TrainConfig) -> dict[str, Any]:
    """What a network reached and what it costs: of a forward pass over one batch of the test part."""
    device = next(model.parameters()).device
    batch = next(iter(batches(task, "test", train, None, device, {})))
    return {**vars(result), "cost": measure.cost(model, batch.inputs)}


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
