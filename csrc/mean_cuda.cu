// The mean over ranks on NVIDIA GPUs: a thread reads its elements of one rank after another and adds them up in registers.
#include <cuda_runtime.h>

#include <stdexcept>

#include "accumulate.h"
#include "accumulate_math.h"
#include "cuda.h"

namespace accumkern {
namespace {

constexpr int kRanksAtOnce = 4;  // whose elements a thread asks for before it adds the first of them

template <class F>
__global__ void __launch_bounds__(kThreads, kMinBlocks) mean_kernel(const __grid_constant__ MeanCall call, const bool all_aligned) {
  const int64_t begin = blockIdx.x * kBlockNumel;
  const auto* sums = static_cast<const typename F::Sum*>(call.sums) + begin;
  const auto* residuals = static_cast<const typename F::Residual*>(call.residuals) + begin;
  auto* out_sum = static_cast<typename F::Sum*>(call.out_sum) + begin;
  auto* out_residual = static_cast<typename F::Residual*>(call.out_residual) + begin;
  const float divisor = value_of(call.divisor);
  // Where a thread writes, it has read those elements of every rank, and no other thread reads them.
  const auto totals_at = [&](auto width, int at) {
    Vector<float, width.value> totals;
#pragma unroll
    for (int i = 0; i < width.value; ++i) totals.values[i] = -0.0f;  // which leaves what is added to it as it is
#pragma unroll kRanksAtOnce
    for (int64_t rank = 0; rank < call.ranks; ++rank) {
      const auto sum = load<width.value>(sums + rank * call.sum_stride + at);
      const auto residual = load<width.value>(residuals + rank * call.residual_stride + at);
#pragma unroll
      for (int i = 0; i < width.value; ++i) {
        totals.values[i] = totals.values[i] + F::decode(sum.values[i], residual.values[i]);
      }
    }
    return totals;
  };
  walk<1, 1>(extent_of(call.numel - begin, all_aligned), totals_at, [&](auto width, int at, auto& totals) {
    Vector<typename F::Sum, width.value> sum;
    Vector<typename F::Residual, width.value> residual;
#pragma unroll
    for (int i = 0; i < width.value; ++i) {
      F::encode(canonical_bits(__fdiv_rn(totals.values[i], divisor)), &sum.values[i], &residual.values[i]);
    }
    store(out_sum + at, sum);
    store(out_residual + at, residual);
  });
}

// Whether vectors of every rank, and of what is written, are aligned.
template <class F>
bool is_aligned(const MeanCall& call) {
  const auto bytes = [](int64_t stride, size_t size) { return reinterpret_cast<const void*>(stride * static_cast<int64_t>(size)); };
  return is_aligned(call.sums) && is_aligned(bytes(call.sum_stride, sizeof(typename F::Sum))) && is_aligned(call.residuals) &&
         is_aligned(bytes(call.residual_stride, sizeof(typename F::Residual))) && is_aligned(call.out_sum) &&
         is_aligned(call.out_residual);
}

// ---- launcher ------------------------------------------------------------------------------------------------

template <class F>
void launch(const MeanCall& call, cudaStream_t stream) {
  const auto blocks = static_cast<uint32_t>((call.numel + kBlockNumel - 1) / kBlockNumel);
  if (blocks == 0) return;
  const bool all_aligned = is_aligned<F>(call);
  mean_kernel<F><<<blocks, kThreads, 0, stream>>>(call, all_aligned);
  check(cudaGetLastError(), "launching a kernel");
}

}  // namespace

void mean_cuda(const MeanCall& call, int device, uintptr_t stream_address) {
  const DeviceGuard guard(device);
  const auto stream = reinterpret_cast<cudaStream_t>(stream_address);
  switch (call.format) {
    case Format::kSplit24:
      return launch<Split24>(call, stream);
    case Format::kSplit32:
      return launch<Split32>(call, stream);
    default:
      throw std::invalid_argument("accumkern: the mean over ranks is of split formats");
  }
}

}  // namespace accumkern
