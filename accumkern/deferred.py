"""What ``finish(defer=True)`` leaves to the next step: to divide and clip the gradients that it reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from accumkern.backends import Kernels
from accumkern.finish import Scaling, write
from accumkern.slot import Slot


@dataclass
class _Deferred:
    scaling: Scaling
    count: int  # of backward passes before
    is_written: bool = False  # into the gradients that are scaled in memory


class DeferredScaling:
    """A scaling of gradients, until the step that reads them has come to its end.

    Args:
        kernels_on: returns the kernels of a device.
        count_passes: returns how many backward passes there have been.
    """

    def __init__(self, kernels_on: Callable[[torch.device], Kernels], count_passes: Callable[[], int]) -> None:
        self._kernels_on, self._count_passes = kernels_on, count_passes
        self._deferred: _Deferred | None = None
        self._done_at = -1  # backward passes before the last step that has scaled

    def set(self, scaling: Scaling) -> None:
        """Have the next step scale the gradients that it reads."""
        # A divisor may be counted on by others before the step.
        copies = Scaling(*[scalar.clone() if isinstance(scalar, Tensor) else scalar for scalar in scaling])
        self._deferred = _Deferred(copies, self._count_passes())

    def forget(self) -> None:
        """Leave gradients as they are; they may be other ones."""
        self._deferred, self._done_at = None, -1

    def waits(self) -> bool:
        """Return whether gradients of the last backward pass are still to be scaled."""
        return self._deferred is not None and self._deferred.count == self._count_passes()

    def checked(self) -> Scaling:
        """Return how a step has to scale the gradients, which are there.

        Raises:
            RuntimeError: they are other gradients than those that were to be scaled, or have been stepped already.
        """
        count = self._count_passes()
        if self._deferred is None:
            if self._done_at == count:
                raise RuntimeError(
                    "gradients that finish(defer=True) was called for are stepped a second time: some were scaled in "
                    "memory, others as they were read. Call zero_grad() after step(), or finish() without defer"
                )
            return Scaling()
        if self._deferred.count != count:
            passes = count - self._deferred.count
            self.forget()
            raise RuntimeError(
                f"finish(defer=True) was followed by {passes} backward passes before step(): its norm is not that of "
                "the gradients. Call finish() again, or step() once more to take them as they are"
            )
        return self._deferred.scaling

    def write(self, slots: list[Slot]) -> None:
        """Scale gradients in memory, unless that was done before an error."""
        deferred = self._deferred
        if deferred is not None and deferred.scaling.changes and not deferred.is_written:
            write(slots, deferred.scaling, self._kernels_on, keeps_residuals=True)
            deferred.is_written = True

    def end_step(self) -> None:
        """Note that a step has read the gradients."""
        if self._deferred is not None:
            self._done_at, self._deferred = self._deferred.count, None
