"""The plan: what fits, what would fit, what is fast, what helps training, the decision, and everything put back."""

import copy
import dataclasses
import gc
import json
import math
import os
import random
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masters import OwnAdamW
from planned import hungry, old_objects_aside  # noqa: F401
from torch import Tensor, nn

import accumkern
from accumkern import stepping
from accumkern.memory import storage_bytes
from accumkern.noise_scale import Estimate
from accumkern.planning import speed as speed_module
from accumkern.planning import trial
from accumkern.planning.memory import (
    MemoryLimitError,
    MemoryMeter,
    available_bytes,
    format_bytes,
    held_tensors,
    is_out_of_memory,
    parse_bytes,
)
from accumkern.planning.noise import best_batch, interval, measure_noise, samples_factor, steps_factor, useful_batches
from accumkern.planning.precision import accumulation, choose_buffer, choose_masters, step_bytes
from accumkern.planning.predict import PredictionError, fake_setup, predict_memory
from accumkern.planning.protocol import (
    Setup,
    check_setup,
    compute_loss,
    make_batch,
    run_setup,
)
from accumkern.planning.speed import Speed, knee, measure_speed, split, split_by_size
from accumkern.planning.trial import Fit, Preserved, find_fit, largest, train_window, try_windows

pytestmark = pytest.mark.usefixtures("one_thread", "old_objects_aside")

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent
KB = 1000


@pytest.fixture(autouse=True)
def short_timings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed_module, "LEAST_SECONDS", 0.02)


class Clock:
    """Time that passes where a test says so, and not with the machine."""

    def __init__(self, seconds_of_step: float) -> None:
        self.seconds, self.seconds_of_step = 0.0, seconds_of_step

    def pass_with(self, setup: Setup) -> Setup:
        """Let a micro-batch take 5 ms and 1 ms for each sample, and a step what it takes."""

        def loss(model: nn.Module, batch: Tensor) -> Tensor:
            self.seconds += 0.005 + 0.001 * batch.shape[0]
            return setup.loss(model, batch)

        def step(*_: Any) -> None:
            self.seconds += self.seconds_of_step

        setup.optimizer.register_step_post_hook(step)
        return setup._replace(loss=loss)

    def now(self, _setup: Setup) -> float:
        return self.seconds


def mlp(dtype: torch.dtype = torch.bfloat16, width: int = 64) -> Setup:
    model = nn.Sequential(nn.Linear(16, width), nn.GELU(), nn.Linear(width, 4)).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return Setup(
        model,
        optimizer,
        lambda size: torch.randn(size, 16, dtype=dtype),
        lambda model, batch: model(batch).float().square().mean(),
    )


class Conv(nn.Module):
    """Convolutions whose CPU kernels need memory of their own, and BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1)
        )
        self.head = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.layers(images).mean((2, 3)))


def conv() -> Setup:
    model = Conv()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return Setup(
        model,
        optimizer,
        lambda size: (torch.randn(size, 3, 32, 32), torch.randint(10, (size,))),
        lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]),
    )


def gpt(layers: int = 1) -> Setup:
    sys.path.insert(0, str(ROOT / "examples"))
    from train_gpt import CONTEXT, GPT

    model = GPT(width=64, layers=layers).to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    text = torch.randint(256, (2**20,), dtype=torch.uint8)  # more than all the rest, and not part of it
    return Setup(
        model,
        optimizer,
        lambda size: text[: size * (CONTEXT + 1)].view(size, -1).long(),
        lambda model, batch: model(batch),
        tokens_per_sample=CONTEXT,
    )


# ---- the protocol ------------------------------------------------------------------------------------------------


def test_setup_may_return_a_plain_tuple() -> None:
    setup = mlp()
    assert check_setup(setup[:4]) == setup
    assert check_setup(setup).device == CPU


def changed(**fields: Any) -> Any:
    return mlp()._replace(**fields)


def on_meta() -> Setup:
    model = nn.Linear(16, 4, device="meta")
    return changed(model=model, optimizer=torch.optim.SGD(model.parameters()))


def frozen() -> Setup:
    setup = mlp()
    setup.model.requires_grad_(False)
    return setup


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (lambda: None, TypeError, "setup() returned a NoneType; it must return model, optimizer, make_batch and loss"),
        (lambda: list(mlp()[:4]), TypeError, "setup() returned a list"),
        (lambda: mlp()[:3], ValueError, "setup() returned 3 things"),
        (
            lambda: (mlp().optimizer, *mlp()[1:4]),
            TypeError,
            "model of setup() is a AdamW; it must be a torch.nn.Module",
        ),
        (lambda: changed(optimizer=0.1), TypeError, "optimizer of setup() is a float"),
        (lambda: changed(make_batch=torch.zeros(3)), TypeError, "make_batch of setup() is a Tensor"),
        (lambda: changed(loss=None), TypeError, "loss of setup() is a NoneType; it must be a function"),
        (lambda: changed(longest_batch=3), TypeError, "longest_batch of setup() is a int"),
        (lambda: changed(tokens_per_sample="64"), TypeError, "tokens_per_sample of setup() is a str"),
        (lambda: changed(tokens_per_sample=-1), ValueError, "tokens_per_sample of setup() is -1"),
        (
            lambda: changed(optimizer=mlp().optimizer),
            ValueError,
            "4 of the optimizer's 4 parameters are not the model's",
        ),
        (frozen, ValueError, "no parameter that requires a gradient"),
        (lambda: changed(model=nn.ReLU()), ValueError, "no parameter that requires a gradient"),
        (on_meta, ValueError, "model of setup() is on the meta device, without memory"),
    ],
)
def test_wrong_setups_are_named(returned: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        run_setup(returned)
    assert message in str(raised.value)


def test_a_setup_that_raises_is_named() -> None:
    def setup() -> Setup:
        raise KeyError("layers")

    with pytest.raises(RuntimeError, match=r"setup\(\) raised KeyError: 'layers'; run it by itself") as raised:
        run_setup(setup)
    assert isinstance(raised.value.__cause__, KeyError)
    with pytest.raises(TypeError, match="setup is a str; it must be a function"):
        accumkern.plan("train.py:setup")


@pytest.mark.parametrize(
    ("maker", "error", "message"),
    [
        (
            lambda size: torch.zeros(size - 1, 16),
            ValueError,
            "made tensors of shape (2, 16); the first dimension of one of them must be 3",
        ),
        (lambda size: torch.zeros(16, size), ValueError, "must be 3"),
        (lambda size: [1, 2, 3], TypeError, "returned a list without a tensor"),
        (lambda size: 1 / 0, RuntimeError, "make_batch(3) of setup() raised ZeroDivisionError: division by zero"),
    ],
    ids=["too small", "transposed", "no tensor", "raises"],
)
def test_wrong_batches_are_named(maker: Callable[[int], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        make_batch(changed(make_batch=maker), 3)
    assert message in str(raised.value)
    with pytest.raises(error):
        accumkern.plan(lambda: changed(make_batch=lambda size: maker(size + 2)), effective_batch=2)


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (
            lambda model, batch: model(batch).sum().item(),
            TypeError,
            "returned a float; it must return a floating tensor",
        ),
        (lambda model, batch: model(batch).argmax(), TypeError, "returned a torch.int64 tensor"),
        (lambda model, batch: model(batch).sum(-1), ValueError, "returned shape (3,); it must be 0-dim"),
        (lambda model, batch: model(batch).sum().detach(), ValueError, "without a graph"),
        (
            lambda model, batch: model(batch[:, 1:]).mean(),
            RuntimeError,
            "loss of setup() raised RuntimeError: mat1 and",
        ),
        (lambda model, batch: batch.missing, RuntimeError, "loss of setup() raised AttributeError"),
    ],
)
def test_wrong_losses_are_named(loss: Any, error: type[Exception], message: str) -> None:
    setup = changed(loss=loss)
    with pytest.raises(error) as raised:
        compute_loss(setup, make_batch(setup, 3))
    assert message in str(raised.value)


def test_a_loss_without_the_model_is_named() -> None:
    with pytest.raises(ValueError, match=r"loss of setup\(\) gives no parameter of the optimizer a gradient"):
        accumkern.plan(lambda: changed(loss=lambda model, batch: torch.zeros((), requires_grad=True)))


# ---- memory ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [(5, 5), ("24GB", 24 * 10**9), ("1.5 GiB", 3 * 2**29), ("512mib", 2**29), ("7 kB", 7000), ("100B", 100)],
)
def test_parse_bytes(text: int | str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    ("size", "error"), [("24", ValueError), ("GB", ValueError), ("1 XB", ValueError), (0, ValueError), (1.5, TypeError)]
)
def test_parse_bytes_refuses(size: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="memory is"):
        parse_bytes(size)


def test_format_bytes() -> None:
    assert [format_bytes(x) for x in (0, 999, 1500, 45e6, 24e9, 2.5e12)] == [
        "0 B",
        "999 B",
        "1.5 kB",
        "45 MB",
        "24 GB",
        "2,500 GB",
    ]


def test_the_meter_counts_every_allocation() -> None:
    kept = torch.zeros(10 * KB, dtype=torch.uint8)
    with MemoryMeter(CPU, 5 * KB, 10**9) as meter:
        a = torch.zeros(40 * KB, dtype=torch.uint8)
        b = a.clone()  # 80 kB
        del a
        c = torch.zeros(30 * KB, dtype=torch.uint8)  # 70 kB
        del b
        c.zero_()
        kept[::2].view(-1, 2)
    assert meter.peak_bytes == 85 * KB
    assert meter.left_bytes == 30 * KB


def test_the_meter_sees_what_a_kernel_allocates_inside() -> None:
    x = torch.randn(512, 512)
    with MemoryMeter(CPU, 0, 10**9) as meter:
        x.sort()  # results of 1 MB and 2 MB, and copies while it works
    assert meter.peak_bytes >= 3 * 2**20


def test_the_limit_stops_at_the_operation_that_goes_beyond_it() -> None:
    weight = torch.zeros(50 * KB, dtype=torch.uint8)
    with MemoryMeter(CPU, 50 * KB, 120 * KB) as meter:
        for _ in range(10):  # views, what is written in place, and what was released take nothing
            weight.view(-1, 2).t()
            weight.zero_()
            torch.ones(60 * KB, dtype=torch.uint8)
        first = torch.ones(40 * KB, dtype=torch.uint8)
        with pytest.raises(MemoryLimitError, match="130 kB of 120 kB"):
            first.clone()
    assert meter.peak_bytes == 130 * KB
    torch.zeros(200 * KB)  # no limit after the block
    with MemoryMeter(CPU, 200 * KB, 100 * KB):
        weight.view(-1, 2).zero_()  # allocates nothing, whatever is held


def test_a_device_that_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="memory of device 'meta' cannot be measured"):
        MemoryMeter(torch.device("meta"), 0, 1)


def test_running_out_of_memory_is_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60)
    assert is_out_of_memory(raised.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_available_memory_is_part_of_the_machines() -> None:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 2**20 < available_bytes(CPU) <= total


def test_held_memory_counts_every_piece_once() -> None:
    setup = mlp()
    setup.model[0].weight.grad = torch.zeros_like(setup.model[0].weight)
    params = sum(p.numel() * 2 for p in setup.model.parameters())
    assert storage_bytes(held_tensors(setup.model, setup.optimizer)) == params + 2 * 16 * 64
    both = nn.ModuleList([setup.model, setup.model])
    assert storage_bytes(held_tensors(both, setup.optimizer)) == params + 2 * 16 * 64


# ---- everything put back -----------------------------------------------------------------------------------------


def fingerprint(setup: Setup) -> Any:
    model, optimizer = setup.model, setup.optimizer
    return copy.deepcopy(
        (
            model.state_dict(),
            [p.grad for p in model.parameters()],
            [m.training for m in model.modules()],
            optimizer.state_dict(),
            torch.get_rng_state(),
            random.getstate(),
        )
    )


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def adagrad() -> Setup:
    """Its states are there from the beginning, in bfloat16."""
    setup = mlp()
    return setup._replace(optimizer=torch.optim.Adagrad(setup.model.parameters()))


@pytest.mark.parametrize("how", ["finished", "raised"])
@pytest.mark.parametrize("maker", [mlp, adagrad, conv], ids=["bf16 AdamW", "bf16 Adagrad", "BatchNorm, momentum"])
def test_a_setup_is_put_back_bit_for_bit(maker: Callable[[], Setup], how: str) -> None:
    setup = maker()
    setup.optimizer.param_groups[0]["lr"] = torch.tensor(0.01)
    train_window(setup, [make_batch(setup, 4)], 1, None)  # so that there are states
    compute_loss(setup, make_batch(setup, 4)).backward()  # and gradients
    next(setup.model.children()).eval()
    before = fingerprint(setup)
    tensors = [id(t) for t in held_tensors(setup.model, setup.optimizer)]

    def change() -> None:
        with Preserved(setup) as preserved:
            assert gc.get_freeze_count() > 0
            assert all(p.grad is None for p in setup.model.parameters())
            for _ in range(2):
                with accumulation(setup, choose_buffer(setup, None), 2, choose_masters(setup, "auto")) as accumulator:
                    for group in setup.optimizer.param_groups:
                        group["lr"].mul_(10)
                    train_window(setup, [make_batch(setup, 4) for _ in range(2)], 2, accumulator)
                setup.model.train()
                random.random()
                assert not same(before, fingerprint(setup))
                preserved.rewind()
            train_window(setup, [make_batch(setup, 4)], 1, None)
            if how == "raised":
                raise KeyboardInterrupt

    if how == "raised":
        gc.unfreeze()
        with pytest.raises(KeyboardInterrupt):
            change()
        assert gc.get_freeze_count() == 0
        gc.freeze()
    else:
        change()
        assert gc.get_freeze_count() > 0  # somebody else's
    assert same(before, fingerprint(setup))
    assert tensors == [id(t) for t in held_tensors(setup.model, setup.optimizer)]
    accumkern.attach(setup.optimizer, "split24").detach()  # no hook was left behind


@pytest.mark.parametrize("how", ["finished", "raised"])
@pytest.mark.parametrize("master_weights", ["auto", None])
def test_plan_leaves_everything_as_it_was(master_weights: str | None, how: str) -> None:
    setup = mlp()
    train_window(setup, [make_batch(setup, 4)], 1, None)
    calls = 0

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if how == "raised" and calls > 50:
            raise ZeroDivisionError("in the middle of a trial")
        return model(batch).float().square().mean()

    setup = setup._replace(loss=loss)
    before = fingerprint(setup)
    if how == "raised":
        with pytest.raises(RuntimeError, match=r"loss of setup\(\) raised ZeroDivisionError: in the middle") as raised:
            accumkern.plan(lambda: setup, effective_batch=8, noise_windows=4, master_weights=master_weights)
        assert isinstance(raised.value.__cause__, ZeroDivisionError)
    else:
        accumkern.plan(lambda: setup, effective_batch=8, noise_windows=4, master_weights=master_weights)
    assert same(before, fingerprint(setup))


@pytest.mark.parametrize("measure", [True, False])
def test_what_was_cut_off_is_there_after_a_plan(measure: bool) -> None:
    made: list[Setup] = []

    def setup() -> Setup:
        made.append(mlp(torch.float32))
        accumkern.to_bfloat16(made[-1].model)
        return made[-1]._replace(make_batch=lambda size: torch.randn(size, 16, dtype=torch.bfloat16))

    other = nn.Linear(100, 100)
    weights = [param.detach().clone() for param in other.parameters()]
    accumkern.to_bfloat16(other)
    torch.manual_seed(3)
    plan = accumkern.plan(setup, effective_batch=8, noise_windows=4, memory="1 GB", measure=measure)
    assert (plan.master_weights, plan.prediction_problem) == ("split32", None)
    with accumkern.attach(torch.optim.SGD(other.parameters()), master_weights="split32") as accumulator:
        assert all(
            torch.equal(accumulator.master_weight(p), w) for p, w in zip(other.parameters(), weights, strict=True)
        )
    if measure:
        torch.manual_seed(3)
        weights = [param.detach() for param in mlp(torch.float32).model.parameters()]
        of_plan = made[0].model.parameters()
        with accumkern.attach(made[0].optimizer, master_weights="split32") as accumulator:
            assert all(torch.equal(accumulator.master_weight(p), w) for p, w in zip(of_plan, weights, strict=True))


# ---- what fits ---------------------------------------------------------------------------------------------------


@given(st.integers(1, 300), st.integers(1, 300))
@settings(max_examples=200, deadline=None)
def test_doubling_and_binary_search_find_the_largest(fitting: int, at_most: int) -> None:
    tried = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= fitting

    assert largest(fits, at_most) == min(fitting, at_most)
    assert max(tried, default=1) <= at_most
    assert max(tried, default=1) <= 2 * min(fitting, at_most)  # never far beyond what fits
    assert len(tried) <= 2 * at_most.bit_length()


def fit_of(setup: Setup, limit: int, at_most: int = 64) -> Fit:
    with Preserved(setup) as preserved:
        return find_fit(preserved, limit, at_most)


def test_the_largest_that_fits_is_found_and_the_next_does_not_fit() -> None:
    found = fit_of(hungry(), 8000 * KB)
    peaks = {trial.micro_batch: trial for trial in found.trials}
    assert found.is_limited_by_memory
    assert 4 < found.micro_batch < 64
    assert peaks[found.micro_batch].fits
    assert peaks[found.micro_batch].peak_bytes <= 8000 * KB
    assert not peaks[found.micro_batch + 1].fits
    assert found.verified is found.trials[-1]
    assert found.held_bytes == 100 * KB
    # Each sample's share: batch, product, its square, and gradients on the way back.
    growth = peaks[4].peak_bytes - peaks[2].peak_bytes
    assert growth % (2 * 100 * KB) == 0
    assert growth > 0


def test_memory_is_not_the_limit_where_everything_fits() -> None:
    found = fit_of(hungry(), 10**9, at_most=6)
    assert (found.micro_batch, found.is_limited_by_memory) == (6, False)


def test_the_optimizers_states_count_from_the_first_step_on() -> None:
    class Big(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1000 * KB))

        def forward(self, batch: Tensor) -> Tensor:
            return (self.weight[: batch.shape[1]] * batch).mean()

    model = Big()
    setup = Setup(
        model,
        torch.optim.Adam(model.parameters()),
        lambda size: torch.ones(size, 10),
        lambda model, batch: model(batch),
    )
    found = fit_of(setup, 10**9, at_most=1)
    assert found.trials[0].peak_bytes > 5 * 4000 * KB  # weight, gradient, its addition, two states
    with pytest.raises(RuntimeError, match="no micro-batch fits: one sample needs more than 18 MB"):
        fit_of(setup, 18000 * KB, at_most=1)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adagrad])
def test_a_step_that_runs_out_of_memory_leaves_nothing_attached(kind: Any) -> None:
    # Then detach() has no memory to make the optimizer's states bfloat16 again.
    setup = gpt()
    setup = setup._replace(optimizer=kind(setup.model.parameters()))
    before = fingerprint(setup)
    with Preserved(setup, "split24", master_weights="split32") as preserved:
        most = try_windows(preserved, 1, 2, 2, 10**10)[0].peak_bytes
        outcomes = []
        for limit in range(most // 4, most + 1, most // 40):
            outcomes.append(try_windows(preserved, 1, 2, 2, limit)[0].fits)
            assert accumkern.accumulator_of(setup.optimizer) is None
            assert "add_param_group" not in vars(setup.optimizer)
    assert outcomes == sorted(outcomes)  # more memory is never worse
    assert not outcomes[0]
    assert same(before, fingerprint(setup))


def test_what_runs_out_later_is_made_smaller() -> None:
    windows = 0

    def growing(model: nn.Module, batch: Tensor) -> Tensor:
        nonlocal windows
        windows += 1
        if batch.shape[0] > 9 and windows % 7 == 0:  # not in the short trials, which have four losses each
            raise torch.OutOfMemoryError("CUDA out of memory.")
        if batch.shape[0] <= 9:
            windows = 0
        return model(batch)

    setup = hungry(growing)
    windows = 0
    found = fit_of(setup, 10**9, at_most=16)
    assert found.micro_batch <= 9 < 16
    assert found.is_limited_by_memory
    assert found.verified.fits
    assert any(not trial.fits for trial in found.trials)


def test_a_limit_below_the_parameters_and_no_fit_are_named() -> None:
    with pytest.raises(ValueError, match="less than what the model and its optimizer hold already, 100 kB"):
        fit_of(hungry(), 90 * KB)
    with pytest.raises(RuntimeError, match="no micro-batch fits: one sample needs more than 300 kB"):
        fit_of(hungry(), 300 * KB)
    with pytest.raises(RuntimeError, match="use activation checkpointing"):
        accumkern.plan(hungry, effective_batch=4, memory="400 kB")


def test_a_setup_that_leaks_is_named_and_a_cache_is_none() -> None:
    kept: list[Tensor] = []

    def leaking(model: nn.Module, batch: Tensor) -> Tensor:
        kept.append(batch)
        return model(batch)

    with pytest.raises(RuntimeError, match=r"setup\(\) leaks memory: each of 4 equal trials left"):
        fit_of(hungry(leaking), 10**9)
    cache: dict[int, Tensor] = {}

    def caching(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch * cache.setdefault(batch.shape[0], torch.ones_like(batch)))

    assert fit_of(hungry(caching), 10**9, at_most=2).micro_batch == 2


def test_the_longest_batch_is_what_is_tried() -> None:
    setup = hungry()._replace(make_batch=lambda size: torch.ones(size, 1))
    tall = setup._replace(longest_batch=lambda size: torch.ones(size, 25 * KB))
    assert fit_of(setup, 10**9, at_most=1).verified.peak_bytes < fit_of(tall, 10**9, at_most=1).verified.peak_bytes


# ---- what would fit elsewhere ------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("size", [1, 8, 32])
@pytest.mark.parametrize(
    ("maker", "least", "most"),
    [(gpt, -0.03, 0.001), (hungry, -0.001, 0.001), (conv, -0.30, 0.001)],
    ids=["gpt", "hungry", "conv"],
)
def test_predictions_are_near_what_is_measured(
    maker: Callable[[], Setup], least: float, most: float, size: int, micro_batches: int
) -> None:
    # What is missing is what kernels allocate inside themselves, such as the CPU's convolutions.
    setup = maker()
    buffer = choose_buffer(setup, None)
    with Preserved(setup, buffer) as preserved:
        tried, _ = try_windows(preserved, size, 2, micro_batches, 10**10)
    with fake_setup(maker) as fake:
        memory = predict_memory(fake, size, buffer, micro_batches)
    assert least <= memory.total / tried.peak_bytes - 1 <= most
    assert memory.parameters >= storage_bytes(setup.model.parameters())


def tuned(kind: Callable[..., torch.optim.Optimizer], **options: Any) -> Callable[[], Setup]:
    def make() -> Setup:
        setup = gpt()
        return setup._replace(optimizer=kind(setup.model.parameters(), lr=1e-3, **options))

    return make


@pytest.mark.parametrize("bucket_bytes", [2**18, 2**23], ids=["small buckets", "one bucket"])
@pytest.mark.parametrize("master_weights", ["split24", "split32"])
@pytest.mark.parametrize(("size", "micro_batches"), [(1, 1), (1, 2), (8, 2)])
@pytest.mark.parametrize(
    "maker",
    [
        tuned(torch.optim.AdamW, fused=True),
        tuned(torch.optim.AdamW, foreach=True),
        tuned(torch.optim.AdamW, foreach=False),
        tuned(torch.optim.SGD, momentum=0.9),
        tuned(torch.optim.SGD, momentum=0.9, foreach=True),
        tuned(OwnAdamW, fused=True),
        tuned(OwnAdamW, foreach=True),
    ],
    ids=["AdamW fused", "AdamW foreach", "AdamW", "SGD", "SGD foreach", "own AdamW fused", "own AdamW foreach"],
)
def test_predictions_with_master_weights_are_near_what_is_measured(
    maker: Callable[[], Setup],
    size: int,
    micro_batches: int,
    master_weights: str,
    bucket_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stepping, "bucket_bytes_on", lambda device: bucket_bytes)
    with Preserved(maker(), "split24", master_weights=master_weights) as preserved:
        tried, _ = try_windows(preserved, size, 2, micro_batches, 10**10)
    with fake_setup(maker) as fake:
        memory = predict_memory(fake, size, "split24", micro_batches, master_weights)
    assert memory.total == pytest.approx(tried.peak_bytes, rel=0.001)


def test_categories_of_a_prediction_with_master_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_setup(tuned(torch.optim.AdamW)) as fake:
        numel = sum(p.numel() for p in fake.model.parameters())
        assert step_bytes(fake) == 0
        in_one_pass = predict_memory(fake, 8, "split24", 2, "split32").optimizer_state
        assert 8 * numel <= in_one_pass <= 8.1 * numel  # two moments
    with fake_setup(tuned(OwnAdamW, fused=True)) as fake:
        assert step_bytes(fake) == 8 * numel
        memories = {name: predict_memory(fake, 8, "split24", 2, name) for name in ("split24", "split32")}
    for name, per_param in (("split24", 1), ("split32", 2)):
        assert memories[name].master_residuals == per_param * numel
        assert (memories[name].parameters, memories[name].residuals) == (2 * numel, numel)
        # Two moments and a bucket of everything, in FP32.
        assert 16 * numel <= memories[name].optimizer_state <= 16.1 * numel
    monkeypatch.setattr(stepping, "bucket_bytes_on", lambda device: 1)
    with fake_setup(tuned(OwnAdamW, fused=True)) as fake:
        largest_numel = max(p.numel() for p in fake.model.parameters())
        small = predict_memory(fake, 8, "split24", 2, "split32")
        assert 8 * (numel + largest_numel) <= small.optimizer_state <= 8.1 * (numel + largest_numel)
        assert dataclasses.replace(small, optimizer_state=0) == dataclasses.replace(
            memories["split32"], optimizer_state=0
        )


def test_categories_of_a_prediction() -> None:
    with fake_setup(gpt) as fake:
        numel = sum(p.numel() for p in fake.model.parameters())
        memories = {buffer: predict_memory(fake, 8, buffer) for buffer in ("split24", "split32", "fp32")}
    for buffer, per_param in (("split24", 1), ("split32", 2), ("fp32", 4)):
        assert memories[buffer].residuals == per_param * numel
        assert memories[buffer].parameters == 2 * numel
    assert memories["split24"].gradients == 2 * numel
    assert 4 * numel <= memories["split24"].optimizer_state <= 4 * numel + 400


def test_a_model_larger_than_the_machine_is_predicted_without_its_memory() -> None:
    def giant() -> Setup:
        sizes = [2**15, 2**16] * 4 + [2**15]
        model = nn.Sequential(*(nn.Linear(*pair, bias=False) for pair in pairwise(sizes))).to(torch.bfloat16)
        optimizer = torch.optim.AdamW(model.parameters())
        return Setup(
            model,
            optimizer,
            lambda size: torch.randn(size, 2**15, dtype=torch.bfloat16),
            lambda model, batch: model(batch).mean(),
        )

    plan = accumkern.plan(giant, effective_batch=64, memory="200 GB", master_weights=None, measure=False)
    parameters = 8 * 2**32
    assert plan.predictions[0].memory.parameters == parameters  # 34 GB
    assert plan.predictions[0].memory.residuals == parameters // 2
    assert (plan.choice.micro_batch, plan.choice.accumulation_steps, plan.fit) == (64, 1, None)
    with pytest.raises(ValueError, match=r"no micro-batch would fit into 100 GB with a margin of 10%: .* 34\.4 GB"):
        accumkern.plan(giant, memory="100 GB", master_weights=None, measure=False)
    with pytest.raises(ValueError, match=r"parameters 34\.4 GB, their master weights 34\.4 GB, .* residuals 51\.5 GB"):
        accumkern.plan(giant, memory="200 GB", measure=False)


def test_a_script_that_needs_values_is_not_predicted_and_says_why() -> None:
    def peeking() -> Setup:
        return mlp()._replace(make_batch=lambda size: torch.randn(size, 16 + int(torch.rand(1).item())).bfloat16())

    with pytest.raises(PredictionError, match="does not run on fake tensors"):
        accumkern.plan(peeking, memory="1 GB", measure=False)
    plan = accumkern.plan(peeking, effective_batch=2, noise_windows=0)
    assert plan.predictions == ()
    assert "does not run on fake tensors" in str(plan.prediction_problem)
    assert "does not run on fake tensors" in str(plan)


def test_a_model_that_was_made_before_is_not_predicted_and_not_touched() -> None:
    setup = mlp()
    before = fingerprint(setup)
    with pytest.raises(PredictionError, match="a model that was made before it was called"):
        accumkern.plan(lambda: setup, memory="1 GB", measure=False)
    assert same(before, fingerprint(setup))
    plan = accumkern.plan(lambda: setup, effective_batch=4, noise_windows=0)  # measuring works
    assert "made before it was called" in str(plan.prediction_problem)
    assert same(before, fingerprint(setup))


def test_a_prediction_leaves_random_numbers_alone_and_needs_a_limit() -> None:
    before = torch.get_rng_state(), random.getstate()
    accumkern.plan(mlp, memory="1 GB", largest_micro_batch=4, measure=False)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    with pytest.raises(ValueError, match="memory is None; a prediction"):
        accumkern.plan(mlp, measure=False)


# ---- what is fast, what helps training ---------------------------------------------------------------------------


def test_the_knee_is_the_smallest_that_is_about_as_fast_as_any() -> None:
    speeds = [Speed(m, 0.01 + 0.001 * m, 0.1) for m in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)]
    assert knee(speeds).micro_batch == 256  # 256 / 0.266 is 98% of 512 / 0.522; 128 is 95% of nothing better
    assert knee([Speed(1, 1.0, 0.0), Speed(2, 2.0, 0.0)]).micro_batch == 1
    assert Speed(4, 0.5, 1.0).window_seconds(6) == 4.0
    assert Speed(4, 0.5, 1.0).samples_per_second(6) == 6.0


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


# ---- the decision ------------------------------------------------------------------------------------------------


def saturating(micro_batch: int, accumulation_steps: int) -> float:
    """Samples per second: 1 ms per micro-batch and per sample, 10 ms per step."""
    return micro_batch * accumulation_steps / (accumulation_steps * (0.001 + 0.001 * micro_batch) + 0.01)


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
    assert best_batch(1, sizes, saturating, 1e-9) == 1
    assert best_batch(1, sizes, saturating, 0.0) == 1
    assert best_batch(1, sizes, saturating, 4.0) < best_batch(1, sizes, saturating, 400.0)


@pytest.mark.parametrize(
    ("dtypes", "asked", "buffer"),
    [
        ([torch.float32], None, None),
        ([torch.float32], "split32", None),
        ([torch.bfloat16, torch.float32], None, "split24"),
        ([torch.bfloat16], "split32", "split32"),
        ([torch.float16], None, "fp32"),
    ],
)
def test_the_buffer_follows_the_dtypes(dtypes: list[torch.dtype], asked: str | None, buffer: str | None) -> None:
    model = nn.ParameterList([nn.Parameter(torch.zeros(3, dtype=dtype)) for dtype in dtypes])
    setup = Setup(model, torch.optim.SGD(model.parameters()), torch.zeros, lambda model, batch: batch)
    assert choose_buffer(setup, asked) == buffer


@pytest.mark.parametrize(
    ("dtypes", "asked", "masters"),
    [
        ([torch.float32], "auto", None),
        ([torch.float32], "split32", None),  # stepped as they are
        ([torch.bfloat16, torch.float32], "auto", "split32"),
        ([torch.bfloat16], "split24", "split24"),
        ([torch.bfloat16], None, None),
        ([torch.float16, torch.bfloat16], "auto", None),
    ],
)
def test_masters_follow_the_dtypes(dtypes: list[torch.dtype], asked: str | None, masters: str | None) -> None:
    model = nn.ParameterList([nn.Parameter(torch.zeros(3, dtype=dtype)) for dtype in dtypes])
    setup = Setup(model, torch.optim.SGD(model.parameters()), torch.zeros, lambda model, batch: batch)
    assert choose_masters(setup, asked) == masters
    if torch.float16 in dtypes:
        with pytest.raises(TypeError, match=r"'split32', and some of the optimizer's parameters are float16"):
            choose_masters(setup, "split32")
    model.requires_grad_(False)
    assert choose_masters(setup, asked) is None  # what is frozen is not stepped


# ---- the plan ----------------------------------------------------------------------------------------------------


def test_a_plan_of_a_gpt() -> None:
    told = []
    plan = accumkern.plan(
        gpt, effective_batch=24, memory="4 MB", noise_windows=8, progress=lambda stage, detail: told.append(stage)
    )
    choice = plan.choice
    assert choice.micro_batch * choice.accumulation_steps == choice.effective_batch == 24
    assert plan.buffer == "split24"
    assert plan.master_weights == "split32"
    assert plan.attach
    assert plan.fit is not None
    assert plan.is_limited_by_memory
    assert choice.memory_bytes <= 0.9 * 4e6
    assert plan.largest_micro_batch < 24
    assert plan.prediction_error is not None
    assert plan.prediction_error < 0.03
    assert plan.noise is not None
    assert [c.ranks for c in plan.by_ranks] == [1, 2, 4, 8]
    assert plan.by_ranks[0] == choice
    assert all(c.effective_batch == 24 for c in plan.by_ranks)
    assert plan.by_ranks[3].micro_batch <= 3
    assert plan.by_ranks[1].memory_bytes > plan.gradient_bytes
    assert set(told) == {"what fits", "what is fast", "what helps training", "what would fit elsewhere", "the plan"}
    text = str(plan)
    assert f"micro-batch {choice.micro_batch}, accumulation steps {choice.accumulation_steps}" in text
    assert "kept exactly" in text
    steps = choice.accumulation_steps
    assert f"accumkern.attach(optimizer, 'split24', master_weights='split32', average_over={steps})\n" in text
    assert "Master weights: 'split32', because without them updates below 1/512 of a weight are lost" in text
    assert "This costs 2 bytes per parameter (173 kB), optimizer states in FP32 (4 bytes more per parameter" in text
    assert "for the FP32 weights and gradients of a step" not in text  # which is one pass
    data = json.loads(json.dumps(plan.to_dict(), allow_nan=False))
    assert data["choice"]["effective_batch"] == 24


def test_accumulation_that_is_not_worth_it_is_called_so(monkeypatch: pytest.MonkeyPatch) -> None:
    # Little noise and a cheap step: a batch of many micro-batches wastes samples.
    clock = Clock(seconds_of_step=0.005)
    monkeypatch.setattr(trial, "now", clock.now)

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
    assert "beta2 raised to the power" in str(plan)
    alone = accumkern.plan(setup, effective_batch=4, noise_windows=0)
    assert (alone.choice.accumulation_steps, alone.attach) == (1, True)
    assert "not needed" in str(alone)
    assert alone.attach_line == "accumkern.attach(optimizer, 'split24', master_weights='split32')"
    stock = accumkern.plan(setup, effective_batch=4, noise_windows=0, master_weights=None)
    assert (stock.attach, stock.attach_line) == (False, None)
    assert "Master weights: none were asked for, and updates below 1/512 of a weight are lost" in str(stock)
    assert "master_weights='split32' would keep them for 2 bytes per parameter (128 B)" in str(stock)


def test_accumulation_that_spreads_a_slow_step_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(seconds_of_step=0.5)
    monkeypatch.setattr(trial, "now", clock.now)

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

    plan = accumkern.plan(setup, effective_batch=256, largest_micro_batch=4, noise_windows=8)
    assert plan.accumulation_pays is True
    assert "worth it here" in str(plan)
    assert "Buffer: none" in str(plan)
    assert "Master weights" not in str(plan)
    free = accumkern.plan(setup, largest_micro_batch=4, noise_windows=32)
    assert free.choice.accumulation_steps > 8
    assert free.target is None


def test_a_target_that_nothing_divides_gets_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(seconds_of_step=0.005)
    monkeypatch.setattr(trial, "now", clock.now)
    plan = accumkern.plan(lambda: clock.pass_with(gpt()), effective_batch=97, memory="3 MB", noise_windows=0)
    assert plan.choice.micro_batch > 1
    assert abs(plan.choice.effective_batch - 97) < 10
    assert plan.choice.effective_batch != 97
    assert "the nearest to the 97 that was asked for" in str(plan)
    assert "What helps training: the gradient noise scale was not measured." in str(plan)


def gradient_release() -> Setup:
    """Return a setup whose optimizer cannot step FP32 weights, by its option."""
    setup = mlp()
    group = {"params": list(setup.model.parameters()), "gradient_release": True}
    return setup._replace(optimizer=torch.optim.SGD([group], lr=0.1))


def test_an_optimizer_that_cannot_step_fp32_weights_is_planned_for_without_and_told_why() -> None:
    plan = accumkern.plan(gradient_release, effective_batch=4, noise_windows=4)
    assert (plan.master_weights, plan.attach) == (None, plan.choice.accumulation_steps > 1)
    why = (
        "SGD cannot step FP32 weights: gradient_release is on: its steps are hooks in the backward pass, and not step()"
    )
    assert plan.master_problem == why
    assert (
        f"Master weights: none, and updates below 1/512 of a weight are lost in rounding it to bfloat16; {why}."
        in str(plan)
    )
    for measure in (True, False):
        with pytest.raises(TypeError, match="master_weights is 'split24', and SGD cannot step FP32 weights: gradient"):
            accumkern.plan(gradient_release, memory="1 GB", master_weights="split24", measure=measure)


@pytest.mark.parametrize(("master_weights", "dtype"), [("auto", torch.float32), (None, torch.bfloat16)])
def test_all_that_is_measured_steps_what_will_be_stepped(master_weights: str | None, dtype: torch.dtype) -> None:
    stages: dict[str, set[tuple[torch.dtype, bool]]] = {}
    stage = "what fits"

    def told(name: str, _detail: str) -> None:
        nonlocal stage
        stage = name

    def setup() -> Setup:
        made = mlp()

        def after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            if type(next(iter(made.model.parameters()))) is nn.Parameter:  # not what is predicted with
                found = {state["exp_avg"].dtype for state in optimizer.state.values()}
                attached = accumkern.accumulator_of(optimizer) is not None
                stages.setdefault(stage, set()).update((of, attached) for of in found)

        made.optimizer.register_step_post_hook(after_step)
        return made

    asked: Any = {"effective_batch": 4, "largest_micro_batch": 4, "noise_windows": 4, "progress": told}
    plan = accumkern.plan(setup, **asked, master_weights=master_weights)
    is_attached = master_weights is not None or plan.choice.accumulation_steps > 1  # by what is fast here
    assert {"what fits", "what is fast", "what helps training", "the plan"} <= set(stages)
    assert {of for found in stages.values() for of, _ in found} == {dtype}
    assert stages["the plan"] == {(dtype, is_attached)}


def test_batchnorm_gets_a_warning() -> None:
    plan = accumkern.plan(conv, effective_batch=8, largest_micro_batch=2, noise_windows=0)
    assert len(plan.warnings) == 1
    assert "BatchNorm (layers.1)" in plan.warnings[0]
    assert "statistics are those of a micro-batch of" in plan.warnings[0]
    assert not accumkern.plan(mlp, effective_batch=1, noise_windows=0).warnings


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"effective_batch": 0}, ValueError, "effective_batch is 0; it must be an int of at least 1"),
        ({"effective_batch": 2.0}, TypeError, "effective_batch is a float; it must be an int of at least 1"),
        ({"memory": "lots"}, ValueError, "memory is 'lots'"),
        ({"margin": 1.0}, ValueError, "margin is 1.0; it must be a number of at least 0 and less than 1"),
        ({"margin": "10%"}, TypeError, "margin is a str"),
        ({"buffer": "split16"}, ValueError, "buffer is 'split16'; it must be one of split24, split32, fp32"),
        ({"master_weights": "fp32"}, ValueError, "is 'fp32'; it must be one of auto, split24, split32, or None"),
        ({"master_weights": True}, TypeError, "master_weights is a bool; it must be one of auto, split24, split32"),
        ({"noise_windows": 2}, ValueError, "noise_windows is 2; it must be at least 4, or 0"),
        ({"largest_micro_batch": -1}, ValueError, "largest_micro_batch is -1"),
        ({"memory": "1 kB"}, ValueError, "less than what the model and its optimizer hold already"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        accumkern.plan(mlp, **arguments)
    assert message in str(raised.value)


@pytest.mark.parametrize("master_weights", [None, "split32"])
def test_an_attached_optimizer_is_refused_and_left_attached(master_weights: str | None) -> None:
    setup = mlp()
    accumulator = accumkern.attach(setup.optimizer, master_weights=master_weights)
    train_window(setup, [make_batch(setup, 2) for _ in range(2)], 2, accumulator)
    params = list(setup.model.parameters())
    before = fingerprint(setup)
    masters = [] if master_weights is None else [accumulator.master_weight(param) for param in params]
    with pytest.raises(ValueError, match="attached already; detach"):
        accumkern.plan(lambda: setup, effective_batch=8)
    assert accumkern.accumulator_of(setup.optimizer) is accumulator
    if master_weights is not None:
        assert any(not torch.equal(master, param) for master, param in zip(masters, params, strict=True))
        assert same(masters, [accumulator.master_weight(param) for param in params])
    assert same(before, fingerprint(setup))
    train_window(setup, [make_batch(setup, 2) for _ in range(2)], 2, accumulator)


@pytest.mark.gpu
def test_a_plan_on_a_gpu_respects_its_limit_and_gives_the_memory_back() -> None:
    def setup() -> Setup:
        made = gpt(layers=2)
        model = made.model.cuda()
        return made._replace(
            model=model,
            optimizer=torch.optim.AdamW(model.parameters(), fused=True),
            make_batch=lambda size: torch.randint(256, (size, 65), device="cuda"),
        )

    made = setup()
    device = made.device
    torch.cuda.empty_cache()
    allocated, fraction = torch.cuda.memory_allocated(device), torch.cuda.get_per_process_memory_fraction(device)
    limit = torch.cuda.memory_reserved(device) + 200 * 10**6
    plan = accumkern.plan(lambda: made, effective_batch=4096, memory=limit, noise_windows=8)
    assert plan.is_limited_by_memory
    assert plan.choice.memory_bytes <= 0.9 * limit
    assert torch.cuda.memory_allocated(device) <= allocated  # less where a library has let go of its workspace
    assert torch.cuda.get_per_process_memory_fraction(device) == fraction
    with fake_setup(setup) as fake:
        size = plan.choice.micro_batch
        micro_batches = min(2, plan.choice.accumulation_steps)
        predicted = predict_memory(fake, size, "split24", micro_batches, plan.master_weights).total
    print(f"predicted {predicted / plan.choice.memory_bytes - 1:+.1%} of the measured peak on {plan.machine['device']}")
    assert predicted == pytest.approx(plan.choice.memory_bytes, rel=0.25)
