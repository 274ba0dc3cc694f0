"""The search as a function: from its arguments to its result, with a checkpoint after each generation."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .._checks import integer
from ..population import GeneSpace, PopulationEvaluator
from ..runtime.stopping import Stopped, stop_requests
from ..runtime.world import RankLost, World, usable
from .algorithms import Algorithm
from .callbacks import progress_bar
from .fitness import Fitness, MaskFunction
from .limits import Limits
from .problem import Problem, problem_of
from .result import Callback, Result
from .resume import Saved
from .search import Search

__all__ = ["evolve"]


def evolve(
    evaluator: PopulationEvaluator | GeneSpace,
    fitness: Fitness | MaskFunction,
    algorithm: str | Algorithm = "ecs",
    population: int = 32,
    generations: int = 50,
    seed: int = 0,
    *,
    budget: Mapping[str, float] | None = None,
    k_min: int | None = None,
    limits: Limits | None = None,
    initial: Tensor | None = None,
    checkpoint: str | Path | None = None,
    callback: Callback | Sequence[Callback] = (),
    progress: bool = False,
    world: World | None = None,
    device: torch.device | str = "cpu",
) -> Result:
    """Searches for the masks of the largest fitness.

    >>> import fastkd, torch
    >>> from fastkd.evolve import Fitness, evolve
    >>> model = torch.nn.Sequential(
    ...     torch.nn.Conv2d(1, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(128, 3)
    ... ).eval()
    >>> images, labels = torch.randn(20, 1, 6, 6), torch.randint(3, (20,))
    >>> evaluator = fastkd.PopulationEvaluator(model, images[:1])
    >>> fitness = Fitness("accuracy", [(images, labels)])
    >>> result = evolve(evaluator, fitness, population=8, generations=5, budget={"macs": 0.4})
    >>> len(result.history), result.best.shape
    (5, torch.Size([8]))
    >>> small = fastkd.compact(model, result.best, evaluator.space)

    Args:
        evaluator: of the network; its :class:`GeneSpace` will do where the quality is a callable.
        fitness: a :class:`Fitness`; a callable masks bool [P, genes] -> [P] stands for Fitness(callable).
        algorithm: "ecs" (as published, arXiv:1707.08005), "ga", "nsga2", "random"; "ga-widths", "nsga2-widths",
            "random-widths", which breed how many filters every group keeps (:class:`GA`); or one with options, such as
            ECS(selection="tournament"); or :class:`Pymoo`.
        population: individuals of a generation.
        generations: the initial population is the first one: population * generations individuals are asked for.
        seed: of all that is random.
        budget: cost -> fraction of the full network's that is allowed, such as {"macs": 0.4}. Every mask is repaired
            to hold it, see :class:`fastkd.evolve.Limits`.
        k_min: filters that every group keeps, in any case; default 1.
        limits: in place of both, the :class:`fastkd.evolve.Limits` of the evaluator's space that others use too.
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
        TypeError, ValueError: arguments that are not as above; a budget that no mask can meet, or that is stated twice.
        FitnessError: a fitness that is not finite. The checkpoint of the generation before is whole.
        CheckpointError: the directory holds a run of another configuration (the message lists the
            differences) or no whole checkpoint, another process is at work there, or the disk is full.
        Stopped: Ctrl-C or SIGTERM came, with a checkpoint; the generation was finished, and it was written.
        RankLost: another of several ranks has ended.
    """
    world, folder = world or World(), None if checkpoint is None else Path(checkpoint)
    integer("generations", generations, 1)
    problem = problem_of(
        evaluator, fitness, algorithm, population, seed, budget, k_min, limits, initial, usable(device)
    )
    saved = None if folder is None else Saved(folder, problem.identity())
    callbacks = (callback,) if callable(callback) else tuple(callback)
    try:
        with world.alone(folder):
            return _run(problem, generations, saved, callbacks, progress, world)
    except RankLost as error:
        if saved is None or not saved.file.exists():
            raise RankLost(f"{error}; no checkpoint had been written yet: start anew") from None
        raise RankLost(
            f"{error}; the checkpoint {saved.file} is whole: the same command goes on from there, with any number of "
            "processes"
        ) from None


def _run(
    problem: Problem,
    generations: int,
    saved: Saved | None,
    callbacks: Sequence[Callable[[Result], object]],
    progress: bool,
    world: World,
) -> Result:
    world.same(
        "configuration", {**problem.identity(), "generations": generations, "writes checkpoints": saved is not None}
    )
    search = Search(problem, world, saved is not None)
    found = None if saved is None else world.first(lambda: saved.find(generations))
    if saved is not None and found is not None:
        saved.restore(search, *found)
    else:
        search.full_cost = world.first(lambda: problem.fitness.full_cost(problem.limits))
    writes = saved is not None and world.rank == 0
    if saved is not None and writes:
        saved.write_history(search.history)
    shown = progress and world.rank == 0
    with (
        progress_bar(shown, problem.algorithm.name, generations, search.generation) as bar,
        stop_requests(saved is not None) as stop,
    ):
        while search.generation < generations:
            begin = time.perf_counter()
            search.step()
            search.record(time.perf_counter() - begin)
            if saved is not None and writes:
                saved.save(search)
            result = search.result(generations)
            for function in (bar, *callbacks):
                function(result)
            if world.any(stop.is_set()):
                raise Stopped(f"stopped after generation {search.generation}; the same command goes on from there")
    if problem.fitness.rotate is not None:
        search.finish()
    return search.result(generations)
