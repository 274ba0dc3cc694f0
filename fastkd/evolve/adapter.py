"""Algorithms of pymoo, through their ask and tell."""

from __future__ import annotations

import copy
import hashlib
import pickle
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .algorithms import Algorithm, Scores
from .limits import Limits

__all__ = ["Pymoo"]


class Pymoo(Algorithm):
    """An algorithm of pymoo, over binary variables.

    >>> from pymoo.algorithms.moo.nsga2 import NSGA2
    >>> from pymoo.operators.sampling.rnd import BinaryRandomSampling
    >>> from pymoo.operators.crossover.ux import UX
    >>> from pymoo.operators.mutation.bitflip import BitflipMutation
    >>> nsga2 = NSGA2(pop_size=32, sampling=BinaryRandomSampling(), crossover=UX(), mutation=BitflipMutation())
    >>> algorithm = Pymoo(nsga2)

    It is given as ``evolve(evaluator, fitness, algorithm, population=32)``.

    It minimises the objectives of :class:`fastkd.evolve.Scores`; one for a problem of a single objective: then the
    score. The population's size is pymoo's own. Its state is not in checkpoints: a resumed run asks and tells
    anew from the beginning, and finds all that was evaluated.

    Args:
        algorithm: not set up yet; its seed comes from the run's.
        objectives: "many", or "score".

    Raises:
        ImportError: there is no pymoo.
    """

    name: ClassVar[str] = "pymoo"
    replayed: ClassVar[bool] = True

    def __init__(self, algorithm: Any, objectives: str = "many") -> None:
        try:
            import pymoo.core.algorithm
        except ImportError as error:
            raise ImportError(f"fastkd.evolve.Pymoo needs the package pymoo: pip install pymoo ({error})") from None
        if not isinstance(algorithm, pymoo.core.algorithm.Algorithm):
            raise TypeError(f"algorithm must be a pymoo Algorithm, got {type(algorithm).__name__}")
        if algorithm.is_initialized or algorithm.problem is not None:
            raise ValueError("algorithm must be a new one, but this one has been set up for a problem already")
        if objectives not in ("many", "score"):
            raise ValueError(f"objectives must be 'many' or 'score', got {objectives!r}")
        self.algorithm, self.objectives = algorithm, objectives
        self._running: Any = None  # a copy, so that one of these can be used for several runs
        self._asked: Any = None

    def identity(self) -> dict[str, Any]:
        kind = type(self.algorithm)
        try:
            options = hashlib.sha256(pickle.dumps(self.algorithm)).hexdigest()[:16]
        except Exception:  # what it is made of cannot be pickled, and is not compared
            options = ""
        return {
            "name": self.name,
            "algorithm": f"{kind.__module__}.{kind.__qualname__}",
            "options": options,
            "objectives": self.objectives,
        }

    def initial(
        self, limits: Limits, population: int, objectives: int, generator: torch.Generator, device: torch.device
    ) -> Tensor:
        from pymoo.core.problem import Problem
        from pymoo.core.termination import NoTermination

        n_obj = objectives if self.objectives == "many" else 1
        problem = Problem(n_var=limits.space.num_genes, n_obj=n_obj, xl=0, xu=1, vtype=bool)
        seed = int(torch.randint(2**31, (), generator=generator))
        self._running = copy.deepcopy(self.algorithm)
        self._running.setup(problem, termination=NoTermination(), seed=seed, verbose=False)
        return self._ask(device)

    def ask(self, limits: Limits, masks: Tensor, scores: Scores, generator: torch.Generator) -> Tensor:
        return self._ask(masks.device)

    def _ask(self, device: torch.device) -> Tensor:
        self._asked = self._running.ask()
        return torch.from_numpy(np.asarray(self._asked.get("X")) > 0.5).to(device)

    def tell(self, masks: Tensor, children: Tensor, scores: Scores) -> Tensor:
        minimised = scores.objectives if self.objectives == "many" else -scores.score[:, None]
        asked, old, total = self._asked, len(masks), len(scores.score)
        asked.set("X", children.cpu().numpy())  # as repaired
        asked.set("row", np.arange(old, total))
        values = minimised[old:].cpu().numpy()
        for individual, f in zip(asked, values, strict=True):
            individual.F, individual.evaluated = f, {"F", "G", "H"}
            individual.G, individual.H = np.zeros(0), np.zeros(0)
        self._running.evaluator.n_eval += len(asked)
        self._running.tell(infills=asked)
        rows = self._running.pop.get("row")
        if any(row is None for row in rows):  # it keeps no population
            return torch.arange(old, total, device=children.device)
        self._running.pop.set("row", np.arange(len(rows)))
        return torch.tensor([int(row) for row in rows], device=children.device)
