// The end of a norm on the CPU.
#include <cstdint>

#include "accumulate.h"
#include "cpu.h"
#include "norm_math.h"

namespace accumkern {

// Every kLanes-th number goes into one sum, so that additions need not wait for one another. The order is fixed.
void norm_cpu(const NormCall& call) {
  constexpr int64_t kLanes = 8;
  double lanes[kLanes] = {};
  for (int64_t i = 0; i < call.count; ++i) lanes[i % kLanes] += call.partials[i];
  double total = 0.0;
  for (const double lane : lanes) total += lane;
  end_norm(call, total, value_of(call.divisor));
}

}  // namespace accumkern
