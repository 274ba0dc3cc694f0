// From run-time tags to template arguments.
#pragma once

#include <stdexcept>

#include "common/math.h"

namespace fastkd {

template <class T> struct type_tag {
    using type = T;
};
template <auto V> struct value_tag {
    static constexpr auto value = V;
};

template <class F> void dispatch(DType dtype, F&& f) {
    switch (dtype) {
        case DType::f16:
            return f(type_tag<half_t>{});
        case DType::bf16:
            return f(type_tag<bf16_t>{});
        case DType::f32:
            return f(type_tag<float>{});
        case DType::f64:
            return f(type_tag<double>{});
    }
    throw std::invalid_argument("fastkd: unknown dtype");
}

template <class F> void dispatch_acc(DType acc, F&& f) {
    if (acc == DType::f64) return f(type_tag<double>{});
    return f(type_tag<float>{});
}

template <class F> void dispatch_index(bool wide, F&& f) {
    if (wide) return f(type_tag<std::int64_t>{});
    return f(type_tag<std::int32_t>{});
}

}  // namespace fastkd
