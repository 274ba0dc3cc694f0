// What all CUDA kernels share: launching, indices, warp reductions and 16-byte loads.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "common/blocks.h"
#include "common/dispatch.h"

namespace fastkd::cuda {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAll = 0xffffffffu;

inline void check(cudaError_t error, const char* what) {
    if (error != cudaSuccess)
        throw std::runtime_error(std::string("fastkd: ") + what + ": " + cudaGetErrorName(error) + ": " +
                                 cudaGetErrorString(error));
}

struct Grid {
    Grid(std::int64_t blocks, std::int64_t shared = 0) : blocks(blocks), shared(shared) {}
    std::int64_t blocks, shared;  // bytes of dynamic shared memory per block
};

// Nothing to do launches nothing: an empty grid is an error in CUDA.
template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), Grid grid, void* stream, A&&... args) {
    if (grid.blocks == 0) return;
    if (grid.blocks > 0x7fffffff)
        throw std::runtime_error(std::string("fastkd: ") + name + ": grid too large");
    if (grid.shared > 48 << 10)  // what is granted without asking
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(grid.shared)),
              name);
#ifdef FASTKD_SIMT
    (void)stream;
    simt::launch(kernel, dim3(unsigned(grid.blocks)), dim3(kThreads), std::size_t(grid.shared), P(args)...);
#else
    const auto on = static_cast<cudaStream_t>(stream);
    kernel<<<unsigned(grid.blocks), kThreads, std::size_t(grid.shared), on>>>(P(args)...);
#endif
    check(cudaGetLastError(), name);
}

// The block's dynamic shared memory.
#ifdef FASTKD_SIMT
#define FASTKD_DYNAMIC_SHARED(name) char* const name = static_cast<char*>(simt::dynamic_shared())
#else
#define FASTKD_DYNAMIC_SHARED(name) extern __shared__ __align__(16) char name[]
#endif

// An index array of either width; the branch is the same for all threads.
struct Indices {
    const void* data;
    bool wide;
    __device__ std::int64_t operator[](std::int64_t k) const {
        return wide ? static_cast<const std::int64_t*>(data)[k]
                    : std::int64_t(static_cast<const std::int32_t*>(data)[k]);
    }
    __device__ explicit operator bool() const { return data != nullptr; }
};

struct Graph {
    Indices rowptr, col;
    std::int64_t rows, edges;
    __device__ std::int64_t begin(std::int64_t i) const { return rowptr[i]; }
};
inline Graph graph_of(const Csr& g) { return {{g.rowptr, g.wide}, {g.col, g.wide}, g.rows, g.edges}; }

// The last row in [low, high) that begins at or before edge e.
__device__ inline std::int64_t row_of(const Graph& g, std::int64_t e, std::int64_t low, std::int64_t high) {
    while (high - low > 1) {
        const std::int64_t mid = (low + high) / 2;
        if (g.begin(mid) <= e) low = mid;
        else high = mid;
    }
    return low;
}

// The rows of a warp's 32 slots from `first` on: one search over all rows, then a short one per lane.
__device__ inline std::int64_t row_of_lane(const Graph& g, std::int64_t first, int lane) {
    const std::int64_t last = (first + 31 < g.edges ? first + 31 : g.edges - 1);
    const std::int64_t low = row_of(g, first, 0, g.rows);
    const std::int64_t high = row_of(g, last, low, g.rows) + 1;
    const std::int64_t e = first + lane < last ? first + lane : last;
    return row_of(g, e, low, high);
}

template <class A> __device__ A warp_sum(A v) {
    for (int o = 16; o > 0; o /= 2) v += __shfl_xor_sync(kAll, v, o);
    return v;
}

// The sum over the block, in all threads. scratch: one element per warp, free again on return.
template <class A> __device__ A block_sum(A v, A* scratch) {
    v = warp_sum(v);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
    __syncthreads();
    A sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += scratch[w];
    __syncthreads();
    return sum;
}

// V consecutive features, widened; one 16-byte load unless V is 1.
template <class T, int V> struct Pack {
    acc_t<T> v[V];
    __device__ static Pack load(const T* p) {
        Pack out;
        if constexpr (V == 1) {
            out.v[0] = widen(*p);
        } else {
            static_assert(V * sizeof(T) == 16);
            const uint4 raw = __ldg(reinterpret_cast<const uint4*>(p));
            T narrow[V];
            memcpy(narrow, &raw, 16);
#pragma unroll
            for (int k = 0; k < V; ++k) out.v[k] = widen(narrow[k]);
        }
        return out;
    }
    __device__ static Pack zero() {
        Pack out;
#pragma unroll
        for (int k = 0; k < V; ++k) out.v[k] = 0;
        return out;
    }
};

template <class T> struct Matrix {
    const T* data;
    std::int64_t rows, cols, stride;
    __device__ const T* row(std::int64_t i) const { return data + i * stride; }
};
template <class T> Matrix<T> matrix_of(const Features& x) {
    return {static_cast<const T*>(x.data), x.rows, x.cols, x.stride};
}

// Whether all rows may be read 16 bytes at a time.
inline bool vectorizable(const Features& x) {
    const std::int64_t size = size_of(x.dtype);
    return reinterpret_cast<std::uintptr_t>(x.data) % 16 == 0 && x.stride * size % 16 == 0 &&
           x.cols * size % 16 == 0;
}

// f(value_tag<V>): 16 bytes of T, or single elements.
template <class T, class F> void dispatch_vector(bool wide, F&& f) {
    if (wide) f(value_tag<int(16 / sizeof(T))>{});
    else f(value_tag<1>{});
}

// Lanes that share an edge: a power of two that covers `vectors` loads, at most a warp.
inline int lanes_for(std::int64_t vectors) {
    int lanes = 1;
    while (lanes < 32 && lanes < vectors) lanes *= 2;
    return lanes;
}

}  // namespace fastkd::cuda
