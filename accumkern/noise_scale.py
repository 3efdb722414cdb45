"""The gradient noise scale, from squared norms that the accumulate kernel takes while it folds.

With ``s_i`` the gradient of micro-batch i's summed loss, ``t_i`` its tokens, ``T = sum t_i`` and N micro-batches::

    A = (1/T) sum_i ||s_i||^2 / t_i            q = ||sum_i s_i / T||^2
    tr(Sigma) = T (A - q) / (N - 1)            |G|^2 = (N q - A) / (N - 1)         B_simple = tr(Sigma) / |G|^2

Both are unbiased; their ratio is not, so they are smoothed over windows separately and then divided (S. McCandlish et
al., "An Empirical Model of Large-Batch Training", arXiv 1812.06162, appendix A, for equal micro-batches).
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from accumkern import checks
from accumkern.formats import Start


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
        raise ValueError(f"tokens is {counts}; {right}, in the range of FP32")
    return counts


class Smoother:
    """An exponential average over windows that weighs the first windows fully."""

    def __init__(self) -> None:
        self.trace = self.squared_gradient = self.weight = 0.0
        self.windows = 0
        self.last_window = -1  # the number of the one that was added last

    def add(self, window: Estimate, smoothing: float) -> Estimate:
        """Return the average after one more window."""
        self.trace = smoothing * self.trace + (1 - smoothing) * window.trace
        self.squared_gradient = smoothing * self.squared_gradient + (1 - smoothing) * window.squared_gradient
        self.weight = smoothing * self.weight + (1 - smoothing)
        self.windows += 1
        return Estimate(self.trace / self.weight, self.squared_gradient / self.weight)


class _Gradients:
    """The gradients of one parameter in a window."""

    __slots__ = ("count", "first", "group", "partials", "window")

    def __init__(self, group: int) -> None:
        self.group = group  # of the optimizer
        self.window = -1
        self.begin(-1)

    def begin(self, window: int) -> None:
        self.window, self.count = window, 0
        self.first: tuple[weakref.ref[Tensor], int] | None = None  # the first, while it is not measured; its version
        self.partials: Tensor | None = None  # of the last fold


class WindowSquares:
    """Squared norms of the micro-gradients of a window, by optimizer group, on the device until they are asked for.

    A parameter's k-th gradient of a window belongs to micro-batch k. The first one is not folded; its square is read
    off the old value when the second is.

    Args:
        group_of: the index of a parameter's group in the optimizer.
    """

    def __init__(self, group_of: Callable[[Tensor], int]) -> None:
        self.window = 0  # its number
        self._group_of = group_of
        self._closed = False
        self._edited = False
        self._gradients: dict[Tensor, _Gradients] = {}
        self._squares: list[dict[tuple[int, torch.device], Tensor]] = []  # of each micro-batch
        self._folded: list[tuple[_Gradients, Tensor, Start, float | Tensor]] = []  # since the last reduction
        self._lock = threading.Lock()  # autograd folds the gradients of each device in a thread of its own

    def arrive(self, param: Tensor, is_first: bool) -> None:
        """Count a gradient; ``is_first`` says that ``.grad`` was None before."""
        of = self._gradients.get(param)
        if of is None:
            of = self._gradients[param] = _Gradients(self._group_of(param))
        if self._closed or (is_first and of.window == self.window):
            self.window += 1
            self._closed = self._edited = False
            self._squares.clear()
            self._folded.clear()
        if of.window != self.window:
            of.begin(self.window)
        of.count += 1

    def keep(self, param: Tensor, grad: Tensor) -> None:
        """Note that the first gradient of a window was kept as it came."""
        self._gradients[param].first = weakref.ref(grad), grad._version

    def fold(self, param: Tensor, running: Tensor, start: Start, partials: Tensor, scale: float | Tensor) -> None:
        """Note a fold into ``running`` that left ``partials``."""
        of = self._gradients[param]
        first, of.first = of.first, None
        with self._lock:
            if start is Start.FROM_SUM:
                # From the first gradient, as it came, or from zeros: whether they are, reduce() sees.
                if of.count == 2:
                    self._edited |= first is None or first[0]() is not running or first[1] != running._version
                else:
                    self._edited |= of.count != 1
            elif start is Start.CONTINUE:
                self._edited |= of.count == 1
            of.partials = partials
            self._folded.append((of, partials, start, scale))

    def reduce(self) -> None:
        """Add up the partial sums of the folds since the last call, before others overwrite them."""
        with self._lock:
            groups: dict[Any, list[Tensor]] = {}
            scales: dict[int, float | Tensor] = {}
            for of, partials, start, scale in self._folded:
                scales[id(scale)] = scale
                key = (of.count - 1, of.group, partials.device, start is Start.FROM_SUM, id(scale))
                groups.setdefault(key, []).append(partials)
            for (index, group, device, from_sum, scale_id), rows in groups.items():
                scale = scales[scale_id]
                if isinstance(scale, Tensor):
                    scale = scale.to(device, torch.float64)
                totals = torch.cat(rows).sum(0, dtype=torch.float64)
                self._add(index, group, totals[0] * scale * scale)
                if from_sum:
                    # At the second gradient, the square of the first; at the first, of zeros, or index -1 will tell.
                    self._add(index - 1, group, totals[2])
            self._folded.clear()

    def _add(self, index: int, group: int, square: Tensor) -> None:
        while len(self._squares) <= index + 1:
            self._squares.append({})
        of = self._squares[index + 1]
        key = (group, square.device)
        of[key] = of[key] + square if key in of else square

    def close(self) -> None:
        """Let the next gradient begin another window."""
        self._closed = True

    def totals(self, group: int | None) -> tuple[list[float], float]:
        """Return ``||s_i||^2`` of each micro-batch and ``||sum s_i||^2``, of all groups or of one.

        Raises:
            RuntimeError: there is nothing to estimate from, or gradients were changed in the middle of the window.
        """
        self.reduce()
        members = {
            param: of for param, of in self._gradients.items() if of.window == self.window and group in (None, of.group)
        }
        count = max((of.count for of in members.values()), default=0)
        if count < 2:
            found = "no micro-batch" if count == 0 else "one micro-batch"
            raise RuntimeError(f"the noise scale is undefined: the window has {found}, and it needs at least two")
        squares = [torch.zeros((), dtype=torch.float64, device="cpu")] * (count + 1)
        square_of_sum = 0.0
        for index, of_groups in enumerate(self._squares):
            for (of_group, _), square in of_groups.items():
                if group in (None, of_group):
                    squares[index] = squares[index] + square.cpu()
        rows: dict[torch.device, list[Tensor]] = {}
        for param, of in members.items():
            if of.first is not None:  # had one gradient alone, which no fold has measured
                grad = param.grad
                if grad is None or grad is not of.first[0]() or grad._version != of.first[1]:
                    raise RuntimeError("call noise_scale() after the last backward pass and before zero_grad()")
                square = torch.linalg.vector_norm(grad, dtype=torch.float32).double().cpu() ** 2
                squares[1] = squares[1] + square
                square_of_sum += float(square)
            elif of.partials is not None:
                rows.setdefault(of.partials.device, []).append(of.partials)
        square_of_sum += sum(float(torch.cat(r)[:, 1].sum(dtype=torch.float64)) for r in rows.values())
        if self._edited or float(squares[0]) > 0:
            raise RuntimeError(
                "the noise scale is unknown: .grad was changed in the middle of the window. Call noise_scale() once "
                "per window, after its last backward pass; clip and unscale after it"
            )
        return [float(square) for square in squares[1:]], square_of_sum


class NoiseScaleMeter:
    """The noise scale of an accumulator, window after window.

    Args:
        groups: of the optimizer, as they are now.
    """

    def __init__(self, groups: Callable[[], list[dict[str, Any]]]) -> None:
        self.squares = WindowSquares(self._group_of)
        self._groups = groups
        self._group_of_param: dict[Tensor, int] = {}  # of all that there have been
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
        if param not in self._group_of_param:
            self._learn()
        return self._group_of_param.get(param, 0)

    def _learn(self) -> None:
        self._group_of_param |= {p: i for i, group in enumerate(self._groups()) for p in group["params"]}
