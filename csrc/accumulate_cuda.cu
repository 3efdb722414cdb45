// The accumulate kernel on NVIDIA GPUs. One launch folds a list of tensors: their addresses travel as kernel
// arguments, so nothing is copied to the device first and a launch can be captured in a CUDA graph.
#include "accumulate.h"

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "accumulate_math.h"

namespace accumkern {
namespace {

constexpr int kThreads = 256;
constexpr int kVector = 8;                                       // elements a thread loads at once: 16 B of a 16-bit sum
constexpr int kSteps = kBlockNumel / (kThreads * kVector);       // vectors a thread has in flight
static_assert(kSteps * kThreads * kVector == kBlockNumel, "a block is a whole number of vectors");

constexpr int kMinBlocks = 4;                                    // per multiprocessor: 64 registers a thread, no spills
constexpr int kMaxTensors = 90;                                  // of one launch: 4 KB of kernel arguments

template <int kCapacity>
struct TensorList {
  FoldTensor tensors[kCapacity];
  uint32_t first_block[kCapacity];  // of each tensor, in the launch; ascending
  int count;
};
static_assert(sizeof(TensorList<kMaxTensors>) <= 4096 - 64, "kernel arguments may fill 4 KB on every GPU");

// ---- vectors -------------------------------------------------------------------------------------------------

template <class T>
struct alignas(sizeof(T) * kVector < 16 ? sizeof(T) * kVector : 16) Vector {
  T values[kVector];
};

template <class T>
__device__ __forceinline__ Vector<T> load(const T* address) {
  return *reinterpret_cast<const Vector<T>*>(address);
}

template <class T>
__device__ __forceinline__ void store(T* address, const Vector<T>& vector) {
  *reinterpret_cast<Vector<T>*>(address) = vector;
}

__host__ __device__ inline bool is_aligned(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % 16 == 0;
}

// ---- kernel --------------------------------------------------------------------------------------------------

// x = fma(scale, grad, decode(sum, residual)); (sum, residual) = encode(x), for one element.
template <class F>
__device__ __forceinline__ void fold_element(Start start, float scale, typename F::Sum grad, typename F::Sum* sum,
                                             typename F::Residual* residual, float* grad_squares,
                                             float* sum_squares) {
  const float g = F::widen(grad);
  float x;
  if (start == Start::kFromZero) {
    x = __fmul_rn(scale, g);
  } else if (start == Start::kFromSum || !F::kHasResidual) {
    x = __fmaf_rn(scale, g, F::widen(*sum));
  } else {
    x = __fmaf_rn(scale, g, F::decode(*sum, *residual));
  }
  F::encode(canonical_bits(x), sum, residual);
  *grad_squares = __fmaf_rn(g, g, *grad_squares);
  *sum_squares = __fmaf_rn(x, x, *sum_squares);
}

// Writes the block's two totals. The order of additions is fixed, so equal inputs give equal partials.
__device__ __forceinline__ void write_partials(float* partials, float grad_squares, float sum_squares) {
  __shared__ float of_warp[2][kThreads / 32];
  for (int offset = 16; offset > 0; offset /= 2) {
    grad_squares += __shfl_down_sync(0xFFFFFFFFu, grad_squares, offset);
    sum_squares += __shfl_down_sync(0xFFFFFFFFu, sum_squares, offset);
  }
  if (threadIdx.x % 32 == 0) {
    of_warp[0][threadIdx.x / 32] = grad_squares;
    of_warp[1][threadIdx.x / 32] = sum_squares;
  }
  __syncthreads();
  if (threadIdx.x < 2) {
    float total = 0.0f;
    for (int warp = 0; warp < kThreads / 32; ++warp) total += of_warp[threadIdx.x][warp];
    partials[threadIdx.x] = total;
  }
}

template <class F, int kCapacity>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    accumulate_kernel(const __grid_constant__ TensorList<kCapacity> list, const Start start, const Scale scale_argument) {
  // The last tensor whose first block is not past this one.
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
  const FoldTensor& tensor = list.tensors[index];
  const int64_t block = blockIdx.x - list.first_block[index];
  const int64_t begin = block * kBlockNumel;
  const int64_t left = tensor.numel - begin;

  const auto* grad = static_cast<const typename F::Sum*>(tensor.grad) + begin;
  auto* sum = static_cast<typename F::Sum*>(tensor.sum) + begin;
  auto* residual = F::kHasResidual ? static_cast<typename F::Residual*>(tensor.residual) + begin : nullptr;
  const float scale = scale_argument.address != nullptr ? *scale_argument.address : scale_argument.value;
  const bool reads_sum = start != Start::kFromZero;
  const bool reads_residual = F::kHasResidual && start == Start::kContinue;
  float grad_squares = 0.0f, sum_squares = 0.0f;

  if (left >= kBlockNumel && is_aligned(tensor.grad) && is_aligned(tensor.sum) && is_aligned(tensor.residual)) {
    Vector<typename F::Sum> grads[kSteps], sums[kSteps];
    Vector<typename F::Residual> residuals[kSteps];
    const int first = threadIdx.x * kVector;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int at = first + step * kThreads * kVector;
      grads[step] = load(grad + at);
      if (reads_sum) sums[step] = load(sum + at);
      if constexpr (F::kHasResidual) {
        if (reads_residual) residuals[step] = load(residual + at);
      }
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        fold_element<F>(start, scale, grads[step].values[i], &sums[step].values[i], &residuals[step].values[i],
                        &grad_squares, &sum_squares);
      }
      const int at = first + step * kThreads * kVector;
      store(sum + at, sums[step]);
      if constexpr (F::kHasResidual) store(residual + at, residuals[step]);
    }
  } else {
    const int count = static_cast<int>(left < kBlockNumel ? left : kBlockNumel);
    for (int i = threadIdx.x; i < count; i += kThreads) {
      typename F::Sum one_sum = reads_sum ? sum[i] : typename F::Sum{};
      typename F::Residual one_residual{};
      if (reads_residual) one_residual = residual[i];
      fold_element<F>(start, scale, grad[i], &one_sum, &one_residual, &grad_squares, &sum_squares);
      sum[i] = one_sum;
      if constexpr (F::kHasResidual) residual[i] = one_residual;
    }
  }
  if (tensor.partials != nullptr) write_partials(tensor.partials + 2 * block, grad_squares, sum_squares);
}

// ---- launcher ------------------------------------------------------------------------------------------------

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

template <int kCapacity>
void launch(Format format, Start start, const TensorList<kCapacity>& list, uint32_t blocks, Scale scale,
            cudaStream_t stream) {
  switch (format) {
    case Format::kSplit24:
      accumulate_kernel<Split24><<<blocks, kThreads, 0, stream>>>(list, start, scale);
      break;
    case Format::kSplit32:
      accumulate_kernel<Split32><<<blocks, kThreads, 0, stream>>>(list, start, scale);
      break;
    case Format::kMainGradBFloat16:
      accumulate_kernel<MainGrad<BFloat16>><<<blocks, kThreads, 0, stream>>>(list, start, scale);
      break;
    case Format::kMainGradFloat16:
      accumulate_kernel<MainGrad<Float16>><<<blocks, kThreads, 0, stream>>>(list, start, scale);
      break;
    case Format::kPlain32:
      accumulate_kernel<Plain32><<<blocks, kThreads, 0, stream>>>(list, start, scale);
      break;
  }
  check(cudaGetLastError(), "launching the accumulate kernel");
}

template <int kCapacity>
void launch_in_groups(Format format, Start start, const std::vector<FoldTensor>& tensors, Scale scale,
                      cudaStream_t stream) {
  constexpr int64_t kMaxBlocks = 0x7FFFFFFF;  // of a grid
  TensorList<kCapacity> list;
  list.count = 0;
  int64_t blocks = 0;
  for (const FoldTensor& tensor : tensors) {
    if (tensor.numel == 0) continue;
    const int64_t tensor_blocks = (tensor.numel + kBlockNumel - 1) / kBlockNumel;
    if (list.count == kCapacity || (list.count > 0 && blocks + tensor_blocks > kMaxBlocks)) {
      launch(format, start, list, static_cast<uint32_t>(blocks), scale, stream);
      list.count = 0;
      blocks = 0;
    }
    list.tensors[list.count] = tensor;
    list.first_block[list.count] = static_cast<uint32_t>(blocks);
    ++list.count;
    blocks += tensor_blocks;
  }
  if (list.count > 0) launch(format, start, list, static_cast<uint32_t>(blocks), scale, stream);
}

}  // namespace

void accumulate_cuda(Format format, Start start, const std::vector<FoldTensor>& tensors, Scale scale, int device,
                     uintptr_t stream) {
  const DeviceGuard guard(device);
  const auto cuda_stream = reinterpret_cast<cudaStream_t>(stream);
  if (tensors.size() == 1) {
    launch_in_groups<1>(format, start, tensors, scale, cuda_stream);
  } else {
    launch_in_groups<kMaxTensors>(format, start, tensors, scale, cuda_stream);
  }
}

}  // namespace accumkern
