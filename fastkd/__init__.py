"""Fast, exact knowledge distillation kernels for PyTorch."""

from . import kernels, reference
from ._C import __version__
from .config import show_config
from .evolve import evolve
from .graph import Graph
from .lsp import LSPLoss, TeacherStructure, lsp_loss, teacher_structure
from .masked_conv import masked_conv2d
from .population import PopulationEvaluator, compact

__all__ = [
    "Graph",
    "LSPLoss",
    "PopulationEvaluator",
    "TeacherStructure",
    "__version__",
    "compact",
    "evolve",
    "kernels",
    "lsp_loss",
    "masked_conv2d",
    "reference",
    "show_config",
    "teacher_structure",
]
