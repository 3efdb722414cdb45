// A whole optimizer step on NVIDIA GPUs, in one pass over weights, gradients and states.
#include <cuda_runtime.h>

#include <stdexcept>

#include "accumulate.h"
#include "accumulate_math.h"
#include "cuda.h"
#include "step_math.h"

namespace accumkern {
namespace {

constexpr int kMaxTensors = 49;      // of one launch
constexpr int kMinBlocksOfStep = 2;  // per multiprocessor: 128 registers a thread, no spills
static_assert(sizeof(TensorList<StepTensor, kMaxTensors>) <= kArgumentBytes, "kernel arguments are limited");

// What all elements of a launch have in common.
struct StepScalars {
  Start start;
  Scalar divisor, factor;
  const float* skip;
};

// weight, states = update((gradient / divisor) * factor, weight, states), for one element.
template <class U, class W, class G>
__device__ __forceinline__ void step_element(const typename U::Coefficients& by, Start start, float divisor, float factor,
                                             typename G::Sum grad, typename G::Residual grad_residual,
                                             typename W::Sum* weight, typename W::Residual* weight_residual,
                                             float* states) {
  float g = value_of<G>(start, grad, grad_residual);
  if (divisor != 1.0f || factor != 1.0f) g = scaled(g, divisor, factor);
  const float value = U::update(by, g, W::decode(*weight, *weight_residual), states);
  W::encode(canonical_bits(value), weight, weight_residual);
}

template <class U, class W, class G>
__global__ void __launch_bounds__(kThreads, kMinBlocksOfStep)
    step_kernel(const __grid_constant__ TensorList<StepTensor, kMaxTensors> list, const StepScalars scalars) {
  if (scalars.skip != nullptr && *scalars.skip != 0.0f) return;
  const int index = tensor_of_this_block(list);
  const StepTensor& tensor = list.tensors[index];
  const int64_t begin = static_cast<int64_t>(blockIdx.x - list.first_block[index]) * kBlockNumel;
  const int64_t left = tensor.numel - begin;
  auto* weights = static_cast<typename W::Sum*>(tensor.weight) + begin;
  auto* weight_residuals = static_cast<typename W::Residual*>(tensor.weight_residual) + begin;
  const auto* grads = static_cast<const typename G::Sum*>(tensor.grad) + begin;
  const bool reads_residual = scalars.start == Start::kContinue;
  const auto* grad_residuals = static_cast<const typename G::Residual*>(tensor.grad_residual);
  if (reads_residual) grad_residuals += begin;
  float* states[U::kStates + 1];
  bool is_whole = left >= kBlockNumel && is_aligned(weights) && is_aligned(weight_residuals) && is_aligned(grads);
  is_whole = is_whole && (!reads_residual || is_aligned(grad_residuals));
#pragma unroll
  for (int state = 0; state < U::kStates; ++state) {
    states[state] = tensor.states[state] + begin;
    is_whole &= is_aligned(states[state]);
  }
  const auto by = *reinterpret_cast<const typename U::Coefficients*>(tensor.coefficients);
  const float divisor = value_of(scalars.divisor), factor = value_of(scalars.factor);

  if (is_whole) {
#pragma unroll 1  // the states of one vector fill enough registers
    for (int step = 0; step < kSteps; ++step) {
      const int at = (step * kThreads + threadIdx.x) * kVector;
      auto weight = load(weights + at);
      auto weight_residual = load(weight_residuals + at);
      const auto grad = load(grads + at);
      Vector<typename G::Residual> grad_residual{};
      if (reads_residual) grad_residual = load(grad_residuals + at);
      Vector<float> state[U::kStates + 1];
#pragma unroll
      for (int i = 0; i < U::kStates; ++i) state[i] = load(states[i] + at);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        float of_element[U::kStates + 1];
#pragma unroll
        for (int k = 0; k < U::kStates; ++k) of_element[k] = state[k].values[i];
        step_element<U, W, G>(by, scalars.start, divisor, factor, grad.values[i], grad_residual.values[i],
                              &weight.values[i], &weight_residual.values[i], of_element);
#pragma unroll
        for (int k = 0; k < U::kStates; ++k) state[k].values[i] = of_element[k];
      }
      store(weights + at, weight);
      store(weight_residuals + at, weight_residual);
#pragma unroll
      for (int i = 0; i < U::kStates; ++i) store(states[i] + at, state[i]);
    }
  } else {
    const int count = static_cast<int>(left < kBlockNumel ? left : kBlockNumel);
    for (int i = threadIdx.x; i < count; i += kThreads) {
      typename G::Residual grad_residual{};
      if (reads_residual) grad_residual = grad_residuals[i];
      float of_element[U::kStates + 1];
#pragma unroll
      for (int k = 0; k < U::kStates; ++k) of_element[k] = states[k][i];
      step_element<U, W, G>(by, scalars.start, divisor, factor, grads[i], grad_residual, weights + i,
                            weight_residuals + i, of_element);
#pragma unroll
      for (int k = 0; k < U::kStates; ++k) states[k][i] = of_element[k];
    }
  }
}

// ---- launcher ------------------------------------------------------------------------------------------------

template <class U, class W, class G>
void launch_step(const StepCall& call, cudaStream_t stream) {
  const StepScalars scalars = {call.start, call.divisor, call.factor, call.skip};
  launch_in_groups<kMaxTensors>(call.tensors, [&](const auto& list, uint32_t blocks) {
    step_kernel<U, W, G><<<blocks, kThreads, 0, stream>>>(list, scalars);
  });
}

template <class U, class W>
void launch_gradient(const StepCall& call, cudaStream_t stream) {
  switch (call.grad_format) {
    case Format::kSplit24:
      return launch_step<U, W, Split24>(call, stream);
    case Format::kSplit32:
      return launch_step<U, W, Split32>(call, stream);
    case Format::kMainGradBFloat16:
      return launch_step<U, W, MainGrad<BFloat16>>(call, stream);
    default:
      throw std::invalid_argument("accumkern: a step takes bfloat16 gradients");
  }
}

template <class U>
void launch_weight(const StepCall& call, cudaStream_t stream) {
  switch (call.weight_format) {
    case Format::kSplit24:
      return launch_gradient<U, Split24>(call, stream);
    case Format::kSplit32:
      return launch_gradient<U, Split32>(call, stream);
    default:
      throw std::invalid_argument("accumkern: a step takes split weights");
  }
}

}  // namespace

void step_cuda(const StepCall& call, int device, uintptr_t stream_address) {
  const DeviceGuard guard(device);
  const auto stream = reinterpret_cast<cudaStream_t>(stream_address);
  switch (call.update) {
    case Update::kAdam:
      return launch_weight<Adam<false>>(call, stream);
    case Update::kAmsgrad:
      return launch_weight<Adam<true>>(call, stream);
    case Update::kSgd:
      return launch_weight<Sgd<false>>(call, stream);
    case Update::kMomentum:
      return launch_weight<Sgd<true>>(call, stream);
  }
  throw std::invalid_argument("accumkern: unknown update");
}

}  // namespace accumkern
