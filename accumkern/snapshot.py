"""What a window that is begun again has to go back to: gradients, buffers of the model, and random numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from accumkern.random_state import RandomState
from accumkern.slot import Slot


class _Gradient(NamedTuple):
    grad: Any
    values: Tensor  # on the CPU, or a copy of a gradient that is not dense
    residual: Tensor | None  # on the CPU; None where none belonged to the gradient
    is_owned: bool


class Snapshot:
    """Gradients, buffers and random numbers as they are now.

    Gradients that are there are copied to the host's memory, so that the device's is free; where there are none, as at
    the beginning of a window, nothing is copied. Buffers are copied where they are.

    Args:
        params: whose gradients.
        slots: of those that are accumulated by hooks.
        model: whose buffers, such as BatchNorm's running statistics; None leaves them as they are.
    """

    def __init__(self, params: Iterable[Tensor], slots: Mapping[Tensor, Slot], model: nn.Module | None) -> None:
        self._params = list(dict.fromkeys(params))
        self._slots = slots
        self._gradients = {
            param: _copied(param.grad, slots.get(param)) for param in self._params if param.grad is not None
        }
        self._buffers = [] if model is None else [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
        self._random = RandomState(*(param.device for param in self._params))

    def put_back(self) -> None:
        """Make gradients, buffers and random numbers what they were; gradients that came since are let go."""
        with torch.no_grad():
            for param in self._params:
                before = self._gradients.get(param)
                if before is None:
                    param.grad = None
                else:
                    _put_back(param, self._slots.get(param), before)
            for buffer, values in self._buffers:
                buffer.copy_(values)
        self._random.put_back()


def _copied(grad: Any, slot: Slot | None) -> _Gradient:
    if grad.layout is not torch.strided:
        return _Gradient(grad, grad.detach().clone(), None, False)
    residual = None if slot is None else slot.valid_residual(grad)
    local = grad.detach() if slot is None else slot.local(grad.detach())
    return _Gradient(
        grad,
        local.to("cpu", copy=True),
        None if residual is None else residual.to("cpu", copy=True),
        slot is not None and slot.owns(grad),
    )


def _put_back(param: Tensor, slot: Slot | None, before: _Gradient) -> None:
    grad = param.grad = before.grad
    if grad.layout is not torch.strided:
        param.grad = before.values.clone()  # others add to it
        return
    (grad if slot is None else slot.local(grad)).copy_(before.values)
    if slot is None:
        return
    if before.residual is not None:
        slot.residual.copy_(before.residual)
    if before.is_owned:
        slot.remember()
    else:
        slot.forget()
