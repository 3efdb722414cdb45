"""Gradients that are spread over processes: the shards of a DTensor, and sums over ranks."""

from __future__ import annotations

import copy
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from accumkern.backends import kernels
from accumkern.formats import BUFFERS, Format, decode, encode
from accumkern.ops import same_order

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from accumkern.accumulator import GradAccumulator
    from accumkern.parameter import Parameter

_queue_callback = torch.autograd.Variable._execution_engine.queue_callback


class RunningShard(Tensor):
    """This rank's shard of a running gradient, where ``fully_shard`` adds to it.

    fully_shard calls the hooks of a parameter after it has added: it computes ``param.grad._local_tensor += new``. This
    tensor is as any other but for that addition, which is a fold. Copies of it are plain tensors.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    parameter: weakref.ref[Parameter]

    @staticmethod
    def put_into(grad: Any, parameter: Parameter) -> None:
        """Let the shard of ``grad`` fold what is added to it."""
        running = shard(grad).as_subclass(RunningShard)
        running.parameter = weakref.ref(parameter)
        grad._local_tensor = running

    def __iadd__(self, new: Any) -> RunningShard:  # type: ignore[misc]
        parameter = self.parameter()
        if parameter is None or not isinstance(new, Tensor) or not parameter.accumulator._takes_shard():
            return self.add_(new)  # type: ignore[return-value]
        parameter.accumulator._fold_shard(parameter, self, new)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return copy.deepcopy(self.as_subclass(Tensor), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)


def is_in_group() -> bool:
    """Return whether this process has a process group, so that others may read and write ``.grad`` at any moment."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_dtensor(tensor: Tensor) -> bool:
    """Return whether ``tensor`` is a DTensor."""
    if not is_traceable_wrapper_subclass(tensor) or not torch.distributed.is_available():
        return False  # without an import that takes its time
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


@torch.no_grad()
def shard(grad: Any) -> Tensor:
    """Return the very tensor that holds this rank's part of a DTensor, once a collective that writes it is done."""
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    local = grad.to_local()
    return local.wait() if isinstance(local, AsyncCollectiveTensor) else local


@torch.no_grad()
def with_shard(local: Tensor, like: Any) -> Any:
    """Return a DTensor laid out over ranks as ``like`` is, of which this rank holds ``local``."""
    from torch.distributed.tensor import DTensor

    shape, stride = like.shape, like.stride()
    return DTensor.from_local(local, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride)


def check_layout(name: str, tensor: Tensor, of: str, param: Tensor) -> None:
    """Raise unless ``tensor`` is spread over ranks as ``param`` is: both alike, or neither.

    Args:
        name: what to call ``tensor``.
        tensor: what is loaded.
        of: what to call ``param``.
        param: the parameter that it is loaded for.
    """
    loaded, wanted = is_dtensor(tensor), is_dtensor(param)
    if loaded is not wanted:
        kinds = "DTensor" if loaded else "plain tensor", "DTensor" if wanted else "plain tensor"
        raise TypeError(f"{name} is a {kinds[0]}; {of} is a {kinds[1]}")
    if not loaded:
        return
    a: Any = tensor
    b: Any = param
    if a.placements != b.placements or a.device_mesh != b.device_mesh:
        raise ValueError(
            f"{name} is laid out as {a.placements} on {a.device_mesh}; {of} as {b.placements} on {b.device_mesh}. "
            "Redistribute it, or let torch.distributed.checkpoint do it"
        )


def is_pending(grad: Any) -> bool:
    """Return whether the value of a DTensor is the sum of what its ranks hold."""
    return any(placement.is_partial() for placement in grad.placements)


@torch.no_grad()
def reduced(local: Tensor, like: Any) -> Tensor:
    """Return this rank's part of the sum that ``local`` is a term of, where ``like`` is such a sum."""
    from torch.distributed.tensor import Replicate

    placements = [Replicate() if placement.is_partial() else placement for placement in like.placements]
    return shard(with_shard(local, like).redistribute(placements=placements))


def groups_of_shards(grad: Any) -> tuple[ProcessGroup, ...]:
    """Return the groups of ranks that hold different elements of a DTensor."""
    return tuple(
        grad.device_mesh.get_group(dim)
        for dim, placement in enumerate(grad.placements)
        if not placement.is_replicate() and not placement.is_partial()
    )


def norm_over(groups: tuple[ProcessGroup, ...], norm: Tensor, norm_type: float) -> Tensor:
    """Return the norm of a vector of which each rank holds some elements.

    Args:
        groups: of ranks that hold different elements; those of one group after the other are combined.
        norm: of the elements of this rank, 0-dim.
        norm_type: a positive number, or infinity.
    """
    if not groups:
        return norm
    if norm_type == float("inf"):  # the greatest of numbers and NaN may be either
        both = torch.stack([norm.nan_to_num(0.0, posinf=torch.inf), norm.isnan().to(norm.dtype)])
        for group in groups:
            torch.distributed.all_reduce(both, torch.distributed.ReduceOp.MAX, group=group)
        return torch.where(both[1] > 0, torch.nan, both[0])
    power = norm.double() ** norm_type
    for group in groups:
        torch.distributed.all_reduce(power, group=group)
    return (power ** (1 / norm_type)).to(norm.dtype)


class Fp32Reduction:
    """The communication hook of :meth:`accumkern.GradAccumulator.reduce_in_fp32`.

    A bucket holds the upper halves of the sums. Their residuals are added to a copy of it in FP32, the copy is reduced,
    and the mean is split again: the upper halves go into the bucket, from where DistributedDataParallel takes them, and
    the low bits become the new residuals.
    """

    def __init__(self, accumulator: GradAccumulator, group: ProcessGroup) -> None:
        self._accumulator = weakref.ref(accumulator)
        self._group = group
        self._in_flight: torch.futures.Future[Tensor] | None = None
        self._reduced: list[Parameter] = []

    def start(self, bucket: Any) -> Any:
        """Start the reduction of a bucket; return the future of its buffer."""
        if bucket.index() == 0:
            self._in_flight = None  # the last backward pass may have failed
            self._reduced = []
            # DistributedDataParallel writes the gradients in a callback that it queues later than this one.
            _queue_callback(lambda: _queue_callback(self._adopt))
        buffer = bucket.buffer()
        if buffer.dtype not in (torch.bfloat16, torch.float16):
            from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

            return allreduce_hook(self._group, bucket)
        if self._in_flight is not None:
            self._in_flight.wait()  # so that there is one copy in FP32 at a time
        accumulator = self._accumulator()
        backend = "eager" if accumulator is None else accumulator._backend_on(buffer.device)
        wide = torch.empty(buffer.numel(), dtype=torch.float32, device=buffer.device)
        members = []
        stored: dict[Format, list[tuple[Tensor, Tensor, Tensor]]] = {}
        for param, half in zip(bucket.parameters(), bucket.gradients(), strict=True):
            part = wide.as_strided(half.shape, half.stride(), half.storage_offset() - buffer.storage_offset())
            parameter = None if accumulator is None else accumulator._parameters.get(param)
            format_ = None if accumulator is None else BUFFERS[accumulator.buffer].get(half.dtype)
            residual = None if parameter is None else _residual_in_bucket(parameter, format_)
            if residual is None or format_ is None:
                part.copy_(half)
            elif same_order(param.grad, half):
                stored.setdefault(format_, []).append((param.grad, residual, part))
            else:
                part.copy_(decode(format_, param.grad, _in_shape_of(param.grad, residual)))
            members.append((parameter, format_, half, part))
        for format_, tensors in stored.items():
            sums, residuals, parts = map(list, zip(*tensors, strict=True))
            kernels(backend).decode(format_, sums, residuals, parts)

        def split(future: torch.futures.Future[Any]) -> Tensor:
            future.wait()  # raises what went wrong
            ranks = self._group.size()
            to_store: dict[Format, list[tuple[Tensor, Tensor, Tensor]]] = {}
            for parameter, format_, half, part in members:
                grad = None if parameter is None else parameter.param.grad
                if parameter is None or grad is None or format_ is None or format_.residual_dtype is None:
                    half.copy_(part.div_(ranks))
                    continue
                residual = parameter.residual_of_dtype(format_.residual_dtype)
                if same_order(grad, half):
                    to_store.setdefault(format_, []).append((part, half, residual))
                else:
                    upper, low = encode(format_, part.div_(ranks))
                    assert low is not None
                    half.copy_(upper)
                    _in_shape_of(grad, residual).copy_(low)
                self._reduced.append(parameter)
            for format_, tensors in to_store.items():
                parts, halves, residuals = map(list, zip(*tensors, strict=True))
                kernels(backend).encode(format_, parts, ranks, halves, residuals)
                torch.autograd.graph.increment_version(halves)
            return buffer

        work = torch.distributed.all_reduce(wide, group=self._group, async_op=True)
        self._in_flight = work.get_future().then(split)
        return self._in_flight

    def _adopt(self) -> None:
        """Let the residuals of the mean belong to the gradients, now that they are the mean."""
        for parameter in self._reduced:
            if parameter.owns(parameter.param.grad):  # of a parameter that no rank uses, which is left as it was
                parameter.forget()
            elif parameter.param.grad is not None:
                parameter.remember()
        self._reduced = []
        self._in_flight = None


def _residual_in_bucket(parameter: Parameter, format_: Format | None) -> Tensor | None:
    """Return the residual of a gradient that has just been put into a bucket, if it has one, as it lies in memory.

    Where gradients are views of the bucket, ``.grad`` is another tensor than what was folded, with its values.
    """
    grad = parameter.param.grad
    residual = parameter.residual
    if grad is None or format_ is None or residual is None or residual.dtype is not format_.residual_dtype:
        return None
    folded = parameter.written()
    moved = grad._is_view() and parameter.version >= 0 and (folded is None or folded._version == parameter.version)
    if not parameter.owns(grad) and not moved:
        return None
    return residual


def _in_shape_of(grad: Tensor, residual: Tensor) -> Tensor:
    return residual.as_strided(grad.shape, grad.stride())
