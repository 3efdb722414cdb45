"""A run that is killed in the middle of a window, and resumed from what it had saved, ends as if nothing had happened.

As a script, ``python test_resume.py torch FOLDER 13`` is such a run: it saves as it goes, goes on from what it finds in
FOLDER, and kills itself in the middle of the backward pass of micro-batch 13.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gradients import assert_same_bits
from tiny import LIGHTNING, TOKENS, Classifier, assert_same_weights, examples
from torch import nn

import accumkern

pytestmark = pytest.mark.usefixtures("one_thread")

MICRO_BATCHES, WINDOW, SAVES_EVERY = 40, 8, 3


def die_in_the_next_backward(model: nn.Module) -> None:
    """Kill this process when some parameters have their new gradients and others have not."""
    model.norm.weight.register_hook(lambda _grad: os.kill(os.getpid(), signal.SIGKILL))


def train_with_torch(folder: Path, dies_in: int | None = None) -> nn.Module:
    """The loop of docs/integrations.md."""
    model = Classifier(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    accumulator = accumkern.attach(optimizer)
    generator = torch.Generator().manual_seed(3)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "accumulator": accumulator}
    done = 0
    file = folder / "checkpoint.pt"
    if file.exists():
        state = torch.load(file, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        generator.set_state(state["generator"])
        done = state["done"]

    for n in range(done + 1, MICRO_BATCHES + 1):
        if n == dies_in:
            die_in_the_next_backward(model)
        tokens = torch.randint(TOKENS, (2, 5), generator=generator)
        classes = torch.randint(10, (2,), generator=generator)
        (model(tokens, classes) / WINDOW).backward()
        if n % WINDOW == 0:
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        if n % SAVES_EVERY == 0:
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= {"generator": generator.get_state(), "done": n}
            torch.save(state, folder / "new.pt")
            os.replace(folder / "new.pt", file)  # a file that was half written is never read
    return model


def train_with_accelerate(folder: Path, dies_in: int | None = None) -> nn.Module:
    from test_accelerate import Run

    run = Run(torch.bfloat16, "after prepare", examples(2 * MICRO_BATCHES), accumulation_steps=WINDOW)
    run.accelerator.register_for_checkpointing(run.accumulator)
    saved = max((int(path.name) for path in folder.iterdir() if path.name.isdigit()), default=0)
    if saved:
        run.accelerator.load_state(str(folder / str(saved)))
    for n in run.epoch(skip=saved):
        if n % SAVES_EVERY == 0:
            run.accelerator.save_state(str(folder / "new"))
            os.replace(folder / "new", folder / str(n))
        if n + 1 == dies_in:
            die_in_the_next_backward(run.model)
    return run.model


def train_with_lightning(folder: Path, dies_in: int | None = None) -> nn.Module:
    from test_lightning import L, Module, Resumable, trainer

    file = folder / "checkpoint.ckpt"

    class Saves(L.Callback):  # type: ignore[name-defined,misc]
        def on_train_batch_end(self, trainer: Any, module: Any, *_more: Any) -> None:
            n = trainer.fit_loop.total_batch_idx + 1
            if n % SAVES_EVERY == 0:
                trainer.save_checkpoint(folder / "new.ckpt")
                os.replace(folder / "new.ckpt", file)
            if n + 1 == dies_in:
                die_in_the_next_backward(module.model)

    module = Module(True, torch.bfloat16)
    settings = {"accumulate_grad_batches": WINDOW, "max_epochs": 1, "callbacks": [Saves()]}
    loader = Resumable(examples(2 * MICRO_BATCHES))
    trainer(folder, **settings).fit(module, loader, ckpt_path=file if file.exists() else None)
    return module.model


TRAIN: dict[str, Callable[..., nn.Module]] = {
    "torch": train_with_torch,
    "accelerate": train_with_accelerate,
    "lightning": train_with_lightning,
}


@pytest.mark.parametrize(
    "framework",
    [
        pytest.param("torch", marks=pytest.mark.integration("Resume after SIGKILL: torch.save, weights_only")),
        pytest.param(
            "accelerate",
            marks=pytest.mark.integration("Resume after SIGKILL: Accelerate's save_state", version_of="accelerate"),
        ),
        pytest.param(
            "lightning",
            marks=pytest.mark.integration("Resume after SIGKILL: Lightning's checkpoint", version_of=LIGHTNING),
        ),
    ],
)
def test_killed_in_a_window_and_resumed_ends_with_the_same_bits(framework: str, tmp_path: Path) -> None:
    if framework == "accelerate":
        pytest.importorskip("accelerate")
    if framework == "lightning":
        pytest.importorskip(LIGHTNING.replace("-", "_"))
    folder, other = tmp_path / "killed", tmp_path / "whole"
    folder.mkdir()
    other.mkdir()
    for dies_in in (14, 36) if framework == "torch" else (14,):  # the sixth and the fourth of their windows
        command = [sys.executable, __file__, framework, str(folder), str(dies_in)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert any(folder.iterdir())
    resumed, whole = TRAIN[framework](folder), TRAIN[framework](other)
    assert_same_weights(resumed, whole)
    for a, b in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert_same_bits(a.grad, b.grad)


if __name__ == "__main__":
    torch.set_num_threads(1)
    TRAIN[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]))
    sys.exit("it should have died")
