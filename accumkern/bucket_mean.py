"""The mean over ranks of a bucket of accumulated gradients, in FP32: of sums and residuals together.

Two ways, by what the residuals are. Split sums are exchanged as they are stored, in 3 (split24) or 4 (split32) bytes::

    every rank        part p of its sums and residuals             -> rank p
    rank p            x = (...(x_0 + x_1) + ...) / divisor         x_r: what rank r sent, decoded; added in FP32
                      part p of the mean = encode(x)               -> every rank

So each element is added by one rank, in the order of ranks: the mean has the same bits on all of them, in every run.
FP32 sums go through an all-reduce of FP32 values, and so do all sums where several machines have several ranks each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from accumkern.backends import Kernels
from accumkern.exchange import Exchange
from accumkern.formats import Format, decode, encode, fp32_scalar
from accumkern.lost_rank import RollCall
from accumkern.ops import is_dense, same_order
from accumkern.slot import Slot

DOING = "in the mean over ranks of gradients"


class Member(NamedTuple):
    """A gradient in a bucket.

    Attributes:
        slot: of the parameter; None where it is not accumulated, or the bucket is not of this rank's gradients.
        half: the gradient in the bucket, shown in the parameter's order.
        residual: what belongs to it, flat in the memory order of ``.grad``; None counts as zero.
    """

    slot: Slot | None
    half: Tensor
    residual: Tensor | None

    @property
    def grad(self) -> Tensor | None:
        """``.grad`` of a parameter that is accumulated."""
        return None if self.slot is None else self.slot.param.grad

    @property
    def laid_out(self) -> Tensor:
        """``.grad``, or what lies as it will: of a parameter that only other ranks have used, the bucket makes it."""
        return self.half if self.grad is None else self.grad

    def within(self, flat: Tensor, buffer: Tensor) -> Tensor:
        """Return the part of a flat tensor that lies as the gradient does in the bucket's buffer."""
        half = self.half
        return flat.as_strided(half.shape, half.stride(), half.storage_offset() - buffer.storage_offset())


class BucketMean:
    """The mean over ranks of a bucket, which is taken in steps, so that others can go on while tensors travel.

    Args:
        bucket: of bfloat16 or float16 gradients, as DistributedDataParallel hands it to a communication hook.
        slots: of the parameters that are accumulated; none of them if the bucket is not of this rank's gradients.
        format_: of its sums; None where they have no residual.
        kernels: for the bucket's device.
        group: its ranks, which take the steps of all buckets in the same order.
        divide_by: what the sum over ranks is divided by.
        by_parts: whether split sums are exchanged by parts.
    """

    def __init__(
        self,
        bucket: Any,
        slots: Mapping[Tensor, Slot],
        format_: Format | None,
        kernels: Kernels,
        group: dist.ProcessGroup,
        divide_by: int,
        by_parts: bool,
    ) -> None:
        self._buffer: Tensor = bucket.buffer()
        self._format, self._kernels = format_, kernels
        self._is_by_parts = by_parts and format_ in (Format.SPLIT24, Format.SPLIT32)
        self._group, self._divide_by = group, divide_by
        self._members: list[Member] = []
        for param, half in zip(bucket.parameters(), bucket.gradients(), strict=True):
            if is_dense(param):  # the bucket holds it in this order, and torch shows it in another
                half = half.as_strided(param.shape, param.stride(), half.storage_offset())
            slot = slots.get(param)
            self._members.append(Member(slot, half, None if slot is None else _residual_in_bucket(slot, format_)))

    def steps(self, ready: Callable[[], None]) -> Iterator[None]:
        """Take the mean; each stop is where tensors have been sent, and the next step waits for others.

        At the end the bucket holds the mean, and the residuals, of gradients that have slots, what it lacks.

        Args:
            ready: called each time before anything is sent, when this rank has all that it needs for that.

        Raises:
            RanksError: in a step, a rank is gone, or has not come within the group's timeout.
        """
        return self.by_parts(ready) if self._is_by_parts else self.all_reduced(ready)

    @property
    def reduced(self) -> list[tuple[Slot, Tensor]]:
        """The slots whose residuals belong to the mean, once it is there, and the mean."""
        if self._format is None or self._format.residual_dtype is None:
            return []
        return [(member.slot, member.half) for member in self._members if member.slot is not None]

    # ---- split sums ----

    def by_parts(self, ready: Callable[[], None]) -> Iterator[None]:
        """Take the mean of split sums, which travel as they are stored."""
        buffer, format_ = self._buffer, self._format
        assert format_ is not None
        assert format_.residual_dtype is not None
        low = torch.empty_like(buffer, dtype=format_.residual_dtype)
        for member in self._members:
            part = member.within(low, buffer)
            if member.residual is None:
                part.zero_()
            else:
                part.copy_(_in_shape_of(member.grad, member.residual))
        flats = [buffer, low]
        exchange = Exchange(self._group, buffer.numel(), DOING, ready)
        rows = [exchange.rows(flat) for flat in flats]
        transfer = exchange.scatter(flats, rows)
        yield
        transfer.wait()
        own = exchange.own
        self._kernels.mean(format_, rows[0], rows[1], self._divide_by, buffer[own], low[own])
        del rows
        transfer = exchange.gather(flats)
        yield
        transfer.wait()
        for member in self._members:
            if member.slot is not None:
                residual = member.slot.residual_for(member.half, format_.residual_dtype)
                _in_shape_of(member.laid_out, residual).copy_(member.within(low, buffer))
        torch.autograd.graph.increment_version([member.half for member in self._members])

    # ---- FP32 sums, and gradients without residuals ----

    def all_reduced(self, ready: Callable[[], None]) -> Iterator[None]:
        """Take the mean by an all-reduce of FP32 values."""
        buffer, format_ = self._buffer, self._format
        wide = torch.empty_like(buffer, dtype=torch.float32)
        stored: list[tuple[Tensor, Tensor, Tensor]] = []
        for member in self._members:
            part, grad = member.within(wide, buffer), member.grad
            if member.residual is None or format_ is None or grad is None:
                part.copy_(member.half)
            elif same_order(grad, member.half):
                stored.append((grad, member.residual, part))
            else:
                part.copy_(decode(format_, grad, _in_shape_of(grad, member.residual)))
        if format_ is not None and stored:
            sums, residuals, parts = map(list, zip(*stored, strict=True))
            self._kernels.decode(format_, sums, residuals, parts)
        ready()
        work = dist.all_reduce(wide, group=self._group, async_op=True)
        yield
        try:
            work.wait()
        except RuntimeError as error:
            raise RollCall(self._group, DOING).lost(error) from error
        to_store: list[tuple[Tensor, Tensor, Tensor]] = []
        for member in self._members:
            part, half, grad = member.within(wide, buffer), member.half, member.laid_out
            if member.slot is None or format_ is None or format_.residual_dtype is None:
                half.copy_(part.div_(fp32_scalar(self._divide_by, part.device)))
                continue
            residual = member.slot.residual_for(half, format_.residual_dtype)
            if same_order(grad, half):
                to_store.append((part, half, residual))
            else:
                upper, low = encode(format_, part.div_(fp32_scalar(self._divide_by, part.device)))
                assert low is not None
                half.copy_(upper)
                _in_shape_of(grad, residual).copy_(low)
        if format_ is not None and to_store:
            parts, halves, residuals = map(list, zip(*to_store, strict=True))
            self._kernels.encode(format_, parts, self._divide_by, halves, residuals)
            torch.autograd.graph.increment_version(halves)


def _residual_in_bucket(slot: Slot, format_: Format | None) -> Tensor | None:
    """Return the residual of a gradient that has just been put into a bucket, if it has one, as it lies in memory.

    Where gradients are views of the bucket, ``.grad`` is another tensor than what was folded, with its values; and its
    version is that of all others there, of which DistributedDataParallel zeroes those that are not used.
    """
    grad = slot.param.grad
    residual = slot.residual
    if grad is None or format_ is None or residual is None or residual.dtype is not format_.residual_dtype:
        return None
    folded = slot.written()
    if slot.owns(grad):
        return residual
    if not grad._is_view() or slot.version < 0:
        return None
    if folded is grad and residual.numel() == grad.numel():  # or it was itself zeroed
        return (_in_shape_of(grad, residual) * (grad != 0)).as_strided((grad.numel(),), (1,))
    return residual if folded is None or folded._version == slot.version else None


def _in_shape_of(grad: Any, residual: Tensor) -> Tensor:
    return residual.as_strided(grad.shape, grad.stride())
