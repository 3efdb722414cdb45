"""Whole networks on every backend: the sums of their gradients against FP64, and that they train."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny import check_gradients, fp64_sums, relative_error
from torch import Tensor, nn

import accumkern

pytestmark = pytest.mark.eager_on_gpu


def make_mlp(device: torch.device) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A network with large and small parameters, and its random inputs."""
    net = nn.Sequential(nn.Linear(96, 768), nn.LayerNorm(768), nn.GELU(), nn.Linear(768, 33, bias=False))
    return net.to(device, torch.bfloat16), lambda: torch.randn(64, 96, device=device, dtype=torch.bfloat16)


def make_convolutions(device: torch.device) -> tuple[nn.Module, Callable[[], Tensor]]:
    """The same for weights and gradients in channels_last order."""
    net = nn.Sequential(nn.Conv2d(8, 128, 3), nn.GELU(), nn.Conv2d(128, 64, 3))
    net = net.to(device, torch.bfloat16, memory_format=torch.channels_last)
    return net, lambda: torch.randn(4, 8, 12, 12, device=device, dtype=torch.bfloat16).contiguous(
        memory_format=torch.channels_last
    )


@pytest.mark.parametrize("make_network", [make_mlp, make_convolutions], ids=["mlp", "channels_last"])
@pytest.mark.parametrize("buffer", ["split24", "split32", "fp32"])
def test_training(
    backend: str,
    device: torch.device,
    buffer: str,
    make_network: Callable[[torch.device], tuple[nn.Module, Callable[[], Tensor]]],
) -> None:
    net, make_input = make_network(device)
    params = list(net.parameters())
    optimizer = torch.optim.AdamW(params, lr=1e-2)
    acc = accumkern.attach(optimizer, buffer=buffer, average_over=8, backend=backend)
    truths = fp64_sums(params)
    for _ in range(2):
        before = [param.detach().clone() for param in params]
        for _ in range(8):
            net(make_input()).float().square().mean().backward()
        check_gradients(acc, params, truths, scale=1 / 8)
        optimizer.step()
        optimizer.zero_grad()
        assert not any(torch.equal(param, old) for param, old in zip(params, before, strict=True))
        for truth in truths:
            truth.zero_()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["float16", "autocast"])
def test_training_with_grad_scaler(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """float16 parameters with the fused optimizer, which takes the scale; float32 parameters under autocast."""
    if device.type == "cpu" and dtype is torch.float16:
        pytest.skip("torch's fused SGD leaves most float16 parameters on the CPU as they are")
    net = nn.Sequential(nn.Linear(96, 768), nn.ReLU(), nn.Linear(768, 33)).to(device, dtype)
    params = list(net.parameters())
    lr, scale = 0.1, 256.0
    optimizer = torch.optim.SGD(params, lr=lr, fused=True)
    scaler = torch.amp.GradScaler(device.type, init_scale=scale)
    acc = accumkern.attach(optimizer, buffer="fp32", backend=backend)
    truths = fp64_sums(params)

    def micro_batches(factor: float = 1.0) -> None:
        for truth in truths:
            truth.zero_()
        for _ in range(8):
            x = torch.randn(64, 96, device=device, dtype=dtype)
            with torch.autocast(device.type, dtype=torch.float16, enabled=dtype is torch.float32):
                loss = net(x).float().square().sum(1).mean() / 8
            scaler.scale(loss * factor).backward()

    for _ in range(2):
        before = [param.detach().clone() for param in params]
        micro_batches()
        check_gradients(acc, params, truths)
        if dtype is torch.float32:  # GradScaler.unscale_ refuses float16 gradients
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(params, 1e6)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        for param, old, truth in zip(params, before, truths, strict=True):
            step = param.detach().double() - old.double()  # a few last places of a float16 parameter
            assert relative_error([step], [-lr * truth / scale]) < (0.1 if dtype is torch.float16 else 1e-4)

    before = [param.detach().clone() for param in params]
    micro_batches(factor=float("inf"))
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    assert scaler.get_scale() == scale / 2
    assert all(torch.equal(param, old) for param, old in zip(params, before, strict=True))
    micro_batches()
    check_gradients(acc, params, truths)
