// fastpeft._C: loading it registers the CPU kernels (bind/); its functions say and choose the instruction set.
#include <Python.h>

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

PyMethodDef methods[] = {
    {"isa", isa, METH_NOARGS, "isa() -> str\n\nThe instruction set that the CPU kernels use now."},
    {"select_isa", select_isa, METH_VARARGS,
     "select_isa(name)\n\nUse 'avx512', 'avx2', 'scalar' or 'auto' (the best); ValueError if it cannot be used."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C", "CPU kernels of fastpeft.", -1, methods, nullptr, nullptr, nullptr, nullptr
};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
