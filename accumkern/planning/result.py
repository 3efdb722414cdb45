"""What a plan consists of, and its plain text."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from accumkern.planning.files import finite
from accumkern.planning.fit import Fit
from accumkern.planning.noise import Noise
from accumkern.planning.predict import Memory
from accumkern.planning.throughput import Speed


@dataclass(frozen=True)
class Choice:
    """A plan for a number of data-parallel ranks.

    Attributes:
        ranks: that train with different data.
        micro_batch: samples of one forward and backward pass of a rank.
        accumulation_steps: micro-batches of a rank between two optimizer steps.
        effective_batch: samples between two optimizer steps, over all ranks.
        memory_bytes: peak of a rank.
        samples_per_second: of all ranks, without the time of communication; None where speed was not measured.
        useful_low: the smallest effective batch whose time to train is about the best; None where noise or speed were
            not measured.
        useful_high: the largest; infinite where there is no upper end.
    """

    ranks: int
    micro_batch: int
    accumulation_steps: int
    effective_batch: int
    memory_bytes: int
    samples_per_second: float | None
    useful_low: float | None
    useful_high: float | None


@dataclass(frozen=True)
class Batch:
    """What an effective batch costs, by speed and noise scale, on the ranks there are.

    Attributes:
        effective_batch: samples between two optimizer steps.
        samples_per_second: of all ranks.
        time: to train, over the least of all batches.
        time_low: the same with the lower end of the noise scale's interval.
        time_high: with the upper end.
    """

    effective_batch: int
    samples_per_second: float
    time: float
    time_low: float
    time_high: float


@dataclass(frozen=True)
class Prediction:
    """What a micro-batch needs, from fake tensors.

    Attributes:
        micro_batch: samples in it.
        memory: at the peak, by category.
    """

    micro_batch: int
    memory: Memory


@dataclass(frozen=True)
class Plan:
    """What to train with, and why; made by :func:`accumkern.plan`.

    Attributes:
        choice: for the ranks there are.
        by_ranks: how it changes with others.
        target: the effective batch that was asked for; None where the plan chose it.
        buffer: for :func:`accumkern.attach`; None where stock PyTorch accumulates in FP32 already.
        attach: whether to call it: there is something to accumulate, and a buffer to do it in.
        accumulation_pays: whether the effective batch trains faster than one of a single micro-batch would; None where
            noise or speed were not measured.
        reasons: in words.
        warnings: likewise.
        memory_limit_bytes: of the device, or as asked for.
        margin: the part of it that is left free.
        largest_micro_batch: that fits, or that was to be tried.
        is_limited_by_memory: whether memory was the reason to stop there.
        fit: what was tried; None where nothing was measured.
        predictions: from fake tensors.
        prediction_problem: why there are none.
        speeds: by micro-batch.
        knee: the smallest micro-batch that is about as fast as any; None where speed was not measured.
        noise: the gradient noise scale; None where it was not measured.
        batches: what effective batches cost; none where noise or speed were not measured.
        tokens_per_sample: of the setup.
        gradient_bytes: of all parameters together, in their own dtypes.
        adam: whether the optimizer's settings have Adam's betas.
        machine: what it was measured on.
    """

    choice: Choice
    by_ranks: tuple[Choice, ...]
    target: int | None
    buffer: str | None
    attach: bool
    accumulation_pays: bool | None
    reasons: tuple[str, ...]
    warnings: tuple[str, ...]
    memory_limit_bytes: int
    margin: float
    largest_micro_batch: int
    is_limited_by_memory: bool
    fit: Fit | None
    predictions: tuple[Prediction, ...]
    prediction_problem: str | None
    speeds: tuple[Speed, ...]
    knee: int | None
    noise: Noise | None
    batches: tuple[Batch, ...]
    tokens_per_sample: float | None
    gradient_bytes: int
    adam: bool
    machine: dict[str, str]

    @property
    def prediction_error(self) -> float | None:
        """The largest relative error of the predicted peaks against the measured ones; None without both."""
        if self.fit is None:
            return None
        measured = {trial.micro_batch: trial.peak_bytes for trial in self.fit.trials if trial.fits}
        errors = [
            abs(prediction.memory.total / measured[prediction.micro_batch] - 1)
            for prediction in self.predictions
            if prediction.micro_batch in measured
        ]
        return max(errors, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data for JSON: infinite numbers become None."""
        data = dataclasses.asdict(self) | {"prediction_error": self.prediction_error}
        for entry in data["speeds"]:
            entry["samples_per_second"] = entry["micro_batch"] / entry["seconds"]
        for entry in data["predictions"]:
            entry["memory"]["total"] = sum(entry["memory"].values())
        plain: dict[str, Any] = finite(data)
        return plain

    def __str__(self) -> str:
        c = self.choice
        lines = [
            f"micro-batch {c.micro_batch}, accumulation steps {c.accumulation_steps}, ranks {c.ranks}: "
            f"effective batch {c.effective_batch}"
        ]
        if self.attach:
            lines.append(f"accumkern.attach(optimizer, {self.buffer!r}, average_over={c.accumulation_steps})")
        lines += [f"- {reason}" for reason in self.reasons] + [f"- warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)
