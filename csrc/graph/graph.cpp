// Building compressed rows: a stable, parallel radix sort of (dst, src) keys, the transpose by the
// same sort, and the union of two graphs by merging rows.
#include "graph/graph.h"

#include <memory>
#include <utility>
#include <vector>

#include "common/blocks.h"
#include "common/dispatch.h"
#include "common/parallel.h"

namespace fastkd::cpu {
namespace {

int bits_for(std::int64_t count) {  // of the values 0 .. count - 1
    int bits = 0;
    while (bits < 63 && (std::int64_t(1) << bits) < count) ++bits;
    return bits;
}

// f(b, e) for the pieces of the part of 0 .. n - 1 that thread t of `threads` does. A piece is the loop of
// f itself: what f captures by value then stays in registers.
template <class F> void for_pieces(std::int64_t n, int threads, std::int64_t t, F f) {
    constexpr std::int64_t piece = 1 << 16;
    const std::int64_t end = n * (t + 1) / threads;
    for (std::int64_t b = n * t / threads; b < end; b += piece) {
        poll();
        f(b, std::min(end, b + piece));
    }
}

// Keys with their payload, sorted by the bits [low, high) of the key from one pair of arrays to the other
// and back. The sort is stable, hence the same for every number of threads.
template <class Key, class I> struct Sorter {
    std::int64_t n;
    int threads;
    std::unique_ptr<Key[]> key{new Key[n]}, key_next{new Key[n]};
    std::unique_ptr<I[]> value{new I[n]}, value_next{new I[n]};

    void sort(int low, int high) {
        const int passes = (high - low + 10) / 11;
        for (int pass = 0; pass < passes; ++pass) {
            const int from = low + (high - low) * pass / passes;
            const int to = low + (high - low) * (pass + 1) / passes;
            sort_digit(from, to - from);
        }
    }

    void sort_digit(int shift, int bits) {
        const std::int64_t digits = std::int64_t(1) << bits;
        const Key mask = Key(digits - 1);
        const Key* keys = key.get();
        const I* values = value.get();
        Key* keys_to = key_next.get();
        I* values_to = value_next.get();
        std::vector<std::int64_t> offset(std::size_t(digits * threads), 0);
        parallel_for(threads, threads, [&](std::int64_t t) {
            std::int64_t* count = &offset[std::size_t(t * digits)];
            for_pieces(n, threads, t, [=](std::int64_t b, std::int64_t e) {
                for (std::int64_t x = b; x < e; ++x) ++count[(keys[x] >> shift) & mask];
            });
        });
        std::int64_t sum = 0;
        for (std::int64_t d = 0; d < digits; ++d)
            for (int t = 0; t < threads; ++t) {
                std::int64_t& o = offset[std::size_t(t * digits + d)];
                sum += std::exchange(o, sum);
            }
        parallel_for(threads, threads, [&](std::int64_t t) {
            std::int64_t* next = &offset[std::size_t(t * digits)];
            for_pieces(n, threads, t, [=](std::int64_t b, std::int64_t e) {
                for (std::int64_t x = b; x < e; ++x) {
                    const std::int64_t to = next[(keys[x] >> shift) & mask]++;
                    keys_to[to] = keys[x];
                    values_to[to] = values[x];
                }
            });
        });
        std::swap(key, key_next);
        std::swap(value, value_next);
    }

    // The sorted keys as compressed rows: the row in the high bits, the column in the low ones.
    void write(int col_bits, std::int64_t rows, I* rowptr, I* col, I* perm) const {
        const Key mask = Key((Key(1) << col_bits) - 1);
        const Key* keys = key.get();
        const I* values = value.get();
        auto row = [=, n = n](std::int64_t x) {
            return x < 0 ? std::int64_t(-1) : (x == n ? rows : std::int64_t(keys[x] >> col_bits));
        };
        parallel_for(threads, threads, [&](std::int64_t t) {
            for_pieces(n, threads, t, [=](std::int64_t b, std::int64_t e) {
                for (std::int64_t x = b; x < e; ++x) {
                    for (std::int64_t i = row(x - 1) + 1; i <= row(x); ++i) rowptr[i] = I(x);
                    col[x] = I(keys[x] & mask);
                    perm[x] = values[x];
                }
            });
        });
        for (std::int64_t i = row(n - 1) + 1; i <= rows; ++i) rowptr[i] = I(n);
    }
};

template <class F> void dispatch_key(int bits, F&& f) {
    if (bits < 32) f(type_tag<std::uint32_t>{});
    else f(type_tag<std::uint64_t>{});
}

template <class In> struct Edges {
    const In *src, *dst;  // [count]
    std::int64_t count, num_src, num_dst;

    bool valid(std::int64_t x) const {
        return src[x] >= 0 && src[x] < num_src && dst[x] >= 0 && dst[x] < num_dst;
    }
};

struct Scan {
    std::int64_t bad = -1;  // the first edge out of range
    bool by_src = true;     // no source is before that of the edge before
};

template <class In> Scan scan(const Edges<In>& edges, int threads) {
    std::vector<Scan> parts(std::size_t(threads), Scan{});
    parallel_for(threads, threads, [&](std::int64_t t) {
        Scan& part = parts[std::size_t(t)];
        for_pieces(edges.count, threads, t, [&part, edges](std::int64_t b, std::int64_t e) {
            bool by_src = true;
            for (std::int64_t x = b; x < e && part.bad < 0; ++x) {
                if (!edges.valid(x)) part.bad = x;
                else by_src &= x == 0 || edges.src[x] >= edges.src[x - 1];
            }
            part.by_src = part.by_src && by_src;
        });
    });
    Scan all;
    for (int t = threads; t-- > 0;) {
        if (parts[std::size_t(t)].bad >= 0) all.bad = parts[std::size_t(t)].bad;
        all.by_src = all.by_src && parts[std::size_t(t)].by_src;
    }
    return all;
}

template <class In, class I>
void sort_edges(const Edges<In>& edges, bool by_src, I* rowptr, I* col, I* perm, int threads) {
    const int src_bits = bits_for(edges.num_src), bits = src_bits + bits_for(edges.num_dst);
    dispatch_key(bits, [&](auto tag) {
        using Key = typename decltype(tag)::type;
        Sorter<Key, I> sorter{edges.count, threads};
        parallel_for(threads, threads, [&](std::int64_t t) {
            Key* keys = sorter.key.get();
            I* values = sorter.value.get();
            for_pieces(edges.count, threads, t, [=](std::int64_t b, std::int64_t e) {
                for (std::int64_t x = b; x < e; ++x) {
                    keys[x] = Key(Key(edges.dst[x]) << src_bits) | Key(edges.src[x]);
                    values[x] = I(x);
                }
            });
        });
        if (!by_src) sorter.sort(0, src_bits);
        sorter.sort(src_bits, bits);
        sorter.write(src_bits, edges.num_dst, rowptr, col, perm);
    });
}

// Ascending columns of a row, taken one by one.
template <class I> struct Columns {
    const I *next, *end;
    bool done() const { return next == end; }
    void skip(I column) {
        while (next < end && *next == column) ++next;
    }
};

// The number of distinct columns in both; they are written to `to`, unless it is null.
template <class I> std::int64_t merge(Columns<I> a, Columns<I> b, I* to) {
    std::int64_t count = 0;
    while (!a.done() || !b.done()) {
        const I least = b.done() || (!a.done() && *a.next < *b.next) ? *a.next : *b.next;
        a.skip(least), b.skip(least);
        if (to) to[count] = least;
        ++count;
    }
    return count;
}

}  // namespace

std::int64_t csr_from_coo(const void* src, const void* dst, bool wide_in, std::int64_t edges,
                          std::int64_t num_src, std::int64_t num_dst, bool wide_out, void* rowptr, void* col,
                          void* perm, int threads) {
    threads = std::max(threads, 1);
    std::int64_t bad = -1;
    dispatch_index(wide_in, [&](auto in) {
        using In = typename decltype(in)::type;
        const Edges<In> list{static_cast<const In*>(src), static_cast<const In*>(dst), edges, num_src,
                             num_dst};
        const Scan found = scan(list, threads);
        bad = found.bad;
        if (bad >= 0) return;
        dispatch_index(wide_out, [&](auto out) {
            using I = typename decltype(out)::type;
            sort_edges(list, found.by_src, static_cast<I*>(rowptr), static_cast<I*>(col),
                       static_cast<I*>(perm), threads);
        });
    });
    return bad;
}

void csr_transpose(const Csr& in, void* rowptr_out, void* col_out, void* perm_out, int threads) {
    threads = std::max(threads, 1);
    dispatch_index(in.wide, [&](auto index) {
        using I = typename decltype(index)::type;
        const I* rowptr = static_cast<const I*>(in.rowptr);
        const I* col = static_cast<const I*>(in.col);
        const int row_bits = bits_for(in.rows), bits = row_bits + bits_for(in.cols);
        dispatch_key(bits, [&](auto key) {
            using Key = typename decltype(key)::type;
            Sorter<Key, I> sorter{in.edges, threads};
            Key* keys = sorter.key.get();
            I* values = sorter.value.get();
            parallel_for(num_blocks(in.rows, in.edges), threads, [&](std::int64_t block) {
                for_edges(RowPointers<I>{rowptr}, in.rows, block,
                          [=](std::int64_t i, std::int64_t b, std::int64_t e) {
                              for (std::int64_t x = b; x < e; ++x) {
                                  keys[x] = Key(Key(col[x]) << row_bits) | Key(i);
                                  values[x] = I(x);
                              }
                          });
            });
            sorter.sort(row_bits, bits);  // rows are in order already
            sorter.write(row_bits, in.cols, static_cast<I*>(rowptr_out), static_cast<I*>(col_out),
                         static_cast<I*>(perm_out));
        });
    });
}

void csr_union(const Csr& a, const Csr& b, void* rowptr_out, void* col_out, int threads) {
    dispatch_index(a.wide, [&](auto index) {
        using I = typename decltype(index)::type;
        I* rowptr = static_cast<I*>(rowptr_out);
        I* col = static_cast<I*>(col_out);
        auto row = [](const Csr& g, std::int64_t i) {
            const I* pointers = static_cast<const I*>(g.rowptr);
            const I* columns = static_cast<const I*>(g.col);
            return Columns<I>{columns + pointers[i], columns + pointers[i + 1]};
        };
        const std::int64_t rows = a.rows;
        parallel_for(num_blocks(rows, 0), threads, [&](std::int64_t block) {
            const std::int64_t last = std::min((block + 1) * kBlock, rows);
            for (std::int64_t i = block * kBlock; i < last; ++i) {
                const std::int64_t count = merge(row(a, i), row(b, i), col ? col + rowptr[i] : nullptr);
                if (!col) rowptr[i + 1] = I(count);
            }
        });
        if (col) return;
        rowptr[0] = 0;
        for (std::int64_t i = 0; i < rows; ++i) rowptr[i + 1] += rowptr[i];
    });
}

}  // namespace fastkd::cpu
