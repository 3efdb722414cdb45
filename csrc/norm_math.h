// The end of a norm: its root, the mean, and what gradients are clipped by.
//
// This header is the only C++ statement of it, for the CPU and for CUDA; accumkern/clipping.py says the same in torch.
#pragma once

#include <cmath>

#include "accumulate.h"
#include "accumulate_math.h"

namespace accumkern {

// norm = sqrt(total) / divisor; coefficient = min(1, max_norm * (1 / (norm + 1e-6))), or 1 where nothing is clipped.
// The root is taken in FP64 and rounded to FP32, as everything after it is, one by one. A NaN stays one.
ACCUMKERN_INLINE void end_norm(const NormCall& call, double total, float divisor) {
  const float norm = quotient_of(static_cast<float>(sqrt(total)), divisor);
  const float coefficient = call.max_norm * quotient_of(1.0f, norm + 1e-6f);
  call.results[0] = norm;
  call.results[1] = !call.clips || coefficient > 1.0f ? 1.0f : coefficient;
  *call.nonfinite = (bits_of(norm) & 0x7F800000u) == 0x7F800000u;
}

}  // namespace accumkern
