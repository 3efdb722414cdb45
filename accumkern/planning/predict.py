"""What would fit elsewhere: peak memory by category, from a window on fake tensors, which have shapes but no memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from accumkern import backends
from accumkern.checks import one_of
from accumkern.out_of_memory import format_bytes
from accumkern.planning.fakes import StepValues
from accumkern.planning.kernels import GpuKernels, block_bytes, workspace_bytes
from accumkern.planning.precision import accumulation
from accumkern.planning.protocol import Setup, make_batch, step
from accumkern.planning.tracker import MemoryTracker
from accumkern.planning.trial import accumulate, train_window
from accumkern.stand_ins import as_on
from accumkern.torch_private import pop_mode_temporarily

#: What can be predicted for, and what the plan says of the machine then.
DEVICES = {"cpu": "none: predicted for a CPU on fake tensors", "cuda": "none: predicted for a GPU on fake tensors"}


@dataclass(frozen=True)
class Memory:
    """Bytes at the moment of the peak, by what they are for.

    Attributes:
        parameters: with buffers.
        gradients: ``.grad``, and a new gradient that is just being folded.
        residuals: what accumkern keeps beside ``.grad``.
        master_residuals: what it keeps beside the weights.
        optimizer_state: with what its step needs for a moment, such as FP32 weights and gradients of a bucket.
        activations: with the batch, gradients of activations, and results of operations that are needed for a moment.
        kernels: what the kernel that runs then needs inside itself, such as copies in another layout: as much as is
            known of torch's CPU kernels. Those of a GPU may need less. With what cuBLAS keeps on a GPU.
    """

    parameters: int
    gradients: int
    residuals: int
    master_residuals: int
    optimizer_state: int
    activations: int
    kernels: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class Prediction:
    """What a micro-batch needs, from fake tensors.

    Attributes:
        micro_batch: samples in it.
        memory: at the peak, by category; its total decides what fits.
        low: bytes of the peak where kernels need nothing inside themselves.
    """

    micro_batch: int
    memory: Memory
    low: int


def choose_device(setup: Setup, device: str | None) -> str:
    """Return the kind of device to predict for: what was asked for, or else a GPU.

    Raises:
        TypeError, ValueError: ``device`` is neither ``"cpu"`` nor ``"cuda"``, or ``"cpu"`` for a model on a GPU.
    """
    if device is not None:
        one_of("device", device, DEVICES, ", or None")
    if device == "cpu" and setup.device.type != "cpu":
        raise ValueError(f"device is 'cpu', and setup() puts the model on {setup.device}; let it choose the CPU")
    return device or "cuda"


def predict(
    setup: Setup,
    micro_batch: int,
    buffer: str | None,
    micro_batches: int = 2,
    master_weights: str | None = None,
    device: str | None = None,
) -> Prediction:
    """Return the peak memory of training with a micro-batch, without having that memory.

    Two windows run, with the optimizer's step; all that there is counts in the second. CUDA's own context is not in it,
    and neither are workspaces of cuDNN.

    Args:
        setup: of the block of :func:`accumkern.planning.fakes.fake_setup`, and inside it.
        micro_batch: samples in a micro-batch, of the longest.
        buffer: of :func:`accumkern.attach`; None accumulates as stock PyTorch does.
        micro_batches: in a window; 1 accumulates nothing.
        master_weights: of :func:`accumkern.attach`.
        device: ``"cpu"`` or ``"cuda"``; None takes that of the model. For a GPU, memory counts in the blocks of its
            allocator, with the workspaces of cuBLAS, optimizers step several parameters at a time where they would
            there, and a model on the CPU has a GPU's attention, dropout and RMSNorm.
    """
    device = device or setup.device.type
    tracker = MemoryTracker()
    if device == "cuda":
        tracker = MemoryTracker(block_bytes, partial(workspace_bytes, device=setup.device))

    def batches() -> Iterator[Any]:
        # A batch counts, but not the data that it is cut from, which was there before.
        for _ in range(micro_batches):
            with pop_mode_temporarily():
                batch = make_batch(setup, micro_batch, "longest_batch")
            tracker.count("activations", batch)
            yield batch
            del batch

    # The hooks run, and allocate what they do in training; fake tensors have nothing that kernels could read.
    with (
        backends.without_kernels(),
        StepValues(),
        as_on(device),
        _several_at_a_time(setup) if device == "cuda" else nullcontext(),
        GpuKernels() if (device, setup.device.type) == ("cuda", "cpu") else nullcontext(),
        accumulation(setup, buffer, micro_batches, master_weights, backend="eager") as accumulator,
    ):
        setup.optimizer.zero_grad()  # what an attempt that failed has left
        for _ in range(micro_batches):
            accumulate(setup, make_batch(setup, micro_batch, "longest_batch"), micro_batches, accumulator)
        with tracker:
            step(setup)  # what a step keeps for the next one counts from here on
        state = {} if accumulator is None else accumulator.state_dict()
        setup.optimizer.zero_grad()
        tracker.count("residuals", state.get("residuals", {}))
        tracker.count("master_residuals", state.get("master_weights", {}).get("residuals", {}))
        tracker.count("parameters", [*setup.model.parameters(), *setup.model.buffers()])
        tracker.count("optimizer_state", list(setup.optimizer.state.values()))
        del state  # which holds gradients
        with tracker.gradients_of(setup.model), tracker:
            train_window(setup, batches(), micro_batches, accumulator)
    return Prediction(micro_batch, Memory(**tracker.peak), tracker.low)


@contextmanager
def _several_at_a_time(setup: Setup) -> Iterator[None]:
    """Let torch's optimizers step in the way that they choose by themselves where parameters are on a GPU."""
    groups = [
        group
        for group in setup.optimizer.param_groups
        if type(setup.optimizer).__module__.startswith("torch.optim.")
        and not isinstance(setup.optimizer, torch.optim.Adafactor)  # which takes one at a time there too
        and group.get("foreach", False) is None
        and not group.get("fused")
    ]
    for group in groups:
        group["foreach"] = True
    try:
        yield
    finally:
        for group in groups:
            group["foreach"] = None


def smallest_size(attempt: Callable[[int], object], at_most: int) -> int:
    """Return the first of a few small sizes that an attempt with it does not raise for: 1, or one that BatchNorm needs.

    Raises:
        RuntimeError: of the first attempt, where all fail.
    """
    first: RuntimeError | None = None
    for size in [size for size in (1, 2, 4, 8) if size <= at_most]:
        try:
            attempt(size)
        except RuntimeError as error:
            first = first or error
        else:
            return size
    assert first is not None
    raise first


def no_fit(of: Prediction, limit_bytes: int, margin: float) -> str:
    """Return what an error says where the smallest micro-batch is too large."""
    memory, samples = of.memory, "one sample needs" if of.micro_batch == 1 else f"{of.micro_batch} samples need"
    return (
        f"no micro-batch would fit into {format_bytes(limit_bytes)} with a margin of {margin:.0%}: {samples} "
        f"{format_bytes(memory.total)}, of which parameters {format_bytes(memory.parameters)}, their master weights "
        f"{format_bytes(memory.master_residuals)}, gradients and residuals "
        f"{format_bytes(memory.gradients + memory.residuals)}, optimizer state "
        f"{format_bytes(memory.optimizer_state)}; take more memory, a smaller model, or activation checkpointing"
    )
