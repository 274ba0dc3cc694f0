// Building compressed rows: a stable, parallel radix sort of (dst, src) keys, the transpose by the
// same sort, and the union of two graphs by merging rows.
#include "graph/graph.h"

#include <memory>
#include <utility>
#include <vector>

#include "common/dispatch.h"
#include "common/parallel.h"

namespace fastkd::cpu {
namespace {

int bits_for(std::int64_t count) {  // of the values 0 .. count - 1
    int bits = 0;
    while (bits < 63 && (std::int64_t(1) << bits) < count) ++bits;
    return bits;
}

// f(x) for the part of 0 .. n - 1 that thread t of `threads` does.
template <class F> void for_chunk(std::int64_t n, int threads, std::int64_t t, F f) {
    constexpr std::int64_t piece = 1 << 16;
    const std::int64_t end = n * (t + 1) / threads;
    for (std::int64_t x = n * t / threads; x < end;) {
        poll();
        for (const std::int64_t last = std::min(end, x + piece); x < last; ++x) f(x);
    }
}

// Keys with their payload, sorted in place of each other by the bits [low, high) of the key. Stable,
// hence the same for every number of threads.
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
        std::vector<std::int64_t> offset(std::size_t(digits * threads), 0);
        parallel_for(threads, threads, [&](std::int64_t t) {
            std::int64_t* count = &offset[std::size_t(t * digits)];
            for_chunk(n, threads, t, [&](std::int64_t x) { ++count[(key[x] >> shift) & mask]; });
        });
        std::int64_t sum = 0;
        for (std::int64_t d = 0; d < digits; ++d)
            for (int t = 0; t < threads; ++t) {
                std::int64_t& o = offset[std::size_t(t * digits + d)];
                sum += std::exchange(o, sum);
            }
        parallel_for(threads, threads, [&](std::int64_t t) {
            std::int64_t* next = &offset[std::size_t(t * digits)];
            for_chunk(n, threads, t, [&](std::int64_t x) {
                const std::int64_t to = next[(key[x] >> shift) & mask]++;
                key_next[to] = key[x];
                value_next[to] = value[x];
            });
        });
        std::swap(key, key_next);
        std::swap(value, value_next);
    }

    // The sorted keys as compressed rows: the row in the high bits, the column in the low ones.
    void write(int col_bits, std::int64_t rows, I* rowptr, I* col, I* perm) const {
        const Key mask = Key((Key(1) << col_bits) - 1);
        auto row = [&](std::int64_t x) {
            return x < 0 ? std::int64_t(-1) : (x == n ? rows : std::int64_t(key[x] >> col_bits));
        };
        parallel_for(threads, threads, [&](std::int64_t t) {
            for_chunk(n, threads, t, [&](std::int64_t x) {
                for (std::int64_t i = row(x - 1) + 1; i <= row(x); ++i) rowptr[i] = I(x);
                col[x] = I(key[x] & mask);
                perm[x] = value[x];
            });
        });
        for (std::int64_t i = row(n - 1) + 1; i <= rows; ++i) rowptr[i] = I(n);
    }
};

template <class F> void dispatch_key(int bits, F&& f) {
    if (bits < 32) f(type_tag<std::uint32_t>{});
    else f(type_tag<std::uint64_t>{});
}

}  // namespace

std::int64_t csr_from_coo(const void* src_data, const void* dst_data, bool wide_in, std::int64_t edges,
                          std::int64_t num_src, std::int64_t num_dst, bool wide_out, void* rowptr, void* col,
                          void* perm, int threads) {
    threads = std::max(threads, 1);
    std::int64_t bad = -1;
    dispatch_index(wide_in, [&](auto in) {
        using In = typename decltype(in)::type;
        const In* src = static_cast<const In*>(src_data);
        const In* dst = static_cast<const In*>(dst_data);
        std::vector<std::int64_t> first_bad(std::size_t(threads), -1);
        std::vector<char> disorder(std::size_t(threads), 0);
        parallel_for(threads, threads, [&](std::int64_t t) {
            for_chunk(edges, threads, t, [&](std::int64_t x) {
                if (src[x] < 0 || src[x] >= num_src || dst[x] < 0 || dst[x] >= num_dst) {
                    if (first_bad[std::size_t(t)] < 0) first_bad[std::size_t(t)] = x;
                    return;
                }
                if (x > 0 && src[x] < src[x - 1]) disorder[std::size_t(t)] = 1;
            });
        });
        bool by_src = true;
        for (int t = threads; t-- > 0;) {
            if (first_bad[std::size_t(t)] >= 0) bad = first_bad[std::size_t(t)];
            by_src = by_src && !disorder[std::size_t(t)];
        }
        if (bad >= 0) return;
        const int src_bits = bits_for(num_src), bits = src_bits + bits_for(num_dst);
        dispatch_index(wide_out, [&](auto out) {
            using I = typename decltype(out)::type;
            dispatch_key(bits, [&](auto key) {
                using Key = typename decltype(key)::type;
                Sorter<Key, I> sorter{edges, threads};
                parallel_for(threads, threads, [&](std::int64_t t) {
                    for_chunk(edges, threads, t, [&](std::int64_t x) {
                        sorter.key[x] = Key(Key(dst[x]) << src_bits) | Key(src[x]);
                        sorter.value[x] = I(x);
                    });
                });
                if (!by_src) sorter.sort(0, src_bits);
                sorter.sort(src_bits, bits);
                sorter.write(src_bits, num_dst, static_cast<I*>(rowptr), static_cast<I*>(col),
                             static_cast<I*>(perm));
            });
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
            parallel_for(num_blocks(in.rows, in.edges), threads, [&](std::int64_t block) {
                auto begin = [=](std::int64_t i) { return std::int64_t(rowptr[i]); };
                for_edges(begin, in.rows, block, [&](std::int64_t i, std::int64_t b, std::int64_t e) {
                    for (std::int64_t x = b; x < e; ++x) {
                        sorter.key[x] = Key(Key(col[x]) << row_bits) | Key(i);
                        sorter.value[x] = I(x);
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
        const I* ptr_a = static_cast<const I*>(a.rowptr);
        const I* ptr_b = static_cast<const I*>(b.rowptr);
        const I* col_a = static_cast<const I*>(a.col);
        const I* col_b = static_cast<const I*>(b.col);
        I* rowptr = static_cast<I*>(rowptr_out);
        I* col = static_cast<I*>(col_out);
        // The number of distinct columns of row i in both; written to `to` where given.
        auto merge = [&](std::int64_t i, I* to) {
            I x = ptr_a[i], y = ptr_b[i];
            const I x_end = ptr_a[i + 1], y_end = ptr_b[i + 1];
            std::int64_t count = 0;
            while (x < x_end || y < y_end) {
                const I least = y == y_end || (x < x_end && col_a[x] < col_b[y]) ? col_a[x] : col_b[y];
                while (x < x_end && col_a[x] == least) ++x;
                while (y < y_end && col_b[y] == least) ++y;
                if (to) to[count] = least;
                ++count;
            }
            return count;
        };
        const std::int64_t rows = a.rows;
        parallel_for(num_blocks(rows, 0), threads, [&](std::int64_t block) {
            const std::int64_t last = std::min((block + 1) * kBlock, rows);
            for (std::int64_t i = block * kBlock; i < last; ++i) {
                if (col) merge(i, col + rowptr[i]);
                else rowptr[i + 1] = I(merge(i, nullptr));
            }
        });
        if (col) return;
        rowptr[0] = 0;
        for (std::int64_t i = 0; i < rows; ++i) rowptr[i + 1] += rowptr[i];
    });
}

}  // namespace fastkd::cpu
