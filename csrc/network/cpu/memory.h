// Memory for planes: aligned to lines, and huge pages where it is large.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "network/cpu/image_blocks.h"
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fastkd::cpu {

constexpr std::int64_t kHuge = 2 << 20;  // bytes of a huge page

// `bytes` is a multiple of kHuge, or of kLine where it is less than kHuge. The caller frees it.
inline char* allocate(std::int64_t bytes) {
    const std::int64_t alignment = bytes >= kHuge ? kHuge : kLine;
    void* data = std::aligned_alloc(std::size_t(alignment), std::size_t(bytes));
    if (!data) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    if (bytes >= kHuge) madvise(data, std::size_t(bytes), MADV_HUGEPAGE);
#endif
    return static_cast<char*>(data);
}

// Buffers given back are taken again. Where none is large enough, the largest is replaced, so that there
// are never more of some size or above than were lent at once when one of these was asked for.
class BufferPool {
  public:
    ~BufferPool() {
        for (auto& b : free_) std::free(b.data);
    }
    // What a buffer of so many bytes takes.
    static std::int64_t size(std::int64_t bytes) {
        return round_up(bytes + kLine, bytes + kLine >= kHuge ? kHuge : kLine);
    }
    std::shared_ptr<char> take(std::int64_t bytes) {
        bytes = size(bytes);
        Buffer buffer{nullptr, bytes};
        const auto best = smallest_of(bytes);
        if (best != free_.end()) {
            buffer = *best;
            free_.erase(best);
        } else {
            drop_largest();
            buffer.data = allocate(bytes);
            held_ += bytes;
            most_ = std::max(most_, held_);
        }
        return {buffer.data, [this, buffer](char*) { free_.push_back(buffer); }};
    }
    std::int64_t most() const { return most_; }

  private:
    struct Buffer {
        char* data;
        std::int64_t bytes;
    };
    using Place = std::vector<Buffer>::iterator;

    // The smallest free buffer that is large enough.
    Place smallest_of(std::int64_t bytes) {
        Place best = free_.end();
        for (Place b = free_.begin(); b != free_.end(); ++b)
            if (b->bytes >= bytes && (best == free_.end() || b->bytes < best->bytes)) best = b;
        return best;
    }
    void drop_largest() {
        if (free_.empty()) return;
        const Place largest = std::max_element(
            free_.begin(), free_.end(), [](const Buffer& a, const Buffer& b) { return a.bytes < b.bytes; });
        std::free(largest->data);
        held_ -= largest->bytes;
        free_.erase(largest);
    }

    std::vector<Buffer> free_;
    std::int64_t held_ = 0, most_ = 0;
};

}  // namespace fastkd::cpu
