// The accumulate kernel on the CPU: one loop body, compiled for three instruction sets and chosen at run time.
#include "accumulate.h"

#include <algorithm>
#include <stdexcept>

#include "accumulate_math.h"

namespace accumkern {
namespace {

// ---- kernels -------------------------------------------------------------------------------------------------

constexpr int64_t kChunk = 512;  // elements whose floats stay in L1 for the partial sums

struct Range {
  const FoldTensor& tensor;
  int64_t begin, end;  // elements; begin is a multiple of kBlockNumel
};

// x = fma(scale, grad, decode(sum, residual)); (sum, residual) = encode(x), for `numel` elements.
template <class F, Start kStart, bool kMeasured>
ACCUMKERN_INLINE void fold_elements(const typename F::Sum* grad, typename F::Sum* sum, typename F::Residual* residual,
                                    float scale, int64_t numel, float* grads, float* values, float* old_values) {
#pragma GCC ivdep  // sum may be grad itself, element for element
  for (int64_t i = 0; i < numel; ++i) {
    const float g = F::widen(grad[i]);
    float old_value = 0.0f, x;
    if constexpr (kStart == Start::kFromZero) {
      x = scale * g;
    } else {
      if constexpr (kStart == Start::kFromSum || !F::kHasResidual) {
        old_value = F::widen(sum[i]);
      } else {
        old_value = F::decode(sum[i], residual[i]);
      }
      x = __builtin_fmaf(scale, g, old_value);
    }
    const uint32_t bits = canonical_bits(x);
    if constexpr (F::kHasResidual) {
      F::encode(bits, sum + i, residual + i);
    } else {
      F::encode(bits, sum + i, nullptr);
    }
    if constexpr (kMeasured) {
      grads[i] = g;
      values[i] = x;
      if constexpr (kStart == Start::kFromSum) old_values[i] = old_value;
    }
  }
}

ACCUMKERN_INLINE float sum_of_squares(const float* values, int64_t numel) {
  float total = 0.0f;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < numel; ++i) total += values[i] * values[i];
  return total;
}

template <class F, Start kStart, bool kMeasured>
ACCUMKERN_INLINE void fold(const Range& range, float scale, float) {
  const auto* grad = static_cast<const typename F::Sum*>(range.tensor.grad);
  auto* sum = static_cast<typename F::Sum*>(range.tensor.sum);
  auto* residual = static_cast<typename F::Residual*>(range.tensor.residual);
  if constexpr (!kMeasured) {
    const int64_t at = range.begin;
    fold_elements<F, kStart, false>(grad + at, sum + at, F::kHasResidual ? residual + at : nullptr, scale,
                                    range.end - at, nullptr, nullptr, nullptr);
  } else {
    for (int64_t block = range.begin; block < range.end; block += kBlockNumel) {
      float grads[kChunk], values[kChunk], old_values[kChunk];
      float squares[kPartials] = {};
      const int64_t block_end = std::min(range.end, block + kBlockNumel);
      for (int64_t i = block; i < block_end; i += kChunk) {
        const int64_t count = std::min(kChunk, block_end - i);
        fold_elements<F, kStart, true>(grad + i, sum + i, F::kHasResidual ? residual + i : nullptr, scale, count,
                                       grads, values, old_values);
        squares[0] += sum_of_squares(grads, count);
        squares[1] += sum_of_squares(values, count);
        if constexpr (kStart == Start::kFromSum) squares[2] += sum_of_squares(old_values, count);
      }
      std::copy(squares, squares + kPartials, range.tensor.partials + kPartials * (block / kBlockNumel));
    }
  }
}

// sum = round((decode(sum, residual) / divisor) * factor)
template <class F, Start kStart, bool>
ACCUMKERN_INLINE void finish(const Range& range, float divisor, float factor) {
  auto* sum = static_cast<typename F::Sum*>(range.tensor.sum);
  const auto* residual = static_cast<const typename F::Residual*>(range.tensor.residual);
#pragma GCC ivdep
  for (int64_t i = range.begin; i < range.end; ++i) {
    float x;
    if constexpr (kStart == Start::kFromSum || !F::kHasResidual) {
      x = F::widen(sum[i]);
    } else {
      x = F::decode(sum[i], residual[i]);
    }
    sum[i] = F::round(canonical_bits((x / divisor) * factor));
  }
}

// ---- instruction sets ----------------------------------------------------------------------------------------

using RangeFunction = void (*)(const Range&, float, float);

#define ACCUMKERN_FOR_TARGET(KERNEL, NAME, ATTRIBUTE)                          \
  template <class F, Start kStart, bool kMeasured>                             \
  ATTRIBUTE void KERNEL##_##NAME(const Range& range, float a, float b) {       \
    KERNEL<F, kStart, kMeasured>(range, a, b);                                 \
  }
#if defined(__x86_64__)
#define ACCUMKERN_FOR_TARGETS(KERNEL)                                          \
  ACCUMKERN_FOR_TARGET(KERNEL, baseline, )                                     \
  ACCUMKERN_FOR_TARGET(KERNEL, avx2, __attribute__((target("avx2,fma"))))      \
  ACCUMKERN_FOR_TARGET(KERNEL, avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))))
#else
#define ACCUMKERN_FOR_TARGETS(KERNEL) ACCUMKERN_FOR_TARGET(KERNEL, baseline, )
#endif

ACCUMKERN_FOR_TARGETS(fold)
ACCUMKERN_FOR_TARGETS(finish)

enum class InstructionSet { kBaseline, kAvx2, kAvx512 };

InstructionSet instruction_set() {
#if defined(__x86_64__)
  static const InstructionSet found = [] {
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return avx2 && avx512 ? InstructionSet::kAvx512 : avx2 ? InstructionSet::kAvx2 : InstructionSet::kBaseline;
  }();
  return found;
#else
  return InstructionSet::kBaseline;
#endif
}

enum class Kernel { kFold, kMeasuredFold, kFinish };

#define ACCUMKERN_CHOOSE_KERNEL(NAME)             \
  kKernel == Kernel::kFinish ? finish_##NAME<F, kStart, false> \
                             : fold_##NAME<F, kStart, kKernel == Kernel::kMeasuredFold>

template <class F, Start kStart, Kernel kKernel>
RangeFunction choose_target() {
  switch (instruction_set()) {
#if defined(__x86_64__)
    case InstructionSet::kAvx512:
      return ACCUMKERN_CHOOSE_KERNEL(avx512);
    case InstructionSet::kAvx2:
      return ACCUMKERN_CHOOSE_KERNEL(avx2);
#endif
    default:
      return ACCUMKERN_CHOOSE_KERNEL(baseline);
  }
}

template <class F, Start kStart>
RangeFunction choose_kernel(Kernel kernel) {
  switch (kernel) {
    case Kernel::kFold:
      return choose_target<F, kStart, Kernel::kFold>();
    case Kernel::kMeasuredFold:
      return choose_target<F, kStart, Kernel::kMeasuredFold>();
    case Kernel::kFinish:
      return choose_target<F, kStart, Kernel::kFinish>();
  }
  throw std::invalid_argument("accumkern: unknown kernel");
}

template <class F>
RangeFunction choose_start(Start start, Kernel kernel) {
  switch (start) {
    case Start::kContinue:
      return choose_kernel<F, Start::kContinue>(kernel);
    case Start::kFromSum:
      return choose_kernel<F, Start::kFromSum>(kernel);
    case Start::kFromZero:
      return choose_kernel<F, Start::kFromZero>(kernel);
  }
  throw std::invalid_argument("accumkern: unknown start");
}

RangeFunction choose(Format format, Start start, Kernel kernel) {
  switch (format) {
    case Format::kSplit24:
      return choose_start<Split24>(start, kernel);
    case Format::kSplit32:
      return choose_start<Split32>(start, kernel);
    case Format::kMainGradBFloat16:
      return choose_start<MainGrad<BFloat16>>(start, kernel);
    case Format::kMainGradFloat16:
      return choose_start<MainGrad<Float16>>(start, kernel);
    case Format::kPlain32:
      return choose_start<Plain32>(start, kernel);
  }
  throw std::invalid_argument("accumkern: unknown format");
}

int64_t blocks_of(int64_t numel) { return (numel + kBlockNumel - 1) / kBlockNumel; }

}  // namespace

// ---- launcher ------------------------------------------------------------------------------------------------

const char* cpu_instruction_set() {
  switch (instruction_set()) {
    case InstructionSet::kAvx512:
      return "avx512";
    case InstructionSet::kAvx2:
      return "avx2";
    default:
      return "baseline";
  }
}

static float value_of(Scalar scalar) { return scalar.address != nullptr ? *scalar.address : scalar.value; }

// Runs a kernel over all blocks of a list: an even share for each thread, wherever tensors begin and end.
static void run(RangeFunction kernel, const std::vector<FoldTensor>& tensors, float a, float b, int threads) {
  int64_t total_blocks = 0, total_numel = 0;
  for (const FoldTensor& tensor : tensors) {
    total_blocks += blocks_of(tensor.numel);
    total_numel += tensor.numel;
  }

  const auto run_share = [&](int64_t first, int64_t last) {
    int64_t offset = 0;  // block at which the tensor at hand begins
    for (const FoldTensor& tensor : tensors) {
      const int64_t blocks = blocks_of(tensor.numel);
      const int64_t begin = std::max(first - offset, int64_t{0});
      const int64_t end = std::min(last - offset, blocks);
      if (begin < end) kernel({tensor, begin * kBlockNumel, std::min(end * kBlockNumel, tensor.numel)}, a, b);
      offset += blocks;
      if (offset >= last) break;
    }
  };

  constexpr int64_t kNumelWorthAThread = 8 * kBlockNumel;
  const int64_t workers = std::min<int64_t>(threads, total_numel / kNumelWorthAThread);
  if (workers <= 1) {
    run_share(0, total_blocks);
    return;
  }
#pragma omp parallel for num_threads(static_cast<int>(workers)) schedule(static)
  for (int64_t worker = 0; worker < workers; ++worker) {
    run_share(total_blocks * worker / workers, total_blocks * (worker + 1) / workers);
  }
}

void accumulate_cpu(Format format, Start start, const std::vector<FoldTensor>& tensors, Scalar scale, int threads) {
  const bool measured = std::any_of(tensors.begin(), tensors.end(), [](const FoldTensor& tensor) {
    return tensor.partials != nullptr;  // an empty tensor has none
  });
  run(choose(format, start, measured ? Kernel::kMeasuredFold : Kernel::kFold), tensors, value_of(scale), 0.0f, threads);
}

void finish_cpu(Format format, Start start, const std::vector<FoldTensor>& tensors, Scalar divisor, Scalar factor,
                int threads) {
  run(choose(format, start, Kernel::kFinish), tensors, value_of(divisor), value_of(factor), threads);
}

// ---- proof ---------------------------------------------------------------------------------------------------

// split32: decode(encode(x)) == x bit for bit, and the sum is x rounded to bfloat16 but for ties, which may go away
// from zero. split24: the error is at most 2^-16 |x| for normal x (half a last place for subnormal x), and the sum is
// x rounded to bfloat16 to half a last place and 2^-8 of one. Both: NaN becomes (0x7FC0, 0), and encoding what was
// decoded changes nothing.
template <class F>
static bool obeys_law(uint32_t pattern) {
  uint16_t sum;
  typename F::Residual residual;
  F::encode(canonical_bits(float_of(pattern)), &sum, &residual);
  const uint32_t magnitude = pattern & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return sum == 0x7FC0u && residual == 0;

  const uint32_t decoded = bits_of(F::decode(sum, residual));
  uint16_t sum_again;
  typename F::Residual residual_again;
  F::encode(decoded, &sum_again, &residual_again);
  if (sum_again != sum || residual_again != residual) return false;
  if ((decoded ^ pattern) >> 31) return false;  // the sign is kept, of zeros too

  // In units of the last place, differences of bit patterns are differences of values: the patterns of one sign are
  // in the order of the values, and across a power of two the spacing only doubles.
  const int64_t kept_bits = sizeof(typename F::Residual) == 1 ? 8 : 0;
  const int64_t decoded_error = std::abs(static_cast<int64_t>(decoded & 0x7FFFFFFFu) - static_cast<int64_t>(magnitude));
  if (decoded_error > (kept_bits == 8 ? 0x80 : 0)) return false;
  const int64_t sum_magnitude = static_cast<int64_t>(sum & 0x7FFFu) << 16;
  const int64_t sum_error = std::abs(sum_magnitude - static_cast<int64_t>(magnitude));
  if (sum_error > (kept_bits == 8 ? 0x8080 : 0x8000)) return false;
  if (magnitude == 0x7F800000u || magnitude == 0) return decoded == pattern && residual == 0;
  if (kept_bits == 8 && magnitude >= 0x00800000u && (decoded & 0x7FFFFFFFu) < 0x7F800000u) {
    const double x = float_of(pattern), y = float_of(decoded);
    if (std::fabs(y - x) > std::fabs(x) * 0x1p-16) return false;
  }
  return true;
}

uint64_t count_roundtrip_failures(Format format, uint64_t first, uint64_t last, int threads) {
  if (format != Format::kSplit24 && format != Format::kSplit32) {
    throw std::invalid_argument("accumkern: only the split formats have a round trip to sweep");
  }
  uint64_t failures = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : failures)
  for (uint64_t pattern = first; pattern < last; ++pattern) {
    const auto bits = static_cast<uint32_t>(pattern);
    failures += format == Format::kSplit24 ? !obeys_law<Split24>(bits) : !obeys_law<Split32>(bits);
  }
  return failures;
}

}  // namespace accumkern
