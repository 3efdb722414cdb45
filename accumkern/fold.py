"""One fold: which format, scale and kernel it takes, and what is left to torch's own addition."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from accumkern import backends
from accumkern.dtensor import is_dtensor
from accumkern.formats import BUFFERS, Start
from accumkern.ops import is_dense
from accumkern.slot import FOLDED_DTYPES, Slot
from accumkern.torch_private import is_fake, is_flattened, is_wrapper_subclass
from accumkern.window_squares import WindowSquares

_is_grad_enabled = torch.is_grad_enabled
_numel = Tensor.numel


def is_plain(grad: Tensor, dtype: torch.dtype) -> bool:
    """Return whether the kernels take a gradient of a dtype as it is; sparse tensors are not contiguous."""
    return grad.dtype is dtype and grad.is_contiguous() and not grad.is_neg()


class Fold:
    """How the gradients of one accumulator are folded.

    Attributes:
        buffer: see below.
        scale: the factor of each micro-gradient: a number, or a floating 0-dim tensor.
        is_scaled: whether it is anything but 1.
        squares: the noise scale's record of the partial sums of squares that folds leave, or None.

    Args:
        buffer: a name in :data:`accumkern.formats.BUFFERS`.
        backend: a backend's name, or None for the first that can run on a gradient's device.
        squares: see above.
    """

    def __init__(self, buffer: str, backend: str | None, squares: WindowSquares | None) -> None:
        self.buffer = buffer
        self.squares = squares
        self.set_scale(1.0)
        self._backend = backend
        self._kernels_of_device: dict[torch.device, backends.Kernels] = {}

    def set_scale(self, scale: float | Tensor) -> None:
        """Multiply each micro-gradient by ``scale`` from now on."""
        self.scale = scale if isinstance(scale, Tensor) else float(scale)  # as Kernels.fold_into takes it
        self.is_scaled = isinstance(scale, Tensor) or scale != 1

    def check(self, name: str, param: Tensor) -> None:
        """Raise unless the gradient of a parameter can be folded: of a plain tensor, or of a DTensor shard by shard.

        Raises:
            TypeError: it is of another kind, has no memory, or is of a dtype that the buffer cannot hold.
            RuntimeError: the backend asked for cannot run on its device.
        """
        _check_memory(name, param)
        if is_wrapper_subclass(param) and not is_dtensor(param):
            raise TypeError(
                f"{name} is a {type(param).__name__}; its gradient is not one tensor that can be folded in place"
            )
        if is_flattened(param):
            raise TypeError(
                f"{name} is of a FullyShardedDataParallel module, which keeps the gradient apart from .grad in its own "
                "buffers; use torch.distributed.fsdp.fully_shard"
            )
        if param.dtype is torch.float16 and param.dtype not in BUFFERS[self.buffer]:
            raise TypeError(
                f"{name} is torch.float16, which buffer={self.buffer!r} cannot hold (it is made of bfloat16); "
                "use buffer='fp32'"
            )
        self.kernels_on(param.device)

    def kernels_on(self, device: torch.device) -> backends.Kernels:
        """Return the kernels that run on a device.

        Raises:
            RuntimeError: the backend asked for cannot run there.
        """
        kernels = self._kernels_of_device.get(device)
        if kernels is None:
            chosen = backends.choose(self._backend, device)
            kernels = self._kernels_of_device[device] = backends.kernels(chosen)
        return kernels

    def many(self, slots: list[Slot], grads: list[Tensor], sums: list[Any], start: Start) -> None:
        """Fold gradients of one device and dtype into their sums, which are laid out alike.

        To continue, each slot has just said that it has the residual of the sum. From zero there are no sums. The
        gradients may share memory with tensors of somebody else, so what is written goes into memory of its own.

        Raises:
            TypeError: the buffer cannot hold the gradients' dtype.
            ValueError: a sum has another size than its gradient. Nothing is written then.
        """
        new = grads[0]
        if type(new) is not Tensor:
            _check_memory("a gradient", new)
        format_ = slots[0].formats.get(new.dtype)
        if format_ is None:
            raise TypeError(f".grad is {new.dtype}, which buffer={self.buffer!r} cannot hold; use buffer='fp32'")
        if start is Start.FROM_ZERO:
            sums = [torch.empty_like(grad) for grad in grads]
        # Whoever gives .grad another size through .data leaves no trace in its version.
        elif any(map(operator.ne, map(_numel, grads), map(_numel, sums))):
            raise ValueError("the .data of a .grad was given another size in the middle of a window")
        dtype, scale, residuals, partials = format_.residual_dtype, self.scale, None, None
        if dtype is not None:
            if start is Start.CONTINUE:
                residuals = [slot.residual for slot in slots]
            else:
                residuals = [slot.residual_for(total, dtype) for slot, total in zip(slots, sums, strict=True)]
        if isinstance(scale, Tensor):
            scale = scale.to(new.device)
        squares = self.squares
        if squares is not None:
            partials = [slot.partials_for(total) for slot, total in zip(slots, sums, strict=True)]
        kernels = self.kernels_on(new.device)
        kernels.fold(format_, start, grads, sums, residuals, scale, partials)
        if start is Start.FROM_ZERO:
            for slot, total in zip(slots, sums, strict=True):
                slot.param.grad = slot.whole(total, slot.param.grad)
        if start is not Start.CONTINUE:
            for slot in slots:
                slot.remember()
        for slot, total in zip(slots, sums, strict=True):
            if not slot.may_wait and type(total) is Tensor and slot.address != total.data_ptr():
                slot.prepare(total, kernels.fold_into, Start.CONTINUE)
        if squares is not None and partials is not None:
            for slot, rows in zip(slots, partials, strict=True):
                squares.fold(slot.param, slot.param.grad, start, rows, scale)

    def go_on(self, slots: list[Slot], grads: list[Tensor], sums: list[Tensor]) -> bool:
        """Fold gradients of one device and dtype into sums that are as their slots left them, where all is as usual.

        Return whether it was. Else, as where folds are measured, nothing is written.
        """
        dtype, scale = grads[0].dtype, self.scale
        format_ = slots[0].formats.get(dtype)
        if format_ is None or self.squares is not None or isinstance(scale, Tensor):
            return False
        residuals = None if format_.residual_dtype is None else [slot.residual for slot in slots]
        return self.kernels_on(grads[0].device).fold_alike(format_, grads, sums, residuals, scale)

    def second(self, slot: Slot, running: Tensor, new: Tensor) -> None:
        """Fold the second gradient of a window into the first, where nothing measures it, as the next ones will be.

        Both are laid out alike, as the kernels take them.
        """
        format_ = slot.formats.get(running.dtype)
        if format_ is not None and type(running) is Tensor:
            if format_.residual_dtype is not None:
                slot.residual_for(running, format_.residual_dtype)
            slot.prepare(running, self.kernels_on(running.device).fold_into, Start.FROM_SUM)
            is_folded = False
            try:
                is_folded = slot.fold_next(new, running, running._version, self.scale)
            finally:
                if not is_folded:  # another fold will write the residual, and this one would leave it out
                    slot.unprepare()
            if is_folded:
                slot.remember()
                return
        self.many([slot], [new], [running], Start.FROM_SUM)

    def one(self, slot: Slot, running: Any, new: Any, start: Start) -> None:
        """Fold at once a gradient of any layout into the running one, if there is one, or leave it to torch.

        Args:
            slot: of the parameter.
            running: ``.grad`` as it was, or None.
            new: the gradient.
            start: where the fold starts, if it can be folded.
        """
        if (
            _is_grad_enabled()
            or new.dtype not in FOLDED_DTYPES
            or new.layout is not torch.strided
            or (running is not None and (running.dtype is not new.dtype or running.layout is not torch.strided))
        ):
            self.as_torch_does(slot, running, new)
            return
        if running is None:
            new = new.resolve_neg()
            if not is_dense(new):
                new = new.contiguous()
            slot.param.grad = None
            self.many([slot], [new], [None], start)
            return
        # A running gradient that is somebody's, lazily negated or with holes in its memory, is folded in a copy.
        total = running if is_dense(running) else running.contiguous()
        total = total.resolve_neg()
        if new.stride() != total.stride() or new.is_neg():
            new = torch.empty_strided(new.shape, total.stride(), dtype=new.dtype, device=new.device).copy_(new)
        slot.param.grad = running
        self.many([slot], [new], [total], start)
        if total is not running:
            running.data.copy_(total)  # gradients that are views of one tensor share a version counter: leave it alone
            slot.remember()

    def as_torch_does(self, slot: Slot, running: Any, new: Any) -> None:
        """Do what AccumulateGrad does: for sparse, complex and float64 gradients, and for create_graph."""
        continues = slot.owns(running)
        slot.forget()
        param = slot.param
        if self.is_scaled:
            scale = self.scale.to(new.device) if isinstance(self.scale, Tensor) else self.scale
            new = slot.whole(slot.local(new) * scale, new)
        if self.squares is not None:
            self.squares.measure(param, running, new, continues)
        if running is None:
            param.grad = new
        elif _is_grad_enabled():
            param.grad = running + new
        elif running.is_sparse and not new.is_sparse:
            param.grad = new + running
        else:
            param.grad = running.add_(new)
        if self.squares is not None:
            self.squares.keep(param, is_sum=True)


def _check_memory(name: str, tensor: Tensor) -> None:
    if is_fake(tensor) and not backends.are_kernels_left_out():
        raise TypeError(
            f"{name} is a FakeTensor, which has a shape but no memory to accumulate in; accumkern.plan(..., "
            "measure=False) predicts memory on fake tensors"
        )
