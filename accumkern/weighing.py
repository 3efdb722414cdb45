"""What each part of a window counts, and the losses of the whole: each part's, times what it is of the whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from accumkern.checks import real

_RIGHT = "it must return the mean loss of a micro-batch, a floating 0-dim tensor with a graph, or several of them"

Count = Callable[[Any], Any]
Counts = dict[Any, float]  # by the name of the loss; None: of all


def counts_of(count: Count | None, pieces: list[Any], cuts: list[tuple[int, int]]) -> list[Counts]:
    """Return what each part counts, waiting once for the device that has made the numbers.

    Args:
        count: of a part; None counts samples.
        pieces: the parts.
        cuts: where each begins and ends in the batch.
    """
    if count is None:
        return [{None: float(stop - start)} for start, stop in cuts]
    counts = [_named(count(piece)) for piece in pieces]
    on_devices = [value for each in counts for value in each.values() if isinstance(value, Tensor)]
    right = "count must return a number that is not negative, or one for each loss"
    for tensor in on_devices:
        if tensor.numel() != 1:
            raise ValueError(f"count returned a tensor of shape {tuple(tensor.shape)}; {right}")
    if on_devices:
        numbers = iter(torch.stack([tensor.detach().reshape(()).double() for tensor in on_devices]).tolist())
        counts = [{k: next(numbers) if isinstance(v, Tensor) else v for k, v in each.items()} for each in counts]
    for each in counts:
        for name, value in each.items():
            each[name] = float(real("what count returned", value, right))
            if not 0 <= each[name] < float("inf"):
                raise ValueError(f"count returned {value}; {right}")
    return counts


def totals_of(counts: list[Counts]) -> Counts:
    """Return what all parts count together, by name."""
    totals: Counts = {}
    for each in counts:
        for name, value in each.items():
            totals[name] = totals.get(name, 0.0) + value
    return totals


def check_whole(whole: Counts) -> None:
    """Raise a ValueError where the whole counts nothing."""
    for name, value in whole.items():
        if value == 0:
            what = "all parts" if name is None else f"the loss {name!r}"
            raise ValueError(f"count returned 0 for {what}; a mean needs something to be of")


def runs_of(counts: list[Counts], skips_parts: bool) -> list[tuple[int, bool]]:
    """Return which parts are run, one after another, and whether what they bring counts.

    A part that counts nothing has no mean, and is left out. Where other ranks wait for its passes, a part that counts
    is run once more in its stead, with a weight of zero.

    Raises:
        ValueError: no part can stand in for it.
    """
    if skips_parts:
        return [(i, True) for i, each in enumerate(counts) if any(each.values())]
    counting = [i for i, each in enumerate(counts) if all(each.values())]
    for i, each in enumerate(counts):
        if not all(each.values()) and (any(each.values()) or not counting):
            raise ValueError(
                f"count returned {each.get(None, each)} for part {i} of {len(counts)}; with fully_shard every rank "
                "runs the same passes of as many parts: let each count something for every loss, or none of them where "
                "another part does"
            )
    return [(i, True) if i in counting else (counting[0], False) for i in range(len(counts))]


def _named(found: Any) -> dict[Any, Any]:
    """Return losses, or what they count, by their names; one alone is called None."""
    if isinstance(found, Mapping):
        return dict(found)
    if isinstance(found, (tuple, list)):
        return dict(enumerate(found))
    return {None: found}


def losses_of(returned: Any, counts: Counts) -> dict[Any, Tensor]:
    """Return the losses of a part by their names.

    Raises:
        TypeError, ValueError: they are none that can be trained, or have other names than what they count.
    """
    losses = _named(returned)
    right = _RIGHT
    for loss in losses.values():
        if not isinstance(loss, Tensor) or not loss.is_floating_point():
            found = f"a {loss.dtype} tensor" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise TypeError(f"loss_fn returned {found}; {right}")
        if loss.dim() != 0:
            raise ValueError(f"loss_fn returned a tensor of shape {tuple(loss.shape)}; {right}")
    if not losses:
        raise ValueError(f"loss_fn returned no loss; {right}")
    if None not in counts and counts.keys() != losses.keys():
        raise ValueError(f"count returned numbers for {list(counts)}, and loss_fn losses for {list(losses)}")
    return losses


def without_graph() -> str:
    """Return what is wrong where no part's loss has a graph."""
    off = "" if torch.is_grad_enabled() else ": gradients are off here, by no_grad() or inference_mode()"
    return f"loss_fn returned a loss without a graph{off}; {_RIGHT}"


def weighted_sum(losses: dict[Any, Tensor], counts: Counts, totals: Counts, takes_mean: bool) -> Tensor | None:
    """Return the sum of a part's losses, each times what the part is of the whole; None where that is nothing."""
    total: Any = None
    for name, loss in losses.items():
        weight = _of(counts, name) / _of(totals, name) if takes_mean else 1.0
        if weight == 0 or not loss.requires_grad:  # where a part counts nothing for a loss, its mean may be NaN
            continue
        # In FP32: a loss of 16 bits would round its weight to 8. One that is whole goes backward as it is.
        term = loss if weight == 1 else (loss if loss.dtype is torch.float64 else loss.float()) * weight
        total = term if total is None else total + term
    return total


def add_losses(
    so_far: dict[Any, Tensor], losses: dict[Any, Tensor], counts: Counts, totals: Counts, takes_mean: bool
) -> None:
    """Add the losses of a part to those before it, in FP32 on the device."""
    for name, loss in losses.items():
        weight = _of(counts, name) / _of(totals, name) if takes_mean else 1.0
        if weight:
            term = (loss.detach() if loss.dtype is torch.float64 else loss.detach().float()) * weight
            so_far[name] = so_far[name] + term if name in so_far else term


def _of(counts: Counts, name: Any) -> float:
    return counts[name] if name in counts else counts[None]
