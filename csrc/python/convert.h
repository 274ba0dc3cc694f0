// Between Python's tuples and integers and the structures and enums of the contracts.
//
// A structure arrives as a tuple of its fields in the order of Fields<>, which names each member once and
// which the module exports as `fields`, so that Python compares its own with it. An enum is exported by
// the names that the compiler knows, and arrives as its number. Memory arrives as an address, 0 for none.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <limits>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "common/types.h"

namespace fastkd {

namespace py = pybind11;
using Address = std::uintptr_t;

template <class T = void> T* pointer(Address address) { return reinterpret_cast<T*>(address); }

// The name of an enumerator, or "" where the enum has none of this value: of the compiler's name of this
// function, which ends in "V = fastkd::Metric::dot]" or "V = (fastkd::Metric)7]" or has more behind a ";".
template <auto V> constexpr std::string_view enumerator() {
    constexpr std::string_view text = __PRETTY_FUNCTION__, before = "V = ";
    const std::size_t begin = text.find(before) + before.size();
    const std::string_view value = text.substr(begin, text.find_first_of(";]", begin) - begin);
    return value[0] == '(' ? std::string_view() : value.substr(value.rfind(':') + 1);
}

// Of an enum whose values are 0, 1, ...
template <class E, int N = 0> constexpr int count_of() {
    if constexpr (enumerator<E(N)>().empty()) return N;
    else return count_of<E, N + 1>();
}

inline std::int64_t integer(PyObject* from) {
    const long long value = PyLong_AsLongLong(from);
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    return value;
}

inline std::int64_t integer(PyObject* from, std::int64_t low, std::int64_t high, const char* what) {
    const std::int64_t value = integer(from);
    if (value < low || value > high)
        throw py::value_error(std::string(what) + " must be in [" + std::to_string(low) + ", " +
                              std::to_string(high) + "], got " + std::to_string(value));
    return value;
}

// The items of a tuple of a known size.
inline PyObject* const* items(PyObject* from, std::size_t size, const char* what) {
    if (!PyTuple_Check(from) || std::size_t(PyTuple_GET_SIZE(from)) != size)
        throw py::value_error(std::string(what) + " must be a tuple of " + std::to_string(size));
    return &PyTuple_GET_ITEM(from, 0);
}

template <class T> struct Fields;  // `name`, and `all`: a tuple of Field and Custom

template <class S, class M> struct Field {
    const char* name;
    M S::* member;
};
// A member that a function reads.
template <class S> struct Custom {
    const char* name;
    void (*set)(PyObject* from, S& to);
};
#define FASTKD_FIELD(S, MEMBER) \
    ::fastkd::Field { #MEMBER, &S::MEMBER }

template <class T> void read(PyObject* from, std::vector<T>& to, const char* what);

template <class T> void read(PyObject* from, T& to, const char* what) {
    if constexpr (std::is_same_v<T, bool>) to = integer(from, 0, 1, what) != 0;
    else if constexpr (std::is_enum_v<T>) to = T(integer(from, 0, count_of<T>() - 1, what));
    else if constexpr (std::is_pointer_v<T>) to = reinterpret_cast<T>(integer(from));
    else if constexpr (std::is_integral_v<T>)
        to = T(integer(from, std::numeric_limits<T>::min(), std::numeric_limits<T>::max(), what));
    else if constexpr (std::is_floating_point_v<T>) {
        to = PyFloat_AsDouble(from);
        if (to == -1.0 && PyErr_Occurred()) throw py::error_already_set();
    } else if constexpr (std::is_array_v<T>) {
        PyObject* const* item = items(from, std::extent_v<T>, what);
        for (auto& x : to) read(*item++, x, what);
    } else {
        PyObject* const* item = items(from, std::tuple_size_v<decltype(Fields<T>::all)>, Fields<T>::name);
        auto one = [&](const auto& field) {
            if constexpr (requires { field.set; }) field.set(*item++, to);
            else read(*item++, to.*field.member, field.name);
        };
        std::apply([&](const auto&... field) { (one(field), ...); }, Fields<T>::all);
    }
}

// Of a tuple of any size.
template <class T> void read(PyObject* from, std::vector<T>& to, const char* what) {
    if (!PyTuple_Check(from)) throw py::value_error(std::string(what) + " must be a tuple");
    to.resize(std::size_t(PyTuple_GET_SIZE(from)));
    for (std::size_t k = 0; k < to.size(); ++k) read(PyTuple_GET_ITEM(from, Py_ssize_t(k)), to[k], what);
}

template <class T> T structure(const py::tuple& from) {
    T to{};
    read(from.ptr(), to, Fields<T>::name);
    return to;
}

template <class T> void export_fields(py::module_& root) {
    auto names =
        std::apply([](const auto&... field) { return py::make_tuple(field.name...); }, Fields<T>::all);
    root.attr("fields")[Fields<T>::name] = names;
}

template <class E, int... N>
void export_enum(py::module_& root, const char* name, std::integer_sequence<int, N...>) {
    py::dict members;
    ((members[py::str(std::string(enumerator<E(N)>()))] = N), ...);
    root.attr(name) =
        py::module_::import("enum").attr("IntEnum")(name, members, py::arg("module") = root.attr("__name__"));
}
// E becomes an IntEnum of the module.
template <class E> void export_enum(py::module_& root, const char* name) {
    export_enum<E>(root, name, std::make_integer_sequence<int, count_of<E>()>());
}

// An operation of a back end, which runs in so many threads or on a stream.
template <class Op, class Where> void def(py::module_& m, const char* name, void (*run)(const Op&, Where)) {
    using Argument = std::conditional_t<std::is_pointer_v<Where>, Address, int>;
    m.def(
        name,
        [run](const py::tuple& op, Argument where) {
            const Op native = structure<Op>(op);
            const py::gil_scoped_release release;
            if constexpr (std::is_pointer_v<Where>) run(native, pointer(where));
            else run(native, where);
        },
        py::arg("op"), py::arg("where"));
}

template <> struct Fields<Features> {
    static constexpr auto name = "Features";
    static constexpr std::tuple all{FASTKD_FIELD(Features, data), FASTKD_FIELD(Features, rows),
                                    FASTKD_FIELD(Features, cols), FASTKD_FIELD(Features, stride),
                                    FASTKD_FIELD(Features, dtype)};
};
template <> struct Fields<Csr> {
    static constexpr auto name = "Csr";
    static constexpr std::tuple all{FASTKD_FIELD(Csr, rowptr), FASTKD_FIELD(Csr, col),
                                    FASTKD_FIELD(Csr, rows),   FASTKD_FIELD(Csr, cols),
                                    FASTKD_FIELD(Csr, edges),  FASTKD_FIELD(Csr, wide)};
};

// What each subject adds to the module, and to its back ends; `cuda` is null in a build without it.
void bind_lsp(py::module_& root, py::module_& cpu, py::module_& cuda);
void bind_graph(py::module_& cpu);
void bind_network(py::module_& root, py::module_& cpu, py::module_& cuda);

}  // namespace fastkd
