"""Outside of ``step()`` the optimizer is as always: hooks, closures, schedulers, scalers, errors, copies, detach."""

from __future__ import annotations

import copy
import gc
import importlib
import io
import weakref
from typing import Any

import pytest
import torch
from masters import Masters, Reference, adamw, assert_equal, backward, fp32_model, own_adamw
from torch import nn, optim

import accumkern

pytestmark = pytest.mark.usefixtures("one_thread")

BUCKET = 8 * 24 * 40


def assert_holds_the_parameters(mine: Masters) -> None:
    assert [id(p) for group in mine.optimizer.param_groups for p in group["params"]] == [id(p) for p in mine.params]
    assert all(any(key is p for p in mine.params) for key in mine.optimizer.state)


def test_hooks_see_the_optimizer_as_always_and_gradients_may_change_in_them() -> None:
    """Whenever they were registered: a pre-hook before anything is stepped, a post-hook when everything is."""
    mine, reference = Masters(adamw, bucket=BUCKET), Reference(adamw)
    seen: dict[str, list[Any]] = {"before": [], "after": []}

    def halve(optimizer: Any, _args: Any, _kwargs: Any) -> None:
        assert optimizer is mine.optimizer
        assert_holds_the_parameters(mine)
        seen["before"].append(mine.masters())
        mine.acc.finish(2.0)

    def look(optimizer: Any, _args: Any, _kwargs: Any) -> None:
        assert optimizer is mine.optimizer
        assert_holds_the_parameters(mine)
        seen["after"].append(mine.masters())

    mine.optimizer.register_step_post_hook(look)
    mine.optimizer.register_step_pre_hook(halve)
    before = mine.masters()
    for step in range(2):
        mine.window(step)
        backward(reference.model, step)
        reference.step(2.0)
        assert_equal(seen["before"][-1], before)
        assert_equal(seen["after"][-1], reference.masters())
        before = mine.masters()
        assert_equal(before, reference.masters())
    assert len(seen["before"]) == len(seen["after"]) == 2


def test_a_hook_that_would_come_too_late_is_found_out() -> None:
    mine, reference = Masters(adamw), Reference(adamw)
    called = []
    optim.Optimizer.register_step_pre_hook(mine.optimizer, lambda *_: called.append(1))  # as wrappers do
    before = mine.masters()
    backward(mine.model, 0)
    with pytest.raises(RuntimeError, match=r"a hook before step\(\) was registered after attach"):
        mine.optimizer.step()
    assert_equal(mine.masters(), before)
    mine.optimizer.step()
    backward(reference.model, 0)
    reference.step()
    assert_equal(mine.masters(), reference.masters())
    assert called == [1]


@pytest.mark.parametrize("by_name", [False, True])
def test_closure_is_called_once_with_gradients_enabled_before_the_step(by_name: bool) -> None:
    mine, reference = Masters(adamw, bucket=BUCKET), Reference(adamw)
    calls = []

    def closure() -> torch.Tensor:
        assert_holds_the_parameters(mine)
        mine.optimizer.zero_grad()
        backward(mine.model, len(calls))
        calls.append(torch.is_grad_enabled())
        return torch.tensor(float(len(calls)))

    for step in range(3):
        loss = mine.optimizer.step(closure=closure) if by_name else mine.optimizer.step(closure)
        assert loss == step + 1
        mine.scheduler.step()
        reference.window(step)
    assert calls == [True] * 3
    assert_equal(mine.masters(), reference.masters())


class CallsTwice(optim.SGD):
    def step(self, closure: Any = None) -> Any:
        closure()
        return super().step(closure)


def test_an_optimizer_that_calls_its_closure_again_is_found_out() -> None:
    mine = Masters(lambda params: CallsTwice(params, lr=0.1))
    before = mine.masters()
    with pytest.raises(RuntimeError, match="calls its closure several times in a step"):
        mine.optimizer.step(lambda: backward(mine.model, 0))
    assert_equal(mine.masters(), before)
    assert_holds_the_parameters(mine)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_after_an_error_the_optimizer_is_as_always(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Buckets that were stepped before the error are stepped, as are parameters in stock PyTorch."""
    mine = Masters(own_adamw, bucket=BUCKET)
    mine.window(0)
    before, calls = mine.masters(), []
    adam = importlib.import_module("torch.optim.adam")
    original = adam.adam

    def fail(*args: Any, **kwargs: Any) -> None:
        calls.append(1)
        if len(calls) == at:
            raise MemoryError("none left")
        original(*args, **kwargs)

    backward(mine.model, 1)
    monkeypatch.setattr(adam, "adam", fail)
    with pytest.raises(MemoryError, match="none left"):
        mine.optimizer.step()
    monkeypatch.undo()
    assert_holds_the_parameters(mine)
    assert {t.dtype for state in mine.optimizer.state.values() for t in state.values()} == {torch.float32}
    changed = [not torch.equal(a, b) for a, b in zip(mine.masters(), before, strict=True)]
    assert any(changed) is (at > 1)
    assert not changed[-1]
    mine.optimizer.step()
    assert not torch.equal(mine.masters()[-1], before[-1])


@pytest.mark.parametrize("fused", [False, True])
def test_a_grad_scaler_skips_what_is_not_finite(fused: bool) -> None:
    mine = Masters(lambda params: optim.AdamW(params, lr=1e-3, fused=fused))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    mine.window(0)
    for factor in (float("inf"), 1.0):
        before = mine.masters()
        mine.optimizer.zero_grad()
        x = torch.randn(4, 24).bfloat16()
        scaler.scale(mine.model(x).square().mean() * factor).backward()
        scaler.step(mine.optimizer)
        scaler.update()
        same = all(torch.equal(a, b) for a, b in zip(mine.masters(), before, strict=True))
        assert same is (factor != 1.0)
        assert all(bool(master.isfinite().all()) for master in mine.masters())


@pytest.mark.filterwarnings("ignore:Profiler record function")
def test_a_compiled_step() -> None:
    """torch.compile breaks its graph at the hooks, so that the step is right."""
    mine, reference = Masters(adamw), Reference(adamw)
    step_compiled = torch.compile(mine.optimizer.step)
    for step in range(3):
        backward(mine.model, step)
        step_compiled()
        mine.optimizer.zero_grad()
        mine.scheduler.step()
        reference.window(step)
    for a, b in zip(mine.masters(), reference.masters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
        assert not torch.equal(a, a.bfloat16().float())


def test_copies_and_files_of_the_optimizer_carry_nothing() -> None:
    mine = Masters(adamw)
    mine.window(0)
    twin = copy.deepcopy(mine.optimizer)
    assert type(twin) is optim.AdamW
    assert "accumkern" not in str(twin.__dict__)
    stream = io.BytesIO()
    torch.save(mine.optimizer, stream)
    stream.seek(0)
    assert type(torch.load(stream, weights_only=False)) is optim.AdamW
    torch.save(mine.model.state_dict(), io.BytesIO())


def test_nothing_is_left_after_detach() -> None:
    mine = Masters(adamw)
    mine.window(0)
    hooks = mine.optimizer._optimizer_step_pre_hooks, mine.optimizer._optimizer_step_post_hooks
    mine.acc.detach()
    assert not any(map(len, hooks))
    assert "register_step_pre_hook" not in vars(mine.optimizer)
    assert not mine.optimizer._optimizer_load_state_dict_pre_hooks
    assert not mine.optimizer._optimizer_load_state_dict_post_hooks
    state = mine.optimizer.state[mine.params[0]]
    assert (state["exp_avg"].dtype, state["step"].dtype) == (torch.bfloat16, torch.float32)
    backward(mine.model, 1)
    mine.optimizer.step()  # stock PyTorch's
    mine.optimizer.load_state_dict(mine.optimizer.state_dict())
    assert mine.optimizer.state[mine.params[0]]["exp_avg"].dtype is torch.bfloat16


def test_optimizer_model_and_residuals_go_when_nobody_holds_them(no_collector: None) -> None:
    mine = Masters(adamw, bucket=BUCKET)
    mine.window(0)
    residuals = [weakref.ref(r) for r in mine.acc._rooms.masters.held_tensors()]  # type: ignore[union-attr]
    optimizer, model = weakref.ref(mine.optimizer), weakref.ref(mine.model)
    del mine
    gc.collect()  # the scheduler is in a circle with its optimizer
    assert optimizer() is None
    assert model() is None
    assert [r() for r in residuals] == [None] * len(residuals)


def test_attributes_of_parameters_are_those_of_their_stand_ins() -> None:
    class ByLabel(optim.SGD):
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    assert p.label == list(p.shape)
                    assert p.requires_grad
            super().step(closure)

    mine = Masters(lambda params: ByLabel(params, lr=0.1))
    for param in mine.params:
        param.label = list(param.shape)  # type: ignore[attr-defined]
    mine.window(0)


def test_attach_again_after_detach() -> None:
    model = fp32_model().bfloat16()
    optimizer = adamw(list(model.parameters()))
    for _ in range(2):
        with accumkern.attach(optimizer, master_weights="split32") as acc:
            backward(model, 0)
            optimizer.step()
            assert not torch.equal(acc.master_weight(model[0].weight), model[0].weight.detach().float())
        assert accumkern.accumulator_of(optimizer) is None


def test_two_accumulators_of_one_parameter_are_refused() -> None:
    mine = Masters(adamw)
    with pytest.raises(ValueError, match="is attached already"):
        accumkern.attach(optim.SGD(mine.params, lr=0.1), master_weights="split32")
    mine.window(0)


def test_repr_says_how_masters_are_kept() -> None:
    assert "master_weights='split32'" in repr(Masters(adamw).acc)
    weight = nn.Parameter(torch.ones(3))
    optimizer = optim.SGD([weight])
    acc = accumkern.attach(optimizer)
    assert "master_weights" not in repr(acc)
