"""Accelerate: attach before or after prepare(), and its loop does not change."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fp32_twin import Fp32Twin, assert_same_masters
from tiny import Classifier, MicroGradients, assert_same_weights, examples
from torch.utils.data import DataLoader

import accumkern

accelerate = pytest.importorskip("accelerate")

pytestmark = pytest.mark.usefixtures("one_thread")

ON_CPU = not torch.cuda.is_available()

accelerate_feature = pytest.mark.integration("Accelerate", version_of="accelerate")


@pytest.fixture(autouse=True)
def _new_state() -> Iterator[None]:
    yield
    forget_settings()


def forget_settings() -> None:
    """Accelerate keeps its settings for the whole process."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


class Run:
    """The loop of Accelerate's documentation, clipping included."""

    def __init__(
        self,
        dtype: torch.dtype,
        attach: str | None,
        data: list[Any],
        accumulation_steps: int = 4,
        max_norm: float = 0.5,
        mixed_precision: str = "no",
        master_weights: str | None = None,
    ) -> None:
        forget_settings()
        self.accelerator = accelerate.Accelerator(
            gradient_accumulation_steps=accumulation_steps, mixed_precision=mixed_precision, cpu=ON_CPU
        )
        self.model = Classifier(dtype if master_weights is None else torch.float32)
        if master_weights is not None:
            accumkern.to_bfloat16(self.model)
        self.truth = MicroGradients(self.model)
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.accumulator: accumkern.GradAccumulator | None = None
        if attach == "before prepare":
            self.accumulator = accumkern.attach(optimizer, master_weights=master_weights)
        loader = DataLoader(data, batch_size=2)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        self.prepared, self.optimizer, self.loader, self.scheduler = self.accelerator.prepare(
            self.model, optimizer, loader, scheduler
        )
        if attach == "after prepare":
            self.accumulator = accumkern.attach(self.optimizer, master_weights=master_weights)
        self.max_norm = max_norm
        self.twin: Fp32Twin | None = None
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.errors: list[float] = []

    def epoch(self, skip: int = 0) -> Iterator[int]:
        """Train, and yield the number of micro-batches after each."""
        loader = accelerate.skip_first_batches(self.loader, skip) if skip else self.loader
        for n, batch in enumerate(loader, skip + 1):
            with self.accelerator.accumulate(self.prepared):
                loss = self.prepared(*batch)
                self.accelerator.backward(loss)
                self.losses.append(loss.item())
                if self.accelerator.sync_gradients:
                    self.errors.append(self.truth.error())
                    norm = self.accelerator.clip_grad_norm_(self.prepared.parameters(), self.max_norm)
                    self.norms.append(float(norm))
                    if self.twin is not None:
                        self.twin.step()
                self.optimizer.step()
                if self.twin is not None and self.accelerator.sync_gradients:
                    self.twin.check()
                self.scheduler.step()
                self.optimizer.zero_grad()
            yield n

    def assert_same(self, other: Run) -> None:
        assert self.losses == other.losses
        assert self.norms == other.norms
        assert_same_weights(self.model, other.model)
        if self.accumulator is not None and "master_weights" in self.accumulator.state_dict():
            assert_same_masters(self.accumulator, self.model, other.accumulator, other.model)


@accelerate_feature
@pytest.mark.parametrize("attach", ["before prepare", "after prepare"])
@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_fp32_weights_train_as_stock_bit_for_bit(attach: str, mixed_precision: str) -> None:
    runs = []
    for how in (attach, None):
        run = Run(torch.float32, how, examples(22), mixed_precision=mixed_precision)  # 4, 4 and 3 micro-batches
        list(run.epoch())
        list(run.epoch())
        assert len(run.norms) == 6
        runs.append(run)
    runs[0].assert_same(runs[1])


@accelerate_feature
@pytest.mark.parametrize("attach", ["before prepare", "after prepare"])
def test_bf16_gradients_and_norms_are_nearer_to_fp64_than_stock(attach: str) -> None:
    errors, norm_errors = {}, {}
    for how in (attach, None):
        run = Run(torch.bfloat16, how, examples(4) * 192, accumulation_steps=384, max_norm=torch.inf)
        list(run.epoch())
        (errors[how],) = run.errors
        norm_errors[how] = abs(run.norms[0] / run.truth.norm() - 1)
    assert errors[attach] < 2.5e-3  # one rounding to bfloat16
    assert errors[None] > 4 * errors[attach]
    assert norm_errors[attach] < 2**-7  # torch computes norms of bfloat16 gradients in bfloat16
    assert norm_errors[None] > 2 * norm_errors[attach]


def assert_resumes(micro_batches: int, folder: Path, master_weights: str | None) -> None:
    """Assert that a run that is saved after some micro-batches, and goes on, is the same as one that goes on."""
    whole = Run(torch.bfloat16, "after prepare", examples(22), master_weights=master_weights)
    list(whole.epoch())
    list(whole.epoch())

    first = Run(torch.bfloat16, "after prepare", examples(22), master_weights=master_weights)
    first.accelerator.register_for_checkpointing(first.accumulator)
    next(n for n in first.epoch() if n == micro_batches)
    first.accelerator.save_state(str(folder))

    resumed = Run(torch.bfloat16, "after prepare", examples(22), master_weights=master_weights)
    resumed.accelerator.register_for_checkpointing(resumed.accumulator)
    resumed.accelerator.load_state(str(folder))
    resumed.losses, resumed.norms = first.losses, first.norms
    list(resumed.epoch(skip=micro_batches))
    list(resumed.epoch())
    resumed.assert_same(whole)


@pytest.mark.integration("Accelerate: save_state in a window", version_of="accelerate")
@pytest.mark.parametrize("micro_batches", [1, 3, 6, 8], ids="after-{}".format)
def test_saved_in_the_middle_of_a_window_and_resumed_bit_for_bit(micro_batches: int, tmp_path: Path) -> None:
    assert_resumes(micro_batches, tmp_path, None)


masters_feature = pytest.mark.integration("Master weights: Accelerate", version_of="accelerate")


@masters_feature
@pytest.mark.parametrize("attach", ["before prepare", "after prepare"])
def test_master_weights_have_the_bits_of_fp32_weights(attach: str) -> None:
    run = Run(torch.bfloat16, attach, examples(22), master_weights="split32")
    for param, start in zip(run.model.parameters(), Classifier(torch.float32).parameters(), strict=True):
        assert torch.equal(run.accumulator.master_weight(param), start)
    run.twin = Fp32Twin(run.accumulator, run.model.parameters(), torch.optim.AdamW)
    list(run.epoch())
    list(run.epoch())
    assert len(run.norms) == 6


@masters_feature
@pytest.mark.parametrize("micro_batches", [1, 4, 6, 11], ids="after-{}".format)
def test_master_weights_saved_and_resumed_bit_for_bit(micro_batches: int, tmp_path: Path) -> None:
    assert_resumes(micro_batches, tmp_path, "split32")


@pytest.mark.integration("Accelerate: fp16 with its GradScaler", version_of="accelerate")
@pytest.mark.gpu
def test_fp16_loss_scaling_trains_as_stock_bit_for_bit() -> None:
    runs = []
    for how in ("before prepare", None):
        run = Run(torch.float32, how, examples(22), mixed_precision="fp16")
        list(run.epoch())
        list(run.epoch())
        runs.append(run)
    runs[0].assert_same(runs[1])
