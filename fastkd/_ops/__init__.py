"""The operators: of each its schema, checks, fake and implementations. Only this package touches addresses.

An operator's real and fake implementation call the same check, so that a shape error is the same in eager
mode and under ``torch.compile``. Implementations allocate; the native core writes every element.
"""

from . import conv, graph, lsp, native, network, structs
from .conv import Masked, masked_conv2d, masked_conv2d_backward
from .graph import csr_from_coo, csr_transpose, csr_union, expand_rows
from .lsp import (
    Backward,
    Divergence,
    Metric,
    Problem,
    Reduction,
    Shape,
    backward_arguments,
    kernel_spec,
    kernel_values,
    lsp_backward,
    lsp_forward,
    problem,
)
from .native import DTYPES, acc_dtype, backends, no_second_derivative
from .network import ALWAYS, NEVER, Activation, Network, Operation, runs

__all__ = [
    "ALWAYS",
    "DTYPES",
    "NEVER",
    "Activation",
    "Backward",
    "Divergence",
    "Masked",
    "Metric",
    "Network",
    "Operation",
    "Problem",
    "Reduction",
    "Shape",
    "acc_dtype",
    "backends",
    "backward_arguments",
    "conv",
    "csr_from_coo",
    "csr_transpose",
    "csr_union",
    "expand_rows",
    "graph",
    "kernel_spec",
    "kernel_values",
    "lsp",
    "lsp_backward",
    "lsp_forward",
    "masked_conv2d",
    "masked_conv2d_backward",
    "native",
    "network",
    "no_second_derivative",
    "problem",
    "runs",
    "structs",
]
