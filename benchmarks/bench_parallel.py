"""One global batch, divided by accumulation, data, tensor and pipeline parallelism: memory of a rank, and the gradient.

``python benchmarks/bench_parallel.py [--device cpu|cuda] [--quick]``

Starts four processes (gloo on a CPU; NCCL on four GPUs), which train the same GPT with the same global batch in every
way of ``parallel_ways.py``. Bytes are counted in the second window, when everything is there: those that are held at
its end, from the tensors, and the most that the process took while it ran. The gradient is compared with that of one
process in FP32. Writes ``benchmarks/results/<machine>/parallel.json``.
"""

from __future__ import annotations

import gc
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # from a checkout, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from harness import parser, steps, write_results
from parallel_ways import RANKS, WAYS, Shape, Way, new_batch, new_gpt
from processes import outcome_of_ranks
from resident import PeakMeter, give_back_blocks

from measure import relative_error

SHAPE = Shape(width=256, layers=4, context=64, global_batch=16, micro_batch=2)
QUICK = Shape(width=64, layers=2, context=16, global_batch=8, micro_batch=1)
KINDS = ("weights", "master_residuals", "gradients", "residuals", "optimizer_state")


def main() -> None:
    """Measure every way, print the table and write the file."""
    arguments = parser(__doc__).parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and torch.cuda.device_count() < RANKS:
        print(f"it takes {RANKS} GPUs, and here is {torch.cuda.device_count()}: not measured")
        return
    shape = QUICK if arguments.quick else SHAPE
    with steps("parallel"):
        results = outcome_of_ranks(measure, RANKS, device.type, shape)
    numel = sum(param.numel() for param in new_gpt(shape, torch.device("cpu"), torch.float32).parameters())
    method = {
        "model": f"a GPT of width {shape.width} with {shape.layers} layers, {numel:,} weights",
        "global_batch": f"{shape.global_batch} samples of {shape.context} bytes",
        "training": "AdamW; for bytes bfloat16 weights with split32 masters and split24 sums",
        "backend": "nccl" if device.type == "cuda" else "gloo, all processes on one machine",
        "held": "bytes of a rank after the last backward pass of its second window, counted from the tensors",
        "peak": "the most bytes that a rank's process took during that window (on a CPU memory of the system, on a GPU "
        "of the allocator), less what it took before the model was made, after a first training; with activations, "
        "gathered weights, whole gradients, buckets, and gloo's buffers",
        "errors": "relative L2 error of the whole gradient against that of one process in FP32; bfloat16's is that of "
        "activations and micro-gradients in bfloat16, also on one process",
    }
    write_results(arguments, "parallel", method, results)


def measure(device: torch.device, shape: Shape) -> list[dict[str, Any]]:
    """Run all ways as one rank, and return their results."""
    give_back_blocks()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # nothing here writes in place
    batch = new_batch(shape, device)
    truth = gradients(Way, shape, batch, torch.float32)
    results = []
    for kind in WAYS:
        found = of_rank(kind, shape, batch, truth)
        of_ranks = [found] * RANKS
        dist.all_gather_object(of_ranks, found)
        if kind is Way:
            of_ranks = of_ranks[:1]  # each is alone
        results.append(
            {
                "way": kind.name,
                "data_parallel": kind.data_parallel,
                "accumulation_steps": kind.steps(shape),
                "micro_batch": shape.micro_batch,
                "error_fp32": max(of.pop("error_fp32") for of in of_ranks),
                "error_bf16": max(of.pop("error_bf16") for of in of_ranks),
                "ranks": of_ranks,
            }
        )
    return results


def of_rank(kind: type[Way], shape: Shape, batch: Tensor, truth: dict[str, Tensor]) -> dict[str, Any]:
    """Return what a way takes on this rank, and how far its gradients are from those of one process in FP32."""
    errors = {  # and what a process makes once is made
        name: error(gradients(kind, shape, batch, dtype), truth)
        for name, dtype in (("error_fp32", torch.float32), ("error_bf16", torch.bfloat16))
    }
    meter = PeakMeter(batch.device)
    way = kind(shape, batch.device, torch.bfloat16)
    way.run_window(batch)
    way.end_window()
    meter.reset()
    way.run_window(batch)
    peak_bytes = meter.peak_bytes()
    held = asdict(way.acc.memory())
    del way
    gc.collect()
    return {"held_bytes": {name: held[name] for name in KINDS}, "peak_bytes": peak_bytes, **errors}


def gradients(kind: type[Way], shape: Shape, batch: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the mean gradients in FP32, by name, of the parameters that this rank has a part of; steps once."""
    way = kind(shape, batch.device, dtype)
    way.run_window(batch)
    found = dict(way.gradients())
    way.end_window()
    del way
    gc.collect()
    return found


def error(grads: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Return the relative L2 error of gradients, by name, over all of them together."""
    return relative_error(list(grads.values()), [truth[name] for name in grads])


if __name__ == "__main__":
    main()
