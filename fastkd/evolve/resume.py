"""The checkpoint of a search, and how it goes on from there."""

from __future__ import annotations

import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._text import installs
from ..population.masks import packed, unpacked
from ..runtime import checkpoint
from .search import Evaluated, Search

__all__ = ["Saved"]


class Saved:
    """The files of a search: ``checkpoint.safetensors``, the one before it, and ``history.jsonl``.

    Args:
        folder: in which they are.
        identity: of the search; a checkpoint of another one is refused.

    Raises:
        ImportError: safetensors is not installed.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        if importlib.util.find_spec("safetensors") is None:
            raise ImportError(f"checkpoints need the package safetensors: {installs('compress')}")
        self.identity = identity
        self.file, self.previous = folder / "checkpoint.safetensors", folder / "previous.safetensors"
        self.history = folder / "history.jsonl"

    def save(self, search: Search) -> None:
        """Writes where a search is, and adds its latest generation to the history.

        Raises:
            CheckpointError: the disk is full, or whatever else the system says.
        """
        keys = search.memo.keys
        tensors = {
            "population": packed(search.population.masks),
            "population.values": search.population.values,
            "best": packed(search.best.masks),
            "best.values": search.best.values,
            "front": packed(search.front.masks),
            "front.values": search.front.values,
            "memo": torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(len(keys), -1),
            "memo.values": search.memo.values,
            "generator": search.generator.get_state(),
        }
        state = {
            "identity": self.identity,
            "generation": search.generation,
            "history": search.history,
            "seconds": search.seconds,
            "full_cost": search.full_cost,
            "reference": search.reference,
        }
        checkpoint.save(self.file, tensors, state, self.previous)
        try:
            with open(self.history, "a") as file:
                file.write(json.dumps(search.history[-1]) + "\n")
        except OSError as error:
            raise checkpoint.CheckpointError(
                f"{self.history} could not be written ({error}); {self.file} is whole, and the same command goes on "
                "from there"
            ) from error

    def write_history(self, history: list[dict[str, Any]]) -> None:
        """Writes all of it anew: a process that was killed may have left more than its checkpoint knows."""
        lines = [json.dumps(record) + "\n" for record in history]
        checkpoint.replace(self.history, lambda part: part.write_text("".join(lines)))

    def find(self, generations: int) -> tuple[dict[str, Tensor], Any] | None:
        """The last whole checkpoint, if there is any.

        Raises:
            CheckpointError: none is whole, or it is of another search, or has more than so many generations.
        """
        damaged: list[tuple[Path, checkpoint.CheckpointError]] = []
        for path in (self.file, self.previous):
            if not path.exists():
                continue
            try:
                tensors, state = checkpoint.load(path)
            except checkpoint.CheckpointError as error:
                damaged.append((path, error))
                continue
            if differences := checkpoint.differences(state["identity"], self.identity):
                raise checkpoint.CheckpointError(
                    f"{path} belongs to another configuration: "
                    + "; ".join(differences)
                    + ". Take another directory, or the configuration of the checkpoint"
                )
            if state["generation"] > generations:
                raise checkpoint.CheckpointError(
                    f"{path} has {state['generation']} generations already, but generations = "
                    f"{generations}: take another directory, or at least as many"
                )
            for bad, why in damaged:
                aside = bad.with_name("damaged.safetensors")
                bad.replace(aside)  # or it would take the place of the good one
                warnings.warn(
                    f"{why} (moved to {aside}). Going on from {path}, generation {state['generation']}",
                    RuntimeWarning,
                    stacklevel=2,
                )
            return tensors, state
        if damaged:
            raise damaged[0][1]
        return None

    def restore(self, search: Search, tensors: dict[str, Tensor], state: Any) -> None:
        """Puts a new search where `find` found one.

        Raises:
            CheckpointError: an algorithm that is replayed does something else than it did.
        """
        problem = search.problem
        device, genes = problem.device, problem.space.num_genes

        def evaluated(name: str) -> Evaluated:
            return Evaluated(unpacked(tensors[name], genes).to(device), tensors[f"{name}.values"])

        values = tensors["memo.values"]
        search.memo.restore((row.tobytes() for row in tensors["memo"].numpy()), values)
        search.full_cost, search.reference = state["full_cost"], state["reference"]
        population = evaluated("population")
        if problem.algorithm.replayed:
            for _ in range(state["generation"]):
                search.step()
            if len(search.memo) > len(values) or not torch.equal(search.population.masks, population.masks):
                raise checkpoint.CheckpointError(
                    f"{self.file}: {problem.algorithm.name} does not repeat what it did when this was written, perhaps "
                    "in another version"
                )
        search.population, search.best, search.front = population, evaluated("best"), evaluated("front")
        search.generator.set_state(tensors["generator"])
        search.generation, search.history, search.seconds = state["generation"], state["history"], state["seconds"]
        search.asked = search.generation
