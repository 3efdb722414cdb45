"""Whole gradients under fully_shard: its own sums, in bfloat16 and FP32, and the split sums of reduce_in_fp32().

``python benchmarks/bench_whole.py [--device cpu|cuda] [--quick]``

Starts 2 and 4 processes (gloo on CPUs; NCCL on as many GPUs as there are, one each). Each rank runs windows of
micro-batches with random gradients, of which the last alone reduces. Counted are the bytes that are held before it, and
timed a backward pass that does not reduce, and the one that does; the result is compared with the FP64 mean of
everything that was accumulated. Writes ``benchmarks/results/<machine>/whole.json``.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # from a checkout, installed or not

from harness import parser, steps, write_results
from processes import outcome_of_ranks
from timing import percentile

import accumkern


class Way(NamedTuple):
    """How whole gradients are added up."""

    reduce_dtype: torch.dtype
    buffer: str | None  # of the accumulator, or None


VARIANTS = {
    "stock, bfloat16": Way(torch.bfloat16, None),
    "stock, float32": Way(torch.float32, None),
    "split24, reduce_in_fp32": Way(torch.bfloat16, "split24"),
    "split32, reduce_in_fp32": Way(torch.bfloat16, "split32"),
}
MICRO_BATCHES = 32
LAYERS, PARAMETERS = 4, 4  # parameters of a layer


class Gradients(nn.Module):
    """A layer that adds to its input a sum of products, whose other factors are the gradients of its parameters."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.params = nn.ParameterList(torch.zeros(numel // (LAYERS * PARAMETERS)) for _ in range(PARAMETERS))

    def forward(self, x: Tensor, factors: list[Tensor]) -> Tensor:
        """Return ``x``, 0-dim, and the sum."""
        return torch.stack([x, *((p * factor).sum() for p, factor in zip(self.params, factors, strict=True))]).sum()


def main() -> None:
    """Measure every number of processes, print the table and write the file."""
    arguments = parser(__doc__).parse_args()
    device = torch.device(arguments.device)
    world_sizes = [2, 4]
    if device.type == "cuda":
        world_sizes = [n for n in world_sizes if n <= torch.cuda.device_count()]
        if not world_sizes:
            print(f"NCCL takes one GPU for each process, and here is {torch.cuda.device_count()}: not measured")
            return
    numel = 2**16 if arguments.quick else 2**21
    rounds = 2 if arguments.quick else 6

    results: list[dict[str, Any]] = []
    with steps("whole gradients") as on_step:
        for done, world_size in enumerate(world_sizes):
            on_step(done, len(world_sizes))
            results += outcome_of_ranks(measure, world_size, device.type, numel, rounds)
    method = {
        "policy": "float32 parameters, param_dtype bfloat16; reduce_dtype as the variant says, bfloat16 with accumkern",
        "held": "bytes of tensors that come alive in the micro-batches before the one that reduces, on rank 0",
        "timed": "the backward pass of a micro-batch, from a barrier to its end on rank 0: median over those of all "
        "windows that do not reduce, and over those that do",
        "order": "the variants take turns in every round",
        "micro_batches": MICRO_BATCHES,
        "parameters": LAYERS * PARAMETERS,
        "backend": "nccl" if device.type == "cuda" else "gloo, all processes on one machine",
        "threads_of_a_process": "torch's threads divided by the processes, at least one",
    }
    write_results(arguments, "whole", method, results)


def measure(device: torch.device, numel: int, rounds: int) -> list[dict[str, Any]]:
    """Run all variants as one rank, and return their results."""
    world_size = dist.get_world_size()
    torch.set_num_threads(max(1, torch.get_num_threads() // world_size))
    micro_batches = [factors(numel, n, dist.get_rank(), device) for n in range(MICRO_BATCHES)]
    flat = [[factor for of_layer in layers for factor in of_layer] for layers in micro_batches]
    truth = [torch.stack(parts).sum(0, dtype=torch.float64) / world_size for parts in zip(*flat, strict=True)]
    for total in truth:
        dist.all_reduce(total)

    models = {name: Variant(numel, device, way) for name, way in VARIANTS.items()}
    passes: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in VARIANTS}
    for number in range(rounds + 1):
        for name, variant in models.items():
            seconds, last = variant.run_window(micro_batches)
            if number > 0:  # the first makes what later ones find
                passes[name][0].extend(seconds)
                passes[name][1].append(last)
    results = []
    for name, variant in models.items():
        adding, reducing = ([1e3 * each for each in seconds] for seconds in passes[name])
        result = {
            "processes": world_size,
            "variant": name,
            "numel": numel,
            "held_bytes_per_parameter": variant.held_bytes / numel,
            "error_of_grad": relative_error(variant.gradients(), truth),
            "adding_median_ms": statistics.median(adding),
            "median_ms": statistics.median(reducing),
            "p20_ms": percentile(reducing, 0.2),
            "p80_ms": percentile(reducing, 0.8),
            "n": rounds,
        }
        results.append(result)
    return results


def factors(numel: int, micro_batch: int, rank: int, device: torch.device) -> list[list[Tensor]]:
    """Return the gradients of a micro-batch of a rank, by layer and parameter."""
    generator = torch.Generator(device).manual_seed(1000 * rank + micro_batch)
    return [
        [
            (torch.randn(numel // (LAYERS * PARAMETERS), device=device, generator=generator) + 1).bfloat16()
            for _ in range(PARAMETERS)
        ]
        for _ in range(LAYERS)
    ]


class Variant:
    """Layers under fully_shard, with or without accumkern.

    Attributes:
        held_bytes: before the last backward pass of the last window.
    """

    def __init__(self, numel: int, device: torch.device, way: Way) -> None:
        self.device, self.held_bytes = device, 0
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=way.reduce_dtype)
        self.layers: Any = [fully_shard(Gradients(numel).to(device), mp_policy=policy) for _ in range(LAYERS)]
        self.params = [param for layer in self.layers for param in layer.parameters()]
        self.optimizer = torch.optim.SGD(self.params)
        if way.buffer is not None:
            acc = accumkern.attach(self.optimizer, way.buffer)
            for layer in self.layers:
                acc.reduce_in_fp32(layer)

    def run_window(self, micro_batches: list[list[list[Tensor]]]) -> tuple[list[float], float]:
        """Run one window; return the seconds of its backward passes, and of the one that reduces."""
        self.optimizer.zero_grad()
        before, seconds = self._live_bytes(), []
        for n, micro_batch in enumerate(micro_batches):
            is_last = n == len(micro_batches) - 1
            if is_last:
                self.held_bytes = self._live_bytes() - before
            x = torch.zeros((), device=self.device, requires_grad=True)
            for layer, of_layer in zip(self.layers, micro_batch, strict=True):
                layer.set_requires_gradient_sync(is_last)
                x = layer(x, of_layer)
            synchronize(self.device)
            dist.barrier()
            begin = time.perf_counter()
            x.float().backward()
            synchronize(self.device)
            seconds.append(time.perf_counter() - begin)
        return seconds[:-1], seconds[-1]

    def gradients(self) -> list[Tensor]:
        """Return what the optimizer reads, whole."""
        grads: list[Any] = [param.grad for param in self.params if param.grad is not None]
        return [grad.full_tensor() for grad in grads]

    def _live_bytes(self) -> int:
        """Return the bytes of all tensors, gradients of gathered parameters among them."""
        for layer in self.layers:
            layer.unshard()
        grads = [param.grad for layer in self.layers for param in layer.parameters()]
        gc.collect()
        tensors = [thing for thing in gc.get_objects() if type(thing) is Tensor] + [g for g in grads if g is not None]
        found = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors if t.device == self.device}
        for layer in self.layers:
            layer.reshard()
        return sum(found.values())


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
