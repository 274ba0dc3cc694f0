// The gradients of a convolution on planes (see planes.h): what conv_backward.cpp schedules, compiled
// once per instruction set.
#pragma once

#include "network/cpu/planes.h"

namespace fastkd::cpu {

// What reads position i of one axis of x: tap[k] for the result's position at[k], begin[i] <= k < begin[i +
// 1].
struct Readers {
    const std::int32_t *begin, *tap, *at;
};

// One individual, one block of images, the kept channels of one group. Planes hold zeros behind their
// last number, up to the next 64 bytes.
struct PlaneGradients : Window<std::int64_t> {
    Readers readers[2];
    std::int64_t images, inputs, outputs;
    std::int64_t row;         // of the weight: taps * all inputs of the group
    const std::int32_t* in;   // [inputs], in a row of the weight
    const std::int32_t* out;  // [outputs], rows of the weight
    const void* const* x;     // [inputs]
    const void* const* grad;  // [outputs]
    void* const* grad_x;      // [inputs], added to
    const void* weight;
    void* grad_weight;  // added to
    void* packed;       // room for inputs * outputs * taps
};

// sum += the sum of a plane
struct PlaneSum {
    std::int64_t numbers;
    const void* plane;
    void* sum;
};

#define FASTKD_PLANE_BACKWARD_OPERATIONS(X)                                    \
    X(plane_grad_input, (DType dtype, const PlaneGradients& op), (dtype, op))  \
    X(plane_grad_weight, (DType dtype, const PlaneGradients& op), (dtype, op)) \
    X(plane_sum, (DType dtype, const PlaneSum& op), (dtype, op))

FASTKD_DECLARE_ISAS(FASTKD_PLANE_BACKWARD_OPERATIONS)

}  // namespace fastkd::cpu
