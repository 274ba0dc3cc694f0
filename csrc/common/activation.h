// The activations of network.h, each written once.
#pragma once

#include "common/math.h"
#include "network/network.h"

namespace fastkd {

FASTKD_HD float erf_(float x) { return ::erff(x); }
FASTKD_HD double erf_(double x) { return ::erf(x); }
FASTKD_HD float tanh_(float x) { return ::tanhf(x); }
FASTKD_HD double tanh_(double x) { return ::tanh(x); }

// Comparisons such that NaN stays.
template <class V> FASTKD_HD V clamp(V x, V low, V high) {
    x = x < low ? low : x;
    return x > high ? high : x;
}

template <Activation Kind, class A> FASTKD_HD A activated(A v, A param) {
    if constexpr (Kind == Activation::relu) return v < 0 ? A(0) : v;
    else if constexpr (Kind == Activation::relu6) return clamp(v, A(0), A(6));
    else if constexpr (Kind == Activation::leaky_relu) return v < 0 ? v * param : v;
    else if constexpr (Kind == Activation::sigmoid) return 1 / (1 + exp_(-v));
    else if constexpr (Kind == Activation::silu) return v / (1 + exp_(-v));
    else if constexpr (Kind == Activation::hardsigmoid) return clamp(v + 3, A(0), A(6)) / 6;
    else if constexpr (Kind == Activation::hardswish) return v * (clamp(v + 3, A(0), A(6)) / 6);
    else if constexpr (Kind == Activation::tanh) return tanh_(v);
    else if constexpr (Kind == Activation::gelu)
        return v * A(0.5) * (1 + erf_(v * A(0.70710678118654752440)));
    else if constexpr (Kind == Activation::gelu_tanh) {
        const A inner = A(0.79788456080286535588) * (v + A(0.044715) * v * v * v);
        return A(0.5) * v * (1 + tanh_(inner));
    } else return v;
}

}  // namespace fastkd
