// What csrc/*.cu use of CUDA, run by a C++ compiler on the CPU: tests/test_cuda_on_cpu.py includes this
// in place of NVIDIA's header. Blocks run one after another; the threads of a block are fibers that take turns in
// order, each up to its next barrier.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static

struct Index {
  unsigned x = 0;
};
inline Index blockIdx, threadIdx;

namespace emulator {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 64 * 1024;

struct Fiber {
  ucontext_t context{};
  std::unique_ptr<char[]> stack = std::make_unique<char[]>(kStackBytes);
  bool has_ended = false;
};

struct Running {
  ucontext_t scheduler{};
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
  std::vector<Fiber> fibers;
  std::vector<double> exchanged;  // a value of each thread; FP64 holds every FP32 number
};
inline Running running;

inline void run_fiber() {
  running.body(running.argument);
  running.fibers[threadIdx.x].has_ended = true;
}

// Waits until every thread of the block is here.
inline void barrier() {
  const unsigned thread = threadIdx.x;
  swapcontext(&running.fibers[thread].context, &running.scheduler);
  threadIdx.x = thread;
}

// kernel<<<blocks, threads, 0, stream>>>
template <class Body>
void launch(unsigned blocks, unsigned threads, Body body) {
  running.body = [](void* argument) { (*static_cast<Body*>(argument))(); };
  running.argument = &body;
  running.fibers.resize(threads);
  running.exchanged.resize(threads);
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    for (Fiber& fiber : running.fibers) {
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStackBytes;
      fiber.context.uc_link = &running.scheduler;
      fiber.has_ended = false;
      makecontext(&fiber.context, run_fiber, 0);
    }
    for (unsigned ended = 0; ended < threads;) {
      ended = 0;
      for (unsigned thread = 0; thread < threads; ++thread) {
        threadIdx.x = thread;
        swapcontext(&running.scheduler, &running.fibers[thread].context);
        ended += running.fibers[thread].has_ended;
      }
      if (ended > 0 && ended < threads) {
        std::fprintf(stderr, "runtime error: %u of %u threads wait at a barrier that the others left out\n",
                     threads - ended, threads);
        std::abort();
      }
    }
  }
}

}  // namespace emulator

inline void __syncthreads() { emulator::barrier(); }

// The value of the thread `offset` further in the warp, or one's own past its end.
template <class T>
T __shfl_down_sync(unsigned, T value, int offset) {
  auto& exchanged = emulator::running.exchanged;
  const unsigned thread = threadIdx.x, lane = thread % emulator::kWarp;
  exchanged[thread] = value;
  emulator::barrier();
  const T received = static_cast<T>(exchanged[lane + offset < emulator::kWarp ? thread + offset : thread]);
  emulator::barrier();
  return received;
}

inline float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
struct cudaFuncAttributes {};
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel*) {
  return cudaSuccess;
}
