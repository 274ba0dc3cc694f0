// The module: what it says of its build, and how a signal reaches a call that takes long.
#include <pybind11/pybind11.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "common/interrupt.h"
#include "python/convert.h"

namespace fastkd {
namespace {

unsigned long main_thread;  // Python handles signals there alone

void check_signals() {
    if (PyThread_get_thread_ident() != main_thread) return;
    const py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals()) throw py::error_already_set();
}

// Advice only: where the system does not take it, nothing changes.
void advise_huge_pages([[maybe_unused]] Address begin, [[maybe_unused]] Address bytes) {
#ifdef MADV_HUGEPAGE
    constexpr Address page = 4096;  // madvise wants whole pages
    const Address first = (begin + page - 1) / page * page, last = (begin + bytes) / page * page;
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace
}  // namespace fastkd

PYBIND11_MODULE(FASTKD_MODULE, m) {
    using namespace fastkd;
    m.doc() = "Native core of fastkd. Not a public interface: arguments are not checked here.";
    m.attr("__version__") = FASTKD_VERSION;
    m.attr("compiler") = FASTKD_COMPILER;
    m.attr("cuda_version") = FASTKD_CUDA_VERSION;              // "" without CUDA
    m.attr("cuda_architectures") = FASTKD_CUDA_ARCHITECTURES;  // "75 80 ..."
    m.attr("fields") = py::dict();
    export_enum<DType>(m, "DType");
    export_fields<Features>(m);
    export_fields<Csr>(m);
    auto cpu = m.def_submodule("cpu");
    cpu.attr("uses_workspace") = false;
    cpu.def("advise_huge_pages", advise_huge_pages, py::arg("begin"), py::arg("bytes"));
    auto cuda = py::reinterpret_steal<py::module_>(nullptr);
#ifdef FASTKD_CUDA
    cuda = m.def_submodule("cuda");
    cuda.attr("uses_workspace") = true;
#endif
    bind_lsp(m, cpu, cuda);
    bind_graph(cpu);
    bind_network(m, cpu, cuda);
    main_thread = py::module_::import("threading").attr("main_thread")().attr("ident").cast<unsigned long>();
    interrupt_hook = check_signals;
}
