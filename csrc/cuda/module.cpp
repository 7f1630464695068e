// fastpeft._cuda: loading it registers the CUDA kernels (nf4.cpp); its functions say what it was built for and whether
// that runs here. It loads on a machine without a driver.
#include <Python.h>
#include <torch/headeronly/version.h>

#include <exception>

#include "runtime.h"

namespace {

PyObject* build_info(PyObject*, PyObject*) {
  return Py_BuildValue(
      "{s:s,s:s,s:s,s:s}", "cuda", FASTPEFT_CUDA_RELEASE, "archs", FASTPEFT_CUDA_ARCHS, "nvcc", FASTPEFT_NVCC, "torch",
      TORCH_VERSION
  );
}

PyObject* reason_or_none(const std::string& reason) {
  if (reason.empty()) Py_RETURN_NONE;
  return PyUnicode_FromString(reason.c_str());
}

PyObject* why_no_driver(PyObject*, PyObject*) { return reason_or_none(fastpeft::cuda::why_no_driver()); }

PyObject* why_not(PyObject*, PyObject* args) {
  int device;
  if (!PyArg_ParseTuple(args, "i", &device)) return nullptr;
  try {
    return reason_or_none(fastpeft::cuda::why_not(device));
  } catch (const std::exception& error) {
    return PyErr_Format(PyExc_ValueError, "%s", error.what());
  }
}

PyObject* fall_back_to(PyObject*, PyObject* args) {
  const char* name;
  if (!PyArg_ParseTuple(args, "s", &name)) return nullptr;
  fastpeft::cuda::fall_back_to(name);
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"build_info", build_info, METH_NOARGS,
     "build_info() -> dict\n\nCUDA release, compute capabilities, nvcc and torch that this extension was built with."},
    {"why_no_driver", why_no_driver, METH_NOARGS,
     "why_no_driver() -> str | None\n\nNone if a driver and a GPU are there, else why not."},
    {"why_not", why_not, METH_VARARGS,
     "why_not(device) -> str | None\n\nNone if the kernels run on GPU `device`, else why not."},
    {"fall_back_to", fall_back_to, METH_VARARGS,
     "fall_back_to(namespace)\n\nWhose operators take what these kernels do not, from compute capability 8.0 on."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_cuda", "CUDA kernels of fastpeft.", -1, methods, nullptr, nullptr, nullptr, nullptr
};

}  // namespace

PyMODINIT_FUNC PyInit__cuda() { return PyModule_Create(&module); }
