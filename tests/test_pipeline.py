"""Pipeline parallel models: the schedules' micro-batches are accumulated, with the gradient of one process."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks, device, full
from tiny import fp64_sums, relative_error
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleavedZeroBubble
from torch.nn.parallel import DistributedDataParallel

import accumkern

pytestmark = pytest.mark.integration("Pipeline parallel: GPipe, 1F1B")

BF16 = torch.bfloat16
MICRO_BATCHES = 32
schedules = pytest.mark.parametrize("schedule", [ScheduleGPipe, Schedule1F1B])


def layers(dtype: torch.dtype) -> list[nn.Module]:
    torch.manual_seed(1)
    return [nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12)).to(device(), dtype) for _ in range(2)]


def batch(dtype: torch.dtype, part: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(part)
    return (torch.randn(3 * MICRO_BATCHES, 12, generator=generator) + 0.5).to(device(), dtype)


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


@pytest.mark.parametrize(
    ("schedule", "kind"),
    # torch's DDP fails by itself in GPipe, whose forward passes all come before the first backward pass.
    [(Schedule1F1B, "DDP"), (Schedule1F1B, "fully_shard"), (ScheduleGPipe, "fully_shard")],
)
def test_stages_that_are_data_parallel(ranks: Ranks, schedule: type, kind: str) -> None:
    ranks.run(data_parallel_stages, schedule, kind, ranks=4, at_least=4)


def zero_bubble() -> None:
    """Two stages on each rank. The schedule computes the gradients of some weights apart, and adds them itself."""
    grads = []
    for attached in (False, True):
        mine = [layers(BF16)[0] for _ in range(2)]
        params = [p for stage in mine for p in stage.parameters()]
        acc = accumkern.attach(torch.optim.SGD(params)) if attached else None
        pipe = ScheduleInterleavedZeroBubble(
            [PipelineStage(stage, dist.get_rank() + 2 * i, 4, device()) for i, stage in enumerate(mine)],
            MICRO_BATCHES,
            loss_fn=loss,
            scale_grads=False,
        )
        x = batch(BF16)
        if dist.get_rank() == 0:
            pipe.step(x)
        else:
            pipe.step(target=x, losses=[])
        grads.append([p.grad for p in params])
        del acc
    assert relative_error(grads[1], grads[0]) < 1e-2


def test_schedules_that_split_the_backward_pass_agree_with_stock(ranks: Ranks) -> None:
    ranks.run(zero_bubble, at_least=2)
