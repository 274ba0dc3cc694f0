// The formulas of the local structure preserving loss, each written once for host and device, and the
// choice of those that are template arguments.
#pragma once

#include <limits>

#include "common/dispatch.h"
#include "lsp/lsp.h"

namespace fastkd {

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

// Whether the values of a row, from low to high, differ by more than rounding: to a softmax, which sees
// absolute differences.
template <class A> FASTKD_HD bool informative(A low, A high) {
    const A above = high < 0 ? -high : high, below = low < 0 ? -low : low;
    const A size = above > below ? above : below;
    return high - low > 8 * std::numeric_limits<A>::epsilon() * (size > 1 ? size : A(1));
}

// f(value_tag<Metric>). Cosine reduces like dot; its norms are applied by the caller.
template <class F> void dispatch(Metric metric, F&& f) {
    switch (metric) {
        case Metric::dot:
        case Metric::cosine:
            return f(value_tag<Metric::dot>{});
        case Metric::sqdist:
            return f(value_tag<Metric::sqdist>{});
        case Metric::l1:
            return f(value_tag<Metric::l1>{});
    }
    throw std::invalid_argument("fastkd: unknown metric");
}

// f(value_tag<Shape>, value_tag<bool>), the latter for root. The caller has checked the shape: a device
// cannot throw.
FASTKD_ANY_CALLBACK
template <class F> FASTKD_HD void dispatch(const Kernel& kernel, F&& f) {
    auto with_root = [&](auto shape) {
        if (kernel.root) f(shape, value_tag<true>{});
        else f(shape, value_tag<false>{});
    };
    switch (kernel.shape) {
        case Shape::linear:
            return with_root(value_tag<Shape::linear>{});
        case Shape::power:
            return with_root(value_tag<Shape::power>{});
        case Shape::exponential:
            return with_root(value_tag<Shape::exponential>{});
    }
}

}  // namespace fastkd
