"""The accumulate kernel against what torch has: time, bytes moved, bandwidth.

``python benchmarks/bench_kernels.py [--device cpu|cuda] [--quick] [--sizes 2^20,2^25]``

accumkern is called as its hook calls it: the kernel of each backend, ``accumkern.backends.fold_function``, without the
checks of ``accumkern.accumulate_``. Writes ``benchmarks/results/<machine>/kernels.json``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # from a checkout, installed or not

from provenance import machine, write_results
from timing import Timing, Variant, sets_of, time_variants

from accumkern import backends
from accumkern.formats import Format, Start

# Name -> format, and bytes that a fold reads and writes for each element: gradient, sum and residual in; both out.
FORMATS = {
    "split24": (Format.SPLIT24, 2 + 2 + 1 + 2 + 1),
    "split32": (Format.SPLIT32, 2 + 2 + 2 + 2 + 2),
    "fp32": (Format.MAIN_GRAD_BFLOAT16, 2 + 2 + 4 + 2 + 4),
}
COPY = "bf16.copy_(bf16)"

# What torch has: name -> dtype of the sum, the operation on (sum, gradient), bytes for each element.
STOCK: dict[str, tuple[torch.dtype, Callable[[Tensor, Tensor], object], int]] = {
    "bf16.add_(bf16)": (torch.bfloat16, lambda total, grad: total.add_(grad), 6),
    "_foreach_add_(bf16, bf16)": (torch.bfloat16, lambda total, grad: torch._foreach_add_([total], [grad]), 6),
    "fp32.add_(bf16)": (torch.float32, lambda total, grad: total.add_(grad), 10),
    "fp32.add_(bf16.float())": (torch.float32, lambda total, grad: total.add_(grad.float()), 6 + 12),
    COPY: (torch.bfloat16, lambda total, grad: total.copy_(grad), 4),
}


def main() -> None:
    """Measure every size, print the tables and write the file."""
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
        of_size = measure(numel, device, rounds)
        print_table(numel, device, of_size)
        results += of_size
    method = {
        "how": "benchmarks/timing.py",
        "rounds": rounds,
        "accumkern_is_called_as": "accumkern.backends.fold_function(backend), which the hook calls, without checks",
        "bandwidth": "bytes that the operation must read and write, over the median time",
    }
    write_results(device, "kernels", method, results)


def default_sizes(arguments: argparse.Namespace) -> list[int]:
    """Return the sizes that are measured when none are given."""
    if arguments.device == "cuda":
        return [2**20, 2**24] if arguments.quick else [2**14, 2**20, 2**24, 2**28]
    return [2**20] if arguments.quick else [2**20, 2**25]


def parse_size(text: str) -> int:
    """Return 1048576 for ``2^20`` or ``1048576``."""
    base, _, exponent = text.strip().partition("^")
    return int(base) ** int(exponent) if exponent else int(base)


def measure(numel: int, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """Return one result for each variant on tensors of ``numel`` elements."""
    sets = sets_of(4 * numel, device)  # a copy touches 4 bytes an element, the fewest
    grads = buffers(sets, numel, torch.bfloat16, device)
    names = [name for name in backends.BACKENDS if runs_on(name, device)]

    makers: dict[str, Callable[[], Variant]] = {}
    labels: dict[str, dict[str, Any]] = {}
    for kind, (format_, bytes_per_element) in FORMATS.items():
        for backend in names:
            variant = f"{kind} {backend}"
            makers[variant] = lambda f=format_, b=backend, n=bytes_per_element: fold_variant(f, b, grads, n)  # type: ignore[misc]
            labels[variant] = {"buffer": kind, "backend": backend, "bytes_per_element": bytes_per_element}
    for variant, (dtype, operation, bytes_per_element) in STOCK.items():
        makers[variant] = lambda d=dtype, o=operation, n=bytes_per_element: stock_variant(d, o, grads, n)  # type: ignore[misc]
        labels[variant] = {"buffer": None, "backend": "torch", "bytes_per_element": bytes_per_element}

    timings = time_variants(makers, device, rounds, seconds_each=10.0)
    copy, split24 = timings[COPY], timings[f"split24 {backends.choose(None, device)}"]
    results = []
    for variant, label in labels.items():
        timing = timings[variant]
        result: dict[str, Any] = {"numel": numel, "variant": variant, **label}
        if isinstance(timing, Timing):
            gb_per_s = label["bytes_per_element"] * numel / timing.median_ms / 1e6
            result |= {**asdict(timing), "gb_per_s": gb_per_s}
            if isinstance(copy, Timing):
                result["fraction_of_copy"] = gb_per_s / (4 * numel / copy.median_ms / 1e6)
            if isinstance(split24, Timing):
                result["time_over_split24"] = timing.median_ms / split24.median_ms
        else:
            result["error"] = timing
        results.append(result)
    return results


def runs_on(backend: str, device: torch.device) -> bool:
    """Return whether a backend takes tensors on a device here."""
    try:
        backends.choose(backend, device)
    except RuntimeError:
        return False
    return True


def buffers(sets: int, numel: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Return ``sets`` tensors of ``numel`` random elements, side by side in memory."""
    flat = torch.empty(sets, numel, dtype=dtype, device=device)
    flat.normal_() if dtype.is_floating_point else flat.zero_()
    return list(flat.unbind())


def fold_variant(format_: Format, backend: str, grads: list[Tensor], bytes_per_element: int) -> Variant:
    """Return a fold of each gradient into a sum and a residual of its own."""
    fold = backends.fold_function(backend)
    sets, numel, device = len(grads), grads[0].numel(), grads[0].device
    assert format_.residual_dtype is not None
    sums = buffers(sets, numel, format_.sum_dtype, device)
    residuals = buffers(sets, numel, format_.residual_dtype, device)

    def run(i: int) -> None:
        fold(format_, Start.CONTINUE, [grads[i]], [sums[i]], [residuals[i]], 1.0, None)

    return Variant(run, sets, bytes_per_element * numel)


def stock_variant(
    dtype: torch.dtype, operation: Callable[[Tensor, Tensor], object], grads: list[Tensor], bytes_per_element: int
) -> Variant:
    """Return an operation of torch on each gradient and a sum of its own."""
    sums = buffers(len(grads), grads[0].numel(), dtype, grads[0].device)
    return Variant(lambda i: operation(sums[i], grads[i]), len(grads), bytes_per_element * grads[0].numel())


def print_table(numel: int, device: torch.device, results: list[dict[str, Any]]) -> None:
    """Print the results of one size."""
    table = Table(title=f"{numel:,} elements on {machine(device)}")
    columns = ("variant", "µs", "p20", "p80", "B/element", "GB/s", "of copy_", "time / split24", "measured as")
    for name in columns:
        table.add_column(name, justify="left" if name in ("variant", "measured as") else "right")
    for result in results:
        if "error" in result:
            table.add_row(result["variant"], *[""] * (len(columns) - 2), result["error"])
            continue
        table.add_row(
            result["variant"],
            *(f"{1e3 * result[key]:,.1f}" for key in ("median_ms", "p20_ms", "p80_ms")),
            str(result["bytes_per_element"]),
            f"{result['gb_per_s']:,.0f}",
            f"{result['fraction_of_copy']:.0%}" if "fraction_of_copy" in result else "",
            f"{result['time_over_split24']:.2f}" if "time_over_split24" in result else "",
            f"{result['how']} of {result['calls']}, {result['n']} times",
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
