"""What is made of the runs of a sweep: the way to a loss, rows, findings, and the critical batch."""

import dataclasses
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
from planned import old_objects_aside  # noqa: F401
from swept import noisy, run, sweep_of

from accumkern.planning.sweep_result import Sweep
from accumkern.planning.sweep_runs import Run, write_json

pytestmark = pytest.mark.usefixtures("one_thread", "old_objects_aside")


def test_json_is_written_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    write_json(path, {"loss": 1.0})

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_json(path, {"loss": 2.0})
    assert json.loads(path.read_text()) == {"loss": 1.0}
    assert list(tmp_path.glob("*.json")) == [path]


# ---- what is made of runs ----------------------------------------------------------------------------------------


def test_the_way_to_a_loss_is_a_straight_line_between_points() -> None:
    one = run(4, [5.0, 3.0, 1.0, 2.0], 10.0)
    assert one.reaches(4.0) == (50.0, 5.0)
    assert one.reaches(3.0) == (100.0, 10.0)
    assert one.reaches(2.0) == (150.0, 15.0)
    assert one.reaches(6.0) == (0.0, 0.0)
    assert one.reaches(0.5) is None
    assert one.best_loss == 1.0
    assert run(4, [5.0, math.nan, math.nan], 1.0).reaches(4.0) is None


def test_rows_and_findings() -> None:
    sweep = Sweep(
        (
            run(4, [5.0, 3.0, 1.0], 1.0),
            run(4, [5.0, 2.0, 1.5], 2.0, seed=1),
            run(16, [5.0, 4.0, 2.0], 0.5),
            run(16, [5.0, 4.0, 3.0], 0.5, seed=1),
            run(64, [5.0, 4.0, 11.0], 0.1, status="diverged"),
        ),
        None,
        None,
        4,
    )
    assert sweep.target_loss == 3.0  # which every finished run has reached
    four, sixteen, sixty_four = sweep.rows
    assert four.samples_to_target == pytest.approx((100 + 100 * 2 / 3) / 2)
    assert four.seconds_to_target == pytest.approx((1 + 2 * 2 / 3) / 2)
    assert four.seconds_range == (1.0, pytest.approx(4 / 3))
    assert four.last_loss == 1.25
    assert sixteen.seconds_to_target == pytest.approx((0.75 + 1.0) / 2)
    assert (sixty_four.failed, sixty_four.seconds_to_target, sixty_four.last_loss) == ("1 diverged", None, None)
    text = " ".join(sweep.findings)
    assert "Fastest to the loss 3: an effective batch of 16" in text
    assert "Fewest samples to it: an effective batch of 4" in text
    assert "64 (sqrt, seed 0): diverged" in text
    assert "not worth it" not in text  # the fastest accumulates
    unreached = dataclasses.replace(sweep, asked_target_loss=0.1)
    assert "No effective batch reached the loss 0.1 with every seed." in " ".join(unreached.findings)
    single = dataclasses.replace(sweep, runs=(sweep.runs[0], run(16, [5.0, 4.0, 2.0], 5.0)))
    assert "Accumulation was not worth it here" in " ".join(single.findings)
    assert "one seed" in " ".join(single.findings)


def test_runs_survive_json() -> None:
    one = run(4, [5.0, math.inf], 1.0)
    again = Run.from_dict(json.loads(json.dumps(one.to_dict(), allow_nan=False)))
    assert again.points[0] == one.points[0]
    assert math.isnan(again.points[1].loss)


def test_a_loss_of_evaluation_mode_that_is_no_number_is_passed_over() -> None:
    one = run(4, [5.0, math.inf, 3.0, 1.0], 1.0)
    assert one.reaches(3.0) == (200.0, 2.0)
    assert one.reaches(2.0) == (250.0, 2.5)
    sweep = sweep_of([one, run(16, [5.0, math.nan], 1.0)])
    assert sweep.target_loss == 5.0
    assert sweep.rows[1].last_loss is None
    json.dumps(sweep.to_dict(), allow_nan=False)


# ---- the critical batch ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_critical_batch_is_the_largest_that_loses_nothing(seeds: int) -> None:
    ends = {4: 1.0, 8: 1.0, 16: 1.0, 32: 1.5, 64: 2.0}
    result = sweep_of([noisy(batch, end, 0.005, seed) for batch, end in ends.items() for seed in range(seeds)])
    critical = result.critical_batch
    assert critical is not None
    assert [one.verdict for one in critical.comparisons] == [None, *["loses nothing"] * 2, "loses", "loses"]
    assert critical.effective_batch == 16
    assert critical.comparisons[3].excess == pytest.approx(0.5, abs=0.05)
    assert 0 < (critical.comparisons[3].error or 0) < 0.1
    text = next(finding for finding in result.findings if finding.startswith("Critical batch"))
    assert text.startswith("Critical batch over this training: 16 is the largest effective batch that loses nothing. ")
    assert ("from 3 seeds" if seeds == 3 else "from the scatter of the last evaluations of one seed") in text
    assert result.to_dict()["critical_batch"]["effective_batch"] == 16


def test_errors_of_seeds_are_those_of_student() -> None:
    ends = {4: (1.0, 1.9), 16: (1.2, 2.2)}  # differences of 0.2 and 0.3
    runs = [run(batch, [9.0, end], 1.0, seed=i) for batch, of_seeds in ends.items() for i, end in enumerate(of_seeds)]
    critical = sweep_of(runs).critical_batch
    assert critical is not None
    standard_error = 0.05  # sqrt(0.1**2 / 2) / sqrt(2), of the mean of two numbers 0.1 apart
    assert critical.comparisons[1].error == pytest.approx(12.71 * standard_error)
    assert critical.comparisons[1].excess == pytest.approx(0.25)
    assert critical.comparisons[1].verdict == "loses nothing"


def test_the_end_is_that_of_a_line_at_equal_samples() -> None:
    falling = [5.0 - 0.1 * i for i in range(21)]
    longer = run(4, falling + falling[-1:] * 4, 1.0)
    critical = sweep_of([longer, run(16, falling, 1.0)]).critical_batch
    assert critical is not None
    assert [one.loss for one in critical.comparisons] == [pytest.approx(3.0)] * 2


@pytest.mark.parametrize(
    ("runs", "effective_batch", "words"),
    [
        ([noisy(4, 1, 0.005), noisy(16, 1, 0.005)], 16, "and the largest that was compared, so the critical batch may"),
        ([noisy(4, 1, 0.005), noisy(16, 2, 0.005)], None, "below 16, since no batch above 4 loses nothing"),
        ([noisy(4, 1, 0.5), noisy(16, 1, 0.5)], None, ": undecidable, since no error is known to be less than a tenth"),
        ([run(4, [5.0, 1.0], 1.0), run(16, [5.0, 1.0], 1.0)], None, r"undecided \(\+0, error not known\)"),
        ([noisy(4, 1, 0.005), noisy(16, 1, 0.005, status="diverged")], None, r"16 \(sqrt\) diverged"),
        (
            [noisy(4, 1, 0.5), noisy(16, 1, 0.5), noisy(64, 4.5, 0.1)],
            None,
            ": below 64, and otherwise undecidable, since no error is known",
        ),
        ([noisy(4, 2, 0.005), noisy(16, 1, 0.005)], 16, "16 does better than smaller ones shows that their learning"),
        (
            [noisy(4, 1, 0.005), noisy(16, 2, 0.005), noisy(16, 1, 0.005, rule="linear")],
            16,
            r"16 \(linear\) loses nothing",
        ),
    ],
    ids=["all", "none", "noise", "unknown", "diverged", "part", "better", "best rule"],
)
def test_what_the_critical_batch_says(runs: list[Run], effective_batch: int | None, words: str) -> None:
    result = sweep_of(runs, start_sha256="1234")
    assert result.critical_batch is not None
    assert result.critical_batch.effective_batch == effective_batch
    text = next(finding for finding in result.findings if finding.startswith("Critical batch"))
    assert text.startswith("Critical batch from the checkpoint on: ")
    assert re.search(words, text)
    json.dumps(result.to_dict(), allow_nan=False)


def test_without_two_batches_there_is_no_critical_one() -> None:
    for runs in (
        [noisy(4, 1, 0.1)],
        [noisy(4, 1, 0.1, status="diverged"), noisy(16, 1, 0.1)],
        [noisy(4, 1, 0.1), noisy(16, 1, 0.1, status="out of memory", points=())],
        [noisy(4, 1, 0.1, status="diverged"), noisy(16, 1, 0.1, status="diverged")],
    ):
        assert sweep_of(runs).critical_batch is None
        assert not any("Critical" in finding for finding in sweep_of(runs).findings)
    assert sweep_of(runs).findings[0].startswith("No run finished, so there is no loss to compare at")
