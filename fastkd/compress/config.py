"""What a compression is made of."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from ..evolve import ALGORITHMS
from ..lab.arguments import Choice, Maker, arguments
from ..lab.settings import Configuration, Strict, among, refusal
from ..models.cnn import CNNS, build_cnn
from ..population.space import COSTS
from .controls import CONTROLS

__all__ = ["CompressConfig", "load_config", "recipes"]

TEXTS = {"num_classes": "classes.", "dropout": "before the linear layers of the classifier, in [0, 1]."}


@functools.cache
def _networks() -> dict[str, Maker]:
    """By name, of ``fastkd.models.CNNS``."""
    return {name: Maker(arguments(f, (), TEXTS), functools.partial(build_cnn, name)) for name, f in CNNS.items()}


@functools.cache
def _algorithms() -> dict[str, Maker]:
    """By name, of ``fastkd.evolve.ALGORITHMS``, and the controls. A control looks at no option, but takes those of all
    algorithms, so that a row of a plan can change the name alone."""
    out = {name: Maker(arguments(algorithm), algorithm) for name, algorithm in ALGORITHMS.items()}
    every = {key: argument for maker in reversed(out.values()) for key, argument in maker.keys.items()}
    return {**out, **{name: Maker(every, None) for name in CONTROLS}}


class ModelConfig(Choice):
    makers = staticmethod(_networks)
    modules = True

    name: str
    """One of ``fastkd.models.CNNS``, or ``module:function`` of your own."""


class TrainConfig(Strict):
    epochs: int = Field(default=0, ge=0)
    """Passes over the images."""
    batch_size: int = Field(default=128, ge=1)
    """Images per step."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """torch's optimizer of that name."""
    lr: float = Field(default=0.05, gt=0, le=1e20)
    """Learning rate."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Of sgd."""
    weight_decay: float = Field(default=5e-4, ge=0)
    """Of the optimizer."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """Of the learning rate, over all steps; cosine ends at 0."""
    clip_norm: float | None = Field(default=None, gt=0)
    """Largest norm of the gradient."""
    augment: bool = False
    """Random crops of images padded by an eighth, and mirror images."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of forward and backward passes in training; with bfloat16 under torch's autocast: weights, their updates, batch
    statistics and losses stay float32. For processors that multiply matrices in it."""
    channels_last: bool = False
    """Training with images and weights in that order in memory: faster or slower by processor, threads and precision,
    so measure (``python -m bench.compression --parts training``). Not for a network that views the result of a
    convolution as a matrix (``x.view``; ``x.flatten`` can)."""


class FinetuneConfig(TrainConfig):
    kd: float = Field(default=0.0, ge=0)
    """Weight of knowledge distillation from the full network, arXiv:1503.02531; the labels' weight is 1."""
    temperature: float = Field(default=4.0, gt=0)
    """Of the distillation: logits are divided by it."""


class FitnessConfig(Strict):
    quality: Literal["accuracy", "loss", "agreement", "reconstruction", "lsp"] = "accuracy"
    """One of ``fastkd.evolve.QUALITIES``."""
    images: int = Field(default=1000, ge=1)
    """Of the fitness part."""
    cost: Literal["filters", "parameters", "macs", "latency"] = "macs"
    """Latency is measured, with one image (:func:`fastkd.evolve.latency`): unlike all else, not the same twice."""
    weight: float = Field(default=0.0, ge=0)
    """Of the removed fraction of the cost, beside the quality."""
    bn: Literal["inherit", "recalibrate"] = "recalibrate"
    """Statistics of batch normalisation for every individual: the full network's, or its own."""
    calibration_images: int = Field(default=500, ge=2)
    """Of the training part, for these statistics and for those of the network that is taken."""
    calibration_batch: int = Field(default=250, ge=2)
    """Images per batch of calibration."""


class AlgorithmConfig(Choice):
    makers = staticmethod(_algorithms)

    name: str = "ecs"
    """One of ``fastkd.evolve.ALGORITHMS``, or a control of ``fastkd.compress.controls``."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Its options, which a control ignores."""
    population: int = Field(default=32, ge=1)
    """Individuals per generation."""
    generations: int = Field(default=50, ge=1)
    """The initial population is the first one."""
    start_l1: bool = False
    """A quarter of the initial population are the filters of largest l1, at as many densities."""
    start_norm: bool = False
    """A quarter are the filters of largest norm in the whole network (:func:`fastkd.evolve.global_norm`), at the budget
    with several weights of what is coupled to a filter, then below it."""


class ExportConfig(Strict):
    onnx: bool = True
    """Write an ONNX file."""
    int8: bool = True
    """Static quantisation of the ONNX file."""
    calibration_images: int = Field(default=256, ge=1)
    """Of the training part, for the ranges of int8."""


def _share(value: float) -> float:
    if not 0 < value <= 1:
        raise refusal(f"must be in (0, 1], a fraction of the full network's, got {value}")
    return value


class CompressConfig(Configuration):
    RECIPES = Path(__file__).parent / "recipes"

    data: str
    """One of ``fastkd.data.load_images``, or a path to an npz."""
    model: ModelConfig
    """The full network."""
    weights: str | None = None
    """Path of an .npz or .safetensors file, or the name of one in ``$FASTKD_DATA/weights``; None: it is trained."""
    train: TrainConfig = Field(default_factory=TrainConfig)
    """Of the full network, if no weights are given."""
    budget: dict[Annotated[str, among(COSTS)], Annotated[float, AfterValidator(_share)]] = Field(default_factory=dict)
    """Fractions of "macs", "parameters", "filters" that may be left; empty: none."""
    k_min: int = Field(default=1, ge=1)
    """Filters that every layer keeps."""
    fitness: FitnessConfig = Field(default_factory=FitnessConfig)
    """What an individual is worth."""
    algorithm: AlgorithmConfig = Field(default_factory=AlgorithmConfig)
    """The search, or a control in its place."""
    finetune: FinetuneConfig = Field(default_factory=FinetuneConfig)
    """Training of the smaller network."""
    export: ExportConfig = Field(default_factory=ExportConfig)
    """Files for other runtimes."""


load_config, recipes = CompressConfig.load, CompressConfig.recipes
