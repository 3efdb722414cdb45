"""The compiled backends: the CPU and CUDA kernels of csrc/, through the extension module accumkern.backends._C."""

from __future__ import annotations

from itertools import repeat

import torch
from torch import Tensor

from accumkern.backends import _C  # type: ignore[attr-defined]
from accumkern.formats import Format, Start

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
    format_: Format, start: Start, sums: list[Tensor], residuals: list[Tensor] | None, partials: list[Tensor]
) -> None:
    """Write the sums of squares of each block; see :class:`accumkern.backends.Kernels`."""
    _run(_C.SQUARES, format_, start, None, sums, residuals, partials)


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
    if len(sums) == 1:  # written out, because it comes for every gradient that does not wait
        total = sums[0]
        table = [
            grads[0].data_ptr() if grads else _ABSENT,
            total.data_ptr(),
            residuals[0].data_ptr() if residuals else _ABSENT,
            partials[0].data_ptr() if partials else _ABSENT,
            total.numel(),
        ]
    else:
        table = []
        for column in (grads, sums, residuals, partials):
            table += map(_address, column) if column is not None else repeat(_ABSENT, len(sums))
        table += map(_numel, sums)
    # A factor crosses as (value, address). An FP32 copy of a tensor is kept until the launch.
    scalar_pair, factor_pair = (scalar, 0), (factor, 0)
    if isinstance(scalar, Tensor):
        scalar = scalar.detach().to(torch.float32)
        scalar_pair = 1.0, scalar.data_ptr()
    if isinstance(factor, Tensor):
        factor = factor.detach().to(torch.float32)
        factor_pair = 1.0, factor.data_ptr()
    device = sums[0].get_device()
    where = torch.get_num_threads() if device < 0 else torch.cuda.current_stream(device).cuda_stream
    _C.run(kernel, format_, start, table, scalar_pair, factor_pair, device, where)
