"""The kernels in Triton: each operation on the elements of a block, then for one tensor and for a list of small ones.

Blocks that are whole have a path of their own, so that only the last block of a tensor pays for its mask with narrow
loads. Each path makes its offsets itself: shared, they would lie in registers, and fewer blocks would run at a time. A
kernel's scalar is a float32, or a pointer to one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from accumkern.backends.triton_math import PLAIN32, canonical, decoded, encoded, round_to, sum_of_squares, widen
from accumkern.formats import BLOCK_NUMEL, PARTIALS, Start

# Start as numbers that a kernel can compare.
CONTINUE = tl.constexpr(int(Start.CONTINUE))
FROM_SUM = tl.constexpr(int(Start.FROM_SUM))
FROM_ZERO = tl.constexpr(int(Start.FROM_ZERO))

BLOCK_SIZE = tl.constexpr(BLOCK_NUMEL)
PARTIAL_COLUMNS = tl.constexpr(PARTIALS)
# Elements a thread loads at once: 16 bytes of a 16-bit sum. Naming it keeps the one-byte residual in the same layout,
# where 16 bytes would be 16 elements and every value would be exchanged between threads through shared memory.
VECTOR = tl.constexpr(8)


# ---- elements ----------------------------------------------------------------------------------------------------


@triton.jit
def load_scalar(scalar, IS_POINTER: tl.constexpr):
    """Return a float32, given by its value or by a pointer to it."""
    if IS_POINTER:
        return tl.load(scalar)
    else:
        return scalar


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
def finish_elements(sum_ptr, residual_ptr, left, divisor, factor, FORMAT: tl.constexpr, START: tl.constexpr):
    """Finish BLOCK_SIZE elements, or the first `left` if that is not None."""
    offsets = tl.max_contiguous(tl.arange(0, BLOCK_SIZE), VECTOR)
    mask = None if left is None else offsets < left
    x = load_value(sum_ptr, residual_ptr, offsets, mask, FORMAT, START)
    x = canonical(tl.div_rn(x, tl.zeros_like(x) + divisor) * factor)
    if FORMAT == PLAIN32:
        tl.store(sum_ptr + offsets, x, mask=mask)
    else:
        tl.store(sum_ptr + offsets, round_to(x, sum_ptr.dtype.element_ty), mask=mask)


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


# ---- blocks ------------------------------------------------------------------------------------------------------


@triton.jit
def fold_block(
    grad_ptr,
    sum_ptr,
    residual_ptr,  # unused for PLAIN32
    partials_ptr,  # (blocks, 3) float32; unused without PARTIALS
    numel,
    block,
    scale,
    FORMAT: tl.constexpr,
    START: tl.constexpr,
    PARTIALS: tl.constexpr,
):
    """x = fma(scale, grad, decode(sum, residual)); (sum, residual) = encode(x), for a tensor's block."""
    begin = block.to(tl.int64) * BLOCK_SIZE
    left = numel - begin
    grad_ptr += begin
    sum_ptr += begin
    residual_ptr += begin
    partials_ptr += block.to(tl.int64) * PARTIAL_COLUMNS
    if left >= BLOCK_SIZE:
        fold_elements(grad_ptr, sum_ptr, residual_ptr, partials_ptr, None, scale, FORMAT, START, PARTIALS)
    else:
        fold_elements(grad_ptr, sum_ptr, residual_ptr, partials_ptr, left, scale, FORMAT, START, PARTIALS)


@triton.jit
def finish_block(
    sum_ptr,
    residual_ptr,  # unused for PLAIN32 and FROM_SUM
    numel,
    block,
    divisor,
    factor,
    FORMAT: tl.constexpr,
    START: tl.constexpr,
):
    """sum = round((decode(sum, residual) / divisor) * factor), for a tensor's block."""
    begin = block.to(tl.int64) * BLOCK_SIZE
    left = numel - begin
    sum_ptr += begin
    residual_ptr += begin
    if left >= BLOCK_SIZE:
        finish_elements(sum_ptr, residual_ptr, None, divisor, factor, FORMAT, START)
    else:
        finish_elements(sum_ptr, residual_ptr, left, divisor, factor, FORMAT, START)


@triton.jit
def decode_block(
    sum_ptr,
    residual_ptr,  # unused for PLAIN32
    value_ptr,  # float32
    numel,
    block,
    FORMAT: tl.constexpr,
):
    """value = decode(sum, residual), for a tensor's block."""
    begin = block.to(tl.int64) * BLOCK_SIZE
    left = numel - begin
    sum_ptr += begin
    residual_ptr += begin
    value_ptr += begin
    if left >= BLOCK_SIZE:
        decode_elements(sum_ptr, residual_ptr, value_ptr, None, FORMAT)
    else:
        decode_elements(sum_ptr, residual_ptr, value_ptr, left, FORMAT)


@triton.jit
def encode_block(
    value_ptr,  # float32
    sum_ptr,
    residual_ptr,  # unused for PLAIN32
    numel,
    block,
    divisor,
    FORMAT: tl.constexpr,
):
    """(sum, residual) = encode(value / divisor), for a tensor's block."""
    begin = block.to(tl.int64) * BLOCK_SIZE
    left = numel - begin
    value_ptr += begin
    sum_ptr += begin
    residual_ptr += begin
    if left >= BLOCK_SIZE:
        encode_elements(value_ptr, sum_ptr, residual_ptr, None, divisor, FORMAT)
    else:
        encode_elements(value_ptr, sum_ptr, residual_ptr, left, divisor, FORMAT)


# ---- kernels for one tensor --------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["numel"])
def accumulate_kernel(
    grad_ptr,
    sum_ptr,
    residual_ptr,
    partials_ptr,
    numel,
    scale,
    FORMAT: tl.constexpr,
    START: tl.constexpr,
    PARTIALS: tl.constexpr,
    SCALE_IS_POINTER: tl.constexpr,
):
    """Fold one tensor: program b does block b."""
    block, factor = tl.program_id(0), load_scalar(scale, SCALE_IS_POINTER)
    fold_block(grad_ptr, sum_ptr, residual_ptr, partials_ptr, numel, block, factor, FORMAT, START, PARTIALS)


@triton.jit(do_not_specialize=["numel"])
def finish_kernel(
    sum_ptr,
    residual_ptr,
    numel,
    divisor,
    factor,
    FORMAT: tl.constexpr,
    START: tl.constexpr,
    DIVISOR_IS_POINTER: tl.constexpr,
    FACTOR_IS_POINTER: tl.constexpr,
):
    """Finish one tensor: program b does block b."""
    divide_by, multiply_by = load_scalar(divisor, DIVISOR_IS_POINTER), load_scalar(factor, FACTOR_IS_POINTER)
    finish_block(sum_ptr, residual_ptr, numel, tl.program_id(0), divide_by, multiply_by, FORMAT, START)


@triton.jit(do_not_specialize=["numel"])
def decode_kernel(sum_ptr, residual_ptr, value_ptr, numel, FORMAT: tl.constexpr):
    """Decode one tensor: program b does block b."""
    decode_block(sum_ptr, residual_ptr, value_ptr, numel, tl.program_id(0), FORMAT)


@triton.jit(do_not_specialize=["numel"])
def encode_kernel(
    value_ptr, sum_ptr, residual_ptr, numel, divisor, FORMAT: tl.constexpr, DIVISOR_IS_POINTER: tl.constexpr
):
    """Encode one tensor: program b does block b."""
    divide_by = load_scalar(divisor, DIVISOR_IS_POINTER)
    encode_block(value_ptr, sum_ptr, residual_ptr, numel, tl.program_id(0), divide_by, FORMAT)


# ---- kernels for a list ------------------------------------------------------------------------------------------
#
# A table has a row for each tensor: what the kernel for one tensor takes up to numel, int64. A shorter tensor has fewer
# blocks than the grid.


@triton.jit
def load_pointer(row_ptr, COLUMN: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return a pointer from a row; ALIGNED tells the compiler that it is a multiple of 16."""
    pointer = tl.load(row_ptr + COLUMN).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def accumulate_list_kernel(
    table_ptr,  # (tensors, 5)
    scale,
    FORMAT: tl.constexpr,
    START: tl.constexpr,
    PARTIALS: tl.constexpr,
    SCALE_IS_POINTER: tl.constexpr,
    SUM_DTYPE: tl.constexpr,
    RESIDUAL_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Fold a list of tensors: program (t, b) does block b of tensor t."""
    row_ptr = table_ptr + tl.program_id(0).to(tl.int64) * 5
    grad_ptr = load_pointer(row_ptr, 0, SUM_DTYPE, ALIGNED)
    sum_ptr = load_pointer(row_ptr, 1, SUM_DTYPE, ALIGNED)
    residual_ptr = load_pointer(row_ptr, 2, RESIDUAL_DTYPE, ALIGNED)
    partials_ptr = load_pointer(row_ptr, 3, tl.float32, False)
    numel = tl.load(row_ptr + 4)
    block = tl.program_id(1)
    if block * BLOCK_SIZE < numel:
        factor = load_scalar(scale, SCALE_IS_POINTER)
        fold_block(grad_ptr, sum_ptr, residual_ptr, partials_ptr, numel, block, factor, FORMAT, START, PARTIALS)


@triton.jit
def finish_list_kernel(
    table_ptr,  # (tensors, 3)
    divisor,
    factor,
    FORMAT: tl.constexpr,
    START: tl.constexpr,
    DIVISOR_IS_POINTER: tl.constexpr,
    FACTOR_IS_POINTER: tl.constexpr,
    SUM_DTYPE: tl.constexpr,
    RESIDUAL_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Finish a list of tensors: program (t, b) does block b of tensor t."""
    row_ptr = table_ptr + tl.program_id(0).to(tl.int64) * 3
    sum_ptr = load_pointer(row_ptr, 0, SUM_DTYPE, ALIGNED)
    residual_ptr = load_pointer(row_ptr, 1, RESIDUAL_DTYPE, ALIGNED)
    numel = tl.load(row_ptr + 2)
    block = tl.program_id(1)
    if block * BLOCK_SIZE < numel:
        divide_by, multiply_by = load_scalar(divisor, DIVISOR_IS_POINTER), load_scalar(factor, FACTOR_IS_POINTER)
        finish_block(sum_ptr, residual_ptr, numel, block, divide_by, multiply_by, FORMAT, START)


@triton.jit
def decode_list_kernel(
    table_ptr,  # (tensors, 4)
    FORMAT: tl.constexpr,
    SUM_DTYPE: tl.constexpr,
    RESIDUAL_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Decode a list of tensors: program (t, b) does block b of tensor t."""
    row_ptr = table_ptr + tl.program_id(0).to(tl.int64) * 4
    sum_ptr = load_pointer(row_ptr, 0, SUM_DTYPE, ALIGNED)
    residual_ptr = load_pointer(row_ptr, 1, RESIDUAL_DTYPE, ALIGNED)
    value_ptr = load_pointer(row_ptr, 2, tl.float32, ALIGNED)
    numel = tl.load(row_ptr + 3)
    block = tl.program_id(1)
    if block * BLOCK_SIZE < numel:
        decode_block(sum_ptr, residual_ptr, value_ptr, numel, block, FORMAT)


@triton.jit
def encode_list_kernel(
    table_ptr,  # (tensors, 4)
    divisor,
    FORMAT: tl.constexpr,
    DIVISOR_IS_POINTER: tl.constexpr,
    SUM_DTYPE: tl.constexpr,
    RESIDUAL_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Encode a list of tensors: program (t, b) does block b of tensor t."""
    row_ptr = table_ptr + tl.program_id(0).to(tl.int64) * 4
    value_ptr = load_pointer(row_ptr, 0, tl.float32, ALIGNED)
    sum_ptr = load_pointer(row_ptr, 1, SUM_DTYPE, ALIGNED)
    residual_ptr = load_pointer(row_ptr, 2, RESIDUAL_DTYPE, ALIGNED)
    numel = tl.load(row_ptr + 3)
    block = tl.program_id(1)
    if block * BLOCK_SIZE < numel:
        divide_by = load_scalar(divisor, DIVISOR_IS_POINTER)
        encode_block(value_ptr, sum_ptr, residual_ptr, numel, block, divide_by, FORMAT)
