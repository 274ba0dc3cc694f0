"""Populations of masks over the channels of a convolutional network."""

from .compact import compact, export_onnx, load, save
from .evaluator import PopulationEvaluator
from .space import KEPT, ZERO, GeneSpace, Group, Op, Value
from .trace import UnsupportedModelError, trace

__all__ = [
    "KEPT",
    "ZERO",
    "GeneSpace",
    "Group",
    "Op",
    "PopulationEvaluator",
    "UnsupportedModelError",
    "Value",
    "compact",
    "export_onnx",
    "load",
    "save",
    "trace",
]
