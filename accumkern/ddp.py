"""The mean over the ranks of DistributedDataParallel, taken in FP32: of sum and residual together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from accumkern.backends import Kernels
from accumkern.formats import BUFFERS, Format, decode, encode, fp32_scalar
from accumkern.ops import same_order
from accumkern.slot import Slot
from accumkern.torch_private import queue_callback

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Fp32Reduction:
    """The communication hook of :meth:`accumkern.GradAccumulator.reduce_in_fp32`.

    A bucket holds the upper halves of the sums. Their residuals are added to a copy of it in FP32, the copy is reduced,
    and the mean is split again: the upper halves go into the bucket, from where DistributedDataParallel takes them, and
    the low bits become the new residuals.

    Args:
        slots: of the parameters whose gradients are accumulated; empty once the accumulator is detached.
        buffer: a name in :data:`accumkern.formats.BUFFERS`.
        kernels_on: the kernels for a device.
        group: the ranks.
    """

    def __init__(
        self,
        slots: Mapping[Tensor, Slot],
        buffer: str,
        kernels_on: Callable[[torch.device], Kernels],
        group: ProcessGroup,
    ) -> None:
        self._slots = slots
        self._formats = BUFFERS[buffer]
        self._kernels_on = kernels_on
        self._group = group
        self._in_flight: torch.futures.Future[Tensor] | None = None
        self._reduced: list[Slot] = []

    def start(self, bucket: Any) -> Any:
        """Start the reduction of a bucket; return the future of its buffer."""
        if bucket.index() == 0:
            self._in_flight = None  # the last backward pass may have failed
            self._reduced = []
            # DistributedDataParallel writes the gradients in a callback that it queues later than this one.
            queue_callback(lambda: queue_callback(self._own_means))
        buffer = bucket.buffer()
        if buffer.dtype not in (torch.bfloat16, torch.float16):
            from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

            return allreduce_hook(self._group, bucket)
        if self._in_flight is not None:
            self._in_flight.wait()  # so that there is one copy in FP32 at a time
        format_ = self._formats.get(buffer.dtype)  # None: no such gradient is accumulated
        wide = torch.empty(buffer.numel(), dtype=torch.float32, device=buffer.device)
        members: list[tuple[Slot | None, Tensor, Tensor]] = []
        stored: list[tuple[Tensor, Tensor, Tensor]] = []
        for param, half in zip(bucket.parameters(), bucket.gradients(), strict=True):
            part = wide.as_strided(half.shape, half.stride(), half.storage_offset() - buffer.storage_offset())
            slot = self._slots.get(param)
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
            self._split(format_, members)
            return buffer

        work = torch.distributed.all_reduce(wide, group=self._group, async_op=True)
        self._in_flight = work.get_future().then(split)
        return self._in_flight

    def _split(self, format_: Format | None, members: list[tuple[Slot | None, Tensor, Tensor]]) -> None:
        """Divide the sums over ranks by their number, and store the means: halves in the bucket, and residuals."""
        ranks = self._group.size()
        to_store: list[tuple[Tensor, Tensor, Tensor]] = []
        for slot, half, part in members:
            grad = None if slot is None else slot.param.grad
            if slot is None or grad is None or format_ is None or format_.residual_dtype is None:
                half.copy_(part.div_(fp32_scalar(ranks, part.device)))
                continue
            residual = slot.residual_for(half, format_.residual_dtype)
            if same_order(grad, half):
                to_store.append((part, half, residual))
            else:
                upper, low = encode(format_, part.div_(fp32_scalar(ranks, part.device)))
                assert low is not None
                half.copy_(upper)
                _in_shape_of(grad, residual).copy_(low)
            self._reduced.append(slot)
        if format_ is not None and to_store:
            parts, halves, residuals = map(list, zip(*to_store, strict=True))
            self._kernels_on(parts[0].device).encode(format_, parts, ranks, halves, residuals)
            torch.autograd.graph.increment_version(halves)

    def _own_means(self) -> None:
        """Let the residuals of the mean belong to the gradients, now that they are the mean."""
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
