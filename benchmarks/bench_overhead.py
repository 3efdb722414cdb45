"""What the hook costs on the host: microseconds for each parameter and micro-batch, over stock accumulation.

``python benchmarks/bench_overhead.py [--device cpu|cuda] [--quick]``

Many tiny bfloat16 parameters, whose gradients one autograd node makes, so that little is timed beside accumulation.
What is timed is ``backward()`` of a micro-batch that is added to earlier ones. On a GPU that is the time until Python
goes on, not until the GPU has finished. Writes ``benchmarks/results/<machine>/overhead.json``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # from a checkout, installed or not

from provenance import machine, write_results
from timing import percentile

import accumkern
from accumkern import backends

PARAMETERS = (10, 300, 3000)
NUMEL = 64  # of a parameter
STOCK = "stock"


class MakeGradients(torch.autograd.Function):
    """A scalar whose gradients are new tensors, made by one call."""

    @staticmethod
    def forward(ctx: Any, micro_gradients: list[Tensor], *params: Tensor) -> Tensor:
        """Return zero."""
        ctx.micro_gradients = micro_gradients
        return torch.zeros((), device=params[0].device)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Return copies of the micro-gradients."""
        return None, *torch._foreach_mul(ctx.micro_gradients, 1.0)


def main() -> None:
    """Measure every number of parameters, print the table and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--quick", action="store_true", help="fewer rounds, to see that it runs")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)

    results = []
    for count in PARAMETERS:
        results += measure(count, device, rounds=(6000 if arguments.quick else 60_000) // count + 20)
    print_table(device, results)
    method = {
        "timed": "backward() on the host, second and later micro-batches of a window",
        "order": "stock and each backend take turns in every round; the order is reversed from round to round",
        "over_stock": "median over rounds of the difference to stock of the same round, divided by the parameters",
        "elements_of_a_parameter": NUMEL,
        "buffer": "split24",
    }
    write_results(device, "overhead", method, results)


def measure(count: int, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """Return one result for stock and for each backend with ``count`` parameters."""
    variants = {STOCK: make_backward(count, device, None)}
    for backend in backends.BACKENDS:
        try:
            backends.choose(backend, device)
        except RuntimeError:
            continue
        variants[backend] = make_backward(count, device, backend)

    names = list(variants)
    us: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names if number % 2 == 0 else names[::-1]:
            us[name].append(1e6 * variants[name]() / count)
    results = []
    for name in names:
        over = [mine - stock for mine, stock in zip(us[name], us[STOCK], strict=True)]
        result = {
            "parameters": count,
            "variant": name,
            "us_per_parameter": statistics.median(us[name]),
            "over_stock_us": statistics.median(over),
            "over_stock_p20_us": percentile(over, 0.2),
            "over_stock_p80_us": percentile(over, 0.8),
            "n": rounds,
        }
        results.append(result)
    return results


def make_backward(count: int, device: torch.device, backend: str | None) -> Callable[[], float]:
    """Return a function that runs one micro-batch and returns the seconds of its ``backward()``.

    Args:
        count: number of parameters.
        device: where they are.
        backend: what accumkern folds with; None leaves accumulation to torch.
    """
    params = [torch.nn.Parameter(torch.randn(NUMEL, device=device).bfloat16()) for _ in range(count)]
    micro_gradients = [torch.randn_like(param) for param in params]
    acc = None
    if backend is not None:
        acc = accumkern.attach(torch.optim.SGD(params), backend=backend)

    def backward(_kept: object = acc) -> float:  # the hooks live no longer than the accumulator
        loss = MakeGradients.apply(micro_gradients, *params)
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        loss.backward()
        return time.perf_counter() - begin

    for _ in range(3):  # begin a window, make the residuals, compile
        backward()
    return backward


def print_table(device: torch.device, results: list[dict[str, Any]]) -> None:
    """Print all results."""
    table = Table(title=f"Host time of accumulation per parameter and micro-batch, {machine(device)}")
    for name in ("parameters", "variant", "µs", "µs over stock", "p20", "p80", "rounds"):
        table.add_column(name, justify="left" if name == "variant" else "right")
    for result in results:
        over = (f"{result[key]:+.2f}" for key in ("over_stock_us", "over_stock_p20_us", "over_stock_p80_us"))
        stock = result["variant"] == STOCK
        table.add_row(
            f"{result['parameters']:,}",
            result["variant"],
            f"{result['us_per_parameter']:.2f}",
            *(("", "", "") if stock else over),
            str(result["n"]),
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
