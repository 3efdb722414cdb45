// The mean over ranks on the CPU: one pass over what they have, with the totals of a run of elements in the cache.
#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "accumulate.h"
#include "accumulate_math.h"
#include "cpu.h"

namespace accumkern {
namespace {

// Elements of each rank that are read one after another. Their totals, and the runs of two ranks, fill 20 or 24 KB.
constexpr int64_t kRun = 2048;
static_assert(kBlockNumel % kRun == 0 && kRun % kChunk == 0, "a block is whole runs, and a run whole chunks");

// ---- chunks --------------------------------------------------------------------------------------------------

// total += decode(sum, residual), for `numel` elements of a chunk.
template <class F>
ACCUMKERN_INLINE void add_elements(const typename F::Sum* sum, const typename F::Residual* residual, int64_t numel,
                                   float* totals) {
#pragma GCC ivdep
  for (int64_t i = 0; i < numel; ++i) totals[i] += F::decode(sum[i], residual[i]);
}

// The same for a whole chunk, two neighbours at a time: first the totals of the first ones, then those of the second.
template <class F>
ACCUMKERN_INLINE void add_pairs(const typename F::Sum* sum, const typename F::Residual* residual, float* totals) {
  const auto* sums = reinterpret_cast<const SumPair*>(sum);
  const auto* residuals = reinterpret_cast<const typename ResidualPairOf<F>::Type*>(residual);
#pragma GCC ivdep
  for (int64_t i = 0; i < kChunk / 2; ++i) {
    float first, second;
    F::decode_pair(sums[i], residuals[i], &first, &second);
    totals[i] += first, totals[kChunk / 2 + i] += second;
  }
}

// (sum, residual) = encode(total / divisor), for `numel` elements of a chunk.
template <class F>
ACCUMKERN_INLINE void store_elements(const float* totals, float divisor, int64_t numel, typename F::Sum* sum,
                                     typename F::Residual* residual) {
#pragma GCC ivdep
  for (int64_t i = 0; i < numel; ++i) F::encode(canonical_bits(totals[i] / divisor), sum + i, residual + i);
}

// The same for a whole chunk, whose totals are those of add_pairs.
template <class F>
ACCUMKERN_INLINE void store_pairs(const float* totals, float divisor, typename F::Sum* sum, typename F::Residual* residual) {
  auto* sums = reinterpret_cast<SumPair*>(sum);
  auto* residuals = reinterpret_cast<typename ResidualPairOf<F>::Type*>(residual);
#pragma GCC ivdep
  for (int64_t i = 0; i < kChunk / 2; ++i) {
    const uint32_t first = canonical_bits(totals[i] / divisor), second = canonical_bits(totals[kChunk / 2 + i] / divisor);
    uint32_t new_sums;
    typename F::ResidualPair new_residuals;
    F::encode_pair(first, second, &new_sums, &new_residuals);
    sums[i] = new_sums;
    residuals[i] = new_residuals;
  }
}

// ---- kernel --------------------------------------------------------------------------------------------------

template <class F>
struct Mean {
  // For the elements from begin to end. Where something is written, every rank has been read.
  static ACCUMKERN_INLINE void run(const MeanCall& call, int64_t begin, int64_t end, float divisor) {
    const auto* all_sums = static_cast<const typename F::Sum*>(call.sums);
    const auto* all_residuals = static_cast<const typename F::Residual*>(call.residuals);
    auto* out_sum = static_cast<typename F::Sum*>(call.out_sum);
    auto* out_residual = static_cast<typename F::Residual*>(call.out_residual);
    for (int64_t at = begin; at < end; at += kRun) {
      const int64_t numel = std::min(kRun, end - at);
      alignas(64) float totals[kRun];
      std::fill(totals, totals + kRun, -0.0f);  // the zero that leaves what is added to it as it is, zeros too
      for (int64_t rank = 0; rank < call.ranks; ++rank) {
        const auto* sums = all_sums + rank * call.sum_stride + at;
        const auto* residuals = all_residuals + rank * call.residual_stride + at;
        // Meanwhile the next rank's run is asked for, after the last rank the first one's next run.
        const bool is_last = rank + 1 == call.ranks;
        const int64_t next_sum = is_last ? kRun - rank * call.sum_stride : call.sum_stride;
        const int64_t next_residual = is_last ? kRun - rank * call.residual_stride : call.residual_stride;
        for (int64_t i = 0; i < numel; i += kChunk) {
          prefetch<false>(sums + i, next_sum);
          prefetch<false>(residuals + i, next_residual);
          if (numel - i < kChunk) {
            add_elements<F>(sums + i, residuals + i, numel - i, totals + i);
          } else {
            add_pairs<F>(sums + i, residuals + i, totals + i);
          }
        }
      }
      for (int64_t i = 0; i < numel; i += kChunk) {
        if (numel - i < kChunk) {
          store_elements<F>(totals + i, divisor, numel - i, out_sum + at + i, out_residual + at + i);
        } else {
          store_pairs<F>(totals + i, divisor, out_sum + at + i, out_residual + at + i);
        }
      }
    }
  }
};

using MeanFunction = void (*)(const MeanCall&, int64_t, int64_t, float);

template <class F>
MeanFunction compiled() {
  return for_this_cpu<Mean<F>, const MeanCall&, int64_t, int64_t, float>();
}

MeanFunction choose_format(Format format) {
  switch (format) {
    case Format::kSplit24:
      return compiled<Split24>();
    case Format::kSplit32:
      return compiled<Split32>();
    default:
      throw std::invalid_argument("accumkern: the mean over ranks is of split formats");
  }
}

}  // namespace

// ---- launcher ------------------------------------------------------------------------------------------------

void mean_cpu(const MeanCall& call, int threads) {
  const MeanFunction kernel = choose_format(call.format);
  const float divisor = value_of(call.divisor);
  run_in_shares(std::vector<MeanCall>{call}, threads, [&](const MeanCall& all, int64_t begin, int64_t end) {
    kernel(all, begin, end, divisor);
  });
}

}  // namespace accumkern
