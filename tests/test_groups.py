"""Parameter groups that are changed after attach, by whatever way."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gradients import BF16, assert_equal, assert_fp32_sum, micro_gradients, parameter, record
from torch.nn import Parameter

import accumkern

pytestmark = pytest.mark.usefixtures("one_thread")


def append_to_params(optimizer: torch.optim.Optimizer, new: Parameter) -> None:
    optimizer.param_groups[0]["params"].append(new)


def append_a_group(optimizer: torch.optim.Optimizer, new: Parameter) -> None:
    optimizer.param_groups.append({**optimizer.param_groups[0], "params": [new]})


def assign_the_list(optimizer: torch.optim.Optimizer, new: Parameter) -> None:
    optimizer.param_groups[1]["params"] = [new]


def replace_an_item(optimizer: torch.optim.Optimizer, new: Parameter) -> None:
    optimizer.param_groups[1]["params"][0] = new


def by_the_class(optimizer: torch.optim.Optimizer, new: Parameter) -> None:
    torch.optim.Optimizer.add_param_group(optimizer, {"params": [new]})


def by_the_method(optimizer: torch.optim.Optimizer, new: Parameter) -> None:
    optimizer.add_param_group({"params": [new]})


BY_HAND = [append_to_params, append_a_group, assign_the_list, replace_an_item, by_the_class]
Change = Callable[[torch.optim.Optimizer, Parameter], None]


def attached(average_over: int | None = None, **options: Any) -> tuple[Any, ...]:
    params = [parameter(8), parameter(8)]
    optimizer = torch.optim.Adam([{"params": [param]} for param in params], lr=0.0)
    return *params, optimizer, accumkern.attach(optimizer, "split32", average_over=average_over, **options)


def window(optimizer: torch.optim.Optimizer) -> dict[Parameter, list[torch.Tensor]]:
    used = [param for group in optimizer.param_groups for param in group["params"]]
    arrived = {param: record(param) for param in used}
    for grad in micro_gradients(5, 8):
        (sum(used).float() * grad).sum().backward()  # type: ignore[union-attr]
    return arrived


@pytest.mark.parametrize("change", [*BY_HAND, by_the_method])
def test_what_has_come_is_hooked_by_whoever_asks_for_the_accumulator(change: Change, average_over: int | None) -> None:
    *_, optimizer, acc = attached(average_over)
    change(optimizer, parameter(8))
    assert accumkern.accumulator_of(optimizer) is acc
    arrived = window(optimizer)
    for param, grads in arrived.items():
        assert_fp32_sum(acc, param, grads, 1 / (average_over or 1))
    norm = torch.cat([p.grad.flatten().float() for p in arrived]).norm()
    torch.testing.assert_close(acc.finish().norm, norm, rtol=3e-3, atol=0)
    assert len(acc.state_dict()["sums"]) == len(arrived)
    optimizer.step()


@pytest.mark.parametrize("change", BY_HAND)
@pytest.mark.parametrize("ask", ["step", "finish", "state_dict", "noise_scale", "gradient"])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_what_has_come_unseen_is_an_error_and_hooked_from_then_on(change: Change, ask: str, set_to_none: bool) -> None:
    *_, optimizer, acc = attached(4, stats=True)
    new = parameter(8)
    change(optimizer, new)
    window(optimizer)
    asked: dict[str, Callable[[], Any]] = {
        "step": optimizer.step,
        "finish": acc.finish,
        "state_dict": acc.state_dict,
        "noise_scale": acc.noise_scale,
        "gradient": lambda: acc.gradient(new),
    }
    for _ in range(1 if ask == "gradient" else 2):  # whoever looks at one gradient finds it hooked then
        with pytest.raises(RuntimeError, match=r"1 parameters, the first of shape \(8,\), had no hooks, and torch has"):
            asked[ask]()
    window(optimizer)
    with pytest.raises(RuntimeError, match=r"1 parameters, the first of shape \(8,\), had no hooks, and torch has"):
        optimizer.step()
    optimizer.zero_grad(set_to_none=set_to_none)
    for param, grads in window(optimizer).items():
        assert_fp32_sum(acc, param, grads[-5:], 1 / 4)
    optimizer.step()


def test_float32_parameters_whose_gradients_torch_may_add_come_without_an_error() -> None:
    """As in densification, where a step may follow at once."""
    param = parameter(8, dtype=torch.float32)
    optimizer = torch.optim.Adam([param], lr=0.0)
    acc = accumkern.attach(optimizer)
    new = optimizer.param_groups[0]["params"][0] = parameter(12, dtype=torch.float32)
    new.sum().backward()
    optimizer.step()
    assert_equal(acc.gradient(new), torch.ones(12))
    with pytest.raises(ValueError, match="param is not a parameter of the attached optimizer"):
        acc.gradient(param)


def test_what_has_left_is_let_go(no_collector: None) -> None:
    first, second, optimizer, acc = attached(4)
    window(optimizer)
    optimizer.step()
    optimizer.zero_grad()
    reference = weakref.ref(second)
    optimizer.state.pop(second)
    del optimizer.param_groups[1]
    optimizer.step()
    second.sum().backward()
    assert_equal(second.grad, torch.ones(8, dtype=BF16))  # nobody averages it
    del second
    gc.collect()
    assert reference() is None
    for param, grads in window(optimizer).items():
        assert param is first
        assert_fp32_sum(acc, param, grads[-5:], 1 / 4)


class Wrapper:
    """As Accelerate's: groups and steps are those of the optimizer inside."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def add_param_group(self, group: dict[str, Any]) -> None:
        self.optimizer.add_param_group(group)


@pytest.mark.parametrize("attach_to", ["wrapper", "inner"])
@pytest.mark.parametrize("add_to", ["wrapper", "inner"])
def test_a_group_that_is_added_to_the_optimizer_inside_a_wrapper(attach_to: str, add_to: str) -> None:
    param, added = parameter(8), parameter(8)
    inner = torch.optim.SGD([param], lr=1.0)
    wrapper = Wrapper(inner)
    acc = accumkern.attach(wrapper if attach_to == "wrapper" else inner, "split32", average_over=4)  # type: ignore[arg-type]
    (wrapper if add_to == "wrapper" else inner).add_param_group({"params": [added]})
    for p, grads in window(inner).items():
        assert_fp32_sum(acc, p, grads, 1 / 4)
    acc.detach()
    assert "add_param_group" not in vars(inner)


def test_loading_an_optimizers_state_changes_no_parameter(average_over: int | None) -> None:
    *_, optimizer, acc = attached(average_over)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for param, grads in window(optimizer).items():
        assert_fp32_sum(acc, param, grads, 1 / (average_over or 1))


def test_a_parameter_that_was_left_out_because_it_was_frozen_is_checked_when_it_is_not() -> None:
    param, half = parameter(4), parameter(4, dtype=torch.float16).requires_grad_(False)
    optimizer = torch.optim.SGD([param, half], lr=1.0)
    acc = accumkern.attach(optimizer)
    param.sum().backward()
    optimizer.step()
    half.requires_grad_(True)
    with pytest.raises(TypeError, match=r"parameter 1 of optimizer .* is torch.float16, which buffer='split24'"):
        optimizer.step()
    acc.detach()
