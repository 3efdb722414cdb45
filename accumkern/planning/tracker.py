"""How many bytes tensors take while a setup trains, by what they are for, and the most at any time."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from accumkern.memory import tensors_in
from accumkern.planning.kernels import scratch_bytes
from accumkern.torch_private import TorchDispatchMode, tree_leaves

#: What bytes are for, in the order of a table.
KINDS = ("parameters", "gradients", "residuals", "master_residuals", "optimizer_state", "activations")


class MemoryTracker(TorchDispatchMode):
    """A block in which the memory of every tensor that an operation returns counts, until it is freed.

    What was made before counts if it is handed to :meth:`count`. A tensor is an activation unless it is made in an
    optimizer's step, arrives as the gradient of a parameter of :meth:`gradients_of`, or is handed to :meth:`count`.

    Attributes:
        low: the most bytes at any time, of tensors alone.
        peak: bytes by kind, with ``"kernels"``, when tensors and what the kernel that ran needed inside itself were
            the most.
    """

    def __init__(
        self,
        block_bytes: Callable[[int], int] = lambda size: size,
        workspace_bytes: Callable[[Any], int] = lambda operation: 0,
    ) -> None:
        """Make ready to count.

        Args:
            block_bytes: what the allocator takes for a tensor of so many bytes.
            workspace_bytes: what a library keeps from an operation on, in which all that it keeps is.
        """
        super().__init__()
        self._block_bytes, self._workspace_bytes, self._workspace = block_bytes, workspace_bytes, 0
        self._bytes = dict.fromkeys(KINDS, 0)
        self._total = self._most = self.low = 0
        self._kind_now = "activations"
        self._known: dict[int, tuple[weakref.ref[torch.UntypedStorage], list[Any]]] = {}
        self.peak = self._bytes | {"kernels": 0}

    def count(self, kind: str, tree: Any) -> None:
        """Count the memory of tensors as of a kind, also where it has counted as of another one."""
        for storage in _storages(tree):
            self._count(storage, kind)
        self._look(0)

    @contextmanager
    def gradients_of(self, model: nn.Module) -> Iterator[None]:
        """Let what arrives at the model's parameters in this block, and ``.grad``, count as gradients."""
        with ExitStack() as stack:
            for param in model.parameters():
                if param.requires_grad:
                    arrives = param.register_hook(partial(self.count, "gradients"))
                    accumulated = param.register_post_accumulate_grad_hook(lambda p: self.count("gradients", p.grad))
                    stack.callback(arrives.remove)
                    stack.callback(accumulated.remove)
            yield

    def __enter__(self) -> MemoryTracker:
        self._hooks = (
            register_optimizer_step_pre_hook(lambda *_: self._let_be("optimizer_state")),
            register_optimizer_step_post_hook(lambda *_: self._let_be("activations")),
        )
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for hook in self._hooks:
            hook.remove()
        self._kind_now = "activations"

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # a tensor that is made of others calls their operations, which are seen then
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage._cdata not in self._known:
                self._count(storage, self._kind_now)
        self._workspace = max(self._workspace, self._workspace_bytes(func))
        self._look(scratch_bytes(func, args, result))
        return result

    def _let_be(self, kind: str) -> None:
        self._kind_now = kind

    def _count(self, storage: torch.UntypedStorage, kind: str) -> None:
        key = storage._cdata
        if key in self._known:
            size, before = self._known[key][1]
            self._bytes[before] -= size
            self._known[key][1][1] = kind
        else:
            size = self._block_bytes(storage.nbytes())
            self._known[key] = weakref.ref(storage, partial(self._forget, key)), [size, kind]
            self._total += size
        self._bytes[kind] += size

    def _forget(self, key: int, _reference: object) -> None:
        size, kind = self._known.pop(key)[1]
        self._bytes[kind] -= size
        self._total -= size

    def _look(self, scratch: int) -> None:
        kernels = scratch + self._workspace
        self.low = max(self.low, self._total)
        if self._total + kernels > self._most:
            self._most = self._total + kernels
            self.peak = self._bytes | {"kernels": kernels}


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    """Return the memory of all tensors in arguments or results."""
    leaves = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return [tensor.untyped_storage() for tensor in tensors_in(leaves) if tensor.layout is torch.strided]
