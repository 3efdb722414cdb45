"""torch's Adam, AdamW and SGD on FP32 weights, with the roundings that a fused step has: what it is compared with.

States are made by torch's own code, and updated one parameter at a time by the reference of :mod:`accumkern.updates`.
How near that is to torch's own arithmetic, tests/test_step_kernels.py says.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from accumkern.updates import Update, adam_coefficients, sgd_coefficients, updated


def pinned(optimizer: Any) -> Any:
    """Return an optimizer whose steps have a fused step's roundings, if it is of a class that is stepped so."""
    optimizer.__class__ = PINNED.get(type(optimizer), type(optimizer))
    return optimizer


class _PinnedAdam:
    @torch.no_grad()
    def step(self: Any, _closure: None = None) -> None:
        """Step each parameter that has a gradient."""
        for group in self.param_groups:
            params, grads, exp_avgs, exp_avg_sqs, maxima, steps = lists = [[] for _ in range(6)]
            self._init_group(group, *lists)
            update = Update.AMSGRAD if group["amsgrad"] else Update.ADAM
            columns = [exp_avgs, exp_avg_sqs, *([maxima] if group["amsgrad"] else [])]
            for param, grad, step, *of_param in zip(params, grads, steps, *columns, strict=True):
                step += 1
                _write(update, adam_coefficients(group, step.reshape(1)), param, grad, of_param)


class _PinnedSgd:
    @torch.no_grad()
    def step(self: Any, _closure: None = None) -> None:
        """Step each parameter that has a gradient."""
        for group in self.param_groups:
            params, grads, buffers = lists = [[] for _ in range(3)]
            self._init_group(group, *lists)
            for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
                if not group["momentum"]:
                    _write(Update.SGD, sgd_coefficients(group, torch.tensor([False])), param, grad, ())
                    continue
                state, is_first = self.state[param], buffers[i] is None
                if is_first:
                    state["momentum_buffer"] = torch.zeros_like(param.detach())
                rows = sgd_coefficients(group, torch.tensor([is_first]))
                _write(Update.MOMENTUM, rows, param, grad, (state["momentum_buffer"],))


_MIXINS = {torch.optim.Adam: _PinnedAdam, torch.optim.AdamW: _PinnedAdam, torch.optim.SGD: _PinnedSgd}
PINNED = {kind: type(f"Pinned{kind.__name__}", (mixin, kind), {}) for kind, mixin in _MIXINS.items()}


def _write(update: Update, rows: Tensor, param: Tensor, grad: Tensor, states: Any) -> None:
    weight = _local(param)
    by = rows[0].to(weight.device)
    weight.copy_(updated(update, by, _local(grad).float(), weight, [_local(state) for state in states]))


def _local(tensor: Any) -> Tensor:
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()
