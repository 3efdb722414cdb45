"""Pipeline schedules that split the backward pass (zero bubble), and add gradients of weights themselves.

They compute the gradients of a stage's inputs first, and those of its weights when the rank would be idle. The latter
come from ``torch.autograd.grad`` and are added by ``weight.grad += new``, which no hook sees. So stages are watched:
meanwhile ``.grad`` is set aside, and then what has come is folded into it, as hooks do where autograd accumulates.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from accumkern.hooks import owner_of
from accumkern.pipelining_private import watch_stages
from accumkern.slot import Slot

_IN_PARTS = (
    "a pipeline with several stages on a rank, or whose schedule splits the backward pass, has several backward passes "
    "for a micro-batch, each of some parameters; use ScheduleGPipe or Schedule1F1B, with one stage on a rank"
)


def watch() -> None:
    """Fold what stages of pipelines add, where torch.distributed.pipelining is imported.

    They stay watched when an accumulator is detached: parameters without hooks are left to torch.
    """
    watch_stages(_backward, _add_gradients)


def _backward(original: Any, stage: Any, kind: str, *args: Any, **kwargs: Any) -> Any:
    """Let a stage run ``original``: a backward pass, or the part of one for its inputs or its weights.

    Raises:
        RuntimeError: it is a part, and a DistributedDataParallel is to reduce the gradients.
    """
    owners = _owners(stage.submod.parameters())
    if kind != "full" and owners:
        _check_replicas(stage.submod)
    result = original(stage, kind, *args, **kwargs)
    if kind != "full" or stage.num_stages > stage.group_size:
        for owner in owners:
            if owner.rooms.fold.squares is not None:
                owner.rooms.fold.squares.spoil(_IN_PARTS)
    return result


def _add_gradients(original: Any, weights: Iterable[Tensor], groups: list[dict[str, Any]], *args: Any) -> Any:
    """Let ``original`` take the gradients of groups of weights, and fold them, one group after the other."""
    weights = list(weights)
    owners = _owners(weights)
    if not owners:
        return original(iter(weights), groups, *args)
    with torch.no_grad():
        for owner in owners:
            owner.rooms.passes.enter()
    for group in groups:
        params = [node.variable for node in group["params"]]  # of nodes that would accumulate their gradients
        with _folding(params):
            original(iter(params), [group], *args)
    return tuple(weight.grad for weight in weights)


def _owners(params: Iterable[Tensor]) -> set[Any]:
    """Return the attachments whose hooks are on parameters."""
    return {owner for param in params if (owner := owner_of(param)) is not None}


def _check_replicas(module: torch.nn.Module) -> None:
    if isinstance(module, torch.nn.parallel.DistributedDataParallel) and module.process_group.size() > 1:
        raise RuntimeError(
            "a stage of the pipeline is a DistributedDataParallel, and the schedule splits its backward pass (zero "
            f"bubble): torch {torch.__version__} would never reduce the gradients of its weights. Use fully_shard, or "
            "a schedule with whole backward passes, such as Schedule1F1B or ScheduleInterleaved1F1B"
        )


@contextmanager
def _folding(params: list[Tensor]) -> Iterator[None]:
    """Fold the gradients that parameters get inside of this block into those that they had."""
    slots: list[Slot] = [owner.slots[param] for owner in _owners(params) for param in params if param in owner.slots]
    running = [slot.param.grad for slot in slots]
    for slot in slots:
        slot.param.grad = None
    try:
        yield
    finally:
        with torch.no_grad(), ExitStack() as stack:  # every gradient is put back, also where the fold of another fails
            for slot, grad in zip(slots, running, strict=True):
                stack.callback(_fold, slot, grad)


def _fold(slot: Slot, running: Any) -> None:
    if slot.param.grad is None:
        slot.param.grad = running
    else:
        slot.set_aside = running
        slot.accumulate(slot, slot.param)
