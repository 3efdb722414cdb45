"""The step of torch's Adam, AdamW and SGD in one pass: near torch's own, right however it is called, without copies."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from masters import Make, Masters, OwnAdamW, Reference, adamw, assert_equal, backward, fp32_model, own_adamw
from pinned import pinned
from torch import Tensor, nn, optim
from torch._subclasses import FakeTensorMode

import accumkern
from accumkern import backends
from accumkern.planning.memory import MemoryMeter

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS: dict[str, Make] = {
    "Adam": lambda params: optim.Adam(params, lr=1e-3),
    "Adam coupled": lambda params: optim.Adam(params, lr=1e-3, weight_decay=0.1, maximize=True),
    "Adam amsgrad": lambda params: optim.Adam(params, lr=1e-3, amsgrad=True, betas=(0.3, 0.9)),
    "AdamW": lambda params: optim.AdamW(params, lr=1e-3),
    "AdamW fused": lambda params: optim.AdamW(params, lr=1e-3, fused=True, maximize=True),
    "AdamW amsgrad": lambda params: optim.AdamW(params, lr=1e-3, amsgrad=True, weight_decay=0.0),
    "AdamW tensors": lambda params: optim.AdamW(
        params, lr=torch.tensor(1e-3), betas=(torch.tensor(0.8), torch.tensor(0.95))
    ),
    "SGD": lambda params: optim.SGD(params, lr=0.1),
    "SGD decay": lambda params: optim.SGD(params, lr=0.1, weight_decay=0.1, maximize=True),
    "SGD momentum": lambda params: optim.SGD(params, lr=0.1, momentum=0.9, dampening=0.5),
    "SGD Nesterov": lambda params: optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "SGD fused": lambda params: optim.SGD(params, lr=0.1, momentum=0.9, fused=True),
}


def assert_fused(acc: accumkern.GradAccumulator) -> None:
    assert "step='fused'" in repr(acc)


@pytest.mark.parametrize("make", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("buffer", ["split24", "split32", "fp32"])
def test_all_options(make: Make, buffer: str) -> None:
    mine, reference = Masters(make, buffer), Reference(make, buffer)
    for step in range(6):
        mine.window(step)
        reference.window(step)
    assert_equal(mine.masters(), reference.masters())
    assert_fused(mine.acc)


@pytest.mark.parametrize("make", OPTIONS.values(), ids=OPTIONS)
def test_states_are_those_that_torch_would_make(make: Make) -> None:
    mine, stock = Masters(make), make(list(fp32_model().parameters()))
    mine.window(0)
    for group in stock.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    stock.step()
    stock_state, state = stock.state_dict()["state"], mine.optimizer.state_dict()["state"]
    assert state.keys() == stock_state.keys()
    for i, of_param in stock_state.items():
        assert state[i].keys() == of_param.keys()
        for name, value in of_param.items():
            found = state[i][name]
            assert (found.dtype, found.shape, found.device) == (value.dtype, value.shape, value.device), name
    stock.load_state_dict(copy.deepcopy(mine.optimizer.state_dict()))
    stock.step()


@pytest.mark.parametrize("make", OPTIONS.values(), ids=OPTIONS)
def test_many_steps_stay_near_torch(make: Make) -> None:
    """Each step may differ by a unit in the last place of weight or update, which feeds back through the model."""
    mine = Masters(make)
    stock_weights = [nn.Parameter(param.detach().clone()) for param in fp32_model().parameters()]
    stock, start = make(stock_weights), mine.masters()
    for step in range(10):
        backward(mine.model, step)
        for param, weight in zip(mine.params, stock_weights, strict=True):
            weight.grad = mine.acc.gradient(param)
        mine.optimizer.step()
        mine.optimizer.zero_grad()
        stock.step()
    for found, weight, before in zip(mine.masters(), stock_weights, start, strict=True):
        moved = float((weight.detach() - before).abs().max())
        assert moved > 0
        assert float((found - weight).detach().abs().max()) < 1e-5 * moved + 10 * 2.0**-23 * float(before.abs().max())


def test_two_groups_are_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    kernels = backends.kernels("eager")

    def step(*arguments: Any) -> None:
        calls.append(len(arguments[4]))
        kernels.step(*arguments)

    monkeypatch.setattr(backends, "kernels", lambda _: kernels._replace(step=step))

    def make(params: list[nn.Parameter]) -> optim.Optimizer:
        return optim.AdamW([{"params": params[:3], "lr": 1e-3}, {"params": params[3:], "weight_decay": 0.0}], lr=1e-2)

    mine, reference = Masters(make, backend="eager"), Reference(make)
    for step_number in range(3):
        mine.window(step_number)
        reference.window(step_number)
    assert_equal(mine.masters(), reference.masters())
    assert calls == [len(mine.params)] * 3


def test_gradients_of_one_micro_batch_and_of_many_in_one_step() -> None:
    """Those of one have no residual, and are another launch."""
    mine, reference = Masters(adamw), Reference(adamw)
    for one in (mine, reference):
        backward(one.model, 0)
        kept = [param.grad for param in one.params[:2]]
        assert all(grad is not None for grad in kept)
        for param in one.params[:2]:
            param.grad = None
        backward(one.model, 1, 1)
        for param, grad in zip(one.params[:2], kept, strict=True):
            param.grad = grad
    mine.optimizer.step()
    reference.step()
    assert_equal(mine.masters(), reference.masters())


# ---- by rule -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "how"), [(adamw, "fused"), (own_adamw, "in buckets"), (optim.NAdam, "in buckets")])
def test_repr_says_how_a_step_is_made(make: Any, how: str) -> None:
    assert f"step={how!r}" in repr(Masters(make).acc)


def test_what_does_not_fit_is_stepped_in_buckets_and_repr_says_so() -> None:
    mine = Masters(adamw)
    mine.window(0)
    weight = mine.params[0]
    state = mine.optimizer.state[weight]
    state["exp_avg"] = state["exp_avg"].t().contiguous().t()
    twin = nn.Parameter(mine.acc.master_weight(weight))
    stock = optim.AdamW([twin], lr=mine.optimizer.param_groups[0]["lr"])
    stock.state[twin] = {name: value.clone() for name, value in state.items()}
    backward(mine.model, 1)
    twin.grad = mine.acc.gradient(weight)
    mine.optimizer.step()
    stock.step()
    assert torch.equal(mine.acc.master_weight(weight), twin.detach())
    assert "step='fused, 1 parameter in buckets'" in repr(mine.acc)


def test_a_parameter_that_is_there_twice_is_stepped_twice() -> None:
    weight = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = optim.SGD([weight, weight], lr=2.0**-10)
    acc = accumkern.attach(optimizer, master_weights="split32")
    weight.sum().backward()
    optimizer.step()
    assert torch.equal(acc.master_weight(weight), torch.full((8,), 1 - 2 * 2.0**-10))


def test_states_in_another_dtype_are_stepped_in_buckets() -> None:
    mine = Masters(adamw)
    mine.window(0)
    state = mine.optimizer.state[mine.params[0]]
    state["exp_avg"] = state["exp_avg"].double()
    backward(mine.model, 1)
    with pytest.raises(RuntimeError):  # torch's own
        mine.optimizer.step()


@pytest.mark.parametrize("convert", [lambda n: n.long(), lambda n: n.view(1)], ids=["integer", "a vector"])
def test_steps_that_are_counted_in_another_way_are_stepped_by_torch(convert: Any) -> None:
    mine = Masters(adamw)
    mine.window(0)
    weight = mine.params[0]
    mine.optimizer.state[weight]["step"] = convert(mine.optimizer.state[weight]["step"])
    twin = nn.Parameter(mine.acc.master_weight(weight))
    stock = optim.AdamW([twin], lr=mine.optimizer.param_groups[0]["lr"])
    stock.state[twin] = {name: value.clone() for name, value in mine.optimizer.state[weight].items()}
    backward(mine.model, 1)
    twin.grad = mine.acc.gradient(weight)
    mine.optimizer.step()
    stock.step()
    assert torch.equal(mine.acc.master_weight(weight), twin.detach())
    assert torch.equal(mine.optimizer.state[weight]["step"], stock.state[twin]["step"])


@pytest.mark.parametrize("missing", ["step", "exp_avg"])
def test_a_state_that_lacks_something_is_torchs_error(missing: str) -> None:
    mine = Masters(adamw)
    mine.window(0)
    del mine.optimizer.state[mine.params[0]][missing]
    backward(mine.model, 1)
    with pytest.raises(KeyError, match=missing):
        mine.optimizer.step()


def test_an_optimizer_that_becomes_another_one_is_refused() -> None:
    mine = Masters(adamw)
    pinned(own_adamw(mine.params))  # whose step() has hooks from then on
    backward(mine.model, 0)
    mine.optimizer.__class__ = OwnAdamW
    with pytest.raises(RuntimeError, match="optimizer is a OwnAdamW, and was a AdamW when it was attached"):
        mine.optimizer.step()


# ---- errors ------------------------------------------------------------------------------------------------------


class Failing:
    """The eager kernels, whose step fails when it is asked to; made before what uses them.

    Attributes:
        fails_after: calls of the step that do not fail, before one that does.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fails_after: int | None = None
        self._kernels = backends.kernels("eager")
        monkeypatch.setattr(backends, "kernels", lambda _: self._kernels._replace(step=self._step))

    def _step(self, *arguments: Any) -> None:
        if self.fails_after == 0:
            self.fails_after = None
            raise MemoryError("no memory")
        if self.fails_after is not None:
            self.fails_after -= 1
        self._kernels.step(*arguments)


def mixed(params: list[nn.Parameter]) -> optim.Optimizer:
    return optim.AdamW([{"params": params[:3], "amsgrad": True}, {"params": params[3:]}], lr=1e-3)


def first_of_dampened(params: list[nn.Parameter]) -> optim.Optimizer:
    return optim.SGD(params, lr=0.1, momentum=0.9, dampening=0.5)


@pytest.mark.parametrize("make", [adamw, mixed, first_of_dampened], ids=["AdamW", "two launches", "SGD"])
@pytest.mark.parametrize("windows_before", [0, 1])
def test_a_step_that_fails_can_be_made_again(make: Make, windows_before: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps, states and what is deferred are as they were."""
    kernels = Failing(monkeypatch)
    mine, reference = Masters(make, backend="eager"), Reference(make)
    for step in range(windows_before):
        mine.window(step)
        reference.window(step)
    backward(mine.model, 7)
    backward(reference.model, 7)
    mine.acc.finish(4.0, defer=True)
    kernels.fails_after = 0
    with pytest.raises(MemoryError):
        mine.optimizer.step()
    mine.optimizer.step()
    mine.optimizer.zero_grad()
    mine.scheduler.step()
    reference.step(4.0)
    mine.window(8)
    reference.window(8)
    assert_equal(mine.masters(), reference.masters())


def test_float32_gradients_are_scaled_once_where_a_step_fails_behind_that(monkeypatch: pytest.MonkeyPatch) -> None:
    model = accumkern.to_bfloat16(fp32_model(), keep=[nn.LayerNorm])
    optimizer = optim.SGD(model.parameters(), lr=1.0)
    acc = accumkern.attach(optimizer, "split32", master_weights="split32")
    backward(model, 0)
    norm = model[1].weight  # type: ignore[index]
    expected = norm.detach() - acc.gradient(norm) / 4  # type: ignore[operator]
    acc.finish(4.0, defer=True)
    with monkeypatch.context() as patched:
        patched.delattr(sys.modules[optim.SGD.__module__], "sgd")
        with pytest.raises(NameError):
            optimizer.step()
    optimizer.step()
    assert torch.equal(norm.detach(), expected)


def test_autograd_sees_what_was_stepped_before_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = Failing(monkeypatch)
    mine = Masters(mixed, backend="eager")
    backward(mine.model, 0)
    versions = [param._version for param in mine.params]
    kernels.fails_after = 1
    with pytest.raises(MemoryError):
        mine.optimizer.step()
    assert [p._version > version for p, version in zip(mine.params, versions, strict=True)] == [True] * 3 + [False] * 4
    assert [len(mine.optimizer.state[param]) for param in mine.params] == [4] * 3 + [0] * 4


# ---- scaling -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("make", [adamw, own_adamw, lambda params: optim.NAdam(params, lr=1e-3)])
def test_finish_can_leave_mean_and_clipping_to_the_step(make: Make, as_tensor: bool) -> None:
    mine, reference = Masters(make), Reference(make)
    for step in range(3):
        backward(mine.model, step)
        backward(reference.model, step)
        sums = [mine.acc.gradient(param) for param in mine.params]
        finished = mine.acc.finish(torch.tensor(7.0) if as_tensor else 7.0, max_norm=1e-3, defer=True)
        assert 0 < finished.clip_coefficient < 1
        for param, total in zip(mine.params, sums, strict=True):
            assert torch.equal(mine.acc.gradient(param), total)  # type: ignore[arg-type]
        mine.optimizer.step()
        mine.optimizer.zero_grad()
        mine.scheduler.step()
        reference.step(7.0, finished.clip_coefficient)
    assert_equal(mine.masters(), reference.masters())


def test_what_is_deferred_reaches_float32_parameters_too() -> None:
    model = accumkern.to_bfloat16(fp32_model(), keep=[nn.LayerNorm])
    optimizer = optim.SGD(model.parameters(), lr=1.0)
    acc = accumkern.attach(optimizer, "split32", master_weights="split32")
    before = {param: acc.master_weight(param) for param in model.parameters()}
    backward(model, 0)
    sums = {param: acc.gradient(param) for param in before}
    acc.finish(4.0, defer=True)
    optimizer.step()
    for param, weight in before.items():
        assert torch.equal(acc.master_weight(param), weight - sums[param] / 4)


def test_deferred_and_then_another_backward_pass_is_an_error() -> None:
    mine = Masters(adamw)
    backward(mine.model, 0)
    mine.acc.finish(3.0, defer=True)
    backward(mine.model, 1)
    before = mine.masters()
    with pytest.raises(RuntimeError, match=r"finish\(defer=True\) was followed by 3 backward passes before step\(\)"):
        mine.optimizer.step()
    assert_equal(mine.masters(), before)
    mine.acc.finish(3.0)
    mine.optimizer.step()
    assert not torch.equal(mine.masters()[0], before[0])


def test_gradients_that_are_clipped_after_a_deferred_finish_are_an_error() -> None:
    """Clipping would see the undivided sum."""
    mine, reference = Masters(adamw), Reference(adamw)
    backward(mine.model, 0)
    mine.acc.finish(4.0, 1.0, defer=True)
    before = mine.masters()
    nn.utils.clip_grad_norm_(mine.params, 1e-3)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"gradients were changed between finish\(defer=True\) and step\(\)"):
            mine.optimizer.step()
    assert_equal(mine.masters(), before)
    mine.optimizer.zero_grad()
    mine.window(0)
    reference.window(0)
    assert_equal(mine.masters(), reference.masters())


def test_zero_grad_takes_back_what_was_deferred() -> None:
    mine, reference = Masters(adamw), Reference(adamw)
    backward(mine.model, 0)
    mine.acc.finish(4.0, 1.0, defer=True)
    mine.optimizer.zero_grad()
    mine.acc.state_dict()
    mine.window(1)
    reference.window(1)
    assert_equal(mine.masters(), reference.masters())


@pytest.mark.parametrize("zeroed", [False, True])
def test_two_steps_on_deferred_gradients_are_an_error(zeroed: bool) -> None:
    """Those that are stepped in one pass would be sums then, and others divided."""
    mine = Masters(adamw)
    backward(mine.model, 0)
    mine.acc.finish(3.0, defer=True)
    mine.optimizer.step()
    before = mine.masters()
    if zeroed:
        mine.optimizer.zero_grad()
        mine.optimizer.step()
    else:
        with pytest.raises(RuntimeError, match=r"zero_grad\(\) is missing: gradients that finish"):
            mine.optimizer.step()
    assert_equal(mine.masters(), before)
    mine.optimizer.zero_grad()
    mine.window(1)
    assert not torch.equal(mine.masters()[0], before[0])


def test_gradients_that_are_given_by_hand_after_a_deferred_step_are_stepped() -> None:
    mine = Masters(adamw)
    backward(mine.model, 0)
    mine.acc.finish(3.0, defer=True)
    mine.optimizer.step()
    before = mine.masters()
    for param in mine.params:
        param.grad = torch.ones_like(param)
    mine.optimizer.step()
    assert not torch.equal(mine.masters()[0], before[0])


def test_a_step_that_is_left_out_takes_along_what_was_deferred() -> None:
    mine, reference = Masters(adamw), Reference(adamw)
    for one in (mine, reference):
        backward(one.model, 0)
    mine.acc.finish(3.0, defer=True)
    for one in (mine, reference):
        one.model.zero_grad()
        backward(one.model, 1)
    mine.acc.finish(2.0, defer=True)
    mine.optimizer.step()
    reference.step(2.0)
    assert_equal(mine.masters(), reference.masters())


def test_what_is_deferred_is_the_divisor_of_that_time() -> None:
    mine, reference = Masters(adamw), Reference(adamw)
    for one in (mine, reference):
        backward(one.model, 0)
    tokens = torch.tensor(5.0)
    mine.acc.finish(tokens, defer=True)
    tokens.zero_()  # for the next window
    mine.optimizer.step()
    reference.step(5.0)
    assert_equal(mine.masters(), reference.masters())


def test_gradients_that_are_loaded_have_nothing_deferred() -> None:
    mine, reference = Masters(adamw), Reference(adamw)
    for one in (mine, reference):
        backward(one.model, 0)
    state = copy.deepcopy(mine.acc.state_dict())
    mine.acc.finish(7.0, max_norm=1e-3, defer=True)
    mine.acc.load_state_dict(state)
    mine.optimizer.step()
    reference.step()
    assert_equal(mine.masters(), reference.masters())


def test_what_is_deferred_is_done_by_detach() -> None:
    mine = Masters(adamw)
    backward(mine.model, 0)
    expected = [mine.acc.gradient(param) / 4 for param in mine.params]  # type: ignore[operator]
    mine.acc.finish(4.0, defer=True)
    mine.acc.detach()
    for param, wanted in zip(mine.params, expected, strict=True):
        torch.testing.assert_close(param.grad.float(), wanted, rtol=2.0**-8, atol=0.0)  # type: ignore[union-attr]
    mine.acc.detach()


def test_defer_needs_masters_and_is_a_bool() -> None:
    model = fp32_model().bfloat16()
    acc = accumkern.attach(adamw(list(model.parameters())))
    backward(model, 0)
    with pytest.raises(ValueError, match="defer is True, and attached without master_weights"):
        acc.finish(defer=True)
    with pytest.raises(TypeError, match="defer is a int; it must be True or False"):
        acc.finish(defer=1)  # type: ignore[arg-type]
    acc.finish(2.0)


def test_a_checkpoint_between_a_deferred_finish_and_its_step_is_refused() -> None:
    mine = Masters(adamw)
    backward(mine.model, 0)
    mine.acc.finish(2.0, defer=True)
    with pytest.raises(RuntimeError, match=r"finish\(defer=True\) waits for optimizer.step\(\)"):
        mine.acc.state_dict()
    mine.optimizer.step()
    mine.acc.state_dict()


@pytest.mark.parametrize("defer", [False, True])
@pytest.mark.parametrize(
    "make",
    [lambda params: optim.AdamW(params, lr=1e-3, fused=True), lambda params: optim.SGD(params, lr=0.1, fused=True)],
)
def test_a_grad_scaler_is_divided_by_and_skips(make: Make, defer: bool) -> None:
    """It hands its scale and what it has found to a fused optimizer, and does not touch the gradients."""
    mine, reference = Masters(make), Reference(make)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1000)

    def loss(model: nn.Module, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        result: Tensor = model(torch.randn(8, 24, generator=generator).bfloat16()).float().square().mean()
        return result

    for step in range(3):
        scaler.scale(loss(mine.model, step)).backward()
        (8.0 * loss(reference.model, step)).backward()
        if defer:
            mine.acc.finish(4.0, defer=True)
        scaler.step(mine.optimizer)
        scaler.update()
        mine.optimizer.zero_grad()
        mine.scheduler.step()
        reference.step(8.0 * (4.0 if defer else 1.0))
    assert_equal(mine.masters(), reference.masters())
    steps = [float(state["step"]) for state in mine.optimizer.state.values() if "step" in state]
    states = copy.deepcopy(mine.optimizer.state_dict()["state"])
    scaler.scale(loss(mine.model, 9) * float("inf")).backward()
    scaler.step(mine.optimizer)
    scaler.update()
    assert_equal(mine.masters(), reference.masters())
    assert [float(state["step"]) for state in mine.optimizer.state.values() if "step" in state] == steps
    after = mine.optimizer.state_dict()["state"]
    for i, of_param in states.items():
        for name, value in of_param.items():
            assert torch.equal(after[i][name], value), name


# ---- memory and graphs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("defer", [False, True])
def test_a_step_makes_no_copies(defer: bool) -> None:
    weights = [nn.Parameter(torch.randn(256, 256).bfloat16()) for _ in range(8)]
    optimizer = optim.AdamW(weights, lr=1e-3)
    acc = accumkern.attach(optimizer, master_weights="split32")
    for last in (False, True):
        for _ in range(2):
            sum(weight.sum() for weight in weights).backward()  # type: ignore[union-attr]
        held = acc.memory().total
        with MemoryMeter(torch.device("cpu"), held, 2**40) as meter:
            acc.finish(2.0, 1.0, defer=defer)
            optimizer.step()
        if last:
            assert acc.memory().total == held
            assert meter.peak_bytes - held < 2**16
        optimizer.zero_grad()


def test_a_subclass_of_a_fused_optimizer_has_its_own_arithmetic() -> None:
    mine, reference = Masters(own_adamw), Reference(own_adamw)
    assert type(pinned(own_adamw(mine.params))) is OwnAdamW
    mine.window(0)
    reference.window(0)
    assert_equal(mine.masters(), reference.masters())


@pytest.mark.parametrize("make", [adamw, lambda params: optim.SGD(params, lr=0.1, momentum=0.9)], ids=["AdamW", "SGD"])
def test_a_step_of_fake_weights_on_a_gpu(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their coefficients come from the host, where fake tensors cannot be pinned."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with backends.without_kernels(), FakeTensorMode():
        weight = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16, device="cuda"))
        weight.grad = torch.zeros_like(weight)
        optimizer = make([weight])
        acc = accumkern.attach(optimizer, master_weights="split32", backend="eager")
        optimizer.step()
    assert_fused(acc)
    assert all(state.shape in ((), (3,)) for state in optimizer.state[weight].values())
