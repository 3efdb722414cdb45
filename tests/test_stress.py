"""Thousands of windows of everything that a training loop may do, on random models, against sums in FP64.

A hook on each parameter notes what autograd hands in. The expected value of a gradient is the FP64 sum of that, times
the scale, from the last edit on; beside it stands a bound of the error that the format may have made by then. No
kernel, format or hook of the package takes part in the expectation. test_state.py has the same with exact bits, for
gradients that are made up.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gradients import Raise, assert_same_bits
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import accumkern
from accumkern import waiting as waiting_gradients
from accumkern.noise_scale import estimate

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")
stateful = pytest.importorskip("hypothesis.stateful")

pytestmark = pytest.mark.slow

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

#: Relative error of one fold: what rounding the sum to its format may cost.
FOLD_ERROR = {"split24": 2.0**-16 + 2.0**-24, "split32": 2.0**-24, "fp32": 2.0**-24}
#: Relative error of ``.grad``: half a unit in the last place, and the ties that round away from zero.
GRAD_ERROR = {BF16: 2.0**-8 * (1 + 2.0**-7), FP16: 2.0**-11, FP32: 2.0**-24, FP64: 2.0**-53}
#: Absolute error of ``.grad`` and of the sum where they are subnormal.
GRAD_TINY = {BF16: 1e-38, FP16: 2.0**-25, FP32: 1e-38, FP64: 0.0}
SUM_TINY = 1e-37


# ---- random models -----------------------------------------------------------------------------------------------


LAYERS = ["linear", "tied", "norm", "gain", "convolution", "checkpointed", "checkpointed reentrant", "large"]


class Network(nn.Module):
    """Layers of one width in a row, each behind a tanh; a dtype of its own for each if `dtypes` holds several."""

    def __init__(self, width: int, layers: list[str], dtypes: list[torch.dtype]) -> None:
        super().__init__()
        self.width, self.kinds = width, layers
        self.fails_before: int | None = None
        self.layers = nn.ModuleList()
        for i, kind in enumerate(layers):
            self.layers.append(self._layer(kind).to(dtypes[i % len(dtypes)]))

    def _layer(self, kind: str) -> nn.Module:
        if kind == "tied":
            linear = [layer for layer in self.layers if isinstance(layer, nn.Linear)]
            return linear[0] if linear else nn.Linear(self.width, self.width)
        if kind == "norm":
            return nn.LayerNorm(self.width)
        if kind == "gain":
            return nn.ParameterList([torch.ones(()), torch.ones(self.width), torch.ones(0)])
        if kind == "convolution":
            return nn.Conv2d(self.width, self.width, 2, padding=1).to(memory_format=torch.channels_last)
        if kind == "large":  # too large to wait for the end of the backward pass
            return nn.ParameterList([torch.ones(257, 256)])
        return nn.Linear(self.width, self.width)

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, width); returns a scalar."""
        for i, (kind, layer) in enumerate(zip(self.kinds, self.layers, strict=True)):
            if i == self.fails_before:
                x = Raise.apply(x)
            x = x.to(next(layer.parameters()).dtype)
            if kind == "gain":
                x = x * layer[0] + layer[1] + layer[2].sum()
            elif kind == "large":
                x = x + (layer[0].float() * x.mean()).sum() / 257  # more than float16 holds
            elif kind == "convolution":
                x = layer(x[:, :, None, None].expand(-1, -1, 2, 2)).mean((2, 3))
            elif kind.startswith("checkpointed"):
                x = checkpoint(layer, x, use_reentrant=kind.endswith(" reentrant"))
            else:
                x = layer(x)
            x = torch.tanh(x)
        return x.float().square().sum()


# ---- what must come out ------------------------------------------------------------------------------------------


class Expected:
    """The FP64 value of one gradient, and a bound of the error that the accumulated one may have."""

    def __init__(self, param: nn.Parameter, buffer: str) -> None:
        self.param = param
        folded = param.dtype is not FP64
        self.error = (FOLD_ERROR[buffer] if param.dtype is BF16 else 2.0**-24) if folded else 2.0**-53
        self.value: Tensor | None = None
        self.bound = torch.zeros((), dtype=FP64)
        self.arrived: list[Tensor] = []  # in this backward pass
        param.register_hook(lambda grad: self.arrived.append(grad.to(FP64, copy=True)))

    def take(self, error: float = 0.0) -> None:
        """Take over a gradient that somebody set or changed."""
        grad = self.param.grad
        self.value = None if grad is None else grad.detach().to(FP64, copy=True)
        self.bound = torch.zeros((), dtype=FP64) if self.value is None else error * self.value.abs()

    def add(self, grad: Tensor, scale: float | Tensor) -> None:
        """Add what arrived."""
        # The kernels take the scale in FP32; torch multiplies a float64 gradient by the number.
        factor = float(scale) if self.param.dtype is FP64 else float(torch.as_tensor(scale, dtype=FP32))
        term = grad * factor
        if self.value is None and factor == 1:  # kept as it came
            self.value, self.bound = term, torch.zeros((), dtype=FP64)
            return
        self.value = term if self.value is None else self.value + term
        # The eager backend rounds the product too.
        self.bound = self.bound + self.error * (self.value.abs() + self.bound) + 2.0**-24 * term.abs()

    def is_met_by(self, gradient: Tensor | None) -> bool:
        """Return whether an accumulated gradient, read in FP32, and ``.grad`` are what must come out."""
        if gradient is None or self.value is None:
            return gradient is None and self.value is None and self.param.grad is None
        bound = self.bound + SUM_TINY
        if self.param.dtype is FP64:  # is read in FP32
            bound = bound + 2.0**-24 * self.value.abs()
        return bool(((gradient.double() - self.value).abs() <= bound).all()) and self.is_rounded_to_grad()

    def is_rounded_to_grad(self) -> bool:
        """Return whether ``.grad`` is what must come out."""
        grad = self.param.grad
        if grad is None or self.value is None or grad.dtype is not self.param.dtype or grad.shape != self.param.shape:
            return False
        bound = self.bound + GRAD_ERROR[grad.dtype] * (self.value.abs() + self.bound) + GRAD_TINY[grad.dtype] + SUM_TINY
        return bool(((grad.double() - self.value).abs() <= bound).all())


class Noise:
    """The squares that the noise scale of a window is made of, in FP64."""

    def __init__(self) -> None:
        self.is_known = True
        self.squares: list[float] = []
        self.sums: dict[nn.Parameter, Tensor] = {}

    def add(self, entries: list[Expected], scale: float) -> None:
        """Add what arrived in a backward pass."""
        arrived = [entry for entry in entries if entry.arrived]
        # Parts of a gradient that come one by one have no square that a fold could take.
        self.is_known &= all(len(entry.arrived) == 1 for entry in arrived)
        if arrived and self.is_known:
            self.squares.append(sum(float((entry.arrived[0] * scale).square().sum()) for entry in arrived))
            for entry in arrived:
                self.sums[entry.param] = self.sums.get(entry.param, 0) + entry.arrived[0] * scale


EDITS: dict[str, Callable[[nn.Parameter], Any]] = {
    "mul_": lambda p: p.grad.mul_(0.7),
    "fill_": lambda p: p.grad.fill_(1.25),
    "zero_": lambda p: p.grad.zero_(),
    "a new tensor": lambda p: setattr(p, "grad", p.grad * 2),
    "a view of a flat buffer": lambda p: setattr(p, "grad", torch.cat([p.grad.flatten()] * 2)[: p.numel()].view_as(p)),
    "None": lambda p: setattr(p, "grad", None),
}


def zero(style: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    if style == "optimizer, None":
        optimizer.zero_grad()
    elif style == "optimizer, zeros":
        optimizer.zero_grad(set_to_none=False)
    elif style == "model":
        model.zero_grad()
    elif style == "model, zeros":
        model.zero_grad(set_to_none=False)
    else:
        for i, param in enumerate(model.parameters()):
            if param.grad is not None:
                param.grad = None if i % 2 else torch.zeros_like(param.grad)


zero_styles = st.sampled_from(["optimizer, None", "optimizer, zeros", "model", "model, zeros", "by hand"])
seeds = st.integers(0, 2**16)
counted = {"windows": 0, "folds": 0, "noise scales": 0}


class Loop(stateful.RuleBasedStateMachine):  # type: ignore[name-defined,misc]
    """A training loop; hypothesis chooses what it does next, and after each rule everything is compared."""

    @stateful.initialize(
        width=st.sampled_from([1, 3, 8]),
        layers=st.lists(st.sampled_from(LAYERS), min_size=1, max_size=5),
        setup=st.sampled_from(
            [
                ("split24", [BF16]),
                ("split24", [BF16, FP32]),
                ("split32", [BF16]),
                ("split32", [BF16, FP64]),
                ("fp32", [BF16]),
                ("fp32", [FP16, BF16]),
                ("split24", [FP32]),
            ]
        ),
        average_over=st.sampled_from([None, None, 4, 3]),
        stats=st.booleans(),
        waits=st.booleans(),
        seed=seeds,
    )
    def build(
        self,
        width: int,
        layers: list[str],
        setup: Any,
        average_over: int | None,
        stats: bool,
        waits: bool,
        seed: int,
    ) -> None:
        torch.manual_seed(seed)
        waiting_gradients.WAITING_DEVICE_TYPES = frozenset({"cpu", "cuda"} if waits else {"cuda"})
        self.buffer, dtypes = setup
        self.model = Network(width, layers, dtypes)
        self.params = list(self.model.parameters())
        self.expected = [Expected(param, self.buffer) for param in self.params]
        self.late = self.params.pop() if len(self.params) > 1 and seed % 2 else None  # for add_param_group
        self.optimizer = torch.optim.SGD(self.params, lr=0.02, momentum=0.5)
        self.stats = stats
        self.accumulator = accumkern.attach(self.optimizer, self.buffer, average_over=average_over, stats=stats)
        self.unfinished = self.has_failed = False
        self.noise = Noise()

    # ---- rules -------------------------------------------------------------------------------------------------

    @stateful.rule(count=st.integers(1, 6), seed=seeds)
    def micro_batches(self, count: int, seed: int) -> None:
        for k in range(count):
            self.backward(self.loss(seed + k))

    @stateful.rule(
        counts=st.lists(st.integers(1, 8), min_size=1, max_size=6),
        seed=seeds,
        style=zero_styles,
        clip=st.sampled_from([None, 0.1, 1e9]),
    )
    def windows_of(self, counts: list[int], seed: int, style: str, clip: float | None) -> None:
        for count in counts:
            self.micro_batches(count, seed)
            self.check()
            if self.stats:
                self.noise_scale()
            self.step(style, clip)

    @stateful.rule(seed=seeds)
    def backward_twice(self, seed: int) -> None:
        loss = self.loss(seed)
        self.backward(loss, retain_graph=True)
        self.backward(loss)

    @stateful.rule(seed=seeds, place=st.integers(0, 99))
    def backward_for_one_parameter(self, seed: int, place: int) -> None:
        param = self.params[place % len(self.params)]
        if param.requires_grad and not any(kind.endswith(" reentrant") for kind in self.model.kinds):
            self.backward(self.loss(seed), inputs=[param])

    @stateful.rule(seed=seeds)
    def autograd_grad(self, seed: int) -> None:
        params = [param for param in self.params if param.requires_grad]
        if params and not any(kind.endswith(" reentrant") for kind in self.model.kinds):
            torch.autograd.grad(self.loss(seed), params, allow_unused=True)
            self.forget_arrivals()

    @stateful.rule(seed=seeds, place=st.integers(0, 99), how=st.sampled_from(["layer", "hook", "late hook"]))
    def backward_that_fails(self, seed: int, place: int, how: str) -> None:
        param = self.params[place % len(self.params)]
        if how != "layer" and not param.requires_grad:
            return
        self.has_failed = True

        def fail(_: Tensor) -> None:
            raise ArithmeticError

        handle = None
        if how == "layer":
            self.model.fails_before = place % len(self.model.kinds)
        else:
            handle = param.register_hook(fail) if how == "hook" else param.register_post_accumulate_grad_hook(fail)
        try:
            self.loss(seed).backward()
        except (ArithmeticError, RuntimeError):
            pass
        finally:
            self.model.fails_before = None
            if handle is not None:
                handle.remove()
        self.noise.is_known = False
        # Each gradient counts or does not: what arrived before the failure may be in, but never half of it.
        for entry in self.watched():
            gradient = self.accumulator.gradient(entry.param)
            for grad in entry.arrived:
                if entry.is_met_by(gradient):
                    break
                entry.add(grad, self.accumulator.scale)
        self.forget_arrivals()

    @stateful.rule(seed=seeds, place=st.integers(0, 99), style=zero_styles)
    def backward_that_fails_and_zero_grad(self, seed: int, place: int, style: str) -> None:
        self.model.fails_before = place % len(self.model.kinds)
        self.has_failed = True
        try:
            self.loss(seed).backward()
        except (ArithmeticError, RuntimeError):
            pass
        finally:
            self.model.fails_before = None
        self.forget_arrivals()
        self.zero_grad(style)

    @stateful.rule(style=zero_styles)
    def zero_grad(self, style: str) -> None:
        zero(style, self.model, self.optimizer)
        for entry in self.expected:
            entry.take()
            assert entry.value is None or not entry.value.any() or entry.param is self.late
        self.noise = Noise()

    @stateful.rule(place=st.integers(0, 99), how=st.sampled_from(list(EDITS)))
    def edit(self, place: int, how: str) -> None:
        param = self.params[place % len(self.params)]
        if param.grad is not None:
            EDITS[how](param)
            self.of(param).take()
            self.noise.is_known = False

    @stateful.rule(place=st.integers(0, 99), factor=st.sampled_from([0.0, 0.7, -3.0]))
    def edit_that_leaves_no_trace(self, place: int, factor: float) -> None:
        param = self.params[place % len(self.params)]
        if param.grad is not None:
            param.grad.data.mul_(factor)
            self.noise.is_known = False
            self.of(param).take(error=GRAD_ERROR[param.dtype] if param.dtype in (BF16, FP16) else 0.0)
            if param.dtype is FP16:
                self.of(param).bound = self.of(param).bound + GRAD_TINY[FP16]

    @stateful.rule(place=st.integers(0, 99), frozen=st.booleans())
    def freeze(self, place: int, frozen: bool) -> None:
        self.params[place % len(self.params)].requires_grad_(not frozen)

    @stateful.rule(scale=st.sampled_from([1.0, 0.25, 1 / 3, 2.5]), as_tensor=st.booleans())
    def set_scale(self, scale: float, as_tensor: bool) -> None:
        self.accumulator.scale = torch.tensor(scale) if as_tensor else scale

    @stateful.rule(
        divide_by=st.sampled_from([1.0, 7.0, 0.3]), max_norm=st.sampled_from([None, 1e-2, 1e9]), style=zero_styles
    )
    def finish_and_step(self, divide_by: float, max_norm: float | None, style: str) -> None:
        entries = [entry for entry in self.watched() if entry.value is not None]
        if not entries or not self.unfinished:
            return
        finished = self.accumulator.finish(divide_by=torch.tensor(divide_by), max_norm=max_norm)
        self.noise.is_known = False
        values = [entry.value / divide_by for entry in entries if entry.value is not None]
        bounds = [(entry.bound / divide_by).expand_as(value) for entry, value in zip(entries, values, strict=True)]
        norm = float(torch.cat([value.flatten() for value in values]).norm())
        slack = (
            float(torch.cat([bound.flatten() for bound in bounds]).norm()) + 1e-4 * norm + SUM_TINY
        )  # torch sums squares in FP32
        assert abs(float(finished.norm) - norm) <= slack
        clip = 1.0 if max_norm is None else min(1.0, max_norm / (norm + 1e-6))
        error_of_clip = slack / max(norm, SUM_TINY) + 1e-6 if clip < 1 or max_norm == norm else 1e-6
        for entry, value, bound in zip(entries, values, bounds, strict=True):
            entry.value = value * clip
            entry.bound = bound * clip + (error_of_clip + 2.0**-22) * entry.value.abs()
            assert entry.is_rounded_to_grad(), "after finish()"
            entry.take()
        self.unfinished = False
        self.step(style, None)

    @stateful.rule()
    def save_and_load(self) -> None:
        before = [self.accumulator.gradient(param) for param in self.params]
        grads = [None if param.grad is None else param.grad.clone() for param in self.params]
        scale = self.accumulator.scale
        file = io.BytesIO()
        torch.save({"optimizer": self.optimizer.state_dict(), "accumulator": self.accumulator.state_dict()}, file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
        self.accumulator.detach()
        for param in self.params:
            param.grad = None
        groups = [dict(group) for group in self.optimizer.param_groups]
        self.optimizer = torch.optim.SGD(groups, lr=0.02, momentum=0.5)
        self.optimizer.load_state_dict(state["optimizer"])
        self.accumulator = accumkern.attach(self.optimizer, self.buffer, stats=self.stats)
        self.noise.is_known = False
        self.accumulator.load_state_dict(state["accumulator"])
        self.accumulator.scale = scale
        for param, gradient, grad in zip(self.params, before, grads, strict=True):
            assert_same_bits(self.accumulator.gradient(param), gradient)
            assert_same_bits(param.grad, grad)

    @stateful.rule()
    def detach_and_attach(self) -> None:
        scale = self.accumulator.scale
        self.accumulator.detach()
        self.accumulator = accumkern.attach(self.optimizer, self.buffer, stats=self.stats)
        self.noise.is_known = False
        self.accumulator.scale = scale
        for entry in self.watched():
            entry.take()  # the residuals are gone

    @stateful.rule(seed=seeds)
    def roll_back(self, seed: int) -> None:
        """A state is loaded into the accumulator that saved it, after a micro-batch that does not count."""
        file = io.BytesIO()
        torch.save(self.accumulator.state_dict(), file)
        file.seek(0)
        before = [self.accumulator.gradient(param) for param in self.params]
        self.loss(seed).backward()
        self.forget_arrivals()
        with torch.inference_mode(seed % 2 == 0):
            self.accumulator.load_state_dict(torch.load(file, weights_only=True))
        for param, gradient in zip(self.params, before, strict=True):
            assert_same_bits(self.accumulator.gradient(param), gradient)
        self.noise.is_known = False

    @stateful.precondition(lambda self: self.stats)
    @stateful.rule()
    def noise_scale(self) -> None:
        if not self.noise.is_known or len(self.noise.squares) < 2:
            with contextlib.suppress(RuntimeError):
                self.accumulator.noise_scale()
            self.noise.is_known = False
            return
        squares, sums = self.noise.squares, self.noise.sums.values()
        wanted = estimate(squares, sum(float(total.square().sum()) for total in sums), [1.0] * len(squares))
        found = self.accumulator.noise_scale()
        assert found.micro_batches == len(squares)
        slack = 1e-3 * max(squares) + SUM_TINY
        assert abs(found.window.trace - wanted.trace) <= slack
        assert abs(found.window.squared_gradient - wanted.squared_gradient) <= slack
        counted["noise scales"] += 1
        self.noise.is_known = False

    @stateful.precondition(lambda self: not self.has_failed)  # after that torch itself keeps nodes, and their shapes
    @stateful.rule(
        style=zero_styles, place=st.integers(0, 99), shape=st.sampled_from([(257, 256), (3, 5), (1,), (0, 4)])
    )
    def another_shape(self, style: str, place: int, shape: tuple[int, ...]) -> None:
        self.zero_grad(style)
        large = [layer[0] for kind, layer in zip(self.model.kinds, self.model.layers, strict=True) if kind == "large"]
        if large:
            param = large[place % len(large)]
            param.grad = None
            param.data = torch.ones(shape, dtype=param.dtype)
            self.optimizer.state.pop(param, None)
            self.of(param).take()

    @stateful.precondition(lambda self: not self.has_failed)  # after that torch itself keeps nodes, and refuses
    @stateful.rule(style=zero_styles)
    def swap_out_and_back(self, style: str) -> None:
        """As for an evaluation with averaged weights."""
        self.zero_grad(style)
        others = [nn.Parameter(param.detach().clone()) for param in self.params]
        for _ in range(2):
            for param, other in zip(self.params, others, strict=True):
                torch.utils.swap_tensors(param, other)

    @stateful.precondition(lambda self: self.late is None and len(self.params) > 1)
    @stateful.rule(place=st.integers(0, 99))
    def leave_its_group(self, place: int) -> None:
        self.late = self.params.pop(place % len(self.params))
        for group in self.optimizer.param_groups:
            group["params"] = [param for param in group["params"] if param is not self.late]
        self.optimizer.state.pop(self.late, None)
        accumkern.accumulator_of(self.optimizer)
        self.noise.is_known = False

    @stateful.precondition(lambda self: self.late is not None)
    @stateful.rule(how=st.sampled_from(["add_param_group", "append", "the class"]))
    def add_param_group(self, how: str) -> None:
        if self.late.grad is not None:
            self.noise.is_known = False
        if how == "add_param_group":
            self.optimizer.add_param_group({"params": [self.late]})
        else:
            self.late.grad = None
            if how == "append":
                self.optimizer.param_groups[0]["params"].append(self.late)
            else:
                torch.optim.Optimizer.add_param_group(self.optimizer, {"params": [self.late]})
            assert accumkern.accumulator_of(self.optimizer) is self.accumulator
        self.params.append(self.late)
        self.of(self.late).take()
        self.late = None

    @stateful.invariant()
    def check(self) -> None:
        for i, entry in enumerate(self.watched()):
            assert not entry.arrived
            gradient = self.accumulator.gradient(entry.param)
            assert entry.is_met_by(gradient), f"parameter {i}: {gradient} is not {entry.value} +- {entry.bound}"

    # ---- helpers -----------------------------------------------------------------------------------------------

    def of(self, param: nn.Parameter) -> Expected:
        return next(entry for entry in self.expected if entry.param is param)

    def watched(self) -> list[Expected]:
        return [entry for entry in self.expected if entry.param is not self.late]

    def loss(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(2, self.model.width, generator=generator).requires_grad_()
        return self.model(x) * 2.0 ** (seed % 13 - 6)

    def backward(self, loss: Tensor, **options: Any) -> None:
        loss.backward(**options)
        self.noise.add(self.watched(), float(self.accumulator.scale))
        for entry in self.watched():
            for grad in entry.arrived:
                self.unfinished = True
                entry.add(grad, self.accumulator.scale)
                counted["folds"] += 1
        self.forget_arrivals()

    def forget_arrivals(self) -> None:
        for entry in self.expected:
            entry.arrived.clear()

    def step(self, style: str, clip: float | None) -> None:
        if clip is not None and any(param.grad is not None for param in self.params):
            torch.nn.utils.clip_grad_norm_(self.params, clip)
        self.optimizer.step()
        self.zero_grad(style)
        counted["windows"] += 1


def test_any_sequence_of_events_keeps_the_sums(tmp_path: Any) -> None:
    hypothesis.configuration.set_hypothesis_home_dir(tmp_path)
    threads, waiting = torch.get_num_threads(), waiting_gradients.WAITING_DEVICE_TYPES
    torch.set_num_threads(1)
    try:
        stateful.run_state_machine_as_test(
            Loop,
            settings=hypothesis.settings(
                max_examples=900,
                stateful_step_count=30,
                derandomize=True,
                database=None,
                deadline=None,
                phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
                suppress_health_check=list(hypothesis.HealthCheck),
            ),
        )
    finally:
        torch.set_num_threads(threads)
        waiting_gradients.WAITING_DEVICE_TYPES = waiting
    assert counted["windows"] >= 3000
    assert counted["folds"] >= 50_000
    assert counted["noise scales"] >= 300
