"""The formats in Triton: the formulas of accumkern/formats.py, for values in registers."""

from __future__ import annotations

import triton
import triton.language as tl

from accumkern.formats import Format

# Format as numbers that a kernel can compare.
SPLIT24 = tl.constexpr(int(Format.SPLIT24))
SPLIT32 = tl.constexpr(int(Format.SPLIT32))
PLAIN32 = tl.constexpr(int(Format.PLAIN32))


@triton.jit
def canonical(x):
    """Return x with every NaN made the quiet NaN 0x7FC00000."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def widen(half):
    """Return a 16- or 32-bit float as FP32; bfloat16 by its bits, which is exact everywhere."""
    if half.dtype == tl.bfloat16:
        return (half.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return half.to(tl.float32)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """Return the canonical FP32 x rounded to nearest even in dtype."""
    if dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return rounded.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        bits = x.to(tl.int32, bitcast=True)
        rounded = x.to(tl.float16).to(tl.int16, bitcast=True)
        # The conversion's own NaN is another. Compared with 0x7FC00000 itself, LLVM would take it for 0x7E00, and leave
        # the selection out.
        return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7E00, rounded).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def decoded(total, residual, FORMAT: tl.constexpr):
    """Return the accumulated value, FP32."""
    wide = widen(total)
    if FORMAT == SPLIT24 or FORMAT == SPLIT32:
        low = residual.to(tl.int32)
        low = tl.where((wide == 0.0) & (low < 0), 0, low)
        if FORMAT == SPLIT24:
            low = low << 8
        return (wide.to(tl.int32, bitcast=True) + low).to(tl.float32, bitcast=True)
    else:
        rounded = round_to(canonical(residual), total.dtype)
        same = rounded.to(tl.int16, bitcast=True) == total.to(tl.int16, bitcast=True)
        return tl.where(same, residual, wide)


@triton.jit
def encoded(x, dtype: tl.constexpr, FORMAT: tl.constexpr):
    """Return (sum, residual) of the canonical FP32 x."""
    bits = x.to(tl.int32, bitcast=True)
    if FORMAT == SPLIT24:
        upper = ((bits + 0x7F + ((bits >> 8) & 1)) >> 8) & 0xFFFFFF
        low = upper.to(tl.int8)
        high = (upper - low.to(tl.int32)) >> 8
        return high.to(tl.int16).to(tl.bfloat16, bitcast=True), low
    elif FORMAT == SPLIT32:
        low = bits.to(tl.int16)
        high = (bits - low.to(tl.int32)) >> 16
        return high.to(tl.int16).to(tl.bfloat16, bitcast=True), low
    elif FORMAT == PLAIN32:
        return x, x
    else:
        return round_to(x, dtype), x


@triton.jit
def sum_of_squares(values, mask):
    """Return the sum of squares, FP32, in a fixed order."""
    squares = values * values
    if mask is not None:
        squares = tl.where(mask, squares, 0.0)
    return tl.sum(squares, axis=0)
