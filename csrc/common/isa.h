// Operations that are compiled once per instruction set, and the choice between them at run time.
//
// A subject lists its operations once, as X(name, (parameters), (arguments)), for two macros:
// FASTKD_DECLARE_ISAS declares them, in cpu and in a namespace per instruction set, and FASTKD_DEFINE_ISAS
// defines the functions of cpu, which call the best of the others. All goes by name, so that none can be
// missing and none can stand in the place of another.
#pragma once

namespace fastkd::cpu {

enum class Isa { generic, avx2, avx512 };

// The best that the build and the processor have, or what FASTKD_ISA names if they have it.
Isa best_isa();

}  // namespace fastkd::cpu

#define FASTKD_DECLARE(NAME, PARAMETERS, ARGUMENTS) void NAME PARAMETERS;
#define FASTKD_DECLARE_ISAS(OPERATIONS) \
    OPERATIONS(FASTKD_DECLARE)          \
    namespace generic {                 \
    OPERATIONS(FASTKD_DECLARE)          \
    }                                   \
    namespace avx2 {                    \
    OPERATIONS(FASTKD_DECLARE)          \
    }                                   \
    namespace avx512 {                  \
    OPERATIONS(FASTKD_DECLARE)          \
    }

#ifdef FASTKD_X86
#define FASTKD_BEST(NAME) \
    (best_isa() == Isa::avx512 ? avx512::NAME : best_isa() == Isa::avx2 ? avx2::NAME : generic::NAME)
#else
#define FASTKD_BEST(NAME) generic::NAME
#endif
#define FASTKD_DEFINE(NAME, PARAMETERS, ARGUMENTS)  \
    void NAME PARAMETERS {                          \
        static const auto best = FASTKD_BEST(NAME); \
        best ARGUMENTS;                             \
    }
#define FASTKD_DEFINE_ISAS(OPERATIONS) OPERATIONS(FASTKD_DEFINE)
