"""Training where launches decide: a small GPT with tiny micro-batches, stock bf16 against split24 by each backend."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import torch
from overhead_hook import STOCK
from regimes import MAX_NORM, Regime
from torch import nn
from turns import Clocked, by_turns, clocked, compared

import accumkern
from designs import Split24, StockBF16
from train_gpt import GPT

MICRO_BATCH, WINDOW = "micro-batch", "window"


class OnBackend(Split24):
    """Stock PyTorch and one line, which names the backend."""

    def __init__(self, model: nn.Module, backend: str, max_norm: float) -> None:
        super().__init__(model, max_norm=max_norm)
        self.backend = backend

    def attach(self) -> accumkern.GradAccumulator:
        """Attach to the optimizer."""
        return accumkern.attach(self.optimizer, self.buffer, backend=self.backend)


def measure(
    regime: Regime, device: torch.device, backends: list[str], share: Callable[[], float]
) -> list[dict[str, Any]]:
    """Return results of stock and of each backend: of a micro-batch, and of a window, by each clock."""
    variants = {STOCK: None, **{backend: backend for backend in backends}}
    makers = {name: partial(make_window, regime, device, backend) for name, backend in variants.items()}
    case = {"model": "training", "parameters": len(list(new_model(regime, torch.device("meta")).parameters()))}
    return [case | result for result in compared(by_turns(makers, share), [STOCK])]


def new_model(regime: Regime, device: torch.device) -> nn.Module:
    """Return the model, with the same weights each time."""
    torch.manual_seed(0)
    with device:
        return GPT(regime.width, regime.layers, regime.heads, regime.context)


def make_window(regime: Regime, device: torch.device, backend: str | None) -> Callable[[], Clocked]:
    """Return a function that trains for a window and returns the times of it and of its second and later micro-batches.

    Args:
        regime: model and micro-batches.
        device: where they are.
        backend: what accumkern folds with; None leaves accumulation to torch.
    """
    model = StockBF16.cast(new_model(regime, device))
    design = StockBF16(model, max_norm=MAX_NORM) if backend is None else OnBackend(model, backend, MAX_NORM)
    shape = (regime.batch_size, regime.context + 1)
    window = [torch.randint(256, shape, device=device) for _ in range(regime.micro_batches)]
    design.begin()

    def run_micro_batch(number: int) -> None:
        design.backward(design.model(window[number]) / len(window), last=number == len(window) - 1)

    def run_window() -> Clocked:
        micro_batches = [clocked(partial(run_micro_batch, number), device) for number in range(len(window))]
        step = clocked(design.step, device)
        times: Clocked = {}
        for clock in step:
            of_batches = [milliseconds[clock] for milliseconds in micro_batches]
            times[MICRO_BATCH, clock] = of_batches[1:]  # the first keeps the gradient
            times[WINDOW, clock] = [sum(of_batches) + step[clock]]
        return times

    run_window()  # allocates and compiles
    return run_window
