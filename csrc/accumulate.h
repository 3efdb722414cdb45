// What the launchers take. Plain C++: no torch, no pybind11, no CUDA header.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
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

// Sums per block that a fold can leave behind: grad^2, the new value^2, and the old value^2 where it starts from the
// sum (zero otherwise), which is the first micro-gradient when the second is folded.
constexpr int kPartials = 3;

// A tensor as a kernel takes it. What a kernel does not use is nullptr.
struct FoldTensor {
  const void* grad;  // to decode: the sum; to encode: the FP32 values
  void* sum;         // to decode: the FP32 values
  void* residual;    // nullptr when the format has none
  float* partials;   // (blocks, kPartials); nullptr to leave them out
  int64_t numel;
};

// A factor: a value, or an address on the device of the tensors.
struct Scalar {
  float value;
  const float* address;
};

// x = fma(scale, grad, decode(sum, residual)); (sum, residual) = encode(x)
void accumulate_cpu(Format format, Start start, const std::vector<FoldTensor>& tensors, Scalar scale, int threads);
// sum = round((decode(sum, residual) / divisor) * factor), from kContinue or kFromSum; residuals are left alone
void finish_cpu(Format format, Start start, const std::vector<FoldTensor>& tensors, Scalar divisor, Scalar factor,
                int threads);
// value = decode(sum, residual)
void decode_cpu(Format format, const std::vector<FoldTensor>& tensors, int threads);
// (sum, residual) = encode(value / divisor)
void encode_cpu(Format format, const std::vector<FoldTensor>& tensors, Scalar divisor, int threads);
const char* cpu_instruction_set();

// The same, launched on `stream` of `device` without waiting; they throw std::runtime_error with CUDA's message.
void accumulate_cuda(Format format, Start start, const std::vector<FoldTensor>& tensors, Scalar scale, int device,
                     uintptr_t stream);
void finish_cuda(Format format, Start start, const std::vector<FoldTensor>& tensors, Scalar divisor, Scalar factor,
                 int device, uintptr_t stream);
void decode_cuda(Format format, const std::vector<FoldTensor>& tensors, int device, uintptr_t stream);
void encode_cuda(Format format, const std::vector<FoldTensor>& tensors, Scalar divisor, int device, uintptr_t stream);

// Why the kernels cannot run on the current device (another architecture, an old driver), or an empty string.
std::string cuda_problem();

// Number of bit patterns in [first, last) that break a format's law when they are encoded and decoded again; `law` is
// described where it is checked, in accumulate_cpu.cpp.
uint64_t count_roundtrip_failures(Format format, uint64_t first, uint64_t last, int threads);

}  // namespace accumkern
