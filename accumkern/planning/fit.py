"""What fits: the largest micro-batch that trains under a limit of memory, and the smallest that trains at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from accumkern.memory import storage_bytes
from accumkern.out_of_memory import format_bytes
from accumkern.planning.trial import Preserved, Trial, held_bytes, try_windows

# The optimizer's states appear in its first step, so only the second window needs all the memory that training needs.
_TRIAL_WINDOWS = 2
_TRIAL_MICRO_BATCHES = 2  # the residuals appear at the second
_VERIFY_WINDOWS = 4
_VERIFY_MICRO_BATCHES = 4
_LEAK_TRIALS = 4
_LEAK_FRACTION = 0.01  # of what a trial allocates
_MOST_SMALLEST = 8  # what does not train with so many samples is taken to be wrong


@dataclass(frozen=True)
class Fit:
    """What fits.

    Attributes:
        micro_batch: the largest that does, up to what was asked for.
        is_limited_by_memory: False where memory was not the reason to stop.
        limit_bytes: what was allowed, the safety margin taken off.
        held_bytes: what model and optimizer held before.
        trials: all whose memory was tried, in order.
        verified: the last trial, of several windows.
        smallest: the fewest samples that train: BatchNorm in training mode may need two.
        smallest_problem: what one sample less raises; None where one sample trains.
        data_problem: why there is no batch of one sample more; None where the data was not the reason to stop.
    """

    micro_batch: int
    is_limited_by_memory: bool
    limit_bytes: int
    held_bytes: int
    trials: tuple[Trial, ...]
    verified: Trial
    smallest: int = 1
    smallest_problem: str | None = None
    data_problem: str | None = None


def find_fit(
    preserved: Preserved, limit_bytes: int, at_most: int, progress: Callable[[Trial], None] = lambda trial: None
) -> Fit:
    """Try micro-batches: the smallest, doubled until memory or data run out or ``at_most`` is reached, then a search.

    The smallest is one sample, or the next of up to eight that trains where fewer raise an error. Each trial trains two
    windows of two micro-batches with the longest samples, steps included, from the same state. What was found is
    verified with more and longer windows, and made smaller until they pass. With a process group, all ranks try the
    same and agree: what does not fit on one does not fit.

    Raises:
        ValueError: the limit is less than what the model holds.
        RuntimeError: not even the smallest fits, the setup leaks memory from trial to trial, or another rank failed.
            What the setup itself raises is passed on.
    """
    held = held_bytes(preserved.setup)
    if held > limit_bytes:
        parameters = storage_bytes(preserved.setup.model.parameters())
        raise ValueError(
            f"the memory limit, {format_bytes(limit_bytes)} after the safety margin, is less than what the model and "
            f"its optimizer hold already, {format_bytes(held)} (parameters {format_bytes(parameters)}); raise the "
            "limit, or use a smaller model or dtype"
        )
    first, smallest_problem = _smallest(preserved, limit_bytes, at_most, progress)
    smallest, samples = first.micro_batch, _samples(first.micro_batch)
    if not first.fits:
        raise RuntimeError(
            f"no micro-batch fits: {samples} more than {format_bytes(limit_bytes)} after the safety margin "
            f"(model and optimizer held {format_bytes(held)}; it ran out at {format_bytes(first.peak_bytes)}); "
            "raise the limit, use activation checkpointing, shorter samples, or an optimizer with smaller states"
        )
    _check_leaks(preserved, smallest, limit_bytes)
    trials, data_problems = [first], {}

    def fits(micro_batch: int) -> bool:
        size = _TRIAL_WINDOWS, _TRIAL_MICRO_BATCHES
        trial, _ = try_windows(preserved, micro_batch, *size, limit_bytes, tolerated="batches")
        progress(trial)
        if trial.problem is None:
            trials.append(trial)
        else:
            data_problems[micro_batch] = trial.problem
        return trial.fits

    found = largest(fits, at_most, smallest)
    data_problem = data_problems.get(found + 1)
    is_limited = found < at_most and data_problem is None
    while not (verified := verify(preserved, found, _VERIFY_MICRO_BATCHES, limit_bytes)).fits:
        trials.append(verified)
        progress(verified)
        is_limited, data_problem = True, None
        if found == smallest:
            raise RuntimeError(
                f"no micro-batch fits: {smallest} samples trained for {_TRIAL_WINDOWS} windows, but not for "
                f"{_VERIFY_WINDOWS}; memory grows or fragments while it trains"
            )
        found -= max(1, found // 16)
    progress(verified)
    return Fit(
        found,
        is_limited,
        limit_bytes,
        held,
        (*trials, verified),
        verified,
        smallest,
        smallest_problem,
        data_problem,
    )


def fit_reasons(fit: Fit) -> Iterator[str]:
    """Yield in words what else than memory limits micro-batches."""
    if fit.data_problem is not None:
        yield f"Data: it is the limit. {fit.data_problem}."
    if fit.smallest_problem is not None:
        yield (
            f"Smallest micro-batch: {fit.smallest} samples. With one less the script raises an error "
            f"({fit.smallest_problem})."
        )


def _samples(count: int) -> str:
    return "one sample needs" if count == 1 else f"{count} samples, the fewest that train, need"


def _smallest(
    preserved: Preserved, limit_bytes: int, at_most: int, progress: Callable[[Trial], None]
) -> tuple[Trial, str | None]:
    """Return the trial of the fewest samples that train, or run out of memory, and what one less raises.

    Where no number of them does, the error of two is raised as it is: that of one may only say that it is too few.
    """
    size, problem = (_TRIAL_WINDOWS, _TRIAL_MICRO_BATCHES), None
    for micro_batch in range(1, min(_MOST_SMALLEST, at_most) + 1):
        trial, _ = try_windows(preserved, micro_batch, *size, limit_bytes, tolerated="all")
        progress(trial)
        if trial.problem is None:
            return trial, problem
        problem = trial.problem
    return try_windows(preserved, min(2, at_most), *size, limit_bytes)[0], None


def verify(preserved: Preserved, micro_batch: int, micro_batches: int, limit_bytes: int) -> Trial:
    """Try a micro-batch as :func:`find_fit` verifies, in windows of up to ``micro_batches``; return what happened."""
    count = min(micro_batches, _VERIFY_MICRO_BATCHES)
    return try_windows(preserved, micro_batch, _VERIFY_WINDOWS, count, limit_bytes)[0]


def largest(fits: Callable[[int], bool], at_most: int, least: int = 1) -> int:
    """Return the largest size up to ``at_most`` that fits; ``least`` is known to."""
    fitting, size = least, min(2 * least, at_most)
    while size > fitting and fits(size):
        fitting, size = size, min(2 * size, at_most)
    while size - fitting > 1:
        middle = (fitting + size) // 2
        if fits(middle):
            fitting = middle
        else:
            size = middle
    return fitting


def _check_leaks(preserved: Preserved, micro_batch: int, limit_bytes: int) -> None:
    """Try a size several times more: caches may grow at first, but not again and again."""
    size = _TRIAL_WINDOWS, _TRIAL_MICRO_BATCHES
    tried = [try_windows(preserved, micro_batch, *size, limit_bytes) for _ in range(_LEAK_TRIALS)]
    left = min(left_bytes for _, left_bytes in tried[1:])
    if left > _LEAK_FRACTION * (tried[-1][0].peak_bytes - held_bytes(preserved.setup)):
        raise RuntimeError(
            f"setup() leaks memory: each of {_LEAK_TRIALS} equal trials left {format_bytes(left)} or more behind; look "
            "for losses or outputs that are kept without detach(), or batches kept in a list"
        )
