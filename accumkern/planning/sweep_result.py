"""What ``accumkern.sweep`` returns: its runs, which files keep, the way to a target loss, and what follows."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

_LEARNT = 0.99  # of the first loss


@dataclass(frozen=True)
class Point:
    """The loss at a moment of a run.

    Attributes:
        samples: trained so far.
        seconds: trained so far.
        loss: on the validation samples; NaN or infinite where the run diverged.
    """

    samples: int
    seconds: float
    loss: float


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        effective_batch: samples between two optimizer steps.
        micro_batch: samples of one forward and backward pass.
        accumulation_steps: micro-batches between two optimizer steps.
        rule: of the learning rate.
        seed: of the random numbers.
        learning_rate: of the optimizer's first group.
        status: ``"finished"``, ``"diverged"`` or ``"out of memory"``.
        steps: of the optimizer.
        seconds: of training alone.
        peak_bytes: of a few windows before.
        points: the loss on the way.
    """

    effective_batch: int
    micro_batch: int
    accumulation_steps: int
    rule: str
    seed: int
    learning_rate: float
    status: str
    steps: int
    seconds: float
    peak_bytes: int
    points: tuple[Point, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data for JSON: a loss that is not finite becomes None."""
        data: dict[str, Any] = plain(dataclasses.asdict(self))
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Run:
        """Return what :meth:`to_dict` made a dictionary of; a loss of None becomes NaN."""
        points = [
            Point(p["samples"], p["seconds"], math.nan if p["loss"] is None else p["loss"]) for p in data["points"]
        ]
        return cls(**{**data, "points": tuple(points)})

    @property
    def best_loss(self) -> float:
        """The lowest on the way; infinite where there is none."""
        return min((point.loss for point in self.points if math.isfinite(point.loss)), default=math.inf)

    def reaches(self, loss: float) -> tuple[float, float] | None:
        """Return samples and seconds until the loss was reached first, in a straight line between points; else None."""
        if self.points and self.points[0].loss <= loss:
            return 0.0, 0.0
        for before, after in pairwise(self.points):
            if after.loss <= loss:
                part = (before.loss - loss) / (before.loss - after.loss)
                return (
                    before.samples + part * (after.samples - before.samples),
                    before.seconds + part * (after.seconds - before.seconds),
                )
        return None


@dataclass(frozen=True)
class Row:
    """The runs of an effective batch and a learning-rate rule, over seeds.

    Attributes:
        effective_batch: samples between two optimizer steps.
        rule: of the learning rate.
        learning_rate: of the optimizer's first group.
        accumulation_steps: micro-batches between two optimizer steps.
        runs: how many.
        failed: how many of them diverged or ran out of memory, in words; empty where none.
        samples_to_target: mean over the runs; None where one did not reach the target.
        seconds_to_target: likewise, and their least and most.
        seconds_range: the least and the most.
        last_loss: mean of the finished runs' last losses; None where none finished.
        peak_bytes: the most.
    """

    effective_batch: int
    rule: str
    learning_rate: float
    accumulation_steps: int
    runs: int
    failed: str
    samples_to_target: float | None
    seconds_to_target: float | None
    seconds_range: tuple[float, float] | None
    last_loss: float | None
    peak_bytes: int


@dataclass(frozen=True)
class Sweep:
    """All runs, made by :func:`accumkern.sweep`.

    Attributes:
        runs: in the order in which they ran.
        asked_target_loss: None where none was asked for.
        tokens_per_sample: of the setup.
        base_batch: the effective batch that the setup's learning rate is for.
        master_weights: of :func:`accumkern.attach` in all runs.
        master_problem: why bfloat16 weights have no masters; None where they have, or where none were asked for.
    """

    runs: tuple[Run, ...]
    asked_target_loss: float | None
    tokens_per_sample: float | None
    base_batch: int
    master_weights: str | None = None
    master_problem: str | None = None

    @property
    def learnt(self) -> bool:
        """Whether a run brought its loss down by one percent or more."""
        return any(run.points and run.best_loss < _LEARNT * run.points[0].loss for run in self.runs)

    @property
    def target_loss(self) -> float | None:
        """The target asked for, or the lowest loss that every finished run reached; None where nothing was learnt."""
        if self.asked_target_loss is not None:
            return self.asked_target_loss
        finished = [run.best_loss for run in self.runs if run.status == "finished"]
        return max(finished) if finished and self.learnt else None

    @property
    def rows(self) -> list[Row]:
        """A row for each effective batch and rule."""
        groups: dict[tuple[int, str], list[Run]] = {}
        for run in self.runs:
            groups.setdefault((run.effective_batch, run.rule), []).append(run)
        return [self._row(runs) for _, runs in sorted(groups.items())]

    def _row(self, runs: Sequence[Run]) -> Row:
        target = self.target_loss
        reached = [None if target is None else run.reaches(target) for run in runs]
        ways = [way for way in reached if way is not None]
        complete = len(ways) == len(runs)
        last = [run.points[-1].loss for run in runs if run.status == "finished"]
        failed = [run.status for run in runs if run.status != "finished"]
        seconds = [way[1] for way in ways]
        return Row(
            effective_batch=runs[0].effective_batch,
            rule=runs[0].rule,
            learning_rate=runs[0].learning_rate,
            accumulation_steps=runs[0].accumulation_steps,
            runs=len(runs),
            failed=", ".join(f"{failed.count(status)} {status}" for status in sorted(set(failed))),
            samples_to_target=statistics.fmean(way[0] for way in ways) if complete else None,
            seconds_to_target=statistics.fmean(seconds) if complete else None,
            seconds_range=(min(seconds), max(seconds)) if complete else None,
            last_loss=statistics.fmean(last) if last else None,
            peak_bytes=max(run.peak_bytes for run in runs),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data for JSON."""
        rows = [dataclasses.asdict(row) for row in self.rows]
        own = {"target_loss": self.target_loss, "rows": rows, "findings": self.findings}
        data: dict[str, Any] = plain(dataclasses.asdict(self) | own)
        return data

    @property
    def findings(self) -> list[str]:
        """What follows, in words."""
        findings = []
        reached = [row for row in self.rows if row.seconds_to_target is not None]
        if not self.learnt:
            findings.append(
                "Nothing was learnt: no run brought the loss down by 1%. Train with more samples, check the learning "
                "rate and the loss, and let the base batch be the one that the learning rate was chosen for."
            )
        elif not reached:
            findings.append(
                f"No effective batch reached the loss {self.target_loss:.4g} with every seed. Choose a higher target, "
                "or more samples."
            )
        else:
            fastest = min(reached, key=lambda row: row.seconds_to_target or 0.0)
            thriftiest = min(reached, key=lambda row: row.samples_to_target or 0.0)
            findings.append(
                f"Fastest to the loss {self.target_loss:.4g}: an effective batch of {fastest.effective_batch} (rule "
                f"{fastest.rule}, {fastest.accumulation_steps} accumulation steps), {fastest.seconds_to_target:.3g} s."
            )
            findings.append(
                f"Fewest samples to it: an effective batch of {thriftiest.effective_batch} (rule {thriftiest.rule}), "
                f"{thriftiest.samples_to_target:,.0f} samples."
            )
            if fastest.accumulation_steps == 1 and any(row.accumulation_steps > 1 for row in self.rows):
                findings.append("Accumulation was not worth it here: the fastest batch is a single micro-batch.")
        failed = [
            f"{run.effective_batch} ({run.rule}, seed {run.seed}): {run.status} after {run.steps} steps"
            for run in self.runs
            if run.status != "finished"
        ]
        if failed:
            findings.append(f"Not finished: {', '.join(failed)}.")
        if self.master_weights is not None:
            findings.append(
                f"All runs stepped FP32 master weights: attach with master_weights={self.master_weights!r}."
            )
        elif self.master_problem is not None:
            findings.append(f"No run had master weights: {self.master_problem}.")
        if len({run.seed for run in self.runs}) == 1:
            findings.append("There was one seed: small differences may be chance.")
        return findings


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file so that nobody ever finds half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")
    os.replace(temporary, path)


def plain(data: Any) -> Any:
    """Return what JSON makes of data, with None for numbers that it does not have: infinite ones and NaN."""
    return json.loads(json.dumps(data), parse_constant=lambda _: None)
