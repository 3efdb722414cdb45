"""Who holds whom: optimizer, accumulator and hooks; copies of them; what goes away with what."""

from __future__ import annotations

import copy
import functools
import gc
import io
import pickle
import tracemalloc
import weakref
from collections.abc import Callable
from typing import Any

import gradients
import pytest
import torch
from gradients import (
    BF16,
    assert_attached,
    assert_same_bits,
    backward,
    backward_of_all,
    fail,
    is_averaged,
    is_hooked,
    parameter,
)
from torch import Tensor
from torch.nn import Parameter
from torch.nn import functional as F  # noqa: N812

import accumkern

pytestmark = pytest.mark.usefixtures("one_thread")

sgd = functools.partial(gradients.sgd, momentum=0.5)


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# ---- who holds whom ------------------------------------------------------------------------------------------------


def test_hooks_live_as_long_as_the_optimizer_and_no_longer(no_collector: None) -> None:
    param = parameter(4)
    optimizer = torch.optim.SGD([param], lr=1.0)
    accumkern.attach(optimizer, average_over=2)
    assert is_averaged(param)
    del optimizer
    assert not is_averaged(param)
    assert not param._post_accumulate_grad_hooks


def test_an_accumulator_that_is_kept_keeps_the_optimizer(no_collector: None) -> None:
    param = parameter(4)
    acc = accumkern.attach(torch.optim.SGD([param], lr=1.0), average_over=2)
    assert is_averaged(param)
    assert acc.gradient(param) is None
    del acc
    assert not is_averaged(param)


def test_nothing_is_left_in_a_circle(no_collector: None) -> None:
    """With the noise scale, the report and a step, whatever was made goes away with its last reference."""
    param = parameter(4)
    optimizer = torch.optim.SGD([param], lr=1.0)
    acc = accumkern.attach(optimizer, stats=True, report=True)
    for _ in range(2):
        backward(param, 1.0)
    acc.noise_scale()
    acc.finish()
    optimizer.step()
    gone = [weakref.ref(x) for x in (acc, optimizer, acc._attachment, acc._passes, acc._attachment.slots[param])]
    del acc, optimizer
    assert [reference() for reference in gone] == [None] * 5


@pytest.mark.parametrize("kept", [False, True], ids=["result dropped", "result kept"])
def test_a_cell_that_is_run_again(no_collector: None, kept: bool) -> None:
    """The optimizer and its accumulator have the same names; the second replaces the first."""
    param = parameter(4)
    names: dict[str, object] = {}
    for _ in range(2):
        names["optimizer"] = optimizer = torch.optim.SGD([param], lr=1.0)
        if kept and names.get("acc") is not None:
            with pytest.raises(ValueError, match=r"accumulator_of\(optimizer\)"):
                accumkern.attach(optimizer, average_over=2)
            earlier = accumkern.accumulator_of(optimizer)
            assert earlier is names["acc"]
            assert earlier is not None
            earlier.detach()
        acc = accumkern.attach(optimizer, average_over=2)
        if kept:
            names["acc"] = acc
        assert is_averaged(param)
        del acc, optimizer


def test_an_optimizer_in_a_circle_is_looked_for_before_a_refusal(no_collector: None) -> None:
    class Trainer:
        def __init__(self, param: Tensor) -> None:
            self.optimizer = torch.optim.SGD([param], lr=1.0)
            self.me = self

    param = parameter(4)
    for _ in range(2):
        accumkern.attach(Trainer(param).optimizer, average_over=2)


def test_copies_of_an_optimizer_have_nothing_of_ours() -> None:
    param = parameter(4)
    optimizer = torch.optim.SGD([param], lr=1.0)
    accumkern.attach(optimizer)
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert accumkern.accumulator_of(other) is None
        assert "add_param_group" not in vars(other)


# ---- copies --------------------------------------------------------------------------------------------------------


def model_and_optimizer() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(2)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2)).to(BF16)
    return model, sgd(*model.parameters())


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, windows: int = 2) -> None:
    for _ in range(windows):
        for n in range(8):
            F.mse_loss(model(torch.full((3, 4), 1 + n / 8, dtype=BF16)), torch.ones(3, 2, dtype=BF16)).backward()
        optimizer.step()
        optimizer.zero_grad()


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def saved(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("middle_of_window", [False, True], ids=["between windows", "in a window"])
@pytest.mark.parametrize("make", [copy.deepcopy, pickled, saved], ids=["deepcopy", "pickle", "torch.save"])
def test_copies_of_model_and_optimizer_train_as_stock(make: Callable[[Any], Any], middle_of_window: bool) -> None:
    model, optimizer = model_and_optimizer()
    accumkern.attach(optimizer, "split32")
    train(model, optimizer)
    if middle_of_window:
        for n in range(3):
            model(torch.full((3, 4), 1 + n / 8, dtype=BF16)).sum().backward()
    twin, twin_optimizer = make((model, optimizer))
    if middle_of_window:
        twin_optimizer.zero_grad()
    assert not any(is_hooked(p) for p in twin.parameters())
    assert "add_param_group" not in vars(twin_optimizer)
    assert type(twin_optimizer).add_param_group is torch.optim.Optimizer.add_param_group
    stock, stock_optimizer = model_and_optimizer()
    stock.load_state_dict(model.state_dict())
    stock_optimizer.load_state_dict(optimizer.state_dict())
    for m, o in ((twin, twin_optimizer), (stock, stock_optimizer)):
        o.add_param_group({"params": [parameter(3)]})
        assert not is_hooked(o.param_groups[1]["params"][0])
        train(m, o)
    for a, b in zip(twin.parameters(), stock.parameters(), strict=True):
        assert_same_bits(a, b)
    assert all(is_hooked(p) for p in model.parameters())


def test_state_dicts_of_model_and_optimizer_are_those_of_stock() -> None:
    model, optimizer = model_and_optimizer()
    stock, stock_optimizer = model_and_optimizer()
    accumkern.attach(optimizer)
    train(model, optimizer)
    train(stock, stock_optimizer)
    assert list(model.state_dict()) == list(stock.state_dict())
    ours, theirs = optimizer.state_dict(), stock_optimizer.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    assert {k: list(v) for k, v in ours["state"].items()} == {k: list(v) for k, v in theirs["state"].items()}
    assert all(not vars(p) for p in model.parameters())
    assert [vars(m).keys() for m in model.modules()] == [vars(m).keys() for m in stock.modules()]
    through_a_file({"model": model.state_dict(), "optimizer": ours})


@pytest.mark.parametrize("first", ["attach", "scheduler"])
def test_learning_rate_schedulers_work_as_with_stock(first: str) -> None:
    rates = []
    for attached in (True, False):
        model, optimizer = model_and_optimizer()
        if attached and first == "attach":
            accumkern.attach(optimizer)
        schedulers = [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3),
            torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
        ]
        scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, schedulers, milestones=[3])
        if attached and first == "scheduler":
            accumkern.attach(optimizer)
        rates.append([])
        for _ in range(6):
            train(model, optimizer, windows=1)
            scheduler.step()
            rates[-1].append(optimizer.param_groups[0]["lr"])
        if attached:
            assert_attached(parameter_of(model))
    assert rates[0] == rates[1]


def parameter_of(model: torch.nn.Module) -> Parameter:
    return next(iter(model.parameters()))


# ---- lifetime ------------------------------------------------------------------------------------------------------


def test_accumulator_lives_as_long_as_its_optimizer() -> None:
    param = parameter(4)
    optimizer = sgd(param)
    accumkern.attach(optimizer, "split32")
    gc.collect()
    assert_attached(param)
    gc.collect()
    assert_attached(param)
    del optimizer
    gc.collect()
    param.grad = None
    for grad in (256.0, 1.0, 1.0):  # nobody accumulates any more
        backward_of_all([param], [torch.full((4,), grad)])
    assert param.grad is not None
    assert (param.grad == 256).all()


def test_attach_again_after_the_first_optimizer_is_gone() -> None:
    """What a dropped accumulator left on the parameter must not slow the next one down either."""
    param = parameter(4)
    for _ in range(3):
        optimizer = sgd(param)
        acc = accumkern.attach(optimizer, "split32")
        assert_attached(param)
        assert len(param._post_accumulate_grad_hooks) == 1
        del optimizer, acc
        gc.collect()


@pytest.mark.parametrize("how", ["in a window", "detached", "after a failed backward", "frozen", "with a graph alive"])
def test_nothing_outlives_model_and_optimizer(how: str) -> None:
    params = [parameter(4), parameter(300, 300), parameter(3)]
    params[2].requires_grad_(how != "frozen")
    optimizer = sgd(*params)
    acc = accumkern.attach(optimizer, average_over=4)
    for _ in range(3):
        backward_of_all(params[:2], [torch.ones(4), torch.ones(300, 300)])
    if how == "detached":
        acc.detach()
    if how == "after a failed backward":
        fail(params[:2], late=params[2])
    if how == "with a graph alive":
        loss = sum(p.float().sum() for p in params)
        optimizer.step()
        del loss
    references = [weakref.ref(o) for o in (*params, *(p.grad for p in params[:2]), optimizer, acc)]
    del params, optimizer, acc
    gc.collect()
    assert [r() for r in references] == [None] * len(references)


def test_model_may_outlive_the_accumulator_and_a_graph_may_outlive_both() -> None:
    params = [parameter(4), parameter(4)]
    optimizer = sgd(*params)
    accumkern.attach(optimizer)
    losses = [sum((p.float() * n).sum() for p in params) for n in (256, 1, 1)]
    losses.pop(0).backward()
    del optimizer
    gc.collect()
    for loss in losses:
        loss.backward()
    assert all((p.grad == 256).all() for p in params)  # as stock adds


def test_a_thousand_windows_leave_nothing_behind() -> None:
    params = [parameter(5), parameter(3, 4), parameter(7, dtype=torch.float32)]
    optimizer = sgd(*params)
    acc = accumkern.attach(optimizer, average_over=3)
    grads = [torch.ones_like(p) for p in params]

    def windows(count: int) -> None:
        for n in range(count):
            for _ in range(3):
                backward_of_all(params, grads)
            acc.gradient(params[0])
            optimizer.step()
            optimizer.zero_grad(set_to_none=n % 2 == 0)
            if n % 50 == 0:
                fail(params[:2], late=params[2])
                optimizer.zero_grad()
        optimizer.zero_grad()

    def alive() -> tuple[int, int]:
        gc.collect()
        objects = gc.get_objects()
        return len(objects), sum(type(o) in (Tensor, Parameter) for o in objects)

    windows(51)
    tracemalloc.start()
    try:
        windows(51)
        objects, tensors = alive()
        bytes_before, _ = tracemalloc.get_traced_memory()
        windows(1000)
        objects_after, tensors_after = alive()
        bytes_after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert tensors_after <= tensors
    assert objects_after - objects < 100
    assert bytes_after - bytes_before < 50_000  # less than the smallest object a window


def test_casting_a_model_again_and_again_leaves_nothing_behind() -> None:
    model, optimizer = model_and_optimizer()
    accumkern.attach(optimizer)

    def casts(count: int) -> int:
        for n in range(count):
            model.to(torch.float32 if n % 2 else BF16)
            model(torch.ones(3, 4, dtype=parameter_of(model).dtype)).sum().backward()
            optimizer.zero_grad()
        gc.collect()
        return len(gc.get_objects())

    casts(20)
    before = casts(20)
    assert casts(200) - before < 100
