"""How large the options of a plan may be: beyond, a plan would not end."""

from __future__ import annotations

from accumkern.checks import integer
from accumkern.planning.noise import WINDOW_MICRO_BATCHES

_MOST_EFFECTIVE_BATCH = 2**31
_MOST_MICRO_BATCH = 2**20
_LEAST_WINDOWS = 4
_MOST_WINDOWS = 10_000


def check_sizes(
    effective_batch: int | None, largest_micro_batch: int, noise_windows: int
) -> tuple[int | None, int, int]:
    """Return these arguments of :func:`accumkern.plan` as Python's own.

    Raises:
        TypeError: one is no integer.
        ValueError: one is too small or too large.
    """
    if effective_batch is not None:
        why = "more samples are a training, and not a step of it"
        effective_batch = _whole("effective_batch", effective_batch, 1, _MOST_EFFECTIVE_BATCH, why)
    why = "nothing gets faster by running more at once"
    largest_micro_batch = _whole("largest_micro_batch", largest_micro_batch, 1, _MOST_MICRO_BATCH, why)
    why = f"each trains {WINDOW_MICRO_BATCHES} micro-batches, and {_MOST_WINDOWS} are a training"
    noise_windows = _whole("noise_windows", noise_windows, 0, _MOST_WINDOWS, why)
    if 0 < noise_windows < _LEAST_WINDOWS:
        raise ValueError(
            f"noise_windows is {noise_windows}; it must be at least {_LEAST_WINDOWS}, or 0 to leave the noise scale out"
        )
    return effective_batch, largest_micro_batch, noise_windows


def _whole(name: str, number: int, least: int, most: int, why: str) -> int:
    right = f"it must be an int of at least {least}"
    number = integer(name, number, right, least)
    if number > most:
        raise ValueError(f"{name} is {number}; {right}, and of at most {most}: {why}")
    return number
