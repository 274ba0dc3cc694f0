// The backward direction: one sparse product over the incident edges of every row, without atomics.
#include "common/blocks.h"
#include "common/parallel.h"
#include "common/vec.h"
#include "lsp/cpu/operations.h"
#include "lsp/formulas.h"

namespace fastkd::cpu::FASTKD_ISA {
namespace {

constexpr int kChunk = 8;  // registers of features that are summed at a time
constexpr int kGroup = 4;  // edges that share the loads of the row itself

// Edges of one row: their other ends and weights.
template <class A> struct Segment {
    const void* const* other;
    const A* weight;
    int n;
};

// The incident edges of the rows of a block, laid out before the arithmetic, so that what comes next is
// requested ahead across the ends of rows.
template <class A> struct Stage {
    const void* other[2 * kBlock + 2 * (kGroup + kMostAhead)];
    A weight[2 * kBlock];
};

// acc[d] = sum_e w[e] * B(self, other[e]) for `Width` registers from d on, which are requested of the
// rows that come `ahead` edges later.
template <Metric M, class T, int Width>
FASTKD_HD void sum_registers(const T* self, const Segment<acc_t<T>>* segments, int num_segments,
                             std::int64_t d, int ahead, acc_t<T>* acc) {
    using A = acc_t<T>;
    constexpr int lanes = Vec<A>::lanes;
    vec<A> sum[Width];
#pragma GCC unroll 8
    for (int k = 0; k < Width; ++k) sum[k] = vec<A>{};
    for (int s = 0; s < num_segments; ++s) {
        const auto [other, w, n] = segments[s];
        auto edges = [&, other = other, w = w](int e, auto count) {
            constexpr int group = decltype(count)::value;
            const T* b[group];
            const T* next[group];
            vec<A> weight[group];
#pragma GCC unroll 4
            for (int g = 0; g < group; ++g) {
                b[g] = static_cast<const T*>(other[e + g]) + d;
                next[g] = static_cast<const T*>(other[e + g + ahead]) + d;
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
    }
#pragma GCC unroll 8
    for (int k = 0; k < Width; ++k) store<A>(acc + d + k * lanes, sum[k]);
}

template <Metric M, class T> void sum_row(const void* self_row, const Segment<acc_t<T>>* segments,
                                          int num_segments, std::int64_t dim, int ahead, acc_t<T>* acc) {
    using A = acc_t<T>;
    constexpr int lanes = Vec<A>::lanes;
    const T* self = static_cast<const T*>(self_row);
    std::int64_t d = 0;
    auto registers = [&](auto width) {
        constexpr int count = decltype(width)::value;
        for (; d + count * lanes <= dim; d += count * lanes)
            sum_registers<M, T, count>(self, segments, num_segments, d, ahead, acc);
    };
    registers(value_tag<kChunk>{});
    registers(value_tag<4>{});
    registers(value_tag<2>{});
    registers(value_tag<1>{});
    for (; d < dim; ++d) {
        A sum = 0;
        for (int s = 0; s < num_segments; ++s)
            for (int e = 0; e < segments[s].n; ++e)
                sum = accumulate_gradient<M>(sum, segments[s].weight[e], A(widen(self[d])),
                                             A(widen(static_cast<const T*>(segments[s].other[e])[d])));
        acc[d] = sum;
    }
}

template <class I, class T> struct Product {
    using A = acc_t<T>;
    const Gradient& op;
    void (*sum)(const void*, const Segment<A>*, int, std::int64_t, int, A*);
    const std::int64_t dim = op.self.cols;
    const std::int64_t row_bytes = dim * std::int64_t(sizeof(T));
    const int ahead = int(std::clamp<std::int64_t>(kAhead / (row_bytes + 1), 1, kMostAhead));

    const I* rowptr(int list) const { return static_cast<const I*>(op.lists[list].graph.rowptr); }
    std::int64_t begin(std::int64_t i) const {
        return std::int64_t(rowptr(0)[i]) + (op.num_lists > 1 ? std::int64_t(rowptr(1)[i]) : 0);
    }
    const T* self(std::int64_t i) const { return static_cast<const T*>(op.self.data) + i * op.self.stride; }

    // Slots of the lists: of list k [from[k], to[k]).
    struct Slots {
        std::int64_t from[2], to[2];
    };

    // Lays out the edges of the rows [first, last) that stand in these slots.
    void lay_out(std::int64_t first, std::int64_t last, const Slots& slots, Stage<A>& stage,
                 Segment<A>* segments) const {
        const void** other = stage.other;
        A* weight = stage.weight;
        for (int k = 0; k < op.num_lists; ++k) {
            const Incidence& list = op.lists[k];
            const I* col = static_cast<const I*>(list.graph.col) + slots.from[k];
            const int n = int(slots.to[k] - slots.from[k]);
            segments[k] = {other, weight, n};
            const T* rows = static_cast<const T*>(list.other.data);
            for (int x = 0; x < n; ++x) other[x] = rows + col[x] * list.other.stride;
            // Beyond the end something is requested that is there already.
            std::fill_n(other + n, kGroup + kMostAhead, self(first));
            for (int x = 0; x < ahead; ++x) prefetch(other[x], row_bytes);

            if (list.perm) weigh_leaving(list, slots.from[k], n, weight);
            else std::fill_n(weight, n, A(0));
            if (!list.perm || list.mirrored)
                weigh_arriving(k, first, last, slots.from[k], slots.to[k], weight);
            other += n + kGroup + kMostAhead;
            weight += n;
        }
    }

    // The weights of n slots from `from` on, of edges that leave this row (see Incidence).
    void weigh_leaving(const Incidence& list, std::int64_t from, int n, A* weight) const {
        const A* coef = static_cast<const A*>(op.coef);
        const A* grad = static_cast<const A*>(op.grad);
        const I* col = static_cast<const I*>(list.graph.col) + from;
        const I* perm = static_cast<const I*>(list.perm) + from;
        if (op.grad_per_row)
            for (int x = 0; x < n; ++x) weight[x] = coef[perm[x]] * grad[col[x]];
        else
            for (int x = 0; x < n; ++x) weight[x] = coef[perm[x]] * grad[0];
    }
    // Adds those of edges that arrive here, in the slots [from, to) of list k.
    void weigh_arriving(int k, std::int64_t first, std::int64_t last, std::int64_t from, std::int64_t to,
                        A* weight) const {
        const A* grad = static_cast<const A*>(op.grad);
        const A* direct = static_cast<const A*>(op.coef) + from;
        if (!op.grad_per_row) {  // to which row an edge belongs does not matter
            for (int x = 0; x < int(to - from); ++x) weight[x] += direct[x] * grad[0];
            return;
        }
        for (std::int64_t i = first; i < last; ++i) {
            const std::int64_t b = std::max(std::int64_t(rowptr(k)[i]), from) - from;
            const std::int64_t e = std::min(std::int64_t(rowptr(k)[i + 1]), to) - from;
            for (std::int64_t x = b; x < e; ++x) weight[x] += direct[x] * grad[i];
        }
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

    // The rows [first, last), none of them a hub; acc: room for one row's sums.
    void whole(std::int64_t first, std::int64_t last, A* acc) const {
        for (std::int64_t i = first; i < last; ++i) prefetch(self(i), row_bytes);
        Stage<A> stage;
        Segment<A> all[2], mine[2];
        Slots slots;
        for (int k = 0; k < op.num_lists; ++k) {
            slots.from[k] = rowptr(k)[first];
            slots.to[k] = rowptr(k)[last];
        }
        lay_out(first, last, slots, stage, all);
        for (std::int64_t i = first; i < last; ++i) {
            for (int k = 0; k < op.num_lists; ++k) {
                const std::int64_t offset = rowptr(k)[i] - slots.from[k];
                mine[k] = {all[k].other + offset, all[k].weight + offset,
                           int(rowptr(k)[i + 1] - rowptr(k)[i])};
            }
            A* row = sum_of(i, acc);
            sum(self(i), mine, op.num_lists, dim, ahead, row);
            finish(i, row);
        }
    }

    // The edges [b, e) of hub i, counted over the lists one after the other.
    void piece(std::int64_t i, std::int64_t b, std::int64_t e, A* acc) const {
        Stage<A> stage;
        Segment<A> segments[2];
        Slots slots;
        std::int64_t position = begin(i);
        for (int k = 0; k < op.num_lists; ++k) {
            const std::int64_t start = rowptr(k)[i], count = rowptr(k)[i + 1] - start;
            slots.from[k] = start + std::clamp(b - position, std::int64_t(0), count);
            slots.to[k] = start + std::clamp(e - position, std::int64_t(0), count);
            position += count;
        }
        lay_out(i, i + 1, slots, stage, segments);
        sum(self(i), segments, op.num_lists, dim, ahead, acc);
    }

    void run(int threads) const {
        const std::int64_t rows = op.self.rows;
        const std::int64_t blocks = num_blocks(rows, begin(rows));
        threads = threads_for(begin(rows) * dim, threads);
        const bool hubs = has_hub(*this, rows, op.max_degree);
        Scratch<A> parts(hubs ? 2 * blocks * dim : 0);
        parallel_for(blocks, threads, [&](std::int64_t block) {
            Scratch<A> acc(std::is_same_v<A, T> ? 0 : dim);
            for_rows(*this, rows, block,
                     [&](std::int64_t first, std::int64_t last) { whole(first, last, acc.data); });
            if (!hubs) return;
            for_pieces(*this, rows, block,
                       [&](std::int64_t i, std::int64_t b, std::int64_t e, std::int64_t slot) {
                           piece(i, b, e, parts.data + slot * dim);
                       });
        });
        if (!parts.data) return;
        Scratch<A> acc(dim);
        for_hubs(*this, rows, [&](std::int64_t i) {
            std::fill_n(acc.data, dim, A(0));
            for_slots(*this, i, [&](std::int64_t slot) {
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
                Product<typename decltype(index)::type, T>{op, sum_row<decltype(metric)::value, T>}.run(
                    threads);
            });
        });
    });
}

}  // namespace fastkd::cpu::FASTKD_ISA
