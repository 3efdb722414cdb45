"""The compiled backends: the CPU and CUDA kernels of csrc/, through the extension module accumkern._C."""

from __future__ import annotations

import torch
from torch import Tensor

from accumkern import _C  # type: ignore[attr-defined]
from accumkern.formats import Format, Start


def fold_cpu(
    format_: Format,
    start: Start,
    grads: list[Tensor],
    sums: list[Tensor],
    residuals: list[Tensor] | None,
    scale: float | Tensor,
    partials: list[Tensor] | None,
) -> None:
    """Fold each gradient into its sum; see :func:`accumkern.backends.fold_function` for the contract."""
    scale_pair, _held = _scalar(scale)
    _C.accumulate_cpu(
        format_,
        start,
        _addresses(grads),
        _addresses(sums),
        _addresses(residuals),
        _addresses(partials),
        list(map(Tensor.numel, grads)),
        scale_pair,
        torch.get_num_threads(),
    )


def fold_cuda(
    format_: Format,
    start: Start,
    grads: list[Tensor],
    sums: list[Tensor],
    residuals: list[Tensor] | None,
    scale: float | Tensor,
    partials: list[Tensor] | None,
) -> None:
    """Fold each gradient into its sum; see :func:`accumkern.backends.fold_function` for the contract."""
    device = grads[0].device
    scale_pair, _held = _scalar(scale)
    _C.accumulate_cuda(
        format_,
        start,
        _addresses(grads),
        _addresses(sums),
        _addresses(residuals),
        _addresses(partials),
        list(map(Tensor.numel, grads)),
        scale_pair,
        device.index,
        torch.cuda.current_stream(device).cuda_stream,
    )


def finish_cpu(
    format_: Format,
    start: Start,
    sums: list[Tensor],
    residuals: list[Tensor] | None,
    divisor: float | Tensor,
    factor: float | Tensor,
) -> None:
    """Divide, multiply and round each sum; see :func:`accumkern.backends.finish_function` for the contract."""
    divisor_pair, _held = _scalar(divisor)
    factor_pair, _held_too = _scalar(factor)
    _C.finish_cpu(
        format_,
        start,
        _addresses(sums),
        _addresses(residuals),
        list(map(Tensor.numel, sums)),
        divisor_pair,
        factor_pair,
        torch.get_num_threads(),
    )


def finish_cuda(
    format_: Format,
    start: Start,
    sums: list[Tensor],
    residuals: list[Tensor] | None,
    divisor: float | Tensor,
    factor: float | Tensor,
) -> None:
    """Divide, multiply and round each sum; see :func:`accumkern.backends.finish_function` for the contract."""
    device = sums[0].device
    divisor_pair, _held = _scalar(divisor)
    factor_pair, _held_too = _scalar(factor)
    _C.finish_cuda(
        format_,
        start,
        _addresses(sums),
        _addresses(residuals),
        list(map(Tensor.numel, sums)),
        divisor_pair,
        factor_pair,
        device.index,
        torch.cuda.current_stream(device).cuda_stream,
    )


def decode_cpu(format_: Format, sums: list[Tensor], residuals: list[Tensor] | None, values: list[Tensor]) -> None:
    """Write the FP32 values of each sum; see :func:`accumkern.backends.decode_function` for the contract."""
    _C.decode_cpu(
        format_,
        _addresses(sums),
        _addresses(residuals),
        _addresses(values),
        [total.numel() for total in sums],
        torch.get_num_threads(),
    )


def decode_cuda(format_: Format, sums: list[Tensor], residuals: list[Tensor] | None, values: list[Tensor]) -> None:
    """Write the FP32 values of each sum; see :func:`accumkern.backends.decode_function` for the contract."""
    device = sums[0].device
    _C.decode_cuda(
        format_,
        _addresses(sums),
        _addresses(residuals),
        _addresses(values),
        [total.numel() for total in sums],
        device.index,
        torch.cuda.current_stream(device).cuda_stream,
    )


def encode_cpu(
    format_: Format,
    values: list[Tensor],
    divisor: float | Tensor,
    sums: list[Tensor],
    residuals: list[Tensor] | None,
) -> None:
    """Divide FP32 values and store them; see :func:`accumkern.backends.encode_function` for the contract."""
    divisor_pair, _held = _scalar(divisor)
    _C.encode_cpu(
        format_,
        _addresses(values),
        divisor_pair,
        _addresses(sums),
        _addresses(residuals),
        [total.numel() for total in sums],
        torch.get_num_threads(),
    )


def encode_cuda(
    format_: Format,
    values: list[Tensor],
    divisor: float | Tensor,
    sums: list[Tensor],
    residuals: list[Tensor] | None,
) -> None:
    """Divide FP32 values and store them; see :func:`accumkern.backends.encode_function` for the contract."""
    device = sums[0].device
    divisor_pair, _held = _scalar(divisor)
    _C.encode_cuda(
        format_,
        _addresses(values),
        divisor_pair,
        _addresses(sums),
        _addresses(residuals),
        [total.numel() for total in sums],
        device.index,
        torch.cuda.current_stream(device).cuda_stream,
    )


def _addresses(tensors: list[Tensor] | None) -> list[int]:
    return [] if tensors is None else list(map(Tensor.data_ptr, tensors))  # faster than a comprehension


def _scalar(factor: float | Tensor) -> tuple[tuple[float, int], Tensor | None]:
    """Return a factor as the extension takes it, (value, address), and an FP32 tensor to keep until the launch."""
    if isinstance(factor, Tensor):
        held = factor.detach().to(torch.float32)
        return (1.0, held.data_ptr()), held
    return (factor, 0), None
