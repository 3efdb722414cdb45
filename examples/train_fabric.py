"""The training script's GPT in a loop with Lightning Fabric, with one line of accumkern.

    python examples/train_fabric.py

Take the line with accumkern.attach() away, and it is stock Fabric.
"""

from __future__ import annotations

import torch
from lightning.fabric import Fabric

import accumkern
from train_gpt import GPT, random_batch, read_text


def main() -> None:
    """Train, and print the loss and the gradient's norm at every step."""
    fabric = Fabric(devices=1, precision="bf16-true")
    torch.manual_seed(0)
    text, generator = read_text(), torch.Generator().manual_seed(0)
    model = GPT(width=64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    model, optimizer = fabric.setup(model, optimizer)
    accumkern.attach(optimizer, master_weights="split32")  # this is all there is to it

    for _ in range(6):
        mean_loss = 0.0
        for i in range(64):
            batch = fabric.to_device(random_batch(text, 2, generator))
            with fabric.no_backward_sync(model, enabled=i < 63):
                loss = model(batch)
                fabric.backward(loss / 64)
            mean_loss += loss.item() / 64
        norm = fabric.clip_gradients(model, optimizer, max_norm=1.0)
        assert norm is not None
        optimizer.step()
        optimizer.zero_grad()
        print(f"loss {mean_loss:.4f}  grad_norm {float(norm):.4f}", flush=True)


if __name__ == "__main__":
    main()
