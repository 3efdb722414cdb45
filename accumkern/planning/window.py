"""The windows that everything here is measured with: micro-batches, forward and backward, and an optimizer step."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from accumkern.accumulator import GradAccumulator
from accumkern.wiring import attach
from accumkern.formats import BUFFERS
from accumkern.planning.protocol import Setup, compute_loss


def choose_buffer(setup: Setup, buffer: str | None) -> str | None:
    """Return the ``buffer`` for :func:`accumkern.attach`, or None where stock PyTorch accumulates in FP32 already.

    Args:
        setup: whose trainable parameters decide: ``"split24"`` where some are bfloat16, ``"fp32"`` where float16.
        buffer: what the user asked for; None chooses.

    Raises:
        ValueError: ``buffer`` is unknown.
    """
    if buffer is not None and buffer not in BUFFERS:
        raise ValueError(f"buffer is {buffer!r}; it must be one of {', '.join(BUFFERS)}, or None to choose")
    dtypes = {param.dtype for param in setup.model.parameters() if param.requires_grad}
    if not dtypes & {torch.bfloat16, torch.float16}:
        return None
    return buffer or ("fp32" if torch.float16 in dtypes else "split24")


def accumulation(setup: Setup, buffer: str | None, micro_batches: int) -> AbstractContextManager[object]:
    """Return a block in which the setup's gradients are accumulated, and averaged over ``micro_batches``, in FP32."""
    if buffer is None or micro_batches == 1:
        return nullcontext()
    return attach(setup.optimizer, buffer, average_over=micro_batches)


def accumulate(setup: Setup, batches: Iterable[Any], micro_batches: int, accumulator: object) -> list[torch.Tensor]:
    """Run forward and backward over the batches of a window; return the loss of each, on the device.

    Args:
        setup: what to train.
        batches: of the window.
        micro_batches: how many they are.
        accumulator: what the block of :func:`accumulation` gave: it averages, or else the loss is divided.
    """
    losses = []
    for batch in batches:
        loss = compute_loss(setup, batch)
        losses.append(loss.detach())
        (loss if isinstance(accumulator, GradAccumulator) else loss / micro_batches).backward()
        del loss, batch
    return losses


def train_window(setup: Setup, batches: Iterable[Any], micro_batches: int, accumulator: object) -> list[torch.Tensor]:
    """Accumulate a window, step, and begin a new one; return the losses.

    Raises:
        ValueError: no parameter of the optimizer got a gradient.
    """
    losses = accumulate(setup, batches, micro_batches, accumulator)
    if all(param.grad is None for group in setup.optimizer.param_groups for param in group["params"]):
        raise ValueError(
            "loss of setup() gives no parameter of the optimizer a gradient; compute it with the model that it is given"
        )
    setup.optimizer.step()
    setup.optimizer.zero_grad()
    return losses


def now(setup: Setup) -> float:
    """Return the time in seconds, after the device has done all that it was given."""
    if setup.device.type == "cuda":
        torch.cuda.synchronize(setup.device)
    return time.perf_counter()
