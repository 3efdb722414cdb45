"""The gradient noise scale, from squared norms that the accumulate kernel takes while it folds.

With ``s_i`` the gradient of micro-batch i's summed loss, ``t_i`` its tokens, ``T = sum t_i`` and N micro-batches::

    A = (1/T) sum_i ||s_i||^2 / t_i            q = ||sum_i s_i / T||^2
    tr(Sigma) = T (A - q) / (N - 1)            |G|^2 = (N q - A) / (N - 1)         B_simple = tr(Sigma) / |G|^2

Both are unbiased; their ratio is not, so they are smoothed over windows separately and then divided (S. McCandlish et
al., "An Empirical Model of Large-Batch Training", arXiv 1812.06162, appendix A, for equal micro-batches).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from accumkern import checks
from accumkern.window_squares import WindowSquares


@dataclass(frozen=True)
class Estimate:
    """Unbiased estimates from one window, or their averages over windows.

    Attributes:
        trace: ``tr(Sigma)``, the variance of the gradient of one token (of one micro-batch where no tokens were given),
            summed over parameters. It can come out negative by chance.
        squared_gradient: ``|G|^2``, the squared norm of the true gradient. It can come out negative by chance, when
            noise is all that there is.
        noise_scale: their ratio, in tokens (or micro-batches): infinite where ``squared_gradient`` is not positive,
            zero where ``trace`` is negative.
    """

    trace: float
    squared_gradient: float

    @property
    def noise_scale(self) -> float:
        """``trace / squared_gradient``, infinite or zero where one of them is not positive."""
        if self.squared_gradient <= 0:
            return math.inf
        return max(self.trace, 0.0) / self.squared_gradient


@dataclass(frozen=True)
class NoiseScale:
    """The gradient noise scale after a window.

    Attributes:
        noise_scale: ``B_simple`` from the smoothed estimates, in tokens (or micro-batches where no tokens were given).
        smoothed: the estimates, averaged over the windows so far.
        window: the estimates of the last window alone.
        micro_batches: N of the last window.
        windows: how many windows the average has seen.
    """

    noise_scale: float
    smoothed: Estimate
    window: Estimate
    micro_batches: int
    windows: int


def estimate(squares: Sequence[float], square_of_sum: float, tokens: Sequence[float]) -> Estimate:
    """Return the unbiased estimates of a window.

    Args:
        squares: ``||s_i||^2`` of each micro-batch.
        square_of_sum: ``||sum_i s_i||^2``.
        tokens: ``t_i`` of each micro-batch.
    """
    count, total = len(squares), math.fsum(tokens)
    a = math.fsum(square / t for square, t in zip(squares, tokens, strict=True)) / total
    q = square_of_sum / total**2
    return Estimate(total * (a - q) / (count - 1), (count * q - a) / (count - 1))


def check_smoothing(smoothing: Any) -> float:
    """Return ``smoothing``; raise unless it is a number from 0 to 1, 1 excluded."""
    right = "it must be a number of at least 0 and less than 1"
    number = checks.real("smoothing", smoothing, right)
    if not 0 <= number < 1:
        raise ValueError(f"smoothing is {number}; {right}")
    return number


def check_group(group: Any, groups: int) -> int | None:
    """Return ``group``; raise unless it is None or the index of one of ``groups`` parameter groups."""
    if group is None:
        return None
    right = f"it must be None or the index of one of the optimizer's {groups} parameter groups, from 0"
    index = checks.integer("group", group, right)
    if index >= groups:
        raise ValueError(f"group is {index}; {right}")
    return index


def counts_of(tokens: Any, micro_batches: int) -> list[float]:
    """Return what each micro-batch counts: ``tokens``, or one each where that is None.

    Args:
        tokens: numbers in a sequence, or in what has ``tolist()``: a tensor or an array of one dimension.
        micro_batches: how many there must be.

    Raises:
        TypeError: ``tokens`` is no sequence of numbers.
        ValueError: it does not hold one positive number for each micro-batch.
    """
    if tokens is None:
        return [1.0] * micro_batches
    right = f"it must hold one positive number for each of the window's {micro_batches} micro-batches"
    counts = []
    for i, count in enumerate(checks.items("tokens", tokens, right)):
        is_array = getattr(count, "shape", None) in ((), (1,))  # of one element, or a tensor
        counts.append(float(checks.real(f"tokens[{i}]", count.item() if is_array else count, right)))
    if len(counts) != micro_batches or not all(count > 0 and checks.is_fp32(count) for count in counts):
        raise ValueError(
            f"tokens is {counts}; {right}, in the range of FP32. A micro-batch is a backward pass: call backward() "
            "once for each, on the sum of its losses"
        )
    return counts


class Smoother:
    """An exponential average over windows that weighs the first windows fully."""

    def __init__(self) -> None:
        self.trace = self.squared_gradient = self.weight = 0.0
        self.windows = 0
        self.last_window = -1  # the number of the one that was added last

    def add(self, window: Estimate, smoothing: float) -> Estimate:
        """Return the average after one more window; one that is infinite or NaN, as after an overflow, is left out."""
        if not math.isfinite(window.trace + window.squared_gradient):
            return self.average
        self.trace = smoothing * self.trace + (1 - smoothing) * window.trace
        self.squared_gradient = smoothing * self.squared_gradient + (1 - smoothing) * window.squared_gradient
        self.weight = smoothing * self.weight + (1 - smoothing)
        self.windows += 1
        return self.average

    @property
    def average(self) -> Estimate:
        """The average of the windows so far; NaN before the first."""
        if self.windows == 0:
            return Estimate(math.nan, math.nan)
        return Estimate(self.trace / self.weight, self.squared_gradient / self.weight)


class NoiseScaleMeter:
    """The noise scale of an accumulator, window after window.

    Args:
        groups: of the optimizer, as they are now.
    """

    def __init__(self, groups: Callable[[], list[dict[str, Any]]]) -> None:
        self.squares = WindowSquares(self._group_of)
        self._groups = groups
        self._group_of_param: dict[Tensor, int] = {}  # of all that there have been
        self._learned_in = -1  # the window in which the groups were looked at last
        self._learn()
        self._smoothers: dict[int | None, Smoother] = {}

    def read(self, tokens: object, group: int | None, smoothing: float) -> NoiseScale:
        """Return the noise scale after a window; see :meth:`accumkern.GradAccumulator.noise_scale`."""
        smoothing = check_smoothing(smoothing)
        group = check_group(group, len(self._groups()))
        smoother = self._smoothers.setdefault(group, Smoother())
        if smoother.last_window == self.squares.window:
            raise RuntimeError("noise_scale() was called already in this window; call it once per window and group")
        squares, square_of_sum = self.squares.totals(group)
        counts = counts_of(tokens, len(squares))
        window = estimate(squares, square_of_sum, counts)
        smoothed = smoother.add(window, smoothing)
        smoother.last_window = self.squares.window
        self.squares.close()
        return NoiseScale(smoothed.noise_scale, smoothed, window, len(squares), smoother.windows)

    def _group_of(self, param: Tensor) -> int:
        if param not in self._group_of_param or self._learned_in != self.squares.window:
            self._learn()
            self._learned_in = self.squares.window
        return self._group_of_param.get(param, 0)

    def _learn(self) -> None:
        self._group_of_param |= {p: i for i, group in enumerate(self._groups()) for p in group["params"]}
