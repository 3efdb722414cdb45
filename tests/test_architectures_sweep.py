"""Sweeps of sixteen architectures: they train, and learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from planned import old_objects_aside  # noqa: F401

import accumkern
from accumkern.out_of_memory import parse_bytes

pytest.importorskip("transformers")
from architectures import ARCHITECTURES, CASES, MARGIN, architectures, random_numbers

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread", "old_objects_aside")]


@architectures
def test_a_sweep_learns(name: str, tmp_path: Path) -> None:
    memory = CASES[name].memory
    before = random_numbers()
    result = accumkern.sweep(
        ARCHITECTURES[name], [8, 32], 384, tmp_path, memory=memory, evaluations=4, validation_samples=64
    )
    np.testing.assert_equal(random_numbers(), before)
    assert [run.effective_batch for run in result.runs] == [8, 32]
    for run in result.runs:
        assert run.status == "finished"
        assert run.steps * run.micro_batch * run.accumulation_steps == 384
        assert len(run.points) == 5
        assert run.points[-1].loss < 0.9 * run.points[0].loss
        assert run.peak_bytes <= parse_bytes(memory) * (1 - MARGIN)
    assert result.learnt
