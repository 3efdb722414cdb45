"""The end of a window: the norm of all gradients in one pass over them; mean, clipping and rounding in another."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from itertools import repeat
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from accumkern.backends import Kernels
from accumkern.checks import is_fp32, real
from accumkern.clipping import clipped
from accumkern.dtensor import norm_over
from accumkern.formats import Format, Start, decode, partial_rows, widest
from accumkern.slot import Slot

_KernelsOn: TypeAlias = Callable[[torch.device], Kernels]

_PART_NUMEL = 2**22
_numel = Tensor.numel


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
        divisor, factor = self
        return isinstance(divisor, Tensor) or isinstance(factor, Tensor) or divisor != 1 or factor != 1


class Batch(NamedTuple):
    """Gradients that lie in memory alike, as a kernel takes them: all in one launch."""

    device: torch.device
    format: Format | None
    start: Start
    groups: tuple[Any, ...]  # see Stored
    is_pending: bool  # whether they have a ``reduce``
    slots: list[Slot]
    sums: list[Tensor]
    residuals: list[Tensor] | None
    reduces: list[Any]  # see Stored; of those that are pending

    def has_squares(self, norm_type: float) -> bool:
        """Return whether a kernel takes their norm."""
        return norm_type == 2 and self.format is not None and not self.is_pending

    def with_residuals(self) -> Batch:
        """Return the same with residuals to be written, where the format has any."""
        dtype = None if self.format is None else self.format.residual_dtype
        if dtype is None or self.residuals is not None:
            return self
        return self._replace(
            residuals=[slot.residual_for(t, dtype) for slot, t in zip(self.slots, self.sums, strict=True)]
        )


def batches_of(slots: list[Slot]) -> list[Batch]:
    """Return the gradients that are there, those alike together, in the order in which each kind comes first."""
    found: dict[tuple[Any, ...], tuple[list[Any], ...]] = {}
    for slot in slots:
        grad = slot.param.grad
        if grad is None:
            continue
        total, residual, format_, groups, reduce = slot.in_memory(grad)
        key = total.device, format_, residual is None, groups, reduce is not None
        alike = found.get(key)
        if alike is None:
            alike = found[key] = [], [], [], []
        of, sums, residuals, reduces = alike
        of.append(slot)
        sums.append(total)
        residuals.append(residual)
        reduces.append(reduce)
    batches = []
    for (device, format_, is_whole, groups, is_pending), (of, sums, residuals, reduces) in found.items():
        start = Start.FROM_SUM if is_whole else Start.CONTINUE
        batches.append(
            Batch(device, format_, start, groups, is_pending, of, sums, None if is_whole else residuals, reduces)
        )
    return batches


def measure(
    batches: list[Batch],
    divide_by: float | Tensor,
    max_norm: float | None,
    norm_type: float,
    error_if_nonfinite: bool,
    kernels_on: _KernelsOn,
) -> tuple[Finished, Scaling]:
    """Return the norm of gradients, and what is to become of them; see :meth:`accumkern.GradAccumulator.finish`."""
    divide_by = _checked_divide_by(divide_by, batches)
    max_norm, norm_type = _checked_norm(max_norm, norm_type)
    device = batches[0].device
    divisor = _on(divide_by.detach().float(), device) if isinstance(divide_by, Tensor) else divide_by
    if all(batch.device == device and not batch.groups and batch.has_squares(norm_type) for batch in batches):
        finished = Finished(*_end_of_squares(batches, divisor, max_norm, kernels_on))
    else:
        finished = Finished(*clipped(total_norm(batches, norm_type, kernels_on), divisor, max_norm))
    if error_if_nonfinite and bool(finished.found_nonfinite):
        raise RuntimeError(
            f"the total norm of order {norm_type} of the gradients is {finished.norm.item()}; they are left as they "
            "were"
        )
    return finished, Scaling(divisor, 1.0 if max_norm is None else finished.clip_coefficient)


def write(batches: list[Batch], scaling: Scaling, kernels_on: _KernelsOn, keeps_residuals: bool) -> None:
    """Set each ``.grad`` to the rounded ``(x / divisor) * factor``, computed in FP32 from the accumulated value ``x``.

    Args:
        batches: the gradients as they lie in memory now.
        scaling: divisor and factor.
        kernels_on: returns the kernels of a device.
        keeps_residuals: have residuals that hold what the rounding cuts off.
    """
    if keeps_residuals:  # there is memory for all of them before the first gradient is written
        batches = [batch.with_residuals() for batch in batches]
    for device, format_, start, _, _, _, sums, residuals, _ in batches:
        divisor, factor = _on(scaling.divisor, device), _on(scaling.factor, device)
        if format_ is None:
            _scale_as_torch_does(sums, divisor, factor)
            continue
        kernels = kernels_on(device)
        compute = kernels.rescale if keeps_residuals and residuals is not None else kernels.finish
        compute(format_, start, sums, residuals, divisor, factor)
        torch.autograd.graph.increment_version(sums)
    if keeps_residuals:  # last, because gradients may be views of one tensor, which count versions together
        for batch in batches:
            if batch.residuals is not None:
                for slot in batch.slots:
                    slot.remember()


@torch.no_grad()
def total_norm(batches: list[Batch], norm_type: float, kernels_on: _KernelsOn) -> Tensor:
    """Return the norm of all accumulated values as one vector: FP32, 0-dim, on the device of the first gradient.

    It is computed from what is in memory: many ways of writing there leave no trace. Norms of shards are combined over
    the ranks that hold the others.
    """
    members: dict[tuple[Any, ...], list[Batch]] = defaultdict(list)
    for batch in batches:
        members[batch.groups].append(batch)
    norms = _norms(members.pop((), []), norm_type, kernels_on)
    for groups, shards in members.items():  # in the same order on every rank
        norm = _norm_of(_norms(shards, norm_type, kernels_on), shards[0].device, norm_type)
        norms.append(norm_over(groups, norm, norm_type))
    return _norm_of(norms, batches[0].device, norm_type)


def _checked_divide_by(divide_by: Any, batches: list[Batch]) -> float | Tensor:
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
    devices = {batch.device for batch in batches}
    if divide_by.device not in devices:
        on = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"divide_by is on {divide_by.device} and the gradients on {on}; move it there")
    if divide_by.device.type == "cpu":  # on a GPU, looking would wait for it
        _checked_divide_by(divide_by.item(), batches)
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
    if not isinstance(scalar, Tensor) or scalar.device == device:
        return scalar
    return scalar.to(device, non_blocking=device.type != "cpu")


@torch.no_grad()
def _scale_as_torch_does(sums: list[Tensor], divisor: float | Tensor, factor: float | Tensor) -> None:
    """Divide and multiply gradients that have no format, on one device."""
    if not isinstance(divisor, Tensor):  # torch on CUDA multiplies with the reciprocal of a number
        divisor = torch.full((), divisor, dtype=widest(sums[0].device), device=sums[0].device)
    for total in sums:
        total.div_(divisor).mul_(factor)


def _norm_of(norms: list[Tensor], device: torch.device, norm_type: float) -> Tensor:
    """Return the norm of the vectors that have these norms, on a device."""
    moved = [_on(norm, device) for norm in norms]
    if len(moved) > 1:
        return torch.linalg.vector_norm(torch.stack(moved), norm_type)
    return moved[0] if moved else torch.zeros((), dtype=torch.float32, device=device)


def _norms(batches: list[Batch], norm_type: float, kernels_on: _KernelsOn) -> list[Tensor]:
    """Return FP32 norms that together have the norm of the gradients."""
    norms: list[Tensor] = []
    on_device: dict[torch.device, list[Batch]] = defaultdict(list)
    for batch in batches:
        if batch.has_squares(norm_type):
            on_device[batch.device].append(batch)
        else:
            for total, residual, reduce in zip(
                batch.sums, batch.residuals or repeat(None), batch.reduces, strict=False
            ):
                norms += _norms_of_parts(total, residual, batch.format, reduce, norm_type, kernels_on)
    return norms + [_end_of_squares(some, 1.0, None, kernels_on)[0] for some in on_device.values()]


def _end_of_squares(
    batches: list[Batch], divisor: float | Tensor, max_norm: float | None, kernels_on: _KernelsOn
) -> tuple[Tensor, Tensor, Tensor]:
    """Return :func:`accumkern.clipping.clipped` of the 2-norm of gradients, all on one device."""
    device = batches[0].device
    kernels = kernels_on(device)
    rows = [sum(map(partial_rows, map(_numel, batch.sums))) for batch in batches]
    partials = torch.empty(sum(rows), dtype=torch.float32, device=device)
    parts = [partials] if len(batches) == 1 else partials.split(rows)
    for batch, part in zip(batches, parts, strict=True):
        assert batch.format is not None
        kernels.squares(batch.format, batch.start, batch.sums, batch.residuals, part)
    results = torch.empty(2, dtype=torch.float32, device=device)
    nonfinite = torch.empty((), dtype=torch.bool, device=device)
    kernels.norm(partials, divisor, max_norm, results, nonfinite)
    norm, coefficient = results.unbind()
    return norm, coefficient, nonfinite


def _norms_of_parts(
    total: Tensor,
    residual: Tensor | None,
    format_: Format | None,
    reduce: Any,
    norm_type: float,
    kernels_on: _KernelsOn,
) -> list[Tensor]:
    """Return norms of parts of a gradient's accumulated values, FP32; what decodes is only as large as a part."""
    if reduce is not None:
        low = None if residual is None else residual.as_strided(total.shape, total.stride())
        value = reduce(total.float() if format_ is None else decode(format_, total, low))
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
