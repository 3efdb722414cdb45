"""What is fast: the time of a micro-batch against its size, and how to split an effective batch by it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from accumkern.planning.precision import accumulation
from accumkern.planning.protocol import make_batch
from accumkern.planning.trial import Preserved, Stopwatch, train_window

LEAST_SECONDS = 0.25  # to time a size for
_MICRO_BATCHES = 2  # in a window
_LEAST_WINDOWS = 2
_MOST_WINDOWS = 25
UNEVEN = 2.0  # times, of equal micro-batches: others use the machine
_LONGER = 4  # is then timed
_STANDS_OUT = 1.25  # over the time of a larger micro-batch, or of a smaller one for as many samples: is timed again
_GAIN = 1.02  # below it, a larger micro-batch brings nothing
_SAME_SPEED = 0.95  # of the best
_MUCH_SLOWER = 0.8
_NEAR = 0.1  # of the target, for effective batches that are not it

Rate = Callable[[int, float], float]  # of (micro_batch, accumulation_steps): samples per second of a rank


@dataclass(frozen=True)
class Speed:
    """How long things take with a micro-batch of a size.

    Attributes:
        micro_batch: samples in it.
        seconds: median of forward, backward and accumulation of one micro-batch that is there already.
        step_seconds: median of the optimizer's step, with ``zero_grad``.
        spread: of the micro-batches, the time that nine in ten are within, over that of one in ten.
        cpu_seconds: of the process, per second that was timed: how many cores it had.
    """

    micro_batch: int
    seconds: float
    step_seconds: float
    spread: float = 1.0
    cpu_seconds: float = 1.0

    def window_seconds(self, micro_batches: int) -> float:
        """Return the time of a window of so many micro-batches and a step."""
        return micro_batches * self.seconds + self.step_seconds

    def samples_per_second(self, micro_batches: float = 1) -> float:
        """Return the samples that such windows train in a second; of windows without an end if it is infinite."""
        return self.micro_batch / (self.seconds + self.step_seconds / micro_batches)

    @property
    def limit_per_second(self) -> float:
        """Samples per second of a window so long that its step takes no time."""
        return self.samples_per_second(math.inf)


def measure_speed(preserved: Preserved, micro_batch: int) -> Speed:
    """Time a size: a window of two micro-batches and a step to warm up, then more until there is enough to go by.

    Where some micro-batches take much longer than others, more are timed, so that the median is not of those. With
    several ranks, the slowest counts, and all run equally many windows: the model may hold collectives of its own.
    """
    setup, ranks = preserved.setup, preserved.ranks
    times: list[float] = []
    step_times: list[float] = []
    watch = Stopwatch()
    with accumulation(setup, preserved.buffer, _MICRO_BATCHES, preserved.master_weights) as accumulator:
        for window in range(1 + _MOST_WINDOWS):
            batches = (make_batch(setup, micro_batch) for _ in range(_MICRO_BATCHES))
            counted = None if window == 0 else watch
            seconds, step_seconds = train_window(setup, batches, _MICRO_BATCHES, accumulator, counted)
            if window == 0:
                continue
            times += seconds
            step_times.append(step_seconds)
            longer = _LONGER if _spread(times) > UNEVEN else 1
            is_enough = len(step_times) >= longer * _LEAST_WINDOWS and sum(times) >= longer * LEAST_SECONDS
            if all(ranks.gathered(is_enough)):
                break
    preserved.rewind()
    medians = statistics.median(times), statistics.median(step_times)
    of_ranks = ranks.gathered(Speed(micro_batch, *medians, _spread(times), watch.cpu_seconds / watch.seconds))
    return Speed(
        micro_batch,
        max(speed.seconds for speed in of_ranks),
        max(speed.step_seconds for speed in of_ranks),
        max(speed.spread for speed in of_ranks),
        min(speed.cpu_seconds for speed in of_ranks),
    )


def _spread(times: Sequence[float]) -> float:
    """Return the time that nine in ten are within, over that which one in ten is within."""
    most, least = (sorted(times)[math.ceil(part * len(times)) - 1] for part in (0.9, 0.1))
    return most / least


def sizes_to_time(most: int, batches: Sequence[int], least: int = 1) -> list[int]:
    """Return the micro-batches to time: powers of two, the ends, and what shares a rank's batch.

    Args:
        most: samples that fit.
        batches: what a rank trains between two steps, on as many ranks as there are and on other numbers of them.
            Those that fit are timed themselves, and of the first its three largest divisors.
        least: samples that train.
    """
    sizes = {2**i for i in range(most.bit_length())} | {least, most, *batches}
    for batch in batches[:1]:
        sizes |= set([size for size in range(1, most + 1) if batch % size == 0][-3:])
    return sorted(size for size in sizes if least <= size <= most)


def measure_speeds(
    preserved: Preserved, sizes: Sequence[int], progress: Callable[[Speed], None], needed: Collection[int] = ()
) -> list[Speed]:
    """Time sizes from small to large, until two in a row bring nothing over the best before them; ``needed`` always.

    A time that stands out, because a larger micro-batch takes less or a smaller one much less for as many samples, is
    taken again, and the lesser counts.
    """
    speeds: list[Speed] = []
    is_flat = False
    for size in sorted(sizes):
        if is_flat and size not in needed:
            continue
        speeds.append(measure_speed(preserved, size))
        best = max(speed.limit_per_second for speed in speeds)
        if _STANDS_OUT * speeds[-1].limit_per_second < best:
            speeds[-1] = _timed_again(preserved, speeds[-1])
        for i, speed in enumerate(speeds[:-1]):
            if speed.seconds > _STANDS_OUT * speeds[-1].seconds:
                speeds[i] = _timed_again(preserved, speed)
        progress(speeds[-1])
        if len(speeds) > 2:
            best = max(speed.limit_per_second for speed in speeds[:-2])
            is_flat = is_flat or max(speed.limit_per_second for speed in speeds[-2:]) < _GAIN * best
    return speeds


def _timed_again(preserved: Preserved, speed: Speed) -> Speed:
    return min(speed, measure_speed(preserved, speed.micro_batch), key=lambda speed: speed.seconds)


def as_fast(sizes: Sequence[int], rate: Rate) -> list[int]:
    """Return the micro-batches that are about as fast as any: within 5% of the best, the step's time left out."""
    limits = {size: rate(size, math.inf) for size in sorted(sizes)}
    return [size for size in limits if limits[size] >= _SAME_SPEED * max(limits.values())]


def knee(sizes: Sequence[int], rate: Rate) -> int:
    """Return the smallest micro-batch that is about as fast as any: beyond it, more memory buys little."""
    return as_fast(sizes, rate)[0]


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

    Where the exact ways have less than 80% of the speed of one within 10% of the target, or there is none, it is the
    nearest. Of several it is one whose micro-batch is about as fast as any (:func:`as_fast`): the one without
    accumulation if it is among them, or else the one with the smallest micro-batch. If none is, it is the fastest.

    Args:
        target: the effective batch, over all ranks.
        ranks: that share it.
        sizes: micro-batches to choose from.
        rate: samples per second of a rank.
    """
    speeds = {way: way.samples_per_second(rate) for way in _ways(target, ranks, sizes)}
    distances = {way: abs(way.effective_batch - target) for way in speeds}
    near = [way for way in speeds if distances[way] <= max(_NEAR * target, min(distances.values()))]
    best = max(speeds[way] for way in near)
    distance = min(distances[way] for way in near if speeds[way] >= _MUCH_SLOWER * best)
    nearest = [way for way in near if distances[way] == distance]
    fast = as_fast(sizes, rate)
    choices = [way for way in nearest if way.micro_batch in fast] or [max(nearest, key=lambda way: speeds[way])]
    return min(choices, key=lambda way: (way.accumulation_steps > 1, way.micro_batch))


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


def fast_reason(way: Split, speeds: Sequence[Speed], knee: int) -> str:
    """Return in words what is fast, and why a way's micro-batch is not the knee where it is another."""
    by_size = {speed.micro_batch: speed.limit_per_second for speed in speeds}
    best = max(by_size, key=lambda size: by_size[size])
    is_alone = way.accumulation_steps == 1
    if way.micro_batch == knee:
        taken = "that micro-batch"
    elif way.micro_batch > knee:
        why = "needs no accumulation" if is_alone else f"is the next that makes {way.effective_batch}"
        taken = f"{way.micro_batch}, which {why}"
    else:
        why = f"no micro-batch from {knee} on makes an effective batch of {way.effective_batch}"
        if is_alone:
            why = f"an effective batch of {way.effective_batch} has no more samples for each rank"
        taken = f"{way.micro_batch}, at {by_size[way.micro_batch] / by_size[best]:.1%} of the best speed, because {why}"
    what = f"{plain(by_size[knee])} samples per second with a micro-batch of {knee}"
    if knee == max(by_size):
        return f"What is fast: {what}, the largest; none that is smaller is within 5% of it. The plan takes {taken}."
    rank = "the best" if knee == best else f"the smallest within 5% of the best ({plain(by_size[best])} with {best})"
    return (
        f"What is fast: {what}, {rank}, without the optimizer's step. Beyond it, more memory buys little. The plan "
        f"takes {taken}."
    )


def plain(number: float) -> str:
    """Return a number for people: three digits of it or all before its point, and no powers of ten."""
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}"


def accumulation_reason(way: Split, speeds: Sequence[Speed]) -> str:
    """Return in words what accumulation costs."""
    own = next(speed for speed in speeds if speed.micro_batch == way.micro_batch)
    window = own.window_seconds(way.accumulation_steps)
    reason = (
        f"Cost of accumulation: {way.accumulation_steps} micro-batches and a step take {window:.3g} s, of which "
        f"the step is {100 * own.step_seconds / window:.1f}%"
    )
    largest = speeds[-1]
    if largest.micro_batch != way.micro_batch:
        per_rank = way.micro_batch * way.accumulation_steps
        other = largest.window_seconds(1) * per_rank / largest.micro_batch
        reason += f"; in micro-batches of {largest.micro_batch} the same samples would take about {other:.3g} s"
    return reason + "."
