// The speed at which this host reads random rows of a matrix: the bound on every message passing
// kernel whose features do not stay in a near cache.
#include <cstdint>

typedef float vec __attribute__((vector_size(32), aligned(4)));
constexpr int kChains = 8;  // independent additions in flight, enough to hide their latency

// The sum over n rows of x [N, dim] chosen by index [n]: every byte of a row is read once, and
// nothing is written. Prefetches `ahead` rows ahead (0: never).
extern "C" float gather_sum(const float* x, const std::int32_t* index, std::int64_t n, std::int64_t dim,
                            std::int64_t ahead, int threads) {
    float total = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
    {
        vec sums[kChains] = {};
#pragma omp for schedule(static)
        for (std::int64_t i = 0; i < n; ++i) {
            if (ahead && i + ahead < n) {
                const char* p = reinterpret_cast<const char*>(x + index[i + ahead] * dim);
                for (std::int64_t k = 0; k < dim * 4; k += 64) __builtin_prefetch(p + k);
            }
            const float* row = x + index[i] * dim;
            std::int64_t k = 0;
            for (; k + 8 * kChains <= dim; k += 8 * kChains)
#pragma GCC unroll 8
                for (int c = 0; c < kChains; ++c) sums[c] += *reinterpret_cast<const vec*>(row + k + 8 * c);
            for (; k + 8 <= dim; k += 8) sums[0] += *reinterpret_cast<const vec*>(row + k);
            for (; k < dim; ++k) total += row[k];
        }
        for (int c = 0; c < kChains; ++c)
            for (int k = 0; k < 8; ++k) total += sums[c][k];
    }
    return total;
}
