"""Tensors that are spread over processes: pure functions of DTensors and process groups."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from accumkern.formats import to_fp64
from accumkern.torch_private import dtensor_of, local_tensor, sendable, spec_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch.distributed import ProcessGroup


_PLAIN = (torch.nn.Parameter, Tensor)


def is_in_group() -> bool:
    """Return whether this process has a process group, so that others may read and write ``.grad`` at any moment."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_dtensor(tensor: Tensor) -> bool:
    """Return whether ``tensor`` is a DTensor."""
    if type(tensor) in _PLAIN:
        return False
    module = sys.modules.get("torch.distributed.tensor")  # without an import that takes its time
    return module is not None and isinstance(tensor, module.DTensor)


def shard(grad: Any) -> Tensor:
    """Return the very tensor that holds this rank's part of a DTensor, once a collective that writes it is done."""
    return local_tensor(grad)


def version_of(tensor: Tensor) -> int:
    """Return a number that grows with every change of a tensor. A DTensor and its shard count their own."""
    return tensor._version + shard(tensor)._version if is_dtensor(tensor) else tensor._version


def is_complete_as(grad: Any, param: Any) -> bool:
    """Return whether a DTensor is laid out over ranks as another is, and each rank has the values that it holds."""
    a, b = spec_of(grad), spec_of(param)
    is_same = a is b or (a.placements == b.placements and a.device_mesh == b.device_mesh)
    return is_same and not is_pending(grad)


def computes_on(param: Any) -> torch.device:
    """Return where a parameter is computed with: the ranks of a DTensor may do that elsewhere than its shards are.

    Those are in host memory under fully_shard's CPUOffloadPolicy.
    """
    if not is_dtensor(param) or param.device_mesh.device_type == param.device.type:
        return param.device
    kind = param.device_mesh.device_type
    return torch.device(kind, torch.get_device_module(kind).current_device())


def wait_for_copy(grad: Any) -> None:
    """Wait until this rank's part of a DTensor has come into host memory, where it comes from an accelerator.

    With its default CPUOffloadPolicy fully_shard copies a gradient into pinned memory, and waits at the end of the
    backward pass. The copy is on the stream that is current while it calls the hooks.
    """
    if shard(grad).is_pinned():
        torch.accelerator.current_stream().synchronize()


@torch.no_grad()
def with_shard(local: Tensor, like: Any) -> Any:
    """Return a DTensor laid out over ranks as ``like`` is, of which this rank holds ``local``, and where that lies."""
    return dtensor_of(local, like)


@torch.no_grad()
def shard_as(tensor: Tensor, like: Any) -> Tensor:
    """Return this rank's part of a tensor that is the same on every rank, laid out as ``like`` is; nothing is sent."""
    from torch.distributed.tensor import distribute_tensor

    spread = distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
    return shard(spread).to(shard(like).device)


@torch.no_grad()
def sum_over_shards(numbers: list[Tensor], of: list[Any]) -> list[Tensor]:
    """Return the sums of 0-dim tensors over the ranks that hold the other elements of DTensors.

    Args:
        numbers: one of each DTensor, of this rank.
        of: the DTensors, in the same order on every rank.
    """
    members: dict[tuple[ProcessGroup, ...], list[int]] = {}
    for i, tensor in enumerate(of):
        members.setdefault(groups_of_shards(tensor), []).append(i)
    sums = list(numbers)
    for groups, indices in members.items():
        totals = _all_reduced(torch.stack([numbers[i] for i in indices]), groups)
        for i, total in zip(indices, totals, strict=True):
            sums[i] = total
    return sums


def largest_shard(tensor: Any) -> int:
    """Return how many elements of a DTensor a rank holds, where it is most: the same number on every rank."""
    shape = list(tensor.shape)
    for dim, placement in enumerate(tensor.placements):
        if not placement.is_replicate() and not placement.is_partial():
            shape[placement.dim] = -(-shape[placement.dim] // tensor.device_mesh.size(dim))
    return math.prod(shape)


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
    sent = sendable(local, like.device_mesh.get_group(0))
    return shard(with_shard(sent, like).redistribute(placements=placements)).to(local.device)


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
        both = _all_reduced(both, groups, torch.distributed.ReduceOp.MAX)
        return torch.where(both[1] > 0, torch.nan, both[0])
    power = _all_reduced(to_fp64(norm) ** norm_type, groups)
    return (power ** (1 / norm_type)).to(norm.dtype).to(norm.device)


def _all_reduced(tensor: Tensor, groups: Iterable[ProcessGroup], op: Any = None) -> Tensor:
    """Reduce a tensor, in place or not, over one group after the other: to the sum unless ``op`` says otherwise.

    It may be of shards in host memory, which NCCL does not reach, and what is returned is there again.
    """
    for group in groups:
        sent = sendable(tensor, group)
        torch.distributed.all_reduce(sent, op or torch.distributed.ReduceOp.SUM, group=group)
        tensor = sent.to(tensor.device)
    return tensor
