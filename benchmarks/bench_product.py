"""A weight's gradient and its accumulation: the product, and what adding it to a sum takes beyond that.

``python benchmarks/bench_product.py [--device cpu|cuda] [--quick] [--shape 8192x4096x4096]``

The gradient of a linear layer's weight is a product of two matrices, and what adds it finds it partly in the cache. It
is added by a split24 fold, or by torch in bfloat16 or FP32. Or torch adds within the product,
``torch.addmm(out, a, b, out_dtype=torch.float32, out=out)`` (CUDA only): that is the strongest rival, but it takes a
linear layer of its own, since autograd hands over products. Writes ``benchmarks/results/<machine>/product.json``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # from a checkout, installed or not

from harness import backends_on, parser, steps, write_results
from tables.product import PRODUCT
from timing import Timing, Variant, allocate, sets_of, time_variants

from accumkern import backends
from accumkern.formats import Format, Start

SHAPES = {"cpu": "1024x512x512", "cuda": "8192x4096x4096"}
QUICK_SHAPE = "128x64x32"
SECONDS_EACH = 2.5

Add = Callable[[Tensor, int], object]


class Buffers:
    """The memory that all variants work on in turn: sets of factors and sums; each kind is made where it is needed."""

    def __init__(self, rows: int, columns: int, inner: int, device: torch.device) -> None:
        touched = 2 * (rows * inner + inner * columns + rows * columns)  # by the product alone
        self.sets = sets_of(touched, device)
        self.device = device
        self.numel = rows * columns
        self.bytes = touched
        self.left = self.matrices(rows, inner, torch.bfloat16)
        self.right = self.matrices(inner, columns, torch.bfloat16)
        self.sums = cache(partial(self.matrices, rows, columns))  # by their dtype

    def matrices(self, rows: int, columns: int, dtype: torch.dtype) -> list[Tensor]:
        """Return a matrix for each set."""
        return list(allocate(self.sets * rows * columns, dtype, self.device).view(self.sets, rows, columns).unbind())

    def variant(self, add: Add | None) -> Variant:
        """Return the product, and an addition of it to the sum of a set."""

        def run(i: int) -> None:
            product = torch.mm(self.left[i], self.right[i])
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
        torch.addmm(sums[i], buffers.left[i], buffers.right[i], out_dtype=torch.float32, out=sums[i])

    return Variant(run, buffers.sets, buffers.bytes)


def main() -> None:
    """Measure and write the file."""
    options = parser(__doc__)
    options.add_argument("--shape", type=parse_shape, help="rows x columns of the gradient, and what is summed over")
    arguments = options.parse_args()
    device = torch.device(arguments.device)
    rounds = 3 if arguments.quick else 21
    shape = arguments.shape or parse_shape(QUICK_SHAPE if arguments.quick else SHAPES[device.type])
    method = {
        "how": "benchmarks/timing.py; all variants in one run, by turns",
        "rounds": rounds,
        "product": "torch.mm in bfloat16, into new memory, as in a backward pass",
        "in the product": "torch.addmm(out, a, b, out_dtype=torch.float32, out=out)",
        "more": "median time less that of the product alone",
        "left_out": "the eager backend, by rule",
        "backend": backends.choose(None, device),
    }
    write_results(arguments, "product", method, measure(shape, device, rounds))


def parse_shape(text: str) -> tuple[int, int, int]:
    """Return (8192, 4096, 4096) for ``8192x4096x4096``."""
    sizes = [int(size) for size in text.split("x")]
    if len(sizes) != 3 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: three sizes are needed, as 8192x4096x4096")
    return sizes[0], sizes[1], sizes[2]


def measure(shape: tuple[int, int, int], device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """Return one result for each way of adding a product of a shape (rows, columns, inner) to a sum."""
    buffers = cache(partial(Buffers, *shape, device))  # made by the first variant: what does not fit is a result
    makers: dict[tuple[str, str], Callable[[], Variant]] = {
        (PRODUCT, "torch"): lambda: buffers().variant(None),
        ("product, bf16.add_(bf16)", "torch"): lambda: added_by_torch(buffers(), torch.bfloat16),
        ("product, fp32.add_(bf16)", "torch"): lambda: added_by_torch(buffers(), torch.float32),
        ("addmm(out_dtype=fp32), in place", "torch"): lambda: within_the_product(buffers()),
    }
    for name in backends_on(device):
        if name != "eager":
            makers["product, split24 fold", name] = partial(lambda name: folded(buffers(), name), name)
    with steps("product") as on_step:
        timings = time_variants(makers, device, rounds, SECONDS_EACH, on_step)
    alone = timings[PRODUCT, "torch"]
    results = []
    for (variant, backend), timing in timings.items():
        rows, columns, inner = shape
        result: dict[str, Any] = {"rows": rows, "columns": columns, "inner": inner}
        result |= {"variant": variant, "backend": backend}
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
