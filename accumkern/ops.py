"""The front door of the kernels: contract, checks, one call. Nothing is written before every check has passed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from accumkern import backends, checks
from accumkern.formats import FORMAT_OF_DTYPES, Format, Start


@torch.no_grad()
def accumulate_(
    grads: Sequence[Tensor],
    sums: Sequence[Tensor],
    residuals: Sequence[Tensor] | None = None,
    scale: float | Tensor = 1.0,
    *,
    backend: str | None = None,
) -> None:
    """Add scaled gradients to running sums, in FP32, in place.

    For every element of every tensor, with one rounding in the addition::

        x = scale * grad + decode(sum, residual)        # FP32, fused multiply-add
        sum, residual = encode(x)                       # sum is x rounded to its own dtype (ties: see formats)

    The dtype of a residual chooses the format. bfloat16 sums take int8 (split24: 16-bit significand), int16 (split32:
    exactly FP32) or float32 (the FP32 value itself); float16 sums take float32; float32 sums take no residual. Start
    with zeros, or with any sums and zero residuals. Where a sum is changed between two calls, the change counts; an
    integer residual that is not zeroed with it shifts the result by at most half a unit in the last place of the sum.

    Args:
        grads: new gradients; read. Each of the shape, dtype, device and strides of its sum.
        sums: running sums; read and written. bfloat16, float16 or float32; dense, any order of dimensions.
        residuals: low parts; read and written. Each of the shape and strides of its sum, or flat in the sum's memory
            order. None where all sums are float32.
        scale: factor of every gradient: a number that FP32 holds, or a floating 0-dim tensor on the device of the
            tensors, which is read there without waiting or looking at it.
        backend: "cuda", "triton", "cpu" or "eager"; None takes the first that can run on the tensors' device.

    Raises:
        TypeError: an argument is of the wrong kind, or dtypes do not fit together.
        ValueError: lengths, shapes, devices or layouts do not fit together, memory overlaps or cannot be written, or
            ``backend`` is unknown.
        RuntimeError: the backend asked for cannot run here.

    After an error nothing has been written. Tensors of several devices and formats may be mixed in one call.
    """
    grads = _tensors("grads", grads)
    sums = _tensors("sums", sums)
    if residuals is not None:
        residuals = _tensors("residuals", residuals)
    for name, tensors in (("sums", sums), ("residuals", residuals)):
        if tensors is not None and len(tensors) != len(grads):
            raise ValueError(f"{name} holds {len(tensors)} tensors and grads {len(grads)}; they must be as many")
    scale = check_scale("scale", scale)

    groups: dict[tuple[torch.device, Format], list[int]] = {}
    for i, (grad, total) in enumerate(zip(grads, sums, strict=True)):
        format_ = _check_tensors(i, grad, total, None if residuals is None else residuals[i])
        groups.setdefault((total.device, format_), []).append(i)
        if isinstance(scale, Tensor) and scale.device not in (total.device, torch.device("cpu")):
            raise ValueError(f"scale is on {scale.device} and sums[{i}] on {total.device}; they must be on one device")
    chosen = {device: backends.choose(backend, device) for device, _ in groups}
    _check_memory(grads, sums, residuals)

    for (device, format_), members in groups.items():
        backends.kernels(chosen[device]).fold(
            format_,
            Start.CONTINUE,
            [grads[i] for i in members],
            [sums[i] for i in members],
            None if format_ is Format.PLAIN32 or residuals is None else [residuals[i] for i in members],
            scale.to(device) if isinstance(scale, Tensor) else scale,
            None,
        )
    torch.autograd.graph.increment_version(sums)


def check_scale(name: str, scale: Any) -> float | Tensor:
    """Return the factor of a fold: a number that FP32 holds, or a floating 0-dim tensor, whose value is not looked at.

    Raises:
        TypeError, ValueError: it is neither.
    """
    if isinstance(scale, Tensor):
        if scale.dim() != 0 or not scale.is_floating_point() or scale.layout is not torch.strided:
            raise ValueError(
                f"{name} is a tensor of shape {tuple(scale.shape)} and {scale.dtype}; "
                "it must be a number or a floating 0-dim tensor"
            )
        return scale
    number = checks.real(name, scale, "it must be a number or a floating 0-dim tensor")
    if number != 0 and not checks.is_fp32(number):
        raise ValueError(f"{name} is {number}; it must be finite in FP32, and zero there only if it is zero")
    return number


def reciprocal(name: str, number: Any) -> float:
    """Return ``1 / number``, which FP32 must hold.

    Raises:
        TypeError, ValueError: ``number`` is no positive number, or its reciprocal under- or overflows.
    """
    right = "it must be a positive number whose reciprocal FP32 holds (2.94e-39 to 7.13e+44), or None"
    number = checks.real(name, number, right)
    if not (number > 0 and checks.is_fp32(1.0 / number)):
        raise ValueError(f"{name} is {number}; {right}")
    return 1.0 / number


def is_dense(tensor: Tensor) -> bool:
    """Return whether the elements fill one range of memory, each once, in any order of dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def same_order(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors of one shape, the second dense, have their elements in the same order in memory."""
    if a.stride() == b.stride() or a.numel() == 0:
        return True
    return all(x == y or n == 1 for x, y, n in zip(a.stride(), b.stride(), a.shape, strict=True))


def _kind(value: object) -> str:
    return f"a {type(value).__name__}"


def _tensors(name: str, value: object) -> list[Tensor]:
    if isinstance(value, Tensor) or not isinstance(value, Sequence):
        raise TypeError(f"{name} is {_kind(value)}; it must be a list of tensors")
    for i, item in enumerate(value):
        if not isinstance(item, Tensor):
            raise TypeError(f"{name}[{i}] is {_kind(item)}; it must be a tensor")
        if item.layout is not torch.strided:
            raise TypeError(f"{name}[{i}] has layout {item.layout}; it must be dense (torch.strided)")
    return list(value)


def _check_tensors(i: int, grad: Tensor, total: Tensor, residual: Tensor | None) -> Format:
    """Raise unless the i-th tensors can be folded together, else return their format."""
    residual_dtype = None if residual is None else residual.dtype
    format_ = FORMAT_OF_DTYPES.get((total.dtype, residual_dtype))
    if format_ is None:
        right = [str(r) for s, r in FORMAT_OF_DTYPES if s is total.dtype]
        if not right:
            raise TypeError(f"sums[{i}] is {total.dtype}; it must be torch.bfloat16, torch.float16 or torch.float32")
        raise TypeError(
            f"residuals[{i}] is {residual_dtype} beside sums[{i}] of {total.dtype}; it must be {' or '.join(right)}"
        )
    if grad.dtype is not total.dtype:
        raise TypeError(f"grads[{i}] is {grad.dtype} and sums[{i}] {total.dtype}; they must be of one dtype")
    if grad.shape != total.shape:
        raise ValueError(
            f"grads[{i}] has shape {tuple(grad.shape)} and sums[{i}] {tuple(total.shape)}; they must be equal"
        )
    if not is_dense(total):
        raise ValueError(
            f"sums[{i}] of shape {tuple(total.shape)} has strides {total.stride()}; "
            "its elements must fill one range of memory, each once"
        )
    if not same_order(grad, total):
        raise ValueError(f"grads[{i}] has strides {grad.stride()} and sums[{i}] {total.stride()}; they must be equal")
    if residual is not None:
        flat = residual.shape == (total.numel(),) and residual.is_contiguous()
        if not flat and (residual.shape != total.shape or not same_order(residual, total)):
            raise ValueError(
                f"residuals[{i}] has shape {tuple(residual.shape)} and strides {residual.stride()}; it must have those "
                f"of sums[{i}], {tuple(total.shape)} and {total.stride()}, or be flat with {total.numel()} elements"
            )
    for name, tensor in (("grads", grad), ("sums", total), ("residuals", residual)):
        if tensor is None:
            continue
        if tensor.device != total.device:
            raise ValueError(f"{name}[{i}] is on {tensor.device} and sums[{i}] on {total.device}; they must be equal")
        if tensor.is_neg():
            raise ValueError(f"{name}[{i}] is a lazily negated view; pass {name}[{i}].resolve_neg()")
        if name != "grads" and tensor.is_inference() and not torch.is_inference_mode_enabled():
            raise ValueError(f"{name}[{i}] was made in inference mode and is read-only outside of it; pass a clone")
    return format_


def _check_memory(grads: list[Tensor], sums: list[Tensor], residuals: list[Tensor] | None) -> None:
    """Raise where memory that is written is touched twice, or cannot be written."""
    ranges: list[tuple[torch.device, int, int, bool, str, int]] = []
    for name, tensors in (("grads", grads), ("sums", sums), ("residuals", residuals or [])):
        for i, tensor in enumerate(tensors):
            if tensor.numel() > 0 and not tensor.is_meta:
                begin = tensor.data_ptr()
                end = begin + tensor.numel() * tensor.element_size()
                ranges.append((tensor.device, begin, end, name != "grads", name, i))
    devices = {device: n for n, device in enumerate({entry[0] for entry in ranges})}
    ranges.sort(key=lambda entry: (devices[entry[0]], entry[1]))
    reached: dict[bool, tuple[torch.device, int, str, int]] = {}  # written? -> the range that reaches furthest
    for device, begin, end, written, name, i in ranges:
        for other_written, (other_device, other_end, other_name, j) in reached.items():
            if (written or other_written) and other_device == device and begin < other_end:
                raise ValueError(f"{other_name}[{j}] and {name}[{i}] overlap in memory; they must not")
        furthest = reached.get(written)
        if furthest is None or furthest[0] != device or furthest[1] < end:
            reached[written] = (device, end, name, i)

    for device, begin, end, written, name, i in ranges:
        if written and device.type == "cpu" and not backends.is_writable(begin, end - begin):
            raise ValueError(f"{name}[{i}] lies in read-only memory; pass a clone")
