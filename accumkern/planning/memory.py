"""Memory: sizes as people write them, what a device has, and what a piece of code really allocates under a limit."""

from __future__ import annotations

import gc
import os
import re
import weakref
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from accumkern.checks import integer, real
from accumkern.torch_private import TorchDispatchMode, tree_leaves

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


class MemoryLimitError(MemoryError):
    """Raised by :class:`MemoryMeter` on the CPU at the operation that goes beyond the limit."""


def parse_bytes(size: int | str) -> int:
    """Return a size in bytes: a whole number of them, or text such as ``"24GB"`` (10^9) or ``"16 GiB"`` (2^30).

    Raises:
        TypeError: ``size`` is neither.
        ValueError: it is not such text, or not positive.
    """
    if isinstance(size, str):
        match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]+)\s*", size)
        if match is None or match[2].upper() not in _UNITS:
            raise ValueError(f"memory is {size!r}; it must be a number and a unit, such as '24GB' or '512MiB'")
        size = int(Fraction(match[1]) * _UNITS[match[2].upper()])
    return integer("memory", size, "it must be a positive number of bytes, or text such as '24GB'", least=1)


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


def format_bytes(size: float) -> str:
    """Return ``size`` for people, in decimal units like the memory of a GPU on its box."""
    for unit, one in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if abs(size) >= one:
            return f"{size / one:.3g} {unit}" if abs(size) < 1000 * one else f"{size / one:,.0f} {unit}"
    return f"{size:.0f} B"


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, of a GPU or of the CPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)


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
    :class:`MemoryLimitError`. Memory that is not torch's does not count on the CPU.

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
            self._fraction = torch.cuda.get_per_process_memory_fraction(self.device)
            total = torch.cuda.get_device_properties(self.device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, self.limit_bytes / total), self.device)
        else:
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it reports its start and end to stderr otherwise
            gc.collect()  # torch's allocator warns of what is freed while it is profiled and was not when it was made
            self._profile = torch.autograd.profiler.profile(use_kineto=True, profile_memory=True)
            self._guard = _Guard(self.held_bytes, self.limit_bytes)
            self._profile.__enter__()
            self._guard.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(self._fraction, self.device)
            torch.cuda.synchronize(self.device)
            self.peak_bytes = torch.cuda.max_memory_allocated(self.device)
            self.left_bytes = torch.cuda.memory_allocated(self.device) - self._before
            torch.cuda.empty_cache()
            return
        self._guard.__exit__(kind, value, traceback)
        self._profile.__exit__(kind, value, traceback)
        assert self._profile.kineto_results is not None
        events = [event for event in self._profile.kineto_results.events() if event.name() == "[memory]"]
        allocated = peak = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            allocated += event.nbytes()  # type: ignore[attr-defined]
            peak = max(peak, allocated)
        self.peak_bytes, self.left_bytes = self.held_bytes + peak, allocated


class _Guard(TorchDispatchMode):
    """Raises at the first operation whose results go beyond the limit."""

    def __init__(self, held_bytes: int, limit_bytes: int) -> None:
        super().__init__()
        self.bytes = held_bytes
        self.limit_bytes = limit_bytes
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}
        before = self.bytes
        for storage in _storages(result):
            if storage._cdata not in given and storage._cdata not in self._alive:
                self._count(storage)
        if self.bytes > max(before, self.limit_bytes):  # what allocates nothing, such as putting values back, may go on
            raise MemoryLimitError(f"{func} needs {format_bytes(self.bytes)} of {format_bytes(self.limit_bytes)}")
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()

        def forget(_reference: object) -> None:
            del self._alive[key]
            self.bytes -= size

        self._alive[key] = weakref.ref(storage, forget)
        self.bytes += size


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    """Return the memory of all tensors in arguments or results."""
    leaves = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.layout is torch.strided)
    return [leaf.untyped_storage() for leaf in leaves]
