"""What data-parallel ranks agree on; without a process group there is one rank, which agrees with itself."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def world_size() -> int:
    """Return the number of ranks."""
    return dist.get_world_size() if _has_ranks() else 1


def lowest(value: float, device: torch.device) -> float:
    """Return the lowest value of all ranks."""
    return _reduce(value, device, "MIN")


def highest(value: float, device: torch.device) -> float:
    """Return the highest value of all ranks."""
    return _reduce(value, device, "MAX")


def gathered(items: list[T]) -> list[T]:
    """Return the items of all ranks, in the order of ranks."""
    if not _has_ranks():
        return items
    of_ranks: list[list[T]] = [[]] * world_size()
    dist.all_gather_object(of_ranks, items)
    return [item for of_rank in of_ranks for item in of_rank]


def _reduce(value: float, device: torch.device, operation: str) -> float:
    if not _has_ranks():
        return value
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, getattr(dist.ReduceOp, operation))
    return tensor.item()


def _has_ranks() -> bool:
    return dist.is_available() and dist.is_initialized()
