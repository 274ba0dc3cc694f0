"""Fast, exact kernels for PyTorch that make networks smaller: distillation on graphs, evolution of smaller networks.

The names below are all there is at this level; ``dir(fastkd)`` lists them. Subpackages are loaded when they are touched
for the first time, so that ``import fastkd`` costs little more than ``import torch``.

>>> import torch
>>> import fastkd
>>> graph = fastkd.Graph.from_edge_index(torch.tensor([[0, 1, 2, 0], [1, 2, 0, 2]]))
>>> student, teacher = torch.randn(3, 4, requires_grad=True), torch.randn(3, 8)
>>> fastkd.lsp_loss(student, teacher, graph).backward()
>>> student.grad.shape
torch.Size([3, 4])
"""

import importlib as _importlib
import importlib.util as _util
import pathlib as _pathlib
from typing import TYPE_CHECKING as _TYPE_CHECKING

if _util.find_spec(f"{__name__}._C") is None:
    # Otherwise Python would say that a name cannot be imported from a partially initialized module.
    _here = _pathlib.Path(__file__).resolve().parent
    raise ImportError(
        f"{_here} is fastkd's source folder, whose native core is not built: install with `pip install {_here.parent}` "
        "and start Python in another folder, or run `make setup` there and use .venv/bin/python from another folder"
        if (_here.parent / "CMakeLists.txt").is_file()
        else f"{_here} has no native core for this Python (fastkd._C): install fastkd anew with this Python's pip"
    )

from . import kernels, reference
from ._C import __version__
from .config import show_config
from .graph import Graph
from .lsp import LSPLoss, TeacherStructure, lsp_loss, teacher_structure
from .masked_conv import masked_conv2d

__all__ = [
    "Graph",
    "LSPLoss",
    "PopulationEvaluator",
    "TeacherStructure",
    "__version__",
    "compact",
    "kernels",
    "lsp_loss",
    "masked_conv2d",
    "reference",
    "show_config",
    "teacher_structure",
]

# They are not in __all__: `from fastkd import *` would load them, and fail where an extra is not installed.
_SUBPACKAGES = ("compress", "data", "distill", "evolve", "models", "population")

if _TYPE_CHECKING:
    from . import compress as compress
    from . import data as data
    from . import distill as distill
    from . import evolve as evolve
    from . import models as models
    from . import population as population
    from .population import PopulationEvaluator, compact
else:

    def __getattr__(name: str) -> object:
        if name in _SUBPACKAGES:
            return _importlib.import_module(f".{name}", __name__)
        if name in ("PopulationEvaluator", "compact"):
            value = globals()[name] = getattr(_importlib.import_module(".population", __name__), name)
            return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted((*__all__, *_SUBPACKAGES))
