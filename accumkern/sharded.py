"""Gradients that are DTensors (FSDP2, tensor parallel): folded on the shard that this rank holds."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from accumkern import dtensor
from accumkern.fold import Fold, is_plain
from accumkern.formats import Format, Start
from accumkern.passes import BackwardPasses
from accumkern.slot import FOLDED_DTYPES, NOT_SET_ASIDE, Slot
from accumkern.torch_private import NO_BACKWARD, current_graph_task_id, disabled_torch_function, set_local_tensor


class ShardSlot(Slot):
    """What belongs to a parameter that is a DTensor.

    Args:
        param, formats, accumulate: as of a :class:`accumkern.slot.Slot`.
        add: called as ``add(slot, total, new)`` when fully_shard adds ``new`` to the shard ``total``.
    """

    __slots__ = ("add", "is_folded", "is_fully_sharded", "is_wide")

    def __init__(
        self,
        param: Tensor,
        formats: dict[torch.dtype, Format],
        accumulate: Callable[[Any, Tensor], None],
        add: Callable[[Any, Tensor, Tensor], None],
    ) -> None:
        super().__init__(param, formats, accumulate)
        self.add = add
        self.is_fully_sharded = False  # whether fully_shard accumulates the gradient, and autograd does not
        self.is_folded = False  # whether what fully_shard has added is folded, and its hook still to come
        self.is_wide = False  # whether what fully_shard reduces now was multiplied by ``scale``, and comes in FP32

    def local(self, grad: Any) -> Tensor:
        """Return the shard of this rank."""
        return dtensor.shard(grad)

    def whole(self, local: Tensor, like: Any) -> Any:
        """Return the DTensor of which this rank holds ``local``, laid out as ``like`` is."""
        return dtensor.with_shard(local, like)

    def version_of(self, grad: Any) -> int:
        """Return a number that grows with every change."""
        return dtensor.version_of(grad)

    def has_residual_of(self, grad: Any) -> bool:
        """Return whether a fold into the shard of ``grad`` goes on from its residual, if it needs one."""
        return self.owns(grad) and self._fits_format(dtensor.shard(grad))

    def in_memory(self, grad: Any) -> tuple[Tensor, Tensor | None, Format | None, tuple[Any, ...], Any]:
        """Return the shard of ``.grad`` as it lies in memory, and whose the other shards are."""
        reduce = (lambda term: dtensor.reduced(term, grad)) if dtensor.is_pending(grad) else None
        return *super().in_memory(grad)[:3], dtensor.groups_of_shards(grad), reduce

    def load(self, grad: Any, residual: Tensor | None) -> None:
        """Make ``grad`` the gradient, and ``residual``, of the shard, what belongs to it."""
        if grad is not None:
            RunningShard.put_into(grad, self)
        super().load(grad, residual)

    def saved_residual(self, residual: Tensor, like: Any) -> Any:
        """Return a residual as a state holds it: a DTensor, laid out as the gradient is."""
        return self.whole(residual.view(self.local(like).shape), like)

    def is_complete(self, grad: Any) -> bool:
        """Return whether the gradient is more than one term of a sum over ranks."""
        return not dtensor.is_pending(grad)


class RunningShard(Tensor):
    """This rank's shard of a running gradient, where ``fully_shard`` adds to it.

    fully_shard calls the hooks of a parameter after it has added: it computes ``param.grad._local_tensor += new``. This
    tensor is as any other but for that addition, which is a fold. Copies of it are plain tensors.
    """

    __torch_function__ = disabled_torch_function
    slot: weakref.ref[ShardSlot]

    @staticmethod
    def put_into(grad: Any, slot: ShardSlot) -> None:
        """Let the shard of ``grad`` fold what is added to it."""
        running = dtensor.shard(grad).as_subclass(RunningShard)
        running.slot = weakref.ref(slot)
        set_local_tensor(grad, running)

    def __iadd__(self, new: Any) -> RunningShard:  # type: ignore[misc]
        slot = self.slot()
        if slot is None or not isinstance(new, Tensor):
            return self.add_(new)  # type: ignore[return-value]
        slot.add(slot, self, new)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return copy.deepcopy(self.as_subclass(Tensor), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)


class ShardPasses:
    """What happens when autograd or fully_shard brings the gradient of a DTensor.

    Args:
        passes: the backward passes of the accumulator.
        fold: what folds.
        unscaled: the same, without ``scale``.
    """

    def __init__(self, passes: BackwardPasses, fold: Fold, unscaled: Fold) -> None:
        self._passes = passes
        self._fold, self._unscaled = fold, unscaled

    def accumulate(self, slot: ShardSlot, param: Tensor) -> None:
        """Fold the gradient that has just come into ``param.grad``.

        Where autograd accumulates it (tensor parallel), both hooks are called, as with other parameters. fully_shard
        adds to ``.grad`` itself and calls this hook alone; then a RunningShard has folded already.
        """
        running, slot.set_aside = slot.set_aside, NOT_SET_ASIDE
        new: Any = param.grad
        if new is None:  # somebody's hook took it
            param.grad = None if running is NOT_SET_ASIDE else running
            return
        self._passes.enter()
        if running is NOT_SET_ASIDE:
            self._take_over(slot, new)
        elif running is None:
            slot.forget()
            slot.last = weakref.ref(new)
            if self._fold.is_scaled:
                self._add(slot, None, new, Start.FROM_ZERO)
        else:
            self._add(slot, running, new, Start.CONTINUE if slot.has_residual_of(running) else Start.FROM_SUM)

    def add(self, slot: ShardSlot, total: Tensor, new: Tensor) -> None:
        """Fold what fully_shard adds to a shard.

        Outside of a backward pass it may be an edit, which must not be multiplied by ``scale``.
        """
        fold = self._fold_for(slot)
        if fold.is_scaled and current_graph_task_id() == NO_BACKWARD:
            total.add_(new)
            return
        if slot.is_wide and new.dtype is not torch.float32:
            raise RuntimeError(
                f"torch {torch.__version__} rounds what fully_shard has reduced to {new.dtype} in a way that accumkern "
                "does not know; detach(), or leave out reduce_in_fp32()"
            )
        self._passes.enter()
        slot.is_folded = True
        if new.dtype is torch.float32 is not total.dtype and _are_alike(new, total):
            self._add_wide(slot, total, new * fold.scale if fold.is_scaled else new)
            return
        if not _are_plain(new, total):
            slot.forget()
            total.add_(new * fold.scale if fold.is_scaled else new)
            return
        grad: Any = slot.param.grad
        fold.many([slot], [new], [total], Start.CONTINUE if slot.has_residual_of(grad) else Start.FROM_SUM)

    def _fold_for(self, slot: ShardSlot) -> Fold:
        return self._unscaled if slot.is_wide else self._fold

    def _add_wide(self, slot: ShardSlot, total: Tensor, new: Tensor) -> None:
        """Add FP32 numbers to a sum of 16 bits and its residual, and store what comes out as a fold does."""
        format_ = slot.formats[total.dtype]
        assert format_.residual_dtype is not None
        kernels = self._unscaled.kernels_on(total.device)
        values = torch.empty_like(new)
        if slot.has_residual_of(slot.param.grad):
            kernels.decode(format_, [total], [slot.residual], [values])
        else:
            values.copy_(total)
        values += new
        kernels.encode(format_, [values], 1.0, [total], [slot.residual_for(total, format_.residual_dtype)])
        torch.autograd.graph.increment_version([total])
        slot.remember()

    def _take_over(self, slot: ShardSlot, grad: Any) -> None:
        """Let what fully_shard adds to ``grad`` be folded, once this window's first gradient is there."""
        is_ours = isinstance(dtensor.shard(grad), RunningShard)
        is_folded, slot.is_folded = slot.is_folded, False
        if is_ours and is_folded:
            return
        was_added, slot.last = slot.last() is grad, weakref.ref(grad)
        if is_ours and slot.is_fully_sharded:
            raise RuntimeError(
                f"fully_shard has added to the gradient of a parameter of shape {tuple(slot.param.shape)}, and it was "
                "not folded: "
                + (
                    f"torch {torch.__version__} does it in a way that accumkern does not know; detach()"
                    if current_graph_task_id() != NO_BACKWARD
                    else "outside of a backward pass, where pipeline schedules do so, average_over and scale do not "
                    "reach; divide in finish()"
                )
            )
        if was_added or not slot.is_fully_sharded:  # it may have been moved before its first gradient
            self._passes.without_first_hook(slot, grad, was_added)
        slot.is_fully_sharded = True
        slot.forget()
        if self._fold_for(slot).is_scaled:
            dtensor.wait_for_copy(grad)
            self._add(slot, None, grad, Start.FROM_ZERO)
        RunningShard.put_into(slot.param.grad, slot)

    def _add(self, slot: ShardSlot, running: Any, new: Any, start: Start) -> None:
        """Fold the shard of one DTensor into that of another, or leave it to torch where they are laid out apart.

        After an error ``.grad`` is the running one again.
        """
        alike = True
        if running is not None:
            alike = running.device_mesh == new.device_mesh
            if alike and running.placements != new.placements and not dtensor.is_pending(running):
                new = new.redistribute(placements=running.placements)
            alike &= running.placements == new.placements
        local = dtensor.shard(new)
        total = local if running is None else dtensor.shard(running)
        try:
            if not alike or not _are_plain(local, total) or torch.is_grad_enabled():
                self._fold.as_torch_does(slot, running, new)
            else:
                slot.param.grad = new if running is None else running
                self._fold.many([slot], [local], [total], start)
        except BaseException:
            slot.param.grad = running
            raise


def _are_plain(new: Tensor, total: Tensor) -> bool:
    """Return whether the kernels fold one shard into another as they are."""
    return new.dtype is total.dtype and _are_alike(new, total)


def _are_alike(new: Tensor, total: Tensor) -> bool:
    """Return whether two shards lie in memory alike, as the kernels take them."""
    return (
        new.dtype in FOLDED_DTYPES
        and total.dtype in FOLDED_DTYPES
        and is_plain(new, new.dtype)
        and is_plain(total, total.dtype)
        and new.shape == total.shape
    )
