// Images in blocks of whole lines of memory, and the planes of a block.
#pragma once

#include <algorithm>

#include "network/cpu/planes.h"

namespace fastkd::cpu {

inline std::int64_t size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }
inline std::int64_t round_up(std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; }

// The images of a run, in blocks that depend on their number alone.
struct ImageBlocks {
    ImageBlocks(std::int64_t images, std::int64_t element) : images(images) {
        line = kLine / element;
        lines = (images + line - 1) / line;
        count = (lines + kMostLines - 1) / kMostLines;
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
    std::int64_t images, line, lines, count, narrow;
};

// From a plane to the next. A multiple of 4 KB would have them share a few lines of the cache.
inline std::int64_t plane_step(std::int64_t pixels, std::int64_t images, std::int64_t element) {
    const std::int64_t bytes = round_up(pixels * images * element, kLine);
    return bytes % 1024 ? bytes : bytes + kMostLines * kLine;
}

}  // namespace fastkd::cpu
