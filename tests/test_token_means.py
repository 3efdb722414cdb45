"""The mean over all tokens of a window, of all micro-batches and ranks, is the gradient of one big batch."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks, device, full
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn import functional as F  # noqa: N812
from torch.nn.parallel import DistributedDataParallel

import accumkern

pytestmark = pytest.mark.integration("Token means over ranks")

MICRO_BATCHES = 5
IGNORED = -100


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 11)).to(device())


def micro_batch(rank: int, window: int, n: int) -> tuple[Tensor, Tensor]:
    """Return inputs and labels: of other lengths on each rank and in each micro-batch, and some labels ignored."""
    generator = torch.Generator().manual_seed(100 * rank + 10 * window + n)
    tokens = torch.randint(11, (1 + 7 * rank + 3 * n,), generator=generator)
    labels = torch.where(torch.rand(tokens.shape, generator=generator) < 0.2, IGNORED, tokens.roll(1))
    return tokens.to(device()), labels.to(device())


def loss(model: nn.Module, tokens: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens), labels, ignore_index=IGNORED, reduction="sum")


def equals_one_batch(kind: str, known: str) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    whole, model = net(), net()
    if kind == "DDP":
        model = DistributedDataParallel(model)
    else:
        fully_shard(model[1])
        fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    acc = accumkern.attach(optimizer)
    for window in range(2):
        window_batches = [micro_batch(rank, window, n) for n in range(MICRO_BATCHES)]
        tokens = torch.stack([(labels != IGNORED).sum() for _, labels in window_batches]).sum()
        dist.all_reduce(tokens)
        if known == "before":
            acc.scale = world_size / tokens
        for n, batch in enumerate(window_batches):
            is_last = n == MICRO_BATCHES - 1
            if isinstance(model, FSDPModule):
                model.set_requires_gradient_sync(is_last or n == 1)
            with model.no_sync() if kind == "DDP" and not is_last else nullcontext():
                loss(model, *batch).backward()
        finished = acc.finish(max_norm=0.05, divide_by=1.0 if known == "before" else tokens / world_size)

        all_batches = [micro_batch(r, window, n) for r in range(world_size) for n in range(MICRO_BATCHES)]
        inputs, labels = (torch.cat(tensors) for tensors in zip(*all_batches, strict=True))
        assert int((labels != IGNORED).sum()) == int(tokens)
        whole.zero_grad()
        F.cross_entropy(whole(inputs), labels, ignore_index=IGNORED).backward()
        norm = torch.nn.utils.clip_grad_norm_(whole.parameters(), 0.05)
        assert norm > 0.05
        torch.testing.assert_close(finished.norm, norm, rtol=1e-5, atol=0)
        for p, q in zip(model.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(full(p.grad), q.grad, rtol=1e-5, atol=1e-7)
        optimizer.zero_grad()


@pytest.mark.parametrize("known", ["before", "at the end"])
@pytest.mark.parametrize("kind", ["DDP", "fully_shard"])
def test_token_means_equal_one_big_batch(ranks: Ranks, kind: str, known: str) -> None:
    ranks.run(equals_one_batch, kind, known, ranks=4)
