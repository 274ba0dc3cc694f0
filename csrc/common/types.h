// Types that every operation of the native core shares.
//
// Nothing in csrc knows a framework. Memory belongs to the caller; every operation writes every element
// of its outputs. `cpu::` takes a thread count, `cuda::` a stream, otherwise both are the same.
// Arguments are checked by the caller; results do not depend on the number of threads.
#pragma once

#include <cstdint>

namespace fastkd {

namespace cpu {
const char* isa();  // the instruction set in use: "generic", "avx2", "avx512"
}

enum class DType : int { f16 = 0, bf16 = 1, f32 = 2, f64 = 3 };

// A row-major matrix [rows, cols] whose rows are `stride` elements apart.
struct Features {
    const void* data;
    std::int64_t rows, cols, stride;
    DType dtype;
};

// Compressed rows: row i owns the slots rowptr[i] .. rowptr[i+1], ascending in col. Indices are int64
// if `wide`, int32 otherwise.
struct Csr {
    const void* rowptr;  // [rows + 1]
    const void* col;     // [edges], values in [0, cols)
    std::int64_t rows, cols, edges;
    bool wide;
};

}  // namespace fastkd
