// The layers of a network on planes: what network.cpp schedules, compiled once per instruction set.
//
// A plane is one channel of a block of images, [height, width, images]: the images are the vector, so
// strides, borders and odd counts of channels cost nothing. Channels are reached through pointers to
// planes, so masks, concatenation and shortcuts are lists of pointers. `images` numbers, a multiple of
// 16 bytes, stand at every pixel, and a plane may be read and written up to the next 64 bytes.
#pragma once

#include "network/network.h"

namespace fastkd::cpu {

constexpr std::int64_t kLine = 64;      // bytes; planes start at multiples
constexpr std::int64_t kMostLines = 3;  // of images in a block: three registers of AVX-512

// After the sums: y = activation(y + residual).
struct Tail {
    const void* const* residual;  // [outputs] or null; an entry may be null
    Activation activation;
    double param;
};

struct PlaneConv {
    std::int64_t size[2], out_size[2];  // rows, columns
    std::int64_t kernel[2], stride[2], padding[2], dilation[2];
    std::int64_t images, inputs, outputs;
    const void* const* in;  // [inputs]
    void* const* out;       // [outputs]
    const void* packed;     // see PackWeights
    const void* scale;      // [outputs]: y = scale * sum + shift
    const void* shift;      // [outputs]
    Tail tail;
};

// The weights of some channels in the order in which PlaneConv reads them.
struct PackWeights {
    const void* weight;       // [all outputs, row]
    std::int64_t row, taps;   // row = taps * all inputs
    const std::int32_t* in;   // [inputs]
    const std::int32_t* out;  // [outputs]
    std::int64_t inputs, outputs;
    void* packed;  // [inputs * outputs * taps], out
};

struct PlanePool {
    std::int64_t size[2], out_size[2];
    std::int64_t kernel[2], stride[2], padding[2], dilation[2];
    std::int64_t images;
    bool max, count_padding;
    const void* in;
    void* out;
};

// y = activation(scale * x + shift + residual) for one plane; x null is zero.
struct PlanePointwise {
    std::int64_t pixels, images;
    const void* x;
    double scale, shift;  // exact values of the network's dtype
    Tail tail;            // one residual
    void* out;
};

// y = x * gate
struct PlaneProduct {
    std::int64_t pixels, images;
    const void* x;
    const void* gate;
    bool broadcast;  // gate has one pixel
    void* out;
};

// sums[n] = the sum over the pixels of (x - mean)^power of image n, power 1 or 2.
struct PlaneMoment {
    std::int64_t pixels, images;
    const void* x;
    double mean;
    int power;
    double* sums;  // [images], out
};

// One image's channel at outer[c * channel_step + n * image_step + pixel], n < valid; the rest of a
// plane's images are zero.
struct PlaneTransfer {
    void* outer;
    DType outer_dtype;
    std::int64_t image_step, pixels, images, valid;
    void* plane;
};

#define FASTKD_PLANE_OPS(X)                            \
    X(pack_weights, (DType, const PackWeights&))       \
    X(plane_conv, (DType, const PlaneConv&))           \
    X(plane_pool, (DType, const PlanePool&))           \
    X(plane_pointwise, (DType, const PlanePointwise&)) \
    X(plane_product, (DType, const PlaneProduct&))     \
    X(plane_moment, (DType, const PlaneMoment&))       \
    X(plane_load, (DType, const PlaneTransfer&))       \
    X(plane_store, (DType, const PlaneTransfer&))

#define FASTKD_DECLARE(NAME, ARGUMENTS) void NAME ARGUMENTS;
FASTKD_PLANE_OPS(FASTKD_DECLARE)
namespace generic {
FASTKD_PLANE_OPS(FASTKD_DECLARE)
}
namespace avx2 {
FASTKD_PLANE_OPS(FASTKD_DECLARE)
}
namespace avx512 {
FASTKD_PLANE_OPS(FASTKD_DECLARE)
}
#undef FASTKD_DECLARE

}  // namespace fastkd::cpu
