// The only file that knows Python: tuples of integers become the structures of fastkd.h.
//
// Tensors arrive as addresses. A matrix is (address, rows, cols, stride, dtype), a graph
// (rowptr, col, rows, cols, edges, wide), a kernel (metric, shape, root, degree, scale, param); an
// absent tensor is 0.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "graph/graph.h"
#include "lsp/lsp.h"
#include "network/conv_backward.h"
#include "network/network.h"

namespace py = pybind11;
using std::int64_t;
using Address = std::uintptr_t;

namespace fastkd {
namespace {

template <class T = void> T* pointer(std::uintptr_t address) { return reinterpret_cast<T*>(address); }

int64_t integer(const py::tuple& t, int k) {
    const int64_t value = PyLong_AsLongLong(PyTuple_GET_ITEM(t.ptr(), k));
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    return value;
}
double number(const py::tuple& t, int k) {
    const double value = PyFloat_AsDouble(PyTuple_GET_ITEM(t.ptr(), k));
    if (value == -1.0 && PyErr_Occurred()) throw py::error_already_set();
    return value;
}
void expect(const py::tuple& t, std::size_t size, const char* what) {
    if (t.size() != size)
        throw py::value_error(std::string(what) + ": expected a tuple of " + std::to_string(size) + ", got " +
                              std::to_string(t.size()));
}
const void* address(const py::tuple& t, int k) {
    return pointer<const void>(static_cast<std::uintptr_t>(integer(t, k)));
}

Features features(const py::tuple& t) {
    expect(t, 5, "matrix");
    return {address(t, 0), integer(t, 1), integer(t, 2), integer(t, 3), DType(integer(t, 4))};
}
Csr csr(const py::tuple& t) {
    expect(t, 6, "graph");
    return {address(t, 0), address(t, 1), integer(t, 2), integer(t, 3), integer(t, 4), integer(t, 5) != 0};
}
Kernel kernel(const py::tuple& t) {
    expect(t, 6, "kernel");
    return {Metric(integer(t, 0)), Shape(integer(t, 1)), integer(t, 2) != 0,
            int(integer(t, 3)),    number(t, 4),         number(t, 5)};
}

void pair(const py::tuple& t, int k, int64_t (&out)[2]) {
    out[0] = integer(t, k), out[1] = integer(t, k + 1);
}
// (channels, height, width, address of genes)
Value value(const py::tuple& t) {
    expect(t, 4, "value");
    Value v{integer(t, 0), integer(t, 1), integer(t, 2), {}};
    const auto* genes = static_cast<const std::int32_t*>(address(t, 3));
    v.genes.assign(genes, genes + v.channels);
    return v;
}
// (kind, inputs, output, geometry, activation, param, weight, bias, scale, shift, select) with geometry
// (kernel, stride, padding, dilation: rows and columns of each; groups, count_padding, batch) and select
// the address of [out][2], or 0.
Node node(const py::tuple& t, const std::vector<Value>& values) {
    expect(t, 11, "node");
    Node n{};
    n.kind = Operation(integer(t, 0));
    for (const py::handle& v : py::tuple(t[1])) n.inputs.push_back(v.cast<int>());
    n.output = int(integer(t, 2));
    const py::tuple geometry = t[3];
    expect(geometry, 11, "geometry");
    pair(geometry, 0, n.kernel), pair(geometry, 2, n.stride), pair(geometry, 4, n.padding);
    pair(geometry, 6, n.dilation);
    n.groups = integer(geometry, 8);
    n.count_padding = integer(geometry, 9) != 0, n.batch = integer(geometry, 10) != 0;
    n.activation = Activation(integer(t, 4)), n.param = number(t, 5);
    n.weight = address(t, 6), n.bias = address(t, 7), n.scale = address(t, 8), n.shift = address(t, 9);
    if (const auto* select = static_cast<const std::int32_t*>(address(t, 10)))
        n.select.assign(select, select + 2 * values.at(std::size_t(n.output)).channels);
    return n;
}

// Both back ends take the same arguments; `where` is the thread count or the stream.
struct Cpu {
    using Where = int;
    static constexpr auto inverse_norm = cpu::inverse_norm;
    static constexpr auto similarity = cpu::similarity;
    static constexpr auto kernel_values = cpu::kernel_values;
    static constexpr auto divergences = cpu::divergences;
    static constexpr auto gradient = cpu::gradient;
    template <class Op> static int64_t workspace_bytes(const Op&) { return 0; }
};
#ifdef FASTKD_CUDA
struct Cuda {
    using Where = std::uintptr_t;
    static void inverse_norm(const InverseNorm& op, Where s) { cuda::inverse_norm(op, pointer(s)); }
    static void similarity(const Similarity& op, Where s) { cuda::similarity(op, pointer(s)); }
    static void kernel_values(const KernelValues& op, Where s) { cuda::kernel_values(op, pointer(s)); }
    static void divergences(const Divergences& op, Where s) { cuda::divergences(op, pointer(s)); }
    static void gradient(const Gradient& op, Where s) { cuda::gradient(op, pointer(s)); }
    template <class Op> static int64_t workspace_bytes(const Op& op) { return cuda::workspace_bytes(op); }
};
#endif

template <class Backend> void bind(py::module_ m, bool uses_workspace) {
    m.attr("uses_workspace") = uses_workspace;
    using Where = typename Backend::Where;
    m.def("inverse_norm", [](const py::tuple& x, Address out, Where where) {
        const InverseNorm op{features(x), pointer(out)};
        py::gil_scoped_release release;
        Backend::inverse_norm(op, where);
    });
    m.def("similarity", [](const py::tuple& graph, const py::tuple& src, const py::tuple& dst,
                           Address src_inv_norm, Address dst_inv_norm, int metric, Address reverse, Address r,
                           Where where) {
        const Similarity op{
            csr(graph),     features(src),    features(dst), pointer(src_inv_norm), pointer(dst_inv_norm),
            Metric(metric), pointer(reverse), pointer(r)};
        py::gil_scoped_release release;
        Backend::similarity(op, where);
    });
    m.def("kernel_values",
          [](int64_t edges, const py::tuple& k, int acc, Address r, Address values, Where where) {
              const KernelValues op{edges, kernel(k), DType(acc), pointer(r), pointer(values)};
              py::gil_scoped_release release;
              Backend::kernel_values(op, where);
          });
    // With run False, returns the bytes of workspace that it needs and does nothing else.
    m.def("divergences",
          [](const py::tuple& graph, const py::tuple& student, const py::tuple& teacher, int divergence,
             int reduction, bool teacher_is_values, int acc, Address r_s, Address r_t, Address weight,
             Address src_inv_norm, Address dst_inv_norm, Address coef, Address rows, Address loss,
             Address diagnostics, int64_t max_degree, Address workspace, bool run, Where where) -> int64_t {
              const Divergences op{csr(graph),
                                   kernel(student),
                                   kernel(teacher),
                                   Divergence(divergence),
                                   Reduction(reduction),
                                   teacher_is_values,
                                   DType(acc),
                                   pointer(r_s),
                                   pointer(r_t),
                                   pointer(weight),
                                   pointer(src_inv_norm),
                                   pointer(dst_inv_norm),
                                   pointer(coef),
                                   pointer(rows),
                                   pointer(loss),
                                   pointer<int64_t>(diagnostics),
                                   max_degree,
                                   pointer(workspace)};
              if (!run) return Backend::workspace_bytes(op);
              py::gil_scoped_release release;
              Backend::divergences(op, where);
              return 0;
          });
    // lists: one or two tuples (graph, perm, mirrored, other).
    m.def("gradient",
          [](const py::tuple& self, const py::tuple& lists, int metric, Address coef, Address grad,
             bool grad_per_row, Address inv_norm, Address out, int64_t max_degree, Address workspace,
             bool run, Where where) -> int64_t {
              Gradient op{features(self),    {},           int(lists.size()), Metric(metric), pointer(coef),
                          pointer(grad),     grad_per_row, pointer(inv_norm), pointer(out),   max_degree,
                          pointer(workspace)};
              if (op.num_lists < 1 || op.num_lists > 2)
                  throw py::value_error("gradient takes one or two lists");
              for (int k = 0; k < op.num_lists; ++k) {
                  const py::tuple list = lists[std::size_t(k)];
                  expect(list, 4, "incidence");
                  op.lists[k] = {csr(list[0]), address(list, 1), integer(list, 2) != 0, features(list[3])};
              }
              if (!run) return Backend::workspace_bytes(op);
              py::gil_scoped_release release;
              Backend::gradient(op, where);
              return 0;
          });
}

#ifdef FASTKD_CUDA
// Memory by Python functions: take(bytes), put(buffer) and give(address).
struct PythonMemory : cuda::Memory {
    PythonMemory(py::object take, py::object put, py::object give)
        : take_(std::move(take)), put_(std::move(put)), give_(std::move(give)) {}
    void* take(int64_t bytes) override {
        const py::gil_scoped_acquire gil;
        return pointer(take_(bytes).cast<std::uintptr_t>());
    }
    void* put(const void* data, int64_t bytes) override {
        const py::gil_scoped_acquire gil;
        return pointer(
            put_(py::memoryview::from_memory(const_cast<void*>(data), bytes)).cast<std::uintptr_t>());
    }
    void give(void* data) noexcept override {
        const py::gil_scoped_acquire gil;
        give_(reinterpret_cast<std::uintptr_t>(data));
    }
    py::object take_, put_, give_;
};
#endif

// What both networks have: how they are made, and their runs but for where.
template <class Network> py::class_<Network> bind_network(py::module_ m) {
    return py::class_<Network>(m, "Network", py::module_local())
        .def(py::init(
            [](int dtype, int64_t genes, const py::tuple& values, const py::tuple& nodes, int output) {
                std::vector<Value> v;
                std::vector<Node> n;
                for (const py::handle& t : values) v.push_back(value(py::reinterpret_borrow<py::tuple>(t)));
                for (const py::handle& t : nodes) n.push_back(node(py::reinterpret_borrow<py::tuple>(t), v));
                return std::make_unique<Network>(DType(dtype), genes, std::move(v), std::move(n), output);
            }))
        .def("bytes", &Network::bytes)
        .def("outline", [](const Network& self) {
            const Outline o = self.outline();
            return py::make_tuple(py::cast(o.order), py::cast(o.producer), py::cast(o.seen));
        });
}

// affines: (scale, shift, stride) per norm, moments: (mean, variance) per norm, or empty.
struct Run {
    Run(Address masks, int64_t individuals, Address x, int x_dtype, int64_t x_stride, int64_t images,
        Address out, int out_dtype, const py::tuple& affines_, bool affines_agree, const py::tuple& moments_,
        int64_t norms) {
        for (const py::handle& h : affines_) {
            const auto t = py::reinterpret_borrow<py::tuple>(h);
            affines.push_back({address(t, 0), address(t, 1), integer(t, 2)});
        }
        for (const py::handle& h : moments_) {
            const auto t = py::reinterpret_borrow<py::tuple>(h);
            moments.push_back({const_cast<void*>(address(t, 0)), const_cast<void*>(address(t, 1))});
        }
        if ((!affines.empty() && int64_t(affines.size()) != norms) ||
            (!moments.empty() && int64_t(moments.size()) != norms))
            throw py::value_error("network: expected one entry per norm");
        run = {pointer<const std::uint8_t>(masks),
               individuals,
               pointer(x),
               DType(x_dtype),
               x_stride,
               images,
               pointer(out),
               DType(out_dtype),
               affines.empty() ? nullptr : affines.data(),
               moments.empty() ? nullptr : moments.data(),
               affines_agree};
    }
    Run(const Run&) = delete;
    std::vector<Affine> affines;
    std::vector<Moments> moments;
    NetworkRun run;
};

}  // namespace
}  // namespace fastkd

PYBIND11_MODULE(FASTKD_MODULE, m) {
    using namespace fastkd;
    m.doc() = "Native core of fastkd. Not a public interface: arguments are not checked here.";
    m.attr("__version__") = FASTKD_VERSION;
    m.attr("compiler") = FASTKD_COMPILER;
    m.attr("cuda_version") = FASTKD_CUDA_VERSION;              // "" without CUDA
    m.attr("cuda_architectures") = FASTKD_CUDA_ARCHITECTURES;  // "75;80;..."
    m.def("isa", &cpu::isa);
    auto host = m.def_submodule("cpu");
    bind<Cpu>(host, false);
#ifdef FASTKD_CUDA
    auto device = m.def_submodule("cuda");
    bind<Cuda>(device, true);
#endif
    // Advice only: where the system does not take it, nothing changes.
    host.def("advise_huge_pages", [](Address begin, std::uintptr_t bytes) {
#ifdef MADV_HUGEPAGE
        constexpr std::uintptr_t page = 4096;  // madvise wants whole pages
        const std::uintptr_t first = (begin + page - 1) / page * page, last = (begin + bytes) / page * page;
        if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
        (void)begin, (void)bytes;
#endif
    });
    host.def("csr_from_coo",
             [](Address src, Address dst, bool wide_in, int64_t edges, int64_t num_src, int64_t num_dst,
                bool wide_out, Address rowptr, Address col, Address perm, int threads) {
                 py::gil_scoped_release release;
                 return cpu::csr_from_coo(pointer(src), pointer(dst), wide_in, edges, num_src, num_dst,
                                          wide_out, pointer(rowptr), pointer(col), pointer(perm), threads);
             });
    host.def("csr_transpose",
             [](const py::tuple& graph, Address rowptr, Address col, Address perm, int threads) {
                 const Csr in = csr(graph);
                 py::gil_scoped_release release;
                 cpu::csr_transpose(in, pointer(rowptr), pointer(col), pointer(perm), threads);
             });
    host.def("csr_union",
             [](const py::tuple& a, const py::tuple& b, Address rowptr, Address col, int threads) {
                 const Csr left = csr(a), right = csr(b);
                 py::gil_scoped_release release;
                 cpu::csr_union(left, right, pointer(rowptr), pointer(col), threads);
             });
    // sizes: (individuals, images, channels, outputs, groups), geometry: size, out_size, kernel, stride,
    // padding, dilation, rows and columns of each.
    host.def("conv_backward", [](int acc, int dtype, const py::tuple& sizes, const py::tuple& geometry,
                                 Address in_mask, Address out_mask, Address grad, Address x, bool shared,
                                 Address weight, Address grad_x, Address grad_weight, Address grad_bias,
                                 int threads) {
        expect(sizes, 5, "sizes");
        expect(geometry, 12, "geometry");
        ConvBackward op{};
        op.acc = DType(acc), op.dtype = DType(dtype);
        op.individuals = integer(sizes, 0), op.images = integer(sizes, 1), op.channels = integer(sizes, 2);
        op.outputs = integer(sizes, 3), op.groups = integer(sizes, 4);
        pair(geometry, 0, op.size), pair(geometry, 2, op.out_size), pair(geometry, 4, op.kernel);
        pair(geometry, 6, op.stride), pair(geometry, 8, op.padding), pair(geometry, 10, op.dilation);
        op.in_mask = pointer<const std::uint8_t>(in_mask),
        op.out_mask = pointer<const std::uint8_t>(out_mask);
        op.grad = pointer(grad), op.x = pointer(x), op.shared = shared, op.weight = pointer(weight);
        op.grad_x = pointer(grad_x), op.grad_weight = pointer(grad_weight), op.grad_bias = pointer(grad_bias);
        py::gil_scoped_release release;
        cpu::conv_backward(op, threads);
    });
    bind_network<cpu::Network>(host)
        .def("taken", &cpu::Network::taken)
        .def("run", [](const cpu::Network& self, Address masks, int64_t individuals, Address x, int x_dtype,
                       int64_t x_stride, int64_t images, Address out, int out_dtype, const py::tuple& affines,
                       bool affines_agree, const py::tuple& moments, int threads) {
            const Run r(masks, individuals, x, x_dtype, x_stride, images, out, out_dtype, affines,
                        affines_agree, moments, self.norms());
            py::gil_scoped_release release;
            self.run(r.run, threads);
        });
#ifdef FASTKD_CUDA
    bind_network<cuda::Network>(device).def(
        "run", [](const cuda::Network& self, Address masks, int64_t individuals, Address x, int x_dtype,
                  int64_t x_stride, int64_t images, Address out, int out_dtype, const py::tuple& affines,
                  bool affines_agree, const py::tuple& moments, bool tf32, const py::object& take,
                  const py::object& put, const py::object& give, Address stream) {
            const Run r(masks, individuals, x, x_dtype, x_stride, images, out, out_dtype, affines,
                        affines_agree, moments, self.norms());
            PythonMemory memory(take, put, give);
            py::gil_scoped_release release;
            self.run(r.run, tf32, memory, pointer(stream));
        });
#endif
}
