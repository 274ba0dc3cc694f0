// The backward direction: one sparse product over the incident edges of every row, without atomics.
#include "../dispatch.h"
#include "isa.h"
#include "parallel.h"
#include "vec.h"

namespace fastkd::cpu::FASTKD_ISA {
namespace {

constexpr int kChunk = 8;              // registers of features that are summed at a time
constexpr int kGroup = 4;              // edges that share the loads of the row itself
constexpr int kMostAhead = 16;
constexpr std::int64_t kAhead = 8192;  // bytes of rows requested ahead of use

// The incident edges of the rows of a block, laid out before the arithmetic, so that what comes next is
// requested ahead across the ends of rows.
template <class A> struct Stage {
    const void* other[2 * kBlock + kGroup + kMostAhead];
    A weight[2 * kBlock];
};

// acc[d] = sum_e w[e] * B(self, other[e]) for `Width` registers from d on, which are requested of the
// rows that come `ahead` edges later.
template <Metric M, class T, int Width>
FASTKD_HD void sum_registers(const T* self, const void* const* other, const acc_t<T>* w, int n,
                             std::int64_t d, int ahead, acc_t<T>* acc) {
    using A = acc_t<T>;
    constexpr int lanes = Vec<A>::lanes;
    vec<A> sum[Width];
#pragma GCC unroll 8
    for (int k = 0; k < Width; ++k) sum[k] = vec<A>{};
    auto edges = [&](int e, auto count) {
        constexpr int group = decltype(count)::value;
        const T* b[group];
        const T* next[group];
        vec<A> weight[group];
#pragma GCC unroll 4
        for (int g = 0; g < group; ++g) {
            next[g] = static_cast<const T*>(other[e + g + ahead]) + d;
            b[g] = static_cast<const T*>(other[e + g]) + d;
            weight[g] = w[e + g] - vec<A>{};
        }
#pragma GCC unroll 8
        for (int k = 0; k < Width; ++k) {
            const vec<A> a = load(self + d + k * lanes);
#pragma GCC unroll 4
            for (int g = 0; g < group; ++g) {
                if (k * lanes * int(sizeof(T)) % 64 == 0) __builtin_prefetch(next[g] + k * lanes);
                sum[k] = accumulate_gradient<M>(sum[k], weight[g], a, load(b[g] + k * lanes));
            }
        }
    };
    int e = 0;
    for (; e + kGroup <= n; e += kGroup) edges(e, value_tag<kGroup>{});
    for (; e < n; ++e) edges(e, value_tag<1>{});
#pragma GCC unroll 8
    for (int k = 0; k < Width; ++k) store<A>(acc + d + k * lanes, sum[k]);
}

template <Metric M, class T>
void sum_row(const void* self_row, const void* const* other, const acc_t<T>* w, int n,
             std::int64_t dim, int ahead, acc_t<T>* acc) {
    using A = acc_t<T>;
    constexpr int lanes = Vec<A>::lanes;
    const T* self = static_cast<const T*>(self_row);
    std::int64_t d = 0;
    auto registers = [&](auto width) {
        constexpr int count = decltype(width)::value;
        for (; d + count * lanes <= dim; d += count * lanes)
            sum_registers<M, T, count>(self, other, w, n, d, ahead, acc);
    };
    registers(value_tag<kChunk>{});
    registers(value_tag<4>{});
    registers(value_tag<2>{});
    registers(value_tag<1>{});
    for (; d < dim; ++d) {
        A sum = 0;
        for (int e = 0; e < n; ++e)
            sum = accumulate_gradient<M>(sum, w[e], A(widen(self[d])),
                                         A(widen(static_cast<const T*>(other[e])[d])));
        acc[d] = sum;
    }
}

template <class I, class T> struct Product {
    using A = acc_t<T>;
    const Gradient& op;
    void (*sum)(const void*, const void* const*, const A*, int, std::int64_t, int, A*);
    const std::int64_t dim = op.self.cols;
    const std::int64_t row_bytes = dim * std::int64_t(sizeof(T));
    const int ahead = int(std::clamp<std::int64_t>(kAhead / (row_bytes + 1), 1, kMostAhead));

    const I* rowptr(int list) const { return static_cast<const I*>(op.lists[list].graph.rowptr); }
    std::int64_t begin(std::int64_t i) const {
        return std::int64_t(rowptr(0)[i]) + (op.num_lists > 1 ? std::int64_t(rowptr(1)[i]) : 0);
    }
    const T* self(std::int64_t i) const { return static_cast<const T*>(op.self.data) + i * op.self.stride; }

    // Lays out the edges [b, e) of the rows [first, last), counted over all rows and lists.
    void lay_out(std::int64_t first, std::int64_t last, std::int64_t b, std::int64_t e, Stage<A>& stage) const {
        const A* coef = static_cast<const A*>(op.coef);
        const A* grad = static_cast<const A*>(op.grad);
        const void** other = stage.other;
        A* weight = stage.weight;
        int n = 0;
        // The slots [from, to) of a list, which belong to row i.
        auto edges = [&](const Incidence& list, std::int64_t i, std::int64_t from, std::int64_t to) {
            const I* col = static_cast<const I*>(list.graph.col);
            const I* perm = static_cast<const I*>(list.perm);
            const A here = grad[op.grad_per_row ? i : 0];
            auto there = [&](std::int64_t x) { return op.grad_per_row ? grad[col[x]] : here; };
            const T* rows = static_cast<const T*>(list.other.data);
            for (std::int64_t x = from; x < to; ++x) other[n + x - from] = rows + col[x] * list.other.stride;
            for (std::int64_t x = from; x < to; ++x) {
                A w = perm ? coef[perm[x]] * there(x) : coef[x] * here;
                if (list.mirrored) w += coef[x] * here;
                weight[n + x - from] = w;
            }
            n += int(to - from);
        };
        if (op.num_lists == 1 && !op.grad_per_row) {  // what row an edge belongs to does not matter
            edges(op.lists[0], first, b, e);
        } else {
            for (std::int64_t i = first; i < last; ++i) {
                std::int64_t position = begin(i);
                for (int k = 0; k < op.num_lists; ++k) {
                    const std::int64_t start = rowptr(k)[i], count = rowptr(k)[i + 1] - start;
                    const std::int64_t from = std::max(b - position, std::int64_t(0)), to = std::min(e - position, count);
                    if (from < to) edges(op.lists[k], i, start + from, start + to);
                    position += count;
                }
            }
        }
        // Beyond the end something is requested that is there already.
        std::fill_n(other + n, kGroup + kMostAhead, self(first));
        for (int k = 0; k < ahead; ++k) prefetch(other[k], row_bytes);
    }
    // acc [D] = the sum over `count` edges of the stage from `first` on.
    void add_up(std::int64_t i, const Stage<A>& stage, std::int64_t first, std::int64_t count, A* acc) const {
        sum(self(i), stage.other + first, stage.weight + first, int(count), dim, ahead, acc);
    }

    void finish(std::int64_t i, A* acc) const {
        T* out = static_cast<T*>(op.out) + i * dim;
        if (op.metric == Metric::cosine) {
            const T* x = self(i);
            const A inv = static_cast<const A*>(op.inv_norm)[i];
            A along = 0;
            for (std::int64_t d = 0; d < dim; ++d) along += acc[d] * A(widen(x[d]));
            along *= inv * inv;
            for (std::int64_t d = 0; d < dim; ++d) acc[d] -= along * A(widen(x[d]));
        }
        if constexpr (std::is_same_v<A, T>) {
            if (acc == out) return;
        }
        for (std::int64_t d = 0; d < dim; ++d) out[d] = narrow<T>(acc[d]);
    }
    // Where row i is summed: in its place, if that holds sums.
    A* sum_of(std::int64_t i, A* scratch) const {
        if constexpr (std::is_same_v<A, T>) return static_cast<T*>(op.out) + i * dim;
        else return scratch;
    }

    void run(int threads) const {
        auto start = [this](std::int64_t i) { return begin(i); };
        const std::int64_t rows = op.self.rows;
        const std::int64_t blocks = num_blocks(rows, begin(rows));
        threads = threads_for(begin(rows) * dim, threads);
        const bool hubs = op.max_degree > kBlock || (op.max_degree < 0 && has_hub(start, rows));
        Scratch<A> parts(hubs ? 2 * blocks * dim : 0);
        parallel_for(blocks, threads, [&](std::int64_t block) {
            Scratch<A> acc(std::is_same_v<A, T> ? 0 : dim);
            for_rows(
                start, rows, block,
                [&](std::int64_t first, std::int64_t last) {
                    Stage<A> stage;
                    for (std::int64_t i = first; i < last; ++i) prefetch(self(i), row_bytes);
                    lay_out(first, last, begin(first), begin(last), stage);
                    for (std::int64_t i = first; i < last; ++i) {
                        A* row = sum_of(i, acc.data);
                        add_up(i, stage, begin(i) - begin(first), begin(i + 1) - begin(i), row);
                        finish(i, row);
                    }
                },
                [&](std::int64_t i, std::int64_t b, std::int64_t e, std::int64_t slot) {
                    Stage<A> stage;
                    lay_out(i, i + 1, b, e, stage);
                    add_up(i, stage, 0, e - b, parts.data + slot * dim);
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
                Product<typename decltype(index)::type, T>{op, sum_row<decltype(metric)::value, T>}.run(threads);
            });
        });
    });
}

}  // namespace fastkd::cpu::FASTKD_ISA
