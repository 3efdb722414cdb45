"""The kernels in Triton, for one block of a tensor, whose parts are given by their addresses, int64.

Blocks that are whole have a path of their own, so that only the last block of a tensor pays for its mask with narrow
loads. Each path makes its offsets itself: shared, they would lie in registers, and fewer blocks would run at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from accumkern.backends.triton_math import PLAIN32, canonical, decoded, encoded, round_to, sum_of_squares, widen
from accumkern.formats import BLOCK_NUMEL, PARTIALS, Format, Start

# Start as numbers that a kernel can compare.
CONTINUE = tl.constexpr(int(Start.CONTINUE))
FROM_SUM = tl.constexpr(int(Start.FROM_SUM))
FROM_ZERO = tl.constexpr(int(Start.FROM_ZERO))

BLOCK_SIZE = tl.constexpr(BLOCK_NUMEL)
PARTIAL_COLUMNS = tl.constexpr(PARTIALS)
# Elements a thread loads at once: 16 bytes of a 16-bit sum. Naming it keeps the one-byte residual in the same layout,
# where 16 bytes would be 16 elements and every value would be exchanged between threads through shared memory.
VECTOR = tl.constexpr(8)
# Triton's dtypes of a format's sum and residual, by its number; without a residual, any.
DTYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.int8: tl.int8,
    torch.int16: tl.int16,
    None: tl.int8,
}
SUM_DTYPES = tl.constexpr(tuple(DTYPES[format_.sum_dtype] for format_ in Format))
RESIDUAL_DTYPES = tl.constexpr(tuple(DTYPES[format_.residual_dtype] for format_ in Format))


# ---- elements ----------------------------------------------------------------------------------------------------


@triton.jit
def load_value(sum_ptr, residual_ptr, offsets, mask, FORMAT: tl.constexpr, START: tl.constexpr):
    """Return the accumulated values, FP32: of sum and residual, or of the sum alone."""
    total = tl.load(sum_ptr + offsets, mask=mask)
    if START == CONTINUE and FORMAT != PLAIN32:
        return decoded(total, tl.load(residual_ptr + offsets, mask=mask), FORMAT)
    else:
        return widen(total)


@triton.jit
def store_value(sum_ptr, residual_ptr, offsets, mask, x, FORMAT: tl.constexpr):
    """Store FP32 values as sum and residual."""
    new_sum, new_residual = encoded(canonical(x), sum_ptr.dtype.element_ty, FORMAT)
    tl.store(sum_ptr + offsets, new_sum, mask=mask)
    if FORMAT != PLAIN32:
        tl.store(residual_ptr + offsets, new_residual, mask=mask)


@triton.jit
def fold_elements(
    grad_ptr,
    sum_ptr,
    residual_ptr,
    partials_ptr,
    left,
    scale,
    FORMAT: tl.constexpr,
    START: tl.constexpr,
    PARTIALS: tl.constexpr,
):
    """Fold BLOCK_SIZE elements, or the first `left` if that is not None."""
    offsets = tl.max_contiguous(tl.arange(0, BLOCK_SIZE), VECTOR)
    mask = None if left is None else offsets < left
    g = widen(tl.load(grad_ptr + offsets, mask=mask))
    if START == FROM_ZERO:
        x = scale * g
    else:
        old = load_value(sum_ptr, residual_ptr, offsets, mask, FORMAT, START)
        x = tl.fma(scale, g, old)
    if PARTIALS:
        tl.store(partials_ptr, sum_of_squares(g, mask))
        tl.store(partials_ptr + 1, sum_of_squares(x, mask))
        tl.store(partials_ptr + 2, sum_of_squares(old, mask) if START == FROM_SUM else 0.0)
    store_value(sum_ptr, residual_ptr, offsets, mask, x, FORMAT)


@triton.jit
def finish_elements(
    sum_ptr,
    residual_ptr,
    left,
    divisor,
    factor,
    FORMAT: tl.constexpr,
    START: tl.constexpr,
    RESCALES: tl.constexpr,
):
    """Finish or rescale BLOCK_SIZE elements, or the first `left` if that is not None."""
    offsets = tl.max_contiguous(tl.arange(0, BLOCK_SIZE), VECTOR)
    mask = None if left is None else offsets < left
    x = load_value(sum_ptr, residual_ptr, offsets, mask, FORMAT, START)
    x = tl.div_rn(x, tl.zeros_like(x) + divisor) * factor
    if RESCALES or FORMAT == PLAIN32:
        store_value(sum_ptr, residual_ptr, offsets, mask, x, FORMAT)
    else:
        tl.store(sum_ptr + offsets, round_to(canonical(x), sum_ptr.dtype.element_ty), mask=mask)


@triton.jit
def decode_elements(sum_ptr, residual_ptr, value_ptr, left, FORMAT: tl.constexpr):
    """Decode BLOCK_SIZE elements, or the first `left` if that is not None."""
    offsets = tl.max_contiguous(tl.arange(0, BLOCK_SIZE), VECTOR)
    mask = None if left is None else offsets < left
    tl.store(value_ptr + offsets, load_value(sum_ptr, residual_ptr, offsets, mask, FORMAT, CONTINUE), mask=mask)


@triton.jit
def encode_elements(value_ptr, sum_ptr, residual_ptr, left, divisor, FORMAT: tl.constexpr):
    """Encode BLOCK_SIZE elements, or the first `left` if that is not None."""
    offsets = tl.max_contiguous(tl.arange(0, BLOCK_SIZE), VECTOR)
    mask = None if left is None else offsets < left
    x = tl.load(value_ptr + offsets, mask=mask)
    store_value(sum_ptr, residual_ptr, offsets, mask, tl.div_rn(x, tl.zeros_like(x) + divisor), FORMAT)


@triton.jit
def square_elements(sum_ptr, residual_ptr, partial_ptr, left, FORMAT: tl.constexpr, START: tl.constexpr):
    """Square and add up BLOCK_SIZE elements, or the first `left` if that is not None."""
    offsets = tl.max_contiguous(tl.arange(0, BLOCK_SIZE), VECTOR)
    mask = None if left is None else offsets < left
    x = load_value(sum_ptr, residual_ptr, offsets, mask, FORMAT, START)
    tl.store(partial_ptr, sum_of_squares(x, mask))


@triton.jit
def mean_elements(
    sums_address,
    residuals_address,
    sum_stride,
    residual_stride,
    ranks,
    begin,
    left,
    out_sum_ptr,
    out_residual_ptr,
    divisor,
    ALIGNED: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """Add up BLOCK_SIZE elements of each rank, or the first `left` if that is not None, divide and store."""
    offsets = tl.max_contiguous(tl.arange(0, BLOCK_SIZE), VECTOR)
    mask = None if left is None else offsets < left
    # -0 leaves what is added to it as it is, zeros too. By its bits: some versions of triton make 0 of it.
    x = tl.full([BLOCK_SIZE], -0x80000000, tl.int32).to(tl.float32, bitcast=True)
    while ranks > 0:  # no range, whose end some versions of triton's interpreter cannot read from a tensor
        sum_ptr = pointer(sums_address, SUM_DTYPES[FORMAT], ALIGNED) + begin
        residual_ptr = pointer(residuals_address, RESIDUAL_DTYPES[FORMAT], ALIGNED) + begin
        x += load_value(sum_ptr, residual_ptr, offsets, mask, FORMAT, CONTINUE)
        sums_address += sum_stride
        residuals_address += residual_stride
        ranks -= 1
    store_value(out_sum_ptr, out_residual_ptr, offsets, mask, tl.div_rn(x, tl.zeros_like(x) + divisor), FORMAT)


# ---- blocks ------------------------------------------------------------------------------------------------------


@triton.jit
def pointer(address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return a pointer; ALIGNED tells the compiler that it is a multiple of 16, which lets loads and stores be wide."""
    ptr = address.to(tl.int64).to(tl.pointer_type(DTYPE))  # to the interpreter a zero is an int32
    if ALIGNED:
        ptr = tl.multiple_of(ptr, 16)
    return ptr


@triton.jit
def fold_block(
    grad_address,
    sum_address,
    residual_address,  # unused for PLAIN32
    partials_address,  # (blocks, 3) float32; unused without PARTIALS
    numel,
    block,
    scale,
    ALIGNED: tl.constexpr,
    FORMAT: tl.constexpr,
    START: tl.constexpr,
    PARTIALS: tl.constexpr,
):
    """x = fma(scale, grad, decode(sum, residual)); (sum, residual) = encode(x), for a tensor's block."""
    begin = block.to(tl.int64) * BLOCK_SIZE
    left = numel - begin
    grad_ptr = pointer(grad_address, SUM_DTYPES[FORMAT], ALIGNED) + begin
    sum_ptr = pointer(sum_address, SUM_DTYPES[FORMAT], ALIGNED) + begin
    residual_ptr = pointer(residual_address, RESIDUAL_DTYPES[FORMAT], ALIGNED) + begin
    partials_ptr = pointer(partials_address, tl.float32, False) + block.to(tl.int64) * PARTIAL_COLUMNS
    if left >= BLOCK_SIZE:
        fold_elements(grad_ptr, sum_ptr, residual_ptr, partials_ptr, None, scale, FORMAT, START, PARTIALS)
    elif left > 0:
        fold_elements(grad_ptr, sum_ptr, residual_ptr, partials_ptr, left, scale, FORMAT, START, PARTIALS)


@triton.jit
def finish_block(
    sum_address,
    residual_address,  # unused for PLAIN32; not read for FROM_SUM, not written without RESCALES
    numel,
    block,
    divisor,
    factor,
    ALIGNED: tl.constexpr,
    FORMAT: tl.constexpr,
    START: tl.constexpr,
    RESCALES: tl.constexpr,
):
    """sum = round((decode(sum, residual) / divisor) * factor), for a tensor's block; to rescale is to encode that."""
    begin = block.to(tl.int64) * BLOCK_SIZE
    left = numel - begin
    sum_ptr = pointer(sum_address, SUM_DTYPES[FORMAT], ALIGNED) + begin
    residual_ptr = pointer(residual_address, RESIDUAL_DTYPES[FORMAT], ALIGNED) + begin
    if left >= BLOCK_SIZE:
        finish_elements(sum_ptr, residual_ptr, None, divisor, factor, FORMAT, START, RESCALES)
    elif left > 0:
        finish_elements(sum_ptr, residual_ptr, left, divisor, factor, FORMAT, START, RESCALES)


@triton.jit
def decode_block(
    sum_address,
    residual_address,  # unused for PLAIN32
    value_address,  # float32
    numel,
    block,
    ALIGNED: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """value = decode(sum, residual), for a tensor's block."""
    begin = block.to(tl.int64) * BLOCK_SIZE
    left = numel - begin
    sum_ptr = pointer(sum_address, SUM_DTYPES[FORMAT], ALIGNED) + begin
    residual_ptr = pointer(residual_address, RESIDUAL_DTYPES[FORMAT], ALIGNED) + begin
    value_ptr = pointer(value_address, tl.float32, ALIGNED) + begin
    if left >= BLOCK_SIZE:
        decode_elements(sum_ptr, residual_ptr, value_ptr, None, FORMAT)
    elif left > 0:
        decode_elements(sum_ptr, residual_ptr, value_ptr, left, FORMAT)


@triton.jit
def encode_block(
    value_address,  # float32
    sum_address,
    residual_address,  # unused for PLAIN32
    numel,
    block,
    divisor,
    ALIGNED: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """(sum, residual) = encode(value / divisor), for a tensor's block."""
    begin = block.to(tl.int64) * BLOCK_SIZE
    left = numel - begin
    value_ptr = pointer(value_address, tl.float32, ALIGNED) + begin
    sum_ptr = pointer(sum_address, SUM_DTYPES[FORMAT], ALIGNED) + begin
    residual_ptr = pointer(residual_address, RESIDUAL_DTYPES[FORMAT], ALIGNED) + begin
    if left >= BLOCK_SIZE:
        encode_elements(value_ptr, sum_ptr, residual_ptr, None, divisor, FORMAT)
    elif left > 0:
        encode_elements(value_ptr, sum_ptr, residual_ptr, left, divisor, FORMAT)


@triton.jit
def square_block(
    sum_address,
    residual_address,  # unused for PLAIN32 and FROM_SUM
    partials_address,  # (blocks,) float32
    numel,
    block,
    ALIGNED: tl.constexpr,
    FORMAT: tl.constexpr,
    START: tl.constexpr,
):
    """partial = the sum of decode(sum, residual)**2 over a tensor's block, as a fold of the same values leaves it."""
    begin = block.to(tl.int64) * BLOCK_SIZE
    left = numel - begin
    sum_ptr = pointer(sum_address, SUM_DTYPES[FORMAT], ALIGNED) + begin
    residual_ptr = pointer(residual_address, RESIDUAL_DTYPES[FORMAT], ALIGNED) + begin
    partials_ptr = pointer(partials_address, tl.float32, False) + block.to(tl.int64)
    if left >= BLOCK_SIZE:
        square_elements(sum_ptr, residual_ptr, partials_ptr, None, FORMAT, START)
    elif left > 0:
        square_elements(sum_ptr, residual_ptr, partials_ptr, left, FORMAT, START)


@triton.jit
def mean_block(
    sums_address,
    residuals_address,
    sum_stride,  # bytes from a rank to the next
    residual_stride,
    ranks,
    numel,
    out_sum_address,
    out_residual_address,
    block,
    divisor,
    ALIGNED: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """(out_sum, out_residual) = encode((decode of the first rank's + of the second's + ...) / divisor), for a block."""
    begin = block.to(tl.int64) * BLOCK_SIZE
    left = numel - begin
    out_sum_ptr = pointer(out_sum_address, SUM_DTYPES[FORMAT], ALIGNED) + begin
    out_residual_ptr = pointer(out_residual_address, RESIDUAL_DTYPES[FORMAT], ALIGNED) + begin
    if left >= BLOCK_SIZE:
        mean_elements(
            sums_address,
            residuals_address,
            sum_stride,
            residual_stride,
            ranks,
            begin,
            None,
            out_sum_ptr,
            out_residual_ptr,
            divisor,
            ALIGNED,
            FORMAT,
        )
    elif left > 0:
        mean_elements(
            sums_address,
            residuals_address,
            sum_stride,
            residual_stride,
            ranks,
            begin,
            left,
            out_sum_ptr,
            out_residual_ptr,
            divisor,
            ALIGNED,
            FORMAT,
        )
