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


class _Pinned:
    def step(self: Any, _closure: None = None) -> None:
        """Step each parameter that has a gradient; as torch does, where that is a sum over ranks still to be taken."""
        params = [param for group in self.param_groups for param in group["params"]]
        pending = {param for param in params if _is_pending(param.grad)}
        grads = {param: param.grad for param in params}
        if pending:
            for param in params:
                param.grad = grads[param] if param in pending else None
            super().step()  # type: ignore[misc]
        for param in params:
            param.grad = None if param in pending else grads[param]
        self.step_others()


class _PinnedAdam(_Pinned):
    @torch.no_grad()
    def step_others(self: Any) -> None:
        """Step each parameter that has a gradient."""
        for group in self.param_groups:
            params, grads, exp_avgs, exp_avg_sqs, maxima, steps = lists = [[] for _ in range(6)]
            self._init_group(group, *lists)
            update = Update.AMSGRAD if group["amsgrad"] else Update.ADAM
            columns = [exp_avgs, exp_avg_sqs, *([maxima] if group["amsgrad"] else [])]
            for param, grad, step, *of_param in zip(params, grads, steps, *columns, strict=True):
                step += 1
                _write(update, adam_coefficients(group, step.reshape(1)), param, grad, of_param)


class _PinnedSgd(_Pinned):
    @torch.no_grad()
    def step_others(self: Any) -> None:
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


def _is_pending(grad: Any) -> bool:
    return isinstance(grad, DTensor) and any(placement.is_partial() for placement in grad.placements)


def _local(tensor: Any) -> Tensor:
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()
