"""What belongs to one parameter: the running gradient, its residual, and whether these two belong together."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from accumkern.dtensor import is_in_group
from accumkern.formats import PARTIALS, Format, Start, decode, partial_rows
from accumkern.ops import is_dense

# Gradients of at most this many elements wait for the end of the backward pass and share one launch.
SMALL_NUMEL = 65536
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
    partials: Tensor | None = None  # left by the last fold, if nobody has changed the gradient since
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
        "device",
        "dtype",
        "formats",
        "is_cuda",
        "is_measured",
        "is_small",
        "last",
        "launch_group",
        "numel",
        "param",
        "partials",
        "residual",
        "set_aside",
        "version",
        "written",
    )

    def __init__(
        self, param: Tensor, formats: dict[torch.dtype, Format], accumulate: Callable[[Any, Tensor], None]
    ) -> None:
        self.param = param
        self.formats = formats
        self.accumulate = accumulate
        self.set_aside: Any = NOT_SET_ASIDE  # a tensor, or None where there was no gradient
        self.last: Callable[[], Any] = _nothing  # .grad as the last window or fold left it
        self.renew()

    def renew(self) -> None:
        """Begin without a residual, on the device and in the dtype that the parameter has now."""
        param = self.param
        self.device = param.device
        self.is_cuda = self.device.type == "cuda"
        self.dtype = param.dtype if param.dtype in FOLDED_DTYPES else None
        self.launch_group = _LAUNCH_GROUPS.setdefault((self.device, param.dtype), len(Start) * len(_LAUNCH_GROUPS))
        self.numel = self.local(param).numel()
        self.is_small = self.numel <= SMALL_NUMEL
        self.residual: Any = None  # a tensor, once there is one: flat, in the memory order of .grad
        self.partials: Tensor | None = None
        self.is_measured = False  # whether the partial sums are of what was written last
        self.forget()

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

    def stored(self) -> Stored:
        """Return ``.grad``, which is there, as it lies in memory."""
        grad: Any = self.param.grad
        total = self.local(grad)
        format_ = self.formats.get(total.dtype)
        if format_ is None or total.layout is not torch.strided or total.is_neg() or not is_dense(total):
            return Stored(total, None, None)
        # A collective that has written to .grad since leaves no trace in its version.
        is_measured = self.is_measured and self.owns(grad) and not is_in_group()
        return Stored(total, self.valid_residual(grad), format_, self.partials if is_measured else None)

    def saved_residual(self, residual: Tensor, like: Any) -> Any:
        """Return a flat residual as a state holds it, beside the gradient ``like``."""
        return residual

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

    def valid_residual(self, grad: Tensor) -> Tensor | None:
        """Return the residual that belongs to ``grad``, flat in its memory order, if there is one."""
        format_ = self.formats.get(grad.dtype)
        residual = self.residual
        if format_ is None or residual is None or not self.owns(grad):
            return None
        # .grad.data may be anything
        fits = residual.dtype is format_.residual_dtype and residual.numel() == self.local(grad).numel()
        return residual if fits else None

    # ---- memory ----

    def residual_for(self, total: Tensor, dtype: torch.dtype) -> Tensor:
        """Return memory for the residual of a sum, made when it is needed first and kept: its address is stable."""
        residual = self.residual
        if residual is None or residual.dtype is not dtype or residual.numel() != total.numel():
            self.residual = residual = torch.empty(total.numel(), dtype=dtype, device=self.device)
        return residual

    def partials_for(self, total: Tensor) -> Tensor:
        """Return the rows for partial sums of a sum, made when they are needed first and kept."""
        rows = partial_rows(total.numel())
        if self.partials is None or len(self.partials) != rows:
            self.partials = torch.empty((rows, PARTIALS), dtype=torch.float32, device=self.device)
        self.is_measured = True
        return self.partials

    # ---- the gradient ----

    def take(self) -> Any:
        """Return the gradient and leave None."""
        grad, self.param.grad = self.param.grad, None
        return grad

    def load(self, grad: Any, residual: Tensor | None) -> None:
        """Make ``grad`` the gradient, and a copy of ``residual``, which is flat, what belongs to it."""
        self.param.grad = grad
        self.forget()
        self.is_measured = False  # the partial sums are of what was there before
        if residual is not None:
            self.residual_for(residual, residual.dtype).copy_(residual)
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
        # One with holes in memory was folded in a contiguous copy.
        strides = local.stride() if is_dense(local) else torch.empty(local.shape, device="meta").stride()
        residual = residual.as_strided(local.shape, strides)
        return self.whole(decode(self.formats[local.dtype], local.resolve_neg(), residual), grad)


# ---- helpers -----------------------------------------------------------------------------------------------------

# Device and dtype -> a number, to which a Start can be added: cheaper to group by.
_LAUNCH_GROUPS: dict[tuple[torch.device, torch.dtype], int] = {}


def _nothing() -> None:
    return None
