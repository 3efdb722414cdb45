"""The most memory that a process takes while other threads than Python's allocate and release, too."""

from __future__ import annotations

import ctypes
import gc
import re
from pathlib import Path

import torch

#: Of mallopt(): blocks of 16 kB and more go back to the system as soon as they are released, and all threads share the
#: memory of the others.
_SETTINGS = {"M_MMAP_THRESHOLD": (-3, 16384), "M_ARENA_MAX": (-8, 1)}


def give_back_blocks() -> None:
    """Let this process give memory back when it is released; to be called before it has taken much."""
    for name, setting in _SETTINGS.items():
        if not ctypes.CDLL(None).mallopt(*setting):
            raise RuntimeError(f"mallopt({name}) failed; the memory of a process is measured with glibc alone")


class PeakMeter:
    """Counts from what is there when it is made.

    On a GPU these are the counters of torch's caching allocator. On a CPU it is the memory that Linux has given to the
    process, after :func:`give_back_blocks`: a profiler sees no release by gloo's threads. What has to be loaded or made
    once should have been by then.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            self._before = torch.cuda.memory_allocated(device)
            return
        self._libc = ctypes.CDLL(None)
        self._libc.malloc_trim(0)
        self._before = _status("VmRSS")

    def reset(self) -> None:
        """Let the peak begin at what is there now."""
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self._libc.malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")

    def peak_bytes(self) -> int:
        """Return the most since :meth:`reset`, beyond what was there when the meter was made."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._before
        return _status("VmHWM") - self._before


def _status(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {name}")
    return int(found[1]) * 1024
