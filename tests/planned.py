"""What the tests of plans and sweeps share."""

from __future__ import annotations

import copy
import gc
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # the first step of an optimizer does; by then old objects are set aside
from torch import Tensor, nn

from accumkern.planning import speed, trial
from accumkern.planning.protocol import Setup
from accumkern.torch_private import tree_leaves

ROOT = Path(__file__).resolve().parent.parent


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


class Clock:
    """Time that passes where a test says so, and not with the machine; the fixture ``clock``.

    A micro-batch takes 5 ms and 1 ms for each sample, times ``factor`` of its samples; a step takes ``of_step``. The
    process has ``cores`` while it passes.
    """

    def __init__(self) -> None:
        self.seconds, self.cpu_seconds = 0.0, 0.0
        self.of_step, self.cores = 0.005, 1.0
        self.factor: Callable[[int], float] = lambda size: 1.0

    def take(self, seconds: float) -> None:
        """Let time pass."""
        self.seconds += seconds
        self.cpu_seconds += self.cores * seconds

    def pass_with(self, setup: Setup) -> Setup:
        """Let time pass in a setup's losses and steps."""

        def loss(model: nn.Module, batch: Any) -> Tensor:
            size = tree_leaves(batch)[0].shape[0]
            self.take((0.005 + 0.001 * size) * self.factor(size))
            return setup.loss(model, batch)

        def step(*_: Any) -> None:
            self.take(self.of_step)

        setup.optimizer.register_step_post_hook(step)
        return setup._replace(loss=loss)


@pytest.fixture(name="clock")
def clock_of_the_test(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Tell time by a clock of the test's, on a machine that is idle."""
    made = Clock()
    monkeypatch.setattr(trial, "now", lambda setup: made.seconds)
    monkeypatch.setattr(trial, "cpu_now", lambda: made.cpu_seconds)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    return made


@pytest.fixture
def short_timings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time a size for a moment."""
    monkeypatch.setattr(speed, "LEAST_SECONDS", 0.02)


def mlp(dtype: torch.dtype = torch.bfloat16, width: int = 64) -> Setup:
    model = nn.Sequential(nn.Linear(16, width), nn.GELU(), nn.Linear(width, 4)).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return Setup(
        model,
        optimizer,
        lambda size: torch.randn(size, 16, dtype=dtype),
        lambda model, batch: model(batch).float().square().mean(),
    )


class Conv(nn.Module):
    """Convolutions whose CPU kernels need memory of their own, and BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1)
        )
        self.head = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.layers(images).mean((2, 3)))


def conv() -> Setup:
    model = Conv()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return Setup(
        model,
        optimizer,
        lambda size: (torch.randn(size, 3, 32, 32), torch.randint(10, (size,))),
        lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]),
    )


def gpt(layers: int = 1) -> Setup:
    sys.path.insert(0, str(ROOT / "examples"))
    from train_gpt import CONTEXT, GPT

    model = GPT(width=64, layers=layers).to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    text = torch.randint(256, (2**20,), dtype=torch.uint8)  # more than all the rest, and not part of it
    return Setup(
        model,
        optimizer,
        lambda size: text[: size * (CONTEXT + 1)].view(size, -1).long(),
        lambda model, batch: model(batch),
        tokens_per_sample=CONTEXT,
    )


def changed(**fields: Any) -> Any:
    return mlp()._replace(**fields)


def fingerprint(setup: Setup) -> Any:
    model, optimizer = setup.model, setup.optimizer
    return copy.deepcopy(
        (
            model.state_dict(),
            [p.grad for p in model.parameters()],
            [m.training for m in model.modules()],
            optimizer.state_dict(),
            torch.get_rng_state(),
            random.getstate(),
        )
    )


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)
