"""The kernels in Triton.

Reads from top to bottom: the formats (the formulas of accumkern/formats.py), one block of each kernel, the kernels for
one tensor and for a list of small tensors, the launchers. The launch configuration is fixed: the kernels stream memory,
and an autotuner would stall the first step to find what is known beforehand.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from accumkern.formats import BLOCK_NUMEL, PARTIALS, Format, Start, partial_rows

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
FROM_SUM = tl.constexpr(int(Start.FROM_SUM))
FROM_ZERO = tl.constexpr(int(Start.FROM_ZERO))
PARTIAL_COLUMNS = tl.constexpr(PARTIALS)


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


# ---- blocks ------------------------------------------------------------------------------------------------------


@triton.jit
def load_value(sum_ptr, residual_ptr, offsets, mask, FORMAT: tl.constexpr, START: tl.constexpr):
    """Return the accumulated values, FP32: of sum and residual, or of the sum alone."""
    total = tl.load(sum_ptr + offsets, mask=mask)
    if START == CONTINUE and FORMAT != PLAIN32:
        return decoded(total, tl.load(residual_ptr + offsets, mask=mask), FORMAT)
    else:
        return widen(total)


@triton.jit
def sum_of_squares(values, offsets, left, MASKED: tl.constexpr):
    """Return the sum of squares, FP32, in a fixed order."""
    squares = values * values
    if MASKED:
        squares = tl.where(offsets < left, squares, 0.0)
    return tl.sum(squares, axis=0)


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
        old = load_value(sum_ptr, residual_ptr, offsets, mask, FORMAT, START)
        x = tl.fma(scale, g, old)
    if PARTIALS:
        tl.store(partials_ptr, sum_of_squares(g, offsets, left, MASKED))
        tl.store(partials_ptr + 1, sum_of_squares(x, offsets, left, MASKED))
        tl.store(partials_ptr + 2, sum_of_squares(old, offsets, left, MASKED) if START == FROM_SUM else 0.0)
    new_sum, new_residual = encoded(canonical(x), sum_ptr.dtype.element_ty, FORMAT)
    tl.store(sum_ptr + offsets, new_sum, mask=mask)
    if FORMAT != PLAIN32:
        tl.store(residual_ptr + offsets, new_residual, mask=mask)


@triton.jit
def finish_block(
    sum_ptr,
    residual_ptr,
    left,
    divisor,
    factor,
    FORMAT: tl.constexpr,
    START: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Finish BLOCK_SIZE elements, or the `left` that are left of the tensor when MASKED."""
    offsets = tl.max_contiguous(tl.arange(0, BLOCK_SIZE), VECTOR)
    mask = offsets < left if MASKED else None
    x = load_value(sum_ptr, residual_ptr, offsets, mask, FORMAT, START)
    x = canonical(tl.div_rn(x, tl.zeros_like(x) + divisor) * factor)
    if FORMAT == PLAIN32:
        tl.store(sum_ptr + offsets, x, mask=mask)
    else:
        tl.store(sum_ptr + offsets, round_to(x, sum_ptr.dtype.element_ty), mask=mask)


@triton.jit
def decode_block(
    sum_ptr, residual_ptr, value_ptr, left, FORMAT: tl.constexpr, MASKED: tl.constexpr, BLOCK_SIZE: tl.constexpr
):
    """Decode BLOCK_SIZE elements, or the `left` that are left of the tensor when MASKED."""
    offsets = tl.max_contiguous(tl.arange(0, BLOCK_SIZE), VECTOR)
    mask = offsets < left if MASKED else None
    tl.store(value_ptr + offsets, load_value(sum_ptr, residual_ptr, offsets, mask, FORMAT, CONTINUE), mask=mask)


@triton.jit
def encode_block(
    value_ptr,
    sum_ptr,
    residual_ptr,
    left,
    divisor,
    FORMAT: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Encode BLOCK_SIZE elements, or the `left` that are left of the tensor when MASKED."""
    offsets = tl.max_contiguous(tl.arange(0, BLOCK_SIZE), VECTOR)
    mask = offsets < left if MASKED else None
    x = tl.load(value_ptr + offsets, mask=mask)
    x = canonical(tl.div_rn(x, tl.zeros_like(x) + divisor))
    new_sum, new_residual = encoded(x, sum_ptr.dtype.element_ty, FORMAT)
    tl.store(sum_ptr + offsets, new_sum, mask=mask)
    if FORMAT != PLAIN32:
        tl.store(residual_ptr + offsets, new_residual, mask=mask)


# ---- kernels -----------------------------------------------------------------------------------------------------
#
# Each block has two paths, so that only the last block of a tensor pays for its mask with narrow loads. A kernel's
# scalar is a float32, or a pointer to one.


@triton.jit(do_not_specialize=["numel"])
def accumulate_kernel(
    grad_ptr,
    sum_ptr,
    residual_ptr,  # unused for PLAIN32
    partials_ptr,  # (blocks, 3) float32; unused without PARTIALS
    numel,
    scale,
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
    partials_ptr += PARTIAL_COLUMNS * block
    if left >= BLOCK_SIZE:
        fold_block(
            grad_ptr, sum_ptr, residual_ptr, partials_ptr, left, factor, FORMAT, START, PARTIALS, False, BLOCK_SIZE
        )
    else:
        fold_block(
            grad_ptr, sum_ptr, residual_ptr, partials_ptr, left, factor, FORMAT, START, PARTIALS, True, BLOCK_SIZE
        )


@triton.jit(do_not_specialize=["numel"])
def finish_kernel(
    sum_ptr,
    residual_ptr,  # unused for PLAIN32 and FROM_SUM
    numel,
    divisor,
    factor,
    FORMAT: tl.constexpr,
    START: tl.constexpr,
    DIVISOR_IS_POINTER: tl.constexpr,
    FACTOR_IS_POINTER: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """sum = round((decode(sum, residual) / divisor) * factor). One program per block."""
    begin = tl.program_id(0).to(tl.int64) * BLOCK_SIZE
    left = numel - begin
    divide_by = tl.load(divisor) if DIVISOR_IS_POINTER else divisor
    multiply_by = tl.load(factor) if FACTOR_IS_POINTER else factor
    sum_ptr += begin
    residual_ptr += begin
    if left >= BLOCK_SIZE:
        finish_block(sum_ptr, residual_ptr, left, divide_by, multiply_by, FORMAT, START, False, BLOCK_SIZE)
    else:
        finish_block(sum_ptr, residual_ptr, left, divide_by, multiply_by, FORMAT, START, True, BLOCK_SIZE)


@triton.jit(do_not_specialize=["numel"])
def decode_kernel(
    sum_ptr,
    residual_ptr,  # unused for PLAIN32
    value_ptr,  # float32
    numel,
    FORMAT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """value = decode(sum, residual). One program per block."""
    begin = tl.program_id(0).to(tl.int64) * BLOCK_SIZE
    left = numel - begin
    sum_ptr += begin
    residual_ptr += begin
    value_ptr += begin
    if left >= BLOCK_SIZE:
        decode_block(sum_ptr, residual_ptr, value_ptr, left, FORMAT, False, BLOCK_SIZE)
    else:
        decode_block(sum_ptr, residual_ptr, value_ptr, left, FORMAT, True, BLOCK_SIZE)


@triton.jit(do_not_specialize=["numel"])
def encode_kernel(
    value_ptr,  # float32
    sum_ptr,
    residual_ptr,  # unused for PLAIN32
    numel,
    divisor,
    FORMAT: tl.constexpr,
    DIVISOR_IS_POINTER: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """(sum, residual) = encode(value / divisor). One program per block."""
    begin = tl.program_id(0).to(tl.int64) * BLOCK_SIZE
    left = numel - begin
    divide_by = tl.load(divisor) if DIVISOR_IS_POINTER else divisor
    value_ptr += begin
    sum_ptr += begin
    residual_ptr += begin
    if left >= BLOCK_SIZE:
        encode_block(value_ptr, sum_ptr, residual_ptr, left, divide_by, FORMAT, False, BLOCK_SIZE)
    else:
        encode_block(value_ptr, sum_ptr, residual_ptr, left, divide_by, FORMAT, True, BLOCK_SIZE)


@triton.jit
def load_row(
    table_ptr,
    GRAD_DTYPE: tl.constexpr,
    SUM_DTYPE: tl.constexpr,
    RESIDUAL_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Return the tensor of this program's row: pointers to grad, sum and residual."""
    row_ptr = table_ptr + tl.program_id(0).to(tl.int64) * 5
    grad_ptr = tl.load(row_ptr).to(tl.pointer_type(GRAD_DTYPE))
    sum_ptr = tl.load(row_ptr + 1).to(tl.pointer_type(SUM_DTYPE))
    residual_ptr = tl.load(row_ptr + 2).to(tl.pointer_type(RESIDUAL_DTYPE))
    if ALIGNED:
        grad_ptr = tl.multiple_of(grad_ptr, 16)
        sum_ptr = tl.multiple_of(sum_ptr, 16)
        residual_ptr = tl.multiple_of(residual_ptr, 16)
    return grad_ptr, sum_ptr, residual_ptr


@triton.jit
def accumulate_list_kernel(
    table_ptr,  # (tensors, 5) int64: addresses of grad, sum, residual, partials; numel
    scale,
    SUM_DTYPE: tl.constexpr,
    RESIDUAL_DTYPE: tl.constexpr,
    FORMAT: tl.constexpr,
    START: tl.constexpr,
    PARTIALS: tl.constexpr,
    ALIGNED: tl.constexpr,  # every address is a multiple of 16
    SCALE_IS_POINTER: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Fold a list of tensors: program (t, b) folds block b of tensor t, if it has one."""
    block = tl.program_id(1).to(tl.int64)
    row_ptr = table_ptr + tl.program_id(0).to(tl.int64) * 5
    begin = block * BLOCK_SIZE
    left = tl.load(row_ptr + 4) - begin
    if left > 0:
        grad_ptr, sum_ptr, residual_ptr = load_row(table_ptr, SUM_DTYPE, SUM_DTYPE, RESIDUAL_DTYPE, ALIGNED)
        grad_ptr += begin
        sum_ptr += begin
        residual_ptr += begin
        partials_ptr = tl.load(row_ptr + 3).to(tl.pointer_type(tl.float32)) + PARTIAL_COLUMNS * block
        factor = tl.load(scale) if SCALE_IS_POINTER else scale
        if left >= BLOCK_SIZE:
            fold_block(
                grad_ptr, sum_ptr, residual_ptr, partials_ptr, left, factor, FORMAT, START, PARTIALS, False, BLOCK_SIZE
            )
        else:
            fold_block(
                grad_ptr, sum_ptr, residual_ptr, partials_ptr, left, factor, FORMAT, START, PARTIALS, True, BLOCK_SIZE
            )


@triton.jit
def finish_list_kernel(
    table_ptr,  # (tensors, 5) int64: unused, addresses of sum and residual, unused; numel
    divisor,
    factor,
    SUM_DTYPE: tl.constexpr,
    RESIDUAL_DTYPE: tl.constexpr,
    FORMAT: tl.constexpr,
    START: tl.constexpr,
    ALIGNED: tl.constexpr,
    DIVISOR_IS_POINTER: tl.constexpr,
    FACTOR_IS_POINTER: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Finish a list of tensors: program (t, b) finishes block b of tensor t, if it has one."""
    begin = tl.program_id(1).to(tl.int64) * BLOCK_SIZE
    left = tl.load(table_ptr + tl.program_id(0).to(tl.int64) * 5 + 4) - begin
    if left > 0:
        _, sum_ptr, residual_ptr = load_row(table_ptr, SUM_DTYPE, SUM_DTYPE, RESIDUAL_DTYPE, ALIGNED)
        sum_ptr += begin
        residual_ptr += begin
        divide_by = tl.load(divisor) if DIVISOR_IS_POINTER else divisor
        multiply_by = tl.load(factor) if FACTOR_IS_POINTER else factor
        if left >= BLOCK_SIZE:
            finish_block(sum_ptr, residual_ptr, left, divide_by, multiply_by, FORMAT, START, False, BLOCK_SIZE)
        else:
            finish_block(sum_ptr, residual_ptr, left, divide_by, multiply_by, FORMAT, START, True, BLOCK_SIZE)


@triton.jit
def decode_list_kernel(
    table_ptr,  # (tensors, 5) int64: addresses of sum, values, residual, unused; numel
    SUM_DTYPE: tl.constexpr,
    RESIDUAL_DTYPE: tl.constexpr,
    FORMAT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Decode a list of tensors: program (t, b) decodes block b of tensor t, if it has one."""
    begin = tl.program_id(1).to(tl.int64) * BLOCK_SIZE
    left = tl.load(table_ptr + tl.program_id(0).to(tl.int64) * 5 + 4) - begin
    if left > 0:
        sum_ptr, value_ptr, residual_ptr = load_row(table_ptr, SUM_DTYPE, tl.float32, RESIDUAL_DTYPE, ALIGNED)
        sum_ptr += begin
        value_ptr += begin
        residual_ptr += begin
        if left >= BLOCK_SIZE:
            decode_block(sum_ptr, residual_ptr, value_ptr, left, FORMAT, False, BLOCK_SIZE)
        else:
            decode_block(sum_ptr, residual_ptr, value_ptr, left, FORMAT, True, BLOCK_SIZE)


@triton.jit
def encode_list_kernel(
    table_ptr,  # (tensors, 5) int64: addresses of values, sum, residual, unused; numel
    divisor,
    SUM_DTYPE: tl.constexpr,
    RESIDUAL_DTYPE: tl.constexpr,
    FORMAT: tl.constexpr,
    ALIGNED: tl.constexpr,
    DIVISOR_IS_POINTER: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Encode a list of tensors: program (t, b) encodes block b of tensor t, if it has one."""
    begin = tl.program_id(1).to(tl.int64) * BLOCK_SIZE
    left = tl.load(table_ptr + tl.program_id(0).to(tl.int64) * 5 + 4) - begin
    if left > 0:
        value_ptr, sum_ptr, residual_ptr = load_row(table_ptr, tl.float32, SUM_DTYPE, RESIDUAL_DTYPE, ALIGNED)
        value_ptr += begin
        sum_ptr += begin
        residual_ptr += begin
        divide_by = tl.load(divisor) if DIVISOR_IS_POINTER else divisor
        if left >= BLOCK_SIZE:
            encode_block(value_ptr, sum_ptr, residual_ptr, left, divide_by, FORMAT, False, BLOCK_SIZE)
        else:
            encode_block(value_ptr, sum_ptr, residual_ptr, left, divide_by, FORMAT, True, BLOCK_SIZE)


# ---- launchers ---------------------------------------------------------------------------------------------------

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
    scale = _scalar(scale)
    options = {
        "FORMAT": int(format_),
        "START": int(start),
        "PARTIALS": partials is not None,
        "SCALE_IS_POINTER": isinstance(scale, Tensor),
        "BLOCK_SIZE": BLOCK_NUMEL,
        **OPTIONS,
    }

    def launch(i: int, numel: int) -> None:
        accumulate_kernel[(max(1, partial_rows(numel)),)](
            grads[i],
            sums[i],
            grads[i] if residuals is None else residuals[i],
            grads[i] if partials is None else partials[i],
            numel,
            scale,
            **options,
        )

    with _device_of(sums[0]):
        small, others = _split_by_size(sums)
        if small:
            _load_for_capture("fold", options, lambda: launch(small[0], 0))
            table, grid, list_options = _table(format_, small, grads, sums, residuals, partials)
            accumulate_list_kernel[grid](table, scale, **list_options, **options)
        for i in others:
            launch(i, sums[i].numel())


def finish(
    format_: Format,
    start: Start,
    sums: list[Tensor],
    residuals: list[Tensor] | None,
    divisor: float | Tensor,
    factor: float | Tensor,
) -> None:
    """Divide, multiply and round each sum; see :func:`accumkern.backends.finish_function` for the contract."""
    divisor, factor = _scalar(divisor), _scalar(factor)
    options = {
        "FORMAT": int(format_),
        "START": int(start),
        "DIVISOR_IS_POINTER": isinstance(divisor, Tensor),
        "FACTOR_IS_POINTER": isinstance(factor, Tensor),
        "BLOCK_SIZE": BLOCK_NUMEL,
        **OPTIONS,
    }

    def launch(i: int, numel: int) -> None:
        finish_kernel[(max(1, partial_rows(numel)),)](
            sums[i], sums[i] if residuals is None else residuals[i], numel, divisor, factor, **options
        )

    with _device_of(sums[0]):
        small, others = _split_by_size(sums)
        if small:
            _load_for_capture("finish", options, lambda: launch(small[0], 0))
            table, grid, list_options = _table(format_, small, None, sums, residuals, None)
            finish_list_kernel[grid](table, divisor, factor, **list_options, **options)
        for i in others:
            launch(i, sums[i].numel())


def decode(format_: Format, sums: list[Tensor], residuals: list[Tensor] | None, values: list[Tensor]) -> None:
    """Write the FP32 values of each sum; see :func:`accumkern.backends.decode_function` for the contract."""
    options = {"FORMAT": int(format_), "BLOCK_SIZE": BLOCK_NUMEL, **OPTIONS}

    def launch(i: int, numel: int) -> None:
        decode_kernel[(max(1, partial_rows(numel)),)](
            sums[i], sums[i] if residuals is None else residuals[i], values[i], numel, **options
        )

    with _device_of(sums[0]):
        small, others = _split_by_size(sums)
        if small:
            _load_for_capture("decode", options, lambda: launch(small[0], 0))
            table, grid, list_options = _table(format_, small, sums, values, residuals, None)
            decode_list_kernel[grid](table, **list_options, **options)
        for i in others:
            launch(i, sums[i].numel())


def encode(
    format_: Format,
    values: list[Tensor],
    divisor: float | Tensor,
    sums: list[Tensor],
    residuals: list[Tensor] | None,
) -> None:
    """Divide FP32 values and store them; see :func:`accumkern.backends.encode_function` for the contract."""
    divisor = _scalar(divisor)
    options = {
        "FORMAT": int(format_),
        "DIVISOR_IS_POINTER": isinstance(divisor, Tensor),
        "BLOCK_SIZE": BLOCK_NUMEL,
        **OPTIONS,
    }

    def launch(i: int, numel: int) -> None:
        encode_kernel[(max(1, partial_rows(numel)),)](
            values[i], sums[i], sums[i] if residuals is None else residuals[i], numel, divisor, **options
        )

    with _device_of(sums[0]):
        small, others = _split_by_size(sums)
        if small:
            _load_for_capture("encode", options, lambda: launch(small[0], 0))
            table, grid, list_options = _table(format_, small, values, sums, residuals, None)
            encode_list_kernel[grid](table, divisor, **list_options, **options)
        for i in others:
            launch(i, sums[i].numel())


_loaded: set[tuple[object, ...]] = set()


def _load_for_capture(kernel: str, options: dict[str, Any], launch: Callable[[], None]) -> None:
    """Launch a single kernel on no elements, once, before its list kernel runs.

    While a CUDA graph is captured, lists are launched one by one, and a kernel may not be loaded then. It writes
    nothing but partial sums of zero, which the list kernel writes again.
    """
    key = (kernel, torch.cuda.current_device() if torch.cuda.is_available() else None, *options.values())
    if key not in _loaded:
        _loaded.add(key)
        launch()


def _scalar(factor: float | Tensor) -> float | Tensor:
    return factor.detach().to(torch.float32) if isinstance(factor, Tensor) else float(factor)


def _device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it the tensor's, where it is not."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()


def _split_by_size(sums: list[Tensor]) -> tuple[list[int], list[int]]:
    """Return the indices of tensors that share a launch, and of those that have one each; empty ones have none."""
    numels = [total.numel() for total in sums]
    # A captured copy of the table would read host memory again at every replay, so a capture gets single launches.
    capturing = sums[0].is_cuda and torch.cuda.is_current_stream_capturing()
    small = [i for i, numel in enumerate(numels) if 0 < numel <= SMALL_NUMEL]
    if capturing or len(small) < 2:
        return [], [i for i, numel in enumerate(numels) if numel > 0]
    return small, [i for i, numel in enumerate(numels) if numel > SMALL_NUMEL]


def _table(
    format_: Format,
    small: list[int],
    grads: list[Tensor] | None,
    sums: list[Tensor],
    residuals: list[Tensor] | None,
    partials: list[Tensor] | None,
) -> tuple[Tensor, tuple[int, int], dict[str, object]]:
    """Return a list kernel's table on the device, its grid, and its own options."""
    columns = [
        [0] * len(small) if tensors is None else [tensors[i].data_ptr() for i in small]
        for tensors in (grads, sums, residuals, partials)
    ]
    columns.append([sums[i].numel() for i in small])
    device = sums[0].device
    rows = list(zip(*columns, strict=True))
    table = torch.tensor(rows, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda").to(
        device, non_blocking=True
    )
    options: dict[str, object] = {
        "SUM_DTYPE": _TRITON_DTYPES[format_.sum_dtype],
        "RESIDUAL_DTYPE": _TRITON_DTYPES[format_.residual_dtype],
        "ALIGNED": all(address % 16 == 0 for column in columns[:3] for address in column),
    }
    return table, (len(small), partial_rows(max(columns[4]))), options
