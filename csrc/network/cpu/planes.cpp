// Pools, and what works number by number.
#include "network/cpu/planes.h"

#include "network/cpu/tail.h"
#include "network/cpu/tiles.h"

namespace fastkd::cpu::FASTKD_ISA {
namespace {

// One pixel of the result, for all images.
template <class A, int Bytes> void pool_pixel(const PlanePool& q, const Pooled<std::int64_t>& rows,
                                              const Pooled<std::int64_t>& columns, A* out) {
    using V = typename Vec<A, Bytes>::type;
    const A* in = static_cast<const A*>(q.in);
    const A count = A(pool_count(rows, columns, q.count_padding));
    for (std::int64_t n = 0; n < q.images; n += Vec<A, Bytes>::lanes) {
        V y = V{} + (q.max ? -std::numeric_limits<A>::infinity() : A(0));
        for (std::int64_t r = rows.first; r < rows.last; r += rows.step)
            for (std::int64_t c = columns.first; c < columns.last; c += columns.step) {
                const V x = load_as<V>(in + (r * q.size[1] + c) * q.images + n);
                y = q.max ? pool_max(y, x) : y + x;
            }
        if (!q.max) y /= V{} + count;
        __builtin_memcpy(out + n, &y, sizeof(y));
    }
}

template <class A, int Bytes> void pool(const PlanePool& q) {
    A* out = static_cast<A*>(q.out);
    for (std::int64_t i = 0; i < q.out_size[0]; ++i) {
        const Pooled rows = q.pooled(0, i);
        for (std::int64_t j = 0; j < q.out_size[1]; ++j, out += q.images)
            pool_pixel<A, Bytes>(q, rows, q.pooled(1, j), out);
    }
}

constexpr std::int64_t kPixels = 16;  // of the outer array, of one image: they fill its lines of the cache

// f(pixel, image) of pixels near each other, so that lines of both arrays are used whole.
template <class F> FASTKD_HD void for_tiles(const PlaneTransfer& op, F f) {
    for (std::int64_t first = 0; first < op.pixels; first += kPixels) {
        const std::int64_t last = std::min(first + kPixels, op.pixels);
        for (std::int64_t n = 0; n < op.valid; ++n)
            for (std::int64_t p = first; p < last; ++p) f(p, n);
    }
}

}  // namespace

void plane_pool(DType dtype, const PlanePool& q) {
    dispatch_acc(dtype, [&](auto tag) {
        using A = typename decltype(tag)::type;
        dispatch_width<A>(q.images, [&](auto bytes) { pool<A, bytes.value>(q); });
    });
}

void plane_pointwise(DType dtype, const PlanePointwise& op) {
    dispatch_acc(dtype, [&](auto tag) {
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
    dispatch_acc(dtype, [&](auto tag) {
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
    dispatch_acc(dtype, [&](auto tag) {
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

void plane_load(DType dtype, const PlaneTransfer& op) {
    dispatch_acc(dtype, [&](auto tag) {
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
    dispatch_acc(dtype, [&](auto tag) {
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
