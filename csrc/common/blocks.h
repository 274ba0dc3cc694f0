// How work over compressed rows is cut, on host and device: into blocks of a fixed number of (rows + edges),
// so that the cut, and with it every result, depends on the graph alone and never on the number of threads
// or on the device.
//
// Row i with edges [b, e) stands at the positions b + i .. e + i of a line of rows + edges positions;
// block k is [k * kBlock, (k + 1) * kBlock). A row belongs to the block in which it starts. A row of
// more than kBlock edges (a hub) is cut at block borders into pieces, whose partial results are
// combined in order afterwards: a block holds at most the tail of one hub and the head of another, the
// slots 2 * block and 2 * block + 1.
//
// A graph is here what has begin(i), the number of edges before row i.
#pragma once

#include "common/math.h"

namespace fastkd {

constexpr std::int64_t kBlock = 512;

template <class I> struct RowPointers {
    const I* rowptr;  // [rows + 1]
    FASTKD_HD std::int64_t begin(std::int64_t i) const { return std::int64_t(rowptr[i]); }
};

FASTKD_HD std::int64_t num_blocks(std::int64_t rows, std::int64_t edges) {
    return ceil_div(rows + edges, kBlock);
}

FASTKD_ANY_CALLBACK
template <class Graph> FASTKD_HD bool is_hub(const Graph& g, std::int64_t row) {
    return g.begin(row + 1) - g.begin(row) > kBlock;
}

// The first row that starts at or after a position.
FASTKD_ANY_CALLBACK
template <class Graph>
FASTKD_HD std::int64_t row_at(const Graph& g, std::int64_t rows, std::int64_t position) {
    std::int64_t low = 0, high = rows;
    while (low < high) {
        const std::int64_t mid = (low + high) / 2;
        if (g.begin(mid) + mid < position) low = mid + 1;
        else high = mid;
    }
    return low;
}

// rows(first, last) for the rows that start in the block and are no hubs.
FASTKD_ANY_CALLBACK
template <class Graph, class Rows>
FASTKD_HD void for_rows(const Graph& g, std::int64_t num_rows, std::int64_t block, const Rows& rows) {
    const std::int64_t first = row_at(g, num_rows, block * kBlock);
    std::int64_t last = row_at(g, num_rows, (block + 1) * kBlock);
    // A hub goes beyond the block in which it starts, so it is the last row that starts there.
    if (first < last && is_hub(g, last - 1)) --last;
    if (first < last) rows(first, last);
}

// piece(i, b, e, slot) for the edges [b, e) of a hub that lie in the block.
FASTKD_ANY_CALLBACK
template <class Graph, class Piece>
FASTKD_HD void for_pieces(const Graph& g, std::int64_t rows, std::int64_t block, const Piece& piece) {
    const std::int64_t first = block * kBlock, last = first + kBlock;
    const std::int64_t next = row_at(g, rows, first);
    if (next > 0) {
        const std::int64_t i = next - 1, b = g.begin(i), e = g.begin(i + 1);
        const std::int64_t from = b > first - i ? b : first - i, to = e < last - i ? e : last - i;
        if (e - b > kBlock && from < to) piece(i, from, to, 2 * block);
    }
    const std::int64_t i = row_at(g, rows, last) - 1;
    if (i >= next && i < rows) {
        const std::int64_t b = g.begin(i), e = g.begin(i + 1);
        if (e - b > kBlock) piece(i, b, last - i, 2 * block + 1);
    }
}

// edges(i, b, e) for the part of every row that lies in the block, hub or not.
FASTKD_ANY_CALLBACK
template <class Graph, class Edges>
FASTKD_HD void for_edges(const Graph& g, std::int64_t rows, std::int64_t block, const Edges& edges) {
    const std::int64_t first = block * kBlock, last = first + kBlock;
    const std::int64_t before = row_at(g, rows, first) - 1;
    for (std::int64_t i = before > 0 ? before : 0; i < rows && g.begin(i) + i < last; ++i) {
        const std::int64_t b = g.begin(i) > first - i ? g.begin(i) : first - i;
        const std::int64_t e = g.begin(i + 1) < last - i ? g.begin(i + 1) : last - i;
        if (b < e) edges(i, b, e);
    }
}

// The slot of a hub's first piece, and slot(s) for all of them, in order.
FASTKD_ANY_CALLBACK
template <class Graph> FASTKD_HD std::int64_t first_slot(const Graph& g, std::int64_t row) {
    return 2 * ((g.begin(row) + row) / kBlock) + 1;
}
FASTKD_ANY_CALLBACK
template <class Graph, class Slot>
FASTKD_HD void for_slots(const Graph& g, std::int64_t row, const Slot& slot) {
    const std::int64_t first = (g.begin(row) + row) / kBlock;
    const std::int64_t last = (g.begin(row + 1) - 1 + row) / kBlock;
    slot(2 * first + 1);
    for (std::int64_t k = first + 1; k <= last; ++k) slot(2 * k);
}

// hub(i) for every hub.
FASTKD_ANY_CALLBACK
template <class Graph, class Hub> FASTKD_HD void for_hubs(const Graph& g, std::int64_t rows, const Hub& hub) {
    for (std::int64_t i = 0; i < rows; ++i)
        if (is_hub(g, i)) hub(i);
}

// Whether there is a hub, where the largest degree may be known (else -1).
FASTKD_ANY_CALLBACK
template <class Graph> FASTKD_HD bool has_hub(const Graph& g, std::int64_t rows, std::int64_t max_degree) {
    if (max_degree >= 0) return max_degree > kBlock;
    for (std::int64_t i = 0; i < rows; ++i)
        if (is_hub(g, i)) return true;
    return false;
}

}  // namespace fastkd
