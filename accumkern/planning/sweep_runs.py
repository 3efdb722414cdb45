"""A run of a sweep: what it is planned as, what is kept of it, and the file that holds that."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Planned:
    """What makes a run of a sweep another one; the attributes are those of :class:`Run`."""

    effective_batch: int
    rule: str
    weight_decay_rule: str
    seed: int

    @property
    def rules(self) -> str:
        """For people; that of the weight decay only where it changes."""
        return ", weight decay ".join(self._rules)

    @property
    def words(self) -> str:
        """For people."""
        return f"batch {self.effective_batch}, {self.rules}, seed {self.seed}"

    @property
    def file_name(self) -> str:
        """Of the JSON file."""
        return f"batch-{self.effective_batch}_{'_'.join(self._rules)}_seed-{self.seed}.json"

    @property
    def _rules(self) -> list[str]:
        return [self.rule] if self.weight_decay_rule == "none" else [self.rule, self.weight_decay_rule]


@dataclass(frozen=True)
class Point:
    """The loss at a moment of a run.

    Attributes:
        samples: trained so far.
        seconds: trained so far.
        loss: on the validation samples, in evaluation mode; NaN or infinite where it is not a number.
        training_loss: mean over the samples trained since the point before; None at the first point.
    """

    samples: int
    seconds: float
    loss: float
    training_loss: float | None = None


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
        weight_decay_rule: how the weight decay follows the effective batch.
        weight_decay: of the optimizer's first group that has one; None where no group has.
        jobs: runs that trained at once on this machine, this one included.
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
    weight_decay_rule: str = "none"
    weight_decay: float | None = None
    jobs: int = 1

    @property
    def planned(self) -> Planned:
        """What it was planned as."""
        return Planned(self.effective_batch, self.rule, self.weight_decay_rule, self.seed)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data for JSON: a loss that is not finite becomes None."""
        data: dict[str, Any] = plain(dataclasses.asdict(self))
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Run:
        """Return what :meth:`to_dict` made a dictionary of; a loss of None becomes NaN.

        Raises:
            KeyError, TypeError: it is another dictionary.
        """

        def number(value: float | None) -> float:
            return math.nan if value is None else value

        points = [
            Point(
                point["samples"],
                point["seconds"],
                number(point["loss"]),
                number(point["training_loss"]) if i > 0 else None,
            )
            for i, point in enumerate(data["points"])
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
                part = (before.loss - loss) / (before.loss - after.loss) if math.isfinite(before.loss) else 1.0
                return (
                    before.samples + part * (after.samples - before.samples),
                    before.seconds + part * (after.seconds - before.seconds),
                )
        return None


def read_run(path: Path, planned: Planned) -> Run:
    """Return the run that a file holds.

    Raises:
        ValueError: the file is damaged, or holds another run.
    """
    cure = "delete it to train that run again"
    try:
        run = Run.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not what a run of a sweep writes ({error!r}); {cure}") from error
    if run.planned != planned:
        raise ValueError(f"{path} holds another run ({run.planned.words}); {cure}")
    return run


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file so that nobody ever finds half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def plain(data: Any) -> Any:
    """Return what JSON makes of data, with None for numbers that it does not have: infinite ones and NaN."""
    return json.loads(json.dumps(data), parse_constant=lambda _: None)
