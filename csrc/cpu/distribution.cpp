// Kernel values, softmax over rows, divergence and the coefficient of every edge, in one pass.
//
// Everything elementwise runs over the edges of all rows of a block at once, in loops that vectorise;
// only maxima and sums look at single rows.
#include <limits>

#include "../dispatch.h"
#include "isa.h"
#include "parallel.h"

namespace fastkd::cpu::FASTKD_ISA {
namespace {

constexpr std::int64_t kEdges = 2 * kBlock;  // most edges of the whole rows of one block

// Not a multiple of 4096 bytes, so that equal indices of several buffers fall into different sets of
// the cache.
template <class T> struct alignas(64) Buffer {
    T data[kEdges + 32];
    T& operator[](std::int64_t x) { return data[x]; }
    const T& operator[](std::int64_t x) const { return data[x]; }
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
// coef[x] *= dSIM/dr.
template <class A>
void apply_slope(const Kernel& kernel, const A* r, const A* value, std::int64_t n, A* coef) {
    const A scale = A(kernel.scale), param = A(kernel.param);
    const int degree = kernel.degree;
    dispatch(kernel, [&](auto shape, auto root) {
#pragma omp simd
        for (std::int64_t x = 0; x < n; ++x)
            coef[x] *= kernel_slope<decltype(shape)::value, decltype(root)::value>(r[x], value[x], scale, param, degree);
    });
}

template <class A> struct Extent {
    A low = std::numeric_limits<A>::infinity(), high = -std::numeric_limits<A>::infinity();
    void add(A a) {
        low = a < low ? a : low;
        high = a > high ? a : high;
    }
    void add(const Extent& other) {
        low = std::min(low, other.low);
        high = std::max(high, other.high);
    }
    bool informative() const {  // to a softmax, which sees absolute differences
        const A size = std::max(high < 0 ? -high : high, low < 0 ? -low : low);
        return high - low > 8 * std::numeric_limits<A>::epsilon() * std::max(size, A(1));
    }
};

// What one piece of a hub contributes for student and teacher: a maximum, and a sum relative to it.
template <class A> struct Part {
    A max[2], sum[2];
    Extent<A> extent[2];
};

// The buffers of a block, index 0 the student and 1 the teacher.
template <class A> struct Block {
    Buffer<A> r[2];       // raw reductions
    Buffer<A> value[2];   // kernel values
    Buffer<A> log_p[2];   // with weights, then less the maximum, then log-probabilities
    Buffer<A> term[2];
    Buffer<std::int32_t> row;
};

template <class I, class A> struct Rows {
    const Divergences& op;
    const double scale;  // of the sum over rows
    const I* rowptr = static_cast<const I*>(op.graph.rowptr);
    const I* col = static_cast<const I*>(op.graph.col);
    const I* reverse = static_cast<const I*>(op.reverse);
    const A* r_s = static_cast<const A*>(op.r_s);
    const A* r_t = static_cast<const A*>(op.r_t);
    const A* weight = static_cast<const A*>(op.weight);
    A* coef = static_cast<A*>(op.coef);
    A* divergence = static_cast<A*>(op.rows);
    const bool teacher_student = op.divergence == Divergence::teacher_student;

    std::int64_t begin(std::int64_t i) const { return rowptr[i]; }

    // The raw reductions of row i's edges [b, e) to the buffers from x on.
    void load(std::int64_t i, std::int64_t b, std::int64_t e, std::int64_t x, Block<A>& block) const {
        std::int64_t own = e;
        if (reverse)
            while (own > b && col[own - 1] > i) --own;
        auto copy = [&](const A* r, Buffer<A>& to, bool all) {
            const std::int64_t split = all ? e : own;
            for (std::int64_t k = b; k < split; ++k) to[x + k - b] = r[k];
            for (std::int64_t k = split; k < e; ++k) to[x + k - b] = r[reverse[k]];
        };
        copy(r_s, block.r[0], false);
        copy(r_t, block.r[1], op.teacher_is_values);
    }

    // From raw reductions to kernel values, and to those with weights in log_p.
    void evaluate(std::int64_t b, std::int64_t n, Block<A>& block) const {
        apply_kernel(op.student, block.r[0].data, n, block.value[0].data);
        if (op.teacher_is_values) std::copy_n(block.r[1].data, n, block.value[1].data);
        else apply_kernel(op.teacher, block.r[1].data, n, block.value[1].data);
        for (int side = 0; side < 2; ++side) {
            const A* v = block.value[side].data;
            A* a = block.log_p[side].data;
            if (weight) {
                const A* w = weight + b;
#pragma omp simd
                for (std::int64_t x = 0; x < n; ++x) a[x] = v[x] + log_weight(w[x]);
            } else {
                std::copy_n(v, n, a);
            }
        }
    }

    // From log-probabilities to the terms of the divergence and of the mean (see RowStats).
    void terms(std::int64_t n, Block<A>& block) const {
        const A* log_ps = block.log_p[0].data;
        const A* log_pt = block.log_p[1].data;
        A* divergence_terms = block.term[0].data;
        A* mean_terms = block.term[1].data;
        auto loop = [&](auto swapped) {
#pragma omp simd
            for (std::int64_t x = 0; x < n; ++x) {
                divergence_terms[x] = edge_divergence(decltype(swapped)::value, log_ps[x], log_pt[x]);
                mean_terms[x] = exp_(log_ps[x]) * (log_ps[x] - log_pt[x]);
            }
        };
        if (teacher_student) loop(value_tag<true>{});
        else loop(value_tag<false>{});
    }

    // The coefficients of the slots [b, b + n), given mean(x) of each one's row. The edge's own factor
    // is in term[0].
    template <class Mean> void coefficients(std::int64_t b, std::int64_t n, Block<A>& block, Mean mean) const {
        const A* log_ps = block.log_p[0].data;
        const A* log_pt = block.log_p[1].data;
        const A* factor = block.term[0].data;
        A* out = coef + b;
        auto loop = [&](auto swapped) {
#pragma omp simd
            for (std::int64_t x = 0; x < n; ++x)
                out[x] = factor[x] * edge_gradient(decltype(swapped)::value, log_ps[x], log_pt[x], mean(x));
        };
        if (teacher_student) loop(value_tag<true>{});
        else loop(value_tag<false>{});
        apply_slope(op.student, block.r[0].data, block.value[0].data, n, out);
    }
    void factors(std::int64_t i, std::int64_t b, std::int64_t e, A* out) const {
        const A factor = A(metric_factor(op.student.metric) * scale);
        const A* src_norm = static_cast<const A*>(op.src_inv_norm);
        if (!src_norm) {
            std::fill_n(out, e - b, factor);
            return;
        }
        const A here = factor * static_cast<const A*>(op.dst_inv_norm)[i];
        for (std::int64_t x = b; x < e; ++x) out[x - b] = here * src_norm[col[x]];
    }

    void count(std::int64_t rows, std::int64_t student, std::int64_t teacher) const {
        __atomic_fetch_add(&op.diagnostics[0], rows, __ATOMIC_RELAXED);
        __atomic_fetch_add(&op.diagnostics[1], student, __ATOMIC_RELAXED);
        __atomic_fetch_add(&op.diagnostics[2], teacher, __ATOMIC_RELAXED);
    }

    // The rows [first, last) of a block, none of them a hub.
    void whole(std::int64_t first, std::int64_t last) const {
        Block<A> block;
        Buffer<A> max[2], sum[2];  // per row; of the terms in the end
        const std::int64_t b0 = begin(first), n = begin(last) - b0, rows = last - first;
        for (std::int64_t i = first; i < last; ++i) {
            const std::int64_t b = begin(i), e = begin(i + 1);
            load(i, b, e, b - b0, block);
            std::fill_n(block.row.data + (b - b0), e - b, std::int32_t(i - first));
        }
        evaluate(b0, n, block);
        std::int64_t seen = 0, informative[2] = {0, 0};
        for (std::int64_t k = 0; k < rows; ++k) {
            const std::int64_t b = begin(first + k) - b0, e = begin(first + k + 1) - b0;
            Extent<A> s, t;
            for (std::int64_t x = b; x < e; ++x) {
                s.add(block.value[0][x]);
                t.add(block.value[1][x]);
            }
            seen += e - b > 1;
            informative[0] += e - b > 1 && s.informative();
            informative[1] += e - b > 1 && t.informative();
            if (weight) {
                s = t = {};
                for (std::int64_t x = b; x < e; ++x) {
                    s.add(block.log_p[0][x]);
                    t.add(block.log_p[1][x]);
                }
            }
            max[0][k] = s.high;
            max[1][k] = t.high;
        }
        count(seen, informative[0], informative[1]);

        const std::int32_t* row = block.row.data;
        for (int side = 0; side < 2; ++side) {
            A* a = block.log_p[side].data;
            A* t = block.term[side].data;
            const A* m = max[side].data;
#pragma omp simd
            for (std::int64_t x = 0; x < n; ++x) {
                a[x] -= m[row[x]];
                t[x] = exp_(a[x]);
            }
        }
        auto sum_rows = [&] {
            for (std::int64_t k = 0; k < rows; ++k) {
                A s = 0, t = 0;
                for (std::int64_t x = begin(first + k) - b0; x < begin(first + k + 1) - b0; ++x) {
                    s += block.term[0][x];
                    t += block.term[1][x];
                }
                sum[0][k] = s;
                sum[1][k] = t;
            }
        };
        sum_rows();
        for (int side = 0; side < 2; ++side) {
            A* s = sum[side].data;
            A* a = block.log_p[side].data;
#pragma omp simd
            for (std::int64_t k = 0; k < rows; ++k) s[k] = log_(s[k]);
#pragma omp simd
            for (std::int64_t x = 0; x < n; ++x) a[x] -= s[row[x]];
        }
        terms(n, block);
        sum_rows();
        std::copy_n(sum[0].data, rows, divergence + first);
        if (!coef) return;
        for (std::int64_t i = first; i < last; ++i)
            factors(i, begin(i), begin(i + 1), block.term[0].data + (begin(i) - b0));
        const A* mean = sum[1].data;
        coefficients(b0, n, block, [=](std::int64_t x) { return mean[row[x]]; });
    }

    // --- hubs: three passes over their pieces, with the parts combined in order between them ---------

    void load_piece(std::int64_t i, std::int64_t b, std::int64_t e, Block<A>& block) const {
        load(i, b, e, 0, block);
        evaluate(b, e - b, block);
    }

    Part<A> part(std::int64_t i, std::int64_t b, std::int64_t e) const {
        Block<A> block;
        load_piece(i, b, e, block);
        Part<A> out;
        for (int side = 0; side < 2; ++side) {
            Extent<A> weighted;
            for (std::int64_t x = 0; x < e - b; ++x) {
                out.extent[side].add(block.value[side][x]);
                weighted.add(block.log_p[side][x]);
            }
            const A m = weighted.high;
            A sum = 0;
#pragma omp simd reduction(+ : sum)
            for (std::int64_t x = 0; x < e - b; ++x) sum += exp_(block.log_p[side][x] - m);
            out.max[side] = m;
            out.sum[side] = sum;
        }
        return out;
    }

    RowStats<A> combine(std::int64_t i, Scratch<Part<A>>& parts) const {
        auto start = [this](std::int64_t k) { return begin(k); };
        Extent<A> extent[2];
        A max[2], log_sum[2];
        for (int side = 0; side < 2; ++side) {
            A m = -std::numeric_limits<A>::infinity();
            for_slots(start, i, [&](std::int64_t slot) {
                m = std::max(m, parts[slot].max[side]);
                extent[side].add(parts[slot].extent[side]);
            });
            double sum = 0;
            for_slots(start, i, [&](std::int64_t slot) {
                sum += double(parts[slot].sum[side]) * double(exp_(parts[slot].max[side] - m));
            });
            max[side] = m;
            log_sum[side] = A(log_(sum));
        }
        count(1, extent[0].informative(), extent[1].informative());
        return {max[0], log_sum[0], max[1], log_sum[1], 0};
    }

    void log_probabilities(std::int64_t n, const RowStats<A>& stats, Block<A>& block) const {
#pragma omp simd
        for (std::int64_t x = 0; x < n; ++x) {
            block.log_p[0].data[x] = stats.log_ps(block.log_p[0].data[x]);
            block.log_p[1].data[x] = stats.log_pt(block.log_p[1].data[x]);
        }
    }

    struct Sums {
        double divergence, mean;
    };
    Sums part_sums(std::int64_t i, std::int64_t b, std::int64_t e, const RowStats<A>& stats) const {
        Block<A> block;
        load_piece(i, b, e, block);
        log_probabilities(e - b, stats, block);
        terms(e - b, block);
        Sums out{0, 0};
        for (std::int64_t x = 0; x < e - b; ++x) {
            out.divergence += block.term[0][x];
            out.mean += block.term[1][x];
        }
        return out;
    }

    void hubs(int threads) const {
        auto start = [this](std::int64_t i) { return begin(i); };
        const std::int64_t rows = op.graph.rows, blocks = num_blocks(rows, op.graph.edges);
        Scratch<Part<A>> parts(2 * blocks);
        Scratch<Sums> sums(2 * blocks);
        Scratch<RowStats<A>> stats(2 * blocks);  // at the slot of a hub's first piece
        auto for_pieces = [&](auto piece) {
            parallel_for(blocks, threads, [&](std::int64_t block) {
                for_rows(start, rows, block, [](std::int64_t, std::int64_t) {}, piece);
            });
        };
        for_pieces([&](std::int64_t i, std::int64_t b, std::int64_t e, std::int64_t slot) {
            parts[slot] = part(i, b, e);
        });
        for_hubs(start, rows, [&](std::int64_t i) { stats[first_slot(start, i)] = combine(i, parts); });
        for_pieces([&](std::int64_t i, std::int64_t b, std::int64_t e, std::int64_t slot) {
            sums[slot] = part_sums(i, b, e, stats[first_slot(start, i)]);
        });
        for_hubs(start, rows, [&](std::int64_t i) {
            Sums total{0, 0};
            for_slots(start, i, [&](std::int64_t slot) {
                total.divergence += sums[slot].divergence;
                total.mean += sums[slot].mean;
            });
            divergence[i] = A(total.divergence);
            stats[first_slot(start, i)].mean = A(total.mean);
        });
        if (!coef) return;
        for_pieces([&](std::int64_t i, std::int64_t b, std::int64_t e, std::int64_t) {
            const RowStats<A>& row = stats[first_slot(start, i)];
            Block<A> block;
            load_piece(i, b, e, block);
            log_probabilities(e - b, row, block);
            factors(i, b, e, block.term[0].data);
            coefficients(b, e - b, block, [=](std::int64_t) { return row.mean; });
        });
    }

    void run(int threads) const {
        auto start = [this](std::int64_t i) { return begin(i); };
        const std::int64_t rows = op.graph.rows;
        for (int k = 0; k < 3; ++k) op.diagnostics[k] = 0;
        parallel_for(num_blocks(rows, op.graph.edges), threads, [&](std::int64_t block) {
            for_rows(start, rows, block, [&](std::int64_t first, std::int64_t last) { whole(first, last); },
                     [](std::int64_t, std::int64_t, std::int64_t, std::int64_t) {});
        });
        if (op.max_degree > kBlock || (op.max_degree < 0 && has_hub(start, rows))) hubs(threads);
        if (!op.loss) return;
        const std::int64_t blocks = num_blocks(rows, 0);
        Scratch<double> sums(blocks);
        parallel_for(blocks, threads, [&](std::int64_t block) {
            sums[block] = 0;
            const std::int64_t last = std::min((block + 1) * kBlock, rows);
            for (std::int64_t i = block * kBlock; i < last; ++i) sums[block] += double(divergence[i]);
        });
        double sum = 0;
        for (std::int64_t block = 0; block < blocks; ++block) sum += sums[block];
        *static_cast<A*>(op.loss) = A(sum * scale);
    }
};

// What the sum over rows is multiplied with.
template <class I, class A> double scale_of(const Divergences& op, int threads) {
    if (op.reduction == Reduction::none || op.reduction == Reduction::sum) return 1;
    if (op.reduction == Reduction::mean) return op.graph.rows ? 1.0 / double(op.graph.rows) : 0;
    const I* rowptr = static_cast<const I*>(op.graph.rowptr);
    const A* weight = static_cast<const A*>(op.weight);
    std::int64_t rows_left = 0, edges_left = 0;
    parallel_for(num_blocks(op.graph.rows, 0), threads, [&](std::int64_t block) {
        std::int64_t rows = 0, edges = 0;
        const std::int64_t last = std::min((block + 1) * kBlock, op.graph.rows);
        for (std::int64_t i = block * kBlock; i < last; ++i) {
            std::int64_t degree = rowptr[i + 1] - rowptr[i];
            if (weight) {
                degree = 0;
                for (I x = rowptr[i]; x < rowptr[i + 1]; ++x) degree += weight[x] > 0;
            }
            edges += degree;
            rows += degree > 0;
        }
        __atomic_fetch_add(&rows_left, rows, __ATOMIC_RELAXED);
        __atomic_fetch_add(&edges_left, edges, __ATOMIC_RELAXED);
    });
    const std::int64_t count = op.reduction == Reduction::mean_active ? rows_left : edges_left;
    return count ? 1.0 / double(count) : 0;
}

}  // namespace

void divergences(const Divergences& op, int threads) {
    dispatch_index(op.graph.wide, [&](auto index) {
        dispatch_acc(op.acc, [&](auto acc) {
            using I = typename decltype(index)::type;
            using A = typename decltype(acc)::type;
            Rows<I, A>{op, scale_of<I, A>(op, threads)}.run(threads);
        });
    });
}

void kernel_values(const KernelValues& op, int threads) {
    dispatch_index(op.graph.wide, [&](auto index) {
        dispatch_acc(op.acc, [&](auto acc) {
            using I = typename decltype(index)::type;
            using A = typename decltype(acc)::type;
            const I* rowptr = static_cast<const I*>(op.graph.rowptr);
            const I* col = static_cast<const I*>(op.graph.col);
            const I* reverse = static_cast<const I*>(op.reverse);
            const A* r = static_cast<const A*>(op.r);
            A* values = static_cast<A*>(op.values);
            auto begin = [=](std::int64_t i) { return std::int64_t(rowptr[i]); };
            parallel_for(num_blocks(op.graph.rows, op.graph.edges), threads, [&](std::int64_t block) {
                std::int64_t first = op.graph.edges, last = 0;
                for_edges(begin, op.graph.rows, block, [&](std::int64_t i, std::int64_t b, std::int64_t e) {
                    for (std::int64_t x = b; x < e; ++x)
                        values[x] = reverse && col[x] > i ? r[reverse[x]] : r[x];
                    first = std::min(first, b);
                    last = std::max(last, e);
                });
                if (first < last) apply_kernel(op.kernel, values + first, last - first, values + first);
            });
        });
    });
}

}  // namespace fastkd::cpu::FASTKD_ISA
