// A SIMD register of the instruction set this file is compiled for, by GCC and Clang's vector
// extension. Arithmetic is the compiler's own; here are only loads that widen, and the reductions.
#pragma once

#include <type_traits>
#include <utility>

#include "common/dispatch.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace fastkd::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kVecBytes = 64;
#elif defined(__AVX2__)
constexpr int kVecBytes = 32;
#else
constexpr int kVecBytes = 16;
#endif

template <class A, int Bytes = kVecBytes> struct Vec {
    typedef A type __attribute__((vector_size(Bytes)));
    static constexpr int lanes = Bytes / int(sizeof(A));
};
template <class A> using vec = typename Vec<A>::type;

// f(value_tag<bytes>): the widest register that divides the images.
template <class A, class F> void dispatch_width(std::int64_t images, F&& f) {
    const std::int64_t bytes = images * std::int64_t(sizeof(A));
    if (bytes % kVecBytes == 0) return f(value_tag<kVecBytes>{});
    if constexpr (kVecBytes > 32) {
        if (bytes % 32 == 0) return f(value_tag<32>{});
    }
    f(value_tag<16>{});
}

template <class V, class A> FASTKD_HD V load_as(const A* p) {
    V v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
}

FASTKD_HD vec<float> load(const float* p) {
    vec<float> v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
}
FASTKD_HD vec<double> load(const double* p) {
    vec<double> v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
}
FASTKD_HD vec<float> load(const bf16_t* p) {
    typedef std::uint16_t narrow_t __attribute__((vector_size(kVecBytes / 2)));
    typedef std::uint32_t wide_t __attribute__((vector_size(kVecBytes)));
    narrow_t n;
    __builtin_memcpy(&n, p, sizeof(n));
    return (vec<float>)(__builtin_convertvector(n, wide_t) << 16);
}
FASTKD_HD vec<float> load(const half_t* p) {
#if defined(__AVX512F__)
    return (vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__) && defined(__F16C__)
    return (vec<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    vec<float> v;
    for (int k = 0; k < Vec<float>::lanes; ++k) v[k] = widen(p[k]);
    return v;
#endif
}

template <class A> FASTKD_HD void store(A* p, vec<A> v) { __builtin_memcpy(p, &v, sizeof(v)); }

// The halves of a register put together by op, down to 16 bytes.
template <int From, class V, std::size_t... K> FASTKD_HD auto lanes_of(V v, std::index_sequence<K...>) {
    return __builtin_shufflevector(v, v, (From + int(K))...);
}
template <class A, int Bytes, class Op>
FASTKD_HD typename Vec<A, 16>::type fold(typename Vec<A, Bytes>::type v, Op op) {
    if constexpr (Bytes == 16) {
        return v;
    } else {
        constexpr int half = Vec<A, Bytes / 2>::lanes;
        constexpr std::make_index_sequence<half> lanes;
        return fold<A, Bytes / 2>(op(lanes_of<0>(v, lanes), lanes_of<half>(v, lanes)), op);
    }
}
template <class A, int Bytes = kVecBytes, class Op>
FASTKD_HD A reduce(typename Vec<A, Bytes>::type v, Op op) {
    const auto q = fold<A, Bytes>(v, op);
    if constexpr (sizeof(A) == 8) return op(q[0], q[1]);
    else return op(op(q[0], q[2]), op(q[1], q[3]));
}
template <class A, int Bytes = kVecBytes> FASTKD_HD A reduce_add(typename Vec<A, Bytes>::type v) {
    return reduce<A, Bytes>(v, [](auto a, auto b) { return a + b; });
}
template <class A> FASTKD_HD A reduce_max(vec<A> v) {
    return reduce<A>(v, [](auto a, auto b) { return a > b ? a : b; });
}

// out[k] = the sum of v[k], four at a time.
template <class A> FASTKD_HD void reduce_add4(const vec<A> (&v)[4], A* out) {
    if constexpr (sizeof(A) == 8) {
        for (int k = 0; k < 4; ++k) out[k] = reduce_add<A>(v[k]);
    } else {
        typedef typename Vec<A, 16>::type quad;
        auto add = [](auto a, auto b) { return a + b; };
        const quad a = fold<A, kVecBytes>(v[0], add), b = fold<A, kVecBytes>(v[1], add);
        const quad c = fold<A, kVecBytes>(v[2], add), d = fold<A, kVecBytes>(v[3], add);
        const quad ab = __builtin_shufflevector(a, b, 0, 1, 4, 5) + __builtin_shufflevector(a, b, 2, 3, 6, 7);
        const quad cd = __builtin_shufflevector(c, d, 0, 1, 4, 5) + __builtin_shufflevector(c, d, 2, 3, 6, 7);
        const quad sum =
            __builtin_shufflevector(ab, cd, 0, 2, 4, 6) + __builtin_shufflevector(ab, cd, 1, 3, 5, 7);
        __builtin_memcpy(out, &sum, sizeof(sum));
    }
}

// v, with `other` in the lanes from `count` on.
template <class A> FASTKD_HD vec<A> keep(vec<A> v, std::int64_t count, A other) {
    typedef std::conditional_t<sizeof(A) == 8, std::int64_t, std::int32_t> Int;
    vec<Int> lane;
    for (int k = 0; k < Vec<A>::lanes; ++k) lane[k] = k;
    return lane < Int(count < Vec<A>::lanes ? count : Vec<A>::lanes) ? v : vec<A>{} + other;
}

// How far ahead of their use rows are requested: in bytes, and in rows at most.
constexpr std::int64_t kAhead = 8192;
constexpr int kMostAhead = 16;

FASTKD_HD void prefetch(const void* p, std::int64_t bytes) {
    const char* c = static_cast<const char*>(p);
    for (std::int64_t k = 0; k < bytes; k += 64) __builtin_prefetch(c + k);
}

}  // namespace
}  // namespace fastkd::cpu
