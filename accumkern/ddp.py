"""The mean over the ranks of DistributedDataParallel, taken in FP32: of sum and residual together."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from accumkern.backends import Kernels
from accumkern.formats import BUFFERS, Format, decode, encode, fp32_scalar
from accumkern.ops import is_dense, same_order
from accumkern.slot import Slot
from accumkern.torch_private import (
    NO_BACKWARD,
    current_graph_task_id,
    divides_by_all_ranks,
    has_communication_hook,
    queue_callback,
)

#: Dtypes of gradients whose sums are wider than they are.
HALVES = (torch.bfloat16, torch.float16)


def reduce_in_fp32(model: Any, reduction: Fp32Reduction) -> None:
    """Let ``reduction`` take the means of a model, until it ends.

    Raises:
        RuntimeError: the model has another reduction that has not ended, or a communication hook of somebody else.
    """
    hook = _HOOKS.get(model)
    if hook is None:
        hook = CommunicationHook(model)
        try:
            # A lambda, because DDP compares annotations, and takes none that are strings.
            model.register_comm_hook(None, lambda state, bucket: hook.start(bucket))
        except RuntimeError as error:
            raise RuntimeError(
                f"model has a communication hook already, and DistributedDataParallel takes only one: {error}"
            ) from error
        _HOOKS[model] = hook
    elif hook.reduction is not None and hook.reduction.is_on:
        raise RuntimeError(
            "model has a communication hook already: reduce_in_fp32() was called for it by an accumulator that is "
            "attached still; detach() that first"
        )
    hook.reduction = reduction


def reduction_of(model: Any) -> Fp32Reduction | None:
    """Return what takes the means of a model in FP32, or None.

    Raises:
        ValueError: the model has a communication hook of somebody else.
    """
    hook = _HOOKS.get(model)
    if hook is None:
        if has_communication_hook(model):
            raise ValueError(
                "model has a communication hook, which only a backward pass can call, and acc.backward() takes the "
                "mean over ranks after the last one: use acc.reduce_in_fp32(model), or no hook"
            )
        return None
    return hook.reduction if hook.reduction is not None and hook.reduction.is_on else None


class CommunicationHook:
    """The communication hook of a model, which DistributedDataParallel has no way to take off again.

    While there is a reduction, that takes the means; else they are taken as without a hook, bit for bit.

    Attributes:
        reduction: of the accumulator that is attached, or None.
    """

    def __init__(self, model: Any) -> None:
        self.reduction: Fp32Reduction | None = None
        self._model = weakref.ref(model)  # which holds this hook
        self._group = model.process_group

    def start(self, bucket: Any) -> Any:
        """Start the reduction of a bucket; return the future of its buffer."""
        # Under join(), a rank without inputs calls the hook outside of a backward pass, with buckets of zeros.
        is_shadow = current_graph_task_id() == NO_BACKWARD
        if self.reduction is not None and not self.reduction.is_on:
            self.reduction = None
        reduction, buffer = self.reduction, bucket.buffer()
        divide_by = self._divisor(is_shadow, buffer.device)
        if reduction is not None:
            if bucket.index() == 0 and not is_shadow:
                reduction.begin()
                # DistributedDataParallel writes the gradients in a callback that it queues later than this one.
                queue_callback(lambda: queue_callback(reduction.end))
            if buffer.dtype in HALVES:
                return reduction.start(bucket, self._sum, divide_by, is_shadow)
        if buffer.is_sparse:
            buffer.div_(divide_by)
        else:
            buffer.mul_(1 / divide_by)
        return self._sum(buffer).then(lambda future: future.value()[0])

    def _sum(self, buffer: Tensor) -> Any:
        """Start to take the sum of a buffer over ranks; return its future."""
        return torch.distributed.all_reduce(buffer, group=self._group, async_op=True).get_future()

    def _divisor(self, is_shadow: bool, device: torch.device) -> int:
        """Return what DistributedDataParallel divides by: the number of ranks, or of those that have not joined."""
        if divides_by_all_ranks(self._model()):
            return self._group.size()
        there = torch.tensor(0 if is_shadow else 1, device=device)
        torch.distributed.all_reduce(there, group=self._group)
        return int(there)


_HOOKS: weakref.WeakKeyDictionary[Any, CommunicationHook] = weakref.WeakKeyDictionary()


class Fp32Reduction:
    """How :meth:`accumkern.GradAccumulator.reduce_in_fp32` takes the mean.

    A bucket holds the upper halves of the sums. Their residuals are added to a copy of it in FP32, the copy is reduced,
    and the mean is split again: the upper halves go into the bucket, from where DistributedDataParallel takes them, and
    the low bits become the new residuals.

    Args:
        slots: of the parameters whose gradients are accumulated; empty once the accumulator is detached.
        buffer: a name in :data:`accumkern.formats.BUFFERS`.
        kernels_on: the kernels for a device.
    """

    def __init__(
        self, slots: Mapping[Tensor, Slot], buffer: str, kernels_on: Callable[[torch.device], Kernels]
    ) -> None:
        self._slots = slots
        self._formats = BUFFERS[buffer]
        self._kernels_on = kernels_on
        self._in_flight: torch.futures.Future[Tensor] | None = None
        self._reduced: list[Slot] = []

    @property
    def is_on(self) -> bool:
        """Whether the accumulator is attached, to any parameter."""
        return bool(self._slots)

    def begin(self) -> None:
        """Prepare for the buckets of a model."""
        self._in_flight = None  # the last backward pass may have failed
        self._reduced = []

    def start(self, bucket: Any, take_sum: Callable[[Tensor], Any], divide_by: int, is_shadow: bool) -> Any:
        """Start the reduction of a bucket; return the future of its buffer.

        Args:
            bucket: of bfloat16 or float16 gradients.
            take_sum: starts to take the sum of a tensor over ranks, in place; returns its future.
            divide_by: their sum is divided by this.
            is_shadow: whether this rank has no inputs any more, so that the bucket is not of its gradients.
        """
        buffer = bucket.buffer()
        if self._in_flight is not None:
            self._in_flight.wait()  # so that there is one copy in FP32 at a time
        format_ = self._formats.get(buffer.dtype)  # None: no such gradient is accumulated
        wide = torch.empty(buffer.numel(), dtype=torch.float32, device=buffer.device)
        members: list[tuple[Slot | None, Tensor, Tensor]] = []
        stored: list[tuple[Tensor, Tensor, Tensor]] = []
        for param, half in zip(bucket.parameters(), bucket.gradients(), strict=True):
            offset = half.storage_offset()
            if is_dense(param):  # the bucket holds it in this order, and torch shows it in another
                half = half.as_strided(param.shape, param.stride(), offset)
            part = wide.as_strided(half.shape, half.stride(), offset - buffer.storage_offset())
            slot = None if is_shadow else self._slots.get(param)
            residual = None if slot is None else _residual_in_bucket(slot, format_)
            if residual is None or format_ is None:
                part.copy_(half)
            elif same_order(param.grad, half):
                stored.append((param.grad, residual, part))
            else:
                part.copy_(decode(format_, param.grad, _in_shape_of(param.grad, residual)))
            members.append((slot, half, part))
        if format_ is not None and stored:
            sums, residuals, parts = map(list, zip(*stored, strict=True))
            self._kernels_on(buffer.device).decode(format_, sums, residuals, parts)

        def split(future: torch.futures.Future[Any]) -> Tensor:
            future.wait()  # raises what went wrong
            self._split(format_, members, divide_by)
            return buffer

        self._in_flight = take_sum(wide).then(split)
        return self._in_flight

    def _split(self, format_: Format | None, members: list[tuple[Slot | None, Tensor, Tensor]], divide_by: int) -> None:
        """Divide the sums over ranks, and store the means: halves in the bucket, and residuals."""
        to_store: list[tuple[Tensor, Tensor, Tensor]] = []
        for slot, half, part in members:
            grad = None if slot is None else slot.param.grad
            if slot is None or grad is None or format_ is None or format_.residual_dtype is None:
                half.copy_(part.div_(fp32_scalar(divide_by, part.device)))
                continue
            residual = slot.residual_for(half, format_.residual_dtype)
            if same_order(grad, half):
                to_store.append((part, half, residual))
            else:
                upper, low = encode(format_, part.div_(fp32_scalar(divide_by, part.device)))
                assert low is not None
                half.copy_(upper)
                _in_shape_of(grad, residual).copy_(low)
            self._reduced.append(slot)
        if format_ is not None and to_store:
            parts, halves, residuals = map(list, zip(*to_store, strict=True))
            self._kernels_on(parts[0].device).encode(format_, parts, divide_by, halves, residuals)
            torch.autograd.graph.increment_version(halves)

    def end(self) -> None:
        """Let the residuals of the means belong to the gradients, now that these are the means."""
        for slot in self._reduced:
            if slot.owns(slot.param.grad):  # of a parameter that no rank uses, which is left as it was
                slot.forget()
            elif slot.param.grad is not None:
                slot.remember()
        self._reduced = []
        self._in_flight = None


def _residual_in_bucket(slot: Slot, format_: Format | None) -> Tensor | None:
    """Return the residual of a gradient that has just been put into a bucket, if it has one, as it lies in memory.

    Where gradients are views of the bucket, ``.grad`` is another tensor than what was folded, with its values.
    """
    grad = slot.param.grad
    residual = slot.residual
    if grad is None or format_ is None or residual is None or residual.dtype is not format_.residual_dtype:
        return None
    folded = slot.written()
    moved = grad._is_view() and slot.version >= 0 and (folded is None or folded._version == slot.version)
    return residual if moved or slot.owns(grad) else None


def _in_shape_of(grad: Tensor, residual: Tensor) -> Tensor:
    return residual.as_strided(grad.shape, grad.stride())
