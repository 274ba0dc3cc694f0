// Kernel values, softmax over rows, divergence and the coefficient of every edge: in one pass over the blocks
// of rows, and in three over the pieces of hubs.
//
// What is elementwise runs over the edges of all rows of a block at once. What looks at single rows
// works a register at a time from buffer to buffer: it may write beyond the row's end, since the next
// row is written after it.
#include <limits>

#include "common/blocks.h"
#include "common/parallel.h"
#include "common/vec.h"
#include "lsp/cpu/operations.h"
#include "lsp/formulas.h"

namespace fastkd::cpu::FASTKD_ISA {
namespace {

constexpr std::int64_t kEdges = 2 * kBlock;  // most edges of the whole rows of one block

// Room for one register beyond the end; and not a multiple of 4096 bytes, so that equal indices of
// several buffers fall into different sets of the cache.
template <class T> struct alignas(64) Buffer {
    T data[kEdges + 32];
};

// out[x] = SIM(r[x]).
template <class A> void apply_kernel(const Kernel& kernel, const A* r, std::int64_t n, A* out) {
    const A scale = A(kernel.scale), param = A(kernel.param);
    const int degree = kernel.degree;
    dispatch(kernel, [&](auto shape, auto root) {
#pragma omp simd
        for (std::int64_t x = 0; x < n; ++x)
            out[x] = kernel_value<decltype(shape)::value, decltype(root)::value>(r[x], scale, param, degree);
    });
}
// coef[x] = gradient[x] * factor * dSIM/dr.
template <class A> void apply_slope(const Kernel& kernel, const A* r, const A* value, const A* gradient,
                                    A factor, std::int64_t n, A* coef) {
    const A scale = A(kernel.scale), param = A(kernel.param);
    const int degree = kernel.degree;
    dispatch(kernel, [&](auto shape, auto root) {
#pragma omp simd
        for (std::int64_t x = 0; x < n; ++x)
            coef[x] = gradient[x] * factor *
                      kernel_slope<decltype(shape)::value, decltype(root)::value>(r[x], value[x], scale,
                                                                                  param, degree);
    });
}

template <class A> struct Extent {
    A low = std::numeric_limits<A>::infinity(), high = -std::numeric_limits<A>::infinity();
};

// Smallest and largest of a[0 .. n); reads up to a register beyond.
template <class A> Extent<A> extent_of(const A* a, std::int64_t n) {
    const A inf = std::numeric_limits<A>::infinity();
    vec<A> high = vec<A>{} - inf, minus_low = high;
    for (std::int64_t x = 0; x < n; x += Vec<A>::lanes) {
        const vec<A> v = load(a + x);
        const vec<A> up = keep<A>(v, n - x, -inf), down = keep<A>(-v, n - x, -inf);
        high = up > high ? up : high;
        minus_low = down > minus_low ? down : minus_low;
    }
    return {-reduce_max<A>(minus_low), reduce_max<A>(high)};
}
template <class A> A sum_of(const A* a, std::int64_t n) {
    vec<A> sum{};
    for (std::int64_t x = 0; x < n; x += Vec<A>::lanes) sum += keep<A>(load(a + x), n - x, A(0));
    return reduce_add<A>(sum);
}
// f(x) for every register that holds an element of [b, e).
template <class A, class F> FASTKD_HD void for_registers(std::int64_t b, std::int64_t e, F&& f) {
    for (std::int64_t x = b; x < e; x += Vec<A>::lanes) f(x);
}

// The buffers of a block, index 0 the student and 1 the teacher.
template <class A> struct Block {
    Buffer<A> value[2];  // kernel values, without weights
    Buffer<A> sim[2];    // with weights
    Buffer<A> above[2];  // less the row's maximum
    Buffer<A> p[2];      // exp of that; then probabilities
    Buffer<A> d;
    Buffer<A> term[2];  // of the divergence and of the mean
};

// What one piece of a hub contributes for student and teacher: a maximum, and a sum relative to it.
template <class A> struct Part {
    A max[2], sum[2];
    Extent<A> extent[2];
};

template <class I, class A> struct Rows {
    const Divergences& op;
    const double scale;  // of the sum over rows
    const I* rowptr = static_cast<const I*>(op.graph.rowptr);
    const I* col = static_cast<const I*>(op.graph.col);
    const A* r_s = static_cast<const A*>(op.r_s);
    const A* r_t = static_cast<const A*>(op.r_t);
    const A* weight = static_cast<const A*>(op.weight);
    A* coef = static_cast<A*>(op.coef);
    A* divergence = static_cast<A*>(op.rows);
    const bool teacher_student = op.divergence == Divergence::teacher_student;

    std::int64_t begin(std::int64_t i) const { return rowptr[i]; }

    // Kernel values of the slots [b, b + n), and with weights.
    void evaluate(std::int64_t b, std::int64_t n, Block<A>& block) const {
        apply_kernel(op.student, r_s + b, n, block.value[0].data);
        if (op.teacher_is_values) std::copy_n(r_t + b, n, block.value[1].data);
        else apply_kernel(op.teacher, r_t + b, n, block.value[1].data);
        if (!weight) return;
        for (int side = 0; side < 2; ++side) {
            const A* v = block.value[side].data;
            const A* w = weight + b;
            A* a = block.sim[side].data;
#pragma omp simd
            for (std::int64_t x = 0; x < n; ++x) a[x] = v[x] + log_weight(w[x]);
        }
    }
    const A* sims(const Block<A>& block, int side) const {
        return weight ? block.sim[side].data : block.value[side].data;
    }

    // From probabilities and d to the terms of divergence and mean.
    void terms(std::int64_t n, Block<A>& block) const {
        const A* p_s = block.p[0].data;
        const A* p_t = block.p[1].data;
        const A* d = block.d.data;
        A* divergence_terms = block.term[0].data;
        A* mean_terms = block.term[1].data;
        auto loop = [&](auto swapped) {
#pragma omp simd
            for (std::int64_t x = 0; x < n; ++x) {
                divergence_terms[x] = edge_divergence(decltype(swapped)::value, p_s[x], p_t[x], d[x]);
                mean_terms[x] = p_s[x] * d[x];
            }
        };
        if (teacher_student) loop(value_tag<true>{});
        else loop(value_tag<false>{});
    }

    // dS/dSIM of the edges [b, e) of a row, to term[0].
    void gradients(std::int64_t b, std::int64_t e, A mean, Block<A>& block) const {
        for_registers<A>(b, e, [&](std::int64_t x) {
            const vec<A> p_s = load(block.p[0].data + x), p_t = load(block.p[1].data + x);
            const vec<A> d = load(block.d.data + x);
            store<A>(block.term[0].data + x, edge_gradient(teacher_student, p_s, p_t, d, vec<A>{} + mean));
        });
    }
    // From dS/dSIM in term[0] to coefficients; the rows [first, last) own the slots [b, b + n).
    void coefficients(std::int64_t first, std::int64_t last, std::int64_t b, std::int64_t n,
                      Block<A>& block) const {
        const A factor = A(metric_factor(op.student.metric) * scale);
        A* gradient = block.term[0].data;
        if (const A* src_norm = static_cast<const A*>(op.src_inv_norm)) {
            for (std::int64_t i = first; i < last; ++i) {
                const A here = static_cast<const A*>(op.dst_inv_norm)[i];
                const std::int64_t from = std::max(begin(i), b), to = std::min(begin(i + 1), b + n);
                for (std::int64_t x = from; x < to; ++x) gradient[x - b] *= here * src_norm[col[x]];
            }
        }
        apply_slope(op.student, r_s + b, block.value[0].data, gradient, factor, n, coef + b);
    }

    void count(std::int64_t rows, std::int64_t student, std::int64_t teacher) const {
        __atomic_fetch_add(&op.diagnostics[0], rows, __ATOMIC_RELAXED);
        __atomic_fetch_add(&op.diagnostics[1], student, __ATOMIC_RELAXED);
        __atomic_fetch_add(&op.diagnostics[2], teacher, __ATOMIC_RELAXED);
    }

    // The rows [first, last) of a block, none of them a hub.
    void whole(std::int64_t first, std::int64_t last) const {
        Block<A> block;
        Buffer<A> sum[2], ratio;  // per row
        const std::int64_t b0 = begin(first), n = begin(last) - b0, rows = last - first;
        evaluate(b0, n, block);

        std::int64_t seen = 0, differing[2] = {0, 0};
        for (std::int64_t i = first; i < last; ++i) {
            const std::int64_t b = begin(i) - b0, e = begin(i + 1) - b0;
            if (b == e) continue;
            seen += e - b > 1;
            for (int side = 0; side < 2; ++side) {
                const Extent<A> extent = extent_of(block.value[side].data + b, e - b);
                differing[side] += e - b > 1 && informative(extent.low, extent.high);
                const A* sim = sims(block, side);
                const A max = weight ? extent_of(sim + b, e - b).high : extent.high;
                A* above = block.above[side].data;
                for_registers<A>(b, e, [&](std::int64_t x) { store<A>(above + x, load(sim + x) - max); });
            }
        }
        count(seen, differing[0], differing[1]);

        for (int side = 0; side < 2; ++side) {
            const A* above = block.above[side].data;
            A* p = block.term[side].data;
#pragma omp simd
            for (std::int64_t x = 0; x < n; ++x) p[x] = exp_(above[x]);
        }
        for (std::int64_t i = first; i < last; ++i)
            for (int side = 0; side < 2; ++side)
                sum[side].data[i - first] =
                    sum_of(block.term[side].data + (begin(i) - b0), begin(i + 1) - begin(i));
#pragma omp simd
        for (std::int64_t k = 0; k < rows; ++k) ratio.data[k] = log_(sum[1].data[k] / sum[0].data[k]);
        for (std::int64_t i = first; i < last; ++i) {
            const std::int64_t b = begin(i) - b0, e = begin(i + 1) - b0;
            const A inv_s = 1 / sum[0].data[i - first], inv_t = 1 / sum[1].data[i - first];
            const A log_ratio = ratio.data[i - first];
            for_registers<A>(b, e, [&](std::int64_t x) {
                store<A>(block.p[0].data + x, load(block.term[0].data + x) * inv_s);
                store<A>(block.p[1].data + x, load(block.term[1].data + x) * inv_t);
                store<A>(block.d.data + x,
                         (load(block.above[0].data + x) - load(block.above[1].data + x)) + log_ratio);
            });
        }
        terms(n, block);
        for (std::int64_t i = first; i < last; ++i)
            divergence[i] = sum_of(block.term[0].data + (begin(i) - b0), begin(i + 1) - begin(i));
        if (!coef) return;
        for (std::int64_t i = first; i < last; ++i) {
            const std::int64_t b = begin(i) - b0, e = begin(i + 1) - b0;
            gradients(b, e, teacher_student ? A(0) : sum_of(block.term[1].data + b, e - b), block);
        }
        coefficients(first, last, b0, n, block);
    }

    // --- hubs: three passes over their pieces, with the parts combined in order between them ---------

    Part<A> part(std::int64_t b, std::int64_t e) const {
        Block<A> block;
        const std::int64_t n = e - b;
        evaluate(b, n, block);
        Part<A> out;
        for (int side = 0; side < 2; ++side) {
            const A* sim = sims(block, side);
            out.extent[side] = extent_of(block.value[side].data, n);
            const A max = extent_of(sim, n).high;
            A sum = 0;
#pragma omp simd reduction(+ : sum)
            for (std::int64_t x = 0; x < n; ++x) sum += exp_(sim[x] - max);
            out.max[side] = max;
            out.sum[side] = sum;
        }
        return out;
    }

    RowStats<A> combine(std::int64_t i, Scratch<Part<A>>& parts) const {
        Extent<A> extent[2];
        A max[2];
        double sum[2] = {0, 0};
        for (int side = 0; side < 2; ++side) {
            max[side] = -std::numeric_limits<A>::infinity();
            for_slots(*this, i, [&](std::int64_t slot) {
                const Part<A>& part = parts[slot];
                max[side] = std::max(max[side], part.max[side]);
                extent[side].low = std::min(extent[side].low, part.extent[side].low);
                extent[side].high = std::max(extent[side].high, part.extent[side].high);
            });
            for_slots(*this, i, [&](std::int64_t slot) {
                sum[side] += double(parts[slot].sum[side]) * double(exp_(parts[slot].max[side] - max[side]));
            });
        }
        count(1, informative(extent[0].low, extent[0].high), informative(extent[1].low, extent[1].high));
        return {max[0], max[1], A(1 / sum[0]), A(1 / sum[1]), A(log_(sum[1] / sum[0])), 0};
    }

    // Probabilities, d and terms of a piece.
    void piece_terms(std::int64_t b, std::int64_t e, const RowStats<A>& row, Block<A>& block) const {
        const std::int64_t n = e - b;
        evaluate(b, n, block);
        const A* sim_s = sims(block, 0);
        const A* sim_t = sims(block, 1);
#pragma omp simd
        for (std::int64_t x = 0; x < n; ++x) {
            const Probabilities<A> p(sim_s[x], sim_t[x], row);
            block.p[0].data[x] = p.s;
            block.p[1].data[x] = p.t;
            block.d.data[x] = p.d;
        }
        terms(n, block);
    }

    struct Sums {
        double divergence, mean;
    };

    void hubs(int threads) const {
        const std::int64_t rows = op.graph.rows, blocks = num_blocks(rows, op.graph.edges);
        Scratch<Part<A>> parts(2 * blocks);
        Scratch<Sums> sums(2 * blocks);
        Scratch<RowStats<A>> stats(2 * blocks);  // at the slot of a hub's first piece
        auto all_pieces = [&](auto piece) {
            parallel_for(blocks, threads,
                         [&](std::int64_t block) { fastkd::for_pieces(*this, rows, block, piece); });
        };
        all_pieces([&](std::int64_t, std::int64_t b, std::int64_t e, std::int64_t slot) {
            parts[slot] = part(b, e);
        });
        for_hubs(*this, rows, [&](std::int64_t i) { stats[first_slot(*this, i)] = combine(i, parts); });
        all_pieces([&](std::int64_t i, std::int64_t b, std::int64_t e, std::int64_t slot) {
            Block<A> block;
            piece_terms(b, e, stats[first_slot(*this, i)], block);
            sums[slot] = {double(sum_of(block.term[0].data, e - b)),
                          double(sum_of(block.term[1].data, e - b))};
        });
        for_hubs(*this, rows, [&](std::int64_t i) {
            Sums total{0, 0};
            for_slots(*this, i, [&](std::int64_t slot) {
                total.divergence += sums[slot].divergence;
                total.mean += sums[slot].mean;
            });
            divergence[i] = A(total.divergence);
            stats[first_slot(*this, i)].mean = A(total.mean);
        });
        if (!coef) return;
        all_pieces([&](std::int64_t i, std::int64_t b, std::int64_t e, std::int64_t) {
            const RowStats<A>& row = stats[first_slot(*this, i)];
            Block<A> block;
            piece_terms(b, e, row, block);
            gradients(0, e - b, row.mean, block);
            coefficients(i, i + 1, b, e - b, block);
        });
    }

    void run(int threads) const {
        const std::int64_t rows = op.graph.rows;
        threads = threads_for(32 * op.graph.edges, threads);
        for (int k = 0; k < 3; ++k) op.diagnostics[k] = 0;
        parallel_for(num_blocks(rows, op.graph.edges), threads, [&](std::int64_t block) {
            for_rows(*this, rows, block, [&](std::int64_t first, std::int64_t last) { whole(first, last); });
        });
        if (has_hub(*this, rows, op.max_degree)) hubs(threads);
        if (!op.loss) return;
        double sum = 0;
        for (std::int64_t b = 0; b < rows; b += kBlock) {
            double part = 0;
            for (std::int64_t i = b; i < std::min(b + kBlock, rows); ++i) part += double(divergence[i]);
            sum += part;
        }
        *static_cast<A*>(op.loss) = A(sum * scale);
    }
};

// What the sum over rows is multiplied with.
template <class I, class A> double scale_of(const Divergences& op) {
    if (op.reduction == Reduction::none || op.reduction == Reduction::sum) return 1;
    if (op.reduction == Reduction::mean) return op.graph.rows ? 1.0 / double(op.graph.rows) : 0;
    const I* rowptr = static_cast<const I*>(op.graph.rowptr);
    const A* weight = static_cast<const A*>(op.weight);
    std::int64_t rows = 0, edges = 0;
    for (std::int64_t i = 0; i < op.graph.rows; ++i) {
        std::int64_t degree = rowptr[i + 1] - rowptr[i];
        if (weight) {
            degree = 0;
            for (I x = rowptr[i]; x < rowptr[i + 1]; ++x) degree += weight[x] > 0;
        }
        edges += degree;
        rows += degree > 0;
    }
    const std::int64_t count = op.reduction == Reduction::mean_active ? rows : edges;
    return count ? 1.0 / double(count) : 0;
}

}  // namespace

void divergences(const Divergences& op, int threads) {
    dispatch_index(op.graph.wide, [&](auto index) {
        dispatch_acc(op.acc, [&](auto acc) {
            using I = typename decltype(index)::type;
            using A = typename decltype(acc)::type;
            Rows<I, A>{op, scale_of<I, A>(op)}.run(threads);
        });
    });
}

void kernel_values(const KernelValues& op, int threads) {
    dispatch_acc(op.acc, [&](auto acc) {
        using A = typename decltype(acc)::type;
        threads = threads_for(8 * op.edges, threads);
        parallel_for(num_blocks(0, op.edges), threads, [&](std::int64_t block) {
            const std::int64_t b = block * kBlock, n = std::min(kBlock, op.edges - b);
            apply_kernel(op.kernel, static_cast<const A*>(op.r) + b, n, static_cast<A*>(op.values) + b);
        });
    });
}

}  // namespace fastkd::cpu::FASTKD_ISA
