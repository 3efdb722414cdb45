"""The compiled backends: the CPU and CUDA kernels of csrc/, through the extension module accumkern.backends._C."""

from __future__ import annotations

from collections.abc import Callable
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from accumkern.backends import _C  # type: ignore[attr-defined]
from accumkern.formats import Format, Start
from accumkern.torch_private import current_raw_stream
from accumkern.updates import MAX_STATES, Update

_Column = list[Tensor] | None


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
    _run(_C.FOLD, format_, start, grads, sums, residuals, partials, scale)


def fold_into(
    format_: Format, start: Start, total: Tensor, residual: Tensor | None
) -> Callable[[Tensor, Tensor, int, Any], bool]:
    """Return a function that folds into a sum; see :class:`accumkern.backends.Kernels`."""
    return _C.fold_into(format_, start, total, residual, torch.get_num_threads)


def fold_alike(
    format_: Format, grads: list[Tensor], sums: list[Tensor], residuals: list[Tensor] | None, scale: float
) -> bool:
    """Fold if all tensors are as they mostly are; see :class:`accumkern.backends.Kernels`."""
    if residuals is not None and type(residuals[0]) is Tensor and residuals[0].dtype is not format_.residual_dtype:
        return False
    return _C.fold_alike(format_, grads, sums, residuals, scale, *_place(sums[0]))


def finish(
    format_: Format,
    start: Start,
    sums: list[Tensor],
    residuals: list[Tensor] | None,
    divisor: float | Tensor,
    factor: float | Tensor,
) -> None:
    """Divide, multiply and round each sum; see :class:`accumkern.backends.Kernels`."""
    _run(_C.FINISH, format_, start, None, sums, residuals, None, divisor, factor)


def rescale(
    format_: Format,
    start: Start,
    sums: list[Tensor],
    residuals: list[Tensor] | None,
    divisor: float | Tensor,
    factor: float | Tensor,
) -> None:
    """Divide, multiply and store each value; see :class:`accumkern.backends.Kernels`."""
    _run(_C.RESCALE, format_, start, None, sums, residuals, None, divisor, factor)


def decode(format_: Format, sums: list[Tensor], residuals: list[Tensor] | None, values: list[Tensor]) -> None:
    """Write the FP32 values of each sum; see :class:`accumkern.backends.Kernels`."""
    _run(_C.DECODE, format_, Start.CONTINUE, sums, values, residuals, None)


def encode(
    format_: Format,
    values: list[Tensor],
    divisor: float | Tensor,
    sums: list[Tensor],
    residuals: list[Tensor] | None,
) -> None:
    """Divide FP32 values and store them; see :class:`accumkern.backends.Kernels`."""
    _run(_C.ENCODE, format_, Start.CONTINUE, values, sums, residuals, None, divisor)


def squares(
    format_: Format, start: Start, sums: list[Tensor], residuals: list[Tensor] | None, partials: Tensor
) -> None:
    """Write the sums of squares of each block; see :class:`accumkern.backends.Kernels`."""
    table = _table([None, sums, residuals, None], sums)
    _C.squares(format_, start, table, partials.data_ptr(), *_place(sums[0]))


def norm(partials: Tensor, divisor: float | Tensor, max_norm: float | None, results: Tensor, nonfinite: Tensor) -> None:
    """Write norm, clip coefficient and whether the norm is not finite; see :class:`accumkern.backends.Kernels`."""
    pair, kept = _pair(divisor)
    written = results.data_ptr(), nonfinite.data_ptr()
    _C.norm(partials.data_ptr(), partials.numel(), pair, max_norm, *written, *_place(partials))
    del kept


def mean(
    format_: Format,
    sums: Tensor,
    residuals: Tensor,
    divisor: float | Tensor,
    out_sum: Tensor,
    out_residual: Tensor,
) -> None:
    """Add up what ranks have, in their order, divide and store; see :class:`accumkern.backends.Kernels`."""
    pair, kept = _pair(divisor)
    read = sums.data_ptr(), sums.stride(0), residuals.data_ptr(), residuals.stride(0), *sums.shape
    _C.mean(format_, *read, pair, out_sum.data_ptr(), out_residual.data_ptr(), *_place(sums))
    del kept


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
    columns = [weights, weight_residuals, grads, grad_residuals, *states, *[None] * (MAX_STATES - len(states))]
    table = _table(columns, weights)
    (divisor_pair, kept), (factor_pair, kept_too) = _pair(divisor), _pair(factor)
    skip_address = 0 if skip is None else skip.data_ptr()
    formats = update, weight_format, grad_format, start
    _C.step(*formats, table, coefficients.data_ptr(), divisor_pair, factor_pair, skip_address, *_place(weights[0]))
    del kept, kept_too


_address, _numel = Tensor.data_ptr, Tensor.numel
_ABSENT = -1


def _run(
    kernel: int,
    format_: Format,
    start: Start,
    grads: _Column,
    sums: list[Tensor],
    residuals: _Column,
    partials: _Column,
    scalar: float | Tensor = 1.0,
    factor: float | Tensor = 1.0,
) -> None:
    """Run a kernel on the columns of a FoldTensor (csrc/accumulate.h), those that it does not use None."""
    table = _table([grads, sums, residuals, partials], sums)
    (scalar_pair, kept), (factor_pair, kept_too) = _pair(scalar), _pair(factor)
    _C.run(kernel, format_, start, table, scalar_pair, factor_pair, *_place(sums[0]))
    del kept, kept_too


def _table(columns: list[_Column], sized: list[Tensor]) -> list[int]:
    """Return columns of addresses, and the numbers of elements."""
    table: list[int] = []
    for column in columns:
        table += map(_address, column) if column is not None else repeat(_ABSENT, len(sized))
    table += map(_numel, sized)
    return table


def _pair(scalar: float | Tensor) -> tuple[tuple[float, int], Tensor | None]:
    """Return a factor as it crosses, (value, address), and a tensor in FP32, to be kept until the launch."""
    if not isinstance(scalar, Tensor):
        return (scalar, 0), None
    kept = scalar if scalar.dtype is torch.float32 else scalar.detach().to(torch.float32)
    return (1.0, kept.data_ptr()), kept


def _place(tensor: Tensor) -> tuple[int, int]:
    """Return the device, and its stream; for the CPU a negative number, and how many threads."""
    device = tensor.get_device()
    return device, torch.get_num_threads() if device < 0 else current_raw_stream(device)
