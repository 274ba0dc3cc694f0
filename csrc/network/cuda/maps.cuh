// The layers of a masked network on the GPU: what an Execution plans, each launched once for all groups of
// individuals that share a result.
//
// A group's activations are pixels by channels, [images * height * width, pitch]: the channels that some
// individual of the group keeps, ascending, then zeros up to a multiple of 16 bytes. Layers that work
// channel by channel reach each one by its own address, so that masks, concatenation and shortcuts are
// lists; convolutions want the channels of their input side by side.
#pragma once

#include "common/activation.h"
#include "common/launch.cuh"
#include "network/schedule.h"

namespace fastkd::cuda {

constexpr int kPadBytes = 16;          // channels are padded to these
constexpr int kElements = 4096;        // of a result, per block
constexpr std::int64_t kPiece = 2048;  // pixels whose moments are summed at once; results depend on it
constexpr int kChunkBytes = 64;        // of a row of the matrix product, at once
constexpr std::int64_t kNone = -1;

// One channel: its number at pixel r is data[r * pitch]; zero if data is null.
struct Channel {
    const void* data;
    std::int64_t pitch;
};

// scale * x + shift for each column; null pointers are 1 and 0. "acc" is float, or double for f64.
struct AffineOf {
    const void* bias;   // acc [channels], of a convolution: added before
    const void* scale;  // acc [rows, channels]
    const void* shift;
    std::int64_t stride;  // between rows of scale and shift; the row is the keeper
    // or from the batch: (x - mean) / sqrt(variance + eps) * weight + offset
    const double* mean;  // [individuals, channels], null if not
    const double* variance;
    std::int64_t channels;
    double eps;
    const void* weight;  // acc [channels]
    const void* offset;
};

// Lists lie in one block of memory with the tasks and are stated as distances from its begin, or kNone.

// A result computed channel by channel.
struct MapTask {
    std::int64_t first;     // block
    std::int64_t x, other;  // Channel [outputs]: input; residual or gate
    std::int64_t columns;   // Column [outputs]
    void* out;              // [rows, pitch]
    int outputs, pitch;
};

struct MapLayer {
    const char* lists;
    std::int64_t tasks;  // MapTask [count]
    int count;
    std::int64_t rows;  // images * height * width of the result
    AffineOf affine;
    Activation activation;
    double param;
};

struct ImageWindow : Window<int> {
    std::int64_t images;
};

struct ConvTask {
    std::int64_t first;  // tile
    const void* in;      // the first channel at the first pixel
    std::int64_t in_pitch;
    int inputs, positions;          // numbers read per pixel; with zeros, a multiple of 16 bytes
    const void* packed;             // [outputs, depth]
    std::int64_t depth;             // taps * positions, rounded up to kChunkBytes
    std::int64_t columns;           // Column [outputs]
    std::int64_t residual;          // Channel [outputs] or kNone
    void* out;                      // the first channel at the first pixel
    int out_pitch, outputs, width;  // `width` numbers are written per pixel, zeros from `outputs` on
};

struct ConvLayer {
    const char* lists;
    std::int64_t tasks;
    int count;
    ImageWindow window;
    bool aligned;  // pixels of the input begin at multiples of 16 bytes, and zeros follow its channels
    AffineOf affine;
    Activation activation;
    double param;
};

// packed[o, tap * positions + i] = weight[column o, channel i, tap], 0 where there is none.
struct PackTask {
    std::int64_t first;     // block
    std::int64_t channels;  // std::int32_t [positions]: of the group's, or -1
    std::int64_t columns;   // Column [outputs]
    void* packed;
    int outputs, positions;
    std::int64_t depth;
};

struct PackLayer {
    const char* lists;
    std::int64_t tasks;
    int count;
    const void* weight;  // [all outputs, row]
    std::int64_t row;
    int taps;
};

// The sum over the rows of a piece of (x - mean)^power.
struct MomentTask {
    std::int64_t first;    // block
    std::int64_t x;        // Channel [width]
    std::int64_t columns;  // Column [width]
    double* partial;       // [pieces, width]
    int width;
};
// Where a moment goes: column `at` of a task, to an individual's row.
struct MomentEntry {
    std::int32_t task, at, individual, channel;
};
struct MomentLayer {
    const char* lists;
    std::int64_t tasks, entries;
    int count;
    std::int64_t num_entries;
    std::int64_t rows;
    int power;
    double* mean;  // [individuals, channels]
    double* variance;
    std::int64_t channels;
};

// The network's input or its result, [images, channels, pixels] for each task.
struct TransferTask {
    std::int64_t first;  // block
    void* outer;
    std::int64_t columns;  // load: Column [width], channels of the result
    std::int64_t x;        // store: Channel [width]
    void* out;             // load: [rows, pitch]
    int width, pitch;
};
struct TransferLayer {
    const char* lists;
    std::int64_t tasks;
    int count;
    std::int64_t images, pixels, channels;
};

// Rows of a result per block.
FASTKD_HD std::int64_t map_rows(int pitch) { return pitch >= kElements ? 1 : kElements / pitch; }
inline std::int64_t conv_tiles(const ConvTask& t, std::int64_t rows, int tile) {
    return ceil_div(rows, 128) * ceil_div(t.width, tile);
}
constexpr std::int64_t kPackElements = 1024;  // per block

void load(DType, DType outer, const TransferLayer&, std::int64_t blocks, void* stream);
void store(DType, DType outer, const TransferLayer&, std::int64_t blocks, void* stream);
void pointwise(DType, const MapLayer&, std::int64_t blocks, void* stream);
void product(DType, const MapLayer&, std::int64_t pixels, std::int64_t gate_pixels, std::int64_t blocks,
             void* stream);
void pool(DType, const MapLayer&, const ImageWindow&, bool max, bool count_padding, std::int64_t blocks,
          void* stream);
// weight [channels, taps]
void depthwise(DType, const MapLayer&, const ImageWindow&, const void* weight, std::int64_t blocks,
               void* stream);
void moments(const MomentLayer&, DType, std::int64_t blocks, void* stream);
void pack(DType, const PackLayer&, std::int64_t blocks, void* stream);
// tile: 16, 32, 64 or 128 outputs; see conv_tile
void conv(DType, const ConvLayer&, int tile, bool tf32, std::int64_t tiles, void* stream);
int conv_tile(DType, bool tf32, double mean_width);

// The task of a block: the last that begins at or before it.
template <class Task> __device__ const Task& task_of(const char* lists, std::int64_t tasks, int count) {
    const Task* t = reinterpret_cast<const Task*>(lists + tasks);
    int low = 0, high = count;
    while (high - low > 1) {
        const int mid = (low + high) / 2;
        if (t[mid].first <= std::int64_t(blockIdx.x)) low = mid;
        else high = mid;
    }
    return t[low];
}

// y = scale * x + shift of one column, in the numbers of the network.
template <class A> struct Line {
    A scale, shift;
    __device__ Line(const AffineOf& f, Column c) {
        auto at = [](const void* p, std::int64_t k, double none) {
            return p ? double(static_cast<const A*>(p)[k]) : none;
        };
        double a, b;
        if (f.mean) {
            const std::int64_t k = c.keeper * f.channels + c.channel;
            a = at(f.weight, c.channel, 1) / sqrt(f.variance[k] + f.eps);
            b = at(f.offset, c.channel, 0) - f.mean[k] * a;
        } else {
            const std::int64_t k = c.keeper * f.stride + c.channel;
            a = at(f.scale, k, 1);
            b = at(f.bias, c.channel, 0) * a + at(f.shift, k, 0);
        }
        scale = A(a), shift = A(b);
    }
};

template <class T> struct Reader {
    const T* data;
    std::int64_t pitch;
    __device__ explicit Reader(const Channel& c) : data(static_cast<const T*>(c.data)), pitch(c.pitch) {}
    __device__ acc_t<T> operator()(std::int64_t row) const {
        return data ? widen(data[row * pitch]) : acc_t<T>(0);
    }
};

template <class A> __device__ A activate(Activation activation, A v, A param) {
    A y = v;
    dispatch(activation, [&](auto kind) { y = activated<decltype(kind)::value>(v, param); });
    return y;
}

}  // namespace fastkd::cuda
