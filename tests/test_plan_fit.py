"""What fits: memory, trials after which everything is put back, the largest micro-batch and the smallest."""

import gc
import os
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planned import (  # noqa: F401
    changed,
    conv,
    fingerprint,
    gpt,
    hungry,
    mlp,
    old_objects_aside,
    same,
    short_timings,
)
from scarce import Scarce
from torch import Tensor, nn

import accumkern
from accumkern.memory import storage_bytes
from accumkern.out_of_memory import MemoryLimitError, format_bytes, is_out_of_memory, parse_bytes
from accumkern.planning import memory
from accumkern.planning.fit import Fit, find_fit, largest
from accumkern.planning.memory import MemoryMeter, available_bytes, held_tensors
from accumkern.planning.precision import accumulation, choose_buffer, choose_masters
from accumkern.planning.protocol import (
    Setup,
    check_setup,
    compute_loss,
    make_batch,
)
from accumkern.planning.trial import Preserved, train_window, try_windows

pytestmark = pytest.mark.usefixtures("one_thread", "old_objects_aside", "short_timings")

CPU = torch.device("cpu")
KB = 1000


# ---- memory --------------------------------------------------------------------------------------------------------


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


def test_the_meter_knows_what_another_thread_releases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "is_in_group", lambda: True)  # whose threads release
    held: list[torch.Tensor] = []
    with MemoryMeter(CPU, 0, 10**9) as meter:
        for _ in range(8):
            held.append(torch.zeros(4000 * KB, dtype=torch.uint8))
            thread = threading.Thread(target=held.clear)
            thread.start()
            thread.join()
    assert meter.left_bytes == 0
    assert 4000 * KB <= meter.peak_bytes < 8 * 4000 * KB  # an address that comes again was released


def test_the_limit_knows_storages_that_were_resized() -> None:
    with MemoryMeter(CPU, 0, 120 * KB):
        kept = [torch.ones(50 * KB, dtype=torch.uint8)]
        for _ in range(4):
            kept[-1].untyped_storage().resize_(0)
            kept.append(torch.ones(50 * KB, dtype=torch.uint8))
        with pytest.raises(MemoryLimitError, match="150 kB of 120 kB"):
            torch.ones(100 * KB, dtype=torch.uint8)


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
    for text in (
        "DefaultCPUAllocator: not enough memory",
        "std::bad_alloc",
        "CUBLAS_STATUS_NOT_INITIALIZED when calling",
    ):
        assert is_out_of_memory(RuntimeError(text))
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


# ---- everything put back -------------------------------------------------------------------------------------------


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


# ---- what fits -----------------------------------------------------------------------------------------------------


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


# ---- the smallest that trains, and data that ends ------------------------------------------------------------------


def batch_norm() -> Setup:
    """Return a model whose BatchNorm has one value per channel and sample, as a ResNet's has on small images."""
    model = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    return Setup(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        lambda size: torch.randn(size, 16),
        lambda model, batch: model(batch).square().mean(),
    )


def needs(least: int, tried: list[int] | None = None) -> Setup:
    """Return a setup that fewer samples than ``least`` do not train."""
    setup = hungry()

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        if tried is not None:
            tried.append(batch.shape[0])
        if batch.shape[0] < least:
            raise ZeroDivisionError(f"not of {batch.shape[0]}")
        return setup.loss(model, batch)

    return setup._replace(loss=loss)


def test_where_one_sample_is_too_few_for_batchnorm_nothing_smaller_than_two_is_tried() -> None:
    sizes = set()

    def setup() -> Setup:
        made = batch_norm()

        def loss(model: nn.Module, batch: Tensor) -> Tensor:
            sizes.add(batch.shape[0])
            return made.loss(model, batch)

        return made._replace(loss=loss)

    plan = accumkern.plan(setup, effective_batch=16, largest_micro_batch=6, noise_windows=4)
    assert plan.fit is not None
    assert (plan.fit.smallest, plan.fit.micro_batch) == (2, 6)
    assert min(speed.micro_batch for speed in plan.speeds) == 2
    assert all(choice.micro_batch >= 2 for choice in plan.by_ranks)
    assert plan.prediction_problem is None
    assert "Smallest micro-batch: 2 samples. With one less the script raises an error (ValueError: Expected" in str(
        plan
    )
    assert sizes >= {1, 2, 4, 6}


@pytest.mark.parametrize(("least", "at_most"), [(2, 2), (3, 7), (8, 64)])
def test_the_smallest_that_trains_is_found(least: int, at_most: int) -> None:
    found = fit_of(needs(least), 10**9, at_most)
    assert (found.smallest, found.micro_batch, found.is_limited_by_memory) == (least, at_most, False)
    assert found.smallest_problem == f"ZeroDivisionError: not of {least - 1}"
    assert min(trial.micro_batch for trial in found.trials) == least
    assert all(trial.problem is None for trial in found.trials)


@pytest.mark.parametrize(("least", "at_most", "last"), [(9, 64, 8), (3, 2, 2), (2, 1, 1)])
def test_an_error_of_every_size_is_raised_as_it_is(least: int, at_most: int, last: int) -> None:
    tried: list[int] = []
    raises = min(2, at_most)
    with pytest.raises(RuntimeError, match=rf"^loss of setup\(\) raised ZeroDivisionError: not of {raises}$") as raised:
        fit_of(needs(least, tried), 10**9, at_most)
    assert isinstance(raised.value.__cause__, ZeroDivisionError)
    assert tried == [*range(1, last + 1), raises]


def test_what_one_sample_raises_does_not_hide_what_is_wrong() -> None:
    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        raise KeyError("labels") if len(model(batch)) > 1 else AssertionError

    with pytest.raises(RuntimeError, match=r"loss of setup\(\) raised KeyError: 'labels'"):
        fit_of(batch_norm()._replace(loss=loss), 10**9)


def test_an_error_of_larger_sizes_alone_is_raised_at_once() -> None:
    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        if batch.shape[0] == 4:
            raise ZeroDivisionError("of four")
        return model(batch)

    with pytest.raises(RuntimeError, match="ZeroDivisionError: of four"):
        fit_of(hungry(loss), 10**9)


def test_the_smallest_that_trains_may_not_fit() -> None:
    with pytest.raises(
        RuntimeError, match="no micro-batch fits: 3 samples, the fewest that train, need more than 800 kB"
    ):
        fit_of(needs(3), 800 * KB)


def sampled(size: int) -> Tensor:
    return torch.stack(random.sample(list(torch.ones(13, 16)), size))


def indexed(size: int) -> Tensor:
    return torch.stack([torch.ones(13, 16)[i] for i in range(size)])


def cut(size: int) -> Tensor:
    return torch.ones(13, 16)[:size]


def loaded(size: int) -> Tensor:
    return next(iter(torch.utils.data.DataLoader(torch.ones(13, 16), batch_size=size, drop_last=True)))


@pytest.mark.parametrize("at_most", [13, 14, 64])
@pytest.mark.parametrize(
    ("maker", "problem"),
    [
        (sampled, "make_batch(14) of setup() raised ValueError: Sample larger than population"),
        (indexed, "make_batch(14) of setup() raised IndexError"),
        (
            cut,
            "make_batch(14) of setup() made tensors of shape (13, 16); the first dimension of one of them must be 14",
        ),
        (loaded, "make_batch(14) of setup() raised StopIteration"),
    ],
    ids=["random.sample", "index", "slice", "DataLoader"],
)
def test_the_data_may_be_the_limit(maker: Callable[[int], Tensor], problem: str, at_most: int) -> None:
    setup = mlp(torch.float32)._replace(make_batch=maker)
    found = fit_of(setup, 10**9, at_most)
    assert (found.micro_batch, found.is_limited_by_memory) == (13, False)
    if at_most == 13:
        assert found.data_problem is None
    else:
        assert str(found.data_problem).startswith(problem)
        assert "let make_batch draw with replacement, or ask for smaller micro-batches" in str(found.data_problem)


def test_a_plan_says_that_the_data_is_the_limit() -> None:
    plan = accumkern.plan(lambda: mlp(torch.float32)._replace(make_batch=sampled), effective_batch=52, noise_windows=0)
    assert plan.largest_micro_batch == 13
    assert "memory is not the limit. A micro-batch of 13 samples, the largest that there is data for, fits" in str(plan)
    assert "Data: it is the limit. make_batch(14) of setup() raised ValueError: Sample larger than" in str(plan)


def test_memory_counts_before_data() -> None:
    found = fit_of(hungry()._replace(make_batch=lambda size: torch.randn(min(size, 20), 25000)), 4000 * KB)
    assert found.micro_batch < 13
    assert (found.is_limited_by_memory, found.data_problem) == (True, None)


def test_data_that_comes_to_an_end_is_named() -> None:
    left = 100

    def make(size: int) -> Tensor:
        nonlocal left
        left -= size
        return torch.ones(size if left >= 0 else 0, 16)

    with pytest.raises(ValueError, match=r"or they have come to an end, let make_batch draw with replacement"):
        accumkern.plan(lambda: mlp(torch.float32)._replace(make_batch=make), effective_batch=4, noise_windows=8)


def test_the_noise_scale_is_not_measured_with_fewer_than_train() -> None:
    plan = accumkern.plan(lambda: needs(6), effective_batch=12, largest_micro_batch=6, noise_windows=4)
    assert plan.noise is not None
    assert plan.noise.batch == 8 * 6


def test_a_trial_that_failed_in_a_backward_pass_leaves_nothing_for_the_next_to_let_go() -> None:
    """What waits in autograd's queue is gone before the next trial is measured, or that seems to need less."""

    def setup() -> Any:
        torch.manual_seed(0)
        scarce = Scarce(4, "backward")
        model = nn.ModuleDict({"first": nn.Linear(8, 64), "side": nn.Linear(64, 4), "last": nn.Linear(64, 4)})

        def loss(model: Any, batch: Tensor) -> Tensor:
            hidden = model["first"](batch)
            side = model["side"](hidden.exp()).square().mean()  # waits while the other branch fails
            return side + model["last"](scarce(hidden.tanh())).square().mean()

        return model, torch.optim.SGD(model.parameters(), lr=0.1), lambda size: torch.randn(size, 8), loss

    def peak_of_four(fails_before: bool) -> int:
        with Preserved(check_setup(setup())) as preserved:
            if fails_before:
                assert not try_windows(preserved, 256, 2, 2, 10**9)[0].fits
            return try_windows(preserved, 4, 2, 2, 10**9)[0].peak_bytes

    assert peak_of_four(True) == peak_of_four(False)
