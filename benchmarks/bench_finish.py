"""The end of a window: divide, norm, clip and round, against torch's three passes; and what measuring costs a fold.

``python benchmarks/bench_finish.py [--device cpu|cuda] [--quick] [--sizes 2^20,2^25]``

Writes ``benchmarks/results/<machine>/finish.json``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # from a checkout, installed or not

from bench_kernels import buffers, default_sizes, parse_size
from provenance import machine, write_results
from timing import Timing, Variant, sets_of, time_variants

from accumkern import backends
from accumkern.finish import Gradient, total_norm, write
from accumkern.formats import PARTIALS, Format, Start, partial_rows

# What is divided by is 1 and what is clipped to is never reached: the work is the same, and the values stay what they
# are from call to call.
MAX_NORM = 1e30
FORMATS = {"split24": Format.SPLIT24, "split32": Format.SPLIT32}


def main() -> None:
    """Measure every size, print the results and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--quick", action="store_true", help="fewer sizes and rounds, to see that it runs")
    parser.add_argument("--sizes", help="elements of a tensor, as 2^20,2^25")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    rounds = 7 if arguments.quick else 31
    sizes = [parse_size(text) for text in arguments.sizes.split(",")] if arguments.sizes else default_sizes(arguments)

    results: list[dict[str, Any]] = []
    for numel in sizes:
        results += measure(numel, device, rounds)
    print(f"{machine(device)}")
    for result in results:
        shown = f"{result['median_ms']:9.3f} ms, {result['time_over_stock']:.2f} of stock" if "n" in result else ""
        print(f"{result['numel']:>12,}  {result['variant']:34s} {shown or result['error']}")
    method = {
        "how": "benchmarks/timing.py",
        "rounds": rounds,
        "finish": "norm from the partial sums that the folds left, division by a tensor, clip, one rounding",
        "stock": "torch._foreach_div_ and torch.nn.utils.clip_grad_norm_ on bfloat16 gradients",
        "measured": "a fold that leaves partial sums of squares, as finish() and stats=True need it",
    }
    write_results(device, "finish", method, results)


def measure(numel: int, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """Return one result for each variant on gradients of ``numel`` elements."""
    sets = sets_of(2 * numel, device)
    backend = backends.choose(None, device)
    makers: dict[str, Callable[[], Variant]] = {
        "stock": lambda: stock_variant(sets, numel, device),
        "fold split24": lambda: fold_variant(sets, numel, device, backend, measured=False),
        "fold split24, measured": lambda: fold_variant(sets, numel, device, backend, measured=True),
    }
    for name, format_ in FORMATS.items():
        makers[f"finish {name}"] = lambda f=format_: finish_variant(f, sets, numel, device, backend)  # type: ignore[misc]
    timings = time_variants(makers, device, rounds, seconds_each=10.0)
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


def stock_variant(sets: int, numel: int, device: torch.device) -> Variant:
    """Return torch's way: three passes over bfloat16 gradients."""
    params = [torch.nn.Parameter(total) for total in buffers(sets, numel, torch.bfloat16, device)]
    for param, grad in zip(params, buffers(sets, numel, torch.bfloat16, device), strict=True):
        param.grad = grad

    def run(i: int) -> None:
        grad = params[i].grad
        assert grad is not None
        torch._foreach_div_([grad], 1.0)
        torch.nn.utils.clip_grad_norm_([params[i]], MAX_NORM)

    return Variant(run, sets, (4 + 2 + 4) * numel)


def finish_variant(format_: Format, sets: int, numel: int, device: torch.device, backend: str) -> Variant:
    """Return what GradAccumulator.finish() does with gradients that were folded."""
    assert format_.residual_dtype is not None
    residuals = buffers(sets, numel, format_.residual_dtype, device)
    partials = [torch.rand(partial_rows(numel), PARTIALS, device=device) for _ in range(sets)]
    gradients = [
        Gradient(grad, format_, residual, partial)
        for grad, residual, partial in zip(
            buffers(sets, numel, torch.bfloat16, device), residuals, partials, strict=True
        )
    ]
    one = torch.ones((), device=device)

    def run(i: int) -> None:
        norm = total_norm([gradients[i]], 2.0) / one
        coefficient = torch.clamp(MAX_NORM / (norm + 1e-6), max=1.0)
        write([gradients[i]], one, coefficient, lambda _: backend)

    return Variant(run, sets, (2 + residuals[0].element_size() + 2) * numel)


def fold_variant(sets: int, numel: int, device: torch.device, backend: str, measured: bool) -> Variant:
    """Return a split24 fold, with or without partial sums of squares."""
    fold = backends.fold_function(backend)
    grads = buffers(sets, numel, torch.bfloat16, device)
    sums = buffers(sets, numel, torch.bfloat16, device)
    residuals = buffers(sets, numel, torch.int8, device)
    partials = [torch.empty(partial_rows(numel), PARTIALS, device=device) for _ in range(sets)]

    def run(i: int) -> None:
        rows: list[Tensor] | None = [partials[i]] if measured else None
        fold(Format.SPLIT24, Start.CONTINUE, [grads[i]], [sums[i]], [residuals[i]], 1.0, rows)

    return Variant(run, sets, 8 * numel)


if __name__ == "__main__":
    main()
