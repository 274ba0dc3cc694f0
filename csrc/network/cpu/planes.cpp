#include "network/cpu/planes.h"

#include <cmath>
#include <limits>

#include "common/activation.h"
#include "common/dispatch.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "common/vec.h"

namespace fastkd::cpu::FASTKD_ISA {
namespace {

// Sums in registers: kOutputs channels x kVectors vectors of images, with room for the images.
#if defined(__AVX512F__)
constexpr int kOutputs = 8, kVectors = 3;
#else
constexpr int kOutputs = 6, kVectors = 2;
#endif
constexpr std::int64_t kNear = 256 << 10;  // bytes of input that stay in the second level cache

template <class F> void dispatch_plane(DType dtype, F&& f) {
    if (dtype == DType::f64) return f(type_tag<double>{});
    return f(type_tag<float>{});
}

template <class A> struct Range {
    A low, high;
};
template <class A> Range<A> range_of(Activation activation) {
    constexpr A infinity = std::numeric_limits<A>::infinity();
    if (activation == Activation::relu) return {0, infinity};
    if (activation == Activation::relu6) return {0, 6};
    return {-infinity, infinity};
}

template <Activation Kind, class A> void activate_all(double param, A* x, std::int64_t n) {
    const A given = A(param);
    for (std::int64_t k = 0; k < n; ++k) x[k] = activated<Kind>(x[k], given);
}

// What a clamp cannot do; relu and relu6 are done where the sums are stored.
template <class A> void activate(Activation activation, double param, A* x, std::int64_t n) {
    switch (activation) {
        case Activation::none:
        case Activation::relu:
        case Activation::relu6:
            return;
        case Activation::leaky_relu:
            return activate_all<Activation::leaky_relu>(param, x, n);
        case Activation::sigmoid:
            return activate_all<Activation::sigmoid>(param, x, n);
        case Activation::silu:
            return activate_all<Activation::silu>(param, x, n);
        case Activation::hardsigmoid:
            return activate_all<Activation::hardsigmoid>(param, x, n);
        case Activation::hardswish:
            return activate_all<Activation::hardswish>(param, x, n);
        case Activation::tanh:
            return activate_all<Activation::tanh>(param, x, n);
        case Activation::gelu:
            return activate_all<Activation::gelu>(param, x, n);
        case Activation::gelu_tanh:
            return activate_all<Activation::gelu_tanh>(param, x, n);
    }
}

// --- convolution ----------------------------------------------------------------------------------

// Some outputs of a convolution, over a run of numbers of one row of the result whose columns have the
// same taps.
template <class A> struct Strip {
    const PlaneConv* conv;
    const A* weight;      // [taps, inputs, K]
    std::int64_t output;  // the first
    Range<A> range;
    std::int64_t row, column;  // where the run begins
    std::int64_t hop;          // from one column of the run to the next, in columns of the input
    std::int64_t at, count;    // numbers of the run
};

// The taps of one axis that fall on the image: first <= tap < last.
struct Taps {
    std::int64_t start, first, last;
};
FASTKD_HD Taps taps(const PlaneConv& q, int axis, std::int64_t at) {
    const std::int64_t start = at * q.stride[axis] - q.padding[axis], step = q.dilation[axis];
    std::int64_t first = 0, last = q.kernel[axis];
    if (start < 0) first = (-start + step - 1) / step;
    if (start + (last - 1) * step >= q.size[axis])
        last = start < q.size[axis] ? (q.size[axis] - 1 - start) / step + 1 : 0;
    return {start, first, last};
}

// A register of equal parts that are `step` numbers apart.
template <class V, std::size_t... K> FASTKD_HD auto join(V low, V high, std::index_sequence<K...>) {
    return __builtin_shufflevector(low, high, int(K)...);
}
template <class A, int Bytes, int Parts>
FASTKD_HD typename Vec<A, Bytes>::type load_parts(const A* p, std::int64_t step) {
    if constexpr (Parts <= 1) {
        return load_as<typename Vec<A, Bytes>::type>(p);
    } else {
        const auto low = load_parts<A, Bytes / 2, Parts / 2>(p, step);
        const auto high = load_parts<A, Bytes / 2, Parts / 2>(p + Parts / 2 * step, step);
        return join(low, high, std::make_index_sequence<std::size_t(Vec<A, Bytes>::lanes)>{});
    }
}

// K outputs x N vectors of numbers at a time. Every sum runs over (row, column, input). Parts: columns
// in a vector, or 0 if the numbers of the input follow each other as those of the run do.
template <class A, int Bytes, int Parts, int K, int N> void strip(const Strip<A>& s) {
    using V = typename Vec<A, Bytes>::type;
    constexpr int lanes = Vec<A, Bytes>::lanes;
    const PlaneConv& q = *s.conv;
    const A* const* in = reinterpret_cast<const A* const*>(q.in);
    A* const* out = reinterpret_cast<A* const*>(q.out) + s.output;
    const A* scale = static_cast<const A*>(q.scale) + s.output;
    const A* shift = static_cast<const A*>(q.shift) + s.output;
    const A* residual[K];
    for (int j = 0; j < K; ++j)
        residual[j] = q.tail.residual ? static_cast<const A*>(q.tail.residual[s.output + j]) : nullptr;
    const Taps rows = taps(q, 0, s.row), columns = taps(q, 1, s.column);
    const std::int64_t to_run = (s.row * q.out_size[1] + s.column) * q.images, part = s.hop * q.images;
    const std::int64_t next = Parts ? lanes * s.hop : lanes;
    for (std::int64_t at = s.at; at < s.at + s.count; at += N * lanes) {
        V sum[K][N] = {};
        for (std::int64_t a = rows.first; a < rows.last; ++a) {
            for (std::int64_t b = columns.first; b < columns.last; ++b) {
                const std::int64_t pixel =
                    (rows.start + a * q.dilation[0]) * q.size[1] + columns.start + b * q.dilation[1];
                const std::int64_t from = pixel * q.images + at * s.hop;
                const A* w = s.weight + (a * q.kernel[1] + b) * q.inputs * K;
                for (std::int64_t c = 0; c < q.inputs; ++c, w += K) {
                    const A* p = in[c] + from;
                    V x[N];
#pragma GCC unroll 8
                    for (int v = 0; v < N; ++v) x[v] = load_parts<A, Bytes, Parts>(p + v * next, part);
#pragma GCC unroll 8
                    for (int j = 0; j < K; ++j)
#pragma GCC unroll 8
                        for (int v = 0; v < N; ++v) sum[j][v] += x[v] * w[j];
                }
            }
        }
        const std::int64_t to = to_run + at;
#pragma GCC unroll 8
        for (int j = 0; j < K; ++j)
#pragma GCC unroll 8
            for (int v = 0; v < N; ++v) {
                V y = sum[j][v] * scale[j] + shift[j];
                if (residual[j]) y += load_as<V>(residual[j] + to + v * lanes);
                y = clamp(y, V{} + s.range.low, V{} + s.range.high);
                __builtin_memcpy(out[j] + to + v * lanes, &y, sizeof(y));
            }
    }
}

// f(value_tag<count>{}) for a count of outputs, at most kOutputs.
template <int K = kOutputs, class F> auto for_count(std::int64_t count, F&& f) {
    if constexpr (K > 1)
        if (count < K) return for_count<K - 1>(count, f);
    return f(value_tag<K>{});
}

template <class A, int Bytes, int Parts, int N> auto strip_of(std::int64_t outputs) {
    return for_count(outputs, [](auto count) { return &strip<A, Bytes, Parts, count.value, N>; });
}

// A run in registers as wide as fit.
template <class A, int Bytes, int Parts> void strips(Strip<A> s, std::int64_t outputs) {
    constexpr int lanes = Vec<A, Bytes>::lanes;
    const std::int64_t end = s.at + s.count;
    auto take = [&](auto vectors, auto strip) {
        s.count = (end - s.at) / (vectors.value * lanes) * (vectors.value * lanes);
        if (s.count) strip(s);
        s.at += s.count;
    };
    if constexpr (Bytes == kVecBytes) {
        take(value_tag<kVectors>{}, strip_of<A, Bytes, Parts, kVectors>(outputs));
        if constexpr (!Parts) take(value_tag<2>{}, strip_of<A, Bytes, 0, 2>(outputs));
    }
    take(value_tag<1>{}, strip_of<A, Bytes, Parts, 1>(outputs));
    s.count = end - s.at;
    if constexpr (Bytes > 16) {
        if (s.count) strips<A, Bytes / 2, Parts / 2>(s, outputs);
    }
}

// f(first, count) for blocks of outputs of nearly equal sizes.
template <class F> void for_outputs(std::int64_t outputs, F&& f) {
    const std::int64_t blocks = (outputs + kOutputs - 1) / kOutputs;
    for (std::int64_t k = 0, first = 0; k < blocks; ++k) {
        const std::int64_t count = outputs / blocks + (k < outputs % blocks);
        f(first, count);
        first += count;
    }
}

// f(column, hop, at, count) for runs of numbers, at first + at ..., of columns with the same taps, that
// cover the numbers [begin, end) of a row.
template <class A, class F> void for_runs(const PlaneConv& q, std::int64_t begin, std::int64_t end, F&& f) {
    const std::int64_t step = q.stride[1], reach = (q.kernel[1] - 1) * q.dilation[1];
    const std::int64_t first = std::min((q.padding[1] + step - 1) / step, q.out_size[1]);
    const std::int64_t room = q.size[1] - 1 - reach + q.padding[1];
    std::int64_t last = std::clamp(room < 0 ? 0 : room / step + 1, first, q.out_size[1]);
    if (step > 1 && q.images > Vec<A>::lanes) last = first;
    for (std::int64_t column = begin / q.images; column * q.images < end;) {
        const bool inside = column >= first && column < last;
        const std::int64_t from = inside ? first : column, to = inside ? last : column + 1;
        const std::int64_t at = std::max(begin - from * q.images, std::int64_t(0));
        f(from, inside ? step : 1, at, std::min(end, to * q.images) - from * q.images - at);
        column = to;
    }
}

// f(value_tag<parts>{}) for the columns in a register of numbers that are `hop` columns apart, see strip.
template <class A, class F> FASTKD_HD void dispatch_parts(const PlaneConv& q, std::int64_t hop, F&& f) {
    if (hop == 1) return f(value_tag<0>{});
    if (q.images == Vec<A>::lanes) return f(value_tag<1>{});
    if constexpr (kVecBytes > 16) {
        if (q.images * 2 == Vec<A>::lanes) return f(value_tag<2>{});
    }
    if constexpr (kVecBytes > 32) f(value_tag<4>{});
}

// One channel by itself, over a run as above: as many sums at once as hide the latency of adding.
template <class A> struct Depth {
    const PlaneConv& q;
    Taps rows, columns;
    const A* in;  // where the run would begin to read, were there no border
    A* out;
    const A* residual;
    Range<A> range;
    std::int64_t hop, count;

    template <int Bytes, int Parts> FASTKD_HD void run(std::int64_t at) const {
        if constexpr (Bytes == kVecBytes) {
            at = strips<Bytes, Parts, 8>(at);
            at = strips<Bytes, Parts, 3>(at);
        }
        at = strips<Bytes, Parts, 1>(at);
        if constexpr (Bytes > 16) {
            if (at < count) run<Bytes / 2, Parts / 2>(at);
        }
    }
    template <int Bytes, int Parts, int N> FASTKD_HD std::int64_t strips(std::int64_t at) const {
        using V = typename Vec<A, Bytes>::type;
        constexpr int lanes = Vec<A, Bytes>::lanes;
        const A scale = *static_cast<const A*>(q.scale), shift = *static_cast<const A*>(q.shift);
        const std::int64_t part = hop * q.images, next = Parts ? lanes * hop : lanes;
        for (; at + N * lanes <= count; at += N * lanes) {
            V sum[N] = {};
            for (std::int64_t a = rows.first; a < rows.last; ++a) {
                const A* w = static_cast<const A*>(q.packed) + a * q.kernel[1];
                const A* row = in + a * q.dilation[0] * q.size[1] * q.images + at * hop;
                for (std::int64_t b = columns.first; b < columns.last; ++b) {
                    const A* p = row + b * q.dilation[1] * q.images;
#pragma GCC unroll 8
                    for (int v = 0; v < N; ++v)
                        sum[v] += load_parts<A, Bytes, Parts>(p + v * next, part) * w[b];
                }
            }
#pragma GCC unroll 8
            for (int v = 0; v < N; ++v) {
                V y = sum[v] * scale + shift;
                if (residual) y += load_as<V>(residual + at + v * lanes);
                y = clamp(y, V{} + range.low, V{} + range.high);
                __builtin_memcpy(out + at + v * lanes, &y, sizeof(y));
            }
        }
        return at;
    }
};

template <class A> void depthwise(const PlaneConv& q) {
    const std::int64_t line = q.out_size[1] * q.images;
    const A* residual = q.tail.residual ? static_cast<const A*>(*q.tail.residual) : nullptr;
    A* out = static_cast<A*>(*q.out);
    for (std::int64_t row = 0; row < q.out_size[0]; ++row) {
        const Taps rows = taps(q, 0, row);
        for_runs<A>(q, 0, line, [&](std::int64_t column, std::int64_t hop, std::int64_t, std::int64_t n) {
            const Taps columns = taps(q, 1, column);
            const std::int64_t to = row * line + column * q.images;
            const Depth<A> run{
                q,
                rows,
                columns,
                static_cast<const A*>(*q.in) + (rows.start * q.size[1] + columns.start) * q.images,
                out + to,
                residual ? residual + to : nullptr,
                range_of<A>(q.tail.activation),
                hop,
                n};
            dispatch_parts<A>(q, hop, [&](auto parts) { run.template run<kVecBytes, parts.value>(0); });
        });
    }
    activate(q.tail.activation, q.tail.param, out, q.out_size[0] * line);
}

template <class A> void convolve(const PlaneConv& q) {
    constexpr std::int64_t lanes = Vec<A>::lanes, wide = kVectors * lanes;
    const std::int64_t taps = q.kernel[0] * q.kernel[1], line = q.out_size[1] * q.images;
    const bool clamped = q.tail.activation <= Activation::relu6;
    // Few enough numbers that the rows they read stay near while all outputs are computed.
    const std::int64_t bytes = q.kernel[0] * q.stride[1] * q.inputs * std::int64_t(sizeof(A));
    const std::int64_t chunk = std::max<std::int64_t>(kNear / (bytes + 1) / wide, 4) * wide;
    for (std::int64_t row = 0; row < q.out_size[0]; ++row)
        for (std::int64_t begin = 0; begin < line; begin += chunk) {
            const std::int64_t end = std::min(begin + chunk, line);
            for_outputs(q.outputs, [&](std::int64_t first, std::int64_t count) {
                const A* weight = static_cast<const A*>(q.packed) + first * q.inputs * taps;
                for_runs<A>(q, begin, end,
                            [&](std::int64_t column, std::int64_t hop, std::int64_t at, std::int64_t n) {
                                const Strip<A> s{&q,  weight, first, range_of<A>(q.tail.activation),
                                                 row, column, hop,   at,
                                                 n};
                                dispatch_parts<A>(
                                    q, hop, [&](auto parts) { strips<A, kVecBytes, parts.value>(s, count); });
                            });
                if (clamped) return;
                for (std::int64_t k = first; k < first + count; ++k)
                    activate(q.tail.activation, q.tail.param, static_cast<A*>(q.out[k]) + row * line + begin,
                             end - begin);
            });
        }
}

}  // namespace

void plane_conv(DType dtype, const PlaneConv& q) {
    dispatch_plane(dtype, [&](auto tag) {
        using A = typename decltype(tag)::type;
        bool point = true;
        for (int k = 0; k < 2; ++k)
            point = point && q.kernel[k] == 1 && q.stride[k] == 1 && q.padding[k] == 0;
        if (!point) return q.inputs == 1 && q.outputs == 1 ? depthwise<A>(q) : convolve<A>(q);
        // A plane is then one line of numbers, whatever the images.
        constexpr std::int64_t lanes = Vec<A>::lanes;
        PlaneConv line = q;
        line.images = (q.size[0] * q.size[1] * q.images + lanes - 1) / lanes * lanes;
        for (int k = 0; k < 2; ++k) line.size[k] = line.out_size[k] = 1;
        convolve<A>(line);
    });
}

void pack_weights(DType dtype, const PackWeights& op) {
    dispatch_plane(dtype, [&](auto tag) {
        using A = typename decltype(tag)::type;
        for_outputs(op.outputs, [&](std::int64_t first, std::int64_t count) {
            A* packed = static_cast<A*>(op.packed) + first * op.inputs * op.taps;
            const A* rows[kOutputs];
            for (std::int64_t j = 0; j < count; ++j)
                rows[j] = static_cast<const A*>(op.weight) + op.out[first + j] * op.row;
            auto copy = [&](auto outputs) {
                for (std::int64_t c = 0; c < op.inputs; ++c)
                    for (std::int64_t t = 0; t < op.taps; ++t) {
                        A* to = packed + (t * op.inputs + c) * outputs.value;
#pragma GCC unroll 8
                        for (int j = 0; j < outputs.value; ++j) to[j] = rows[j][op.in[c] * op.taps + t];
                    }
            };
            for_count(count, copy);
        });
    });
}

// --- the rest -------------------------------------------------------------------------------------

namespace {

template <class A, int Bytes> void pool(const PlanePool& q) {
    using V = typename Vec<A, Bytes>::type;
    constexpr std::int64_t lanes = Vec<A, Bytes>::lanes;
    struct Window {
        std::int64_t first, last, step, count;  // positions on the image; count with padding
    };
    auto window = [&](int axis, std::int64_t at) -> Window {
        const std::int64_t size = q.size[axis], step = q.dilation[axis];
        if (q.kernel[axis] == 0) {
            const std::int64_t first = at * size / q.out_size[axis];
            const std::int64_t last = ((at + 1) * size + q.out_size[axis] - 1) / q.out_size[axis];
            return {first, last, 1, last - first};
        }
        std::int64_t first = at * q.stride[axis] - q.padding[axis];
        const std::int64_t last = first + (q.kernel[axis] - 1) * step + 1;
        const std::int64_t count = std::min(last, size + q.padding[axis]) - first;
        if (first < 0) first += (-first + step - 1) / step * step;
        return {first, std::min(last, size), step, count};
    };
    const A* in = static_cast<const A*>(q.in);
    A* out = static_cast<A*>(q.out);
    for (std::int64_t i = 0; i < q.out_size[0]; ++i) {
        const Window rows = window(0, i);
        for (std::int64_t j = 0; j < q.out_size[1]; ++j, out += q.images) {
            const Window columns = window(1, j);
            const std::int64_t inside = std::max<std::int64_t>(rows.last - rows.first, 0) *
                                        std::max<std::int64_t>(columns.last - columns.first, 0);
            // Padding that is larger at the end has windows beyond it.
            const A count =
                A(std::max<std::int64_t>(1, q.count_padding ? rows.count * columns.count : inside));
            for (std::int64_t n = 0; n < q.images; n += lanes) {
                V y = V{} + (q.max ? -std::numeric_limits<A>::infinity() : A(0));
                for (std::int64_t r = rows.first; r < rows.last; r += rows.step)
                    for (std::int64_t c = columns.first; c < columns.last; c += columns.step) {
                        const V x = load_as<V>(in + (r * q.size[1] + c) * q.images + n);
                        if (q.max) y = (x > y) | (x != x) ? x : y;
                        else y += x;
                    }
                if (!q.max) y /= V{} + count;
                __builtin_memcpy(out + n, &y, sizeof(y));
            }
        }
    }
}

}  // namespace

void plane_pool(DType dtype, const PlanePool& q) {
    dispatch_plane(dtype, [&](auto tag) {
        using A = typename decltype(tag)::type;
        dispatch_width<A>(q.images, [&](auto bytes) { pool<A, bytes.value>(q); });
    });
}

void plane_pointwise(DType dtype, const PlanePointwise& op) {
    dispatch_plane(dtype, [&](auto tag) {
        using A = typename decltype(tag)::type;
        const A* x = static_cast<const A*>(op.x);
        const A* r = op.tail.residual ? static_cast<const A*>(*op.tail.residual) : nullptr;
        A* y = static_cast<A*>(op.out);
        const A scale = A(op.scale), shift = A(op.shift);
        const Range<A> range = range_of<A>(op.tail.activation);
        const std::int64_t n = op.pixels * op.images;
        auto each = [&](auto value) {
            for (std::int64_t k = 0; k < n; ++k) y[k] = clamp(value(k), range.low, range.high);
        };
        if (x && r) each([=](std::int64_t k) { return x[k] * scale + shift + r[k]; });
        else if (x) each([=](std::int64_t k) { return x[k] * scale + shift; });
        else if (r) each([=](std::int64_t k) { return shift + r[k]; });
        else each([=](std::int64_t) { return shift; });
        activate(op.tail.activation, op.tail.param, y, n);
    });
}

void plane_product(DType dtype, const PlaneProduct& op) {
    dispatch_plane(dtype, [&](auto tag) {
        using A = typename decltype(tag)::type;
        const A* x = static_cast<const A*>(op.x);
        const A* gate = static_cast<const A*>(op.gate);
        A* y = static_cast<A*>(op.out);
        for (std::int64_t p = 0; p < op.pixels; ++p, x += op.images, y += op.images) {
            const A* g = op.broadcast ? gate : gate + p * op.images;
            for (std::int64_t n = 0; n < op.images; ++n) y[n] = x[n] * g[n];
        }
    });
}

void plane_moment(DType dtype, const PlaneMoment& op) {
    dispatch_plane(dtype, [&](auto tag) {
        using A = typename decltype(tag)::type;
        const A* x = static_cast<const A*>(op.x);
        const double mean = op.mean;
        for (std::int64_t n = 0; n < op.images; ++n) op.sums[n] = 0;
        for (std::int64_t p = 0; p < op.pixels; ++p, x += op.images) {
            if (op.power == 1)
                for (std::int64_t n = 0; n < op.images; ++n) op.sums[n] += double(x[n]);
            else
                for (std::int64_t n = 0; n < op.images; ++n)
                    op.sums[n] += (double(x[n]) - mean) * (double(x[n]) - mean);
        }
    });
}

namespace {

constexpr std::int64_t kPixels = 16;  // a line of the outer array

// f(pixel, image) of pixels near each other, so that lines of both arrays are used whole.
template <class F> FASTKD_HD void for_tiles(const PlaneTransfer& op, F f) {
    for (std::int64_t first = 0; first < op.pixels; first += kPixels) {
        const std::int64_t last = std::min(first + kPixels, op.pixels);
        for (std::int64_t n = 0; n < op.valid; ++n)
            for (std::int64_t p = first; p < last; ++p) f(p, n);
    }
}

}  // namespace

void plane_load(DType dtype, const PlaneTransfer& op) {
    dispatch_plane(dtype, [&](auto tag) {
        dispatch(op.outer_dtype, [&](auto outer_tag) {
            using A = typename decltype(tag)::type;
            using T = typename decltype(outer_tag)::type;
            const T* outer = static_cast<const T*>(op.outer);
            A* plane = static_cast<A*>(op.plane);
            for_tiles(op, [&](std::int64_t p, std::int64_t n) {
                plane[p * op.images + n] = A(widen(outer[n * op.image_step + p]));
            });
            for (std::int64_t p = 0; p < op.pixels; ++p)
                for (std::int64_t n = op.valid; n < op.images; ++n) plane[p * op.images + n] = 0;
        });
    });
}

void plane_store(DType dtype, const PlaneTransfer& op) {
    dispatch_plane(dtype, [&](auto tag) {
        dispatch(op.outer_dtype, [&](auto outer_tag) {
            using A = typename decltype(tag)::type;
            using T = typename decltype(outer_tag)::type;
            T* outer = static_cast<T*>(op.outer);
            const A* plane = static_cast<const A*>(op.plane);
            for_tiles(op, [&](std::int64_t p, std::int64_t n) {
                outer[n * op.image_step + p] = narrow<T>(acc_t<T>(plane[p * op.images + n]));
            });
        });
    });
}

}  // namespace fastkd::cpu::FASTKD_ISA
