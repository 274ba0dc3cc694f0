"""From a configuration to a smaller network, and a record of what it is worth."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import environment
from ..data import Images, load_images
from ..evolve import Result
from ..lab.settings import ConfigError
from ..lab.stage import finished, stage, trained_network
from ..lab.study import Progress
from ..models.cnn import load_weights
from ..population import compact, save, trace
from ..runtime import checkpoint, fingerprint
from ..runtime.world import World, usable
from . import export
from .config import CompressConfig
from .network import build, weights_file
from .search import Search, mask_of
from .train import accuracy, fit, predictions, recalibrate

__all__ = ["compress", "measure_again"]

SCHEMA = 1  # of records
Record = dict[str, Any]
Heartbeat = Callable[[], object]
"""Tells the other ranks now and then that this one is alive."""


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
    trusted: Collection[str] = (),
) -> Record:
    """Trains or loads a network, searches for the filters it can do without, and makes the smaller one.

    In `directory`: result.json (the record), weights.safetensors (see :func:`fastkd.population.load`), model.onnx and
    model-int8.onnx; while it runs, checkpoints. Stopped or killed at any moment, the same call goes on and ends bit for
    bit where the unbroken one would. If result.json is there already, it is returned as it is.

    Args:
        seed: of the network's initial weights, of training, and of the search.
        shared: where trained networks and searches are kept, for other runs that need the same; None: in `directory`.
        progress: called as training and search go on, on rank 0.
        callback: given to :func:`fastkd.evolve.evolve`.
        world: the processes that share the search, see :func:`fastkd.evolve.evolve`; None: this one alone.
        trusted: names ``module:function`` of networks that may come from outside the working directory.

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
    world = world or World(device=device)
    directory = Path(directory)
    identity = json.loads(json.dumps(config.model_dump()))
    world.same("configuration", {**identity, "seed": seed})

    def compute() -> Record:
        run = _Compression(
            config, seed, directory, Path(shared or directory), progress, callback, world, identity, trusted
        )
        return run.record()

    return stage(world, directory, lambda: finished(directory / "result.json", identity, seed), compute)


def measure_again(record: Record, device: torch.device | str = "cpu", trusted: Collection[str] = ()) -> Record:
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
    model = build(config.model, trusted).eval().to(device)
    space = trace(model, example)
    small = compact(model, mask_of(record["search"], space), space)
    full, less = export.costs([model, small], example)
    return {
        **record,
        "dense": {**record["dense"], **full},
        "compact": {**record["compact"], **less},
        "measured": environment(device),
    }


class _Compression:
    """One run: the full network, the search, and what is made of its mask."""

    def __init__(
        self,
        config: CompressConfig,
        seed: int,
        directory: Path,
        shared: Path,
        progress: Progress | None,
        callback: Callable[[Result], object] | None,
        world: World,
        identity: dict[str, Any],
        trusted: Collection[str],
    ) -> None:
        """Finds all that can be wrong before anything long begins."""
        self.config, self.seed, self.directory, self.shared, self.world = config, seed, directory, shared, world
        self.callback, self.identity = callback, identity
        self.progress: Progress = progress if progress is not None and world.rank == 0 else lambda *_: None
        self.data: Images = load_images(config.data)
        self.score = "agreement" if config.fitness.quality == "agreement" or not self.data.labels else "accuracy"
        torch.manual_seed(seed)
        self.model = build(config.model, trusted).eval().to(world.device)
        self.example = self.data.part("train", 1)[0].to(world.device)
        self.space = trace(self.model, self.example)
        self.search = Search(config, self.model, self.example, self.space, self.data, world)
        if config.export.int8:
            self._ranges()
        self.weights = weights_file(config)
        self._agreed: dict[str, Tensor] = {}

    def record(self) -> Record:
        """Runs what is not there yet, and writes the record."""
        world, c = self.world, self.config
        state, dense = world.first_at_length(self._full_network)
        self.model.load_state_dict(state)
        self.model.eval()
        keys = ("budget", "k_min", "fitness", "algorithm")
        identity = {**self._dense_identity(), **{key: self.identity[key] for key in keys}, "seed": self.seed}
        folder = self.shared / f"search-{fingerprint.of_config(identity)}"
        file = folder / "search.json"
        search = stage(
            world,
            folder,
            lambda: checkpoint.read_json(file) if file.exists() else None,
            lambda: self.search.run(self.seed, folder, self._callbacks(c.algorithm.name)),
        )
        return world.first_at_length(lambda heartbeat: self._finished(dense, search, heartbeat))

    # --- the full network ----------------------------------------------------------------------------

    def _full_network(self, heartbeat: Heartbeat) -> tuple[dict[str, Tensor], Record]:
        """State and record of the full network; on rank 0."""
        if self.weights is not None:
            load_weights(self.model, self.weights)
            return self.model.state_dict(), {"seconds": 0.0, "history": []}
        folder, c = self.shared / f"dense-{fingerprint.of_config(self._dense_identity())}", self.config.train

        def train() -> Record:
            start = time.perf_counter()
            history = fit(
                self.model,
                self.data,
                ["train"],
                c,
                self.seed,
                folder / "training.safetensors",
                lambda model: self._accuracy(model, "val"),
                heartbeat=heartbeat,
                progress=lambda epoch, latest: self.progress("training the full network", epoch, c.epochs, latest),
            )
            return {"seconds": time.perf_counter() - start, "history": history}

        record = trained_network(folder, self.model, train, World(), "training.safetensors")
        return self.model.state_dict(), record

    def _dense_identity(self) -> dict[str, Any]:
        given = {key: self.identity[key] for key in ("data", "model", "weights")}
        # Weights from a file are the same for every seed.
        trained = self.config.weights is None
        return {**given, "train": self.identity["train"], "seed": self.seed} if trained else given

    def _callbacks(self, algorithm: str) -> Sequence[Callable[[Result], object]]:
        def report(result: Result) -> None:
            self.progress(f"search, {algorithm}", result.generation, result.generations, result.history[-1])

        return (report, self.callback) if self.callback is not None and self.world.rank == 0 else (report,)

    # --- what comes after the search -----------------------------------------------------------------

    def _finished(self, dense: Record, search: Record, heartbeat: Heartbeat) -> Record:
        """The smaller network, fine-tuned, exported and measured; the record is written last. On rank 0."""
        tuning = self.directory / "finetuning.safetensors"
        mask = mask_of(search, self.space)
        small, stages, training = self._smaller(mask, tuning, heartbeat)
        full, less = export.costs([self.model, small], self.example)
        heartbeat()
        limits = self.search.limits
        counts = limits.counts(mask[None])
        record: Record = {
            "schema": SCHEMA,
            "kind": "compress",
            "seed": self.seed,
            "config": self.identity,
            "environment": {**environment(self.world.device), "processes": self.world.size},
            "score": self.score,
            "dense": {**self._scores(self.model), **full, "filters": limits.full["filters"], **dense},
            "compact": {
                **list(stages.values())[-1],
                **less,
                "filters": int(limits.costs(counts, "filters")),
                "stages": stages,
                **training,
            },
            "layers": [
                {"name": group.name, "size": group.size, "kept": kept}
                for group, kept in zip(self.space.groups, counts[0].tolist(), strict=True)
            ],
            "search": search,
        }
        record |= self._exported(small, heartbeat)
        shape = list(self.example.shape[1:])
        weights = self.directory / "weights.safetensors"
        save(weights, small.cpu(), mask, config=self.identity["model"], input_shape=shape)
        checkpoint.write_json(self.directory / "result.json", record)
        tuning.unlink(missing_ok=True)
        return record

    def _smaller(
        self, mask: Tensor, tuning: Path, heartbeat: Heartbeat
    ) -> tuple[nn.Module, dict[str, dict[str, float]], Record]:
        """The network of a mask, its scores by stage, and how it was trained."""
        c = self.config.finetune
        small = compact(self.model, mask, self.space).eval()
        stages = {"masked": self._scores(small)}
        heartbeat()
        if any(isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)) for m in small.modules()):
            recalibrate(small, self.search.calibration)
            stages["recalibrated"] = self._scores(small)
        history: list[dict[str, Any]] = []
        start = time.perf_counter()
        if c.epochs:
            # The search is over: the images that it looked at are training data again.
            history = fit(
                small,
                self.data,
                ["train", "fitness"],
                c,
                self.seed,
                tuning,
                lambda model: self._scores(model, ("val",))["val"],
                teacher=self.model,
                heartbeat=heartbeat,
                progress=lambda epoch, latest: self.progress("fine-tuning", epoch, c.epochs, latest),
            )
            stages["finetuned"] = self._scores(small)
        training = {"seconds": time.perf_counter() - start, "history": history}
        heartbeat()
        return small, stages, training

    def _exported(self, small: nn.Module, heartbeat: Heartbeat) -> Record:
        """Files and figures of ONNX and int8, where they are wanted."""
        wanted, out = self.config.export, dict[str, Any](onnx=None, int8=None)
        if not wanted.onnx and not wanted.int8:
            return out
        small = small.cpu()
        path, quantised = self.directory / "model.onnx", self.directory / "model-int8.onnx"
        out["onnx"] = export.to_onnx(small, path, self.example.cpu())
        heartbeat()
        if wanted.int8:
            figures = export.to_int8(path, quantised, self._ranges())
            out["int8"] = {**figures, **self._scored(lambda x: export.predict(quantised, x).argmax(1))}
            heartbeat()
        return out

    def _ranges(self) -> Tensor:
        """The images that int8 takes its ranges from."""
        count = self.config.export.calibration_images
        try:
            return self.data.part("train", count)[0]
        except ValueError as error:
            raise ConfigError(f"export.calibration_images = {count}: {error}") from None

    # --- scores --------------------------------------------------------------------------------------

    def _scores(self, model: nn.Module, parts: Sequence[str] = ("val", "test")) -> dict[str, float]:
        """Percent, by part."""
        return self._scored(lambda x: predictions(model, x), parts)

    def _scored(self, predict: Callable[[Tensor], Tensor], parts: Sequence[str] = ("val", "test")) -> dict[str, float]:
        out = {}
        for part in parts:
            x, y = self.data.part(part)
            if self.score == "agreement":
                if part not in self._agreed:
                    self._agreed[part] = predictions(self.model, x)
                y = self._agreed[part]
            assert y is not None
            out[part] = accuracy(predict(x), y)
        return out

    def _accuracy(self, model: nn.Module, part: str) -> float:
        x, y = self.data.part(part)
        assert y is not None
        return accuracy(predictions(model, x), y)
