// Tensors of torch, read by DLPack in nanoseconds, where Python would take some hundred for each attribute.
#pragma once

#include <Python.h>

#include "dlpack.h"

namespace accumkern {

// Takes torch.Tensor: its instances are read from now on. Throws std::runtime_error where it cannot be done.
void read_tensors_of(PyObject* type);

// What tensors are read with; nullptr until read_tensors_of() was called.
const dlpack::Exchange* exchange_of_tensors();

// Reads an exact torch.Tensor; false, without a Python exception, for everything else and where it is sparse.
bool read_tensor(PyObject* object, dlpack::Tensor* tensor);

// layout(*lists): bytes that are equal where the lists' tensors have the same classes, dtypes, devices, shapes and strides;
// None may take the place of a tensor. Returns None where something else is among them. METH_FASTCALL.
PyObject* layout(PyObject* module, PyObject* const* lists, Py_ssize_t count);

}  // namespace accumkern
