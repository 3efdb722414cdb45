"""The benchmark of ways to divide a batch: bytes are what is said of them, and the gradient is that of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import Ranks
from test_bench_training import CPU  # which skips this file, too, where a package is missing

import bench_parallel  # isort: skip
import parallel_ways  # isort: skip
import resident  # isort: skip
from tables.parallel import parallel_summary, parallel_tables  # isort: skip

SHAPE = bench_parallel.QUICK
NUMEL = sum(param.numel() for param in parallel_ways.new_gpt(SHAPE, CPU, torch.float32).parameters())


def test_the_ways_divide_one_global_batch() -> None:
    for shape in (bench_parallel.SHAPE, SHAPE):
        for kind in parallel_ways.WAYS:
            assert kind.data_parallel * kind.steps(shape) * shape.micro_batch == shape.global_batch
            assert kind.steps(shape) >= 2  # the second micro-batch leaves residuals


def of_rank(number: int) -> dict[str, Any]:
    parallel_ways.mesh_of.cache_clear()  # its groups were those of another test
    batch = parallel_ways.new_batch(SHAPE, CPU)
    truth = bench_parallel.gradients(parallel_ways.Way, SHAPE, batch, torch.float32)
    return bench_parallel.of_rank(parallel_ways.WAYS[number], SHAPE, batch, truth)


#: The ranks among which the weights of a model are divided.
PARTS = {
    parallel_ways.Way: 1,
    parallel_ways.DDP: 1,
    parallel_ways.FSDP: 4,
    parallel_ways.FSDPOnce: 4,
    parallel_ways.HSDP: 2,
    parallel_ways.TensorParallel: 4,
    parallel_ways.Pipeline: 2,
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", PARTS, ids=lambda kind: kind.__name__)
def test_a_rank_holds_its_part_and_has_the_gradient_of_one_process(ranks: Ranks, kind: type[Any]) -> None:
    if ranks.backend == "nccl":
        pytest.skip("the model is on the CPU")
    count = 1 if kind is parallel_ways.Way else parallel_ways.RANKS
    for found in ranks.run(of_rank, parallel_ways.WAYS.index(kind), ranks=count):
        held = found["held_bytes"]
        part = NUMEL / PARTS[kind]
        for name, of_weight in (("weights", 2), ("master_residuals", 2), ("gradients", 2), ("optimizer_state", 8)):
            assert held[name] == pytest.approx(of_weight * part, rel=0.1), name  # small tensors are divided unevenly
        assert found["peak_bytes"] > 0.9 * sum(held.values())  # what is small may lie where something was before
        assert found["error_fp32"] < 1e-6
        assert 1e-4 < found["error_bf16"] < 2e-2


def test_a_meter_sees_the_most_since_its_reset() -> None:
    def block(megabytes: int) -> torch.Tensor:
        return torch.ones(megabytes * 250_000)

    resident.give_back_blocks()
    block(1)  # what torch makes once
    meter = resident.PeakMeter(CPU)
    kept, dropped = block(20), block(30)
    del dropped
    meter.reset()
    assert meter.peak_bytes() == pytest.approx(20e6, abs=2e6)
    for _ in range(3):
        block(10)
    assert meter.peak_bytes() == pytest.approx(30e6, abs=2e6)
    assert len(kept) == 5_000_000


def test_a_table_shows_the_rank_that_has_the_most() -> None:
    kinds = dict.fromkeys(bench_parallel.KINDS, 10**6)
    ranks = [{"held_bytes": kinds, "peak_bytes": 9 * 10**6}, {"held_bytes": kinds | {"weights": 3 * 10**6}}]
    ranks[1]["peak_bytes"] = 8 * 10**6
    result = {"way": "halves", "data_parallel": 2, "accumulation_steps": 4, "micro_batch": 8, "ranks": ranks}
    result |= {"error_fp32": 1e-7, "error_bf16": 5e-3}
    method = {"model": "a model", "global_batch": "64 samples", "backend": "gloo, on one machine"}
    content = {"method": method, "results": [result, result | {"way": "other", "error_fp32": 0.0}]}
    lines = parallel_tables(content)
    assert "| halves | 2 x 4 x 8 | 4.00 | 2.00 | 1.00 | 7.00 | 9.00 | 1e-07 | 5.0e-03 |" in lines
    assert any(line.endswith("| 0 | 5.0e-03 |") for line in lines)
    (summary, *_) = parallel_summary(content)
    assert summary.startswith("One global batch, divided in 2 ways")
