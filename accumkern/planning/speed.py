"""What is fast: the time of a micro-batch against its size, and how to split an effective batch by it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from accumkern.planning.precision import accumulation
from accumkern.planning.protocol import make_batch
from accumkern.planning.trial import Preserved, train_window

LEAST_SECONDS = 0.25  # to time a size for
_MICRO_BATCHES = 2  # in a window
_LEAST_WINDOWS = 2
_MOST_WINDOWS = 25
_GAIN = 1.02  # below it, a larger micro-batch brings nothing
_SAME_SPEED = 0.95  # of the best
_MUCH_SLOWER = 0.8
_NEAR = 0.1  # of the target, for effective batches that are not it

Rate = Callable[[int, int], float]  # of (micro_batch, accumulation_steps): samples per second of a rank


@dataclass(frozen=True)
class Speed:
    """How long things take with a micro-batch of a size.

    Attributes:
        micro_batch: samples in it.
        seconds: median of forward, backward and accumulation of one micro-batch that is there already.
        step_seconds: median of the optimizer's step, with ``zero_grad``.
    """

    micro_batch: int
    seconds: float
    step_seconds: float

    def window_seconds(self, micro_batches: int) -> float:
        """Return the time of a window of so many micro-batches and a step."""
        return micro_batches * self.seconds + self.step_seconds

    def samples_per_second(self, micro_batches: int = 1) -> float:
        """Return the samples that such windows train in a second."""
        return micro_batches * self.micro_batch / self.window_seconds(micro_batches)

    @property
    def limit_per_second(self) -> float:
        """Samples per second of a window so long that its step takes no time."""
        return self.micro_batch / self.seconds


def measure_speed(preserved: Preserved, micro_batch: int) -> Speed:
    """Time a size: a window of two micro-batches and a step to warm up, then more until there is enough to go by.

    With several ranks, the slowest counts, and all run equally many windows: the model may hold collectives of its own.
    """
    setup, ranks = preserved.setup, preserved.ranks
    times: list[float] = []
    step_times: list[float] = []
    with accumulation(setup, preserved.buffer, _MICRO_BATCHES, preserved.master_weights) as accumulator:
        for window in range(1 + _MOST_WINDOWS):
            batches = (make_batch(setup, micro_batch) for _ in range(_MICRO_BATCHES))
            seconds, step_seconds = train_window(setup, batches, _MICRO_BATCHES, accumulator)
            if window > 0:
                times += seconds
                step_times.append(step_seconds)
            if len(step_times) >= _LEAST_WINDOWS and min(ranks.gathered(sum(times))) >= LEAST_SECONDS:
                break
    preserved.rewind()
    medians = ranks.gathered((statistics.median(times), statistics.median(step_times)))
    return Speed(micro_batch, *map(max, zip(*medians, strict=True)))


def sizes_to_time(most: int, per_rank: int | None) -> list[int]:
    """Return the micro-batches to time: powers of two, the largest, and the largest parts of a rank's batch."""
    sizes = {2**i for i in range(most.bit_length())} | {most}
    if per_rank is not None:
        parts = [size for size in range(1, most + 1) if per_rank % size == 0]
        sizes |= set(parts[-3:])
    return sorted(sizes)


def measure_speeds(preserved: Preserved, sizes: Sequence[int], progress: Callable[[Speed], None]) -> list[Speed]:
    """Time sizes from small to large, until two in a row bring nothing over the best before them."""
    speeds: list[Speed] = []
    for size in sorted(sizes):
        speeds.append(measure_speed(preserved, size))
        progress(speeds[-1])
        if len(speeds) > 2:
            best = max(speed.limit_per_second for speed in speeds[:-2])
            if max(speed.limit_per_second for speed in speeds[-2:]) < _GAIN * best:
                break
    return speeds


def knee(speeds: Sequence[Speed]) -> Speed:
    """Return the smallest micro-batch that is within 5% of the best speed: beyond it, more memory buys little."""
    best = max(speed.limit_per_second for speed in speeds)
    return min(
        (speed for speed in speeds if speed.limit_per_second >= _SAME_SPEED * best), key=lambda speed: speed.micro_batch
    )


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

    def samples_per_second(self, rate: Rate) -> float:
        """Return the samples of all ranks, without the time of communication."""
        return self.ranks * rate(self.micro_batch, self.accumulation_steps)


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
    ways = _ways(target, ranks, sizes)
    speeds = {way: way.samples_per_second(rate) for way in ways if abs(way.effective_batch - target) <= _NEAR * target}
    if not speeds:  # fewer samples than ranks
        return Split(ranks, min(sizes), 1)
    best = max(speeds.values())
    exact = {way: speed for way, speed in speeds.items() if way.effective_batch == target}
    if exact and max(exact.values()) >= _MUCH_SLOWER * best:
        best = max(exact.values())
        return min((way for way in exact if exact[way] >= _SAME_SPEED * best), key=lambda way: way.micro_batch)
    fast = [way for way in speeds if speeds[way] >= _MUCH_SLOWER * best]
    return min(fast, key=lambda way: (abs(way.effective_batch - target), -speeds[way]))


def split_by_size(target: int, ranks: int, largest: int) -> Split:
    """Return how to make an effective batch where no speed was measured, and micro-batches up to ``largest`` fit.

    It is the nearest to ``target``, exactly if possible, with a micro-batch of half the largest or more, which is taken
    to be as fast; of several, that with the largest.
    """
    most = min(largest, max(1, round(target / ranks)))
    ways = _ways(target, ranks, range((most + 1) // 2, most + 1))
    return min(ways, key=lambda way: (abs(way.effective_batch - target), -way.micro_batch))


def _ways(target: int, ranks: int, sizes: Sequence[int]) -> list[Split]:
    """Return the split with each micro-batch that comes nearest to an effective batch."""
    return [Split(ranks, size, max(1, round(target / ranks / size))) for size in sizes]
