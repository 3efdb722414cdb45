"""``acc.backward`` of sixteen architectures: a batch that does not fit trains in parts, as a whole."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from planned import old_objects_aside  # noqa: F401

import accumkern
from accumkern.planning.protocol import run_setup

pytest.importorskip("transformers")
from architectures import ARCHITECTURES, CASES, architectures

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread", "old_objects_aside")]

# Losses that are no means over samples: the router's, of negatives in the micro-batch, and one that draws its noise.
NO_MEAN = {"moe", "moe_bfloat16", "clip", "unet"}
COUNTS: dict[str, Callable[[Any], Any]] = dict.fromkeys(("bert", "t5"), lambda part: (part["labels"] != -100).sum())


@pytest.mark.parametrize("name", sorted(ARCHITECTURES.keys() - NO_MEAN))
def test_the_gradient_is_that_of_the_whole_batch(name: str) -> None:
    setup = run_setup(ARCHITECTURES[name])
    setup.model.eval()  # without dropout, and with BatchNorm's running statistics
    batch = setup.make_batch(20)
    whole = setup.loss(setup.model, batch)
    whole.backward()
    params = [param for param in setup.model.parameters() if param.grad is not None]
    grads = [param.grad.float() for param in params]
    setup.optimizer.zero_grad()
    acc = accumkern.attach(setup.optimizer, "split32")
    loss = acc.backward(partial(setup.loss, setup.model), batch, micro_batch=8, count=COUNTS.get(name))
    is_short = any(param.dtype is torch.bfloat16 for param in params)
    assert loss.item() == pytest.approx(whole.item(), rel=1e-2 if is_short else 1e-5)
    difference = torch.cat([(acc.gradient(p) - g).flatten() for p, g in zip(params, grads, strict=True)])
    assert difference.norm() <= (2e-2 if is_short else 1e-4) * torch.cat([g.flatten() for g in grads]).norm()


@architectures
def test_a_batch_that_does_not_fit_trains(name: str) -> None:
    setup = run_setup(ARCHITECTURES[name])
    acc = accumkern.attach(setup.optimizer)
    memory = "4MB" if name == "convnext" else CASES[name].memory  # what its kernels need inside themselves is not seen
    losses = []
    for _ in range(12):
        batch = setup.make_batch(80)
        loss_fn = partial(setup.loss, setup.model)
        loss = acc.backward(loss_fn, batch, model=setup.model, count=COUNTS.get(name), memory=memory)
        losses.append(loss.item())
        setup.optimizer.step()
        setup.optimizer.zero_grad()
    assert acc.micro_batch is not None
    assert 8 <= acc.micro_batch <= 40
    assert losses[-1] < 0.9 * losses[0], losses
