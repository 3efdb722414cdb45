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
  float* partials;   // of a fold (blocks, kPartials), nullptr to leave them out; of squares (blocks,)
  int64_t numel;
};

// A factor: a value, or an address on the device of the tensors.
struct Scalar {
  float value;
  const float* address;
};

// What is computed for every element of every tensor.
enum class Kernel {
  kFold,     // x = fma(scale, grad, decode(sum, residual)); (sum, residual) = encode(x)
  kFinish,   // sum = round((decode(sum, residual) / divisor) * factor), not from zero; residuals are left alone
  kRescale,  // (sum, residual) = encode((decode(sum, residual) / divisor) * factor), not from zero
  kDecode,   // value = decode(sum, residual)
  kEncode,   // (sum, residual) = encode(value / divisor)
  kSquares,  // partial = the sum of decode(sum, residual)^2 over a block, not from zero; nothing else is written
};

struct Call {
  Kernel kernel;
  Format format;
  Start start;  // of a fold, finish, rescale or squares
  std::vector<FoldTensor> tensors;
  Scalar scalar;  // a fold's scale, the others' divisor
  Scalar factor;  // finish's and rescale's
};

// Which optimizer's update a step computes (step_math.h). The numbers are shared with accumkern/updates.py.
enum class Update : int { kAdam = 0, kAmsgrad = 1, kSgd = 2, kMomentum = 3 };

constexpr int kMaxStates = 3;
constexpr int kCoefficients = 9;  // FP32 numbers that a tensor's update is made with

// A bfloat16 weight with its residual, and what its step reads and writes.
struct StepTensor {
  void* weight;
  void* weight_residual;
  const void* grad;
  const void* grad_residual;  // nullptr where the gradient is complete in itself
  float* states[kMaxStates];
  int64_t numel;
  const float* coefficients;  // of the update
};

// weight, states = update((gradient / divisor) * factor, weight, states), for every element of every tensor.
struct StepCall {
  Update update;
  Format weight_format;
  Format grad_format;
  Start start;  // of the gradients: kContinue, or kFromSum for those without residuals
  std::vector<StepTensor> tensors;
  Scalar divisor, factor;
  const float* skip;  // where this is not zero, nothing is written; nullptr for none
};

// The end of a norm, of which `partials` are sums of squares (norm_math.h).
struct NormCall {
  const float* partials;
  int64_t count;
  Scalar divisor;
  bool clips;
  float max_norm;  // where it clips
  float* results;  // the norm, and what gradients are to be multiplied by
  bool* nonfinite;
};

// The mean of what ranks have, each a row: x = decode(sum, residual) of the first, and of the others added in their
// order; (out_sum, out_residual) = encode(x / divisor). Of a split format.
struct MeanCall {
  Format format;
  const void* sums;       // (ranks, numel), at least one rank
  int64_t sum_stride;     // elements from a row to the next
  const void* residuals;  // (ranks, numel)
  int64_t residual_stride;
  int64_t ranks, numel;
  Scalar divisor;
  void* out_sum;       // (numel,); may be a row of the sums
  void* out_residual;  // (numel,); may be a row of the residuals
};

void run_cpu(const Call& call, int threads);
void step_cpu(const StepCall& call, int threads);
void norm_cpu(const NormCall& call);
void mean_cpu(const MeanCall& call, int threads);
const char* cpu_instruction_set();

// Launched on `stream` of `device` without waiting; throws std::runtime_error with CUDA's message.
void run_cuda(const Call& call, int device, uintptr_t stream);
void step_cuda(const StepCall& call, int device, uintptr_t stream);
void norm_cuda(const NormCall& call, int device, uintptr_t stream);
void mean_cuda(const MeanCall& call, int device, uintptr_t stream);

// Why the kernels cannot run on a device (another architecture, an old driver), or an empty string.
std::string cuda_problem(int device);

}  // namespace accumkern
