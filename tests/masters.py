"""A small model, its micro-batches, and the same training on FP32 weights: what master weights are compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pinned import pinned
from torch import Tensor, nn

import accumkern
from accumkern.formats import Format, encode

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def fp32_model(device: str = "cpu") -> nn.Module:
    """Return FP32 weights, always the same."""
    torch.manual_seed(0)
    layers = nn.Linear(24, 40), nn.LayerNorm(40), nn.Linear(40, 33, bias=False), nn.Linear(33, 24)
    return nn.Sequential(*layers).to(device)


def backward(model: nn.Module, step: int, micro_batches: int = 3) -> None:
    """Run the backward passes of a window."""
    generator = torch.Generator().manual_seed(step)
    for _ in range(micro_batches):
        batch = torch.randn(8, 24, generator=generator, dtype=torch.float32).bfloat16()
        model(batch.to(next(model.parameters()).device)).square().mean().backward()


class Masters:
    """Training bfloat16 weights with accumkern's master weights."""

    def __init__(self, make: Make, buffer: str = "split32", device: str = "cpu", **options: Any) -> None:
        self.model = accumkern.to_bfloat16(fp32_model(device))
        self.params = list(self.model.parameters())
        self.optimizer = make(self.params)
        options.setdefault("master_weights", "split32")
        self.acc = accumkern.attach(self.optimizer, buffer, **options)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.95)

    def window(self, step: int) -> None:
        """Train on one window, as users do."""
        backward(self.model, step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.model.zero_grad()  # of parameters that the optimizer has not
        self.scheduler.step()

    def masters(self) -> list[Tensor]:
        """Return the FP32 weights."""
        stepped = {id(param) for group in self.optimizer.param_groups for param in group["params"]}
        return [
            self.acc.master_weight(param) if id(param) in stepped else param.detach().float() for param in self.params
        ]


class Reference:
    """The same optimizer on FP32 weights, which are rounded to bfloat16 for the forward pass.

    Gradients are accumulated by accumkern: what is compared is the step. They are rounded as the format says: ties go
    away from zero, one of 2^16 weights in a step.
    """

    def __init__(self, make: Make, buffer: str = "split32", device: str = "cpu") -> None:
        self.model = accumkern.to_bfloat16(fp32_model(device))
        self.params = list(self.model.parameters())
        self.acc = accumkern.attach(torch.optim.SGD(self.params, lr=0.0), buffer)
        self.fp32 = list(fp32_model(device).parameters())
        self.optimizer = pinned(make(self.fp32))
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.95)

    def window(self, step: int) -> None:
        """Train on one window."""
        backward(self.model, step)
        self.step()

    def step(self, divide_by: float = 1.0, factor: float | Tensor = 1.0) -> None:
        """Step the FP32 weights with ``gradient / divide_by * factor``, and round them."""
        for param, weight in zip(self.params, self.fp32, strict=True):
            gradient = self.acc.gradient(param)
            weight.grad = None if gradient is None else gradient / divide_by * factor
        self.optimizer.step()
        self.model.zero_grad()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for param, weight in zip(self.params, self.fp32, strict=True):
                param.copy_(encode(Format.SPLIT32, weight.detach())[0])
        self.scheduler.step()

    def masters(self) -> list[Tensor]:
        """Return the FP32 weights."""
        stepped = {id(param) for group in self.optimizer.param_groups for param in group["params"]}
        return [
            weight.detach() if id(weight) in stepped else param.detach().float()
            for weight, param in zip(self.fp32, self.params, strict=True)
        ]


def assert_equal(a: list[Tensor], b: list[Tensor]) -> None:
    """Assert that tensors are the same, bit for bit."""
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        assert x.dtype is y.dtype
        assert torch.equal(x, y), f"tensor {i}: {int((x != y).sum())} of {x.numel()} differ"


class OwnAdamW(torch.optim.AdamW):
    """A class of somebody's own, which is stepped in buckets by torch's arithmetic."""


def own_adamw(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Return that AdamW, with a large learning rate."""
    return OwnAdamW(params, lr=1e-3)


def adamw(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Return AdamW with a large learning rate."""
    return torch.optim.AdamW(params, lr=1e-3)
