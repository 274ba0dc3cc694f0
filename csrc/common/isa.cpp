#include "common/isa.h"

#include <cstdlib>
#include <cstring>

#include "lsp/lsp.h"
#include "network/cpu/planes_backward.h"

namespace fastkd::cpu {
namespace {

struct Table {
    const char* name;
    decltype(&generic::inverse_norm) inverse_norm;
    decltype(&generic::similarity) similarity;
    decltype(&generic::kernel_values) kernel_values;
    decltype(&generic::divergences) divergences;
    decltype(&generic::gradient) gradient;
#define FASTKD_MEMBER(NAME, ARGUMENTS) decltype(&generic::NAME) NAME;
    FASTKD_PLANE_OPS(FASTKD_MEMBER)
    FASTKD_PLANE_BACKWARD_OPS(FASTKD_MEMBER)
};

#define FASTKD_TABLE(ISA)                                                                                  \
    Table {                                                                                                \
        #ISA, ISA::inverse_norm, ISA::similarity, ISA::kernel_values, ISA::divergences, ISA::gradient,     \
            ISA::pack_weights, ISA::plane_conv, ISA::plane_pool, ISA::plane_pointwise, ISA::plane_product, \
            ISA::plane_moment, ISA::plane_load, ISA::plane_store, ISA::plane_grad_input,                   \
            ISA::plane_grad_weight, ISA::plane_sum                                                         \
    }

// The best the build and the processor have, or what FASTKD_ISA names if they have it.
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
void pack_weights(DType d, const PackWeights& op) { table().pack_weights(d, op); }
void plane_conv(DType d, const PlaneConv& op) { table().plane_conv(d, op); }
void plane_pool(DType d, const PlanePool& op) { table().plane_pool(d, op); }
void plane_pointwise(DType d, const PlanePointwise& op) { table().plane_pointwise(d, op); }
void plane_product(DType d, const PlaneProduct& op) { table().plane_product(d, op); }
void plane_moment(DType d, const PlaneMoment& op) { table().plane_moment(d, op); }
void plane_load(DType d, const PlaneTransfer& op) { table().plane_load(d, op); }
void plane_store(DType d, const PlaneTransfer& op) { table().plane_store(d, op); }
void plane_grad_input(DType d, const PlaneGradients& op) { table().plane_grad_input(d, op); }
void plane_grad_weight(DType d, const PlaneGradients& op) { table().plane_grad_weight(d, op); }
void plane_sum(DType d, const PlaneSum& op) { table().plane_sum(d, op); }

}  // namespace fastkd::cpu
