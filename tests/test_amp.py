"""Automatic mixed precision: autocast, and a GradScaler with steps that it skips."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from fp32_twin import Fp32Twin
from gradients import micro_gradients, parameter
from tiny import Classifier, MicroGradients, assert_same_weights, examples
from torch import Tensor, nn

import accumkern

pytestmark = pytest.mark.usefixtures("one_thread")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WINDOW = 4
BATCHES = [(tokens.unsqueeze(0), classes.unsqueeze(0)) for tokens, classes in examples(6 * WINDOW)]


def train(attached: bool, dtype: torch.dtype, scaled: bool, overflow_in: int | None) -> tuple[nn.Module, list[float]]:
    """Train FP32 weights under autocast, as torch's AMP examples do; return the model, and scales and norms."""
    model = Classifier(torch.float32).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if attached:
        accumkern.attach(optimizer)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**12, growth_interval=2, enabled=scaled)
    numbers = []
    for n, (tokens, classes) in enumerate(BATCHES, 1):
        with torch.autocast(DEVICE, dtype=dtype):
            loss = model(tokens.to(DEVICE), classes.to(DEVICE)) / WINDOW
        if n == overflow_in:
            loss = loss * torch.inf
        scaler.scale(loss).backward()
        if n % WINDOW == 0:
            scaler.unscale_(optimizer)
            numbers.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
            scaler.step(optimizer)
            scaler.update()
            numbers.append(scaler.get_scale())
            optimizer.zero_grad()
    return model, numbers


@pytest.mark.integration("AMP: autocast, GradScaler")
@pytest.mark.parametrize(
    ("dtype", "scaled", "overflow_in"),
    [(torch.bfloat16, False, None), *((torch.float16, True, n) for n in (None, 5, 7, 8))],
    ids=["bf16", "fp16", "fp16-overflow-first", "fp16-overflow-third", "fp16-overflow-last"],
)
def test_fp32_weights_under_autocast_train_as_stock_bit_for_bit(
    dtype: torch.dtype, scaled: bool, overflow_in: int | None
) -> None:
    (model, numbers), (stock, stock_numbers) = (train(a, dtype, scaled, overflow_in) for a in (True, False))
    torch.testing.assert_close(numbers, stock_numbers, rtol=0, atol=0, equal_nan=True)
    assert_same_weights(model, stock)
    assert all(bool(param.isfinite().all()) for param in model.parameters())
    if scaled:
        assert min(numbers[1::2]) == (2.0**11 if overflow_in else 2.0**12)


@pytest.mark.integration("Master weights: GradScaler")
@pytest.mark.parametrize("enabled", [True, False], ids=["enabled", "disabled"])
@pytest.mark.parametrize("unscales", [True, False], ids=["unscale_", "in the step"])
@pytest.mark.parametrize("how", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
def test_master_weights_with_a_grad_scaler(how: dict[str, bool], unscales: bool, enabled: bool) -> None:
    """Fused optimizers divide by the scale themselves, and step over what is not finite."""
    make = partial(torch.optim.AdamW, lr=1e-3, **how)
    model = accumkern.to_bfloat16(Classifier(torch.float32).to(DEVICE))
    optimizer = make(model.parameters())
    acc = accumkern.attach(optimizer, master_weights="split32", bucket=10_000)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**12, growth_interval=100, enabled=enabled)
    twin = Fp32Twin(acc, model.parameters(), make)
    overflows = (2, 3) if enabled else ()
    for window in range(6):
        for n, (tokens, classes) in enumerate(BATCHES[:WINDOW]):
            loss = model(tokens.to(DEVICE), classes.to(DEVICE)) / WINDOW
            scaler.scale(loss * torch.inf if n == 1 and window in overflows else loss).backward()
        if unscales:
            scaler.unscale_(optimizer)
        scale = 1.0 if unscales else scaler.get_scale()
        before = [acc.master_weight(param) for param in twin.of]
        if window not in overflows:
            twin.step(divide_by=scale)
        scaler.step(optimizer)
        scaler.update()
        twin.check()
        changed = [not torch.equal(acc.master_weight(param), old) for param, old in zip(twin.of, before, strict=True)]
        assert all(changed) if window not in overflows else not any(changed)
        optimizer.zero_grad()
    assert scaler.get_scale() == (2.0**10 if enabled else 1.0)


@pytest.mark.integration("AMP: GradScaler with bfloat16 weights")
def test_bf16_weights_with_a_grad_scaler_are_nearer_to_fp64_than_stock() -> None:
    errors = {}
    for attached in (True, False):
        model = Classifier(torch.bfloat16).to(DEVICE)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        if attached:
            accumkern.attach(optimizer)
        scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**12)
        truth = MicroGradients(model)
        for tokens, classes in BATCHES[:4] * 64:
            scaler.scale(model(tokens.to(DEVICE), classes.to(DEVICE))).backward()
        scaler.unscale_(optimizer)
        for total in truth.sums.values():
            total /= 2.0**12
        errors[attached] = truth.error()
    assert errors[True] < 2.5e-3  # one rounding to bfloat16
    assert errors[False] > 2 * errors[True]


@pytest.mark.parametrize("scale", [2.0**10, 2.0**16], ids=["1024", "65536"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("buffer", ["split24", "split32", "fp32"])
def test_unscale_keeps_the_low_bits_and_the_norm_is_right(buffer: str, dtype: torch.dtype, scale: float) -> None:
    """The recipe of docs/averaging.md in three windows, beside FP64.

    ``unscale_`` multiplies ``.grad`` by a power of two, and a split residual is relative to it. An FP32 buffer is not:
    ``.grad`` is not its rounding any more, and wins, so what is left is the sum rounded once.
    """
    params = [parameter(300, 300, dtype=dtype, device=DEVICE), parameter(7, dtype=dtype, device=DEVICE)]
    optimizer = torch.optim.SGD(params, lr=0.0)
    acc = accumkern.attach(optimizer, buffer)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=scale)
    for window in range(3):
        micro = [micro_gradients(8 + window, *p.shape, dtype=dtype, device=DEVICE) for p in params]
        for grads in zip(*micro, strict=True):
            loss = sum((p.float() * grad).sum() for p, grad in zip(params, grads, strict=True))
            scaler.scale(loss).backward()  # type: ignore[union-attr]
        truth = [torch.stack(grads).double().sum(0) for grads in micro]
        scaler.unscale_(optimizer)
        found = [acc.gradient(p) for p in params]
        assert_near(found, truth, tolerance := accuracy(buffer, dtype))
        if tolerance == ROUNDED_ONCE:
            assert all(torch.equal(value, p.grad.float()) for p, value in zip(params, found, strict=True))
        norm = torch.stack([t.norm() for t in truth]).norm() / 8
        finished = acc.finish(divide_by=8.0, max_norm=0.5 * norm.item())
        torch.testing.assert_close(finished.norm.double(), norm, rtol=1e-5, atol=0)
        torch.testing.assert_close(finished.clip_coefficient.item(), 0.5, rtol=1e-5, atol=0)
        assert_near([p.grad for p in params], [t / 16 for t in truth], 1e-6 if dtype is torch.float32 else ROUNDED_ONCE)
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == scale
        optimizer.zero_grad()


ROUNDED_ONCE = 2.5e-3  # to bfloat16


def accuracy(buffer: str, dtype: torch.dtype) -> float:
    """Return the greatest relative error of an accumulated gradient after ``unscale_``."""
    if dtype is torch.float32 or buffer == "split32":
        return 2e-7
    return 1.5e-5 if buffer == "split24" else ROUNDED_ONCE


def assert_near(found: list[Any], truth: list[Tensor], tolerance: float) -> None:
    for value, right in zip(found, truth, strict=True):
        assert (value.double() - right).norm() <= tolerance * right.norm()
