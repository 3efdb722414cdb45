"""What is attached to an optimizer, what cannot be watched, and what detaching leaves."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
from collections.abc import Callable
from typing import Any

import gradients
import pytest
import torch
from gradients import (
    BF16,
    assert_attached,
    assert_equal,
    assert_fp32_sum,
    assert_stock,
    backward,
    backward_of_all,
    is_averaged,
    parameter,
    record,
    seeded,
)
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

import accumkern
from accumkern.formats import BUFFERS, decode, encode

pytestmark = pytest.mark.usefixtures("one_thread")

sgd = functools.partial(gradients.sgd, momentum=0.5)


# ---- accumulator_of ------------------------------------------------------------------------------------------------


def test_accumulator_of_returns_what_is_attached() -> None:
    param = parameter(4)
    optimizer = torch.optim.SGD([param], lr=1.0)
    assert accumkern.accumulator_of(optimizer) is None
    acc = accumkern.attach(optimizer)
    assert accumkern.accumulator_of(optimizer) is acc
    acc.detach()
    assert accumkern.accumulator_of(optimizer) is None


def test_accumulator_of_finds_one_whose_result_was_dropped(no_collector: None) -> None:
    """It goes on where it was: scale, window, and the count that lets finish() be called once."""
    param = parameter(4)
    optimizer = torch.optim.SGD([param], lr=1.0)
    accumkern.attach(optimizer, "split32", average_over=2)
    backward(param, 1.0)
    backward(param, 2.0)
    acc = accumkern.accumulator_of(optimizer)
    assert acc is not None
    assert (acc.buffer, acc.scale) == ("split32", 0.5)
    assert (acc.gradient(param) == 1.5).all()
    acc.finish()
    del acc
    again = accumkern.accumulator_of(optimizer)
    assert again is not None
    with pytest.raises(RuntimeError, match="already since the last backward pass"):
        again.finish()
    again.detach()
    assert not is_averaged(param)


def test_accumulator_of_a_wrapper_and_of_what_it_wraps() -> None:
    class Wrapper:
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer
            self.param_groups = optimizer.param_groups

        def add_param_group(self, group: dict[str, object]) -> None:
            self.optimizer.add_param_group(group)

    optimizer = torch.optim.SGD([parameter(4)], lr=1.0)
    wrapper = Wrapper(optimizer)
    acc = accumkern.attach(wrapper)  # type: ignore[arg-type]
    assert accumkern.accumulator_of(wrapper) is acc  # type: ignore[arg-type]
    assert accumkern.accumulator_of(optimizer) is acc


@pytest.mark.parametrize("wrong", [None, 3, [parameter(4)]], ids=["None", "number", "list"])
def test_accumulator_of_refuses_what_is_no_optimizer(wrong: object) -> None:
    with pytest.raises(TypeError, match=r"optimizer is a .*; it must be a torch\.optim\.Optimizer"):
        accumkern.accumulator_of(wrong)  # type: ignore[arg-type]


# ---- what cannot be watched ----------------------------------------------------------------------------------------


class Slotted:
    """A wrapper without room for another attribute, and without an optimizer of torch."""

    __slots__ = ("optimizer",)

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> list[dict[str, object]]:
        return self.optimizer.param_groups

    def add_param_group(self, group: dict[str, object]) -> None:
        self.optimizer.add_param_group(group)


class Plain:
    """An optimizer that is not torch's."""

    def __init__(self, params: list[torch.nn.Parameter]) -> None:
        self.param_groups = [{"params": params}]

    def add_param_group(self, group: dict[str, Any]) -> None:
        self.param_groups.append(group)


def test_a_wrapper_without_room_around_an_optimizer_of_torch() -> None:
    param, added = parameter(4), parameter(4)
    optimizer = torch.optim.SGD([param], lr=1.0)
    acc = accumkern.attach(Slotted(optimizer), average_over=2)  # type: ignore[arg-type]
    Slotted(optimizer).add_param_group({"params": [added]})
    assert is_averaged(param)
    assert is_averaged(added)
    acc.detach()


class ReadOnly(torch.optim.SGD):
    def __setattr__(self, name: str, value: object) -> None:
        if name == "add_param_group":
            raise AttributeError("read only")
        super().__setattr__(name, value)


@pytest.mark.parametrize("kind", [Slotted, ReadOnly], ids=["__slots__", "read only"])
def test_a_refused_optimizer_leaves_no_hooks(kind: type) -> None:
    param = parameter(4)
    optimizer = Slotted(Plain([param])) if kind is Slotted else ReadOnly([param], lr=1.0)
    with pytest.raises(TypeError, match=f"optimizer is a {kind.__name__}, whose add_param_group cannot be watched"):
        accumkern.attach(optimizer, average_over=2)  # type: ignore[arg-type]
    assert not is_averaged(param)


# ---- several optimizers --------------------------------------------------------------------------------------------


@pytest.mark.integration("Several models and optimizers: a GAN loop")
def test_two_accumulators_in_a_gan_loop() -> None:
    """The generator's loss sends gradients through the discriminator, whose optimizer zeroes them."""
    generator = torch.nn.Linear(4, 6, dtype=BF16)
    discriminator = torch.nn.Sequential(torch.nn.Linear(6, 5, dtype=BF16), torch.nn.Tanh(), torch.nn.Linear(5, 1))
    discriminator.to(BF16)
    optimizers = [sgd(*generator.parameters()), sgd(*discriminator.parameters())]
    accs = [accumkern.attach(optimizers[0], "split32", average_over=4), accumkern.attach(optimizers[1], "split24")]
    arrived = {p: record(p) for p in (*generator.parameters(), *discriminator.parameters())}
    for _ in range(2):
        for n in range(4):
            noise, real = seeded(3, 4, seed=n), seeded(3, 6, seed=n + 9)
            F.softplus(-discriminator(generator(noise)).float()).sum().backward()
        for p in generator.parameters():
            assert_fp32_sum(accs[0], p, arrived[p], 1 / 4)
        optimizers[0].step()
        optimizers[0].zero_grad()
        optimizers[1].zero_grad(set_to_none=False)
        for grads in arrived.values():
            grads.clear()
        for n in range(4):
            noise, real = seeded(3, 4, seed=n), seeded(3, 6, seed=n + 9)
            out = discriminator(generator(noise).detach()).float(), discriminator(real).float()
            (F.softplus(out[0]) + F.softplus(-out[1])).sum().backward()
        for p in discriminator.parameters():
            format_ = BUFFERS["split24"][BF16]
            total, residual = encode(format_, arrived[p][0].float())
            for grad in arrived[p][1:]:
                total, residual = encode(format_, decode(format_, total, residual) + grad.float())
            assert_equal(p.grad, total)
            assert_equal(accs[1].gradient(p), decode(format_, total, residual))
        assert all(p.grad is None for p in generator.parameters())
        optimizers[1].step()
        optimizers[1].zero_grad()
        for grads in arrived.values():
            grads.clear()


# ---- detaching -----------------------------------------------------------------------------------------------------


def test_detach_restores_stock_behaviour() -> None:
    params = [parameter(4), parameter(300, 300)]
    optimizer = sgd(*params)
    acc = accumkern.attach(optimizer)
    for param in params:
        assert_attached(param)
    acc.detach()
    assert "add_param_group" not in vars(optimizer)
    assert optimizer.add_param_group.__func__ is torch.optim.Optimizer.add_param_group
    added = parameter(4)
    optimizer.add_param_group({"params": [added]})
    for param in (*params, added):
        assert_stock(param)
    acc.detach()
    for param in params:
        assert_stock(param)


WHEN_DETACHED: dict[str, Callable[[accumkern.GradAccumulator, Tensor], object]] = {
    "finish": lambda acc, p: acc.finish(),
    "gradient": lambda acc, p: acc.gradient(p),
    "noise_scale": lambda acc, p: acc.noise_scale(),
    "report": lambda acc, p: acc.report(),
    "reduce_in_fp32": lambda acc, p: acc.reduce_in_fp32(p),  # type: ignore[arg-type]
    "mean_over_ranks": lambda acc, p: acc.mean_over_ranks(p),  # type: ignore[arg-type]
    "scale": lambda acc, p: setattr(acc, "scale", torch.tensor(0.5)),
    "state_dict": lambda acc, p: acc.state_dict(),
    "empty_state_dict": lambda acc, p: acc.empty_state_dict(),
    "load_state_dict": lambda acc, p: acc.load_state_dict({}),
}


@pytest.mark.parametrize("method", WHEN_DETACHED)
def test_what_is_detached_says_so(method: str) -> None:
    param = parameter(4)
    acc = accumkern.attach(sgd(param), stats=True, report=True)
    backward_of_all([param], [torch.ones(4)])
    acc.detach()
    assert "detached" in repr(acc)
    with pytest.raises(
        RuntimeError, match=r"this accumulator is detached from its optimizer; attach\(\) makes another"
    ):
        WHEN_DETACHED[method](acc, param)
    assert param.grad is not None
    assert (param.grad == 1).all()


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, pickle.dumps], ids=["copy", "deepcopy", "pickle"])
def test_an_accumulator_cannot_be_copied_and_says_what_can(way: Callable[[object], object]) -> None:
    acc = accumkern.attach(sgd(parameter(4)))
    with pytest.raises(TypeError, match=r"cannot be copied or pickled.*state_dict\(\), and attach\(\)"):
        way(acc)


def test_attach_in_inference_mode() -> None:
    params = [parameter(4), parameter(4).requires_grad_(False)]
    with torch.inference_mode():
        acc = accumkern.attach(sgd(*params))
    assert [p.requires_grad for p in params] == [True, False]
    params[1].requires_grad_(True)
    for param in params:
        assert_attached(param)
    acc.detach()


@pytest.mark.parametrize("notices", ["step", "finish"])
def test_parameters_that_were_given_another_tensor_are_noticed_and_hooked_again(notices: str) -> None:
    model = torch.nn.Linear(3, 2).to(BF16)
    optimizer = sgd(*model.parameters())
    acc = accumkern.attach(optimizer, average_over=2)
    model(torch.ones(1, 3, dtype=BF16)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.ones(1, 3)).sum().backward()
    with pytest.raises(RuntimeError, match=r"2 parameters, the first of shape \(2, 3\), had no hooks"):
        optimizer.step() if notices == "step" else acc.finish()
    assert all(map(torch.equal, before, model.parameters()))
    optimizer.zero_grad()
    for factor in (1.0, 3.0):
        (model(torch.ones(1, 3)) * factor).sum().backward()
    acc.finish()
    for p in model.parameters():
        assert p.grad is not None
        assert (p.grad == 2).all()
    optimizer.step()
    for p, old in zip(model.parameters(), before, strict=True):
        assert not torch.equal(p, old)


def test_detach_in_the_middle_of_a_window_leaves_grad_to_stock_additions() -> None:
    param = parameter(4)
    acc = accumkern.attach(sgd(param), "split32")
    for grad in (256.0, 1.0, 1.0, 0.5):
        backward_of_all([param], [torch.full((4,), grad)])
    grad = param.grad
    acc.detach()
    assert param.grad is grad
    assert grad is not None
    assert (grad == 258).all()
    backward_of_all([param], [torch.ones(4)])
    assert param.grad is grad
    assert (grad == 260).all()  # 259, rounded to even in bfloat16


def test_detach_frees_the_residuals() -> None:
    param = parameter(12343)
    acc = accumkern.attach(sgd(param))

    def residuals() -> int:
        gc.collect()
        return sum(type(o) is Tensor and o.dtype is torch.int8 and o.numel() == 12343 for o in gc.get_objects())

    assert_attached(param)
    assert residuals() == 1
    acc.detach()
    assert residuals() == 0


def test_context_manager_detaches() -> None:
    param = parameter(4)
    optimizer = sgd(param)
    with accumkern.attach(optimizer, "split32") as acc:
        assert isinstance(acc, accumkern.GradAccumulator)
        assert_attached(param)
    assert_stock(param)
    with pytest.raises(ArithmeticError), accumkern.attach(optimizer):
        raise ArithmeticError
    assert_stock(param)
    with accumkern.attach(optimizer) as acc:
        acc.detach()
    assert_stock(param)


def test_attach_again_after_detach() -> None:
    param = parameter(4)
    optimizer = sgd(param)
    for buffer in (*BUFFERS, "split24"):
        acc = accumkern.attach(optimizer, buffer)
        assert_attached(param)
        with pytest.raises(ValueError, match="is attached already"):
            accumkern.attach(optimizer)
        acc.detach()
        assert_stock(param)


def test_detach_leaves_an_add_param_group_of_someone_else_in_place() -> None:
    param, calls = parameter(4), []
    optimizer = sgd(param)
    acc = accumkern.attach(optimizer)
    ours = optimizer.add_param_group

    def theirs(param_group: dict[str, Any]) -> None:
        calls.append(param_group)
        ours(param_group)

    optimizer.add_param_group = theirs  # type: ignore[method-assign]
    attached, stock = parameter(4), parameter(4)
    optimizer.add_param_group({"params": [attached]})
    assert_attached(attached)
    acc.detach()
    assert optimizer.add_param_group is theirs
    optimizer.add_param_group({"params": [stock]})
    assert len(calls) == 2
    assert len(optimizer.param_groups) == 3
    for p in (param, attached, stock):
        assert_stock(p)


def test_detach_keeps_the_hooks_of_the_user() -> None:
    param, calls = parameter(4), []
    before = param.register_post_accumulate_grad_hook(lambda _: calls.append("before"))
    acc = accumkern.attach(sgd(param))
    after = param.register_post_accumulate_grad_hook(lambda _: calls.append("after"))
    acc.detach()
    backward_of_all([param], [torch.ones(4)])
    assert calls == ["before", "after"]
    before.remove()
    after.remove()
    assert_stock(param)


# ---- what went wrong once ----------------------------------------------------------------------------------------


def test_a_failed_attach_leaves_nothing() -> None:
    """Hooks cannot be registered on a tensor that is not a leaf, which is noticed after others have theirs."""

    class Optimizer:
        def __init__(self, params: list[Tensor]) -> None:
            self.param_groups: list[dict[str, Any]] = [{"params": params}]

        def add_param_group(self, group: dict[str, Any]) -> None:
            self.param_groups.append(group)

    param = parameter(4)
    optimizer: Any = Optimizer([param, parameter(4) * 2])
    with pytest.raises(RuntimeError, match="non-leaf"):
        accumkern.attach(optimizer, average_over=2)
    assert not is_averaged(param)
    assert "add_param_group" not in vars(optimizer)
    optimizer.param_groups[0]["params"].pop()
    accumkern.attach(optimizer, average_over=2)
    assert is_averaged(param)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_a_parameter_that_is_listed_twice_has_its_hooks_once() -> None:
    param = parameter(4)
    optimizer = torch.optim.SGD([param, param], lr=1.0)
    acc = accumkern.attach(optimizer, average_over=2)
    assert is_averaged(param)
    acc.detach()
    assert not is_averaged(param)
    assert not param._post_accumulate_grad_hooks
    assert accumkern.accumulator_of(optimizer) is None


class Delegating:
    """A wrapper that answers as the optimizer, whatever it calls it."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._inner = optimizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_inner"], name)


def test_a_wrapper_may_be_made_for_the_call_alone(no_collector: None) -> None:
    param = parameter(4)
    optimizer = torch.optim.SGD([param], lr=1.0)
    accumkern.attach(Delegating(optimizer), average_over=2)  # type: ignore[arg-type]
    gc.collect()
    assert is_averaged(param)


def test_a_step_through_a_wrapper_notices_lost_hooks() -> None:
    param = parameter(4)
    wrapper = Delegating(torch.optim.SGD([param], lr=1.0))
    acc = accumkern.attach(wrapper)  # type: ignore[arg-type]
    torch.utils.swap_tensors(param, torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16)))
    backward(param, 1.0)
    with pytest.raises(RuntimeError, match="had no hooks, and torch has accumulated"):
        wrapper.step()
    acc.detach()


def test_an_optimizer_may_be_replaced_by_one_that_takes_over_its_state(no_collector: None) -> None:
    """As wrappers do that copy ``__dict__`` and become a subclass of the optimizer's class."""
    param = parameter(4)
    first = torch.optim.SGD([param], lr=1.0)
    accumkern.attach(first, average_over=2)
    second = torch.optim.SGD.__new__(torch.optim.SGD)
    second.__dict__.update(first.__dict__)
    del first
    gc.collect()
    assert is_averaged(param)
    acc = accumkern.accumulator_of(second)
    assert acc is not None
    backward(param, 4.0)
    assert acc.state_dict()["sums"]["0"] is not None
    acc.detach()
    assert not is_averaged(param)


def test_add_param_group_of_an_optimizer_that_is_gone() -> None:
    optimizer = torch.optim.SGD([parameter(4)], lr=1.0)
    accumkern.attach(optimizer)
    add_param_group = optimizer.add_param_group
    del optimizer
    gc.collect()
    with pytest.raises(ReferenceError, match="the optimizer of this add_param_group is gone"):
        add_param_group({"params": [parameter(2)]})
