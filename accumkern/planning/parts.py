"""Whether a batch's loss is the mean of its parts' losses, which is what accumulation over micro-batches computes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from accumkern.dtensor import is_dtensor, shard
from accumkern.out_of_memory import forget_failed_pass
from accumkern.planning.protocol import Setup, compute_loss, make_batch
from accumkern.planning.speed import Split
from accumkern.planning.trial import Preserved, together
from accumkern.ranks import RanksError
from accumkern.splitting import part_of, samples_of

# Of the norm of the halves' mean gradient. Where the loss is a mean it is rounding: 0.01% in FP32 and 0.4% in bfloat16
# (tests' architectures); a mean over tokens makes 5 to 40%, a contrastive loss more than 100%.
_DIFFERENCE = 0.05
_SAME_LOSS = 0.01  # of a loss
_HALF = 2  # samples: few, so that they differ in length, and more than one, of which statistics may not be finite
_DRAWS = 4


@dataclass(frozen=True)
class _Draw:
    """A batch and its halves.

    Attributes:
        difference: of the batch's gradient and the mean of its halves', over the larger of the latter and itself.
        loss: of the batch.
        of_halves: the losses of its halves.
    """

    difference: float
    loss: float
    of_halves: tuple[float, float]

    @property
    def is_between(self) -> bool:
        """Whether the loss may be a mean of the halves' with other weights."""
        tolerance = _SAME_LOSS * abs(self.loss)
        return min(self.of_halves) - tolerance <= self.loss <= max(self.of_halves) + tolerance


def parts_warnings(preserved: Preserved, way: Split, largest: int) -> list[str]:
    """Return a warning where accumulating trains something else than the batch's loss.

    Gradients of batches of four samples are compared with the means of those of their halves, in eval mode, and
    everything is put back: a difference above 5% is told. Gradients, because losses of an untrained model are alike
    however they are weighed. A loss that draws random numbers in eval mode, or a batch that cannot be taken apart,
    cannot be compared and is not told. With several ranks, one that finds it is enough.

    Args:
        preserved: the setup.
        way: how it is to be trained.
        largest: samples that fit.
    """
    if way.accumulation_steps == 1:
        return []
    half = min(_HALF, largest // 2)
    draws: list[_Draw] = []
    try:
        preserved.setup.model.eval()
        if half:
            with together(preserved):
                draws = _draws(preserved, half)
    except RanksError:
        raise
    except (RuntimeError, TypeError, ValueError):
        # Not every batch can be taken apart, and not every model runs backward in eval mode.
        forget_failed_pass()
    preserved.rewind()
    draws = [draw for of_rank in preserved.ranks.gathered(draws) for draw in of_rank]
    differing = [draw for draw in draws if draw.difference > _DIFFERENCE]
    if not differing:
        return []
    return [_warning(way, 2 * half, max(differing, key=lambda draw: (not draw.is_between, draw.difference)))]


def _draws(preserved: Preserved, half: int) -> list[_Draw]:
    """Return what some batches and their halves have given.

    Raises:
        RuntimeError, TypeError, ValueError: they cannot be compared.
    """
    setup, draws = preserved.setup, []
    for _ in range(_DRAWS):
        batch = make_batch(setup, 2 * half)
        samples_of(batch, None)  # raises where it cannot be taken apart
        with torch.no_grad():
            again = [compute_loss(setup, batch).item() for _ in range(2)]
        if not math.isclose(*again, rel_tol=1e-5):
            raise ValueError("the loss draws random numbers: other ones for halves")
        parts = (part_of(batch, 0, half, None), part_of(batch, half, 2 * half, None))
        first, second = (_backward(setup, part, 0.5) for part in parts)
        of_halves = _norm(setup)
        loss = _backward(setup, batch, -1.0)
        difference = _norm(setup)
        for param in setup.model.parameters():
            param.grad = None
        if difference > 0 and math.isfinite(difference + of_halves):
            draws.append(_Draw(difference / max(of_halves, difference), loss, (first, second)))
    return draws


def _backward(setup: Setup, batch: Any, factor: float) -> float:
    """Add the gradient of a multiple of a batch's loss to ``.grad``; return the loss."""
    loss = compute_loss(setup, batch)
    (loss * factor).backward()
    return loss.item()


def _norm(setup: Setup) -> float:
    grads: list[Tensor] = [param.grad for param in setup.model.parameters() if param.grad is not None]
    grads = [shard(grad) if is_dtensor(grad) else grad for grad in grads]
    dense = [grad.coalesce().values() if grad.is_sparse else grad for grad in grads]
    return math.sqrt(sum(torch.linalg.vector_norm(grad, dtype=torch.float32).item() ** 2 for grad in dense))


def _warning(way: Split, samples: int, draw: _Draw) -> str:
    low, high = sorted(draw.of_halves)
    found = (
        f"the gradient of {samples} samples is not the mean of the gradients of their halves (they differ by "
        f"{draw.difference:.0%}, in eval mode)"
    )
    if draw.is_between:
        return (
            f"{found}, as with a mean over tokens, of which halves have unequal numbers. Micro-batches that are "
            "averaged all count the same, so their tokens do not: weigh them by tokens with acc.backward(..., "
            "count=...), see docs/averaging.md"
        )
    return (
        f"{found}, and their loss, {draw.loss:.3g}, is not between those of the halves, {low:.3g} and {high:.3g}: "
        "samples see each other, as in a contrastive loss with negatives from the batch (or it is a sum, and has to be "
        f"a mean). Accumulation then trains another loss, of {way.micro_batch} samples at a time and not of "
        f"{way.effective_batch}: keep the micro-batch that the recipe was tuned for"
    )
