"""A plan of a model that is under ``fully_shard``, on the ranks that share it."""

from __future__ import annotations

from typing import Any
from unittest import mock

import planned
import pytest
import torch
import torch.distributed as dist
from ranks import Ranks, device
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import accumkern
from accumkern.planning import speed
from accumkern.planning.plan_result import Plan
from accumkern.planning.protocol import Setup
from accumkern.planning.trial import held_bytes

pytestmark = pytest.mark.integration("fully_shard (FSDP2)")

NUMEL = 25000  # of the model's one weight


def sharded(**ways: Any) -> Setup:
    mesh = init_device_mesh(device().type, (dist.get_world_size(),))
    model = fully_shard(planned.Hungry().to(device(), torch.bfloat16), mesh=mesh, **ways)
    made = planned.hungry(device=device())
    return made._replace(model=model, optimizer=torch.optim.Adam(model.parameters()))


def plan(memory: str, **ways: Any) -> Plan:
    speed.LEAST_SECONDS = 0.01
    torch.manual_seed(dist.get_rank())
    return accumkern.plan(lambda: sharded(**ways), effective_batch=16, largest_micro_batch=16, memory=memory)


def test_it_says_what_fits_and_what_it_leaves_out(ranks: Ranks) -> None:
    is_cpu = ranks.backend == "gloo"
    made, *others = ranks.run(plan, "2.5MB" if is_cpu else "1GB")
    count = 1 + len(others)
    assert all(other == made for other in others)
    assert made.is_limited_by_memory is is_cpu
    assert (made.largest_micro_batch < 16 / count) is is_cpu  # what did not fit has left the ranks as they were
    assert made.choice.memory_bytes <= made.memory_limit_bytes
    assert made.choice.ranks * made.choice.micro_batch * made.choice.accumulation_steps == 16
    assert made.bfloat16_numel == NUMEL / count  # of a rank's shard
    assert made.by_ranks == (made.choice,)
    assert made.noise is None
    assert sum("the gradient noise scale was not measured: parameters are DTensors" in w for w in made.warnings) == 1
    assert made.prediction_problem is not None
    assert "the model of setup() is sharded over ranks" in made.prediction_problem
    assert any("memory and speed of a model that is sharded are known of the ranks" in r for r in made.reasons)


def of_gpus() -> tuple[str, int]:
    """Return the device of a setup whose mesh says that it is one of GPUs, and what it holds of that."""
    setup = sharded()
    for param in setup.model.parameters():
        param.device_mesh._device_type = "cuda"
    with mock.patch("torch.cuda.current_device", return_value=3):
        return str(setup.device), held_bytes(setup)


def held() -> list[int]:
    return [held_bytes(sharded()), 2 * next(sharded().model.parameters()).to_local().numel()]


def test_shards_in_host_memory_are_no_memory_of_the_gpu_that_computes(ranks: Ranks) -> None:
    for of_rank, expected in ranks.run(held):
        assert of_rank == expected
    if ranks.backend == "gloo":
        assert ranks.run(of_gpus) == 2 * [("cuda:3", 0)]
        return
    made = ranks.run(plan, "1GB", offload_policy=CPUOffloadPolicy())[0]
    assert made.fit.held_bytes == 0
    assert made.machine["device"] == torch.cuda.get_device_name()


def tensor_parallel() -> str:
    mesh = init_device_mesh(device().type, (dist.get_world_size(),))
    model = nn.Sequential(parallelize_module(nn.Linear(4, 4, device=device()), mesh, ColwiseParallel()))
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(ValueError, match="its ranks train on the same batch") as raised:
        accumkern.plan(lambda: (model, optimizer, torch.zeros, lambda *_: None))
    return str(raised.value)


def test_tensor_parallel_layers_are_refused(ranks: Ranks) -> None:
    for told in ranks.run(tensor_parallel):
        assert told.startswith("0.weight of setup()'s model is spread over ranks as (Shard(dim=0),) by something else")
