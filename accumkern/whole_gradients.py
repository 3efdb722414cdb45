"""Whole gradients under fully_shard (FSDP2): kept as sum and residual until they are reduced, once, in FP32.

With ``set_requires_gradient_sync(False)`` fully_shard adds up whole gradients on every rank, group by group: where all
gradients of a group of parameters have come, it calls the group's ``post_backward``. Here that function is another one
of the same name. It folds what has come into split sums, which wait where fully_shard keeps its own. In a pass that
reduces, it hands their values to fully_shard in FP32, which reduces them in FP32, and adds FP32 to the shards.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from accumkern import dtensor
from accumkern.fold import Fold
from accumkern.formats import BUFFERS, Format, Start, fp32_scalar
from accumkern.fully_shard_private import (
    has_whole_gradients,
    put_back_whole_gradient,
    reduced_in_fp32,
    replace_post_backward,
    sharded_groups,
    take_whole_gradient,
    zeros_for_unused,
)
from accumkern.sharded import RunningShard, ShardSlot
from accumkern.slot import FOLDED_DTYPES, Slot


@dataclass
class WholeSum:
    """A running whole gradient, in the ``unsharded_accumulated_grad`` of fully_shard's parameter.

    Attributes:
        sum: contiguous, ``format.sum_dtype``; of a DTensor (tensor parallel), what this rank holds.
        format: of sum and residual: a split one, or FP32 alone where the buffer keeps FP32 beside ``.grad``, which a
            whole gradient has no need of.
        like: the gradient that came first, a DTensor, or None.
        residual: flat, from the second gradient on; None where ``format`` needs none.
    """

    sum: Tensor
    format: Format
    like: Any
    residual: Tensor | None = None


def reduce_in_fp32(modules: list[Any], slots: Mapping[Tensor, Slot], fold: Fold) -> list[WholeGradients]:
    """Let the whole gradients of modules under fully_shard be split sums, reduced in FP32, until ``slots`` is empty.

    Raises:
        RuntimeError: an accumulator that is attached does it already, fully_shard keeps whole gradients of earlier
            passes, or this torch has another fully_shard than the ones that are known.
    """
    groups = sharded_groups(modules)
    if any(map(keeps_split_sums, groups)):
        raise RuntimeError(
            "reduce_in_fp32() was called for model by an accumulator that is attached still; detach() that first"
        )
    if any(map(has_whole_gradients, groups)):
        raise RuntimeError(
            "fully_shard keeps gradients of earlier passes that were not reduced, in another form; call "
            "reduce_in_fp32() before the window, or after a backward pass that reduces them"
        )
    return [WholeGradients(group, slots, fold) for group in groups]


def keeps_split_sums(group: Any) -> bool:
    """Return whether the whole gradients of a group are split sums, of an accumulator that is attached."""
    owner = getattr(group.post_backward, "__self__", None)
    return isinstance(owner, WholeGradients) and owner.is_on


class WholeGradients:
    """The whole gradients of one group of parameters, in the place of the group's ``post_backward``.

    Each whole gradient is multiplied by the scale of its own time; shards are added as they come then. With the first
    pass after the accumulator was detached, or is gone, fully_shard has its own function back.

    Args:
        group: of fully_shard.
        slots: of the parameters whose gradients are accumulated; empty once the accumulator is detached.
        fold: has buffer, scale and kernels.
    """

    def __init__(self, group: Any, slots: Mapping[Tensor, Slot], fold: Fold) -> None:
        self._group, self._slots, self._fold = group, slots, fold
        self._formats = BUFFERS[fold.buffer]
        self._stock = group.post_backward
        self._restore = replace_post_backward(group, self.post_backward)

    @property
    def is_on(self) -> bool:
        """Whether the accumulator is attached, to any parameter."""
        return bool(self._slots)

    @property
    def are_pending(self) -> bool:
        """Whether there are gradients that are not in any shard yet."""
        return has_whole_gradients(self._group)

    def held(self) -> list[WholeSum]:
        """Return the running sums that are there."""
        found = [param.unsharded_accumulated_grad for param in self._group.fsdp_params]
        return [held for held in found if isinstance(held, WholeSum)]

    def post_backward(self, *unused: Any) -> None:
        """Do what fully_shard does where a group has all gradients of a backward pass."""
        if not self.is_on:
            self._end()
        elif self._group.reduce_grads:
            self._reduce(*unused)
            return
        else:
            with torch.no_grad():
                self._collect(is_last=False)
        self._stock(*unused)

    def _reduce(self, *unused: Any) -> None:
        """Let fully_shard reduce FP32 values of all whole gradients, and add them to the shards."""
        with torch.no_grad():
            self._collect(is_last=True)
            params = [param for param in self._group.fsdp_params if param.unsharded_accumulated_grad is not None]
            for param in params:
                self._widen(param)
        shards = [param.sharded_param for param in params]
        slots = [slot for shard in shards if isinstance(slot := self._slots.get(shard), ShardSlot)]
        begun: list[tuple[Any, Any, int]] = []
        try:
            for shard in shards:
                if shard.grad is None and shard.dtype is not torch.float32:
                    begun.append(self._begin(shard))
            for slot in slots:
                slot.is_wide = True
            with reduced_in_fp32(self._group):
                self._stock(*unused)
        finally:
            for slot in slots:
                slot.is_wide = False
            for shard, zeros, version in begun:
                if shard.grad is zeros and dtensor.shard(zeros)._version == version:
                    shard.grad = None  # nothing has come: it failed, or replicas are to be reduced later

    def _begin(self, shard: Any) -> tuple[Any, Any, int]:
        """Give a shard of 16 bits zeros as its gradient, since fully_shard adds FP32 to what is there alone."""
        zeros = shard.grad = dtensor.with_shard(torch.zeros_like(dtensor.shard(shard)), shard)
        slot = self._slots.get(shard)
        if isinstance(slot, ShardSlot):
            slot.forget()
            slot.is_fully_sharded = True
            RunningShard.put_into(zeros, slot)
        return shard, zeros, dtensor.shard(zeros)._version

    # ---- what has come ----

    def _collect(self, is_last: bool) -> None:
        """Take the gradients that autograd has brought: fold them into sums, or make sums of them.

        Args:
            is_last: whether sums are reduced next: a gradient that comes alone is not made one.
        """
        terms: list[tuple[WholeSum, Tensor]] = []
        for param in self._group.fsdp_params:
            grad, held = take_whole_gradient(param), param.unsharded_accumulated_grad
            if grad is None:
                if is_last and held is None:
                    param.unsharded_accumulated_grad = zeros_for_unused(self._group, param)
                continue
            _check(grad)
            if held is None:
                make = self._alone if is_last else self._first
                param.unsharded_accumulated_grad = make(grad)
                continue
            if held.like is not None and held.like.placements != grad.placements:
                grad = grad.redistribute(placements=held.like.placements)
            terms.append((held, _contiguous(grad)))
        self._fold_all(terms)

    def _alone(self, grad: Any) -> Any:
        """Return the only gradient of a window in FP32."""
        value = _contiguous(grad).float()
        if self._fold.is_scaled:
            value = value * fp32_scalar(self._fold.scale, value.device)
        return dtensor.with_shard(value, grad) if dtensor.is_dtensor(grad) else value

    def _first(self, grad: Any) -> WholeSum:
        """Return the sum of the first gradient of a window, which is that where it is not multiplied."""
        new = _contiguous(grad)
        format_ = self._formats.get(new.dtype)
        if format_ is None or format_.residual_dtype is torch.float32:
            new, format_ = new.float(), Format.PLAIN32
        held = WholeSum(new, format_, grad if dtensor.is_dtensor(grad) else None)
        if self._fold.is_scaled:
            held.sum = torch.empty_like(new)  # what the gradient lies in may be somebody else's, in this very pass
            self._fold_all([(held, new)], Start.FROM_ZERO)
        return held

    def _fold_all(self, terms: list[tuple[WholeSum, Tensor]], start: Start | None = None) -> None:
        """Fold gradients into their sums, those of one kind together.

        Args:
            terms: sums, and what is to be added.
            start: where all folds start; None is where each sum is.
        """
        batches: dict[tuple[Format, Start], list[tuple[WholeSum, Tensor]]] = {}
        for held, new in terms:
            is_whole = held.residual is not None or held.format.residual_dtype is None
            begins = start or (Start.CONTINUE if is_whole else Start.FROM_SUM)
            batches.setdefault((held.format, begins), []).append((held, new.to(held.sum.dtype)))
        for (format_, begins), batch in batches.items():
            sums = [held.sum for held, _ in batch]
            device, scale = sums[0].device, self._fold.scale
            for held, _ in batch:
                if held.residual is None and format_.residual_dtype is not None:
                    held.residual = torch.empty(held.sum.numel(), dtype=format_.residual_dtype, device=device)
            residuals: Any = None if format_.residual_dtype is None else [held.residual for held, _ in batch]
            scale = scale.to(device) if isinstance(scale, Tensor) else scale
            self._fold.kernels_on(device).fold(format_, begins, [new for _, new in batch], sums, residuals, scale, None)

    # ---- what goes on ----

    def _widen(self, param: Any) -> None:
        """Put the FP32 value in the place of a running sum, whose memory is free then."""
        held = param.unsharded_accumulated_grad
        if not isinstance(held, WholeSum):
            return
        value = held.sum.float()
        if held.residual is not None:
            value = torch.empty_like(held.sum, dtype=torch.float32)
            self._fold.kernels_on(value.device).decode(held.format, [held.sum], [held.residual], [value])
        param.unsharded_accumulated_grad = value if held.like is None else dtensor.with_shard(value, held.like)

    def _end(self) -> None:
        """Give fully_shard its function back, and what is not reduced yet, in the form that it has itself."""
        self._restore()
        with torch.no_grad():
            for param in self._group.fsdp_params:
                if isinstance(param.unsharded_accumulated_grad, WholeSum):
                    self._widen(param)
                    put_back_whole_gradient(param, param.unsharded_accumulated_grad)


def tensors_of(parts: Iterable[WholeGradients]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the sums of whole gradients, and their residuals, as they lie in memory."""
    sums = [held for whole in parts for held in whole.held()]
    return [held.sum for held in sums], [held.residual for held in sums if held.residual is not None]


def _contiguous(grad: Any) -> Tensor:
    """Return what this rank holds of a gradient, as the kernels take it."""
    local = dtensor.shard(grad) if dtensor.is_dtensor(grad) else grad
    return local.detach().resolve_neg().contiguous()


def _check(grad: Any) -> None:
    """Raise unless a gradient can be folded."""
    if grad.dtype not in FOLDED_DTYPES or grad.layout is not torch.strided:
        raise TypeError(
            f"fully_shard has a gradient of {grad.dtype}, {grad.layout}; reduce_in_fp32() takes dense ones in "
            "bfloat16, float16 and float32: detach(), or leave such parameters out of fully_shard"
        )
