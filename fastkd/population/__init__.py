"""Populations of masks over the channels of a convolutional network."""

from .compact import compact, export_onnx, load, save
from .evaluator import PopulationEvaluator
from .memo import Memo, Stats
from .quality import QUALITIES, Quality
from .space import KEPT, ZERO, GeneSpace, Group, Op, UnsupportedModelError, Value
from .trace import trace

__all__ = [
    "KEPT",
    "QUALITIES",
    "ZERO",
    "GeneSpace",
    "Group",
    "Memo",
    "Op",
    "PopulationEvaluator",
    "Quality",
    "Stats",
    "UnsupportedModelError",
    "Value",
    "compact",
    "export_onnx",
    "load",
    "save",
    "trace",
]
