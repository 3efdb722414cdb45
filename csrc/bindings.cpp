// The Python module accumkern.backends._C: the only file that knows pybind11. Tensors cross as addresses, so one build serves
// every version of torch; accumkern/ops.py has checked them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cerrno>
#include <stdexcept>
#include <string>

#include "accumulate.h"
#if defined(__linux__)
#include <sys/uio.h>
#include <unistd.h>
#endif

namespace py = pybind11;
using namespace accumkern;

namespace {

using Addresses = std::vector<uintptr_t>;
using Numels = std::vector<int64_t>;

// One column per argument, one entry per tensor; every column but sums may be empty.
std::vector<FoldTensor> gather(const Addresses& grads, const Addresses& sums, const Addresses& residuals,
                               const Addresses& partials, const Numels& numels) {
  const size_t count = sums.size();
  for (const Addresses* column : {&grads, &residuals, &partials}) {
    if (!column->empty() && column->size() != count) throw std::invalid_argument("accumkern.backends._C: lists differ in length");
  }
  if (numels.size() != count) throw std::invalid_argument("accumkern.backends._C: lists differ in length");
  std::vector<FoldTensor> tensors(count);
  for (size_t i = 0; i < count; ++i) {
    for (const Addresses* column : {&grads, &sums, &residuals}) {
      if (numels[i] > 0 && !column->empty() && (*column)[i] == 0) {
        throw std::runtime_error("accumkern: a tensor has no memory, as torch's immutable ZeroTensors; clone() it first");
      }
    }
    tensors[i] = {grads.empty() ? nullptr : reinterpret_cast<const void*>(grads[i]), reinterpret_cast<void*>(sums[i]),
                  residuals.empty() ? nullptr : reinterpret_cast<void*>(residuals[i]),
                  partials.empty() ? nullptr : reinterpret_cast<float*>(partials[i]), numels[i]};
  }
  return tensors;
}

// A factor crosses as (value, address); an address of zero means the value.
using ScalarPair = std::pair<float, uintptr_t>;
Scalar scalar_of(ScalarPair pair) { return {pair.first, reinterpret_cast<const float*>(pair.second)}; }

// Runs on a CUDA device's stream, or on the CPU with some threads where the device is negative.
void run(const Call& call, int device, uintptr_t threads_or_stream) {
  const py::gil_scoped_release release;
  if (device < 0) return run_cpu(call, static_cast<int>(threads_or_stream));
#if defined(ACCUMKERN_CUDA_TARGETS)
  run_cuda(call, device, threads_or_stream);
#else
  throw std::runtime_error("accumkern: built without CUDA kernels");
#endif
}

// Whether the first and the last byte of a range of this process can be written, without writing: the kernel copies
// each byte onto itself and refuses where a store would fault. Where it cannot be asked, the answer is yes.
bool is_writable(uintptr_t address, size_t bytes) {
#if defined(__linux__)
  for (const uintptr_t at : {address, address + bytes - 1}) {
    iovec byte = {reinterpret_cast<void*>(at), 1};
    if (process_vm_readv(getpid(), &byte, 1, &byte, 1, 0) < 0 && errno == EFAULT) return false;
  }
#else
  (void)address, (void)bytes;
#endif
  return true;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "accumkern's compiled kernels, on raw addresses";
  module.attr("version") = ACCUMKERN_VERSION;
  module.attr("block_numel") = kBlockNumel;
#if defined(__clang__)
  module.attr("compiler") = __VERSION__;
#else
  module.attr("compiler") = "GCC " __VERSION__;
#endif
#if defined(_OPENMP)
  module.attr("openmp") = true;
#else
  module.attr("openmp") = false;
#endif
  module.def("cpu_instruction_set", &cpu_instruction_set);
  module.def("is_writable", &is_writable, py::arg("address"), py::arg("bytes"));

  // Arguments in the order of every backend, then the tensors' sizes and where they are.
  module.def(
      "fold",
      [](int format, int start, const Addresses& grads, const Addresses& sums, const Addresses& residuals,
         ScalarPair scale, const Addresses& partials, const Numels& numels, int device, uintptr_t threads_or_stream) {
        run({Kernel::kFold, static_cast<Format>(format), static_cast<Start>(start),
             gather(grads, sums, residuals, partials, numels), scalar_of(scale)},
            device, threads_or_stream);
      },
      py::arg("format"), py::arg("start"), py::arg("grads"), py::arg("sums"), py::arg("residuals"), py::arg("scale"),
      py::arg("partials"), py::arg("numels"), py::arg("device"), py::arg("threads_or_stream"));

  module.def(
      "finish",
      [](int format, int start, const Addresses& sums, const Addresses& residuals, ScalarPair divisor,
         ScalarPair factor, const Numels& numels, int device, uintptr_t threads_or_stream) {
        run({Kernel::kFinish, static_cast<Format>(format), static_cast<Start>(start),
             gather({}, sums, residuals, {}, numels), scalar_of(divisor), scalar_of(factor)},
            device, threads_or_stream);
      },
      py::arg("format"), py::arg("start"), py::arg("sums"), py::arg("residuals"), py::arg("divisor"),
      py::arg("factor"), py::arg("numels"), py::arg("device"), py::arg("threads_or_stream"));

  module.def(
      "decode",
      [](int format, const Addresses& sums, const Addresses& residuals, const Addresses& values, const Numels& numels,
         int device, uintptr_t threads_or_stream) {
        run({Kernel::kDecode, static_cast<Format>(format), Start::kContinue,
             gather(sums, values, residuals, {}, numels)},
            device, threads_or_stream);
      },
      py::arg("format"), py::arg("sums"), py::arg("residuals"), py::arg("values"), py::arg("numels"),
      py::arg("device"), py::arg("threads_or_stream"));

  module.def(
      "encode",
      [](int format, const Addresses& values, ScalarPair divisor, const Addresses& sums, const Addresses& residuals,
         const Numels& numels, int device, uintptr_t threads_or_stream) {
        run({Kernel::kEncode, static_cast<Format>(format), Start::kContinue,
             gather(values, sums, residuals, {}, numels), scalar_of(divisor)},
            device, threads_or_stream);
      },
      py::arg("format"), py::arg("values"), py::arg("divisor"), py::arg("sums"), py::arg("residuals"),
      py::arg("numels"), py::arg("device"), py::arg("threads_or_stream"));

  module.def(
      "squares",
      [](int format, int start, const Addresses& sums, const Addresses& residuals, const Addresses& partials,
         const Numels& numels, int device, uintptr_t threads_or_stream) {
        run({Kernel::kSquares, static_cast<Format>(format), static_cast<Start>(start),
             gather({}, sums, residuals, partials, numels)},
            device, threads_or_stream);
      },
      py::arg("format"), py::arg("start"), py::arg("sums"), py::arg("residuals"), py::arg("partials"),
      py::arg("numels"), py::arg("device"), py::arg("threads_or_stream"));

#if defined(ACCUMKERN_CUDA_TARGETS)
  module.attr("cuda_targets") = ACCUMKERN_CUDA_TARGETS;
  module.def("cuda_problem", &cuda_problem);
#else
  module.attr("cuda_targets") = py::none();
#endif
}
