"""One backward pass after another: what happens when autograd brings a gradient, and what waits for the pass to end.

A first hook runs before autograd adds a new gradient: it sets the running ``.grad`` aside, so that autograd puts the
new gradient in its place instead of adding to it in the parameter's dtype. The second runs after that: it folds the new
gradient into the one set aside, in FP32, and puts that back. Between two backward passes ``.grad`` is what it always
was, the sum so far in the parameter's dtype; the low bits lie in a residual beside it.

On a GPU gradients wait, to be folded together (:mod:`accumkern.waiting`).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from accumkern import waiting
from accumkern.dtensor import is_in_group
from accumkern.fold import Fold, is_plain
from accumkern.formats import Start
from accumkern.lost_bits import LostBitsMeter
from accumkern.slot import FOLDED_DTYPES, NOT_SET_ASIDE, Slot
from accumkern.torch_private import (
    NO_BACKWARD,
    current_graph_task_id,
    is_in_function,
    queue_callback,
    refuse_compiled_autograd,
)
from accumkern.waiting import WaitingGradients, may_wait

_is_grad_enabled = torch.is_grad_enabled


class _Pass:
    """A backward pass. Autograd holds it, and calls it at the end: it is gone when the pass has failed."""

    __slots__ = ("__weakref__", "_end", "number")

    def __init__(self, number: int, end: Callable[[int], None]) -> None:
        self.number, self._end = number, end

    def __call__(self) -> None:
        self._end(self.number)


class BackwardPasses:
    """The backward passes of one accumulator.

    Attributes:
        count: of the passes that have brought a gradient, nested ones too.

    Args:
        fold: what folds.
        lost_bits: the sample that is accumulated as stock PyTorch does, or None.
        put_on_hooks: hooks a parameter that has lost its hooks.
    """

    def __init__(self, fold: Fold, lost_bits: LostBitsMeter | None, put_on_hooks: Callable[[Tensor], None]) -> None:
        self.count = 0
        self._fold = fold
        self._lost_bits = lost_bits
        self._put_on_hooks = put_on_hooks
        # Autograd calls the hooks of each device from a thread of its own. What they share is gradients that wait, and
        # flags that are set under a lock when a backward pass begins.
        self._waiting = WaitingGradients(fold, lambda number: number in under_way)
        self._lock = threading.RLock()
        self._number = NO_BACKWARD  # autograd's, of the backward pass that has brought a gradient last
        self._is_observed = lost_bits is not None or fold.squares is not None  # whether each gradient is looked at
        self._plain_number = NO_BACKWARD - 1  # the same, of a pass whose gradients may be folded without a look at them
        self._newest = NO_BACKWARD  # the greatest number so far
        self._under_way: weakref.WeakValueDictionary[int, _Pass] = weakref.WeakValueDictionary()
        under_way = self._under_way
        self._in_group = False  # whether there is a process group
        self._may_wait = False  # whether gradients may wait
        self._versions: dict[int, int] = {}  # of memory that gradients are views of, when the backward pass came there

    def accumulate(self, slot: Slot, param: Tensor) -> None:
        """Fold the gradient that autograd has just left in ``param.grad`` into the running one.

        After an error ``.grad`` is the running one again.
        """
        running: Any = slot.set_aside
        slot.set_aside = NOT_SET_ASIDE
        new: Any = param.grad
        # What comes most often: a pass that is known brings the first gradient of a window, or one for a running
        # gradient that is as a fold left it.
        if current_graph_task_id() == self._plain_number and new is not None:
            if running is None:
                if not (self._may_wait or self._fold.is_scaled):
                    self._keep(slot, new)
                    slot.may_wait = False
                    return
            elif slot.written() is running and self._goes_on(slot, param, running, new):
                return
        if running is NOT_SET_ASIDE:
            if new is None:  # somebody's hook took it
                return
            running = None
            self.without_first_hook(slot, new, was_added=slot.last() is new)
        elif new is None:
            param.grad = running
            return
        try:
            self._add(slot, param, running, new)
        except BaseException:
            param.grad = running
            raise
        if self._lost_bits is not None:
            self._measure(slot)

    def _goes_on(self, slot: Slot, param: Tensor, running: Tensor, new: Any) -> bool:
        """Let a gradient wait or fold it, where it is laid out as the running one; return whether that was so."""
        try:
            if self._may_wait and type(new) is Tensor and self._waiting.add(slot, running, new, self._number):
                return True
            is_in_bucket = self._in_group and running._is_view()  # where a change of one counts as one of all
            if is_in_bucket or not slot.fold_next(new, running, slot.version, self._fold.scale):
                return False
            param.grad = running
            if self._may_wait:
                self._waiting.show(param)
        except BaseException:
            param.grad = running
            raise
        return True

    def _keep(self, slot: Slot, new: Tensor) -> None:
        """Let the first gradient of a window be the running one."""
        slot.forget()
        slot.last = weakref.ref(new)

    def _measure(self, slot: Slot) -> None:
        """Let the report look at the sum that was folded just now."""
        grad: Any = slot.param.grad
        residual = slot.valid_residual(grad)
        if residual is not None and not grad.is_contiguous():  # it lies in another order than it is looked at
            grad, residual = slot.value(grad), None
        if self._lost_bits is not None:
            self._lost_bits.folded(slot.param, grad, residual, slot.formats.get(grad.dtype))

    def _add(self, slot: Slot, param: Tensor, running: Any, new: Any) -> None:
        fold = self._fold
        number = current_graph_task_id()
        if number != self._number or slot.waits:
            param.grad = running  # as it was before this gradient came
            if slot.waits:  # for a pass inside this one, or around it
                self._waiting.fold()
            if number != self._number:
                self._begin(number)
            running, param.grad = param.grad, new
        squares = fold.squares
        if squares is not None:
            squares.arrive(param, running)
        if self._in_group and running is not None:
            self._look_through_bucket(slot, running)
        continues = running is not None and slot.has_residual_of(running)
        if not continues:  # it may begin a window
            slot.may_wait = self._may_wait and may_wait(new)
        if self._lost_bits is not None:
            self._lost_bits.add(param, new, fold.scale, running, slot.value if continues else None)
        if running is None:  # the first micro-batch of a window
            self._keep(slot, new)
            if not fold.is_scaled:
                if squares is not None:
                    squares.keep(param)
                return
            start = Start.FROM_ZERO
        else:
            start = Start.CONTINUE if continues else Start.FROM_SUM
        # .grad.data may have been given another layout or dtype, which no version tells.
        dtype = new.dtype
        plain = dtype in FOLDED_DTYPES and is_plain(new, dtype) and (running is None or is_plain(running, dtype))
        if not plain or _is_grad_enabled():  # create_graph=True
            fold.one(slot, running, new, start)
        elif self._may_wait and self._waiting.add(slot, running, new, self._number):
            return
        else:
            param.grad = running
            if start is Start.FROM_SUM and squares is None:
                fold.second(slot, running, new)
            else:
                fold.many([slot], [new], [running], start)
        if self._may_wait:
            self._waiting.show(param)

    def without_first_hook(self, slot: Slot, new: Any, was_added: bool) -> None:
        """Hook a parameter again whose first hook was not called, because somebody has removed it.

        Args:
            slot: of the parameter.
            new: its ``.grad``.
            was_added: whether torch has added a gradient to one that was there.

        Raises:
            RuntimeError: it has, and those that were there have been multiplied by ``scale`` already.
        """
        refuse_compiled_autograd()
        self._put_on_hooks(slot.param)
        if was_added and self._fold.is_scaled:
            raise RuntimeError(
                f"a parameter of shape {tuple(new.shape)} has lost its hooks in the middle of a window (it was moved "
                "by module.to(), or its _backward_hooks were cleared), and its gradients with average_over or scale "
                "can no longer be told apart. It is hooked again now: call zero_grad() and begin the window again"
            )

    def enter(self) -> None:
        """Prepare for the backward pass that is under way, if another one was before."""
        number = current_graph_task_id()
        if number != self._number or number == NO_BACKWARD:
            self._begin(number)

    def complete(self) -> None:
        """Fold what waits."""
        self._waiting.fold()

    def drop(self) -> None:
        """Let go of what waits, and of its memory, because the window is begun again."""
        self._waiting.drop()

    def _begin(self, number: int) -> None:
        """Note which backward pass brings gradients now: another one, one inside it, or the one around it again."""
        with self._lock:
            if number == self._number != NO_BACKWARD:  # another thread was first
                return
            if number not in self._under_way:
                is_inside = len(self._under_way) > 0 or number < self._newest
                if not is_inside:
                    self._waiting.fold()  # of a pass that has failed
                    self._versions.clear()
                    if self._fold.squares is not None:
                        self._fold.squares.begin_pass(is_inside_another=is_in_function())
                self.count += 1
                self._in_group = is_in_group()
                # DistributedDataParallel sends .grad on right after the hook, and a report looks at it.
                self._may_wait = (
                    number != NO_BACKWARD
                    and not self._in_group
                    and self._lost_bits is None
                    and (torch.cuda.is_initialized() or "cpu" in waiting.WAITING_DEVICE_TYPES)
                )
                if number != NO_BACKWARD:
                    self._under_way[number] = this = _Pass(number, self._end)
                    queue_callback(this)
                    self._newest = max(self._newest, number)
            is_plain_pass = not (self._is_observed or _is_grad_enabled())  # not create_graph=True
            self._plain_number = number if is_plain_pass else NO_BACKWARD - 1
            self._number = number  # last: other threads look at it without the lock

    def _end(self, number: int) -> None:
        try:
            self._waiting.fold()
        finally:
            self._under_way.pop(number, None)
        if self._fold.squares is not None and not self._under_way:
            self._fold.squares.end_pass()

    def _look_through_bucket(self, slot: Slot, grad: Tensor) -> None:
        """Let a change of ``grad``'s version that comes from others in its bucket not count as one of its own.

        DistributedDataParallel divides the gradients of a bucket one after another, each after its hook. If they are
        views of the bucket, they share a counter, and the division of one looks like a change of those to come.
        """
        if grad._is_view():
            before = self._versions.setdefault(grad.untyped_storage().data_ptr(), grad._version)
            if slot.version == before:
                slot.version = grad._version
