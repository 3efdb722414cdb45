"""Master weights on several ranks: DDP, fully_shard, tensor parallel, pipelines; with the bits of FP32 weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fp32_twin import BF16, Fp32Twin, bits, rounded
from masters import OwnAdamW
from pinned import pinned
from ranks import Ranks, device, full
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import accumkern

ADAMW = partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.1)
MICRO_BATCHES, STEPS = 3, 6


class Net(nn.Module):
    """Layers whose first dimensions do not divide evenly among the ranks; the last has one row, which one rank has."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(*sizes) for sizes in ((12, 23), (23, 23), (23, 1)))
        self.norm = nn.LayerNorm(23)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = self.norm(torch.tanh(layer(x)))
        return self.layers[-1](x)


def net(dtype: torch.dtype = BF16) -> Net:
    torch.manual_seed(1)
    return Net().to(device(), dtype)


def micro_batch(n: int, rank: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * (dist.get_rank() if rank is None else rank) + n)
    return (torch.randn(6, 12, generator=generator) + 0.5).to(device(), BF16)


def backward(model: nn.Module, n: int, rank: int | None = None) -> None:
    (model(micro_batch(n, rank)) ** 2).float().sum().backward()


# ---- DistributedDataParallel --------------------------------------------------------------------------------------


def one_process(starts: dict[str, Tensor], ranks: int) -> dict[str, Tensor]:
    """Return the FP32 weights that one process makes of the micro-batches of all ranks, with FP32 sums and AdamW."""
    model = net()
    masters = {name: nn.Parameter(start.clone()) for name, start in starts.items()}
    optimizer = pinned(ADAMW(masters.values()))
    for step in range(STEPS):
        with torch.no_grad():
            for name, param in model.named_parameters():
                param.copy_(rounded(masters[name]))
                masters[name].grad = torch.zeros_like(masters[name])
        for rank in range(ranks):
            sums = {name: torch.zeros_like(master) for name, master in masters.items()}
            for n in range(MICRO_BATCHES):
                model.zero_grad()
                backward(model, MICRO_BATCHES * step + n, rank)
                for name, param in model.named_parameters():
                    sums[name] += param.grad
            for name, master in masters.items():
                master.grad += sums[name] / ranks
        optimizer.step()
    return {name: master.detach() for name, master in masters.items()}


def ddp(in_fp32: bool, views: bool, kind: str) -> tuple[list[Tensor], bool]:
    """Return this rank's masters, and whether they are those of one process."""
    module = net(torch.float32)
    starts = {name: param.detach().clone() for name, param in module.named_parameters()}
    accumkern.to_bfloat16(module)
    model = DistributedDataParallel(module, gradient_as_bucket_view=views)
    optimizer = ADAMW(module.parameters())
    acc = accumkern.attach(optimizer, "split32", master_weights=kind, bucket=1000)
    if in_fp32:
        acc.reduce_in_fp32(model)
    assert kind == "split24" or all(torch.equal(acc.master_weight(p), starts[n]) for n, p in module.named_parameters())
    twin = Fp32Twin(acc, module.parameters(), ADAMW)
    for step in range(STEPS):
        for n in range(MICRO_BATCHES):
            with nullcontext() if n == MICRO_BATCHES - 1 else model.no_sync():
                backward(model, MICRO_BATCHES * step + n)
        if kind == "split32":
            twin.step()
        optimizer.step()
        if kind == "split32":
            twin.check()
        optimizer.zero_grad()
    masters = {name: acc.master_weight(param) for name, param in module.named_parameters()}
    alone = one_process(starts, dist.get_world_size())
    return list(masters.values()), all(torch.equal(bits(masters[name]), bits(alone[name])) for name in masters)


@pytest.mark.integration("Master weights: DistributedDataParallel")
@pytest.mark.parametrize("views", [True, False], ids=["bucket views", "copies"])
@pytest.mark.parametrize(
    ("in_fp32", "kind"),
    [(True, "split32"), (False, "split32"), (False, "split24")],
    ids=["reduce_in_fp32", "split32", "split24"],
)
def test_ddp_ranks_have_the_same_masters(ranks: Ranks, in_fp32: bool, views: bool, kind: str) -> None:
    (first, is_one_process), *others = ranks.run(ddp, in_fp32, views, kind)
    assert is_one_process == in_fp32  # or else DDP rounds the mean to bfloat16
    for masters, _ in others:
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(first, masters, strict=True))


def other_weights() -> list[str]:
    """Return the warnings where each rank begins with weights of its own, and DDP makes them those of rank 0."""
    torch.manual_seed(dist.get_rank())
    module = accumkern.to_bfloat16(Net().to(device()))
    model = DistributedDataParallel(module)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        accumkern.attach(ADAMW(model.parameters()), master_weights="split32")
    return [str(warning.message) for warning in caught if warning.filename == __file__]


@pytest.mark.integration("Master weights: DistributedDataParallel")
def test_what_ddp_does_not_hand_on_is_warned_of(ranks: Ranks) -> None:
    first, *others = ranks.run(other_weights)
    assert first == []
    for messages in others:
        (message,) = messages
        assert "give all ranks the same FP32 weights before to_bfloat16()" in message


def zero_redundancy() -> None:
    optimizer = ZeroRedundancyOptimizer(net().parameters(), optimizer_class=torch.optim.AdamW, lr=1e-3)
    with pytest.raises(TypeError, match=r"ZeroRedundancyOptimizer, which cannot be stepped.*fully_shard"):
        accumkern.attach(optimizer, master_weights="split32")
    accumkern.attach(optimizer).detach()


@pytest.mark.integration(
    "Master weights: ZeroRedundancyOptimizer", refused="ranks hand each other weights without what they lack"
)
def test_zero_redundancy_optimizer_is_refused(ranks: Ranks) -> None:
    ranks.run(zero_redundancy)


# ---- fully_shard --------------------------------------------------------------------------------------------------


def sharded(module: Net, **ways: Any) -> Net:
    for layer in module.layers:
        fully_shard(layer, **ways)
    return fully_shard(module, **ways)


def train_beside_fp32(
    model: nn.Module,
    params: Iterable[nn.Parameter],
    acc: accumkern.GradAccumulator,
    optimizer: torch.optim.Optimizer,
    make: Any,
    no_sync: bool = False,
    max_norm: float | None = None,
) -> None:
    twin = Fp32Twin(acc, params, make)
    for step in range(STEPS):
        for n in range(MICRO_BATCHES):
            if no_sync:
                model.set_requires_gradient_sync(n == MICRO_BATCHES - 1)
            backward(model, MICRO_BATCHES * step + n)
        if max_norm is not None:
            wide = [full(acc.gradient(param)) / 2 for param in model.parameters()]
            norm = torch.linalg.vector_norm(torch.cat([x.flatten() for x in wide]))
            finished = acc.finish(divide_by=2, max_norm=max_norm)
            torch.testing.assert_close(finished.norm, norm, rtol=1e-6, atol=0)
            for param, x in zip(model.parameters(), wide, strict=True):
                assert torch.equal(full(acc.gradient(param)), x * finished.clip_coefficient)
        twin.step()
        optimizer.step()
        twin.check()
        optimizer.zero_grad()


def fsdp(ways: dict[str, Any], cast: str, make: Any, bucket: int | None, no_sync: bool, mesh_shape: Any) -> None:
    if mesh_shape is not None:
        names = ("replicate", "shard")[-len(mesh_shape) :]
        ways = {**ways, "mesh": init_device_mesh(device().type, mesh_shape, mesh_dim_names=names)}
    starts = [param.detach() for param in net(torch.float32).parameters()]
    if cast == "before":
        model = sharded(accumkern.to_bfloat16(net(torch.float32)), **ways)
    elif cast == "after":
        model = accumkern.to_bfloat16(sharded(net(torch.float32), **ways))
    else:
        model = sharded(net(), **ways)
    optimizer = make(model.parameters())
    acc = accumkern.attach(optimizer, master_weights="split32", bucket=bucket)
    if cast:
        masters = [acc.master_weight(param) for param in model.parameters()]
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(masters, starts, strict=True))
    train_beside_fp32(model, model.parameters(), acc, optimizer, make, no_sync)
    assert acc.memory().master_residuals == 2 * acc.memory().numel


fsdp_feature = pytest.mark.integration("Master weights: fully_shard (FSDP2)")
OFFLOAD = {"offload_policy": CPUOffloadPolicy(pin_memory=False)}
REDUCED = {"mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32)}


@fsdp_feature
@pytest.mark.parametrize(
    ("ways", "no_sync"),
    [
        ({"reshard_after_forward": True}, False),
        ({"reshard_after_forward": False}, False),
        (REDUCED, False),
        (REDUCED, True),
        (OFFLOAD, False),
    ],
    ids=["reshard", "keep", "reduced in FP32", "without sync", "on the CPU"],
)
@pytest.mark.parametrize("cast", ["before", "after", ""], ids="cast {}".format)
def test_fully_shard(ranks: Ranks, ways: dict[str, Any], no_sync: bool, cast: str) -> None:
    if ways is OFFLOAD and ranks.backend != "gloo":
        pytest.skip("to compare shards that are on the CPU needs gloo")
    ranks.run(fsdp, ways, cast, ADAMW, None, no_sync, None)


@fsdp_feature
@pytest.mark.parametrize(
    "make",
    [
        partial(OwnAdamW, lr=1e-3),
        partial(OwnAdamW, lr=1e-3, foreach=False),
        partial(OwnAdamW, lr=1e-3, fused=True),
        partial(torch.optim.NAdam, lr=1e-3),
    ],
    ids=["AdamW", "AdamW one by one", "AdamW fused", "NAdam"],
)
@pytest.mark.parametrize("bucket", [1, 2500])
def test_fully_shard_in_buckets(ranks: Ranks, make: Any, bucket: int) -> None:
    ranks.run(fsdp, {}, "", make, bucket, False, None)


def finishes() -> None:
    model = sharded(net())
    optimizer = ADAMW(model.parameters())
    acc = accumkern.attach(optimizer, "split32", master_weights="split32")
    train_beside_fp32(model, model.parameters(), acc, optimizer, ADAMW, max_norm=0.25)


@fsdp_feature
def test_what_finish_makes_of_shards_is_stepped_in_fp32(ranks: Ranks) -> None:
    ranks.run(finishes)


@fsdp_feature
def test_fully_shard_with_replicas(ranks: Ranks) -> None:
    ranks.run(fsdp, {}, "after", ADAMW, 2500, False, (2, 2), ranks=4, at_least=4)


# ---- tensor parallel ----------------------------------------------------------------------------------------------


class Blocks(nn.Module):
    """The feed-forward halves of transformer blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(self.norm(x))))


def parallel(model: Blocks, mesh: DeviceMesh, sequence: bool) -> Blocks:
    plan: dict[str, Any] = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    if sequence:
        plan = {
            "norm": SequenceParallel(),
            "up": ColwiseParallel(input_layouts=Shard(1)),
            "down": RowwiseParallel(output_layouts=Shard(1)),
        }
        parallelize_module(model, mesh, PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(1)))
    for block in model.blocks:
        parallelize_module(block, mesh, plan)
    return model


def tensor_parallel(sequence: bool, foreach: bool, bucket: int) -> None:
    torch.manual_seed(1)
    mesh = init_device_mesh(device().type, (dist.get_world_size(),))
    model = parallel(Blocks().to(device(), BF16), mesh, sequence)
    make = partial(ADAMW, foreach=foreach)
    optimizer = make(model.parameters())
    acc = accumkern.attach(optimizer, master_weights="split32", bucket=bucket)
    twin = Fp32Twin(acc, model.parameters(), make)
    for step in range(STEPS):
        for n in range(MICRO_BATCHES):
            generator = torch.Generator().manual_seed(MICRO_BATCHES * step + n)
            x = torch.randn(2, 4, 16, generator=generator).to(device(), BF16)
            (model(x) ** 2).float().sum().backward()
        twin.step()
        optimizer.step()
        twin.check()
        optimizer.zero_grad()


@pytest.mark.integration("Master weights: tensor and sequence parallel")
@pytest.mark.parametrize(
    ("sequence", "foreach"),
    [(False, False), (True, False), (True, True)],  # torch mixes no tensors and DTensors with foreach
    ids=["tensor", "sequence", "sequence, foreach"],
)
@pytest.mark.parametrize("bucket", [1, 3000, 2**20])
def test_tensor_parallel(ranks: Ranks, sequence: bool, foreach: bool, bucket: int) -> None:
    """Under sequence parallelism the gradients of norms are sums to be taken, with the same collectives everywhere."""
    ranks.run(tensor_parallel, sequence, foreach, bucket)


def pending_sums(kind: type, bucket: int) -> None:
    """Gradients that are sums to be taken, beside a weight of which the ranks hold different numbers of rows."""
    mesh = init_device_mesh(device().type, (dist.get_world_size(),))
    count, rank = mesh.size(), dist.get_rank()
    params = []
    for n, (size, placement) in enumerate([(8, Replicate()), (3 * count + 1, Shard(0)), (8, Replicate())]):
        generator = torch.Generator().manual_seed(n)
        start = torch.randn(size, generator=generator).to(device(), BF16)
        params.append(nn.Parameter(distribute_tensor(start, mesh, [placement])))
    make = partial(kind, lr=1e-3, foreach=True)
    optimizer = make(params)
    acc = accumkern.attach(optimizer, master_weights="split32", bucket=bucket)
    twin = Fp32Twin(acc, params, make)
    for step in range(3):
        for n, param in enumerate(params):
            term = torch.full_like(param.to_local(), (n + 1) * (rank + 1) + step)
            placement = Partial() if n != 1 else Shard(0)
            param.grad = DTensor.from_local(term, mesh, [placement], shape=param.shape, stride=param.stride())
        twin.step()
        optimizer.step()
        twin.check()


@pytest.mark.integration("Master weights: tensor and sequence parallel")
@pytest.mark.parametrize("kind", [OwnAdamW, torch.optim.AdamW])
def test_buckets_are_the_same_on_all_ranks(ranks: Ranks, kind: type) -> None:
    """A step that takes sums over ranks takes them in the same order everywhere: with less of a shard, too."""
    ranks.run(pending_sums, kind, 8 * 19)  # where the last rank, with 3 rows, would have room for all


def on_another_mesh() -> None:
    meshes = [DeviceMesh(device().type, order) for order in ([0, 1], [1, 0])]
    weight, grad = (
        distribute_tensor(torch.arange(8.0).to(device(), BF16), mesh, [Shard(0)], src_data_rank=None) for mesh in meshes
    )
    param = nn.Parameter(weight)
    optimizer = ADAMW([param])
    acc = accumkern.attach(optimizer, master_weights="split32")
    param.grad = grad
    with pytest.raises(RuntimeError, match="mesh"):  # torch's own
        optimizer.step()
    assert torch.equal(full(acc.master_weight(param)).cpu(), torch.arange(8.0))


def test_a_gradient_whose_shards_lie_elsewhere_is_left_to_torch(ranks: Ranks) -> None:
    ranks.run(on_another_mesh, at_least=2)


# ---- pipelines ----------------------------------------------------------------------------------------------------


def pipeline(schedule: type, per_rank: int) -> None:
    """Train the stages of this rank: one, or several."""
    size, micro_batches = dist.get_world_size(), 4
    stages, pipe_stages = nn.ModuleList(), []
    for index in range(dist.get_rank(), per_rank * size, size):
        torch.manual_seed(1 + index)
        stage = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12)).to(device())
        stages.append(accumkern.to_bfloat16(stage))
        pipe_stages.append(PipelineStage(stage, index, per_rank * size, device()))
    pipe = schedule(
        pipe_stages if per_rank > 1 else pipe_stages[0],
        micro_batches,
        loss_fn=lambda output, target: ((output - target) ** 2).float().sum(),
        scale_grads=False,
    )
    optimizer = ADAMW(stages.parameters())
    acc = accumkern.attach(optimizer, master_weights="split32", average_over=micro_batches, bucket=500)
    twin = Fp32Twin(acc, stages.parameters(), ADAMW)
    assert not any(torch.equal(twin_param, param) for twin_param, param in zip(twin.params, twin.of, strict=True))
    for step in range(STEPS):
        x = torch.randn(3 * micro_batches, 12, generator=torch.Generator().manual_seed(step)).to(device(), BF16)
        if dist.get_rank() == 0:
            pipe.step(x)
        else:
            pipe.step(target=x, losses=[])
        twin.step()
        optimizer.step()
        twin.check()
        optimizer.zero_grad()


@pytest.mark.integration("Master weights: pipeline parallel")
@pytest.mark.parametrize(
    ("schedule", "per_rank"),
    [(ScheduleGPipe, 1), (Schedule1F1B, 1), (ScheduleInterleaved1F1B, 2), (ScheduleInterleavedZeroBubble, 2)],
)
def test_pipelines(ranks: Ranks, schedule: type, per_rank: int) -> None:
    ranks.run(pipeline, schedule, per_rank, at_least=2)
