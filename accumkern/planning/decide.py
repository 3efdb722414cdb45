"""The decision: micro-batch and accumulation steps for an effective batch, and which effective batches are useful."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from accumkern.planning.noise import samples_factor

# What a difference has to be before it counts.
_SAME_SPEED = 0.95
_MUCH_SLOWER = 0.8
_NEAR = 0.1  # of the target, for effective batches that are not it
_USEFUL = 1.1  # times the least time to train
_MOST_BATCH = 2**24

Rate = Callable[[int, int], float]  # of (micro_batch, accumulation_steps): samples per second of a rank


@dataclass(frozen=True)
class Split:
    """How the ranks share an effective batch.

    Attributes:
        ranks: that train with different data.
        micro_batch: samples of one forward and backward pass of a rank.
        accumulation_steps: micro-batches of a rank between two optimizer steps.
    """

    ranks: int
    micro_batch: int
    accumulation_steps: int

    @property
    def effective_batch(self) -> int:
        """Samples between two optimizer steps, over all ranks."""
        return self.ranks * self.micro_batch * self.accumulation_steps


def split(target: int, ranks: int, sizes: Sequence[int], rate: Rate) -> Split:
    """Return how to make an effective batch of ``target`` samples, exactly if that is not much slower than nearly.

    Of the ways that are as fast as the fastest, within 5%, it is the one with the smallest micro-batch. Where the exact
    ways have less than 80% of the speed of one within 10% of the target, or there is none, it is the nearest.

    Args:
        target: the effective batch, over all ranks.
        ranks: that share it.
        sizes: micro-batches to choose from.
        rate: samples per second of a rank.
    """
    per_rank = target / ranks
    near = [Split(ranks, size, max(1, round(per_rank / size))) for size in sizes]
    exact = [way for way in near if way.effective_batch == target]
    near = [way for way in near if abs(way.effective_batch - target) <= _NEAR * target]
    if not near:  # fewer samples than ranks
        return Split(ranks, min(sizes), 1)

    def speed(way: Split) -> float:
        return rate(way.micro_batch, way.accumulation_steps)

    best = max(map(speed, near))
    if exact and max(map(speed, exact)) >= _MUCH_SLOWER * best:
        best = max(map(speed, exact))
        return min((way for way in exact if speed(way) >= _SAME_SPEED * best), key=lambda way: way.micro_batch)
    fast = [way for way in near if speed(way) >= _MUCH_SLOWER * best]
    return min(fast, key=lambda way: (abs(way.effective_batch - target), -speed(way)))


def split_by_size(target: int, ranks: int, largest: int) -> Split:
    """Return how to make an effective batch where no speed was measured, and micro-batches up to ``largest`` fit.

    It is the nearest to ``target``, exactly if possible, with a micro-batch of half the largest or more, which is taken
    to be as fast; of several, that with the largest.
    """
    per_rank = target / ranks
    most = min(largest, max(1, round(per_rank)))
    ways = [Split(ranks, size, max(1, round(per_rank / size))) for size in range((most + 1) // 2, most + 1)]
    return min(ways, key=lambda way: (abs(way.effective_batch - target), -way.micro_batch))


def relative_time(batch: int, ranks: int, sizes: Sequence[int], rate: Rate, noise_scale: float) -> float:
    """Return the time to train with an effective batch: the samples it needs, over the samples per second.

    It is in no unit: only ratios mean something.
    """
    way = split(batch, ranks, sizes, rate)
    return samples_factor(way.effective_batch, noise_scale) / (ranks * rate(way.micro_batch, way.accumulation_steps))


def useful_batches(ranks: int, sizes: Sequence[int], rate: Rate, noise_scales: Sequence[float]) -> tuple[float, float]:
    """Return the least and the largest effective batch whose time to train is within 10% of the best.

    Looked at are powers of two times the ranks. With several noise scales, the range covers that of each. It has no
    upper end, infinity, where the gradient was all noise.
    """
    batches = [ranks * 2**i for i in range(int(math.log2(_MOST_BATCH / ranks)))]
    low, high = math.inf, 0.0
    for noise_scale in noise_scales:
        if noise_scale == 0:
            low, high = min(low, ranks), max(high, ranks)
            continue
        times = {batch: relative_time(batch, ranks, sizes, rate, noise_scale) for batch in batches}
        useful = [batch for batch, time in times.items() if time <= _USEFUL * min(times.values())]
        low, high = min(low, useful[0]), max(high, math.inf if useful[-1] == batches[-1] else useful[-1])
    return low, high


def best_batch(ranks: int, sizes: Sequence[int], rate: Rate, noise_scale: float) -> int:
    """Return the smallest effective batch whose time to train is within 5% of the best, of powers of two per rank."""
    batches = [ranks * 2**i for i in range(int(math.log2(_MOST_BATCH / ranks)))]
    if noise_scale == 0:
        return batches[0]
    times = {batch: relative_time(batch, ranks, sizes, rate, noise_scale) for batch in batches}
    least = min(times.values())
    return next(batch for batch in batches if times[batch] * _SAME_SPEED <= least)
