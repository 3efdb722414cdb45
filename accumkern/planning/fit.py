"""What fits: the largest micro-batch that trains under a memory limit, found by trying."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from accumkern.planning.memory import MemoryMeter, format_bytes, held_tensors, is_out_of_memory, storage_bytes
from accumkern.planning.preserve import Preserved
from accumkern.planning.protocol import Setup, make_batch
from accumkern.planning.ranks import Ranks
from accumkern.planning.window import accumulation, train_window

# The optimizer's states appear in its first step, so only the second window needs all the memory that training needs.
_TRIAL_WINDOWS = 2
_TRIAL_MICRO_BATCHES = 2  # the residuals appear at the second
_VERIFY_WINDOWS = 4
_VERIFY_MICRO_BATCHES = 4
_LEAK_TRIALS = 4
_LEAK_FRACTION = 0.01  # of what a trial allocates


@dataclass(frozen=True)
class Trial:
    """What happened when a micro-batch was tried.

    Attributes:
        micro_batch: samples in it.
        fits: whether it trained under the limit, on every rank.
        peak_bytes: the most memory that was allocated, the worst rank's; up to where it ran out if it did not fit.
    """

    micro_batch: int
    fits: bool
    peak_bytes: int


@dataclass(frozen=True)
class Fit:
    """What fits.

    Attributes:
        micro_batch: the largest that does, up to what was asked for.
        is_limited_by_memory: False where memory was not the reason to stop.
        limit_bytes: what was allowed, the safety margin taken off.
        held_bytes: what model and optimizer held before.
        trials: all that was tried, in order.
        verified: the last trial, of several windows.
    """

    micro_batch: int
    is_limited_by_memory: bool
    limit_bytes: int
    held_bytes: int
    trials: tuple[Trial, ...]
    verified: Trial


def find_fit(
    setup: Setup,
    preserved: Preserved,
    ranks: Ranks,
    limit_bytes: int,
    at_most: int,
    buffer: str | None,
    progress: Callable[[Trial], None] = lambda trial: None,
) -> Fit:
    """Try micro-batches: one sample, doubled until memory runs out or ``at_most`` is reached, then a binary search.

    Each trial trains two windows of two micro-batches with the longest samples, steps included, from the same state.
    What was found is verified with more and longer windows, and made smaller until they pass. With a process group,
    all ranks try the same and agree: what does not fit on one does not fit.

    Args:
        setup: what to train.
        preserved: the block that puts the setup back.
        ranks: that try it together.
        limit_bytes: of all memory together.
        at_most: the largest micro-batch to try.
        buffer: what gradients are accumulated in; None leaves it to stock PyTorch.
        progress: is told of every trial.

    Raises:
        ValueError: the limit is less than what the model holds.
        RuntimeError: not even one sample fits, the setup leaks memory from trial to trial, or another rank failed.
            What the setup itself raises is passed on.
    """
    held = storage_bytes(held_tensors(setup.model, setup.optimizer))
    if held > limit_bytes:
        parameters = storage_bytes(setup.model.parameters())
        raise ValueError(
            f"the memory limit, {format_bytes(limit_bytes)} after the safety margin, is less than what the model and "
            f"its optimizer hold already, {format_bytes(held)} (parameters {format_bytes(parameters)}); raise the "
            "limit, or use a smaller model or dtype"
        )
    trials: list[Trial] = []

    def fits(micro_batch: int, windows: int = _TRIAL_WINDOWS, micro_batches: int = _TRIAL_MICRO_BATCHES) -> bool:
        trial, _ = _try(setup, preserved, ranks, micro_batch, buffer, windows, micro_batches, limit_bytes)
        trials.append(trial)
        progress(trial)
        return trial.fits

    if not fits(1):
        raise RuntimeError(
            f"no micro-batch fits: one sample needs more than {format_bytes(limit_bytes)} after the safety margin "
            f"(model and optimizer held {format_bytes(held)}; it ran out at {format_bytes(trials[-1].peak_bytes)}); "
            "raise the limit, use activation checkpointing, shorter samples, or an optimizer with smaller states"
        )
    _check_leaks(setup, preserved, ranks, buffer, limit_bytes)
    found = largest(fits, at_most)
    is_limited = found < at_most
    while not fits(found, _VERIFY_WINDOWS, _VERIFY_MICRO_BATCHES):
        is_limited = True
        if found == 1:
            raise RuntimeError(
                f"no micro-batch fits: one sample trained for {_TRIAL_WINDOWS} windows, but not for {_VERIFY_WINDOWS}; "
                "memory grows or fragments while it trains"
            )
        found -= max(1, found // 16)
    return Fit(found, is_limited, limit_bytes, held, tuple(trials), trials[-1])


def try_window(
    setup: Setup,
    preserved: Preserved,
    ranks: Ranks,
    micro_batch: int,
    micro_batches: int,
    buffer: str | None,
    limit_bytes: int,
) -> Trial:
    """Train as for verification, with windows of up to ``micro_batches``; return what happened.

    Raises:
        RuntimeError: another rank failed. What the setup itself raises is passed on.
    """
    count = min(micro_batches, _VERIFY_MICRO_BATCHES)
    return _try(setup, preserved, ranks, micro_batch, buffer, _VERIFY_WINDOWS, count, limit_bytes)[0]


def largest(fits: Callable[[int], bool], at_most: int) -> int:
    """Return the largest size up to ``at_most`` that fits; 1 is known to."""
    fitting, size = 1, min(2, at_most)
    while size > fitting and fits(size):
        fitting, size = size, min(2 * size, at_most)
    if size == fitting:
        return fitting
    while size - fitting > 1:
        middle = (fitting + size) // 2
        if fits(middle):
            fitting = middle
        else:
            size = middle
    return fitting


def _try(
    setup: Setup,
    preserved: Preserved,
    ranks: Ranks,
    micro_batch: int,
    buffer: str | None,
    windows: int,
    micro_batches: int,
    limit_bytes: int,
) -> tuple[Trial, int]:
    """Train some windows; return what happened, and the bytes that were still there after the rewind."""
    held_bytes = storage_bytes(held_tensors(setup.model, setup.optimizer))
    fits = True
    with MemoryMeter(setup.device, held_bytes, limit_bytes) as meter:
        try:
            with accumulation(setup, buffer, micro_batches) as accumulator:
                for _ in range(windows):
                    batches = (make_batch(setup, micro_batch, "longest_batch") for _ in range(micro_batches))
                    train_window(setup, batches, micro_batches, accumulator)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            fits = False
        preserved.rewind()
    outcomes = ranks.gathered((fits and meter.peak_bytes <= limit_bytes, meter.peak_bytes))
    trial = Trial(micro_batch, all(fits for fits, _ in outcomes), max(peak for _, peak in outcomes))
    return trial, meter.left_bytes


def _check_leaks(setup: Setup, preserved: Preserved, ranks: Ranks, buffer: str | None, limit_bytes: int) -> None:
    """Try one sample several times more: caches may grow at first, but not again and again.

    Raises:
        RuntimeError: they do.
    """
    left = []
    for _ in range(_LEAK_TRIALS):
        trial, left_bytes = _try(setup, preserved, ranks, 1, buffer, _TRIAL_WINDOWS, _TRIAL_MICRO_BATCHES, limit_bytes)
        left.append(left_bytes)
    held = storage_bytes(held_tensors(setup.model, setup.optimizer))
    least = _LEAK_FRACTION * (trial.peak_bytes - held)
    if min(left[1:]) > least:
        raise RuntimeError(
            f"setup() leaks memory: each of {_LEAK_TRIALS} equal trials left {format_bytes(min(left[1:]))} or more "
            "behind; look for losses or outputs that are kept without detach(), or batches kept in a list"
        )
