"""The record of a run of distillation. It needs neither networks nor data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, ClassVar

from pydantic import BeforeValidator, Field, model_validator

from ..lab.record import LOOKS, Json, Part, Record, Scores, columns

__all__ = ["Cost", "DistillRecord", "Look", "Network", "ShapePicture", "is_lsp"]


class Look(Part):
    """At the validation part, during training."""

    epoch: int
    loss: float
    """The weighted sum that is minimised."""
    val: float
    terms: dict[str, float] = Field(default_factory=dict)
    """What is summed, without weights; ``task`` is that of the labels."""


class Cost(Part):
    """Of a forward pass over one batch of the test part (:func:`fastkd.runtime.measure.cost`); None: not measured."""

    mmacs: float | None = None
    latency_ms: float | None = None
    peak_memory_mb: float | None = None
    threads: int | None = None


class Network(Scores):
    """What a trained network reached and what it costs."""

    epochs: int
    seconds: float
    parameters: int
    peak_memory_mb: float | None = None
    """Of training."""
    history: Annotated[list[Look], LOOKS]
    cost: Cost | None = None


class ShapePicture(Part):
    """Distances of features on one shape of the test part to those of one of its points (1: the farthest)."""

    points: list[list[float]]
    at: int
    teacher: list[float]
    student: list[float]
    teacher_layer: str = ""
    student_layer: str = ""

    @model_validator(mode="after")
    def _one_shape(self) -> ShapePicture:
        n = len(self.points)
        for distances in (self.teacher, self.student):
            if len(distances) != n:
                raise ValueError(f"a picture of {n} points and {len(distances)} distances")
        if not 0 <= self.at < n or any(len(point) != 3 for point in self.points):
            raise ValueError("a picture that is no 3-D cloud with one of its points")
        return self


class DistillRecord(Record):
    """A student, and the teacher that it learned from."""

    KIND: ClassVar[str | None] = None

    student: Network
    teacher: Network
    picture: Annotated[ShapePicture | None, BeforeValidator(lambda picture: picture or None)] = None

    @property
    def losses(self) -> dict[str, Json]:
        """Those that count."""
        return {name: loss for name, loss in self.config["losses"].items() if loss["weight"] > 0}

    @property
    def of_teacher(self) -> str:
        """What makes the teachers of two records the same network."""
        return json.dumps([self.config["teacher"], self.config.get("teacher_seed")], sort_keys=True)

    @property
    def group(self) -> tuple[str, str]:
        return self.config["data"], self.of_teacher

    @property
    def label(self) -> str:
        return " + ".join(self.losses) or "student alone"

    @property
    def title(self) -> str:
        models = (self.config[role]["model"]["name"] for role in ("teacher", "student"))
        return f"{self.config['data']}, {' to '.join(models)}"

    @property
    def plain(self) -> bool:
        """A student that learns from labels only."""
        return not self.losses

    @property
    def lsp(self) -> bool:
        return any(is_lsp(name) for name in self.losses)

    @property
    def network(self) -> Network:
        return self.student

    def shortened(self, beside: Sequence[Record] = ()) -> Json:
        """The student's history as columns without seconds and learning rates; of the teacher's, nothing is drawn. One
        picture of a row is, that of its first seed."""
        out = self.content()
        history = columns(out["student"]["history"], ("epoch", "loss", "val", "terms"))
        out |= {"student": {**out["student"], "history": history}, "teacher": {**out["teacher"], "history": []}}
        if any(other.seed < self.seed and getattr(other, "picture", None) for other in beside):
            out.pop("picture", None)
        return out


def is_lsp(loss: str) -> bool:
    return loss == "lsp" or loss.startswith("lsp_")
