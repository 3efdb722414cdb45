// What the launchers take. Plain C++: no torch, no pybind11, no CUDA header.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace accumkern {

// The numbers are shared with accumkern/formats.py.
enum class Format : int { kSplit24 = 0, kSplit32 = 1, kMainGradBFloat16 = 2, kMainGradFloat16 = 3, kPlain32 = 4 };

// What a fold starts from.
enum class Start : int {
  kContinue = 0,  // sum and residual
  kFromSum = 1,   // the sum alone: the residual counts as zero and is only written
  kFromZero = 2,  // nothing: sum and residual are only written, and the sum may be the gradient itself
};

// Elements per block: a block leaves one pair of partial sums, so the pairs do not depend on threads or backend.
constexpr int64_t kBlockNumel = 4096;

struct FoldTensor {
  const void* grad;
  void* sum;
  void* residual;   // nullptr when the format has none
  float* partials;  // (blocks, 2): sum of grad^2, sum of new sum^2 per block; nullptr to leave them out
  int64_t numel;
};

// The scale of a fold: a value, or an address on the device of the tensors.
struct Scale {
  float value;
  const float* address;
};

void accumulate_cpu(Format format, Start start, const std::vector<FoldTensor>& tensors, Scale scale, int threads);
const char* cpu_instruction_set();

// Launches on `stream` of `device` without waiting; throws std::runtime_error with CUDA's message.
void accumulate_cuda(Format format, Start start, const std::vector<FoldTensor>& tensors, Scale scale, int device,
                     uintptr_t stream);

// Number of bit patterns in [first, last) that break a format's law when they are encoded and decoded again; `law` is
// described where it is checked, in accumulate_cpu.cpp.
uint64_t count_roundtrip_failures(Format format, uint64_t first, uint64_t last, int threads);

}  // namespace accumkern
