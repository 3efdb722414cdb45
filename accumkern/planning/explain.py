"""The reasons of a plan, in words."""

from __future__ import annotations

import dataclasses
import math

from accumkern.planning.memory import format_bytes
from accumkern.planning.noise import samples_factor, steps_factor
from accumkern.planning.result import Plan

_FEW_MICRO_BATCHES = 8  # the gain of FP32 accumulation may be invisible up to here


def explain(plan: Plan) -> Plan:
    """Return the plan with its reasons."""
    reasons = [
        *_memory(plan),
        *_speed(plan),
        *_target(plan),
        *_accumulation(plan),
        *_noise(plan),
        *_verdict(plan),
        *_buffer(plan),
        *_ranks(plan),
    ]
    return dataclasses.replace(plan, reasons=tuple(reasons))


def _memory(plan: Plan) -> list[str]:
    allowed = format_bytes(plan.memory_limit_bytes * (1 - plan.margin))
    limit = f"{allowed} ({format_bytes(plan.memory_limit_bytes)} less a margin of {plan.margin:.0%})"
    how = "fits" if plan.fit is not None else "is predicted to fit"
    if plan.is_limited_by_memory:
        found = f"What fits: a micro-batch of up to {plan.largest_micro_batch} samples {how} into {limit}."
    else:
        found = (
            f"What fits: memory is not the limit. A micro-batch of {plan.largest_micro_batch} samples, the largest "
            f"that was to be tried, {how} into {limit}."
        )
    reasons = [found]
    if plan.fit is not None:
        reasons.append(
            f"Expected memory: a peak of {format_bytes(plan.choice.memory_bytes)}, measured over several windows with "
            f"micro-batches of {plan.choice.micro_batch}."
        )
    if plan.prediction_error is not None:
        reasons.append(
            f"Without the device: peaks predicted on fake tensors are within {100 * plan.prediction_error:.1f}% of the "
            "measured ones."
        )
    if plan.prediction_problem is not None:
        reasons.append(f"Without the device: {plan.prediction_problem}.")
    return reasons


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
    per_rank = choice.micro_batch * choice.accumulation_steps
    if largest.micro_batch != choice.micro_batch:
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
    if not plan.attach:
        return []
    reason = f"Buffer: {plan.buffer!r}, so that {steps} micro-gradients are summed in FP32"
    if steps <= _FEW_MICRO_BATCHES:
        reason += "; with so few, the loss may not show the difference to stock accumulation"
    return [reason + "."]


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
