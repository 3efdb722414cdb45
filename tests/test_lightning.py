"""Lightning: one line where the optimizer is made, and nothing else changes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fp32_twin import Fp32Twin, assert_same_masters
from tiny import LIGHTNING, Classifier, MicroGradients, assert_same_weights, examples
from torch.utils.data import DataLoader

import accumkern

L = pytest.importorskip("lightning.pytorch" if LIGHTNING == "lightning" else "pytorch_lightning")

lightning_feature = pytest.mark.integration("Lightning", version_of=LIGHTNING)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*(num_workers|GPU available|TreeSpec)"),
]


class Module(L.LightningModule):  # type: ignore[name-defined,misc]
    """A module as any user writes it, but for the marked lines and what it notes for the tests."""

    def __init__(self, attached: bool, dtype: torch.dtype, master_weights: str | None = None) -> None:
        super().__init__()
        self.model = Classifier(dtype if master_weights is None else torch.float32)
        if master_weights is not None:
            accumkern.to_bfloat16(self.model)  # <- accumkern
        self.master_weights = master_weights
        self.attached = attached
        self.accumulator: accumkern.GradAccumulator | None = None
        self.window: Any = None
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.errors: list[float] = []

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        if self.accumulator is not None:
            self.accumulator.detach()  # <- accumkern; trained before, with another optimizer
        if self.attached:
            self.accumulator = accumkern.attach(optimizer, master_weights=self.master_weights)  # <- accumkern
        self.truth = MicroGradients(self.model)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def training_step(self, batch: Any, _batch_idx: int) -> Any:
        loss = self.model(*batch)
        self.losses.append(loss.item())
        return loss

    def on_before_optimizer_step(self, _optimizer: Any) -> None:
        self.norms.append(float(L.utilities.grad_norm(self, norm_type=2)["grad_2.0_norm_total"]))
        self.errors.append(self.truth.error())

    # Checkpoints in the middle of a window.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.accumulator is not None:
            checkpoint["accumkern"] = self.accumulator.state_dict()  # <- accumkern

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.window = checkpoint.get("accumkern")  # <- accumkern; there is no optimizer yet

    def on_train_start(self) -> None:
        if self.accumulator is not None and self.window is not None:
            self.accumulator.load_state_dict(self.window)  # <- accumkern
            self.window = None


def trainer(folder: Path, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "default_root_dir": folder,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 2,
        "accumulate_grad_batches": 4,
        "gradient_clip_val": 0.05,
    }
    return L.Trainer(**settings | changes)


def assert_same_runs(found: Module, expected: Module) -> None:
    assert found.losses == expected.losses
    assert found.norms == expected.norms
    assert_same_weights(found.model, expected.model)
    if found.master_weights is not None:
        assert_same_masters(found.accumulator, found.model, expected.accumulator, expected.model)


@lightning_feature
@pytest.mark.parametrize(
    "changes",
    [{}, {"precision": "bf16-mixed"}, {"gradient_clip_algorithm": "value"}, {"schedule": {0: 4, 1: 2}}],
    ids=["fp32", "autocast-bf16", "clip-by-value", "scheduled-windows"],
)
def test_fp32_weights_train_as_stock_bit_for_bit(changes: dict[str, Any], tmp_path: Path) -> None:
    runs = []
    for attached in (True, False):
        settings = dict(changes)
        schedule = settings.pop("schedule", None)
        if schedule is not None:
            settings |= {"accumulate_grad_batches": 1}
            settings |= {"callbacks": [L.callbacks.GradientAccumulationScheduler(schedule)]}
        module = Module(attached, torch.float32)
        trainer(tmp_path, **settings).fit(module, DataLoader(examples(22), batch_size=2))
        assert len(module.norms) == (6 if schedule is None else 9)  # 11 micro-batches an epoch: 4, 4, 3; 2, 2, ..., 1
        runs.append(module)
    assert_same_runs(*runs)


@lightning_feature
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_bf16_gradients_and_norms_are_nearer_to_fp64_than_stock(precision: str, tmp_path: Path) -> None:
    errors, norm_errors = {}, {}
    for attached in (True, False):
        module = Module(attached, torch.bfloat16 if precision == "32-true" else torch.float32)
        settings = {"precision": precision, "accumulate_grad_batches": 384, "max_epochs": 1, "gradient_clip_val": None}
        trainer(tmp_path, **settings).fit(module, DataLoader(examples(4) * 192, batch_size=2))
        assert module.model.out.weight.dtype is torch.bfloat16
        (errors[attached],) = module.errors
        norm_errors[attached] = abs(module.norms[0] / module.truth.norm() - 1)
    assert errors[True] < 2.5e-3  # one rounding to bfloat16
    assert errors[False] > 4 * errors[True]
    assert norm_errors[True] < 2**-7  # torch computes norms of bfloat16 gradients in bfloat16
    assert norm_errors[False] > 2 * norm_errors[True]


class Resumable:
    """A data loader that says where it is and can go on from there, as Lightning asks for."""

    def __init__(self, data: list[Any]) -> None:
        self.batches = list(DataLoader(data, batch_size=2))
        self.place = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        while self.place < len(self.batches):
            self.place += 1
            yield self.batches[self.place - 1]
        self.place = 0

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]


class SaveAndStop(L.Callback):  # type: ignore[name-defined,misc]
    def __init__(self, micro_batches: int, path: Path) -> None:
        self.micro_batches, self.path = micro_batches, path

    def on_train_batch_end(self, trainer: Any, _module: Any, _outputs: Any, _batch: Any, batch_idx: int) -> None:
        if batch_idx + 1 == self.micro_batches:
            trainer.save_checkpoint(self.path)
            raise KeyboardInterrupt


def assert_resumes(micro_batches: int, folder: Path, master_weights: str | None, **changes: Any) -> None:
    """Assert that a run that is saved after some micro-batches, and goes on, is the same as one that goes on."""
    whole = Module(True, torch.bfloat16, master_weights)
    trainer(folder, **changes).fit(whole, Resumable(examples(22)))

    path = folder / "window.ckpt"
    first = Module(True, torch.bfloat16, master_weights)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer(folder, callbacks=[SaveAndStop(micro_batches, path)], **changes).fit(first, Resumable(examples(22)))

    resumed = Module(True, torch.bfloat16, master_weights)
    resumed.losses, resumed.norms = first.losses, first.norms
    trainer(folder, **changes).fit(resumed, Resumable(examples(22)), ckpt_path=path)
    assert_same_runs(resumed, whole)


@pytest.mark.integration("Lightning: checkpoint in a window", version_of=LIGHTNING)
@pytest.mark.parametrize("micro_batches", [1, 3, 4, 6, 8], ids="after-{}".format)
def test_saved_in_the_middle_of_a_window_and_resumed_bit_for_bit(micro_batches: int, tmp_path: Path) -> None:
    assert_resumes(micro_batches, tmp_path, None)


masters_feature = pytest.mark.integration("Master weights: Lightning", version_of=LIGHTNING)


@masters_feature
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("micro_batches", [1, 4, 6, 8], ids="after-{}".format)
def test_master_weights_saved_and_resumed_bit_for_bit(micro_batches: int, precision: str, tmp_path: Path) -> None:
    assert_resumes(micro_batches, tmp_path, "split32", precision=precision)


class BesideFp32(Module):
    """Compares each step, which Lightning makes with a closure, with one of FP32 weights."""

    twin: Fp32Twin | None = None
    steps = 0

    def on_train_start(self) -> None:
        super().on_train_start()
        self.twin = Fp32Twin(self.accumulator, self.model.parameters(), torch.optim.AdamW)
        fp32 = dict(Classifier(torch.float32).named_parameters())
        for name, param in self.model.named_parameters():
            assert torch.equal(self.accumulator.master_weight(param), fp32[name])

    def configure_gradient_clipping(self, optimizer: Any, *how: Any, **named: Any) -> None:
        super().configure_gradient_clipping(optimizer, *how, **named)
        self.twin.step()

    def optimizer_step(self, *args: Any, **named: Any) -> None:
        super().optimizer_step(*args, **named)
        self.twin.check()
        self.steps += 1


@masters_feature
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("clip", [{}, {"gradient_clip_algorithm": "value"}, {"gradient_clip_val": None}], ids=str)
def test_master_weights_have_the_bits_of_fp32_weights(precision: str, clip: dict[str, Any], tmp_path: Path) -> None:
    module = BesideFp32(True, torch.bfloat16, "split32")
    trainer(tmp_path, precision=precision, **clip).fit(module, DataLoader(examples(22), batch_size=2))
    assert module.steps == 6


class Adversaries(L.LightningModule):  # type: ignore[name-defined,misc]
    """Two optimizers in turn by hand, each with the other's parameters frozen (toggle_optimizer)."""

    def __init__(self, attached: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(1)
        self.generator, self.critic = torch.nn.Linear(5, 8), torch.nn.Linear(8, 1)
        self.attached = attached

    def configure_optimizers(self) -> Any:
        optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.generator, self.critic)]
        if self.attached:
            for optimizer in optimizers:
                accumkern.attach(optimizer)
        return optimizers

    def training_step(self, batch: Any, batch_idx: int) -> None:
        noise = (batch[0] % 7).float()
        steps = (batch_idx + 1) % 4 == 0
        for optimizer, sign in zip(self.optimizers(), (1, -1), strict=True):
            self.toggle_optimizer(optimizer)
            score = self.critic(torch.tanh(self.generator(noise))).mean()
            self.manual_backward(sign * score / 4)
            if steps:
                self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
                optimizer.step()
                optimizer.zero_grad()
            self.untoggle_optimizer(optimizer)


@pytest.mark.integration("Lightning: manual optimization, two optimizers", version_of=LIGHTNING)
def test_manual_optimization_of_two_optimizers(tmp_path: Path) -> None:
    runs = []
    for attached in (True, False):
        module = Adversaries(attached)
        settings = {"accumulate_grad_batches": 1, "gradient_clip_val": None}
        trainer(tmp_path, **settings).fit(module, DataLoader(examples(32), batch_size=2))
        runs.append(module)
    assert_same_weights(runs[0], runs[1])


@lightning_feature
def test_trained_after_a_search_for_a_learning_rate_and_again(tmp_path: Path) -> None:
    runs = []
    for attached in (False, True):
        torch.manual_seed(0)
        module, loader = Module(attached, torch.float32), DataLoader(examples(24), batch_size=2)
        first = trainer(tmp_path, max_epochs=1)
        L.tuner.Tuner(first).lr_find(module, loader, num_training=8, attr_name="unused", update_attr=False)
        first.fit(module, loader)
        trainer(tmp_path, max_epochs=1).fit(module, loader)
        runs.append(module)
    assert_same_runs(runs[1], runs[0])
