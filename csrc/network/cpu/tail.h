// What comes after a layer's sums: an activation.
#pragma once

#include <limits>

#include "common/activation.h"

namespace fastkd::cpu {
namespace {

// The activations that are a clamp are done where the sums are stored; the others clamp nothing there.
template <class A> struct Range {
    A low, high;
};
template <class A> Range<A> range_of(Activation activation) {
    constexpr A infinity = std::numeric_limits<A>::infinity();
    if (activation == Activation::relu) return {0, infinity};
    if (activation == Activation::relu6) return {0, 6};
    return {-infinity, infinity};
}
inline bool is_clamp(Activation activation) { return activation <= Activation::relu6; }

// What a clamp cannot do.
template <class A> void activate(Activation activation, double param, A* x, std::int64_t n) {
    if (is_clamp(activation)) return;
    dispatch(activation, [&](auto kind) {
        const A slope = A(param);
        for (std::int64_t k = 0; k < n; ++k) x[k] = activated<decltype(kind)::value>(x[k], slope);
    });
}

}  // namespace
}  // namespace fastkd::cpu
