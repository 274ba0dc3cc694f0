// Convolutions of a population: one launch per layer, a grouped matrix product over (group of individuals,
// tile of pixels, tile of outputs). The rows of the product are pixels, gathered from the image as they are
// read ("implicit GEMM"); its depth runs over taps and the channels that the group keeps, so that a sum is
// taken in the same order whatever the tiles.
#include "network/cuda/maps.cuh"
#include "network/cuda/tensor_core.cuh"

namespace fastkd::cuda {
namespace {

constexpr int kRows = 128;                   // of a tile
constexpr int kStages = 3;                   // chunks of the depth that are in flight
constexpr int kRowBytes = kChunkBytes + 16;  // in shared memory: rows 16 bytes apart modulo the banks
constexpr int kStaged = 32;                  // columns of the results in shared memory at once

template <class T> constexpr int per_copy() { return 16 / int(sizeof(T)); }
template <class T> constexpr int per_chunk() { return kChunkBytes / int(sizeof(T)); }

template <class T> std::int64_t shared_bytes(int tile) {
    const std::int64_t stages = std::int64_t(kStages) * (kRows + tile) * kRowBytes;
    const std::int64_t staged = std::int64_t(kRows) * (kStaged + 1) * std::int64_t(sizeof(acc_t<T>));
    return stages > staged ? stages : staged;
}

// Four threads copy a row of a chunk, 16 bytes each; each has four rows of the pixels.
template <class T, int Tile> class Loader {
  public:
    __device__ Loader(const ConvLayer& layer, const ConvTask& task, std::int64_t row, int output)
        : layer_(layer), task_(task), at_(int(threadIdx.x) % 4 * per_copy<T>()), output_(output) {
        const ImageWindow& w = layer.window;
        const std::int64_t pixels = std::int64_t(w.out_size[0]) * w.out_size[1];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const std::int64_t r = row + threadIdx.x / 4 + 32 * i;
            valid_[i] = r < w.images * pixels;
            const std::int64_t image = valid_[i] ? r / pixels : 0;
            const int in_image = valid_[i] ? int(r % pixels) : 0;
            image_[i] = static_cast<const T*>(task.in) + image * w.size[0] * w.size[1] * task.in_pitch;
            row_[i] = w.start(0, in_image / w.out_size[1]);
            column_[i] = w.start(1, in_image % w.out_size[1]);
        }
        channel_ = at_, tap_ = 0;
        skip();
    }

    // The next chunk.
    __device__ void operator()(char* stage) {
        const ImageWindow& w = layer_.window;
        const int taps = w.kernel[0] * w.kernel[1], offset = int(threadIdx.x) % 4 * 16;
        const int down = tap_ / w.kernel[1] * w.dilation[0], right = tap_ % w.kernel[1] * w.dilation[1];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            char* to = stage + (threadIdx.x / 4 + 32 * i) * kRowBytes + offset;
            const int y = row_[i] + down, x = column_[i] + right;
            const bool inside = valid_[i] && tap_ < taps && w.inside(0, y) && w.inside(1, x);
            const T* from = image_[i];
            if (inside) from += (std::int64_t(y) * w.size[1] + x) * task_.in_pitch + channel_;
            if (layer_.aligned) {
                copy16(to, from, inside);
            } else {
                for (int e = 0; e < per_copy<T>(); ++e)
                    reinterpret_cast<T*>(to)[e] =
                        inside && channel_ + e < task_.inputs ? from[e] : narrow<T>(0);
            }
        }
        char* weights = stage + kRows * kRowBytes + offset;
        for (int o = int(threadIdx.x) / 4; o < Tile; o += 32) {
            const bool real = output_ + o < task_.outputs;
            const T* from = static_cast<const T*>(task_.packed);
            if (real) from += (output_ + o) * task_.depth + at_;
            copy16(weights + o * kRowBytes, from, real);
        }
        at_ += per_chunk<T>(), channel_ += per_chunk<T>();
        skip();
    }

  private:
    __device__ void skip() {
        // Without positions there is no depth.
        while (task_.positions && channel_ >= task_.positions) channel_ -= task_.positions, ++tap_;
    }
    const ConvLayer& layer_;
    const ConvTask task_;  // a copy, which stays in registers
    const T* image_[4];
    int row_[4], column_[4];
    bool valid_[4];
    std::int64_t at_;  // of the depth
    int output_, channel_, tap_;
};

// Sums of a tile in registers, by the tensor cores. A warp has kWarpRows x kWarpColumns of it.
template <class T, int Tile> class TensorSums {
  public:
    __device__ void add(const char* stage) {
        const int lane = int(threadIdx.x) % 32;
        const char* x = stage + (warp_row() + lane % 16) * kRowBytes + lane / 16 * 16;
        const char* w =
            stage + (kRows + warp_column() + lane / 16 * 8 + lane % 8) * kRowBytes + lane / 8 % 2 * 16;
#pragma unroll
        for (int k = 0; k < kChunkBytes; k += 32) {
            std::uint32_t a[kDown][4], b[kRight / 2][4];
#pragma unroll
            for (int i = 0; i < kDown; ++i) load_matrices(a[i], x + 16 * i * kRowBytes + k);
#pragma unroll
            for (int j = 0; j < kRight / 2; ++j) load_matrices(b[j], w + 16 * j * kRowBytes + k);
#pragma unroll
            for (int i = 0; i < kDown; ++i)
#pragma unroll
                for (int j = 0; j < kRight; ++j)
                    multiply<T>(sum_[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
        }
    }
    // put(row, column, sum) for the columns first .. first + kStaged.
    template <class Put> __device__ void read(int first, Put put) const {
        const int lane = int(threadIdx.x) % 32;
#pragma unroll
        for (int i = 0; i < kDown; ++i)
#pragma unroll
            for (int j = 0; j < kRight; ++j)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int column = warp_column() + 8 * j + lane % 4 * 2 + e % 2 - first;
                    if (column >= 0 && column < kStaged)
                        put(warp_row() + 16 * i + lane / 4 + e / 2 * 8, column, sum_[i][j][e]);
                }
    }

  private:
    static constexpr int kAcross = Tile >= 64 ? 2 : 1;  // warps
    static constexpr int kWarpRows = kRows / (kWarps / kAcross), kWarpColumns = Tile / kAcross;
    static constexpr int kDown = kWarpRows / 16, kRight = kWarpColumns / 8;
    __device__ static int warp_row() { return int(threadIdx.x) / 32 / kAcross * kWarpRows; }
    __device__ static int warp_column() { return int(threadIdx.x) / 32 % kAcross * kWarpColumns; }
    float sum_[kDown][kRight][4] = {};
};

// The same by multiply-adds: a thread has rows 16 apart and columns 8 apart.
template <class T, int Tile> class PlainSums {
  public:
    __device__ void add(const char* stage) {
        const char* x = stage + threadIdx.x / 8 * kRowBytes;
        const char* w = stage + (kRows + threadIdx.x % 8) * kRowBytes;
        for (int k = 0; k < per_chunk<T>(); ++k) {
            acc_t<T> a[8], b[kRight];
#pragma unroll
            for (int i = 0; i < 8; ++i) a[i] = widen(reinterpret_cast<const T*>(x + 16 * i * kRowBytes)[k]);
#pragma unroll
            for (int j = 0; j < kRight; ++j)
                b[j] = widen(reinterpret_cast<const T*>(w + 8 * j * kRowBytes)[k]);
#pragma unroll
            for (int i = 0; i < 8; ++i)
#pragma unroll
                for (int j = 0; j < kRight; ++j) sum_[i][j] += a[i] * b[j];
        }
    }
    template <class Put> __device__ void read(int first, Put put) const {
#pragma unroll
        for (int i = 0; i < 8; ++i)
#pragma unroll
            for (int j = 0; j < kRight; ++j) {
                const int column = int(threadIdx.x) % 8 + 8 * j - first;
                if (column >= 0 && column < kStaged) put(int(threadIdx.x) / 8 + 16 * i, column, sum_[i][j]);
            }
    }

  private:
    static constexpr int kRight = Tile / 8;
    acc_t<T> sum_[8][kRight] = {};
};

// Sums of one tile: chunk after chunk of the depth, kStages of them in flight.
template <class T, int Tile, class Sums>
__device__ void add_chunks(Loader<T, Tile>& load, std::int64_t chunks, char* shared, Sums& sums) {
    constexpr int stage = (kRows + Tile) * kRowBytes;
    for (int k = 0; k < kStages - 1; ++k) {
        if (k < chunks) load(shared + k * stage);
        commit_copies();
    }
    for (std::int64_t k = 0; k < chunks; ++k) {
        wait_for_copies<kStages - 2>();
        __syncthreads();  // the chunk is there for all, and nobody reads the one before it any more
        if (k + kStages - 1 < chunks) load(shared + (k + kStages - 1) % kStages * stage);
        commit_copies();
        sums.add(shared + k % kStages * stage);
    }
    wait_for_copies<0>();
    __syncthreads();
}

// Writes column j of a tile's rows from `row` on; staged: the first of its sums. A thread of `columns` that
// own a column side by side has every (kThreads / columns)-th row.
template <class T> __device__ void write_column(const ConvLayer& layer, const ConvTask& task, int j,
                                                const acc_t<T>* staged, std::int64_t row, std::int64_t rows,
                                                int columns) {
    using A = acc_t<T>;
    const bool real = j < task.outputs;
    const Column column =
        real ? reinterpret_cast<const Column*>(layer.lists + task.columns)[j] : Column{0, 0};
    const Line<A> line(layer.affine, column);
    const Reader<T> residual(real && task.residual != kNone
                                 ? reinterpret_cast<const Channel*>(layer.lists + task.residual)[j]
                                 : Channel{nullptr, 0});
    T* out = static_cast<T*>(task.out) + j;
    for (int r = int(threadIdx.x) / columns; r < kRows && row + r < rows; r += kThreads / columns) {
        A y = staged[r * (kStaged + 1)] * line.scale + line.shift + residual(row + r);
        y = activate(layer.activation, y, A(layer.param));
        out[(row + r) * task.out_pitch] = narrow<T>(real ? y : A(0));
    }
}

template <class T, int Tile, bool Tensor> __global__ void __launch_bounds__(kThreads)
    conv_kernel(ConvLayer layer) {
    using A = acc_t<T>;
    if constexpr (Tensor && !kHasTensorCores) return;
    FASTKD_DYNAMIC_SHARED(shared);
    const ConvTask task = task_of<ConvTask>(layer.lists, layer.tasks, layer.count);
    const ImageWindow& w = layer.window;
    const std::int64_t rows = w.images * w.out_size[0] * w.out_size[1];
    const std::int64_t tile = blockIdx.x - task.first, across = (task.width + Tile - 1) / Tile;
    const std::int64_t row = tile / across * kRows;
    const int output = int(tile % across) * Tile;

    Loader<T, Tile> load(layer, task, row, output);
    std::conditional_t<Tensor, TensorSums<T, Tile>, PlainSums<T, Tile>> sums;
    add_chunks(load, task.depth / per_chunk<T>(), shared, sums);

    // Through shared memory, so that a thread owns a column.
    A* staged = reinterpret_cast<A*>(shared);
    constexpr int columns = Tile < kStaged ? Tile : kStaged;
    for (int first = 0; first < Tile && output + first < task.width; first += kStaged) {
        sums.read(first, [&](int r, int c, A v) { staged[r * (kStaged + 1) + c] = v; });
        __syncthreads();
        const int c = int(threadIdx.x) % columns, j = output + first + c;
        if (j < task.width) write_column<T>(layer, task, j, staged + c, row, rows, columns);
        __syncthreads();
    }
}

template <class T> __global__ void __launch_bounds__(kThreads) pack_kernel(PackLayer layer) {
    const PackTask& task = task_of<PackTask>(layer.lists, layer.tasks, layer.count);
    const auto* channels = reinterpret_cast<const std::int32_t*>(layer.lists + task.channels);
    const auto* columns = reinterpret_cast<const Column*>(layer.lists + task.columns);
    const T* weight = static_cast<const T*>(layer.weight);
    const std::int64_t first = (blockIdx.x - task.first) * kPackElements;
    for (std::int64_t k = first + threadIdx.x; k < first + kPackElements; k += kThreads) {
        const std::int64_t o = k / task.depth, at = k % task.depth;
        if (o >= task.outputs) return;
        const int tap = int(at / task.positions),
                  channel = tap < layer.taps ? channels[at % task.positions] : -1;
        static_cast<T*>(task.packed)[k] =
            channel < 0 ? narrow<T>(0)
                        : weight[columns[o].channel * layer.row + std::int64_t(channel) * layer.taps + tap];
    }
}

// Tensor cores need a GPU of compute capability 8.0; before that, plain multiply-adds.
bool tensor_cores() {
    int device = 0, major = 0;
    check(cudaGetDevice(&device), "device");
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "compute capability");
    return major >= 8;
}

template <class T, bool Tensor>
void launch_tile(const ConvLayer& layer, int tile, std::int64_t tiles, void* stream) {
    auto go = [&](auto size) {
        constexpr int n = decltype(size)::value;
        launch("convolution", conv_kernel<T, n, Tensor>, {tiles, shared_bytes<T>(n)}, stream, layer);
    };
    if constexpr (Tensor) {
        if (tile == 128) return go(value_tag<128>{});
    }
    if (tile == 64) return go(value_tag<64>{});
    if (tile == 32) return go(value_tag<32>{});
    go(value_tag<16>{});
}

}  // namespace

int conv_tile(DType dtype, bool tf32, double mean_width) {
    const bool tensor = dtype != DType::f64 && (dtype != DType::f32 || tf32) && tensor_cores();
    for (int tile : {16, 32, 64})
        if (mean_width <= tile) return tile;
    return tensor ? 128 : 64;
}

void conv(DType dtype, const ConvLayer& layer, int tile, bool tf32, std::int64_t tiles, void* stream) {
    dispatch(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        if constexpr (sizeof(T) == 8) {
            launch_tile<T, false>(layer, tile, tiles, stream);
        } else {
            if (tensor_cores() && (sizeof(T) == 2 || tf32)) launch_tile<T, true>(layer, tile, tiles, stream);
            else launch_tile<T, false>(layer, tile, tiles, stream);
        }
    });
}

void pack(DType dtype, const PackLayer& layer, std::int64_t blocks, void* stream) {
    dispatch(dtype, [&](auto tag) {
        launch("pack", pack_kernel<typename decltype(tag)::type>, blocks, stream, layer);
    });
}

}  // namespace fastkd::cuda
