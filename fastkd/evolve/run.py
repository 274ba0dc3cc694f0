"""The run: generation after generation, with a checkpoint after each.

Every number of a run follows from its seed: one generator on the CPU, the same on every rank; the order in
which individuals are evaluated, and by how many processes, changes nothing. An individual is evaluated
once, and then remembered.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..population import GeneSpace, PopulationEvaluator
from ..runtime import checkpoint as files
from ..runtime.curves import Curves
from ..runtime.stopping import Stopped, stop_requests
from ..runtime.world import RankLost, World, usable
from . import operators, pareto
from .algorithms import ALGORITHMS, NSGA2, Algorithm, Scores
from .budget import Limits
from .fitness import Fitness, FitnessError, Measure
from .operators import packed, unpacked

__all__ = ["Individuals", "Result", "Seen", "TensorBoard", "evolve", "mask_id"]

SCHEMA = 2  # of checkpoints


@dataclass
class Individuals:
    masks: Tensor
    """bool [n, genes]"""
    score: Tensor
    """float64 [n], larger is better."""
    quality: Tensor
    """float64 [n], larger is better: minus the loss, for a loss."""
    cost: Tensor | None
    """float64 [n], in its own unit; None if the fitness names none."""


@dataclass
class Seen:
    """Every individual that was evaluated, once each, in the order of evaluation; with Fitness(rotate=...) once for
    each part of the images that it met."""

    ids: list[str]
    """:func:`mask_id`"""
    quality: Tensor
    """float64 [n]"""
    cost: Tensor | None
    """float64 [n], in its own unit; None if the fitness names none."""


@dataclass
class Result:
    """Where a run is: after the last generation, or in a callback after the latest one.

    With Fitness(rotate=...), every generation has images of its own, on which the best and the front so far are
    measured anew, as are those of the old population that may stay. What a callback and the history are told is of
    these images, so that neither the best nor the hypervolume only grows. After the last generation the population,
    the best and the front are measured on all images, and the best and the front are chosen anew among them.
    """

    best: Tensor
    """bool [genes]: the first one of the largest score, of all generations."""
    best_score: float
    best_quality: float
    best_cost: float | None
    population: Individuals
    front: Individuals
    """Of all that were evaluated, those that no other beats in both quality and cost, by ascending cost, one of each
    that are equal; without a cost the best alone."""
    seen: Seen
    history: list[dict[str, Any]]
    """One record per generation: generation (from 1), best (score so far) with its quality and cost, mean (score),
    diversity (how likely two different individuals differ in a gene), hypervolume (of the front; None without a cost),
    evaluations (different individuals so far), seconds (so far), mask (of the best so far: hex of numpy.packbits, the
    first gene in the highest bit)."""
    generation: int
    generations: int
    evaluations: int
    full_cost: float | None
    """Of the full network, in the cost's own unit."""


Callback = Callable[[Result], object]


def evolve(
    evaluator: PopulationEvaluator | GeneSpace,
    fitness: Fitness | Measure,
    algorithm: str | Algorithm = "ecs",
    population: int = 32,
    generations: int = 50,
    seed: int = 0,
    *,
    initial: Tensor | None = None,
    checkpoint: str | Path | None = None,
    callback: Callback | Sequence[Callback] = (),
    progress: bool = False,
    world: World | None = None,
    device: torch.device | str = "cpu",
) -> Result:
    """Searches for the masks of the largest fitness.

    >>> evaluator = fastkd.PopulationEvaluator(model, images[:1])
    >>> fitness = Fitness("accuracy", batches, budget={"macs": 0.4})
    >>> result = fastkd.evolve.evolve(evaluator, fitness, checkpoint="runs/first", progress=True)
    >>> small = fastkd.compact(model, result.best, images[:1])

    Args:
        evaluator: of the network; its :class:`GeneSpace` will do where the quality is a callable.
        fitness: a :class:`Fitness`; a callable masks bool [P, genes] -> [P] stands for Fitness(callable).
        algorithm: "ecs" (as published, arXiv:1707.08005), "ga", "nsga2", "random"; "ga-widths", "nsga2-widths",
            "random-widths", which breed how many filters every group keeps (:class:`GA`); or one with options, such as
            ECS(selection="tournament"); or :class:`Pymoo`.
        population: individuals of a generation.
        generations: the initial population is the first one: population * generations individuals are asked for.
        seed: of all that is random.
        initial: bool [n, genes], individuals that take the first places of the initial population, such as those of
            :func:`uniform_l1`. They are repaired as all are.
        checkpoint: a directory. After every generation it holds checkpoint.safetensors, the one before it
            (previous.safetensors), and history.jsonl. If there is one of the same configuration the run goes
            on from there, bit for bit as if it had never ended; `generations` may have grown.
        callback: called after every generation, on every rank; or several.
        progress: a bar with the time left and the best so far, on rank 0.
        world: the processes that share the evaluation, ``World.from_environment()`` under torchrun; None: this
            one alone. Every rank gets the same result, whatever their number.
        device: where masks are bred.

    Raises:
        TypeError, ValueError: arguments that are not as above; a budget that no mask can meet.
        FitnessError: a fitness that is not finite. The checkpoint of the generation before is whole.
        CheckpointError: the directory holds a run of another configuration (the message lists the
            differences) or no whole checkpoint, another process is at work there, or the disk is full.
        Stopped: Ctrl-C or SIGTERM came, with a checkpoint; the generation was finished, and it was written.
        RankLost: another of several ranks has ended.
    """
    run = _Run(
        evaluator,
        fitness,
        algorithm,
        population,
        generations,
        seed,
        initial,
        None if checkpoint is None else Path(checkpoint),
        world or World(),
        usable(device),
    )
    callbacks: Sequence[Callback] = (callback,) if callable(callback) else tuple(callback)
    try:
        with run.world.alone(None if checkpoint is None else Path(checkpoint)):
            return run.run(callbacks, progress)
    except RankLost as error:
        remedy = (
            "no checkpoint had been written yet: start anew"
            if run.file is None or not run.file.exists()
            else f"the checkpoint {run.file} is whole: the same command goes on from there, with any number of "
            "processes"
        )
        raise RankLost(f"{error}; {remedy}") from None


class _Run:
    def __init__(
        self,
        evaluator: Any,
        fitness: Any,
        algorithm: Any,
        population: int,
        generations: int,
        seed: int,
        initial: Tensor | None,
        directory: Path | None,
        world: World,
        device: torch.device,
    ) -> None:
        for name, value, least in (("population", population, 1), ("generations", generations, 1), ("seed", seed, 0)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {value!r}")
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if isinstance(algorithm, str):
            if algorithm not in ALGORITHMS:
                raise ValueError(
                    f"algorithm must be one of {', '.join(ALGORITHMS)}, or an Algorithm, got {algorithm!r}"
                )
            algorithm = ALGORITHMS[algorithm]()
        if not isinstance(algorithm, Algorithm):
            raise TypeError(f"algorithm must be a name or an Algorithm, got {type(algorithm).__name__}")
        if not isinstance(evaluator, (PopulationEvaluator, GeneSpace)):
            raise TypeError(
                "evaluator must be a PopulationEvaluator, or a GeneSpace where the quality is a callable, "
                f"got {type(evaluator).__name__}"
            )
        if not isinstance(fitness, Fitness):
            if not callable(fitness):
                raise TypeError(f"fitness must be a Fitness or a callable, got {type(fitness).__name__}")
            fitness = Fitness(fitness)
        if isinstance(algorithm, NSGA2) and fitness.cost is None:
            raise ValueError(
                "algorithm 'nsga2' weighs the quality against a cost: name one, as in Fitness(..., cost='macs')"
            )
        if algorithm.replayed and fitness.rotate is not None:
            raise ValueError(
                f"fitness must be without rotate for algorithm {algorithm.name!r}, which keeps scores of "
                f"other generations, got rotate = {fitness.rotate}"
            )
        self.evaluator, self.fitness, self.algorithm = evaluator, fitness, algorithm
        self.space: GeneSpace = evaluator if isinstance(evaluator, GeneSpace) else evaluator.space
        if self.space.num_genes == 0:
            raise ValueError("evaluator has no genes: nothing of this network can be removed")
        self.population, self.generations, self.world, self.device = population, generations, world, device
        self.limits = Limits(self.space, fitness.budget, fitness.k_min, fill=not fitness.weight)
        self.file = None if directory is None else directory / "checkpoint.safetensors"
        if directory is not None and importlib.util.find_spec("safetensors") is None:
            raise ImportError('checkpoints need the package safetensors: pip install "fastkd[compress]"')
        if initial is not None:
            if not isinstance(initial, Tensor) or initial.dtype != torch.bool:
                raise TypeError(
                    "initial must be a torch.bool tensor, got "
                    f"{initial.dtype if isinstance(initial, Tensor) else type(initial).__name__}"
                )
            if initial.dim() != 2 or initial.shape[1] != self.space.num_genes:
                raise ValueError(f"initial must have shape [n, {self.space.num_genes}], got {list(initial.shape)}")
            if len(initial) > population:
                raise ValueError(f"initial must have at most population = {population} individuals, got {len(initial)}")
        self.initial = None if initial is None else initial.to(device)
        own = (
            evaluator.identity()
            if isinstance(evaluator, PopulationEvaluator)
            else {"genes": self.space.num_genes, "order": _digest(self.limits.order.numpy()).hex()}
        )
        self.identity = json.loads(
            json.dumps(
                {
                    "schema": SCHEMA,
                    "algorithm": algorithm.identity(),
                    "population": population,
                    "seed": seed,
                    "initial": None if self.initial is None else _digest(packed(self.initial).numpy()).hex(),
                    "fitness": fitness.identity(),
                    "evaluator": {**own, "costs": self.limits.full},
                }
            )
        )

        self.generator = torch.Generator().manual_seed(seed)
        columns = len(fitness.columns)
        self.masks = torch.empty(0, self.space.num_genes, dtype=torch.bool, device=device)
        self.values = torch.empty(0, columns, dtype=torch.float64)  # as everything below, on the CPU
        self.known = self.values
        self.keys: dict[bytes, int] = {}  # digest of a mask, part of the images -> row of known
        self.part: int | None = None
        self.best, self.best_values = self.masks, self.values
        self.front, self.front_values = self.masks, self.values
        self.full_cost = 1.0
        self.reference: list[float] | None = (
            None if fitness.reference is None else [-fitness.reference[0], fitness.reference[1]]
        )
        self.generation, self.seconds = 0, 0.0
        self.history: list[dict[str, Any]] = []

    # --- generations -------------------------------------------------------------------------------

    def run(self, callbacks: Sequence[Callback], progress: bool) -> Result:
        self.world.same(
            "configuration",
            {**self.identity, "generations": self.generations, "writes checkpoints": self.file is not None},
        )
        found = None if self.file is None else self.world.first(self._found)
        if found is not None:
            self._restore(*found)
        else:
            self.full_cost = self.world.first(lambda: self.fitness.full_cost(self.limits))
        if self.file is not None and self.world.rank == 0:
            lines = [json.dumps(record) + "\n" for record in self.history]
            files.replace(self.file.parent / "history.jsonl", lambda part: part.write_text("".join(lines)))
        with (
            _bar(progress and self.world.rank == 0, self.algorithm.name, self.generations, self.generation) as bar,
            stop_requests(self.file is not None) as stop,
        ):
            while self.generation < self.generations:
                begin = time.perf_counter()
                self._step()
                self.generation += 1
                self._record(time.perf_counter() - begin)
                self._save()
                result = self.result()
                bar(result)
                for callback in callbacks:
                    callback(result)
                if self.world.any(stop.is_set()):
                    raise Stopped(f"stopped after generation {self.generation}; the same command goes on from there")
        if self.fitness.rotate is not None:
            self._finish()
        return self.result()

    def _step(self) -> None:
        """The next population, and its values."""
        scores, device = self._scores(self.values), self.device
        if len(self.masks):
            there = Scores(scores.score.to(device), scores.objectives.to(device))
            children = self.algorithm.ask(self.limits, self.masks, there, self.generator)
        else:
            children = self.algorithm.initial(
                self.limits, self.population, scores.objectives.shape[1], self.generator, device
            )
            if self.initial is not None:
                children[: len(self.initial)] = self.initial
        children = self.limits.repair(children)
        values = self._measured(children) if self.fitness.rotate is None else self._rotated(children)
        masks, values = torch.cat((self.masks, children)), torch.cat((self.values, values))
        scores = self._scores(values)
        stay = self.algorithm.tell(self.masks, children, Scores(scores.score.to(device), scores.objectives.to(device)))
        self._remember(children, values[len(self.values) :])
        self.masks, self.values = masks[stay], values[stay.cpu()]

    def _rotated(self, children: Tensor) -> Tensor:
        """The children's values on the next images, and those of all that they are compared with."""
        self.part = self.fitness.part(self.generation + 1)
        parents = self.masks if type(self.algorithm).tell is not Algorithm.tell else self.masks[:0]  # else all go
        groups = children, self.best, self.front, parents
        measured = self._measured(torch.cat(groups))
        values, self.best_values, self.front_values, own = measured.split([len(group) for group in groups])
        if len(own):
            self.values = own
            self._remember(parents, own)  # one of them may be the best on these
        return values

    def _finish(self) -> None:
        """All images decide among those who came through the parts of them."""
        self.part = None
        masks = torch.cat((self.masks, self.best, self.front))
        values = self._measured(masks)
        self.values = values[: len(self.masks)]
        self.best, self.best_values = self.front, self.front_values = masks[:0], values[:0]
        self._remember(masks, values)

    def _scores(self, values: Tensor) -> Scores:
        return self.fitness.scores(values, self.full_cost)

    def _measured(self, masks: Tensor) -> Tensor:
        """float64 [P, columns]; what is not known yet is shared among ranks."""
        rows = packed(masks).numpy()
        images = (
            b""
            if self.fitness.rotate is None
            else (-1 if self.part is None else self.part).to_bytes(8, "little", signed=True)
        )
        keys = [_digest(row) + images for row in rows]
        new = {key: p for p, key in reversed(list(enumerate(keys))) if key not in self.keys}
        # In the order of their genes, since neighbours share work.
        order = sorted(new, key=lambda key: rows[new[key]].tobytes())
        mine = self.world.range(len(order))
        values = torch.zeros(len(order), len(self.fitness.columns), dtype=torch.float64)
        if mine.start < mine.stop:
            own = masks[torch.tensor([new[key] for key in order[mine]], device=masks.device)]
            values[mine] = self.fitness.on(self.part).measure(self.evaluator, self.limits, own)
        if self.world.size > 1:  # as integers: nothing is rounded, and not even a nan is changed
            values = self.world.sum(values.view(torch.int64)).view(torch.float64)
        if not bool(values.isfinite().all()):
            row = int((~values.isfinite()).any(1).nonzero()[0])
            key = order[row]
            told = ", ".join(
                f"{name} = {value}" for name, value in zip(self.fitness.columns, values[row].tolist(), strict=True)
            )
            kept = (
                ""
                if self.file is None or self.generation == 0
                else f"; the checkpoint of generation {self.generation} is whole, and the same command goes on from "
                "there"
            )
            at = min(self.generation + 1, self.generations)
            raise FitnessError(
                f"individual {new[key]} of generation {at} (mask {key.hex()[:12]}, "
                f"{int(masks[new[key]].sum())} of {masks.shape[1]} genes) has no finite fitness: "
                f"{told}{kept}"
            )
        first = len(self.known)
        self.keys.update((key, first + k) for k, key in enumerate(order))
        self.known = torch.cat((self.known, values))
        return self.known[[self.keys[key] for key in keys]]

    def _remember(self, masks: Tensor, values: Tensor) -> None:
        """The best so far, and the front."""
        scores = self._scores(values)
        p = int(scores.score.argmax())
        if not len(self.best) or float(scores.score[p]) > float(self._scores(self.best_values).score):
            self.best, self.best_values = masks[p : p + 1].clone(), values[p : p + 1]
        if scores.objectives.shape[1] == 1:
            self.front, self.front_values = self.best, self.best_values
            return
        if self.reference is None:
            self.reference = [float(scores.objectives[:, 0].max()), max(1.0, float(scores.objectives[:, 1].max()))]
        merged = torch.cat((self.front_values, values))
        stay = pareto.nondominated(self._scores(merged).objectives)
        stay = stay[merged[stay, 1].argsort(stable=True)]
        old = len(self.front_values)
        out = torch.empty(len(stay), masks.shape[1], dtype=torch.bool, device=masks.device)
        is_old = (stay < old).to(masks.device)
        at = stay.to(masks.device)
        out[is_old], out[~is_old] = self.front[at[is_old]], masks[at[~is_old] - old]
        self.front, self.front_values = out, merged[stay]

    def _record(self, seconds: float) -> None:
        self.seconds += seconds
        scores, best = self._scores(self.values).score, self._scores(self.best_values)
        on, n = operators.occurrences(self.masks), len(self.masks)
        differ = 2 * int((on * (n - on)).sum())  # ordered pairs of individuals, times genes
        volume = None
        if self.reference is not None and self.front_values.shape[1] == 2:
            volume = pareto.hypervolume(self._scores(self.front_values).objectives, self.reference)
        self.history.append(
            {
                "generation": self.generation,
                "best": float(best.score),
                "quality": float(self.best_values[0, 0]),
                "cost": float(self.best_values[0, 1]) if self.best_values.shape[1] > 1 else None,
                "mean": math.fsum(scores.tolist()) / n,
                "diversity": differ / max(n * (n - 1) * self.masks.shape[1], 1),
                "hypervolume": volume,
                "evaluations": len(self.known),
                "seconds": self.seconds,
                "mask": packed(self.best).numpy().tobytes().hex(),
            }
        )

    def result(self) -> Result:
        def individuals(masks: Tensor, values: Tensor) -> Individuals:
            return Individuals(
                masks, self._scores(values).score, values[:, 0], values[:, 1] if values.shape[1] > 1 else None
            )

        best = individuals(self.best, self.best_values)
        return Result(
            self.best[0],
            float(best.score),
            float(best.quality),
            None if best.cost is None else float(best.cost),
            individuals(self.masks, self.values),
            individuals(self.front, self.front_values),
            Seen(
                [key.hex()[:12] for key in self.keys],
                self.known[:, 0],
                self.known[:, 1] if self.known.shape[1] > 1 else None,
            ),
            list(self.history),
            self.generation,
            self.generations,
            len(self.known),
            None if self.fitness.cost is None else self.full_cost,
        )

    # --- checkpoints -------------------------------------------------------------------------------

    def _save(self) -> None:
        if self.file is None or self.world.rank > 0:
            return
        keys = torch.frombuffer(bytearray(b"".join(self.keys)), dtype=torch.uint8).view(len(self.keys), -1)
        tensors = {
            "population": packed(self.masks),
            "population.values": self.values,
            "best": packed(self.best),
            "best.values": self.best_values,
            "front": packed(self.front),
            "front.values": self.front_values,
            "memo": keys,
            "memo.values": self.known,
            "generator": self.generator.get_state(),
        }
        state = {
            "identity": self.identity,
            "generation": self.generation,
            "history": self.history,
            "seconds": self.seconds,
            "full_cost": self.full_cost,
            "reference": self.reference,
        }
        files.save(self.file, tensors, state, self._previous)
        try:
            with open(self.file.parent / "history.jsonl", "a") as file:
                file.write(json.dumps(self.history[-1]) + "\n")
        except OSError as error:
            raise files.CheckpointError(
                f"{self.file.parent / 'history.jsonl'} could not be written ({error}); "
                f"{self.file} is whole, and the same command goes on from there"
            ) from error

    @property
    def _previous(self) -> Path:
        assert self.file is not None
        return self.file.with_name("previous.safetensors")

    def _found(self) -> tuple[dict[str, Tensor], Any] | None:
        """The last whole checkpoint, if there is any; on rank 0."""
        assert self.file is not None
        errors = []
        for path in (self.file, self._previous):
            if not path.exists():
                continue
            try:
                tensors, state = files.load(path)
            except files.CheckpointError as error:
                errors.append((path, error))
                continue
            differences = files.differences(state["identity"], self.identity)
            if differences:
                raise files.CheckpointError(
                    f"{path} belongs to another configuration: "
                    + "; ".join(differences)
                    + ". Take another directory, or the configuration of the checkpoint"
                )
            if state["generation"] > self.generations:
                raise files.CheckpointError(
                    f"{path} has {state['generation']} generations already, but generations = "
                    f"{self.generations}: take another directory, or at least as many"
                )
            for damaged, told in errors:
                aside = damaged.with_name("damaged.safetensors")
                damaged.replace(aside)  # or it would take the place of the good one
                warnings.warn(
                    f"{told} (moved to {aside}). Going on from {path}, generation {state['generation']}",
                    RuntimeWarning,
                    stacklevel=2,
                )
            return tensors, state
        if errors:
            raise errors[0][1]
        return None

    def _restore(self, tensors: dict[str, Tensor], state: Any) -> None:
        genes, device = self.space.num_genes, self.device
        generation, masks = state["generation"], unpacked(tensors["population"], genes).to(device)
        self.known = tensors["memo.values"]
        self.keys = {bytes(key.tobytes()): k for k, key in enumerate(tensors["memo"].numpy())}
        self.full_cost, self.reference = state["full_cost"], state["reference"]
        if self.algorithm.replayed:
            for _ in range(generation):
                self._step()
            if len(self.known) > len(tensors["memo.values"]) or not torch.equal(self.masks, masks):
                raise files.CheckpointError(
                    f"{self.file}: {self.algorithm.name} does not repeat what it did when this "
                    "was written, perhaps in another version"
                )
        self.masks, self.values = masks, tensors["population.values"]
        self.best, self.best_values = unpacked(tensors["best"], genes).to(device), tensors["best.values"]
        self.front, self.front_values = unpacked(tensors["front"], genes).to(device), tensors["front.values"]
        self.generator.set_state(tensors["generator"])
        self.generation, self.history, self.seconds = generation, state["history"], state["seconds"]


def mask_id(mask: Tensor) -> str:
    """The name of a mask bool [genes] in messages and in :class:`Seen`: 12 hexadecimal digits of its digest."""
    return _digest(packed(mask[None]).numpy()[0]).hex()[:12]


def _digest(array: np.ndarray) -> bytes:
    return hashlib.blake2b(array.data, digest_size=16).digest()


class TensorBoard(Curves):
    """A callback that writes every number of the history as a scalar, by generation.

    >>> fastkd.evolve.evolve(evaluator, fitness, callback=TensorBoard("runs/first/tensorboard"))

    After a resume, one made anew for the same folder goes on with the same curves. Under torchrun, give it to rank 0
    alone.

    Raises:
        ImportError: there is no tensorboard.
    """

    def __call__(self, result: Result) -> None:
        latest = result.history[-1]
        scalars = {
            name: value for name, value in latest.items() if name not in ("generation", "mask") and value is not None
        }
        self.write("evolution", result.generation, scalars)


@contextlib.contextmanager
def _bar(wanted: bool, name: str, generations: int, done: int) -> Iterator[Callback]:
    if not wanted:
        yield lambda result: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[shown]}"),
    ) as progress:
        task = progress.add_task(name, total=generations, completed=done, shown="")

        def update(result: Result) -> None:
            cost = (
                ""
                if result.best_cost is None or not result.full_cost
                else f", cost {result.best_cost / result.full_cost:.1%}"
            )
            progress.update(
                task,
                completed=result.generation,
                shown=f"best {result.best_score:.4g} (quality {result.best_quality:.4g}{cost})",
            )

        yield update
