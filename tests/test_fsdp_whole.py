"""fully_shard (FSDP2) with one reduction for many micro-batches: whole gradients as split sums, reduced in FP32."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks, device, full
from tiny import GRAD_TOLERANCE, TOLERANCE, relative_error
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

import accumkern

pytestmark = pytest.mark.integration("fully_shard (FSDP2)")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
MICRO_BATCHES = 20


class Net(nn.Module):
    """Layers that do not divide evenly among ranks, one used twice, a weight in two of them, and one used at times."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(*sizes) for sizes in ((12, 23), (23, 23), (23, 3)))
        self.norm = nn.LayerNorm(23)
        self.tied = nn.Linear(23, 23, bias=False)
        self.tied.weight = nn.Parameter(self.layers[1].weight.detach().clone())
        self.again = nn.Linear(23, 23, bias=False)
        self.again.weight = self.tied.weight
        self.rare = nn.Linear(23, 23)
        self.checkpoints = False

    def forward(self, x: Tensor, is_rare: bool = False) -> Tensor:
        x = torch.tanh(self.layers[0](x))
        middle = self.layers[1]
        for _ in range(2):
            x = self.norm(torch.tanh(checkpoint(middle, x, use_reentrant=False) if self.checkpoints else middle(x)))
        x = self.again(torch.tanh(self.tied(x)))
        return self.layers[2](x + self.rare(x) if is_rare else x)


def net(dtype: torch.dtype) -> Net:
    torch.manual_seed(1)
    return Net().to(device(), dtype)


def sharded(module: Any, **ways: Any) -> Any:
    for layer in (*module.layers, module.rare):
        fully_shard(layer, **ways)
    return fully_shard(module, **ways)


def micro_batch(n: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * rank + n)
    return (torch.randn(6, 12, generator=generator) + 0.5).to(device())


def step(model: nn.Module, n: int, dtype: torch.dtype, rank: int | None = None) -> None:
    """Run forward and backward pass of a micro-batch of a rank."""
    x = micro_batch(n, dist.get_rank() if rank is None else rank).to(dtype)
    model(x, is_rare=n % 3 == 0).float().sum().backward()


def run_window(model: Any, dtype: torch.dtype, reduced: set[int], count: int = MICRO_BATCHES) -> None:
    """Run micro-batches, and reduce in some of them."""
    for n in range(count):
        model.set_requires_gradient_sync(n in reduced)
        step(model, n, dtype)
    model.set_requires_gradient_sync(True)


def fp64_means(
    dtype: torch.dtype, compute: torch.dtype, factor: Callable[[int], float] = lambda _: 1.0, count: int = MICRO_BATCHES
) -> list[Tensor]:
    """Return what one process makes of the micro-batches of all ranks: the FP64 sum of all gradients, over ranks."""
    model = net(dtype).to(compute)
    means = [torch.zeros(p.shape, dtype=torch.float64, device=device()) for p in model.parameters()]
    ranks = dist.get_world_size()
    for rank in range(ranks):
        for n in range(count):
            step(model, n, compute, rank)
            for mean, p in zip(means, model.parameters(), strict=True):
                if p.grad is not None:
                    mean += p.grad.double() * factor(n) / ranks
                p.grad = None
    return means


def gradients(model: nn.Module) -> list[Tensor]:
    return [full(p.grad) for p in model.parameters()]


def values(acc: accumkern.GradAccumulator, model: nn.Module) -> list[Tensor]:
    return [full(acc.gradient(p)) for p in model.parameters()]


LAST = {MICRO_BATCHES - 1}

# ---- the sums of one process --------------------------------------------------------------------------------------


def against_one_process(dtype: torch.dtype, ways: dict[str, Any], buffer: str, checkpoints: bool = False) -> None:
    policy = ways.get("mp_policy", MixedPrecisionPolicy())
    compute = policy.param_dtype or dtype
    truth = fp64_means(dtype, compute)
    stock = sharded(net(dtype), **ways)
    run_window(stock, compute, LAST)
    model = sharded(net(dtype), **ways)
    model.checkpoints = checkpoints
    optimizer = torch.optim.SGD(model.parameters())
    acc = accumkern.attach(optimizer, buffer)
    acc.reduce_in_fp32(model)
    for window in range(2):
        optimizer.zero_grad()
        run_window(model, compute, LAST if window else {2}, MICRO_BATCHES if window else 3)
    found = gradients(model)
    assert all(p.grad.dtype is p.dtype for p in model.parameters())
    assert relative_error(values(acc, model), truth) < TOLERANCE["fp32" if compute is FP32 else buffer]
    assert relative_error(found, truth) < GRAD_TOLERANCE[dtype] + TOLERANCE[buffer]
    of_stock = relative_error(gradients(stock), truth)
    if (policy.reduce_dtype or compute) is BF16:  # in which it adds and reduces
        assert 2 * relative_error(found, truth) < of_stock
        assert 20 * relative_error(values(acc, model), truth) < of_stock
    else:
        assert relative_error(found, truth) < 1.2 * of_stock + TOLERANCE[buffer]


@pytest.mark.parametrize("reduce_dtype", [None, BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize(
    ("dtype", "param_dtype"), [(BF16, None), (FP32, BF16), (FP32, FP16), (FP32, None), (BF16, FP32)], ids=str
)
def test_policies(ranks: Ranks, dtype: torch.dtype, param_dtype: Any, reduce_dtype: Any) -> None:
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype)
    ranks.run(against_one_process, dtype, {"mp_policy": policy}, "split24")


@pytest.mark.parametrize("buffer", ["split24", "split32", "fp32"])
@pytest.mark.parametrize(
    "ways",
    [
        {"reshard_after_forward": False},
        {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
        {"mp_policy": MixedPrecisionPolicy(param_dtype=FP16)},
    ],
    ids=["keep", "on the CPU", "float16"],
)
def test_buffers_and_ways(ranks: Ranks, buffer: str, ways: dict[str, Any]) -> None:
    ranks.run(against_one_process, FP32 if "mp_policy" in ways else BF16, ways, buffer)


def test_float16_parameters(ranks: Ranks) -> None:
    ranks.run(against_one_process, FP16, {}, "fp32")


def test_activation_checkpointing(ranks: Ranks) -> None:
    ranks.run(against_one_process, BF16, {}, "split32", True)
