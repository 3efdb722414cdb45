"""Meshes of four ranks in two dimensions: replicas of shards (HSDP), and shards of tensor parallel layers.

What is compared: sums in bfloat16 with FP64 sums of what is reduced; in float32 gradients and norms with one process;
master weights with the same optimizer on FP32 weights. Every rank has a batch of another size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fp32_twin import Fp32Twin
from ranks import Ranks, device, full
from tiny import relative_error
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import accumkern

hsdp = pytest.mark.integration("fully_shard (FSDP2): replicas of shards (HSDP)")
two_ways = pytest.mark.integration("Tensor and sequence parallel with fully_shard (FSDP2)")
kinds = pytest.mark.parametrize(
    "kind",
    [
        pytest.param("HSDP", marks=hsdp),
        pytest.param("tensor", marks=two_ways),
        pytest.param("sequence", marks=two_ways),
    ],
)

BF16, FP32 = torch.bfloat16, torch.float32
MICRO_BATCHES = 12
POLICY = MixedPrecisionPolicy(reduce_dtype=FP32)


class Block(nn.Module):
    """The feed-forward half of a transformer block, whose dimensions the ranks do not divide evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(17), nn.Linear(17, 30), nn.Linear(30, 17)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(self.norm(x))))


def block(dtype: torch.dtype) -> Block:
    torch.manual_seed(1)
    return Block().to(device(), dtype)


class Spread:
    """A block spread over a mesh of (2, 2), and which micro-batches its ranks have.

    Args:
        kind: ``"HSDP"``: all ranks have micro-batches of their own. ``"tensor"``, ``"sequence"``: two by two the same.
        module: the block.
    """

    def __init__(self, kind: str, module: Block) -> None:
        names = ("replicate", "shard") if kind == "HSDP" else ("dp", "tp")
        self.mesh = init_device_mesh(device().type, (2, 2), mesh_dim_names=names)
        if kind != "HSDP":
            parallel(module, self.mesh["tp"], kind == "sequence")
        self.sources = 4 if kind == "HSDP" else 2
        self.source = dist.get_rank() if kind == "HSDP" else self.mesh.get_local_rank("dp")
        mesh = self.mesh if kind == "HSDP" else self.mesh["dp"]
        for layer in (module.up, module.down):
            fully_shard(layer, mesh=mesh, mp_policy=POLICY)
        self.model: Any = fully_shard(module, mesh=mesh, mp_policy=POLICY)
        self.params = list(self.model.parameters())

    def backward(self, n: int) -> None:
        loss(self.model, micro_batch(n, self.source, self.params[0].dtype)).backward()


def parallel(module: Block, mesh: DeviceMesh, sequence: bool) -> None:
    plan: dict[str, Any] = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    if sequence:
        whole = PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(1))
        parallelize_module(module, mesh, whole)
        shards = {"input_layouts": Shard(1)}
        plan = {"norm": SequenceParallel(), "up": ColwiseParallel(**shards), "down": RowwiseParallel()}
    parallelize_module(module, mesh, plan)


def micro_batch(n: int, source: int, dtype: torch.dtype) -> Tensor:
    """Return micro-batch `n` of a source, which has samples of its own number."""
    generator = torch.Generator().manual_seed(100 * source + n)
    return (torch.randn(2 + source, 4, 17, generator=generator) + 0.5).to(device(), dtype)


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return ((model(x) - x) ** 2).float().sum()


def assert_close(found: list[Any], right: list[Tensor]) -> None:
    for p, q in zip(found, right, strict=True):
        torch.testing.assert_close(full(p), q, rtol=1e-5, atol=1e-5 * float(q.abs().max()))


# ---- sums ---------------------------------------------------------------------------------------------------------


def sums(kind: str) -> None:
    """Compare with the FP64 sums of what is reduced from each micro-batch."""
    plain = Spread(kind, block(BF16))
    truth = [torch.zeros(p.shape, dtype=torch.float64, device=device()) for p in plain.params]
    for n in range(MICRO_BATCHES):
        plain.backward(n)
        for total, p in zip(truth, plain.params, strict=True):
            total += full(p.grad)
            p.grad = None
    for average_over in (None, MICRO_BATCHES):
        spread = Spread(kind, block(BF16))
        acc = accumkern.attach(torch.optim.SGD(spread.params), average_over=average_over)
        for n in range(MICRO_BATCHES):
            spread.backward(n)
            plain.backward(n)
        right = [total / (average_over or 1) for total in truth]
        assert relative_error([full(acc.gradient(p)) for p in spread.params], right) < 1e-4
        stock = relative_error([full(p.grad) for p in plain.params], truth)
        assert relative_error([full(p.grad) for p in spread.params], right) * 2 < stock
        plain.model.zero_grad()


@kinds
def test_sums(ranks: Ranks, kind: str) -> None:
    ranks.run(sums, kind, ranks=4, at_least=4)


def one_process(kind: str) -> None:
    """Compare with one process that has all micro-batches, in float32; in the second window they are reduced once."""
    spread = Spread(kind, block(FP32))
    optimizer = torch.optim.SGD(spread.params)
    acc = accumkern.attach(optimizer, average_over=5)
    for window in range(2):
        alone = block(FP32)
        for n in range(5 * window, 5 * window + 5):
            spread.model.set_requires_gradient_sync(window == 0 or n == 9)
            spread.backward(n)
            for source in range(spread.sources):
                (loss(alone, micro_batch(n, source, FP32)) / 5 / spread.sources).backward()
        right = [q.grad for q in alone.parameters()]
        assert_close([p.grad for p in spread.params], right)
        norm = torch.nn.utils.get_total_norm(right)
        finished = acc.finish(divide_by=3.0, max_norm=float(norm) / 6)
        torch.testing.assert_close(finished.norm, norm / 3, rtol=1e-5, atol=0)
        assert_close([p.grad for p in spread.params], [grad / 6 for grad in right])
        optimizer.zero_grad()


@kinds
def test_gradient_and_norm_are_those_of_one_process(ranks: Ranks, kind: str) -> None:
    ranks.run(one_process, kind, ranks=4, at_least=4)


# ---- master weights and checkpoints -------------------------------------------------------------------------------


def make(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.01)


def masters(kind: str, folder: Path) -> None:
    """Compare with the optimizer on FP32 weights; then go on from a checkpoint in the middle of a window."""
    runs = []
    for _ in range(2):
        spread = Spread(kind, accumkern.to_bfloat16(block(FP32)))
        optimizer = make(spread.params)
        acc = accumkern.attach(optimizer, "split32", master_weights="split32", average_over=4)
        runs.append((spread, optimizer, acc))
    (spread, optimizer, acc), (other, other_optimizer, other_acc) = runs
    twin = Fp32Twin(acc, spread.params, make)
    for step in range(3):
        for n in range(4):
            spread.backward(4 * step + n)
            if step == 2 and n == 1:
                save(spread, optimizer, acc, folder)
        acc.finish(max_norm=0.5)
        twin.step()
        optimizer.step()
        twin.check()
        optimizer.zero_grad()
    load(other, other_optimizer, other_acc, folder)
    for n in (10, 11):
        other.backward(n)
    other_acc.finish(max_norm=0.5, defer=True)  # which is the same in FP32
    other_optimizer.step()
    for p, q in zip(spread.params, other.params, strict=True):
        assert torch.equal(full(p.detach()), full(q.detach()))
        assert torch.equal(full(acc.master_weight(p)), full(other_acc.master_weight(q)))


def save(spread: Spread, optimizer: torch.optim.Optimizer, acc: accumkern.GradAccumulator, folder: Path) -> None:
    model, states = get_state_dict(spread.model, optimizer)
    checkpoint.save({"model": model, "optimizer": states, "accumulator": acc.state_dict()}, checkpoint_id=folder)


def load(spread: Spread, optimizer: torch.optim.Optimizer, acc: accumkern.GradAccumulator, folder: Path) -> None:
    model, states = get_state_dict(spread.model, optimizer)
    state = {"model": model, "optimizer": states, "accumulator": acc.empty_state_dict()}
    checkpoint.load(state, checkpoint_id=folder)
    set_state_dict(spread.model, optimizer, model_state_dict=model, optim_state_dict=states)
    acc.load_state_dict(state["accumulator"])


@kinds
def test_master_weights_and_a_checkpoint_in_a_window(ranks: Ranks, kind: str, tmp_path: Path) -> None:
    ranks.run(masters, kind, tmp_path, ranks=4, at_least=4)


# ---- replicas that are not reduced in each micro-batch ------------------------------------------------------------


def all_reduced_once(dtype: torch.dtype) -> None:
    """Reduce over shards in each micro-batch, and over replicas in every fourth; two of these are a window."""
    spread, plain = Spread("HSDP", block(dtype)), Spread("HSDP", block(dtype))
    acc = accumkern.attach(torch.optim.SGD(spread.params), "split32", average_over=8)
    alone = block(FP32)
    right = [torch.zeros(p.shape, device=device()) for p in alone.parameters()]
    for window in range(2):
        for total in right:
            total.zero_()
        for n in range(8):
            for each in (spread, plain):
                each.model.set_requires_all_reduce(n % 4 == 3)
                each.backward(8 * window + n)
            if n % 4 == 3:
                for total, p in zip(right, plain.params, strict=True):
                    total += full(p.grad) / 8
                    p.grad = None
        found = [full(acc.gradient(p)) for p in spread.params]
        for p, total in zip(found, right, strict=True):
            torch.testing.assert_close(p, total, rtol=3e-7, atol=3e-7 * float(total.abs().max()))
        if dtype is FP32:
            alone.zero_grad()
            for n in range(8):
                for source in range(4):
                    (loss(alone, micro_batch(8 * window + n, source, FP32)) / 8 / 4).backward()
            assert_close(found, [q.grad for q in alone.parameters()])
        norm = torch.linalg.vector_norm(torch.cat([p.flatten() for p in found]))
        torch.testing.assert_close(acc.finish(max_norm=1.0).norm, norm, rtol=1e-6, atol=0)
        spread.model.zero_grad()


@hsdp
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_replicas_are_reduced_in_some_micro_batches(ranks: Ranks, dtype: torch.dtype) -> None:
    ranks.run(all_reduced_once, dtype, ranks=4, at_least=4)


# ---- acc.backward -------------------------------------------------------------------------------------------------


def any_batch(reduce_once: bool) -> None:
    """Run the batches of all ranks, of other sizes each, as one."""
    spread, alone = Spread("HSDP", block(FP32)), block(FP32)
    optimizer = torch.optim.SGD(spread.params, lr=0.1)
    acc = accumkern.attach(optimizer)
    batches = [torch.cat([micro_batch(n, source, FP32) for n in range(2)]) for source in range(4)]  # 4, 6, 8, 10
    for _ in range(2):
        mine = batches[spread.source]
        found = acc.backward(
            lambda x: nn.functional.mse_loss(spread.model(x), x), mine, 3, model=spread.model, reduce_once=reduce_once
        )
        x = torch.cat(batches)
        right = nn.functional.mse_loss(alone(x), x)
        right.backward()
        dist.all_reduce(found)
        torch.testing.assert_close(found / 4, right.detach(), rtol=1e-5, atol=0)
        assert_close([p.grad for p in spread.params], [q.grad for q in alone.parameters()])
    norm = torch.nn.utils.get_total_norm([q.grad for q in alone.parameters()])
    torch.testing.assert_close(acc.finish().norm, norm, rtol=1e-5, atol=0)


@hsdp
@pytest.mark.parametrize("reduce_once", [False, True], ids=["each part", "once"])
def test_any_batch_on_replicas_of_shards(ranks: Ranks, reduce_once: bool) -> None:
    ranks.run(any_batch, reduce_once, ranks=4, at_least=4)
