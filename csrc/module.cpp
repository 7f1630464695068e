// fastpeft._C: loading it registers the CPU kernels (bind/); its functions say and choose the instruction set.
#include <Python.h>
#include <torch/headeronly/version.h>

#include "cpu/select.h"

namespace {

PyObject* isa(PyObject*, PyObject*) { return PyUnicode_FromString(fastpeft::kernels().name); }

PyObject* select_isa(PyObject*, PyObject* args) {
  const char* name;
  if (!PyArg_ParseTuple(args, "s", &name)) return nullptr;
  const char* reason = "";
  if (!fastpeft::select_isa(name, &reason)) {
    return PyErr_Format(
        PyExc_ValueError, "instruction set '%s' cannot be used: %s; choose auto, avx512, avx2 or scalar", name, reason
    );
  }
  Py_RETURN_NONE;
}

// MKL takes its best code on processors of one maker only: decisions.py asks for this.
PyObject* maker(PyObject*, PyObject*) {
#if defined(__x86_64__)
  if (__builtin_cpu_is("amd")) return PyUnicode_FromString("amd");
  if (__builtin_cpu_is("intel")) return PyUnicode_FromString("intel");
#endif
  return PyUnicode_FromString("other");
}

PyObject* build_info(PyObject*, PyObject*) {
#if defined(__clang__)
  const char* compiler = "clang " __clang_version__;
#elif defined(__GNUC__)
  const char* compiler = "gcc " __VERSION__;
#else
  const char* compiler = "unknown";
#endif
#if defined(__x86_64__)
  const char* isas = "avx512 avx2 scalar";
#else
  const char* isas = "scalar";
#endif
  // TORCH_TARGET_VERSION: the oldest LibTorch whose stable ABI has everything that is called.
  const unsigned long long target = TORCH_TARGET_VERSION;
  PyObject* oldest =
      PyUnicode_FromFormat("%d.%d", static_cast<int>(target >> 56 & 0xff), static_cast<int>(target >> 48 & 0xff));
  if (oldest == nullptr) return nullptr;
  return Py_BuildValue(
      "{s:s,s:N,s:s,s:s}", "torch", TORCH_VERSION, "torch_abi", oldest, "isas", isas, "compiler", compiler
  );
}

PyMethodDef methods[] = {
    {"isa", isa, METH_NOARGS, "isa() -> str\n\nThe instruction set that the CPU kernels use now."},
    {"maker", maker, METH_NOARGS, "maker() -> str\n\nOf the processor: 'amd', 'intel' or 'other'."},
    {"select_isa", select_isa, METH_VARARGS,
     "select_isa(name)\n\nUse 'avx512', 'avx2', 'scalar' or 'auto' (the best); ValueError if it cannot be used."},
    {"build_info", build_info, METH_NOARGS,
     "build_info() -> dict\n\nThe torch and compiler this was built with, the oldest torch whose stable ABI it needs, and "
     "its instruction sets."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C", "CPU kernels of fastpeft.", -1, methods, nullptr, nullptr, nullptr, nullptr
};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
