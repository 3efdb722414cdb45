// The fold of one gradient as autograd brings it. Its Python would cost several times what a small fold does: tensors are
// read by DLPack, and arguments are taken as they come.
#include "fold_into.h"

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "accumulate.h"
#include "dlpack.h"
#include "tensors.h"

namespace accumkern {
namespace {

// A small fold keeps the interpreter: to give it away and take it again costs as much.
constexpr int64_t kShort = 1 << 15;  // elements, some ten microseconds

constexpr int32_t kMaxDims = 6;  // of a sum that is folded so

PyObject *const version_name = PyUnicode_InternFromString("_version"), *const is_neg_name = PyUnicode_InternFromString("is_neg");

// A sum where it lies, and what belongs to it.
struct Place {
  Format format;
  dlpack::Device device;
  dlpack::DType dtype;
  int32_t ndim;
  int64_t shape[kMaxDims], strides[kMaxDims];
  int64_t numel;
  void* sum;
  void* residual;
  PyObject* threads;  // a function that returns how many
  Start start;        // of the next fold

  // Whether a tensor has its elements in the order of the sum.
  bool is_laid_out_alike(const dlpack::Tensor& tensor) const {
    if (tensor.device.type != device.type || tensor.device.id != device.id || tensor.dtype.code != dtype.code ||
        tensor.dtype.bits != dtype.bits || tensor.ndim != ndim) {
      return false;
    }
    for (int32_t i = 0; i < ndim; ++i) {
      if (tensor.shape[i] != shape[i] || (tensor.strides[i] != strides[i] && shape[i] != 1)) return false;
    }
    return true;
  }
};

// 1 or 0; -1 with a Python exception.
int has_version(PyObject* tensor, PyObject* version) {
  PyObject* now = PyObject_GetAttr(tensor, version_name);
  if (now == nullptr) return -1;
  const int is_equal = PyObject_RichCompareBool(now, version, Py_EQ);
  Py_DECREF(now);
  return is_equal;
}

// Whether a tensor is lazily negated: 1 or 0; -1 with a Python exception. It is the imaginary part of a conjugate then, and
// no complex number has parts of bfloat16.
int is_negated(PyObject* tensor, const dlpack::DType& dtype) {
  if (dtype.code == dlpack::kBFloat) return 0;
  PyObject* answer = PyObject_CallMethodNoArgs(tensor, is_neg_name);
  if (answer == nullptr) return -1;
  const int is_true = PyObject_IsTrue(answer);
  Py_DECREF(answer);
  return is_true;
}

// Folds a gradient; returns false with a Python exception where it cannot.
bool fold(const Place& place, void* grad, float scale) {
  int64_t threads = 1;
  if (place.device.type == dlpack::kCpu && place.numel > kShort) {
    PyObject* number = PyObject_CallNoArgs(place.threads);
    threads = number == nullptr ? -1 : PyLong_AsLongLong(number);
    Py_XDECREF(number);
    if (PyErr_Occurred() != nullptr) return false;
  }
  void* stream = nullptr;
  if (place.device.type != dlpack::kCpu && exchange_of_tensors()->current_stream(place.device.type, place.device.id, &stream) != 0) return false;

  PyThreadState* interpreter = place.device.type == dlpack::kCpu && place.numel <= kShort ? nullptr : PyEval_SaveThread();
  std::string problem;
  try {
    const Call call = {Kernel::kFold, place.format, place.start, {{grad, place.sum, place.residual, nullptr, place.numel}},
                       {scale, nullptr}, {1.0f, nullptr}};
    if (place.device.type == dlpack::kCpu) {
      run_cpu(call, static_cast<int>(threads));
    } else {
#if defined(ACCUMKERN_CUDA_TARGETS)
      run_cuda(call, place.device.id, reinterpret_cast<uintptr_t>(stream));
#else
      problem = "accumkern: built without CUDA kernels";
#endif
    }
  } catch (const std::exception& error) {
    problem = error.what();
  }
  if (interpreter != nullptr) PyEval_RestoreThread(interpreter);
  if (problem.empty()) return true;
  PyErr_SetString(PyExc_RuntimeError, problem.c_str());
  return false;
}

// add(grad, total, version, scale)
PyObject* add(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 4) {
    PyErr_SetString(PyExc_TypeError, "accumkern.backends._C: add() takes a gradient, a sum, its version and a scale");
    return nullptr;
  }
  PyObject *grad_object = arguments[0], *total_object = arguments[1];
  auto& place = *static_cast<Place*>(PyCapsule_GetPointer(self, nullptr));
  dlpack::Tensor grad, total;
  if (!PyFloat_CheckExact(arguments[3]) || !read_tensor(grad_object, &grad) || !read_tensor(total_object, &total)) Py_RETURN_FALSE;
  if (dlpack::address(total) != place.sum || !place.is_laid_out_alike(total) || !place.is_laid_out_alike(grad)) Py_RETURN_FALSE;
  if (dlpack::address(grad) == nullptr && place.numel > 0) Py_RETURN_FALSE;  // torch's immutable zeros
  const int is_unchanged = has_version(total_object, arguments[2]);
  if (is_unchanged < 0) return nullptr;
  const int is_neg = is_negated(grad_object, grad.dtype);
  if (is_neg < 0) return nullptr;
  if (!is_unchanged || is_neg) Py_RETURN_FALSE;
  if (!fold(place, dlpack::address(grad), static_cast<float>(PyFloat_AS_DOUBLE(arguments[3])))) return nullptr;
  place.start = Start::kContinue;
  Py_RETURN_TRUE;
}

// Whether a tensor's elements lie one after another.
bool is_contiguous(const dlpack::Tensor& tensor) {
  int64_t numel = 1;
  bool is_row_major = true;
  for (int32_t i = tensor.ndim - 1; i >= 0; --i) {
    if (tensor.shape[i] != 1 && tensor.strides[i] != numel) is_row_major = false;
    numel *= tensor.shape[i];
  }
  return is_row_major || numel == 0;
}

bool is_of(const dlpack::Tensor& tensor, const dlpack::Device& device, const dlpack::DType& dtype) {
  return tensor.device.type == device.type && tensor.device.id == device.id && tensor.dtype.code == dtype.code &&
         tensor.dtype.bits == dtype.bits;
}

PyMethodDef add_method = {"add", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&add)), METH_FASTCALL,
                          "add(grad, total, version, scale): fold, or return False where that is not as it was."};

// cannot(grad, total, version, scale)
PyObject* cannot(PyObject*, PyObject*) { Py_RETURN_FALSE; }

PyMethodDef cannot_method = {"cannot", &cannot, METH_VARARGS, "cannot(grad, total, version, scale): return False."};

void release(PyObject* capsule) {
  const auto* place = static_cast<Place*>(PyCapsule_GetPointer(capsule, nullptr));
  Py_DECREF(place->threads);
  delete place;
}

}  // namespace

PyObject* fold_into(int format, int start, PyObject* total, PyObject* residual, PyObject* threads) {
  dlpack::Tensor sum, low = {};
  if (!read_tensor(total, &sum) || (residual != Py_None && !read_tensor(residual, &low))) throw std::invalid_argument("not a torch.Tensor");
  if (sum.ndim > kMaxDims) return PyCFunction_New(&cannot_method, nullptr);
  auto* place = new Place{static_cast<Format>(format), sum.device, sum.dtype, sum.ndim, {}, {}, dlpack::numel(sum),
                          dlpack::address(sum), residual == Py_None ? nullptr : dlpack::address(low), threads, static_cast<Start>(start)};
  std::copy_n(sum.shape, sum.ndim, place->shape);
  std::copy_n(sum.strides, sum.ndim, place->strides);
  PyObject* capsule = PyCapsule_New(place, nullptr, &release);
  if (capsule == nullptr) {
    delete place;
    return nullptr;
  }
  Py_INCREF(threads);
  PyObject* function = PyCFunction_New(&add_method, capsule);
  Py_DECREF(capsule);
  return function;
}

std::optional<std::vector<FoldTensor>> read_alike(PyObject* grads, PyObject* sums, PyObject* residuals) {
  const bool has_residuals = residuals != Py_None;
  if (!PyList_CheckExact(grads) || !PyList_CheckExact(sums) || (has_residuals && !PyList_CheckExact(residuals)) ||
      PyList_GET_SIZE(grads) != PyList_GET_SIZE(sums) || (has_residuals && PyList_GET_SIZE(residuals) != PyList_GET_SIZE(sums))) {
    throw std::invalid_argument("accumkern.backends._C: fold_alike() takes lists of one length");
  }
  std::vector<FoldTensor> tensors(static_cast<size_t>(PyList_GET_SIZE(sums)));
  dlpack::Device device = {};
  dlpack::DType dtype = {}, low_dtype = {};
  for (size_t i = 0; i < tensors.size(); ++i) {
    const auto at = static_cast<Py_ssize_t>(i);
    PyObject *grad_object = PyList_GET_ITEM(grads, at), *sum_object = PyList_GET_ITEM(sums, at);
    dlpack::Tensor grad, sum, low = {};
    if (!read_tensor(grad_object, &grad) || !read_tensor(sum_object, &sum)) return std::nullopt;
    if (has_residuals && !read_tensor(PyList_GET_ITEM(residuals, at), &low)) return std::nullopt;
    if (i == 0) device = grad.device, dtype = grad.dtype, low_dtype = low.dtype;
    if (!is_of(grad, device, dtype) || !is_of(sum, device, dtype) || (has_residuals && !is_of(low, device, low_dtype))) return std::nullopt;
    const int64_t numel = dlpack::numel(sum);
    if (dlpack::numel(grad) != numel || (has_residuals && dlpack::numel(low) != numel)) return std::nullopt;
    if (!is_contiguous(grad) || !is_contiguous(sum)) return std::nullopt;
    if (numel > 0 && (dlpack::address(grad) == nullptr || dlpack::address(sum) == nullptr)) return std::nullopt;  // torch's immutable zeros
    for (PyObject* object : {grad_object, sum_object}) {
      const int is_neg = is_negated(object, dtype);
      if (is_neg < 0) PyErr_Clear();
      if (is_neg != 0) return std::nullopt;
    }
    tensors[i] = {dlpack::address(grad), dlpack::address(sum), has_residuals ? dlpack::address(low) : nullptr, nullptr, numel};
  }
  return tensors;
}

}  // namespace accumkern
