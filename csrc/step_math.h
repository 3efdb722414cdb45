// The optimizers' updates of one element, in FP32: the formulas of torch.optim with their roundings pinned.
//
// This header is the only C++ statement of them, for the CPU and for CUDA; accumkern/updates.py says the same in torch.
// Products and sums round one by one, but for those written as a fused multiply-add; square roots and quotients are
// rounded correctly.
#pragma once

#include "accumulate.h"
#include "accumulate_math.h"

namespace accumkern {

ACCUMKERN_INLINE float fma_of(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

ACCUMKERN_INLINE float square_root_of(float x) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(x);
#else
  return __builtin_sqrtf(x);
#endif
}

// What a step reads of a gradient: (value / divisor) * factor.
ACCUMKERN_INLINE float scaled(float value, float divisor, float factor) { return quotient_of(value, divisor) * factor; }

// Adam and AdamW, with the maximum of exp_avg_sq or without.
template <bool kIsAmsgrad>
struct Adam {
  static constexpr int kStates = kIsAmsgrad ? 3 : 2;  // exp_avg, exp_avg_sq, max_exp_avg_sq

  struct Coefficients {         // of one tensor
    float sign;                 // -1 to maximize
    float coupled_decay;        // weight_decay where it is a part of the gradient, or zero
    float decay;                // the learning rate times weight_decay where it is not, or zero
    float one_minus_beta1;
    float beta2;
    float one_minus_beta2;
    float root_of_correction2;  // sqrt(1 - beta2^step)
    float eps;
    float step_size;            // the learning rate / (1 - beta1^step)
  };
  static_assert(sizeof(Coefficients) == kCoefficients * sizeof(float), "a row of coefficients");

  // Returns the new weight, and changes the states.
  static ACCUMKERN_INLINE float update(const Coefficients& by, float grad, float weight, float* states) {
    float g = by.sign * grad;
    g = by.coupled_decay == 0.0f ? g : fma_of(by.coupled_decay, weight, g);
    const float difference = g - states[0];
    const bool is_small = by.one_minus_beta1 < 0.5f;
    states[0] = fma_of(is_small ? by.one_minus_beta1 : by.one_minus_beta1 - 1.0f, difference, is_small ? states[0] : g);
    states[1] = fma_of(by.one_minus_beta2 * g, g, by.beta2 * states[1]);
    float square = states[1];
    if constexpr (kIsAmsgrad) {  // a NaN of either stays
      square = states[2] = states[2] >= square || states[2] != states[2] ? states[2] : square;
    }
    const float denominator = quotient_of(square_root_of(square), by.root_of_correction2) + by.eps;
    const float change = quotient_of(by.step_size * states[0], denominator);
    return weight - (by.decay == 0.0f ? change : fma_of(by.decay, weight, change));
  }
};

// SGD, with momentum or without.
template <bool kHasMomentum>
struct Sgd {
  static constexpr int kStates = kHasMomentum ? 1 : 0;  // momentum_buffer

  struct Coefficients {         // of one tensor
    float sign;                 // -1 to maximize
    float decay;                // weight_decay
    float momentum;             // of the buffer; zero in the first step
    float one_minus_dampening;  // one in the first step
    float nesterov_momentum;    // zero where it is not Nesterov's
    float learning_rate;
    float unused[3];
  };
  static_assert(sizeof(Coefficients) == kCoefficients * sizeof(float), "a row of coefficients");

  static ACCUMKERN_INLINE float update(const Coefficients& by, float grad, float weight, float* states) {
    float g = by.sign * grad;
    g = by.decay == 0.0f ? g : fma_of(by.decay, weight, g);
    if constexpr (kHasMomentum) {
      states[0] = fma_of(by.one_minus_dampening, g, by.momentum * states[0]);
      g = by.nesterov_momentum == 0.0f ? states[0] : fma_of(by.nesterov_momentum, states[0], g);
    }
    return fma_of(-by.learning_rate, g, weight);
  }
};

}  // namespace accumkern
