"""What autograd hands to the parameters of a model, added up in FP64: the truth for tests that train one."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn


class MicroGradients:
    """Sums in FP64 of all gradients that arrive at the parameters of ``model`` from now on.

    A hook on a tensor runs before autograd adds its gradient to ``.grad``, so attached and stock runs hand in the same
    values while their weights are the same.
    """

    def __init__(self, model: nn.Module) -> None:
        self.params = {name: param for name, param in model.named_parameters() if param.requires_grad}
        self.sums = {name: torch.zeros_like(param, dtype=torch.float64) for name, param in self.params.items()}
        for name, param in self.params.items():
            param.register_hook(functools.partial(self._add, name))

    def _add(self, name: str, grad: Tensor) -> None:
        self.sums[name] += grad

    def norm(self) -> float:
        """Return the norm of all sums as one vector."""
        return math.sqrt(sum(float(total.square().sum()) for total in self.sums.values()))

    def error(self) -> float:
        """Return the relative L2 error of ``.grad`` against the sums."""
        difference = 0.0
        for name, param in self.params.items():
            grad = torch.zeros_like(param) if param.grad is None else param.grad
            difference += float((grad.double() - self.sums[name]).square().sum())
        return math.sqrt(difference) / self.norm()


def assert_same_weights(found: nn.Module, expected: nn.Module) -> None:
    """Assert that two models have the same parameters, bit for bit."""
    theirs = dict(expected.named_parameters())
    for name, param in found.named_parameters():
        assert torch.equal(param.detach(), theirs[name].detach()), f"{name} differs"
