"""What attach refuses, and that nothing is hooked then."""

from __future__ import annotations

import functools
import math
import re
from typing import Any

import gradients
import pytest
import torch
from gradients import assert_same_bits, assert_stock, backward, fp32_sum, parameter, sgd
from torch._subclasses import FakeTensorMode
from torch.nn import Parameter

import accumkern
from accumkern import backends

micro_gradients = functools.partial(gradients.micro_gradients, mean=3.0)


# ---- errors of attach ----------------------------------------------------------------------------------------------


BAD_ARGUMENTS: dict[str, tuple[dict[str, object], type[Exception], str]] = {
    "unknown buffer": ({"buffer": "split16"}, ValueError, r"buffer is 'split16'; .* split24, split32, fp32"),
    "buffer of another kind": ({"buffer": torch.int8}, TypeError, "buffer is a dtype; .* split24"),
    "buffer is a list": ({"buffer": ["split24"]}, TypeError, "buffer is a list; .* split24"),
    "unknown backend": ({"backend": "vulkan"}, ValueError, r"backend is 'vulkan'; .* cuda, triton, cpu, eager"),
    "average over 0": ({"average_over": 0}, ValueError, "average_over is 0; .* positive number .*, or None"),
    "average over -1": ({"average_over": -1}, ValueError, "average_over is -1; .* positive"),
    "average over nan": ({"average_over": math.nan}, ValueError, "average_over is nan; .* positive"),
    "average over inf": ({"average_over": math.inf}, ValueError, "average_over is inf; .* positive"),
    "average over a string": ({"average_over": "8"}, TypeError, "average_over is a str; .* positive"),
    "average over True": ({"average_over": True}, TypeError, "average_over is a bool; .* positive"),
    "average over a tensor": ({"average_over": torch.ones(2)}, TypeError, "average_over is a Tensor; .* positive"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_attach_refuses_a_bad_argument_and_hooks_nothing(case: str) -> None:
    arguments, error, message = BAD_ARGUMENTS[case]
    param = parameter(4)
    optimizer = sgd(param)
    with pytest.raises(error, match=message):
        accumkern.attach(optimizer, **arguments)  # type: ignore[arg-type]
    assert "add_param_group" not in vars(optimizer)
    assert_stock(param)


@pytest.mark.parametrize(
    "not_an_optimizer",
    [torch.nn.Linear(2, 2), [parameter(2)], None, parameter(2), torch.optim.SGD],
    ids=["module", "list", "None", "parameter", "class"],
)
def test_attach_refuses_what_is_no_optimizer(not_an_optimizer: object) -> None:
    kind = type(not_an_optimizer).__name__
    with pytest.raises(TypeError, match=f"optimizer is a {kind}; it must be a torch.optim.Optimizer"):
        accumkern.attach(not_an_optimizer)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_attach_refuses_a_backend_that_cannot_run_on_the_parameters(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    param = parameter(4)
    reason = accumkern.available_backends()[name] or backends.refusal(name, "cpu")
    assert reason is not None
    with pytest.raises(RuntimeError, match=f"backend '{name}' cannot run on device 'cpu': {re.escape(reason)}"):
        accumkern.attach(sgd(param), backend=name)
    assert_stock(param)


@pytest.mark.parametrize("wanted", ["nonsense", "cuda"])
def test_attach_refuses_a_bad_default_backend(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """ACCUMKERN_BACKEND is refused when the hooks are made, not in the middle of the first backward pass."""
    monkeypatch.setenv("ACCUMKERN_BACKEND", wanted)
    param = parameter(4)
    with pytest.raises((ValueError, RuntimeError), match=f"ACCUMKERN_BACKEND .*'{wanted}'"):
        accumkern.attach(sgd(param))
    assert_stock(param)


def test_default_backend_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    original = backends.kernels
    monkeypatch.setattr(backends, "kernels", lambda name: used.append(name) or original(name))
    monkeypatch.setenv("ACCUMKERN_BACKEND", "eager")
    param = parameter(4)
    optimizer = sgd(param)  # it keeps the accumulator alive
    accumkern.attach(optimizer)
    for _ in range(2):
        backward(param, torch.ones(4))
    assert set(used) == {"eager"}


@pytest.mark.parametrize("buffer", ["split24", "split32"])
def test_attach_refuses_float16_with_a_split_buffer(buffer: str) -> None:
    good, bad = parameter(4), parameter(3, 2, dtype=torch.float16)
    message = rf"parameter 1 of optimizer \(shape \(3, 2\)\) is torch.float16, .*buffer='{buffer}'.* buffer='fp32'"
    with pytest.raises(TypeError, match=message):
        accumkern.attach(sgd(good, bad), buffer)
    assert_stock(good)
    assert not bad._post_accumulate_grad_hooks


def test_attach_refuses_tensor_subclasses_that_wrap_other_tensors() -> None:
    two_tensor = pytest.importorskip("torch.testing._internal.two_tensor")
    good, bad = parameter(4), Parameter(two_tensor.TwoTensor(torch.zeros(3), torch.zeros(3)))
    with pytest.raises(TypeError, match=r"parameter 1 of optimizer \(shape \(3,\)\) is a TwoTensor; .* in place"):
        accumkern.attach(sgd(good, bad))
    assert_stock(good)


class Packed(torch.Tensor):
    """As packed weights are: a tensor that wraps another one, and of which there is no gradient."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Packed:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=torch.bfloat16, requires_grad=False)

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], *_: Any) -> Packed:
        return Packed(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return Packed(args[0].inner)
        raise NotImplementedError(str(func))

    __torch_function__ = torch._C._disabled_torch_function_impl


def frozen_weights() -> dict[str, Parameter]:
    with FakeTensorMode():
        fake = Parameter(torch.zeros(3, dtype=torch.bfloat16), requires_grad=False)
    return {
        "packed": Parameter(Packed(torch.ones(4, dtype=torch.int8)), requires_grad=False),
        "float16": parameter(3, dtype=torch.float16).requires_grad_(False),
        "float8": Parameter(torch.ones(4).to(torch.float8_e4m3fn), requires_grad=False),
        "int8": Parameter(torch.ones(4, dtype=torch.int8), requires_grad=False),
        "fake": fake,
        "lazy": torch.nn.UninitializedParameter(requires_grad=False),
    }


@pytest.mark.parametrize("kind", frozen_weights())
def test_a_frozen_weight_of_a_kind_that_cannot_be_folded_is_left_alone(kind: str) -> None:
    frozen, trained = frozen_weights()[kind], parameter(4)
    optimizer = sgd(frozen, trained)
    accumulator = accumkern.attach(optimizer, "split24")
    grads = micro_gradients(5, 4)
    for grad in grads:
        backward(trained, grad)
    parts = accumulator.parts(trained)
    assert parts is not None
    assert parts.residual is not None
    assert frozen.grad is None
    optimizer.add_param_group({"params": [frozen_weights()[kind]]})


def test_a_fake_parameter_is_sent_to_plan_and_nothing_is_attached() -> None:
    good = parameter(4)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = torch.nn.Linear(3, 2)
        message = (
            r"parameter 1 of optimizer \(shape \(2, 3\)\) is a FakeTensor, .* no memory.*accumkern\.plan.* predicts"
        )
        optimizer = sgd(good, *fake.parameters())
        with pytest.raises(TypeError, match=message):
            accumkern.attach(optimizer)
    assert_stock(good)
    with FakeTensorMode(allow_non_fake_inputs=True), backends.without_kernels():
        accumkern.attach(optimizer).detach()


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_a_fake_gradient_is_named_before_anything_is_written(backend: str) -> None:
    param = parameter(4)
    optimizer = sgd(param)
    accumulator = accumkern.attach(optimizer, backend=backend)
    for grad in micro_gradients(2, 4):
        backward(param, grad)
    before = accumulator.gradient(param)
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(TypeError, match=r"FakeTensor, .* no memory"):
        (param * 2).sum().backward()
    assert_same_bits(accumulator.gradient(param), before)
    optimizer.zero_grad()
    with FakeTensorMode(allow_non_fake_inputs=True):  # and where the first one of a window is
        (param * 2).sum().backward()
        with pytest.raises(TypeError, match=r"FakeTensor, .* no memory"):
            (param * 2).sum().backward()


def test_a_lazy_parameter_is_asked_for_a_forward_pass() -> None:
    good, lazy = parameter(4), torch.nn.LazyLinear(3)
    optimizer = sgd(good, *lazy.parameters())
    with pytest.raises(
        TypeError, match=r"parameter 1 of optimizer is a UninitializedParameter.*run a forward pass first"
    ):
        accumkern.attach(optimizer)
    assert_stock(good)
    accumulator = accumkern.attach(sgd(good))
    with pytest.raises(TypeError, match="run a forward pass first"):
        accumulator._optimizer.add_param_group({"params": list(lazy.parameters())})
    accumulator.detach()
    lazy(torch.ones(1, 2))
    accumkern.attach(optimizer)


def test_second_attach_is_refused_and_changes_nothing() -> None:
    param, other = parameter(4), parameter(4)
    acc = accumkern.attach(sgd(param), "split32")
    for optimizer in (sgd(other, param), acc._optimizer):
        with pytest.raises(ValueError, match=r"parameter . of optimizer \(shape \(4,\)\) is attached already; detach"):
            accumkern.attach(optimizer)
    grads = micro_gradients(5, 4)
    for grad in grads:
        backward(param, grad)
    assert_same_bits(acc.gradient(param), fp32_sum(grads))
    assert_stock(other)


def test_add_param_group_that_is_refused_adds_nothing() -> None:
    param, half, added = parameter(4), parameter(4, dtype=torch.float16), parameter(4)
    optimizer = sgd(param)
    acc = accumkern.attach(optimizer, "split32")
    with pytest.raises(TypeError, match=r"torch.float16, .* use buffer='fp32'"):
        optimizer.add_param_group({"params": [added, half]})
    assert len(optimizer.param_groups) == 1
    assert_stock(added)
    assert not half._post_accumulate_grad_hooks
    grads = micro_gradients(5, 4)
    for grad in grads:
        backward(param, grad)
    assert_same_bits(acc.gradient(param), fp32_sum(grads))
