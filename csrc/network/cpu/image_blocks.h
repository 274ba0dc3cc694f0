// Images in blocks of whole lines of memory, and the planes of a block.
#pragma once

#include <algorithm>

#include "network/cpu/planes.h"

namespace fastkd::cpu {

// The images of a run, in blocks that depend on their number alone.
struct ImageBlocks {
    ImageBlocks(std::int64_t images, std::int64_t element) : images(images) {
        line = kLine / element;
        lines = ceil_div(images, line);
        count = ceil_div(lines, kMostLines);
        narrow = 16 / element;
        while (narrow < images && narrow < line) narrow *= 2;
    }
    std::int64_t first(std::int64_t b) const {
        return (b * (lines / count) + std::min(b, lines % count)) * line;
    }
    std::int64_t valid(std::int64_t b) const { return std::min(first(b + 1), images) - first(b); }
    std::int64_t padded(std::int64_t b) const {
        return images < line ? narrow : (lines / count + (b < lines % count)) * line;
    }
    std::int64_t images;
    std::int64_t line;    // images in a line of memory
    std::int64_t lines;   // of all images
    std::int64_t count;   // blocks
    std::int64_t narrow;  // images at a pixel where all are less than a line
};

// From a plane to the next. A multiple of 4 KB would have them share a few lines of the cache.
inline std::int64_t plane_step(std::int64_t pixels, std::int64_t images, std::int64_t element) {
    const std::int64_t bytes = round_up(pixels * images * element, kLine);
    return bytes % 1024 ? bytes : bytes + kMostLines * kLine;
}

// At least what planes of all channels of a value take: the same for all individuals, so that buffers fit the
// next one.
inline std::int64_t planes_bytes(const Value& v, std::int64_t images, std::int64_t element) {
    return v.channels * (round_up(v.height * v.width * images * element, kLine) + kMostLines * kLine);
}

}  // namespace fastkd::cpu
