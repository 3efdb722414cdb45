"""The host time of ``finish(max_norm=1)`` on few and on many small gradients, against torch's clipping."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from overhead_hook import Bare
from turns import Clocked, by_turns, clocked, compared

import accumkern

COUNTS = (1, 148)  # the second as GPT-2 has them
MAX_NORM = 1.0
MICRO_BATCHES = 2  # the second leaves residuals
CLIP, MEAN_AND_CLIP = "clip_grad_norm_", "_foreach_div_, clip_grad_norm_"
FINISH = "finish"


def measure(count: int, device: torch.device, backends: list[str], share: Callable[[], float]) -> list[dict[str, Any]]:
    """Return results of torch's two ways and of each backend, on ``count`` gradients, by each clock."""
    variants = {CLIP: None, MEAN_AND_CLIP: None, **{backend: backend for backend in backends}}
    makers = {name: partial(make_finish, name, count, device, backend) for name, backend in variants.items()}
    case = {"model": "finish", "parameters": count}
    return [case | result for result in compared(by_turns(makers, share), [CLIP, MEAN_AND_CLIP])]


def make_finish(name: str, count: int, device: torch.device, backend: str | None) -> Callable[[], Clocked]:
    """Return a function that accumulates a window, ends it and returns the time of that end.

    Args:
        name: which of torch's ways, where there is no backend.
        count: number of gradients.
        device: where they are.
        backend: accumkern's; None leaves accumulation to torch.
    """
    torch.manual_seed(0)
    model = Bare(count).to(device)
    params = list(model.params)
    optimizer = torch.optim.SGD(params)
    acc = None if backend is None else accumkern.attach(optimizer, backend=backend)

    def end() -> None:
        if acc is not None:
            acc.finish(max_norm=MAX_NORM)
            return
        if name == MEAN_AND_CLIP:
            torch._foreach_div_([param.grad for param in params if param.grad is not None], float(MICRO_BATCHES))
        torch.nn.utils.clip_grad_norm_(params, MAX_NORM, foreach=True)

    def run_window() -> Clocked:
        optimizer.zero_grad()
        for _ in range(MICRO_BATCHES):
            model().backward()
        return {(FINISH, clock): [milliseconds] for clock, milliseconds in clocked(end, device).items()}

    run_window()  # allocates and compiles
    return run_window
