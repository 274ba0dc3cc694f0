// The raw reduction r of every edge: the only pass over the features in the forward direction.
#include "../dispatch.h"
#include "isa.h"
#include "parallel.h"
#include "vec.h"

namespace fastkd::cpu::FASTKD_ISA {
namespace {

constexpr int kStage = 256;         // edges whose row addresses are laid out before the arithmetic
constexpr int kGroup = 4;           // edges reduced together, for independent chains of additions
constexpr std::int64_t kAhead = 4096;  // bytes of rows requested ahead of use

// out[e] = r of the rows a[e], b[e] [D], e < n.
template <Metric M, class T>
void reduce_pairs(const void* const* a, const void* const* b, int n, std::int64_t dim, acc_t<T>* out) {
    using A = acc_t<T>;
    constexpr int lanes = Vec<A>::lanes;
    const std::int64_t bytes = dim * std::int64_t(sizeof(T));
    const int ahead = int(std::clamp<std::int64_t>(kAhead / (bytes + 1), 1, 16) + kGroup - 1) / kGroup * kGroup;
    for (int e = 0; e < std::min(ahead, n); ++e) prefetch(b[e], bytes);
    int e = 0;
    for (; e + kGroup <= n; e += kGroup) {
        for (int k = e + ahead; k < std::min(e + ahead + kGroup, n); ++k) prefetch(b[k], bytes);
        const T* pa[kGroup];
        const T* pb[kGroup];
        vec<A> sum[kGroup];
        for (int k = 0; k < kGroup; ++k) {
            pa[k] = static_cast<const T*>(a[e + k]);
            pb[k] = static_cast<const T*>(b[e + k]);
            sum[k] = vec<A>{};
        }
        std::int64_t d = 0;
        for (; d + lanes <= dim; d += lanes)
#pragma GCC unroll 4
            for (int k = 0; k < kGroup; ++k) sum[k] = accumulate<M>(sum[k], load(pa[k] + d), load(pb[k] + d));
        reduce_add4<A>(sum, out + e);
        for (; d < dim; ++d)
            for (int k = 0; k < kGroup; ++k)
                out[e + k] = accumulate<M>(out[e + k], A(widen(pa[k][d])), A(widen(pb[k][d])));
    }
    for (; e < n; ++e) {
        const T* pa = static_cast<const T*>(a[e]);
        const T* pb = static_cast<const T*>(b[e]);
        vec<A> sum{};
        std::int64_t d = 0;
        for (; d + lanes <= dim; d += lanes) sum = accumulate<M>(sum, load(pa + d), load(pb + d));
        A total = reduce_add<A>(sum);
        for (; d < dim; ++d) total = accumulate<M>(total, A(widen(pa[d])), A(widen(pb[d])));
        out[e] = total;
    }
}

const char* row_address(const Features& x, std::int64_t i, std::int64_t size) {
    return static_cast<const char*>(x.data) + i * x.stride * size;
}

template <class I, class T> void run(const Similarity& op, int threads) {
    using A = acc_t<T>;
    const I* rowptr = static_cast<const I*>(op.graph.rowptr);
    const I* col = static_cast<const I*>(op.graph.col);
    const I* reverse = static_cast<const I*>(op.reverse);
    const A* src_norm = static_cast<const A*>(op.src_inv_norm);
    const A* dst_norm = static_cast<const A*>(op.dst_inv_norm);
    A* r = static_cast<A*>(op.r);
    void (*reduce)(const void* const*, const void* const*, int, std::int64_t, A*) = nullptr;
    dispatch(op.metric, [&](auto m) { reduce = reduce_pairs<decltype(m)::value, T>; });
    auto begin = [=](std::int64_t i) { return std::int64_t(rowptr[i]); };
    threads = threads_for(op.graph.edges * op.src.cols, threads);
    parallel_for(num_blocks(op.graph.rows, op.graph.edges), threads, [&](std::int64_t block) {
        const void* a[kStage];
        const void* b[kStage];
        std::int64_t row[kStage], slot[kStage];
        A out[kStage];
        int n = 0;
        auto flush = [&] {
            reduce(a, b, n, op.src.cols, out);
            if (op.metric == Metric::cosine)
                for (int k = 0; k < n; ++k) out[k] *= dst_norm[row[k]] * src_norm[col[slot[k]]];
            for (int k = 0; k < n; ++k) r[slot[k]] = out[k];
            if (reverse)
                for (int k = 0; k < n; ++k) r[reverse[slot[k]]] = out[k];
            n = 0;
        };
        for_edges(begin, op.graph.rows, block, [&](std::int64_t i, std::int64_t first, std::int64_t last) {
            const char* self = row_address(op.dst, i, sizeof(T));
            for (std::int64_t e = first; e < last; ++e) {
                if (reverse && col[e] > i) break;  // ascending in col
                a[n] = self;
                b[n] = row_address(op.src, col[e], sizeof(T));
                row[n] = i;
                slot[n] = e;
                if (++n == kStage) flush();
            }
        });
        flush();
    });
}

}  // namespace

void similarity(const Similarity& op, int threads) {
    dispatch_index(op.graph.wide, [&](auto index) {
        dispatch(op.src.dtype, [&](auto dtype) {
            run<typename decltype(index)::type, typename decltype(dtype)::type>(op, threads);
        });
    });
}

void inverse_norm(const InverseNorm& op, int threads) {
    dispatch(op.x.dtype, [&](auto dtype) {
        using T = typename decltype(dtype)::type;
        using A = acc_t<T>;
        A* out = static_cast<A*>(op.inv_norm);
        const std::int64_t rows = op.x.rows;
        threads = threads_for(rows * op.x.cols, threads);
        parallel_for((rows + kStage - 1) / kStage, threads, [&](std::int64_t block) {
            const void* a[kStage];
            const std::int64_t first = block * kStage;
            const int n = int(std::min<std::int64_t>(kStage, rows - first));
            for (int k = 0; k < n; ++k) a[k] = row_address(op.x, first + k, sizeof(T));
            reduce_pairs<Metric::dot, T>(a, a, n, op.x.cols, out + first);
            for (int k = 0; k < n; ++k) {
                A& v = out[first + k];
                v = v > 0 ? 1 / sqrt_(v) : A(0);
            }
        });
    });
}

}  // namespace fastkd::cpu::FASTKD_ISA
