"""What belongs to one parameter: the running gradient, its residual, and whether these two belong together."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from accumkern.formats import PARTIALS, Format, Start, decode, partial_rows
from accumkern.ops import is_dense

FOLDED_DTYPES = frozenset({torch.bfloat16, torch.float16, torch.float32})
NOT_SET_ASIDE: Any = object()  # nobody has looked at .grad before autograd accumulated


class Parts(NamedTuple):
    """An accumulated gradient as it is stored; of a DTensor, what this rank holds of it.

    Attributes:
        sum: ``.grad``, the accumulated value rounded to the parameter's dtype; ties away from zero in split formats.
        residual: what the sum lacks, of its shape and strides, in ``format.residual_dtype``; None counts as zero.
        format: how the two make one number (:mod:`accumkern.formats`); None where torch adds by itself (sparse,
            complex, float64, or holes in memory).
    """

    sum: Tensor
    residual: Tensor | None
    format: Format | None


class Stored(NamedTuple):
    """An accumulated gradient as it lies in memory, and what the end of a window can use of it."""

    sum: Tensor
    residual: Tensor | None  # flat, in the memory order of the sum
    format: Format | None
    groups: tuple[Any, ...] = ()  # process groups whose ranks hold the other elements
    reduce: Callable[[Tensor], Tensor] | None = None  # takes the sum over ranks of which this is one term


class Slot:
    """What belongs to one parameter: the gradient set aside while autograd works, and the residual.

    The residual belongs to a gradient if that is the very tensor that was written last, unchanged since. The kernels
    do not count as a change: they leave a tensor's version alone, which gradients that are views of one flat buffer
    have in common.

    Args:
        param: the parameter.
        formats: dtype of ``.grad`` -> format, a row of :data:`accumkern.formats.BUFFERS`.
        accumulate: called as ``accumulate(slot, param)`` when autograd has left a new gradient in ``.grad``.
    """

    __slots__ = (
        "__weakref__",
        "accumulate",
        "address",
        "fold_next",
        "formats",
        "hook",
        "identity",
        "last",
        "may_wait",
        "param",
        "partials",
        "residual",
        "set_aside",
        "version",
        "waits",
        "written",
    )

    def __init__(
        self, param: Tensor, formats: dict[torch.dtype, Format], accumulate: Callable[[Any, Tensor], None]
    ) -> None:
        self.param = param
        self.formats = formats
        self.accumulate = accumulate
        self.set_aside: Any = NOT_SET_ASIDE  # a tensor, or None where there was no gradient
        self.identity = self.hook = -1  # of the parameter and of its second hook, when they were hooked
        self.last: Callable[[], Any] = _nothing  # .grad as the last window or fold left it
        self.waits = False  # whether a gradient waits to be folded
        self.may_wait = False  # whether one may in this window: small, and nobody hooks the node that brings it
        self.residual: Any = None  # a tensor, once there is one: flat, in the memory order of .grad
        self.partials: Tensor | None = None
        self.address: int  # of the sum that fold_next() is for
        self.fold_next: Callable[[Tensor, Tensor, int, Any], bool]
        self.unprepare()
        self.forget()

    def stored(self) -> Stored:
        """Return ``.grad``, which is there, as it lies in memory."""
        return Stored(*self.in_memory(self.param.grad))

    # ---- what a shard does in its own way (accumkern/sharded.py) ----

    def local(self, grad: Any) -> Tensor:
        """Return what this rank holds of a gradient."""
        return grad

    def whole(self, local: Tensor, like: Any) -> Any:
        """Return the gradient of which this rank holds ``local``, laid out over ranks as ``like`` is."""
        return local

    def version_of(self, grad: Any) -> int:
        """Return a number that grows with every change of ``grad``."""
        return grad._version

    def in_memory(self, grad: Any) -> tuple[Tensor, Tensor | None, Format | None, tuple[Any, ...], Any]:
        """Return what a :class:`Stored` has of ``.grad``, as a tuple that is quickly made."""
        total = self.local(grad)
        format_ = self.formats.get(total.dtype)
        if (
            format_ is None
            or total.layout is not torch.strided
            or total.is_neg()
            or not (total.is_contiguous() or is_dense(total))
        ):
            return total, None, None, (), None
        has_residual = format_.residual_dtype is not None and self.has_residual_of(grad)
        return total, self.residual if has_residual else None, format_, (), None

    def saved_residual(self, residual: Tensor, like: Any) -> Any:
        """Return a flat residual as a state holds it, beside the gradient ``like``: in its shape and strides."""
        return residual.as_strided(like.shape, _dense_strides(like))

    def is_complete(self, grad: Any) -> bool:
        """Return whether the gradient is more than one term of a sum over ranks."""
        return True

    # ---- whether residual and gradient belong together ----

    def forget(self) -> None:
        """Note that the residual belongs to no gradient."""
        self.written: Callable[[], Any] = _nothing
        self.version = -1

    def remember(self) -> None:
        """Note that the residual belongs to ``.grad`` as it is now."""
        grad: Any = self.param.grad
        self.written = self.last = weakref.ref(grad)
        self.version = self.version_of(grad)

    def owns(self, grad: Tensor | None) -> bool:
        """Return whether ``grad`` is what was written last, unchanged since: the residual belongs to it."""
        return grad is not None and self.written() is grad and self.version_of(grad) == self.version

    def has_residual_of(self, grad: Any) -> bool:
        """Return whether a fold into ``grad`` goes on from its residual, or from it alone where none is needed."""
        return self.written() is grad and grad._version == self.version and self._fits_format(grad)

    def valid_residual(self, grad: Tensor) -> Tensor | None:
        """Return the residual that belongs to ``grad``, flat in its memory order, if there is one."""
        return self.residual if self.has_residual_of(grad) and self.formats[grad.dtype].residual_dtype else None

    # ---- memory ----

    def residual_for(self, total: Tensor, dtype: torch.dtype) -> Tensor:
        """Return memory for the residual of a sum, made when it is needed first and kept: its address is stable."""
        if not self._fits(total, dtype):
            self.residual = torch.empty(total.numel(), dtype=dtype, device=total.device)
            self.unprepare()
        return self.residual

    def prepare(self, total: Tensor, make_fold: Callable[[Format, Start, Tensor, Any], Any], start: Start) -> None:
        """Prepare to fold into a sum that lies where ``total`` does.

        Args:
            total: the sum as the kernels take it: contiguous, or one range of memory in another order.
            make_fold: the kernels' ``fold_into``.
            start: whether the next fold starts from the sum alone, or from the residual too.
        """
        format_ = self.formats[total.dtype]
        self.fold_next = make_fold(format_, start, total, None if format_.residual_dtype is None else self.residual)
        self.address = total.data_ptr()

    def unprepare(self) -> None:
        """Take back what was prepared: the residual lies elsewhere, or the next fold starts otherwise."""
        self.address, self.fold_next = -1, _cannot

    def partials_for(self, total: Tensor) -> Tensor:
        """Return the rows for partial sums of a sum, made when they are needed first and kept."""
        rows, partials = partial_rows(total.numel()), self.partials
        if partials is None or len(partials) != rows or partials.device != total.device:
            self.partials = torch.empty((rows, PARTIALS), dtype=torch.float32, device=total.device)
        return self.partials  # type: ignore[return-value]

    def _fits_format(self, total: Tensor) -> bool:
        """Return whether the residual is of the kind and size that a sum has: .grad.data may be anything."""
        format_ = self.formats.get(total.dtype)
        if format_ is None:
            return False
        dtype = format_.residual_dtype
        return dtype is None or self._fits(total, dtype)

    def _fits(self, total: Tensor, dtype: torch.dtype) -> bool:
        residual = self.residual
        return (
            residual is not None
            and residual.dtype is dtype
            and residual.numel() == total.numel()
            and residual.get_device() == total.get_device()
        )

    # ---- the gradient ----

    def copies(self, total: Any, residual: Any) -> tuple[Any, Tensor | None]:
        """Return copies of a sum and of the residual that a state holds beside it, flat in the sum's memory order."""
        total = total.detach().clone().to(self.param.device)
        if residual is None:
            return total, None
        local = self.local(total)
        low = torch.empty_strided(local.shape, local.stride(), dtype=residual.dtype, device=local.device)
        return total, low.copy_(self.local(residual)).as_strided((low.numel(),), (1,))

    def load(self, grad: Any, residual: Tensor | None) -> None:
        """Make ``grad`` the gradient, and ``residual``, which is flat in its memory order, what belongs to it."""
        self.param.grad = grad
        self.forget()
        if residual is not None:
            if self._fits(residual, residual.dtype):
                self.residual.copy_(residual)
            else:
                self.residual = residual
                self.unprepare()
            self.remember()

    def parts(self) -> Parts:
        """Return ``.grad``, which is there, and what belongs to it, as this rank holds them."""
        total, residual, format_ = self.stored()[:3]
        return Parts(total, None if residual is None else residual.as_strided(total.shape, total.stride()), format_)

    def value(self, grad: Any) -> Any:
        """Return the accumulated value as a new FP32 tensor; a complex one as it is."""
        residual = self.valid_residual(grad)
        grad = grad.detach()
        if grad.is_complex():
            return grad.clone()
        local = self.local(grad)
        if residual is None:
            return self.whole(local.to(torch.float32, copy=True).resolve_neg(), grad)
        residual = residual.as_strided(local.shape, _dense_strides(local))
        return self.whole(decode(self.formats[local.dtype], local.resolve_neg(), residual), grad)


# ---- helpers -----------------------------------------------------------------------------------------------------


def _dense_strides(total: Tensor) -> tuple[int, ...]:
    """Return the strides of a sum as it was folded: one with holes in memory in a contiguous copy."""
    return total.stride() if is_dense(total) else torch.empty(total.shape, device="meta").stride()


def _nothing() -> None:
    return None


def _cannot(*_: object) -> bool:
    return False
