// The kernels on the CPU: one loop body each, compiled for three instruction sets and chosen at run time.
#include "accumulate.h"

#include <algorithm>
#include <cstdint>
#include <stdexcept>

#include "accumulate_math.h"

namespace accumkern {
namespace {

// ---- kernels -------------------------------------------------------------------------------------------------

constexpr int64_t kChunk = 128;   // elements between two rounds of prefetching
constexpr int64_t kAhead = 1024;  // elements from what is folded to what is asked for
constexpr int64_t kCacheLineBytes = 64;
static_assert(kBlockNumel % kChunk == 0, "a block is a whole number of chunks");
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "a word holds the first of two neighbours in its lower half");

struct Range {
  const FoldTensor& tensor;
  int64_t begin, end;  // elements; begin is a multiple of kBlockNumel
};

// Two neighbouring elements. They are as aligned as one element is.
using SumPair __attribute__((may_alias, aligned(2))) = uint32_t;
template <class F>
struct ResidualPairOf {
  using Type __attribute__((may_alias, aligned(alignof(typename F::Residual)))) = typename F::ResidualPair;
};

// Squares of a block, added up element by element of a chunk so that a loop over a chunk stays free of sums across it.
struct Squares {
  alignas(64) float of_grad[kChunk] = {}, of_value[kChunk] = {}, of_old_value[kChunk] = {};
};

template <class T>
ACCUMKERN_INLINE T* at(T* array, int64_t i) {
  return array == nullptr ? nullptr : array + i;
}

// Asks for the chunk that is kAhead elements away. The processor's own prefetching stops at every page. Addresses past
// the end are harmless, but not for pointer arithmetic.
template <bool kWrites, class T>
ACCUMKERN_INLINE void prefetch(const T* chunk) {
  const uintptr_t ahead = reinterpret_cast<uintptr_t>(chunk) + kAhead * sizeof(T);
#pragma GCC unroll 8
  for (uintptr_t offset = 0; offset < kChunk * sizeof(T); offset += kCacheLineBytes) {
    __builtin_prefetch(reinterpret_cast<const void*>(ahead + offset), kWrites);
  }
}

// x = fma(scale, grad, decode(sum, residual)); (sum, residual) = encode(x), for `numel` elements of a chunk.
template <class F, Start kStart, bool kMeasured>
ACCUMKERN_INLINE void fold_elements(const typename F::Sum* grad, typename F::Sum* sum, typename F::Residual* residual,
                                    float scale, int64_t numel, Squares* squares) {
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
      squares->of_grad[i] += g * g;
      squares->of_value[i] += x * x;
      if constexpr (kStart == Start::kFromSum) squares->of_old_value[i] += old_value * old_value;
    }
  }
}

// The same for a whole chunk of a split format, two neighbours at a time.
template <class F, Start kStart, bool kMeasured>
ACCUMKERN_INLINE void fold_pairs(const typename F::Sum* grad, typename F::Sum* sum, typename F::Residual* residual,
                                 float scale, Squares* squares) {
  const auto* grads = reinterpret_cast<const SumPair*>(grad);
  auto* sums = reinterpret_cast<SumPair*>(sum);
  auto* residuals = reinterpret_cast<typename ResidualPairOf<F>::Type*>(residual);
#pragma GCC ivdep
  for (int64_t i = 0; i < kChunk / 2; ++i) {
    const float g0 = float_of(grads[i] << 16), g1 = float_of(grads[i] & 0xFFFF0000u);
    float old0 = 0.0f, old1 = 0.0f, x0, x1;
    if constexpr (kStart == Start::kFromZero) {
      x0 = scale * g0, x1 = scale * g1;
    } else {
      if constexpr (kStart == Start::kFromSum) {
        old0 = float_of(sums[i] << 16), old1 = float_of(sums[i] & 0xFFFF0000u);
      } else {
        F::decode_pair(sums[i], residuals[i], &old0, &old1);
      }
      x0 = __builtin_fmaf(scale, g0, old0), x1 = __builtin_fmaf(scale, g1, old1);
    }
    uint32_t new_sums;
    typename F::ResidualPair new_residuals;
    F::encode_pair(canonical_bits(x0), canonical_bits(x1), &new_sums, &new_residuals);
    sums[i] = new_sums;
    residuals[i] = new_residuals;
    if constexpr (kMeasured) {
      squares->of_grad[i] = __builtin_fmaf(g0, g0, __builtin_fmaf(g1, g1, squares->of_grad[i]));
      squares->of_value[i] = __builtin_fmaf(x0, x0, __builtin_fmaf(x1, x1, squares->of_value[i]));
      if constexpr (kStart == Start::kFromSum) {
        squares->of_old_value[i] = __builtin_fmaf(old0, old0, __builtin_fmaf(old1, old1, squares->of_old_value[i]));
      }
    }
  }
}

ACCUMKERN_INLINE float sum_of(const float* values) {
  float total = 0.0f;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < kChunk; ++i) total += values[i];
  return total;
}

template <class F, Start kStart, bool kMeasured>
ACCUMKERN_INLINE void fold(const Range& range, float scale, float) {
  const auto* grads = static_cast<const typename F::Sum*>(range.tensor.grad);
  auto* sums = static_cast<typename F::Sum*>(range.tensor.sum);
  auto* residuals = F::kHasResidual ? static_cast<typename F::Residual*>(range.tensor.residual) : nullptr;
  for (int64_t block = range.begin; block < range.end; block += kBlockNumel) {
    Squares squares;
    const int64_t block_end = std::min(range.end, block + kBlockNumel);
    for (int64_t i = block; i < block_end; i += kChunk) {
      const auto* grad = grads + i;
      auto* sum = sums + i;
      auto* residual = at(residuals, i);
      const int64_t numel = std::min(kChunk, block_end - i);
      if constexpr (F::kHasResidual) {
        prefetch<false>(grad);
        prefetch<true>(sum);
        prefetch<true>(residual);
      }
      if (numel < kChunk) {
        fold_elements<F, kStart, kMeasured>(grad, sum, residual, scale, numel, &squares);
      } else if constexpr (F::kHasPairs) {
        fold_pairs<F, kStart, kMeasured>(grad, sum, residual, scale, &squares);
      } else {  // the compiler sees how many, and leaves out what other numbers need
        fold_elements<F, kStart, kMeasured>(grad, sum, residual, scale, kChunk, &squares);
      }
    }
    if constexpr (kMeasured) {
      float* partials = range.tensor.partials + kPartials * (block / kBlockNumel);
      partials[0] = sum_of(squares.of_grad);
      partials[1] = sum_of(squares.of_value);
      partials[2] = sum_of(squares.of_old_value);
    }
  }
}

// sum = round((decode(sum, residual) / divisor) * factor), for `numel` elements of a chunk.
template <class F, Start kStart>
ACCUMKERN_INLINE void finish_elements(typename F::Sum* sum, const typename F::Residual* residual, float divisor,
                                      float factor, int64_t numel) {
#pragma GCC ivdep
  for (int64_t i = 0; i < numel; ++i) {
    float x;
    if constexpr (kStart == Start::kFromSum || !F::kHasResidual) {
      x = F::widen(sum[i]);
    } else {
      x = F::decode(sum[i], residual[i]);
    }
    sum[i] = F::round(canonical_bits((x / divisor) * factor));
  }
}

template <class F, Start kStart, bool>
ACCUMKERN_INLINE void finish(const Range& range, float divisor, float factor) {
  auto* sums = static_cast<typename F::Sum*>(range.tensor.sum);
  const auto* residuals = F::kHasResidual ? static_cast<const typename F::Residual*>(range.tensor.residual) : nullptr;
  for (int64_t i = range.begin; i < range.end; i += kChunk) {
    auto* sum = sums + i;
    const auto* residual = at(residuals, i);
    const int64_t numel = std::min(kChunk, range.end - i);
    prefetch<true>(sum);
    if constexpr (kStart == Start::kContinue && F::kHasResidual) prefetch<false>(residual);
    if (numel < kChunk) {
      finish_elements<F, kStart>(sum, residual, divisor, factor, numel);
    } else {
      finish_elements<F, kStart>(sum, residual, divisor, factor, kChunk);
    }
  }
}

// value = decode(sum, residual), for `numel` elements of a chunk.
template <class F>
ACCUMKERN_INLINE void decode_elements(const typename F::Sum* sum, const typename F::Residual* residual, float* value,
                                      int64_t numel) {
#pragma GCC ivdep
  for (int64_t i = 0; i < numel; ++i) {
    if constexpr (F::kHasResidual) {
      value[i] = F::decode(sum[i], residual[i]);
    } else {
      value[i] = F::widen(sum[i]);
    }
  }
}

template <class F, Start, bool>
ACCUMKERN_INLINE void decode(const Range& range, float, float) {
  const auto* sums = static_cast<const typename F::Sum*>(range.tensor.grad);
  const auto* residuals = F::kHasResidual ? static_cast<const typename F::Residual*>(range.tensor.residual) : nullptr;
  auto* values = static_cast<float*>(range.tensor.sum);
  for (int64_t i = range.begin; i < range.end; i += kChunk) {
    const auto* sum = sums + i;
    const auto* residual = at(residuals, i);
    const int64_t numel = std::min(kChunk, range.end - i);
    prefetch<false>(sum);
    if constexpr (F::kHasResidual) prefetch<false>(residual);
    prefetch<true>(values + i);
    if (numel < kChunk) {
      decode_elements<F>(sum, residual, values + i, numel);
    } else {
      decode_elements<F>(sum, residual, values + i, kChunk);
    }
  }
}

// (sum, residual) = encode(value / divisor), for `numel` elements of a chunk.
template <class F>
ACCUMKERN_INLINE void encode_elements(const float* value, float divisor, typename F::Sum* sum,
                                      typename F::Residual* residual, int64_t numel) {
#pragma GCC ivdep
  for (int64_t i = 0; i < numel; ++i) {
    const uint32_t bits = canonical_bits(value[i] / divisor);
    if constexpr (F::kHasResidual) {
      F::encode(bits, sum + i, residual + i);
    } else {
      F::encode(bits, sum + i, nullptr);
    }
  }
}

template <class F, Start, bool>
ACCUMKERN_INLINE void encode(const Range& range, float divisor, float) {
  const auto* values = static_cast<const float*>(range.tensor.grad);
  auto* sums = static_cast<typename F::Sum*>(range.tensor.sum);
  auto* residuals = F::kHasResidual ? static_cast<typename F::Residual*>(range.tensor.residual) : nullptr;
  for (int64_t i = range.begin; i < range.end; i += kChunk) {
    auto* sum = sums + i;
    auto* residual = at(residuals, i);
    const int64_t numel = std::min(kChunk, range.end - i);
    prefetch<false>(values + i);
    prefetch<true>(sum);
    if constexpr (F::kHasResidual) prefetch<true>(residual);
    if (numel < kChunk) {
      encode_elements<F>(values + i, divisor, sum, residual, numel);
    } else {
      encode_elements<F>(values + i, divisor, sum, residual, kChunk);
    }
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
ACCUMKERN_FOR_TARGETS(decode)
ACCUMKERN_FOR_TARGETS(encode)

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

enum class Kernel { kFold, kMeasuredFold, kFinish, kDecode, kEncode };

#define ACCUMKERN_CHOOSE_KERNEL(NAME)                                       \
  kKernel == Kernel::kFinish   ? finish_##NAME<F, kStart, false>            \
  : kKernel == Kernel::kDecode ? decode_##NAME<F, Start::kContinue, false>  \
  : kKernel == Kernel::kEncode ? encode_##NAME<F, Start::kContinue, false>  \
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
    case Kernel::kDecode:
      return choose_target<F, kStart, Kernel::kDecode>();
    case Kernel::kEncode:
      return choose_target<F, kStart, Kernel::kEncode>();
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

void decode_cpu(Format format, const std::vector<FoldTensor>& tensors, int threads) {
  run(choose(format, Start::kContinue, Kernel::kDecode), tensors, 0.0f, 0.0f, threads);
}

void encode_cpu(Format format, const std::vector<FoldTensor>& tensors, Scalar divisor, int threads) {
  run(choose(format, Start::kContinue, Kernel::kEncode), tensors, value_of(divisor), 0.0f, threads);
}

// ---- proof ---------------------------------------------------------------------------------------------------

// Whether decode_pair and encode_pair do to two neighbours what decode and encode do to each. A pattern serves as a float
// to encode, and as a sum (upper half) with a residual (below it) to decode, stale and impossible pairs included.
template <class F>
static bool pairs_like_one_by_one(uint32_t first, uint32_t second) {
  using Residual = typename F::Residual;
  constexpr int kResidualBits = 8 * sizeof(Residual);
  uint16_t sum[2];
  Residual residual[2];
  F::encode(canonical_bits(float_of(first)), &sum[0], &residual[0]);
  F::encode(canonical_bits(float_of(second)), &sum[1], &residual[1]);
  uint32_t sums;
  typename F::ResidualPair residuals;
  F::encode_pair(canonical_bits(float_of(first)), canonical_bits(float_of(second)), &sums, &residuals);
  if (memcmp(&sums, sum, sizeof sums) != 0 || memcmp(&residuals, residual, sizeof residuals) != 0) return false;

  const uint32_t patterns[2] = {first, second};
  for (int i = 0; i < 2; ++i) {
    sum[i] = static_cast<uint16_t>(patterns[i] >> 16);
    residual[i] = static_cast<Residual>((patterns[i] >> (16 - kResidualBits)) & ((1u << kResidualBits) - 1));
  }
  memcpy(&sums, sum, sizeof sums);
  memcpy(&residuals, residual, sizeof residuals);
  float decoded[2];
  F::decode_pair(sums, residuals, &decoded[0], &decoded[1]);
  return bits_of(decoded[0]) == bits_of(F::decode(sum[0], residual[0])) &&
         bits_of(decoded[1]) == bits_of(F::decode(sum[1], residual[1]));
}

// split32: decode(encode(x)) == x bit for bit, and the sum is x rounded to bfloat16 but for ties, which may go away
// from zero. split24: the error is at most 2^-16 |x| for normal x (half a last place for subnormal x), and the sum is
// x rounded to bfloat16 to half a last place and 2^-8 of one. Both: NaN becomes (0x7FC0, 0), and encoding what was
// decoded changes nothing. Two at a time, the same comes out as one by one.
template <class F>
static bool obeys_law(uint32_t pattern) {
  // Multiplied by an odd number: over all patterns, all are in the other place too.
  if (!pairs_like_one_by_one<F>(pattern, pattern * 2654435761u)) return false;

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
