// The contract of the population executor: a network as a list of operations over numbered values, run
// for many individuals that each keep some of its channels.
//
// Every channel of a value has a gene: the channel exists for an individual whose mask has that gene.
// A channel that does not exist is neither read nor computed; to whatever reads it, it is zero. So a
// masked network is the physically smaller one, and its result is bitwise that of the smaller one
// alone: it does not depend on the other individuals, their order, or the number of threads.
#pragma once

#include <memory>
#include <vector>

#include "common/activation.h"

namespace fastkd {

constexpr std::int32_t kAlways = -1, kNever = -2;  // genes of a channel that always, that never exists

// [channels, height, width] per image.
struct Value {
    std::int64_t channels, height, width;
    std::vector<std::int32_t> genes;  // [channels]: kAlways, kNever or the index of a gene
};

struct Program;  // schedule.h

enum class Operation : int {
    conv = 0,  // weight [out, in / groups, kernel], bias [out]; a linear layer has a kernel of the map's size
    norm = 1,  // scale * x + shift; batch normalisation if batch
    activation = 2,  // activation, param
    max_pool = 3,
    avg_pool = 4,  // a kernel of 0 x 0: adaptive to the output's size
    add = 5,       // of all inputs
    multiply = 6,  // of two inputs, the second of the same size or 1 x 1
    select = 7,    // select [out][2]: (input, channel), or (-1, 0) for zeros; cat, slices, shuffles, padding
    flatten = 8,   // channel c and pixel k become channel c * pixels + k
};

// Weights are of the network's dtype, biases, scales and shifts of that of its sums: "acc", float, or
// double for f64. They belong to the caller, who keeps them as long as the network.
struct Node {
    Operation kind;
    std::vector<int> inputs;
    int output;
    std::int64_t kernel[2], stride[2], padding[2], dilation[2];  // rows, columns
    std::int64_t groups;
    bool count_padding;  // avg_pool
    bool batch;  // norm: statistics of the batch where asked for; weight, bias and param (eps) are then used
    Activation activation;
    double param;
    const void* weight;  // or null; of a norm acc, too
    const void* bias;    // or null
    const void* scale;   // norm: [out]
    const void* shift;   // norm: [out]
    std::vector<std::int32_t> select;
};

// Scale and shift of one norm in place of its own: row p belongs to individual p.
struct Affine {
    const void* scale;    // acc [individuals or 1, channels], or null for the norm's own
    const void* shift;    // the same
    std::int64_t stride;  // between rows, 0 if all share one
};

// Mean and variance (biased) of the batch that reached one norm; 0 and 1 for channels that do not exist.
struct Moments {
    void* mean;      // double [individuals, channels], out
    void* variance;  // the same
};

struct NetworkRun {
    const std::uint8_t* masks;  // [individuals, genes], on the host
    std::int64_t individuals;
    const void* x;          // [images, channels, height, width], or that for every individual
    DType x_dtype;          // any
    std::int64_t x_stride;  // elements between individuals, 0 if all share x
    std::int64_t images;
    void* out;               // [individuals, images, channels, height, width], or null
    DType out_dtype;         // any
    const Affine* affines;   // [norms], or null
    const Moments* moments;  // [norms] or null: with it, batch norms use the batch
    // Individuals that agree on the genes on which a norm's input depends have equal rows of affines, so
    // that they may share it. Where the host has the rows it compares them, and this says nothing.
    bool affines_agree;
};

// What is done at once, and what individuals share: step k is done once for all that agree on the first
// seen[k] genes of `order`.
struct Outline {
    std::vector<std::int32_t> order;
    std::vector<int> producer;  // of each value: a step, or -1
    std::vector<std::int64_t> seen;
};

namespace cpu {

class Network {
  public:
    // dtype: f32 or f64, of weights and sums. Value 0 is the input.
    Network(DType dtype, std::int64_t genes, std::vector<Value> values, std::vector<Node> nodes, int output);
    ~Network();
    void run(const NetworkRun&, int threads) const;
    // What run takes at most beyond its arguments.
    std::int64_t bytes(std::int64_t images, bool recalibrate, std::int64_t individuals, int threads) const;
    std::int64_t taken() const;  // by the values of the last run
    std::int64_t norms() const;
    Outline outline() const;

  private:
    struct Plan;
    std::unique_ptr<Plan> plan_;
};

}  // namespace cpu

#ifdef FASTKD_CUDA
namespace cuda {

// Memory of the device, from the caller; what is given back may be used again in the order of the stream.
struct Memory {
    virtual ~Memory() = default;
    virtual void* take(std::int64_t bytes) = 0;
    virtual void* put(const void* data, std::int64_t bytes) = 0;  // a copy of what is on the host
    virtual void give(void*) noexcept = 0;
};

class Network {
  public:
    // dtype: any; sums are float, or double for f64. What nodes point to is on the device.
    Network(DType dtype, std::int64_t genes, std::vector<Value> values, std::vector<Node> nodes, int output);
    ~Network();
    // All but the masks is on the device. tf32: tensor cores for f32, at ten bits of mantissa.
    void run(const NetworkRun&, bool tf32, Memory&, void* stream) const;
    // What run takes at most beyond its arguments.
    std::int64_t bytes(std::int64_t images, bool recalibrate, std::int64_t individuals) const;
    std::int64_t norms() const;
    Outline outline() const;

  private:
    std::unique_ptr<const Program> program_;
};

}  // namespace cuda
#endif
}  // namespace fastkd
