"""Pipeline parallel models: the schedules' micro-batches are accumulated, with the gradient of one process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks, device, full
from tiny import fp64_sums, relative_error
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
    ScheduleZBVZeroBubble,
)
from torch.distributed.pipelining.stage import _PipelineStageBase
from torch.nn.parallel import DistributedDataParallel

import accumkern

one_stage = pytest.mark.integration("Pipeline parallel: GPipe, 1F1B")

BF16 = torch.bfloat16
MICRO_BATCHES = 32
schedules = pytest.mark.parametrize("schedule", [ScheduleGPipe, Schedule1F1B])


def layers(dtype: torch.dtype, count: int = 2) -> list[nn.Module]:
    torch.manual_seed(1)
    return [nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12)).to(device(), dtype) for _ in range(count)]


def batch(dtype: torch.dtype, part: int = 0, micro_batches: int = MICRO_BATCHES) -> Tensor:
    generator = torch.Generator().manual_seed(part)
    return (torch.randn(3 * micro_batches, 12, generator=generator) + 0.5).to(device(), dtype)


def loss(output: Tensor, target: Tensor) -> Tensor:
    return ((output - target) ** 2).float().sum()


def pipeline(schedule: type, stage: nn.Module, group: dist.ProcessGroup | None = None) -> partial[None]:
    """Return a function that runs one batch of the given part."""
    index = dist.get_rank(group)
    pipe = schedule(
        PipelineStage(stage, index, 2, device(), group=group), MICRO_BATCHES, loss_fn=loss, scale_grads=False
    )

    def run(dtype: torch.dtype, part: int = 0) -> None:
        x = batch(dtype, part)
        if index == 0:
            pipe.step(x)
        else:
            pipe.step(target=x, losses=[])

    return partial(run)


def stages(schedule: type, dtype: torch.dtype) -> None:
    errors = []
    for attached in (False, True):
        stage = layers(dtype)[dist.get_rank()]
        params = list(stage.parameters())
        run = pipeline(schedule, stage)
        optimizer = torch.optim.SGD(params)
        acc = accumkern.attach(optimizer) if attached else None
        run(dtype)
        optimizer.zero_grad()
        truth = fp64_sums(params)
        run(dtype)
        errors.append(relative_error([p.grad for p in params], truth))
        if acc is not None:
            assert relative_error([acc.gradient(p) for p in params], truth) < 1e-4
    if dtype is BF16:
        assert errors[1] * 2 < errors[0]
        return
    # In float32, the whole batch on one process gives the same.
    whole = nn.Sequential(*layers(dtype))
    x = batch(dtype)
    loss(whole(x), x).backward()
    for p, q in zip(params, whole[dist.get_rank()].parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-5 * float(q.grad.abs().max()))
    square = acc.finish().norm.square()
    dist.all_reduce(square)
    norm = torch.nn.utils.get_total_norm([q.grad for q in whole.parameters()])
    torch.testing.assert_close(square.sqrt(), norm, rtol=1e-5, atol=0)


@one_stage
@schedules
@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
def test_schedules(ranks: Ranks, schedule: type, dtype: torch.dtype) -> None:
    ranks.run(stages, schedule, dtype, at_least=2)


def data_parallel_stages(schedule: type, kind: str) -> None:
    """Two replicas of two stages, and two batches in a window."""
    mesh = init_device_mesh(device().type, (2, 2), mesh_dim_names=("dp", "pp"))
    index, replica = mesh.get_local_rank("pp"), mesh.get_local_rank("dp")
    stage = layers(torch.float32)[index]
    if kind == "DDP":
        model: nn.Module = DistributedDataParallel(stage, process_group=mesh.get_group("dp"))
    else:
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
        model = fully_shard(stage, mesh=mesh["dp"], mp_policy=policy)
    run = pipeline(schedule, model, mesh.get_group("pp"))
    params = list(model.parameters())
    optimizer = torch.optim.SGD(params)
    acc = accumkern.attach(optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        run(torch.float32, replica)
        if kind == "fully_shard":
            run(torch.float32, 2 + replica)
        finished = acc.finish()
    whole = nn.Sequential(*layers(torch.float32))
    for part in range(2 if kind == "DDP" else 4):
        x = batch(torch.float32, part)
        (loss(whole(x), x) / 2).backward()
    truth = [q.grad for q in whole[index].parameters()]
    for p, q in zip(params, truth, strict=True):
        torch.testing.assert_close(full(p.grad), q, rtol=1e-5, atol=1e-5 * float(q.abs().max()))
    torch.testing.assert_close(finished.norm, torch.nn.utils.get_total_norm(truth), rtol=1e-5, atol=0)
    if kind == "fully_shard":
        acc.scale = 0.5
        optimizer.zero_grad()
        run(torch.float32, replica)
        with pytest.raises(RuntimeError, match="average_over and scale do not reach"):
            run(torch.float32, replica)
        optimizer.zero_grad()
        acc.reduce_in_fp32(model)  # which multiplies before the reduction
        for part in (replica, 2 + replica):
            run(torch.float32, part)
        for p, q in zip(params, truth, strict=True):
            torch.testing.assert_close(full(p.grad), q / 2, rtol=1e-5, atol=1e-5 * float(q.abs().max()))


@one_stage
@pytest.mark.parametrize(
    ("schedule", "kind"),
    # torch's DDP fails by itself in GPipe, whose forward passes all come before the first backward pass.
    [(Schedule1F1B, "DDP"), (Schedule1F1B, "fully_shard"), (ScheduleGPipe, "fully_shard")],
)
def test_stages_that_are_data_parallel(ranks: Ranks, schedule: type, kind: str) -> None:
    ranks.run(data_parallel_stages, schedule, kind, ranks=4, at_least=4)


# ---- several stages on a rank, and backward passes that are split -------------------------------------------------

FEW = 12  # micro-batches
WHOLE = [ScheduleInterleaved1F1B, ScheduleLoopedBFS]
SPLIT = [ScheduleInterleavedZeroBubble, ScheduleZBVZeroBubble, ScheduleDualPipeV]
IN_V = [ScheduleZBVZeroBubble, ScheduleDualPipeV]  # where a rank has the first stage and the last
whole = pytest.mark.integration("Pipeline parallel: several stages on a rank")
split = pytest.mark.integration("Pipeline parallel: zero bubble, whose schedules split the backward pass")
several = pytest.mark.parametrize(
    "schedule",
    [
        *[pytest.param(schedule, marks=whole) for schedule in WHOLE],
        *[pytest.param(schedule, marks=split) for schedule in SPLIT],
    ],
)


def run_several(pipe: Any, mine: dict[int, nn.Module], x: Tensor) -> None:
    """Run one batch through the stages of this rank."""
    has_last = any(stage.is_last for stage in pipe._stages)
    pipe.step(*([x] if 0 in mine else []), **({"target": x, "losses": []} if has_last else {}))


def stages_of_this_rank(schedule: type, dtype: torch.dtype) -> dict[int, nn.Module]:
    rank, size = dist.get_rank(), dist.get_world_size()
    every = layers(dtype, 2 * size)
    return {i: every[i] for i in (rank, 2 * size - 1 - rank if schedule in IN_V else rank + size)}


def scheduled(schedule: type, mine: dict[int, nn.Module], group: dist.ProcessGroup | None = None) -> Any:
    count = 2 * dist.get_world_size(group)
    of_rank = [PipelineStage(stage, i, count, device(), group=group) for i, stage in mine.items()]
    return schedule(of_rank, FEW, loss_fn=loss, scale_grads=False)


def several_stages(schedule: type, dtype: torch.dtype, averages: tuple[float | None, ...]) -> None:
    """Compare with the FP64 sum of what arrives; in float32 also with one process."""
    errors: list[float] = []
    for attached, average_over in [(False, None), *((True, each) for each in averages)]:
        mine = stages_of_this_rank(schedule, dtype)
        params = [p for stage in mine.values() for p in stage.parameters()]
        pipe = scheduled(schedule, mine)
        optimizer = torch.optim.SGD(params)
        acc = accumkern.attach(optimizer, average_over=average_over) if attached else None
        run_several(pipe, mine, batch(dtype, 1, FEW))
        optimizer.zero_grad()
        sums = fp64_sums(params)
        with kinds_of_passes() as kinds:
            for part in range(2):
                run_several(pipe, mine, batch(dtype, part, FEW))
        assert ("weight" in kinds) == (schedule in SPLIT)
        truth = [total / (average_over or 1) for total in sums]
        errors.append(relative_error([p.grad for p in params], truth))
        if acc is None:
            continue
        assert relative_error([acc.gradient(p) for p in params], truth) < 1e-4
        if dtype is BF16:
            assert errors[-1] * 2 < errors[0]
        else:
            assert_one_process(mine, acc, average_over or 1)


def assert_one_process(mine: dict[int, nn.Module], acc: accumkern.GradAccumulator, divide_by: float) -> None:
    alone = nn.Sequential(*layers(torch.float32, 2 * dist.get_world_size()))
    for part in range(2):
        x = batch(torch.float32, part, FEW)
        (loss(alone(x), x) / divide_by).backward()
    for i, stage in mine.items():
        for p, q in zip(stage.parameters(), alone[i].parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-5 * float(q.grad.abs().max()))
    square = acc.finish().norm.square()
    dist.all_reduce(square)
    norm = torch.nn.utils.get_total_norm([q.grad for q in alone.parameters()])
    torch.testing.assert_close(square.sqrt(), norm, rtol=1e-5, atol=0)


@contextmanager
def kinds_of_passes() -> Iterator[set[str]]:
    """Return a block that notes which kinds of backward passes the stages run."""
    kinds: set[str] = set()
    method = _PipelineStageBase.backward_maybe_with_nosync

    def see(self: Any, kind: str, *args: Any, **kwargs: Any) -> Any:
        kinds.add(kind)
        return method(self, kind, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_PipelineStageBase, "backward_maybe_with_nosync", see)
        yield kinds


def skip_what_torch_cannot(ranks: Ranks, schedule: type) -> None:
    if schedule in IN_V and ranks.backend == "gloo" and torch.__version__.startswith(("2.10.", "2.11.")):
        pytest.skip("a schedule in V lets a rank of this torch send to itself, which gloo cannot")


@several
@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
def test_several_stages_on_a_rank(ranks: Ranks, schedule: type, dtype: torch.dtype) -> None:
    skip_what_torch_cannot(ranks, schedule)
    ranks.run(several_stages, schedule, dtype, (None, 48), at_least=2)


@pytest.mark.parametrize(
    "schedule",
    [
        pytest.param(ScheduleInterleaved1F1B, marks=whole),
        pytest.param(ScheduleInterleavedZeroBubble, marks=split),
    ],
)
def test_several_stages_on_each_of_four_ranks(ranks: Ranks, schedule: type) -> None:
    ranks.run(several_stages, schedule, torch.float32, (48,), ranks=4, at_least=4)


def several_stages_with_replicas(schedule: type, kind: str) -> None:
    """Compare four stages on two ranks, times two data-parallel ranks, with one process; two batches in a window."""
    mesh = init_device_mesh(device().type, (2, 2), mesh_dim_names=("dp", "pp"))
    index, replica = mesh.get_local_rank("pp"), mesh.get_local_rank("dp")
    every, mine = layers(torch.float32, 4), {}
    for i in (index, index + 2):
        if kind == "DDP":
            mine[i] = DistributedDataParallel(every[i], process_group=mesh.get_group("dp"))
        else:
            policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
            mine[i] = fully_shard(every[i], mesh=mesh["dp"], mp_policy=policy)
    pipe = scheduled(schedule, mine, mesh.get_group("pp"))
    params = [p for stage in mine.values() for p in stage.parameters()]
    optimizer = torch.optim.SGD(params)
    acc = accumkern.attach(optimizer, average_over=2 if kind == "DDP" else None)
    batches = [replica] if kind == "DDP" else [replica, 2 + replica]
    for _ in range(2):
        optimizer.zero_grad()
        for part in batches:
            run_several(pipe, mine, batch(torch.float32, part, FEW))
        finished = acc.finish(divide_by=1 if kind == "DDP" else 2)
    alone = nn.Sequential(*layers(torch.float32, 4))
    for part in range(2 * len(batches)):
        x = batch(torch.float32, part, FEW)
        (loss(alone(x), x) / 4).backward()
    truth = [q.grad for i in mine for q in alone[i].parameters()]
    for p, q in zip(params, truth, strict=True):
        torch.testing.assert_close(full(p.grad), q, rtol=1e-5, atol=1e-5 * float(q.abs().max()))
    torch.testing.assert_close(finished.norm, torch.nn.utils.get_total_norm(truth), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("schedule", "kind"),
    [
        pytest.param(ScheduleInterleaved1F1B, "DDP", marks=whole),
        pytest.param(ScheduleInterleaved1F1B, "fully_shard", marks=whole),
        pytest.param(ScheduleInterleavedZeroBubble, "fully_shard", marks=split),
    ],
)
def test_several_stages_that_are_data_parallel(ranks: Ranks, schedule: type, kind: str) -> None:
    ranks.run(several_stages_with_replicas, schedule, kind, ranks=4, at_least=4)
