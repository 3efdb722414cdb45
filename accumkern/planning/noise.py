"""What helps training: the gradient noise scale over some windows, and what it says of a batch size.

With the noise scale ``B_noise``, and against the fewest samples and steps that any batch size could do with (S.
McCandlish et al., "An Empirical Model of Large-Batch Training", arXiv 1812.06162, equations 2.7 and 5.1)::

    samples(B) = samples_min * (1 + B / B_noise)            steps(B) = steps_min * (1 + B_noise / B)
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from accumkern.wiring import attach
from accumkern.noise_scale import Estimate
from accumkern.planning.preserve import Preserved
from accumkern.planning.protocol import Setup, make_batch
from accumkern.planning.ranks import Ranks
from accumkern.planning.window import accumulate, choose_buffer

_MICRO_BATCHES = 8
_RESAMPLES = 1000
_TAIL = 0.1  # on both sides: an 80% interval


@dataclass(frozen=True)
class Noise:
    """The gradient noise scale, in samples.

    Attributes:
        noise_scale: ``B_noise``; infinite where the windows were all noise.
        low: the lower end of its 80% interval, by bootstrap over windows.
        high: the upper end.
        windows: how many it was estimated from.
        batch: samples of a window.
        first_loss: mean loss of the first window.
        last_loss: of the last: how far training had come.
    """

    noise_scale: float
    low: float
    high: float
    windows: int
    batch: int
    first_loss: float
    last_loss: float


def measure_noise(setup: Setup, preserved: Preserved, ranks: Ranks, micro_batch: int, windows: int) -> Noise:
    """Train some windows of eight micro-batches, and estimate the noise scale from the second half, of all ranks.

    The first half takes the weights away from where they were made, where gradients are unlike those of training. It
    is still the noise scale of the beginning, unless the setup loads a checkpoint: it grows while a model trains. Each
    rank must draw batches of its own.

    Raises:
        RuntimeError: a loss or a gradient is not finite.
    """
    estimates: list[Estimate] = []
    losses: list[float] = []
    with attach(setup.optimizer, choose_buffer(setup, None) or "split24", stats=True) as accumulator:
        accumulator.scale = 1 / _MICRO_BATCHES
        for window in range(windows):
            batches = (make_batch(setup, micro_batch) for _ in range(_MICRO_BATCHES))
            of_window = accumulate(setup, batches, _MICRO_BATCHES, accumulator)
            losses.append(sum(loss.item() for loss in of_window) / _MICRO_BATCHES)
            estimates.append(accumulator.noise_scale().window)
            if not math.isfinite(losses[-1] + estimates[-1].trace + estimates[-1].squared_gradient):
                raise RuntimeError(
                    f"training for the noise scale diverged: in window {window + 1} of {windows} the loss was "
                    f"{losses[-1]:.3g}, and the loss or a gradient was not finite; lower the learning rate, check the "
                    "loss, or leave the noise scale out (noise_windows=0)"
                )
            setup.optimizer.step()
            setup.optimizer.zero_grad()
    preserved.rewind()
    estimates = [estimate for of_rank in ranks.gathered(estimates[windows // 2 :]) for estimate in of_rank]
    low, high = _interval(estimates)
    noise_scale = _mean(estimates).noise_scale
    return Noise(
        noise_scale=noise_scale * micro_batch,
        low=low * micro_batch,
        high=high * micro_batch,
        windows=len(estimates),
        batch=_MICRO_BATCHES * micro_batch,
        first_loss=losses[0],
        last_loss=losses[-1],
    )


def samples_factor(batch: float, noise_scale: float) -> float:
    """Return ``1 + B / B_noise``: the samples that training with a batch needs, over the fewest possible."""
    return math.inf if noise_scale == 0 else 1 + batch / noise_scale


def steps_factor(batch: float, noise_scale: float) -> float:
    """Return ``1 + B_noise / B``: the steps that training with a batch needs, over the fewest possible."""
    return 1 + noise_scale / batch


def _mean(estimates: Sequence[Estimate]) -> Estimate:
    """Return the mean of unbiased estimates, which is one; their ratio is taken after."""
    count = len(estimates)
    return Estimate(
        math.fsum(estimate.trace for estimate in estimates) / count,
        math.fsum(estimate.squared_gradient for estimate in estimates) / count,
    )


def _interval(estimates: Sequence[Estimate]) -> tuple[float, float]:
    """Return an 80% interval of the noise scale, by drawing windows again with replacement."""
    drawn = random.Random(0)
    values = sorted(_mean(drawn.choices(estimates, k=len(estimates))).noise_scale for _ in range(_RESAMPLES))
    tail = int(_TAIL * _RESAMPLES)
    return values[tail], values[-1 - tail]
