"""The kernels in Triton, for one tensor and for a list, each program doing one block; and the end of a norm.

A kernel's scalar is a float32, or a pointer to one; tensors are given by their addresses, int64. What a kernel is given
besides constants does not choose the machine code: what a first launch has loaded does for all with the same constants.
"""

from __future__ import annotations

import triton
import triton.language as tl

from accumkern.backends.triton_blocks import (
    decode_block,
    encode_block,
    finish_block,
    fold_block,
    mean_block,
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


@triton.jit(do_not_specialize=range(6))
def accumulate_kernel(
    grad_address: tl.int64,
    sum_address: tl.int64,
    residual_address: tl.int64,
    numel: tl.int64,
    partials_address: tl.int64,
    scale,
    ALIGNED: tl.constexpr,
    FORMAT: tl.constexpr,
    START: tl.constexpr,
    PARTIALS: tl.constexpr,
    SCALE_IS_POINTER: tl.constexpr,
):
    """Fold one tensor: program b does block b."""
    fold_block(
        grad_address,
        sum_address,
        residual_address,
        partials_address,
        numel,
        tl.program_id(0),
        load_scalar(scale, SCALE_IS_POINTER),
        ALIGNED,
        FORMAT,
        START,
        PARTIALS,
    )


@triton.jit(do_not_specialize=range(5))
def finish_kernel(
    sum_address: tl.int64,
    residual_address: tl.int64,
    numel: tl.int64,
    divisor,
    factor,
    ALIGNED: tl.constexpr,
    FORMAT: tl.constexpr,
    START: tl.constexpr,
    RESCALES: tl.constexpr,
    DIVISOR_IS_POINTER: tl.constexpr,
    FACTOR_IS_POINTER: tl.constexpr,
):
    """Finish or rescale one tensor: program b does block b."""
    block = tl.program_id(0)
    divide_by, multiply_by = load_scalar(divisor, DIVISOR_IS_POINTER), load_scalar(factor, FACTOR_IS_POINTER)
    finish_block(sum_address, residual_address, numel, block, divide_by, multiply_by, ALIGNED, FORMAT, START, RESCALES)


@triton.jit(do_not_specialize=range(4))
def decode_kernel(
    sum_address: tl.int64,
    residual_address: tl.int64,
    value_address: tl.int64,
    numel: tl.int64,
    ALIGNED: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """Decode one tensor: program b does block b."""
    decode_block(sum_address, residual_address, value_address, numel, tl.program_id(0), ALIGNED, FORMAT)


@triton.jit(do_not_specialize=range(5))
def encode_kernel(
    value_address: tl.int64,
    sum_address: tl.int64,
    residual_address: tl.int64,
    numel: tl.int64,
    divisor,
    ALIGNED: tl.constexpr,
    FORMAT: tl.constexpr,
    DIVISOR_IS_POINTER: tl.constexpr,
):
    """Encode one tensor: program b does block b."""
    divide_by = load_scalar(divisor, DIVISOR_IS_POINTER)
    encode_block(value_address, sum_address, residual_address, numel, tl.program_id(0), divide_by, ALIGNED, FORMAT)


@triton.jit(do_not_specialize=range(4))
def squares_kernel(
    sum_address: tl.int64,
    residual_address: tl.int64,
    numel: tl.int64,
    partials_address: tl.int64,
    ALIGNED: tl.constexpr,
    FORMAT: tl.constexpr,
    START: tl.constexpr,
):
    """Square and add up one tensor: program b does block b."""
    square_block(sum_address, residual_address, partials_address, numel, tl.program_id(0), ALIGNED, FORMAT, START)


# ---- the mean over ranks -----------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=range(9))
def mean_kernel(
    sums_address: tl.int64,
    residuals_address: tl.int64,
    sum_stride: tl.int64,
    residual_stride: tl.int64,
    ranks: tl.int64,
    numel: tl.int64,
    out_sum_address: tl.int64,
    out_residual_address: tl.int64,
    divisor,
    ALIGNED: tl.constexpr,
    FORMAT: tl.constexpr,
    DIVISOR_IS_POINTER: tl.constexpr,
):
    """Add up what ranks have, divide and store: program b does block b of every rank."""
    mean_block(
        sums_address,
        residuals_address,
        sum_stride,
        residual_stride,
        ranks,
        numel,
        out_sum_address,
        out_residual_address,
        tl.program_id(0),
        load_scalar(divisor, DIVISOR_IS_POINTER),
        ALIGNED,
        FORMAT,
    )


# ---- kernels for a list ------------------------------------------------------------------------------------------
#
# Their programs do the blocks of the tensors one after another. A table, int64, has columns of as many entries as there
# are tensors: first the number of each tensor's first block, ascending; then one for each number that the kernel for
# one tensor takes, in its order.


@triton.jit
def tensor_of_program(table_ptr, count):
    """Return (index, block): the last tensor whose first block is not past this program's, and which one that is."""
    program = tl.program_id(0)
    index, low, high = 0, 1, count
    while low < high:
        middle = (low + high) // 2
        is_past = tl.load(table_ptr + middle) > program
        index = tl.where(is_past, index, middle)
        low, high = tl.where(is_past, low, middle + 1), tl.where(is_past, middle, high)
    return index, program - tl.load(table_ptr + index)


@triton.jit
def entry(table_ptr, count, index, COLUMN: tl.constexpr):
    """Return what the table has for a tensor."""
    return tl.load(table_ptr + COLUMN * count + index)


@triton.jit(do_not_specialize=range(3))
def accumulate_list_kernel(
    table_ptr,
    count: tl.int32,
    scale,
    ALIGNED: tl.constexpr,
    FORMAT: tl.constexpr,
    START: tl.constexpr,
    PARTIALS: tl.constexpr,
    SCALE_IS_POINTER: tl.constexpr,
):
    """Fold a list of tensors."""
    index, block = tensor_of_program(table_ptr, count)
    fold_block(
        entry(table_ptr, count, index, 1),
        entry(table_ptr, count, index, 2),
        entry(table_ptr, count, index, 3),
        entry(table_ptr, count, index, 5),
        entry(table_ptr, count, index, 4),
        block,
        load_scalar(scale, SCALE_IS_POINTER),
        ALIGNED,
        FORMAT,
        START,
        PARTIALS,
    )


@triton.jit(do_not_specialize=range(4))
def finish_list_kernel(
    table_ptr,
    count: tl.int32,
    divisor,
    factor,
    ALIGNED: tl.constexpr,
    FORMAT: tl.constexpr,
    START: tl.constexpr,
    RESCALES: tl.constexpr,
    DIVISOR_IS_POINTER: tl.constexpr,
    FACTOR_IS_POINTER: tl.constexpr,
):
    """Finish or rescale a list of tensors."""
    index, block = tensor_of_program(table_ptr, count)
    sum_address, residual_address = entry(table_ptr, count, index, 1), entry(table_ptr, count, index, 2)
    numel = entry(table_ptr, count, index, 3)
    divide_by, multiply_by = load_scalar(divisor, DIVISOR_IS_POINTER), load_scalar(factor, FACTOR_IS_POINTER)
    finish_block(sum_address, residual_address, numel, block, divide_by, multiply_by, ALIGNED, FORMAT, START, RESCALES)


@triton.jit(do_not_specialize=range(2))
def decode_list_kernel(table_ptr, count: tl.int32, ALIGNED: tl.constexpr, FORMAT: tl.constexpr):
    """Decode a list of tensors."""
    index, block = tensor_of_program(table_ptr, count)
    sum_address, residual_address = entry(table_ptr, count, index, 1), entry(table_ptr, count, index, 2)
    value_address, numel = entry(table_ptr, count, index, 3), entry(table_ptr, count, index, 4)
    decode_block(sum_address, residual_address, value_address, numel, block, ALIGNED, FORMAT)


@triton.jit(do_not_specialize=range(3))
def encode_list_kernel(
    table_ptr, count: tl.int32, divisor, ALIGNED: tl.constexpr, FORMAT: tl.constexpr, DIVISOR_IS_POINTER: tl.constexpr
):
    """Encode a list of tensors."""
    index, block = tensor_of_program(table_ptr, count)
    value_address, sum_address = entry(table_ptr, count, index, 1), entry(table_ptr, count, index, 2)
    residual_address, numel = entry(table_ptr, count, index, 3), entry(table_ptr, count, index, 4)
    divide_by = load_scalar(divisor, DIVISOR_IS_POINTER)
    encode_block(value_address, sum_address, residual_address, numel, block, divide_by, ALIGNED, FORMAT)


@triton.jit(do_not_specialize=range(2))
def squares_list_kernel(table_ptr, count: tl.int32, ALIGNED: tl.constexpr, FORMAT: tl.constexpr, START: tl.constexpr):
    """Square and add up a list of tensors."""
    index, block = tensor_of_program(table_ptr, count)
    sum_address, residual_address = entry(table_ptr, count, index, 1), entry(table_ptr, count, index, 2)
    numel, partials_address = entry(table_ptr, count, index, 3), entry(table_ptr, count, index, 4)
    square_block(sum_address, residual_address, partials_address, numel, block, ALIGNED, FORMAT, START)


# ---- the end of a norm -------------------------------------------------------------------------------------------

# Partial sums that are added at once: eight of each thread of sixteen warps.
NORM_SIZE = tl.constexpr(4096)


@triton.jit(do_not_specialize=range(6))
def norm_kernel(
    partials_ptr,  # (numel,) float32
    numel: tl.int64,
    divisor,
    max_norm,  # float32; unused without CLIPS
    results_ptr,  # (2,) float32
    nonfinite_ptr,  # (1,) bool
    DIVISOR_IS_POINTER: tl.constexpr,
    CLIPS: tl.constexpr,
):
    """norm = float32(sqrt(sum of partials)) / divisor, its clip coefficient, and whether it is finite: one program.

    Sum and root are float64; what follows is float32, rounded after each operation as torch's clip_grad_norm_ rounds.
    """
    offsets = tl.arange(0, NORM_SIZE)
    sums = tl.zeros([NORM_SIZE], tl.float64)
    left = numel
    while left > 0:
        sums += tl.load(partials_ptr + offsets, mask=offsets < left, other=0.0).to(tl.float64)
        partials_ptr += NORM_SIZE
        left -= NORM_SIZE
    total = tl.sqrt(tl.sum(sums, axis=0)).to(tl.float32)
    # A number is float64 in some versions of triton's interpreter.
    norm = tl.div_rn(total, tl.cast(load_scalar(divisor, DIVISOR_IS_POINTER), tl.float32))
    coefficient = 1.0
    if CLIPS:
        coefficient = tl.div_rn(1.0, norm + 1e-6) * tl.cast(max_norm, tl.float32)
        coefficient = tl.where(coefficient > 1.0, 1.0, coefficient)  # NaN stays
    tl.store(results_ptr, norm)
    tl.store(results_ptr + 1, coefficient)
    tl.store(nonfinite_ptr, (norm.to(tl.int32, bitcast=True) & 0x7FFFFFFF) >= 0x7F800000)
