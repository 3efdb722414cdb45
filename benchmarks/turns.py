"""Variants that take turns for as long as their time lasts, so that any two can be compared round by round."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from paired import quantiles, summary
from timing import describe

MIN_ROUNDS = 8  # however long they take; six are the fewest that give an interval of 95 %
MAX_ROUNDS = 1000

Measured = TypeVar("Measured")
#: What a round of a variant measures: (stretch, clock) -> milliseconds, as many for every variant.
Clocked = dict[tuple[str, str], list[float]]


class Budget:
    """Seconds for some cases together, the making of their variants included.

    The time that one case does not need, or needs beyond its share, is spread over those that come after it.

    Args:
        seconds: for all.
        weights: of the cases, in their order: one of weight 2 has twice the share of one of weight 1.
    """

    def __init__(self, seconds: float, weights: Sequence[int]) -> None:
        self._end = time.perf_counter() + seconds
        self._weights = list(weights)

    def share(self) -> float:
        """Return the seconds of the next case: its part of what is left."""
        share = max(0.0, self._end - time.perf_counter()) * self._weights[0] / sum(self._weights)
        del self._weights[0]
        return share


def by_turns(
    makers: Mapping[str, Callable[[], Callable[[], Measured]]], share: Callable[[], float]
) -> dict[str, list[Measured] | str]:
    """Make variants, and call each once a round; the order is reversed from round to round.

    Args:
        makers: name -> function that makes a variant: a function that measures it once.
        share: returns the seconds of all rounds together; called when the variants are made. ``MIN_ROUNDS`` are run in
            any case, and ``MAX_ROUNDS`` at most.

    Returns:
        Name -> what it has measured, a value for each round, or a description of the error that ended it. The others
        have gone on, and all have as many values.
    """
    errors: dict[str, str] = {}
    variants: dict[str, Callable[[], Measured]] = {}
    for name, make in makers.items():
        try:
            variants[name] = make()
        except Exception as error:  # any variant's any failure is a result
            errors[name] = describe(error)
    measured: dict[str, list[Measured]] = {name: [] for name in variants}
    gc.collect()
    end = time.perf_counter() + share()
    for number in range(MAX_ROUNDS):
        if number >= MIN_ROUNDS and time.perf_counter() > end:
            break
        for name in list(variants) if number % 2 == 0 else list(variants)[::-1]:
            try:
                measured[name].append(variants[name]())
            except Exception as error:  # likewise
                errors[name] = describe(error)
                del variants[name]
    return {name: errors[name] if name in errors else measured[name] for name in makers}


def clocked(action: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Return the milliseconds of an action by clock: ``host`` until Python goes on, ``done`` until a GPU has finished.

    The GPU has nothing to do at the beginning. A CPU has one clock, ``host``.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    action()
    milliseconds = {"host": 1e3 * (time.perf_counter() - begin)}
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        milliseconds["done"] = 1e3 * (time.perf_counter() - begin)
    return milliseconds


def compared(rounds: Mapping[str, list[Clocked] | str], references: Sequence[str]) -> list[dict[str, Any]]:
    """Return a result for each variant, stretch and clock: its times, and their ratios to those of the references.

    Args:
        rounds: what :func:`by_turns` returns of them.
        references: what the others are compared with: each value with that in the same place of the same round.
    """
    results: list[dict[str, Any]] = []
    for name, mine in rounds.items():
        if isinstance(mine, str):
            results.append({"variant": name, "error": mine})
            continue
        for stretch, clock in mine[0]:
            of = {n: _joined(r, stretch, clock) for n, r in rounds.items() if n == name or n in references}
            times = of.pop(name)
            over = {} if name in references else {n: summary([*map(_ratio, times, of[n])]) for n in of if of[n]}
            result = {"variant": name, "stretch": stretch, "clock": clock, "rounds": len(mine), **quantiles(times)}
            results.append(result | ({"over": over} if over else {}))
    return results


def _joined(rounds: list[Clocked] | str, stretch: str, clock: str) -> list[float]:
    """Return the values of all rounds; none of a variant that failed."""
    return [] if isinstance(rounds, str) else [value for one in rounds for value in one[stretch, clock]]


def _ratio(mine: float, other: float) -> float:
    return mine / other
