"""The accumulate kernel in Triton.

Reads from top to bottom: the formats (the formulas of accumkern/formats.py), one block of the fold, the two kernels
(one tensor; a list of small tensors), the launcher. The launch configuration is fixed: the kernel streams memory, and
an autotuner would stall the first step to find what is known beforehand.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from accumkern.formats import BLOCK_NUMEL, Format, Start, partial_rows

# The arithmetic is pinned: tl.fma where one rounding is meant, no other product is fused with a sum.
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
if torch.version.hip is None:
    OPTIONS["maxnreg"] = 96  # left to itself, the assembler for sm_100 stops at 64 registers and spills
# A tensor of at most this many elements shares a launch with others; a larger one fills the GPU by itself.
SMALL_NUMEL = 65536
# Elements a thread loads at once: 16 bytes of a 16-bit sum. Naming it keeps the one-byte residual in the same layout,
# where 16 bytes would be 16 elements and every value would be exchanged between threads through shared memory.
VECTOR = tl.constexpr(8)

# Format and Start as numbers that a kernel can compare.
SPLIT24 = tl.constexpr(int(Format.SPLIT24))
SPLIT32 = tl.constexpr(int(Format.SPLIT32))
PLAIN32 = tl.constexpr(int(Format.PLAIN32))
CONTINUE = tl.constexpr(int(Start.CONTINUE))
FROM_ZERO = tl.constexpr(int(Start.FROM_ZERO))


# ---- formats -----------------------------------------------------------------------------------------------------


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
        return tl.where(bits == 0x7FC00000, 0x7E00, rounded).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def decode(total, residual, FORMAT: tl.constexpr):
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
def encode(x, dtype: tl.constexpr, FORMAT: tl.constexpr):
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


# ---- kernels -----------------------------------------------------------------------------------------------------


@triton.jit
def fold_block(
    grad_ptr,
    sum_ptr,
    residual_ptr,
    partials_ptr,
    left,
    scale,
    FORMAT: tl.constexpr,
    START: tl.constexpr,
    PARTIALS: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Fold BLOCK_SIZE elements, or the `left` that are left of the tensor when MASKED."""
    offsets = tl.max_contiguous(tl.arange(0, BLOCK_SIZE), VECTOR)
    mask = offsets < left if MASKED else None
    g = widen(tl.load(grad_ptr + offsets, mask=mask))
    if START == FROM_ZERO:
        x = scale * g
    else:
        total = tl.load(sum_ptr + offsets, mask=mask)
        if START == CONTINUE and FORMAT != PLAIN32:
            residual = tl.load(residual_ptr + offsets, mask=mask)
            x = tl.fma(scale, g, decode(total, residual, FORMAT))
        else:
            x = tl.fma(scale, g, widen(total))
    if PARTIALS:
        grad_squares = tl.where(offsets < left, g * g, 0.0) if MASKED else g * g
        sum_squares = tl.where(offsets < left, x * x, 0.0) if MASKED else x * x
        tl.store(partials_ptr, tl.sum(grad_squares, axis=0))
        tl.store(partials_ptr + 1, tl.sum(sum_squares, axis=0))
    new_sum, new_residual = encode(canonical(x), sum_ptr.dtype.element_ty, FORMAT)
    tl.store(sum_ptr + offsets, new_sum, mask=mask)
    if FORMAT != PLAIN32:
        tl.store(residual_ptr + offsets, new_residual, mask=mask)


@triton.jit
def accumulate_kernel(
    grad_ptr,
    sum_ptr,
    residual_ptr,  # unused for PLAIN32
    partials_ptr,  # (blocks, 2) float32; unused without PARTIALS
    numel,
    scale,  # float32, or a pointer to one
    FORMAT: tl.constexpr,
    START: tl.constexpr,
    PARTIALS: tl.constexpr,
    SCALE_IS_POINTER: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """x = fma(scale, grad, decode(sum, residual)); (sum, residual) = encode(x). One program per block."""
    block = tl.program_id(0).to(tl.int64)
    begin = block * BLOCK_SIZE
    left = numel - begin
    factor = tl.load(scale) if SCALE_IS_POINTER else scale
    grad_ptr += begin
    sum_ptr += begin
    residual_ptr += begin
    partials_ptr += 2 * block
    # Two paths, so that only the last block of a tensor pays for its mask with narrow loads.
    if left >= BLOCK_SIZE:
        fold_block(
            grad_ptr, sum_ptr, residual_ptr, partials_ptr, left, factor, FORMAT, START, PARTIALS, False, BLOCK_SIZE
        )
    else:
        fold_block(
            grad_ptr, sum_ptr, residual_ptr, partials_ptr, left, factor, FORMAT, START, PARTIALS, True, BLOCK_SIZE
        )


@triton.jit
def accumulate_list_kernel(
    table_ptr,  # (tensors, 5) int64: addresses of grad, sum, residual, partials; numel
    scale,  # float32, or a pointer to one
    SUM_DTYPE: tl.constexpr,
    RESIDUAL_DTYPE: tl.constexpr,
    FORMAT: tl.constexpr,
    START: tl.constexpr,
    PARTIALS: tl.constexpr,
    ALIGNED: tl.constexpr,  # every address is a multiple of 16
    SCALE_IS_POINTER: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """The same for a list of tensors: program (b, t) folds block b of tensor t, if it has one."""
    block = tl.program_id(0).to(tl.int64)
    row_ptr = table_ptr + tl.program_id(1).to(tl.int64) * 5
    begin = block * BLOCK_SIZE
    left = tl.load(row_ptr + 4) - begin
    if left > 0:
        grad_ptr = tl.load(row_ptr).to(tl.pointer_type(SUM_DTYPE))
        sum_ptr = tl.load(row_ptr + 1).to(tl.pointer_type(SUM_DTYPE))
        residual_ptr = tl.load(row_ptr + 2).to(tl.pointer_type(RESIDUAL_DTYPE))
        partials_ptr = tl.load(row_ptr + 3).to(tl.pointer_type(tl.float32)) + 2 * block
        if ALIGNED:
            grad_ptr = tl.multiple_of(grad_ptr, 16)
            sum_ptr = tl.multiple_of(sum_ptr, 16)
            residual_ptr = tl.multiple_of(residual_ptr, 16)
        grad_ptr += begin
        sum_ptr += begin
        residual_ptr += begin
        factor = tl.load(scale) if SCALE_IS_POINTER else scale
        if left >= BLOCK_SIZE:
            fold_block(
                grad_ptr, sum_ptr, residual_ptr, partials_ptr, left, factor, FORMAT, START, PARTIALS, False, BLOCK_SIZE
            )
        else:
            fold_block(
                grad_ptr, sum_ptr, residual_ptr, partials_ptr, left, factor, FORMAT, START, PARTIALS, True, BLOCK_SIZE
            )


# ---- launcher ----------------------------------------------------------------------------------------------------

_TRITON_DTYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.int8: tl.int8,
    torch.int16: tl.int16,
    None: tl.int8,
}


def fold(
    format_: Format,
    start: Start,
    grads: list[Tensor],
    sums: list[Tensor],
    residuals: list[Tensor] | None,
    scale: float | Tensor,
    partials: list[Tensor] | None,
) -> None:
    """Fold each gradient into its sum; see :func:`accumkern.backends.fold_function` for the contract."""
    if isinstance(scale, Tensor):
        scale = scale.detach().to(torch.float32)
    device = grads[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            _fold_on_current_device(format_, start, grads, sums, residuals, scale, partials)
    else:
        _fold_on_current_device(format_, start, grads, sums, residuals, scale, partials)


def _fold_on_current_device(
    format_: Format,
    start: Start,
    grads: list[Tensor],
    sums: list[Tensor],
    residuals: list[Tensor] | None,
    scale: float | Tensor,
    partials: list[Tensor] | None,
) -> None:
    # A captured copy of the table would read host memory again at every replay, so a capture gets single launches.
    capturing = grads[0].is_cuda and torch.cuda.is_current_stream_capturing()
    small = [] if capturing else [i for i, grad in enumerate(grads) if 0 < grad.numel() <= SMALL_NUMEL]
    if len(small) > 1:
        _fold_small(format_, start, grads, sums, residuals, scale, partials, small)
    together = set(small) if len(small) > 1 else set()
    for i, grad in enumerate(grads):
        numel = grad.numel()
        if numel == 0 or i in together:
            continue
        accumulate_kernel[(partial_rows(numel),)](
            grad,
            sums[i],
            grad if residuals is None else residuals[i],
            grad if partials is None else partials[i],
            numel,
            scale,
            FORMAT=int(format_),
            START=int(start),
            PARTIALS=partials is not None,
            SCALE_IS_POINTER=isinstance(scale, Tensor),
            BLOCK_SIZE=BLOCK_NUMEL,
            **OPTIONS,
        )


def _fold_small(
    format_: Format,
    start: Start,
    grads: list[Tensor],
    sums: list[Tensor],
    residuals: list[Tensor] | None,
    scale: float | Tensor,
    partials: list[Tensor] | None,
    small: list[int],
) -> None:
    rows = [
        [
            grads[i].data_ptr(),
            sums[i].data_ptr(),
            0 if residuals is None else residuals[i].data_ptr(),
            0 if partials is None else partials[i].data_ptr(),
            grads[i].numel(),
        ]
        for i in small
    ]
    device = grads[0].device
    table = torch.tensor(rows, dtype=torch.int64, pin_memory=device.type == "cuda").to(device, non_blocking=True)
    accumulate_list_kernel[(partial_rows(max(row[4] for row in rows)), len(rows))](
        table,
        scale,
        SUM_DTYPE=_TRITON_DTYPES[format_.sum_dtype],
        RESIDUAL_DTYPE=_TRITON_DTYPES[format_.residual_dtype],
        FORMAT=int(format_),
        START=int(start),
        PARTIALS=partials is not None,
        ALIGNED=all(address % 16 == 0 for row in rows for address in row[:3]),
        SCALE_IS_POINTER=isinstance(scale, Tensor),
        BLOCK_SIZE=BLOCK_NUMEL,
        **OPTIONS,
    )
