// Kernel values, softmax over rows, divergence and the coefficient of every edge. A warp owns a row;
// hubs are cut into pieces, a block each, whose results are combined in order.
#include <limits>

#include "launch.cuh"

namespace fastkd::cuda {
namespace {

template <class A> __device__ A value_of(const Kernel& k, A r) {
    A out = 0;
    const A scale = A(k.scale), param = A(k.param);
    switch (k.shape) {
        case Shape::linear:
            out = k.root ? kernel_value<Shape::linear, true>(r, scale, param, 1)
                         : kernel_value<Shape::linear, false>(r, scale, param, 1);
            break;
        case Shape::power:
            out = k.root ? kernel_value<Shape::power, true>(r, scale, param, k.degree)
                         : kernel_value<Shape::power, false>(r, scale, param, k.degree);
            break;
        case Shape::exponential:
            out = k.root ? kernel_value<Shape::exponential, true>(r, scale, param, 1)
                         : kernel_value<Shape::exponential, false>(r, scale, param, 1);
    }
    return out;
}
template <class A> __device__ A slope_of(const Kernel& k, A r) {
    A out = 0;
    const A scale = A(k.scale), param = A(k.param);
    switch (k.shape) {
        case Shape::linear:
            out = k.root ? kernel_slope<Shape::linear, true>(r, scale, param, 1)
                         : kernel_slope<Shape::linear, false>(r, scale, param, 1);
            break;
        case Shape::power:
            out = k.root ? kernel_slope<Shape::power, true>(r, scale, param, k.degree)
                         : kernel_slope<Shape::power, false>(r, scale, param, k.degree);
            break;
        case Shape::exponential:
            out = k.root ? kernel_slope<Shape::exponential, true>(r, scale, param, 1)
                         : kernel_slope<Shape::exponential, false>(r, scale, param, 1);
    }
    return out;
}

// Running maximum, sum of exponentials relative to it, and extent of the values without weights.
template <class A> struct Part {
    A max, sum, low, high;

    __device__ static Part empty() {
        const A inf = std::numeric_limits<A>::infinity();
        return {-inf, 0, inf, -inf};
    }
    __device__ void extend(A plain) {
        low = plain < low ? plain : low;
        high = plain > high ? plain : high;
    }
    __device__ void add(A a) {
        if (a > max) {
            sum = sum * exp_(max - a) + 1;
            max = a;
        } else {
            sum += exp_(a - max);
        }
    }
    // In an order that does not depend on timing.
    __device__ void merge(A other_max, A other_sum) {
        const A m = other_max > max ? other_max : max;
        if (m == -std::numeric_limits<A>::infinity()) return;
        sum = sum * exp_(max - m) + other_sum * exp_(other_max - m);
        max = m;
    }
    __device__ void merge_warp() {
        for (int o = 16; o > 0; o /= 2) {
            const A m = __shfl_xor_sync(kAll, max, o), s = __shfl_xor_sync(kAll, sum, o);
            const A l = __shfl_xor_sync(kAll, low, o), h = __shfl_xor_sync(kAll, high, o);
            // Both lanes of a pair must get the same bits: the lower one's part comes first in both.
            if (threadIdx.x & unsigned(o)) {
                Part first{m, s, l, h};
                first.merge(max, sum);
                max = first.max;
                sum = first.sum;
            } else {
                merge(m, s);
            }
            low = l < low ? l : low;
            high = h > high ? h : high;
        }
    }
    __device__ bool informative() const {
        const A a = high < 0 ? -high : high, b = low < 0 ? -low : low;
        const A size = a > b ? a : b;
        // A softmax sees absolute differences.
        return high - low > 8 * std::numeric_limits<A>::epsilon() * (size > 1 ? size : A(1));
    }
    // Of an empty row, 0 and 0.
    __device__ A maximum() const { return sum > 0 ? max : A(0); }
    __device__ A log_sum() const { return sum > 0 ? log_(sum) : A(0); }
};

template <class A> struct Args {
    Graph g;
    Indices reverse;
    Kernel student, teacher;
    bool teacher_student, teacher_is_values, fold;
    Reduction reduction;
    A* r_s;
    A* r_t;
    const A* weight;
    const A* src_inv_norm;
    const A* dst_inv_norm;
    RowStats<A>* stats;
    A* loss;
    unsigned long long* diagnostics;
    double* scale;  // [1], what the sum over rows is multiplied with

    struct Pair { A s, t; };

    __device__ void fill(std::int64_t i, std::int64_t x) const {
        if (!reverse || g.col[x] <= i) return;
        const std::int64_t mirror = reverse[x];
        r_s[x] = r_s[mirror];
        if (!teacher_is_values) r_t[x] = r_t[mirror];
    }
    __device__ Pair plain(std::int64_t x) const {
        return {value_of(student, r_s[x]), teacher_is_values ? r_t[x] : value_of(teacher, r_t[x])};
    }
    __device__ Pair weighted(std::int64_t x, Pair v) const {
        const A w = weight ? log_weight(weight[x]) : A(0);
        return {v.s + w, v.t + w};
    }
    __device__ A term(const Pair& v, const RowStats<A>& row) const {
        return teacher_student ? divergence_term(row.log_pt(v.t), row.log_ps(v.s))
                               : divergence_term(row.log_ps(v.s), row.log_pt(v.t));
    }
    __device__ A log_ratio(const Pair& v, const RowStats<A>& row) const {
        const A log_ps = row.log_ps(v.s);
        return exp_(log_ps) * (log_ps - row.log_pt(v.t));
    }
};

// Every row that is no hub.
template <class A> __global__ void __launch_bounds__(kThreads) rows_kernel(Args<A> a) {
    __shared__ int counts[kWarps][3];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const std::int64_t i = std::int64_t(blockIdx.x) * kWarps + warp;
    if (lane < 3) counts[warp][lane] = 0;
    __syncwarp();
    if (i < a.g.rows) {
        const std::int64_t b = a.g.begin(i), e = a.g.begin(i + 1);
        if (e - b <= kBlock) {
            Part<A> s = Part<A>::empty(), t = Part<A>::empty();
            for (std::int64_t x = b + lane; x < e; x += 32) {
                a.fill(i, x);
                const auto p = a.plain(x);
                s.extend(p.s);
                t.extend(p.t);
                const auto w = a.weighted(x, p);
                s.add(w.s);
                t.add(w.t);
            }
            s.merge_warp();
            t.merge_warp();
            RowStats<A> row{s.maximum(), s.log_sum(), t.maximum(), t.log_sum(), 0, 0};
            A sum = 0, mean = 0;
            for (std::int64_t x = b + lane; x < e; x += 32) {
                const auto v = a.weighted(x, a.plain(x));
                sum += a.term(v, row);
                mean += a.log_ratio(v, row);
            }
            row.divergence = warp_sum(sum);
            row.mean = warp_sum(mean);
            if (lane == 0) {
                a.stats[i] = row;
                if (e - b >= 2) {
                    counts[warp][0] = 1;
                    counts[warp][1] = s.informative();
                    counts[warp][2] = t.informative();
                }
            }
        }
    }
    __syncthreads();
    if (threadIdx.x < 3) {
        int sum = 0;
        for (int w = 0; w < kWarps; ++w) sum += counts[w][threadIdx.x];
        if (sum) atomicAdd(&a.diagnostics[threadIdx.x], (unsigned long long)sum);
    }
}

// One piece of a hub per call; all threads of the block take part.
template <class A> __global__ void __launch_bounds__(kThreads) hub_parts_kernel(Args<A> a, Part<A>* parts) {
    __shared__ Part<A> shared[2][kWarps];
    auto begin = [&](std::int64_t i) { return a.g.begin(i); };
    for_pieces(begin, a.g.rows, blockIdx.x, [&](std::int64_t i, std::int64_t b, std::int64_t e, std::int64_t slot) {
        Part<A> p[2] = {Part<A>::empty(), Part<A>::empty()};
        for (std::int64_t x = b + threadIdx.x; x < e; x += kThreads) {
            a.fill(i, x);
            const auto v = a.plain(x);
            p[0].extend(v.s);
            p[1].extend(v.t);
            const auto w = a.weighted(x, v);
            p[0].add(w.s);
            p[1].add(w.t);
        }
        for (int side = 0; side < 2; ++side) {
            p[side].merge_warp();
            if (threadIdx.x % 32 == 0) shared[side][threadIdx.x / 32] = p[side];
        }
        __syncthreads();
        if (threadIdx.x < 2) {
            Part<A> total = shared[threadIdx.x][0];
            for (int w = 1; w < kWarps; ++w) {
                const Part<A>& other = shared[threadIdx.x][w];
                total.merge(other.max, other.sum);
                total.low = other.low < total.low ? other.low : total.low;
                total.high = other.high > total.high ? other.high : total.high;
            }
            parts[2 * slot + threadIdx.x] = total;
        }
        __syncthreads();
    });
}

template <class A>
__global__ void __launch_bounds__(kThreads) hub_stats_kernel(Args<A> a, const Part<A>* parts) {
    const std::int64_t i = std::int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (i >= a.g.rows || a.g.begin(i + 1) - a.g.begin(i) <= kBlock) return;
    auto begin = [&](std::int64_t k) { return a.g.begin(k); };
    atomicAdd(&a.diagnostics[0], 1ull);
    for (int side = 0; side < 2; ++side) {
        Part<A> total = Part<A>::empty();
        for_slots(begin, i, [&](std::int64_t slot) {
            const Part<A>& p = parts[2 * slot + side];
            total.max = p.max > total.max ? p.max : total.max;
            total.low = p.low < total.low ? p.low : total.low;
            total.high = p.high > total.high ? p.high : total.high;
        });
        double sum = 0;
        for_slots(begin, i, [&](std::int64_t slot) {
            const Part<A>& p = parts[2 * slot + side];
            sum += double(p.sum) * double(exp_(p.max - total.max));
        });
        (side ? a.stats[i].max_t : a.stats[i].max_s) = total.max;
        (side ? a.stats[i].log_sum_t : a.stats[i].log_sum_s) = A(log_(sum));
        if (total.informative()) atomicAdd(&a.diagnostics[1 + side], 1ull);
    }
}

// Of a piece; see RowStats.
struct Sums {
    double divergence, mean;
};

template <class A>
__global__ void __launch_bounds__(kThreads) hub_divergence_kernel(Args<A> a, Sums* sums) {
    __shared__ A scratch[kWarps];
    auto begin = [&](std::int64_t i) { return a.g.begin(i); };
    for_pieces(begin, a.g.rows, blockIdx.x, [&](std::int64_t i, std::int64_t b, std::int64_t e, std::int64_t slot) {
        const RowStats<A> row = a.stats[i];
        A sum = 0, mean = 0;
        for (std::int64_t x = b + threadIdx.x; x < e; x += kThreads) {
            const auto v = a.weighted(x, a.plain(x));
            sum += a.term(v, row);
            mean += a.log_ratio(v, row);
        }
        sum = block_sum(sum, scratch);
        mean = block_sum(mean, scratch);
        if (threadIdx.x == 0) sums[slot] = {sum, mean};
    });
}

template <class A>
__global__ void __launch_bounds__(kThreads) hub_finish_kernel(Args<A> a, const Sums* sums) {
    const std::int64_t i = std::int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (i >= a.g.rows || a.g.begin(i + 1) - a.g.begin(i) <= kBlock) return;
    auto begin = [&](std::int64_t k) { return a.g.begin(k); };
    double divergence = 0, mean = 0;
    for_slots(begin, i, [&](std::int64_t slot) {
        divergence += sums[slot].divergence;
        mean += sums[slot].mean;
    });
    a.stats[i].divergence = A(divergence);
    a.stats[i].mean = A(mean);
}

struct Total {
    double sum, rows, edges;
};

constexpr std::int64_t kRowsPerBlock = 4 * kThreads;

// Sums over rows: the divergence, and for the reductions that need them the rows and edges left.
template <class A> __global__ void __launch_bounds__(kThreads) totals_kernel(Args<A> a, Total* totals) {
    __shared__ double scratch[kWarps];
    double sum = 0, rows = 0, edges = 0;
    for (int k = 0; k < kRowsPerBlock / kThreads; ++k) {
        const std::int64_t i = blockIdx.x * kRowsPerBlock + k * kThreads + threadIdx.x;
        if (i >= a.g.rows) break;
        sum += a.stats[i].divergence;
        if (a.reduction == Reduction::none) a.loss[i] = a.stats[i].divergence;
        const std::int64_t b = a.g.begin(i), e = a.g.begin(i + 1);
        std::int64_t degree = e - b;
        if (a.weight && a.reduction >= Reduction::mean_active) {
            degree = 0;
            for (std::int64_t x = b; x < e; ++x) degree += a.weight[x] > 0;
        }
        edges += double(degree);
        rows += degree > 0;
    }
    sum = block_sum(sum, scratch);
    rows = block_sum(rows, scratch);
    edges = block_sum(edges, scratch);
    if (threadIdx.x == 0) totals[blockIdx.x] = {sum, rows, edges};
}

template <class A>
__global__ void __launch_bounds__(kThreads) loss_kernel(Args<A> a, const Total* totals, std::int64_t count) {
    __shared__ double scratch[kWarps];
    double sum = 0, rows = 0, edges = 0;
    for (std::int64_t k = threadIdx.x; k < count; k += kThreads) {
        sum += totals[k].sum;
        rows += totals[k].rows;
        edges += totals[k].edges;
    }
    sum = block_sum(sum, scratch);
    rows = block_sum(rows, scratch);
    edges = block_sum(edges, scratch);
    if (threadIdx.x != 0) return;
    double by = 1;
    if (a.reduction == Reduction::mean) by = double(a.g.rows);
    if (a.reduction == Reduction::mean_active) by = rows;
    if (a.reduction == Reduction::mean_edges) by = edges;
    *a.scale = by > 0 ? 1 / by : 0;
    if (a.reduction != Reduction::none) *a.loss = A(sum * *a.scale);
}

template <class A> __global__ void __launch_bounds__(kThreads) coefficients_kernel(Args<A> a) {
    const int lane = threadIdx.x % 32;
    const std::int64_t first = std::int64_t(blockIdx.x) * kThreads + threadIdx.x - lane, x = first + lane;
    if (first >= a.g.edges) return;
    const std::int64_t i = row_of_lane(a.g, first, lane);
    if (x >= a.g.edges) return;
    const std::int64_t j = a.g.col[x];
    const auto v = a.weighted(x, a.plain(x));
    auto gradient_in = [&](const RowStats<A>& row) {
        return edge_gradient(a.teacher_student, v.s, v.t, row);
    };
    A gradient = gradient_in(a.stats[i]);
    if (a.fold) gradient += gradient_in(a.stats[j]);
    A factor = A(metric_factor(a.student.metric) * *a.scale);
    if (a.src_inv_norm) factor *= a.dst_inv_norm[i] * a.src_inv_norm[j];
    a.r_s[x] = gradient * slope_of(a.student, a.r_s[x]) * factor;
}

template <class A>
__global__ void __launch_bounds__(kThreads)
    values_kernel(Graph g, Indices reverse, Kernel kernel, const A* r, A* values) {
    const int lane = threadIdx.x % 32;
    const std::int64_t first = std::int64_t(blockIdx.x) * kThreads + threadIdx.x - lane, x = first + lane;
    if (first >= g.edges) return;
    const std::int64_t i = row_of_lane(g, first, lane);
    if (x >= g.edges) return;
    values[x] = value_of(kernel, r[reverse && g.col[x] > i ? reverse[x] : x]);
}

// Scratch memory, in this order.
template <class A> struct Workspace {
    double* scale;
    Total* totals;
    Sums* sums;
    Part<A>* parts;
    std::int64_t bytes;

    Workspace(const Divergences& op, bool hubs) {
        const std::int64_t blocks = hubs ? ceil_div(op.graph.rows + op.graph.edges, kBlock) : 0;
        char* base = static_cast<char*>(op.workspace);
        std::int64_t at = 0;
        auto take = [&](std::int64_t size) {
            char* p = base + at;
            at += ceil_div(size, 16) * 16;
            return p;
        };
        scale = reinterpret_cast<double*>(take(sizeof(double)));
        totals = reinterpret_cast<Total*>(take(ceil_div(op.graph.rows, kRowsPerBlock) * sizeof(Total)));
        sums = reinterpret_cast<Sums*>(take(2 * blocks * sizeof(Sums)));
        parts = reinterpret_cast<Part<A>*>(take(4 * blocks * sizeof(Part<A>)));
        bytes = at;
    }
};

bool may_have_hubs(const Divergences& op) {
    return op.graph.edges > kBlock && (op.max_degree < 0 || op.max_degree > kBlock);
}

template <class A> void run(const Divergences& op, void* stream) {
    const bool hubs = may_have_hubs(op);
    const Workspace<A> work(op, hubs);
    const Args<A> args{
        graph_of(op.graph), {op.reverse, op.graph.wide}, op.student, op.teacher,
        op.divergence == Divergence::teacher_student, op.teacher_is_values, op.fold, op.reduction,
        static_cast<A*>(op.r_s), static_cast<A*>(op.r_t), static_cast<const A*>(op.weight),
        static_cast<const A*>(op.src_inv_norm), static_cast<const A*>(op.dst_inv_norm),
        static_cast<RowStats<A>*>(op.stats), static_cast<A*>(op.loss),
        reinterpret_cast<unsigned long long*>(op.diagnostics), work.scale};
    const std::int64_t rows = op.graph.rows, edges = op.graph.edges;
    const std::int64_t blocks = ceil_div(rows + edges, kBlock), totals = ceil_div(rows, kRowsPerBlock);
    check(cudaMemsetAsync(op.diagnostics, 0, 3 * sizeof(std::int64_t), static_cast<cudaStream_t>(stream)),
          "clearing the diagnostics");
    launch("rows", rows_kernel<A>, ceil_div(rows, kWarps), stream, args);
    if (hubs) {
        launch("hub parts", hub_parts_kernel<A>, blocks, stream, args, work.parts);
        launch("hub stats", hub_stats_kernel<A>, ceil_div(rows, kThreads), stream, args, work.parts);
        launch("hub divergence", hub_divergence_kernel<A>, blocks, stream, args, work.sums);
        launch("hub finish", hub_finish_kernel<A>, ceil_div(rows, kThreads), stream, args, work.sums);
    }
    launch("totals", totals_kernel<A>, totals, stream, args, work.totals);
    launch("loss", loss_kernel<A>, 1, stream, args, work.totals, totals);
    if (op.want_coef) launch("coefficients", coefficients_kernel<A>, ceil_div(edges, kThreads), stream, args);
}

}  // namespace

std::int64_t workspace_bytes(const Divergences& op) {
    std::int64_t bytes = 0;
    dispatch_acc(op.acc, [&](auto acc) {
        bytes = Workspace<typename decltype(acc)::type>(op, may_have_hubs(op)).bytes;
    });
    return bytes;
}

void divergences(const Divergences& op, void* stream) {
    dispatch_acc(op.acc, [&](auto acc) { run<typename decltype(acc)::type>(op, stream); });
}

void kernel_values(const KernelValues& op, void* stream) {
    dispatch_acc(op.acc, [&](auto acc) {
        using A = typename decltype(acc)::type;
        launch("values", values_kernel<A>, ceil_div(op.graph.edges, kThreads), stream, graph_of(op.graph),
               Indices{op.reverse, op.graph.wide}, op.kernel, static_cast<const A*>(op.r),
               static_cast<A*>(op.values));
    });
}

}  // namespace fastkd::cuda
