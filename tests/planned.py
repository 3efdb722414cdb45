"""What the tests of plans and sweeps share."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import pytest
import torch
import torch._dynamo  # the first step of an optimizer does; by then old objects are set aside
from torch import Tensor, nn

from accumkern.planning.protocol import Setup


@pytest.fixture(scope="module")
def old_objects_aside() -> Iterator[None]:
    """The collector then looks at none of what other tests have imported and made; each plan and run calls it."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class Hungry(nn.Module):
    """Keeps 100 kB per sample for its backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(25000))

    def forward(self, batch: Tensor) -> Tensor:
        return (batch * self.weight).square().mean()


def hungry(
    loss: Callable[[nn.Module, Tensor], Tensor] = lambda model, batch: model(batch), device: str | torch.device = "cpu"
) -> Setup:
    model = Hungry().to(device)
    return Setup(
        model, torch.optim.Adam(model.parameters()), lambda size: torch.randn(size, 25000, device=device), loss
    )
