"""The optimizers' updates of FP32 weights in plain torch: the reference that every backend's step is compared with.

They are those of ``torch.optim``'s ``Adam``, ``AdamW`` and ``SGD``, in IEEE binary32 with their roundings pinned:
products and sums round one by one, ``fma`` once; square roots and quotients are rounded correctly. With ``g`` the
gradient, ``w`` the weight, ``m``, ``v`` and ``b`` the states, and a tensor's coefficients as :func:`adam_coefficients`
and :func:`sgd_coefficients` make them::

    Adam    g = sign * g;  g = fma(coupled_decay, w, g)
            m = fma(1 - beta1, g - m, m)                    from g, fma(-beta1, g - m, g), where beta1 is at most 1/2
            v = fma((1 - beta2) * g, g, beta2 * v)
            u = (step_size * m) / (sqrt(v) / root_of_correction2 + eps)       of the greatest v so far with amsgrad
            w = w - fma(decay, w, u)
    SGD     g = sign * g;  g = fma(decay, w, g)
            b = fma(1 - dampening, g, momentum * b);  g = b     with Nesterov's momentum fma(nesterov_momentum, b, g)
            w = fma(-learning_rate, g, w)

A decay of zero is left out, so that an infinite weight stays what it is. ``1 - beta`` is rounded once, from FP64: taken
as ``1 - float32(beta)``, it would be wrong by up to 3e-5 of itself for a beta of 0.999.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from accumkern.formats import fma, to_fp64, widest

#: FP32 numbers that a tensor's update is made with. Shared with csrc/accumulate.h.
COEFFICIENTS = 9


class Update(IntEnum):
    """What a step computes. The numbers are shared with csrc/accumulate.h.

    Attributes:
        states: torch's names of the FP32 tensors that an optimizer keeps for each parameter.
    """

    ADAM = 0, ("exp_avg", "exp_avg_sq")
    AMSGRAD = 1, ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    SGD = 2, ()
    MOMENTUM = 3, ("momentum_buffer",)

    states: tuple[str, ...]

    def __new__(cls, number: int, states: tuple[str, ...]) -> Update:
        """Make a member that knows its states."""
        member = int.__new__(cls, number)
        member._value_ = number
        member.states = states
        return member


#: The most states that an update has. Shared with csrc/accumulate.h.
MAX_STATES = max(len(update.states) for update in Update)


def updated(update: Update, by: Tensor, grad: Tensor, weight: Tensor, states: list[Tensor]) -> Tensor:
    """Return the new FP32 weight, and write the states.

    Args:
        update: which one.
        by: ``(COEFFICIENTS,)``, FP32: a row of what the functions below return.
        grad: any shape, FP32.
        weight: the same.
        states: the same, as ``update.states`` names them.
    """
    if update in (Update.ADAM, Update.AMSGRAD):
        sign, coupled_decay, decay, one_minus_beta1, beta2, one_minus_beta2, root_of_correction2, eps, step_size = by
        m, v = states[:2]
        g = _with_decay(coupled_decay, weight, sign * grad)
        from_m = one_minus_beta1 < 0.5
        m.copy_(fma(torch.where(from_m, one_minus_beta1, one_minus_beta1 - 1), g - m, torch.where(from_m, m, g)))
        v.copy_(fma(one_minus_beta2 * g, g, beta2 * v))
        if update is Update.AMSGRAD:
            # torch.maximum, but for which of two zeros it takes, which depends on the processor.
            v = states[2].copy_(torch.where((states[2] >= v) | states[2].isnan(), states[2], v))
        u = (step_size * m) / (_square_root(v) / root_of_correction2 + eps)
        return weight - _with_decay(decay, weight, u)
    sign, decay, momentum, one_minus_dampening, nesterov_momentum, learning_rate = by[:6]
    g = _with_decay(decay, weight, sign * grad)
    if update is Update.MOMENTUM:
        b = states[0].copy_(fma(one_minus_dampening, g, momentum * states[0]))
        g = torch.where(nesterov_momentum == 0, b, fma(nesterov_momentum, b, g))
    return fma(-learning_rate, g, weight)


def _with_decay(decay: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    return torch.where(decay == 0, x, fma(decay, weight, x))


def _square_root(x: Tensor) -> Tensor:
    """Return the square root of an FP32 tensor, rounded correctly: torch's own on a CPU is not."""
    return to_fp64(x).sqrt().to(torch.float32).to(x.device)


@torch.no_grad()
def adam_coefficients(group: Mapping[str, Any], steps: Tensor) -> Tensor:
    """Return a row of coefficients for each tensor: ``(len(steps), COEFFICIENTS)``, FP32, on the device of ``steps``.

    Args:
        group: the options of an Adam's or AdamW's parameter group. What is a tensor has one element, and is on the
            CPU or on the device of ``steps``.
        steps: of each tensor, this one counted.
    """
    steps = steps.to(widest(steps.device))
    lr, weight_decay, (beta1, beta2) = group["lr"], group["weight_decay"], group["betas"]
    is_decoupled = group["decoupled_weight_decay"]
    rows = torch.zeros(len(steps), COEFFICIENTS, dtype=steps.dtype, device=steps.device)
    rows[:, 0] = -1 if group["maximize"] else 1
    rows[:, 1] = 0 if is_decoupled else weight_decay
    rows[:, 2] = lr * weight_decay if is_decoupled else 0
    rows[:, 3] = 1 - beta1
    rows[:, 4] = beta2
    rows[:, 5] = 1 - beta2
    rows[:, 6] = (1 - beta2**steps).sqrt()
    rows[:, 7] = group["eps"]
    rows[:, 8] = lr / (1 - beta1**steps)
    return rows.float()


@torch.no_grad()
def sgd_coefficients(group: Mapping[str, Any], is_first: Tensor) -> Tensor:
    """Return a row of coefficients for each tensor: ``(len(is_first), COEFFICIENTS)``, FP32, where ``is_first`` is.

    Args:
        group: the options of an SGD's parameter group; a tensor as learning rate as in :func:`adam_coefficients`.
        is_first: of each tensor, bool: whether it has no momentum yet. Its momentum buffer is zero then.
    """
    rows = torch.zeros(len(is_first), COEFFICIENTS, dtype=widest(is_first.device), device=is_first.device)
    rows[:, 0] = -1 if group["maximize"] else 1
    rows[:, 1] = group["weight_decay"]
    rows[:, 2] = group["momentum"]
    rows[:, 3] = 1 - group["dampening"]
    rows[:, 4] = group["momentum"] if group["nesterov"] else 0
    rows[:, 5] = group["lr"]
    rows[:, 2].masked_fill_(is_first, 0)
    rows[:, 3].masked_fill_(is_first, 1)
    return rows.float()
