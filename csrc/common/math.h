// Formulas shared by host and device, each written once.
//
// Everything is forced inline: the host sources are compiled once per instruction set, and an
// out-of-line copy from one of them must never serve another.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "lsp/lsp.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define FASTKD_HD __host__ __device__ __forceinline__
#else
#define FASTKD_HD inline __attribute__((always_inline))
#endif

namespace fastkd {

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

// p (log p - log q) + q - p >= 0: an edge's part of KL(p || q) without cancellation, since the added
// terms sum to 0 over a row. Equals p (d + expm1(-d)) with d = log p - log q; the second form below
// cannot overflow.
template <class A> FASTKD_HD A divergence_term(A p, A q, A d) {
    const A limit = sizeof(A) == 4 ? A(0.5) : A(0.03);
    const A series =
        d * d *
        (A(0.5) +
         d * (A(-1.0 / 6) +
              d * (A(1.0 / 24) +
                   d * (A(-1.0 / 120) + d * (A(1.0 / 720) + d * (A(-1.0 / 5040) + d * A(1.0 / 40320)))))));
    const A direct = p * (d - 1) + q;
    return d < limit && d > -limit ? p * series : direct;
}

// One feature pair's part of the raw reduction.
template <Metric M, class V> FASTKD_HD V accumulate(V sum, V a, V b) {
    if constexpr (M == Metric::dot || M == Metric::cosine) {
        return sum + a * b;
    } else if constexpr (M == Metric::sqdist) {
        const V t = a - b;
        return sum + t * t;
    } else {
        const V t = a - b;
        return sum + (t < 0 ? -t : t);
    }
}

// One feature's part of the gradient of row a: weight * B(a, b).
template <Metric M, class V> FASTKD_HD V accumulate_gradient(V sum, V weight, V a, V b) {
    if constexpr (M == Metric::dot || M == Metric::cosine) {
        return sum + weight * b;
    } else if constexpr (M == Metric::sqdist) {
        return sum + weight * (a - b);
    } else {
        return sum + (a > b ? weight : (a < b ? -weight : weight * 0));
    }
}

template <class A> FASTKD_HD A int_power(A base, int degree) {
    A result = 1;
    for (int k = 0; k < degree; ++k) result *= base;
    return result;
}

// SIM(r), and dSIM/dr from r and SIM(r). The shape is a template argument so that loops over edges stay
// branch-free.
template <Shape S, bool Root, class A> FASTKD_HD A kernel_value(A r, A scale, A param, int degree) {
    const A u = Root ? sqrt_(scale * r) : scale * r;
    if constexpr (S == Shape::linear) return param * u;
    else if constexpr (S == Shape::power) return int_power(u + param, degree);
    else return exp_(-param * u);
}
template <Shape S, bool Root, class A> FASTKD_HD A kernel_slope(A r, A value, A scale, A param, int degree) {
    const A u = Root ? sqrt_(scale * r) : scale * r;
    // An unsquared distance has the subgradient 0 at 0.
    const A du = Root ? (u > 0 ? scale / (2 * u) : A(0)) : scale;
    if constexpr (S == Shape::linear) return param * du;
    else if constexpr (S == Shape::power) return degree * int_power(u + param, degree - 1) * du;
    else return -param * value * du;
}

// dr/dx carries a constant factor: r = |a - b|^2 gives 2 (a - b).
FASTKD_HD double metric_factor(Metric m) { return m == Metric::sqdist ? 2.0 : 1.0; }

// What is known of a row's distributions: maxima, and sums of exp(SIM - maximum). The mean of
// d = log p_s - log p_t under p_s is the divergence once more, but with the same rounding as its
// terms: a gradient centred on it sums to 0, where one centred on the (more exact) divergence would not.
template <class A> struct RowStats {
    A max_s, max_t, inv_sum_s, inv_sum_t;
    A log_ratio;  // log(sum_t / sum_s)
    A mean;
};

// The probabilities of an edge, and d. SIM less the row's maximum comes first: with it the digits that
// d is made of are safe.
template <class A> struct Probabilities {
    A s, t, d;
    FASTKD_HD Probabilities(A sim_s, A sim_t, const RowStats<A>& row) {
        const A above_s = sim_s - row.max_s, above_t = sim_t - row.max_t;
        s = exp_(above_s) * row.inv_sum_s;
        t = exp_(above_t) * row.inv_sum_t;
        d = (above_s - above_t) + row.log_ratio;
    }
};

// An edge's part of the divergence, and dS/dSIM_s.
template <class A> FASTKD_HD A edge_divergence(bool teacher_student, A p_s, A p_t, A d) {
    return teacher_student ? divergence_term(p_t, p_s, -d) : divergence_term(p_s, p_t, d);
}
template <class A> FASTKD_HD A edge_gradient(bool teacher_student, A p_s, A p_t, A d, A mean) {
    return teacher_student ? p_s - p_t : p_s * (d - mean);
}

// Stands for log 0: finite, so that differences of two of them are 0 and not NaN.
template <class A> FASTKD_HD A log_zero() { return A(-1e30); }
template <class A> FASTKD_HD A log_weight(A w) { return w > 0 ? log_(w) : log_zero<A>(); }

}  // namespace fastkd
