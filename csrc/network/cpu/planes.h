// The layers of a network on planes: what walk.cpp and layers.cpp call, compiled once per instruction set.
//
// A plane is one channel of a block of images, [height, width, images]: the images are the vector, so
// strides, borders and odd counts of channels cost nothing. Channels are reached through pointers to
// planes, so masks, concatenation and shortcuts are lists of pointers. `images` numbers, a multiple of
// 16 bytes, stand at every pixel, and a plane may be read and written up to the next 64 bytes.
#pragma once

#include "common/isa.h"
#include "common/window.h"
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

struct PlaneConv : Window<std::int64_t> {
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

struct PlanePool : Window<std::int64_t> {
    std::int64_t images;
    bool max, count_padding;  // the maximum, or else the average, which may count the padding
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

// Pixel p of image n < valid stands at outer[n * image_step + p]. When a plane is loaded, the rest of its
// images become zero.
struct PlaneTransfer {
    void* outer;
    DType outer_dtype;
    std::int64_t image_step, pixels, images, valid;
    void* plane;
};

#define FASTKD_PLANE_OPERATIONS(X)                                           \
    X(pack_weights, (DType dtype, const PackWeights& op), (dtype, op))       \
    X(plane_conv, (DType dtype, const PlaneConv& op), (dtype, op))           \
    X(plane_pool, (DType dtype, const PlanePool& op), (dtype, op))           \
    X(plane_pointwise, (DType dtype, const PlanePointwise& op), (dtype, op)) \
    X(plane_product, (DType dtype, const PlaneProduct& op), (dtype, op))     \
    X(plane_moment, (DType dtype, const PlaneMoment& op), (dtype, op))       \
    X(plane_load, (DType dtype, const PlaneTransfer& op), (dtype, op))       \
    X(plane_store, (DType dtype, const PlaneTransfer& op), (dtype, op))

FASTKD_DECLARE_ISAS(FASTKD_PLANE_OPERATIONS)

}  // namespace fastkd::cpu
