"""The squared norms of a window's micro-gradients, of which the noise scale is made.

Micro-gradients come one parameter after another; here they are put together into micro-batches and windows.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from accumkern.formats import Start, widest

_CHANGED = (
    ".grad was changed in the middle of the window. Call noise_scale() once per window, after its last backward pass; "
    "clip and unscale after it"
)
_TWICE = (
    "a parameter got more than one gradient in a backward pass, as from a module that reentrant checkpoints run "
    "several times, and the squares of parts do not add up; use checkpoint(use_reentrant=False)"
)
_FAILED = "a backward pass of the window has failed; call zero_grad() and begin the window again"
_INSIDE = (
    "its backward passes bring gradients from inside reentrant checkpoints first, and not of all parameters in each, "
    "so that where a micro-batch ends cannot be told; use checkpoint(use_reentrant=False)"
)
_ZEROS = -1


class _Gradients:
    """The gradients of one parameter in a window."""

    __slots__ = ("count", "group", "index", "is_fresh", "partials", "unfolded", "window")

    def __init__(self) -> None:
        self.begin(-1, 0)

    def begin(self, window: int, group: int) -> None:
        self.window = window
        self.group = group  # of the optimizer
        self.count = 0
        self.index = -1  # of the micro-batch that brought the last gradient
        self.is_fresh = True  # whether nothing has been folded or kept yet
        self.partials: Tensor | None = None  # of the last fold
        # A gradient that no fold has measured: weakly, its version, and the micro-batch whose square it has, or None.
        self.unfolded: tuple[weakref.ref[Tensor], int, int | None] | None = None

    def is_as_left(self, grad: Tensor | None) -> bool:
        """Return whether ``grad`` is what no fold has measured, unchanged."""
        return grad is not None and self.unfolded is not None and _is_as_left(grad, *self.unfolded[:2])


class WindowSquares:
    """Squared norms of the micro-gradients of a window, by optimizer group, on the device until they are asked for.

    A micro-batch is a backward pass, with those inside it. A window is the backward passes from one optimizer step, or
    from gradients that are set to None or to zero, to the next. A parameter without a gradient in a micro-batch has a
    zero there. The first gradient in a window is not folded; its square is read off the old value when the second is.

    Args:
        group_of: the index of a parameter's group in the optimizer.
    """

    def __init__(self, group_of: Callable[[Tensor], int]) -> None:
        self.window = 0  # its number
        self._group_of = group_of
        self._gradients: dict[Tensor, _Gradients] = {}
        self._lock = threading.Lock()  # autograd folds the gradients of each device in a thread of its own
        self._pass_is_under_way = False
        self._is_inside = False  # whether the pass is inside another, which may have brought no gradient yet
        self._begin_window()

    def _begin_window(self, if_not_zero: str = _CHANGED) -> None:
        self.window += 1
        self._index = -1  # of the micro-batch
        self._closed = False
        self._counts_by_repeats = False  # whether micro-batches were told by a parameter's second gradient
        self._spoilt = ""  # why the window's noise scale is unknown
        self._if_not_zero = if_not_zero  # why it is if the gradients were not zero when it began
        self._witness: tuple[Tensor, weakref.ref[Tensor], int] | None = None  # a gradient that shows whether it is over
        self._squares: dict[tuple[int, int, torch.device], Tensor] = {}  # by micro-batch and group
        self._zeros: dict[torch.device, Tensor] = {}  # squares of what should have been zero
        self._folded: list[tuple[_Gradients, Tensor, float | Tensor, int, int | None]] = []

    # ---- in a backward pass ----

    def begin_pass(self, is_inside_another: bool) -> None:
        """Begin a micro-batch, unless the pass is inside another: then a parameter's second gradient will."""
        has_failed, self._pass_is_under_way = self._pass_is_under_way, True
        if self._closed or has_failed or self._is_over():
            self._begin_window(_FAILED if has_failed else _CHANGED)
        self._is_inside = is_inside_another
        self._counts_by_repeats |= is_inside_another
        if not is_inside_another or self._index < 0:
            self._index += 1

    def end_pass(self) -> None:
        """Add up what the pass has brought."""
        self._pass_is_under_way = False
        self.reduce()
        param = next((param for param, of in self._gradients.items() if of.window == self.window), None)
        if param is not None and param.grad is not None:
            self._witness = param, weakref.ref(param.grad), param.grad._version

    def spoil(self, reason: str) -> None:
        """Note why the noise scale of this window is unknown."""
        self.end_pass()
        self._spoilt = reason

    def arrive(self, param: Tensor, running: Tensor | None) -> None:
        """Count a gradient; ``running`` is ``.grad`` before it came."""
        of = self._gradients.get(param)
        if of is None:
            of = self._gradients[param] = _Gradients()
        if of.window != self.window:
            of.begin(self.window, self._group_of(param))
        elif of.index == self._index:
            self.reduce()  # before the next fold of this parameter overwrites its partial sums
            if self._is_inside:
                self._index += 1
            else:
                self._spoilt = self._spoilt or _TWICE
        elif running is None:
            self._spoilt = self._spoilt or _CHANGED
        of.index = self._index
        of.count += 1

    def keep(self, param: Tensor, is_sum: bool = False) -> None:
        """Note that ``.grad`` is what no fold has measured: the first gradient of a window, or a sum by torch."""
        of = self._gradients[param]
        grad: Any = param.grad
        of.is_fresh, of.partials = False, None
        of.unfolded = weakref.ref(grad), grad._version, None if is_sum else of.index

    def fold(
        self, param: Tensor, running: Tensor | None, start: Start, partials: Tensor, scale: float | Tensor
    ) -> None:
        """Note a fold into ``running`` that left ``partials``."""
        of = self._gradients[param]
        old_index = None  # of the micro-batch whose square that of the old value is
        if of.is_fresh:
            is_right = start is not Start.CONTINUE  # which goes on from the last window
            if start is Start.FROM_SUM:
                old_index = _ZEROS
        elif of.unfolded is not None:
            is_right, old_index = of.is_as_left(running), of.unfolded[2]
        else:
            is_right = start is Start.CONTINUE
        if not is_right:
            self._spoilt = self._spoilt or (self._if_not_zero if of.is_fresh else _CHANGED)
        of.is_fresh, of.unfolded, of.partials = False, None, partials
        with self._lock:
            self._folded.append((of, partials, scale, of.index, old_index if start is Start.FROM_SUM else None))

    def measure(self, param: Tensor, running: Tensor | None, scaled: Tensor, continues: bool) -> None:
        """Take the square of a gradient that torch is going to add: one that is not folded, such as a sparse one.

        ``continues`` says that ``running`` is what the last fold has left.
        """
        of = self._gradients[param]
        with self._lock:
            self._add(of.index, of.group, _square_of(scaled))
            if running is not None and of.is_as_left(running) and of.unfolded[2] is not None:  # type: ignore[index]
                self._add(of.unfolded[2], of.group, _square_of(running))  # type: ignore[index]
            elif running is not None and of.is_fresh:
                self._add_to_zeros(_square_of(running))
            elif running is not None and not continues and not of.is_as_left(running):
                self._spoilt = self._spoilt or _CHANGED

    def reduce(self) -> None:
        """Add up the partial sums of the folds since the last call, before others overwrite them."""
        with self._lock:
            groups: dict[Any, list[Tensor]] = {}
            scales: dict[int, float | Tensor] = {}
            for of, partials, scale, index, old_index in self._folded:
                scales[id(scale)] = scale
                key = (index, old_index, of.group, partials.device, id(scale))
                groups.setdefault(key, []).append(partials)
            for (index, old_index, group, device, scale_id), rows in groups.items():
                scale = scales[scale_id]
                totals = torch.cat(rows).sum(0, dtype=widest(device))
                if isinstance(scale, Tensor):
                    scale = scale.to(totals)
                self._add(index, group, totals[0] * scale * scale)
                if old_index == _ZEROS:
                    self._add_to_zeros(totals[2])
                elif old_index is not None:
                    self._add(old_index, group, totals[2])
            self._folded.clear()

    def _add(self, index: int, group: int, square: Tensor) -> None:
        key = (index, group, square.device)
        self._squares[key] = self._squares[key] + square if key in self._squares else square

    def _add_to_zeros(self, square: Tensor) -> None:
        device = square.device
        self._zeros[device] = self._zeros[device] + square if device in self._zeros else square

    # ---- the window ----

    def close(self) -> None:
        """Let the next backward pass begin another window."""
        self._closed = True

    def reset(self) -> None:
        """Forget the window, whose gradients are others now."""
        self._begin_window()

    def _is_over(self) -> bool:
        """Return whether somebody has taken the window's gradients away, or changed them."""
        if self._witness is None:
            return False
        param, reference, version = self._witness
        return param.grad is None or not _is_as_left(param.grad, reference, version)

    def totals(self, group: int | None) -> tuple[list[float], float]:
        """Return ``||s_i||^2`` of each micro-batch and ``||sum s_i||^2``, of all groups or of one.

        Raises:
            RuntimeError: there is nothing to estimate from, or gradients were changed in the middle of the window.
        """
        self.reduce()
        reason = _FAILED if self._pass_is_under_way else self._spoilt
        if not reason and any(float(square) > 0 for square in self._zeros.values()):
            reason = self._if_not_zero
        count = self._index + 1
        if self._counts_by_repeats:
            here = [of for of in self._gradients.values() if of.window == self.window]
            reason = reason or ("" if all(of.count == count for of in here) else _INSIDE)
        if reason:
            raise RuntimeError(f"the noise scale is unknown: {reason}")
        if count < 2:
            found = "no micro-batch" if count == 0 else "one micro-batch"
            raise RuntimeError(f"the noise scale is undefined: the window has {found}, and it needs at least two")
        squares = [0.0] * count
        for (index, of_group, _), square in self._squares.items():
            if group in (None, of_group):
                squares[index] += float(square)
        square_of_sum = 0.0
        rows: dict[torch.device, list[Tensor]] = {}
        for param, of in self._gradients.items():
            if of.window != self.window or group not in (None, of.group):
                continue
            if of.unfolded is not None:
                if not of.is_as_left(param.grad):
                    raise RuntimeError("call noise_scale() after the last backward pass and before zero_grad()")
                alone = float(_square_of(param.grad))  # type: ignore[arg-type]
                if of.unfolded[2] is not None:
                    squares[of.unfolded[2]] += alone
                square_of_sum += alone
            elif of.partials is not None:
                rows.setdefault(of.partials.device, []).append(of.partials)
        square_of_sum += sum(float(torch.cat(r)[:, 1].sum(dtype=widest(device))) for device, r in rows.items())
        return squares, square_of_sum


def _is_as_left(grad: Tensor, reference: weakref.ref[Tensor], version: int) -> bool:
    return reference() is grad and grad._version == version


@torch.no_grad()
def _square_of(grad: Tensor) -> Tensor:
    """Return the squared 2-norm of a gradient of any kind, in the widest dtype of its device."""
    if grad.layout is not torch.strided:
        grad = grad.coalesce().values() if grad.layout is torch.sparse_coo else grad.values()
    dtype = torch.float32 if grad.dtype in (torch.bfloat16, torch.float16) else None
    return torch.linalg.vector_norm(grad.detach(), dtype=dtype).to(widest(grad.device)) ** 2
