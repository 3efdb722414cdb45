"""Which batch size for the small GPT of train_gpt.py, on real text? Takes about three minutes on a CPU.

    python examples/plan_gpt.py --output plan-gpt       # both of these, into one folder with a report.html
    accumkern plan examples/plan_gpt.py:setup --effective-batch 64 --memory 40MB --output plan-gpt
    accumkern sweep examples/plan_gpt.py:setup --effective-batches 4,16,64 --samples 3072 --output plan-gpt

The text is the source of Python's standard library, or what TEXT in the environment names.
"""

from __future__ import annotations

import argparse
import os
import sys

import torch
from torch import Tensor

from accumkern.__main__ import main as accumkern
from accumkern.planning.protocol import Setup
from train_gpt import CONTEXT, GPT, random_batch, read_text

VALIDATION_BYTES = 2**18


def setup() -> Setup:
    """Return the GPT in bfloat16, AdamW, batches of text, and the loss."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    text = read_text(os.environ.get("TEXT"))
    held_out = min(VALIDATION_BYTES, len(text) // 8)
    model = GPT().to(device, torch.bfloat16)
    generator = torch.Generator().manual_seed(torch.initial_seed())

    def make_batch(size: int) -> Tensor:
        return random_batch(text[:-held_out], size, generator).to(device)

    def validation_batch(size: int) -> Tensor:
        return random_batch(text[-held_out:], size, generator).to(device)

    return Setup(
        model,
        torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True),
        make_batch,
        lambda model, batch: model(batch),
        validation_batch=validation_batch,
        tokens_per_sample=CONTEXT,
    )


def main() -> int:
    """Plan for an effective batch of 64 in 40 MB; then train with several batches, and see."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", default="plan-gpt", help="folder for the results (default: plan-gpt)")
    output = parser.parse_args().output
    target = f"{__file__}:setup"
    plan = ["plan", target, "--effective-batch", "64", "--memory", "40MB", "--output", output]
    sweep = ["sweep", target, "--effective-batches", "4,16,64", "--samples", "3072", "--output", output]
    sweep += ["--base-batch", "16", "--micro-batch", "16", "--rules", "none,sqrt"]
    sweep += ["--evaluations", "12", "--validation-samples", "128"]
    return accumkern(plan) or accumkern(sweep)


if __name__ == "__main__":
    sys.exit(main())
