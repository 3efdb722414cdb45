"""The decision: how to split an effective batch, which one to take, and what is said of it."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planned import (  # noqa: F401
    Clock,
    clock_of_the_test,
    gpt,
    hungry,
    mlp,
    old_objects_aside,
    short_timings,
)
from torch import nn

import accumkern
from accumkern.planning import plan as plan_module
from accumkern.planning.noise import Noise, accumulation_pays, best_way, costs, noise_reason, useful_batches
from accumkern.planning.plan_result import Plan
from accumkern.planning.protocol import Setup
from accumkern.planning.speed import Speed, Split, as_fast, fast_reason, knee, plain, split, split_by_size

pytestmark = pytest.mark.usefixtures("one_thread", "old_objects_aside", "short_timings")


# ---- how to split an effective batch -------------------------------------------------------------------------------


def saturating(micro_batch: int, accumulation_steps: float) -> float:
    """Samples per second: 1 ms per micro-batch and per sample, 10 ms per step."""
    return Speed(micro_batch, 0.001 + 0.001 * micro_batch, 0.01).samples_per_second(accumulation_steps)


@given(st.integers(1, 5000), st.sampled_from([1, 2, 4, 8]), st.integers(1, 200))
@settings(max_examples=300, deadline=None)
def test_a_split_is_exact_or_near(target: int, ranks: int, most: int) -> None:
    way = split(target, ranks, range(1, most + 1), saturating)
    assert way.ranks == ranks
    assert way.micro_batch <= most
    if target >= 10 * ranks:
        assert abs(way.effective_batch - target) <= 0.1 * target
    if target % ranks == 0 and way.effective_batch != target:
        # No exact way has 80% of the speed of one that is near.
        per_rank = target // ranks
        exact = max(saturating(m, per_rank // m) for m in range(1, most + 1) if per_rank % m == 0)
        assert exact < 0.8 * max(
            saturating(m, max(1, round(per_rank / m)))
            for m in range(1, most + 1)
            if abs(ranks * m * max(1, round(per_rank / m)) - target) <= 0.1 * target
        )


def test_splits() -> None:
    sizes = [1, 2, 4, 8, 12, 16, 32]
    assert split(96, 1, sizes, saturating).effective_batch == 96
    assert split(96, 8, sizes, saturating) == split(12 * 8, 8, sizes, saturating)
    assert split(96, 8, sizes, saturating).accumulation_steps == 1
    assert split(3, 8, sizes, saturating).effective_batch == 8  # fewer samples than ranks
    prime = split(97, 1, [1, 8, 32], saturating)
    assert (prime.micro_batch, prime.accumulation_steps) == (32, 3)
    assert split(97, 1, [1, 8, 32], lambda m, k: 1.0).effective_batch == 97  # exact where it costs nothing


def test_the_knee_is_the_smallest_that_is_about_as_fast_as_any() -> None:
    sizes = [2**i for i in range(10)]
    assert as_fast(sizes, saturating) == [32, 64, 128, 256, 512]  # 32 / 33 is 97% of 512 / 513; 16 / 17 is 94%
    assert knee(sizes, saturating) == 32
    assert knee([1, 2], lambda micro_batch, accumulation_steps: 1.0) == 1
    assert Speed(4, 0.5, 1.0).window_seconds(6) == 4.0
    assert Speed(4, 0.5, 1.0).samples_per_second(6) == 6.0
    assert Speed(4, 0.5, 1.0).limit_per_second == 8.0


@pytest.mark.parametrize(
    ("target", "ranks", "sizes", "way"),
    [
        (64, 1, [1, 16, 32, 64], (64, 1)),  # as fast as 32, and does not accumulate
        (64, 1, [1, 8, 32], (32, 2)),
        (64, 2, [1, 16, 32, 64], (32, 1)),
        (64, 4, [1, 16, 32, 64], (16, 1)),  # 32 is more than its share
        (256, 1, [1, 16, 32, 64, 128], (32, 8)),  # the smallest of those that are as fast
        (96, 1, [1, 8, 12, 100], (12, 8)),  # 100 does not divide it
        (48, 1, [12, 16, 100], (16, 3)),
        (1000, 1, [1, 500, 1000], (1000, 1)),
    ],
)
def test_of_ways_that_are_as_fast_it_is_the_one_without_accumulation_or_the_smallest(
    target: int, ranks: int, sizes: list[int], way: tuple[int, int]
) -> None:
    found = split(target, ranks, sizes, saturating)
    assert (found.micro_batch, found.accumulation_steps) == way


def test_a_slow_step_does_not_make_small_micro_batches_fast() -> None:
    # Windows of as many samples take the same step, so that it hides what a micro-batch costs.
    def slow_step(micro_batch: int, accumulation_steps: float) -> float:
        return Speed(micro_batch, 0.001 + 0.001 * micro_batch, 100.0).samples_per_second(accumulation_steps)

    sizes = [1, 2, 4, 8, 16, 32]
    assert knee(sizes, slow_step) == 16
    assert split(64, 1, sizes, slow_step).micro_batch == 16


@pytest.mark.parametrize(
    ("way", "words"),
    [
        (Split(1, 32, 2), "The plan takes that micro-batch."),
        (Split(2, 64, 1), "The plan takes 64, which needs no accumulation."),
        (Split(1, 48, 2), "The plan takes 48, which is the next that makes 96."),
        (
            Split(2, 16, 1),
            "16, at 95.6% of the best speed, because an effective batch of 32 has no more samples for each",
        ),
        (Split(1, 16, 3), "because no micro-batch from 32 on makes an effective batch of 48."),
    ],
)
def test_words_say_why_it_is_not_the_knee(way: Split, words: str) -> None:
    speeds = [Speed(size, 0.001 + 0.001 * size, 0.01) for size in (1, 16, 32, 48, 64)]
    reason = fast_reason(way, speeds, 32)
    assert reason.startswith("What is fast: 970 samples per second with a micro-batch of 32, the smallest within 5%")
    assert words in reason


def test_words_name_the_best_once_and_no_power_of_ten() -> None:
    speeds = [Speed(size, 0.0001 * max(size, 4), 0.01) for size in (1, 2, 4, 8)]
    reason = fast_reason(Split(1, 4, 2), speeds, 4)
    assert reason.startswith("What is fast: 10,000 samples per second with a micro-batch of 4, the best, without the")
    assert [plain(number) for number in (2048.4, 100.0, 99.96, 0.01234, -1234.5)] == [
        "2,048",
        "100",
        "100",
        "0.0123",
        "-1,234",
    ]
    noise = noise_reason(Noise(2048.4, 1234.5, math.inf, 8, 32, 4.0, 3.0), 10**6)
    assert "is 2,048 samples (80% interval 1,234 or more, from 8 windows" in noise
    assert "489 times as many samples" in noise


def test_splits_without_measured_speeds() -> None:
    for target, ranks, most, micro_batch, accumulation_steps in [
        (4096, 1, 60, 32, 128),
        (96, 1, 30, 24, 4),
        (97, 1, 30, 24, 4),  # the nearest
        (96, 8, 30, 12, 1),
        (64, 1, 1000, 64, 1),
        (3, 8, 30, 1, 1),
        (7, 1, 1, 1, 7),
    ]:
        way = split_by_size(target, ranks, most)
        assert (way.micro_batch, way.accumulation_steps) == (micro_batch, accumulation_steps)


def test_useful_batches_follow_the_noise_scale_and_the_ranks() -> None:
    sizes = [2**i for i in range(8)]
    low, high = useful_batches(1, sizes, saturating, [1000.0])
    assert 16 <= low < high <= 1000
    assert useful_batches(8, sizes, saturating, [1000.0])[0] > low
    assert useful_batches(1, sizes, saturating, [1000.0, 100000.0])[1] > high
    assert math.isinf(useful_batches(1, sizes, saturating, [1000.0, math.inf])[1])
    assert useful_batches(2, sizes, saturating, [0.0]) == (2, 2)


def noise(noise_scale: float, low: float = 0.0) -> Noise:
    return Noise(noise_scale, low, math.inf, 16, 32, 1.0, 1.0)


@pytest.mark.parametrize(
    ("of", "way"),
    [
        (None, (16, 1)),
        (noise(0.0), (16, 1)),
        (noise(math.inf, math.inf), (16, 1)),
        (noise(math.inf, 100.0), (16, 2)),  # by the lower end
        (noise(100.0, 1.0), (16, 2)),
        (noise(0.01), (1, 1)),  # each sample more is one too many
    ],
    ids=["not measured", "no noise", "all noise", "a lower end", "known", "small"],
)
def test_without_a_target_the_noise_scale_decides_or_it_is_one_micro_batch_at_the_knee(
    of: Noise | None, way: tuple[int, int]
) -> None:
    for ranks in (1, 2):
        found = best_way(ranks, [1, 2, 4, 8, 16], saturating, of)
        assert found.ranks == ranks
        if ranks == 1:
            assert (found.micro_batch, found.accumulation_steps) == way


@pytest.mark.parametrize("noise_scale", [0.1, 3.0, 10.0, 30.0, 100.0, 300.0, 1e4])
@pytest.mark.parametrize("ranks", [1, 3, 8])
@pytest.mark.parametrize("step_seconds", [0.0, 0.01, 1.0])
def test_what_is_chosen_is_useful_and_accumulates_only_where_that_pays(
    step_seconds: float, ranks: int, noise_scale: float
) -> None:
    def rate(micro_batch: int, accumulation_steps: float) -> float:
        return Speed(micro_batch, 0.001 + 0.001 * micro_batch, step_seconds).samples_per_second(accumulation_steps)

    sizes = [2, 4, 5, 8, 16, 20]
    of = noise(noise_scale)
    way = best_way(ranks, sizes, rate, of)
    assert accumulation_pays(way, sizes, rate, of) is (True if way.accumulation_steps > 1 else None)
    low, high = useful_batches(ranks, sizes, rate, [noise_scale])
    assert low <= way.effective_batch <= high
    assert low < high or noise_scale < 100


def test_nothing_smaller_than_what_trains_is_useful() -> None:
    sizes = [2, 4, 8]
    assert useful_batches(4, sizes, saturating, [0.0]) == (8, 8)
    assert useful_batches(1, sizes, saturating, [1e-9])[0] == 2
    assert best_way(4, sizes, saturating, noise(1e-9)) == Split(4, 2, 1)
    way = Split(1, 2, 1)
    assert [batch.effective_batch for batch in costs(way, sizes, saturating, noise(1e-9))] == [2, 4, 8, 16]


def test_what_is_looked_at_has_an_end() -> None:
    way, sizes = Split(1, 2, 1), [2, 4, 8]
    assert len(costs(way, sizes, saturating, noise(1e300))) == 64
    assert useful_batches(1, sizes, saturating, [1e300])[1] == math.inf
    assert best_way(1, sizes, saturating, noise(1e300)).effective_batch < 2**24


# ---- what the plan takes, and what it says -------------------------------------------------------------------------


def rows(plan: Plan) -> list[tuple[int, int, int]]:
    return [(choice.ranks, choice.micro_batch, choice.accumulation_steps) for choice in plan.by_ranks]


def test_rows_agree_with_the_reasons(clock: Clock) -> None:
    def setup() -> Setup:
        return clock.pass_with(mlp())

    asked: Any = {"noise_windows": 0, "effective_batch": 64}
    plan = accumkern.plan(setup, **asked, largest_micro_batch=16)
    assert plan.knee == 16
    assert rows(plan) == [(1, 16, 4), (2, 16, 2), (4, 16, 1), (8, 8, 1)]
    assert "The plan takes that micro-batch." in str(plan)
    assert "More ranks: each accumulates less for the same effective batch." in str(plan)
    plan = accumkern.plan(setup, **asked)
    assert rows(plan) == [(1, 64, 1), (2, 32, 1), (4, 16, 1), (8, 8, 1)]
    clock.factor = lambda size: 0.002 * size / (0.005 + 0.001 * size)  # no size is faster
    plan = accumkern.plan(setup, **asked)
    assert plan.knee == 1
    assert rows(plan) == [(1, 64, 1), (2, 32, 1), (4, 16, 1), (8, 8, 1)]  # timed, though nothing was to be gained
    assert "The plan takes 64, which needs no accumulation." in str(plan)
    assert "Accumulation: not needed" in str(plan)
    assert rows(accumkern.plan(setup, **asked, largest_micro_batch=16)) == [
        (1, 1, 64),
        (2, 1, 32),
        (4, 16, 1),
        (8, 8, 1),
    ]


def test_rows_of_a_batch_that_some_ranks_cannot_share_say_so(clock: Clock) -> None:
    plan = accumkern.plan(lambda: clock.pass_with(mlp()), effective_batch=6, noise_windows=0)
    assert rows(plan) == [(1, 6, 1), (2, 3, 1), (4, 2, 1), (8, 1, 1)]
    assert "for the same effective batch, or for the nearest (8 on 4, 8 on 8)." in str(plan)


def test_without_a_target_every_row_has_the_same_micro_batch(clock: Clock) -> None:
    clock.of_step = 0.5  # that windows without an end would hide

    def setup() -> Setup:
        return clock.pass_with(mlp())

    plan = accumkern.plan(setup, largest_micro_batch=6, noise_windows=0)
    assert rows(plan) == [(1, 6, 1), (2, 6, 1), (4, 6, 1), (8, 6, 1)]
    assert "none was asked for, and no noise scale is known to choose it by, so this is one micro-batch on" in str(plan)
    assert "on each rank, the smallest that is fast, without accumulation." in str(plan)
    assert "the effective batch is chosen for each number of ranks in the same way" in str(plan)
    plan = accumkern.plan(setup, largest_micro_batch=6, measure=False, memory="1 GB")
    assert rows(plan) == [(1, 6, 1), (2, 6, 1), (4, 6, 1), (8, 6, 1)]
    assert "on each rank, the largest that fits, without accumulation." in str(plan)


def test_a_small_noise_scale_is_given_as_the_reason(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "measure_noise", lambda *_: Noise(0.1, 0.05, 0.2, 16, 32, 1.0, 1.0))
    plan = accumkern.plan(lambda: clock.pass_with(mlp()), largest_micro_batch=6)
    assert rows(plan) == [(1, 1, 1), (2, 1, 1), (4, 1, 1), (8, 1, 1)]
    assert (plan.choice.useful_low, plan.knee) == (1, 6)
    assert "One of 1 trains in about the least time that speed and noise allow, by the model below: a larger" in str(
        plan
    )
    assert "at 30.6% of the best speed, because an effective batch of 1 has no more samples for each rank" in str(plan)


def test_accumulation_that_is_not_worth_it_is_called_so(clock: Clock) -> None:
    # Little noise and a cheap step: a batch of many micro-batches wastes samples.

    def setup() -> Setup:
        weight = nn.Parameter(torch.zeros(64, dtype=torch.bfloat16))
        model = nn.ParameterList([weight])
        made = Setup(
            model,
            torch.optim.AdamW([weight], lr=0.0),
            lambda size: (1 + torch.randn(size, 64)).to(torch.bfloat16),
            lambda model, batch: (batch @ model[0]).float().mean(),
        )
        return clock.pass_with(made)

    plan = accumkern.plan(setup, effective_batch=4096, largest_micro_batch=16, noise_windows=8)
    assert plan.accumulation_pays is False
    assert "probably not worth it" in str(plan)
    assert "arXiv 2507.07101" in str(plan)
    assert "beta2" not in str(plan)  # the recipe's is far from one micro-batch's
    assert "16, without accumulation, is far from 4096, so let a sweep try some between" in str(plan)
    near = accumkern.plan(setup, effective_batch=64, largest_micro_batch=16, noise_windows=0)
    assert "16, without accumulation, with Adam's beta2 raised to the power 0.25 so that it" in str(near)
    alone = accumkern.plan(setup, effective_batch=4, noise_windows=0)
    assert (alone.choice.accumulation_steps, alone.attach) == (1, True)
    assert "not needed" in str(alone)
    assert alone.attach_line == "accumkern.attach(optimizer, 'split24', master_weights='split32')"
    stock = accumkern.plan(setup, effective_batch=4, noise_windows=0, master_weights=None)
    assert (stock.attach, stock.attach_line) == (False, None)
    assert "Master weights: none were asked for, and updates below 1/512 of a weight are lost" in str(stock)
    assert "master_weights='split32' would keep them for 2 bytes per parameter (128 B)" in str(stock)


def test_accumulation_that_spreads_a_slow_step_is_worth_it(clock: Clock) -> None:
    clock.of_step = 0.5

    def setup() -> Setup:
        weight = nn.Parameter(torch.zeros(64))
        model = nn.ParameterList([weight])
        made = Setup(
            model,
            torch.optim.SGD([weight], lr=0.0),
            lambda size: 0.02 + torch.randn(size, 64),  # B_noise is 2500
            lambda model, batch: (batch @ model[0]).mean(),
        )
        return clock.pass_with(made)

    torch.manual_seed(0)
    plan = accumkern.plan(setup, effective_batch=256, largest_micro_batch=4, noise_windows=8)
    assert plan.accumulation_pays is True
    assert "worth it here" in str(plan)
    assert "Buffer: none" in str(plan)
    assert "Master weights" not in str(plan)
    torch.manual_seed(0)
    free = accumkern.plan(setup, largest_micro_batch=4, noise_windows=32)
    assert free.choice.accumulation_steps > 8
    assert free.target is None


def test_a_target_that_nothing_divides_gets_the_nearest(clock: Clock) -> None:
    plan = accumkern.plan(lambda: clock.pass_with(gpt()), effective_batch=97, memory="3 MB", noise_windows=0)
    assert plan.choice.micro_batch > 1
    assert abs(plan.choice.effective_batch - 97) < 10
    assert plan.choice.effective_batch != 97
    assert "the nearest to the 97 that was asked for" in str(plan)
    assert "What helps training: the gradient noise scale was not measured." in str(plan)
