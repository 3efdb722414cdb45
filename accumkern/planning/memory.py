"""Memory: what a device has, and what a piece of code really allocates under a limit."""

from __future__ import annotations

import gc
import os
import platform
import re
import sys
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor, nn

from accumkern.checks import real
from accumkern.dtensor import is_in_group
from accumkern.out_of_memory import CpuLimit, gpu_limit
from accumkern.torch_private import memory_events, tree_leaves
from accumkern.version import __version__


def check_margin(margin: float) -> float:
    """Return the part of the memory that is to stay free.

    Raises:
        TypeError: it is not a number.
        ValueError: it is less than 0, or 1 or more.
    """
    right = "it must be a number of at least 0 and less than 1"
    number = real("margin", margin, right)
    if not 0 <= number < 1:
        raise ValueError(f"margin is {number}; {right}")
    return number


def interpolated(peaks: dict[int, int], micro_batch: int) -> int:
    """Return the peak of a micro-batch within those that are known: memory grows in a straight line."""
    if micro_batch in peaks:
        return peaks[micro_batch]
    low = max(size for size in peaks if size < micro_batch)
    high = min(size for size in peaks if size > micro_batch)
    part = (micro_batch - low) / (high - low)
    return round(peaks[low] + part * (peaks[high] - peaks[low]))


def available_bytes(device: torch.device) -> int:
    """Return what a program can have of a device's memory now: what is free and what torch holds there already.

    On the CPU it is what the system says is available, or what is left of the control group's limit if that is less.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        match = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE)
        if match is not None:
            free = int(match[1]) * 1024
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return free
    return free if limit == "max" else min(free, int(limit) - int(used))


def machine_of(device: torch.device | None) -> dict[str, str]:
    """Return what a plan was made on, and when; None is no device."""
    name = "none: predicted on fake tensors"
    if device is not None:
        threads = torch.get_num_threads()
        name = f"CPU, {threads} {'thread' if threads == 1 else 'threads'}"
        if device.type == "cuda":
            name = torch.cuda.get_device_name(device)
    return {
        "device": name,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "accumkern": __version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def held_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return what a model and its optimizer hold: parameters, gradients, buffers and optimizer state."""
    params = list(model.parameters())
    grads = [param.grad for param in params if param.grad is not None]
    states = [leaf for leaf in tree_leaves(list(optimizer.state.values())) if isinstance(leaf, Tensor)]
    return [*params, *grads, *model.buffers(), *states]


class MemoryMeter:
    """What a piece of code allocates on a device, and a limit to it.

    On a GPU both are the caching allocator's: its counters, and its limit for this process. On the CPU every single
    allocation and release of torch's allocator is counted, from the memory events of torch's profiler. The limit is
    kept by looking at the results of every operation, on their way out: the first one that goes beyond it raises
    :class:`accumkern.out_of_memory.MemoryLimitError`. Memory that is not torch's does not count on the CPU.

    Attributes:
        peak_bytes: the most that was allocated at any time, with ``held_bytes``; after the block.
        left_bytes: how much more was allocated at its end than at its beginning.
    """

    def __init__(self, device: torch.device, held_bytes: int, limit_bytes: int) -> None:
        """Make ready.

        Args:
            device: whose memory.
            held_bytes: what is allocated already and counts; on a GPU, where the allocator knows, it is not used.
            limit_bytes: of everything together.

        Raises:
            ValueError: the device is neither a CPU nor a GPU of CUDA or ROCm.
        """
        if device.type not in ("cpu", "cuda"):
            raise ValueError(
                f"memory of device {str(device)!r} cannot be measured; put the model on a CPU or CUDA device"
            )
        self.device = device
        self.held_bytes = held_bytes
        self.limit_bytes = limit_bytes
        self.peak_bytes = self.left_bytes = 0

    def __enter__(self) -> MemoryMeter:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
            self._limit = gpu_limit(self.device, self.limit_bytes)
            self._limit.__enter__()
        else:
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it reports its start and end to stderr otherwise
            gc.collect()  # torch's allocator warns of what is freed while it is profiled and was not when it was made
            self._profile = torch.autograd.profiler.profile(use_kineto=True, profile_memory=True)
            self._guard = CpuLimit(self.held_bytes, self.limit_bytes)
            self._profile.__enter__()
            self._guard.__enter__()
        return self

    def lift_limit(self) -> None:
        """Let the rest of the block allocate what it needs, on a CPU, because it puts things back."""
        if self.device.type != "cuda":
            self._guard.limit_bytes = sys.maxsize

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.device.type == "cuda":
            self._limit.__exit__(None, None, None)
            torch.cuda.synchronize(self.device)
            self.peak_bytes = torch.cuda.max_memory_allocated(self.device)
            self.left_bytes = torch.cuda.memory_allocated(self.device) - self._before
            torch.cuda.empty_cache()
            return
        self._guard.__exit__(kind, value, traceback)
        self._profile.__exit__(kind, value, traceback)
        assert self._profile.kineto_results is not None
        # The profiler does not see what other threads release, as gloo's do with what they have sent. An address that
        # is allocated again has been released; of what is left at the end, the limit's own count knows.
        alive: dict[int, int] = {}
        allocated = peak = 0
        for _, address, size in memory_events(self._profile.kineto_results):
            allocated += size - alive.get(address, 0) if size > 0 else size
            alive[address] = max(size, 0)
            peak = max(peak, allocated)
        self.peak_bytes = self.held_bytes + peak
        self.left_bytes = allocated
        if is_in_group():
            self._guard.recount()
            self.left_bytes = min(allocated, self._guard.bytes - self.held_bytes)
