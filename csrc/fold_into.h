// Python functions that fold gradients one by one.
#pragma once

#include <Python.h>

#include <cstdint>

namespace accumkern {

// Returns add(grad, total, version, scale), a new reference; nullptr with a Python exception.
//
// It does sum, residual = encode(scale * grad + decode(sum, residual)) and returns True, if total is the sum as it lies
// here, one range of memory, and is of that version; grad is laid out alike; both are exactly tensors; and scale is a float.
// Else it writes nothing and returns False. The first fold has this start, later ones continue. threads() says how many a
// large one on the CPU may take.
PyObject* fold_into(int format, int start, PyObject* total, PyObject* residual, PyObject* threads);

}  // namespace accumkern
