"""What is fast: the time of a micro-batch and of the optimizer's step, against the size of the micro-batch."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from accumkern.planning.preserve import Preserved
from accumkern.planning.protocol import Setup, make_batch
from accumkern.planning.ranks import Ranks
from accumkern.planning.window import accumulate, accumulation, now

_MICRO_BATCHES = 2  # in a window
_LEAST_SECONDS = 0.25  # to time a size for
_LEAST_WINDOWS = 2
_MOST_WINDOWS = 25
_GAIN = 1.02  # below it, a larger micro-batch brings nothing
_KNEE = 0.95  # of the best speed


@dataclass(frozen=True)
class Speed:
    """How long things take with a micro-batch of a size.

    Attributes:
        micro_batch: samples in it.
        seconds: median of forward, backward and accumulation of one micro-batch that is there already.
        step_seconds: median of the optimizer's step.
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


def measure_speed(setup: Setup, preserved: Preserved, ranks: Ranks, micro_batch: int, buffer: str | None) -> Speed:
    """Time a size: a window of two micro-batches and a step to warm up, then more until there is enough to go by.

    Making the batches is not timed: a data loader does that while the model trains. With several ranks, the slowest
    counts, and all run equally many windows: the model may hold collectives of its own.
    """
    times: list[float] = []
    step_times: list[float] = []
    with accumulation(setup, buffer, _MICRO_BATCHES) as accumulator:
        for window in range(1 + _MOST_WINDOWS):
            of_window = []
            for _ in range(_MICRO_BATCHES):
                batch = make_batch(setup, micro_batch)
                begin = now(setup)
                accumulate(setup, [batch], _MICRO_BATCHES, accumulator)
                of_window.append(now(setup) - begin)
            begin = now(setup)
            setup.optimizer.step()
            step = now(setup) - begin
            setup.optimizer.zero_grad()
            if window > 0:
                times += of_window
                step_times.append(step)
            if len(step_times) >= _LEAST_WINDOWS and min(ranks.gathered(sum(times))) >= _LEAST_SECONDS:
                break
    preserved.rewind()
    medians = ranks.gathered((statistics.median(times), statistics.median(step_times)))
    return Speed(micro_batch, max(median for median, _ in medians), max(median for _, median in medians))


def measure_speeds(
    setup: Setup,
    preserved: Preserved,
    ranks: Ranks,
    sizes: Sequence[int],
    buffer: str | None,
    progress: Callable[[Speed], None],
) -> list[Speed]:
    """Time sizes from small to large, until two in a row bring nothing over the best before them."""
    speeds: list[Speed] = []
    for size in sorted(sizes):
        speeds.append(measure_speed(setup, preserved, ranks, size, buffer))
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
        (speed for speed in speeds if speed.limit_per_second >= _KNEE * best), key=lambda speed: speed.micro_batch
    )
