"""A budget of tokens: what the batch laws make of it in words, and when to raise the batch during such a run.

A schedule doubles the accumulation steps, from one micro-batch per rank to the batch of the plan, whenever Power Lines'
critical batch for the tokens seen so far has come to the next one. That it grows with tokens was measured twice, as
D^0.46 there and as D^0.47 in arXiv 2410.21676, both over runs of several lengths and not within one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from accumkern.checks import integer, real
from accumkern.planning.scaling_laws import (
    TOKENS,
    UNITS,
    BatchLaws,
    LawBatch,
    format_count,
    tokens_until_critical,
)
from accumkern.planning.speed import Split

_EARLY = 0.05  # of a run
_DIFFERENT = 2  # times, from where noise scale and laws are said to disagree


def parse_tokens(tokens: int | float | str) -> int:
    """Return a number of tokens: a whole number, or text such as ``"10B"``, ``"300M"`` or ``"10e9"``.

    Raises:
        TypeError: ``tokens`` is neither.
        ValueError: it is not such text, not whole, less than 1, or beyond 64 bits.
    """
    right = "it must be a whole number of at least 1, or text such as '10B' or '300M'"
    number: int | float | Fraction
    if isinstance(tokens, str):
        match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?(?:[eE]\+?[0-9]{1,2})?)\s*([KMBTkmbt]?)\s*", tokens)
        if match is None:
            raise ValueError(f"tokens is {tokens!r}; {right}")
        number = Fraction(match[1]) * UNITS[match[2].upper()]
    else:
        number = real("tokens", tokens, right)
    if not 1 <= number < 2**63 or number != int(number):
        raise ValueError(f"tokens is {tokens!r}; {right}")
    return integer("tokens", int(number), right, 1)


def check_budget(tokens: int | float | str | None, schedule: bool) -> int | None:
    """Return the number of tokens, if there is one; a schedule needs it.

    Raises:
        TypeError, ValueError: either is wrong.
    """
    if not isinstance(schedule, bool):
        raise TypeError(f"schedule is a {type(schedule).__name__}; it must be True or False")
    if schedule and tokens is None:
        raise ValueError("schedule is True, and tokens is None; give the tokens of the run (--tokens)")
    return None if tokens is None else parse_tokens(tokens)


@dataclass(frozen=True)
class Stage:
    """A part of a run with one batch.

    Attributes:
        from_tokens: where it begins.
        from_samples: likewise, over all ranks.
        effective_batch: samples between two optimizer steps.
        accumulation_steps: micro-batches of a rank.
        lr_factor: of the learning rate that belongs to the last stage: the root of the batch over the last one.
    """

    from_tokens: float
    from_samples: int
    effective_batch: int
    accumulation_steps: int
    lr_factor: float


@dataclass(frozen=True)
class Schedule:
    """When to raise the batch during a run.

    Attributes:
        stages: from the beginning to the end of the run.
        micro_batch: samples of one micro-batch of a rank.
        ranks: that train with different data.
        optimizer_steps: of the run with it.
        constant_steps: of the run with the plan's batch from the beginning to the end.
        line: of code that makes it.
    """

    stages: tuple[Stage, ...]
    micro_batch: int
    ranks: int
    optimizer_steps: int
    constant_steps: int
    line: str

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Samples and accumulation steps of the stages, as :class:`accumkern.BatchSchedule` takes them."""
        return _pairs(self.stages)


def schedule_of(laws: BatchLaws, way: Split) -> Schedule:
    """Return when to raise the batch to that of a way of splitting it. Every stage keeps the micro-batch."""
    smallest, per_sample = way.ranks * way.micro_batch, laws.tokens_per_sample
    starts = {0: 1}  # a stage that begins with the next one is left out
    for steps in [2**i for i in range(1, 64) if 2**i < way.accumulation_steps] + [way.accumulation_steps]:
        if steps > 1:
            starts[math.ceil(tokens_until_critical(steps * smallest * per_sample) / per_sample)] = steps
    samples = math.ceil(laws.tokens / per_sample)
    found = [(start, steps) for start, steps in starts.items() if start < samples]
    stages = tuple(
        Stage(start * per_sample, start, smallest * steps, steps, math.sqrt(steps / found[-1][1]))
        for start, steps in found
    )
    ends = [(a.effective_batch, b.from_samples - a.from_samples) for a, b in pairwise(stages)]
    ends.append((stages[-1].effective_batch, samples - stages[-1].from_samples))
    ranks = f", ranks={way.ranks}" if way.ranks > 1 else ""
    return Schedule(
        stages=stages,
        micro_batch=way.micro_batch,
        ranks=way.ranks,
        optimizer_steps=sum(math.ceil(count / batch) for batch, count in ends),
        constant_steps=math.ceil(samples / way.effective_batch),
        line=f"accumkern.BatchSchedule({_pairs(stages)}, micro_batch={way.micro_batch}{ranks}, accumulator=acc)",
    )


def _pairs(stages: tuple[Stage, ...]) -> list[tuple[int, int]]:
    return [(stage.from_samples, stage.accumulation_steps) for stage in stages]


def target_reason(laws: BatchLaws, batch: int) -> str:
    """Say that the laws have chosen a batch."""
    fitted = [law.law for law in laws.optima if law.out_of_range is None]
    mean = "the geometric mean of " if len(fitted) > 1 else ""
    return (
        f"Effective batch: none was asked for. {batch} samples are the power of two per rank that is nearest to "
        f"{format_count(laws.best_samples or 0)}, {mean}the optimal batch by {' and '.join(fitted)} for "
        f"{format_count(laws.tokens)} tokens. Laws of whole runs go before the noise scale of the beginning; the loss "
        "is flat around the optimum."
    )


def law_reasons(laws: BatchLaws, batch: int, noise_scale: float | None) -> Iterator[str]:
    """Say what the laws make of a run and of a batch, and where the noise scale disagrees."""
    optima = " and ".join(f"{_both(law)} by {law.law}" for law in laws.optima)
    yield (
        f"Token budget: for {format_count(laws.tokens)} tokens and {format_count(laws.parameters)} parameters the "
        f"optimal batch is {optima}; the critical one is {_both(laws.critical)} by Power Lines. By that an effective "
        f"batch of {batch} needs {1 + batch / laws.critical.samples:.3g} times the tokens of a very small one. The "
        "laws are of language models pretrained from scratch with AdamW."
    )
    problems = [f"{law.law} does not cover this run ({law.out_of_range})" for law in laws.optima if law.out_of_range]
    if problems:
        what = "It chooses nothing" if len(problems) == 1 else "They choose nothing"
        yield f"Outside what was fitted: {'; '.join(problems)}. {what} here; take the number as an order of magnitude."
    power_lines, step_law = (law.out_of_range is None for law in laws.optima)
    if step_law:
        yield f"Learning rate by Step Law: {laws.learning_rate:.2g}, at its own optimal batch."
    if power_lines:
        yield (
            "Timescale of AdamW by Power Lines: batch / (learning rate * weight decay * tokens) is best at "
            f"{laws.timescale:.2g}, with the batch in tokens."
        )
    if noise_scale is None or not 0 < noise_scale < math.inf:
        return
    ratio = laws.critical.samples / noise_scale
    if max(ratio, 1 / ratio) <= _DIFFERENT:
        yield f"Noise scale and laws agree on the critical batch within a factor of {_DIFFERENT}."
    elif ratio > 1:
        yield (
            f"Noise scale and laws disagree: the laws' critical batch is {format_count(ratio)} times the noise scale. "
            "That is to be expected where the noise scale is of the beginning: all samples pull the weights the same "
            "way then, so few of them show the gradient. Measured directly, the critical batch is near zero at first, "
            "rises fast and levels off (arXiv 2505.23971); the laws are of whole runs."
        )
    else:
        yield (
            f"Noise scale and laws disagree: the noise scale is {format_count(1 / ratio)} times the laws' critical "
            "batch. The windows were few, or the samples are not those of language models in pretraining; a sweep can "
            "say."
        )


def _both(law: LawBatch) -> str:
    return f"{format_count(law.samples)} samples ({format_count(law.tokens)} tokens)"


def schedule_reasons(schedule: Schedule, laws: BatchLaws, batch: int) -> Iterator[str]:
    """Say when the batch would be raised towards that of the plan, and what is known of the gain."""
    default = "A constant batch is the default, and what the rest of this plan is for"
    if len(schedule.stages) == 1:
        smallest = schedule.stages[0].effective_batch
        why = "the batch is one micro-batch per rank already"
        if smallest < batch:
            why = f"the critical batch does not rise above {smallest} samples, one micro-batch per rank, in time"
        yield f"Schedule: none. {default}, and {why}."
        return
    stages = ", ".join(
        f"{stage.effective_batch} from {format_count(stage.from_tokens)} tokens "
        f"({100 * stage.from_tokens / laws.tokens:.2g}% of the run)"
        for stage in schedule.stages[1:]
    )
    yield (
        f"Schedule: {default}. If it is raised: {schedule.stages[0].effective_batch} samples at first, {stages}; the "
        f"learning rate of the last times the root of batch over last batch. {schedule.optimizer_steps:,} optimizer "
        f"steps, against {schedule.constant_steps:,} with the plan's batch throughout."
    )
    end = schedule.stages[-1].from_tokens / laws.tokens
    if end < _EARLY:
        yield (
            f"What the schedule would change: little. It is over after {100 * end:.2g}% of the run, where the critical "
            f"batch passes {batch} samples. Schedules are for batches near {format_count(laws.critical.samples)}, "
            "where that ends, such as many ranks need."
        )
    if schedule.stages[-1].effective_batch < batch:
        yield f"The critical batch does not come to {batch} samples in this run: they are more than it can use well."
    beyond = [stage for stage in schedule.stages[1:] if stage.from_tokens < TOKENS[0]]
    if beyond or laws.critical.out_of_range:
        yield (
            "What the schedule rests on: Power Lines' critical batch, taken for the tokens seen so far, far outside "
            f"what it was fitted on (about {format_count(TOKENS[0])} tokens and more, of whole runs)."
        )
    yield (
        "Evidence for raising the batch: OLMo 1B reached a slightly better loss in 43% fewer steps when the batch was "
        "doubled as its measured critical batch had doubled, with the root of that in the learning rate (arXiv "
        "2505.23971); a schedule by the noise scale took 18% less time (arXiv 2411.00999). Against an early rise: on "
        "hard tasks small batches for most of the run, and a late switch, did best (arXiv 2602.14208)."
    )
