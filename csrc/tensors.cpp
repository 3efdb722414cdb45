#include "tensors.h"

#include <stdexcept>
#include <string>

namespace accumkern {
namespace {

PyTypeObject* tensor_type = nullptr;  // torch.Tensor
const dlpack::Exchange* exchange = nullptr;

// What a layout says of a tensor; then come its shape and its strides.
struct Head {
  PyTypeObject* type;
  dlpack::Device device;
  dlpack::DType dtype;
  int32_t ndim;
};

}  // namespace

void read_tensors_of(PyObject* type) {
  PyObject* capsule = PyObject_GetAttrString(type, "__dlpack_c_exchange_api__");
  if (capsule == nullptr) {
    PyErr_Clear();
    throw std::runtime_error("this torch has no torch.Tensor.__dlpack_c_exchange_api__");
  }
  const auto* found = static_cast<const dlpack::Exchange*>(PyCapsule_GetPointer(capsule, dlpack::kCapsuleName));
  Py_DECREF(capsule);
  while (found != nullptr && found->major > dlpack::kMajorVersion) found = found->older;
  if (found == nullptr || found->read == nullptr || found->current_stream == nullptr) {
    PyErr_Clear();
    throw std::runtime_error("this torch exchanges tensors by another version of DLPack than 1");
  }
  exchange = found;
  tensor_type = reinterpret_cast<PyTypeObject*>(type);
  Py_INCREF(type);
}

const dlpack::Exchange* exchange_of_tensors() { return exchange; }

bool read_tensor(PyObject* object, dlpack::Tensor* tensor) {
  if (Py_TYPE(object) != tensor_type) return false;
  if (exchange->read(object, tensor) == 0) return true;
  PyErr_Clear();  // a sparse one
  return false;
}

PyObject* layout(PyObject*, PyObject* const* lists, Py_ssize_t count) {
  std::string bytes;
  const auto add = [&bytes](const void* begin, size_t size) { bytes.append(static_cast<const char*>(begin), size); };
  if (exchange == nullptr) Py_RETURN_NONE;
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (!PyList_CheckExact(lists[i])) Py_RETURN_NONE;
    const Py_ssize_t length = PyList_GET_SIZE(lists[i]);
    add(&length, sizeof(length));
    for (Py_ssize_t k = 0; k < length; ++k) {
      PyObject* object = PyList_GET_ITEM(lists[i], k);
      Head head = {};
      dlpack::Tensor tensor = {};
      if (object != Py_None) {
        if (!PyObject_TypeCheck(object, tensor_type)) Py_RETURN_NONE;
        if (exchange->read(object, &tensor) != 0) {
          PyErr_Clear();  // a sparse one
          Py_RETURN_NONE;
        }
        head = {Py_TYPE(object), tensor.device, tensor.dtype, tensor.ndim};
      }
      add(&head, sizeof(head));
      add(tensor.shape, tensor.ndim * sizeof(int64_t));
      add(tensor.strides, tensor.ndim * sizeof(int64_t));
    }
  }
  return PyBytes_FromStringAndSize(bytes.data(), static_cast<Py_ssize_t>(bytes.size()));
}

}  // namespace accumkern
