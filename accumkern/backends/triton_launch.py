"""The launches of the Triton kernels: one for a list of tensors, whatever their sizes and alignment.

The launch configuration is fixed: the kernels stream memory, and an autotuner would stall the first step to find what
is known beforehand.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate, chain
from math import gcd
from typing import Any

import torch
from torch import Tensor

from accumkern.backends.triton_kernels import (
    accumulate_kernel,
    accumulate_list_kernel,
    decode_kernel,
    decode_list_kernel,
    encode_kernel,
    encode_list_kernel,
    finish_kernel,
    finish_list_kernel,
    mean_kernel,
    norm_kernel,
    squares_kernel,
    squares_list_kernel,
)
from accumkern.backends.triton_step import STEP_NUMEL, step_kernel, step_list_kernel
from accumkern.formats import BLOCK_NUMEL, Format, Start, partial_rows
from accumkern.updates import MAX_STATES, Update

# The arithmetic is pinned: tl.fma where one rounding is meant, no other product is fused with a sum.
OPTIONS: dict[str, Any] = {"num_warps": 8, "enable_fp_fusion": False}
if torch.version.hip is None:
    OPTIONS["maxnreg"] = 96  # left to itself, the assembler for sm_100 stops at 64 registers and spills
NORM_OPTIONS = OPTIONS | {"num_warps": 16}  # a single program, which mostly waits for memory


# What a kernel does not use, residuals or partials, are sums or zeros instead.


def fold(
    format_: Format,
    start: Start,
    grads: list[Tensor],
    sums: list[Tensor],
    residuals: list[Tensor] | None,
    scale: float | Tensor,
    partials: list[Tensor] | None,
) -> None:
    """Fold each gradient into its sum; see :class:`accumkern.backends.Kernels`."""
    addresses = [0] * len(sums) if partials is None else list(map(Tensor.data_ptr, partials))
    constants = int(format_), int(start), partials is not None, isinstance(scale, Tensor)
    tensors, kernels = [grads, sums, residuals or sums], (accumulate_kernel, accumulate_list_kernel)
    _launch(*kernels, tensors, [addresses], [_scalar(scale)], constants)


def finish(
    format_: Format,
    start: Start,
    sums: list[Tensor],
    residuals: list[Tensor] | None,
    divisor: float | Tensor,
    factor: float | Tensor,
) -> None:
    """Divide, multiply and round each sum; see :class:`accumkern.backends.Kernels`."""
    _finish(format_, start, sums, residuals, divisor, factor, rescales=False)


def rescale(
    format_: Format,
    start: Start,
    sums: list[Tensor],
    residuals: list[Tensor] | None,
    divisor: float | Tensor,
    factor: float | Tensor,
) -> None:
    """Divide, multiply and store each value; see :class:`accumkern.backends.Kernels`."""
    _finish(format_, start, sums, residuals, divisor, factor, rescales=True)


def _finish(
    format_: Format,
    start: Start,
    sums: list[Tensor],
    residuals: list[Tensor] | None,
    divisor: float | Tensor,
    factor: float | Tensor,
    rescales: bool,
) -> None:
    constants = int(format_), int(start), rescales, isinstance(divisor, Tensor), isinstance(factor, Tensor)
    scalars = [_scalar(divisor), _scalar(factor)]
    _launch(finish_kernel, finish_list_kernel, [sums, residuals or sums], [], scalars, constants)


def decode(format_: Format, sums: list[Tensor], residuals: list[Tensor] | None, values: list[Tensor]) -> None:
    """Write the FP32 values of each sum; see :class:`accumkern.backends.Kernels`."""
    _launch(decode_kernel, decode_list_kernel, [sums, residuals or sums, values], [], [], (int(format_),))


def encode(
    format_: Format,
    values: list[Tensor],
    divisor: float | Tensor,
    sums: list[Tensor],
    residuals: list[Tensor] | None,
) -> None:
    """Divide FP32 values and store them; see :class:`accumkern.backends.Kernels`."""
    tensors, constants = [values, sums, residuals or sums], (int(format_), isinstance(divisor, Tensor))
    _launch(encode_kernel, encode_list_kernel, tensors, [], [_scalar(divisor)], constants)


def squares(
    format_: Format, start: Start, sums: list[Tensor], residuals: list[Tensor] | None, partials: Tensor
) -> None:
    """Write the sums of squares of each block; see :class:`accumkern.backends.Kernels`."""
    rows = accumulate((partial_rows(total.numel()) for total in sums[:-1]), initial=0)
    address, row_bytes = partials.data_ptr(), partials.element_size()
    addresses = [address + row * row_bytes for row in rows]
    constants = int(format_), int(start)
    _launch(squares_kernel, squares_list_kernel, [sums, residuals or sums], [addresses], [], constants)


def norm(partials: Tensor, divisor: float | Tensor, max_norm: float | None, results: Tensor, nonfinite: Tensor) -> None:
    """Write a norm, its clip coefficient and whether it is finite; see :class:`accumkern.backends.Kernels`."""
    constants = isinstance(divisor, Tensor), max_norm is not None
    limit = 1.0 if max_norm is None else float(max_norm)
    arguments = partials, partials.numel(), _scalar(divisor), limit, results, nonfinite
    with _current(partials.device):
        _run(norm_kernel, partials.device, 1, arguments, constants, NORM_OPTIONS)


def mean(
    format_: Format,
    sums: Tensor,
    residuals: Tensor,
    divisor: float | Tensor,
    out_sum: Tensor,
    out_residual: Tensor,
) -> None:
    """Add up what ranks have, in their order, divide and store; see :class:`accumkern.backends.Kernels`."""
    device, (ranks, numel) = sums.device, sums.shape
    if numel == 0:
        return
    read = sums.data_ptr(), residuals.data_ptr(), *(x.stride(0) * x.element_size() for x in (sums, residuals))
    written = out_sum.data_ptr(), out_residual.data_ptr()
    constants = gcd(16, *read, *written) == 16, int(format_), isinstance(divisor, Tensor)
    with _current(device):
        arguments = *read, ranks, numel, *written, _scalar(divisor)
        _run(mean_kernel, device, partial_rows(numel), arguments, constants)


def step(
    update: Update,
    weight_format: Format,
    grad_format: Format,
    start: Start,
    weights: list[Tensor],
    weight_residuals: list[Tensor],
    grads: list[Tensor],
    grad_residuals: list[Tensor] | None,
    states: list[list[Tensor]],
    coefficients: Tensor,
    divisor: float | Tensor,
    factor: float | Tensor,
    skip: Tensor | None,
) -> None:
    """Update each weight; see :class:`accumkern.backends.Kernels`."""
    # A list of states that the update does not have, or residuals that are not read, are weights instead.
    absent = [weights] * (MAX_STATES - len(states))
    tensors = [weights, weight_residuals, grads, grad_residuals or weights, *states, *absent]
    are_tensors = isinstance(divisor, Tensor), isinstance(factor, Tensor)
    scales = any(are_tensors) or (divisor, factor) != (1.0, 1.0)
    formats = int(weight_format), int(grad_format)
    constants = int(update), *formats, int(start), scales, skip is not None, *are_tensors
    shared = [coefficients, _scalar(divisor), _scalar(factor), coefficients if skip is None else skip]
    rows = range(len(weights))
    _launch(step_kernel, step_list_kernel, tensors, [rows], shared, constants, STEP_NUMEL)


def _launch(
    kernel: Any,
    list_kernel: Any,
    tensors: list[list[Tensor]],
    numbers: list[Sequence[int]],
    shared: list[Any],
    constants: tuple[int, ...],
    block_numel: int = BLOCK_NUMEL,
) -> None:
    """Launch a kernel on lists of tensors.

    Args:
        kernel: for one tensor: takes its addresses, its length, more numbers, what all share, and constants.
        list_kernel: for several, whose addresses, lengths and numbers are in a table.
        tensors: a list for each address.
        numbers: a list for each of the other numbers.
        shared: what all tensors share.
        constants: of the kernels, in their order.
        block_numel: elements of a program.
    """
    device, addresses = tensors[0][0].device, len(tensors)
    numels = [tensor.numel() for tensor in tensors[0]]
    columns = [*[list(map(Tensor.data_ptr, column)) for column in tensors], numels, *numbers]
    with _current(device):
        if len(numels) == 1 or _is_capturing(device):
            for row in zip(*columns, strict=True):
                if row[addresses] > 0:
                    of_row = gcd(16, *row[:addresses]) == 16, *constants
                    _run(kernel, device, -(-row[addresses] // block_numel), (*row, *shared), of_row)
            return
        for is_aligned, some in _by_alignment(columns, addresses):
            # A grid takes 2**31 - 1 programs, which no memory reaches: they would do 8 TiB of weights.
            first_blocks = list(accumulate([-(-numel // block_numel) for numel in some[addresses]], initial=0))
            blocks = first_blocks.pop()
            if blocks > 0:
                _load(kernel, device, (*[0] * len(some), *shared), (is_aligned, *constants))
                table = _on_device([*first_blocks, *chain(*some)], device)
                arguments = table, len(first_blocks), *shared
                _run(list_kernel, device, blocks, arguments, (is_aligned, *constants))


def _by_alignment(columns: list[Sequence[int]], addresses: int) -> list[tuple[bool, list[Sequence[int]]]]:
    """Return [(whether all addresses are multiples of 16, columns)]: those that are not would slow down the others."""
    if gcd(16, *chain(*columns[:addresses])) == 16:
        return [(True, columns)]
    rows: dict[bool, list[tuple[int, ...]]] = {True: [], False: []}
    for row in zip(*columns, strict=True):
        rows[gcd(16, *row[:addresses]) == 16].append(row)
    return [(is_aligned, list(zip(*some, strict=True))) for is_aligned, some in rows.items() if some]


def _scalar(scalar: float | Tensor) -> float | Tensor:
    """Return a kernel's scalar as it is passed: a number, or an FP32 tensor."""
    return scalar.detach().to(torch.float32) if isinstance(scalar, Tensor) else float(scalar)


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it the tensors', where it is not."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return nullcontext()


# (kernel, device, constants) -> what Triton made of it, or None in its interpreter. There is one for all arguments.
_compiled: dict[tuple[Any, ...], Any] = {}


def _run(
    kernel: Any,
    device: torch.device,
    programs: int,
    arguments: tuple[Any, ...],
    constants: tuple[int, ...],
    options: dict[str, Any] = OPTIONS,
) -> None:
    """Launch a kernel: from the second time on, without asking Triton which machine code is the right one."""
    key = kernel, device, constants
    compiled = _compiled.get(key)
    if compiled is None:
        _compiled[key] = kernel[programs,](*arguments, *constants, **options)
    else:
        compiled[programs, 1, 1](*arguments, *constants)


def _load(kernel: Any, device: torch.device, arguments: tuple[Any, ...], constants: tuple[int, ...]) -> None:
    """Launch the kernel for one tensor on no elements at the first list of its kind, so that it is loaded.

    While a CUDA graph is captured, lists are launched one by one, and no kernel may be loaded then.
    """
    if (kernel, device, constants) not in _compiled:
        _run(kernel, device, 1, arguments, constants)


def _is_capturing(device: torch.device) -> bool:
    """Return whether a CUDA graph is captured: a table's copy would read host memory again at every replay."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _on_device(numbers: list[int], device: torch.device) -> Tensor:
    """Return a kernel's table, int64 on the device, copied there from pinned memory without waiting."""
    table = torch.frombuffer(array("q", numbers), dtype=torch.int64)
    if device.type == "cuda":
        table = table.pin_memory()
    return table.to(device, non_blocking=True)
