"""Sixteen architectures, each a ``setup()`` as its users write one, and what tests of plans and sweeps ask of them.

The idioms are the users' too: text sliced by random indices, images drawn from a data set by a list of indices, masks
that are written through booleans, ``torch.manual_seed`` first, frozen parts, several dtypes. Each learns its synthetic
data.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import architectures_pictures as pictures
import architectures_text as text
import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

import accumkern
from accumkern.memory import storage_bytes
from accumkern.out_of_memory import parse_bytes
from accumkern.planning.memory import MemoryMeter, held_tensors
from accumkern.planning.plan_result import Plan
from accumkern.planning.protocol import Setup, run_setup

ARCHITECTURES: dict[str, Callable[[], Any]] = {
    function.__name__: function
    for function in (
        *(text.gpt, text.llama, text.bert, text.t5, text.mamba, text.moe, text.moe_bfloat16, text.whisper),
        *(text.lora, text.tied, pictures.vit, pictures.convnext, pictures.swin, pictures.resnet, pictures.unet),
        *(pictures.clip, pictures.frozen),
    )
}
BATCH = 96
MARGIN = 0.1


class Case(NamedTuple):
    """A memory of which some tens of samples are the most that fits, and how near predictions of the peak come."""

    memory: str
    least: float = 0.95  # predicted over measured, from 8 samples on
    most: float = 1.01


CASES = {
    "gpt": Case("1.8MB"),
    "llama": Case("2.2MB", most=1.06),  # a mask whose values say that it is not needed
    "bert": Case("4MB"),
    "t5": Case("4.5MB"),
    "vit": Case("6MB", most=1.06),  # the masks of dropout
    "convnext": Case("7MB", least=0.99),
    "swin": Case("4MB"),
    "resnet": Case("2.6MB", least=0.99),
    "unet": Case("8MB", least=0.99),
    "moe": Case("5.5MB", most=1.05),
    "moe_bfloat16": Case("3.5MB", most=1.04),
    "mamba": Case("10MB"),
    "clip": Case("2.6MB", least=0.99),
    "whisper": Case("2.2MB"),
    "lora": Case("3MB"),
    "tied": Case("1.8MB"),
    "frozen": Case("2MB", least=0.99),
}
assert CASES.keys() == ARCHITECTURES.keys()
architectures = pytest.mark.parametrize("name", CASES)


@contextlib.contextmanager
def nothing_changes(setup: Callable[[], Any], is_setup_drawing: bool = False) -> Iterator[Callable[[], Any]]:
    """Give a setup to call; afterwards all that it made, and all random numbers, must be as they were.

    With ``is_setup_drawing`` the random numbers are as the first call of the setup left them.
    """
    made: list[Any] = []

    def remembering() -> Any:
        nonlocal before
        returned = setup()
        if is_setup_drawing and not made:
            before = random_numbers()
        model, optimizer = returned[:2]
        if not any(isinstance(param, FakeTensor) for param in model.parameters()):
            state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            made.append((model, optimizer, state, [module.training for module in model.modules()]))
        return returned

    torch.manual_seed(3)
    before = random_numbers()
    yield remembering
    np.testing.assert_equal(random_numbers(), before)
    for model, optimizer, state, training in made:
        found = (model.state_dict(), optimizer.state_dict())
        torch.testing.assert_close(found, state, rtol=0, atol=0, equal_nan=True)
        assert [module.training for module in model.modules()] == training
        assert all(param.grad is None for param in model.parameters())


def random_numbers() -> list[Any]:
    return [torch.get_rng_state().numpy(), random.getstate(), np.random.get_state()]


def trained_peak(name: str, micro_batch: int, plan: Plan) -> int:
    """Return the peak memory of a user's loop with a plan's line and the longest samples; weights must have moved."""
    setup = run_setup(ARCHITECTURES[name])
    before = [param.detach().clone() for param in setup.model.parameters()]
    steps = plan.choice.accumulation_steps
    held = storage_bytes(held_tensors(setup.model, setup.optimizer))
    gc.collect()  # what is freed inside the block would count as less
    with MemoryMeter(setup.device, held, parse_bytes("1GB")) as meter:
        if plan.attach_line is not None:
            eval(plan.attach_line, {"accumkern": accumkern, "optimizer": setup.optimizer})
        for _ in range(2):  # only the second has all of the optimizer's states
            for _ in range(min(steps, 2)):
                train_micro_batch(setup, micro_batch, 1 if plan.attach_line is not None else steps)
            setup.optimizer.step()
            setup.optimizer.zero_grad()
    moved = [not torch.equal(a, b) for a, b in zip(before, setup.model.parameters(), strict=True)]
    assert any(moved)
    return meter.peak_bytes


def train_micro_batch(setup: Setup, micro_batch: int, divide_by: int) -> None:
    batch = (setup.longest_batch or setup.make_batch)(micro_batch)
    loss: Tensor = setup.loss(setup.model, batch) / divide_by
    assert math.isfinite(loss.item())
    loss.backward()
