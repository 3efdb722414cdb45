"""Times, and comparing two things that were measured in the same rounds, or with the same seeds."""

from __future__ import annotations

import math
import statistics
from typing import Any

from timing import percentile


def median_interval(values: list[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Return a confidence interval for the median of what the values are drawn from, and its exact confidence.

    It reaches from the k-th least to the k-th greatest value, with the greatest k that gives at least ``confidence``,
    whatever the distribution is (the interval of the sign test). Of fewer than six values even the least and the
    greatest give less than 95 %: five give 93.75 %.

    Args:
        values: independent draws.
        confidence: that is wanted.
    """
    ordered = sorted(values)
    n = len(ordered)

    def reached(k: int) -> float:
        outside: int = sum(math.comb(n, i) for i in range(k))
        return float(1 - 2 * outside / 2**n)

    k = max((k for k in range(1, (n + 1) // 2 + 1) if reached(k) >= confidence), default=1)
    return ordered[k - 1], ordered[n - k], reached(k)


def summary(values: list[float]) -> dict[str, Any]:
    """Return the median, its confidence interval and how many values there are."""
    low, high, confidence = median_interval(values)
    return {
        "median": statistics.median(values),
        "low": low,
        "high": high,
        "confidence": round(confidence, 4),
        "n": len(values),
    }


def quantiles(values_ms: list[float]) -> dict[str, float]:
    """Return median, 20th and 80th percentile and the number of measurements."""
    return {
        "median_ms": statistics.median(values_ms),
        "p20_ms": percentile(values_ms, 0.2),
        "p80_ms": percentile(values_ms, 0.8),
        "n": len(values_ms),
    }
