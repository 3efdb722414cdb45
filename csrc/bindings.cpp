// The Python module accumkern.backends._C: the only file that knows pybind11. Tensors cross as addresses, so one build serves
// every version of torch; accumkern/ops.py has checked them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cerrno>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "accumulate.h"
#include "fold_into.h"
#include "tensors.h"
#if defined(__linux__)
#include <sys/uio.h>
#include <unistd.h>
#endif

namespace py = pybind11;
using namespace accumkern;

namespace {

// Tensors cross as one list of numbers, column after column: the addresses of what a FoldTensor has, kAbsent in a column
// that the kernel does not use, and the numbers of elements.
constexpr size_t kColumns = 5;
constexpr int64_t kAbsent = -1;

void* pointer_of(int64_t address, int64_t numel) {
  if (address == 0 && numel > 0) {
    throw std::runtime_error("accumkern: a tensor has no memory, as torch's immutable ZeroTensors; clone() it first");
  }
  return address == kAbsent ? nullptr : reinterpret_cast<void*>(address);
}

std::vector<FoldTensor> tensors_of(const std::vector<int64_t>& table) {
  if (table.size() % kColumns != 0) throw std::invalid_argument("accumkern.backends._C: columns differ in length");
  const size_t count = table.size() / kColumns;
  std::vector<FoldTensor> tensors(count);
  for (size_t i = 0; i < count; ++i) {
    const int64_t numel = table[4 * count + i];
    const auto pointer = [&](size_t column) { return pointer_of(table[column * count + i], numel); };
    tensors[i] = {pointer(0), pointer(1), pointer(2), static_cast<float*>(pointer(3)), numel};
  }
  return tensors;
}

// The same, with room for a number of each block, tensor after tensor.
std::vector<FoldTensor> tensors_of(const std::vector<int64_t>& table, float* partials) {
  std::vector<FoldTensor> tensors = tensors_of(table);
  for (FoldTensor& tensor : tensors) {
    tensor.partials = partials;
    partials += (tensor.numel + kBlockNumel - 1) / kBlockNumel;
  }
  return tensors;
}

// The same for a step: seven columns of addresses and the numbers of elements, and a row of coefficients for each tensor.
std::vector<StepTensor> step_tensors_of(const std::vector<int64_t>& table, uintptr_t coefficients) {
  constexpr size_t kStepColumns = 8;
  if (table.size() % kStepColumns != 0) throw std::invalid_argument("accumkern.backends._C: columns differ in length");
  const size_t count = table.size() / kStepColumns;
  std::vector<StepTensor> tensors(count);
  for (size_t i = 0; i < count; ++i) {
    const auto pointer = [&](size_t column) -> void* { return pointer_of(table[column * count + i], table[7 * count + i]); };
    const auto state = [&](size_t index) { return static_cast<float*>(pointer(4 + index)); };
    tensors[i] = {pointer(0), pointer(1), pointer(2), pointer(3), {state(0), state(1), state(2)}, table[7 * count + i],
                  reinterpret_cast<const float*>(coefficients) + kCoefficients * i};
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

void step(const StepCall& call, int device, uintptr_t threads_or_stream) {
  const py::gil_scoped_release release;
  if (device < 0) return step_cpu(call, static_cast<int>(threads_or_stream));
#if defined(ACCUMKERN_CUDA_TARGETS)
  step_cuda(call, device, threads_or_stream);
#else
  throw std::runtime_error("accumkern: built without CUDA kernels");
#endif
}

void norm(const NormCall& call, int device, uintptr_t threads_or_stream) {
  if (device < 0) return norm_cpu(call);  // so short that nobody needs to be let in
  const py::gil_scoped_release release;
#if defined(ACCUMKERN_CUDA_TARGETS)
  norm_cuda(call, device, threads_or_stream);
#else
  throw std::runtime_error("accumkern: built without CUDA kernels");
#endif
}

void mean(const MeanCall& call, int device, uintptr_t threads_or_stream) {
  const py::gil_scoped_release release;
  if (device < 0) return mean_cpu(call, static_cast<int>(threads_or_stream));
#if defined(ACCUMKERN_CUDA_TARGETS)
  mean_cuda(call, device, threads_or_stream);
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

PyMethodDef layout_method = {"layout", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&layout)), METH_FASTCALL,
                             "layout(*lists): bytes that are equal where all of their tensors lie alike, wherever in memory."};

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "accumkern's compiled kernels, on raw addresses";
  module.attr("version") = ACCUMKERN_VERSION;
  module.attr("sources") = ACCUMKERN_SOURCES;
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

  for (const auto& [name, kernel] : {std::pair{"FOLD", Kernel::kFold}, {"FINISH", Kernel::kFinish}, {"RESCALE", Kernel::kRescale},
                                     {"DECODE", Kernel::kDecode}, {"ENCODE", Kernel::kEncode}}) {
    module.attr(name) = static_cast<int>(kernel);
  }
  module.def("read_tensors_of", [](const py::object& type) { read_tensors_of(type.ptr()); }, py::arg("type"));
  module.attr("layout") = py::reinterpret_steal<py::object>(PyCFunction_New(&layout_method, nullptr));
  module.def(
      "fold_into",
      [](int format, int start, const py::object& total, const py::object& residual, const py::object& threads) {
        PyObject* function = fold_into(format, start, total.ptr(), residual.ptr(), threads.ptr());
        if (function == nullptr) throw py::error_already_set();
        return py::reinterpret_steal<py::object>(function);
      },
      py::arg("format"), py::arg("start"), py::arg("total"), py::arg("residual"), py::arg("threads"));
  module.def(
      "fold_alike",
      [](int format, const py::object& grads, const py::object& sums, const py::object& residuals, float scale, int device,
         uintptr_t threads_or_stream) {
        auto tensors = read_alike(grads.ptr(), sums.ptr(), residuals.ptr());
        if (!tensors) return false;
        run({Kernel::kFold, static_cast<Format>(format), Start::kContinue, std::move(*tensors), {scale, nullptr}, {1.0f, nullptr}},
            device, threads_or_stream);
        return true;
      },
      py::arg("format"), py::arg("grads"), py::arg("sums"), py::arg("residuals"), py::arg("scale"), py::arg("device"),
      py::arg("threads_or_stream"));
  module.def(
      "run",
      [](int kernel, int format, int start, const std::vector<int64_t>& table, ScalarPair scalar, ScalarPair factor,
         int device, uintptr_t threads_or_stream) {
        run({static_cast<Kernel>(kernel), static_cast<Format>(format), static_cast<Start>(start), tensors_of(table), scalar_of(scalar),
             scalar_of(factor)},
            device, threads_or_stream);
      },
      py::arg("kernel"), py::arg("format"), py::arg("start"), py::arg("table"), py::arg("scalar"), py::arg("factor"),
      py::arg("device"), py::arg("threads_or_stream"));

  module.def(
      "squares",
      [](int format, int start, const std::vector<int64_t>& table, uintptr_t partials, int device, uintptr_t threads_or_stream) {
        run({Kernel::kSquares, static_cast<Format>(format), static_cast<Start>(start),
             tensors_of(table, reinterpret_cast<float*>(partials)), {}, {}},
            device, threads_or_stream);
      },
      py::arg("format"), py::arg("start"), py::arg("table"), py::arg("partials"), py::arg("device"),
      py::arg("threads_or_stream"));

  module.def(
      "step",
      [](int update, int weight_format, int grad_format, int start, const std::vector<int64_t>& table,
         uintptr_t coefficients, ScalarPair divisor, ScalarPair factor, uintptr_t skip, int device,
         uintptr_t threads_or_stream) {
        step({static_cast<Update>(update), static_cast<Format>(weight_format), static_cast<Format>(grad_format),
              static_cast<Start>(start), step_tensors_of(table, coefficients), scalar_of(divisor), scalar_of(factor),
              reinterpret_cast<const float*>(skip)},
             device, threads_or_stream);
      },
      py::arg("update"), py::arg("weight_format"), py::arg("grad_format"), py::arg("start"), py::arg("table"),
      py::arg("coefficients"), py::arg("divisor"), py::arg("factor"), py::arg("skip"), py::arg("device"),
      py::arg("threads_or_stream"));

  module.def(
      "norm",
      [](uintptr_t partials, int64_t count, ScalarPair divisor, std::optional<float> max_norm, uintptr_t results,
         uintptr_t nonfinite, int device, uintptr_t threads_or_stream) {
        norm({reinterpret_cast<const float*>(partials), count, scalar_of(divisor), max_norm.has_value(),
              max_norm.value_or(1.0f), reinterpret_cast<float*>(results), reinterpret_cast<bool*>(nonfinite)},
             device, threads_or_stream);
      },
      py::arg("partials"), py::arg("count"), py::arg("divisor"), py::arg("max_norm"), py::arg("results"),
      py::arg("nonfinite"), py::arg("device"), py::arg("threads_or_stream"));

  module.def(
      "mean",
      [](int format, int64_t sums, int64_t sum_stride, int64_t residuals, int64_t residual_stride, int64_t ranks, int64_t numel,
         ScalarPair divisor, int64_t out_sum, int64_t out_residual, int device, uintptr_t threads_or_stream) {
        mean({static_cast<Format>(format), pointer_of(sums, numel), sum_stride, pointer_of(residuals, numel), residual_stride,
              ranks, numel, scalar_of(divisor), pointer_of(out_sum, numel), pointer_of(out_residual, numel)},
             device, threads_or_stream);
      },
      py::arg("format"), py::arg("sums"), py::arg("sum_stride"), py::arg("residuals"), py::arg("residual_stride"),
      py::arg("ranks"), py::arg("numel"), py::arg("divisor"), py::arg("out_sum"), py::arg("out_residual"),
      py::arg("device"), py::arg("threads_or_stream"));

#if defined(ACCUMKERN_CUDA_TARGETS)
  module.attr("cuda_targets") = ACCUMKERN_CUDA_TARGETS;
  module.def("cuda_problem", &cuda_problem, py::arg("device"));
#else
  module.attr("cuda_targets") = py::none();
#endif
}
