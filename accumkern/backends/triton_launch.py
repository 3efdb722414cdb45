"""The launches of the Triton kernels: one for each large tensor, one for all small ones; of a step one for all.

The launch configuration is fixed: the kernels stream memory, and an autotuner would stall the first step to find what
is known beforehand.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate, chain
from typing import Any

import torch
import triton.language as tl
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
    squares_kernel,
    squares_list_kernel,
)
from accumkern.backends.triton_step import STEP_NUMEL, step_kernel, step_list_kernel
from accumkern.formats import Format, Start, partial_rows
from accumkern.updates import MAX_STATES, Update

# The arithmetic is pinned: tl.fma where one rounding is meant, no other product is fused with a sum.
OPTIONS: dict[str, Any] = {"num_warps": 8, "enable_fp_fusion": False}
if torch.version.hip is None:
    OPTIONS["maxnreg"] = 96  # left to itself, the assembler for sm_100 stops at 64 registers and spills
# A tensor of at most this many elements shares a launch with others; a larger one fills the GPU by itself.
SMALL_NUMEL = 65536
#: torch's dtype, or None where a format has no residuals -> Triton's.
DTYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.int8: tl.int8,
    torch.int16: tl.int16,
    None: tl.int8,
}


# What a kernel does not use, residuals or partials, are sums instead: a pointer has to point somewhere.


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
    _launch(
        accumulate_kernel,
        accumulate_list_kernel,
        format_,
        [grads, sums, residuals or sums],
        {"scale": scale},
        partials or sums,
        START=int(start),
        PARTIALS=partials is not None,
    )


def finish(
    format_: Format,
    start: Start,
    sums: list[Tensor],
    residuals: list[Tensor] | None,
    divisor: float | Tensor,
    factor: float | Tensor,
) -> None:
    """Divide, multiply and round each sum; see :class:`accumkern.backends.Kernels`."""
    columns, scalars = [sums, residuals or sums], {"divisor": divisor, "factor": factor}
    _launch(finish_kernel, finish_list_kernel, format_, columns, scalars, START=int(start), RESCALES=False)


def rescale(
    format_: Format,
    start: Start,
    sums: list[Tensor],
    residuals: list[Tensor] | None,
    divisor: float | Tensor,
    factor: float | Tensor,
) -> None:
    """Divide, multiply and store each value; see :class:`accumkern.backends.Kernels`."""
    columns, scalars = [sums, residuals or sums], {"divisor": divisor, "factor": factor}
    _launch(finish_kernel, finish_list_kernel, format_, columns, scalars, START=int(start), RESCALES=True)


def decode(format_: Format, sums: list[Tensor], residuals: list[Tensor] | None, values: list[Tensor]) -> None:
    """Write the FP32 values of each sum; see :class:`accumkern.backends.Kernels`."""
    _launch(decode_kernel, decode_list_kernel, format_, [sums, residuals or sums, values], {})


def encode(
    format_: Format,
    values: list[Tensor],
    divisor: float | Tensor,
    sums: list[Tensor],
    residuals: list[Tensor] | None,
) -> None:
    """Divide FP32 values and store them; see :class:`accumkern.backends.Kernels`."""
    _launch(encode_kernel, encode_list_kernel, format_, [values, sums, residuals or sums], {"divisor": divisor})


def squares(
    format_: Format, start: Start, sums: list[Tensor], residuals: list[Tensor] | None, partials: list[Tensor]
) -> None:
    """Write the sums of squares of each block; see :class:`accumkern.backends.Kernels`."""
    columns = [sums, residuals or sums]
    _launch(squares_kernel, squares_list_kernel, format_, columns, {}, partials, START=int(start))


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
    columns = [weights, weight_residuals, grads, grad_residuals or weights, *states, *absent]
    given = {"divisor": divisor, "factor": factor}
    scalars = _scalars(given)
    constants = {
        "UPDATE": int(update),
        "WEIGHT_FORMAT": int(weight_format),
        "GRAD_FORMAT": int(grad_format),
        "START": int(start),
        "SCALES": any(isinstance(scalar, Tensor) or scalar != 1.0 for scalar in scalars),
    }
    options = {**constants, **_are_pointers(given), **OPTIONS}
    residual_dtypes = {
        "WEIGHT_RESIDUAL_DTYPE": DTYPES[weight_format.residual_dtype],
        "GRAD_RESIDUAL_DTYPE": DTYPES[grad_format.residual_dtype],
    }
    shared = coefficients, *scalars, skip
    device = weights[0].device

    def launch(i: int, numel: int) -> None:
        grid = (max(1, _step_blocks(numel)),)
        step_kernel[grid](*[column[i] for column in columns], numel, i, *shared, **options)

    with _current(device):
        indices = [i for i, weight in enumerate(weights) if weight.numel() > 0]
        if len(indices) < 2 or _is_capturing(device):
            for i in indices:
                launch(i, weights[i].numel())
            return
        _load(step_kernel, device, [*options.values(), skip is None], lambda: launch(indices[0], 0))
        rows: dict[bool, list[list[int]]] = {True: [], False: []}  # the aligned ones are not slowed down by the others
        for i in indices:
            addresses = [column[i].data_ptr() for column in columns]
            is_aligned = all(address % 16 == 0 for address in addresses)
            rows[is_aligned].append([*addresses, weights[i].numel(), i])
        for is_aligned, some in rows.items():
            if some:
                first_blocks = [0, *accumulate(_step_blocks(row[len(columns)]) for row in some)]
                step_list_kernel[first_blocks.pop(),](
                    _on_device([*first_blocks, *chain.from_iterable(some)], device),
                    len(some),
                    *shared,
                    ALIGNED=is_aligned,
                    **residual_dtypes,
                    **options,
                )


def _step_blocks(numel: int) -> int:
    """Return how many programs step a tensor."""
    return -(-numel // STEP_NUMEL)


def _launch(
    kernel: Any,
    list_kernel: Any,
    format_: Format,
    columns: list[list[Tensor]],
    named_scalars: dict[str, float | Tensor],
    partials: list[Tensor] | None = None,
    **constants: int,
) -> None:
    """Launch a kernel on lists of tensors, one for each of its pointers, in their order; partial sums come last."""
    pointers = columns if partials is None else [*columns, partials]
    scalars = _scalars(named_scalars)
    options = {"FORMAT": int(format_), **constants, **_are_pointers(named_scalars), **OPTIONS}
    numels = [tensor.numel() for tensor in columns[0]]
    device = columns[0][0].device

    def launch(i: int, numel: int) -> None:
        grid = (max(1, partial_rows(numel)),)
        kernel[grid](*[column[i] for column in pointers], numel, *scalars, **options)

    with _current(device):
        small, others = _split_by_size(numels, device)
        if small:
            # On no elements, it writes nothing but partial sums of zero, which the list kernel writes again.
            _load(kernel, device, [*options.values()], lambda: launch(small[0], 0))
            addresses = [[column[i].data_ptr() for i in small] for column in pointers]
            small_numels = [numels[i] for i in small]
            list_kernel[len(small), partial_rows(max(small_numels))](
                _on_device(list(chain.from_iterable(zip(*addresses, small_numels, strict=True))), device),
                *scalars,
                SUM_DTYPE=DTYPES[format_.sum_dtype],
                RESIDUAL_DTYPE=DTYPES[format_.residual_dtype],
                # Partial sums are stored one by one.
                ALIGNED=all(address % 16 == 0 for column in addresses[: len(columns)] for address in column),
                **options,
            )
        for i in others:
            launch(i, numels[i])


def _scalars(named: dict[str, float | Tensor]) -> list[float | Tensor]:
    """Return a kernel's scalars as they are passed: numbers, and FP32 tensors."""
    return [s.detach().to(torch.float32) if isinstance(s, Tensor) else float(s) for s in named.values()]


def _are_pointers(named: dict[str, float | Tensor]) -> dict[str, bool]:
    """Return the constants that tell a kernel which of its scalars are tensors."""
    return {f"{name.upper()}_IS_POINTER": isinstance(s, Tensor) for name, s in named.items()}


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it the tensors', where it is not."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return nullcontext()


_loaded: set[tuple[object, ...]] = set()


def _load(kernel: Any, device: torch.device, options: list[Any], launch: Callable[[], None]) -> None:
    """Launch the kernel for one tensor at the first list of its kind, so that it is loaded.

    While a CUDA graph is captured, lists are launched one by one, and no kernel may be loaded then.
    """
    key = (kernel, device, *options)
    if key not in _loaded:
        _loaded.add(key)
        launch()


def _is_capturing(device: torch.device) -> bool:
    """Return whether a CUDA graph is captured: a table's copy would read host memory again at every replay."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _split_by_size(numels: list[int], device: torch.device) -> tuple[list[int], list[int]]:
    """Return the indices of tensors that share a launch, and of those that have one each; empty ones have none."""
    small = [i for i, numel in enumerate(numels) if 0 < numel <= SMALL_NUMEL]
    if len(small) < 2 or _is_capturing(device):
        return [], [i for i, numel in enumerate(numels) if numel > 0]
    return small, [i for i, numel in enumerate(numels) if numel > SMALL_NUMEL]


def _on_device(numbers: list[int], device: torch.device) -> Tensor:
    """Return a kernel's table, int64 on the device, copied there from pinned memory without waiting."""
    table = torch.tensor(numbers, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
    return table.to(device, non_blocking=True)
