"""Optimizers of unusual kinds with master weights: right, or found out and refused; none is silently wrong."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from masters import Masters, Reference, adamw, assert_equal, backward, fp32_model
from torch import nn, optim

import accumkern
from accumkern import optimizers

pytestmark = pytest.mark.usefixtures("one_thread")


class WritesData(optim.SGD):
    """Steps what it has kept, in a way that leaves no trace."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        self.kept = list(self.param_groups[0]["params"])

    def step(self, closure: Any = None) -> None:
        for p in self.kept:
            p.data.add_(p.grad.data, alpha=-0.1)


class KeepsByParameter(optim.SGD):
    """Keeps its state outside of ``optimizer.state``."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        self.momentum: dict[Any, torch.Tensor] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            p.sub_(self.momentum.setdefault(p, torch.zeros_like(p)).mul_(0.9).add_(p.grad), alpha=0.1)


@pytest.mark.parametrize(
    ("make", "step", "message"),
    [(WritesData, 1, "has written parameters that it does not take"), (KeepsByParameter, 2, "keeps parameters of its")],
)
def test_what_steps_or_keeps_elsewhere_is_found_out(make: Any, step: int, message: str) -> None:
    mine = Masters(make)
    for number in range(step):
        backward(mine.model, number)
        if number == step - 1:
            break
        mine.optimizer.step()
        mine.optimizer.zero_grad()
    with pytest.raises(RuntimeError, match=message):
        mine.optimizer.step()


def test_state_in_attributes_of_parameters() -> None:
    class InAttributes(optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for p in self.param_groups[0]["params"]:
                p.momentum = getattr(p, "momentum", torch.zeros_like(p)) * 0.9 + p.grad
                p.sub_(p.momentum, alpha=0.1)

    def make(params: Any) -> optim.Optimizer:
        return InAttributes(params, lr=0.1)

    mine, reference = Masters(make), Reference(make)
    for step in range(3):
        mine.window(step)
        reference.window(step)
    assert_equal(mine.masters(), reference.masters())


def test_gradients_that_a_step_drops_are_dropped() -> None:
    class Zeroes(optim.SGD):
        def step(self, closure: Any = None) -> Any:
            result = super().step(closure)
            self.zero_grad()
            return result

    mine = Masters(lambda params: Zeroes(params, lr=0.1))
    backward(mine.model, 0)
    mine.optimizer.step()
    assert all(param.grad is None for param in mine.params)


def test_a_closure_at_other_weights_is_found_out() -> None:
    """Sharpness-aware minimization perturbs the weights and then calls its closure."""

    class Sharp(optim.SGD):
        def step(self, closure: Any = None) -> Any:
            with torch.no_grad():
                for p in self.param_groups[0]["params"]:
                    p.add_(p.grad, alpha=0.05)
            return closure()

    mine = Masters(lambda params: Sharp(params, lr=0.1))
    before = mine.masters()
    with pytest.raises(RuntimeError, match="or with other weights than those before the step"):
        mine.optimizer.step(lambda: backward(mine.model, 0))
    assert_equal(mine.masters(), before)


def test_a_step_that_bears_the_name_of_another_is_not_in_the_table() -> None:
    def clipped(step: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(step)
        def wrapper(self: Any, closure: Any = None) -> Any:
            nn.utils.clip_grad_norm_([p for group in self.param_groups for p in group["params"]], 1e-3)
            return step(self, closure)

        del wrapper.__dict__["hooked"]
        return wrapper

    optim.SGD([nn.Parameter(torch.ones(1))])

    class Clipped(optim.SGD):
        step = clipped(optim.SGD.step)  # type: ignore[assignment]

    def make(params: Any) -> optim.Optimizer:
        return Clipped(params, lr=0.1)

    mine, reference = Masters(make, bucket=1), Reference(make)
    assert not optimizers.is_stepped_in_parts(mine.optimizer)
    for step in range(3):
        mine.window(step)
        reference.window(step)
    assert_equal(mine.masters(), reference.masters())


def no_init(params: Any) -> Any:
    class Wrapper(optim.Optimizer):
        def __init__(self, inner: optim.Optimizer) -> None:
            self.param_groups, self.state, self.inner = inner.param_groups, inner.state, inner
            self._optimizer_step_pre_hooks = inner._optimizer_step_pre_hooks
            self._optimizer_step_post_hooks = inner._optimizer_step_post_hooks

        def step(self, closure: Any = None) -> None:
            self.inner.step(closure)

    return Wrapper(optim.SGD(params, lr=0.1))


def with_slots(params: Any) -> Any:
    return type("Slotted", (optim.SGD,), {"__slots__": ("more",)})(params, lr=0.1)


def final(params: Any) -> Any:
    class Final(optim.SGD):
        def __init_subclass__(cls, **options: Any) -> None:
            raise TypeError("this class is final")

    return Final(params, lr=0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [(no_init, "its step\\(\\) calls no hooks"), (with_slots, "it has __slots__"), (final, "this class is final")],
)
def test_what_no_stand_in_can_be_made_of_is_refused(make: Any, message: str) -> None:
    optimizer = make(list(fp32_model().bfloat16().parameters()))
    with pytest.raises(TypeError, match=message):
        accumkern.attach(optimizer, master_weights="split32")
    accumkern.attach(optimizer).detach()


def test_attributes_of_the_optimizer_are_its_own() -> None:
    class Own(optim.SGD):
        def step(self, closure: Any = None) -> Any:
            assert self.members == ["mine"]
            assert self.stand_ins == 3
            self.stand_ins += 1
            return super().step(closure)

    mine = Masters(lambda params: Own(params, lr=0.1))
    mine.optimizer.members, mine.optimizer.stand_ins = ["mine"], 3  # type: ignore[attr-defined]
    mine.window(0)
    assert mine.optimizer.stand_ins == 4  # type: ignore[attr-defined]


@pytest.mark.parametrize("is_derived", [False, True])
def test_scalar_weights_and_derived_optimizers_are_stepped_by_torch_after_detach(is_derived: bool) -> None:
    kind = type("Mine", (optim.AdamW,), {"__module__": "mine"}) if is_derived else optim.AdamW
    scalar = nn.Parameter(torch.tensor(2.0, dtype=torch.bfloat16))
    optimizer = kind([scalar], lr=0.1)
    acc = accumkern.attach(optimizer, master_weights="split32")
    for _ in range(2):
        scalar.grad = torch.ones_like(scalar)
        optimizer.step()
    acc.detach()
    optimizer.step()
    assert optimizer.state[scalar]["step"] == 3


def test_states_that_are_bfloat16_by_choice_stay_so() -> None:
    class Short(optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for p in self.param_groups[0]["params"]:
                state = self.state[p].setdefault("short", torch.zeros_like(p, dtype=torch.bfloat16))
                p.sub_(state.mul_(0.9).add_(p.grad), alpha=0.1)

    Short.__module__ = "mine"
    kind = type("Choice", (optim.Optimizer,), {"step": Short.step})

    mine = Masters(lambda params: kind(params, {"lr": 0.1}))
    mine.window(0)
    mine.optimizer.load_state_dict(mine.optimizer.state_dict())
    assert mine.optimizer.state[mine.params[0]]["short"].dtype is torch.bfloat16


@pytest.mark.parametrize("by", ["method", "class"])
def test_hooks_that_change_what_is_loaded(by: str) -> None:
    mine = Masters(lambda params: adamw(params[:1] + params[2:3]))
    backward(mine.model, 0)
    mine.optimizer.step()
    saved = mine.optimizer.state_dict()
    for state in saved["state"].values():
        state["exp_avg"] = torch.rand_like(state["exp_avg"])

    def double(_optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        doubled = {i: {**s, "exp_avg": s["exp_avg"] * 2} for i, s in state_dict["state"].items()}
        return {**state_dict, "state": doubled}

    if by == "method":
        mine.optimizer.register_load_state_dict_pre_hook(double)
    else:
        optim.Optimizer.register_load_state_dict_pre_hook(mine.optimizer, double)
        with pytest.raises(RuntimeError, match=r"a hook before load_state_dict\(\) was registered after attach"):
            mine.optimizer.load_state_dict(saved)
    mine.optimizer.load_state_dict(saved)
    for param, state in zip(mine.optimizer.param_groups[0]["params"], saved["state"].values(), strict=True):
        assert torch.equal(mine.optimizer.state[param]["exp_avg"], state["exp_avg"] * 2)


def test_masters_of_two_optimizers_are_exported_together() -> None:
    model = accumkern.to_bfloat16(fp32_model())
    matrices = [param for param in model.parameters() if param.dim() == 2]
    others = [param for param in model.parameters() if param.dim() != 2]
    accumulators = [
        accumkern.attach(optimizer, master_weights="split32")
        for optimizer in (optim.Muon(matrices, lr=1e-2), optim.AdamW(others, lr=1e-2))
    ]
    for acc in accumulators:
        backward(model, 0)
        acc._optimizer.step()
    exported = accumulators[0].master_state_dict(model)
    for name, param in model.named_parameters():
        acc = accumulators[0 if param.dim() == 2 else 1]
        assert torch.equal(exported[name], acc.master_weight(param))
        assert not torch.equal(exported[name], param.detach().float())
