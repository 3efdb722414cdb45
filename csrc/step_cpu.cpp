// A whole optimizer step on the CPU, in one pass over weights, gradients and states.
#include <algorithm>
#include <cstdint>
#include <stdexcept>

#include "accumulate.h"
#include "accumulate_math.h"
#include "cpu.h"
#include "step_math.h"

namespace accumkern {
namespace {

struct StepRange {
  const StepTensor& tensor;
  int64_t begin, end;  // elements; begin is a multiple of kBlockNumel
  float divisor, factor;
};

// gradient = (gradient / divisor) * factor, for `numel` elements of a chunk.
ACCUMKERN_INLINE void scale_elements(float* grad, float divisor, float factor, int64_t numel) {
  for (int64_t i = 0; i < numel; ++i) grad[i] = scaled(grad[i], divisor, factor);
}

// weight, states = update(gradient, weight, states), for `numel` elements of a chunk.
template <class U>
ACCUMKERN_INLINE void update_elements(const typename U::Coefficients& by, const float* grad, float* weight,
                                      float* const* states, int64_t offset, int64_t numel) {
  float* first = U::kStates > 0 ? states[0] + offset : nullptr;
  float* second = U::kStates > 1 ? states[1] + offset : nullptr;
  float* third = U::kStates > 2 ? states[2] + offset : nullptr;
#pragma GCC ivdep
  for (int64_t i = 0; i < numel; ++i) {
    float of_element[3];
    if constexpr (U::kStates > 0) of_element[0] = first[i];
    if constexpr (U::kStates > 1) of_element[1] = second[i];
    if constexpr (U::kStates > 2) of_element[2] = third[i];
    weight[i] = U::update(by, grad[i], weight[i], of_element);
    if constexpr (U::kStates > 0) first[i] = of_element[0];
    if constexpr (U::kStates > 1) second[i] = of_element[1];
    if constexpr (U::kStates > 2) third[i] = of_element[2];
  }
}

// (weight, residual) = encode(value), for `numel` elements of a chunk.
template <class W>
ACCUMKERN_INLINE void encode_weights(const float* value, typename W::Sum* weight, typename W::Residual* residual,
                                     int64_t numel) {
#pragma GCC ivdep
  for (int64_t i = 0; i < numel; ++i) W::encode(canonical_bits(value[i]), weight + i, residual + i);
}

// A chunk is decoded to FP32, updated and encoded in the first-level cache.
template <class U, class W, class G, Start kStart>
ACCUMKERN_INLINE void step_elements(const StepRange& range, const typename U::Coefficients& by, int64_t begin,
                                    int64_t numel) {
  const StepTensor& tensor = range.tensor;
  const auto* grad = static_cast<const typename G::Sum*>(tensor.grad) + begin;
  const auto* grad_residual = static_cast<const typename G::Residual*>(tensor.grad_residual);
  auto* weight = static_cast<typename W::Sum*>(tensor.weight) + begin;
  auto* weight_residual = static_cast<typename W::Residual*>(tensor.weight_residual) + begin;
  if constexpr (kStart == Start::kContinue) grad_residual += begin;
  alignas(64) float grads[kChunk], weights[kChunk];
  decode_elements<G, kStart>(grad, grad_residual, grads, numel);
  decode_elements<W>(weight, weight_residual, weights, numel);
  if (range.divisor != 1.0f || range.factor != 1.0f) scale_elements(grads, range.divisor, range.factor, numel);
  update_elements<U>(by, grads, weights, tensor.states, begin, numel);
  encode_weights<W>(weights, weight, weight_residual, numel);
}

template <class U, class W, class G, Start kStart>
struct Step {
  static ACCUMKERN_INLINE void run(const StepRange& range) {
    const StepTensor& tensor = range.tensor;
    const auto by = *reinterpret_cast<const typename U::Coefficients*>(tensor.coefficients);
    for (int64_t i = range.begin; i < range.end; i += kChunk) {
      prefetch<true>(static_cast<const typename W::Sum*>(tensor.weight) + i);
      prefetch<true>(static_cast<const typename W::Residual*>(tensor.weight_residual) + i);
      prefetch<false>(static_cast<const typename G::Sum*>(tensor.grad) + i);
      if constexpr (kStart == Start::kContinue) {
        prefetch<false>(static_cast<const typename G::Residual*>(tensor.grad_residual) + i);
      }
      for (int state = 0; state < U::kStates; ++state) prefetch<true>(tensor.states[state] + i);
      const int64_t numel = std::min(kChunk, range.end - i);
      if (numel < kChunk) {
        step_elements<U, W, G, kStart>(range, by, i, numel);
      } else {  // the compiler sees how many, and leaves out what other numbers need
        step_elements<U, W, G, kStart>(range, by, i, kChunk);
      }
    }
  }
};

// ---- choice --------------------------------------------------------------------------------------------------

using StepFunction = void (*)(const StepRange&);

template <class U, class W>
StepFunction choose_gradient(const StepCall& call) {
  if (call.start == Start::kFromSum) return for_this_cpu<Step<U, W, Split24, Start::kFromSum>, const StepRange&>();
  switch (call.grad_format) {
    case Format::kSplit24:
      return for_this_cpu<Step<U, W, Split24, Start::kContinue>, const StepRange&>();
    case Format::kSplit32:
      return for_this_cpu<Step<U, W, Split32, Start::kContinue>, const StepRange&>();
    case Format::kMainGradBFloat16:
      return for_this_cpu<Step<U, W, MainGrad<BFloat16>, Start::kContinue>, const StepRange&>();
    default:
      throw std::invalid_argument("accumkern: a step takes bfloat16 gradients");
  }
}

template <class U>
StepFunction choose_weight(const StepCall& call) {
  switch (call.weight_format) {
    case Format::kSplit24:
      return choose_gradient<U, Split24>(call);
    case Format::kSplit32:
      return choose_gradient<U, Split32>(call);
    default:
      throw std::invalid_argument("accumkern: a step takes split weights");
  }
}

StepFunction choose_update(const StepCall& call) {
  switch (call.update) {
    case Update::kAdam:
      return choose_weight<Adam<false>>(call);
    case Update::kAmsgrad:
      return choose_weight<Adam<true>>(call);
    case Update::kSgd:
      return choose_weight<Sgd<false>>(call);
    case Update::kMomentum:
      return choose_weight<Sgd<true>>(call);
  }
  throw std::invalid_argument("accumkern: unknown update");
}

}  // namespace

void step_cpu(const StepCall& call, int threads) {
  const StepFunction kernel = choose_update(call);
  if (call.skip != nullptr && *call.skip != 0.0f) return;
  const float divisor = value_of(call.divisor), factor = value_of(call.factor);
  run_in_shares(call.tensors, threads, [&](const StepTensor& tensor, int64_t begin, int64_t end) {
    kernel({tensor, begin, end, divisor, factor});
  });
}

}  // namespace accumkern
