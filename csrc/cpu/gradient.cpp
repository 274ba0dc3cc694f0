// The backward direction: one sparse product over the incident edges of every row, without atomics.
#include "../dispatch.h"
#include "isa.h"
#include "parallel.h"
#include "vec.h"

namespace fastkd::cpu::FASTKD_ISA {
namespace {

constexpr int kStage = 256;
constexpr int kChunk = 8;              // registers of features that are summed at a time
constexpr std::int64_t kAhead = 4096;  // bytes of rows requested ahead of use

// acc[d] += sum_e w[e] * B(self, other[e]) for `Width` registers from d on. The edges of a stage are
// summed on their own first: a hub's sum would otherwise lose a digit.
template <Metric M, class T, int Width>
FASTKD_HD void sum_registers(const T* self, const void* const* other, const acc_t<T>* w, int n,
                             std::int64_t d, std::int64_t prefetch_bytes, int ahead, acc_t<T>* acc) {
    using A = acc_t<T>;
    constexpr int lanes = Vec<A>::lanes;
    vec<A> sum[Width];
#pragma GCC unroll 8
    for (int k = 0; k < Width; ++k) sum[k] = vec<A>{};
    for (int e = 0; e < n; ++e) {
        if (prefetch_bytes && e + ahead < n) prefetch(other[e + ahead], prefetch_bytes);
        const T* b = static_cast<const T*>(other[e]) + d;
        const vec<A> weight = w[e] - vec<A>{};
#pragma GCC unroll 8
        for (int k = 0; k < Width; ++k)
            sum[k] = accumulate_gradient<M>(sum[k], weight, load(self + d + k * lanes), load(b + k * lanes));
    }
#pragma GCC unroll 8
    for (int k = 0; k < Width; ++k) store<A>(acc + d + k * lanes, load(acc + d + k * lanes) + sum[k]);
}

template <Metric M, class T>
void sum_rows(const void* self_row, const void* const* other, const acc_t<T>* w, int n,
              std::int64_t dim, acc_t<T>* acc) {
    using A = acc_t<T>;
    constexpr int lanes = Vec<A>::lanes;
    const T* self = static_cast<const T*>(self_row);
    const std::int64_t bytes = dim * std::int64_t(sizeof(T));
    const int ahead = int(std::clamp<std::int64_t>(kAhead / (bytes + 1), 1, 16));
    for (int e = 0; e < std::min(ahead, n); ++e) prefetch(other[e], bytes);
    std::int64_t d = 0;
    for (; d + kChunk * lanes <= dim; d += kChunk * lanes)
        sum_registers<M, T, kChunk>(self, other, w, n, d, d == 0 ? bytes : 0, ahead, acc);
    for (; d + 2 * lanes <= dim; d += 2 * lanes)
        sum_registers<M, T, 2>(self, other, w, n, d, d == 0 ? bytes : 0, ahead, acc);
    for (; d + lanes <= dim; d += lanes)
        sum_registers<M, T, 1>(self, other, w, n, d, d == 0 ? bytes : 0, ahead, acc);
    for (; d < dim; ++d) {
        A sum = 0;
        for (int e = 0; e < n; ++e)
            sum = accumulate_gradient<M>(sum, w[e], A(widen(self[d])),
                                         A(widen(static_cast<const T*>(other[e])[d])));
        acc[d] += sum;
    }
}

template <class I, class T> struct Product {
    using A = acc_t<T>;
    const Gradient& op;
    void (*sum)(const void*, const void* const*, const A*, int, std::int64_t, A*);

    const I* rowptr(int list) const { return static_cast<const I*>(op.lists[list].graph.rowptr); }
    std::int64_t begin(std::int64_t i) const {
        return std::int64_t(rowptr(0)[i]) + (op.num_lists > 1 ? std::int64_t(rowptr(1)[i]) : 0);
    }
    const T* self(std::int64_t i) const { return static_cast<const T*>(op.self.data) + i * op.self.stride; }

    // Adds the edges [b, e) of row i, counted over both lists, to acc [D].
    void add(std::int64_t i, std::int64_t b, std::int64_t e, A* acc) const {
        const A* coef = static_cast<const A*>(op.coef);
        const A* grad = static_cast<const A*>(op.grad);
        const void* other[kStage];
        A w[kStage];
        int n = 0;
        auto flush = [&] {
            sum(self(i), other, w, n, op.self.cols, acc);
            n = 0;
        };
        std::int64_t position = begin(i);
        for (int k = 0; k < op.num_lists; ++k) {
            const Incidence& list = op.lists[k];
            const I* col = static_cast<const I*>(list.graph.col);
            const I* perm = static_cast<const I*>(list.perm);
            const std::int64_t first = rowptr(k)[i], deg = rowptr(k)[i + 1] - first;
            const std::int64_t from = std::max<std::int64_t>(b - position, 0);
            const std::int64_t to = std::min(e - position, deg);
            for (std::int64_t x = first + from; x < first + to; ++x) {
                const std::int64_t j = col[x];
                other[n] = static_cast<const T*>(list.other.data) + j * list.other.stride;
                const A here = grad[op.grad_per_row ? i : 0];
                w[n] = perm ? coef[perm[x]] * grad[op.grad_per_row ? j : 0] : coef[x] * here;
                if (list.mirrored) w[n] += coef[x] * here;
                if (++n == kStage) flush();
            }
            position += deg;
        }
        if (n) flush();
    }

    void finish(std::int64_t i, A* acc) const {
        const std::int64_t dim = op.self.cols;
        T* out = static_cast<T*>(op.out) + i * dim;
        if (op.metric == Metric::cosine) {
            const T* x = self(i);
            const A inv = static_cast<const A*>(op.inv_norm)[i];
            A along = 0;
            for (std::int64_t d = 0; d < dim; ++d) along += acc[d] * A(widen(x[d]));
            along *= inv * inv;
            for (std::int64_t d = 0; d < dim; ++d) acc[d] -= along * A(widen(x[d]));
        }
        for (std::int64_t d = 0; d < dim; ++d) out[d] = narrow<T>(acc[d]);
    }

    void run(int threads) const {
        auto start = [this](std::int64_t i) { return begin(i); };
        const std::int64_t rows = op.self.rows, dim = op.self.cols;
        const std::int64_t blocks = num_blocks(rows, begin(rows));
        threads = threads_for(begin(rows) * dim, threads);
        const bool hubs = op.max_degree > kBlock || (op.max_degree < 0 && has_hub(start, rows));
        Scratch<A> parts(hubs ? 2 * blocks * dim : 0);
        parallel_for(blocks, threads, [&](std::int64_t block) {
            Scratch<A> acc(dim);
            for_rows(
                start, rows, block,
                [&](std::int64_t first, std::int64_t last) {
                    for (std::int64_t i = first; i < last; ++i) {
                        std::fill_n(acc.data, dim, A(0));
                        add(i, begin(i), begin(i + 1), acc.data);
                        finish(i, acc.data);
                    }
                },
                [&](std::int64_t i, std::int64_t b, std::int64_t e, std::int64_t slot) {
                    std::fill_n(parts.data + slot * dim, dim, A(0));
                    add(i, b, e, parts.data + slot * dim);
                });
        });
        if (!parts.data) return;
        Scratch<A> acc(dim);
        for_hubs(start, rows, [&](std::int64_t i) {
            std::fill_n(acc.data, dim, A(0));
            for_slots(start, i, [&](std::int64_t slot) {
                for (std::int64_t d = 0; d < dim; ++d) acc[d] += parts[slot * dim + d];
            });
            finish(i, acc.data);
        });
    }
};

}  // namespace

void gradient(const Gradient& op, int threads) {
    dispatch_index(op.lists[0].graph.wide, [&](auto index) {
        dispatch(op.self.dtype, [&](auto dtype) {
            dispatch(op.metric, [&](auto metric) {
                using T = typename decltype(dtype)::type;
                Product<typename decltype(index)::type, T>{op, sum_rows<decltype(metric)::value, T>}.run(threads);
            });
        });
    });
}

}  // namespace fastkd::cpu::FASTKD_ISA
