#include "network/cpu/planes_backward.h"

#include "common/dispatch.h"
#include "common/vec.h"

namespace fastkd::cpu::FASTKD_ISA {
namespace {

// Sums in registers: of the input gradient kChannels x kVectors vectors of images, of the weight gradient
// kRows outputs x kColumns inputs.
#if defined(__AVX512F__)
constexpr int kChannels = 8, kVectors = 3, kRows = 6, kColumns = 4;
#else
constexpr int kChannels = 6, kVectors = 2, kRows = 4, kColumns = 2;
#endif
constexpr std::int64_t kNear = 256 << 10;  // bytes that stay in the second level cache
constexpr std::int64_t kLeast = 128;       // vectors worth a reduction to one number

// f(value_tag<n>), 1 <= n <= Most
template <int Most, class F> void dispatch_count(std::int64_t n, F&& f) {
    if constexpr (Most > 1) {
        if (n < Most) return dispatch_count<Most - 1>(n, f);
    }
    f(value_tag<Most>{});
}

// f(first, count) for tiles of nearly equal sizes, of at most Most.
template <int Most, class F> void for_tiles(std::int64_t n, F&& f) {
    const std::int64_t tiles = (n + Most - 1) / Most;
    for (std::int64_t k = 0, first = 0; k < tiles; ++k) {
        const std::int64_t count = n / tiles + (k < n % tiles);
        f(first, count);
        first += count;
    }
}

// Where a kernel is one pixel that never leaves the image, a plane is one line of numbers, whatever the
// images: one pixel of many images.
template <class A> PlaneGradients flat(const PlaneGradients& given) {
    PlaneGradients q = given;
    for (int k = 0; k < 2; ++k)
        if (q.kernel[k] != 1 || q.stride[k] != 1 || q.padding[k] != 0) return q;
    constexpr std::int64_t lanes = Vec<A>::lanes;
    q.images = (q.size[0] * q.size[1] * q.images + lanes - 1) / lanes * lanes;
    for (int k = 0; k < 2; ++k) q.size[k] = q.out_size[k] = 1;
    return q;
}

// --- of the input ---------------------------------------------------------------------------------

struct Run {
    std::int64_t row, column, columns, image, images;
};

// K channels x N vectors of images, pixel after pixel. Every sum runs over (row, column, output).
template <class A, int Bytes, int K, int N>
__attribute__((noinline)) void input_tile(const PlaneGradients& q, const Run& run, A* const* grad_x,
                                          const A* packed) {
    using V = typename Vec<A, Bytes>::type;
    constexpr int lanes = Vec<A, Bytes>::lanes;
    const A* const* grad = reinterpret_cast<const A* const*>(q.grad);
    const Readers &rows = q.readers[0], &columns = q.readers[1];
    for (std::int64_t column = run.column; column < run.column + run.columns; ++column) {
        for (std::int64_t image = run.image; image < run.image + run.images; image += N * lanes) {
            const std::int64_t to = (run.row * q.size[1] + column) * q.images + image;
            V sum[K][N];
#pragma GCC unroll 8
            for (int j = 0; j < K; ++j)
#pragma GCC unroll 4
                for (int v = 0; v < N; ++v) sum[j][v] = load_as<V>(grad_x[j] + to + v * lanes);
            for (std::int32_t a = rows.begin[run.row]; a < rows.begin[run.row + 1]; ++a) {
                for (std::int32_t b = columns.begin[column]; b < columns.begin[column + 1]; ++b) {
                    const std::int64_t pixel = rows.at[a] * q.out_size[1] + columns.at[b];
                    const std::int64_t from = pixel * q.images + image;
                    const A* w = packed + (rows.tap[a] * q.kernel[1] + columns.tap[b]) * q.outputs * K;
                    for (std::int64_t o = 0; o < q.outputs; ++o, w += K) {
                        V g[N];
#pragma GCC unroll 4
                        for (int v = 0; v < N; ++v) g[v] = load_as<V>(grad[o] + from + v * lanes);
#pragma GCC unroll 8
                        for (int j = 0; j < K; ++j)
#pragma GCC unroll 4
                            for (int v = 0; v < N; ++v) sum[j][v] += g[v] * w[j];
                    }
                }
            }
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
    for_tiles<kChannels>(q.inputs, [&](std::int64_t first, std::int64_t count) {
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
        for_tiles<kChannels>(q.inputs, [&](std::int64_t first, std::int64_t count) {
            dispatch_count<kChannels>(count, [&](auto k) {
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

// The positions of the result at which a tap falls on the image: first <= position < last.
struct Span {
    std::int64_t first, last;
};
Span span(const PlaneGradients& q, int axis, std::int64_t tap) {
    const std::int64_t shift = q.padding[axis] - tap * q.dilation[axis], stride = q.stride[axis];
    const std::int64_t end = q.size[axis] + shift;
    return {shift > 0 ? (shift + stride - 1) / stride : 0,
            end > 0 ? std::min((end + stride - 1) / stride, q.out_size[axis]) : 0};
}

// Some rows of the result and some images.
struct Part {
    Span rows;
    std::int64_t image, images;
};

template <class A, int Bytes> FASTKD_HD A total(typename Vec<A, Bytes>::type v) {
    const auto q = fold<A, Bytes>(v, [](auto a, auto b) { return a + b; });
    if constexpr (sizeof(A) == 8) return q[0] + q[1];
    else return (q[0] + q[2]) + (q[1] + q[3]);
}

// One tap of K outputs x M inputs. Every lane's sum runs over (row, column, image).
template <class A, int Bytes, int K, int M> void weight_tile(const PlaneGradients& q, const Part& part,
                                                             std::int64_t output, std::int64_t input,
                                                             std::int64_t a, std::int64_t b) {
    using V = typename Vec<A, Bytes>::type;
    constexpr int lanes = Vec<A, Bytes>::lanes;
    const A *grad[K], *x[M];
    for (int k = 0; k < K; ++k) grad[k] = static_cast<const A*>(q.grad[output + k]) + part.image;
    for (int m = 0; m < M; ++m) x[m] = static_cast<const A*>(q.x[input + m]) + part.image;
    const Span rows = span(q, 0, a), columns = span(q, 1, b);
    // Neighbours of the result read neighbours of x: then a row is one line of numbers.
    const bool line = q.stride[1] == 1 && part.images == q.images;
    const std::int64_t step = line ? columns.last - columns.first : 1, count = step * part.images;
    V sum[K][M] = {};
    for (std::int64_t row = std::max(rows.first, part.rows.first); row < std::min(rows.last, part.rows.last);
         ++row) {
        const std::int64_t from = row * q.stride[0] - q.padding[0] + a * q.dilation[0];
        for (std::int64_t column = columns.first; column < columns.last; column += step) {
            const std::int64_t shift = column * q.stride[1] - q.padding[1] + b * q.dilation[1];
            const std::int64_t i = (from * q.size[1] + shift) * q.images;
            const std::int64_t o = (row * q.out_size[1] + column) * q.images;
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
    }
    const std::int64_t taps = q.kernel[0] * q.kernel[1], tap = a * q.kernel[1] + b;
    for (int k = 0; k < K; ++k) {
        A sums[M];
        if constexpr (M == 4 && Bytes == kVecBytes) {
            reduce_add4<A>(sum[k], sums);
        } else {
            for (int m = 0; m < M; ++m) sums[m] = total<A, Bytes>(sum[k][m]);
        }
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

void plane_grad_input(DType dtype, const PlaneGradients& given) {
    dispatch_acc(dtype, [&](auto tag) {
        using A = typename decltype(tag)::type;
        const PlaneGradients q = flat<A>(given);
        dispatch_width<A>(q.images, [&](auto bytes) { grad_input<A, bytes.value>(q); });
    });
}

void plane_grad_weight(DType dtype, const PlaneGradients& given) {
    dispatch_acc(dtype, [&](auto tag) {
        using A = typename decltype(tag)::type;
        const PlaneGradients q = flat<A>(given);
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
