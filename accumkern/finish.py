"""The end of a window: the norm of all gradients in one pass over them; mean, clipping and rounding in another."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from accumkern.backends import Kernels
from accumkern.checks import is_fp32, real
from accumkern.dtensor import norm_over
from accumkern.formats import Format, Start, decode, divide, partial_rows, widest
from accumkern.slot import Slot, Stored

_KernelsOn: TypeAlias = Callable[[torch.device], Kernels]

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


class Scaling(NamedTuple):
    """What gradients become: ``(gradient / divisor) * factor``. Tensors are FP32, 0-dim."""

    divisor: float | Tensor = 1.0
    factor: float | Tensor = 1.0

    @property
    def changes(self) -> bool:
        """Whether it may change a gradient."""
        return any(isinstance(scalar, Tensor) or scalar != 1 for scalar in self)


def measure(
    gradients: list[Stored],
    divide_by: float | Tensor,
    max_norm: float | None,
    norm_type: float,
    error_if_nonfinite: bool,
    kernels_on: _KernelsOn,
) -> tuple[Finished, Scaling]:
    """Return the norm of gradients, and what is to become of them; see :meth:`accumkern.GradAccumulator.finish`."""
    divide_by = _checked_divide_by(divide_by, gradients)
    max_norm, norm_type = _checked_norm(max_norm, norm_type)
    norm = total_norm(gradients, float(norm_type), kernels_on)
    divisor: float | Tensor = divide_by
    if isinstance(divide_by, Tensor):
        divisor = _on(divide_by.detach().float(), norm.device)
    norm = divide(norm, divisor)
    nonfinite = ~norm.isfinite()
    if error_if_nonfinite and bool(nonfinite):
        raise RuntimeError(
            f"the total norm of order {norm_type} of the gradients is {norm.item()}; they are left as they were"
        )
    coefficient = torch.ones_like(norm) if max_norm is None else torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    return Finished(norm, coefficient, nonfinite), Scaling(divisor, 1.0 if max_norm is None else coefficient)


def write(slots: list[Slot], scaling: Scaling, kernels_on: _KernelsOn, keeps_residuals: bool) -> None:
    """Set each ``.grad`` to the rounded ``(x / divisor) * factor``, computed in FP32 from the accumulated value ``x``.

    Args:
        slots: of gradients that are there.
        scaling: divisor and factor.
        kernels_on: returns the kernels of a device.
        keeps_residuals: have residuals that hold what the rounding cuts off.
    """
    gradients = [slot.stored(keeps_residuals) for slot in slots]
    scale(gradients, scaling, kernels_on, keeps_residuals)
    if keeps_residuals:
        for slot, stored in zip(slots, gradients, strict=True):
            if stored.residual is not None:
                slot.remember()


@torch.no_grad()
def total_norm(gradients: list[Stored], norm_type: float, kernels_on: _KernelsOn) -> Tensor:
    """Return the norm of all accumulated values as one vector: FP32, 0-dim, on the device of the first gradient.

    It is computed from what is in memory: many ways of writing there leave no trace. Norms of shards are combined over
    the ranks that hold the others.
    """
    members: dict[tuple[Any, ...], list[Stored]] = defaultdict(list)
    for gradient in gradients:
        members[gradient.groups].append(gradient)
    norms = _norms(members.pop((), []), norm_type, kernels_on)
    for groups, shards in members.items():  # in the same order on every rank
        norm = _norm_of(_norms(shards, norm_type, kernels_on), shards[0].sum.device, norm_type)
        norms.append(norm_over(groups, norm, norm_type))
    return _norm_of(norms, gradients[0].sum.device, norm_type)


@torch.no_grad()
def scale(gradients: list[Stored], scaling: Scaling, kernels_on: _KernelsOn, keeps_residuals: bool) -> None:
    """Scale gradients as they lie in memory; see :func:`write`."""
    divisor, factor = scaling
    for total, _, format_, *_ in gradients:
        if format_ is None:
            by, device = divisor, total.device
            if not isinstance(by, Tensor):  # torch on CUDA multiplies with the reciprocal of a number
                by = torch.full((), by, dtype=widest(device), device=device)
            total.div_(_on(by, device)).mul_(_on(factor, device))
    for device, format_, start, sums, residuals in _launches(gradients):
        kernels = kernels_on(device)
        compute = kernels.rescale if keeps_residuals and residuals is not None else kernels.finish
        compute(format_, start, sums, residuals, _on(divisor, device), _on(factor, device))
        torch.autograd.graph.increment_version(sums)


def _checked_divide_by(divide_by: Any, gradients: list[Stored]) -> float | Tensor:
    """Return ``divide_by``; raise unless it is a positive number, or a 0-dim tensor on a device of the gradients."""
    right = "it must be a number or a 0-dim tensor, positive and finite in FP32"
    if not isinstance(divide_by, Tensor):
        number = real("divide_by", divide_by, right)
        if not (number > 0 and is_fp32(number)):
            raise ValueError(f"divide_by is {number}; {right}")
        return number
    is_real = not divide_by.is_complex() and divide_by.dtype is not torch.bool
    if divide_by.dim() != 0 or not is_real or divide_by.layout is not torch.strided:
        shape, dtype = tuple(divide_by.shape), divide_by.dtype
        raise ValueError(f"divide_by is a tensor of shape {shape} and {dtype}; {right}")
    devices = {gradient.sum.device for gradient in gradients}
    if divide_by.device not in devices:
        on = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"divide_by is on {divide_by.device} and the gradients on {on}; move it there")
    if divide_by.device.type == "cpu":  # on a GPU, looking would wait for it
        _checked_divide_by(divide_by.item(), gradients)
    return divide_by


def _checked_norm(max_norm: Any, norm_type: Any) -> tuple[float | None, float]:
    """Return ``max_norm`` and ``norm_type``; raise unless they are positive numbers, infinity, or no ``max_norm``."""
    if max_norm is not None:
        right = "it must be a positive number that FP32 holds, infinity, or None"
        max_norm = real("max_norm", max_norm, right)
        if not (max_norm > 0 and (is_fp32(max_norm) or max_norm == float("inf"))):
            raise ValueError(f"max_norm is {max_norm}; {right}")
    right = "it must be a positive number or infinity"
    norm_type = real("norm_type", norm_type, right)
    if not norm_type > 0:
        raise ValueError(f"norm_type is {norm_type}; {right}")
    return max_norm, norm_type


def _on(scalar: Any, device: torch.device) -> Any:
    """Return a number as it is, and a tensor on a device. A copy to the CPU is waited for: it is read there at once."""
    return scalar.to(device, non_blocking=device.type != "cpu") if isinstance(scalar, Tensor) else scalar


def _launches(
    gradients: list[Stored],
) -> Iterator[tuple[torch.device, Format, Start, list[Tensor], list[Tensor] | None]]:
    """Yield ``(device, format, start, sums, residuals)`` of the gradients that have a format, those alike together."""
    launches: dict[tuple[torch.device, Format, Start], tuple[list[Tensor], list[Any]]] = {}
    for total, residual, format_, *_ in gradients:
        if format_ is not None:
            start = Start.FROM_SUM if residual is None else Start.CONTINUE
            sums, residuals = launches.setdefault((total.device, format_, start), ([], []))
            sums.append(total)
            residuals.append(residual)
    for (device, format_, start), (sums, residuals) in launches.items():
        yield device, format_, start, sums, residuals if start is Start.CONTINUE else None


def _norm_of(norms: list[Tensor], device: torch.device, norm_type: float) -> Tensor:
    """Return the norm of the vectors that have these norms, on a device."""
    moved = [_on(norm, device) for norm in norms]
    if len(moved) > 1:
        return torch.linalg.vector_norm(torch.stack(moved), norm_type)
    return moved[0] if moved else torch.zeros((), dtype=torch.float32, device=device)


def _norms(gradients: list[Stored], norm_type: float, kernels_on: _KernelsOn) -> list[Tensor]:
    """Return FP32 norms that together have the norm of the gradients."""
    in_one: list[Stored] = []
    norms: list[Tensor] = []
    for gradient in gradients:
        if norm_type == 2 and gradient.format is not None and gradient.reduce is None:
            in_one.append(gradient)
        else:
            norms += _norms_of_parts(gradient, norm_type, kernels_on)
    for device, format_, start, sums, residuals in _launches(in_one):
        rows = [partial_rows(total.numel()) for total in sums]
        partials = torch.empty(sum(rows), dtype=torch.float32, device=device)
        kernels_on(device).squares(format_, start, sums, residuals, list(partials.split(rows)))
        norms.append(partials.sum(dtype=widest(device)).sqrt().float())
    return norms


def _norms_of_parts(gradient: Stored, norm_type: float, kernels_on: _KernelsOn) -> list[Tensor]:
    """Return norms of parts of a gradient's accumulated values, FP32; what decodes is only as large as a part."""
    total, residual, format_ = gradient[:3]
    if gradient.reduce is not None:
        low = None if residual is None else residual.as_strided(total.shape, total.stride())
        value = gradient.reduce(total.float() if format_ is None else decode(format_, total, low))
        return [torch.linalg.vector_norm(value, norm_type)] if value.numel() else []
    if total.numel() == 0:  # which has no maximum
        return []
    if format_ is None or residual is None:
        if total.layout is not torch.strided:
            total = total.coalesce().values() if total.layout is torch.sparse_coo else total.values()
        dtype = torch.float32 if total.dtype in (torch.bfloat16, torch.float16) else None
        return [torch.linalg.vector_norm(total, norm_type, dtype=dtype).float()]
    flat = total.as_strided((total.numel(),), (1,))
    norms = []
    for part, low_part in zip(flat.split(_PART_NUMEL), residual.split(_PART_NUMEL), strict=True):
        value = torch.empty_like(part, dtype=torch.float32)
        kernels_on(total.device).decode(format_, [part], [low_part], [value])
        norms.append(torch.linalg.vector_norm(value, norm_type))
    return norms
