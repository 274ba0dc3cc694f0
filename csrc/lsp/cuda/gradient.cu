// The backward direction: one sparse product over the incident edges of every row, without atomics.
// A warp owns a row; groups of its lanes take edges in turn, each lane 16 bytes of the row at a time.
// Hubs are cut into pieces of a block each, whose partial sums are added in order.
#include "common/launch.cuh"
#include "lsp/formulas.h"

namespace fastkd::cuda {
namespace {

constexpr int C = 2;  // vectors of a row per lane and pass

template <class T> struct List {
    Graph g;
    Indices perm;
    bool mirrored;
    Matrix<T> other;
};

template <class T> struct Args {
    using A = acc_t<T>;
    Matrix<T> self;
    List<T> lists[2];
    int num_lists;
    bool cosine, grad_per_row;
    const A* coef;
    const A* grad;
    const A* inv_norm;
    T* out;
    A* parts;  // [2 * blocks, D]
    int lanes;

    // Edges before row i, counted over both lists.
    __device__ std::int64_t begin(std::int64_t i) const {
        return lists[0].g.begin(i) + (num_lists > 1 ? lists[1].g.begin(i) : 0);
    }
};

// One pass's features of a row: C vectors per lane, `lanes * V` apart.
template <Metric M, class T, int V> struct Pass {
    using A = acc_t<T>;
    const Args<T>& a;
    std::int64_t i, first;  // the row, and the first feature of the pass
    int lane, group, part, groups;
    Pack<T, V> self[C], sum[C];

    __device__ Pass(const Args<T>& args, std::int64_t row, std::int64_t first_feature)
        : a(args),
          i(row),
          first(first_feature),
          lane(threadIdx.x % 32),
          group(lane / args.lanes),
          part(lane % args.lanes),
          groups(32 / args.lanes) {
#pragma unroll
        for (int c = 0; c < C; ++c) {
            self[c] = inside(c) ? Pack<T, V>::load(a.self.row(i) + feature(c)) : Pack<T, V>::zero();
            sum[c] = Pack<T, V>::zero();
        }
    }
    __device__ std::int64_t feature(int c) const { return first + (std::int64_t(c) * a.lanes + part) * V; }
    __device__ bool inside(int c) const { return feature(c) < a.self.cols; }

    // The edges [b, e) of the row, counted over both lists.
    __device__ void add(std::int64_t b, std::int64_t e) {
        std::int64_t position = a.begin(i);
        for (int k = 0; k < a.num_lists; ++k) {
            const List<T>& list = a.lists[k];
            const std::int64_t start = list.g.begin(i), degree = list.g.begin(i + 1) - start;
            add_slots(list, start + (b > position ? b - position : 0),
                      start + (e - position < degree ? e - position : degree));
            position += degree;
        }
    }

    // Each lane fetches what one edge weighs; then the groups take the edges in turn, two at once, so that
    // the loads are two edges deep.
    __device__ void add_slots(const List<T>& list, std::int64_t from, std::int64_t to) {
        for (std::int64_t x = from; x < to; x += 32) {
            std::int64_t j = 0;
            A w = 0;
            if (x + lane < to) {
                j = list.g.col[x + lane];
                w = weight(list, x + lane, j);
            }
            const int count = to - x < 32 ? int(to - x) : 32;
            for (int s = 0; s < count; s += 2 * groups) step(list, j, w, s + group, s + groups + group);
        }
    }

    // See Incidence.
    __device__ A weight(const List<T>& list, std::int64_t x, std::int64_t j) const {
        A w = 0;
        if (!list.perm || list.mirrored) w = a.coef[x] * a.grad[a.grad_per_row ? i : 0];
        if (list.perm) w += a.coef[list.perm[x]] * a.grad[a.grad_per_row ? j : 0];
        return w;
    }

    // The edges that the lanes k0 and k1 fetched, to the sums of this group.
    __device__ void step(const List<T>& list, std::int64_t j, A w, int k0, int k1) {
        // Beyond the last edge w is 0 and j is a valid row: the lanes stay together.
        const std::int64_t j0 = __shfl_sync(kAll, j, k0 & 31), j1 = __shfl_sync(kAll, j, k1 & 31);
        A w0 = __shfl_sync(kAll, w, k0 & 31), w1 = __shfl_sync(kAll, w, k1 & 31);
        if (k0 > 31) w0 = 0;
        if (k1 > 31) w1 = 0;
        const T* row0 = list.other.row(j0);
        const T* row1 = list.other.row(j1);
        Pack<T, V> x0[C], x1[C];
#pragma unroll
        for (int c = 0; c < C; ++c)
            if (inside(c)) {
                if (w0 != 0) x0[c] = Pack<T, V>::load(row0 + feature(c));
                if (w1 != 0) x1[c] = Pack<T, V>::load(row1 + feature(c));
            }
#pragma unroll
        for (int c = 0; c < C; ++c)
            if (inside(c))
#pragma unroll
                for (int v = 0; v < V; ++v) {
                    if (w0 != 0)
                        sum[c].v[v] = accumulate_gradient<M>(sum[c].v[v], w0, self[c].v[v], x0[c].v[v]);
                    if (w1 != 0)
                        sum[c].v[v] = accumulate_gradient<M>(sum[c].v[v], w1, self[c].v[v], x1[c].v[v]);
                }
    }

    // The groups' sums together, in every group.
    __device__ void combine() {
        for (int o = a.lanes; o < 32; o *= 2)
#pragma unroll
            for (int c = 0; c < C; ++c)
#pragma unroll
                for (int v = 0; v < V; ++v) sum[c].v[v] += __shfl_xor_sync(kAll, sum[c].v[v], o);
    }

    __device__ A along() const {
        A dot = 0;
#pragma unroll
        for (int c = 0; c < C; ++c)
#pragma unroll
            for (int v = 0; v < V; ++v) dot += sum[c].v[v] * self[c].v[v];
        for (int o = a.lanes / 2; o > 0; o /= 2) dot += __shfl_xor_sync(kAll, dot, o);
        return dot;
    }

    __device__ void write(A projection) const {
        if (group != 0) return;
#pragma unroll
        for (int c = 0; c < C; ++c) {
            if (!inside(c)) continue;
            T* out = a.out + i * a.self.cols + feature(c);
#pragma unroll
            for (int v = 0; v < V; ++v) out[v] = narrow<T>(sum[c].v[v] - projection * self[c].v[v]);
        }
    }
};

// load(pass) fills a pass's sums. For cosine the part along the row is needed before anything is
// written; where a row takes several passes, they are made twice.
template <Metric M, class T, int V, class Load>
__device__ void finish_row(const Args<T>& a, std::int64_t i, Load load) {
    using A = acc_t<T>;
    const std::int64_t width = std::int64_t(a.lanes) * V * C, dim = a.self.cols;
    A projection = 0;
    if (a.cosine && dim > width) {
        for (std::int64_t first = 0; first < dim; first += width) {
            Pass<M, T, V> pass(a, i, first);
            load(pass);
            projection += pass.along();
        }
    }
    for (std::int64_t first = 0; first < dim; first += width) {
        Pass<M, T, V> pass(a, i, first);
        load(pass);
        if (a.cosine && dim <= width) projection = pass.along();
        pass.write(a.cosine ? projection * a.inv_norm[i] * a.inv_norm[i] : A(0));
    }
}

template <Metric M, class T, int V> __global__ void __launch_bounds__(kThreads) rows_kernel(Args<T> a) {
    const std::int64_t i = std::int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
    if (i >= a.self.rows) return;
    if (is_hub(a, i)) return;
    const std::int64_t b = a.begin(i), e = a.begin(i + 1);
    finish_row<M, T, V>(a, i, [&](Pass<M, T, V>& pass) {
        pass.add(b, e);
        pass.combine();
    });
}

// The sums of the warps of a block, for the features of one pass.
template <class T, int V> using Shares = acc_t<T>[kWarps][32 * V * C];

// One pass over a piece [b, e) that the warps of a block share; parts[slot] is the sum of theirs.
template <Metric M, class T, int V>
__device__ void add_piece(const Args<T>& a, std::int64_t i, std::int64_t b, std::int64_t e, std::int64_t slot,
                          std::int64_t first, Shares<T, V>& shared) {
    const int warp = threadIdx.x / 32;
    const std::int64_t share = (e - b + kWarps - 1) / kWarps;
    const std::int64_t from = b + warp * share < e ? b + warp * share : e;
    const std::int64_t to = from + share < e ? from + share : e;
    Pass<M, T, V> pass(a, i, first);
    pass.add(from, to);
    pass.combine();
    if (pass.group == 0)
#pragma unroll
        for (int c = 0; c < C; ++c)
#pragma unroll
            for (int v = 0; v < V; ++v) shared[warp][(c * a.lanes + pass.part) * V + v] = pass.sum[c].v[v];
    __syncthreads();
    const std::int64_t width = std::int64_t(a.lanes) * V * C;
    for (int d = threadIdx.x; d < width && first + d < a.self.cols; d += kThreads) {
        acc_t<T> sum = 0;
        for (int w = 0; w < kWarps; ++w) sum += shared[w][d];
        a.parts[slot * a.self.cols + first + d] = sum;
    }
    __syncthreads();
}

template <Metric M, class T, int V> __global__ void __launch_bounds__(kThreads) pieces_kernel(Args<T> a) {
    __shared__ Shares<T, V> shared;
    for_pieces(a, a.self.rows, blockIdx.x,
               [&](std::int64_t i, std::int64_t b, std::int64_t e, std::int64_t slot) {
                   const std::int64_t width = std::int64_t(a.lanes) * V * C;
                   for (std::int64_t first = 0; first < a.self.cols; first += width)
                       add_piece<M, T, V>(a, i, b, e, slot, first, shared);
               });
}

template <class T> __global__ void __launch_bounds__(kThreads) hubs_kernel(Args<T> a) {
    using A = acc_t<T>;
    const int lane = threadIdx.x % 32;
    const std::int64_t i = std::int64_t(blockIdx.x) * kWarps + threadIdx.x / 32, dim = a.self.cols;
    if (i >= a.self.rows || !is_hub(a, i)) return;
    auto sum = [&](std::int64_t d) {
        A total = 0;
        for_slots(a, i, [&](std::int64_t slot) { total += a.parts[slot * dim + d]; });
        return total;
    };
    const T* self = a.self.row(i);
    A projection = 0;
    if (a.cosine) {
        for (std::int64_t d = lane; d < dim; d += 32) projection += sum(d) * widen(self[d]);
        projection = warp_sum(projection) * a.inv_norm[i] * a.inv_norm[i];
    }
    for (std::int64_t d = lane; d < dim; d += 32)
        a.out[i * dim + d] = narrow<T>(sum(d) - projection * widen(self[d]));
}

bool may_have_hubs(const Gradient& op, std::int64_t edges) {
    return edges > kBlock && (op.max_degree < 0 || op.max_degree > kBlock);
}

std::int64_t edges_of(const Gradient& op) {
    return op.lists[0].graph.edges + (op.num_lists > 1 ? op.lists[1].graph.edges : 0);
}

template <Metric M, class T, int V> void run(const Gradient& op, const Args<T>& args, void* stream) {
    const std::int64_t rows = op.self.rows, edges = edges_of(op);
    launch("gradient", rows_kernel<M, T, V>, ceil_div(rows, kWarps), stream, args);
    if (!may_have_hubs(op, edges)) return;
    launch("gradient pieces", pieces_kernel<M, T, V>, num_blocks(rows, edges), stream, args);
    launch("gradient hubs", hubs_kernel<T>, ceil_div(rows, kWarps), stream, args);
}

}  // namespace

std::int64_t workspace_bytes(const Gradient& op) {
    const std::int64_t edges = edges_of(op);
    if (!may_have_hubs(op, edges)) return 0;
    return 2 * num_blocks(op.self.rows, edges) * op.self.cols *
           size_of(op.self.dtype == DType::f64 ? DType::f64 : DType::f32);
}

void gradient(const Gradient& op, void* stream) {
    dispatch(op.self.dtype, [&](auto dtype) {
        using T = typename decltype(dtype)::type;
        using A = acc_t<T>;
        Args<T> args{};
        args.self = matrix_of<T>(op.self);
        args.num_lists = op.num_lists;
        bool wide = vectorizable(op.self);
        for (int k = 0; k < op.num_lists; ++k) {
            const Incidence& list = op.lists[k];
            args.lists[k] = {
                graph_of(list.graph), {list.perm, list.graph.wide}, list.mirrored, matrix_of<T>(list.other)};
            wide = wide && vectorizable(list.other);
        }
        args.cosine = op.metric == Metric::cosine;
        args.grad_per_row = op.grad_per_row;
        args.coef = static_cast<const A*>(op.coef);
        args.grad = static_cast<const A*>(op.grad);
        args.inv_norm = static_cast<const A*>(op.inv_norm);
        args.out = static_cast<T*>(op.out);
        args.parts = static_cast<A*>(op.workspace);
        dispatch_vector<T>(wide, [&](auto width) {
            constexpr int V = decltype(width)::value;
            const std::int64_t vectors = ceil_div(op.self.cols, V);
            args.lanes = lanes_for(ceil_div(vectors, C));
            dispatch(op.metric, [&](auto metric) { run<decltype(metric)::value, T, V>(op, args, stream); });
        });
    });
}

}  // namespace fastkd::cuda
