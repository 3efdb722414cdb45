"""What ``accumkern.sweep`` returns: its runs, a row for each batch and rule, the way to a loss, and what follows."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from accumkern.planning.critical_batch import CriticalBatch, critical_batch
from accumkern.planning.sweep_runs import Planned, Run, plain

_LEARNT = 0.99  # of the first loss
_HIGH = 2.0  # times it


@dataclass(frozen=True)
class Row:
    """The runs of an effective batch, a learning-rate and a weight-decay rule, over seeds.

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
        weight_decay_rule: how the weight decay follows the effective batch.
        weight_decay: of the optimizer's first group that has one; None where no group has.
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
    weight_decay_rule: str
    weight_decay: float | None

    @property
    def rules(self) -> str:
        """For people; that of the weight decay only where it changes."""
        return Planned(self.effective_batch, self.rule, self.weight_decay_rule, 0).rules


@dataclass(frozen=True)
class Sweep:
    """All runs, made by :func:`accumkern.sweep`.

    Attributes:
        runs: in the order in which they ran.
        asked_target_loss: None where none was asked for.
        tokens_per_sample: of the setup.
        base_batch: the effective batch that the learning rate is for.
        master_weights: of :func:`accumkern.attach` in all runs.
        master_problem: why bfloat16 weights have no masters; None where they have, or where none were asked for.
        learning_rate: of the optimizer's first group, as the setup or the checkpoint has it.
        start_sha256: of the checkpoint that every run began with; None where they began with what the setup makes.
        same_weights: whether the setup makes the same ones whatever the seed.
    """

    runs: tuple[Run, ...]
    asked_target_loss: float | None
    tokens_per_sample: float | None
    base_batch: int
    master_weights: str | None = None
    master_problem: str | None = None
    learning_rate: float | None = None
    start_sha256: str | None = None
    same_weights: bool = False

    @property
    def learnt(self) -> bool:
        """Whether a run brought its loss down by one percent or more; from a checkpoint, at all."""
        part = _LEARNT if self.start_sha256 is None else 1.0
        return any(run.points and run.best_loss < part * run.points[0].loss for run in self.runs)

    @property
    def critical_batch(self) -> CriticalBatch | None:
        """The largest effective batch that loses nothing; None where fewer than two can be compared."""
        return critical_batch(self.runs)

    @property
    def target_loss(self) -> float | None:
        """The target asked for, or the lowest loss that every finished run reached; None where nothing was learnt."""
        if self.asked_target_loss is not None:
            return self.asked_target_loss
        finished = [run.best_loss for run in self.runs if run.status == "finished" and math.isfinite(run.best_loss)]
        return max(finished) if finished and self.learnt else None

    @property
    def rows(self) -> list[Row]:
        """A row for each effective batch and its rules."""
        groups: dict[tuple[int, str, str], list[Run]] = {}
        for run in self.runs:
            groups.setdefault((run.effective_batch, run.rule, run.weight_decay_rule), []).append(run)
        return [self._row(runs) for _, runs in sorted(groups.items())]

    def _row(self, runs: Sequence[Run]) -> Row:
        target = self.target_loss
        reached = [None if target is None else run.reaches(target) for run in runs]
        ways = [way for way in reached if way is not None]
        complete = len(ways) == len(runs)
        last = [run.points[-1].loss for run in runs if _finished(run)]
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
            last_loss=statistics.fmean(last) if last and all(map(math.isfinite, last)) else None,
            peak_bytes=max(run.peak_bytes for run in runs),
            weight_decay_rule=runs[0].weight_decay_rule,
            weight_decay=runs[0].weight_decay,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data for JSON."""
        rows = [dataclasses.asdict(row) for row in self.rows]
        critical = self.critical_batch
        own = {
            "target_loss": self.target_loss,
            "rows": rows,
            "critical_batch": None if critical is None else dataclasses.asdict(critical),
            "findings": self.findings,
        }
        data: dict[str, Any] = plain(dataclasses.asdict(self) | own)
        return data

    @property
    def findings(self) -> list[str]:
        """What follows, in words."""
        critical = self.critical_batch
        where = "over this training" if self.start_sha256 is None else "from the checkpoint on"
        return [
            *self._about_target(),
            *([] if critical is None else [critical.finding(where)]),
            *self._about_losses(),
            *self._about_settings(),
        ]

    def _about_target(self) -> list[str]:
        """Return what reached the target loss first."""
        reached = [row for row in self.rows if row.seconds_to_target is not None]
        if not self.learnt:
            found = "by 1%" if self.start_sha256 is None else "below that of the checkpoint"
            return [
                f"Nothing was learnt: no run brought the loss down {found}. Train with more samples, check the "
                "learning rate and the loss, and let the base batch be the one that the learning rate was chosen for."
            ]
        if self.target_loss is None:
            return ["No run finished, so there is no loss to compare at: lower the learning rate, or name a target."]
        if not reached:
            return [
                f"No effective batch reached the loss {self.target_loss:.4g} with every seed. Choose a higher target, "
                "or more samples."
            ]
        fastest = min(reached, key=lambda row: row.seconds_to_target or 0.0)
        thriftiest = min(reached, key=lambda row: row.samples_to_target or 0.0)
        findings = [
            f"Fastest to the loss {self.target_loss:.4g}: an effective batch of {fastest.effective_batch} (rule "
            f"{fastest.rules}, {fastest.accumulation_steps} accumulation steps), {fastest.seconds_to_target:.3g} s.",
            f"Fewest samples to it: an effective batch of {thriftiest.effective_batch} (rule {thriftiest.rules}), "
            f"{thriftiest.samples_to_target:,.0f} samples.",
        ]
        if fastest.accumulation_steps == 1 and any(row.accumulation_steps > 1 for row in self.rows):
            findings.append("Accumulation was not worth it here: the fastest batch is a single micro-batch.")
        return findings

    def _about_losses(self) -> list[str]:
        """Return which runs did not finish, and where losses are not what they seem."""
        findings = []
        failed = [f"{_name(run)}: {run.status} after {run.steps} steps" for run in self.runs if not _finished(run)]
        if failed:
            findings.append(f"Not finished: {', '.join(failed)}.")
        finished = [run for run in self.runs if _finished(run)]
        lagging = [run for run in finished if not all(p.loss <= _HIGH * run.points[0].loss for p in run.points[1:])]
        if lagging and lagging[0].points[0].loss > 0:
            findings.append(
                f"In evaluation mode the loss of {', '.join(map(_name, lagging))} was for a time more than twice that "
                "at the beginning. That is no divergence, which the training loss decides: running statistics, such as "
                "BatchNorm's, lag behind at first. The loss at the end counts, where they have caught up."
            )
        most = max((run.points[-1].samples for run in finished), default=0)
        short = {
            run.effective_batch: run.points[-1].samples for run in finished if run.points[-1].samples < 0.98 * most
        }
        if short:
            found = ", ".join(f"{batch} with {samples:,}" for batch, samples in short.items())
            findings.append(
                f"Not all trained with as many samples: effective batches of {found} of {most:,}, since only full "
                "windows count; let samples be a multiple of every effective batch."
            )
        return findings

    def _about_settings(self) -> list[str]:
        """Return what all runs had in common."""
        findings = []
        of_what = "setup()" if self.start_sha256 is None else "the checkpoint"
        if self.learning_rate is not None:
            is_smallest = all(run.effective_batch >= self.base_batch for run in self.runs)
            hint = ", the smallest; --base-batch (base_batch) names another" if is_smallest else ""
            findings.append(
                f"The learning rate of {of_what}, {self.learning_rate:.3g}, is taken to be for the base batch, "
                f"{self.base_batch}{hint}."
            )
        if self.master_weights is not None:
            findings.append(
                f"All runs stepped FP32 master weights: attach with master_weights={self.master_weights!r}."
            )
        elif self.master_problem is not None:
            findings.append(f"No run had master weights: {self.master_problem}.")
        seeds = len({run.seed for run in self.runs})
        if seeds == 1:
            findings.append("There was one seed: small differences may be chance.")
        elif self.start_sha256 is not None or self.same_weights:
            reason = "all runs begin with those of the checkpoint" if self.start_sha256 else "setup() makes no others"
            findings.append(f"The {seeds} seeds had the same initial weights ({reason}): they differ in their batches.")
        jobs = max((run.jobs for run in self.runs), default=1)
        if jobs > 1:
            findings.append(
                f"Seconds are of runs that shared the machine, up to {jobs} at once: compare them with each other with "
                "care, and with no other's. Samples and losses are not touched by that."
            )
        return findings


def _finished(run: Run) -> bool:
    return run.status == "finished"


def _name(run: Run) -> str:
    return f"{run.effective_batch} ({run.planned.rules}, seed {run.seed})"
