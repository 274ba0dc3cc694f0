"""Fast, exact knowledge distillation kernels for PyTorch."""

from . import kernels, reference
from ._C import __version__
from .config import show_config
from .graph import Graph
from .lsp import LSPLoss, TeacherStructure, lsp_loss, teacher_structure

__all__ = [
    "Graph",
    "LSPLoss",
    "TeacherStructure",
    "__version__",
    "kernels",
    "lsp_loss",
    "reference",
    "show_config",
    "teacher_structure",
]
