"""What accumulating costs and how exact it is: time, allocated memory, and distance from an FP64 sum.

Each function takes the designs of designs.py.
"""

from __future__ import annotations

import gc
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from designs import StockBF16


class AllocatorMeter:
    """What a piece of code allocates on a device, as the device's allocator reports it.

    On a GPU these are the counters of torch's caching allocator; on the CPU every single allocation and release, from
    the memory events of torch.profiler. All is counted from what was allocated at the beginning.

    Attributes:
        held_bytes: what was allocated at each :meth:`mark`.
        peak_bytes: the most that was allocated at any time before the first mark, between each two, and after the last.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.held_bytes: list[int] = []
        self.peak_bytes: list[int] = []

    def __enter__(self) -> AllocatorMeter:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it reports its start and end to stderr otherwise
            self._profile = torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU],
                profile_memory=True,
                acc_events=True,  # there is one cycle; torch 2.10 warns of others
            )
            self._profile.__enter__()
        return self

    def mark(self) -> None:
        """Note what is allocated now, and what was at most since the last mark."""
        if self.device.type == "cuda":
            self.held_bytes.append(torch.cuda.memory_allocated(self.device) - self._before)
            self.peak_bytes.append(torch.cuda.max_memory_allocated(self.device) - self._before)
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with torch.profiler.record_function("AllocatorMeter.mark"):
                pass

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.device.type == "cuda":
            self.peak_bytes.append(torch.cuda.max_memory_allocated(self.device) - self._before)
            return
        self._profile.__exit__(kind, value, traceback)
        if kind is not None:
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "trace.json")
            self._profile.export_chrome_trace(str(path))
            events = json.loads(path.read_text())["traceEvents"]
        marks = sorted(event["ts"] for event in events if event["name"] == "AllocatorMeter.mark")
        changes = sorted(
            (event["ts"], event["args"]["Bytes"])
            for event in events
            if event["name"] == "[memory]" and event["args"]["Device Type"] == 0
        )
        totals = list(accumulate((size for _, size in changes), initial=0))
        at_marks = [sum(ts <= mark for ts, _ in changes) for mark in marks]
        self.held_bytes = [totals[i] for i in at_marks]
        self.peak_bytes = [max(totals[i : j + 1]) for i, j in pairwise([0, *at_marks, len(totals) - 1])]


@dataclass(frozen=True)
class Memory:
    """Bytes that training needs.

    Attributes:
        resident: weights, their FP32 copies or what belongs to their masters, and the state of AdamW.
        held: sums of gradients and what belongs to them, after the last backward pass, when all activations are gone.
        peak: the most at any time, all included.
        peak_in_step: the most after the last backward pass, less ``resident``.
    """

    resident: int
    held: int
    peak: int
    peak_in_step: int


def measure_memory(
    make: Callable[[], StockBF16], batches: list[Tensor], device: torch.device, keep: bool = True
) -> Memory:
    """Run two windows of a new design, steps included, and return what was allocated: the second is like all others.

    Args:
        make: makes the design and its model.
        batches: the micro-batches of each window.
        device: where to run.
        keep: False throws every gradient away as soon as it is there.
    """
    with AllocatorMeter(device) as meter:
        design = make()
        design.backward(design.model(batches[0]), last=True)  # libraries allocate their workspaces on first use
        for param in design.params:
            param.grad = None
        design.make_state()
        if not keep:
            for param in design.params:
                param.register_post_accumulate_grad_hook(_throw_away)
        meter.mark()
        design.begin()
        run_micro_batches(design, batches, range(len(batches)))
        design.step()
        run_micro_batches(design, batches, range(len(batches)))
        meter.mark()
        design.step()
    resident, after_backward = meter.held_bytes
    _, peak, peak_in_step = meter.peak_bytes
    return Memory(resident, after_backward - resident, max(peak, peak_in_step), peak_in_step - resident)


def _throw_away(param: Tensor) -> None:
    param.grad = None


def run_micro_batches(design: StockBF16, window: list[Tensor], numbers: range) -> tuple[list[Tensor], list[float]]:
    """Run some micro-batches of a window, forward and backward; return the loss of each and the milliseconds.

    On a GPU, which works behind the program's back, the time of all is divided by their number.
    """
    device = window[0].device
    losses, times = [], []
    synchronize(device)
    begin = time.perf_counter()
    for number in numbers:
        loss = design.model(window[number])
        design.backward(loss / len(window), last=number == len(window) - 1)
        losses.append(loss.detach())
        if device.type == "cpu":
            end = time.perf_counter()
            times.append((end - begin) * 1e3)
            begin = end
    if device.type != "cpu":
        synchronize(device)
        times = [(time.perf_counter() - begin) * 1e3 / len(numbers)] * len(numbers)
    return losses, times


def timed(action: Callable[[], object], device: torch.device) -> float:
    """Do something; return the milliseconds that it took."""
    synchronize(device)
    begin = time.perf_counter()
    action()
    synchronize(device)
    return (time.perf_counter() - begin) * 1e3


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def relative_error(tensors: list[Tensor], truths: list[Tensor]) -> float:
    """Return ``||tensors - truths|| / ||truths||``, over all elements of all tensors, in FP64."""
    difference = sum((t.double() - s).square().sum().item() for t, s in zip(tensors, truths, strict=True))
    total = sum(s.square().sum().item() for s in truths)
    return float((difference / total) ** 0.5)


def measure_error(
    design: StockBF16, batches: list[Tensor], micro_batches: int
) -> tuple[dict[str, float], list[Tensor]]:
    """Accumulate ``batches``, and compare with an FP64 sum of the very gradients that autograd handed over.

    Returns:
        ``sum``: relative error of the sum after ``micro_batches``; ``optimizer``: that of what AdamW would read then.
        And the FP64 sums of all batches.
    """
    truths = [torch.zeros_like(param, dtype=torch.float64) for param in design.params]
    for param, truth in zip(design.params, truths, strict=True):
        param.register_hook(_add_to(truth))  # a tensor's hook sees its new gradient before it is accumulated
    design.begin()
    errors = {}
    for count, batch in enumerate(batches, start=1):
        design.backward(design.model(batch) / micro_batches, last=count == micro_batches)
        if count == micro_batches:
            errors["sum"] = relative_error(design.sums(), truths)
            errors["optimizer"] = relative_error(design.gradients_for_step(), truths)
    return errors, truths


def _add_to(truth: Tensor) -> Callable[[Tensor], None]:
    def hook(grad: Tensor) -> None:
        truth.add_(grad)

    return hook
