"""A plan with its reasons in words."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from accumkern.memory import tensors_in
from accumkern.out_of_memory import format_bytes
from accumkern.planning.advice import settings_of, verdict_reason
from accumkern.planning.caveats import batch_norm_warnings
from accumkern.planning.fit import fit_reasons
from accumkern.planning.link import Link, exchange_of_model, link_reasons
from accumkern.planning.memory import interpolated
from accumkern.planning.noise import noise_reason
from accumkern.planning.plan_result import Choice, Plan
from accumkern.planning.precision import buffer_reason, masters_problem, masters_reason, step_bytes, with_masters
from accumkern.planning.predict import DEVICES
from accumkern.planning.protocol import Setup
from accumkern.planning.speed import Speed, Split, accumulation_reason, fast_reason
from accumkern.planning.token_budget import law_reasons, schedule_of, schedule_reasons, target_reason

RANKS = (1, 2, 4, 8)  # that a plan has a row for


def plan_of(
    setup: Setup,
    way: Split,
    way_on: Callable[[int], Split],
    peaks: dict[int, int],
    prospects: Callable[[Split], tuple[float | None, float | None, float | None]],
    link: Link | None,
    measured_ranks: int = 1,
    speeds: Sequence[Speed] = (),
    warnings: Sequence[str] = (),
    **known: Any,
) -> Plan:
    """Return a plan with its reasons; ``prospects`` gives samples per second of a way, and its useful batches.

    ``link`` is between the ranks, None where it is not known; the other arguments are as they stand in :class:`Plan`.
    """
    counts = [way.ranks] if setup.is_sharded else sorted({*RANKS, way.ranks})  # on others, shards are of other sizes
    gradient_bytes = sum(p.numel() * p.element_size() for p in setup.model.parameters() if p.requires_grad)

    def choice(of: Split) -> Choice:
        buckets = gradient_bytes if of.ranks > measured_ranks == 1 else 0  # of DistributedDataParallel
        memory = interpolated(peaks, of.micro_batch) + buckets
        return Choice(of.ranks, of.micro_batch, of.accumulation_steps, of.effective_batch, memory, *prospects(of))

    return explain(
        Plan(
            choice=choice(way),
            by_ranks=tuple(choice(way if n == way.ranks else way_on(n)) for n in counts),
            attach=known["buffer"] is not None and (way.accumulation_steps > 1 or known["master_weights"] is not None),
            master_problem=masters_problem(setup) if known["master_weights"] is None else None,
            bfloat16_numel=sum(held.numel() for held in tensors_in(with_masters(setup))),
            step_bytes=step_bytes(setup),
            warnings=(*batch_norm_warnings(setup, way.micro_batch), *warnings),
            tokens_per_sample=setup.tokens_per_sample,
            gradient_bytes=gradient_bytes,
            measured_ranks=measured_ranks,
            exchange=None if link is None else exchange_of_model(setup.model, known["buffer"], link, way, speeds),
            speeds=tuple(speeds),
            adam="betas" in setup.optimizer.param_groups[0],
            **known,
        )
    )


def explain(plan: Plan) -> Plan:
    """Return the plan with its reasons and settings."""
    parts = (_memory, _speed, _target, _accumulation, _noise, _laws, _verdict, _schedule, _buffer, _masters, _ranks)
    reasons = tuple(reason for part in parts for reason in part(plan))
    settings = settings_of(plan.way, plan.target, plan.attach_line, plan.buffer, plan.master_weights, plan.adam)
    return dataclasses.replace(plan, reasons=reasons, settings=tuple(settings))


def with_schedule(plan: Plan) -> Plan:
    """Return a plan that has laws with its schedule, and with reasons."""
    assert plan.laws is not None
    return explain(dataclasses.replace(plan, schedule=schedule_of(plan.laws, plan.way)))


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
        buckets = f" Of it {format_bytes(plan.gradient_bytes)} are for DDP's buckets." if _adds_buckets(plan) else ""
        yield (
            f"Expected memory: a peak of {format_bytes(plan.choice.memory_bytes)}, measured while it trained with "
            f"micro-batches of {plan.choice.micro_batch}.{buckets}"
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
    return [fast_reason(plan.way, plan.speeds, plan.knee)]


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
    return [accumulation_reason(plan.way, plan.speeds)]


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
    return [verdict_reason(plan.way, plan.accumulation_pays, plan.by_laws is not None, plan.adam)]


def _buffer(plan: Plan) -> list[str]:
    reason = buffer_reason(plan.buffer, plan.choice.accumulation_steps)
    return [] if reason is None else [reason]


def _masters(plan: Plan) -> list[str]:
    if not plan.bfloat16_numel:
        return []
    return [masters_reason(plan.master_weights, plan.master_problem, plan.bfloat16_numel, plan.step_bytes, plan.adam)]


def _ranks(plan: Plan) -> Iterator[str]:
    if not plan.gradient_bytes:
        return
    batch = plan.choice.effective_batch
    others = [f"{of.effective_batch} on {of.ranks}" for of in plan.by_ranks if of.effective_batch != batch]
    is_sharded = len(plan.by_ranks) == 1
    if is_sharded:
        what = "memory and speed of a model that is sharded are known of the ranks that it was planned on"
    elif not others:
        what = "each accumulates less for the same effective batch"
    elif plan.target is None:
        what = "the effective batch is chosen for each number of ranks in the same way"
    else:
        what = f"each accumulates less for the same effective batch, or for the nearest ({', '.join(others)})"
    left_out = (
        f" Speeds leave out the reduction of {format_bytes(plan.gradient_bytes)} of gradients per step, and memory on "
        "several ranks has that much for the buckets of DistributedDataParallel, where the model was not wrapped yet."
    )
    yield f"More ranks: {what}.{'' if is_sharded else left_out}"
    if plan.exchange is not None:
        yield from link_reasons(plan.exchange)
    else:
        asked = "--bandwidth GB/s" if plan.choice.ranks > 1 else "--ranks N --bandwidth GB/s"
        yield (
            f"Exchange between ranks: not known. {asked}, or this command on the ranks themselves (torchrun), tells "
            "what it takes, and how much of that accumulation saves."
        )


def _adds_buckets(plan: Plan) -> bool:
    """Return whether the memory of the plan has DistributedDataParallel's buckets beside what was measured."""
    return plan.choice.ranks > plan.measured_ranks == 1


def _count(ranks: int) -> str:
    return "one rank" if ranks == 1 else f"{ranks} ranks"
