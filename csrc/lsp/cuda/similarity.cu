// The raw reduction r of every edge. A warp takes 32 consecutive slots; a group of lanes shares an
// edge, each lane 16 bytes of both rows at a time, and works on several edges at once.
#include "common/launch.cuh"
#include "lsp/formulas.h"

namespace fastkd::cuda {
namespace {

constexpr int kInFlight = 4;  // edges per group whose loads are independent

// The slots of a warp that are to be done: their rows and columns, and their places among the 32.
struct Todo {
    std::int64_t row[32], col[32];
    int place[32];
};

// Packs them to the front and returns their number: on a symmetric pattern only those with col <= row.
__device__ inline int pack_edges(const Graph& g, bool symmetric, std::int64_t first, int lane, Todo& todo) {
    const std::int64_t row = row_of_lane(g, first, lane), e = first + lane;
    const std::int64_t col = e < g.edges ? g.col[e] : 0;
    const unsigned mask = __ballot_sync(kAll, e < g.edges && (!symmetric || col <= row));
    if (mask >> lane & 1) {
        const int k = __popc(mask & ((1u << lane) - 1));
        todo.row[k] = row;
        todo.col[k] = col;
        todo.place[k] = lane;
    }
    __syncwarp();
    return __popc(mask);
}

// This lane's part of the reductions of a few pairs of rows at once.
template <Metric M, class T, int V>
__device__ void reduce_pairs(const T* const (&a)[kInFlight], const T* const (&b)[kInFlight], std::int64_t dim,
                             int lanes, int part, acc_t<T> (&sum)[kInFlight]) {
    for (std::int64_t d = std::int64_t(part) * V; d < dim; d += std::int64_t(lanes) * V) {
        Pack<T, V> x[kInFlight], y[kInFlight];
#pragma unroll
        for (int u = 0; u < kInFlight; ++u) {
            x[u] = Pack<T, V>::load(a[u] + d);
            y[u] = Pack<T, V>::load(b[u] + d);
        }
#pragma unroll
        for (int u = 0; u < kInFlight; ++u)
#pragma unroll
            for (int k = 0; k < V; ++k) sum[u] = accumulate<M>(sum[u], x[u].v[k], y[u].v[k]);
    }
}

template <Metric M, class T, int V> __global__ void __launch_bounds__(kThreads)
    similarity_kernel(Graph g, Matrix<T> src, Matrix<T> dst, const acc_t<T>* src_inv_norm,
                      const acc_t<T>* dst_inv_norm, Indices reverse, bool cosine, int lanes, acc_t<T>* r) {
    using A = acc_t<T>;
    __shared__ Todo all[kWarps];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const std::int64_t first = (std::int64_t(blockIdx.x) * kWarps + warp) * 32;
    if (first >= g.edges) return;

    Todo& todo = all[warp];
    const int count = pack_edges(g, bool(reverse), first, lane, todo);
    const int groups = 32 / lanes, group = lane / lanes, part = lane % lanes;
    for (int start = 0; start < count; start += groups * kInFlight) {
        const T* a[kInFlight];
        const T* b[kInFlight];
        A sum[kInFlight];
#pragma unroll
        for (int u = 0; u < kInFlight; ++u) {
            const int k = start + u * groups + group < count ? start + u * groups + group : count - 1;
            a[u] = dst.row(todo.row[k]);
            b[u] = src.row(todo.col[k]);
            sum[u] = 0;
        }
        reduce_pairs<M, T, V>(a, b, src.cols, lanes, part, sum);
#pragma unroll
        for (int u = 0; u < kInFlight; ++u) {
            A total = sum[u];
            for (int o = lanes / 2; o > 0; o /= 2) total += __shfl_xor_sync(kAll, total, o);
            const int k = start + u * groups + group;
            if (part == 0 && k < count) {
                if (cosine) total *= dst_inv_norm[todo.row[k]] * src_inv_norm[todo.col[k]];
                const std::int64_t slot = first + todo.place[k];
                r[slot] = total;
                if (reverse) r[reverse[slot]] = total;
            }
        }
    }
}

template <class T, int V> __global__ void __launch_bounds__(kThreads)
    inverse_norm_kernel(Matrix<T> x, acc_t<T>* out) {
    const int lane = threadIdx.x % 32;
    const std::int64_t i = std::int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
    if (i >= x.rows) return;
    acc_t<T> sum = 0;
    for (std::int64_t d = lane * V; d < x.cols; d += 32 * V) {
        const Pack<T, V> p = Pack<T, V>::load(x.row(i) + d);
#pragma unroll
        for (int k = 0; k < V; ++k) sum += p.v[k] * p.v[k];
    }
    sum = warp_sum(sum);
    if (lane == 0) out[i] = sum > 0 ? 1 / sqrt_(sum) : acc_t<T>(0);
}

}  // namespace

void similarity(const Similarity& op, void* stream) {
    dispatch(op.src.dtype, [&](auto dtype) {
        using T = typename decltype(dtype)::type;
        using A = acc_t<T>;
        dispatch_vector<T>(vectorizable(op.src) && vectorizable(op.dst), [&](auto width) {
            constexpr int V = decltype(width)::value;
            dispatch(op.metric, [&](auto metric) {
                launch("similarity", similarity_kernel<decltype(metric)::value, T, V>,
                       ceil_div(op.graph.edges, kThreads), stream, graph_of(op.graph), matrix_of<T>(op.src),
                       matrix_of<T>(op.dst), static_cast<const A*>(op.src_inv_norm),
                       static_cast<const A*>(op.dst_inv_norm), Indices{op.reverse, op.graph.wide},
                       op.metric == Metric::cosine, lanes_for(ceil_div(op.src.cols, V)),
                       static_cast<A*>(op.r));
            });
        });
    });
}

void inverse_norm(const InverseNorm& op, void* stream) {
    dispatch(op.x.dtype, [&](auto dtype) {
        using T = typename decltype(dtype)::type;
        dispatch_vector<T>(vectorizable(op.x), [&](auto width) {
            launch("inverse_norm", inverse_norm_kernel<T, decltype(width)::value>,
                   ceil_div(op.x.rows, kWarps), stream, matrix_of<T>(op.x),
                   static_cast<acc_t<T>*>(op.inv_norm));
        });
    });
}

}  // namespace fastkd::cuda
