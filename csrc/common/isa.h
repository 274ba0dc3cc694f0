// The kernels, once per instruction set they are compiled for; isa.cpp chooses at run time.
#pragma once

#include "lsp/lsp.h"

#define FASTKD_DECLARE_ISA(NAME)                          \
    namespace fastkd::cpu::NAME {                         \
    void inverse_norm(const InverseNorm&, int threads);   \
    void similarity(const Similarity&, int threads);      \
    void kernel_values(const KernelValues&, int threads); \
    void divergences(const Divergences&, int threads);    \
    void gradient(const Gradient&, int threads);          \
    }

FASTKD_DECLARE_ISA(generic)
FASTKD_DECLARE_ISA(avx2)
FASTKD_DECLARE_ISA(avx512)
