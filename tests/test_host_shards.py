"""Shards in host memory, of ranks that compute on GPUs (``CPUOffloadPolicy``): nothing leaves them on the GPU.

Without GPUs the mesh of the ranks says that it is one of GPUs: whatever is moved there raises then.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks, device, full
from scarce import Scarce
from tiny import relative_error
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import accumkern
from accumkern import dtensor
from accumkern.snapshot import Snapshot

pytestmark = pytest.mark.integration("fully_shard (FSDP2)")

BF16 = torch.bfloat16
MICRO_BATCHES, STEPS = 3, 2
CLASSES = {"SGD": torch.optim.SGD, "AdamW": torch.optim.AdamW, "NAdam": torch.optim.NAdam}


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(12, 23), nn.Tanh(), nn.Linear(23, 3)).to(device())


def sharded(module: Any, offloads: bool) -> Any:
    ways = {"offload_policy": CPUOffloadPolicy(pin_memory=False)} if offloads else {}
    for layer in module:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, **ways)
    fully_shard(module, **ways)
    if offloads:
        for param in module.parameters():
            param.device_mesh._device_type = "cuda"
    return module


def run_window(model: Any, first: int, no_sync: bool = False) -> None:
    for n in range(first, first + MICRO_BATCHES):
        model.set_requires_gradient_sync(not no_sync or n == first + MICRO_BATCHES - 1)
        generator = torch.Generator().manual_seed(1000 * dist.get_rank() + n)
        x = (torch.randn(6, 12, generator=generator) + 0.5).to(device(), BF16)
        (model(x) ** 2).float().sum().backward()


def whole(tensors: list[Any], offloads: bool = True) -> list[Tensor]:
    """Return whole tensors, of DTensors that are in host memory if they should be."""
    for tensor in tensors:
        assert isinstance(tensor, DTensor)
        assert tensor.device.type == tensor.to_local().device.type == ("cpu" if offloads else device().type)
    return [full(tensor.float()).cpu() for tensor in tensors]  # ranks exchange no int16


def train(offloads: bool, buffer: str, masters: str | None, name: str, once: bool, norm_type: float) -> list[Tensor]:
    """Return what is made of a model: gradients, norms, states and weights, all of them whole."""
    model = sharded(net() if masters else net().to(BF16), offloads)
    found: list[Any] = []

    def note(tensors: list[Any]) -> None:
        found.extend(whole(tensors, offloads))

    if masters:
        accumkern.to_bfloat16(model)
    params = list(model.parameters())
    optimizer = CLASSES[name](params, lr=1e-2)
    average = None if once else MICRO_BATCHES
    acc = accumkern.attach(optimizer, buffer, master_weights=masters, average_over=average)
    if once:
        acc.reduce_in_fp32(model)
    for step in range(STEPS):
        run_window(model, MICRO_BATCHES * step, once)
        note([acc.gradient(p) for p in params])
        state = acc.state_dict()
        whole([tensor for tensor in state["residuals"].values() if tensor is not None], offloads)
        acc.load_state_dict(state)
        note([acc.gradient(p) for p in params])
        norm = acc.finish(max_norm=0.5, norm_type=norm_type).norm
        assert norm.device.type == "cpu" or not offloads
        found.append(norm.cpu())
        note([p.grad for p in params])
        optimizer.step()
        optimizer.zero_grad()
        note([acc.master_weight(p) for p in params] if masters else params)
    return found


def both_ways(*case: Any) -> None:
    for there, here in zip(train(True, *case), train(False, *case), strict=True):
        assert relative_error([there], [here]) < 2**-7  # of bfloat16


@pytest.mark.parametrize("once", [False, True], ids=["each micro-batch", "reduced once"])
@pytest.mark.parametrize(
    ("buffer", "masters", "name"),
    [("split32", None, "SGD"), ("split24", "split32", "AdamW"), ("fp32", "split32", "NAdam")],
)
@pytest.mark.parametrize("norm_type", [2.0, 3.0, float("inf")], ids="norm {}".format)
def test_training(ranks: Ranks, buffer: str, masters: str | None, name: str, once: bool, norm_type: float) -> None:
    ranks.run(both_ways, buffer, masters, name, once, norm_type)


def cast_before() -> None:
    module = net().cpu()
    truth = [param.detach().clone() for param in module.parameters()]
    model = sharded(accumkern.to_bfloat16(module), True)
    acc = accumkern.attach(torch.optim.SGD(model.parameters()), master_weights="split32")
    for param, master in zip(model.parameters(), truth, strict=True):
        assert torch.equal(whole([acc.master_weight(param)])[0], master)


def test_a_model_that_was_cast_before_keeps_what_was_cut_off(ranks: Ranks) -> None:
    if ranks.backend != "nccl":
        pytest.skip("a tensor is spread by way of a GPU")
    ranks.run(cast_before)


def sums_over_ranks() -> None:
    mesh = dist.device_mesh.init_device_mesh(device().type, (dist.get_world_size(),))
    like = distribute_tensor(torch.zeros(4, 4, device=device()), mesh, [Replicate()])
    pending = DTensor.from_local(torch.ones(4, 4, device=device()), mesh, [Partial()])
    spread = distribute_tensor(torch.zeros(4, 4, device=device()), mesh, [Shard(0)])
    mesh._device_type = "cuda"
    here = torch.arange(16.0).view(4, 4).t()
    made = dtensor.with_shard(here, like)
    assert made.device.type == "cpu"
    assert made.to_local().data_ptr() == here.data_ptr()
    count = dist.get_world_size()
    assert torch.equal(dtensor.reduced(torch.ones(4, 4), pending), torch.full((4, 4), float(count)))
    assert dtensor.sum_over_shards([torch.tensor(2)], [spread]) == [2 * count]
    norm = dtensor.norm_over(dtensor.groups_of_shards(spread), torch.tensor(3.0), 2.0)
    torch.testing.assert_close(norm, torch.tensor(3 * count**0.5))


def test_sums_over_ranks_of_what_is_in_host_memory(ranks: Ranks) -> None:
    ranks.run(sums_over_ranks)


# ---- acc.backward(loss_fn, batch) --------------------------------------------------------------------------------


def random_numbers_of_a_gpu() -> None:
    """Those of the GPU that the ranks say they compute on are kept, where no parameter is."""
    model = sharded(net().to(BF16), True)
    with (
        mock.patch("torch.cuda.current_device", return_value=3),
        mock.patch("torch.cuda.get_rng_state", return_value="numbers"),
        mock.patch("torch.cuda.set_rng_state") as put_back,
    ):
        Snapshot(model.parameters(), {}, None).put_back()
    put_back.assert_called_once_with("numbers", torch.device("cuda", 3))


def begins_again(most: int, micro_batch: Any) -> list[Tensor]:
    """Return what a window with dropout gives, and the random numbers after it; more than ``most`` samples run out."""
    torch.manual_seed(1)
    layers = nn.Linear(12, 23), nn.Dropout(0.5), Scarce(most), nn.Linear(23, 3)
    model = sharded(nn.Sequential(*layers).to(device(), BF16), True)
    acc = accumkern.attach(torch.optim.SGD(model.parameters()))
    torch.manual_seed(2 + dist.get_rank())
    batch = torch.randn(8, 12, device=device(), dtype=BF16)
    losses = acc.backward(lambda part: model(part).float().square().mean(), batch, micro_batch=micro_batch, model=model)
    return [losses, *(full(param.grad) for param in model.parameters()), torch.rand(3, device=device())]


def the_window_is_that_of_the_size_that_fits() -> None:
    for found, expected in zip(begins_again(3, "auto"), begins_again(8, 2), strict=True):
        assert torch.equal(found, expected)


def test_a_window_that_begins_again_has_the_random_numbers_of_the_gpu(ranks: Ranks) -> None:
    ranks.run(the_window_is_that_of_the_size_that_fits if ranks.backend == "nccl" else random_numbers_of_a_gpu)
