// How the window of a convolution or of a pool slides over an image: each formula written once, for host and
// device.
#pragma once

#include "common/math.h"

namespace fastkd {

// The taps of one axis that fall on the image: first <= tap < last. The window begins at `start`, which may
// lie in the padding.
template <class I> struct Taps {
    I start, first, last;
};

// Positions first <= position < last.
template <class I> struct Span {
    I first, last;
};

// What a pool reads of one axis: the positions first, first + step, ... < last of the image. `count` are
// those that an average with the padding counts.
template <class I> struct Pooled {
    I first, last, step, count;
};

// Index 0 stands for rows, 1 for columns. I is std::int64_t on the host and int on the device.
template <class I> struct Window {
    I size[2], out_size[2];  // of the image, of the result
    I kernel[2], stride[2], padding[2], dilation[2];

    // Where the window of a position of the result begins.
    FASTKD_HD I start(int axis, I at) const { return at * stride[axis] - padding[axis]; }
    FASTKD_HD bool inside(int axis, I position) const { return position >= 0 && position < size[axis]; }

    FASTKD_HD Taps<I> taps(int axis, I at) const {
        const I from = start(axis, at), step = dilation[axis];
        I first = 0, last = kernel[axis];
        if (from < 0) first = (-from + step - 1) / step;
        if (from + (last - 1) * step >= size[axis])
            last = from < size[axis] ? (size[axis] - 1 - from) / step + 1 : 0;
        return {from, first, last};
    }

    // The positions of the result at which a tap falls on the image.
    FASTKD_HD Span<I> reached(int axis, I tap) const {
        const I shift = padding[axis] - tap * dilation[axis], end = size[axis] + shift;
        const I first = shift > 0 ? (shift + stride[axis] - 1) / stride[axis] : 0;
        const I last = end > 0 ? (end + stride[axis] - 1) / stride[axis] : 0;
        return {first, last < out_size[axis] ? last : out_size[axis]};
    }

    // The positions of the result at which all taps do.
    FASTKD_HD Span<I> interior(int axis) const {
        const I begin = reached(axis, 0).first, last = reached(axis, kernel[axis] - 1).last;
        const I first = begin < out_size[axis] ? begin : out_size[axis];
        return {first, last > first ? last : first};
    }

    // The position of the result of which a tap reads this position of the image, or -1 if there is none.
    FASTKD_HD I reader(int axis, I position, I tap) const {
        const I at = position + padding[axis] - tap * dilation[axis];
        if (at < 0 || at % stride[axis] || at / stride[axis] >= out_size[axis]) return -1;
        return at / stride[axis];
    }

    // Is the kernel one pixel that never leaves the image, the same pixel as that of the result?
    FASTKD_HD bool is_point() const {
        bool point = true;
        for (int k = 0; k < 2; ++k) point = point && kernel[k] == 1 && stride[k] == 1 && padding[k] == 0;
        return point;
    }

    // A kernel of 0 is adaptive: it divides the image among the positions of the result.
    FASTKD_HD Pooled<I> pooled(int axis, I at) const {
        if (kernel[axis] == 0) {
            const std::int64_t all = size[axis], parts = out_size[axis];
            const I first = I(at * all / parts), last = I(((at + 1) * all + parts - 1) / parts);
            return {first, last, 1, last - first};
        }
        const I step = dilation[axis], end = size[axis] + padding[axis];
        I first = start(axis, at);
        const I last = first + (kernel[axis] - 1) * step + 1;
        const I count = (last < end ? last : end) - first;
        if (first < 0) first += (-first + step - 1) / step * step;
        return {first, last < size[axis] ? last : size[axis], step, count};
    }
};

// What an average over a window divides by. Padding that is larger at the end has windows beyond it: as in
// torch, those divide by one.
template <class I>
FASTKD_HD std::int64_t pool_count(const Pooled<I>& rows, const Pooled<I>& columns, bool count_padding) {
    const std::int64_t height = rows.last > rows.first ? rows.last - rows.first : 0;
    const std::int64_t width = columns.last > columns.first ? columns.last - columns.first : 0;
    const std::int64_t count = count_padding ? std::int64_t(rows.count) * columns.count : height * width;
    return count > 1 ? count : 1;
}

// The larger of a pool's maximum so far and a number. NaN stays.
template <class V> FASTKD_HD V pool_max(V most, V x) { return (x > most) | (x != x) ? x : most; }

}  // namespace fastkd
