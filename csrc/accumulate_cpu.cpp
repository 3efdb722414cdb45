// The kernels on the CPU: one loop body each, compiled for three instruction sets and chosen at run time.
#include <algorithm>
#include <cstdint>
#include <stdexcept>

#include "accumulate.h"
#include "accumulate_math.h"
#include "cpu.h"

namespace accumkern {
namespace {

// ---- kernels -------------------------------------------------------------------------------------------------

struct Range {
  const FoldTensor& tensor;
  int64_t begin, end;  // elements; begin is a multiple of kBlockNumel
};

// Squares of a block, added up element by element of a chunk so that a loop over a chunk stays free of sums across it.
struct Squares {
  alignas(64) float of_grad[kChunk] = {}, of_value[kChunk] = {}, of_old_value[kChunk] = {};
};

// The same of the i-th pair of neighbours, of a split format.
template <class F, Start kStart>
ACCUMKERN_INLINE void values_at(const SumPair* sums, const typename ResidualPairOf<F>::Type* residuals, int64_t i,
                                float* first, float* second) {
  if constexpr (kStart == Start::kFromSum) {
    *first = float_of(sums[i] << 16), *second = float_of(sums[i] & 0xFFFF0000u);
  } else {
    F::decode_pair(sums[i], residuals[i], first, second);
  }
}

ACCUMKERN_INLINE void add_square(float x, float* total) { *total += x * x; }

ACCUMKERN_INLINE void add_squares(float first, float second, float* total) {
  *total = __builtin_fmaf(first, first, __builtin_fmaf(second, second, *total));
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
      old_value = value_at<F, kStart>(sum, residual, i);
      x = __builtin_fmaf(scale, g, old_value);
    }
    F::encode(canonical_bits(x), sum + i, at<F>(residual, i));
    if constexpr (kMeasured) {
      add_square(g, &squares->of_grad[i]);
      add_square(x, &squares->of_value[i]);
      if constexpr (kStart == Start::kFromSum) add_square(old_value, &squares->of_old_value[i]);
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
      values_at<F, kStart>(sums, residuals, i, &old0, &old1);
      x0 = __builtin_fmaf(scale, g0, old0), x1 = __builtin_fmaf(scale, g1, old1);
    }
    uint32_t new_sums;
    typename F::ResidualPair new_residuals;
    F::encode_pair(canonical_bits(x0), canonical_bits(x1), &new_sums, &new_residuals);
    sums[i] = new_sums;
    residuals[i] = new_residuals;
    if constexpr (kMeasured) {
      add_squares(g0, g1, &squares->of_grad[i]);
      add_squares(x0, x1, &squares->of_value[i]);
      if constexpr (kStart == Start::kFromSum) add_squares(old0, old1, &squares->of_old_value[i]);
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
struct Fold {
  static ACCUMKERN_INLINE void run(const Range& range, float scale, float) {
    const auto* grads = static_cast<const typename F::Sum*>(range.tensor.grad);
    auto* sums = static_cast<typename F::Sum*>(range.tensor.sum);
    auto* residuals = static_cast<typename F::Residual*>(range.tensor.residual);
    for (int64_t block = range.begin; block < range.end; block += kBlockNumel) {
      Squares squares;
      const int64_t block_end = std::min(range.end, block + kBlockNumel);
      for (int64_t i = block; i < block_end; i += kChunk) {
        const auto* grad = grads + i;
        auto* sum = sums + i;
        auto* residual = at<F>(residuals, i);
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
};

// sum = round((decode(sum, residual) / divisor) * factor), for `numel` elements of a chunk. To rescale is to encode that
// instead of rounding it.
template <class F, Start kStart, bool kRescales>
ACCUMKERN_INLINE void finish_elements(typename F::Sum* sum, typename F::Residual* residual, float divisor, float factor,
                                      int64_t numel) {
#pragma GCC ivdep
  for (int64_t i = 0; i < numel; ++i) {
    const uint32_t bits = canonical_bits((value_at<F, kStart>(sum, residual, i) / divisor) * factor);
    if constexpr (kRescales) {
      F::encode(bits, sum + i, at<F>(residual, i));
    } else {
      sum[i] = F::round(bits);
    }
  }
}

// The same for a whole chunk of a split format that is rescaled, two neighbours at a time.
template <class F, Start kStart>
ACCUMKERN_INLINE void rescale_pairs(typename F::Sum* sum, typename F::Residual* residual, float divisor, float factor) {
  auto* sums = reinterpret_cast<SumPair*>(sum);
  auto* residuals = reinterpret_cast<typename ResidualPairOf<F>::Type*>(residual);
#pragma GCC ivdep
  for (int64_t i = 0; i < kChunk / 2; ++i) {
    float x0, x1;
    values_at<F, kStart>(sums, residuals, i, &x0, &x1);
    uint32_t new_sums;
    typename F::ResidualPair new_residuals;
    F::encode_pair(canonical_bits((x0 / divisor) * factor), canonical_bits((x1 / divisor) * factor), &new_sums,
                   &new_residuals);
    sums[i] = new_sums;
    residuals[i] = new_residuals;
  }
}

template <class F, Start kStart, bool kRescales>
struct Finish {
  static ACCUMKERN_INLINE void run(const Range& range, float divisor, float factor) {
    auto* sums = static_cast<typename F::Sum*>(range.tensor.sum);
    auto* residuals = static_cast<typename F::Residual*>(range.tensor.residual);
    for (int64_t i = range.begin; i < range.end; i += kChunk) {
      auto* sum = sums + i;
      auto* residual = at<F>(residuals, i);
      const int64_t numel = std::min(kChunk, range.end - i);
      prefetch<true>(sum);
      if constexpr ((kRescales || kStart == Start::kContinue) && F::kHasResidual) prefetch<kRescales>(residual);
      if (numel < kChunk) {
        finish_elements<F, kStart, kRescales>(sum, residual, divisor, factor, numel);
      } else if constexpr (kRescales && F::kHasPairs) {
        rescale_pairs<F, kStart>(sum, residual, divisor, factor);
      } else {
        finish_elements<F, kStart, kRescales>(sum, residual, divisor, factor, kChunk);
      }
    }
  }
};

template <class F>
struct Decode {
  static ACCUMKERN_INLINE void run(const Range& range, float, float) {
    const auto* sums = static_cast<const typename F::Sum*>(range.tensor.grad);
    const auto* residuals = static_cast<const typename F::Residual*>(range.tensor.residual);
    auto* values = static_cast<float*>(range.tensor.sum);
    for (int64_t i = range.begin; i < range.end; i += kChunk) {
      const auto* sum = sums + i;
      const auto* residual = at<F>(residuals, i);
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
};

// (sum, residual) = encode(value / divisor), for `numel` elements of a chunk.
template <class F>
ACCUMKERN_INLINE void encode_elements(const float* value, float divisor, typename F::Sum* sum,
                                      typename F::Residual* residual, int64_t numel) {
#pragma GCC ivdep
  for (int64_t i = 0; i < numel; ++i) {
    F::encode(canonical_bits(value[i] / divisor), sum + i, at<F>(residual, i));
  }
}

template <class F>
struct Encode {
  static ACCUMKERN_INLINE void run(const Range& range, float divisor, float) {
    const auto* values = static_cast<const float*>(range.tensor.grad);
    auto* sums = static_cast<typename F::Sum*>(range.tensor.sum);
    auto* residuals = static_cast<typename F::Residual*>(range.tensor.residual);
    for (int64_t i = range.begin; i < range.end; i += kChunk) {
      auto* sum = sums + i;
      auto* residual = at<F>(residuals, i);
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
};

// total += decode(sum, residual)^2, for `numel` elements of a chunk.
template <class F, Start kStart>
ACCUMKERN_INLINE void square_elements(const typename F::Sum* sum, const typename F::Residual* residual, int64_t numel,
                                      float* totals) {
  for (int64_t i = 0; i < numel; ++i) add_square(value_at<F, kStart>(sum, residual, i), &totals[i]);
}

// The same for a whole chunk of a split format, two neighbours at a time.
template <class F, Start kStart>
ACCUMKERN_INLINE void square_pairs(const typename F::Sum* sum, const typename F::Residual* residual, float* totals) {
  const auto* sums = reinterpret_cast<const SumPair*>(sum);
  const auto* residuals = reinterpret_cast<const typename ResidualPairOf<F>::Type*>(residual);
  for (int64_t i = 0; i < kChunk / 2; ++i) {
    float first, second;
    values_at<F, kStart>(sums, residuals, i, &first, &second);
    add_squares(first, second, &totals[i]);
  }
}

// The partial sums are those that a fold would leave of the same values.
template <class F, Start kStart>
struct Square {
  static ACCUMKERN_INLINE void run(const Range& range, float, float) {
    const auto* sums = static_cast<const typename F::Sum*>(range.tensor.sum);
    const auto* residuals = static_cast<const typename F::Residual*>(range.tensor.residual);
    for (int64_t block = range.begin; block < range.end; block += kBlockNumel) {
      alignas(64) float totals[kChunk] = {};
      const int64_t block_end = std::min(range.end, block + kBlockNumel);
      for (int64_t i = block; i < block_end; i += kChunk) {
        const auto* sum = sums + i;
        const auto* residual = at<F>(residuals, i);
        const int64_t numel = std::min(kChunk, block_end - i);
        prefetch<false>(sum);
        if constexpr (kStart == Start::kContinue && F::kHasResidual) prefetch<false>(residual);
        if (numel < kChunk) {
          square_elements<F, kStart>(sum, residual, numel, totals);
        } else if constexpr (F::kHasPairs) {
          square_pairs<F, kStart>(sum, residual, totals);
        } else {
          square_elements<F, kStart>(sum, residual, kChunk, totals);
        }
      }
      range.tensor.partials[block / kBlockNumel] = sum_of(totals);
    }
  }
};

// ---- choice --------------------------------------------------------------------------------------------------

using RangeFunction = void (*)(const Range&, float, float);

template <class K>
RangeFunction compiled() {
  return for_this_cpu<K, const Range&, float, float>();
}

template <class F, Start kStart>
RangeFunction choose_kernel(Kernel kernel, bool measured) {
  switch (kernel) {
    case Kernel::kFold:
      return measured ? compiled<Fold<F, kStart, true>>() : compiled<Fold<F, kStart, false>>();
    case Kernel::kFinish:
      return compiled<Finish<F, kStart, false>>();
    case Kernel::kRescale:
      return compiled<Finish<F, kStart, true>>();
    case Kernel::kDecode:
      return compiled<Decode<F>>();
    case Kernel::kEncode:
      return compiled<Encode<F>>();
    case Kernel::kSquares:
      return compiled<Square<F, kStart>>();
  }
  throw std::invalid_argument("accumkern: unknown kernel");
}

template <class F>
RangeFunction choose_start(const Call& call, bool measured) {
  switch (call.start) {
    case Start::kContinue:
      return choose_kernel<F, Start::kContinue>(call.kernel, measured);
    case Start::kFromSum:
      return choose_kernel<F, Start::kFromSum>(call.kernel, measured);
    case Start::kFromZero:
      return choose_kernel<F, Start::kFromZero>(call.kernel, measured);
  }
  throw std::invalid_argument("accumkern: unknown start");
}

RangeFunction choose_format(const Call& call, bool measured) {
  switch (call.format) {
    case Format::kSplit24:
      return choose_start<Split24>(call, measured);
    case Format::kSplit32:
      return choose_start<Split32>(call, measured);
    case Format::kMainGradBFloat16:
      return choose_start<MainGrad<BFloat16>>(call, measured);
    case Format::kMainGradFloat16:
      return choose_start<MainGrad<Float16>>(call, measured);
    case Format::kPlain32:
      return choose_start<Plain32>(call, measured);
  }
  throw std::invalid_argument("accumkern: unknown format");
}

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

void run_cpu(const Call& call, int threads) {
  const bool measured = std::any_of(call.tensors.begin(), call.tensors.end(), [](const FoldTensor& tensor) {
    return tensor.partials != nullptr;  // an empty tensor has none
  });
  const RangeFunction kernel = choose_format(call, measured);
  const float scalar = value_of(call.scalar), factor = value_of(call.factor);
  run_in_shares(call.tensors, threads, [&](const FoldTensor& tensor, int64_t begin, int64_t end) {
    kernel({tensor, begin, end}, scalar, factor);
  });
}

}  // namespace accumkern
