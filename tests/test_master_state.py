"""Checkpoints of master weights: bit for bit, interchangeable with FP32 weights, and refused where they do not fit."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from masters import Make, Masters, OwnAdamW, adamw, assert_equal, backward, fp32_model
from pinned import pinned
from test_master_weights import OF_OTHERS, TORCH
from torch import nn, optim

import accumkern

pytestmark = pytest.mark.usefixtures("one_thread")


def through_a_file(state: Any) -> Any:
    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=True)


def save(run: Masters) -> dict[str, Any]:
    state = {"model": run.model, "optimizer": run.optimizer, "scheduler": run.scheduler, "acc": run.acc}
    return through_a_file({name: part.state_dict() for name, part in state.items()})


def load(run: Masters, saved: dict[str, Any]) -> None:
    run.model.load_state_dict(saved["model"])
    run.optimizer.load_state_dict(saved["optimizer"])
    run.scheduler.load_state_dict(saved["scheduler"])
    run.acc.load_state_dict(saved["acc"])


def assert_resumes(make: Make, **options: Any) -> None:
    run = Masters(make, **options)
    for step in range(4):
        run.window(step)
    saved = save(run)
    run.window(4)
    run.window(5)
    resumed = Masters(make, **options)
    resumed.window(9)
    load(resumed, saved)
    resumed.window(4)
    resumed.window(5)
    assert_equal(resumed.masters(), run.masters())
    assert_equal([p.detach() for p in resumed.params], [p.detach() for p in run.params])
    for a, b in zip(resumed.params, run.params, strict=True):
        for key, value in run.optimizer.state.get(b, {}).items():
            assert not isinstance(value, torch.Tensor) or torch.equal(resumed.optimizer.state[a][key], value), key


@pytest.mark.parametrize("make", TORCH.values(), ids=TORCH)
def test_resume(make: Make) -> None:
    assert_resumes(make)


@pytest.mark.parametrize("name", OF_OTHERS)
def test_resume_optimizers_of_others(name: str) -> None:
    pytest.importorskip(name.split("-")[0])
    assert_resumes(OF_OTHERS[name])


def test_resume_split24() -> None:
    assert_resumes(adamw, master_weights="split24", buffer="split24")


def test_resume_in_the_middle_of_a_window() -> None:
    run, resumed = Masters(adamw), Masters(adamw)
    run.window(0)
    backward(run.model, 1)
    saved = save(run)
    load(resumed, saved)
    for one in (run, resumed):
        backward(one.model, 2)
        one.optimizer.step()
    assert_equal(resumed.masters(), run.masters())


def test_state_holds_what_the_weights_lack_and_nothing_else() -> None:
    run = Masters(adamw)
    run.window(0)
    state = run.acc.state_dict()
    assert set(state) == {"buffer", "sums", "residuals", "master_weights"}
    assert set(state["master_weights"]) == {"format", "residuals", "checksums"}
    assert state["master_weights"]["format"] == "split32"
    for i, param in enumerate(run.params):
        residual = state["master_weights"]["residuals"][str(i)]
        assert (residual.dtype, residual.shape, residual.stride()) == (torch.int16, param.shape, param.stride())
    never = accumkern.attach(adamw(list(fp32_model().bfloat16().parameters())), master_weights="split24")
    assert set(never.state_dict()["master_weights"]["residuals"].values()) == {None}


def test_weights_that_were_changed_lack_nothing() -> None:
    run = Masters(adamw)
    run.window(0)
    with torch.no_grad():
        run.params[0].mul_(2)
    assert run.acc.state_dict()["master_weights"]["residuals"]["0"] is None


# ---- the optimizer's state ---------------------------------------------------------------------------------------


def states(optimizer: optim.Optimizer) -> list[torch.Tensor]:
    groups = optimizer.state_dict()["state"]
    return [value for i in sorted(groups) for value in groups[i].values() if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("make", TORCH.values(), ids=TORCH)
def test_checkpoints_of_fp32_weights_are_exchanged_without_loss(make: Make) -> None:
    fp32 = fp32_model()
    params = list(fp32.parameters())
    stock = make(params)
    for param in params:
        param.grad = torch.randn_like(param)
    stock.step()
    mine = Masters(make)
    mine.optimizer.load_state_dict(through_a_file(stock.state_dict()))
    assert_equal(states(mine.optimizer), states(stock))
    with torch.no_grad():
        for param, weight in zip(mine.params, params, strict=True):
            param.copy_(weight)
            weight.copy_(mine.acc.master_weight(param) if weight in stock.state else param)
    pinned(stock)
    for step in range(2):
        backward(mine.model, step)
        for param, weight in zip(mine.params, params, strict=True):
            weight.grad = mine.acc.gradient(param) if weight in stock.state else None
        mine.optimizer.step()
        stock.step()
        mine.optimizer.zero_grad()
        mine.model.zero_grad()
    assert_equal(
        mine.masters(),
        [w.detach() if w in stock.state else p.detach().float() for w, p in zip(params, mine.params, strict=True)],
    )
    back = make(list(fp32_model().parameters()))
    back.load_state_dict(through_a_file(mine.optimizer.state_dict()))
    assert_equal(states(back), states(stock))


@pytest.mark.parametrize("when", ["before attach", "loaded"])
def test_states_of_bfloat16_training_become_fp32(when: str) -> None:
    model = fp32_model().bfloat16()
    optimizer = adamw(list(model.parameters()))
    backward(model, 0)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    assert before["state"][0]["exp_avg"].dtype is torch.bfloat16
    if when == "loaded":
        optimizer = adamw(list(model.parameters()))
    accumkern.attach(optimizer, master_weights="split32")
    if when == "loaded":
        optimizer.load_state_dict(before)
    state = optimizer.state[model[0].weight]
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert torch.equal(state["exp_avg"], before["state"][0]["exp_avg"].float())
    backward(model, 1)
    optimizer.step()


def test_nested_states() -> None:
    class Nested(optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for p in self.param_groups[0]["params"]:
                state = self.state[p]
                if not state:
                    state["parts"] = [torch.zeros_like(p), {"sum": torch.zeros_like(p)}]
                state["parts"][1]["sum"].add_(p.grad)
                p.sub_(state["parts"][1]["sum"], alpha=0.1)

    run = Masters(lambda params: Nested(params, lr=0.1))
    run.window(0)
    saved = through_a_file(run.optimizer.state_dict())
    run.optimizer.load_state_dict(saved)
    parts = run.optimizer.state[run.params[0]]["parts"]
    assert parts[0].dtype is parts[1]["sum"].dtype is torch.float32
    assert torch.equal(parts[1]["sum"], saved["state"][0]["parts"][1]["sum"])


# ---- export ------------------------------------------------------------------------------------------------------


def test_a_model_in_fp32_for_export() -> None:
    run = Masters(adamw)
    run.window(0)
    exported = run.acc.master_state_dict(run.model)
    fp32 = fp32_model()
    fp32.load_state_dict(exported)
    assert_equal([p.detach() for p in fp32.parameters()], run.masters())
    assert not any(value.requires_grad for value in exported.values())
    assert list(exported) == list(run.model.state_dict())
    exported["0.weight"].zero_()
    assert run.masters()[0].any()


def test_export_casts_what_has_no_master() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 4))
    model.bfloat16()
    model[3].float()
    acc = accumkern.attach(adamw(list(model[0].parameters())), master_weights="split32")
    exported = acc.master_state_dict(model)
    assert {key: value.dtype for key, value in exported.items()} == {
        key: torch.int64 if "num_batches" in key else torch.float32 for key in model.state_dict()
    }
    assert torch.equal(exported["2.weight"], model[2].weight.float())
    with pytest.raises(TypeError, match="model is a list; it must be"):
        acc.master_state_dict([])  # type: ignore[arg-type]


# ---- memory ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "bucket"), [(optim.AdamW, 0), (OwnAdamW, 2 * 1024 * 4)])
def test_memory_is_counted_from_the_tensors(kind: Any, bucket: int) -> None:
    weight = nn.Parameter(torch.randn(1000).bfloat16())
    optimizer = kind([weight])
    acc = accumkern.attach(optimizer, master_weights="split32")
    kinds = "weights", "master_residuals", "gradients", "residuals", "optimizer_state", "bucket"

    def held() -> list[int]:
        memory = acc.memory()
        assert memory.total == sum(getattr(memory, kind) for kind in kinds)
        return [getattr(memory, kind) for kind in kinds]

    assert held() == [2000, 0, 0, 0, 0, 0]
    for _ in range(2):
        weight.sum().backward()
    assert held() == [2000, 0, 2000, 1000, 0, 0]
    optimizer.step()
    assert held() == [2000, 2000, 2000, 1000, 8004, bucket]
    optimizer.zero_grad()
    assert held() == [2000, 2000, 0, 1000, 8004, bucket]
    assert acc.memory().numel == 1000
    lines = str(acc.memory()).splitlines()
    assert "master residuals" in lines[1]
    assert lines[1].endswith("2.00 B per parameter")
    assert lines[-1].split()[0] == "total"
    acc.detach()
    with pytest.raises(RuntimeError, match="detached"):
        acc.memory()


def test_of_a_quantized_state_what_it_is_made_of_is_counted() -> None:
    states = pytest.importorskip("torchao.optim.subclass_8bit")
    weight = nn.Parameter(torch.randn(4096).bfloat16())
    optimizer = optim.SGD([weight])
    acc = accumkern.attach(optimizer)
    state = states.OptimState8bit.zeros(weight.shape, signed=True, block_size=256, device=weight.device)
    optimizer.state[weight]["exp_avg"] = state
    assert acc.memory().optimizer_state == 4096 + 4 * 4096 // 256 + 4 * 256  # codes, scales and what the codes mean


# ---- what does not fit -------------------------------------------------------------------------------------------

Change = Callable[[dict[str, Any]], Any]


def drop(*keys: str) -> Change:
    def change(state: dict[str, Any]) -> None:
        for key in keys[:-1]:
            state = state[key]
        del state[keys[-1]]

    return change


def put(value: Any, *keys: str) -> Change:
    def change(state: dict[str, Any]) -> None:
        for key in keys[:-1]:
            state = state[key]
        state[keys[-1]] = value(state[keys[-1]]) if callable(value) else value

    return change


M = "master_weights"
WRONG: dict[str, tuple[Change, type[Exception], str]] = {
    "none": (drop(M), ValueError, "this accumulator has master_weights and state_dict has none"),
    "no dict": (put(3, M), TypeError, r"state_dict\['master_weights'\] is int; it must be what"),
    "keys": (drop(M, "checksums"), TypeError, r"is \['format', 'residuals'\]; it must be what"),
    "format": (put("split24", M, "format"), ValueError, "was saved with 'split24'; this accumulator has 'split32'"),
    "list": (put([], M, "residuals"), TypeError, "residuals of .* is a list; it must be a dictionary"),
    "fewer": (drop(M, "residuals", "6"), ValueError, "residuals of .* are of 6 parameters; the optimizer has 7"),
    "number": (put(3, M, "residuals", "0"), TypeError, r"residuals\[0\] of .* is a int; it must be a dense tensor"),
    "dtype": (
        put(lambda r: r.int(), M, "residuals", "0"),
        TypeError,
        "is torch.int32; with 'split32' it is torch.int16",
    ),
    "shape": (
        put(lambda r: r.t(), M, "residuals", "0"),
        ValueError,
        r"has shape \(24, 40\); parameter 0 has \(40, 24\)",
    ),
    "meta": (put(lambda r: r.to("meta"), M, "residuals", "0"), TypeError, "it must be a dense tensor with values"),
    "checksum": (put(lambda c: c + 1, M, "checksums", "1"), ValueError, "belongs to another weight than parameter 1"),
    "no checksum": (put(None, M, "checksums", "1"), TypeError, r"checksums\[1\] of .* is no tensor"),
    "gradients": (put(3, "sums", "0"), TypeError, r"sums\[0\] of state_dict is a int"),
}


@pytest.mark.parametrize(("change", "error", "message"), WRONG.values(), ids=WRONG)
def test_a_state_that_does_not_fit(change: Change, error: type[Exception], message: str) -> None:
    run = Masters(adamw)
    run.window(0)
    before = run.masters()
    state = copy.deepcopy(run.acc.state_dict())
    change(state)
    with pytest.raises(error, match=message):
        run.acc.load_state_dict(state)
    assert_equal(run.masters(), before)


def test_residuals_of_other_weights_are_refused_because_the_model_has_to_be_loaded_before() -> None:
    run = Masters(adamw)
    run.window(0)
    saved = save(run)
    other = Masters(adamw)
    before = other.masters()
    with pytest.raises(ValueError, match="load the state of the model before this one"):
        other.acc.load_state_dict(saved["acc"])
    assert_equal(other.masters(), before)
    load(other, saved)
    assert_equal(other.masters(), run.masters())


def test_a_state_with_masters_is_refused_without_them() -> None:
    saved = Masters(adamw).acc.state_dict()
    acc = accumkern.attach(adamw(list(fp32_model().bfloat16().parameters())), "split32")
    with pytest.raises(ValueError, match="state_dict has master_weights and this accumulator has none"):
        acc.load_state_dict(saved)


def test_a_residual_for_an_fp32_weight_is_refused() -> None:
    saved = Masters(adamw).acc.state_dict()
    model = accumkern.to_bfloat16(fp32_model(), keep=["0.weight"])
    acc = accumkern.attach(adamw(list(model.parameters())), "split32", master_weights="split32")
    with pytest.raises(TypeError, match=r"parameter 0 is torch.float32, which lacks nothing"):
        acc.load_state_dict(saved)
