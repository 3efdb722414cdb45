"""The training script's GPT in Accelerate's loop, with one line of accumkern.

    python examples/train_accelerate.py

Take the line with accumkern.attach() away, and it is stock Accelerate.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

import accumkern
from train_gpt import GPT, random_batch, read_text


def main() -> None:
    """Train, and print the loss and the gradient's norm at every step."""
    accelerator = Accelerator(gradient_accumulation_steps=64)
    torch.manual_seed(0)
    text, generator = read_text(), torch.Generator().manual_seed(0)
    batches: Any = [random_batch(text, 2, generator) for _ in range(6 * 64)]
    model = GPT(width=64).to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    accumkern.attach(optimizer, master_weights="split32")  # this is all there is to it
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(batches, batch_size=None))

    mean_loss = 0.0
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(batch)
            accelerator.backward(loss)
            mean_loss += loss.item() / 64
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
                print(f"loss {mean_loss:.4f}  grad_norm {float(norm):.4f}", flush=True)
                mean_loss = 0.0
            optimizer.step()
            optimizer.zero_grad()


if __name__ == "__main__":
    main()
