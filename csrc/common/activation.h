// The activations of a network, each written once for host and device.
#pragma once

#include "common/dispatch.h"

namespace fastkd {

enum class Activation : int {
    none = 0,
    relu = 1,
    relu6 = 2,
    leaky_relu = 3,  // param: the slope below 0
    sigmoid = 4,
    silu = 5,
    hardsigmoid = 6,
    hardswish = 7,
    tanh = 8,
    gelu = 9,
    gelu_tanh = 10,
};

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

// f(value_tag<Activation>). The caller has checked the activation: a device cannot throw.
FASTKD_ANY_CALLBACK
template <class F> FASTKD_HD void dispatch(Activation activation, F&& f) {
    switch (activation) {
        case Activation::none:
            return f(value_tag<Activation::none>{});
        case Activation::relu:
            return f(value_tag<Activation::relu>{});
        case Activation::relu6:
            return f(value_tag<Activation::relu6>{});
        case Activation::leaky_relu:
            return f(value_tag<Activation::leaky_relu>{});
        case Activation::sigmoid:
            return f(value_tag<Activation::sigmoid>{});
        case Activation::silu:
            return f(value_tag<Activation::silu>{});
        case Activation::hardsigmoid:
            return f(value_tag<Activation::hardsigmoid>{});
        case Activation::hardswish:
            return f(value_tag<Activation::hardswish>{});
        case Activation::tanh:
            return f(value_tag<Activation::tanh>{});
        case Activation::gelu:
            return f(value_tag<Activation::gelu>{});
        case Activation::gelu_tanh:
            return f(value_tag<Activation::gelu_tanh>{});
    }
}

}  // namespace fastkd
