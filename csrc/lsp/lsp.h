// The contract of the local structure preserving loss: what every operation takes, its shapes and its
// meaning.
#pragma once

#include "common/types.h"

namespace fastkd {

// What is reduced over the feature axis for an edge (j -> i): the raw reduction r.
enum class Metric : int {
    dot = 0,     // sum_k a_k b_k
    cosine = 1,  // dot / (|a| |b|); 0 where a norm is 0
    sqdist = 2,  // sum_k (a_k - b_k)^2
    l1 = 3,      // sum_k |a_k - b_k|
};

// How r becomes the similarity, with u = scale * r, or sqrt(scale * r) if root.
enum class Shape : int {
    linear = 0,       // param * u
    power = 1,        // (u + param)^degree
    exponential = 2,  // exp(-param * u)
};

struct Kernel {
    Metric metric;
    Shape shape;
    bool root;
    int degree;
    double scale;
    double param;
};

enum class Divergence : int { student_teacher = 0, teacher_student = 1 };

// mean divides by num_dst, mean_active by the rows that have an edge, mean_edges by the edges.
// Edges of weight 0 count as absent. A division by 0 gives 0.
enum class Reduction : int { none = 0, sum = 1, mean = 2, mean_active = 3, mean_edges = 4 };

// "acc" below is float, or double where the features are f64.

// r[e] for every slot e of graph (rows are destinations, cols are sources). With reverse, the slots with
// col <= row are computed and their mirror images get the same number.
struct Similarity {
    Csr graph;
    Features src, dst;         // [cols, D], [rows, D]
    const void* src_inv_norm;  // acc [cols], cosine only
    const void* dst_inv_norm;  // acc [rows], cosine only
    Metric metric;
    const void* reverse;  // index [edges], or null
    void* r;              // acc [edges], out
};

// inv_norm[i] = 1 / |x_i|, or 0 for a zero row.
struct InverseNorm {
    Features x;
    void* inv_norm;  // acc [rows], out
};

// SIM(r) of every edge.
struct KernelValues {
    std::int64_t edges;
    Kernel kernel;
    DType acc;      // f32 or f64
    const void* r;  // acc [edges]
    void* values;   // acc [edges], out
};

// Softmax over each row, divergence per row, reduction, and the coefficient of each edge.
//
// With p = softmax_row(SIM + log w), d = log p_s - log p_t and S_i the divergence of row i:
//   dS_i/dSIM_s = p_s (d - sum p_s d)  for student||teacher,  p_s - p_t  for teacher||student,
// and coef = dloss/dr times the metric's own factor, so that the gradient is a sparse product
// (see Gradient).
struct Divergences {
    Csr graph;
    Kernel student, teacher;
    Divergence divergence;
    Reduction reduction;
    bool teacher_is_values;  // r_t holds the teacher's kernel values, not r
    DType acc;
    const void* r_s;           // acc [edges]
    const void* r_t;           // acc [edges]
    const void* weight;        // acc [edges] >= 0, or null
    const void* src_inv_norm;  // acc [cols], student's, cosine only
    const void* dst_inv_norm;  // acc [rows]
    void* coef;                // acc [edges], out, or null where no gradient is wanted; may be r_s
    void* rows;                // acc [rows], out: S_i
    void* loss;                // acc [1], out, or null for Reduction::none
    // rows with two or more edges; of those, the rows whose student (teacher) similarities differ by
    // more than rounding: 0 of many means that the kernel is saturated
    std::int64_t* diagnostics;  // [3], out
    std::int64_t max_degree;    // of a row, or -1 if unknown
    void* workspace;            // CUDA only: workspace_bytes(*this) bytes
};

// One list of incident edges of every output row: their other ends and weights. An edge weighs
//   coef[x] * grad of this row            without perm (edges that arrive here),
//   coef[perm[x]] * grad of the other end with perm (edges that leave),
//   both together                         if mirrored: perm is then the reverse of every edge.
struct Incidence {
    Csr graph;         // rows are the output's rows
    const void* perm;  // index [edges] or null
    bool mirrored;
    Features other;  // [cols, D]
};

// out_i = sum over incident edges of  weight * B(x_i, x_j), with
//   B = x_j (dot, cosine),  x_i - x_j (sqdist),  sign(x_i - x_j) (l1);
// for cosine the part along x_i is then projected out.
struct Gradient {
    Features self;  // [rows, D]
    Incidence lists[2];
    int num_lists;
    Metric metric;
    const void* coef;  // acc [edges]
    const void* grad;  // of the loss: acc [1], or of S: acc [destinations] if grad_per_row
    bool grad_per_row;
    const void* inv_norm;     // acc [rows], of self, cosine only
    void* out;                // dtype of self, [rows, D], contiguous
    std::int64_t max_degree;  // no row has more incident edges; -1 if unknown
    void* workspace;          // CUDA only: workspace_bytes(*this) bytes
};

namespace cpu {
void inverse_norm(const InverseNorm&, int threads);
void similarity(const Similarity&, int threads);
void kernel_values(const KernelValues&, int threads);
void divergences(const Divergences&, int threads);
void gradient(const Gradient&, int threads);
}  // namespace cpu

#ifdef FASTKD_CUDA
namespace cuda {
void inverse_norm(const InverseNorm&, void* stream);
void similarity(const Similarity&, void* stream);
void kernel_values(const KernelValues&, void* stream);
void divergences(const Divergences&, void* stream);
void gradient(const Gradient&, void* stream);
std::int64_t workspace_bytes(const Divergences&);
std::int64_t workspace_bytes(const Gradient&);
}  // namespace cuda
#endif

}  // namespace fastkd
