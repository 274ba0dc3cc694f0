"""The search of a compression: what is asked for, where it starts, and a record of all that it looked at."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._text import suggestion
from ..data import Images
from ..evolve import ALGORITHMS, QUALITIES, Algorithm, Fitness, Limits, Result, evolve, latency, mask_id, uniform_l1
from ..evolve.limits import largest
from ..evolve.ranking import group_norm, strongest
from ..lab.settings import ConfigError
from ..population import GeneSpace, PopulationEvaluator
from ..population.masks import duplicates, from_hex, to_hex
from ..runtime import checkpoint
from ..runtime.world import World
from .config import CompressConfig
from .controls import CONTROLS, control
from .train import pieces

__all__ = ["Search", "mask_of"]

DENSITIES = 16  # of the uniform-L1 control beside every search
TESTED = 3  # times as many images of the test part as the search had: on which its front is measured, at most
COUPLED = (0.0, 0.1, 0.2, 1.0)  # powers; on two ResNets' fitness images the best one was 0 to 0.25, by the budget
PIECE = 8  # networks between two heartbeats
Record = dict[str, Any]
Callback = Callable[[Result], object]


class Search:
    """From a network to the mask that is taken.

    Args:
        example: an image of the network, [1, C, H, W].
        world: the processes that share the evaluation.

    Raises:
        ConfigError: a configuration that cannot be run; the message says which key.
        ValueError: a budget that no mask can meet, or more images than there are.
    """

    def __init__(
        self, config: CompressConfig, model: nn.Module, example: Tensor, space: GeneSpace, data: Images, world: World
    ) -> None:
        self.config, self.model, self.example, self.data, self.world = config, model, example, data, world
        try:
            self.limits = Limits(space, config.budget, config.k_min, fill=not config.fitness.weight)
        except TypeError as error:
            raise ConfigError(str(error)) from None
        self.name = config.algorithm.name
        self.algorithm = self._algorithm()
        self.calibration = self._calibration()
        self._fitness()  # with its images, so that it can be wrong now

    def _algorithm(self) -> Algorithm | None:
        """With its options; None for a control."""
        if self.name in CONTROLS:
            if not self.config.budget:
                raise ConfigError(f"algorithm.name = {self.name!r} needs a budget, such as --budget macs=0.4")
            return None
        if self.name not in ALGORITHMS:
            valid = [*ALGORITHMS, *CONTROLS]
            raise ConfigError(
                f"algorithm.name must be one of {', '.join(valid)}, got {self.name!r}{suggestion(self.name, valid)}"
            )
        try:
            return ALGORITHMS[self.name](**self.config.algorithm.args)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"algorithm.args = {self.config.algorithm.args}: {error}") from None

    def _calibration(self) -> list[Tensor]:
        """Batches of the training part, for the statistics of batch normalisation."""
        c = self.config.fitness
        x = self.data.part("train", c.calibration_images)[0].to(self.world.device)
        return list(pieces(x, c.calibration_batch))

    def _batch(self, part: str, images: int) -> Any:
        """What a fitness takes: images, and labels if there are any."""
        x, y = self.data.part(part, images)
        x = x.to(self.world.device)
        return x if y is None else (x, y)

    def _fitness(self) -> Fitness:
        c = self.config.fitness
        batch = self._batch("fitness", c.images)
        if not isinstance(batch, tuple) and c.quality in QUALITIES and QUALITIES[c.quality].labels:
            raise ConfigError(
                f"fitness.quality = {c.quality!r} needs labels, and data {self.data.name} has none: take agreement"
            )
        cost = latency(self.model, self.example) if c.cost == "latency" else c.cost
        return Fitness(c.quality, [batch], cost=cost, weight=c.weight)

    def evaluator(self) -> PopulationEvaluator:
        """Of the network as its weights are now, which the order of repairs follows, too."""
        bn = self.config.fitness.bn
        evaluator = PopulationEvaluator(self.model, self.limits.space, bn=bn)
        if bn == "recalibrate":
            evaluator.calibrate(self.calibration)
        return evaluator

    def run(self, seed: int, folder: Path, callbacks: Sequence[Callback]) -> Record:
        """Searches, measures what was found on test images, and writes search.json; the record is on every rank."""
        c, start = self.config.algorithm, time.perf_counter()
        evaluator, fitness = self.evaluator(), self._fitness()
        space = evaluator.space
        if self.algorithm is None:
            mask = self.world.first(lambda: control(self.name, self.model, self.example, self.limits))
            masks = mask[None]
            values = fitness.measure(evaluator, self.limits, masks)
            columns = _columns([mask_id(mask)], values[:, 0], values[:, 1], masks)
            record: Record = {
                "evaluations": 1,
                "seconds": time.perf_counter() - start,
                "history": [],
                "individuals": columns,
                "front": dict(columns),
            }
        else:
            result = evolve(
                evaluator,
                fitness,
                self.algorithm,
                c.population,
                c.generations,
                seed,
                initial=self._initial(space),
                limits=self.limits,
                checkpoint=folder,
                callback=callbacks,
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

        def write(heartbeat: Callable[[], object]) -> Record:
            self._complete(record, evaluator, fitness, mask, masks, heartbeat)
            checkpoint.write_json(folder / "search.json", record)
            for name in ("checkpoint.safetensors", "previous.safetensors"):
                (folder / name).unlink(missing_ok=True)
            return record

        return self.world.first_at_length(write)

    def _complete(
        self,
        record: Record,
        evaluator: PopulationEvaluator,
        fitness: Fitness,
        mask: Tensor,
        masks: Tensor,
        heartbeat: Callable[[], object],
    ) -> None:
        """Adds what was asked for, the uniform-L1 control at several densities, and scores on test images."""
        c, searched = self.config, self.algorithm is not None
        densities = [(k + 1) / DENSITIES for k in range(DENSITIES)]
        ladder = uniform_l1(evaluator.space, torch.tensor(densities, dtype=torch.float64), c.k_min)
        steps = fitness.measure(evaluator, self.limits, ladder)  # the last one is the full network
        # The search looked at the quality of hundreds of networks, which flatters those that it kept.
        images = min(TESTED * c.fitness.images, len(self.data.images["test"]))
        held_out, parts = Fitness(fitness.quality, [self._batch("test", images)]), []
        for some in torch.cat((masks, ladder)).split(PIECE):
            parts.append(held_out.measure(evaluator, self.limits, some)[:, 0])
            heartbeat()
        tested = torch.cat(parts).tolist()
        record["front"]["test"] = tested[: len(masks)]
        record |= {
            "algorithm": self.name,
            "population": c.algorithm.population if searched else 1,
            "generations": c.algorithm.generations if searched else 1,
            "quality": c.fitness.quality,
            "cost": c.fitness.cost,
            "full_quality": float(steps[-1, 0]),
            "full_cost": float(steps[-1, 1]),
            "chosen": mask_id(mask),
            "mask": to_hex(mask),
            "l1": {"density": densities, **_columns(None, steps[:, 0], steps[:, 1]), "test": tested[len(masks) :]},
        }

    def _initial(self, space: GeneSpace) -> Tensor | None:
        """Individuals that the initial population begins with; None: all are drawn."""
        c, k_min = self.config.algorithm, self.config.k_min
        count = c.population // 4
        densities = (torch.arange(count, dtype=torch.float64) + 1) / max(count, 1)
        masks = [uniform_l1(space, densities, k_min)] if c.start_l1 else []
        if c.start_norm:
            masks.append(_of_norm(self.limits, count))
        return self.limits.repair(torch.cat(masks)) if masks and count else None


def mask_of(record: Record, space: GeneSpace) -> Tensor:
    """The mask that a search took, bool [genes]."""
    return from_hex(record["mask"], space.num_genes)


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


def _columns(
    ids: list[str] | None, quality: Tensor, cost: Tensor | None, masks: Tensor | None = None
) -> dict[str, Any]:
    out: dict[str, Any] = {} if ids is None else {"id": ids}
    out |= {"quality": quality.tolist(), "cost": [] if cost is None else cost.tolist()}
    return out if masks is None else {**out, "mask": [to_hex(m) for m in masks]}
