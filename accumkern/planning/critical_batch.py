"""The critical batch as it was measured: the largest effective batch that loses nothing beyond its error.

Runs with equal samples and several effective batches are compared at their end (arXiv 2505.23971; without the model of
a noise scale). Of each batch the best learning-rate and weight-decay rule counts.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from accumkern.planning.sweep_runs import Run

_LAST = 0.25  # of the samples: where the evaluations lie through which the line goes
_DECISIVE = 0.1  # of what training brought the loss down by; with a larger error nothing is decided
#: 97.5% quantiles of Student's t for 1, 2, ... degrees of freedom; more are taken for the last.
_STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
_LEAST_POINTS = 3  # for a line, and what is left of them beside it

NOTHING, LOSES, UNDECIDED = "loses nothing", "loses", "undecided"


@dataclass(frozen=True)
class Comparison:
    """An effective batch against the best of the smaller ones.

    Attributes:
        effective_batch: samples between two optimizer steps.
        rules: of learning rate and weight decay; those of its best runs.
        loss: at the end; mean over seeds, each the end of a straight line through the last quarter's evaluations.
            Infinite where no rule's runs all finished.
        excess: how much more that is than the lowest of a smaller batch; None where there is none.
        error: half of a 95% interval of ``excess``; None where nothing is known of it.
        verdict: ``"loses"``, ``"loses nothing"`` or ``"undecided"``; None where no smaller batch finished.
    """

    effective_batch: int
    rules: str
    loss: float
    excess: float | None = None
    error: float | None = None
    verdict: str | None = None

    @property
    def words(self) -> str:
        """For people."""
        if self.excess is None or math.isinf(self.loss):
            return f"{self.effective_batch} ({self.rules}) diverged"
        error = "error not known" if self.error is None else f"error {self.error:.2g}"
        return f"{self.effective_batch} ({self.rules}) {self.verdict} ({self.excess:+.2g}, {error})"


@dataclass(frozen=True)
class CriticalBatch:
    """What follows from a sweep's runs.

    Attributes:
        effective_batch: the largest that loses nothing against the best of the smaller ones; None where none does.
        gain: how much training brought the loss down by, at best.
        seeds: of each batch; with one, errors come from the scatter of the last evaluations.
        comparisons: one for each effective batch.
    """

    effective_batch: int | None
    gain: float
    seeds: int
    comparisons: tuple[Comparison, ...]

    def finding(self, where: str) -> str:
        """Return what follows, in words; ``where`` names the part of training that it holds for."""
        smallest = next(one for one in self.comparisons if one.verdict is None)
        larger = [one for one in self.comparisons if one.effective_batch > smallest.effective_batch]
        if self.effective_batch is not None:
            head = f"{self.effective_batch} is the largest effective batch that loses nothing"
            if self.effective_batch == larger[-1].effective_batch:
                head += ", and the largest that was compared, so the critical batch may lie above"
        elif larger[0].verdict == LOSES:
            head = f"below {larger[0].effective_batch}, since no batch above {smallest.effective_batch} loses nothing"
        else:
            losing = [one.effective_batch for one in larger if one.verdict == LOSES]
            head = f"below {losing[0]}, and otherwise undecidable" if losing else "undecidable"
            head += (
                ", since no error is known to be less than a tenth of what training brought the loss down by; take "
                "more evaluations, samples or seeds"
            )
        if self.seeds > 1:
            source = f"errors are 95% intervals from {self.seeds} seeds"
        else:
            source = (
                "errors are 95% intervals from the scatter of the last evaluations of one seed, and say nothing of "
                "another one; several seeds decide better"
            )
        better = [one for one in larger if one.error is not None and one.excess is not None and one.excess < -one.error]
        hint = ""
        if better:
            hint = (
                f" That {better[0].effective_batch} does better than smaller ones shows that their learning rate is "
                "not the best: try other rules, or another base_batch."
            )
        return (
            f"Critical batch {where}: {head}. The loss at the end was {smallest.loss:.4g} with an effective batch of "
            f"{smallest.effective_batch} ({smallest.rules}); compared with the best smaller batch: "
            f"{', '.join(one.words for one in larger)}. Training brought the loss down by {self.gain:.2g}; "
            f"{source if any(one.error is not None for one in larger) else 'no error is known'}.{hint}"
        )


def critical_batch(runs: Sequence[Run]) -> CriticalBatch | None:
    """Return what runs with equal samples say; None where fewer than two effective batches can be compared.

    A batch whose runs diverged with every rule loses; runs that ran out of memory say nothing.
    """
    groups: dict[tuple[int, str], list[Run]] = {}
    for run in runs:
        if run.status != "out of memory":
            groups.setdefault((run.effective_batch, run.planned.rules), []).append(run)
    at = min((run.points[-1].samples for run in runs if run.status == "finished"), default=0)
    best: dict[int, tuple[float, str, dict[int, _End]]] = {}
    for (batch, rules), of_group in groups.items():
        is_complete = all(run.status == "finished" for run in of_group)
        ends = {run.seed: _end(run, at) for run in of_group} if is_complete else {}
        loss = statistics.fmean(end.loss for end in ends.values()) if ends else math.inf
        if batch not in best or loss < best[batch][0]:
            best[batch] = loss, rules, ends
    finite = sorted(batch for batch, (loss, _, _) in best.items() if math.isfinite(loss))
    if not finite or finite[0] == max(best):
        return None
    gain = _first_loss(runs) - min(loss for loss, _, _ in best.values())
    over_seeds = _error_over_seeds([best[batch][2] for batch in finite])
    comparisons = []
    for batch, (loss, rules, ends) in sorted(best.items()):
        smaller = min((size for size in finite if size < batch), key=lambda size: best[size][0], default=None)
        made = Comparison(batch, rules, loss)
        if math.isinf(loss):
            made = Comparison(batch, rules, loss, math.inf, None, LOSES)
        elif smaller is not None:
            excess, error = loss - best[smaller][0], over_seeds
            if error is None:
                error = _error_of_evaluations([*best[smaller][2].values(), *ends.values()])
            made = Comparison(batch, rules, loss, excess, error, _verdict(excess, error, gain))
        comparisons.append(made)
    harmless = [one.effective_batch for one in comparisons if one.verdict == NOTHING]
    return CriticalBatch(max(harmless, default=None), gain, len({run.seed for run in runs}), tuple(comparisons))


def _first_loss(runs: Sequence[Run]) -> float:
    first = [run.points[0].loss for run in runs if run.points and math.isfinite(run.points[0].loss)]
    return statistics.fmean(first) if first else math.nan


def _verdict(excess: float, error: float | None, gain: float) -> str:
    if error is None:
        return UNDECIDED
    if excess > error:
        return LOSES
    return NOTHING if error <= _DECISIVE * gain else UNDECIDED


class _End(NamedTuple):
    """A run's loss at the end: that of a straight line through its last evaluations, and what these scatter by."""

    loss: float
    variance: float  # of the loss, from the scatter
    freedom: int  # degrees of it; 0 where nothing is known of the variance


def _end(run: Run, at: int) -> _End:
    """Return a run's loss after ``at`` samples."""
    points = [point for point in run.points if math.isfinite(point.loss)]
    last = [point for point in points if (1 - _LAST) * at < point.samples <= at]
    if len(last) < _LEAST_POINTS:
        nearest = min(points, key=lambda point: abs(point.samples - at), default=None)
        return _End(math.inf if nearest is None else nearest.loss, 0.0, 0)
    samples, losses = [point.samples for point in last], [point.loss for point in last]
    slope, intercept = statistics.linear_regression(samples, losses)
    squares = sum((loss - intercept - slope * x) ** 2 for x, loss in zip(samples, losses, strict=True))
    middle, freedom = statistics.fmean(samples), len(last) - 2
    leverage = 1 / len(last) + (at - middle) ** 2 / sum((x - middle) ** 2 for x in samples)
    return _End(intercept + slope * at, squares / freedom * leverage, freedom)


def _error_over_seeds(groups: Sequence[dict[int, _End]]) -> float | None:
    """Return half of a 95% interval of the difference of two batches' mean losses; None with fewer than two seeds.

    Batches share the initial weights and the samples of a seed, so what is common to all of them with that seed does
    not count: the variance is that of a table of batches and seeds around the means of its rows and columns.
    """
    seeds = set.intersection(*map(set, groups))
    freedom = (len(groups) - 1) * (len(seeds) - 1)
    if freedom <= 0:
        return None
    table = [[ends[seed].loss for seed in sorted(seeds)] for ends in groups]
    of_rows, of_columns = (
        [statistics.fmean(row) for row in table],
        list(map(statistics.fmean, zip(*table, strict=True))),
    )
    mean = statistics.fmean(of_rows)
    left = (
        x - a - b + mean for row, a in zip(table, of_rows, strict=True) for x, b in zip(row, of_columns, strict=True)
    )
    return _interval(sum(rest**2 for rest in left) / freedom * 2 / len(seeds), freedom)


def _error_of_evaluations(ends: Sequence[_End]) -> float | None:
    """Return half of a 95% interval of the difference between two runs' losses, by the scatter of their evaluations."""
    if not all(end.freedom for end in ends):
        return None
    return _interval(sum(end.variance for end in ends), sum(end.freedom for end in ends))


def _interval(variance: float, freedom: int) -> float:
    return _STUDENT[min(freedom, len(_STUDENT)) - 1] * math.sqrt(variance)
