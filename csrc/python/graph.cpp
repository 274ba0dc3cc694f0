#include "graph/graph.h"

#include "python/convert.h"

namespace fastkd {
namespace {

// The first position at which a graph is wrong: k for rowptr[k], rows + 1 + e for col[e], or -1. Neighbours
// are compared and not subtracted: a difference may wrap.
template <class I> std::int64_t first_wrong(const Csr& graph) {
    const I* rowptr = static_cast<const I*>(graph.rowptr);
    const I* col = static_cast<const I*>(graph.col);
    const std::int64_t rows = graph.rows, edges = graph.edges;
    if (rowptr[0] != 0) return 0;
    for (std::int64_t k = 1; k <= rows; ++k)
        if (rowptr[k] < rowptr[k - 1] || rowptr[k] > edges) return k;
    if (rowptr[rows] != edges) return rows;
    for (std::int64_t e = 0; e < edges; ++e)
        if (col[e] < 0 || col[e] >= graph.cols) return rows + 1 + e;
    return -1;
}

}  // namespace

void bind_graph(py::module_& cpu) {
    cpu.def(
        "csr_from_coo",
        [](Address src, Address dst, bool wide_in, std::int64_t edges, std::int64_t num_src,
           std::int64_t num_dst, bool wide_out, Address rowptr, Address col, Address perm, int threads) {
            const py::gil_scoped_release release;
            return cpu::csr_from_coo(pointer(src), pointer(dst), wide_in, edges, num_src, num_dst, wide_out,
                                     pointer(rowptr), pointer(col), pointer(perm), threads);
        },
        py::kw_only(), py::arg("src"), py::arg("dst"), py::arg("wide_in"), py::arg("edges"),
        py::arg("num_src"), py::arg("num_dst"), py::arg("wide_out"), py::arg("rowptr"), py::arg("col"),
        py::arg("perm"), py::arg("threads"));
    cpu.def(
        "csr_first_wrong",
        [](const py::tuple& graph) {
            const Csr in = structure<Csr>(graph);
            const py::gil_scoped_release release;
            return in.wide ? first_wrong<std::int64_t>(in) : first_wrong<std::int32_t>(in);
        },
        py::arg("graph"));
    cpu.def(
        "csr_transpose",
        [](const py::tuple& graph, Address rowptr, Address col, Address perm, int threads) {
            const Csr in = structure<Csr>(graph);
            const py::gil_scoped_release release;
            cpu::csr_transpose(in, pointer(rowptr), pointer(col), pointer(perm), threads);
        },
        py::arg("graph"), py::kw_only(), py::arg("rowptr"), py::arg("col"), py::arg("perm"),
        py::arg("threads"));
    cpu.def(
        "csr_union",
        [](const py::tuple& a, const py::tuple& b, Address rowptr, Address col, int threads) {
            const Csr left = structure<Csr>(a), right = structure<Csr>(b);
            const py::gil_scoped_release release;
            cpu::csr_union(left, right, pointer(rowptr), pointer(col), threads);
        },
        py::arg("a"), py::arg("b"), py::kw_only(), py::arg("rowptr"), py::arg("col"), py::arg("threads"));
}

}  // namespace fastkd
