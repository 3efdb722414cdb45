// Gradients as Python has them, read by DLPack, and functions that fold them one by one.
#pragma once

#include <Python.h>

#include <optional>
#include <vector>

#include "accumulate.h"

namespace accumkern {

// Returns add(grad, total, version, scale), a new reference; nullptr with a Python exception.
//
// It does sum, residual = encode(scale * grad + decode(sum, residual)) and returns True, if total is the sum as it lies
// here, one range of memory, and is of that version; grad is laid out alike; both are exactly tensors; and scale is a float.
// Else it writes nothing and returns False. The first fold has this start, later ones continue. threads() says how many a
// large one on the CPU may take.
PyObject* fold_into(int format, int start, PyObject* total, PyObject* residual, PyObject* threads);

// Reads lists of gradients, sums and residuals, or no residuals where they are None. Nothing where any is not exactly a
// tensor, on another device, lazily negated or without memory, a gradient or sum not contiguous or of another dtype than the
// first gradient, a residual of another dtype than the first one, or not of as many elements as its sum.
std::optional<std::vector<FoldTensor>> read_alike(PyObject* grads, PyObject* sums, PyObject* residuals);

}  // namespace accumkern
