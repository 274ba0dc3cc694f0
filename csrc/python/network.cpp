#include "network/network.h"

#include "network/conv_backward.h"
#include "python/convert.h"

namespace fastkd {
namespace {

// With the vectors that its arrays are.
struct Run : NetworkRun {
    std::vector<Affine> affines_of;
    std::vector<Moments> moments_of;
};

}  // namespace

template <> struct Fields<Value> {
    using S = Value;
    static constexpr auto name = "Value";
    static constexpr std::tuple all{FASTKD_FIELD(S, channels), FASTKD_FIELD(S, height),
                                    FASTKD_FIELD(S, width), FASTKD_FIELD(S, genes)};
};
template <> struct Fields<Node> {
    using S = Node;
    static constexpr auto name = "Node";
    static constexpr std::tuple all{
        FASTKD_FIELD(S, kind),     FASTKD_FIELD(S, inputs),     FASTKD_FIELD(S, output),
        FASTKD_FIELD(S, kernel),   FASTKD_FIELD(S, stride),     FASTKD_FIELD(S, padding),
        FASTKD_FIELD(S, dilation), FASTKD_FIELD(S, groups),     FASTKD_FIELD(S, count_padding),
        FASTKD_FIELD(S, batch),    FASTKD_FIELD(S, activation), FASTKD_FIELD(S, param),
        FASTKD_FIELD(S, weight),   FASTKD_FIELD(S, bias),       FASTKD_FIELD(S, scale),
        FASTKD_FIELD(S, shift),    FASTKD_FIELD(S, select)};
};
template <> struct Fields<Affine> {
    using S = Affine;
    static constexpr auto name = "Affine";
    static constexpr std::tuple all{FASTKD_FIELD(S, scale), FASTKD_FIELD(S, shift), FASTKD_FIELD(S, stride)};
};
template <> struct Fields<Moments> {
    using S = Moments;
    static constexpr auto name = "Moments";
    static constexpr std::tuple all{FASTKD_FIELD(S, mean), FASTKD_FIELD(S, variance)};
};
template <> struct Fields<Run> {
    using S = Run;
    static constexpr auto name = "NetworkRun";
    static void affines(PyObject* from, Run& to) { read(from, to.affines_of, "affines"); }
    static void moments(PyObject* from, Run& to) { read(from, to.moments_of, "moments"); }
    static constexpr std::tuple all{
        FASTKD_FIELD(S, masks),        FASTKD_FIELD(S, individuals),  FASTKD_FIELD(S, x),
        FASTKD_FIELD(S, x_dtype),      FASTKD_FIELD(S, x_stride),     FASTKD_FIELD(S, images),
        FASTKD_FIELD(S, out),          FASTKD_FIELD(S, out_dtype),    Custom<S>{"affines", affines},
        Custom<S>{"moments", moments}, FASTKD_FIELD(S, affines_agree)};
};
template <> struct Fields<ConvBackward> {
    using S = ConvBackward;
    static constexpr auto name = "ConvBackward";
    static constexpr std::tuple all{
        FASTKD_FIELD(S, acc),      FASTKD_FIELD(S, dtype),    FASTKD_FIELD(S, individuals),
        FASTKD_FIELD(S, images),   FASTKD_FIELD(S, channels), FASTKD_FIELD(S, outputs),
        FASTKD_FIELD(S, groups),   FASTKD_FIELD(S, size),     FASTKD_FIELD(S, out_size),
        FASTKD_FIELD(S, kernel),   FASTKD_FIELD(S, stride),   FASTKD_FIELD(S, padding),
        FASTKD_FIELD(S, dilation), FASTKD_FIELD(S, in_mask),  FASTKD_FIELD(S, out_mask),
        FASTKD_FIELD(S, grad),     FASTKD_FIELD(S, x),        FASTKD_FIELD(S, shared),
        FASTKD_FIELD(S, weight),   FASTKD_FIELD(S, grad_x),   FASTKD_FIELD(S, grad_weight),
        FASTKD_FIELD(S, grad_bias)};
};

namespace {

// Fills the run, whose vectors must stay where they are.
template <class Network> void fill(Run& run, const Network& network, const py::tuple& op) {
    read(op.ptr(), run, Fields<Run>::name);
    for (const std::size_t size : {run.affines_of.size(), run.moments_of.size()})
        if (size && std::int64_t(size) != network.norms())
            throw py::value_error("a run needs one entry per norm: " + std::to_string(network.norms()) +
                                  ", got " + std::to_string(size));
    run.affines = run.affines_of.empty() ? nullptr : run.affines_of.data();
    run.moments = run.moments_of.empty() ? nullptr : run.moments_of.data();
}

// Lists have the lengths that the contract says.
void check(const std::vector<Value>& values, const std::vector<Node>& nodes) {
    for (const Value& v : values)
        if (std::int64_t(v.genes.size()) != v.channels)
            throw py::value_error("a value needs a gene per channel");
    for (const Node& n : nodes)
        if (n.kind == Operation::select &&
            std::int64_t(n.select.size()) != 2 * values.at(std::size_t(n.output)).channels)
            throw py::value_error("select needs two integers per channel");
}

template <class T> py::list list(const std::vector<T>& from) {
    py::list to;
    for (const T& x : from) to.append(x);
    return to;
}

// What both back ends have, all but their runs.
template <class Network> py::class_<Network> bind(py::module_& m) {
    return py::class_<Network>(m, "Network", py::module_local())
        .def(py::init([](int dtype, std::int64_t genes, const py::tuple& values, const py::tuple& nodes,
                         int output) {
                 std::vector<Value> v;
                 std::vector<Node> n;
                 read(values.ptr(), v, "values");
                 read(nodes.ptr(), n, "nodes");
                 check(v, n);
                 return std::make_unique<Network>(DType(dtype), genes, std::move(v), std::move(n), output);
             }),
             py::kw_only(), py::arg("dtype"), py::arg("genes"), py::arg("values"), py::arg("nodes"),
             py::arg("output"))
        .def("outline", [](const Network& self) {
            const Outline o = self.outline();
            return py::make_tuple(list(o.order), list(o.producer), list(o.seen));
        });
}

#ifdef FASTKD_CUDA
// Memory by the methods of a Python object: take(bytes), put(buffer) and give(address).
struct PythonMemory : cuda::Memory {
    explicit PythonMemory(const py::object& memory)
        : take_(memory.attr("take")), put_(memory.attr("put")), give_(memory.attr("give")) {}
    void* take(std::int64_t bytes) override {
        const py::gil_scoped_acquire gil;
        return pointer(take_(bytes).cast<Address>());
    }
    void* put(const void* data, std::int64_t bytes) override {
        const py::gil_scoped_acquire gil;
        return pointer(put_(py::memoryview::from_memory(const_cast<void*>(data), bytes)).cast<Address>());
    }
    void give(void* data) noexcept override {
        const py::gil_scoped_acquire gil;
        give_(reinterpret_cast<Address>(data));
    }
    py::object take_, put_, give_;
};
#endif

}  // namespace

void bind_network(py::module_& root, py::module_& cpu, [[maybe_unused]] py::module_& cuda) {
    export_enum<Operation>(root, "Operation");
    export_enum<Activation>(root, "Activation");
    root.attr("ALWAYS") = kAlways;
    root.attr("NEVER") = kNever;
    export_fields<Value>(root);
    export_fields<Node>(root);
    export_fields<Affine>(root);
    export_fields<Moments>(root);
    export_fields<Run>(root);
    export_fields<ConvBackward>(root);
    def(cpu, "conv_backward", cpu::conv_backward);
    // Both take the same arguments; the CPU looks at neither tf32 nor memory, and a GPU at no threads.
    bind<cpu::Network>(cpu)
        .def("bytes", &cpu::Network::bytes, py::arg("images"), py::arg("recalibrate"), py::arg("individuals"),
             py::arg("threads"))
        .def(
            "run",
            [](const cpu::Network& self, const py::tuple& op, int where, bool, const py::object&) {
                Run run{};
                fill(run, self, op);
                const py::gil_scoped_release release;
                self.run(run, where);
                return self.taken();
            },
            py::arg("op"), py::arg("where"), py::arg("tf32"), py::arg("memory"));
#ifdef FASTKD_CUDA
    bind<cuda::Network>(cuda)
        .def(
            "bytes",
            [](const cuda::Network& self, std::int64_t images, bool recalibrate, std::int64_t individuals,
               int) { return self.bytes(images, recalibrate, individuals); },
            py::arg("images"), py::arg("recalibrate"), py::arg("individuals"), py::arg("threads"))
        .def(
            "run",
            [](const cuda::Network& self, const py::tuple& op, Address where, bool tf32,
               const py::object& memory) {
                Run run{};
                fill(run, self, op);
                PythonMemory python(memory);
                {
                    const py::gil_scoped_release release;
                    self.run(run, tf32, python, pointer(where));
                }
                return memory.attr("most").cast<std::int64_t>();
            },
            py::arg("op"), py::arg("where"), py::arg("tf32"), py::arg("memory"));
#endif
}

}  // namespace fastkd
