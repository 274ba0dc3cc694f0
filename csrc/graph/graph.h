// The contract of graph construction: compressed rows from edges, their transpose and their union.
#pragma once

#include "common/types.h"

namespace fastkd::cpu {

// Sorts the edges (src[e] -> dst[e]) by (dst, src), stably: rowptr [num_dst + 1], col [edges] and
// perm [edges] with slot -> e. Returns the position of the first edge out of range, or -1.
std::int64_t csr_from_coo(const void* src, const void* dst, bool wide_in, std::int64_t edges,
                          std::int64_t num_src, std::int64_t num_dst, bool wide_out, void* rowptr, void* col,
                          void* perm, int threads);
// The same edges by (src, dst): rowptr [cols + 1], col [edges], perm [edges] with slot -> slot of in.
void csr_transpose(const Csr& in, void* rowptr, void* col, void* perm, int threads);
// Rows of a and b merged without duplicates. First with col = null to get rowptr [rows + 1], then
// with col [rowptr[rows]].
void csr_union(const Csr& a, const Csr& b, void* rowptr, void* col, int threads);

}  // namespace fastkd::cpu
