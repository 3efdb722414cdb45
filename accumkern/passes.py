"""One backward pass after another: what happens when autograd brings a gradient, and what waits for the pass to end.

A first hook runs before autograd adds a new gradient: it sets the running ``.grad`` aside, so that autograd puts the
new gradient in its place instead of adding to it in the parameter's dtype. The second runs after that: it folds the new
gradient into the one set aside, in FP32, and puts that back. Between two backward passes ``.grad`` is what it always
was, the sum so far in the parameter's dtype; the low bits lie in a residual beside it.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from accumkern.dtensor import is_in_group
from accumkern.fold import Fold, is_plain
from accumkern.formats import Start
from accumkern.lost_bits import LostBitsMeter
from accumkern.slot import NOT_SET_ASIDE, Slot
from accumkern.torch_private import (
    NO_BACKWARD,
    compiled_autograd,
    current_graph_task_id,
    current_raw_stream,
    post_accumulate_hooks,
    queue_callback,
)

# A small gradient that waits for the end of the backward pass: its slot; it; the running sum, which is .grad until
# then, and its version; where the fold starts; the stream that made the gradient.
_Waiting: TypeAlias = tuple[Slot, Any, Any, int, Start, int]

# Small gradients wait for the end of the backward pass, unless so many elements wait already that their memory counts.
MAX_WAITING_NUMEL = 2**22

_is_grad_enabled = torch.is_grad_enabled


def hook_functions(slot: Slot) -> tuple[Callable[[Any], None], Callable[[Tensor], None]]:
    """Return the functions for the two hooks of a parameter (:class:`accumkern.hooks.ParameterHooks`).

    They hold the slot weakly: a cycle through autograd's own objects would never be collected.
    """
    reference = weakref.ref(slot)

    def set_aside(_grad_outputs: Any) -> None:
        compiled = compiled_autograd()
        if compiled is not None and compiled.in_compiled_autograd_region:
            _refuse_compiled_autograd()
        slot = reference()
        if slot is not None:
            param = slot.param
            slot.set_aside = grad = param.grad
            if grad is not None:
                param.grad = None

    def accumulate(param: Tensor) -> None:
        slot = reference()
        if slot is not None:
            slot.accumulate(slot, param)

    return set_aside, accumulate


class BackwardPasses:
    """The backward passes of one accumulator.

    Attributes:
        count: of the passes that have brought a gradient.

    Args:
        fold: what folds.
        lost_bits: the sample that is accumulated as stock PyTorch does, or None.
        renew_nodes: hooks the node of a parameter that was moved, or of all (None); see :meth:`renew_nodes`.
    """

    def __init__(
        self, fold: Fold, lost_bits: LostBitsMeter | None, renew_nodes: Callable[[Tensor | None], None]
    ) -> None:
        self.count = 0
        self._fold = fold
        self._lost_bits = lost_bits
        self._renew_nodes = renew_nodes
        # Autograd calls the hooks of each device from a thread of its own. What they share is a deque, whose append and
        # popleft cannot be torn apart, and flags that are set under a lock when a backward pass begins.
        self._waiting: deque[_Waiting] = deque()
        self._waiting_numel = 0
        self._lock = threading.RLock()
        self._number = NO_BACKWARD  # autograd's, of the backward pass that is under way
        self._in_group = False  # whether there is a process group
        self._may_wait = False  # whether small gradients may wait for the end of the backward pass
        self._versions: dict[int, int] = {}  # of memory that gradients are views of, when the backward pass came there

    def accumulate(self, slot: Slot, param: Tensor) -> None:
        """Fold the gradient that autograd has just left in ``param.grad`` into the running one."""
        running: Any = slot.set_aside
        slot.set_aside = NOT_SET_ASIDE
        new: Any = param.grad
        if new is None:  # somebody's hook took it
            param.grad = None if running is NOT_SET_ASIDE else running
            return
        fold = self._fold
        number = current_graph_task_id()
        if running is NOT_SET_ASIDE:
            compiled = compiled_autograd()
            if compiled is not None and compiled.in_compiled_autograd_region:
                _refuse_compiled_autograd()
            self._begin(number)
            self.renew_nodes(new, was_added=slot.last() is new)
            running = None
        elif number != self._number:
            param.grad = running  # as it was before this gradient came
            self._begin(number)
            running = param.grad
            param.grad = new

        squares = fold.squares
        if squares is not None:
            squares.arrive(param, is_first=running is None)
        lost_bits = self._lost_bits
        if running is None:  # the first micro-batch of a window
            slot.forget()
            slot.last = weakref.ref(new)
            if lost_bits is not None:
                lost_bits.add(param, new, fold.scale)
            if not fold.is_scaled:
                if squares is not None:
                    squares.keep(param, new)
                self._measure(slot)
                return
            running, start = new, Start.FROM_ZERO
            version = new._version
        else:
            version = running._version
            if self._in_group:
                self._look_through_bucket(slot, running, version)
            is_ours = running is slot.written() and version == slot.version
            start = Start.CONTINUE if is_ours else Start.FROM_SUM
            if lost_bits is not None:
                lost_bits.add(param, new, fold.scale, running, slot.value if is_ours else None)
        # .grad.data may have been given another layout or dtype, which no version tells.
        plain = is_plain(new, slot.dtype) and (running is new or is_plain(running, slot.dtype))
        if not plain or _is_grad_enabled():  # create_graph=True
            fold.one(slot, running, new, start)
            self._measure(slot)
            return

        param.grad = running
        if self._may_wait and slot.is_small and len(post_accumulate_hooks(param)) == 1:
            stream = current_raw_stream(slot.device.index) if slot.is_cuda else 0
            self._waiting.append((slot, new, running, version, start, stream))
            self._waiting_numel += slot.numel
            if self._waiting_numel > MAX_WAITING_NUMEL:
                self._fold_waiting()
        else:
            fold.many([slot], [new], [running], start)
            self._measure(slot)

    def _measure(self, slot: Slot) -> None:
        """Let the report look at the sum that was folded just now."""
        if self._lost_bits is not None:
            grad: Any = slot.param.grad
            residual = slot.valid_residual(grad)
            if residual is not None and not grad.is_contiguous():  # it lies in another order than it is looked at
                grad, residual = slot.value(grad), None
            self._lost_bits.folded(slot.param, grad, residual, slot.formats.get(grad.dtype))

    def renew_nodes(self, grad: Tensor, was_added: bool, only: Tensor | None = None) -> None:
        """Hook the new nodes of parameters that were moved or cast after attach: the first hook was not called.

        Args:
            grad: the ``.grad`` that was noticed first.
            was_added: whether torch has added to it.
            only: the one parameter to look at; None looks at all.

        Raises:
            RuntimeError: torch added this gradient to others, which have been multiplied by ``scale`` already.
        """
        self._renew_nodes(only)
        if was_added and self._fold.is_scaled:
            raise RuntimeError(
                f"a parameter of shape {tuple(grad.shape)} was moved or cast in the middle of a window, and its "
                "gradients with average_over or scale can no longer be told apart; call zero_grad() and begin the "
                "window again"
            )

    def enter(self) -> None:
        """Prepare for the backward pass that is under way, if another one was before."""
        number = current_graph_task_id()
        if number != self._number or number == NO_BACKWARD:
            self._begin(number)

    def complete(self) -> None:
        """Fold what waits: inside its backward pass as it is, after one that failed with care."""
        self._fold_waiting(of_this_pass=current_graph_task_id() == self._number)

    def _begin(self, number: int) -> None:
        """Fold what waits. Then, if another backward pass has begun (a nested one too, or its end), prepare for it."""
        with self._lock:
            same = number == self._number != NO_BACKWARD
            self._fold_waiting(of_this_pass=same)
            if self._fold.squares is not None:
                self._fold.squares.reduce()
            if same:
                return
            self.count += 1
            self._in_group = is_in_group()
            # DistributedDataParallel sends .grad on right after the hook, and a report looks at it.
            self._may_wait = not self._in_group and self._lost_bits is None
            self._versions.clear()
            if self._may_wait or self._fold.squares is not None:
                queue_callback(self._end)
            self._number = number  # last: other threads look at it without the lock

    def _end(self) -> None:
        self._fold_waiting()
        if self._fold.squares is not None:
            self._fold.squares.reduce()

    def _look_through_bucket(self, slot: Slot, grad: Tensor, version: int) -> None:
        """Let a change of ``grad``'s version that comes from others in its bucket not count as one of its own.

        DistributedDataParallel divides the gradients of a bucket one after another, each after its hook. If they are
        views of the bucket, they share a counter, and the division of one looks like a change of those to come.
        """
        if grad._is_view():
            before = self._versions.setdefault(grad.untyped_storage().data_ptr(), version)
            if slot.version == before:
                slot.version = version

    def _fold_waiting(self, of_this_pass: bool = True) -> None:
        """Fold the small gradients that wait, in one launch for each device, dtype and start.

        Args:
            of_this_pass: False where the gradients may come from a backward pass that failed. Then those are dropped
                whose ``.grad`` somebody changed since, as ``zero_grad()`` does.
        """
        if not self._waiting:
            return
        self._waiting_numel = 0
        launches: dict[int, tuple[list[Slot], list[Tensor], list[Tensor], Start]] = {}
        popleft = self._waiting.popleft
        while True:
            try:
                slot, new, running, version, start, stream = popleft()
            except IndexError:
                break
            grad: Any = slot.param.grad
            if grad is not running or running._version != version:
                if grad is None or not of_this_pass:
                    continue
                start = Start.FROM_SUM
                if not is_plain(grad, slot.dtype):
                    self._fold.one(slot, grad, new, start)
                    continue
            if slot.is_cuda and stream != current_raw_stream(slot.device.index):
                current = torch.cuda.current_stream(slot.device)
                current.wait_stream(torch.cuda.ExternalStream(stream, slot.device))
                new.record_stream(current)
            key = slot.launch_group + start
            launch = launches.get(key)
            if launch is None:
                launch = launches[key] = ([], [], [], start)
            launch[0].append(slot)
            launch[1].append(new)
            launch[2].append(grad)
            if start is Start.FROM_ZERO:  # before any is folded, which may fail: see Fold.many
                slot.param.grad = None
        for slots, grads, sums, start in launches.values():
            self._fold.many(slots, grads, sums, start)


def _refuse_compiled_autograd() -> None:
    """Raise, because compiled autograd calls both hooks after it has added the gradient."""
    raise RuntimeError(
        "compiled autograd adds gradients before accumkern sees them; call backward() without it "
        "(torch._dynamo.config.compiled_autograd = False), which torch.compile of the model does not need"
    )
