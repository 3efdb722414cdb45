"""The examples of the integrations run as they are, learn, and the three with one model and data learn the same."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(script: str) -> list[tuple[float, float]]:
    """Return (loss, norm) of every step that a script prints."""
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"'?\bloss'?:? '?([\d.]+)'?,?  ?'?grad_norm'?:? '?([\d.]+)", done.stdout)
    return [(float(loss), float(norm)) for loss, norm in found]


@pytest.mark.slow
def test_one_model_in_three_frameworks() -> None:
    pytest.importorskip("accelerate")
    if find_spec("lightning") is None:
        pytest.skip("could not import 'lightning'")
    runs = [run(f"train_{name}.py") for name in ("accelerate", "fabric", "lightning")]
    assert runs[0] == runs[1] == runs[2]
    assert len(runs[0]) == 6
    assert runs[0][-1][0] < runs[0][0][0] - 0.5


def test_trainer() -> None:
    pytest.importorskip("transformers")
    steps = run("train_hf_trainer.py")
    assert len(steps) == 6
    assert steps[-1][0] < steps[0][0] - 0.2
