"""A window of any batch: split into micro-batches that fit, with the gradient of the whole, whatever memory does.

With ``c_i`` what part ``i`` counts (its samples, or its tokens), and ``l_i`` its mean loss::

    loss = sum(c_i * l_i) / sum(c_i)            gradient = sum(c_i * gradient(l_i)) / sum(c_i)

Each loss is multiplied by ``c_i / sum(c)`` before its backward pass, so that the weights reach whatever gets a gradient
from it, with hooks or without. Where memory runs out, in a forward or a backward pass, everything goes back to what it
was before the window, and it begins again with micro-batches of half the size.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from accumkern.attachment import Attachment
from accumkern.checks import describe, integer, one_of
from accumkern.dtensor import computes_on
from accumkern.hooks import owner_of
from accumkern.memory import storage_bytes, tensors_in
from accumkern.out_of_memory import CpuLimit, forget_failed_pass, gpu_limit, is_out_of_memory
from accumkern.rank_window import RankWindow
from accumkern.ranks import RanksError
from accumkern.snapshot import Snapshot
from accumkern.splitting import Split, bounds, part_of, samples_of, tensors_of
from accumkern.torch_private import tree_leaves
from accumkern.weighing import (
    Count,
    Counts,
    add_losses,
    check_whole,
    counts_of,
    losses_of,
    runs_of,
    totals_of,
    weighted_sum,
    without_graph,
)


@dataclass
class Request:
    """What was asked for; see :meth:`accumkern.GradAccumulator.backward`.

    Attributes:
        largest: samples of a micro-batch, at most.
        may_halve: whether that becomes less where memory runs out.
    """

    loss_fn: Callable[[Any], Any]
    batch: Any
    samples: int
    largest: int
    may_halve: bool
    count: Count | None
    split: Split | None
    takes_mean: bool
    backward: Callable[[Tensor], Any]
    limit_bytes: int | None


def check_request(
    loss_fn: Any,
    batch: Any,
    micro_batch: Any,
    largest: int | None,
    count: Any,
    split: Any,
    reduction: Any,
    backward: Any,
    limit_bytes: int | None,
) -> Request:
    """Return what was asked for, checked; ``largest`` is the micro-batch that memory was enough for last, or None."""
    for name, function, is_optional in (
        ("loss_fn", loss_fn, False),
        ("count", count, True),
        ("split", split, True),
        ("backward", backward, True),
    ):
        if not callable(function) and not (is_optional and function is None):
            right = "a function, or None" if is_optional else "a function of a micro-batch that returns its loss"
            raise TypeError(f"{name} is a {type(function).__name__}; it must be {right}")
    one_of("reduction", reduction, ("mean", "sum"))
    may_halve = isinstance(micro_batch, str)
    if may_halve:
        one_of("micro_batch", micro_batch, ("auto",), ", or a number of samples")
    else:
        micro_batch = integer("micro_batch", micro_batch, "it must be 'auto' or a positive number of samples", 1)
    samples = samples_of(batch, split)
    if samples == 0:
        raise ValueError("batch has no samples; it must have one or more in the first dimension of its tensors")
    return Request(
        loss_fn=loss_fn,
        batch=batch,
        samples=samples,
        largest=min(samples, (largest or samples) if may_halve else micro_batch),
        may_halve=may_halve,
        count=count,
        split=split,
        takes_mean=reduction == "mean",
        backward=Tensor.backward if backward is None else backward,
        limit_bytes=limit_bytes,
    )


def run(asked: Request, attachment: Attachment, model: nn.Module | None, window: RankWindow) -> tuple[Any, int | None]:
    """Run a window; return its losses, and the size of its micro-batches if memory ran out before.

    Args:
        asked: what was asked for.
        attachment: of the optimizer.
        model: what is trained, if that is known.
        window: of this rank, entered already.

    After an error gradients, buffers and random numbers are what they were before. One of another kind than memory that
    ran out, in a try after that, has it as its cause.
    """
    attachments = _attachments(attachment, model)
    params = [param for each in attachments for param in each.params]
    params += [] if model is None else list(model.parameters())
    for each in attachments:
        if each.rooms.fold.is_scaled:
            raise ValueError(
                f"scale is {each.rooms.fold.scale}; backward() weighs micro-batches itself: attach without "
                "average_over, and leave scale at 1"
            )
    slots = {param: slot for each in attachments for param, slot in each.slots.items()}
    tensors = tensors_of(asked.batch, asked.split)
    leaves = [tensor for tensor in tensors.values() if tensor.requires_grad and tensor.is_leaf]
    before = Snapshot([*params, *leaves], slots, model)
    passes = [(each.rooms, each.rooms.passes.count) for each in attachments]
    versions = {path: _version(tensor) for path, tensor in tensors.items()}
    parts, found = _parts_for(asked.samples, asked.largest), None
    whole: Counts = {}
    ran_out: str | None = None
    while True:
        parts = window.agreed_parts(parts, asked.samples)
        try:
            with window.attempt(), _limit(asked, attachments, params, model):
                losses = _window(asked, parts, whole, window, computes_on(params[0]))
            break
        except BaseException as error:
            _begin_again(passes, before)
            # What ends another rank, for whatever reason, ends this one.
            if not asked.may_halve or isinstance(error, RanksError) or not is_out_of_memory(error):
                if ran_out is not None and error.__cause__ is None and not isinstance(error, RanksError):
                    error.__cause__ = MemoryError(ran_out)  # such as BatchNorm's, whose parts have become too small
                raise
            if parts == asked.samples:
                _explain(error)
                raise
            changed = [path for path, tensor in tensors.items() if _version(tensor) != versions[path]]
            if changed:
                raise RuntimeError(
                    f"memory ran out, and the window cannot begin again, because loss_fn has changed {changed[0]} in "
                    "place; let it work on a copy (clone())"
                ) from error
            error.__traceback__ = None  # whoever keeps the error does not keep what its frames hold
            ran_out = f"memory ran out with micro-batches of {-(-asked.samples // parts)} samples: {describe(error)}"
        # Outside of the handler nothing holds the frames in which it happened, and their tensors, any more.
        _free(params)
        found = max(1, -(-asked.samples // parts) // 2)
        parts = _parts_for(asked.samples, found)
    try:
        window.reduce()
    except BaseException:
        _begin_again(passes, before)
        raise
    return losses, found


def _parts_for(samples: int, largest: int) -> int:
    return -(-samples // largest)


def _window(asked: Request, parts: int, whole: Counts, window: RankWindow, device: torch.device) -> Any:
    """Run forward and backward passes of all parts; return the losses of the whole.

    Args:
        asked: what was asked for.
        parts: how many.
        whole: what the samples of all ranks count, per rank; empty until it is known.
        window: of this rank.
        device: where the parameters are computed with.
    """
    cuts = bounds(asked.samples, parts)
    pieces = [part_of(asked.batch, *cut, asked.split) for cut in cuts]
    counts = counts_of(asked.count, pieces, cuts)
    if not whole:
        whole.update(window.whole(totals_of(counts)))
        check_whole(whole)
    losses: dict[Any, Tensor] = {}
    names: list[Any] = []
    kind: type = dict
    has_graph = False
    runs = runs_of(counts, window.skips_parts)
    for n, (i, counts_here) in enumerate(runs):
        piece = part_of(asked.batch, *cuts[i], asked.split) if pieces[i] is None else pieces[i]
        pieces[i] = None  # a part that split has copied is gone after its pass
        with window.part(is_last=n + 1 == len(runs)):
            returned = asked.loss_fn(piece)
            del piece
            found = losses_of(returned, counts[i])
            has_graph_here = any(loss.requires_grad for loss in found.values())
            has_graph |= has_graph_here
            is_missed = n + 1 == len(runs) and not has_graph  # a part without one adds nothing, but all may not be
            if is_missed or not (has_graph_here or window.skips_parts):  # others wait for the backward pass
                raise ValueError(without_graph())
            with torch.enable_grad():  # as loss_fn may have done for itself
                weighted = weighted_sum(found, counts[i], whole, asked.takes_mean)
            if weighted is not None:
                asked.backward(weighted if counts_here else weighted * 0.0)
        if counts_here:
            add_losses(losses, found, counts[i], whole, asked.takes_mean)
        kind, names = type(returned), list(found)
        del returned, found, weighted  # and the graph with them
    ordered = {  # of what counts on other ranks alone there is nothing here
        name: losses[name] if name in losses else torch.zeros((), device=device) for name in names or whole
    }
    if None in ordered:
        return ordered[None]
    return tuple(ordered.values()) if issubclass(kind, (tuple, list)) else ordered


# ---- around a window ---------------------------------------------------------------------------------------------


def _attachments(attachment: Attachment, model: nn.Module | None) -> list[Attachment]:
    """Return what is attached to a model's parameters: of several optimizers, such as Muon and AdamW, all."""
    others = [] if model is None else [param for param in model.parameters() if param not in attachment.slots]
    owners = [owner_of(param) for param in others]
    return list(dict.fromkeys([attachment, *(owner for owner in owners if isinstance(owner, Attachment))]))


@contextmanager
def _limit(
    asked: Request, attachments: list[Attachment], params: list[Tensor], model: nn.Module | None
) -> Iterator[None]:
    """Limit the memory of what runs in the block, on the devices that compute with the parameters."""
    if asked.limit_bytes is None:
        yield
        return
    with ExitStack() as stack:
        for device in dict.fromkeys(map(computes_on, params)):
            if device.type == "cuda":
                stack.enter_context(gpu_limit(device, asked.limit_bytes))
            else:
                held = [tensor for tensor in _held(asked, attachments, params, model) if tensor.device == device]
                stack.enter_context(CpuLimit(storage_bytes(held), asked.limit_bytes))
        yield


def _held(asked: Request, attachments: list[Attachment], params: list[Tensor], model: nn.Module | None) -> list[Tensor]:
    """Return what there is in memory already: as a plan counts it, and the batch."""
    held: list[Any] = [*params, *(param.grad for param in params)]
    held += [] if model is None else model.buffers()
    held += (leaf for leaf in tree_leaves(asked.batch) if isinstance(leaf, Tensor))
    for each in attachments:
        held += (slot.residual for slot in each.slots.values())
        held += [] if each.rooms.masters is None else each.rooms.masters.held_tensors()
        held.append(dict(getattr(each.optimizer, "state", {})))
    return tensors_in(held)


def _begin_again(passes: list[tuple[Any, int]], before: Snapshot) -> None:
    """Let everything be as it was; ``passes`` has the rooms of accumulators, and how many passes they had seen."""
    for rooms, count in passes:
        rooms.passes.drop()
        rooms.passes.count = count
        if rooms.lost_bits is not None:
            rooms.lost_bits.reset()
    before.put_back()


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _free(params: list[Tensor]) -> None:
    """Let go of what the failed window has left behind."""
    forget_failed_pass()
    gc.collect()
    if any(computes_on(param).type == "cuda" for param in params):
        torch.cuda.empty_cache()


def _explain(error: BaseException) -> None:
    if sys.version_info >= (3, 11):
        error.add_note(
            "acc.backward() ran out of memory with a micro-batch of one sample: use activation checkpointing, shorter "
            "samples, or a smaller model"
        )
