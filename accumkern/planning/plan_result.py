"""What ``accumkern.plan`` returns."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from accumkern.planning.advice import attach_line
from accumkern.planning.fit import Fit
from accumkern.planning.link import Exchange
from accumkern.planning.noise import Batch, Noise
from accumkern.planning.predict import Prediction
from accumkern.planning.scaling_laws import BatchLaws
from accumkern.planning.speed import Speed, Split
from accumkern.planning.token_budget import Schedule


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


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to train with, and why; made by :func:`accumkern.plan`.

    Attributes:
        choice: for the ranks there are, or that were asked for.
        by_ranks: how it changes with others; itself alone where the model is sharded.
        target: the effective batch that was asked for; None where the plan chose it.
        buffer: for :func:`accumkern.attach`; None where stock PyTorch accumulates in FP32 already.
        master_weights: likewise; None steps the weights as they are.
        master_problem: why bfloat16 weights have no masters; None where they have, or where none were asked for.
        attach: whether to call it: there is something to accumulate and a buffer to do it in, or there are masters.
        accumulation_pays: whether the effective batch trains faster than one of a single micro-batch would; None where
            noise or speed were not measured.
        reasons: in words.
        warnings: likewise.
        settings: what is to be set beside micro-batch and accumulation steps, in words and as lines of code.
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
        laws: what published laws say of the batch for the budget of tokens; None without one.
        schedule: when to raise the batch in such a run; None where it was not asked for.
        tokens_per_sample: of the setup.
        gradient_bytes: of all parameters together, in their own dtypes.
        measured_ranks: that it was measured on; 1 where nothing was.
        exchange: what the ranks exchange; None where there is one rank, or where how fast they do was neither told nor
            measured.
        bfloat16_numel: elements of the bfloat16 weights that are trained, on a rank.
        step_bytes: of the FP32 weights and gradients that a step with master weights makes at a time.
        adam: whether the optimizer's settings have Adam's betas.
        machine: what it was measured on.
    """

    choice: Choice
    by_ranks: tuple[Choice, ...]
    target: int | None
    buffer: str | None
    master_weights: str | None
    master_problem: str | None
    attach: bool
    accumulation_pays: bool | None = None
    reasons: tuple[str, ...] = ()
    warnings: tuple[str, ...]
    settings: tuple[str, ...] = ()
    memory_limit_bytes: int
    margin: float
    largest_micro_batch: int
    is_limited_by_memory: bool
    fit: Fit | None = None
    predictions: tuple[Prediction, ...]
    prediction_problem: str | None = None
    speeds: tuple[Speed, ...] = ()
    knee: int | None = None
    noise: Noise | None = None
    batches: tuple[Batch, ...] = ()
    laws: BatchLaws | None = None
    schedule: Schedule | None = None
    tokens_per_sample: float | None
    gradient_bytes: int
    measured_ranks: int
    exchange: Exchange | None = None
    bfloat16_numel: int
    step_bytes: int
    adam: bool
    machine: dict[str, str]

    @property
    def attach_line(self) -> str | None:
        """The call of :func:`accumkern.attach`; None where there is no reason for it."""
        return attach_line(self.buffer, self.master_weights, self.choice.accumulation_steps) if self.attach else None

    @property
    def basis(self) -> str:
        """What it was measured on, or predicted for."""
        device = self.machine["device"]
        if self.fit is None:
            return device.removeprefix("none: ")
        there, planned = self.measured_ranks, self.choice.ranks
        on = f", on {there} ranks" if there > 1 else f", on one rank for {planned}" if planned > 1 else ""
        return f"measured on: {device}{on}"

    @property
    def way(self) -> Split:
        """How the ranks share the effective batch."""
        return Split(self.choice.ranks, self.choice.micro_batch, self.choice.accumulation_steps)

    @property
    def headline(self) -> str:
        """Micro-batch, accumulation steps, ranks, and the effective batch that they make."""
        c = self.choice
        split = f"micro-batch {c.micro_batch}, accumulation steps {c.accumulation_steps}, ranks {c.ranks}"
        return f"{split}: effective batch {c.effective_batch}"

    @property
    def by_laws(self) -> BatchLaws | None:
        """The laws, where they chose the effective batch: none was asked for, and they were fitted on such runs."""
        return self.laws if self.target is None and self.laws is not None and self.laws.best_samples else None

    @property
    def prediction_error(self) -> float | None:
        """The largest relative error of the predicted peaks against the measured ones; None without both."""
        if self.fit is None:
            return None
        measured = {trial.micro_batch: trial.peak_bytes for trial in self.fit.trials if trial.fits}
        predicted = {prediction.micro_batch: prediction.memory.total for prediction in self.predictions}
        return max((abs(predicted[size] / measured[size] - 1) for size in predicted.keys() & measured), default=None)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data for JSON: infinite numbers become None."""
        names = ("attach_line", "basis", "headline", "prediction_error")
        own = {name: getattr(self, name) for name in names}
        data = dataclasses.asdict(self) | own
        for entry in data["speeds"]:
            entry["samples_per_second"] = entry["micro_batch"] / entry["seconds"]
        for entry in data["predictions"]:
            entry["memory"]["total"] = sum(entry["memory"].values())
        plain: dict[str, Any] = json.loads(json.dumps(data), parse_constant=lambda _: None)
        return plain

    def __str__(self) -> str:
        reasons = [f"- {reason}" for reason in self.reasons] + [f"- warning: {warning}" for warning in self.warnings]
        settings = [f"  {setting}" for setting in self.settings]
        return "\n".join([self.basis, self.headline, *reasons, f"What to set: {self.headline}", *settings])
