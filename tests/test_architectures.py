"""Plans, predictions and sweeps of sixteen architectures, as their users write them: what is said of them is so."""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from planned import old_objects_aside  # noqa: F401
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

import accumkern
from accumkern.memory import storage_bytes
from accumkern.planning.memory import MemoryMeter, held_tensors, parse_bytes
from accumkern.planning.plan_result import Plan
from accumkern.planning.protocol import Setup, run_setup

pytest.importorskip("transformers")
from architectures import ARCHITECTURES

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread", "old_objects_aside")]

BATCH = 96
MARGIN = 0.1


class Case(NamedTuple):
    """A memory of which some tens of samples are the most that fits, and how near predictions of the peak come."""

    memory: str
    least: float = 0.95  # predicted over measured, from 8 samples on
    most: float = 1.01


CASES = {
    "gpt": Case("1.8MB"),
    "llama": Case("2.2MB"),
    "bert": Case("4MB"),
    "t5": Case("4.5MB"),
    "vit": Case("6MB", most=1.06),  # the masks of dropout
    "convnext": Case("7MB"),
    "swin": Case("4MB"),
    "resnet": Case("2.6MB"),
    "unet": Case("8MB", least=0.84),  # what convolutions allocate inside themselves
    "moe": Case("5.5MB"),
    "moe_bfloat16": Case("3.5MB"),
    "mamba": Case("10MB"),
    "clip": Case("2.6MB"),
    "whisper": Case("2.2MB"),
    "lora": Case("3MB"),
    "tied": Case("1.8MB"),
    "frozen": Case("2MB"),
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


def trained_peak(name: str, micro_batch: int, plan: Plan, windows: int = 3) -> int:
    """Return the peak memory of a user's loop with a plan's line and the longest samples; weights must have moved."""
    setup = run_setup(ARCHITECTURES[name])
    before = [param.detach().clone() for param in setup.model.parameters()]
    steps = plan.choice.accumulation_steps
    held = storage_bytes(held_tensors(setup.model, setup.optimizer))
    gc.collect()  # what is freed inside the block would count as less
    with MemoryMeter(setup.device, held, parse_bytes("1GB")) as meter:
        if plan.attach_line is not None:
            eval(plan.attach_line, {"accumkern": accumkern, "optimizer": setup.optimizer})
        for _ in range(windows):
            for _ in range(min(steps, 3)):
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


@architectures
def test_the_plan_that_was_measured_holds(name: str) -> None:
    case = CASES[name]
    with nothing_changes(ARCHITECTURES[name], is_setup_drawing=True) as setup:
        plan = accumkern.plan(setup, effective_batch=BATCH, memory=case.memory, margin=MARGIN, noise_windows=4)
    allowed = int(parse_bytes(case.memory) * (1 - MARGIN))
    assert plan.choice.effective_batch == plan.choice.micro_batch * plan.choice.accumulation_steps == BATCH
    assert plan.is_limited_by_memory
    assert 16 <= plan.largest_micro_batch <= 48
    assert plan.choice.micro_batch <= plan.largest_micro_batch
    assert plan.noise is not None
    assert plan.noise.noise_scale > 0

    assert trained_peak(name, plan.choice.micro_batch, plan) == pytest.approx(plan.choice.memory_bytes, rel=0.02)
    assert trained_peak(name, plan.largest_micro_batch, plan) <= allowed
    assert trained_peak(name, plan.largest_micro_batch + 1, plan, windows=2) > allowed

    assert plan.prediction_problem is None
    assert plan.fit is not None
    measured = {trial.micro_batch: trial.peak_bytes for trial in plan.fit.trials if trial.fits}
    errors = {
        size: predicted.memory.total / measured[size]
        for predicted in plan.predictions
        if (size := predicted.micro_batch) >= 8
    }
    assert errors
    assert all(case.least <= error <= case.most for error in errors.values()), errors


@architectures
def test_the_plan_that_was_predicted_holds(name: str) -> None:
    case = CASES[name]
    with nothing_changes(ARCHITECTURES[name]) as setup:
        asked = {"effective_batch": BATCH, "memory": case.memory, "margin": MARGIN}
        plan = accumkern.plan(setup, **asked, measure=False, device="cpu")
    assert plan.choice.effective_batch == plan.choice.micro_batch * plan.choice.accumulation_steps == BATCH
    assert plan.is_limited_by_memory
    assert 16 <= plan.largest_micro_batch <= 48
    error = plan.choice.memory_bytes / trained_peak(name, plan.choice.micro_batch, plan)
    assert case.least <= error <= case.most


@architectures
def test_a_gpu_is_predicted_for_without_one(name: str) -> None:
    with nothing_changes(ARCHITECTURES[name]) as setup:
        plan = accumkern.plan(setup, effective_batch=8, memory="24GB", measure=False)
    assert plan.choice.effective_batch == 8
    setup_made = run_setup(ARCHITECTURES[name])
    peaks = [prediction.memory for prediction in plan.predictions]
    assert all(peak.parameters >= storage_bytes(setup_made.model.parameters()) for peak in peaks)
    assert all(peak.optimizer_state > 0 for peak in peaks)
    assert [peak.total for peak in peaks] == sorted(peak.total for peak in peaks)


@architectures
def test_a_sweep_learns(name: str, tmp_path: Path) -> None:
    memory = CASES[name].memory
    with nothing_changes(ARCHITECTURES[name]) as setup:
        result = accumkern.sweep(
            lambda: setup()[:4], [8, 32], 512, tmp_path, memory=memory, evaluations=4, validation_samples=64
        )
    assert [run.effective_batch for run in result.runs] == [8, 32]
    for run in result.runs:
        assert run.status == "finished"
        assert run.steps * run.micro_batch * run.accumulation_steps == 512
        assert len(run.points) == 5
        assert run.points[-1].loss < 0.9 * run.points[0].loss
        assert run.peak_bytes <= parse_bytes(memory) * (1 - MARGIN)
    assert result.learnt
