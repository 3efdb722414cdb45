"""``acc.backward`` in the loops of other libraries: the recipe's batch is kept when memory runs out, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from scarce import Scarce
from tiny import LIGHTNING, Classifier, assert_same_weights, examples
from torch import Tensor, nn
from torch.utils.data import DataLoader

import accumkern

pytestmark = pytest.mark.usefixtures("one_thread")

BATCH, FITS, STEPS = 12, 3, 4
DATA = examples(BATCH * STEPS)


class ScarceClassifier(nn.Module):
    """The classifier on a device whose memory takes `most` samples."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.model = Classifier(torch.bfloat16)
        self.model.hidden = nn.Sequential(Scarce(most, "backward"), self.model.hidden)  # type: ignore[assignment]

    @property
    def seen(self) -> list[int]:
        return self.model.hidden[0].seen

    def forward(self, tokens: Tensor, classes: Tensor) -> Any:
        return self.model(tokens, classes)


def assert_kept(auto: Any, fixed: Any) -> None:
    """Assert that a run with little memory took the steps of one that was told what fits, and has its bits."""
    assert auto.seen[:3] == [12, 6, 3]  # it ran out twice, in the first window
    assert auto.seen[2:] == fixed.seen == [3] * (BATCH // FITS * STEPS)
    assert_same_weights(auto, fixed)


# ---- Accelerate --------------------------------------------------------------------------------------------------


@pytest.fixture
def accelerate() -> Iterator[Any]:
    accelerate = pytest.importorskip("accelerate")

    def forget() -> None:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerate.state.GradientState._reset_state()

    forget()
    yield accelerate
    forget()


@pytest.mark.integration("Accelerate: acc.backward", version_of="accelerate")
def test_accelerate(accelerate: Any) -> None:
    def trained(most: int, micro_batch: Any) -> ScarceClassifier:
        accelerator = accelerate.Accelerator(cpu=True)
        model = ScarceClassifier(most)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        acc = accumkern.attach(optimizer)
        prepared, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(DATA, batch_size=BATCH))
        steps = 0
        for batch in loader:
            acc.backward(
                lambda part: prepared(*part), batch, micro_batch, model=prepared, backward=accelerator.backward
            )
            accelerator.clip_grad_norm_(prepared.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
        assert steps == STEPS
        return model

    assert_kept(trained(FITS, "auto"), trained(10**9, FITS))


@pytest.mark.integration("Accelerate: acc.backward", version_of="accelerate")
def test_what_find_executable_batch_size_does_instead(accelerate: Any) -> None:
    """It calls the whole function again with a smaller batch: more steps, each with fewer samples."""
    runs: list[tuple[int, int, int]] = []  # the batch, samples seen before memory ran out or the end, and steps

    @accelerate.utils.find_executable_batch_size(
        starting_batch_size=BATCH, reduce_batch_size_fn=lambda: runs[-1][0] // 2
    )
    def train(batch_size: int) -> None:
        model = ScarceClassifier(FITS)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        runs.append((batch_size, 0, 0))
        for batch in DataLoader(DATA, batch_size=batch_size):
            model(*batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            runs[-1] = (batch_size, runs[-1][1] + len(batch[0]), runs[-1][2] + 1)

    train()
    assert runs == [(12, 0, 0), (6, 0, 0), (3, BATCH * STEPS, BATCH // FITS * STEPS)]


# ---- Lightning ---------------------------------------------------------------------------------------------------


@pytest.mark.integration("Lightning: acc.backward", version_of=LIGHTNING)
@pytest.mark.filterwarnings("ignore:.*(num_workers|GPU available|TreeSpec)")
def test_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch" if LIGHTNING == "lightning" else "pytorch_lightning")

    class Module(lightning.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self, most: int, micro_batch: Any) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.model, self.micro_batch = ScarceClassifier(most), micro_batch

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
            self.acc = accumkern.attach(optimizer)
            return optimizer

        def training_step(self, batch: Any, _batch_idx: int) -> Any:
            optimizer = self.optimizers()
            how = {"model": self, "backward": self.manual_backward}
            loss = self.acc.backward(lambda part: self.model(*part), batch, self.micro_batch, **how)
            self.clip_gradients(optimizer, 0.5, "norm")
            optimizer.step()
            optimizer.zero_grad()
            return loss

    def trained(most: int, micro_batch: Any) -> ScarceClassifier:
        trainer = lightning.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        module = Module(most, micro_batch)
        trainer.fit(module, DataLoader(DATA, batch_size=BATCH))
        assert trainer.global_step == STEPS
        return module.model

    assert_kept(trained(FITS, "auto"), trained(10**9, FITS))


# ---- Hugging Face Trainer ----------------------------------------------------------------------------------------


@pytest.mark.integration("HF Trainer: acc.backward", version_of="transformers")
@pytest.mark.parametrize("counts_tokens", [True, False])
def test_trainer(tmp_path: Path, counts_tokens: bool) -> None:
    transformers = pytest.importorskip("transformers")

    class AnyBatchTrainer(transformers.Trainer):  # type: ignore[name-defined,misc]
        micro_batch: Any = "auto"

        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            def loss_fn(part: Any) -> Any:
                with self.compute_loss_context_manager():
                    return self.compute_loss(model, part, num_items_in_batch=num_items_in_batch)

            model.train()
            return accumkern.accumulator_of(self.optimizer).backward(  # type: ignore[union-attr]
                loss_fn,
                self._prepare_inputs(inputs),
                self.micro_batch,
                model=model,
                reduction="mean" if num_items_in_batch is None else "sum",  # the loss is divided by it already
                backward=self.accelerator.backward,
            )

    def rows() -> list[dict[str, Any]]:
        ids = torch.randint(32, (BATCH * STEPS, 8), generator=torch.Generator().manual_seed(1))
        labels = ids.clone()
        for i in range(len(ids)):
            labels[i, : i % 6] = -100
        return [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]

    def trained(most: int, micro_batch: Any, dropout: float = 0.1) -> Any:
        torch.manual_seed(1)
        config = transformers.LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            attention_dropout=dropout,
        )
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
        scarce = Scarce(most, "backward")
        model.model.norm.register_forward_hook(lambda _m, _i, out: scarce(out))
        model.seen = scarce.seen
        arguments = transformers.TrainingArguments(
            str(tmp_path),
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            logging_steps=1,
            save_strategy="no",
            per_device_train_batch_size=BATCH,
            num_train_epochs=1,
            learning_rate=1e-2,
            max_grad_norm=0.5,
        )
        trainer = AnyBatchTrainer(model, arguments, train_dataset=rows())
        trainer.model_accepts_loss_kwargs = counts_tokens
        trainer.micro_batch = micro_batch
        accumkern.attach(trainer.create_optimizer())
        trainer.train()
        assert trainer.state.global_step == STEPS
        model.losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return model

    auto, fixed = trained(FITS, "auto"), trained(10**9, FITS)
    assert auto.losses == fixed.losses
    assert_kept(auto, fixed)
    if counts_tokens:  # parts with more tokens count for more: as in one batch of all
        stock = trained(10**9, BATCH, dropout=0.0)
        assert trained(FITS, "auto", dropout=0.0).losses == pytest.approx(stock.losses, rel=0.02)
