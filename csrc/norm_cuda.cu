// The end of a norm on NVIDIA GPUs: one block adds up what others have left.
#include <cuda_runtime.h>

#include "accumulate.h"
#include "cuda.h"
#include "norm_math.h"

namespace accumkern {
namespace {

constexpr int kNormThreads = 1024;

// Each thread adds up every kNormThreads-th number; then lanes are added up, and warps. The order is fixed.
__global__ void __launch_bounds__(kNormThreads) norm_kernel(const NormCall call) {
  __shared__ double of_warp[kNormThreads / 32];
  double total = 0.0;
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < call.count; i += kNormThreads) total += call.partials[i];
  for (int offset = 16; offset > 0; offset /= 2) total += __shfl_down_sync(0xFFFFFFFFu, total, offset);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = total;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < kNormThreads / 32; ++warp) total += of_warp[warp];
    end_norm(call, total, value_of(call.divisor));
  }
}

}  // namespace

void norm_cuda(const NormCall& call, int device, uintptr_t stream_address) {
  const DeviceGuard guard(device);
  const auto stream = reinterpret_cast<cudaStream_t>(stream_address);
  norm_kernel<<<1, kNormThreads, 0, stream>>>(call);
  check(cudaGetLastError(), "launching a kernel");
}

}  // namespace accumkern
