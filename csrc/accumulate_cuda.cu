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

// What a thread has of gradients, sums and residuals at once.
template <class F, class Grad, class Sum, int kWidth>
struct Part {
  Vector<Grad, kWidth> grad;
  Vector<Sum, kWidth> sum;
  Vector<typename F::Residual, kWidth> residual;
};

// What one thread block works on: up to kBlockNumel elements of one tensor.
template <class F, class Grad, class Sum>
struct Block {
  const Grad* grad;
  Sum* sum;
  typename F::Residual* residual;
  float* partials;
  Extent extent;

  template <int kWidth>
  __device__ __forceinline__ Part<F, Grad, Sum, kWidth> load_part(int at, bool reads_grad, bool reads_sum,
                                                                  bool reads_residual) const {
    Part<F, Grad, Sum, kWidth> part;
    if (reads_grad) part.grad = load<kWidth>(grad + at);
    if (reads_sum) part.sum = load<kWidth>(sum + at);
    if constexpr (F::kHasResidual) {
      if (reads_residual) part.residual = load<kWidth>(residual + at);
    }
    return part;
  }

  template <int kWidth>
  __device__ __forceinline__ void store_part(int at, const Part<F, Grad, Sum, kWidth>& part, bool writes_residual) const {
    store(sum + at, part.sum);
    if constexpr (F::kHasResidual) {
      if (writes_residual) store(residual + at, part.residual);
    }
  }
};

template <class F, class Grad = typename F::Sum, class Sum = typename F::Sum, int kColumns = kPartials, int kCapacity>
__device__ __forceinline__ Block<F, Grad, Sum> this_block(const TensorList<FoldTensor, kCapacity>& list) {
  const int index = tensor_of_this_block(list);
  const FoldTensor& tensor = list.tensors[index];
  const int64_t block = blockIdx.x - list.first_block[index];
  const int64_t begin = block * kBlockNumel;
  const bool all_aligned = is_aligned(tensor.grad) && is_aligned(tensor.sum) && is_aligned(tensor.residual);
  return {static_cast<const Grad*>(tensor.grad) + begin,
          static_cast<Sum*>(tensor.sum) + begin,
          F::kHasResidual ? static_cast<typename F::Residual*>(tensor.residual) + begin : nullptr,
          tensor.partials == nullptr ? nullptr : tensor.partials + kColumns * block,
          extent_of(tensor.numel - begin, all_aligned)};
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
  const bool reads_sum = start != Start::kFromZero, reads_residual = start == Start::kContinue;
  Squares squares;
  const auto load_at = [&](auto width, int at) {
    return block.template load_part<width.value>(at, true, reads_sum, reads_residual);
  };
  walk<kSteps, kElements>(block.extent, load_at, [&](auto width, int at, auto& part) {
#pragma unroll
    for (int i = 0; i < width.value; ++i) {
      fold_element<F>(start, scale, part.grad.values[i], &part.sum.values[i], &part.residual.values[i], &squares);
    }
    block.store_part(at, part, true);
  });
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
  const auto load_at = [&](auto width, int at) {
    return block.template load_part<width.value>(at, false, true, start == Start::kContinue);
  };
  walk<kSteps, kElements>(block.extent, load_at, [&](auto width, int at, auto& part) {
#pragma unroll
    for (int i = 0; i < width.value; ++i) {
      finish_element<F, kRescales>(start, divisor, factor, &part.sum.values[i], &part.residual.values[i]);
    }
    block.store_part(at, part, kRescales);
  });
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
  const auto load_at = [&](auto width, int at) { return block.template load_part<width.value>(at, true, false, true); };
  walk<kSteps, kElements>(block.extent, load_at, [&](auto width, int at, auto& part) {
#pragma unroll
    for (int i = 0; i < width.value; ++i) part.sum.values[i] = F::decode(part.grad.values[i], part.residual.values[i]);
    block.store_part(at, part, false);
  });
}

// (sum, residual) = encode(value / divisor), where the list holds the FP32 values as grad.
template <class F, int kCapacity>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    encode_kernel(const __grid_constant__ TensorList<FoldTensor, kCapacity> list, const Scalar divisor_argument) {
  const auto block = this_block<F, float>(list);
  const float divisor = value_of(divisor_argument);
  const auto load_at = [&](auto width, int at) { return block.template load_part<width.value>(at, true, false, false); };
  walk<kSteps, kElements>(block.extent, load_at, [&](auto width, int at, auto& part) {
#pragma unroll
    for (int i = 0; i < width.value; ++i) {
      const uint32_t bits = canonical_bits(__fdiv_rn(part.grad.values[i], divisor));
      F::encode(bits, &part.sum.values[i], &part.residual.values[i]);
    }
    block.store_part(at, part, true);
  });
}

// ---- squares -------------------------------------------------------------------------------------------------

// The partial sums are those that a fold would leave of the same values, where memory is aligned alike.
template <class F, int kCapacity>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    squares_kernel(const __grid_constant__ TensorList<FoldTensor, kCapacity> list, const Start start) {
  const auto block = this_block<F, typename F::Sum, typename F::Sum, 1>(list);
  float total[1] = {};
  const auto load_at = [&](auto width, int at) {
    return block.template load_part<width.value>(at, false, true, start == Start::kContinue);
  };
  walk<kSteps, kElements>(block.extent, load_at, [&](auto width, int, auto& part) {
#pragma unroll
    for (int i = 0; i < width.value; ++i) {
      const float x = value_of<F>(start, part.sum.values[i], part.residual.values[i]);
      total[0] = __fmaf_rn(x, x, total[0]);
    }
  });
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

std::string cuda_problem(int device) {
  const DeviceGuard guard(device);
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, accumulate_kernel<Split24, 1>);
  cudaGetLastError();
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

}  // namespace accumkern
