"""The mean over ranks of accumulated gradients: DistributedDataParallel's own, in bfloat16, and in FP32 in two ways.

``python benchmarks/bench_reduce.py [--device cpu|cuda] [--quick]``

Starts 2, 4 and 8 processes (gloo on CPUs; NCCL on as many GPUs as there are, one each). Each rank accumulates random
micro-gradients; the last backward pass of a window, which reduces, is timed, and its result compared with the FP64 mean
of everything that was accumulated. ``reduce_in_fp32`` exchanges split sums by parts; an all-reduce of the same sums as
FP32 values, as for ``buffer="fp32"``, is measured beside it. Writes ``benchmarks/results/<machine>/reduce.json``.
"""

from __future__ import annotations

import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # from a checkout, installed or not

from harness import parser, steps, write_results
from processes import outcome_of_ranks
from timing import percentile

import accumkern
from accumkern.bucket_mean import BucketMean

#: name -> bytes per element that a rank sends in each half of the reduction, as a multiple of (ranks - 1) / ranks
VARIANTS = {"stock": 2, "split24": 2, "split24, FP32 all-reduce": 4, "split24, reduce_in_fp32": 3}
MICRO_BATCHES = 8
PARAMETERS = 16


class Gradients(nn.Module):
    """Parameters whose gradients are given: those of a sum of products."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.params = nn.ParameterList(torch.zeros(numel // PARAMETERS) for _ in range(PARAMETERS))

    def forward(self, factors: list[Tensor]) -> Tensor:
        """Return a scalar whose gradient is ``factors``."""
        return torch.stack([(p * factor).sum() for p, factor in zip(self.params, factors, strict=True)]).sum()


def main() -> None:
    """Measure every number of processes, print the table and write the file."""
    arguments = parser(__doc__).parse_args()
    device = torch.device(arguments.device)
    world_sizes = [2, 4, 8]
    if device.type == "cuda":
        world_sizes = [n for n in world_sizes if n <= torch.cuda.device_count()]
        if not world_sizes:
            print(f"NCCL takes one GPU for each process, and here is {torch.cuda.device_count()}: not measured")
            return
    numel = 2**16 if arguments.quick else 2**23
    rounds = 2 if arguments.quick else 16

    results: list[dict[str, Any]] = []
    with steps("mean over ranks") as on_step:
        for done, world_size in enumerate(world_sizes):
            on_step(done, len(world_sizes))
            results += outcome_of_ranks(measure, world_size, device.type, numel, rounds)
    method = {
        "timed": "the last backward pass of a window, from a barrier to its end on rank 0; it reduces",
        "order": "the variants take turns in every round",
        "micro_batches": MICRO_BATCHES,
        "parameters": PARAMETERS,
        "backend": "nccl" if device.type == "cuda" else "gloo, all processes on one machine",
        "threads_of_a_process": "torch's threads divided by the processes, at least one",
    }
    write_results(arguments, "reduce", method, results)


def measure(device: torch.device, numel: int, rounds: int) -> list[dict[str, Any]]:
    """Run all variants as one rank, and return their results."""
    world_size = dist.get_world_size()
    torch.set_num_threads(max(1, torch.get_num_threads() // world_size))
    generator = torch.Generator(device).manual_seed(dist.get_rank())
    micro_batches = [
        [
            (torch.randn(numel // PARAMETERS, device=device, generator=generator) + 1).bfloat16()
            for _ in range(PARAMETERS)
        ]
        for _ in range(MICRO_BATCHES)
    ]
    truth = [torch.stack(parts).sum(0, dtype=torch.float64) for parts in zip(*micro_batches, strict=True)]
    for total in truth:
        dist.all_reduce(total)
        total /= world_size

    models = {name: Variant(numel, device, name) for name in VARIANTS}
    ms: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for number in range(rounds + 1):
        for name, variant in models.items():
            seconds = variant.run_window(micro_batches)
            if number > 0:  # the first makes buckets and residuals
                ms[name].append(1e3 * seconds)
    results = []
    for name, variant in models.items():
        result = {
            "processes": world_size,
            "variant": name,
            "numel": numel,
            "bytes_sent_per_element": 2 * VARIANTS[name] * (world_size - 1) / world_size,
            "error_of_grad": relative_error(variant.gradients(), truth),
            "error_of_sum": relative_error(variant.sums(), truth),
            "median_ms": statistics.median(ms[name]),
            "p20_ms": percentile(ms[name], 0.2),
            "p80_ms": percentile(ms[name], 0.8),
            "n": rounds,
        }
        results.append(result)
    return results


class Variant:
    """A model under DistributedDataParallel, with or without accumkern."""

    def __init__(self, numel: int, device: torch.device, name: str) -> None:
        module = Gradients(numel).to(device, torch.bfloat16)
        self.model = DistributedDataParallel(module)
        self.optimizer = torch.optim.SGD(module.parameters())
        self.acc = None if name == "stock" else accumkern.attach(self.optimizer)
        self.way = BucketMean.all_reduced if "all-reduce" in name else BucketMean.steps
        if self.acc is not None and VARIANTS[name] > 2:
            self.acc.reduce_in_fp32(self.model)

    def run_window(self, micro_batches: list[list[Tensor]]) -> float:
        """Run one window; return the seconds of its last backward pass."""
        self.optimizer.zero_grad()
        for n, factors in enumerate(micro_batches):
            is_last = n == len(micro_batches) - 1
            with nullcontext() if is_last else self.model.no_sync():
                loss = self.model(factors)
                if is_last:
                    synchronize(factors[0].device)
                    dist.barrier()
                begin = time.perf_counter()
                with mock.patch.object(BucketMean, "steps", self.way):
                    loss.backward()
        synchronize(factors[0].device)
        return time.perf_counter() - begin

    def gradients(self) -> list[Tensor]:
        """Return what the optimizer reads."""
        return [param.grad for param in self.model.parameters() if param.grad is not None]

    def sums(self) -> list[Tensor]:
        """Return what accumkern knows of them; without it, what the optimizer reads."""
        if self.acc is None:
            return self.gradients()
        sums = map(self.acc.gradient, self.model.parameters())
        return [total for total in sums if total is not None]


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def relative_error(found: list[Tensor], truth: list[Tensor]) -> float:
    """Return the relative L2 error of all tensors together."""
    error = sum(float((f.double() - t).square().sum()) for f, t in zip(found, truth, strict=True))
    return (error / sum(float(t.square().sum()) for t in truth)) ** 0.5


if __name__ == "__main__":
    main()
