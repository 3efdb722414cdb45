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
    value, held = _scale(scale)
    _C.accumulate_cpu(
        format_,
        start,
        [grad.data_ptr() for grad in grads],
        [total.data_ptr() for total in sums],
        _addresses(residuals),
        _addresses(partials),
        [grad.numel() for grad in grads],
        value,
        0 if held is None else held.data_ptr(),
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
    value, held = _scale(scale)
    _C.accumulate_cuda(
        format_,
        start,
        [grad.data_ptr() for grad in grads],
        [total.data_ptr() for total in sums],
        _addresses(residuals),
        _addresses(partials),
        [grad.numel() for grad in grads],
        value,
        0 if held is None else held.data_ptr(),
        device.index,
        torch.cuda.current_stream(device).cuda_stream,
    )


def _addresses(tensors: list[Tensor] | None) -> list[int]:
    return [] if tensors is None else [tensor.data_ptr() for tensor in tensors]


def _scale(scale: float | Tensor) -> tuple[float, Tensor | None]:
    """Return the scale as a number, or as an FP32 tensor to keep until the launch."""
    if isinstance(scale, Tensor):
        return 1.0, scale.detach().to(torch.float32)
    return scale, None
