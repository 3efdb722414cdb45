"""Tensor parallel models, alone and with fully_shard on top: the gradients of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks, device, full
from tiny import fp64_sums, relative_error
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import accumkern

pytestmark = pytest.mark.integration("Tensor and sequence parallel")

BF16 = torch.bfloat16
MICRO_BATCHES = 20


class Block(nn.Module):
    """The feed-forward half of a transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(self.norm(x))))


def block(dtype: torch.dtype) -> Block:
    torch.manual_seed(1)
    return Block().to(device(), dtype)


def parallel(module: Block, mesh: DeviceMesh, sequence: bool) -> Block:
    plan: dict[str, Any] = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    if sequence:
        whole = PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(1))
        parallelize_module(module, mesh, whole)
        plan = {
            "norm": SequenceParallel(),
            "up": ColwiseParallel(input_layouts=Shard(1)),
            "down": RowwiseParallel(),
        }
    return parallelize_module(module, mesh, plan)


def micro_batch(n: int, dtype: torch.dtype, part: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(100 * part + n)
    return (torch.randn(2, 4, 16, generator=generator) + 0.5).to(device(), dtype)


def run_window(model: nn.Module, dtype: torch.dtype, count: int, part: int = 0) -> None:
    for n in range(count):
        (model(micro_batch(n, dtype, part)) ** 2).float().sum().backward()


def sums_of_what_arrived(dtype: torch.dtype, sequence: bool, buffer: str) -> None:
    mesh = init_device_mesh(device().type, (dist.get_world_size(),))
    errors = []
    for attached in (False, True):
        model = parallel(block(dtype), mesh, sequence)
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
        acc = accumkern.attach(optimizer, buffer) if attached else None
        params = list(model.parameters())
        run_window(model, dtype, 3)
        optimizer.zero_grad(set_to_none=False)
        truth = fp64_sums(params)
        run_window(model, dtype, MICRO_BATCHES)
        errors.append(relative_error([full(p.grad) for p in params], truth))
        if acc is not None:
            assert relative_error([full(acc.gradient(p)) for p in params], truth) < (
                1e-4 if buffer == "split24" else 1e-6
            )
        optimizer.step()
    if dtype is BF16:
        assert errors[1] * 2 < errors[0]
    else:
        assert errors[1] == errors[0]


@pytest.mark.parametrize("sequence", [False, True], ids=["tensor", "sequence"])
@pytest.mark.parametrize(
    ("dtype", "buffer"), [(BF16, "split24"), (BF16, "split32"), (BF16, "fp32"), (torch.float32, "split24")], ids=str
)
def test_tensor_parallel(ranks: Ranks, dtype: torch.dtype, sequence: bool, buffer: str) -> None:
    ranks.run(sums_of_what_arrived, dtype, sequence, buffer)


def gradient_of_one_process(sequence: bool) -> None:
    """Of one process without any of this, in float32, where the order of additions is all that differs."""
    mesh = init_device_mesh(device().type, (dist.get_world_size(),))
    model, alone = parallel(block(torch.float32), mesh, sequence), block(torch.float32)
    acc = accumkern.attach(torch.optim.SGD(model.parameters()), average_over=6)
    run_window(model, torch.float32, 6)
    run_window(alone, torch.float32, 6)
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(full(p.grad), q.grad / 6, rtol=1e-5, atol=1e-5)
    norm = torch.nn.utils.get_total_norm([q.grad / 6 for q in alone.parameters()])
    finished = acc.finish(max_norm=0.5)
    torch.testing.assert_close(finished.norm, norm, rtol=1e-5, atol=0)
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(full(p.grad), q.grad / 6 * (0.5 / norm), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sequence", [False, True], ids=["tensor", "sequence"])
def test_gradient_and_norm_are_those_of_one_process(ranks: Ranks, sequence: bool) -> None:
    ranks.run(gradient_of_one_process, sequence)


def with_fully_shard() -> None:
    """Data parallel by two, tensor parallel by two."""
    mesh = init_device_mesh(device().type, (2, 2), mesh_dim_names=("dp", "tp"))
    model = fully_shard(parallel(block(torch.float32), mesh["tp"], True), mesh=mesh["dp"])
    alone = block(torch.float32)
    acc = accumkern.attach(torch.optim.AdamW(model.parameters()))
    for n in range(5):
        (model(micro_batch(n, torch.float32, mesh.get_local_rank("dp"))) ** 2).sum().backward()
    for part in range(2):
        run_window(alone, torch.float32, 5, part)
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(full(p.grad), q.grad / 2, rtol=1e-5, atol=1e-5)
    norm = torch.nn.utils.get_total_norm([q.grad / 2 for q in alone.parameters()])
    torch.testing.assert_close(acc.finish().norm, norm, rtol=1e-5, atol=0)


def test_tensor_parallel_and_fully_shard_on_a_mesh_of_four(ranks: Ranks) -> None:
    ranks.run(with_fully_shard, ranks=4, at_least=4)


def with_fully_shard_once(dtype: torch.dtype) -> None:
    """As before, reduced once over the data parallel ranks, from split sums."""
    mesh = init_device_mesh(device().type, (2, 2), mesh_dim_names=("dp", "tp"))
    replica = mesh.get_local_rank("dp")
    alone = parallel(block(dtype).to(BF16), mesh["tp"], True)  # one replica, whose gradients are added in FP64
    means = [torch.zeros(p.shape, dtype=torch.float64, device=device()) for p in alone.parameters()]
    for n in range(MICRO_BATCHES):
        (alone(micro_batch(n, BF16, replica)) ** 2).float().sum().backward()
        for mean, p in zip(means, alone.parameters(), strict=True):
            mean += full(p.grad.double()) / 2
            p.grad = None
    for mean in means:
        dist.all_reduce(mean, group=mesh.get_group("dp"))
    for is_whole in (True, False):
        policy = MixedPrecisionPolicy(param_dtype=BF16)
        model = fully_shard(parallel(block(dtype), mesh["tp"], True), mesh=mesh["dp"], mp_policy=policy)
        acc = accumkern.attach(torch.optim.AdamW(model.parameters()), "split32")
        if is_whole:
            acc.reduce_in_fp32(model)
        for n in range(MICRO_BATCHES):
            model.set_requires_gradient_sync(n in (3, MICRO_BATCHES - 1))
            (model(micro_batch(n, BF16, replica)) ** 2).float().sum().backward()
        error = relative_error([full(acc.gradient(p)) for p in model.parameters()], means)
        assert error < 1e-6 if is_whole else error > 1e-3


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
def test_tensor_parallel_and_fully_shard_that_reduces_once(ranks: Ranks, dtype: torch.dtype) -> None:
    ranks.run(with_fully_shard_once, dtype, ranks=4, at_least=4)


def other_placements() -> None:
    mesh = init_device_mesh(device().type, (dist.get_world_size(),))
    param = nn.Parameter(distribute_tensor(torch.zeros(4, 4, dtype=BF16, device=device()), mesh, [Replicate()]))
    acc = accumkern.attach(torch.optim.SGD([param]), average_over=2)
    first = distribute_tensor(torch.full((4, 4), 3.0, device=device(), dtype=BF16), mesh, [Replicate()])
    (param * first).sum().backward()
    param.grad = param.grad.redistribute(placements=[Shard(0)])
    (param * first).sum().backward()
    (param * first * 2**-8).sum().backward()
    assert param.grad.placements == (Shard(0),)
    assert torch.equal(full(acc.gradient(param)), full(first).float() * (1 + 2**-9))


def test_a_gradient_of_other_placements_is_laid_out_as_the_sum(ranks: Ranks) -> None:
    ranks.run(other_placements)


def pending_state() -> None:
    mesh = init_device_mesh(device().type, (dist.get_world_size(),))
    model = parallel(block(BF16), mesh, True)
    acc = accumkern.attach(torch.optim.SGD(model.parameters()))
    run_window(model, BF16, 2)
    with pytest.raises(RuntimeError, match=r"parameter 0 .* still to be taken \(Partial\); save between two windows"):
        acc.state_dict()


def test_the_state_of_pending_sums_is_refused(ranks: Ranks) -> None:
    ranks.run(pending_state)


def moved() -> None:
    """Even where nothing has to move, module.to() gives DTensor parameters other tensors."""
    model = parallel(block(BF16), init_device_mesh(device().type, (dist.get_world_size(),)), False)
    # Some parameters are no DTensors. foreach, torch's default on a GPU, takes no mixed lists, of stock torch either.
    optimizer = torch.optim.SGD(model.parameters(), foreach=False)
    acc = accumkern.attach(optimizer, "split32")
    model.to(device())
    run_window(model, BF16, 1)
    with pytest.raises(RuntimeError, match=r"had no hooks.* module.to\(\) has put other"):
        optimizer.step()
    optimizer.zero_grad()
    truth = fp64_sums(model.parameters())
    run_window(model, BF16, MICRO_BATCHES)
    found = [full(acc.gradient(p)) for p in model.parameters()]
    assert relative_error(found, truth) < 1e-6
    optimizer.step()


def test_a_model_that_is_moved_after_attach_is_noticed(ranks: Ranks) -> None:
    ranks.run(moved)
