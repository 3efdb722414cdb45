"""Fabric: one line after the optimizer is made, and nothing else changes."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from fp32_twin import Fp32Twin, assert_same_masters
from tiny import LIGHTNING, Classifier, MicroGradients, assert_same_weights, examples
from torch.utils.data import DataLoader

import accumkern

pytest.importorskip("lightning.pytorch" if LIGHTNING == "lightning" else "pytorch_lightning")
Fabric = importlib.import_module("lightning.fabric" if LIGHTNING == "lightning" else "lightning_fabric").Fabric

fabric_feature = pytest.mark.integration("Fabric", version_of=LIGHTNING)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*(num_workers|GPU available|TreeSpec)"),
]


class Run:
    """The loop of Fabric's documentation, with windows, clipping and checkpoints."""

    def __init__(
        self, precision: str, attach: str | None, accumulation_steps: int = 4, master_weights: str | None = None
    ) -> None:
        self.fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
        self.model = Classifier(torch.float32)
        if master_weights is not None:
            accumkern.to_bfloat16(self.model)
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.master_weights, self.twin = master_weights, None
        if attach == "before setup":
            self.accumulator = accumkern.attach(optimizer, master_weights=master_weights)
        self.wrapped, self.optimizer = self.fabric.setup(self.model, optimizer)
        if attach == "after setup":
            self.accumulator = accumkern.attach(self.optimizer, master_weights=master_weights)
        self.truth = MicroGradients(self.model)
        self.accumulation_steps = accumulation_steps
        self.max_norm = torch.inf if master_weights is None else 0.5
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.errors: list[float] = []

    def epoch(self, data: list[Any], skip: int = 0, stop_after: int | None = None) -> None:
        batches = self.fabric.setup_dataloaders(DataLoader(data, batch_size=2))
        for n, batch in enumerate(batches, 1):
            if n <= skip:
                continue
            steps = n % self.accumulation_steps == 0 or n == len(batches)
            with self.fabric.no_backward_sync(self.wrapped, enabled=not steps):
                loss = self.wrapped(*batch)
                self.fabric.backward(loss / self.accumulation_steps)
            self.losses.append(loss.item())
            if steps:
                self.errors.append(self.truth.error())
                norm = self.fabric.clip_gradients(self.wrapped, self.optimizer, max_norm=self.max_norm)
                self.norms.append(float(norm))
                if self.twin is not None:
                    self.twin.step()
                self.optimizer.step()
                if self.twin is not None:
                    self.twin.check()
                self.optimizer.zero_grad()
            if n == stop_after:
                return

    def state(self) -> dict[str, Any]:
        return {"model": self.wrapped, "optimizer": self.optimizer, "accumulator": self.accumulator}

    def assert_same(self, other: Run) -> None:
        assert self.losses == other.losses
        assert self.norms == other.norms
        assert_same_weights(self.model, other.model)
        if self.master_weights is not None:
            assert_same_masters(self.accumulator, self.model, other.accumulator, other.model)


@fabric_feature
@pytest.mark.parametrize("attach", ["before setup", "after setup"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_fabric_fp32_weights_train_as_stock_bit_for_bit(attach: str, precision: str) -> None:
    runs = []
    for how in (attach, None):
        run = Run(precision, how)
        run.epoch(examples(22))
        run.epoch(examples(22))
        assert len(run.norms) == 6
        runs.append(run)
    runs[0].assert_same(runs[1])


@fabric_feature
@pytest.mark.parametrize("attach", ["before setup", "after setup"])
def test_fabric_bf16_gradients_and_norms_are_nearer_to_fp64_than_stock(attach: str) -> None:
    errors, norm_errors = {}, {}
    for how in (attach, None):
        run = Run("bf16-true", how, accumulation_steps=384)
        run.epoch(examples(4) * 192)
        (errors[how],) = run.errors
        norm_errors[how] = abs(run.norms[0] / run.truth.norm() - 1)
    assert errors[attach] < 2.5e-3  # one rounding to bfloat16
    assert errors[None] > 4 * errors[attach]
    assert norm_errors[attach] < 2**-7
    assert norm_errors[None] > 2 * norm_errors[attach]


def assert_fabric_resumes(micro_batches: int, folder: Path, master_weights: str | None) -> None:
    """Assert that a run that is saved after some micro-batches, and goes on, is the same as one that goes on."""
    whole, first, resumed = (Run("bf16-true", "after setup", master_weights=master_weights) for _ in range(3))
    whole.epoch(examples(22))
    whole.epoch(examples(22))
    first.epoch(examples(22), stop_after=micro_batches)
    first.fabric.save(folder / "window.ckpt", first.state())
    resumed.fabric.load(folder / "window.ckpt", resumed.state())
    resumed.losses, resumed.norms = first.losses, first.norms
    resumed.epoch(examples(22), skip=micro_batches)
    resumed.epoch(examples(22))
    resumed.assert_same(whole)


@pytest.mark.integration("Fabric: save and load in a window", version_of=LIGHTNING)
@pytest.mark.parametrize("micro_batches", [1, 3, 6, 8], ids="after-{}".format)
def test_fabric_saved_in_the_middle_of_a_window_and_resumed_bit_for_bit(micro_batches: int, tmp_path: Path) -> None:
    assert_fabric_resumes(micro_batches, tmp_path, None)


fabric_masters_feature = pytest.mark.integration("Master weights: Fabric", version_of=LIGHTNING)


@fabric_masters_feature
@pytest.mark.parametrize("micro_batches", [1, 4, 6, 8], ids="after-{}".format)
def test_fabric_master_weights_saved_and_resumed_bit_for_bit(micro_batches: int, tmp_path: Path) -> None:
    assert_fabric_resumes(micro_batches, tmp_path, "split32")


@fabric_masters_feature
@pytest.mark.parametrize("attach", ["before setup", "after setup"])
def test_fabric_master_weights_have_the_bits_of_fp32_weights(attach: str) -> None:
    run = Run("bf16-true", attach, master_weights="split32")
    for param, start in zip(run.model.parameters(), Classifier(torch.float32).parameters(), strict=True):
        assert torch.equal(run.accumulator.master_weight(param), start)
    run.twin = Fp32Twin(run.accumulator, run.model.parameters(), torch.optim.AdamW)
    run.epoch(examples(22))
    run.epoch(examples(22))
    assert len(run.norms) == 6
