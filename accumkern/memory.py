"""Bytes of memory, counted from the tensors themselves."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from accumkern.dtensor import is_dtensor, shard
from accumkern.torch_private import is_wrapper_subclass


@dataclass(frozen=True)
class HeldMemory:
    """Bytes that training holds between two micro-batches on this rank, by what they are for.

    Attributes:
        weights: the optimizer's parameters.
        master_residuals: what they lack of their FP32 master weights, and copies of weights that others write.
        gradients: ``.grad``.
        residuals: what ``.grad`` lacks of the accumulated sums, an FP32 buffer included.
        optimizer_state: of the optimizer, all tensors.
        bucket: of the FP32 weights and gradients of a step, which a CPU keeps for the next one.
        numel: elements of the parameters; no bytes.
    """

    weights: int
    master_residuals: int
    gradients: int
    residuals: int
    optimizer_state: int
    bucket: int
    numel: int

    @property
    def total(self) -> int:
        """All bytes together."""
        return sum(self._bytes().values())

    def _bytes(self) -> dict[str, int]:
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "numel"}

    def __str__(self) -> str:
        """Return a table of bytes, and of bytes per parameter."""
        rows = [*self._bytes().items(), ("total", self.total)]
        return "\n".join(
            f"{name.replace('_', ' '):18s}{size:>18,d} B{size / max(self.numel, 1):>8.2f} B per parameter"
            for name, size in rows
        )


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the memory that tensors lie in, each piece of memory counted once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def tensors_in(tree: Any) -> list[Tensor]:
    """Return the tensors in nested dictionaries, lists and tuples.

    Of a DTensor it is the shard of this rank; of one that is made of others, such as a quantized state, these.
    """
    if isinstance(tree, Tensor):
        tensor: Any = shard(tree) if is_dtensor(tree) else tree
        if tensor.layout is torch.sparse_coo:
            return [tensor._indices(), tensor._values()]
        if tensor.layout is not torch.strided:
            is_by_rows = tensor.layout in (torch.sparse_csr, torch.sparse_bsr)
            names = ("crow_indices", "col_indices") if is_by_rows else ("ccol_indices", "row_indices")
            return [*(getattr(tensor, name)() for name in names), tensor.values()]
        if not is_wrapper_subclass(tensor):
            return [tensor]
        return tensors_in([getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]])
    items = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
    return [tensor for item in items for tensor in tensors_in(item)]
