// Numbers: narrow types, elementary functions and rounding of sizes, for host and device.
//
// Everything is forced inline: the host sources are compiled once per instruction set, and an
// out-of-line copy from one of them must never serve another.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/types.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define FASTKD_HD __host__ __device__ __forceinline__
// Before a template that calls what it is given: a function of the device's may be given on the device.
#define FASTKD_ANY_CALLBACK _Pragma("nv_exec_check_disable")
#else
#define FASTKD_HD inline __attribute__((always_inline))
#define FASTKD_ANY_CALLBACK
#endif

namespace fastkd {

FASTKD_HD std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
FASTKD_HD std::int64_t round_up(std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; }

// Bytes of a number.
FASTKD_HD std::int64_t size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// Storage only; arithmetic is in float.
struct half_t {
    std::uint16_t bits;
};
struct bf16_t {
    std::uint16_t bits;
};

template <class T> struct acc_of {
    using type = float;
};
template <> struct acc_of<double> {
    using type = double;
};
template <class T> using acc_t = typename acc_of<T>::type;

template <class To, class From> FASTKD_HD To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof(to));
    return to;
}

FASTKD_HD float widen(float x) { return x; }
FASTKD_HD double widen(double x) { return x; }
FASTKD_HD float widen(bf16_t x) { return bit_cast<float>(std::uint32_t(x.bits) << 16); }
FASTKD_HD float widen(half_t x) {
#if defined(__CUDA_ARCH__)
    return __half2float(__ushort_as_half(x.bits));
#else
    // The exponent is re-biased by a product with 2^112, which also normalises subnormals.
    const std::uint32_t sign = std::uint32_t(x.bits & 0x8000u) << 16;
    const std::uint32_t rest = std::uint32_t(x.bits & 0x7fffu) << 13;
    float value = bit_cast<float>(rest) * bit_cast<float>(0x77800000u);
    std::uint32_t bits = bit_cast<std::uint32_t>(value);
    if (rest >= 0x0f800000u) bits = rest | 0x7f800000u;  // infinity or NaN
    return bit_cast<float>(bits | sign);
#endif
}

// Round to nearest, ties to even.
template <class T> FASTKD_HD T narrow(acc_t<T> x);
template <> FASTKD_HD float narrow<float>(float x) { return x; }
template <> FASTKD_HD double narrow<double>(double x) { return x; }
template <> FASTKD_HD bf16_t narrow<bf16_t>(float x) {
    std::uint32_t bits = bit_cast<std::uint32_t>(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {std::uint16_t((bits >> 16) | 0x40u)};
    return {std::uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
template <> FASTKD_HD half_t narrow<half_t>(float x) {
#if defined(__CUDA_ARCH__)
    return {__half_as_ushort(__float2half_rn(x))};
#else
    const std::uint32_t bits = bit_cast<std::uint32_t>(x);
    const std::uint16_t sign = std::uint16_t((bits >> 16) & 0x8000u);
    const std::uint32_t rest = bits & 0x7fffffffu;
    if (rest > 0x7f800000u) return {std::uint16_t(sign | 0x7e00u)};
    if (rest >= 0x477ff000u) return {std::uint16_t(sign | 0x7c00u)};  // rounds to infinity
    if (rest < 0x38800000u) {  // subnormal: let the addition of 0.5 do the rounding
        const float shifted = bit_cast<float>(rest) + 0.5f;
        return {std::uint16_t(sign | (bit_cast<std::uint32_t>(shifted) - 0x3f000000u))};
    }
    return {std::uint16_t(sign | ((rest + 0xc8000fffu + ((rest >> 13) & 1u)) >> 13))};
#endif
}

// exp and log. On the host the float versions are branch-free, so that loops over them vectorise:
// exp is within 1 ulp of its range [-87.3, 88.7] and 0 below, log within 2 ulp on normal positives.
#if defined(__CUDA_ARCH__)
FASTKD_HD float exp_(float x) { return ::expf(x); }
FASTKD_HD float log_(float x) { return ::logf(x); }
#else
FASTKD_HD float exp_(float x) {
    const float clamped = x < -87.3f ? -87.3f : (x > 88.72f ? 88.72f : x);
    const float shifted = clamped * 1.44269504088896341f + 12582912.0f;  // rounds to an integer
    const float n = shifted - 12582912.0f;
    float f = clamped - n * 0.693359375f;
    f = f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * (f * f) + f + 1.0f;
    // 2^n in two factors: n can be 128.
    const std::int32_t i = bit_cast<std::int32_t>(shifted) - 0x4b400000;
    const std::int32_t h = i >> 1;
    const float result = p * bit_cast<float>((h + 127) << 23) * bit_cast<float>((i - h + 127) << 23);
    // NaN passes through the last comparison; what is below the range is 0.
    return x < -87.3f ? 0.0f : (x > 88.72f ? bit_cast<float>(0x7f800000u) : (x == x ? result : x));
}
FASTKD_HD float log_(float x) {
    const std::int32_t bits = bit_cast<std::int32_t>(x) - 0x3f3504f3;  // centre on sqrt(1/2)
    const std::int32_t e = bits >> 23;
    const float m = bit_cast<float>((bits & 0x007fffff) + 0x3f3504f3) - 1.0f;
    const float z = m * m;
    float p = 7.0376836292e-2f;
    p = p * m - 1.1514610310e-1f;
    p = p * m + 1.1676998740e-1f;
    p = p * m - 1.2420140846e-1f;
    p = p * m + 1.4249322787e-1f;
    p = p * m - 1.6668057665e-1f;
    p = p * m + 2.0000714765e-1f;
    p = p * m - 2.4999993993e-1f;
    p = p * m + 3.3333331174e-1f;
    const float k = float(e);
    float y = m * z * p + k * -2.12194440e-4f - 0.5f * z;
    return m + y + k * 0.693359375f;
}
#endif
FASTKD_HD double exp_(double x) { return ::exp(x); }
FASTKD_HD double log_(double x) { return ::log(x); }
FASTKD_HD float sqrt_(float x) { return ::sqrtf(x); }
FASTKD_HD double sqrt_(double x) { return ::sqrt(x); }

}  // namespace fastkd
