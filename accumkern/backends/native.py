"""The compiled backends: the CPU and CUDA kernels of csrc/, through the extension module accumkern.backends._C."""

from __future__ import annotations

import torch
from torch import Tensor

from accumkern.backends import _C  # type: ignore[attr-defined]
from accumkern.formats import Format, Start


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
    scale_pair, _held = _scalar(scale)
    device, threads_or_stream = _place(sums)
    _C.fold(
        format_,
        start,
        _addresses(grads),
        _addresses(sums),
        _addresses(residuals),
        scale_pair,
        _addresses(partials),
        list(map(Tensor.numel, sums)),
        device,
        threads_or_stream,
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
    divisor_pair, _held = _scalar(divisor)
    factor_pair, _held_too = _scalar(factor)
    device, threads_or_stream = _place(sums)
    _C.finish(
        format_,
        start,
        _addresses(sums),
        _addresses(residuals),
        divisor_pair,
        factor_pair,
        list(map(Tensor.numel, sums)),
        device,
        threads_or_stream,
    )


def decode(format_: Format, sums: list[Tensor], residuals: list[Tensor] | None, values: list[Tensor]) -> None:
    """Write the FP32 values of each sum; see :class:`accumkern.backends.Kernels`."""
    device, threads_or_stream = _place(sums)
    _C.decode(
        format_,
        _addresses(sums),
        _addresses(residuals),
        _addresses(values),
        list(map(Tensor.numel, sums)),
        device,
        threads_or_stream,
    )


def encode(
    format_: Format,
    values: list[Tensor],
    divisor: float | Tensor,
    sums: list[Tensor],
    residuals: list[Tensor] | None,
) -> None:
    """Divide FP32 values and store them; see :class:`accumkern.backends.Kernels`."""
    divisor_pair, _held = _scalar(divisor)
    device, threads_or_stream = _place(sums)
    _C.encode(
        format_,
        _addresses(values),
        divisor_pair,
        _addresses(sums),
        _addresses(residuals),
        list(map(Tensor.numel, sums)),
        device,
        threads_or_stream,
    )


def squares(
    format_: Format, start: Start, sums: list[Tensor], residuals: list[Tensor] | None, partials: list[Tensor]
) -> None:
    """Write the sums of squares of each block; see :class:`accumkern.backends.Kernels`."""
    device, threads_or_stream = _place(sums)
    _C.squares(
        format_,
        start,
        _addresses(sums),
        _addresses(residuals),
        _addresses(partials),
        list(map(Tensor.numel, sums)),
        device,
        threads_or_stream,
    )


def _addresses(tensors: list[Tensor] | None) -> list[int]:
    return [] if tensors is None else list(map(Tensor.data_ptr, tensors))  # faster than a comprehension


def _scalar(factor: float | Tensor) -> tuple[tuple[float, int], Tensor | None]:
    """Return a factor as the extension takes it, (value, address), and an FP32 tensor to keep until the launch."""
    if isinstance(factor, Tensor):
        held = factor.detach().to(torch.float32)
        return (1.0, held.data_ptr()), held
    return (factor, 0), None


def _place(sums: list[Tensor]) -> tuple[int, int]:
    """Return where the kernels run, as the extension takes it: (device, stream), or (-1, threads) for the CPU."""
    device = sums[0].get_device()
    return device, torch.get_num_threads() if device < 0 else torch.cuda.current_stream(device).cuda_stream
