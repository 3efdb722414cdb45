"""The end of a window: divide, norm, clip and round, against torch's three passes; and what measuring costs a fold.

``python benchmarks/bench_finish.py [--device cpu|cuda] [--quick] [--sizes 2^20,2^25]``

Writes ``benchmarks/results/<machine>/finish.json``.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # from a checkout, installed or not

from bench_kernels import parse_size
from harness import parser, steps, write_results
from timing import Timing, Variant, allocate, sets_of, time_variants

from accumkern import backends, finish
from accumkern.formats import PARTIALS, Format, Start, partial_rows

# What is divided by is 1 and what is clipped to is never reached: the work is the same, and the values stay what they
# are from call to call.
MAX_NORM = 1e30
SIZES = {"cpu": "2^20,2^25", "cuda": "2^20,2^24,2^28"}
SECONDS_EACH = 2.5


def main() -> None:
    """Measure every size and write the file."""
    options = parser(__doc__)
    options.add_argument("--sizes", help="elements of a tensor, as 2^20,2^25")
    arguments = options.parse_args()
    device = torch.device(arguments.device)
    rounds = 3 if arguments.quick else 15
    sizes = arguments.sizes or ("2^20" if arguments.quick else SIZES[arguments.device])

    results: list[dict[str, Any]] = []
    for size in sizes.split(","):
        results += measure(size, device, rounds)
    method = {
        "how": "benchmarks/timing.py; all variants of a size in one run, by turns",
        "rounds": rounds,
        "finish": "norm of what is in memory; then division by a tensor, clip, one rounding in one pass",
        "stock": "torch._foreach_div_ and torch.nn.utils.clip_grad_norm_ on bfloat16 gradients",
        "measured": "a fold that leaves partial sums of squares, as stats=True needs it",
    }
    write_results(arguments, "finish", method, results)


class Buffers:
    """The memory that all variants work on in turn: sets of sums, micro-gradients and residuals of a size."""

    def __init__(self, numel: int, device: torch.device) -> None:
        sets = sets_of(2 * numel, device)  # the norm of bfloat16 gradients touches 2 bytes an element, the fewest

        def split(dtype: torch.dtype) -> list[Tensor]:
            return list(allocate(sets * numel, dtype, device).view(sets, numel).unbind())

        self.sets = sets
        self.numel = numel
        self.sums = split(torch.bfloat16)
        self.grads = split(torch.bfloat16)
        self.residuals = {Format.SPLIT24: split(torch.int8), Format.SPLIT32: split(torch.int16)}
        self.partials = [torch.rand(partial_rows(numel), PARTIALS, device=device) for _ in range(sets)]


def measure(size: str, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """Return one result for each variant on gradients of a size."""
    numel = parse_size(size)
    backend = backends.choose(None, device)
    buffers = cache(partial(Buffers, numel, device))  # made by the first variant: what does not fit is a result
    makers = {
        "stock": lambda: stock_variant(buffers()),
        "fold split24": lambda: fold_variant(buffers(), backend, measured=False),
        "fold split24, measured": lambda: fold_variant(buffers(), backend, measured=True),
        "finish split24": lambda: finish_variant(buffers(), Format.SPLIT24, backend),
        "finish split32": lambda: finish_variant(buffers(), Format.SPLIT32, backend),
    }
    with steps(f"finish, {size}") as on_step:
        timings = time_variants(makers, device, rounds, SECONDS_EACH, on_step)
    stock = timings["stock"]
    results = []
    for name, timing in timings.items():
        result: dict[str, Any] = {"numel": numel, "variant": name, "backend": "torch" if name == "stock" else backend}
        if isinstance(timing, Timing):
            result |= asdict(timing)
            if isinstance(stock, Timing):
                result["time_over_stock"] = timing.median_ms / stock.median_ms
        else:
            result["error"] = timing
        results.append(result)
    return results


def stock_variant(buffers: Buffers) -> Variant:
    """Return torch's way: three passes over bfloat16 gradients."""
    params = [torch.nn.Parameter(value) for value in buffers.grads]  # only their gradients are looked at
    for param, grad in zip(params, buffers.sums, strict=True):
        param.grad = grad

    def run(i: int) -> None:
        grad = params[i].grad
        assert grad is not None
        torch._foreach_div_([grad], 1.0)
        torch.nn.utils.clip_grad_norm_([params[i]], MAX_NORM)

    return Variant(run, buffers.sets, (4 + 2 + 4) * buffers.numel)


def finish_variant(buffers: Buffers, format_: Format, backend: str) -> Variant:
    """Return what GradAccumulator.finish() does with gradients that were folded."""
    residuals = buffers.residuals[format_]
    kernels = backends.kernels(backend)
    one = torch.ones((), device=buffers.sums[0].device)
    batches = [
        finish.Batch(one.device, format_, Start.CONTINUE, (), False, [], [total], [low], [None])
        for total, low in zip(buffers.sums, residuals, strict=True)
    ]

    def run(i: int) -> None:
        some = batches[i : i + 1]
        _, scaling = finish.measure(some, one, MAX_NORM, 2.0, False, lambda _: kernels)
        finish.write(some, scaling, lambda _: kernels, keeps_residuals=False)

    read = 2 + residuals[0].element_size()
    return Variant(run, buffers.sets, (read + read + 2) * buffers.numel)


def fold_variant(buffers: Buffers, backend: str, measured: bool) -> Variant:
    """Return a split24 fold, with or without partial sums of squares."""
    fold = backends.kernels(backend).fold
    grads, sums, residuals = buffers.grads, buffers.sums, buffers.residuals[Format.SPLIT24]

    def run(i: int) -> None:
        rows: list[Tensor] | None = [buffers.partials[i]] if measured else None
        fold(Format.SPLIT24, Start.CONTINUE, [grads[i]], [sums[i]], [residuals[i]], 1.0, rows)

    return Variant(run, buffers.sets, 8 * buffers.numel)


if __name__ == "__main__":
    main()
