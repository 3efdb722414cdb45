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

// What a thread has of a tensor at once.
template <class U, class W, class G, int kWidth>
struct StepPart {
  Vector<typename W::Sum, kWidth> weight;
  Vector<typename W::Residual, kWidth> weight_residual;
  Vector<typename G::Sum, kWidth> grad;
  Vector<typename G::Residual, kWidth> grad_residual;
  Vector<float, kWidth> states[U::kStates + 1];
};

// weight, states = update((gradient / divisor) * factor, weight, states), for the i-th element of a part.
template <class U, class W, class G, int kWidth>
__device__ __forceinline__ void step_element(const typename U::Coefficients& by, Start start, float divisor, float factor,
                                             StepPart<U, W, G, kWidth>& part, int i) {
  float g = value_of<G>(start, part.grad.values[i], part.grad_residual.values[i]);
  if (divisor != 1.0f || factor != 1.0f) g = scaled(g, divisor, factor);
  typename W::Sum& weight = part.weight.values[i];
  typename W::Residual& weight_residual = part.weight_residual.values[i];
  float states[U::kStates + 1];
#pragma unroll
  for (int k = 0; k < U::kStates; ++k) states[k] = part.states[k].values[i];
  const float value = U::update(by, g, W::decode(weight, weight_residual), states);
  W::encode(canonical_bits(value), &weight, &weight_residual);
#pragma unroll
  for (int k = 0; k < U::kStates; ++k) part.states[k].values[i] = states[k];
}

template <class U, class W, class G>
__global__ void __launch_bounds__(kThreads, kMinBlocksOfStep)
    step_kernel(const __grid_constant__ TensorList<StepTensor, kMaxTensors> list, const StepScalars scalars) {
  if (scalars.skip != nullptr && *scalars.skip != 0.0f) return;
  const int index = tensor_of_this_block(list);
  const StepTensor& tensor = list.tensors[index];
  const int64_t begin = static_cast<int64_t>(blockIdx.x - list.first_block[index]) * kBlockNumel;
  auto* weights = static_cast<typename W::Sum*>(tensor.weight) + begin;
  auto* weight_residuals = static_cast<typename W::Residual*>(tensor.weight_residual) + begin;
  const auto* grads = static_cast<const typename G::Sum*>(tensor.grad) + begin;
  const bool reads_residual = scalars.start == Start::kContinue;
  const auto* grad_residuals = static_cast<const typename G::Residual*>(tensor.grad_residual);
  if (reads_residual) grad_residuals += begin;
  float* states[U::kStates + 1];
  bool all_aligned = is_aligned(weights) && is_aligned(weight_residuals) && is_aligned(grads);
  all_aligned = all_aligned && (!reads_residual || is_aligned(grad_residuals));
#pragma unroll
  for (int k = 0; k < U::kStates; ++k) {
    states[k] = tensor.states[k] + begin;
    all_aligned &= is_aligned(states[k]);
  }
  const auto by = *reinterpret_cast<const typename U::Coefficients*>(tensor.coefficients);
  const float divisor = value_of(scalars.divisor), factor = value_of(scalars.factor);

  const auto load_at = [&](auto width, int at) {
    StepPart<U, W, G, width.value> part;
    part.weight = load<width.value>(weights + at);
    part.weight_residual = load<width.value>(weight_residuals + at);
    part.grad = load<width.value>(grads + at);
    if (reads_residual) part.grad_residual = load<width.value>(grad_residuals + at);
#pragma unroll
    for (int k = 0; k < U::kStates; ++k) part.states[k] = load<width.value>(states[k] + at);
    return part;
  };
  // The states of one vector fill enough registers.
  walk<1, kElements / 2>(extent_of(tensor.numel - begin, all_aligned), load_at, [&](auto width, int at, auto& part) {
#pragma unroll
    for (int i = 0; i < width.value; ++i) step_element(by, scalars.start, divisor, factor, part, i);
    store(weights + at, part.weight);
    store(weight_residuals + at, part.weight_residual);
#pragma unroll
    for (int k = 0; k < U::kStates; ++k) store(states[k] + at, part.states[k]);
  });
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
