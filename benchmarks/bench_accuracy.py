"""How far an accumulated gradient is from the FP64 sum of its bfloat16 micro-gradients.

``python benchmarks/bench_accuracy.py [--device cpu|cuda] [--quick]``

Every accumulator gets the same micro-gradients through autograd: a mean that differs between elements plus noise, drawn
anew for each micro-batch and rounded to bfloat16. The error is the relative L2 norm of the difference to their exact
sum. Writes ``benchmarks/results/<machine>/accuracy.json``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # from a checkout, installed or not

from harness import parser, steps, write_results

import accumkern
from accumkern import backends

BUFFERS = ("split24", "split32", "fp32")
STOCK = "stock bf16"
MEAN_OVER_STD = (3.0, 0.1)
SEED = 0


def main() -> None:
    """Accumulate for both kinds of gradients and write the file."""
    arguments = parser(__doc__).parse_args()
    device = torch.device(arguments.device)
    windows = [2**power for power in range(1, 5 if arguments.quick else 10)]
    numel = 2**12 if arguments.quick else 2**18

    results = []
    for ratio in MEAN_OVER_STD:
        with steps(f"accuracy, mean / std {ratio}") as on_step:
            results += accumulate(ratio, windows, numel, device, on_step)
    method = {
        "micro_gradients": "bfloat16(mean + noise); mean ~ N(0, mean_over_std^2) per element, noise ~ N(0, 1) per draw",
        "elements": numel,
        "seed": SEED,
        "truth": "FP64 sum of the bfloat16 micro-gradients",
        "error_of_sum": "relative L2 error of what is kept; for accumkern GradAccumulator.gradient()",
        "error_of_grad": "relative L2 error of .grad, which the optimizer reads: the sum rounded to bfloat16",
        "backend": backends.choose(None, device),
    }
    write_results(arguments, "accuracy", method, results)


def accumulate(
    ratio: float, windows: list[int], numel: int, device: torch.device, on_step: Callable[[int, int], None]
) -> list[dict[str, Any]]:
    """Return the errors of every accumulator after each number of micro-batches in ``windows``."""
    generator = torch.Generator(device).manual_seed(SEED)
    mean = ratio * torch.randn(numel, generator=generator, device=device)
    params = {name: nn.Parameter(torch.zeros(numel, device=device).bfloat16()) for name in (STOCK, *BUFFERS)}
    accumulators = {name: accumkern.attach(torch.optim.SGD([params[name]]), buffer=name) for name in BUFFERS}
    truth = torch.zeros(numel, dtype=torch.float64, device=device)
    results = []
    for micro_batch in range(1, max(windows) + 1):
        on_step(micro_batch, max(windows))
        micro_gradient = (mean + torch.randn(numel, generator=generator, device=device)).bfloat16()
        truth += micro_gradient
        for param in params.values():
            (param * micro_gradient).sum().backward()
        if micro_batch not in windows:
            continue
        for name, param in params.items():
            grad = param.grad
            kept = grad if name == STOCK else accumulators[name].gradient(param)
            assert grad is not None
            assert kept is not None
            result = {
                "accumulator": name,
                "mean_over_std": ratio,
                "micro_batches": micro_batch,
                "error_of_sum": relative_error(kept, truth),
                "error_of_grad": relative_error(grad, truth),
            }
            results.append(result)
    return results


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Return ``|value - truth| / |truth|`` in the L2 norm."""
    return float((value.double() - truth).norm() / truth.norm())


if __name__ == "__main__":
    main()
