"""Predictions for sixteen architectures, against the peaks that are measured."""

from __future__ import annotations

import pytest
from planned import old_objects_aside  # noqa: F401

import accumkern
from accumkern.memory import storage_bytes
from accumkern.planning.protocol import run_setup

pytest.importorskip("transformers")
from architectures import ARCHITECTURES, BATCH, CASES, MARGIN, nothing_changes, trained_peak

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread", "old_objects_aside")]


predicted = pytest.mark.parametrize("name", sorted(CASES))


@predicted
def test_the_plan_that_was_predicted_holds(name: str) -> None:
    case = CASES[name]
    with nothing_changes(ARCHITECTURES[name]) as setup:
        asked = {"effective_batch": BATCH, "memory": case.memory, "margin": MARGIN}
        plan = accumkern.plan(setup, **asked, measure=False, device="cpu")
    assert plan.choice.effective_batch == plan.choice.micro_batch * plan.choice.accumulation_steps == BATCH
    assert plan.is_limited_by_memory
    assert 8 <= plan.largest_micro_batch < BATCH
    error = plan.choice.memory_bytes / trained_peak(name, plan.choice.micro_batch, plan)
    assert case.least <= error <= case.most


@predicted
def test_a_gpu_is_predicted_for_without_one(name: str) -> None:
    with nothing_changes(ARCHITECTURES[name]) as setup:
        plan = accumkern.plan(setup, effective_batch=8, memory="24GB", measure=False)
    assert plan.choice.effective_batch == 8
    setup_made = run_setup(ARCHITECTURES[name])
    peaks = [prediction.memory for prediction in plan.predictions]
    assert all(peak.parameters >= storage_bytes(setup_made.model.parameters()) for peak in peaks)
    assert all(peak.optimizer_state > 0 for peak in peaks)
    totals = [peak.total for peak in peaks][1:]  # one small image is convolved in another way, which may need more
    assert totals == sorted(totals)
