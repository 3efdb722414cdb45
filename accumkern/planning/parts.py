"""Whether a batch's loss is the mean of its parts' losses, which is what accumulation over micro-batches computes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from accumkern.dtensor import is_dtensor, shard
from accumkern.out_of_memory import forget_failed_pass
from accumkern.planning.protocol import compute_loss, make_batch
from accumkern.planning.speed import Split
from accumkern.planning.trial import Preserved
from accumkern.splitting import part_of, samples_of

# Of the norm of the halves' mean gradient. Where the loss is a mean it is rounding: 0.01% in FP32 and 0.4% in bfloat16
# (tests' architectures); a mean over tokens makes 5 to 40%, a contrastive loss more than 100%.
_DIFFERENCE = 0.05
_SAME_LOSS = 0.01  # of a loss
_HALF = 2  # samples: few, so that they differ in length, and more than one, of which statistics may not be finite
_DRAWS = 4


def parts_warnings(preserved: Preserved, way: Split, largest: int) -> list[str]:
    """Return a warning where accumulating trains something else than the batch's loss.

    Gradients of batches of four samples are compared with the means of those of their halves, in eval mode, and
    everything is put back: a difference above 5% of the batch's gradient is told. Gradients, because losses of an
    untrained model are alike however they are weighed. A loss that draws random numbers in eval mode, or a batch that
    cannot be taken apart, cannot be compared and is not told. With several ranks, one that finds it is enough.

    Args:
        preserved: the setup.
        way: how it is to be trained.
        largest: samples that fit.
    """
    if way.accumulation_steps == 1:
        return []
    half = min(_HALF, largest // 2)
    found = None
    try:
        preserved.setup.model.eval()
        found = _difference(preserved, half) if half else None
    except (RuntimeError, TypeError, ValueError):
        # Not every batch can be taken apart, and not every model runs backward in eval mode.
        forget_failed_pass()
    preserved.rewind()
    found = next((of_rank for of_rank in preserved.ranks.gathered(found) if of_rank is not None), None)
    return [] if found is None else [_warning(way, 2 * half, *found)]


def _difference(preserved: Preserved, half: int) -> tuple[float, float, float, float] | None:
    """Return the first of some draws that differs: by how much of the gradient, and the losses of whole and halves."""
    setup = preserved.setup
    for _ in range(_DRAWS):
        batch = make_batch(setup, 2 * half)
        if samples_of(batch, None) != 2 * half:
            return None
        with torch.no_grad():
            if not math.isclose(_loss(preserved, batch), _loss(preserved, batch), rel_tol=1e-5):
                return None  # it draws random numbers: other ones for halves
        first, second = (_backward(preserved, part_of(batch, half * i, half * (i + 1), None), 0.5) for i in (0, 1))
        of_halves = _norm(preserved)
        whole = _backward(preserved, batch, -1.0)
        difference = _norm(preserved)
        for param in setup.model.parameters():
            param.grad = None
        if math.isfinite(difference + of_halves) and difference > _DIFFERENCE * of_halves:
            return difference / max(of_halves, difference), whole, first, second
    return None


def _loss(preserved: Preserved, batch: Any) -> float:
    return compute_loss(preserved.setup, batch).item()


def _backward(preserved: Preserved, batch: Any, factor: float) -> float:
    """Add the gradient of a multiple of a batch's loss to ``.grad``; return the loss."""
    loss = compute_loss(preserved.setup, batch)
    (loss * factor).backward()
    return loss.item()


def _norm(preserved: Preserved) -> float:
    grads: list[Tensor] = [param.grad for param in preserved.setup.model.parameters() if param.grad is not None]
    grads = [shard(grad) if is_dtensor(grad) else grad for grad in grads]
    dense = [grad.coalesce().values() if grad.is_sparse else grad for grad in grads]
    return math.sqrt(sum(torch.linalg.vector_norm(grad, dtype=torch.float32).item() ** 2 for grad in dense))


def _warning(way: Split, samples: int, difference: float, whole: float, first: float, second: float) -> str:
    low, high = sorted((first, second))
    tolerance = _SAME_LOSS * abs(whole)
    found = (
        f"the gradient of {samples} samples is not the mean of the gradients of their halves (they differ by "
        f"{difference:.0%} of it, in eval mode)"
    )
    if low - tolerance <= whole <= high + tolerance:
        return (
            f"{found}, as with a mean over tokens, of which halves have unequal numbers. Micro-batches that are "
            "averaged all count the same, so their tokens do not: weigh them by tokens with acc.backward(..., "
            "count=...), see docs/averaging.md"
        )
    return (
        f"{found}, and their loss, {whole:.3g}, is not between those of the halves, {low:.3g} and {high:.3g}: samples "
        "see each other, as in a contrastive loss with negatives from the batch. Accumulation then trains another "
        f"loss, of {way.micro_batch} samples at a time and not of {way.effective_batch}: keep the micro-batch that the "
        "recipe was tuned for"
    )
