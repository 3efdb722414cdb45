"""Train a small byte-level GPT in bfloat16 weights, with a large batch made of many micro-batches.

    python examples/train_gpt.py                  # on the source text of Python's standard library
    python examples/train_gpt.py --text my/folder

An ordinary training loop: take the line with accumkern.attach() away, and it is stock PyTorch.
"""

from __future__ import annotations

import argparse
import os
import sysconfig
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import accumkern

CONTEXT = 64  # bytes that the model sees
MAX_TEXT_BYTES = 16 * 2**20


class Block(nn.Module):
    """Causal self-attention and an MLP, each behind a layer norm and around a residual connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, length, width); returns the same shape."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attention = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attention.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """A decoder-only transformer over bytes."""

    def __init__(self, width: int = 192, layers: int = 2, heads: int = 4, context: int = CONTEXT) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, batch: Tensor) -> Tensor:
        """batch: (batch, context + 1) bytes as int64; returns the mean loss of predicting each next byte."""
        inputs, targets = batch[:, :-1], batch[:, 1:]
        x = self.blocks(self.bytes(inputs) + self.positions.weight)
        return F.cross_entropy(self.head(self.norm(x)).float().flatten(0, 1), targets.flatten())


def read_text(path: str | None = None) -> Tensor:
    """Return the text in a file, or in all files below a folder, as one uint8 tensor of at most MAX_TEXT_BYTES.

    Args:
        path: a file or folder; None or "" takes the source text of Python's standard library. Of a folder, hidden
            files and folders and files that are not text are left out.

    Raises:
        OSError: there is nothing at ``path``, or it cannot be read.
        ValueError: there is no text there, or too little to train on.
    """
    root = Path(path or sysconfig.get_path("stdlib")).expanduser()
    if root.is_file():
        files = [root]
    elif root.is_dir():
        files = []
        for folder, folders, names in os.walk(root):
            left_out = () if path else ("site-packages", "test")
            folders[:] = sorted(name for name in folders if name[0] != "." and name not in left_out)
            names = sorted(name for name in names if name[0] != "." and (path or name.endswith(".py")))
            files += [file for name in names if (file := Path(folder, name)).is_file()]
    else:
        raise FileNotFoundError(f"there is no file or folder {str(root)!r}")
    text = bytearray()
    for file in files:
        if len(text) == MAX_TEXT_BYTES:
            break
        try:
            with file.open("rb") as stream:
                data = stream.read(MAX_TEXT_BYTES - len(text))
        except OSError:
            if file is root:
                raise
            continue
        if b"\0" not in data:  # else it is no text
            text += data
    if not text:
        raise ValueError(f"{str(root)!r} is empty or holds no text")
    if len(text) <= CONTEXT:
        raise ValueError(f"{str(root)!r} holds only {len(text)} bytes of text; at least {CONTEXT + 1} are needed")
    return torch.frombuffer(text, dtype=torch.uint8)


def random_batch(text: Tensor, batch_size: int, generator: torch.Generator, context: int = CONTEXT) -> Tensor:
    """Return (batch_size, context + 1) bytes as int64: pieces of ``text`` from random places."""
    starts = torch.randint(len(text) - context, (batch_size, 1), generator=generator)
    return text[starts + torch.arange(context + 1)].long()


def main() -> None:
    """Train, and print the loss of every step."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--text", metavar="PATH", help="a folder or file (default: Python's standard library)")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--micro-batches", type=int, default=64, help="micro-batches per step (default: 64)")
    parser.add_argument("--batch-size", type=int, default=2, help="sequences per micro-batch (default: 2)")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    try:
        text = read_text(args.text)
    except (OSError, ValueError) as error:
        parser.error(str(error))

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = GPT().to(args.device, torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, fused=True)
    accumkern.attach(optimizer)  # from here on gradients are accumulated in FP32; this is all there is to it

    for step in range(1, args.steps + 1):
        mean_loss = 0.0
        for _ in range(args.micro_batches):
            batch = random_batch(text, args.batch_size, generator).to(args.device)
            loss = model(batch) / args.micro_batches
            loss.backward()
            mean_loss += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step:4d}  loss {mean_loss:.4f}", flush=True)


if __name__ == "__main__":
    main()
