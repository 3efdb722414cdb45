"""One fold of a gradient against what torch has: time, bytes moved, bandwidth.

``python benchmarks/bench_kernels.py [--device cpu|cuda] [--quick] [--sizes 2^20,2^25] [--models GPT-2,Llama-1B]``

Single tensors, and the parameter lists of real models. accumkern is called as its hook calls it: the kernel of each
backend, ``accumkern.backends.kernels(name).fold``, without the checks of ``accumkern.accumulate_``. Writes
``benchmarks/results/<machine>/kernels.json`` after each case.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # from a checkout, installed or not

from harness import backends_on, parser, steps, write_growing
from shapes import MODELS, Shape
from tables.kernels import COPY, MUL
from timing import Timing, Variant, allocate, sets_of, time_variants

from accumkern import backends
from accumkern.formats import Format, Start

# Buffer -> format, memory of the residuals, and bytes that a fold reads and writes for each element: gradient, sum and
# residual in; both out.
FORMATS = {
    "split24": (Format.SPLIT24, "int8", 2 + 2 + 1 + 2 + 1),
    "split32": (Format.SPLIT32, "int16", 2 + 2 + 2 + 2 + 2),
    "fp32": (Format.MAIN_GRAD_BFLOAT16, "wide", 2 + 2 + 4 + 2 + 4),
}
COPY_BYTES = 2 + 2
ONE_BY_ONE, AS_A_LIST, AS_ONE_TENSOR = "one by one", "as a list", "as one tensor"

# What is measured by default. A large tensor has many seconds of stock FP32 additions on a CPU, and the list of a large
# model has minutes of them: there they are measured when they are asked for.
SIZES = {
    "cpu": ["2^10", "2^15", "2^20", "2^25"],
    "cuda": ["2^10", "2^15", "2^20", "2^24", "2^28", "2^30"],
}
DEFAULT_MODELS = {"cpu": ["GPT-2"], "cuda": list(MODELS)}
QUICK_SIZES = ["2^20"]
# The eager backend takes 40 times as long as the kernels on a CPU, and a dozen temporary tensors everywhere; larger
# cases leave it out.
EAGER_MAX_NUMEL = {"cpu": 2**20, "cuda": 2**26}
ROUNDS = {"cpu": 11, "cuda": 21}
SECONDS_EACH = 2.5
ALIGNMENT = 256  # elements: each tensor of a list begins at a multiple, as memory of its own would


@dataclass(frozen=True)
class Case:
    """A tensor, or the parameters of a model."""

    name: str
    shapes: list[Shape]

    @property
    def numel(self) -> int:
        """Elements of all tensors."""
        return sum(math.prod(shape) for shape in self.shapes)


class Buffers:
    """The memory that all variants of a case work on in turn: sets of gradients, sums and residuals.

    Variants share it, so that cases may be as large as the memory allows. Each kind is allocated by the first variant
    that needs it: what does not fit is that variant's result. Values stay finite, and their time does not depend on
    them.
    """

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case = case
        self.device = device
        self.sets = sets_of(4 * case.numel, device)  # a copy touches 4 bytes an element, the fewest

    @cached_property
    def grads(self) -> list[list[Tensor]]:
        """Micro-gradients in bfloat16."""
        return self._split(self._flat_grads)

    @cached_property
    def sums(self) -> list[list[Tensor]]:
        """Sums in bfloat16."""
        return self._split(self._flat_sums)

    @cached_property
    def wide(self) -> list[list[Tensor]]:
        """Sums in FP32: stock PyTorch's, and the residuals of ``fp32``."""
        return self._split(self._allocate(torch.float32))

    @cached_property
    def int16(self) -> list[list[Tensor]]:
        """Residuals of ``split32``."""
        return self._split(self._flat_residuals)

    @cached_property
    def int8(self) -> list[list[Tensor]]:
        """Residuals of ``split24``, in the memory of the others: every integer is one."""
        return self._split(self._flat_residuals.view(torch.int8)[: self._numel])

    @cached_property
    def flat(self) -> list[tuple[Tensor, Tensor]]:
        """Sum and gradients of each set, as one tensor each."""
        return list(zip(self._flat_sums.chunk(self.sets), self._flat_grads.chunk(self.sets), strict=True))

    @cached_property
    def _flat_grads(self) -> Tensor:
        return self._allocate(torch.bfloat16)

    @cached_property
    def _flat_sums(self) -> Tensor:
        return self._allocate(torch.bfloat16)

    @cached_property
    def _flat_residuals(self) -> Tensor:
        return self._allocate(torch.int16)

    @property
    def _strides(self) -> list[int]:
        return [-(-math.prod(shape) // ALIGNMENT) * ALIGNMENT for shape in self.case.shapes]

    @property
    def _numel(self) -> int:
        return self.sets * sum(self._strides)

    def _allocate(self, dtype: torch.dtype) -> Tensor:
        return allocate(self._numel, dtype, self.device)

    def _split(self, flat: Tensor) -> list[list[Tensor]]:
        """Return the tensors of each set."""
        pieces = iter(flat.split(self._strides * self.sets))
        return [[next(pieces)[: math.prod(shape)].view(shape) for shape in self.case.shapes] for _ in range(self.sets)]


Run = Callable[[int], object]  # does an operation once, on the set of buffers of this number


@dataclass(frozen=True)
class Operation:
    """One way to add gradients to sums.

    Attributes:
        variant: its name.
        called: whether a list of tensors takes a call for each, or one for all.
        buffer: accumkern's kind of buffer; None is torch's own way.
        backend: accumkern's, or ``torch``.
        bytes_per_element: what it must read and write.
        on: allocates what it needs of the shared memory, and returns the operation on it.
    """

    variant: str
    called: str
    buffer: str | None
    backend: str
    bytes_per_element: int
    on: Callable[[Buffers], Run]


def folds(case: Case, device: torch.device) -> list[Operation]:
    """Return accumkern's operations: each buffer, on each backend that runs there."""
    return [
        Operation(f"{buffer} {name}", called, buffer, name, moved, partial(fold, format_, memory, name, called))
        for buffer, (format_, memory, moved) in FORMATS.items()
        for name in backends_on(device)
        if name != "eager" or case.numel <= EAGER_MAX_NUMEL[device.type]
        for called in ([ONE_BY_ONE, AS_A_LIST] if len(case.shapes) > 1 else [AS_ONE_TENSOR])
    ]


def fold(format_: Format, memory: str, backend: str, called: str, buffers: Buffers) -> Run:
    """Return a fold of a set's gradients, as the hook does it."""
    kernel = backends.kernels(backend).fold
    grads, sums, residuals = buffers.grads, buffers.sums, getattr(buffers, memory)

    def all_at_once(i: int) -> None:
        kernel(format_, Start.CONTINUE, grads[i], sums[i], residuals[i], 1.0, None)

    def one_by_one(i: int) -> None:
        for grad, total, residual in zip(grads[i], sums[i], residuals[i], strict=True):
            kernel(format_, Start.CONTINUE, [grad], [total], [residual], 1.0, None)

    return one_by_one if called == ONE_BY_ONE else all_at_once


def stock(case: Case) -> list[Operation]:
    """Return torch's own ways."""
    single = len(case.shapes) == 1
    one_by_one, as_a_list = (AS_ONE_TENSOR, AS_ONE_TENSOR) if single else (ONE_BY_ONE, AS_A_LIST)
    # One kernel serves single tensors of all sizes; the code for a list is made for its shapes.
    compiled = torch.compile(torch_add_all, fullgraph=True, dynamic=single)

    def make(variant: str, called: str, moved: int, add: AddLists, memory: str) -> Operation:
        return Operation(variant, called, None, "torch", moved, partial(on_lists, add, memory))

    return [
        make("bf16.add_(bf16)", one_by_one, 6, add_each, "sums"),
        make("_foreach_add_(bf16, bf16)", as_a_list, 6, torch_add_all, "sums"),
        make("torch.compile(bf16 += bf16)", as_a_list, 6, compiled, "sums"),
        make("fp32.add_(bf16)", one_by_one, 10, add_each, "wide"),
        make("fp32.add_(bf16.float())", one_by_one, 6 + 12, add_each_converted, "wide"),
        make("_foreach_add_(fp32, bf16)", as_a_list, 10, torch_add_all, "wide"),
        make("torch.compile(fp32 += bf16)", as_a_list, 10, compiled, "wide"),
        Operation(COPY, AS_ONE_TENSOR, None, "torch", COPY_BYTES, copy),
        Operation(MUL, AS_ONE_TENSOR, None, "torch", COPY_BYTES, multiply),
    ]


AddLists = Callable[[list[Tensor], list[Tensor]], object]


def add_each(sums: list[Tensor], grads: list[Tensor]) -> None:
    """Add each gradient to its sum."""
    for total, grad in zip(sums, grads, strict=True):
        total.add_(grad)


def add_each_converted(sums: list[Tensor], grads: list[Tensor]) -> None:
    """Add each gradient, converted to FP32 first, to its sum."""
    for total, grad in zip(sums, grads, strict=True):
        total.add_(grad.float())


def torch_add_all(sums: list[Tensor], grads: list[Tensor]) -> None:
    """Add all gradients to their sums in one call."""
    torch._foreach_add_(sums, grads)


def on_lists(add: AddLists, memory: str, buffers: Buffers) -> Run:
    """Return an addition of a set's gradients to sums in ``memory``."""
    grads, sums = buffers.grads, getattr(buffers, memory)
    return lambda i: add(sums[i], grads[i])


def copy(buffers: Buffers) -> Run:
    """Return the copy of all gradients of a set in one call."""
    flat = buffers.flat
    return lambda i: flat[i][0].copy_(flat[i][1])


def multiply(buffers: Buffers) -> Run:
    """Return the same by a kernel: on a GPU a copy may be none, but a memcpy."""
    flat = buffers.flat
    return lambda i: torch.mul(flat[i][1], 1, out=flat[i][0])


def main() -> None:
    """Measure every case and write the file."""
    options = parser(__doc__)
    options.add_argument("--sizes", help="elements of a single tensor, as 2^20,2^25; 'none' for no such case")
    options.add_argument("--models", help=f"of {', '.join(MODELS)}; 'none' for no such case")
    arguments = options.parse_args()
    device = torch.device(arguments.device)
    rounds = 3 if arguments.quick else ROUNDS[device.type]
    cases = chosen_cases(options, arguments)

    method = {
        "how": "benchmarks/timing.py; all variants of a case in one run, by turns",
        "rounds": rounds,
        "backend": backends.choose(None, device),
        "accumkern_is_called_as": "accumkern.backends.kernels(backend).fold, which the hook calls, without checks",
        "bandwidth": "bytes that the operation must read and write, over the median time",
        "roof": "copy_ of as many elements in one tensor, and torch.mul(x, 1, out=y): a kernel on any device",
        "left_out": f"the eager backend above {EAGER_MAX_NUMEL[device.type]:,} elements, by rule",
    }
    write_growing(arguments, "kernels", method, measured(cases, device, rounds))


def measured(cases: list[Case], device: torch.device, rounds: int) -> Iterator[list[dict[str, Any]]]:
    """Measure each case; yield all results until then."""
    results: list[dict[str, Any]] = []
    for case in cases:
        yield (results := [*results, *measure(case, device, rounds)])


def chosen_cases(options: argparse.ArgumentParser, arguments: argparse.Namespace) -> list[Case]:
    """Return the cases that the command line names, or those that its device has by default."""
    sizes = QUICK_SIZES if arguments.quick else SIZES[arguments.device]
    models = [] if arguments.quick else DEFAULT_MODELS[arguments.device]
    if arguments.sizes is not None:
        sizes = [] if arguments.sizes == "none" else arguments.sizes.split(",")
    if arguments.models is not None:
        models = [] if arguments.models == "none" else arguments.models.split(",")
    unknown = set(models) - set(MODELS)
    if unknown:
        options.error(f"--models has {', '.join(sorted(unknown))}; there are {', '.join(MODELS)}")
    return [Case(size, [(parse_size(size),)]) for size in sizes] + [Case(name, MODELS[name]) for name in models]


def parse_size(text: str) -> int:
    """Return 1048576 for ``2^20`` or ``1048576``."""
    base, _, exponent = text.strip().partition("^")
    return int(base) ** int(exponent) if exponent else int(base)


def measure(case: Case, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """Return one result for each operation on a case."""
    torch._dynamo.reset()  # each case compiles for its own shapes
    buffers = Buffers(case, device)
    operations = {(o.variant, o.called): o for o in [*folds(case, device), *stock(case)]}

    def variant(operation: Operation) -> Variant:
        return Variant(operation.on(buffers), buffers.sets, operation.bytes_per_element * case.numel)

    makers = {key: partial(variant, operation) for key, operation in operations.items()}
    with steps(f"kernels, {case.name}") as on_step:
        timings = time_variants(makers, device, rounds, SECONDS_EACH, on_step)

    chosen = f"split24 {backends.choose(None, device)}"
    split24 = [t.median_ms for (name, _), t in timings.items() if name == chosen and isinstance(t, Timing)]
    roofs = {"fraction_of_copy": timings[COPY, AS_ONE_TENSOR], "fraction_of_mul": timings[MUL, AS_ONE_TENSOR]}
    results = []
    for key, operation in operations.items():
        timing = timings[key]
        result: dict[str, Any] = {"case": case.name, "tensors": len(case.shapes), "numel": case.numel}
        labels = ("variant", "called", "buffer", "backend", "bytes_per_element")
        result |= {label: getattr(operation, label) for label in labels}
        if isinstance(timing, Timing):
            gb_per_s = operation.bytes_per_element * case.numel / timing.median_ms / 1e6
            result |= {**asdict(timing), "gb_per_s": gb_per_s}
            for fraction, roof in roofs.items():
                if isinstance(roof, Timing):
                    result[fraction] = gb_per_s / (COPY_BYTES * case.numel / roof.median_ms / 1e6)
            if split24:
                result["time_over_split24"] = timing.median_ms / min(split24)
        else:
            result["error"] = timing
        results.append(result)
    return results


if __name__ == "__main__":
    main()
