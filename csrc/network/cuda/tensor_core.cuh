// Matrix instructions of the tensor cores and asynchronous copies: PTX on a GPU of compute capability
// 8.0 or more; on the host what the PTX manual says that they do, lane by lane, so that the tests see
// whether the kernels put the right numbers into the right lanes.
#pragma once

#include "common/launch.cuh"

namespace fastkd::cuda {

#ifdef FASTKD_SIMT
constexpr bool kHasTensorCores = true;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kHasTensorCores = false;  // the host then chooses other kernels
#else
constexpr bool kHasTensorCores = true;
#endif

// 16 bytes from global to shared memory; zeros if not valid. Both are aligned to 16.
__device__ inline void copy16(void* to, const void* from, bool valid) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    const unsigned at = unsigned(__cvta_generic_to_shared(to)), bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(at), "l"(from), "r"(bytes)
                 : "memory");
#else
    *static_cast<uint4*>(to) = valid ? *static_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
#endif
}

// Ends a group of copies.
__device__ inline void commit_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;\n" ::: "memory");
#endif
}

// Waits until all of this thread's groups but the last Left are there.
template <int Left> __device__ void wait_for_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;\n" ::"n"(Left) : "memory");
#endif
}

// Four 8 x 8 matrices of 16-bit numbers, or 8 x 4 of 32-bit ones: lane 8 i + k gives the address of row k
// of matrix i, and lane l gets word l % 4 of row l / 4 of each.
__device__ inline void load_matrices(std::uint32_t (&r)[4], const void* row) {
#if defined(__CUDA_ARCH__)
#if __CUDA_ARCH__ >= 800
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(unsigned(__cvta_generic_to_shared(row))));
#endif
#else
    const unsigned lane = threadIdx.x % 32;
    for (unsigned i = 0; i < 4; ++i) {
        const auto from = __shfl_sync(kAll, reinterpret_cast<unsigned long long>(row), int(8 * i + lane / 4));
        std::memcpy(&r[i], reinterpret_cast<const char*>(from) + 4 * (lane % 4), 4);
    }
#endif
}

// c += a b, a 16 x k and b k x 8 with k = 32 bytes: 16 numbers of 16 bits, or 8 of tf32. Lane l has
// c[0], c[1] in row l / 4 and columns 2 (l % 4) and the next, c[2], c[3] eight rows below.
#ifdef FASTKD_SIMT
namespace host {
inline std::uint32_t words[kWarps][32][6];

template <class T> float number(std::uint32_t word, int half) {
    if constexpr (sizeof(T) == 4) {  // rounded as cvt.rna.tf32 does
        return half ? 0.0f : bit_cast<float>((word + 0x1000u) & 0xffffe000u);
    } else {
        return widen(bit_cast<T>(std::uint16_t(word >> (16 * half))));
    }
}
}  // namespace host
#endif

template <class T>
__device__ void multiply(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
#if defined(__CUDA_ARCH__)
#if __CUDA_ARCH__ >= 800
    if constexpr (sizeof(T) == 4) {
        std::uint32_t x[4], y[2];
#pragma unroll
        for (int k = 0; k < 4; ++k) asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(x[k]) : "r"(a[k]));
        asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(y[0]) : "r"(b0));
        asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(y[1]) : "r"(b1));
        asm volatile(
            "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
            "{%8, %9}, {%0, %1, %2, %3};\n"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(y[0]), "r"(y[1]));
    } else if constexpr (std::is_same_v<T, bf16_t>) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
            "{%8, %9}, {%0, %1, %2, %3};\n"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
            "{%8, %9}, {%0, %1, %2, %3};\n"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
#endif
#elif defined(FASTKD_SIMT)
    auto& words = host::words[threadIdx.x / 32];
    const unsigned lane = threadIdx.x % 32;
    for (int k = 0; k < 4; ++k) words[lane][k] = a[k];
    words[lane][4] = b0, words[lane][5] = b1;
    __syncwarp();
    constexpr unsigned in_word = 4 / sizeof(T), depth = 8 * in_word;  // numbers
    for (unsigned e = 0; e < 4; ++e) {
        const unsigned row = lane / 4 + 8 * (e / 2), column = 2 * (lane % 4) + e % 2;
        for (unsigned k = 0; k < depth; ++k) {
            const unsigned word = k / in_word, half = k % in_word;
            const auto x =
                host::number<T>(words[row % 8 * 4 + word % 4][row / 8 + 2 * (word / 4)], int(half));
            const auto y = host::number<T>(words[column * 4 + word % 4][4 + word / 4], int(half));
            c[e] += x * y;
        }
    }
    __syncwarp();
#endif
}

}  // namespace fastkd::cuda
