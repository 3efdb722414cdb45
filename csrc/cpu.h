// What the kernels on the CPU have in common: elements and chunks of tensors, instruction sets, and threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "accumulate.h"
#include "accumulate_math.h"

namespace accumkern {

// ---- elements and chunks -------------------------------------------------------------------------------------

constexpr int64_t kChunk = 128;   // elements between two rounds of prefetching
constexpr int64_t kAhead = 1024;  // elements from what is worked on to what is asked for
constexpr int64_t kCacheLineBytes = 64;
static_assert(kBlockNumel % kChunk == 0, "a block is a whole number of chunks");
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "a word holds the first of two neighbours in its lower half");

// Asks for the chunk that is some elements away. The processor's own prefetching stops at every page. Addresses past the
// end are harmless, but not for pointer arithmetic.
template <bool kWrites, class T>
ACCUMKERN_INLINE void prefetch(const T* chunk, int64_t away = kAhead) {
  const uintptr_t ahead = reinterpret_cast<uintptr_t>(chunk) + static_cast<uintptr_t>(away) * sizeof(T);
#pragma GCC unroll 8
  for (uintptr_t offset = 0; offset < kChunk * sizeof(T); offset += kCacheLineBytes) {
    __builtin_prefetch(reinterpret_cast<const void*>(ahead + offset), kWrites);
  }
}

// The i-th residual's address, of a format that has any.
template <class F, class Residual>
ACCUMKERN_INLINE Residual* at(Residual* residuals, int64_t i) {
  if constexpr (F::kHasResidual) {
    return residuals + i;
  } else {
    return nullptr;
  }
}

// The i-th accumulated value: of sum and residual, or of the sum alone.
template <class F, Start kStart = Start::kContinue>
ACCUMKERN_INLINE float value_at(const typename F::Sum* sum, const typename F::Residual* residual, int64_t i) {
  if constexpr (kStart == Start::kFromSum || !F::kHasResidual) {
    return F::widen(sum[i]);
  } else {
    return F::decode(sum[i], residual[i]);
  }
}

// Two neighbouring elements. They are as aligned as one element is.
using SumPair __attribute__((may_alias, aligned(2))) = uint32_t;
template <class F>
struct ResidualPairOf {
  using Type __attribute__((may_alias, aligned(alignof(typename F::Residual)))) = typename F::ResidualPair;
};

// value = decode(sum, residual), for `numel` elements of a chunk.
template <class F, Start kStart = Start::kContinue>
ACCUMKERN_INLINE void decode_elements(const typename F::Sum* sum, const typename F::Residual* residual, float* value,
                                      int64_t numel) {
#pragma GCC ivdep
  for (int64_t i = 0; i < numel; ++i) value[i] = value_at<F, kStart>(sum, residual, i);
}

// ---- instruction sets ----------------------------------------------------------------------------------------

// K::run of these arguments, compiled for one instruction set.
template <class K, class... Arguments>
void run_baseline(Arguments... arguments) {
  K::run(arguments...);
}

#if defined(__x86_64__)
template <class K, class... Arguments>
__attribute__((target("avx2,fma"))) void run_avx2(Arguments... arguments) {
  K::run(arguments...);
}

template <class K, class... Arguments>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))) void run_avx512(Arguments... arguments) {
  K::run(arguments...);
}
#endif

enum class InstructionSet { kBaseline, kAvx2, kAvx512 };

inline InstructionSet instruction_set() {
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

// K::run for the best instruction set that there is.
template <class K, class... Arguments>
auto for_this_cpu() -> void (*)(Arguments...) {
  switch (instruction_set()) {
#if defined(__x86_64__)
    case InstructionSet::kAvx512:
      return run_avx512<K, Arguments...>;
    case InstructionSet::kAvx2:
      return run_avx2<K, Arguments...>;
#endif
    default:
      return run_baseline<K, Arguments...>;
  }
}

// ---- threads -------------------------------------------------------------------------------------------------

inline int64_t blocks_of(int64_t numel) { return (numel + kBlockNumel - 1) / kBlockNumel; }

inline float value_of(Scalar scalar) { return scalar.address != nullptr ? *scalar.address : scalar.value; }

// Calls run(tensor, begin, end) for all elements of a list, `begin` a multiple of kBlockNumel: an even share of the
// blocks for each thread, wherever tensors begin and end.
template <class Tensor, class Run>
void run_in_shares(const std::vector<Tensor>& tensors, int threads, const Run& run) {
  int64_t total_blocks = 0, total_numel = 0;
  for (const Tensor& tensor : tensors) {
    total_blocks += blocks_of(tensor.numel);
    total_numel += tensor.numel;
  }

  const auto run_share = [&](int64_t first, int64_t last) {
    int64_t offset = 0;  // block at which the tensor at hand begins
    for (const Tensor& tensor : tensors) {
      const int64_t blocks = blocks_of(tensor.numel);
      const int64_t begin = std::max(first - offset, int64_t{0});
      const int64_t end = std::min(last - offset, blocks);
      if (begin < end) run(tensor, begin * kBlockNumel, std::min(end * kBlockNumel, tensor.numel));
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

}  // namespace accumkern
