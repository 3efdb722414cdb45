"""The step of any optimizer on master weights: as on FP32 weights, bit for bit; hooks, closures and errors."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from masters import (
    Make,
    Masters,
    OwnAdamW,
    Reference,
    adamw,
    assert_equal,
    backward,
    fp32_model,
    own_adamw,
)
from pinned import pinned
from torch import nn, optim

import accumkern
from accumkern import optimizers
from accumkern.formats import Format, decode, encode
from accumkern.planning.memory import MemoryMeter

pytestmark = pytest.mark.usefixtures("one_thread")


def two_groups(params: list[nn.Parameter]) -> optim.Optimizer:
    return optim.AdamW([{"params": params[:2], "lr": 1e-3}, {"params": params[2:], "weight_decay": 0.0}], lr=1e-2)


def optimi(name: str, **options: Any) -> Make:
    return lambda params: getattr(importlib.import_module("optimi"), name)(params, lr=1e-3, triton=False, **options)


def bitsandbytes(name: str) -> Make:
    return lambda params: getattr(importlib.import_module("bitsandbytes").optim, name)(
        params, lr=1e-3, min_8bit_size=16
    )


TORCH: dict[str, Make] = {
    "SGD": lambda params: optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True),
    "SGD-foreach": lambda params: optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1, foreach=True),
    "Adam": lambda params: optim.Adam(params, lr=1e-3, weight_decay=0.1, foreach=False),
    "Adam-amsgrad": lambda params: optim.Adam(params, lr=1e-3, amsgrad=True, foreach=True),
    "AdamW": lambda params: optim.AdamW(params, lr=1e-3, foreach=False),
    "AdamW-foreach": lambda params: optim.AdamW(params, lr=1e-3, foreach=True),
    "AdamW-fused": lambda params: optim.AdamW(params, lr=1e-3, fused=True),
    "AdamW-tensor-lr": lambda params: optim.AdamW(params, lr=torch.tensor(1e-3), fused=True),
    "AdamW-groups": two_groups,
    "AdamW-own": own_adamw,
    "AdamW-own-fused": lambda params: OwnAdamW(params, lr=1e-3, fused=True),
    "Adafactor": lambda params: optim.Adafactor(params, lr=1e-2),
    "RMSprop": lambda params: optim.RMSprop(params, lr=1e-3, momentum=0.5, centered=True),
    "NAdam": lambda params: optim.NAdam(params, lr=1e-3),
    "RAdam": lambda params: optim.RAdam(params, lr=1e-3),
    "Adamax": lambda params: optim.Adamax(params, lr=1e-3),
    "Adagrad": lambda params: optim.Adagrad(params, lr=1e-2, initial_accumulator_value=0.1),
    "Muon": lambda params: optim.Muon([param for param in params if param.dim() == 2], lr=1e-3),
    "Rprop": lambda params: optim.Rprop(params, lr=1e-3),
    "ASGD": lambda params: optim.ASGD(params, lr=1e-3),
    "Adadelta": lambda params: optim.Adadelta(params, lr=0.1),
}
OF_OTHERS: dict[str, Make] = {
    "optimi-AdamW": optimi("AdamW"),
    "optimi-Lion": optimi("Lion"),
    "optimi-Ranger": optimi("Ranger"),
    "optimi-StableAdamW": optimi("StableAdamW"),
    "bitsandbytes-AdamW8bit": bitsandbytes("AdamW8bit"),
    "bitsandbytes-Lion8bit": bitsandbytes("Lion8bit"),
    "prodigyopt-Prodigy": lambda params: importlib.import_module("prodigyopt").Prodigy(params),
    "torchao-AdamW8bit": lambda params: importlib.import_module("torchao.optim").AdamW8bit(
        params, lr=torch.tensor(1e-3), block_size=8
    ),
}
BUCKET = 8 * 24 * 40  # bytes: the first matrix; there are three buckets


def assert_trains_as_fp32(make: Make, device: str = "cpu", steps: int = 20) -> None:
    mine, reference = Masters(make, device=device, bucket=BUCKET), Reference(make, device=device)
    for step in range(steps):
        mine.window(step)
        reference.window(step)
    assert_equal(mine.masters(), reference.masters())
    assert_equal([param.detach() for param in mine.params], [param.detach() for param in reference.params])
    moved = [not torch.equal(a, b) for a, b in zip(mine.masters(), fp32_model(device).parameters(), strict=True)]
    assert sum(moved) >= 3, "hardly anything was stepped"


@pytest.mark.integration("Master weights: torch.optim")
@pytest.mark.parametrize("make", TORCH.values(), ids=TORCH)
def test_optimizers_of_torch_step_masters_as_fp32_weights(make: Make) -> None:
    assert_trains_as_fp32(make)


@pytest.mark.gpu
@pytest.mark.parametrize("make", TORCH.values(), ids=TORCH)
def test_on_a_gpu(make: Make) -> None:
    assert_trains_as_fp32(make, "cuda")


@pytest.mark.integration("Master weights: optimi, bitsandbytes, Prodigy, torchao")
@pytest.mark.parametrize("name", OF_OTHERS)
def test_optimizers_of_others(name: str) -> None:
    pytest.importorskip(name.split("-")[0])
    assert_trains_as_fp32(OF_OTHERS[name])


@pytest.mark.parametrize("buffer", ["split24", "fp32"])
def test_every_buffer(buffer: str) -> None:
    mine, reference = Masters(adamw, buffer), Reference(adamw, buffer)
    for step in range(5):
        mine.window(step)
        reference.window(step)
    assert_equal(mine.masters(), reference.masters())


def test_split24_masters_are_rounded_to_16_bits_after_each_step() -> None:
    mine = Masters(adamw, master_weights="split24")
    weights = [
        nn.Parameter(decode(Format.SPLIT24, *encode(Format.SPLIT24, p.detach()))) for p in fp32_model().parameters()
    ]
    assert_equal(mine.masters(), [weight.detach() for weight in weights])
    optimizer = pinned(adamw(weights))
    for step in range(5):
        backward(mine.model, step)
        for param, weight in zip(mine.params, weights, strict=True):
            weight.grad = mine.acc.gradient(param)
        mine.optimizer.step()
        mine.optimizer.zero_grad()
        optimizer.step()
        with torch.no_grad():
            for weight in weights:
                weight.copy_(decode(Format.SPLIT24, *encode(Format.SPLIT24, weight.detach())))
        assert_equal(mine.masters(), [weight.detach() for weight in weights])


@pytest.mark.parametrize("windows", [1, 3], ids=["one micro-batch", "three"])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_finish_divides_and_clips_before_anything_is_rounded(windows: int, as_tensor: bool) -> None:
    mine, reference = Masters(adamw), Reference(adamw)
    for step in range(4):
        backward(mine.model, step, windows)
        backward(reference.model, step, windows)
        finished = mine.acc.finish(torch.tensor(7.0) if as_tensor else 7.0, max_norm=1e-3)
        assert 0 < finished.clip_coefficient < 1
        for param in mine.params:
            gradient = mine.acc.gradient(param)
            assert gradient is not None
            assert param.grad is not None
            assert torch.equal(param.grad, encode(Format.SPLIT32, gradient)[0])
        mine.optimizer.step()
        mine.optimizer.zero_grad()
        mine.scheduler.step()
        reference.step(7.0, finished.clip_coefficient)
    assert_equal(mine.masters(), reference.masters())


def test_small_updates_are_not_swallowed() -> None:
    updates = {}
    for masters in (None, "split24", "split32"):
        weight = nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
        optimizer = optim.SGD([weight], lr=1e-3)
        acc = accumkern.attach(optimizer, master_weights=masters)
        for _ in range(20):
            weight.sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        updates[masters] = 1 - (weight.detach().float() if masters is None else acc.master_weight(weight)).mean().item()
    assert updates[None] == 0
    assert updates["split24"] == pytest.approx(0.02, rel=1e-2)
    assert updates["split32"] == pytest.approx(0.02, rel=1e-4)


def test_float32_parameters_are_stepped_as_they_are() -> None:
    model = accumkern.to_bfloat16(fp32_model(), keep=[nn.LayerNorm])
    params = list(model.parameters())
    optimizer = adamw(params)
    acc = accumkern.attach(optimizer, master_weights="split32")
    norm = model[1].weight
    other = nn.Parameter(norm.detach().clone())
    stock = adamw([other])
    for _ in range(3):
        for param in params:
            param.grad = torch.full_like(param, 0.1)
        other.grad = torch.full_like(other, 0.1)
        optimizer.step()
        stock.step()
    assert norm.dtype is torch.float32
    assert_equal([norm.detach(), acc.master_weight(norm)], [other.detach()] * 2)
    assert acc.memory().master_residuals == 2 * sum(p.numel() for p in params if p.dtype is torch.bfloat16)


def test_parameters_without_gradients_are_left_alone() -> None:
    mine = Masters(adamw)
    before = mine.masters()
    mine.params[0].grad = torch.ones_like(mine.params[0])
    mine.optimizer.step()
    assert not torch.equal(mine.masters()[0], before[0])
    assert_equal(mine.masters()[1:], before[1:])
    assert list(mine.optimizer.state) == mine.params[:1]


def test_a_parameter_that_is_added_later_is_stepped_too() -> None:
    def later(params: list[nn.Parameter]) -> optim.Optimizer:
        optimizer = optim.SGD(params[:2], lr=0.1, momentum=0.9)
        optimizer.add_param_group({"params": params[2:], "lr": 0.2})
        return optimizer

    mine, reference = Masters(lambda params: optim.SGD(params[:2], lr=0.1, momentum=0.9)), Reference(later)
    mine.optimizer.add_param_group({"params": mine.params[2:], "lr": 0.2})
    for step in range(3):
        backward(mine.model, step)
        backward(reference.model, step)
        mine.optimizer.step()
        mine.optimizer.zero_grad()
        reference.step()
        for group, lr in zip(reference.optimizer.param_groups, (0.1, 0.2), strict=True):
            group["lr"] = lr
    assert_equal(mine.masters(), reference.masters())


# ---- optimizers that are stepped at once, or refused -------------------------------------------------------------


class CountsInGroup(optim.Optimizer):
    """An optimizer that counts its steps in the group and has something in common for all parameters, as Prodigy."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"k": 0, "norm": 0.0, "lr": 1e-3})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        norm = sum(p.grad.square().sum() for group in self.param_groups for p in group["params"] if p.grad is not None)
        for group in self.param_groups:
            group["k"] += 1
            group["norm"] = float(norm)
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["kept"] = p.grad
                    p.sub_(p.grad / (norm.sqrt() * group["k"]), alpha=1e-3)
        self.state["steps"] = group["k"]
        return loss


def test_what_is_not_in_the_table_is_stepped_at_once() -> None:
    mine, reference = Masters(CountsInGroup, bucket=1), Reference(CountsInGroup)
    kept: list[torch.Tensor] = []
    for step in range(5):
        mine.window(step)
        assert all(torch.equal(old, new) for old, new in zip(kept[::2], kept[1::2], strict=True))
        reference.window(step)
        kept = [
            t for p in mine.params for t in (mine.optimizer.state[p]["kept"], mine.optimizer.state[p]["kept"].clone())
        ]
    assert_equal(mine.masters(), reference.masters())
    assert mine.optimizer.param_groups[0]["k"] == mine.optimizer.state["steps"] == 5
    assert mine.optimizer.param_groups[0]["norm"] == reference.optimizer.param_groups[0]["norm"]


def test_a_subclass_with_a_step_of_its_own_is_stepped_once() -> None:
    class Mine(optim.AdamW):
        steps = 0

        def step(self, closure: Any = None) -> Any:
            self.steps += 1
            return super().step(closure)

    mine, reference = Masters(lambda params: Mine(params, lr=1e-3), bucket=1), Reference(own_adamw)
    called = []
    mine.optimizer.register_step_pre_hook(lambda *_: called.append(1))
    for step in range(3):
        mine.window(step)
        reference.window(step)
    assert_equal(mine.masters(), reference.masters())
    assert mine.optimizer.steps == len(called) == 3  # type: ignore[attr-defined]


class KeepsParameters(optim.SGD):
    """An optimizer that steps what it has kept, whatever is in its groups."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        self.kept = list(self.param_groups[0]["params"])

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.kept:
            p.sub_(p.grad)


def test_an_optimizer_that_steps_what_is_not_in_its_groups_is_found_out() -> None:
    mine = Masters(KeepsParameters)
    backward(mine.model, 0)
    with pytest.raises(RuntimeError, match=r"KeepsParameters.step\(\) has written parameters that it does not take"):
        mine.optimizer.step()


def schedule_free(params: list[nn.Parameter]) -> optim.Optimizer:
    made: optim.Optimizer = pytest.importorskip("schedulefree").AdamWScheduleFree(params)
    return made


def lbfgs(params: list[nn.Parameter]) -> optim.Optimizer:
    return optim.LBFGS(params)


def named(module: str, name: str) -> Make:
    return lambda params: type(name, (optim.SGD,), {"__module__": module})(params, lr=0.1)


def gradient_release(params: list[nn.Parameter]) -> optim.Optimizer:
    pytest.importorskip("optimi")
    return OF_OTHERS_RELEASE(params)


OF_OTHERS_RELEASE = optimi("AdamW", gradient_release=True)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lbfgs, "it calls its closure several times in a step"),
        (named("flashoptim.optimizers", "FlashAdamW"), "it keeps by itself what its bfloat16 weights lack"),
        (schedule_free, "its train\\(\\) and eval\\(\\) exchange"),
        (named("torchao.optim.cpu_offload", "CPUOffloadOptimizer"), "it steps copies of the weights"),
        (lambda params: optim.AdamW(params, differentiable=True), "differentiable is on"),
        (gradient_release, "gradient_release is on"),
    ],
    ids=["LBFGS", "FlashOptim", "ScheduleFree", "CPUOffload", "differentiable", "gradient release"],
)
def test_what_cannot_be_stepped_is_refused(make: Make, reason: str) -> None:
    params = list(fp32_model().bfloat16().parameters())
    optimizer = make(params)
    with pytest.raises(TypeError, match=f"cannot be stepped with master_weights: {reason}"):
        accumkern.attach(optimizer, master_weights="split32")
    assert accumkern.accumulator_of(optimizer) is None
    accumkern.attach(optimizer).detach()


def test_settings_of_single_parameters_in_bitsandbytes_are_refused() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    manager = bnb.optim.GlobalOptimManager.get_instance()
    params = list(fp32_model().bfloat16().parameters())
    optimizer = bnb.optim.AdamW8bit(params)
    try:
        manager.override_config(params[0], "optim_bits", 32)
        with pytest.raises(TypeError, match="GlobalOptimManager has settings for single parameters"):
            accumkern.attach(optimizer, master_weights="split32")
        others = bnb.optim.AdamW8bit(list(fp32_model().bfloat16().parameters()))
        accumkern.attach(others, master_weights="split32")
    finally:
        manager.initialize()


def test_what_is_not_an_optimizer_of_torch_is_refused() -> None:
    class Wrapper:
        def __init__(self) -> None:
            self.param_groups = [{"params": list(fp32_model().bfloat16().parameters())}]

        def add_param_group(self, group: Any) -> None:
            self.param_groups.append(group)

    with pytest.raises(TypeError, match="it has no step hooks"):
        accumkern.attach(Wrapper(), master_weights="split32")  # type: ignore[arg-type]


def test_every_step_in_the_table_is_one_of_torch() -> None:
    """Names that torch no longer has would be stepped at once, silently."""
    names = [name for name in optimizers.STEPPED_IN_PARTS if name.startswith("torch.")]
    for name in names:
        module, kind, _ = name.rsplit(".", 2)
        step = getattr(importlib.import_module(module), kind).step
        assert f"{step.__module__}.{step.__qualname__}" == name
    for make in TORCH.values():
        assert optimizers.is_stepped_in_parts(make(list(fp32_model().parameters())))


# ---- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"master_weights": "fp32"},
            ValueError,
            "master_weights is 'fp32'; it must be one of split24, split32, or None",
        ),
        ({"master_weights": True}, TypeError, "master_weights is a bool; it must be one of split24, split32, or None"),
        ({"master_weights": "split32", "bucket": 0}, ValueError, "bucket is 0; it must be a positive number of bytes"),
        ({"master_weights": "split32", "bucket": 1.5}, TypeError, "bucket is a float; it must be a positive number"),
        ({"bucket": 2**20}, ValueError, "bucket is 1048576; it belongs to master_weights, which is None"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    optimizer = adamw(list(fp32_model().bfloat16().parameters()))
    with pytest.raises(error, match=message):
        accumkern.attach(optimizer, **options)
    assert accumkern.accumulator_of(optimizer) is None


def test_float16_is_refused() -> None:
    optimizer = adamw(list(fp32_model().half().parameters()))
    with pytest.raises(TypeError, match=r"torch.float16, which has no master_weights: with 5 bits of exponent"):
        accumkern.attach(optimizer, "fp32", master_weights="split32")
    assert accumkern.accumulator_of(optimizer) is None


def test_without_masters_one_is_told_to_attach_with_them() -> None:
    model = fp32_model().bfloat16()
    acc = accumkern.attach(adamw(list(model.parameters())))
    for ask in (lambda: acc.master_weight(next(model.parameters())), lambda: acc.master_state_dict(model)):
        with pytest.raises(RuntimeError, match=r"needs the master weights of attach\(..., master_weights='split32'\)"):
            ask()
    acc = Masters(adamw).acc
    with pytest.raises(ValueError, match="param is not a parameter of the attached optimizer"):
        acc.master_weight(torch.ones(3))


# ---- memory ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bucket", [2**18, 2**20])
def test_a_step_needs_one_bucket_beside_what_is_held(bucket: int) -> None:
    weights = [nn.Parameter(torch.randn(128, 128).bfloat16()) for _ in range(64)]  # 8 MiB of FP32 weights and gradients
    optimizer = OwnAdamW(weights, lr=1e-3, fused=True)
    acc = accumkern.attach(optimizer, master_weights="split32", bucket=bucket)

    def window() -> None:
        for _ in range(2):
            sum(weight.sum() for weight in weights).backward()  # type: ignore[union-attr]

    window()
    optimizer.step()
    optimizer.zero_grad()
    acc._rooms.stepping._stand_ins.kept.clear()  # type: ignore[union-attr]
    window()
    held = acc.memory().total
    with MemoryMeter(torch.device("cpu"), held, 2**40) as meter:
        optimizer.step()
    assert acc.memory().total - held == bucket == acc.memory().bucket
    assert bucket <= meter.peak_bytes - held <= 1.05 * bucket
