"""The host time of AdamW's step on many small weights: of FP32 ones, and of bfloat16 ones with masters in them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from overhead_finish import MICRO_BATCHES
from overhead_hook import Bare
from processes import outcome_of_ranks
from torch.distributed.fsdp import fully_shard
from turns import Clocked, by_turns, clocked, compared

import accumkern

COUNT = 148  # as GPT-2 has them
PLAIN, SHARDED = "step", "step, fully_shard"
MODELS = (PLAIN, SHARDED)
#: torch's steps of FP32 weights, by the option of AdamW.
STOCK = {"foreach, FP32": {"foreach": True}, "fused, FP32": {"fused": True}}
MASTERS = "split32"


def measure(model: str, device: torch.device, backends: list[str], share: Callable[[], float]) -> list[dict[str, Any]]:
    """Return results of torch's two steps and of masters by each backend, by each clock.

    Args:
        model: one of ``MODELS``; one under ``fully_shard`` is alone in a process of its own.
        device: where the weights are.
        backends: of accumkern.
        share: returns the seconds.
    """
    if model == PLAIN:
        return of_variants(device, model, backends, share())
    results: list[dict[str, Any]] = outcome_of_ranks(of_variants, 1, device.type, model, backends, share())
    return results


def of_variants(device: torch.device, model: str, backends: list[str], seconds: float) -> list[dict[str, Any]]:
    """Return results of all variants, which take turns for some seconds."""
    torch.set_num_threads(1)
    makers = {name: partial(make_step, model, device, options, None) for name, options in STOCK.items()}
    makers |= {name: partial(make_step, model, device, {}, name) for name in backends}
    case = {"model": model, "parameters": COUNT}
    return [case | result for result in compared(by_turns(makers, lambda: seconds), list(STOCK))]


def make_step(model: str, device: torch.device, options: dict[str, Any], backend: str | None) -> Callable[[], Clocked]:
    """Return a function that accumulates a window, and returns the time of the step that ends it.

    Args:
        model: one of ``MODELS``.
        device: where the weights are.
        options: of AdamW.
        backend: accumkern's; None leaves FP32 weights to torch.
    """
    torch.manual_seed(0)
    weights = Bare(COUNT).float().to(device)
    if backend is not None:
        accumkern.to_bfloat16(weights)
    if model == SHARDED:
        fully_shard(weights)
    optimizer = torch.optim.AdamW(weights.params.parameters(), **options)
    if backend is not None:
        accumkern.attach(optimizer, backend=backend, master_weights=MASTERS)

    def run_window() -> Clocked:
        optimizer.zero_grad()
        for _ in range(MICRO_BATCHES):
            weights().backward()
        return {("step", clock): [milliseconds] for clock, milliseconds in clocked(optimizer.step, device).items()}

    for _ in range(3):  # makes states, and what later steps find
        run_window()
    return run_window
