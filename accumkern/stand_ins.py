"""Stand-ins of bfloat16 parameters: FP32 parameters with the accumulated gradient in FP32, in one piece of memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from accumkern.backends import Kernels
from accumkern.dtensor import is_dtensor, version_of, with_shard
from accumkern.formats import Format
from accumkern.master_weights import MasterWeights, dense, local_of, sum_of_bits
from accumkern.slot import Slot

STAND_IN_BYTES = 8  # of an element: FP32 weight and gradient
_ALIGNMENT = 64  # elements

_as_on: str | None = None


def kind_of(device: torch.device) -> str:
    """Return the type of a device, or in the block of :func:`as_on` the one that is named there."""
    return _as_on or device.type


@contextmanager
def as_on(device_type: str) -> Iterator[None]:
    """Let stand-ins be made and kept as on a kind of device, wherever the parameters are, in all threads.

    For predictions of memory.
    """
    global _as_on
    before, _as_on = _as_on, device_type
    try:
        yield
    finally:
        _as_on = before


class StandIn(NamedTuple):
    """A parameter, what stands for it, and the memory of the master weight."""

    param: Tensor
    version: int  # of the parameter, before the step
    bits: Tensor | None  # the sum of its bits, as long as it is to be seen that the step leaves it alone
    parameter: nn.Parameter
    made_version: int  # of the stand-in, before the step
    own: frozenset[str]  # its attributes that the parameter has not
    master: Tensor


class StandIns:
    """Makes stand-ins.

    Attributes:
        kept: the memory of a step's stand-ins, for the next step. On a CPU, large memory that is freed goes back to the
            system, and takes ten times as long as the step to come again, page by page. Elsewhere torch keeps it.

    Args:
        masters: of the parameters.
        slots: parameter -> slot of its gradient.
        kernels_on: returns the kernels of a device.
    """

    def __init__(
        self,
        masters: MasterWeights,
        slots: Mapping[Tensor, Slot],
        kernels_on: Callable[[torch.device], Kernels],
    ) -> None:
        self._masters, self._slots, self._kernels_on = masters, slots, kernels_on
        self.kept: dict[torch.device, Tensor] = {}

    def keep(self, memory: dict[torch.device, Tensor]) -> None:
        """Keep what stand-ins were in, where that is the host's memory."""
        self.kept = {device: flat for device, flat in memory.items() if kind_of(device) == "cpu"}

    def __call__(self, params: list[Tensor], memory: dict[torch.device, Tensor], is_known: bool) -> list[StandIn]:
        """Return the stand-ins of parameters: master weight and accumulated gradient in FP32.

        Args:
            params: that have masters and gradients.
            memory: a device's piece of memory, which is taken again where it is large enough.
            is_known: whether the step is known to write nothing but stand-ins.
        """
        weights = [dense(local_of(param)) for param in params]
        stored = [self._slots[param].stored() for param in params]
        coded = [i for i, gradient in enumerate(stored) if gradient.format not in (None, Format.PLAIN32)]
        made = _fp32_like([*weights, *(stored[i].sum for i in coded)], memory)
        masters, values = made[: len(params)], dict(zip(coded, made[len(params) :], strict=True))
        self._masters.read(params, masters)
        launches: dict[Any, list[int]] = defaultdict(list)
        for i in coded:
            launches[stored[i].sum.device, stored[i].format, stored[i].residual is None].append(i)
        for (device, format_, is_alone), indices in launches.items():
            sums, out = [stored[i].sum for i in indices], [values[i] for i in indices]
            if is_alone:
                torch._foreach_copy_(out, sums)
            else:
                residuals: Any = [stored[i].residual for i in indices]
                self._kernels_on(device).decode(format_, sums, residuals, out)
        found = []
        for i, (param, master) in enumerate(zip(params, masters, strict=True)):
            whole = with_shard(master, param.detach()) if is_dtensor(param) else master
            parameter = nn.Parameter(whole, requires_grad=param.requires_grad)
            own = frozenset(vars(parameter))
            vars(parameter).update((key, value) for key, value in vars(param).items() if key not in own)
            slot, grad = self._slots[param], param.grad
            assert grad is not None
            if i in values:
                parameter.grad = slot.whole(values[i], grad)
            else:  # one of FP32 as it is; sparse ones and those with holes in memory are rare
                parameter.grad = grad.detach() if grad.dtype is torch.float32 else slot.value(grad)
            bits = None if is_known else sum_of_bits(weights[i])
            found.append(StandIn(param, version_of(param), bits, parameter, parameter._version, own, master))
        return found


def _fp32_like(tensors: list[Tensor], memory: dict[torch.device, Tensor]) -> list[Tensor]:
    """Return FP32 tensors without values, laid out as others are, in one piece of memory for each device.

    Args:
        tensors: without holes in memory.
        memory: a device's piece of memory, which is taken again where it is large enough.
    """
    numel: dict[torch.device, int] = defaultdict(int)
    offsets = []
    for tensor in tensors:
        offsets.append(numel[tensor.device])
        numel[tensor.device] += -(-tensor.numel() // _ALIGNMENT) * _ALIGNMENT
    for device, needed in numel.items():
        if device not in memory or memory[device].numel() < needed:
            memory.pop(device, None)
            memory[device] = torch.empty(needed, dtype=torch.float32, device=device)
    return [
        memory[tensor.device].as_strided(tensor.shape, tensor.stride(), offset)
        for tensor, offset in zip(tensors, offsets, strict=True)
    ]
