#include "common/isa.h"

#include <cstdlib>
#include <cstring>

#include "common/types.h"

namespace fastkd::cpu {
namespace {

Isa choose() {
#ifdef FASTKD_X86
    const char* wanted = std::getenv("FASTKD_ISA");
    auto allowed = [&](const char* name) { return !wanted || !*wanted || !std::strcmp(wanted, name); };
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512 && allowed("avx512")) return Isa::avx512;
    if (avx2 && allowed("avx2")) return Isa::avx2;
#endif
    return Isa::generic;
}

}  // namespace

Isa best_isa() {
    static const Isa chosen = choose();
    return chosen;
}

const char* isa() {
    switch (best_isa()) {
        case Isa::avx512:
            return "avx512";
        case Isa::avx2:
            return "avx2";
        case Isa::generic:
            break;
    }
    return "generic";
}

}  // namespace fastkd::cpu
