"""A weight's gradient that is added to a split sum by the product itself, in Triton: an experiment, no backend.

``(sum, residual) = encode(decode(sum, residual) + dy.T @ x)``, in place, with ``dy`` of ``(inner, rows)`` and ``x`` of
``(inner, columns)``, bfloat16 and row by row, as a backward pass has them; ``inner`` are tokens. What is added is the
product in FP32, which nothing has rounded. Of sum and residual 3 or 4 bytes an element are read and as many written,
the least that such a sum can move; the product itself never lies in memory.

Two kernels do it. One works for all sizes, with pointers and masks, a program for each tile. The other is persistent
and for Hopper: the hardware copies tiles (TMA). The first factors of the next tile come while a tile is folded, and
what a tile is added to comes into the cache during its product.

With ``warp_specialize=True``, where warps of their own copy factors, triton 3.6 computes wrong sums on an H100 (NaN and
1e34 among them; two tiles, both formats), so that is left out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from accumkern.backends.problems import triton_is_interpreted
from accumkern.backends.triton_blocks import CONTINUE, load_value, store_value
from accumkern.backends.triton_math import canonical, decoded, encoded, round_to, widen
from accumkern.formats import Format

ALONE = -1  # in the place of a format: the product is rounded to bfloat16 and written, and nothing is added
PRODUCT_ALONE = tl.constexpr(ALONE)
INTERPRETED = tl.constexpr(triton_is_interpreted())
STREAMED_MULTIPLE = 16  # of rows and columns: TMA asks for rows that are multiples of 16 bytes
PROGRAMS_ON_CPU = 3  # of the persistent kernel in triton's interpreter: less than there are tiles


class Tile(NamedTuple):
    """What a program computes at once, and how.

    Attributes:
        rows, columns: of the gradient.
        inner: of the factors in one step.
        part: columns that are folded at once: registers and shared memory are too small for more beside a product.
        stages: steps whose factors are on their way.
        warps: of a program.
        kernel: ``pointers`` or ``streamed``.
    """

    rows: int
    columns: int
    inner: int
    part: int
    stages: int
    warps: int
    kernel: str

    def __str__(self) -> str:
        """Return it in words."""
        return f"{self.rows}x{self.columns}x{self.inner}, {self.stages} stages, {self.kernel}"


# A tile of 128 x 128 by pointers leaves room for a second program, which multiplies while the first one folds.
TILES = (
    Tile(128, 256, 64, part=64, stages=3, warps=8, kernel="streamed"),
    Tile(128, 128, 64, part=64, stages=4, warps=4, kernel="streamed"),
    Tile(128, 128, 64, part=64, stages=3, warps=4, kernel="pointers"),
)


# ---- kernels -----------------------------------------------------------------------------------------------------


@triton.jit
def corner(tile, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr = 8):
    """Return (first row, first column) of a tile; GROUP rows of tiles are done column by column, for the cache."""
    down, across = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    in_group = GROUP * across
    first = tile // in_group * GROUP
    height = min(down - first, GROUP)
    return (first + tile % in_group % height) * ROWS, tile % in_group // height * COLUMNS


@triton.jit
def multiply(dy, x, product):
    """Return product + dy.T @ x; triton's interpreter, which would multiply the bits of bfloat16, is given FP32."""
    if INTERPRETED:
        dy, x = widen(dy), widen(x)
    return tl.dot(tl.trans(dy), x, product)


@triton.jit
def prefetch(ptr, row, column, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Ask for the memory of a tile, row by row, so that it is in the cache when the tile is folded."""
    if not INTERPRETED:
        i = row + tl.arange(0, ROWS)
        numel = tl.where(i < rows, min(columns - column, COLUMNS), 0)
        tl.inline_asm_elementwise(
            """{ .reg .pred inside; setp.ne.s32 inside, $2, 0;
            @inside cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }""",
            "=r,l,r",
            [ptr + i.to(tl.int64) * columns + column, numel * (ptr.dtype.element_ty.primitive_bitwidth // 8)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def halves(product):
    """Return the left and the right half of a tile, each of which stays in the registers it is in."""
    ROWS: tl.constexpr = product.shape[0]
    COLUMNS: tl.constexpr = product.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(product, (ROWS, 2, COLUMNS)), (0, 2, 1)))


@triton.jit
def fold_pointers(product, sum_ptr, residual_ptr, row, column, rows, columns, FORMAT: tl.constexpr, PART: tl.constexpr):
    """Fold a tile, one part after another."""
    ROWS: tl.constexpr = product.shape[0]
    COLUMNS: tl.constexpr = product.shape[1]
    if COLUMNS > PART:
        left, right = halves(product)
        fold_pointers(left, sum_ptr, residual_ptr, row, column, rows, columns, FORMAT, PART)
        fold_pointers(right, sum_ptr, residual_ptr, row, column + COLUMNS // 2, rows, columns, FORMAT, PART)
    else:
        i, j = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
        offsets = i[:, None].to(tl.int64) * columns + j[None, :]
        mask = (i < rows)[:, None] & (j < columns)[None, :]
        if FORMAT == PRODUCT_ALONE:
            tl.store(sum_ptr + offsets, round_to(canonical(product), tl.bfloat16), mask=mask)
        else:
            old = load_value(sum_ptr, residual_ptr, offsets, mask, FORMAT, CONTINUE)
            store_value(sum_ptr, residual_ptr, offsets, mask, old + product, FORMAT)


@triton.jit
def product_kernel(
    dy_ptr,
    x_ptr,
    sum_ptr,
    residual_ptr,  # unused for PRODUCT_ALONE
    rows,
    columns,
    inner,
    FORMAT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    PART: tl.constexpr,
):
    """Compute and fold one tile, of any size, with masks."""
    row, column = corner(tl.program_id(0), rows, columns, ROWS, COLUMNS)
    i, j, k = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS), tl.arange(0, INNER)
    dy_ptrs = dy_ptr + k[:, None].to(tl.int64) * rows + i[None, :]
    x_ptrs = x_ptr + k[:, None].to(tl.int64) * columns + j[None, :]
    product = tl.zeros((ROWS, COLUMNS), tl.float32)
    for begin in range(0, inner, INNER):
        is_inside = (k < inner - begin)[:, None]
        dy = tl.load(dy_ptrs, is_inside & (i < rows)[None, :], 0.0)
        x = tl.load(x_ptrs, is_inside & (j < columns)[None, :], 0.0)
        product = multiply(dy, x, product)
        dy_ptrs += INNER * rows
        x_ptrs += INNER * columns
    fold_pointers(product, sum_ptr, residual_ptr, row, column, rows, columns, FORMAT, PART)


@triton.jit
def fold_streamed(product, sums, residuals, row, column, FORMAT: tl.constexpr, PART: tl.constexpr):
    """Fold a tile, one part after another."""
    COLUMNS: tl.constexpr = product.shape[1]
    if COLUMNS > PART:
        left, right = halves(product)
        fold_streamed(left, sums, residuals, row, column, FORMAT, PART)
        fold_streamed(right, sums, residuals, row, column + COLUMNS // 2, FORMAT, PART)
    elif FORMAT == PRODUCT_ALONE:
        sums.store([row, column], round_to(canonical(product), tl.bfloat16))
    else:
        old = decoded(sums.load([row, column]), residuals.load([row, column]), FORMAT)
        total, residual = encoded(canonical(old + product), tl.bfloat16, FORMAT)
        sums.store([row, column], total)
        residuals.store([row, column], residual)


@triton.jit
def streamed_kernel(
    dy_ptr,
    x_ptr,
    sum_ptr,
    residual_ptr,  # unused for PRODUCT_ALONE
    rows,
    columns,
    inner,
    FORMAT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    PART: tl.constexpr,
):
    """Compute and fold every so-manieth tile."""
    dy = tl.make_tensor_descriptor(dy_ptr, [inner, rows], [rows, 1], [INNER, ROWS])
    x = tl.make_tensor_descriptor(x_ptr, [inner, columns], [columns, 1], [INNER, COLUMNS])
    sums = tl.make_tensor_descriptor(sum_ptr, [rows, columns], [columns, 1], [ROWS, PART])
    residuals = tl.make_tensor_descriptor(residual_ptr, [rows, columns], [columns, 1], [ROWS, PART])
    tiles = tl.cdiv(rows, ROWS) * tl.cdiv(columns, COLUMNS)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        row, column = corner(tile, rows, columns, ROWS, COLUMNS)
        if FORMAT != PRODUCT_ALONE:
            prefetch(sum_ptr, row, column, rows, columns, ROWS, COLUMNS)
            prefetch(residual_ptr, row, column, rows, columns, ROWS, COLUMNS)
        product = tl.zeros((ROWS, COLUMNS), tl.float32)
        for begin in range(0, inner, INNER):
            product = multiply(dy.load([begin, row]), x.load([begin, column]), product)
        fold_streamed(product, sums, residuals, row, column, FORMAT, PART)


# ---- launches ----------------------------------------------------------------------------------------------------


def add_product(
    format_: Format | None, dy: Tensor, x: Tensor, total: Tensor, residual: Tensor | None, tile: Tile
) -> None:
    """``(total, residual) = encode(decode(total, residual) + dy.T @ x)``, in place; without a format the product alone.

    Args:
        format_: a split format, or None to write ``total = dy.T @ x``.
        dy: ``(inner, rows)`` bfloat16, contiguous, as all are.
        x: ``(inner, columns)`` bfloat16.
        total: ``(rows, columns)`` bfloat16.
        residual: ``(rows, columns)``, of the format; None without one.
        tile: how to compute it.

    Raises:
        ValueError: a tensor has another shape or dtype or is not contiguous, or this tile's kernel cannot have the
            size.
    """
    (inner, rows), columns = dy.shape, x.shape[-1]
    needed: list[tuple[str, Tensor | None, tuple[int, int], torch.dtype | None]] = [
        ("dy", dy, (inner, rows), torch.bfloat16),
        ("x", x, (inner, columns), torch.bfloat16),
        ("total", total, (rows, columns), torch.bfloat16),
    ]
    if format_ is not None:
        needed.append(("residual", residual, (rows, columns), format_.residual_dtype))
    for name, tensor, shape, dtype in needed:
        if tensor is None or tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            found = "None" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}, strides {tensor.stride()}"
            raise ValueError(f"{name} is {found}; {shape} {dtype}, contiguous, is needed")
    if tile.kernel != "pointers" and (rows % STREAMED_MULTIPLE or columns % STREAMED_MULTIPLE):
        raise ValueError(f"total is {rows} x {columns}; a {tile.kernel} tile needs multiples of {STREAMED_MULTIPLE}")
    tiles = triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns)
    arguments = dy, x, total, total if residual is None else residual, rows, columns, inner
    constants = ALONE if format_ is None else int(format_), tile.rows, tile.columns, tile.inner, tile.part
    options = {"num_stages": tile.stages, "num_warps": tile.warps}
    if tile.kernel == "pointers":
        product_kernel[tiles,](*arguments, *constants, **options)
        return
    programs = PROGRAMS_ON_CPU
    if dy.is_cuda:
        programs = torch.cuda.get_device_properties(dy.device).multi_processor_count
        triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=dy.device))
    streamed_kernel[min(programs, tiles),](*arguments, *constants, **options)
