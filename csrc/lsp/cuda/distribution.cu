// Kernel values, softmax over rows, divergence and the coefficient of every edge. A warp owns a row;
// hubs are cut into pieces, a block each, whose results are combined in order.
#include <limits>
#include <type_traits>

#include "common/launch.cuh"
#include "lsp/formulas.h"

namespace fastkd::cuda {
namespace {

template <class A> __device__ A value_of(const Kernel& kernel, A r) {
    A value = 0;
    dispatch(kernel, [&](auto shape, auto root) {
        value = kernel_value<decltype(shape)::value, decltype(root)::value>(r, A(kernel.scale),
                                                                            A(kernel.param), kernel.degree);
    });
    return value;
}
template <class A> __device__ A slope_of(const Kernel& kernel, A r, A value) {
    A slope = 0;
    dispatch(kernel, [&](auto shape, auto root) {
        slope = kernel_slope<decltype(shape)::value, decltype(root)::value>(r, value, A(kernel.scale),
                                                                            A(kernel.param), kernel.degree);
    });
    return slope;
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
};

// Of a hub's piece; see RowStats.
struct Sums {
    double divergence, mean;
};
struct Total {
    double sum, rows, edges;
};

template <class A> struct Args {
    Graph g;
    Kernel student, teacher;
    bool teacher_student, teacher_is_values;
    Reduction reduction;
    const A* r_s;
    const A* r_t;
    const A* weight;
    const A* src_inv_norm;
    const A* dst_inv_norm;
    A* coef;
    A* rows;
    A* loss;
    unsigned long long* diagnostics;
    // Scratch: what the sum over rows is multiplied with [1], sums over blocks of rows, and per piece
    // of a hub its two parts, its sums and (at a hub's first piece) the row's statistics.
    double* scale;
    Total* totals;
    Part<A>* parts;
    Sums* sums;
    RowStats<A>* hubs;

    // Of one edge: student's raw reduction, kernel values, and those with weights.
    struct Edge {
        A r, value_s, value_t, s, t;
    };

    __device__ Edge edge(std::int64_t x) const {
        Edge e;
        e.r = r_s[x];
        e.value_s = value_of(student, e.r);
        e.value_t = teacher_is_values ? r_t[x] : value_of(teacher, r_t[x]);
        const A w = weight ? log_weight(weight[x]) : A(0);
        e.s = e.value_s + w;
        e.t = e.value_t + w;
        return e;
    }
    __device__ void add(const Edge& e, const RowStats<A>& row, A& divergence, A& mean) const {
        const Probabilities<A> p(e.s, e.t, row);
        divergence += edge_divergence(teacher_student, p.s, p.t, p.d);
        mean += p.s * p.d;
    }
    __device__ void write_coef(std::int64_t i, std::int64_t x, const Edge& e, const RowStats<A>& row) const {
        const Probabilities<A> p(e.s, e.t, row);
        A factor = A(metric_factor(student.metric) * *scale);
        if (src_inv_norm) factor *= dst_inv_norm[i] * src_inv_norm[g.col[x]];
        coef[x] = factor * slope_of(student, e.r, e.value_s) *
                  edge_gradient(teacher_student, p.s, p.t, p.d, row.mean);
    }
    __device__ RowStats<A>& hub(std::int64_t i) const { return hubs[first_slot(g, i)]; }
};

// Every row that is no hub. The three loops read the same few cache lines.
template <class A> __global__ void __launch_bounds__(kThreads) rows_kernel(Args<A> a) {
    __shared__ int counts[kWarps][3];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const std::int64_t i = std::int64_t(blockIdx.x) * kWarps + warp;
    if (lane < 3) counts[warp][lane] = 0;
    __syncwarp();
    if (i < a.g.rows && !is_hub(a.g, i)) {
        const std::int64_t b = a.g.begin(i), e = a.g.begin(i + 1);
        Part<A> s = Part<A>::empty(), t = Part<A>::empty();
        for (std::int64_t x = b + lane; x < e; x += 32) {
            const auto v = a.edge(x);
            s.extend(v.value_s);
            t.extend(v.value_t);
            s.add(v.s);
            t.add(v.t);
        }
        s.merge_warp();
        t.merge_warp();
        RowStats<A> row{s.max, t.max, 1 / s.sum, 1 / t.sum, log_(t.sum / s.sum), 0};  // not used if empty
        A divergence = 0, mean = 0;
        for (std::int64_t x = b + lane; x < e; x += 32) a.add(a.edge(x), row, divergence, mean);
        divergence = warp_sum(divergence);
        row.mean = warp_sum(mean);
        if (a.coef)
            for (std::int64_t x = b + lane; x < e; x += 32) a.write_coef(i, x, a.edge(x), row);
        if (lane == 0) {
            a.rows[i] = divergence;
            if (e - b >= 2) {
                counts[warp][0] = 1;
                counts[warp][1] = informative(s.low, s.high);
                counts[warp][2] = informative(t.low, t.high);
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

template <class A> __global__ void __launch_bounds__(kThreads) hub_parts_kernel(Args<A> a) {
    __shared__ Part<A> shared[2][kWarps];
    for_pieces(a.g, a.g.rows, blockIdx.x,
               [&](std::int64_t, std::int64_t b, std::int64_t e, std::int64_t slot) {
                   Part<A> p[2] = {Part<A>::empty(), Part<A>::empty()};
                   for (std::int64_t x = b + threadIdx.x; x < e; x += kThreads) {
                       const auto v = a.edge(x);
                       p[0].extend(v.value_s);
                       p[1].extend(v.value_t);
                       p[0].add(v.s);
                       p[1].add(v.t);
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
                       a.parts[2 * slot + threadIdx.x] = total;
                   }
                   __syncthreads();
               });
}

template <class A> __global__ void __launch_bounds__(kThreads) hub_stats_kernel(Args<A> a) {
    const std::int64_t i = std::int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (i >= a.g.rows || !is_hub(a.g, i)) return;
    A max[2];
    double sums[2];
    atomicAdd(&a.diagnostics[0], 1ull);
#pragma unroll
    for (int side = 0; side < 2; ++side) {
        Part<A> total = Part<A>::empty();
        for_slots(a.g, i, [&](std::int64_t slot) {
            const Part<A>& p = a.parts[2 * slot + side];
            total.max = p.max > total.max ? p.max : total.max;
            total.low = p.low < total.low ? p.low : total.low;
            total.high = p.high > total.high ? p.high : total.high;
        });
        double sum = 0;
        for_slots(a.g, i, [&](std::int64_t slot) {
            const Part<A>& p = a.parts[2 * slot + side];
            sum += double(p.sum) * double(exp_(p.max - total.max));
        });
        max[side] = total.max;
        sums[side] = sum;
        if (informative(total.low, total.high)) atomicAdd(&a.diagnostics[1 + side], 1ull);
    }
    a.hub(i) = {max[0], max[1], A(1 / sums[0]), A(1 / sums[1]), A(log_(sums[1] / sums[0])), 0};
}

template <class A> __global__ void __launch_bounds__(kThreads) hub_sums_kernel(Args<A> a) {
    __shared__ A scratch[kWarps];
    for_pieces(a.g, a.g.rows, blockIdx.x,
               [&](std::int64_t i, std::int64_t b, std::int64_t e, std::int64_t slot) {
                   const RowStats<A> row = a.hub(i);
                   A divergence = 0, mean = 0;
                   for (std::int64_t x = b + threadIdx.x; x < e; x += kThreads)
                       a.add(a.edge(x), row, divergence, mean);
                   divergence = block_sum(divergence, scratch);
                   mean = block_sum(mean, scratch);
                   if (threadIdx.x == 0) a.sums[slot] = {divergence, mean};
               });
}

template <class A> __global__ void __launch_bounds__(kThreads) hub_finish_kernel(Args<A> a) {
    const std::int64_t i = std::int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (i >= a.g.rows || !is_hub(a.g, i)) return;
    double divergence = 0, mean = 0;
    for_slots(a.g, i, [&](std::int64_t slot) {
        divergence += a.sums[slot].divergence;
        mean += a.sums[slot].mean;
    });
    a.rows[i] = A(divergence);
    a.hub(i).mean = A(mean);
}

template <class A> __global__ void __launch_bounds__(kThreads) hub_coef_kernel(Args<A> a) {
    for_pieces(a.g, a.g.rows, blockIdx.x, [&](std::int64_t i, std::int64_t b, std::int64_t e, std::int64_t) {
        const RowStats<A> row = a.hub(i);
        for (std::int64_t x = b + threadIdx.x; x < e; x += kThreads) a.write_coef(i, x, a.edge(x), row);
    });
}

constexpr std::int64_t kRowsPerBlock = 4 * kThreads;

// Sums over blocks of rows: with count, the rows and edges left by the weights; else the divergence.
template <class A> __global__ void __launch_bounds__(kThreads) totals_kernel(Args<A> a, bool count) {
    __shared__ double scratch[kWarps];
    double sum = 0, rows = 0, edges = 0;
    for (int k = 0; k < kRowsPerBlock / kThreads; ++k) {
        const std::int64_t i = blockIdx.x * kRowsPerBlock + k * kThreads + threadIdx.x;
        if (i >= a.g.rows) break;
        if (!count) {
            sum += a.rows[i];
            continue;
        }
        const std::int64_t b = a.g.begin(i), e = a.g.begin(i + 1);
        std::int64_t degree = e - b;
        if (a.weight) {
            degree = 0;
            for (std::int64_t x = b; x < e; ++x) degree += a.weight[x] > 0;
        }
        edges += double(degree);
        rows += degree > 0;
    }
    sum = block_sum(sum, scratch);
    rows = block_sum(rows, scratch);
    edges = block_sum(edges, scratch);
    if (threadIdx.x == 0) a.totals[blockIdx.x] = {sum, rows, edges};
}

// From the totals of `blocks` blocks: with count, the scale; else the loss.
template <class A> __global__ void __launch_bounds__(kThreads)
    finish_kernel(Args<A> a, std::int64_t blocks, bool count) {
    __shared__ double scratch[kWarps];
    double sum = 0, rows = 0, edges = 0;
    for (std::int64_t k = threadIdx.x; k < blocks; k += kThreads) {
        sum += a.totals[k].sum;
        rows += a.totals[k].rows;
        edges += a.totals[k].edges;
    }
    sum = block_sum(sum, scratch);
    rows = block_sum(rows, scratch);
    edges = block_sum(edges, scratch);
    if (threadIdx.x != 0) return;
    if (!count) {
        *a.loss = A(sum * *a.scale);
        return;
    }
    double by = 1;
    if (a.reduction == Reduction::mean) by = double(a.g.rows);
    if (a.reduction == Reduction::mean_active) by = rows;
    if (a.reduction == Reduction::mean_edges) by = edges;
    *a.scale = by > 0 ? 1 / by : 0;
}

template <class A> __global__ void __launch_bounds__(kThreads)
    values_kernel(std::int64_t edges, Kernel kernel, const A* r, A* values) {
    const std::int64_t x = std::int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (x < edges) values[x] = value_of(kernel, r[x]);
}

bool may_have_hubs(const Divergences& op) {
    return op.graph.edges > kBlock && (op.max_degree < 0 || op.max_degree > kBlock);
}

// Places the scratch arrays of args at base; returns their size.
template <class A> std::int64_t place(const Divergences& op, char* base, Args<A>& args) {
    const std::int64_t blocks = may_have_hubs(op) ? num_blocks(op.graph.rows, op.graph.edges) : 0;
    std::int64_t at = 0;
    auto take = [&](auto*& array, std::int64_t count) {
        array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(base + at);
        at += ceil_div(count * std::int64_t(sizeof(*array)), 16) * 16;
    };
    take(args.scale, 1);
    take(args.totals, ceil_div(op.graph.rows, kRowsPerBlock));
    take(args.parts, 4 * blocks);
    take(args.sums, 2 * blocks);
    take(args.hubs, 2 * blocks);
    return at;
}

template <class A> void run(const Divergences& op, void* stream) {
    Args<A> args{};
    args.g = graph_of(op.graph);
    args.student = op.student;
    args.teacher = op.teacher;
    args.teacher_student = op.divergence == Divergence::teacher_student;
    args.teacher_is_values = op.teacher_is_values;
    args.reduction = op.reduction;
    args.r_s = static_cast<const A*>(op.r_s);
    args.r_t = static_cast<const A*>(op.r_t);
    args.weight = static_cast<const A*>(op.weight);
    args.src_inv_norm = static_cast<const A*>(op.src_inv_norm);
    args.dst_inv_norm = static_cast<const A*>(op.dst_inv_norm);
    args.coef = static_cast<A*>(op.coef);
    args.rows = static_cast<A*>(op.rows);
    args.loss = static_cast<A*>(op.loss);
    args.diagnostics = reinterpret_cast<unsigned long long*>(op.diagnostics);
    place(op, static_cast<char*>(op.workspace), args);

    const std::int64_t rows = op.graph.rows, edges = op.graph.edges;
    const std::int64_t blocks = num_blocks(rows, edges);
    check(cudaMemsetAsync(op.diagnostics, 0, 3 * sizeof(std::int64_t), static_cast<cudaStream_t>(stream)),
          "clearing the diagnostics");
    // The scale comes first: the coefficients carry it. Only two reductions have to count for it.
    std::int64_t counted = 0;
    if (op.reduction == Reduction::mean_active || op.reduction == Reduction::mean_edges) {
        counted = ceil_div(rows, kRowsPerBlock);
        launch("counts", totals_kernel<A>, counted, stream, args, true);
    }
    launch("scale", finish_kernel<A>, 1, stream, args, counted, true);
    launch("rows", rows_kernel<A>, ceil_div(rows, kWarps), stream, args);
    if (may_have_hubs(op)) {
        launch("hub parts", hub_parts_kernel<A>, blocks, stream, args);
        launch("hub statistics", hub_stats_kernel<A>, ceil_div(rows, kThreads), stream, args);
        launch("hub sums", hub_sums_kernel<A>, blocks, stream, args);
        launch("hub results", hub_finish_kernel<A>, ceil_div(rows, kThreads), stream, args);
        if (op.coef) launch("hub coefficients", hub_coef_kernel<A>, blocks, stream, args);
    }
    if (!op.loss) return;
    launch("totals", totals_kernel<A>, ceil_div(rows, kRowsPerBlock), stream, args, false);
    launch("loss", finish_kernel<A>, 1, stream, args, ceil_div(rows, kRowsPerBlock), false);
}

}  // namespace

std::int64_t workspace_bytes(const Divergences& op) {
    std::int64_t bytes = 0;
    dispatch_acc(op.acc, [&](auto acc) {
        Args<typename decltype(acc)::type> args{};
        bytes = place(op, nullptr, args);
    });
    return bytes;
}

void divergences(const Divergences& op, void* stream) {
    dispatch_acc(op.acc, [&](auto acc) { run<typename decltype(acc)::type>(op, stream); });
}

void kernel_values(const KernelValues& op, void* stream) {
    dispatch_acc(op.acc, [&](auto acc) {
        using A = typename decltype(acc)::type;
        launch("values", values_kernel<A>, ceil_div(op.edges, kThreads), stream, op.edges, op.kernel,
               static_cast<const A*>(op.r), static_cast<A*>(op.values));
    });
}

}  // namespace fastkd::cuda
