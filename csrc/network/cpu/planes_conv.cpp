// Convolutions on planes, and their weights in the order in which they are read.
#include "network/cpu/planes.h"
#include "network/cpu/tail.h"
#include "network/cpu/tiles.h"

namespace fastkd::cpu::FASTKD_ISA {
namespace {

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

// The places in memory at which a tile of K outputs ends.
template <class A, int K> struct Ends {
    A* const* out;
    const A *scale, *shift;
    const A* residual[K];  // or null

    explicit Ends(const Strip<A>& s)
        : out(reinterpret_cast<A* const*>(s.conv->out) + s.output),
          scale(static_cast<const A*>(s.conv->scale) + s.output),
          shift(static_cast<const A*>(s.conv->shift) + s.output) {
        const void* const* from = s.conv->tail.residual;
        for (int j = 0; j < K; ++j) residual[j] = from ? static_cast<const A*>(from[s.output + j]) : nullptr;
    }
    template <class V, int N>
    FASTKD_HD void store(const V (&sum)[K][N], std::int64_t to, const Range<A>& range) const {
        constexpr int lanes = int(sizeof(V) / sizeof(A));
#pragma GCC unroll 8
        for (int j = 0; j < K; ++j)
#pragma GCC unroll 8
            for (int v = 0; v < N; ++v) {
                V y = sum[j][v] * scale[j] + shift[j];
                if (residual[j]) y += load_as<V>(residual[j] + to + v * lanes);
                y = clamp(y, V{} + range.low, V{} + range.high);
                __builtin_memcpy(out[j] + to + v * lanes, &y, sizeof(y));
            }
    }
};

// K outputs x N vectors of numbers at a time. Every sum runs over (row, column, input). Parts: columns
// in a vector, or 0 if the numbers of the input follow each other as those of the run do.
template <class A, int Bytes, int Parts, int K, int N> void strip(const Strip<A>& s) {
    using V = typename Vec<A, Bytes>::type;
    constexpr int lanes = Vec<A, Bytes>::lanes;
    const PlaneConv& q = *s.conv;
    const A* const* in = reinterpret_cast<const A* const*>(q.in);
    const Ends<A, K> ends(s);
    const Taps rows = q.taps(0, s.row), columns = q.taps(1, s.column);
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
                    add_products(sum, x, w);
                }
            }
        }
        ends.store(sum, to_run + at, s.range);
    }
}

template <class A, int Bytes, int Parts, int N> auto strip_of(std::int64_t outputs) {
    return dispatch_count<kTile>(outputs, [](auto count) { return &strip<A, Bytes, Parts, count.value, N>; });
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

// f(column, hop, at, count) for runs of numbers, at first + at ..., of columns with the same taps, that
// cover the numbers [begin, end) of a row.
template <class A, class F> void for_runs(const PlaneConv& q, std::int64_t begin, std::int64_t end, F&& f) {
    const std::int64_t step = q.stride[1];
    auto [first, last] = q.interior(1);
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
    Taps<std::int64_t> rows, columns;
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
        const Taps rows = q.taps(0, row);
        for_runs<A>(q, 0, line, [&](std::int64_t column, std::int64_t hop, std::int64_t, std::int64_t n) {
            const Taps columns = q.taps(1, column);
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
    // Few enough numbers that the rows they read stay near while all outputs are computed.
    const std::int64_t bytes = q.kernel[0] * q.stride[1] * q.inputs * std::int64_t(sizeof(A));
    const std::int64_t chunk = std::max<std::int64_t>(kNear / (bytes + 1) / wide, 4) * wide;
    for (std::int64_t row = 0; row < q.out_size[0]; ++row)
        for (std::int64_t begin = 0; begin < line; begin += chunk) {
            const std::int64_t end = std::min(begin + chunk, line);
            for_tiles<kTile>(q.outputs, [&](std::int64_t first, std::int64_t count) {
                const A* weight = static_cast<const A*>(q.packed) + first * q.inputs * taps;
                for_runs<A>(q, begin, end,
                            [&](std::int64_t column, std::int64_t hop, std::int64_t at, std::int64_t n) {
                                const Strip<A> s{&q,  weight, first, range_of<A>(q.tail.activation),
                                                 row, column, hop,   at,
                                                 n};
                                dispatch_parts<A>(
                                    q, hop, [&](auto parts) { strips<A, kVecBytes, parts.value>(s, count); });
                            });
                if (is_clamp(q.tail.activation)) return;
                for (std::int64_t k = first; k < first + count; ++k)
                    activate(q.tail.activation, q.tail.param, static_cast<A*>(q.out[k]) + row * line + begin,
                             end - begin);
            });
        }
}

}  // namespace

void plane_conv(DType dtype, const PlaneConv& q) {
    dispatch_acc(dtype, [&](auto tag) {
        using A = typename decltype(tag)::type;
        if (q.is_point()) return convolve<A>(as_line<A>(q));
        if (q.inputs == 1 && q.outputs == 1) depthwise<A>(q);
        else convolve<A>(q);
    });
}

void pack_weights(DType dtype, const PackWeights& op) {
    dispatch_acc(dtype, [&](auto tag) {
        using A = typename decltype(tag)::type;
        for_tiles<kTile>(op.outputs, [&](std::int64_t first, std::int64_t count) {
            A* packed = static_cast<A*>(op.packed) + first * op.inputs * op.taps;
            const A* rows[kTile];
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
            dispatch_count<kTile>(count, copy);
        });
    });
}

}  // namespace fastkd::cpu::FASTKD_ISA
