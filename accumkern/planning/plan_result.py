"""What ``accumkern.plan`` returns, and its reasons in words."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from accumkern.planning.memory import format_bytes
from accumkern.planning.noise import Batch, Noise, samples_factor, steps_factor
from accumkern.planning.predict import DEVICES, Prediction
from accumkern.planning.speed import Speed
from accumkern.planning.trial import Fit

_MASTER_BYTES = {"split24": 1, "split32": 2}  # per parameter, of a residual
_FEW_MICRO_BATCHES = 8  # the gain of FP32 accumulation may be invisible up to here


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
    tokens_per_sample: float | None
    gradient_bytes: int
    bfloat16_numel: int
    step_bytes: int
    adam: bool
    machine: dict[str, str]

    @property
    def attach_line(self) -> str | None:
        """The call of :func:`accumkern.attach`; None where there is no reason for it."""
        if not self.attach:
            return None
        arguments = ["optimizer", repr(self.buffer)]
        if self.master_weights is not None:
            arguments.append(f"master_weights={self.master_weights!r}")
        if self.choice.accumulation_steps > 1:
            arguments.append(f"average_over={self.choice.accumulation_steps}")
        return f"accumkern.attach({', '.join(arguments)})"

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
        own = {"attach_line": self.attach_line, "prediction_error": self.prediction_error}
        data = dataclasses.asdict(self) | own
        for entry in data["speeds"]:
            entry["samples_per_second"] = entry["micro_batch"] / entry["seconds"]
        for entry in data["predictions"]:
            entry["memory"]["total"] = sum(entry["memory"].values())
        plain: dict[str, Any] = json.loads(json.dumps(data), parse_constant=lambda _: None)
        return plain

    def __str__(self) -> str:
        c = self.choice
        lines = [
            f"micro-batch {c.micro_batch}, accumulation steps {c.accumulation_steps}, ranks {c.ranks}: "
            f"effective batch {c.effective_batch}"
        ]
        if self.attach_line is not None:
            lines.append(self.attach_line)
        lines += [f"- {reason}" for reason in self.reasons] + [f"- warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)


def explain(plan: Plan) -> Plan:
    """Return the plan with its reasons."""
    parts = (_memory, _speed, _target, _accumulation, _noise, _verdict, _buffer, _masters, _ranks)
    return dataclasses.replace(plan, reasons=tuple(reason for part in parts for reason in part(plan)))


def _memory(plan: Plan) -> Iterator[str]:
    allowed = format_bytes(plan.memory_limit_bytes * (1 - plan.margin))
    limit = f"{allowed} ({format_bytes(plan.memory_limit_bytes)} less a margin of {plan.margin:.0%})"
    how = "fits" if plan.fit is not None else "is predicted to fit"
    size = plan.largest_micro_batch
    if plan.is_limited_by_memory:
        what = f"a micro-batch of up to {size} samples"
    else:
        what = f"memory is not the limit. A micro-batch of {size} samples, the largest that was to be tried,"
    yield f"What fits: {what} {how} into {limit}."
    if plan.fit is not None:
        yield (
            f"Expected memory: a peak of {format_bytes(plan.choice.memory_bytes)}, measured over several windows with "
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
            "context and workspaces are not in it; leave a margin. device='cpu' predicts for a CPU."
        )


def _speed(plan: Plan) -> list[str]:
    if plan.knee is None:
        return [
            "What is fast: not measured. Micro-batches of half the largest that fits or more are taken to be as fast; "
            "measure on the device."
        ]
    best = max(plan.speeds, key=lambda speed: speed.limit_per_second)
    at_knee = next(speed for speed in plan.speeds if speed.micro_batch == plan.knee)
    return [
        f"What is fast: {at_knee.limit_per_second:.3g} samples per second with a micro-batch of {plan.knee}, the "
        f"smallest within 5% of the best ({best.limit_per_second:.3g} with {best.micro_batch}). Beyond it, more memory "
        "buys little."
    ]


def _target(plan: Plan) -> list[str]:
    choice = plan.choice
    if plan.target is None:
        if plan.noise is None:
            return ["Effective batch: none was asked for, so this is one micro-batch, without accumulation."]
        return [
            f"Effective batch: none was asked for. {choice.effective_batch} samples train in about the least time that "
            "speed and noise allow, by the model below."
        ]
    if choice.effective_batch == plan.target:
        return [f"Effective batch: the {plan.target} that was asked for is kept exactly."]
    return [
        f"Effective batch: {choice.effective_batch}, the nearest to the {plan.target} that was asked for. No "
        f"micro-batch on {_count(choice.ranks)} divides {plan.target} at a good speed; if it has to be exact, take a "
        "micro-batch that divides it and accept the time, or make the last micro-batch of the window smaller and "
        "weigh it with acc.scale."
    ]


def _accumulation(plan: Plan) -> list[str]:
    choice = plan.choice
    if not plan.speeds or choice.accumulation_steps == 1:
        return []
    own = next(speed for speed in plan.speeds if speed.micro_batch == choice.micro_batch)
    window = own.window_seconds(choice.accumulation_steps)
    reason = (
        f"Cost of accumulation: a window of {choice.accumulation_steps} micro-batches takes {window:.3g} s, of which "
        f"the optimizer's step is {100 * own.step_seconds / window:.1f}%"
    )
    largest = plan.speeds[-1]
    if largest.micro_batch != choice.micro_batch:
        per_rank = choice.micro_batch * choice.accumulation_steps
        other = largest.window_seconds(1) * per_rank / largest.micro_batch
        reason += f"; in micro-batches of {largest.micro_batch} the same samples would take about {other:.3g} s"
    return [reason + "."]


def _noise(plan: Plan) -> list[str]:
    if plan.noise is None:
        return ["What helps training: the gradient noise scale was not measured."]
    noise, batch = plan.noise, plan.choice.effective_batch
    if math.isinf(noise.noise_scale) or noise.noise_scale == 0:
        what = "only noise" if noise.noise_scale else "no noise"
        return [
            f"What helps training: {noise.windows} windows of {noise.batch} samples showed {what}; measure over more "
            "windows (noise_windows), or with a larger largest_micro_batch."
        ]
    high = "unbounded" if math.isinf(noise.high) else f"{noise.high:.3g}"
    reasons = [
        f"What helps training: the gradient noise scale is {noise.noise_scale:.3g} samples (80% interval "
        f"{noise.low:.3g} to {high}, from {noise.windows} windows, where the loss was about {noise.last_loss:.3g}). By "
        f"its model an effective batch of {batch} needs {samples_factor(batch, noise.noise_scale):.2g} times the "
        f"fewest samples and {steps_factor(batch, noise.noise_scale):.2g} times the fewest steps.",
    ]
    low, most = plan.choice.useful_low, plan.choice.useful_high
    if low is not None and most is not None:
        upper = "no upper end in sight" if math.isinf(most) else f"to {most:.0f}"
        reasons.append(
            f"Useful effective batches on {_count(plan.choice.ranks)}: from {low:.0f} {upper}, where time to train is "
            "within 10% of the best. This is an order of magnitude: the noise scale grows while the model trains, its "
            "model is of plain gradient steps, and it is disputed (arXiv 2505.23971). A sweep is the proof."
        )
    return reasons


def _verdict(plan: Plan) -> list[str]:
    choice = plan.choice
    if choice.accumulation_steps == 1:
        return ["Accumulation: not needed; the effective batch is one micro-batch."]
    smaller = choice.ranks * choice.micro_batch
    beta2 = ""
    if plan.adam:
        power = smaller / choice.effective_batch
        beta2 = f", with Adam's beta2 raised to the power {power:.3g} so that it forgets as many samples as before,"
    advice = (
        f"an effective batch of {smaller}, without accumulation{beta2} and its own learning rate, often trains as well "
        "per sample (arXiv 2507.07101)"
    )
    if plan.accumulation_pays:
        return [
            "Accumulation: worth it here. Its windows spread the optimizer's step over more samples than the noise "
            "scale says they waste."
        ]
    if plan.accumulation_pays is False:
        return [
            f"Accumulation: probably not worth it here. It makes no sample faster, and {advice}. Accumulate if the "
            "recipe needs the batch, if ranks have to communicate less often, or if a sweep says so."
        ]
    return [f"Accumulation: whether it is worth it was not measured; {advice}."]


def _buffer(plan: Plan) -> list[str]:
    steps = plan.choice.accumulation_steps
    if plan.buffer is None:
        return ["Buffer: none. The parameters are float32, and stock PyTorch accumulates in FP32 already."]
    if steps == 1:
        return []
    reason = f"Buffer: {plan.buffer!r}, so that {steps} micro-gradients are summed in FP32"
    if steps <= _FEW_MICRO_BATCHES:
        reason += "; with so few, the loss may not show the difference to stock accumulation"
    return [reason + "."]


def _masters(plan: Plan) -> list[str]:
    if not plan.bfloat16_numel:
        return []
    lost = "updates below 1/512 of a weight are lost in rounding it to bfloat16"
    if plan.master_problem is not None:
        return [f"Master weights: none, and {lost}; {plan.master_problem}."]
    name = plan.master_weights or "split32"
    each = _MASTER_BYTES[name]
    cost = f"{each} byte{'s' if each > 1 else ''} per parameter ({format_bytes(each * plan.bfloat16_numel)})"
    states = "optimizer states in FP32"
    if plan.adam:
        states += " (4 bytes more per parameter for Adam's two moments, where they were bfloat16)"
    if plan.master_weights is None:
        return [
            f"Master weights: none were asked for, and {lost}. master_weights={name!r} would keep them for {cost} and "
            f"{states}."
        ]
    bucket = ""  # of an optimizer that is stepped in one pass
    if plan.step_bytes:
        bucket = f", up to {format_bytes(plan.step_bytes)} for the FP32 weights and gradients of a step"
    kept = "what that rounds off" if name == "split32" else "8 bits of what that rounds off"
    return [
        f"Master weights: {name!r}, because without them {lost}. The step reads and writes FP32 weights; a residual "
        f"beside each bfloat16 weight keeps {kept}. This costs {cost}, {states}{bucket}, and time of the step. Memory "
        "and speeds here are with all of it."
    ]


def _ranks(plan: Plan) -> list[str]:
    if not plan.gradient_bytes:
        return []
    return [
        "More ranks: each accumulates less for the same effective batch. Speeds leave out the reduction of "
        f"{format_bytes(plan.gradient_bytes)} of gradients per step, and memory on several ranks has that much for the "
        "buckets of DistributedDataParallel, where the model was not wrapped yet."
    ]


def _count(ranks: int) -> str:
    return "one rank" if ranks == 1 else f"{ranks} ranks"
