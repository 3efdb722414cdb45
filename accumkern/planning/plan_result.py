"""What ``accumkern.plan`` returns, and its reasons in words."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from accumkern.out_of_memory import format_bytes
from accumkern.planning.advice import attach_line, settings_of, verdict_reason
from accumkern.planning.fit import Fit, fit_reasons
from accumkern.planning.noise import Batch, Noise, noise_reason
from accumkern.planning.precision import buffer_reason, masters_reason
from accumkern.planning.predict import DEVICES, Prediction
from accumkern.planning.scaling_laws import BatchLaws
from accumkern.planning.speed import Speed, Split, accumulation_reason, fast_reason
from accumkern.planning.token_budget import Schedule, law_reasons, schedule_of, schedule_reasons, target_reason


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
        choice: for the ranks there are.
        by_ranks: how it changes with others.
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
        bfloat16_numel: elements of the bfloat16 weights that are trained.
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
        return f"measured on: {device}" + (f", on {self.choice.ranks} ranks" if self.choice.ranks > 1 else "")

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


def explain(plan: Plan) -> Plan:
    """Return the plan with its reasons and settings."""
    parts = (_memory, _speed, _target, _accumulation, _noise, _laws, _verdict, _schedule, _buffer, _masters, _ranks)
    reasons = tuple(reason for part in parts for reason in part(plan))
    settings = settings_of(_way(plan), plan.target, plan.attach_line, plan.buffer, plan.master_weights, plan.adam)
    return dataclasses.replace(plan, reasons=reasons, settings=tuple(settings))


def with_schedule(plan: Plan) -> Plan:
    """Return a plan that has laws with its schedule, and with reasons."""
    assert plan.laws is not None
    way = Split(plan.choice.ranks, plan.choice.micro_batch, plan.choice.accumulation_steps)
    return explain(dataclasses.replace(plan, schedule=schedule_of(plan.laws, way)))


def _memory(plan: Plan) -> Iterator[str]:
    allowed = format_bytes(plan.memory_limit_bytes * (1 - plan.margin))
    limit = f"{allowed} ({format_bytes(plan.memory_limit_bytes)} less a margin of {plan.margin:.0%})"
    how = "fits" if plan.fit is not None else "is predicted to fit"
    size = plan.largest_micro_batch
    if plan.is_limited_by_memory:
        what = f"a micro-batch of up to {size} samples"
    else:
        is_of_data = plan.fit is not None and plan.fit.data_problem is not None
        largest = "the largest that there is data for" if is_of_data else "the largest that was to be tried"
        if not is_of_data and plan.target is None:
            largest += " (--largest-micro-batch)"
        what = f"memory is not the limit. A micro-batch of {size} samples, {largest},"
    yield f"What fits: {what} {how} into {limit}."
    if plan.fit is not None:
        yield from fit_reasons(plan.fit)
        yield (
            f"Expected memory: a peak of {format_bytes(plan.choice.memory_bytes)}, measured while it trained with "
            f"micro-batches of {plan.choice.micro_batch}."
        )
    else:
        yield from _predicted(plan)
    if plan.prediction_error is not None:
        yield (
            f"Without the device: peaks predicted on fake tensors are within {100 * plan.prediction_error:.1f}% of the "
            "measured ones."
        )
    if plan.prediction_problem is not None:
        yield f"Without the device: {plan.prediction_problem}."


def _predicted(plan: Plan) -> Iterator[str]:
    of = next((of for of in plan.predictions if of.micro_batch == plan.choice.micro_batch), None)
    if of is not None and of.memory.total > of.low:
        yield (
            f"Expected memory: {format_bytes(of.low)} to {format_bytes(of.memory.total)} with micro-batches of "
            f"{of.micro_batch}. Tensors alone take the least; the most has what kernels such as convolutions need "
            "inside themselves, as far as it is known of torch's CPU kernels, and decides what fits."
        )
    if plan.machine["device"] == DEVICES["cuda"]:
        yield (
            "Predicted for a GPU, with fused attention and an optimizer that steps many parameters at a time. CUDA's "
            "context and workspaces are not in it; leave a margin. --device cpu (device='cpu') predicts for a CPU."
        )


def _speed(plan: Plan) -> list[str]:
    if plan.knee is None:
        return [
            "What is fast: not measured. Micro-batches of half the largest that fits or more are taken to be as fast; "
            "measure on the device."
        ]
    return [fast_reason(_way(plan), plan.speeds, plan.knee)]


def _target(plan: Plan) -> list[str]:
    choice = plan.choice
    if plan.target is None:
        if plan.by_laws is not None:
            return [target_reason(plan.by_laws, choice.effective_batch)]
        if plan.noise is None or plan.noise.basis is None:
            reason = (
                "Effective batch: none was asked for, and no noise scale is known to choose it by, so this is one "
                "micro-batch on each rank, "
            )
            if plan.knee is not None:
                return [reason + "the smallest that is fast, without accumulation."]
            return [
                reason + "the largest that fits, without accumulation. That it fits is no reason to train with it: "
                "ask for the effective batch of your recipe."
            ]
        reason = (
            f"Effective batch: none was asked for. One of {choice.effective_batch} trains in about the least time that "
            "speed and noise allow, by the model below"
        )
        if plan.knee is not None and choice.micro_batch < plan.knee:
            reason += ": a larger batch trains more samples per second, but needs still more of them"
        return [reason + "."]
    if choice.effective_batch == plan.target:
        return [f"Effective batch: the {plan.target} that was asked for is kept exactly."]
    smallest = min((speed.micro_batch for speed in plan.speeds), default=1)
    if choice.accumulation_steps == 1 and plan.target < choice.effective_batch == choice.ranks * smallest:
        return [
            f"Effective batch: {choice.effective_batch}, more than the {plan.target} that was asked for, because each "
            f"of {_count(choice.ranks)} trains {choice.micro_batch} at least."
        ]
    return [
        f"Effective batch: {choice.effective_batch}, the nearest to the {plan.target} that was asked for. No "
        f"micro-batch on {_count(choice.ranks)} divides {plan.target} at a good speed; if it has to be exact, take a "
        "micro-batch that divides it and accept the time, or make the last micro-batch of the window smaller and "
        "weigh it with acc.scale."
    ]


def _accumulation(plan: Plan) -> list[str]:
    if not plan.speeds or plan.choice.accumulation_steps == 1:
        return []
    return [accumulation_reason(_way(plan), plan.speeds)]


def _noise(plan: Plan) -> list[str]:
    if plan.noise is None:
        return ["What helps training: the gradient noise scale was not measured."]
    reasons = [noise_reason(plan.noise, plan.choice.effective_batch)]
    if plan.noise.noise_scale in (0, math.inf):
        return reasons
    low, most = plan.choice.useful_low, plan.choice.useful_high
    if low is not None and most is not None:
        upper = "on, with no upper end in sight" if math.isinf(most) else f"to {most:.0f}"
        reasons.append(
            f"Useful effective batches on {_count(plan.choice.ranks)}: from {low:.0f} {upper}, where time to train is "
            "within 10% of the best. This is an order of magnitude: the noise scale grows while the model trains, its "
            "model is of plain gradient steps, and it is disputed (arXiv 2505.23971). A sweep is the proof."
        )
    return reasons


def _laws(plan: Plan) -> Iterator[str]:
    if plan.laws is not None:
        noise_scale = None if plan.noise is None else plan.noise.noise_scale
        yield from law_reasons(plan.laws, plan.choice.effective_batch, noise_scale)


def _schedule(plan: Plan) -> Iterator[str]:
    if plan.laws is not None and plan.schedule is not None:
        yield from schedule_reasons(plan.schedule, plan.laws, plan.choice.effective_batch)


def _verdict(plan: Plan) -> list[str]:
    return [verdict_reason(_way(plan), plan.accumulation_pays, plan.by_laws is not None, plan.adam)]


def _buffer(plan: Plan) -> list[str]:
    reason = buffer_reason(plan.buffer, plan.choice.accumulation_steps)
    return [] if reason is None else [reason]


def _masters(plan: Plan) -> list[str]:
    if not plan.bfloat16_numel:
        return []
    return [masters_reason(plan.master_weights, plan.master_problem, plan.bfloat16_numel, plan.step_bytes, plan.adam)]


def _ranks(plan: Plan) -> list[str]:
    if not plan.gradient_bytes:
        return []
    batch = plan.choice.effective_batch
    others = [f"{of.effective_batch} on {of.ranks}" for of in plan.by_ranks if of.effective_batch != batch]
    if not others:
        what = "each accumulates less for the same effective batch"
    elif plan.target is None:
        what = "the effective batch is chosen for each number of ranks in the same way"
    else:
        what = f"each accumulates less for the same effective batch, or for the nearest ({', '.join(others)})"
    return [
        f"More ranks: {what}. Speeds leave out the reduction of "
        f"{format_bytes(plan.gradient_bytes)} of gradients per step, and memory on several ranks has that much for the "
        "buckets of DistributedDataParallel, where the model was not wrapped yet."
    ]


def _way(plan: Plan) -> Split:
    return Split(plan.choice.ranks, plan.choice.micro_batch, plan.choice.accumulation_steps)


def _count(ranks: int) -> str:
    return "one rank" if ranks == 1 else f"{ranks} ranks"
