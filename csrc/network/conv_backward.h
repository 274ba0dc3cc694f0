// The contract of the gradients of a convolution of a masked population.
#pragma once

#include "common/window.h"

namespace fastkd {

// Channels that an individual lacks are not read, and their gradients are not written: they stay the
// zeros that the caller put there. Sums are in `acc`, in an order that depends on the sizes alone.
struct ConvBackward : Window<std::int64_t> {
    DType acc, dtype;  // f32 or f64; of grad and x, any
    std::int64_t individuals, images, channels, outputs, groups;
    const std::uint8_t* in_mask;   // [individuals, channels], or null: all
    const std::uint8_t* out_mask;  // [individuals, outputs], or null: all
    const void* grad;              // [individuals, images, outputs, out_size]
    const void* x;                 // [images, channels, size], or that for every individual
    bool shared;                   // the former
    const void* weight;            // acc [outputs, channels / groups, kernel]
    // Zeros on entry, or null where not wanted.
    void* grad_x;       // like x; acc if shared, else dtype
    void* grad_weight;  // acc, like weight
    void* grad_bias;    // acc [outputs]
};

namespace cpu {

void conv_backward(const ConvBackward&, int threads);

}  // namespace cpu
}  // namespace fastkd
