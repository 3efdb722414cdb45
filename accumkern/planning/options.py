"""How large the options of a plan may be: beyond, a plan would not end."""

from __future__ import annotations

import math

from accumkern.checks import integer, real
from accumkern.planning.noise import WINDOW_MICRO_BATCHES

_MOST_EFFECTIVE_BATCH = 2**31
_MOST_MICRO_BATCH = 2**20
_MOST_RANKS = 2**20
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


def check_ranks(ranks: int | None, there: int) -> int:
    """Return how many ranks to plan for: those that there are, unless one process plans for others.

    Raises:
        TypeError: ``ranks`` is no integer.
        ValueError: it is too small or too large, or not as many as make the plan.
    """
    if ranks is None:
        return there
    ranks = _whole("ranks", ranks, 1, _MOST_RANKS, "there is no such machine")
    if there not in (1, ranks):
        raise ValueError(
            f"ranks is {ranks}, and {there} ranks make this plan; leave it out, or plan for {ranks} in one process"
        )
    return ranks


def check_bandwidth(gb_per_s: float, ranks: int) -> float:
    """Return the bandwidth of the link between ranks.

    Raises:
        TypeError: it is no number.
        ValueError: it is not positive or not finite, or there is one rank, which has no link.
    """
    right = "it must be a positive number of GB/s"
    number = real("bandwidth_gb_per_s", gb_per_s, right)
    if not 0 < number < math.inf:
        raise ValueError(f"bandwidth_gb_per_s is {number}; {right}")
    if ranks == 1:
        raise ValueError(
            f"bandwidth_gb_per_s is {number}, and the plan is for one rank, which exchanges nothing; say for how many "
            "ranks: ranks=8, or --ranks 8"
        )
    return number


def _whole(name: str, number: int, least: int, most: int, why: str) -> int:
    right = f"it must be an int of at least {least}"
    number = integer(name, number, right, least)
    if number > most:
        raise ValueError(f"{name} is {number}; {right}, and of at most {most}: {why}")
    return number
