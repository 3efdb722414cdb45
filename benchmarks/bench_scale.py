"""The mean over 2 to 4,096 ranks, simulated: its error by running its arithmetic, its bytes and time by a model.

``python benchmarks/bench_scale.py [--device cpu|cuda] [--quick] [--network-gb-per-s 50]``

Every rank accumulates its own random micro-gradients, in bfloat16 as stock PyTorch does and in split24 by accumkern's
kernel. Then the mean over ranks is taken in each way of ``scale_means.py``, element by element in the formats that
would travel, and compared with the FP64 mean of all micro-gradients. What is sent, and how long it would take, is
computed in ``scale_wire.py``: no byte leaves the process. Writes ``benchmarks/results/<machine>/scale.json``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # from a checkout, installed or not

from harness import parser, steps, write_results
from scale_means import EXACT, MEANS, NODE, STOCK, WAYS, Parts
from scale_wire import Links, wire

import accumkern
from accumkern import backends
from accumkern.formats import Format, decode

RANKS = [2, 8, 64, 512, 4096]
MICRO_BATCHES = 8
MEAN_OVER_STD = (3.0, 0.1)  # as in bench_accuracy.py: micro-gradients that agree, and that do not
BLOCK = 2**11  # elements of all ranks at a time
SEED = 0
BUCKET, MODEL = 25 * 2**20 // 2, 10**9  # elements of a bucket of DistributedDataParallel, and of a large model


def main() -> None:
    """Simulate both kinds of gradients and write the file."""
    arguments = options().parse_args()
    links = Links(arguments.node_us, arguments.node_gb_per_s, arguments.network_us, arguments.network_gb_per_s)
    device = torch.device(arguments.device)
    counts = RANKS[:3] if arguments.quick else RANKS
    numel = 2**10 if arguments.quick else 2**14

    errors: dict[tuple[str, str, int], list[dict[str, float]]] = {}
    for ratio in MEAN_OVER_STD:
        with steps(f"mean over ranks, mean / std {ratio:g}") as on_step:
            for key, of_grad, of_step in simulate(ratio, counts, numel, device, on_step):
                error = {"mean_over_std": ratio, "error_of_grad": of_grad, "error_of_step": of_step}
                errors.setdefault(key, []).append(error)
    results = [
        {"way": way, "held": held, "ranks": ranks, "errors": errors[way, held, ranks]}
        | wire(way, ranks, links, [BUCKET, MODEL])
        for ranks in counts
        for way, held in WAYS
    ]
    write_results(arguments, "scale", method(arguments, numel, device), results)


def options() -> argparse.ArgumentParser:
    """Return the parser: every benchmark's options, and latency and bandwidth of the links."""
    made = parser(__doc__)
    for name, default, what in (
        ("node-us", 3.4, "latency of a message within a node; NCCL's figure for a ring over NVLink"),
        ("node-gb-per-s", 450.0, "bandwidth of a GPU's link within a node, one direction; NVLink 4"),
        ("network-us", 14.0, "latency of a message between nodes; NCCL's figure for a ring over the network"),
        ("network-gb-per-s", 50.0, "bandwidth of a GPU's network card, one direction; 400 Gb/s"),
    ):
        made.add_argument(f"--{name}", type=positive, default=default, help=f"{what} (%(default)g)")
    return made


def positive(text: str) -> float:
    """Read an option that is a positive number."""
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def method(arguments: argparse.Namespace, numel: int, device: torch.device) -> dict[str, Any]:
    """Return how it is simulated, for the file."""
    return {
        "simulated": "the arithmetic is run; what is sent, and the time, is a model: no byte was sent",
        "micro_gradients": "bfloat16(mean + noise); mean ~ N(0, mean_over_std^2) per element, the same on all ranks; "
        "noise ~ N(0, 1) per rank and draw; fewer ranks are the first of them",
        "micro_batches": MICRO_BATCHES,
        "elements": numel,
        "seed": SEED,
        "truth": "FP64 mean over ranks of the sums of their bfloat16 micro-gradients",
        "error_of_grad": "relative L2 error of .grad, which the optimizer reads, after the mean",
        "error_of_step": "relative L2 error of what a step reads that reads the residual too",
        "order": "bf16 and FP32 rings: a piece starts at the rank behind its owner and is rounded at every hop; tree: "
        "a chain in each node, then NCCL's binary tree of nodes; all-to-all: FP32, by rank",
        "links": f"{NODE} GPUs in a node; a GPU's link in it {arguments.node_us:g} µs, "
        f"{arguments.node_gb_per_s:g} GB/s, its network card {arguments.network_us:g} µs, "
        f"{arguments.network_gb_per_s:g} GB/s, each direction; by default NVLink 4, 400 Gb/s, and the latencies of "
        "NCCL's own model (hwLat, ring, Simple, in nccl/src/graph/tuning.cc)",
        "time": "latency of each message, one after another, plus bytes over bandwidth; a phase lasts as long as the "
        "slower kind of link; one collective for the whole gradient",
        "not_modelled": "contention, topology, sums in switches (NVLink SHARP, InfiniBand SHARP), several messages in "
        "flight, filling of pipelines, work on the GPUs, overlap with the backward pass",
        "backend": backends.choose(None, device),
    }


def simulate(
    ratio: float, counts: list[int], numel: int, device: torch.device, on_step: Callable[[int, int], None]
) -> list[tuple[tuple[str, str, int], float, float]]:
    """Return ``((way, held, ranks), error_of_grad, error_of_step)`` of every way and number of ranks.

    Args:
        ratio: of the gradient's mean to its standard deviation over micro-batches.
        counts: numbers of ranks, powers of two.
        numel: elements of the gradient, at least as many as ranks; they are simulated in blocks.
        device: where it is computed.
        on_step: is told how many blocks are done, of how many.
    """
    generator = torch.Generator(device).manual_seed(SEED)
    squares: dict[tuple[str, str, int], Tensor] = {}
    truths = dict.fromkeys(counts, 0.0)
    for begin in range(0, numel, BLOCK):
        on_step(begin, numel)
        columns = torch.arange(begin, min(begin + BLOCK, numel), device=device)
        stock, exact, truth = accumulate(ratio, max(counts), len(columns), generator)
        for ranks in counts:
            mean = truth[:ranks].mean(0)
            truths[ranks] += float(mean.square().sum())
            pieces = columns * ranks // numel
            held = {
                STOCK: Parts(stock[:ranks], None, pieces),
                EXACT: Parts(exact[0][:ranks], exact[1][:ranks], pieces),
            }
            for way, sums in WAYS:
                found = torch.stack([(x.double() - mean).square().sum() for x in MEANS[way](held[sums])])
                key = (way, sums, ranks)
                squares[key] = squares.get(key, 0) + found
    return [(key, *((square / truths[key[2]]).sqrt().tolist())) for key, square in squares.items()]


def accumulate(
    ratio: float, ranks: int, numel: int, generator: torch.Generator
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """Return every rank's sum of its micro-gradients, all (ranks, numel): in bfloat16, in split24, and in FP64.

    That in split24 is ``.grad`` alone, bfloat16, and with its residual, FP32.
    """
    device = generator.device
    mean = ratio * torch.randn(numel, generator=generator, device=device)
    stock, halves = (torch.zeros(ranks, numel, dtype=torch.bfloat16, device=device) for _ in range(2))
    residuals = torch.zeros(ranks, numel, dtype=torch.int8, device=device)
    truth = torch.zeros(ranks, numel, dtype=torch.float64, device=device)
    for _ in range(MICRO_BATCHES):
        micro_gradient = (mean + torch.randn(ranks, numel, generator=generator, device=device)).bfloat16()
        stock += micro_gradient
        accumkern.accumulate_([micro_gradient], [halves], [residuals])
        truth += micro_gradient
    return stock, (halves, decode(Format.SPLIT24, halves, residuals)), truth


if __name__ == "__main__":
    main()
