"""What the tests of sweeps share; worker processes import the setups from here."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import accumkern
from accumkern.planning import sweep_training
from accumkern.planning.protocol import Setup
from accumkern.planning.sweep_result import Sweep
from accumkern.planning.sweep_runs import Point, Run
from accumkern.planning.sweep_settings import VALIDATION_SEED

TRUTH = torch.linspace(-1, 1, 8)


def regression(learning_rate: float = 0.05, **fields: Any) -> Setup:
    """Linear regression with noise: it learns at once, and diverges with a large learning rate."""
    model = nn.Linear(8, 1, bias=False)

    def make(size: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(size, 8)
        return x, x @ TRUTH + 0.1 * torch.randn(size)

    setup = Setup(
        model,
        torch.optim.SGD(model.parameters(), lr=learning_rate),
        make,
        lambda model, batch: (model(batch[0])[:, 0] - batch[1]).square().mean(),
    )
    return setup._replace(**fields)


def adam() -> Setup:
    setup = regression()
    return setup._replace(optimizer=torch.optim.Adam(setup.model.parameters(), lr=0.01, betas=(0.9, 0.99)))


def decaying(**settings: Any) -> Setup:
    """Return the regression with AdamW, whose weight decay is decoupled."""
    made = regression()
    arguments = {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.1} | settings
    return made._replace(optimizer=torch.optim.AdamW(made.model.parameters(), **arguments))


def short(**fields: Any) -> Setup:
    """Return the regression in bfloat16."""
    setup = regression()
    setup.model.to(torch.bfloat16)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (model(batch[0].bfloat16())[:, 0].float() - batch[1]).square().mean()

    optimizer = torch.optim.SGD(setup.model.parameters(), lr=1e-3)
    return setup._replace(**({"optimizer": optimizer, "loss": loss} | fields))


def failing() -> Setup:
    """A setup whose third batch of 16 fails, with an error that cannot be handed to another process."""
    made, drawn = regression(), 0

    class StrangeError(Exception):
        def __init__(self, one: int, other: int) -> None:
            super().__init__(f"{one} and {other}")

    def loss(model: nn.Module, batch: Any) -> Tensor:
        nonlocal drawn
        drawn += len(batch[0]) == 16 and torch.is_grad_enabled()
        if drawn > 2:
            raise StrangeError(1, 2)
        return made.loss(model, batch)

    return made._replace(loss=loss)


def dying() -> Setup:
    """A setup whose training with effective batches of 16 ends the process."""
    made = regression()

    def make(size: int) -> Any:
        if size == 16 and torch.initial_seed() != VALIDATION_SEED ^ 2**31 and multiprocessing.parent_process():
            os.kill(os.getpid(), signal.SIGKILL)
        return made.make_batch(size)

    return made._replace(make_batch=make)


def small(setup: Callable[[], Any], folder: Path, **arguments: Any) -> Sweep:
    defaults: dict[str, Any] = {"micro_batch": 4, "evaluations": 4, "validation_samples": 32}
    return accumkern.sweep(setup, [4, 16], 64, folder, **(defaults | arguments))


@pytest.fixture(name="groups")
def seen_groups(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The settings of each optimizer that a run trains with."""
    seen: list[dict[str, Any]] = []
    original = sweep_training.train

    def training(setup: Setup, *rest: Any) -> Any:
        seen.append(dict(setup.optimizer.param_groups[0]))
        return original(setup, *rest)

    monkeypatch.setattr(sweep_training, "train", training)
    return seen


def run(batch: int, losses: list[float], seconds: float, **fields: Any) -> Run:
    points = tuple(Point(100 * i, seconds * i, loss) for i, loss in enumerate(losses))
    made = Run(batch, 4, batch // 4, "sqrt", 0, 0.1, "finished", 10, points[-1].seconds, 1000, points)
    return dataclasses.replace(made, **fields)


def noisy(batch: int, end: float, noise: float, seed: int = 0, **fields: Any) -> Run:
    """A run of 20 evaluations that goes down from 5 to about ``end``."""
    drawn = random.Random(1000 * batch + seed)
    bias, losses = drawn.gauss(0, noise), [5 + (end - 5) * min(1, i / 12) for i in range(21)]
    return run(
        batch, [losses[0], *(loss + bias + drawn.gauss(0, noise) for loss in losses[1:])], 1.0, seed=seed, **fields
    )


def sweep_of(runs: list[Run], **fields: Any) -> Sweep:
    return Sweep(tuple(runs), None, None, 4, **fields)
