"""The mean over the ranks of DistributedDataParallel, taken in FP32: of sum and residual together."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from accumkern.backends import Kernels
from accumkern.bucket_mean import DOING, BucketMean
from accumkern.exchange import share_machines
from accumkern.formats import BUFFERS
from accumkern.slot import Slot
from accumkern.torch_private import (
    NO_BACKWARD,
    current_graph_task_id,
    divides_by_all_ranks,
    has_communication_hook,
    queue_callback,
    refusal_of_hook,
    register_communication_hook,
)

#: Dtypes of gradients whose sums are wider than they are.
HALVES = (torch.bfloat16, torch.float16)


def reduce_in_fp32(model: Any, reduction: Fp32Reduction) -> None:
    """Let ``reduction`` take the means of a model, until it ends.

    Raises:
        RuntimeError: the model has another reduction that has not ended, or a communication hook of somebody else.
    """
    refusal = refusal_of_hook(model)
    if refusal is not None:
        raise RuntimeError(f"model is a DistributedDataParallel with {refusal}; reduce_in_fp32() cannot register one")
    hook = _HOOKS.get(model)
    if hook is None:
        hook = CommunicationHook(model)
        try:
            # A lambda, because DDP compares annotations, and takes none that are strings.
            register_communication_hook(model, lambda state, bucket: hook.start(bucket))
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
            if bucket.index() == 0:
                reduction.begin()
                if not is_shadow:
                    # DistributedDataParallel writes the gradients in a callback that it queues later than this one.
                    queue_callback(lambda: queue_callback(reduction.end))
            if buffer.dtype in HALVES and not buffer.is_sparse:
                future = reduction.start(bucket, self._group, divide_by, is_shadow)
            else:
                future = self._as_without(buffer, divide_by)
            if bucket.is_last():  # buckets come in the order of their numbers: nothing is left to hide the rest behind
                reduction.drain()
            return future
        return self._as_without(buffer, divide_by)

    def _as_without(self, buffer: Tensor, divide_by: int) -> Any:
        """Start what DistributedDataParallel does without a hook; return the future of the buffer."""
        if buffer.is_sparse:
            buffer.div_(divide_by)
        else:
            buffer.mul_(1 / divide_by)
        work = dist.all_reduce(buffer, group=self._group, async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    def _divisor(self, is_shadow: bool, device: torch.device) -> int:
        """Return what DistributedDataParallel divides by: the number of ranks, or of those that have not joined."""
        if divides_by_all_ranks(self._model()):
            return self._group.size()
        there = torch.tensor(0 if is_shadow else 1, device=device)
        dist.all_reduce(there, group=self._group)
        return int(there)


_HOOKS: weakref.WeakKeyDictionary[Any, CommunicationHook] = weakref.WeakKeyDictionary()


class Fp32Reduction:
    """How :meth:`accumkern.GradAccumulator.reduce_in_fp32` takes the mean: :class:`accumkern.bucket_mean.BucketMean`.

    While tensors of one bucket travel, the backward pass goes on, until the next bucket is full: then what has come is
    added, and sent on. So all ranks send in the same order. On a GPU the host waits for nothing, and the steps of a
    bucket follow each other on a stream of their own.

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
        self._streams: dict[torch.device, Any] = {}
        self._by_parts: dict[dist.ProcessGroup, bool] = {}
        self._in_flight: list[Iterator[None]] = []  # the steps of buckets that are not done, oldest first
        self._reduced: list[tuple[Slot, Tensor]] = []  # with the mean

    @property
    def is_on(self) -> bool:
        """Whether the accumulator is attached, to any parameter."""
        return bool(self._slots)

    def begin(self) -> None:
        """Prepare for the buckets of a model."""
        self._in_flight = []  # the last backward pass may have failed
        self._reduced = []

    def start(
        self,
        bucket: Any,
        group: dist.ProcessGroup,
        divide_by: int,
        is_shadow: bool = False,
        ready: Callable[[], None] = lambda: None,
    ) -> torch.futures.Future[Tensor]:
        """Start the reduction of a bucket, and go on with those before it; return the future of its buffer.

        Args:
            bucket: of bfloat16 or float16 gradients.
            group: the ranks.
            divide_by: their sum is divided by this.
            is_shadow: whether this rank has no inputs any more, so that the bucket is not of its gradients.
            ready: of :meth:`accumkern.bucket_mean.BucketMean.steps`.
        """
        buffer: Tensor = bucket.buffer()
        is_on_cpu = buffer.device.type == "cpu"
        future: torch.futures.Future[Tensor] = torch.futures.Future(devices=None if is_on_cpu else [buffer.device])
        self._advance()
        if group not in self._by_parts:
            self._by_parts[group] = not share_machines(group, buffer.device, DOING)
        mean = BucketMean(
            bucket,
            {} if is_shadow else self._slots,
            self._formats.get(buffer.dtype),
            self._kernels_on(buffer.device),
            group,
            divide_by,
            self._by_parts[group],
        )
        steps = self._steps(mean, buffer, future, ready)
        next(steps)
        self._in_flight.append(steps)
        if not is_on_cpu:
            self.drain()
        return future

    def drain(self) -> None:
        """Go on with all buckets until they are done."""
        while self._in_flight:
            self._advance()

    def end(self) -> None:
        """Let the residuals of the means belong to the gradients, now that these are the means."""
        for slot, mean in self._reduced:
            grad: Any = slot.param.grad
            if slot.owns(grad):  # of a parameter that no rank uses, which is left as it was: the mean over equal ones
                slot.residual.as_strided(mean.shape, grad.stride()).mul_(mean == grad)
            elif grad is not None:
                slot.remember()
        self._reduced = []

    def _advance(self) -> None:
        """Take the next step of every bucket that is not done."""
        self._in_flight = [steps for steps in self._in_flight if next(steps, _DONE) is not _DONE]

    def _steps(
        self, mean: BucketMean, buffer: Tensor, future: torch.futures.Future[Tensor], ready: Callable[[], None]
    ) -> Iterator[None]:
        """Take the mean of a bucket in steps, and let the future know when it is there."""
        steps = mean.steps(ready)
        is_done = False
        while not is_done:
            with self._aside(buffer.device):
                is_done = next(steps, _DONE) is _DONE
                if is_done:
                    self._reduced += mean.reduced
                    future.set_result(buffer)
            if not is_done:
                yield

    def _aside(self, device: torch.device) -> AbstractContextManager[object]:
        """Return a block whose work on a GPU follows what the current stream has, and does not hold it up."""
        if device.type != "cuda":
            return nullcontext()
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        self._streams[device].wait_stream(torch.cuda.current_stream(device))
        return torch.cuda.stream(self._streams[device])


_DONE = object()
