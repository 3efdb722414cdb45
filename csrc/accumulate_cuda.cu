// The kernels on NVIDIA GPUs. One launch takes a list of tensors: their addresses travel as kernel arguments, so
// nothing is copied to the device first and a launch can be captured in a CUDA graph.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "accumulate.h"
#include "accumulate_math.h"
#include "cuda.h"

namespace accumkern {
namespace {

constexpr int kMaxTensors = 90;  // of one launch
static_assert(sizeof(TensorList<FoldTensor, kMaxTensors>) <= kArgumentBytes, "kernel arguments are limited");

// ---- blocks --------------------------------------------------------------------------------------------------

// What one thread block works on: up to kBlockNumel elements of one tensor.
template <class F, class Grad, class Sum>
struct Block {
  const Grad* grad;
  Sum* sum;
  typename F::Residual* residual;
  float* partials;
  int count;
  bool is_whole;  // full and aligned: every access can be 16 bytes wide
};

template <class F, class Grad = typename F::Sum, class Sum = typename F::Sum, int kColumns = kPartials, int kCapacity>
__device__ __forceinline__ Block<F, Grad, Sum> this_block(const TensorList<FoldTensor, kCapacity>& list) {
  const int index = tensor_of_this_block(list);
  const FoldTensor& tensor = list.tensors[index];
  const int64_t block = blockIdx.x - list.first_block[index];
  const int64_t begin = block * kBlockNumel;
  const int64_t left = tensor.numel - begin;
  return {static_cast<const Grad*>(tensor.grad) + begin,
          static_cast<Sum*>(tensor.sum) + begin,
          F::kHasResidual ? static_cast<typename F::Residual*>(tensor.residual) + begin : nullptr,
          tensor.partials == nullptr ? nullptr : tensor.partials + kColumns * block,
          static_cast<int>(left < kBlockNumel ? left : kBlockNumel),
          left >= kBlockNumel && is_aligned(tensor.grad) && is_aligned(tensor.sum) && is_aligned(tensor.residual)};
}

// ---- fold ----------------------------------------------------------------------------------------------------

struct Squares {
  float of[kPartials] = {};
};

// x = fma(scale, grad, decode(sum, residual)); (sum, residual) = encode(x), for one element.
template <class F>
__device__ __forceinline__ void fold_element(Start start, float scale, typename F::Sum grad, typename F::Sum* sum,
                                             typename F::Residual* residual, Squares* squares) {
  const float g = F::widen(grad);
  float x;
  if (start == Start::kFromZero) {
    x = __fmul_rn(scale, g);
  } else if (start == Start::kFromSum) {
    const float old_value = F::widen(*sum);
    x = __fmaf_rn(scale, g, old_value);
    squares->of[2] = __fmaf_rn(old_value, old_value, squares->of[2]);
  } else {
    x = __fmaf_rn(scale, g, F::decode(*sum, *residual));
  }
  F::encode(canonical_bits(x), sum, residual);
  squares->of[0] = __fmaf_rn(g, g, squares->of[0]);
  squares->of[1] = __fmaf_rn(x, x, squares->of[1]);
}

// Writes the block's totals. The order of additions is fixed, so equal inputs give equal partials.
template <int kColumns>
__device__ __forceinline__ void write_partials(float* partials, const float (&squares)[kColumns]) {
  __shared__ float of_warp[kColumns][kThreads / 32];
  for (int i = 0; i < kColumns; ++i) {
    float total = squares[i];
    for (int offset = 16; offset > 0; offset /= 2) total += __shfl_down_sync(0xFFFFFFFFu, total, offset);
    if (threadIdx.x % 32 == 0) of_warp[i][threadIdx.x / 32] = total;
  }
  __syncthreads();
  if (threadIdx.x < kColumns) {
    float total = 0.0f;
    for (int warp = 0; warp < kThreads / 32; ++warp) total += of_warp[threadIdx.x][warp];
    partials[threadIdx.x] = total;
  }
}

template <class F, int kCapacity>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    accumulate_kernel(const __grid_constant__ TensorList<FoldTensor, kCapacity> list, const Start start, const Scalar scale_argument) {
  const auto block = this_block<F>(list);
  const float scale = value_of(scale_argument);
  const bool reads_sum = start != Start::kFromZero;
  const bool reads_residual = F::kHasResidual && start == Start::kContinue;
  Squares squares;

  if (block.is_whole) {
    Vector<typename F::Sum> grads[kSteps], sums[kSteps];
    Vector<typename F::Residual> residuals[kSteps];
    const int first = threadIdx.x * kVector;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int at = first + step * kThreads * kVector;
      grads[step] = load(block.grad + at);
      if (reads_sum) sums[step] = load(block.sum + at);
      if constexpr (F::kHasResidual) {
        if (reads_residual) residuals[step] = load(block.residual + at);
      }
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        fold_element<F>(start, scale, grads[step].values[i], &sums[step].values[i], &residuals[step].values[i],
                        &squares);
      }
      const int at = first + step * kThreads * kVector;
      store(block.sum + at, sums[step]);
      if constexpr (F::kHasResidual) store(block.residual + at, residuals[step]);
    }
  } else {
    for (int i = threadIdx.x; i < block.count; i += kThreads) {
      typename F::Sum sum = reads_sum ? block.sum[i] : typename F::Sum{};
      typename F::Residual residual{};
      if (reads_residual) residual = block.residual[i];
      fold_element<F>(start, scale, block.grad[i], &sum, &residual, &squares);
      block.sum[i] = sum;
      if constexpr (F::kHasResidual) block.residual[i] = residual;
    }
  }
  if (block.partials != nullptr) write_partials(block.partials, squares.of);
}

// ---- finish and rescale --------------------------------------------------------------------------------------

// sum = round((decode(sum, residual) / divisor) * factor), for one element. To rescale is to encode that instead of
// rounding it.
template <class F, bool kRescales>
__device__ __forceinline__ void finish_element(Start start, float divisor, float factor, typename F::Sum* sum,
                                               typename F::Residual* residual) {
  const float x = value_of<F>(start, *sum, *residual);
  const uint32_t bits = canonical_bits(__fmul_rn(__fdiv_rn(x, divisor), factor));
  if constexpr (kRescales) {
    F::encode(bits, sum, residual);
  } else {
    *sum = F::round(bits);
  }
}

template <class F, bool kRescales, int kCapacity>
__device__ __forceinline__ void finish_block(const TensorList<FoldTensor, kCapacity>& list, Start start, Scalar divisor_argument,
                                             Scalar factor_argument) {
  const auto block = this_block<F>(list);
  const float divisor = value_of(divisor_argument), factor = value_of(factor_argument);
  const bool reads_residual = F::kHasResidual && start == Start::kContinue;

  if (block.is_whole) {
    Vector<typename F::Sum> sums[kSteps];
    Vector<typename F::Residual> residuals[kSteps];
    const int first = threadIdx.x * kVector;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int at = first + step * kThreads * kVector;
      sums[step] = load(block.sum + at);
      if constexpr (F::kHasResidual) {
        if (reads_residual) residuals[step] = load(block.residual + at);
      }
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        finish_element<F, kRescales>(start, divisor, factor, &sums[step].values[i], &residuals[step].values[i]);
      }
      const int at = first + step * kThreads * kVector;
      store(block.sum + at, sums[step]);
      if constexpr (kRescales && F::kHasResidual) store(block.residual + at, residuals[step]);
    }
  } else {
    for (int i = threadIdx.x; i < block.count; i += kThreads) {
      typename F::Residual residual{};
      if (reads_residual) residual = block.residual[i];
      typename F::Sum sum = block.sum[i];
      finish_element<F, kRescales>(start, divisor, factor, &sum, &residual);
      block.sum[i] = sum;
      if constexpr (kRescales && F::kHasResidual) block.residual[i] = residual;
    }
  }
}

template <class F, int kCapacity>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    finish_kernel(const __grid_constant__ TensorList<FoldTensor, kCapacity> list, const Start start, const Scalar divisor,
                  const Scalar factor) {
  finish_block<F, false>(list, start, divisor, factor);
}

template <class F, int kCapacity>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    rescale_kernel(const __grid_constant__ TensorList<FoldTensor, kCapacity> list, const Start start, const Scalar divisor,
                   const Scalar factor) {
  finish_block<F, true>(list, start, divisor, factor);
}

// ---- decode and encode ---------------------------------------------------------------------------------------

// value = decode(sum, residual), where the list holds the sums as grad and the FP32 values as sum.
template <class F, int kCapacity>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    decode_kernel(const __grid_constant__ TensorList<FoldTensor, kCapacity> list) {
  const auto block = this_block<F, typename F::Sum, float>(list);

  if (block.is_whole) {
    Vector<typename F::Sum> sums[kSteps];
    Vector<typename F::Residual> residuals[kSteps];
    const int first = threadIdx.x * kVector;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int at = first + step * kThreads * kVector;
      sums[step] = load(block.grad + at);
      if constexpr (F::kHasResidual) residuals[step] = load(block.residual + at);
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      Vector<float> values;
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        values.values[i] = F::decode(sums[step].values[i], residuals[step].values[i]);
      }
      store(block.sum + first + step * kThreads * kVector, values);
    }
  } else {
    for (int i = threadIdx.x; i < block.count; i += kThreads) {
      typename F::Residual residual{};
      if constexpr (F::kHasResidual) residual = block.residual[i];
      block.sum[i] = F::decode(block.grad[i], residual);
    }
  }
}

// (sum, residual) = encode(value / divisor), where the list holds the FP32 values as grad.
template <class F, int kCapacity>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    encode_kernel(const __grid_constant__ TensorList<FoldTensor, kCapacity> list, const Scalar divisor_argument) {
  const auto block = this_block<F, float>(list);
  const float divisor = value_of(divisor_argument);

  if (block.is_whole) {
    Vector<float> values[kSteps];
    const int first = threadIdx.x * kVector;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) values[step] = load(block.grad + first + step * kThreads * kVector);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      Vector<typename F::Sum> sums;
      Vector<typename F::Residual> residuals;
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const uint32_t bits = canonical_bits(__fdiv_rn(values[step].values[i], divisor));
        F::encode(bits, &sums.values[i], &residuals.values[i]);
      }
      const int at = first + step * kThreads * kVector;
      store(block.sum + at, sums);
      if constexpr (F::kHasResidual) store(block.residual + at, residuals);
    }
  } else {
    for (int i = threadIdx.x; i < block.count; i += kThreads) {
      typename F::Sum sum{};
      typename F::Residual residual{};
      F::encode(canonical_bits(__fdiv_rn(block.grad[i], divisor)), &sum, &residual);
      block.sum[i] = sum;
      if constexpr (F::kHasResidual) block.residual[i] = residual;
    }
  }
}

// ---- squares -------------------------------------------------------------------------------------------------

// total += decode(sum, residual)^2, for one element.
template <class F>
__device__ __forceinline__ void square_element(Start start, typename F::Sum sum, typename F::Residual residual,
                                               float* total) {
  const float x = value_of<F>(start, sum, residual);
  *total = __fmaf_rn(x, x, *total);
}

// The partial sums are those that a fold would leave of the same values.
template <class F, int kCapacity>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    squares_kernel(const __grid_constant__ TensorList<FoldTensor, kCapacity> list, const Start start) {
  const auto block = this_block<F, typename F::Sum, typename F::Sum, 1>(list);
  const bool reads_residual = F::kHasResidual && start == Start::kContinue;
  float total[1] = {};

  if (block.is_whole) {
    Vector<typename F::Sum> sums[kSteps];
    Vector<typename F::Residual> residuals[kSteps];
    const int first = threadIdx.x * kVector;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int at = first + step * kThreads * kVector;
      sums[step] = load(block.sum + at);
      if constexpr (F::kHasResidual) {
        if (reads_residual) residuals[step] = load(block.residual + at);
      }
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        square_element<F>(start, sums[step].values[i], residuals[step].values[i], total);
      }
    }
  } else {
    for (int i = threadIdx.x; i < block.count; i += kThreads) {
      typename F::Residual residual{};
      if (reads_residual) residual = block.residual[i];
      square_element<F>(start, block.sum[i], residual, total);
    }
  }
  write_partials(block.partials, total);
}

// ---- launcher ------------------------------------------------------------------------------------------------

// What is launched: one of the kernels, for a list of either capacity.
struct Fold {
  Start start;
  Scalar scale;

  template <class F, int kCapacity>
  void launch(const TensorList<FoldTensor, kCapacity>& list, uint32_t blocks, cudaStream_t stream) const {
    accumulate_kernel<F><<<blocks, kThreads, 0, stream>>>(list, start, scale);
  }
};

struct Finish {
  Start start;
  Scalar divisor, factor;

  template <class F, int kCapacity>
  void launch(const TensorList<FoldTensor, kCapacity>& list, uint32_t blocks, cudaStream_t stream) const {
    finish_kernel<F><<<blocks, kThreads, 0, stream>>>(list, start, divisor, factor);
  }
};

struct Rescale {
  Start start;
  Scalar divisor, factor;

  template <class F, int kCapacity>
  void launch(const TensorList<FoldTensor, kCapacity>& list, uint32_t blocks, cudaStream_t stream) const {
    rescale_kernel<F><<<blocks, kThreads, 0, stream>>>(list, start, divisor, factor);
  }
};

struct Decode {
  template <class F, int kCapacity>
  void launch(const TensorList<FoldTensor, kCapacity>& list, uint32_t blocks, cudaStream_t stream) const {
    decode_kernel<F><<<blocks, kThreads, 0, stream>>>(list);
  }
};

struct Encode {
  Scalar divisor;

  template <class F, int kCapacity>
  void launch(const TensorList<FoldTensor, kCapacity>& list, uint32_t blocks, cudaStream_t stream) const {
    encode_kernel<F><<<blocks, kThreads, 0, stream>>>(list, divisor);
  }
};

struct Square {
  Start start;

  template <class F, int kCapacity>
  void launch(const TensorList<FoldTensor, kCapacity>& list, uint32_t blocks, cudaStream_t stream) const {
    squares_kernel<F><<<blocks, kThreads, 0, stream>>>(list, start);
  }
};

template <class F, class Launch>
void launch_all(const Launch& kernel, const std::vector<FoldTensor>& tensors, cudaStream_t stream) {
  const auto launch = [&](const auto& list, uint32_t blocks) { kernel.template launch<F>(list, blocks, stream); };
  if (tensors.size() == 1) {
    launch_in_groups<1>(tensors, launch);
  } else {
    launch_in_groups<kMaxTensors>(tensors, launch);
  }
}

template <class Launch>
void launch_format(const Call& call, const Launch& kernel, cudaStream_t stream) {
  switch (call.format) {
    case Format::kSplit24:
      return launch_all<Split24>(kernel, call.tensors, stream);
    case Format::kSplit32:
      return launch_all<Split32>(kernel, call.tensors, stream);
    case Format::kMainGradBFloat16:
      return launch_all<MainGrad<BFloat16>>(kernel, call.tensors, stream);
    case Format::kMainGradFloat16:
      return launch_all<MainGrad<Float16>>(kernel, call.tensors, stream);
    case Format::kPlain32:
      return launch_all<Plain32>(kernel, call.tensors, stream);
  }
  throw std::invalid_argument("accumkern: unknown format");
}

}  // namespace

void run_cuda(const Call& call, int device, uintptr_t stream_address) {
  const DeviceGuard guard(device);
  const auto stream = reinterpret_cast<cudaStream_t>(stream_address);
  switch (call.kernel) {
    case Kernel::kFold:
      return launch_format(call, Fold{call.start, call.scalar}, stream);
    case Kernel::kFinish:
      return launch_format(call, Finish{call.start, call.scalar, call.factor}, stream);
    case Kernel::kRescale:
      return launch_format(call, Rescale{call.start, call.scalar, call.factor}, stream);
    case Kernel::kDecode:
      return launch_format(call, Decode{}, stream);
    case Kernel::kEncode:
      return launch_format(call, Encode{call.scalar}, stream);
    case Kernel::kSquares:
      return launch_format(call, Square{call.start}, stream);
  }
  throw std::invalid_argument("accumkern: unknown kernel");
}

std::string cuda_problem() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, accumulate_kernel<Split24, 1>);
  cudaGetLastError();
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

}  // namespace accumkern
