"""The end of a window: mean, norm, clipping and rounding of all gradients, in one pass over them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from accumkern import backends, distributed
from accumkern.formats import Format, Start, decode

_PART_NUMEL = 2**22


class Finished(NamedTuple):
    """What :meth:`accumkern.GradAccumulator.finish` returns: 0-dim tensors on the device of the first gradient.

    Attributes:
        norm: total norm of the divided gradients before clipping, FP32.
        clip_coefficient: what they were multiplied by, FP32: ``min(1, max_norm / (norm + 1e-6))``, or 1.
        found_nonfinite: whether the norm is infinite or NaN, bool.
    """

    norm: Tensor
    clip_coefficient: Tensor
    found_nonfinite: Tensor


class Gradient(NamedTuple):
    """One gradient as it lies in memory at the end of a window."""

    grad: Tensor  # of a DTensor, this rank's shard
    format_: Format | None  # None: not folded by a kernel (complex, sparse, float64, or with holes in memory)
    residual: Tensor | None  # flat, in the memory order of grad; None counts as zero
    partials: Tensor | None  # left by the last fold, if nobody changed the gradient since
    dtensor: Any = None  # what the gradient is a shard of


def check_divide_by(divide_by: object, gradients: list[Gradient]) -> None:
    """Raise unless ``divide_by`` is a positive number, or a 0-dim tensor on a device of the gradients."""
    right = "it must be a number or a 0-dim tensor, positive and finite in FP32"
    if isinstance(divide_by, Tensor):
        if divide_by.dim() != 0 or divide_by.is_complex() or divide_by.dtype is torch.bool:
            shape, dtype = tuple(divide_by.shape), divide_by.dtype
            raise ValueError(f"divide_by is a tensor of shape {shape} and {dtype}; {right}")
        devices = {gradient.grad.device for gradient in gradients}
        if divide_by.device not in devices:
            on = ", ".join(sorted(map(str, devices)))
            raise ValueError(f"divide_by is on {divide_by.device} and the gradients on {on}; move it there")
        if divide_by.device.type == "cpu":  # on a GPU, looking would wait for it
            check_divide_by(divide_by.item(), gradients)
    elif isinstance(divide_by, bool) or not isinstance(divide_by, (int, float)):
        raise TypeError(f"divide_by is a {type(divide_by).__name__}; {right}")
    elif not 2.0**-149 <= divide_by <= torch.finfo(torch.float32).max:  # what FP32 holds
        raise ValueError(f"divide_by is {divide_by}; {right}")


def check_max_norm(max_norm: object, norm_type: object) -> None:
    """Raise unless ``max_norm`` is None or a positive number, and ``norm_type`` a positive number or infinity."""
    if max_norm is not None:
        if isinstance(max_norm, bool) or not isinstance(max_norm, (int, float)):
            raise TypeError(f"max_norm is a {type(max_norm).__name__}; it must be a positive number or None")
        if math.isnan(max_norm) or max_norm <= 0:
            raise ValueError(f"max_norm is {max_norm}; it must be a positive number or None")
    if isinstance(norm_type, bool) or not isinstance(norm_type, (int, float)):
        raise TypeError(f"norm_type is a {type(norm_type).__name__}; it must be a positive number or infinity")
    if math.isnan(norm_type) or norm_type <= 0:
        raise ValueError(f"norm_type is {norm_type}; it must be a positive number or infinity")


@torch.no_grad()
def total_norm(gradients: list[Gradient], norm_type: float, backend_on: Callable[[torch.device], str]) -> Tensor:
    """Return the norm of all accumulated values as one vector: FP32, 0-dim, on the device of the first gradient.

    The 2-norm of a gradient whose last fold left partial sums is read from them; the others cost a pass. Norms of
    shards are combined over the ranks that hold the others.
    """
    norms: list[Tensor] = []
    measured: dict[torch.device, list[Tensor]] = {}
    shards: dict[tuple[Any, ...], list[Tensor]] = {}
    for gradient in gradients:
        if gradient.dtensor is not None:
            of_groups = shards.setdefault(distributed.groups_of_shards(gradient.dtensor), [])
            of_groups += [gradient.grad.new_zeros((), dtype=torch.float32), *_norms(gradient, norm_type, backend_on)]
        elif norm_type == 2 and gradient.partials is not None:
            measured.setdefault(gradient.grad.device, []).append(gradient.partials)
        else:
            norms += _norms(gradient, norm_type, backend_on)
    for groups, of_groups in shards.items():
        norms.append(distributed.norm_over(groups, _norm_of(of_groups, of_groups[0].device, norm_type), norm_type))
    norms += [torch.cat(rows)[:, 1].sum(dtype=torch.float64).sqrt().float() for rows in measured.values()]
    device = gradients[0].grad.device
    if not norms:
        return torch.zeros((), dtype=torch.float32, device=device)
    return _norm_of(norms, device, norm_type)


def _norm_of(norms: list[Tensor], device: torch.device, norm_type: float) -> Tensor:
    return torch.linalg.vector_norm(torch.stack([norm.to(device, non_blocking=True) for norm in norms]), norm_type)


@torch.no_grad()
def write(
    gradients: list[Gradient],
    divisor: float | Tensor,
    factor: Tensor | float,
    backend_on: Callable[[torch.device], str],
) -> None:
    """Set each ``.grad`` to ``round((x / divisor) * factor)``, computed in FP32 from the accumulated value ``x``."""
    groups: dict[tuple[torch.device, Format, Start], list[Gradient]] = {}
    for gradient in gradients:
        if gradient.format_ is None:
            gradient.grad.div_(_on(divisor, gradient.grad.device)).mul_(_on(factor, gradient.grad.device))
        else:
            start = Start.FROM_SUM if gradient.residual is None else Start.CONTINUE
            groups.setdefault((gradient.grad.device, gradient.format_, start), []).append(gradient)
    for (device, format_, start), members in groups.items():
        residuals: Any = None if start is Start.FROM_SUM else [member.residual for member in members]
        sums = [member.grad for member in members]
        finish = backends.kernels(backend_on(device)).finish
        finish(format_, start, sums, residuals, _on(divisor, device), _on(factor, device))
        torch.autograd.graph.increment_version(sums)


def _on(scalar: float | Tensor, device: torch.device) -> float | Tensor:
    return scalar.to(device, non_blocking=True) if isinstance(scalar, Tensor) else scalar


def _norms(gradient: Gradient, norm_type: float, backend_on: Callable[[torch.device], str]) -> list[Tensor]:
    """Return norms of parts of a gradient's accumulated values, FP32; what decodes is only as large as a part."""
    grad, residual = gradient.grad, gradient.residual
    if gradient.dtensor is not None and distributed.is_pending(gradient.dtensor):
        value = grad.float() if gradient.format_ is None else decode(gradient.format_, grad, _like(residual, grad))
        value = distributed.reduced(value, gradient.dtensor)
        return [torch.linalg.vector_norm(value, norm_type)] if value.numel() else []
    if grad.numel() == 0:  # which has no maximum
        return []
    if gradient.format_ is None or residual is None:
        if grad.layout is not torch.strided:
            grad = grad.coalesce().values() if grad.layout is torch.sparse_coo else grad.values()
        dtype = torch.float32 if grad.dtype in (torch.bfloat16, torch.float16) else None
        return [torch.linalg.vector_norm(grad, norm_type, dtype=dtype).float()]
    flat = grad.as_strided((grad.numel(),), (1,))
    decode_into = backends.kernels(backend_on(grad.device)).decode
    norms = []
    for part, low in zip(flat.split(_PART_NUMEL), residual.split(_PART_NUMEL), strict=True):
        value = torch.empty_like(part, dtype=torch.float32)
        decode_into(gradient.format_, [part], [low], [value])
        norms.append(torch.linalg.vector_norm(value, norm_type))
    return norms


def _like(residual: Tensor | None, grad: Tensor) -> Tensor | None:
    """Return a flat residual with the shape of its gradient."""
    return None if residual is None else residual.as_strided(grad.shape, grad.stride())
