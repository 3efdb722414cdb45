"""What ``finish(defer=True)`` leaves to the next step: to divide and clip the gradients that it reads."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from accumkern.backends import Kernels
from accumkern.finish import Scaling, batches_of, write
from accumkern.slot import Slot


@dataclass
class _Deferred:
    scaling: Scaling
    count: int  # of backward passes before
    versions: list[tuple[Any, Any, int]]  # of each gradient: weak references to its slot and to it, and its version
    is_written: bool = False  # into the gradients that are scaled in memory

    def are_there(self) -> bool:
        """Return whether some of the gradients are."""
        return any(_grad_of(slot) is grad() is not None for slot, grad, _ in self.versions)


class DeferredScaling:
    """A scaling of gradients, until the step that reads them has come to its end.

    Args:
        kernels_on: returns the kernels of a device.
        count_passes: returns how many backward passes there have been.
    """

    def __init__(self, kernels_on: Callable[[torch.device], Kernels], count_passes: Callable[[], int]) -> None:
        self._kernels_on, self._count_passes = kernels_on, count_passes
        self._deferred: _Deferred | None = None
        self._done: _Deferred | None = None  # what the last step has scaled

    def set(self, scaling: Scaling, slots: list[Slot]) -> None:
        """Have the next step scale the gradients that it reads, those of some slots."""
        # A divisor may be counted on by others before the step.
        copies = Scaling(*[scalar.clone() if isinstance(scalar, Tensor) else scalar for scalar in scaling])
        self._deferred = _Deferred(copies, self._count_passes(), _versions(slots))

    def forget(self) -> None:
        """Leave gradients as they are; they may be other ones."""
        self._deferred = self._done = None

    def waits(self) -> bool:
        """Return whether gradients of the last backward pass are still to be scaled."""
        deferred = self._deferred
        return deferred is not None and deferred.count == self._count_passes() and deferred.are_there()

    def checked(self) -> Scaling:
        """Return how a step has to scale the gradients.

        Raises:
            RuntimeError: they are other gradients than those that were to be scaled, or have been stepped already.
        """
        count = self._count_passes()
        if self._deferred is None:
            if self._done is not None and self._done.count == count and self._done.are_there():
                raise RuntimeError(
                    "zero_grad() is missing: gradients that finish(defer=True) was called for are stepped a second "
                    "time, and it has divided them for one step alone. Or call finish() without defer"
                )
            return Scaling()
        if self._deferred.count != count:
            if not self._deferred.are_there():  # zero_grad() was called, and no step
                self.forget()
                return Scaling()
            passes = count - self._deferred.count
            self.forget()
            raise RuntimeError(
                f"finish(defer=True) was followed by {passes} backward pass{'es' if passes > 1 else ''} before step(): "
                "its norm is not that of the gradients. Call finish() again; step() now would take them undivided"
            )
        if any(_is_changed(*version) for version in self._deferred.versions):
            raise RuntimeError(
                "gradients were changed between finish(defer=True) and step(), which is to divide and clip them: "
                "whoever has changed them has seen undivided ones. Call zero_grad(), and clip by finish(max_norm=...), "
                "or call finish() without defer"
            )
        return self._deferred.scaling

    def write(self, slots: list[Slot]) -> None:
        """Scale gradients in memory, unless that was done before an error."""
        deferred = self._deferred
        if deferred is not None and deferred.scaling.changes and not deferred.is_written:
            write(batches_of(slots), deferred.scaling, self._kernels_on, keeps_residuals=True)
            deferred.is_written = True
            deferred.versions = _versions([slot for reference, _, _ in deferred.versions if (slot := reference())])

    def end_step(self) -> None:
        """Note that a step has read the gradients."""
        if self._deferred is not None:
            self._done, self._deferred = self._deferred, None


def _versions(slots: list[Slot]) -> list[tuple[Any, Any, int]]:
    grads: list[tuple[Slot, Any]] = [(slot, slot.param.grad) for slot in slots]
    return [(weakref.ref(slot), weakref.ref(grad), slot.version_of(grad)) for slot, grad in grads if grad is not None]


def _grad_of(reference: Any) -> Any:
    slot = reference()
    return None if slot is None else slot.param.grad


def _is_changed(slot: Any, reference: Any, version: int) -> bool:
    """Return whether a gradient is another one, or another version, than it was; one that is gone does not count."""
    grad = _grad_of(slot)
    return grad is not None and (grad is not reference() or slot().version_of(grad) != version)
