"""Memory that runs out: how an error says so, sizes as people write them, and a limit for the CPU, which has none."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from accumkern.checks import integer
from accumkern.torch_private import TorchDispatchMode, tree_leaves

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_OUT_OF_MEMORY = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "std::bad_alloc",
    "cublas_status_alloc_failed",
    "cublas_status_not_initialized",  # its handle needs memory
    "cudnn_status_alloc_failed",
)


class MemoryLimitError(MemoryError):
    """Raised under a limit on the CPU at the operation that goes beyond it."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, of a GPU or of the CPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _OUT_OF_MEMORY)


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


def format_bytes(size: float) -> str:
    """Return ``size`` for people, in decimal units like the memory of a GPU on its box."""
    for unit, one in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if abs(size) >= one:
            return f"{size / one:.3g} {unit}" if abs(size) < 1000 * one else f"{size / one:,.0f} {unit}"
    return f"{size:.0f} B"


def forget_failed_pass() -> None:
    """Let go of what a backward pass that failed has left behind.

    What waited in autograd's queue of this thread stays there, with all that it needs, until the next backward pass.
    """
    with torch.inference_mode(False), torch.enable_grad():
        torch.zeros((), requires_grad=True).backward()


class CpuLimit(TorchDispatchMode):
    """A block in which the first operation whose results go beyond a limit raises :class:`MemoryLimitError`.

    Every operation's results are looked at, and counted until they are released, which takes time. What an operation
    allocates inside of itself is not seen, nor what is not torch's.

    Args:
        held_bytes: what is allocated already and counts.
        limit_bytes: of everything together.

    Attributes:
        bytes: that are allocated now; storages that were resized count as before, until the limit seems to be reached.
    """

    def __init__(self, held_bytes: int, limit_bytes: int) -> None:
        super().__init__()
        self.bytes = held_bytes
        self.limit_bytes = limit_bytes
        self._alive: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # a DTensor, or another that is made of tensors, calls their operations: seen then
        result = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}
        before = self.bytes
        for storage in _storages(result):
            if storage._cdata not in given and storage._cdata not in self._alive:
                self._count(storage)
        allowed = max(before, self.limit_bytes)  # what allocates nothing, such as putting values back, may go on
        if self.bytes > allowed:
            self.recount()
        if self.bytes > allowed:
            raise MemoryLimitError(f"{func} needs {format_bytes(self.bytes)} of {format_bytes(self.limit_bytes)}")
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()

        def forget(_reference: object) -> None:
            self.bytes -= self._alive.pop(key)[1]

        self._alive[key] = weakref.ref(storage, forget), size
        self.bytes += size

    def recount(self) -> None:
        """Count what is alive as it is now: fully_shard lets go of gathered weights by ``resize_(0)``, unseen."""
        for key, (reference, size) in list(self._alive.items()):
            storage = reference()
            if storage is not None:
                self._alive[key] = reference, storage.nbytes()
                self.bytes += storage.nbytes() - size


@contextmanager
def gpu_limit(device: torch.device, limit_bytes: int) -> Iterator[None]:
    """Limit what torch's caching allocator takes of a GPU, and put back the limit that was."""
    before = torch.cuda.get_per_process_memory_fraction(device)
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit_bytes / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, device)


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    """Return the memory of all tensors in arguments or results."""
    leaves = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.layout is torch.strided)
    return [leaf.untyped_storage() for leaf in leaves]
