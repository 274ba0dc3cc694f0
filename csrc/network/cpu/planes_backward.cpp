#include "network/cpu/planes_backward.h"

#include "network/cpu/tiles.h"

namespace fastkd::cpu::FASTKD_ISA {
namespace {

// A tile of the weight gradient has kRows outputs x kColumns inputs.
#if defined(__AVX512F__)
constexpr int kRows = 6, kColumns = 4;
#else
constexpr int kRows = 4, kColumns = 2;
#endif
constexpr std::int64_t kLeast = 128;  // vectors worth a reduction to one number

// --- of the input ---------------------------------------------------------------------------------

struct Run {
    std::int64_t row, column, columns, image, images;
};

// To the sums of K channels x N vectors of images, at one pixel. Every sum runs over (row, column, output).
template <class A, class V, int K, int N>
FASTKD_HD void add_readers(const PlaneGradients& q, std::int64_t row, std::int64_t column, std::int64_t image,
                           const A* packed, V (&sum)[K][N]) {
    constexpr int lanes = int(sizeof(V) / sizeof(A));
    const A* const* grad = reinterpret_cast<const A* const*>(q.grad);
    const Readers &rows = q.readers[0], &columns = q.readers[1];
    for (std::int32_t a = rows.begin[row]; a < rows.begin[row + 1]; ++a) {
        for (std::int32_t b = columns.begin[column]; b < columns.begin[column + 1]; ++b) {
            const std::int64_t pixel = rows.at[a] * q.out_size[1] + columns.at[b];
            const std::int64_t from = pixel * q.images + image;
            const A* w = packed + (rows.tap[a] * q.kernel[1] + columns.tap[b]) * q.outputs * K;
            for (std::int64_t o = 0; o < q.outputs; ++o, w += K) {
                V g[N];
#pragma GCC unroll 4
                for (int v = 0; v < N; ++v) g[v] = load_as<V>(grad[o] + from + v * lanes);
                add_products(sum, g, w);
            }
        }
    }
}

// K channels x N vectors of images, pixel after pixel.
template <class A, int Bytes, int K, int N>
__attribute__((noinline)) void input_tile(const PlaneGradients& q, const Run& run, A* const* grad_x,
                                          const A* packed) {
    using V = typename Vec<A, Bytes>::type;
    constexpr int lanes = Vec<A, Bytes>::lanes;
    for (std::int64_t column = run.column; column < run.column + run.columns; ++column) {
        for (std::int64_t image = run.image; image < run.image + run.images; image += N * lanes) {
            const std::int64_t to = (run.row * q.size[1] + column) * q.images + image;
            V sum[K][N];
#pragma GCC unroll 8
            for (int j = 0; j < K; ++j)
#pragma GCC unroll 4
                for (int v = 0; v < N; ++v) sum[j][v] = load_as<V>(grad_x[j] + to + v * lanes);
            add_readers(q, run.row, column, image, packed, sum);
#pragma GCC unroll 8
            for (int j = 0; j < K; ++j)
#pragma GCC unroll 4
                for (int v = 0; v < N; ++v)
                    __builtin_memcpy(grad_x[j] + to + v * lanes, &sum[j][v], sizeof(V));
        }
    }
}

template <class A, int Bytes> void grad_input(const PlaneGradients& q) {
    constexpr std::int64_t lanes = Vec<A, Bytes>::lanes;
    constexpr int most = Bytes == kVecBytes ? kVectors : 1;
    const std::int64_t taps = q.kernel[0] * q.kernel[1];
    A* packed = static_cast<A*>(q.packed);
    for_tiles<kTile>(q.inputs, [&](std::int64_t first, std::int64_t count) {
        A* tile = packed + first * q.outputs * taps;
        for (std::int64_t o = 0; o < q.outputs; ++o)
            for (std::int64_t j = 0; j < count; ++j) {
                const A* w = static_cast<const A*>(q.weight) + q.out[o] * q.row + q.in[first + j] * taps;
                for (std::int64_t t = 0; t < taps; ++t) tile[(t * q.outputs + o) * count + j] = w[t];
            }
    });
    // So much at once that what it reads stays near while all channels are computed.
    const std::int64_t rows = (q.kernel[0] + q.stride[0] - 1) / q.stride[0];
    const std::int64_t vectors = kNear / (rows * q.outputs * Bytes + 1);
    const std::int64_t images = std::min(q.images, std::max<std::int64_t>(vectors / most, 4) * most * lanes);
    const std::int64_t columns = std::max<std::int64_t>(vectors * lanes / q.images, 4) * q.stride[1];
    Run run{};
    auto tiles = [&](auto n) {
        if (run.images <= 0) return;
        for_tiles<kTile>(q.inputs, [&](std::int64_t first, std::int64_t count) {
            dispatch_count<kTile>(count, [&](auto k) {
                input_tile<A, Bytes, k.value, n.value>(q, run, reinterpret_cast<A* const*>(q.grad_x) + first,
                                                       packed + first * q.outputs * taps);
            });
        });
    };
    for (run.row = 0; run.row < q.size[0]; ++run.row)
        for (run.column = 0; run.column < q.size[1]; run.column += columns) {
            run.columns = std::min(columns, q.size[1] - run.column);
            for (std::int64_t image = 0; image < q.images; image += images) {
                const std::int64_t n = std::min(images, q.images - image), rest = n % (most * lanes);
                run.image = image, run.images = n - rest;
                tiles(value_tag<most>{});
                run.image = image + n - rest, run.images = rest;
                if (rest) dispatch_count<most>(rest / lanes, tiles);
            }
        }
}

// --- of the weight --------------------------------------------------------------------------------

// Some rows of the result and some images.
struct Part {
    Span<std::int64_t> rows;
    std::int64_t image, images;
};

// One tap of K outputs x M inputs, in registers. Every lane's sum runs over (row, column, image).
template <class A, int Bytes, int K, int M> struct WeightTile {
    using V = typename Vec<A, Bytes>::type;
    static constexpr int lanes = Vec<A, Bytes>::lanes;
    const A *grad[K], *x[M];
    V sum[K][M] = {};

    FASTKD_HD WeightTile(const PlaneGradients& q, const Part& part, std::int64_t output, std::int64_t input) {
        for (int k = 0; k < K; ++k) grad[k] = static_cast<const A*>(q.grad[output + k]) + part.image;
        for (int m = 0; m < M; ++m) x[m] = static_cast<const A*>(q.x[input + m]) + part.image;
    }
    // A run of `count` numbers, from the numbers o of the result and i of x on.
    FASTKD_HD void add(std::int64_t o, std::int64_t i, std::int64_t count) {
        for (std::int64_t n = 0; n < count; n += lanes) {
            V v[M];
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) v[m] = load_as<V>(x[m] + i + n);
#pragma GCC unroll 8
            for (int k = 0; k < K; ++k) {
                const V g = load_as<V>(grad[k] + o + n);
#pragma GCC unroll 8
                for (int m = 0; m < M; ++m) sum[k][m] += g * v[m];
            }
        }
    }
    FASTKD_HD void row(int k, A (&sums)[M]) const {
        if constexpr (M == 4 && Bytes == kVecBytes) {
            reduce_add4<A>(sum[k], sums);
        } else {
            for (int m = 0; m < M; ++m) sums[m] = reduce_add<A, Bytes>(sum[k][m]);
        }
    }
};

template <class A, int Bytes, int K, int M> void weight_tile(const PlaneGradients& q, const Part& part,
                                                             std::int64_t output, std::int64_t input,
                                                             std::int64_t a, std::int64_t b) {
    WeightTile<A, Bytes, K, M> tile(q, part, output, input);
    const Span rows = q.reached(0, a), columns = q.reached(1, b);
    // Neighbours of the result read neighbours of x: then a row is one line of numbers.
    const bool line = q.stride[1] == 1 && part.images == q.images;
    const std::int64_t step = line ? columns.last - columns.first : 1, count = step * part.images;
    for (std::int64_t row = std::max(rows.first, part.rows.first); row < std::min(rows.last, part.rows.last);
         ++row) {
        const std::int64_t from = q.start(0, row) + a * q.dilation[0];
        for (std::int64_t column = columns.first; column < columns.last; column += step) {
            const std::int64_t shift = q.start(1, column) + b * q.dilation[1];
            tile.add((row * q.out_size[1] + column) * q.images, (from * q.size[1] + shift) * q.images, count);
        }
    }
    const std::int64_t taps = q.kernel[0] * q.kernel[1], tap = a * q.kernel[1] + b;
    for (int k = 0; k < K; ++k) {
        A sums[M];
        tile.row(k, sums);
        A* row = static_cast<A*>(q.grad_weight) + q.out[output + k] * q.row + tap;
        for (int m = 0; m < M; ++m) row[q.in[input + m] * taps] += sums[m];
    }
}

template <class A, int Bytes> void grad_weight(const PlaneGradients& q) {
    constexpr std::int64_t lanes = Vec<A, Bytes>::lanes;
    // So much at once that it stays near for all pairs of channels, but enough for a reduction.
    const std::int64_t near = std::max(kNear / ((q.inputs + q.outputs) * Bytes), kLeast) * lanes;
    const std::int64_t images = std::min(q.images, near);
    const std::int64_t rows = std::max<std::int64_t>(near / (q.out_size[1] * images), 1);
    for (std::int64_t row = 0; row < q.out_size[0]; row += rows)
        for (std::int64_t image = 0; image < q.images; image += images) {
            const Part part{{row, row + rows}, image, std::min(images, q.images - image)};
            for_tiles<kColumns>(q.inputs, [&](std::int64_t input, std::int64_t ins) {
                for_tiles<kRows>(q.outputs, [&](std::int64_t output, std::int64_t outs) {
                    dispatch_count<kRows>(outs, [&](auto k) {
                        dispatch_count<kColumns>(ins, [&](auto m) {
                            for (std::int64_t a = 0; a < q.kernel[0]; ++a)
                                for (std::int64_t b = 0; b < q.kernel[1]; ++b)
                                    weight_tile<A, Bytes, k.value, m.value>(q, part, output, input, a, b);
                        });
                    });
                });
            });
        }
}

}  // namespace

void plane_grad_input(DType dtype, const PlaneGradients& op) {
    dispatch_acc(dtype, [&](auto tag) {
        using A = typename decltype(tag)::type;
        const PlaneGradients q = op.is_point() ? as_line<A>(op) : op;
        dispatch_width<A>(q.images, [&](auto bytes) { grad_input<A, bytes.value>(q); });
    });
}

void plane_grad_weight(DType dtype, const PlaneGradients& op) {
    dispatch_acc(dtype, [&](auto tag) {
        using A = typename decltype(tag)::type;
        const PlaneGradients q = op.is_point() ? as_line<A>(op) : op;
        dispatch_width<A>(q.images, [&](auto bytes) { grad_weight<A, bytes.value>(q); });
    });
}

void plane_sum(DType dtype, const PlaneSum& op) {
    dispatch_acc(dtype, [&](auto tag) {
        using A = typename decltype(tag)::type;
        const A* plane = static_cast<const A*>(op.plane);
        vec<A> sum{};
        for (std::int64_t n = 0; n < op.numbers; n += Vec<A>::lanes) sum += load(plane + n);
        *static_cast<A*>(op.sum) += reduce_add<A>(sum);
    });
}

}  // namespace fastkd::cpu::FASTKD_ISA
