"""Gradients that wait to be folded together, because on a GPU a launch costs more than most folds.

They arrive later in the backward pass, as far as anybody can tell: until then ``.grad`` is what it was before it.
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor

from accumkern.fold import Fold, is_plain
from accumkern.formats import Start
from accumkern.slot import Slot
from accumkern.torch_private import current_node, current_raw_stream, post_accumulate_hooks

# Where a fold costs less than what waiting costs in Python, gradients do not wait.
WAITING_DEVICE_TYPES = frozenset({"cuda"})
# Gradients of at most so many elements wait: a larger one keeps a GPU busy for as long as its launch takes. When more
# than that wait they are folded: less than twice as many, 16 MiB, most of it in the GPU's cache still.
MAX_WAITING_NUMEL = 2**22

# The slot; the gradient; .grad until then, and its version; the device's index and the stream that made the gradient;
# the number of the backward pass.
_Entry: TypeAlias = tuple[Slot, Tensor, "Tensor | None", int, int, int, int]


class WaitingGradients:
    """The gradients of one accumulator that wait.

    Autograd calls the hooks of each device from a thread of its own, so they are in a deque, whose append and popleft
    cannot be torn apart. One thread folds at a time: whose pass ends waits for what another has taken.

    Args:
        fold: what folds.
        is_under_way: whether a backward pass, by its number, goes on; it has ended or failed otherwise.
    """

    def __init__(self, fold: Fold, is_under_way: Callable[[int], bool]) -> None:
        self._fold = fold
        self._is_under_way = is_under_way
        self._entries: deque[_Entry] = deque()
        self._numel = 0
        self._folding = threading.RLock()

    def add(self, slot: Slot, running: Tensor | None, new: Tensor, number: int) -> bool:
        """Let a gradient wait, unless somebody is going to look at it before; return whether it waits.

        Args:
            slot: of the parameter.
            running: what its ``.grad`` is then: the running gradient, or None.
            new: the gradient.
            number: of the backward pass.
        """
        param = slot.param
        if not slot.may_wait or len(post_accumulate_hooks(param)) > 1:
            return False
        param.grad = running
        if slot.waits:  # for a pass inside this one, or around it
            self.fold()
            running = param.grad
        device = new.get_device()
        stream = current_raw_stream(device) if device >= 0 else 0
        version = 0 if running is None else running._version
        slot.waits = True
        self._entries.append((slot, new, running, version, device, stream, number))
        self._numel += new.numel()
        if self._numel > MAX_WAITING_NUMEL:
            self.fold()
        return True

    def show(self, param: Tensor) -> None:
        """Fold all if a parameter has other hooks, which are to come: they may look at any gradient."""
        if self._entries and len(post_accumulate_hooks(param)) > 1:
            self.fold()

    def drop(self) -> None:
        """Let go of all that wait: they count for nothing."""
        with self._folding:
            self._numel = 0
            while self._entries:
                self._entries.popleft()[0].waits = False

    def fold(self) -> None:
        """Fold all, in one launch for each device, stream, dtype and start."""
        with self._folding:
            if self._entries:
                self._numel = 0
                self._fold_entries()

    def _fold_entries(self) -> None:
        launches: dict[Any, tuple[list[Slot], list[Tensor], list[Any], Start]] = {}
        likely: dict[Any, list[tuple[Slot, Tensor, Any, int]]] = defaultdict(list)  # to continue, as most do
        others: list[tuple[Slot, Tensor, Any, int]] = []
        popleft = self._entries.popleft
        errors: list[Exception] = []  # the others are folded all the same
        while True:
            try:
                slot, new, running, version, device_index, stream, number = popleft()
            except IndexError:
                break
            slot.waits = False
            grad: Any = slot.param.grad
            if (
                running is not None
                and grad is running
                and slot.written() is running
                and running._version == version == slot.version
            ):
                likely[new.dtype, device_index, stream].append((slot, new, running, stream))
                continue
            is_changed = running is None or grad is not running or running._version != version
            if not is_changed or self._is_under_way(number):  # else it has failed, and zero_grad() was called
                others.append((slot, new, grad, stream))
        for (_, _, stream), some in likely.items():
            slots, grads, sums, _ = map(list, zip(*some, strict=True))
            try:
                with _on_stream(grads[0].device, stream):
                    is_done = self._fold.go_on(slots, grads, sums)
            except Exception as error:
                errors.append(error)
            else:
                if not is_done:
                    others += some
        for slot, new, grad, stream in others:
            dtype, start = new.dtype, Start.FROM_ZERO
            if grad is not None:
                start = Start.CONTINUE if slot.has_residual_of(grad) else Start.FROM_SUM
            if not is_plain(new, dtype) or (grad is not None and not is_plain(grad, dtype)):
                try:
                    self._fold.one(slot, grad, new, start)
                except Exception as error:
                    errors.append(error)
                continue
            key = (new.device, stream, dtype, start)
            slots, grads, sums, _ = launches.setdefault(key, ([], [], [], start))
            slots.append(slot)
            grads.append(new)
            sums.append(grad)
        for (device, stream, _, _), launch in launches.items():
            try:
                with _on_stream(device, stream):
                    self._fold.many(*launch)
            except Exception as error:
                errors.append(error)
        try:
            if errors:
                raise errors[0]
        finally:
            errors.clear()  # its traceback holds this frame, and what it holds


def may_wait(new: Tensor) -> bool:
    """Return whether a gradient like this one, whose node is evaluated, may wait for the rest of a window.

    A launch costs more than its fold, lists take it as it is, and nobody hooks the node, which would show the sum. Who
    hooks it keeps it, too, so to look once in a window will do.
    """
    is_small = new.device.type in WAITING_DEVICE_TYPES and new.numel() <= MAX_WAITING_NUMEL
    return is_small and is_plain(new, new.dtype) and not _has_hooks(current_node())


def _has_hooks(node: Any) -> bool:
    handle = node.register_hook(lambda *_: None)
    others = len(handle.hooks_dict_ref()) > 1
    handle.remove()
    return others


@contextmanager
def _on_stream(device: torch.device, handle: int) -> Iterator[None]:
    """Let a GPU work on the stream that made the gradients, and the current one wait for it."""
    if device.type != "cuda" or handle == current_raw_stream(device.index):
        yield
        return
    stream = torch.cuda.ExternalStream(handle, device) if handle else torch.cuda.default_stream(device)
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)
