"""BatchSchedule: every window is a true mean, whatever stage it is of; resuming; learning rates; wrong input."""

from __future__ import annotations

import copy
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from gradients import micro_gradients, parameter, sgd

import accumkern
from accumkern import BatchSchedule

STAGES = [(0, 1), (8, 3), (30, 4), (31, 7)]  # with micro-batches of 2 on 2 ranks, so 4 samples each
WINDOWS = [1, 1, 3, 3, 7, 7]  # at 0, 4, 8, 20, 32 and 60 samples: the stage from 30 is passed over
SAMPLES = [0, 4, 8, 20, 32, 60, 88]


def schedule_of(accumulator: accumkern.GradAccumulator | None = None, **arguments: Any) -> BatchSchedule:
    return BatchSchedule(STAGES, 2, ranks=2, accumulator=accumulator, **arguments)


def test_stages_begin_with_the_first_window_at_their_samples() -> None:
    schedule = schedule_of()
    for steps, samples in zip(WINDOWS, SAMPLES, strict=False):
        assert (schedule.accumulation_steps, schedule.effective_batch) == (steps, 4 * steps)
        assert schedule.samples == samples
        schedule.step()
    assert schedule.samples == SAMPLES[-1]


def test_a_short_window_counts_what_it_had() -> None:
    schedule = schedule_of()
    schedule.step(samples=7)
    assert (schedule.samples, schedule.accumulation_steps) == (7, 1)
    schedule.step(samples=np.int64(1))
    assert (schedule.samples, schedule.accumulation_steps) == (8, 3)


@pytest.mark.parametrize("buffer", ["split24", "split32", "fp32"])
def test_every_window_is_the_true_mean(buffer: str) -> None:
    param = parameter(1000)
    optimizer = sgd(param)
    grads = iter(micro_gradients(sum(WINDOWS), 1000))
    accumulator = accumkern.attach(optimizer, buffer)
    schedule = schedule_of(accumulator)
    for steps in WINDOWS:
        window = [next(grads) for _ in range(schedule.accumulation_steps)]
        assert len(window) == steps
        for grad in window:
            (param * grad).sum().backward()
        mean = torch.stack(window).double().mean(0)
        found = accumulator.gradient(param)
        assert found is not None
        # FP32 keeps 24 bits of each of at most 7 partial sums; split24 keeps 16.
        bits = 15 if buffer == "split24" else 22
        largest = torch.stack(window).abs().double().mean(0) + 1e-30
        assert float(((found.double() - mean).abs() / largest).max()) < 2.0**-bits * steps
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


@pytest.mark.parametrize("stop", range(len(WINDOWS)))
def test_resuming_goes_on_as_if_nothing_had_happened(stop: int) -> None:
    def train(windows: int, resume: dict[str, Any] | None) -> tuple[list[torch.Tensor], dict[str, Any]]:
        grads = micro_gradients(sum(WINDOWS), 50)
        param = parameter(50)
        optimizer = sgd(param)
        accumulator = accumkern.attach(optimizer, "split32", average_over=100)
        schedule = schedule_of(accumulator)
        if resume is not None:
            schedule.load_state_dict(resume)
        seen = schedule.samples // 4
        found = []
        for _ in range(windows):
            for grad in grads[seen : seen + schedule.accumulation_steps]:
                (param * grad).sum().backward()
            seen += schedule.accumulation_steps
            assert param.grad is not None
            found.append(param.grad.clone())
            optimizer.zero_grad()
            schedule.step()
        return found, copy.deepcopy(schedule.state_dict())

    whole, end = train(len(WINDOWS), None)
    first, state = train(stop, None)
    rest, other_end = train(len(WINDOWS) - stop, state)
    assert all(torch.equal(a, b) for a, b in zip(whole, first + rest, strict=True))
    assert end == other_end == {"samples": SAMPLES[-1]}


def test_a_checkpoint_in_the_middle_of_a_window_has_its_scale() -> None:
    param = parameter(10)
    accumulator = accumkern.attach(sgd(param))
    schedule = schedule_of(accumulator)
    schedule.load_state_dict({"samples": 20})
    assert accumulator.scale == 1 / 3
    schedule.step()
    assert accumulator.scale == 1 / 7


def test_another_stage_table_takes_the_same_state() -> None:
    schedule = BatchSchedule([(0, 2), (50, 5)], 8)
    schedule.load_state_dict({"samples": 60})
    assert schedule.effective_batch == 40


@pytest.mark.parametrize(("rule", "power"), [("none", 0.0), ("sqrt", 0.5), ("linear", 1.0)])
def test_learning_rates_are_of_the_last_stage(rule: str, power: float) -> None:
    schedule = schedule_of(lr_rule=rule)
    for steps in WINDOWS:
        assert schedule.lr_factor == pytest.approx((steps / 7) ** power, rel=1e-15)
        schedule.step()
    assert schedule.lr_factor == 1


def test_a_learning_rate_scheduler_of_torch_can_ask_for_the_factor() -> None:
    optimizer = sgd(parameter(2))
    schedule = schedule_of()
    of_torch = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: schedule.lr_factor)
    rates = []
    for _ in WINDOWS:
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
        of_torch.step()
    assert rates == pytest.approx([0.5 * (steps / 7) ** 0.5 for steps in WINDOWS])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: BatchSchedule([], 2), ValueError, "stages is empty; it must hold pairs"),
        (lambda: BatchSchedule(3, 2), TypeError, "stages is a int; it must hold pairs"),  # type: ignore[arg-type]
        (lambda: BatchSchedule([3], 2), TypeError, "stages[0] is a int; it must be a pair"),  # type: ignore[list-item]
        (lambda: BatchSchedule([(0, 1, 2)], 2), ValueError, "stages[0] has 3 numbers"),  # type: ignore[list-item]
        (lambda: BatchSchedule([(5, 1)], 2), ValueError, "stages[0] is from 5 samples; the first stage must be from 0"),
        (
            lambda: BatchSchedule([(0, 1), (9, 2), (9, 4)], 2),
            ValueError,
            "stages[2] is from 9 samples; it must be from",
        ),
        (lambda: BatchSchedule([(0, 1), (8, 0)], 2), ValueError, "stages[1][1] is 0; it must be a whole number of acc"),
        (lambda: BatchSchedule([(0, 1), (-1, 2)], 2), ValueError, "stages[1][0] is -1"),
        (lambda: BatchSchedule([(0, 1.5)], 2), TypeError, "stages[0][1] is a float"),  # type: ignore[list-item]
        (lambda: BatchSchedule([(0, True)], 2), TypeError, "stages[0][1] is a bool"),
        (lambda: BatchSchedule([(0, 1)], 0), ValueError, "micro_batch is 0; it must be a whole number of at least 1"),
        (lambda: BatchSchedule([(0, 1)], 2, ranks=0), ValueError, "ranks is 0"),
        (lambda: BatchSchedule([(0, 1)], 2, lr_rule="square"), ValueError, "lr_rule is 'square'; it must be one of"),
        (lambda: schedule_of(Fraction(1, 2)), TypeError, "accumulator is a Fraction"),  # type: ignore[arg-type]
        (lambda: schedule_of().step(0), ValueError, "samples is 0; it must be a whole number of at least 1, or None"),
        (lambda: schedule_of().step(1.5), TypeError, "samples is a float"),  # type: ignore[arg-type]
        (lambda: schedule_of().load_state_dict({}), TypeError, "state_dict is []; it must be what state_dict()"),
        (lambda: schedule_of().load_state_dict(None), TypeError, "state_dict is NoneType"),  # type: ignore[arg-type]
        (lambda: schedule_of().load_state_dict({"samples": -1}), ValueError, "samples of state_dict is -1"),
    ],
)
def test_wrong_input_is_named(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        make()
    assert message in str(raised.value)


def test_a_detached_accumulator_is_refused() -> None:
    accumulator = accumkern.attach(sgd(parameter(2)))
    accumulator.detach()
    with pytest.raises(RuntimeError, match="this accumulator is detached"):
        schedule_of(accumulator)
