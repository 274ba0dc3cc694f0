// Layers that work channel by channel, what enters and leaves a network, and the moments of a batch.
#include <limits>

#include "network/cuda/maps.cuh"

namespace fastkd::cuda {
namespace {

// A thread owns a channel and walks over pixels, so that what belongs to the channel is read once:
// prepare(task, j) gives a function of the row, and its value is written. Zeros follow the channels.
template <class T, class Prepare> __device__ void for_map(const MapLayer& layer, Prepare prepare) {
    const MapTask& task = task_of<MapTask>(layer.lists, layer.tasks, layer.count);
    const std::int64_t rows = map_rows(task.pitch), first = (blockIdx.x - task.first) * rows;
    const std::int64_t last = first + rows < layer.rows ? first + rows : layer.rows;
    const int width = task.pitch < kThreads ? task.pitch : kThreads, at_once = kThreads / width;
    const int turn = int(threadIdx.x) / width;  // which of the rows that a block takes at once
    if (turn >= at_once) return;
    T* out = static_cast<T*>(task.out);
    for (int j = int(threadIdx.x) % width; j < task.pitch; j += width) {
        if (j >= task.outputs) {
            for (std::int64_t r = first + turn; r < last; r += at_once)
                out[r * task.pitch + j] = narrow<T>(0);
            continue;
        }
        auto value = prepare(task, j);
        for (std::int64_t r = first + turn; r < last; r += at_once)
            out[r * task.pitch + j] = narrow<T>(value(r));
    }
}

template <class T> __device__ Reader<T> reader(const MapLayer& layer, std::int64_t list, int j) {
    return Reader<T>(list == kNone ? Channel{nullptr, 0}
                                   : reinterpret_cast<const Channel*>(layer.lists + list)[j]);
}
__device__ inline Column column(const MapLayer& layer, const MapTask& task, int j) {
    return reinterpret_cast<const Column*>(layer.lists + task.columns)[j];
}

template <class T> __global__ void __launch_bounds__(kThreads) pointwise_kernel(MapLayer layer) {
    using A = acc_t<T>;
    for_map<T>(layer, [&](const MapTask& task, int j) {
        const Reader<T> x = reader<T>(layer, task.x, j), residual = reader<T>(layer, task.other, j);
        const Line<A> line(layer.affine, column(layer, task, j));
        return [=, &layer](std::int64_t r) {
            // What does not exist is zero, whatever the scale.
            const A y = (x.data ? x(r) * line.scale + line.shift : line.shift) + residual(r);
            return activate(layer.activation, y, A(layer.param));
        };
    });
}

template <class T> __global__ void __launch_bounds__(kThreads)
    product_kernel(MapLayer layer, std::int64_t pixels, std::int64_t gate_pixels) {
    for_map<T>(layer, [&](const MapTask& task, int j) {
        const Reader<T> x = reader<T>(layer, task.x, j), gate = reader<T>(layer, task.other, j);
        return [=](std::int64_t r) {
            if (!x.data || !gate.data) return acc_t<T>(0);
            return x(r) * gate(gate_pixels == pixels ? r : r / pixels);
        };
    });
}

struct Pixel {
    std::int64_t image;
    int row, column;
};
__device__ inline Pixel pixel_of(const ImageWindow& w, std::int64_t r) {
    const int in_image = int(r % (std::int64_t(w.out_size[0]) * w.out_size[1]));
    return {r / (std::int64_t(w.out_size[0]) * w.out_size[1]), in_image / w.out_size[1],
            in_image % w.out_size[1]};
}

template <class T, bool Max>
__device__ acc_t<T> pool_pixel(const ImageWindow& w, const Reader<T>& x, const Pixel& p, bool count_padding) {
    using A = acc_t<T>;
    const Pooled rows = w.pooled(0, p.row), columns = w.pooled(1, p.column);
    A y = Max ? -std::numeric_limits<A>::infinity() : A(0);
    for (int a = rows.first; a < rows.last; a += rows.step)
        for (int b = columns.first; b < columns.last; b += columns.step) {
            const A v = x((p.image * w.size[0] + a) * w.size[1] + b);
            if constexpr (Max) y = pool_max(y, v);
            else y += v;
        }
    return Max ? y : y / A(pool_count(rows, columns, count_padding));
}

template <class T, bool Max> __global__ void __launch_bounds__(kThreads)
    pool_kernel(MapLayer layer, ImageWindow w, bool count_padding) {
    for_map<T>(layer, [&](const MapTask& task, int j) {
        const Reader<T> x = reader<T>(layer, task.x, j);
        return [=, &w](std::int64_t r) {
            return x.data ? pool_pixel<T, Max>(w, x, pixel_of(w, r), count_padding) : acc_t<T>(0);
        };
    });
}

template <class T>
__device__ acc_t<T> depthwise_pixel(const ImageWindow& w, const Reader<T>& x, const Pixel& p, const T* taps) {
    acc_t<T> sum = 0;
    for (int a = 0; a < w.kernel[0]; ++a)
        for (int b = 0; b < w.kernel[1]; ++b) {
            const int row = w.start(0, p.row) + a * w.dilation[0];
            const int column = w.start(1, p.column) + b * w.dilation[1];
            if (!w.inside(0, row) || !w.inside(1, column)) continue;
            sum += x((p.image * w.size[0] + row) * w.size[1] + column) * widen(taps[a * w.kernel[1] + b]);
        }
    return sum;
}

template <class T> __global__ void __launch_bounds__(kThreads)
    depthwise_kernel(MapLayer layer, ImageWindow w, const T* weight) {
    using A = acc_t<T>;
    for_map<T>(layer, [&](const MapTask& task, int j) {
        const Reader<T> x = reader<T>(layer, task.x, j), residual = reader<T>(layer, task.other, j);
        const Column c = column(layer, task, j);
        const Line<A> line(layer.affine, c);
        const T* taps = weight + std::int64_t(c.channel) * w.kernel[0] * w.kernel[1];
        return [=, &w, &layer](std::int64_t r) {
            const A sum = x.data ? depthwise_pixel(w, x, pixel_of(w, r), taps) : A(0);
            return activate(layer.activation, sum * line.scale + line.shift + residual(r), A(layer.param));
        };
    });
}

// --- in and out -----------------------------------------------------------------------------------

// f(task, row, j): threads next to each other have pixels next to each other, as the outer array has.
template <class F> __device__ void for_transfer(const TransferLayer& layer, F f) {
    const TransferTask& task = task_of<TransferTask>(layer.lists, layer.tasks, layer.count);
    const std::int64_t rows = map_rows(task.pitch), first = (blockIdx.x - task.first) * rows;
    const std::int64_t all = layer.images * layer.pixels, last = first + rows < all ? first + rows : all;
    for (int j = 0; j < task.pitch; ++j)
        for (std::int64_t r = first + threadIdx.x; r < last; r += kThreads) f(task, r, j);
}

__device__ inline std::int64_t outer_at(const TransferLayer& layer, std::int64_t row, std::int64_t channel) {
    return (row / layer.pixels * layer.channels + channel) * layer.pixels + row % layer.pixels;
}

template <class T, class Outer> __global__ void __launch_bounds__(kThreads) load_kernel(TransferLayer layer) {
    for_transfer(layer, [&](const TransferTask& task, std::int64_t r, int j) {
        acc_t<T> v = 0;
        if (j < task.width) {
            const Column c = reinterpret_cast<const Column*>(layer.lists + task.columns)[j];
            v = acc_t<T>(widen(static_cast<const Outer*>(task.outer)[outer_at(layer, r, c.channel)]));
        }
        static_cast<T*>(task.out)[r * task.pitch + j] = narrow<T>(v);
    });
}

template <class T, class Outer> __global__ void __launch_bounds__(kThreads)
    store_kernel(TransferLayer layer) {
    for_transfer(layer, [&](const TransferTask& task, std::int64_t r, int j) {
        const Reader<T> x(reinterpret_cast<const Channel*>(layer.lists + task.x)[j]);
        static_cast<Outer*>(task.outer)[outer_at(layer, r, j)] = narrow<Outer>(acc_t<Outer>(x(r)));
    });
}

// --- moments --------------------------------------------------------------------------------------

// A warp owns 32 channels; the four warps of a block take rows in turn, and are added in order. Nothing
// depends on how many channels there are.
template <class T> __global__ void __launch_bounds__(kThreads) partial_moments_kernel(MomentLayer layer) {
    __shared__ double sums[kWarps][32];
    const MomentTask& task = task_of<MomentTask>(layer.lists, layer.tasks, layer.count);
    const std::int64_t piece = blockIdx.x - task.first, first = piece * kPiece;
    const std::int64_t last = first + kPiece < layer.rows ? first + kPiece : layer.rows;
    const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
    for (int j0 = 0; j0 < task.width; j0 += 32) {
        const int j = j0 + lane;
        double sum = 0;
        if (j < task.width) {
            const Reader<T> x(reinterpret_cast<const Channel*>(layer.lists + task.x)[j]);
            const Column c = reinterpret_cast<const Column*>(layer.lists + task.columns)[j];
            const double mean = layer.power == 2 ? layer.mean[c.keeper * layer.channels + c.channel] : 0;
            for (std::int64_t r = first + warp; r < last; r += kWarps) {
                const double v = double(x(r)) - mean;
                sum += layer.power == 2 ? v * v : v;
            }
        }
        sums[warp][lane] = sum;
        __syncthreads();
        if (warp == 0 && j < task.width) {
            double total = 0;
            for (int w = 0; w < kWarps; ++w) total += sums[w][lane];
            task.partial[piece * task.width + j] = total;
        }
        __syncthreads();
    }
}

__global__ void __launch_bounds__(kThreads) finish_moments_kernel(MomentLayer layer) {
    const std::int64_t k = std::int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (k >= layer.num_entries) return;
    const MomentEntry e = reinterpret_cast<const MomentEntry*>(layer.lists + layer.entries)[k];
    const MomentTask& task = reinterpret_cast<const MomentTask*>(layer.lists + layer.tasks)[e.task];
    double total = 0;
    for (std::int64_t piece = 0; piece * kPiece < layer.rows; ++piece)
        total += task.partial[piece * task.width + e.at];
    (layer.power == 2 ? layer.variance : layer.mean)[e.individual * layer.channels + e.channel] =
        total / double(layer.rows);
}

template <class F> void dispatch_transfer(DType dtype, DType outer, F&& f) {
    dispatch(dtype, [&](auto tag) { dispatch(outer, [&](auto other) { f(tag, other); }); });
}

}  // namespace

void load(DType dtype, DType outer, const TransferLayer& layer, std::int64_t blocks, void* stream) {
    dispatch_transfer(dtype, outer, [&](auto tag, auto other) {
        launch("load", load_kernel<typename decltype(tag)::type, typename decltype(other)::type>, blocks,
               stream, layer);
    });
}
void store(DType dtype, DType outer, const TransferLayer& layer, std::int64_t blocks, void* stream) {
    dispatch_transfer(dtype, outer, [&](auto tag, auto other) {
        launch("store", store_kernel<typename decltype(tag)::type, typename decltype(other)::type>, blocks,
               stream, layer);
    });
}
void pointwise(DType dtype, const MapLayer& layer, std::int64_t blocks, void* stream) {
    dispatch(dtype, [&](auto tag) {
        launch("pointwise", pointwise_kernel<typename decltype(tag)::type>, blocks, stream, layer);
    });
}
void product(DType dtype, const MapLayer& layer, std::int64_t pixels, std::int64_t gate_pixels,
             std::int64_t blocks, void* stream) {
    dispatch(dtype, [&](auto tag) {
        launch("product", product_kernel<typename decltype(tag)::type>, blocks, stream, layer, pixels,
               gate_pixels);
    });
}
void pool(DType dtype, const MapLayer& layer, const ImageWindow& window, bool max, bool count_padding,
          std::int64_t blocks, void* stream) {
    dispatch(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        launch("pool", max ? pool_kernel<T, true> : pool_kernel<T, false>, blocks, stream, layer, window,
               count_padding);
    });
}
void depthwise(DType dtype, const MapLayer& layer, const ImageWindow& window, const void* weight,
               std::int64_t blocks, void* stream) {
    dispatch(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        launch("depthwise", depthwise_kernel<T>, blocks, stream, layer, window,
               static_cast<const T*>(weight));
    });
}
void moments(const MomentLayer& layer, DType dtype, std::int64_t blocks, void* stream) {
    dispatch(dtype, [&](auto tag) {
        launch("moments", partial_moments_kernel<typename decltype(tag)::type>, blocks, stream, layer);
    });
    launch("moments", finish_moments_kernel, ceil_div(layer.num_entries, kThreads), stream, layer);
}

}  // namespace fastkd::cuda
