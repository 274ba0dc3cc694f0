// The part of CUDA that the kernels use, on the CPU: a host compiler builds the .cu files against
// this header, and simt.cpp runs every thread of a block as a fiber. Nothing here is fast or
// parallel; it is deterministic, and it reports what a GPU would let pass or hang on.
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
// Blocks run one after the other on one OS thread, so one copy serves them all.
#define __shared__ static
// __restrict__ is a keyword of the host compilers already.

struct uint3 {
    unsigned x, y, z;
};

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned nx = 1, unsigned ny = 1, unsigned nz = 1) : x(nx), y(ny), z(nz) {}
    constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
    constexpr operator uint3() const { return {x, y, z}; }
};

struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) double2 {
    double x, y;
};

constexpr uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
constexpr uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
constexpr int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
constexpr uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
constexpr float2 make_float2(float x, float y) { return {x, y}; }
constexpr float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
constexpr double2 make_double2(double x, double y) { return {x, y}; }

enum cudaError {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorInvalidDevice = 101,
};
using cudaError_t = cudaError;
using cudaStream_t = void*;

enum cudaMemcpyKind {
    cudaMemcpyHostToHost = 0,
    cudaMemcpyHostToDevice = 1,
    cudaMemcpyDeviceToHost = 2,
    cudaMemcpyDeviceToDevice = 3,
    cudaMemcpyDefault = 4,
};

enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrComputeCapabilityMajor = 75,
    cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};

enum cudaFuncAttribute {
    cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
    cudaFuncAttributePreferredSharedMemoryCarveout = 9,
};

namespace simt {

// Where a kernel waits, for the error reports.
struct Site {
    const char* file;
    int line;
    static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
        return {file, line};
    }
};

enum class Op { syncthreads, syncwarp, shfl, shfl_up, shfl_down, shfl_xor, ballot, any, all };

namespace detail {

inline constexpr int kSharedDefault = 48 * 1024;  // what CUDA grants without an opt-in
inline constexpr int kSharedOptin = 227 * 1024;

// Rewritten by the scheduler whenever another thread or block starts to run.
inline uint3 thread_index, block_index;
inline dim3 block_size, grid_size;
inline cudaError_t last_error = cudaSuccess;

void run(const void* kernel, dim3 grid, dim3 block, std::size_t shared_bytes, void (*body)(const void*),
         const void* context);
cudaError_t allow_shared(const void* kernel, int bytes);
void syncthreads(Site site);
// Waits for the lanes of the mask. Votes give the ballot, shuffles the value of the source lane.
std::uint64_t collective(Op op, unsigned mask, std::uint64_t value, unsigned source, Site site);
unsigned lane();

// The caller's lane, and the lanes that a shuffle of this width keeps to.
struct Segment {
    unsigned lane, first, last;
};
Segment segment(Op op, unsigned mask, int width, Site site);

inline cudaError_t fail(cudaError_t error) { return last_error = error; }

template <class T> T shuffle(Op op, unsigned mask, T value, unsigned source, Site site) {
    static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8),
                  "shuffles move 4- and 8-byte arithmetic types");
    using Bits = std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t>;
    const auto bits = collective(op, mask, std::bit_cast<Bits>(value), source, site);
    return std::bit_cast<T>(static_cast<Bits>(bits));
}

}  // namespace detail

// The block's dynamic shared memory (`extern __shared__` is not C++), filled with 0xA5 when a
// block starts.
void* dynamic_shared();

// kernel<<<grid, block, shared_bytes>>>(args...), done when it returns. A configuration that CUDA
// refuses is left to cudaGetLastError(); faults of the kernel are thrown as std::runtime_error.
template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, std::size_t shared_bytes, A&&... args) {
    static_assert(sizeof...(P) == sizeof...(A), "wrong number of kernel arguments");
    const std::tuple<P...> params(std::forward<A>(args)...);
    const auto body = [&] { std::apply(kernel, params); };
    using Body = decltype(body);
    detail::run(
        reinterpret_cast<const void*>(kernel), grid, block, shared_bytes,
        [](const void* b) { (*static_cast<Body*>(b))(); }, &body);
}

}  // namespace simt

inline cudaError_t cudaGetLastError() { return std::exchange(simt::detail::last_error, cudaSuccess); }

inline const char* cudaGetErrorName(cudaError_t error) {
    switch (error) {
        case cudaSuccess:
            return "cudaSuccess";
        case cudaErrorInvalidValue:
            return "cudaErrorInvalidValue";
        case cudaErrorInvalidConfiguration:
            return "cudaErrorInvalidConfiguration";
        case cudaErrorInvalidDevice:
            return "cudaErrorInvalidDevice";
    }
    return "unrecognized error code";
}

inline const char* cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaSuccess:
            return "no error";
        case cudaErrorInvalidValue:
            return "invalid argument";
        case cudaErrorInvalidConfiguration:
            return "invalid configuration argument";
        case cudaErrorInvalidDevice:
            return "invalid device ordinal";
    }
    return "unrecognized error code";
}

inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) {
    return device == 0 ? cudaSuccess : simt::detail::fail(cudaErrorInvalidDevice);
}
inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 12000, cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 12000, cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    if (device != 0) return simt::detail::fail(cudaErrorInvalidDevice);
    switch (attribute) {
        case cudaDevAttrMultiProcessorCount:
            *value = 2;
            return cudaSuccess;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin:
            *value = simt::detail::kSharedOptin;
            return cudaSuccess;
        case cudaDevAttrComputeCapabilityMajor: {
            const char* given = std::getenv("FASTKD_SIMT_COMPUTE_CAPABILITY");
            *value = given ? std::atoi(given) : 9;
            return cudaSuccess;
        }
    }
    return simt::detail::fail(cudaErrorInvalidValue);
}

template <class T> cudaError_t cudaFuncSetAttribute(T* kernel, cudaFuncAttribute attribute, int value) {
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
    return simt::detail::allow_shared(reinterpret_cast<const void*>(kernel), value);
}

inline cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t = nullptr) {
    if (bytes) std::memset(to, value, bytes);
    return cudaSuccess;
}

inline cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind,
                                   cudaStream_t = nullptr) {
    if (bytes) std::memcpy(to, from, bytes);
    return cudaSuccess;
}

inline const uint3& threadIdx = simt::detail::thread_index;
inline const uint3& blockIdx = simt::detail::block_index;
inline const dim3& blockDim = simt::detail::block_size;
inline const dim3& gridDim = simt::detail::grid_size;
inline constexpr int warpSize = 32;

inline void __syncthreads(simt::Site site = simt::Site::here()) { simt::detail::syncthreads(site); }

inline void __syncwarp(unsigned mask = 0xffffffffu, simt::Site site = simt::Site::here()) {
    simt::detail::collective(simt::Op::syncwarp, mask, 0, simt::detail::lane(), site);
}

// Offsets count modulo 32, and a lane whose source would leave its segment keeps its own value.

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, simt::Site site = simt::Site::here()) {
    const auto s = simt::detail::segment(simt::Op::shfl, mask, width, site);
    const unsigned from = s.first | (static_cast<unsigned>(source) & (s.last - s.first));
    return simt::detail::shuffle(simt::Op::shfl, mask, value, from, site);
}

template <class T> T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                                    simt::Site site = simt::Site::here()) {
    const auto s = simt::detail::segment(simt::Op::shfl_up, mask, width, site);
    const unsigned d = delta & 31, from = d > s.lane - s.first ? s.lane : s.lane - d;
    return simt::detail::shuffle(simt::Op::shfl_up, mask, value, from, site);
}

template <class T> T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                                      simt::Site site = simt::Site::here()) {
    const auto s = simt::detail::segment(simt::Op::shfl_down, mask, width, site);
    const unsigned d = delta & 31, from = d > s.last - s.lane ? s.lane : s.lane + d;
    return simt::detail::shuffle(simt::Op::shfl_down, mask, value, from, site);
}

// Unlike the others, this one may read from an earlier segment.
template <class T> T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32,
                                     simt::Site site = simt::Site::here()) {
    const auto s = simt::detail::segment(simt::Op::shfl_xor, mask, width, site);
    const unsigned other = s.lane ^ (static_cast<unsigned>(lane_mask) & 31);
    const unsigned from = other > s.last ? s.lane : other;
    return simt::detail::shuffle(simt::Op::shfl_xor, mask, value, from, site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, simt::Site site = simt::Site::here()) {
    return static_cast<unsigned>(
        simt::detail::collective(simt::Op::ballot, mask, predicate != 0, simt::detail::lane(), site));
}

inline int __any_sync(unsigned mask, int predicate, simt::Site site = simt::Site::here()) {
    return simt::detail::collective(simt::Op::any, mask, predicate != 0, simt::detail::lane(), site) != 0;
}

inline int __all_sync(unsigned mask, int predicate, simt::Site site = simt::Site::here()) {
    return simt::detail::collective(simt::Op::all, mask, predicate == 0, simt::detail::lane(), site) == 0;
}

// CUDA does not promise that lanes converge, so the caller alone is always a right answer, and the
// one that catches code which relies on more.
inline unsigned __activemask() { return 1u << simt::detail::lane(); }

inline void __threadfence() {}

inline int __popc(unsigned v) { return std::popcount(v); }
inline int __popcll(unsigned long long v) { return std::popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return std::countl_zero(static_cast<unsigned>(v)); }

template <class T> T __ldg(const T* p) { return *p; }

inline int __float_as_int(float v) { return std::bit_cast<int>(v); }
inline float __int_as_float(int v) { return std::bit_cast<float>(v); }
inline unsigned __float_as_uint(float v) { return std::bit_cast<unsigned>(v); }
inline float __uint_as_float(unsigned v) { return std::bit_cast<float>(v); }
inline double __longlong_as_double(long long v) { return std::bit_cast<double>(v); }
inline long long __double_as_longlong(double v) { return std::bit_cast<long long>(v); }

// Only one thread runs at a time, so plain code is atomic. The overloads are CUDA's: it has no
// atomicMin, atomicMax or atomicCAS of floating-point types, and no atomicExch of double.

namespace simt::detail {

template <class T> T add(T a, T b) {
    if constexpr (std::is_floating_point_v<T>) {
        return a + b;
    } else {  // unsigned, because atomics wrap
        using U = std::make_unsigned_t<T>;
        return static_cast<T>(static_cast<U>(a) + static_cast<U>(b));
    }
}

}  // namespace simt::detail

#define SIMT_ATOMIC_ADD(T) \
    inline T atomicAdd(T* p, T v) { return std::exchange(*p, simt::detail::add(*p, v)); }
#define SIMT_ATOMIC_EXCH(T) \
    inline T atomicExch(T* p, T v) { return std::exchange(*p, v); }
#define SIMT_ATOMIC_INTEGER(T)                                                   \
    SIMT_ATOMIC_ADD(T)                                                           \
    SIMT_ATOMIC_EXCH(T)                                                          \
    inline T atomicMin(T* p, T v) { return std::exchange(*p, v < *p ? v : *p); } \
    inline T atomicMax(T* p, T v) { return std::exchange(*p, v > *p ? v : *p); } \
    inline T atomicCAS(T* p, T expected, T v) { return std::exchange(*p, *p == expected ? v : *p); }
SIMT_ATOMIC_INTEGER(int)
SIMT_ATOMIC_INTEGER(unsigned)
SIMT_ATOMIC_INTEGER(unsigned long long)
SIMT_ATOMIC_ADD(float)
SIMT_ATOMIC_ADD(double)
SIMT_ATOMIC_EXCH(float)
#undef SIMT_ATOMIC_INTEGER
#undef SIMT_ATOMIC_EXCH
#undef SIMT_ATOMIC_ADD

#define SIMT_MIN_MAX(R, A, B)                                    \
    constexpr R min(A a, B b) {                                  \
        const auto r = static_cast<R>(a), s = static_cast<R>(b); \
        return s < r ? s : r;                                    \
    }                                                            \
    constexpr R max(A a, B b) {                                  \
        const auto r = static_cast<R>(a), s = static_cast<R>(b); \
        return r < s ? s : r;                                    \
    }
#define SIMT_MIN_MAX_INTEGER(S)                      \
    SIMT_MIN_MAX(S, S, S)                            \
    SIMT_MIN_MAX(unsigned S, unsigned S, unsigned S) \
    SIMT_MIN_MAX(unsigned S, S, unsigned S)          \
    SIMT_MIN_MAX(unsigned S, unsigned S, S)
SIMT_MIN_MAX_INTEGER(int)
SIMT_MIN_MAX_INTEGER(long)
SIMT_MIN_MAX_INTEGER(long long)
#undef SIMT_MIN_MAX_INTEGER
#undef SIMT_MIN_MAX

// As fmin and fmax: a NaN gives way to a number.
inline float min(float a, float b) { return __builtin_fminf(a, b); }
inline float max(float a, float b) { return __builtin_fmaxf(a, b); }
inline double min(double a, double b) { return __builtin_fmin(a, b); }
inline double max(double a, double b) { return __builtin_fmax(a, b); }
inline double min(float a, double b) { return __builtin_fmin(a, b); }
inline double max(float a, double b) { return __builtin_fmax(a, b); }
inline double min(double a, float b) { return __builtin_fmin(a, b); }
inline double max(double a, float b) { return __builtin_fmax(a, b); }
