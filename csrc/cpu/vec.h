// A SIMD register of the instruction set this file is compiled for, by GCC and Clang's vector
// extension. Arithmetic is the compiler's own; here are only loads that widen, and the reductions.
#pragma once

#include "../math.h"
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

template <class A> struct Vec {
    typedef A type __attribute__((vector_size(kVecBytes)));
    static constexpr int lanes = kVecBytes / int(sizeof(A));
};
template <class A> using vec = typename Vec<A>::type;

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

template <class A> FASTKD_HD A reduce_add(vec<A> v) {
    A lanes[Vec<A>::lanes];
    store(lanes, v);
#pragma GCC unroll 8
    for (int width = Vec<A>::lanes / 2; width > 0; width /= 2)
#pragma GCC unroll 8
        for (int k = 0; k < width; ++k) lanes[k] += lanes[k + width];
    return lanes[0];
}

FASTKD_HD void prefetch(const void* p, std::int64_t bytes) {
    const char* c = static_cast<const char*>(p);
    for (std::int64_t k = 0; k < bytes; k += 64) __builtin_prefetch(c + k);
}

}  // namespace
}  // namespace fastkd::cpu
