"""What a window that is begun again has to go back to: gradients, buffers of the model, and random numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from accumkern.dtensor import computes_on
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
    the beginning of a window, nothing is copied. Buffers are copied where they are. What is put back is written past
    the counters of changes: to autograd, and to other views of the same memory, it never changed.

    Args:
        params: whose gradients; other leaves too.
        slots: of those that are accumulated by hooks.
        model: whose buffers, such as BatchNorm's running statistics; None leaves them as they are.
    """

    def __init__(self, params: Iterable[Tensor], slots: Mapping[Tensor, Slot], model: nn.Module | None) -> None:
        self._params = list(dict.fromkeys(params))
        self._slots = slots
        self._gradients = {
            param: _copied(param.grad, slots.get(param)) for param in self._params if param.grad is not None
        }
        modules = [] if model is None else list(model.modules())
        self._buffers = [(module, dict(module._buffers)) for module in modules if module._buffers]
        tensors = {buffer for _, buffers in self._buffers for buffer in buffers.values() if buffer is not None}
        self._values = [(buffer, buffer.detach().clone()) for buffer in tensors]
        self._random = RandomState(*map(computes_on, self._params))

    def put_back(self) -> None:
        """Make gradients, buffers and random numbers what they were; gradients that came since are let go."""
        self._random.put_back()
        with torch.no_grad():
            for param in self._params:
                before = self._gradients.get(param)
                param.grad = None if before is None else _put_back(self._slots.get(param), before)
            for param, before in self._gradients.items():  # when all are written: some may share memory
                slot = self._slots.get(param)
                if slot is not None and before.is_owned:
                    slot.remember()
                elif slot is not None:
                    slot.forget()
            for module, buffers in self._buffers:
                module._buffers.clear()
                module._buffers.update(buffers)
            for buffer, values in self._values:
                _write(buffer, values)


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


def _put_back(slot: Slot | None, before: _Gradient) -> Any:
    grad = before.grad
    if grad.layout is not torch.strided:
        return before.values.clone()  # others add to it
    _write(grad if slot is None else slot.local(grad), before.values)
    if slot is not None and before.residual is not None:
        slot.residual.copy_(before.residual)
    return grad


def _write(tensor: Tensor, values: Tensor) -> None:
    """Give a tensor values again, and its shape where that has changed."""
    if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        return  # expanded: nothing could write into it
    with torch.inference_mode(tensor.is_inference()):  # one that was made there can be written there alone
        if tensor.shape == values.shape:
            tensor.data.copy_(values)
        else:
            tensor.data = values.to(tensor.device, copy=True)
