// Threads, and memory of a thread's own, for code that is compiled for several instruction sets.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <new>

#include "common/interrupt.h"

namespace fastkd::cpu {
namespace {  // one copy per source file: these are compiled for several instruction sets

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
