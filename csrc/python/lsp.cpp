#include "lsp/lsp.h"

#include "python/convert.h"

namespace fastkd {

template <> struct Fields<Kernel> {
    using S = Kernel;
    static constexpr auto name = "Kernel";
    static constexpr std::tuple all{FASTKD_FIELD(S, metric), FASTKD_FIELD(S, shape), FASTKD_FIELD(S, root),
                                    FASTKD_FIELD(S, degree), FASTKD_FIELD(S, scale), FASTKD_FIELD(S, param)};
};
template <> struct Fields<InverseNorm> {
    using S = InverseNorm;
    static constexpr auto name = "InverseNorm";
    static constexpr std::tuple all{FASTKD_FIELD(S, x), FASTKD_FIELD(S, inv_norm)};
};
template <> struct Fields<Similarity> {
    using S = Similarity;
    static constexpr auto name = "Similarity";
    static constexpr std::tuple all{FASTKD_FIELD(S, graph),        FASTKD_FIELD(S, src),
                                    FASTKD_FIELD(S, dst),          FASTKD_FIELD(S, src_inv_norm),
                                    FASTKD_FIELD(S, dst_inv_norm), FASTKD_FIELD(S, metric),
                                    FASTKD_FIELD(S, reverse),      FASTKD_FIELD(S, r)};
};
template <> struct Fields<KernelValues> {
    using S = KernelValues;
    static constexpr auto name = "KernelValues";
    static constexpr std::tuple all{FASTKD_FIELD(S, edges), FASTKD_FIELD(S, kernel), FASTKD_FIELD(S, acc),
                                    FASTKD_FIELD(S, r), FASTKD_FIELD(S, values)};
};
template <> struct Fields<Divergences> {
    using S = Divergences;
    static constexpr auto name = "Divergences";
    static constexpr std::tuple all{
        FASTKD_FIELD(S, graph),       FASTKD_FIELD(S, student),      FASTKD_FIELD(S, teacher),
        FASTKD_FIELD(S, divergence),  FASTKD_FIELD(S, reduction),    FASTKD_FIELD(S, teacher_is_values),
        FASTKD_FIELD(S, acc),         FASTKD_FIELD(S, r_s),          FASTKD_FIELD(S, r_t),
        FASTKD_FIELD(S, weight),      FASTKD_FIELD(S, src_inv_norm), FASTKD_FIELD(S, dst_inv_norm),
        FASTKD_FIELD(S, coef),        FASTKD_FIELD(S, rows),         FASTKD_FIELD(S, loss),
        FASTKD_FIELD(S, diagnostics), FASTKD_FIELD(S, max_degree),   FASTKD_FIELD(S, workspace)};
};
template <> struct Fields<Incidence> {
    using S = Incidence;
    static constexpr auto name = "Incidence";
    static constexpr std::tuple all{FASTKD_FIELD(S, graph), FASTKD_FIELD(S, perm), FASTKD_FIELD(S, mirrored),
                                    FASTKD_FIELD(S, other)};
};
template <> struct Fields<Gradient> {
    using S = Gradient;
    static constexpr auto name = "Gradient";
    static void lists(PyObject* from, Gradient& to) {
        std::vector<Incidence> lists;
        read(from, lists, "lists");
        if (lists.empty() || lists.size() > std::size(to.lists))
            throw py::value_error("lists must be one or two, got " + std::to_string(lists.size()));
        std::copy(lists.begin(), lists.end(), to.lists);
        to.num_lists = int(lists.size());
    }
    static constexpr std::tuple all{FASTKD_FIELD(S, self),       Custom<S>{"lists", lists},
                                    FASTKD_FIELD(S, metric),     FASTKD_FIELD(S, coef),
                                    FASTKD_FIELD(S, grad),       FASTKD_FIELD(S, grad_per_row),
                                    FASTKD_FIELD(S, inv_norm),   FASTKD_FIELD(S, out),
                                    FASTKD_FIELD(S, max_degree), FASTKD_FIELD(S, workspace)};
};

namespace {

template <class Where> void bind_operations(py::module_& m, void (*inverse_norm)(const InverseNorm&, Where),
                                            void (*similarity)(const Similarity&, Where),
                                            void (*kernel_values)(const KernelValues&, Where),
                                            void (*divergences)(const Divergences&, Where),
                                            void (*gradient)(const Gradient&, Where)) {
    def(m, "inverse_norm", inverse_norm);
    def(m, "similarity", similarity);
    def(m, "kernel_values", kernel_values);
    def(m, "divergences", divergences);
    def(m, "gradient", gradient);
}

// The bytes of workspace that an operation needs; the CPU needs none.
template <class Op> void def_bytes(py::module_& m, const char* name, std::int64_t (*bytes)(const Op&)) {
    m.def(name, [bytes](const py::tuple& op) { return bytes ? bytes(structure<Op>(op)) : 0; }, py::arg("op"));
}

}  // namespace

void bind_lsp(py::module_& root, py::module_& cpu, [[maybe_unused]] py::module_& cuda) {
    export_enum<Metric>(root, "Metric");
    export_enum<Shape>(root, "Shape");
    export_enum<Divergence>(root, "Divergence");
    export_enum<Reduction>(root, "Reduction");
    export_fields<Kernel>(root);
    export_fields<InverseNorm>(root);
    export_fields<Similarity>(root);
    export_fields<KernelValues>(root);
    export_fields<Divergences>(root);
    export_fields<Incidence>(root);
    export_fields<Gradient>(root);
    root.def("isa", &cpu::isa);
    bind_operations(cpu, cpu::inverse_norm, cpu::similarity, cpu::kernel_values, cpu::divergences,
                    cpu::gradient);
    def_bytes<Divergences>(cpu, "divergences_bytes", nullptr);
    def_bytes<Gradient>(cpu, "gradient_bytes", nullptr);
#ifdef FASTKD_CUDA
    bind_operations(cuda, cuda::inverse_norm, cuda::similarity, cuda::kernel_values, cuda::divergences,
                    cuda::gradient);
    def_bytes<Divergences>(cuda, "divergences_bytes", cuda::workspace_bytes);
    def_bytes<Gradient>(cuda, "gradient_bytes", cuda::workspace_bytes);
#endif
}

}  // namespace fastkd
