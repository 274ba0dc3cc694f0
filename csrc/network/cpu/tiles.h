// How the kernels on planes cut their work: tiles of channels whose sums stay in registers.
#pragma once

#include "common/vec.h"

namespace fastkd::cpu {
namespace {

// A tile's sums: kTile channels x kVectors vectors of images, with room in the registers for the images.
#if defined(__AVX512F__)
constexpr int kTile = 8, kVectors = 3;
#else
constexpr int kTile = 6, kVectors = 2;
#endif
constexpr std::int64_t kNear = 256 << 10;  // bytes that stay in the second level cache

// f(value_tag<n>), 1 <= n <= Most
template <int Most, class F> FASTKD_HD auto dispatch_count(std::int64_t n, F&& f) {
    if constexpr (Most > 1)
        if (n < Most) return dispatch_count<Most - 1>(n, f);
    return f(value_tag<Most>{});
}

// f(first, count) for tiles of nearly equal sizes, of at most Most.
template <int Most, class F> void for_tiles(std::int64_t n, F&& f) {
    const std::int64_t tiles = ceil_div(n, Most);
    for (std::int64_t k = 0, first = 0; k < tiles; ++k) {
        const std::int64_t count = n / tiles + (k < n % tiles);
        f(first, count);
        first += count;
    }
}

// sum[k][v] += x[v] * w[k]
template <class A, class V, int K, int N>
FASTKD_HD void add_products(V (&sum)[K][N], const V (&x)[N], const A* w) {
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k)
#pragma GCC unroll 8
        for (int v = 0; v < N; ++v) sum[k][v] += x[v] * w[k];
}

// Of a kernel that is a point, planes are one line of numbers, whatever the images: one pixel of many.
template <class A, class Layer> Layer as_line(Layer q) {
    q.images = round_up(q.size[0] * q.size[1] * q.images, Vec<A>::lanes);
    for (int k = 0; k < 2; ++k) q.size[k] = q.out_size[k] = 1;
    return q;
}

}  // namespace
}  // namespace fastkd::cpu
