// What the kernels on NVIDIA GPUs have in common: vectors, lists of tensors as kernel arguments, and launches.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "accumulate.h"
#include "accumulate_math.h"

namespace accumkern {
namespace {

constexpr int kThreads = 256;
constexpr int kVector = 8;                                  // elements a thread loads at once: 16 B of a 16-bit sum
constexpr int kSteps = kBlockNumel / (kThreads * kVector);  // vectors of a thread
static_assert(kSteps * kThreads * kVector == kBlockNumel, "a block is a whole number of vectors");
constexpr int kElements = 8;  // elements that a thread loads at once where it cannot load vectors

constexpr int kMinBlocks = 4;                // per multiprocessor: 64 registers a thread, no spills
constexpr size_t kArgumentBytes = 4096 - 128;  // of a list: a kernel's arguments may fill 4 KB on every GPU

// ---- vectors -------------------------------------------------------------------------------------------------

template <class T, int kWidth>
struct alignas(sizeof(T) * kWidth < 16 ? sizeof(T) * kWidth : 16) Vector {
  T values[kWidth];
};

template <int kWidth, class T>
__device__ __forceinline__ Vector<T, kWidth> load(const T* address) {
  return *reinterpret_cast<const Vector<T, kWidth>*>(address);
}

template <int kWidth, class T>
__device__ __forceinline__ void store(T* address, const Vector<T, kWidth>& vector) {
  *reinterpret_cast<Vector<T, kWidth>*>(address) = vector;
}

__host__ __device__ inline bool is_aligned(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % 16 == 0;
}

// ---- elements ------------------------------------------------------------------------------------------------

__device__ __forceinline__ float value_of(Scalar scalar) {
  return scalar.address != nullptr ? *scalar.address : scalar.value;
}

// The accumulated value of an element: of sum and residual, or of the sum alone.
template <class F>
__device__ __forceinline__ float value_of(Start start, typename F::Sum sum, typename F::Residual residual) {
  return start == Start::kFromSum ? F::widen(sum) : F::decode(sum, residual);
}

// ---- lists ---------------------------------------------------------------------------------------------------

template <class Tensor, int kCapacity>
struct TensorList {
  Tensor tensors[kCapacity];
  uint32_t first_block[kCapacity];  // of each tensor, in the launch; ascending
  int count;
};

// The last tensor whose first block is not past this one.
template <class Tensor, int kCapacity>
__device__ __forceinline__ int tensor_of_this_block(const TensorList<Tensor, kCapacity>& list) {
  int index = 0;
  for (int low = 1, high = list.count; low < high;) {
    const int middle = (low + high) / 2;
    if (list.first_block[middle] <= blockIdx.x) {
      index = middle;
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return index;
}

// ---- blocks --------------------------------------------------------------------------------------------------

template <int kWidth>
struct Width {
  static constexpr int value = kWidth;
};

// The part of a tensor that one thread block works on.
struct Extent {
  int count;    // of elements
  int vectors;  // how many of them, the first ones, lie in vectors: none where memory is not aligned
};

__device__ __forceinline__ Extent extent_of(int64_t left, bool is_aligned) {
  const int count = static_cast<int>(left < kBlockNumel ? left : kBlockNumel);
  return {count, is_aligned ? count / kVector * kVector : 0};
}

// For the elements from begin to end, kWidth at a time, `kCount` times: what a thread has of them is loaded,
// load(Width, at), before it uses any, use(Width, at, loaded), so that no load waits for a store.
template <int kWidth, int kCount, class Load, class Use>
__device__ __forceinline__ void walk_range(int begin, int end, const Load& load, const Use& use) {
  constexpr int kStride = kThreads * kWidth;
  constexpr Width<kWidth> width{};
#pragma unroll 1
  for (int first = begin + static_cast<int>(threadIdx.x) * kWidth; first < end; first += kCount * kStride) {
    decltype(load(width, 0)) loaded[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (first + i * kStride < end) loaded[i] = load(width, first + i * kStride);
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (first + i * kStride < end) use(width, first + i * kStride, loaded[i]);
    }
    if (kCount * kStride >= kBlockNumel) break;  // there are no more in a block
  }
}

// The same for a whole block: vectors first, then the elements that are left. Which thread has which, and in which
// order, depends on alignment alone.
template <int kVectors, int kScalars, class Load, class Use>
__device__ __forceinline__ void walk(const Extent& extent, const Load& load, const Use& use) {
  walk_range<kVector, kVectors>(0, extent.vectors, load, use);
  walk_range<1, kScalars>(extent.vectors, extent.count, load, use);
}

// ---- launches ------------------------------------------------------------------------------------------------

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    cudaGetLastError();  // a launch error is ours alone: do not leave it for the next caller
    throw std::runtime_error(std::string("accumkern: ") + what + ": " + cudaGetErrorString(error));
  }
}

class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    if (device != previous_) {
      check(cudaSetDevice(device), "cudaSetDevice");
      changed_ = true;
    }
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

// Calls launch(list, blocks) for all tensors, as many at a time as a list holds.
template <int kCapacity, class Tensor, class Launch>
void launch_in_groups(const std::vector<Tensor>& tensors, const Launch& launch_list) {
  constexpr int64_t kMaxBlocks = 0x7FFFFFFF;  // of a grid
  TensorList<Tensor, kCapacity> list;
  list.count = 0;
  int64_t blocks = 0;
  const auto launch = [&] {
    launch_list(list, static_cast<uint32_t>(blocks));
    check(cudaGetLastError(), "launching a kernel");
    list.count = 0;
    blocks = 0;
  };
  for (const Tensor& tensor : tensors) {
    if (tensor.numel == 0) continue;
    const int64_t tensor_blocks = (tensor.numel + kBlockNumel - 1) / kBlockNumel;
    if (list.count == kCapacity || (list.count > 0 && blocks + tensor_blocks > kMaxBlocks)) launch();
    list.tensors[list.count] = tensor;
    list.first_block[list.count] = static_cast<uint32_t>(blocks);
    ++list.count;
    blocks += tensor_blocks;
  }
  if (list.count > 0) launch();
}

}  // namespace
}  // namespace accumkern
