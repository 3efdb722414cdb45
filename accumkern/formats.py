"""The storage formats, bit by bit, in plain torch: the reference that every backend is compared with.

An accumulated FP32 value ``x`` is stored as ``sum``, the element of ``.grad`` (``x`` rounded to the parameter's dtype,
ties away from zero in the split formats and to even in the others), and ``residual``, what is missing of ``x``. split24
first rounds ``x`` to 16 significant bits, to even. With ``u16(h)`` the bits of a bfloat16 and all arithmetic in IEEE
binary32, round to nearest even, subnormals kept::

    split24    decode(h, l) = float((u16(h) << 16) + (int32(l) << 8))      l: int8
    split32    decode(h, l) = float((u16(h) << 16) +  int32(l))            l: int16
    main_grad  decode(h, m) = m if h == round(m) else float(h)             m: float32
    plain      decode(x)    = x                                            a float32 sum needs no residual

A zero ``h`` beside a negative ``l`` decodes to zero: ``encode`` never writes that pair, so it means that ``.grad`` was
zeroed by someone else, and the borrow would make a NaN of it. Every NaN is stored as the quiet NaN ``0x7FC00000``.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor


class Format(IntEnum):
    """How an accumulated value lies in memory. The numbers are shared with csrc/accumulate.h.

    Attributes:
        sum_dtype: of ``.grad`` and of each micro-gradient.
        residual_dtype: of the residual, or None where the sum is complete in itself.
    """

    SPLIT24 = 0, torch.bfloat16, torch.int8
    SPLIT32 = 1, torch.bfloat16, torch.int16
    MAIN_GRAD_BFLOAT16 = 2, torch.bfloat16, torch.float32
    MAIN_GRAD_FLOAT16 = 3, torch.float16, torch.float32
    PLAIN32 = 4, torch.float32, None

    sum_dtype: torch.dtype
    residual_dtype: torch.dtype | None
    __hash__ = int.__hash__  # Enum's own is a function in Python

    def __new__(cls, number: int, sum_dtype: torch.dtype, residual_dtype: torch.dtype | None) -> Format:
        """Make a member that knows its dtypes."""
        member = int.__new__(cls, number)
        member._value_ = number
        member.sum_dtype, member.residual_dtype = sum_dtype, residual_dtype
        return member


class Start(IntEnum):
    """What a fold starts from. The numbers are shared with csrc/accumulate.h."""

    CONTINUE = 0  # sum and residual
    FROM_SUM = 1  # the sum alone: the residual counts as zero and is only written
    FROM_ZERO = 2  # nothing: sum and residual are only written, and the sum may be the gradient itself


#: The format of a (sum dtype, residual dtype) pair.
FORMAT_OF_DTYPES = {(format_.sum_dtype, format_.residual_dtype): format_ for format_ in Format}

#: ``buffer`` argument of :func:`accumkern.attach` -> dtype of ``.grad`` -> format.
BUFFERS: dict[str, dict[torch.dtype, Format]] = {
    "split24": {torch.bfloat16: Format.SPLIT24, torch.float32: Format.PLAIN32},
    "split32": {torch.bfloat16: Format.SPLIT32, torch.float32: Format.PLAIN32},
    "fp32": {
        torch.bfloat16: Format.MAIN_GRAD_BFLOAT16,
        torch.float16: Format.MAIN_GRAD_FLOAT16,
        torch.float32: Format.PLAIN32,
    },
}

#: Elements per row of partial sums, and sums per row: of ``grad**2``, of the new value squared, and of the old value
#: squared where a fold starts from the sum (else zero). Shared with csrc/accumulate.h.
BLOCK_NUMEL = 4096
PARTIALS = 3

_NAN = 0x7FC00000


def partial_rows(numel: int) -> int:
    """Return how many rows of partial sums a tensor of ``numel`` elements leaves."""
    return -(-numel // BLOCK_NUMEL)


def widest(device: torch.device) -> torch.dtype:
    """Return FP64, or FP32 on a device that has no FP64."""
    return torch.float32 if device.type == "mps" else torch.float64


def decode(format_: Format, sums: Tensor, residuals: Tensor | None) -> Tensor:
    """Return the accumulated values as a new FP32 tensor of the shape of ``sums``.

    Args:
        format_: the storage format.
        sums: any shape, ``format_.sum_dtype``.
        residuals: the shape of ``sums``, ``format_.residual_dtype``; None counts as zero.
    """
    wide = sums.to(torch.float32, copy=True)
    if residuals is None:
        return wide
    if format_ in (Format.MAIN_GRAD_BFLOAT16, Format.MAIN_GRAD_FLOAT16):
        rounded = round_to(format_.sum_dtype, _canonical(residuals))
        return torch.where(rounded.view(torch.int16) == sums.view(torch.int16), residuals, wide)
    low = residuals.to(torch.int32)
    low = torch.where((wide == 0) & (low < 0), 0, low)
    return (wide.view(torch.int32) + (low << 8 if format_ is Format.SPLIT24 else low)).view(torch.float32)


def encode(format_: Format, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return ``(sums, residuals)``, the stored form of the FP32 tensor ``x``; residuals is None for PLAIN32.

    Sums of the split formats have their ties rounded away from zero: half a unit in the last place is the residual's
    least value, and it has no room for it as a greatest one.
    """
    x = _canonical(x)
    if format_ is Format.PLAIN32:
        return x, None
    if format_ in (Format.MAIN_GRAD_BFLOAT16, Format.MAIN_GRAD_FLOAT16):
        return round_to(format_.sum_dtype, x), x
    bits = x.view(torch.int32)  # int32 wraps and carries like uint32; only a right shift needs its sign masked off
    if format_ is Format.SPLIT24:
        upper = (bits + 0x7F + ((bits >> 8) & 1)) >> 8 & 0xFFFFFF
        low = ((upper + 0x80) & 0xFF) - 0x80
        high = (upper - low) >> 8
    else:
        low = ((bits + 0x8000) & 0xFFFF) - 0x8000
        high = (bits - low) >> 16
    residual_dtype = format_.residual_dtype
    assert residual_dtype is not None
    return high.to(torch.int16).view(torch.bfloat16), low.to(residual_dtype)


def round_to(dtype: torch.dtype, x: Tensor) -> Tensor:
    """Return FP32 ``x`` rounded to nearest even; NaN becomes 0x7FC0, 0x7E00, or 0x7FC00000 in FP32 itself.

    torch's own cast rounds alike, but its NaN depends on the processor.
    """
    if dtype is torch.float32:
        return _canonical(x)
    nan = 0x7FC0 if dtype is torch.bfloat16 else 0x7E00
    return torch.where(x.isnan(), nan, x.to(dtype).view(torch.int16)).to(torch.int16).view(dtype)


def divide(x: Tensor, divisor: float | Tensor) -> Tensor:
    """Return FP32 ``x / divisor``, rounded once.

    By a number, torch on CUDA multiplies with its reciprocal; by a tensor beside ``x`` it divides.
    """
    return x / fp32_scalar(divisor, x.device)


def fp32_scalar(number: float | Tensor, device: torch.device) -> Tensor:
    """Return a number, or a 0-dim tensor on ``device``, as an FP32 0-dim tensor there, without waiting for it."""
    if isinstance(number, Tensor):
        return number.to(torch.float32)
    return torch.full((), number, dtype=torch.float32, device=device)


def to_fp64(x: Tensor) -> Tensor:
    """Return ``x`` in FP64: on its device, or on the CPU where that has no FP64, as MPS."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def fma(scale: float | Tensor, grads: Tensor, x: Tensor) -> Tensor:
    """Return ``scale * grads + x`` in FP32 with one rounding.

    The product of two FP32 numbers is exact in FP64. Their sum with ``x`` is rounded to FP64 towards an odd last bit,
    which makes the second rounding, to FP32, right (S. Boldo, G. Melquiond, "Emulation of FMA and correctly rounded
    sums: proved algorithms using rounding to odd", IEEE Trans. Computers 57(4), 2008).

    Args:
        scale: a number, or a tensor of no dimension or the shape of ``grads``; it is rounded to FP32 first.
        grads: any shape, any floating dtype whose values FP32 holds.
        x: the shape of ``grads``, FP32.
    """
    a = to_fp64(torch.as_tensor(scale, dtype=torch.float32, device=grads.device)) * to_fp64(grads)
    b = to_fp64(x)
    total = a + b
    b_part = total - a
    error = (a - (total - b_part)) + (b - b_part)
    away = torch.where((error > 0) == (total > 0), 1, -1)
    even = total.view(torch.int64) & 1 == 0
    odd = (total.view(torch.int64) + torch.where(even & (error != 0) & error.isfinite(), away, 0)).view(torch.float64)
    return odd.to(torch.float32).to(x.device)


def _canonical(x: Tensor) -> Tensor:
    bits = x.view(torch.int32)
    return torch.where(bits & 0x7FFFFFFF > 0x7F800000, _NAN, bits).view(torch.float32)
