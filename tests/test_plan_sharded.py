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
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import accumkern
from accumkern.out_of_memory import CpuLimit
from accumkern.planning import speed
from accumkern.planning.plan_result import Plan
from accumkern.planning.protocol import Setup, check_setup
from accumkern.planning.trial import held_bytes

pytestmark = pytest.mark.integration("fully_shard (FSDP2)")

NUMEL = 25000  # of the model's one weight


def sharded(policy: CPUOffloadPolicy | None = None) -> Setup:
    mesh = init_device_mesh(device().type, (dist.get_world_size(),))
    ways = {} if policy is None else {"offload_policy": policy}
    model = fully_shard(planned.Hungry().to(device(), torch.bfloat16), mesh=mesh, **ways)
    made = planned.hungry(device=device())
    return made._replace(model=model, optimizer=torch.optim.Adam(model.parameters()))


def plan(memory: str, *policy: CPUOffloadPolicy) -> Plan:
    speed.LEAST_SECONDS = 0.01
    torch.manual_seed(dist.get_rank())
    return accumkern.plan(lambda: sharded(*policy), effective_batch=16, largest_micro_batch=16, memory=memory)


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
    assert not any("of a core" in warning for warning in made.warnings)  # ranks wait for each other
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
    made = ranks.run(plan, "1GB", CPUOffloadPolicy())[0]
    assert made.fit.held_bytes == 0
    assert made.machine["device"] == torch.cuda.get_device_name()


def after_a_pass() -> bool:
    made = sharded()
    with torch.no_grad():
        made.model(torch.zeros(NUMEL, device=device()))  # leaves the root's weights gathered
    was_gathered = not is_sharded(made)
    return was_gathered and is_sharded(check_setup(made))


def is_sharded(setup: Setup) -> bool:
    return all(isinstance(param, DTensor) for param in setup.model.parameters())


def test_what_setup_has_gathered_is_sharded_again(ranks: Ranks) -> None:
    assert all(ranks.run(after_a_pass))


def counted() -> tuple[int, int]:
    """Return what a limit counts of a tensor like a parameter, and how large the shard is."""
    param: Any = next(sharded().model.parameters())
    with CpuLimit(0, 10**9) as limit:
        made = torch.zeros_like(param)
        found = limit.bytes
    return found, made.to_local().nbytes


def test_the_limit_counts_shards(ranks: Ranks) -> None:
    if ranks.backend != "gloo":
        pytest.skip("the limit is one of the CPU")
    for found, of_shard in ranks.run(counted):
        assert 0 < found == of_shard


def plan_where_one(what: str, most: int) -> Any:
    """Return the plan, or the error, where the last of the ranks has no memory or no data for more samples."""
    is_last = dist.get_rank() == dist.get_world_size() - 1

    def fail(size: int) -> None:
        if is_last and size > most:
            raise torch.OutOfMemoryError("out of memory") if what == "memory" else ZeroDivisionError(f"of {size}")

    def setup() -> Setup:
        made = sharded()

        def make_batch(size: int) -> Any:
            if what == "data":
                fail(size)
            return made.make_batch(size)

        def loss(model: nn.Module, batch: Any) -> Any:
            if what in ("memory", "before"):
                fail(batch.shape[0])
            found = model(batch)
            if what == "after":
                fail(batch.shape[0])
            return found

        return made._replace(make_batch=make_batch, loss=loss)

    speed.LEAST_SECONDS = 0.01
    try:
        return accumkern.plan(setup, effective_batch=32, largest_micro_batch=16, memory="1GB")
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("what", ["memory", "data"])
def test_no_rank_waits_in_a_collective_for_one_that_has_no_memory_or_data(ranks: Ranks, what: str) -> None:
    one, *others = ranks.run(plan_where_one, what, 3, at_least=2)
    assert all(other == one for other in others)
    assert one.largest_micro_batch == 3
    assert one.is_limited_by_memory is (what == "memory")
    assert (one.fit.data_problem is None) is (what == "memory")


@pytest.mark.parametrize("what", ["before", "after"])
def test_no_rank_waits_in_a_collective_for_one_whose_loss_raises(ranks: Ranks, what: str) -> None:
    one, other = ranks.run(plan_where_one, what, 0, at_least=2)
    assert other == "RuntimeError: loss of setup() raised ZeroDivisionError: of 1"
    assert one.startswith(f"RanksError: rank 1 failed in the phase 'what fits' with {other}")


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
