"""What helps training: the gradient noise scale over some windows, and which effective batches it makes useful.

With the noise scale ``B_noise``, and against the fewest samples and steps that any batch size could do with (S.
McCandlish et al., "An Empirical Model of Large-Batch Training", arXiv 1812.06162, equations 2.7 and 5.1)::

    samples(B) = samples_min * (1 + B / B_noise)            steps(B) = steps_min * (1 + B_noise / B)

The time to train is the samples that it needs, over the samples per second.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from accumkern.noise_scale import Estimate
from accumkern.planning.precision import choose_buffer
from accumkern.planning.protocol import Setup, make_batch, step
from accumkern.planning.speed import Rate, Split, knee, plain, split
from accumkern.planning.trial import Preserved, accumulate
from accumkern.wiring import attach

WINDOW_MICRO_BATCHES = 8
_RESAMPLES = 1000
_TAIL = 0.1  # on both sides: an 80% interval
# Of times to train, over the least:
_SAME_TIME = 0.95
_USEFUL = 1.1
_MOST_BATCH = 2**24
_SHOWN = 4  # times the larger of chosen batch and noise scale


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

    @property
    def basis(self) -> float | None:
        """The noise scale to choose by: its interval's lower end where it is infinite, None where both say nothing."""
        known = [value for value in (self.noise_scale, self.low) if 0 < value < math.inf]
        return known[0] if known else None


def noise_problem(setup: Setup) -> str | None:
    """Return why the noise scale of a setup cannot be measured, or None."""
    if setup.is_sharded:
        return (
            "the gradient noise scale was not measured: parameters are DTensors, of whose gradients each rank sees a "
            "part. A plan of the model, or of a smaller one of its kind, without fully_shard has it"
        )
    return None


def measure_noise(preserved: Preserved, micro_batch: int, windows: int) -> Noise:
    """Train some windows of eight micro-batches, and estimate the noise scale from the second half, of all ranks.

    The first half takes the weights away from where they were made, where gradients are unlike those of training. It
    is still the noise scale of the beginning, unless the setup loads a checkpoint: it grows while a model trains. Each
    rank must draw batches of its own.

    Raises:
        RuntimeError: a loss or a gradient is not finite.
    """
    setup = preserved.setup
    estimates: list[Estimate] = []
    losses: list[float] = []
    buffer = choose_buffer(setup, None) or "split24"
    with attach(setup.optimizer, buffer, master_weights=preserved.master_weights, stats=True) as accumulator:
        accumulator.scale = 1 / WINDOW_MICRO_BATCHES
        for window in range(windows):
            of_window = [
                accumulate(setup, make_batch(setup, micro_batch), WINDOW_MICRO_BATCHES, accumulator)
                for _ in range(WINDOW_MICRO_BATCHES)
            ]
            losses.append(sum(loss.item() for loss in of_window) / WINDOW_MICRO_BATCHES)
            estimates.append(accumulator.noise_scale().window)
            if not math.isfinite(losses[-1] + estimates[-1].trace + estimates[-1].squared_gradient):
                raise RuntimeError(
                    f"training for the noise scale diverged: in window {window + 1} of {windows} the loss was "
                    f"{losses[-1]:.3g}, and the loss or a gradient was not finite; lower the learning rate, check the "
                    "loss, or leave the noise scale out (noise_windows=0)"
                )
            step(setup)
            setup.optimizer.zero_grad()
    preserved.rewind()
    estimates = [estimate for of_rank in preserved.ranks.gathered(estimates[windows // 2 :]) for estimate in of_rank]
    low, high = interval(estimates)
    return Noise(
        noise_scale=_mean(estimates).noise_scale * micro_batch,
        low=low * micro_batch,
        high=high * micro_batch,
        windows=len(estimates),
        batch=WINDOW_MICRO_BATCHES * micro_batch,
        first_loss=losses[0],
        last_loss=losses[-1],
    )


def interval(estimates: Sequence[Estimate]) -> tuple[float, float]:
    """Return an 80% interval of the noise scale, by drawing windows again with replacement."""
    drawn = random.Random(0)
    values = sorted(_mean(drawn.choices(estimates, k=len(estimates))).noise_scale for _ in range(_RESAMPLES))
    tail = int(_TAIL * _RESAMPLES)
    return values[tail], values[-1 - tail]


def _mean(estimates: Sequence[Estimate]) -> Estimate:
    """Return the mean of unbiased estimates, which is one; their ratio is taken after."""
    count = len(estimates)
    return Estimate(
        math.fsum(estimate.trace for estimate in estimates) / count,
        math.fsum(estimate.squared_gradient for estimate in estimates) / count,
    )


def samples_factor(batch: float, noise_scale: float) -> float:
    """Return ``1 + B / B_noise``: the samples that training with a batch needs, over the fewest possible."""
    return math.inf if noise_scale == 0 else 1 + batch / noise_scale


def steps_factor(batch: float, noise_scale: float) -> float:
    """Return ``1 + B_noise / B``: the steps that training with a batch needs, over the fewest possible."""
    return 1 + noise_scale / batch


def useful_batches(ranks: int, sizes: Sequence[int], rate: Rate, noise_scales: Sequence[float]) -> tuple[float, float]:
    """Return the least and the largest effective batch whose time to train is within 10% of the best.

    With several noise scales, the range covers that of each. It has no upper end, infinity, where the gradient was all
    noise.
    """
    low, high = math.inf, 0.0
    ways = _ways(ranks, sizes, rate)
    for noise_scale in noise_scales:
        if noise_scale == 0:
            low, high = min(low, ranks * min(sizes)), max(high, ranks * min(sizes))
            continue
        times = {way: _time(way, rate, noise_scale) for way in ways}
        useful = [way for way in ways if times[way] <= _USEFUL * min(times.values())]
        low = min(low, useful[0].effective_batch)
        high = max(high, math.inf if useful[-1] is ways[-1] else useful[-1].effective_batch)
    return low, high


def best_way(ranks: int, sizes: Sequence[int], rate: Rate, noise: Noise | None) -> Split:
    """Return how to train where no effective batch was asked for: by the noise scale, if there is one to go by.

    It is the smallest effective batch whose time to train is within 5% of the best; of one micro-batch, unless
    accumulation brings 5%. Without a noise scale it is one micro-batch on each rank, at the knee.
    """
    if noise is None or noise.basis is None:
        return Split(ranks, knee(sizes, rate), 1)
    times = {way: _time(way, rate, noise.basis) for way in _ways(ranks, sizes, rate)}
    best = min(times.values())
    alone = {way: times[way] for way in times if way.accumulation_steps == 1}
    least = min(alone.values())
    if best > _SAME_TIME * least:
        return next(way for way in alone if _SAME_TIME * alone[way] <= least)
    return next(way for way in times if times[way] <= min(best / _SAME_TIME, _SAME_TIME * least))


def accumulation_pays(way: Split, sizes: Sequence[int], rate: Rate, noise: Noise | None) -> bool | None:
    """Return whether training takes less time than with the best effective batch of one micro-batch; None: unknown."""
    if noise is None or noise.basis is None or way.accumulation_steps == 1:
        return None
    alone = min(_time(Split(way.ranks, size, 1), rate, noise.basis) for size in sizes)
    return _time(way, rate, noise.basis) <= _SAME_TIME * alone


@dataclass(frozen=True)
class Batch:
    """What an effective batch costs, by speed and noise scale, on the ranks there are.

    Attributes:
        effective_batch: samples between two optimizer steps.
        samples_per_second: of all ranks.
        time: to train, over the least of all batches.
        time_low: the same with the lower end of the noise scale's interval.
        time_high: with the upper end.
    """

    effective_batch: int
    samples_per_second: float
    time: float
    time_low: float
    time_high: float


def costs(way: Split, sizes: Sequence[int], rate: Rate, noise: Noise | None) -> tuple[Batch, ...]:
    """Return what effective batches cost, each twice the one before it, up to well beyond chosen and noise scale."""
    if noise is None or noise.noise_scale in (0, math.inf):
        return ()
    most = _SHOWN * max(way.effective_batch, noise.noise_scale)
    least = way.ranks * min(sizes)
    batches = [least * 2**i for i in range(64) if i < 4 or least * 2**i <= most]
    ways = [split(batch, way.ranks, sizes, rate) for batch in batches]
    columns = []
    for noise_scale in (noise.noise_scale, noise.low, noise.high):
        times = [_time(way, rate, noise_scale) for way in ways]
        columns.append([time / min(times) for time in times])
    speeds = [way.samples_per_second(rate) for way in ways]
    return tuple(map(Batch, [way.effective_batch for way in ways], speeds, *columns))


def _ways(ranks: int, sizes: Sequence[int], rate: Rate) -> list[Split]:
    """Return the ways to train that are looked at, from small effective batches to large.

    They are each micro-batch alone, and the smallest of them times 1, 2, 3, 4, 6, 8, 12 and so on, on each rank.
    """
    least = ranks * min(sizes)
    batches = [least * part * 2**i for i in range(int(math.log2(_MOST_BATCH / least))) for part in (1, 3)]
    ways = {split(batch, ranks, sizes, rate) for batch in batches} | {Split(ranks, size, 1) for size in sizes}
    return sorted(ways, key=lambda way: (way.effective_batch, way.accumulation_steps))


def _time(way: Split, rate: Rate, noise_scale: float) -> float:
    """Return the time to train: the samples needed, over the samples per second. Only ratios of it mean something."""
    return samples_factor(way.effective_batch, noise_scale) / way.samples_per_second(rate)


def noise_reason(noise: Noise, batch: int) -> str:
    """Return in words what the noise scale is, and what an effective batch costs by it."""
    if noise.noise_scale in (0, math.inf):
        what = "only noise" if noise.noise_scale else "no noise"
        least = (
            ""
            if noise.basis is None
            else f": a noise scale of {plain(noise.basis)} samples or more (90%), to go by here"
        )
        return (
            f"What helps training: {noise.windows} windows of {noise.batch} samples showed {what}{least}; measure over "
            "more windows (noise_windows), or with a larger largest_micro_batch."
        )
    high = "or more" if math.isinf(noise.high) else f"to {plain(noise.high)}"
    samples, steps = samples_factor(batch, noise.noise_scale), steps_factor(batch, noise.noise_scale)
    return (
        f"What helps training: the gradient noise scale is {plain(noise.noise_scale)} samples (80% interval "
        f"{plain(noise.low)} {high}, from {noise.windows} windows, where the loss was about {noise.last_loss:.3g}). By "
        f"its model an effective batch of {batch} needs {plain(samples)} times as many samples as the smallest batches "
        f"and {plain(steps)} times as many steps as the largest."
    )
