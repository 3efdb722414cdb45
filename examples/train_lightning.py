"""The training script's GPT as a LightningModule, with one line of accumkern in configure_optimizers.

    python examples/train_lightning.py

Take the line with accumkern.attach() away, and it is stock Lightning.
"""

from __future__ import annotations

from typing import Any

import lightning
import torch
from lightning.pytorch.utilities import grad_norm
from torch import Tensor
from torch.utils.data import DataLoader

import accumkern
from train_gpt import GPT, random_batch, read_text


class LanguageModel(lightning.LightningModule):
    """Predicts the next byte."""

    def __init__(self) -> None:
        super().__init__()
        self.model = GPT(width=64)
        self.mean_loss = 0.0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Make the optimizer."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=2e-3)
        accumkern.attach(optimizer, master_weights="split32")  # this is all there is to it
        return optimizer

    def training_step(self, batch: Tensor, _batch_idx: int) -> Tensor:
        """Return the loss of a micro-batch."""
        loss: Tensor = self.model(batch)
        self.mean_loss += loss.item() / 64
        return loss

    def on_before_optimizer_step(self, _optimizer: torch.optim.Optimizer) -> None:
        """Print the loss and the gradient's norm."""
        norm = grad_norm(self, norm_type=2)["grad_2.0_norm_total"]
        print(f"loss {self.mean_loss:.4f}  grad_norm {float(norm):.4f}", flush=True)
        self.mean_loss = 0.0


def main() -> None:
    """Train."""
    lightning.seed_everything(0, verbose=False)
    text, generator = read_text(), torch.Generator().manual_seed(0)
    batches: Any = [random_batch(text, 2, generator) for _ in range(6 * 64)]
    trainer = lightning.Trainer(
        max_epochs=1,
        accumulate_grad_batches=64,
        precision="bf16-true",
        gradient_clip_val=1.0,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(LanguageModel(), DataLoader(batches, batch_size=None))


if __name__ == "__main__":
    main()
