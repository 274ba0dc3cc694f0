"""From a configuration to a smaller network, and a record of what it is worth."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .._text import suggestion
from ..config import environment
from ..data import load_images
from ..data.files import cache_folder
from ..evolve import ALGORITHMS, Fitness, Limits, Result, evolve, latency, mask_id, uniform_l1
from ..evolve.limits import largest
from ..evolve.ranking import group_norm, strongest
from ..lab.settings import ConfigError
from ..models.cnn import CNNS, build_cnn, load_weights
from ..population import GeneSpace, PopulationEvaluator, compact, save
from ..population.masks import duplicates
from ..population.trace import trace
from ..runtime import checkpoint as files
from ..runtime.world import World, usable
from . import export
from .config import CompressConfig, ModelConfig
from .controls import CONTROLS, control
from .train import accuracy, fit, pieces, predictions, recalibrate

__all__ = ["build", "compress", "measure_again"]

SCHEMA = 1  # of records
DENSITIES = 16  # of the uniform-L1 control beside every search
TESTED = 3  # times as many images of the test part as the search had: on which its front is measured, at most
COUPLED = (0.0, 0.1, 0.2, 1.0)  # powers; on two ResNets' fitness images the best one was 0 to 0.25, by the budget
PIECE = 8  # networks between two signs of life to the other ranks
Progress = Callable[[str, int, int, dict[str, Any]], None]
"""(what is done, steps of it, all its steps, latest record)"""


def build(model: ModelConfig) -> nn.Module:
    """The full network of a configuration, with new weights.

    Raises:
        ConfigError: no such network, module or function, or arguments that it does not take.
    """
    module, colon, function = model.name.partition(":")
    if not colon:
        try:
            return build_cnn(model.name, **model.args)
        except (ValueError, TypeError) as error:
            own = "" if model.name in CNNS else "; your own is module:function, such as nets:small"
            raise ConfigError(f"model.{error}{own}") from None
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"model.name = {model.name!r} cannot be imported: {error}") from None
    try:
        out = make(**model.args)
    except TypeError as error:
        raise ConfigError(f"model.args = {model.args}: {model.name} says: {error}") from None
    if not isinstance(out, nn.Module):
        raise ConfigError(f"model.name = {model.name!r} must return a torch.nn.Module, got {type(out).__name__}")
    return out


def compress(
    config: CompressConfig,
    seed: int = 0,
    directory: str | Path = "runs/compress",
    *,
    shared: str | Path | None = None,
    progress: Progress | None = None,
    callback: Callable[[Result], object] | None = None,
    device: torch.device | str = "cpu",
    world: World | None = None,
) -> dict[str, Any]:
    """Trains or loads a network, searches for the filters it can do without, and makes the smaller one.

    In `directory`: result.json (the record), weights.safetensors (see :func:`fastkd.population.load`), model.onnx and
    model-int8.onnx; while it runs, checkpoints. Stopped or killed at any moment, the same call goes on and ends bit for
    bit where the unbroken one would. If result.json is there already, it is returned as it is.

    Args:
        seed: of the network's initial weights, of training, and of the search.
        shared: where trained networks and searches are kept, for other runs that need the same; None: in `directory`.
        progress: called as training and search go on, on rank 0.
        callback: given to :func:`fastkd.evolve`.
        world: the processes that share the search, see :func:`fastkd.evolve`; None: this one alone.

    Returns:
        The record.

    Raises:
        ConfigError: a configuration that cannot be run: the message says which key.
        CheckpointError: `directory` is of another configuration, a checkpoint is damaged, another process is at work
            there, or the disk is full.
        ValueError, TypeError, FileNotFoundError: data or weights that are not there or do not fit, a network that
            cannot be traced, a budget that no mask can meet.
        Stopped: Ctrl-C or SIGTERM came; what was reached is saved.
        RankLost: another of several ranks has ended.
    """
    return _Run(
        config,
        seed,
        Path(directory),
        None if shared is None else Path(shared),
        progress,
        callback,
        world or World(device=device),
    ).run()


def measure_again(record: dict[str, Any], device: torch.device | str = "cpu") -> dict[str, Any]:
    """The record, with latency and peak memory of its two networks in torch measured anew, on a device of
    this machine as it is.

    Records of a table are comparable when nothing else ran. The networks are built of the record's mask, with new
    weights, on which time does not depend.

    Raises:
        ConfigError, ValueError, FileNotFoundError: as for :func:`compress`.
    """
    config = CompressConfig.model_validate(record["config"])
    device = usable(device)
    example = load_images(config.data).part("train", 1)[0].to(device)
    model = build(config.model).eval().to(device)
    space = trace(model, example)
    small = compact(model, _unhex(record["search"]["mask"], space.num_genes), space)
    full, less = export.compare(model, small, example)
    return {
        **record,
        "dense": {**record["dense"], **full},
        "compact": {**record["compact"], **less},
        "measured": environment(device),
    }


class _Run:
    def __init__(
        self,
        config: CompressConfig,
        seed: int,
        directory: Path,
        shared: Path | None,
        progress: Progress | None,
        callback: Callable[[Result], object] | None,
        world: World,
    ) -> None:
        self.config, self.seed, self.directory, self.world = config, seed, directory, world
        self.shared, self.callback = shared or directory, callback
        self.told: Progress = progress if progress is not None and world.rank == 0 else lambda *_: None
        self.own = json.loads(json.dumps(config.model_dump()))
        self.algorithm = config.algorithm.name
        if self.algorithm not in ALGORITHMS and self.algorithm not in CONTROLS:
            valid = [*ALGORITHMS, *CONTROLS]
            raise ConfigError(
                f"algorithm.name must be one of {', '.join(valid)}, got {self.algorithm!r}"
                + suggestion(self.algorithm, valid)
            )

    def run(self) -> dict[str, Any]:
        self.world.same("configuration", {**self.own, "seed": self.seed})
        file = self.directory / "result.json"
        return self.world.once(self.directory, lambda: files.result(file, self.own, self.seed), self._run)

    def _run(self) -> dict[str, Any]:
        world = self.world
        self.data = load_images(self.config.data)
        self.score = "agreement" if self.config.fitness.quality == "agreement" or not self.data.labels else "accuracy"
        torch.manual_seed(self.seed)
        self.model = build(self.config.model).eval().to(world.device)
        self.example = self.data.part("train", 1)[0].to(world.device)
        # All that can be wrong is found before anything long begins.
        space = trace(self.model, self.example)
        limits = self._limits(space)
        self._algorithm()
        self._fitness()
        if self.config.export.int8:
            self._ranges()
        weights = self._weights()

        dense, self.dense = world.first_at_length(lambda tick: self._trained(weights, tick))
        self.model.load_state_dict(dense)
        self.model.eval()
        evaluator = self._evaluator()
        search = self._search(evaluator, self._fitness(), self._limits(evaluator.space))
        return world.first_at_length(lambda tick: self._finished(evaluator.space, limits, search, tick))

    # --- the full network ----------------------------------------------------------------------------

    def _weights(self) -> Path | None:
        """Where the given weights are."""
        given = self.config.weights
        if given is None:
            if not self.config.train.epochs:
                raise ConfigError("weights = None and train.epochs = 0: give trained weights (--weights), or epochs")
            return None
        if Path(given).suffix:
            return Path(given)
        root = os.environ.get("FASTKD_DATA")
        folders = [*([Path(root)] if root else []), cache_folder()]
        for folder in folders:
            for path in (folder / "weights" / f"{given}{suffix}" for suffix in (".npz", ".safetensors")):
                if path.is_file():
                    return path
        raise FileNotFoundError(
            f"weights = {given!r}: no {given}.npz or .safetensors in "
            f"{' or '.join(str(f / 'weights') for f in folders)}: give a file with --weights, or "
            "train with --set weights=null --set train.epochs=100"
        )

    def _trained(self, weights: Path | None, tick: Callable[[], object]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """State and record of the full network; trained only if it is not there yet."""
        if weights is not None:
            load_weights(self.model, weights)
            return self.model.state_dict(), {"seconds": 0.0, "history": []}
        folder = self.shared / f"dense-{_key(self._dense_identity())}"
        kept = folder / "weights.safetensors"

        def train() -> tuple[dict[str, Tensor], dict[str, Any]]:
            start, epochs, own = time.perf_counter(), self.config.train.epochs, folder / "training.safetensors"
            history = fit(
                self.model,
                self.data,
                ["train"],
                self.config.train,
                self.seed,
                own,
                lambda model: self._accuracy(model, "val"),
                tick=tick,
                told=lambda epoch, latest: self.told("training the full network", epoch, epochs, latest),
            )
            record = {"seconds": time.perf_counter() - start, "history": history}
            files.save(kept, self.model.state_dict(), record)
            own.unlink(missing_ok=True)
            return self.model.state_dict(), record

        return World().once(folder, lambda: files.load(kept) if kept.exists() else None, train)  # on rank 0 alone

    def _dense_identity(self) -> dict[str, Any]:
        own = {key: self.own[key] for key in ("data", "model", "weights")}
        # Given weights are the same for every seed.
        return own if self.config.weights is not None else {**own, "train": self.own["train"], "seed": self.seed}

    # --- the search ----------------------------------------------------------------------------------

    def _limits(self, space: GeneSpace) -> Limits:
        try:
            return Limits(space, self.config.budget, self.config.k_min)
        except TypeError as error:
            raise ConfigError(str(error)) from None

    def _algorithm(self) -> Any:
        """With its options; None for a control."""
        if self.algorithm in CONTROLS:
            if not self.config.budget:
                raise ConfigError(f"algorithm.name = {self.algorithm!r} needs a budget, such as --budget macs=0.4")
            return None
        try:
            return ALGORITHMS[self.algorithm](**self.config.algorithm.args)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"algorithm.args = {self.config.algorithm.args}: {error}") from None

    def _evaluator(self) -> PopulationEvaluator:
        own = self.config.fitness
        evaluator = PopulationEvaluator(self.model, self.example, bn=own.bn)
        if own.bn == "recalibrate":
            evaluator.calibrate(self._calibration())
        return evaluator

    def _fitness(self) -> Fitness:
        own = self.config.fitness
        self._calibration()
        batch = self._batch("fitness", own.images)
        if not isinstance(batch, tuple) and own.quality in ("accuracy", "loss"):
            raise ConfigError(
                f"fitness.quality = {own.quality!r} needs labels, and data {self.data.name} has none: take agreement"
            )
        cost = latency(self.model, self.example) if own.cost == "latency" else own.cost
        return Fitness(
            own.quality, [batch], cost=cost, weight=own.weight, budget=self.config.budget, k_min=self.config.k_min
        )

    def _batch(self, part: str, images: int) -> Any:
        """What a fitness takes: images, and labels if there are any."""
        x, y = self.data.part(part, images)
        x = x.to(self.world.device)
        return x if y is None else (x, y)

    def _calibration(self) -> list[Tensor]:
        own = self.config.fitness
        x = self.data.part("train", own.calibration_images)[0].to(self.world.device)
        return list(pieces(x, own.calibration_batch))

    def _search(self, evaluator: PopulationEvaluator, fitness: Fitness, limits: Limits) -> dict[str, Any]:
        """What was looked at and what is taken; on every rank."""
        keys = ("budget", "k_min", "fitness", "algorithm")
        identity = {**self._dense_identity(), **{k: self.own[k] for k in keys}, "seed": self.seed}
        folder = self.shared / f"search-{_key(identity)}"
        file = folder / "search.json"
        return self.world.once(
            folder,
            lambda: json.loads(file.read_text()) if file.exists() else None,
            lambda: self._searched(evaluator, fitness, limits, folder),
        )

    def _searched(
        self, evaluator: PopulationEvaluator, fitness: Fitness, limits: Limits, folder: Path
    ) -> dict[str, Any]:
        own, space = self.config.algorithm, evaluator.space
        start = time.perf_counter()
        algorithm = self._algorithm()
        record: dict[str, Any]
        if algorithm is None:
            mask = self.world.first(lambda: control(self.algorithm, self.model, self.example, limits))
            masks = mask[None]
            values = fitness.measure(evaluator, limits, masks)
            alone = _columns([mask_id(mask)], values[:, 0], values[:, 1], masks)
            record = {
                "evaluations": 1,
                "seconds": time.perf_counter() - start,
                "history": [],
                "individuals": alone,
                "front": dict(alone),
            }
        else:
            result = evolve(
                evaluator,
                fitness,
                algorithm,
                own.population,
                own.generations,
                self.seed,
                initial=self._initial(space, limits),
                checkpoint=folder,
                callback=self._heard(),
                world=self.world,
            )
            mask, front, seen = result.best.cpu(), result.front, result.seen
            masks = front.masks.cpu()
            record = {
                "evaluations": result.evaluations,
                "seconds": result.history[-1]["seconds"],
                "history": result.history,
                "individuals": _columns(seen.ids, seen.quality, seen.cost),
                "front": _columns([mask_id(m) for m in front.masks], front.quality, front.cost, front.masks),
            }

        def write(tick: Callable[[], object]) -> dict[str, Any]:
            densities = [(k + 1) / DENSITIES for k in range(DENSITIES)]
            ladder = uniform_l1(space, torch.tensor(densities, dtype=torch.float64), self.config.k_min)
            steps = fitness.measure(evaluator, limits, ladder)  # the last one is the full network
            # The search looked at the quality of hundreds of networks, which flatters those that it kept.
            images = min(TESTED * self.config.fitness.images, len(self.data.images["test"]))
            held_out, parts = Fitness(fitness.quality, [self._batch("test", images)]), []
            for some in torch.cat((masks, ladder)).split(PIECE):
                parts.append(held_out.measure(evaluator, limits, some)[:, 0])
                tick()
            tested = torch.cat(parts).tolist()
            record["front"]["test"] = tested[: len(masks)]
            record.update(
                {
                    "algorithm": self.algorithm,
                    "population": own.population if algorithm is not None else 1,
                    "generations": own.generations if algorithm is not None else 1,
                    "quality": self.config.fitness.quality,
                    "cost": self.config.fitness.cost,
                    "full_quality": float(steps[-1, 0]),
                    "full_cost": float(steps[-1, 1]),
                    "chosen": mask_id(mask),
                    "mask": _hex(mask),
                    "l1": {
                        "density": densities,
                        **_columns(None, steps[:, 0], steps[:, 1]),
                        "test": tested[len(masks) :],
                    },
                }
            )
            files.write_json(folder / "search.json", record)
            for name in ("checkpoint.safetensors", "previous.safetensors"):
                (folder / name).unlink(missing_ok=True)
            return record

        return self.world.first_at_length(write)

    def _initial(self, space: GeneSpace, limits: Limits) -> Tensor | None:
        own, k_min = self.config.algorithm, self.config.k_min
        count = own.population // 4
        densities = (torch.arange(count, dtype=torch.float64) + 1) / max(count, 1)
        given = [uniform_l1(space, densities, k_min)] if own.start_l1 else []
        if own.start_norm:
            given.append(_of_norm(limits, count))
        return limits.repair(torch.cat(given)) if given and count else None

    def _heard(self) -> Sequence[Callable[[Result], object]]:
        def told(result: Result) -> None:
            self.told(f"search, {self.algorithm}", result.generation, result.generations, result.history[-1])

        return (told, self.callback) if self.callback is not None and self.world.rank == 0 else (told,)

    # --- what comes after ----------------------------------------------------------------------------

    def _finished(
        self, space: GeneSpace, limits: Limits, search: dict[str, Any], tick: Callable[[], object]
    ) -> dict[str, Any]:
        config = self.config
        mask = _unhex(search["mask"], space.num_genes)
        small = compact(self.model, mask, space).eval()
        stages = {"masked": self._scores(small)}
        tick()
        norms = any(isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)) for m in small.modules())
        if norms:
            recalibrate(small, self._calibration())
            stages["recalibrated"] = self._scores(small)
        history: list[dict[str, Any]] = []
        start, tuned = time.perf_counter(), self.directory / "finetuning.safetensors"
        if config.finetune.epochs:
            # The search is over: the images that it looked at are training data again.
            history = fit(
                small,
                self.data,
                ["train", "fitness"],
                config.finetune,
                self.seed,
                tuned,
                lambda model: self._scores(model, ("val",))["val"],
                teacher=self.model,
                tick=tick,
                told=lambda epoch, latest: self.told("fine-tuning", epoch, config.finetune.epochs, latest),
            )
            stages["finetuned"] = self._scores(small)
        seconds = time.perf_counter() - start
        tick()
        full, less = export.compare(self.model, small, self.example)
        tick()
        on, off = limits.counts(mask[None])[0].tolist(), limits.sizes.tolist()
        filters = limits.costs(limits.counts(mask[None]), "filters")
        record: dict[str, Any] = {
            "schema": SCHEMA,
            "kind": "compress",
            "seed": self.seed,
            "config": self.own,
            "environment": {**environment(self.world.device), "processes": self.world.size},
            "score": self.score,
            "dense": {**self._scores(self.model), **full, "filters": limits.full["filters"], **self.dense},
            "compact": {
                **list(stages.values())[-1],
                **less,
                "filters": int(filters),
                "stages": stages,
                "seconds": seconds,
                "history": history,
            },
            "layers": [
                {"name": g.name, "size": size, "kept": kept}
                for g, size, kept in zip(space.groups, off, on, strict=True)
            ],
            "search": search,
        }
        record |= self._exported(small, tick)
        shape = list(self.example.shape[1:])
        save(self.directory / "weights.safetensors", small.cpu(), mask, config=self.own["model"], input_shape=shape)
        files.write_json(self.directory / "result.json", record)
        tuned.unlink(missing_ok=True)
        return record

    def _exported(self, small: nn.Module, tick: Callable[[], object]) -> dict[str, Any]:
        wanted, out = self.config.export, dict[str, Any](onnx=None, int8=None)
        if not wanted.onnx and not wanted.int8:
            return out
        small = small.cpu()
        path = self.directory / "model.onnx"
        out["onnx"] = export.to_onnx(small, path, self.example.cpu())
        tick()
        if wanted.int8:
            quantised = self.directory / "model-int8.onnx"
            out["int8"] = {
                **export.to_int8(path, quantised, self._ranges()),
                **self._scored(lambda x: export.predict(quantised, x).argmax(1)),
            }
            tick()
        return out

    def _ranges(self) -> Tensor:
        """The images that int8 takes its ranges from."""
        count = self.config.export.calibration_images
        try:
            return self.data.part("train", count)[0]
        except ValueError as error:
            raise ConfigError(f"export.calibration_images = {count}: {error}") from None

    def _scores(self, model: nn.Module, parts: Sequence[str] = ("val", "test")) -> dict[str, float]:
        """Percent, by part."""
        return self._scored(lambda x: predictions(model, x), parts)

    def _scored(self, predict: Callable[[Tensor], Tensor], parts: Sequence[str] = ("val", "test")) -> dict[str, float]:
        out = {}
        for part in parts:
            x, y = self.data.part(part)
            if self.score == "agreement":
                y = self._theirs(part, x)
            assert y is not None
            out[part] = accuracy(predict(x), y)
        return out

    def _theirs(self, part: str, x: Tensor) -> Tensor:
        """The full network's classes."""
        known = self.__dict__.setdefault("_agreed", {})
        if part not in known:
            known[part] = predictions(self.model, x)
        return known[part]

    def _accuracy(self, model: nn.Module, part: str) -> float:
        x, y = self.data.part(part)
        assert y is not None
        return accuracy(predictions(model, x), y)


def _of_norm(limits: Limits, count: int) -> Tensor:
    """bool [at most count, genes]: the filters of largest norm, at the budget and in steps below, no mask twice."""
    norm, count_of = group_norm(limits.space)
    ladders = [partial(strongest, limits.space, norm * count_of**power, k_min=limits.k_min) for power in COUPLED]
    most = [largest(limits, ladder) for ladder in ladders]
    masks = torch.cat(
        [
            limits.repair(ladder(density * (1 - step / 10)))
            for step in range(10)
            for ladder, density in zip(ladders, most, strict=True)
        ]
    )
    return masks[~duplicates(masks)][:count]


def _key(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def _hex(mask: Tensor) -> str:
    return np.packbits(mask.cpu().numpy()).tobytes().hex()


def _unhex(text: str, genes: int) -> Tensor:
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8), count=genes)
    return torch.from_numpy(bits.astype(bool))


def _columns(
    ids: list[str] | None, quality: Tensor, cost: Tensor | None, masks: Tensor | None = None
) -> dict[str, Any]:
    out: dict[str, Any] = {} if ids is None else {"id": ids}
    out |= {"quality": quality.tolist(), "cost": [] if cost is None else cost.tolist()}
    return out if masks is None else {**out, "mask": [_hex(m) for m in masks]}
