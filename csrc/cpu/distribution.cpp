// Kernel values, softmax over rows, divergence and the coefficient of every edge.
//
// Everything elementwise runs over the edges of a whole block at once, in loops that vectorise;
// only sums and maxima look at single rows.
#include <limits>
#include <utility>

#include "../dispatch.h"
#include "isa.h"
#include "parallel.h"

namespace fastkd::cpu::FASTKD_ISA {
namespace {

constexpr std::int64_t kEdges = 2 * kBlock;  // most edges of the whole rows of one block

// out[x] = SIM(r[x]); slope[x] = dSIM/dr.
template <class A> void apply_kernel(const Kernel& kernel, const A* r, std::int64_t n, A* out) {
    const A scale = A(kernel.scale), param = A(kernel.param);
    const int degree = kernel.degree;
    dispatch(kernel, [&](auto shape, auto root) {
#pragma omp simd
        for (std::int64_t x = 0; x < n; ++x)
            out[x] = kernel_value<decltype(shape)::value, decltype(root)::value>(r[x], scale, param, degree);
    });
}
template <class A> void apply_slope(const Kernel& kernel, const A* r, std::int64_t n, A* slope) {
    const A scale = A(kernel.scale), param = A(kernel.param);
    const int degree = kernel.degree;
    dispatch(kernel, [&](auto shape, auto root) {
#pragma omp simd
        for (std::int64_t x = 0; x < n; ++x)
            slope[x] = kernel_slope<decltype(shape)::value, decltype(root)::value>(r[x], scale, param, degree);
    });
}

template <class A> void add_log_weight(const A* weight, std::int64_t n, A* a) {
#pragma omp simd
    for (std::int64_t x = 0; x < n; ++x) a[x] += log_weight(weight[x]);
}

template <class A> struct Extent {
    A low = std::numeric_limits<A>::infinity(), high = -std::numeric_limits<A>::infinity();
    void add(const A* a, std::int64_t n) {
        A lo = low, hi = high;
#pragma omp simd reduction(min : lo) reduction(max : hi)
        for (std::int64_t x = 0; x < n; ++x) {
            lo = a[x] < lo ? a[x] : lo;
            hi = a[x] > hi ? a[x] : hi;
        }
        low = lo;
        high = hi;
    }
    bool informative() const {
        const A size = std::max(high < 0 ? -high : high, low < 0 ? -low : low);
        // A softmax sees absolute differences.
        return high - low > 8 * std::numeric_limits<A>::epsilon() * std::max(size, A(1));
    }
};

template <class A> A row_max(const A* a, std::int64_t n) {
    A m = -std::numeric_limits<A>::infinity();
#pragma omp simd reduction(max : m)
    for (std::int64_t x = 0; x < n; ++x) m = a[x] > m ? a[x] : m;
    return m;
}
template <class A> A row_sum(const A* a, std::int64_t n) {
    A s = 0;
#pragma omp simd reduction(+ : s)
    for (std::int64_t x = 0; x < n; ++x) s += a[x];
    return s;
}

// What one piece of a hub contributes: a maximum and a sum relative to it for student and teacher.
template <class A> struct Part {
    A max[2], sum[2];
    Extent<A> extent[2];
};

template <class I, class A> struct Rows {
    const Divergences& op;
    const I* rowptr = static_cast<const I*>(op.graph.rowptr);
    const I* col = static_cast<const I*>(op.graph.col);
    const I* reverse = static_cast<const I*>(op.reverse);
    A* r_s = static_cast<A*>(op.r_s);
    A* r_t = static_cast<A*>(op.r_t);
    const A* weight = static_cast<const A*>(op.weight);
    RowStats<A>* stats = static_cast<RowStats<A>*>(op.stats);

    std::int64_t begin(std::int64_t i) const { return rowptr[i]; }

    void set(std::int64_t i, int side, A max, A log_sum) const {
        (side ? stats[i].max_t : stats[i].max_s) = max;
        (side ? stats[i].log_sum_t : stats[i].log_sum_s) = log_sum;
    }

    void fill(std::int64_t i, std::int64_t b, std::int64_t e) const {
        for (std::int64_t x = e; x-- > b && col[x] > i;) {
            r_s[x] = r_s[reverse[x]];
            if (!op.teacher_is_values) r_t[x] = r_t[reverse[x]];
        }
    }

    // Kernel values of the slots [b, b + n), without weights.
    void values(std::int64_t b, std::int64_t n, A* a_s, A* a_t) const {
        apply_kernel(op.student, r_s + b, n, a_s);
        if (op.teacher_is_values) std::copy(r_t + b, r_t + b + n, a_t);
        else apply_kernel(op.teacher, r_t + b, n, a_t);
    }
    void weights(std::int64_t b, std::int64_t n, A* a_s, A* a_t) const {
        if (!weight) return;
        add_log_weight(weight + b, n, a_s);
        add_log_weight(weight + b, n, a_t);
    }

    void count(const Extent<A> (&extent)[2]) const {
        std::int64_t* d = op.diagnostics;
        __atomic_fetch_add(&d[0], 1, __ATOMIC_RELAXED);
        for (int side = 0; side < 2; ++side)
            if (extent[side].informative()) __atomic_fetch_add(&d[1 + side], 1, __ATOMIC_RELAXED);
    }

    // The divergence terms of slots whose a holds log-probabilities.
    void terms(const A* log_ps, const A* log_pt, std::int64_t n, A* out) const {
        if (op.divergence == Divergence::student_teacher) {
#pragma omp simd
            for (std::int64_t x = 0; x < n; ++x) out[x] = divergence_term(log_ps[x], log_pt[x]);
        } else {
#pragma omp simd
            for (std::int64_t x = 0; x < n; ++x) out[x] = divergence_term(log_pt[x], log_ps[x]);
        }
    }

    // p_s (log p_s - log p_t): what RowStats::mean sums.
    void log_ratios(const A* log_ps, const A* log_pt, std::int64_t n, A* out) const {
#pragma omp simd
        for (std::int64_t x = 0; x < n; ++x) out[x] = exp_(log_ps[x]) * (log_ps[x] - log_pt[x]);
    }

    void whole(std::int64_t first, std::int64_t last) const {
        alignas(64) A a[2][kEdges], t[kEdges], high[kBlock], sum[kBlock];
        const std::int64_t b0 = begin(first), n = begin(last) - b0, rows = last - first;
        if (reverse)
            for (std::int64_t i = first; i < last; ++i) fill(i, begin(i), begin(i + 1));
        values(b0, n, a[0], a[1]);
        std::int64_t rows_seen = 0, informative[2] = {0, 0};
        for (std::int64_t i = first; i < last; ++i) {
            const std::int64_t b = begin(i) - b0, deg = begin(i + 1) - begin(i);
            if (deg < 2) continue;
            ++rows_seen;
            for (int side = 0; side < 2; ++side) {
                Extent<A> extent;
                extent.add(a[side] + b, deg);
                informative[side] += extent.informative();
            }
        }
        __atomic_fetch_add(&op.diagnostics[0], rows_seen, __ATOMIC_RELAXED);
        __atomic_fetch_add(&op.diagnostics[1], informative[0], __ATOMIC_RELAXED);
        __atomic_fetch_add(&op.diagnostics[2], informative[1], __ATOMIC_RELAXED);
        weights(b0, n, a[0], a[1]);
        for (int side = 0; side < 2; ++side) {
            A* v = a[side];
            for (std::int64_t i = first; i < last; ++i) {
                const std::int64_t b = begin(i) - b0, deg = begin(i + 1) - begin(i);
                const A m = row_max(v + b, deg);
                for (std::int64_t x = b; x < b + deg; ++x) v[x] -= m;
                high[i - first] = m;
            }
#pragma omp simd
            for (std::int64_t x = 0; x < n; ++x) t[x] = exp_(v[x]);
            for (std::int64_t i = first; i < last; ++i)
                sum[i - first] = row_sum(t + (begin(i) - b0), begin(i + 1) - begin(i));
#pragma omp simd
            for (std::int64_t k = 0; k < rows; ++k) sum[k] = log_(sum[k]);
            for (std::int64_t i = first; i < last; ++i) {
                const std::int64_t b = begin(i) - b0, deg = begin(i + 1) - begin(i);
                const A log_sum = sum[i - first];
                for (std::int64_t x = b; x < b + deg; ++x) v[x] -= log_sum;
                set(i, side, deg ? high[i - first] : A(0), deg ? log_sum : A(0));
            }
        }
        terms(a[0], a[1], n, t);
        for (std::int64_t i = first; i < last; ++i)
            stats[i].divergence = row_sum(t + (begin(i) - b0), begin(i + 1) - begin(i));
        log_ratios(a[0], a[1], n, t);
        for (std::int64_t i = first; i < last; ++i)
            stats[i].mean = row_sum(t + (begin(i) - b0), begin(i + 1) - begin(i));
    }

    Part<A> part(std::int64_t i, std::int64_t b, std::int64_t e) const {
        alignas(64) A a[2][kBlock];
        const std::int64_t n = e - b;
        if (reverse) fill(i, b, e);
        values(b, n, a[0], a[1]);
        Part<A> out;
        for (int side = 0; side < 2; ++side) out.extent[side].add(a[side], n);
        weights(b, n, a[0], a[1]);
        for (int side = 0; side < 2; ++side) {
            A* v = a[side];
            const A m = row_max(v, n);
#pragma omp simd
            for (std::int64_t x = 0; x < n; ++x) v[x] = exp_(v[x] - m);
            out.max[side] = m;
            out.sum[side] = row_sum(v, n);
        }
        return out;
    }

    // Divergence and mean of a part.
    std::pair<A, A> part_sums(std::int64_t i, std::int64_t b, std::int64_t e) const {
        alignas(64) A a[2][kBlock], t[kBlock];
        const std::int64_t n = e - b;
        values(b, n, a[0], a[1]);
        weights(b, n, a[0], a[1]);
        const RowStats<A> row = stats[i];
        for (std::int64_t x = 0; x < n; ++x) {
            a[0][x] = row.log_ps(a[0][x]);
            a[1][x] = row.log_pt(a[1][x]);
        }
        terms(a[0], a[1], n, t);
        const A divergence = row_sum(t, n);
        log_ratios(a[0], a[1], n, t);
        return {divergence, row_sum(t, n)};
    }

    void hubs(int threads) const {
        auto start = [this](std::int64_t i) { return begin(i); };
        const std::int64_t rows = op.graph.rows, blocks = num_blocks(rows, op.graph.edges);
        auto skip = [](std::int64_t, std::int64_t) {};
        Scratch<Part<A>> parts(2 * blocks);
        Scratch<std::pair<A, A>> sums(2 * blocks);
        parallel_for(blocks, threads, [&](std::int64_t block) {
            for_rows(start, rows, block, skip, [&](std::int64_t i, std::int64_t b, std::int64_t e, std::int64_t slot) {
                parts[slot] = part(i, b, e);
            });
        });
        for_hubs(start, rows, [&](std::int64_t i) {
            Extent<A> extent[2];
            for (int side = 0; side < 2; ++side) {
                A m = -std::numeric_limits<A>::infinity();
                double sum = 0;
                for_slots(start, i, [&](std::int64_t slot) {
                    m = std::max(m, parts[slot].max[side]);
                    extent[side].low = std::min(extent[side].low, parts[slot].extent[side].low);
                    extent[side].high = std::max(extent[side].high, parts[slot].extent[side].high);
                });
                for_slots(start, i, [&](std::int64_t slot) {
                    sum += double(parts[slot].sum[side]) * double(exp_(parts[slot].max[side] - m));
                });
                set(i, side, m, A(log_(sum)));
            }
            count(extent);
        });
        parallel_for(blocks, threads, [&](std::int64_t block) {
            for_rows(start, rows, block, skip, [&](std::int64_t i, std::int64_t b, std::int64_t e, std::int64_t slot) {
                sums[slot] = part_sums(i, b, e);
            });
        });
        for_hubs(start, rows, [&](std::int64_t i) {
            double divergence = 0, mean = 0;
            for_slots(start, i, [&](std::int64_t slot) {
                divergence += sums[slot].first;
                mean += sums[slot].second;
            });
            stats[i].divergence = A(divergence);
            stats[i].mean = A(mean);
        });
    }

    // What the sum over rows is multiplied with.
    double norm(int threads) const {
        if (op.reduction == Reduction::none || op.reduction == Reduction::sum) return 1;
        if (op.reduction == Reduction::mean) return op.graph.rows ? 1.0 / double(op.graph.rows) : 0;
        std::int64_t rows_left = 0, edges_left = 0;
        parallel_for(num_blocks(op.graph.rows, 0), threads, [&](std::int64_t block) {
            std::int64_t rows = 0, edges = 0;
            const std::int64_t last = std::min((block + 1) * kBlock, op.graph.rows);
            for (std::int64_t i = block * kBlock; i < last; ++i) {
                std::int64_t deg = 0;
                if (weight)
                    for (std::int64_t x = begin(i); x < begin(i + 1); ++x) deg += weight[x] > 0;
                else deg = begin(i + 1) - begin(i);
                edges += deg;
                rows += deg > 0;
            }
            __atomic_fetch_add(&rows_left, rows, __ATOMIC_RELAXED);
            __atomic_fetch_add(&edges_left, edges, __ATOMIC_RELAXED);
        });
        const std::int64_t count = op.reduction == Reduction::mean_active ? rows_left : edges_left;
        return count ? 1.0 / double(count) : 0;
    }

    void reduce(double scale, int threads) const {
        const std::int64_t rows = op.graph.rows, blocks = num_blocks(rows, 0);
        A* loss = static_cast<A*>(op.loss);
        Scratch<double> sums(blocks);
        parallel_for(blocks, threads, [&](std::int64_t block) {
            double sum = 0;
            const std::int64_t last = std::min((block + 1) * kBlock, rows);
            for (std::int64_t i = block * kBlock; i < last; ++i) {
                if (op.reduction == Reduction::none) loss[i] = stats[i].divergence;
                sum += stats[i].divergence;
            }
            sums[block] = sum;
        });
        if (op.reduction == Reduction::none) return;
        double sum = 0;
        for (std::int64_t block = 0; block < blocks; ++block) sum += sums[block];
        *loss = A(sum * scale);
    }

    void coefficients(double scale, std::int64_t block) const {
        constexpr int kStats = 5;
        alignas(64) A a_s[kBlock], a_t[kBlock], factors[kBlock], gradient[kBlock];
        alignas(64) A here[kStats][kBlock], there[kStats][kBlock];
        const A* src_norm = static_cast<const A*>(op.src_inv_norm);
        const A* dst_norm = static_cast<const A*>(op.dst_inv_norm);
        const A factor = A(metric_factor(op.student.metric) * scale);
        std::int64_t first = -1, n = 0;
        auto start = [this](std::int64_t i) { return begin(i); };
        auto put = [&](A (&to)[kStats][kBlock], const RowStats<A>& row) {
            to[0][n] = row.max_s;
            to[1][n] = row.log_sum_s;
            to[2][n] = row.max_t;
            to[3][n] = row.log_sum_t;
            to[4][n] = row.mean;
        };
        for_edges(start, op.graph.rows, block, [&](std::int64_t i, std::int64_t b, std::int64_t e) {
            if (first < 0) first = b;
            const RowStats<A> row = stats[i];
            for (std::int64_t x = b; x < e; ++x, ++n) {
                put(here, row);
                factors[n] = src_norm ? factor * (dst_norm[i] * src_norm[col[x]]) : factor;
                if (op.fold) put(there, stats[col[x]]);
            }
        });
        if (n == 0) return;
        values(first, n, a_s, a_t);
        weights(first, n, a_s, a_t);
        auto add = [&](const A (&s)[kStats][kBlock], auto&& write) {
            auto loop = [&](auto teacher_student) {
#pragma omp simd
                for (std::int64_t x = 0; x < n; ++x) {
                    const RowStats<A> row{s[0][x], s[1][x], s[2][x], s[3][x], s[4][x], 0};
                    write(x, edge_gradient(decltype(teacher_student)::value, a_s[x], a_t[x], row));
                }
            };
            if (op.divergence == Divergence::teacher_student) loop(value_tag<true>{});
            else loop(value_tag<false>{});
        };
        add(here, [&](std::int64_t x, A g) { gradient[x] = g; });
        if (op.fold) add(there, [&](std::int64_t x, A g) { gradient[x] += g; });
        A* out = r_s + first;
        A* slope = a_t;
        apply_slope(op.student, out, n, slope);
#pragma omp simd
        for (std::int64_t x = 0; x < n; ++x) out[x] = gradient[x] * slope[x] * factors[x];
    }

    void run(int threads) const {
        const std::int64_t rows = op.graph.rows, blocks = num_blocks(rows, op.graph.edges);
        auto start = [this](std::int64_t i) { return begin(i); };
        for (int k = 0; k < 3; ++k) op.diagnostics[k] = 0;
        parallel_for(blocks, threads, [&](std::int64_t block) {
            for_rows(start, rows, block, [&](std::int64_t first, std::int64_t last) { whole(first, last); },
                     [](std::int64_t, std::int64_t, std::int64_t, std::int64_t) {});
        });
        if (has_hub(start, rows)) hubs(threads);
        const double scale = norm(threads);
        reduce(scale, threads);
        if (op.want_coef)
            parallel_for(blocks, threads, [&](std::int64_t block) { coefficients(scale, block); });
    }
};

}  // namespace

void divergences(const Divergences& op, int threads) {
    dispatch_index(op.graph.wide, [&](auto index) {
        dispatch_acc(op.acc, [&](auto acc) {
            Rows<typename decltype(index)::type, typename decltype(acc)::type>{op}.run(threads);
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
                for_edges(begin, op.graph.rows, block, [&](std::int64_t i, std::int64_t b, std::int64_t e) {
                    for (std::int64_t x = b; x < e; ++x)
                        values[x] = reverse && col[x] > i ? r[reverse[x]] : r[x];
                    apply_kernel(op.kernel, values + b, e - b, values + b);
                });
            });
        });
    });
}

}  // namespace fastkd::cpu::FASTKD_ISA
