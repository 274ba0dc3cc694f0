"""The record of a compression. It needs neither networks nor data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

from pydantic import AfterValidator, Field, model_validator

from ..lab.record import LOOKS, Json, Part, Record, Scores, columns, rounded

__all__ = ["BATCHES", "Columns", "CompressRecord", "Costs", "Generation", "Layer", "Search"]

BATCHES = ("1", "64")
"""Images of a forward pass that is measured."""
CONTROLS = ("l1", "torch-pruning", "random", "random-widths")
"""Algorithms that others are compared with."""


def _of_both(value: dict[str, float]) -> dict[str, float]:
    if missing := [batch for batch in BATCHES if batch not in value]:
        raise ValueError(f"no value for a batch of {missing[0]}")
    return value


PerBatch = Annotated[dict[str, float], AfterValidator(_of_both)]


class Costs(Part):
    parameters: int
    macs: int
    bytes: int
    """Of weights and statistics in a file."""
    latency_ms: PerBatch
    peak_memory_mb: PerBatch


class Full(Scores, Costs):
    """The network that is compressed."""


class Epoch(Part):
    """Of fine-tuning. It may diverge."""

    epoch: int
    loss: float | None = Field(default=None, allow_inf_nan=True)
    val: float | None = None


class Small(Scores, Costs):
    """The smaller network, after its last stage."""

    stages: dict[str, Scores]
    """masked, recalibrated, finetuned: those that there were, in this order."""
    history: Annotated[list[Epoch], LOOKS]


class Int8(Scores):
    """The smaller network in int8, in onnxruntime."""

    bytes: int
    latency_ms: PerBatch


class Layer(Part):
    """Filters that are kept or dropped together with those of no other layer."""

    name: str
    size: int
    kept: int


class Columns(Part):
    """Networks that the search looked at; test: their quality on images of the test part."""

    id: list[str] | None = None
    quality: list[float]
    cost: list[float]
    test: list[float] | None = None

    @model_validator(mode="after")
    def _equal(self) -> Columns:
        lengths = {len(column) for column in (self.id, self.quality, self.cost, self.test) if column is not None}
        if len(lengths) != 1:
            raise ValueError("columns of different lengths")
        return self


class Generation(Part):
    """A look at the search."""

    generation: int
    best: float
    mean: float
    diversity: float
    hypervolume: float | None = None
    mask: str
    """Of the best one: a bit per filter, in hexadecimal digits."""


class Search(Part):
    algorithm: str
    quality: str
    cost: str
    full_quality: float
    full_cost: float
    evaluations: int
    seconds: float
    chosen: str
    """Id of the individual that was taken."""
    mask: str
    history: Annotated[list[Generation], LOOKS]
    individuals: Columns
    front: Columns
    l1: Columns
    """Uniform L1 at several densities."""

    @property
    def share(self) -> bool:
        """Whether quality is a share, which is shown in percent."""
        return self.quality in ("accuracy", "agreement")


class CompressRecord(Record):
    """A full network, the smaller one, and the search between them."""

    KIND: ClassVar[str | None] = "compress"

    score: str
    """accuracy, or agreement with the full network."""
    dense: Full
    compact: Small
    layers: list[Layer]
    search: Search
    onnx: Json | None = None
    int8: Int8 | None = None

    @model_validator(mode="after")
    def _genes(self) -> CompressRecord:
        genes = sum(layer.size for layer in self.layers)
        for mask in (self.search.mask, *(look.mask for look in self.search.history)):
            if len(bytes.fromhex(mask)) != -(-genes // 8):
                raise ValueError(f"a mask that does not have {genes} genes")
        return self

    @property
    def group(self) -> tuple[str, str]:
        model = self.config["model"]
        return self.config["data"], f"compressed {model['name']} {model.get('args')}"

    @property
    def label(self) -> str:
        return str(self.config["algorithm"]["name"])

    @property
    def title(self) -> str:
        return f"{self.config['data']}, {self.config['model']['name']} made smaller"

    @property
    def plain(self) -> bool:
        """The plainest control."""
        return self.search.algorithm == "l1"

    @property
    def network(self) -> Small:
        return self.compact

    @property
    def untrained(self) -> Scores:
        """Of what the search found, before any training."""
        stages = self.compact.stages
        return stages.get("recalibrated") or stages["masked"]

    def of_full(self) -> CompressRecord:
        """As if nothing had come of the search: the full network in the place of the smaller one."""
        full = {**dict(self.dense), "stages": {"masked": self.dense}, "history": []}
        return self.model_copy(update={"compact": Small.model_construct(**full)})

    def left(self, cost: str) -> float:
        """What is left of parameters, macs or bytes."""
        return float(getattr(self.compact, cost) / getattr(self.dense, cost))

    def faster(self, batch: str) -> float:
        return self.dense.latency_ms[batch] / self.compact.latency_ms[batch]

    def shortened(self, beside: Sequence[Record] = ()) -> Json:
        """Histories as columns, without the full network's, which is not drawn; of the search the masks of the best
        ones alone."""
        out = self.content()
        dense, compact, search = out["dense"], out["compact"], out["search"]
        of_search = ("generation", "best", "mean", "diversity", "hypervolume", "mask")
        out["dense"] = {key: value for key, value in dense.items() if key != "history"}
        out["compact"] = {**compact, "history": columns(compact["history"], ("epoch", "loss", "val"))}
        out["search"] = {**search, "history": columns(search["history"], of_search)}
        for name in ("individuals", "front", "l1"):
            keys = ("quality", "cost", "test") if name == "front" else ("id", "density", "quality", "cost", "test")
            out["search"][name] = {key: list(map(rounded, search[name][key])) for key in keys if key in search[name]}
        return out
