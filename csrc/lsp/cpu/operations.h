// The operations of lsp.h on the CPU, compiled once per instruction set.
#pragma once

#include "common/isa.h"
#include "lsp/lsp.h"

#define FASTKD_LSP_OPERATIONS(X)                                           \
    X(inverse_norm, (const InverseNorm& op, int threads), (op, threads))   \
    X(similarity, (const Similarity& op, int threads), (op, threads))      \
    X(kernel_values, (const KernelValues& op, int threads), (op, threads)) \
    X(divergences, (const Divergences& op, int threads), (op, threads))    \
    X(gradient, (const Gradient& op, int threads), (op, threads))

namespace fastkd::cpu {
FASTKD_DECLARE_ISAS(FASTKD_LSP_OPERATIONS)
}
