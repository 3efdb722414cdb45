// Reads tensors as DLPack describes them (dlpack.h 1.3, github.com/dmlc/dlpack): torch.Tensor hands out C functions in
// __dlpack_c_exchange_api__, by which one build serves every version of torch, and a tensor is read in nanoseconds.
#pragma once

#include <Python.h>

#include <cstdint>

namespace accumkern::dlpack {

// ---- what DLPack lays down ----------------------------------------------------------------------------------------

constexpr uint32_t kMajorVersion = 1;
constexpr const char* kCapsuleName = "dlpack_exchange_api";

constexpr int32_t kCpu = 1;  // types of devices
constexpr uint8_t kFloat = 2, kBFloat = 4;  // codes of dtypes

struct Device {
  int32_t type;
  int32_t id;
};

struct DType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};

struct Exchange {
  uint32_t major, minor;
  Exchange* older;
  void* allocate;
  void* managed_from_object;
  void* object_from_managed;
  int (*read)(void* object, Tensor* tensor);  // -1 on failure, with a Python exception
  int (*current_stream)(int32_t device_type, int32_t device_id, void** stream);
};

// ---- what is asked of a tensor ------------------------------------------------------------------------------------

inline int64_t numel(const Tensor& tensor) {
  int64_t product = 1;
  for (int32_t i = 0; i < tensor.ndim; ++i) product *= tensor.shape[i];
  return product;
}

inline void* address(const Tensor& tensor) { return static_cast<char*>(tensor.data) + tensor.byte_offset; }

}  // namespace accumkern::dlpack
