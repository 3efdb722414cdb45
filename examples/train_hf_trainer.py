"""A small Llama over bytes in Hugging Face's Trainer, with one line of accumkern.

    python examples/train_hf_trainer.py

Nothing is downloaded. Take the line with accumkern.attach() away, and it is a stock Trainer.
"""

from __future__ import annotations

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import accumkern
from train_gpt import random_batch, read_text


def main() -> None:
    """Train; the trainer prints its logs."""
    torch.manual_seed(0)
    rows = random_batch(read_text(), 6 * 64 * 2, torch.Generator().manual_seed(0))
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=64,
            num_train_epochs=1,
            learning_rate=2e-3,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in rows])
        accumkern.attach(trainer.create_optimizer(), master_weights="split32")  # this is all there is to it
        trainer.train()


if __name__ == "__main__":
    main()
