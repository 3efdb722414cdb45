"""What is fast, what helps training, and whether the machine was busy."""

import itertools
import math
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from planned import (  # noqa: F401
    Clock,
    changed,
    clock_of_the_test,
    fingerprint,
    mlp,
    old_objects_aside,
    same,
    short_timings,
)
from torch import Tensor, nn

import accumkern
from accumkern.noise_scale import Estimate
from accumkern.planning.caveats import busy_warnings
from accumkern.planning.noise import interval, measure_noise, samples_factor, steps_factor
from accumkern.planning.protocol import Setup
from accumkern.planning.speed import Speed, measure_speed, measure_speeds, sizes_to_time
from accumkern.planning.trial import Preserved

pytestmark = pytest.mark.usefixtures("one_thread", "old_objects_aside", "short_timings")


# ---- what is fast, what helps training -----------------------------------------------------------------------------


def test_speed_is_measured_and_nothing_is_left() -> None:
    setup = mlp()
    before = fingerprint(setup)
    with Preserved(setup, "split24") as preserved:
        speed = measure_speed(preserved, 4)
    assert speed.micro_batch == 4
    assert speed.seconds > 0
    assert speed.step_seconds > 0
    assert same(before, fingerprint(setup))


def test_the_noise_scale_is_in_samples_and_near_the_truth() -> None:
    # The gradient of a sample is the sample: mean 0.5 in 512 dimensions, variance 4. B_noise = 512 * 4 / (512 * 0.25).
    weight = nn.Parameter(torch.zeros(512))
    model = nn.ParameterList([weight])
    optimizer = torch.optim.SGD([weight], lr=0.0)
    setup = Setup(
        model, optimizer, lambda size: 0.5 + 2 * torch.randn(size, 512), lambda model, batch: (batch @ model[0]).mean()
    )
    for micro_batch in (1, 4):
        found = []
        for seed in range(8):
            torch.manual_seed(seed)
            with Preserved(setup) as preserved:
                found.append(measure_noise(preserved, micro_batch, 32))
        assert sum(noise.noise_scale for noise in found) / 8 == pytest.approx(16, rel=0.1)
        assert sum(noise.low < 16 < noise.high for noise in found) >= 4  # an 80% interval
        assert all((noise.windows, noise.batch) == (16, 8 * micro_batch) for noise in found)


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_training_that_diverges_has_no_noise_scale(how: str) -> None:
    def infinite(model: nn.Module, batch: Tensor) -> Tensor:
        loss = model(batch).float().square().mean()
        return loss * math.nan if how == "loss" else (loss - loss.detach()).sqrt()  # zero, with an infinite gradient

    with pytest.raises(
        RuntimeError, match=r"diverged: in window 1 of 4 the loss was (nan|0), .* lower the learning rate"
    ):
        accumkern.plan(lambda: changed(loss=infinite), effective_batch=2, noise_windows=4)


def test_the_interval_covers_windows_and_infinity() -> None:
    low, high = interval([Estimate(2.0, 1.0)] * 5)
    assert low == high == 2
    low, high = interval([Estimate(1.0, 1.0), Estimate(1.0, -1.0)])
    assert math.isinf(high)
    assert low == 1


def test_the_factors_of_the_paper() -> None:
    assert samples_factor(10, 10) == steps_factor(10, 10) == 2
    assert samples_factor(1, 1000) == pytest.approx(1.001)
    assert samples_factor(5, 0) == math.inf
    # (samples / least - 1) (steps / least - 1) = 1, equation 2.11
    assert (samples_factor(7, 30) - 1) * (steps_factor(7, 30) - 1) == pytest.approx(1)


# ---- a busy machine ------------------------------------------------------------------------------------------------


def speeds_of(setup: Setup, sizes: list[int], needed: list[int] | None = None) -> list[Speed]:
    with Preserved(setup) as preserved:
        return measure_speeds(preserved, sizes, lambda speed: None, needed or [])


def bursts(until: dict[int, int], factor: float = 40.0) -> Callable[[int], float]:
    """Return how much longer a micro-batch takes: ``factor`` for the first so many of a size."""
    left = dict(until)

    def of(size: int) -> float:
        left[size] = left.get(size, 0) - 1
        return factor if left[size] >= 0 else 1.0

    return of


def idle(size: int) -> float:
    return 0.005 + 0.001 * size


def test_sizes_are_timed_until_nothing_is_gained_and_what_is_needed_always(clock: Clock) -> None:
    sizes = sizes_to_time(48, [48, 24, 12, 100], 2)
    assert sizes == [2, 4, 8, 12, 16, 24, 32, 48]
    assert sizes_to_time(6, []) == [1, 2, 4, 6]
    assert sizes_to_time(20, [30]) == [1, 2, 4, 6, 8, 10, 15, 16, 20]  # 6, 10 and 15 divide it
    clock.factor = lambda size: size / idle(size)  # a second for each sample, whatever the size
    assert [speed.micro_batch for speed in speeds_of(clock.pass_with(mlp()), sizes, [24, 48])] == [2, 4, 8, 24, 48]


@pytest.mark.parametrize("size", [1, 8, 16], ids=["at first", "in the middle", "at last"])
def test_a_size_that_stands_out_is_timed_again(clock: Clock, size: int) -> None:
    clock.factor = bursts({size: 6})  # all that is timed at first
    speeds = speeds_of(clock.pass_with(mlp()), [1, 2, 4, 8, 16])
    assert [speed.micro_batch for speed in speeds] == [1, 2, 4, 8, 16]
    assert [speed.seconds for speed in speeds] == pytest.approx([idle(speed.micro_batch) for speed in speeds])


def test_where_windows_differ_more_are_timed(clock: Clock) -> None:
    setup = clock.pass_with(mlp())

    def timed() -> tuple[Speed, int]:
        losses = 0

        def loss(model: nn.Module, batch: Tensor) -> Tensor:
            nonlocal losses
            losses += 1
            return setup.loss(model, batch)

        with Preserved(setup) as preserved:
            preserved.setup = setup._replace(loss=loss)
            return measure_speed(preserved, 4), losses

    speed, losses = timed()
    assert (speed.spread, losses) == (pytest.approx(1.0), 2 * 3)  # one window to warm up, and two
    clock.factor = bursts({4: 5}, 10.0)  # all of the first, three of four after it
    speed, losses = timed()
    assert losses > 2 * 3
    assert speed.spread > 2
    assert speed.seconds == pytest.approx(idle(4))  # the median is of those that were not disturbed


def test_what_a_first_window_waits_for_is_not_counted(clock: Clock) -> None:
    setup = clock.pass_with(mlp())
    losses = itertools.count()

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        clock.cores = 0.0 if next(losses) < 2 else 1.0
        return setup.loss(model, batch)

    with Preserved(setup._replace(loss=loss)) as preserved:
        assert measure_speed(preserved, 4).cpu_seconds == pytest.approx(1.0)


def test_an_idle_machine_gets_no_warning_and_a_busy_one_is_told_what_was_seen(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def warnings() -> tuple[str, ...]:
        return accumkern.plan(
            lambda: clock.pass_with(mlp()), effective_batch=4, noise_windows=0, largest_micro_batch=4
        ).warnings

    assert warnings() == ()
    clock.cores = 0.25
    (warning,) = warnings()
    assert warning.startswith("the machine seems to have been busy with other things while speed was measured: with mi")
    assert "this process had 0.25 of a core (unless the loss waits for something, such as a disk)" in warning
    clock.cores = 4.0
    assert warnings() == ()
    monkeypatch.setattr(os, "getloadavg", lambda: (9.5, 1.0, 1.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    (warning,) = warnings()
    assert "the load before was 9.5 processes on 2 cores" in warning
    monkeypatch.setattr(os, "getloadavg", lambda: (2.5, 9.0, 9.0))
    assert warnings() == ()
    calls = itertools.count()
    clock.factor = lambda size: 30.0 if next(calls) % 4 == 0 else 1.0
    (warning,) = warnings()
    assert "took 30 times as long as others (unless samples differ in length: see longest_batch)" in warning


def test_on_a_gpu_only_uneven_times_count() -> None:
    calm, starved, uneven = Speed(1, 1.0, 1.0), Speed(2, 1.0, 1.0, 1.1, 0.01), Speed(4, 1.0, 1.0, 3.0, 0.01)
    cpu, load = mlp(), (99.0, 2)
    gpu: Any = SimpleNamespace(device=torch.device("cuda"), longest_batch=None)
    assert busy_warnings(gpu, [calm, starved], load) == []
    (warning,) = busy_warnings(gpu, [calm, starved, uneven], load)
    assert "measured: some micro-batches of 4 took 3 times as long as others (unless samples differ in" in warning
    assert busy_warnings(cpu._replace(longest_batch=cpu.make_batch), [uneven], (0.0, 2))[0].count("took") == 0
    assert len(busy_warnings(cpu, [calm, starved], (0.0, 2))) == 1
    assert busy_warnings(cpu, [calm], (0.0, 2)) == []
