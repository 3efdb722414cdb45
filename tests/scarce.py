"""Memory that runs out where a test says: a layer that takes so many samples and no more, forward or backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def _ran_out(samples: int) -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {samples} samples.")


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Scarce) -> Tensor:
        ctx.layer = layer
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.layer.meet(len(grad))
        return grad, None


class Scarce(nn.Module):
    """The identity for at most `most` samples; with more, memory runs out.

    Attributes:
        seen: the samples of each pass that got here.
        after: so many passes go through, whatever they are, before `most` counts.
    """

    def __init__(self, most: int, where: str = "forward", after: int = 0) -> None:
        super().__init__()
        assert where in ("forward", "backward")
        self.most, self.where, self.after = most, where, after
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.where == "backward":
            return _Backward.apply(x, self)
        self.meet(len(x))
        return x

    def meet(self, samples: int) -> None:
        self.seen.append(samples)
        if samples > self.most and len(self.seen) > self.after:
            raise _ran_out(samples)
