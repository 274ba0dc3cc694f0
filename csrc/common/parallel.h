// How work over compressed rows is cut: into blocks of a fixed number of (rows + edges), so that the
// cut, and with it every result, depends on the graph alone and never on the number of threads.
//
// Row i with edges [b, e) stands at the positions b + i .. e + i of a line of rows + edges positions;
// block k is [k * kBlock, (k + 1) * kBlock). A row belongs to the block in which it starts. A row of
// more than kBlock edges (a hub) is cut at block borders into pieces, whose partial results are
// combined in order afterwards: a block holds at most the tail of one hub and the head of another.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <new>

#include "common/interrupt.h"

namespace fastkd::cpu {
namespace {  // one copy per source file: these are compiled for several instruction sets

constexpr std::int64_t kBlock = 512;

// One thread for what takes it some 50 microseconds (about a million elements of features): to wake
// others costs a few, and on a busy machine much more.
inline int threads_for(std::int64_t elements, int threads) { return elements < (1 << 20) ? 1 : threads; }

// An exception of f, or an interrupt, skips the blocks that nobody has begun, and leaves.
template <class F> void parallel_for(std::int64_t n, int threads, F&& f) {
    // A parallel region of one thread would still start OpenMP, which hangs in a forked child.
    if (threads <= 1 || n <= 1) {
        for (std::int64_t k = 0; k < n; ++k) {
            if (k) poll_often();
            f(k);
        }
        return;
    }
    Loop loop;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (std::int64_t k = 0; k < n; ++k) {
        if (loop.ended()) continue;
        try {  // nothing may be thrown out of a parallel region
            const Loop::Block block(loop);
            f(k);
        } catch (...) {
            loop.end();
        }
    }
    loop.rethrow();
}

inline std::int64_t num_blocks(std::int64_t rows, std::int64_t edges) {
    return (rows + edges + kBlock - 1) / kBlock;
}

// The first row that starts at or after a position. begin(i) is the number of edges before row i.
template <class Begin> std::int64_t row_at(Begin begin, std::int64_t rows, std::int64_t position) {
    std::int64_t low = 0, high = rows;
    while (low < high) {
        const std::int64_t mid = (low + high) / 2;
        if (begin(mid) + mid < position) low = mid + 1;
        else high = mid;
    }
    return low;
}

// rows(first, last) for the whole rows of a block, piece(i, b, e, slot) for the edges [b, e) of a hub,
// slot in [0, 2 * num_blocks).
template <class Begin, class Rows, class Piece>
void for_rows(Begin begin, std::int64_t num_rows, std::int64_t block, Rows rows, Piece piece) {
    const std::int64_t first = block * kBlock, last = first + kBlock;
    std::int64_t i = row_at(begin, num_rows, first);
    if (i > 0) {
        const std::int64_t b = begin(i - 1), e = begin(i);
        const std::int64_t from = std::max(b, first - (i - 1)), to = std::min(e, last - (i - 1));
        if (e - b > kBlock && from < to) piece(i - 1, from, to, 2 * block);
    }
    const std::int64_t run = i;
    while (i < num_rows && begin(i) + i < last && begin(i + 1) - begin(i) <= kBlock) ++i;
    if (run < i) rows(run, i);
    if (i < num_rows && begin(i) + i < last)
        piece(i, begin(i), std::min(begin(i + 1), last - i), 2 * block + 1);
}

// edges(i, b, e) for the part of every row that lies in the block, hub or not.
template <class Begin, class Edges>
void for_edges(Begin begin, std::int64_t rows, std::int64_t block, Edges edges) {
    const std::int64_t first = block * kBlock, last = first + kBlock;
    for (std::int64_t i = std::max<std::int64_t>(row_at(begin, rows, first) - 1, 0);
         i < rows && begin(i) + i < last; ++i) {
        const std::int64_t b = std::max<std::int64_t>(begin(i), first - i);
        const std::int64_t e = std::min<std::int64_t>(begin(i + 1), last - i);
        if (b < e) edges(i, b, e);
    }
}

// The slot of a hub's first piece, and slot(s) for all of them, in order.
template <class Begin> std::int64_t first_slot(Begin begin, std::int64_t row) {
    return 2 * ((begin(row) + row) / kBlock) + 1;
}
template <class Begin, class Slot> void for_slots(Begin begin, std::int64_t row, Slot slot) {
    const std::int64_t first = (begin(row) + row) / kBlock;
    const std::int64_t last = (begin(row + 1) - 1 + row) / kBlock;
    slot(2 * first + 1);
    for (std::int64_t k = first + 1; k <= last; ++k) slot(2 * k);
}

// hub(i) for every row of more than kBlock edges.
template <class Begin, class Hub> void for_hubs(Begin begin, std::int64_t rows, Hub hub) {
    for (std::int64_t i = 0; i < rows; ++i)
        if (begin(i + 1) - begin(i) > kBlock) hub(i);
}

template <class Begin> bool has_hub(Begin begin, std::int64_t rows) {
    bool found = false;
    for_hubs(begin, rows, [&](std::int64_t) { found = true; });
    return found;
}

// Scratch without the standard containers, whose code would be shared between instruction sets.
template <class T> struct Scratch {
    explicit Scratch(std::int64_t n)
        : data(n > 0 ? static_cast<T*>(std::malloc(std::size_t(n) * sizeof(T))) : nullptr) {
        if (n > 0 && !data) throw std::bad_alloc();
    }
    ~Scratch() { std::free(data); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    T& operator[](std::int64_t i) { return data[i]; }
    T* data;
};

}  // namespace
}  // namespace fastkd::cpu
