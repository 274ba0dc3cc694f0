// The raw reduction r of every edge: the only pass over the features in the forward direction.
#include "common/blocks.h"
#include "common/parallel.h"
#include "common/vec.h"
#include "lsp/cpu/operations.h"
#include "lsp/formulas.h"

namespace fastkd::cpu::FASTKD_ISA {
namespace {

constexpr int kGroup = 4;  // pairs reduced together, for independent chains of additions

// Pairs of rows, laid out before the arithmetic, so that rows can be requested ahead of their use.
struct Stage {
    const void* a[kBlock + kGroup];
    const void* b[kBlock + kGroup + kMostAhead];
};

// Pairs of rows whose features are reduced together.
template <Metric M, class T> struct Group {
    using A = acc_t<T>;
    static constexpr int lanes = Vec<A>::lanes;
    static constexpr int line = 64 / int(sizeof(T));  // elements of a cache line
    const T* a[kGroup];
    const T* b[kGroup];
    const T* next[kGroup];  // of the group that comes `ahead` pairs later
    vec<A> sum[kGroup];

    FASTKD_HD Group(const Stage& stage, int e, int ahead) {
#pragma GCC unroll 4
        for (int k = 0; k < kGroup; ++k) {
            a[k] = static_cast<const T*>(stage.a[e + k]);
            b[k] = static_cast<const T*>(stage.b[e + k]);
            next[k] = static_cast<const T*>(stage.b[e + k + ahead]);
            sum[k] = vec<A>{};
        }
    }
    FASTKD_HD void request(std::int64_t d) const {
#pragma GCC unroll 4
        for (int k = 0; k < kGroup; ++k) __builtin_prefetch(next[k] + d);
    }
    // A cache line of features, each with a request of what comes later.
    FASTKD_HD void add_line(std::int64_t d) {
#pragma GCC unroll 4
        for (int k = 0; k < kGroup; ++k) {
            __builtin_prefetch(next[k] + d);
#pragma GCC unroll 8
            for (int c = 0; c < line; c += lanes)
                sum[k] = accumulate<M>(sum[k], load(a[k] + d + c), load(b[k] + d + c));
        }
    }
    FASTKD_HD void add_register(std::int64_t d) {
#pragma GCC unroll 4
        for (int k = 0; k < kGroup; ++k) sum[k] = accumulate<M>(sum[k], load(a[k] + d), load(b[k] + d));
    }
    // What is left of the features comes after the registers' sums.
    FASTKD_HD void finish(std::int64_t d, std::int64_t dim, A* out) const {
        reduce_add4<A>(sum, out);
        for (; d < dim; ++d)
            for (int k = 0; k < kGroup; ++k)
                out[k] = accumulate<M>(out[k], A(widen(a[k][d])), A(widen(b[k][d])));
    }
};

// out[e] = r of the pair e of the stage, e < n, rows [D]; writes up to kGroup - 1 elements beyond the last.
template <Metric M, class T> void reduce_pairs(Stage& stage, int n, std::int64_t dim, acc_t<T>* out) {
    if (!n) return;
    const std::int64_t bytes = dim * std::int64_t(sizeof(T));
    const int ahead =
        int(std::clamp<std::int64_t>(kAhead / (bytes + 1), kGroup, kMostAhead)) / kGroup * kGroup;
    std::fill_n(stage.a + n, kGroup, stage.a[n - 1]);
    std::fill_n(stage.b + n, kGroup + kMostAhead, stage.b[n - 1]);
    for (int e = 0; e < ahead; ++e) prefetch(stage.b[e], bytes);
    for (int e = 0; e < n; e += kGroup) {
        Group<M, T> group(stage, e, ahead);
        std::int64_t d = 0;
        for (; d + group.line <= dim; d += group.line) group.add_line(d);
        if (d < dim) group.request(d);
        for (; d + group.lanes <= dim; d += group.lanes) group.add_register(d);
        group.finish(d, dim, out + e);
    }
}

const char* row_address(const Features& x, std::int64_t i, std::int64_t size) {
    return static_cast<const char*>(x.data) + i * x.stride * size;
}

template <class I, class T> void run(const Similarity& op, int threads) {
    using A = acc_t<T>;
    const RowPointers<I> g{static_cast<const I*>(op.graph.rowptr)};
    const I* col = static_cast<const I*>(op.graph.col);
    const I* reverse = static_cast<const I*>(op.reverse);
    const A* src_norm = static_cast<const A*>(op.src_inv_norm);
    const A* dst_norm = static_cast<const A*>(op.dst_inv_norm);
    const bool cosine = op.metric == Metric::cosine;
    A* r = static_cast<A*>(op.r);
    void (*reduce)(Stage&, int, std::int64_t, A*) = nullptr;
    dispatch(op.metric, [&](auto m) { reduce = reduce_pairs<decltype(m)::value, T>; });
    threads = threads_for(op.graph.edges * op.src.cols, threads);
    parallel_for(num_blocks(op.graph.rows, op.graph.edges), threads, [&](std::int64_t block) {
        Stage stage;
        std::int64_t slot[kBlock];
        A out[kBlock + kGroup], scale[kBlock];
        int n = 0;
        for_edges(g, op.graph.rows, block, [&](std::int64_t i, std::int64_t b, std::int64_t e) {
            const char* self = row_address(op.dst, i, sizeof(T));
            prefetch(self, op.dst.cols * std::int64_t(sizeof(T)));
            for (std::int64_t x = b; x < e; ++x) {
                if (reverse && col[x] > i) break;  // ascending in col
                stage.a[n] = self;
                stage.b[n] = row_address(op.src, col[x], sizeof(T));
                if (cosine) scale[n] = dst_norm[i] * src_norm[col[x]];
                slot[n++] = x;
            }
        });
        reduce(stage, n, op.src.cols, out);
        if (cosine)
            for (int k = 0; k < n; ++k) out[k] *= scale[k];
        for (int k = 0; k < n; ++k) r[slot[k]] = out[k];
        if (reverse)
            for (int k = 0; k < n; ++k) r[reverse[slot[k]]] = out[k];
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
        A* inv_norm = static_cast<A*>(op.inv_norm);
        const std::int64_t rows = op.x.rows;
        threads = threads_for(rows * op.x.cols, threads);
        parallel_for(num_blocks(rows, 0), threads, [&](std::int64_t block) {
            Stage stage;
            A out[kBlock + kGroup];
            const std::int64_t first = block * kBlock, last = std::min(first + kBlock, rows);
            for (std::int64_t i = first; i < last; ++i)
                stage.a[i - first] = stage.b[i - first] = row_address(op.x, i, sizeof(T));
            reduce_pairs<Metric::dot, T>(stage, int(last - first), op.x.cols, out);
            for (std::int64_t i = first; i < last; ++i) {
                const A square = out[i - first];
                inv_norm[i] = square > 0 ? 1 / sqrt_(square) : A(0);
            }
        });
    });
}

}  // namespace fastkd::cpu::FASTKD_ISA
