#include "isa.h"

#include <cstdlib>
#include <cstring>

namespace fastkd::cpu {
namespace {

struct Table {
    const char* name;
    decltype(&generic::inverse_norm) inverse_norm;
    decltype(&generic::similarity) similarity;
    decltype(&generic::kernel_values) kernel_values;
    decltype(&generic::divergences) divergences;
    decltype(&generic::gradient) gradient;
};

#define FASTKD_TABLE(NAME)                                                                                  \
    Table {                                                                                                 \
        #NAME, NAME::inverse_norm, NAME::similarity, NAME::kernel_values, NAME::divergences, NAME::gradient \
    }

// The best the processor has, or what FASTKD_ISA names if the processor has it.
Table choose() {
#ifdef FASTKD_X86
    const char* asked = std::getenv("FASTKD_ISA");
    auto allowed = [&](const char* name) { return !asked || !*asked || !std::strcmp(asked, name); };
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512 && allowed("avx512")) return FASTKD_TABLE(avx512);
    if (avx2 && allowed("avx2")) return FASTKD_TABLE(avx2);
#endif
    return FASTKD_TABLE(generic);
}

const Table& table() {
    static const Table chosen = choose();
    return chosen;
}

}  // namespace

const char* isa() { return table().name; }
void inverse_norm(const InverseNorm& op, int threads) { table().inverse_norm(op, threads); }
void similarity(const Similarity& op, int threads) { table().similarity(op, threads); }
void kernel_values(const KernelValues& op, int threads) { table().kernel_values(op, threads); }
void divergences(const Divergences& op, int threads) { table().divergences(op, threads); }
void gradient(const Gradient& op, int threads) { table().gradient(op, threads); }

}  // namespace fastkd::cpu
