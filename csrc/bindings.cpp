// The Python module accumkern._C: the only file that knows pybind11. Tensors cross as addresses, so one build serves
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

// One column per argument, one entry per tensor; residuals and partials may be empty lists.
std::vector<FoldTensor> gather(const std::vector<uintptr_t>& grads, const std::vector<uintptr_t>& sums,
                               const std::vector<uintptr_t>& residuals, const std::vector<uintptr_t>& partials,
                               const std::vector<int64_t>& numels) {
  const size_t count = grads.size();
  if (sums.size() != count || numels.size() != count || (!residuals.empty() && residuals.size() != count) ||
      (!partials.empty() && partials.size() != count)) {
    throw std::invalid_argument("accumkern._C: the lists differ in length");
  }
  std::vector<FoldTensor> tensors(count);
  for (size_t i = 0; i < count; ++i) {
    tensors[i] = {reinterpret_cast<const void*>(grads[i]), reinterpret_cast<void*>(sums[i]),
                  residuals.empty() ? nullptr : reinterpret_cast<void*>(residuals[i]),
                  partials.empty() ? nullptr : reinterpret_cast<float*>(partials[i]), numels[i]};
  }
  return tensors;
}

Scale scale_of(float value, uintptr_t address) { return {value, reinterpret_cast<const float*>(address)}; }

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

  module.def(
      "accumulate_cpu",
      [](int format, int start, const std::vector<uintptr_t>& grads, const std::vector<uintptr_t>& sums,
         const std::vector<uintptr_t>& residuals, const std::vector<uintptr_t>& partials,
         const std::vector<int64_t>& numels, float scale, uintptr_t scale_address, int threads) {
        const auto tensors = gather(grads, sums, residuals, partials, numels);
        const py::gil_scoped_release release;
        accumulate_cpu(static_cast<Format>(format), static_cast<Start>(start), tensors, scale_of(scale, scale_address),
                       threads);
      },
      py::arg("format"), py::arg("start"), py::arg("grads"), py::arg("sums"), py::arg("residuals"),
      py::arg("partials"), py::arg("numels"), py::arg("scale"), py::arg("scale_address"), py::arg("threads"));

  module.def(
      "count_roundtrip_failures",
      [](int format, uint64_t first, uint64_t last, int threads) {
        const py::gil_scoped_release release;
        return count_roundtrip_failures(static_cast<Format>(format), first, last, threads);
      },
      py::arg("format"), py::arg("first"), py::arg("last"), py::arg("threads"));

#if defined(ACCUMKERN_CUDA_TARGETS)
  module.attr("cuda_targets") = ACCUMKERN_CUDA_TARGETS;
  module.def(
      "accumulate_cuda",
      [](int format, int start, const std::vector<uintptr_t>& grads, const std::vector<uintptr_t>& sums,
         const std::vector<uintptr_t>& residuals, const std::vector<uintptr_t>& partials,
         const std::vector<int64_t>& numels, float scale, uintptr_t scale_address, int device, uintptr_t stream) {
        const auto tensors = gather(grads, sums, residuals, partials, numels);
        const py::gil_scoped_release release;
        accumulate_cuda(static_cast<Format>(format), static_cast<Start>(start), tensors,
                        scale_of(scale, scale_address), device, stream);
      },
      py::arg("format"), py::arg("start"), py::arg("grads"), py::arg("sums"), py::arg("residuals"),
      py::arg("partials"), py::arg("numels"), py::arg("scale"), py::arg("scale_address"), py::arg("device"),
      py::arg("stream"));
#else
  module.attr("cuda_targets") = py::none();
#endif
}
