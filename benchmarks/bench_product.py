"""A weight's gradient and its accumulation: the product, and what adding it to a sum takes beyond that.

``python benchmarks/bench_product.py [--device cpu|cuda] [--quick] [--shapes 8192x4096x4096,4096x4096x2048]``

The gradient of a linear layer's weight is a product of two matrices, ``dy.T @ x``, and what adds it finds it partly in
the cache. It is added by a split24 fold, or by torch in bfloat16 or FP32. Or it is added within the product, on CUDA
only: by torch to an FP32 sum, ``torch.addmm(out, a, b, out_dtype=torch.float32, out=out)``, or to a split sum by
``product_kernels.py``, whose product alone is timed too. That takes a linear layer of its own, since autograd hands
over products. Writes ``benchmarks/results/<machine>/product.json``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # from a checkout, installed or not

from harness import backends_on, parser, steps, write_results
from tables.product import PRODUCT
from timing import Timing, Variant, allocate, sets_of, time_variants

from accumkern import backends
from accumkern.formats import Format, Start, decode

if TYPE_CHECKING:
    from product_kernels import Tile

# Of many tokens, behind whose product a fold is short, and of few.
SHAPES = {"cpu": "1024x512x512,1024x512x128", "cuda": "8192x4096x4096,4096x4096x2048"}
QUICK_SHAPES = "128x64x32"
SECONDS_EACH = 2.5
# What product_kernels.py computes before it is timed: more tiles than programs, and some that end outside.
CHECKED_SHAPES = {"cpu": (160, 272, 80), "cuda": (2064, 2064, 208)}

BY_TRITON = {
    "product by triton": None,
    "split24 within the product": Format.SPLIT24,
    "split32 within the product": Format.SPLIT32,
}

Shape = tuple[int, int, int]
Add = Callable[[Tensor, int], object]


class Buffers:
    """The memory that all variants work on in turn: sets of factors and sums; each kind is made where it is needed.

    Attributes:
        dy, x: the factors as a backward pass has them, ``(inner, rows)`` and ``(inner, columns)``.
        sums: ``sums(dtype)`` are matrices of ``(rows, columns)``.
    """

    def __init__(self, rows: int, columns: int, inner: int, device: torch.device) -> None:
        touched = 2 * (rows * inner + inner * columns + rows * columns)  # by the product alone
        self.sets = sets_of(touched, device)
        self.device = device
        self.numel = rows * columns
        self.bytes = touched
        self.dy = self.matrices(inner, rows, torch.bfloat16)
        self.x = self.matrices(inner, columns, torch.bfloat16)
        self.sums = cache(partial(self.matrices, rows, columns))  # by their dtype

    def matrices(self, rows: int, columns: int, dtype: torch.dtype) -> list[Tensor]:
        """Return a matrix for each set."""
        return list(allocate(self.sets * rows * columns, dtype, self.device).view(self.sets, rows, columns).unbind())

    def variant(self, add: Add | None) -> Variant:
        """Return the product, and an addition of it to the sum of a set."""

        def run(i: int) -> None:
            product = torch.mm(self.dy[i].t(), self.x[i])
            if add is not None:
                add(product, i)

        return Variant(run, self.sets, self.bytes)


def added_by_torch(buffers: Buffers, dtype: torch.dtype) -> Variant:
    """Return the product and torch's addition."""
    sums = buffers.sums(dtype)
    return buffers.variant(lambda product, i: sums[i].add_(product))


def folded(buffers: Buffers, backend: str) -> Variant:
    """Return the product and a split24 fold, called as the hook calls it."""
    fold = backends.kernels(backend).fold
    sums, residuals = buffers.sums(torch.bfloat16), buffers.sums(torch.int8)

    def add(product: Tensor, i: int) -> None:
        fold(Format.SPLIT24, Start.CONTINUE, [product], [sums[i]], [residuals[i]], 1.0, None)

    return buffers.variant(add)


def within_the_product(buffers: Buffers) -> Variant:
    """Return the product that adds to an FP32 sum by itself."""
    sums = buffers.sums(torch.float32)

    def run(i: int) -> None:
        torch.addmm(sums[i], buffers.dy[i].t(), buffers.x[i], out_dtype=torch.float32, out=sums[i])

    return Variant(run, buffers.sets, buffers.bytes)


def by_triton(buffers: Buffers, format_: Format | None, tile: Tile) -> Variant:
    """Return the product that adds to a split sum by itself, or without a format the product alone.

    Raises:
        RuntimeError: it computes something else.
    """
    from product_kernels import add_product

    check_product(format_, tile, CHECKED_SHAPES[buffers.device.type], buffers.device)
    totals = buffers.sums(torch.bfloat16)
    residuals: list[Tensor] | list[None] = [None] * buffers.sets
    if format_ is not None and format_.residual_dtype is not None:
        residuals = buffers.sums(format_.residual_dtype)

    def run(i: int) -> None:
        add_product(format_, buffers.dy[i], buffers.x[i], totals[i], residuals[i], tile)

    return Variant(run, buffers.sets, buffers.bytes)


def check_product(format_: Format | None, tile: Tile, shape: Shape, device: torch.device) -> None:
    """Compare a product of a shape (rows, columns, inner) that is added by itself with one in FP64.

    Raises:
        RuntimeError: an element is further away than its own rounding and that of sums in FP32 explain.
    """
    from product_kernels import add_product

    rows, columns, inner = shape
    dy, x = (torch.randn(inner, size, device=device).bfloat16() for size in (rows, columns))
    total = torch.randn(rows, columns, device=device).bfloat16()
    residual, old = None, torch.zeros(())
    if format_ is not None:
        numbers = torch.randint(-100, 100, (rows, columns), device=device)
        residual = numbers.to(format_.residual_dtype)
        old = decode(format_, total, residual)
    else:
        total.fill_(torch.nan)
    add_product(format_, dy, x, total, residual, tile)
    found = total if format_ is None else decode(format_, total, residual)
    exact = old.to(device).double() + dy.double().t() @ x.double()
    rounding = {None: 2.0**-8, Format.SPLIT24: 2.0**-16, Format.SPLIT32: 2.0**-24}[format_]
    allowed = rounding * exact.abs() + 2.0**-18 * (dy.double().abs().t() @ x.double().abs())
    is_near = (found.double() - exact).abs() <= allowed  # False for NaN
    if not bool(is_near.all()):
        raise RuntimeError(f"{int((~is_near).sum()):,} of {is_near.numel():,} elements are wrong")


def tiles_on(device: torch.device) -> tuple[Tile, ...]:
    """Return the tiles of product_kernels.py that are timed on a device."""
    if device.type != "cuda" or "triton" not in backends_on(device):
        return ()
    from product_kernels import TILES

    return TILES


def main() -> None:
    """Measure and write the file."""
    options = parser(__doc__)
    options.add_argument("--shapes", type=parse_shapes, help="rows x columns of gradients, and what is summed over")
    arguments = options.parse_args()
    device = torch.device(arguments.device)
    rounds = 3 if arguments.quick else 21
    shapes = arguments.shapes or parse_shapes(QUICK_SHAPES if arguments.quick else SHAPES[device.type])
    method = {
        "how": "benchmarks/timing.py; all variants of a shape in one run, by turns",
        "rounds": rounds,
        "product": "torch.mm(dy.t(), x) in bfloat16, into new memory, as in a backward pass",
        "in the product": "torch.addmm(out, dy.t(), x, out_dtype=torch.float32, out=out)",
        "by triton": "benchmarks/product_kernels.py, each tile compared with FP64 before it is timed",
        "more": "median time less that of the product alone",
        "left_out": "the eager backend, by rule",
        "backend": backends.choose(None, device),
    }
    results = [result for shape in shapes for result in measure(shape, device, rounds)]
    write_results(arguments, "product", method, results)


def parse_shapes(text: str) -> list[Shape]:
    """Return [(8192, 4096, 4096), (4096, 4096, 2048)] for ``8192x4096x4096,4096x4096x2048``."""
    return [parse_shape(shape) for shape in text.split(",")]


def parse_shape(text: str) -> Shape:
    """Return (8192, 4096, 4096) for ``8192x4096x4096``."""
    sizes = text.split("x")
    if len(sizes) != 3 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r}: three sizes are needed, as 8192x4096x4096")
    rows, columns, inner = map(int, sizes)
    return rows, columns, inner


def measure(shape: Shape, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """Return one result for each way of adding a product of a shape (rows, columns, inner) to a sum."""
    buffers = cache(partial(Buffers, *shape, device))  # made by the first variant: what does not fit is a result
    makers: dict[tuple[str, str, str | None], Callable[[], Variant]] = {
        (PRODUCT, "torch", None): lambda: buffers().variant(None),
        ("product, bf16.add_(bf16)", "torch", None): lambda: added_by_torch(buffers(), torch.bfloat16),
        ("product, fp32.add_(bf16)", "torch", None): lambda: added_by_torch(buffers(), torch.float32),
        ("addmm(out_dtype=fp32), in place", "torch", None): lambda: within_the_product(buffers()),
    }
    for name in backends_on(device):
        if name != "eager":
            makers["product, split24 fold", name, None] = partial(lambda name: folded(buffers(), name), name)
    for tile in tiles_on(device):
        for variant, format_ in BY_TRITON.items():
            makers[variant, "triton", str(tile)] = partial(lambda f, t: by_triton(buffers(), f, t), format_, tile)
    with steps("product") as on_step:
        timings = time_variants(makers, device, rounds, SECONDS_EACH, on_step)
    alone = timings[PRODUCT, "torch", None]
    results = []
    for (variant, backend, tile_name), timing in timings.items():
        rows, columns, inner = shape
        result: dict[str, Any] = {"rows": rows, "columns": columns, "inner": inner}
        result |= {"variant": variant, "backend": backend}
        if tile_name is not None:
            result["tile"] = tile_name
        if isinstance(timing, Timing):
            result |= asdict(timing)
            if isinstance(alone, Timing) and variant != PRODUCT:
                result |= {"more_ms": timing.median_ms - alone.median_ms}
                result |= {"over_product": timing.median_ms / alone.median_ms}
        else:
            result["error"] = timing
        results.append(result)
    return results


if __name__ == "__main__":
    main()
