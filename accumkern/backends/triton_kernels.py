"""The kernels in Triton, for one tensor and for a list of small ones: each program does one block.

A kernel's scalar is a float32, or a pointer to one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from accumkern.backends.triton_blocks import (
    BLOCK_SIZE,
    decode_block,
    encode_block,
    finish_block,
    fold_block,
    square_block,
)


@triton.jit
def load_scalar(scalar, IS_POINTER: tl.constexpr):
    """Return a float32, given by its value or by a pointer to it."""
    if IS_POINTER:
        return tl.load(scalar)
    else:
        return scalar


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
    RESCALES: tl.constexpr,
    DIVISOR_IS_POINTER: tl.constexpr,
    FACTOR_IS_POINTER: tl.constexpr,
):
    """Finish or rescale one tensor: program b does block b."""
    divide_by, multiply_by = load_scalar(divisor, DIVISOR_IS_POINTER), load_scalar(factor, FACTOR_IS_POINTER)
    finish_block(sum_ptr, residual_ptr, numel, tl.program_id(0), divide_by, multiply_by, FORMAT, START, RESCALES)


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


# Partial sums of several tensors may lie side by side; whether those of one are aligned must not choose the machine
# code, which could not be loaded while a CUDA graph is captured.
@triton.jit(do_not_specialize=["numel"], do_not_specialize_on_alignment=["partials_ptr"])
def squares_kernel(sum_ptr, residual_ptr, partials_ptr, numel, FORMAT: tl.constexpr, START: tl.constexpr):
    """Square and add up one tensor: program b does block b."""
    square_block(sum_ptr, residual_ptr, partials_ptr, numel, tl.program_id(0), FORMAT, START)


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
    RESCALES: tl.constexpr,
    DIVISOR_IS_POINTER: tl.constexpr,
    FACTOR_IS_POINTER: tl.constexpr,
    SUM_DTYPE: tl.constexpr,
    RESIDUAL_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Finish or rescale a list of tensors: program (t, b) does block b of tensor t."""
    row_ptr = table_ptr + tl.program_id(0).to(tl.int64) * 3
    sum_ptr = load_pointer(row_ptr, 0, SUM_DTYPE, ALIGNED)
    residual_ptr = load_pointer(row_ptr, 1, RESIDUAL_DTYPE, ALIGNED)
    numel = tl.load(row_ptr + 2)
    block = tl.program_id(1)
    if block * BLOCK_SIZE < numel:
        divide_by, multiply_by = load_scalar(divisor, DIVISOR_IS_POINTER), load_scalar(factor, FACTOR_IS_POINTER)
        finish_block(sum_ptr, residual_ptr, numel, block, divide_by, multiply_by, FORMAT, START, RESCALES)


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


@triton.jit
def squares_list_kernel(
    table_ptr,  # (tensors, 4)
    FORMAT: tl.constexpr,
    START: tl.constexpr,
    SUM_DTYPE: tl.constexpr,
    RESIDUAL_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Square and add up a list of tensors: program (t, b) does block b of tensor t."""
    row_ptr = table_ptr + tl.program_id(0).to(tl.int64) * 4
    sum_ptr = load_pointer(row_ptr, 0, SUM_DTYPE, ALIGNED)
    residual_ptr = load_pointer(row_ptr, 1, RESIDUAL_DTYPE, ALIGNED)
    partials_ptr = load_pointer(row_ptr, 2, tl.float32, False)
    numel = tl.load(row_ptr + 3)
    block = tl.program_id(1)
    if block * BLOCK_SIZE < numel:
        square_block(sum_ptr, residual_ptr, partials_ptr, numel, block, FORMAT, START)
