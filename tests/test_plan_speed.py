"""What is fast, what helps training, and whether the machine was busy."""

import math

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
from accumkern.planning.noise import interval, measure_noise, samples_factor, steps_factor
from accumkern.planning.protocol import (
    Setup,
)
from accumkern.planning.speed import measure_speed
from accumkern.planning.trial import Preserved

pytestmark = pytest.mark.usefixtures("one_thread", "old_objects_aside", "short_timings")


# ---- what is fast, what helps training ---------------------------------------------------------------------------


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
