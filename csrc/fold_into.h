// Python functions that fold gradients one by one, without pybind11.
#pragma once

#include <Python.h>

namespace accumkern {

// Takes torch.Tensor: its exact instances are read from now on. Throws std::runtime_error where it cannot be done.
void read_tensors_of(PyObject* type);

// Returns add(grad, total, version, scale), a new reference; nullptr with a Python exception.
//
// It does sum, residual = encode(scale * grad + decode(sum, residual)) and returns True, if total is the sum as it lies
// here, of that version; grad is laid out as it; both are plain tensors; and scale is a float. Else nothing is written, and
// it returns False. threads() says how many a large fold on the CPU may take.
PyObject* fold_into(int format, PyObject* total, PyObject* residual, PyObject* threads);

}  // namespace accumkern
