"""What a window and a micro-batch are to the noise scale: backward passes, from one step or zero_grad() to the next."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gradients import Fails
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import accumkern
from accumkern.noise_scale import Estimate, estimate

pytestmark = pytest.mark.usefixtures("one_thread", "waiting")

Loss = Callable[[int], Tensor]


class Truth:
    """The squares of whole micro-gradients and of their sum, in FP64, from torch.autograd.grad."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        self.params = params
        self.begin()

    def begin(self) -> None:
        self.squares: list[float] = []
        self.sums = [torch.zeros(p.shape, dtype=torch.float64) for p in self.params]

    def add(self, loss: Tensor) -> None:
        grads = torch.autograd.grad(loss, self.params, retain_graph=True, allow_unused=True)
        dense = [None if g is None else g.to_dense().double() for g in grads]
        self.squares.append(sum(float(g.square().sum()) for g in dense if g is not None))
        self.sums = [total if g is None else total + g for total, g in zip(self.sums, dense, strict=True)]

    def estimate(self, tokens: list[float] | None = None) -> Estimate:
        return estimate(
            self.squares, float(sum(x.square().sum() for x in self.sums)), tokens or [1.0] * len(self.squares)
        )


def assert_close(found: accumkern.NoiseScale, truth: Truth, tokens: list[float] | None = None) -> None:
    wanted = truth.estimate(tokens)
    assert found.micro_batches == len(truth.squares)
    assert found.window.trace == pytest.approx(wanted.trace, rel=1e-4)
    assert found.window.squared_gradient == pytest.approx(wanted.squared_gradient, rel=1e-3)


def inputs(n: int, rows: int = 8, width: int = 8) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(n))


def linears(count: int, width: int = 8) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(width, width) for _ in range(count))


@pytest.mark.parametrize("trunk", [True, False], ids=["with a trunk", "experts alone"])
@pytest.mark.parametrize("order", [lambda n: (n * 7 + n // 3) % 4, lambda n: n % 4, lambda n: int(n > 5)])
def test_a_mixture_of_experts(trunk: bool, order: Callable[[int], int]) -> None:
    """An expert has a gradient in some of the micro-batches, and zero in the others."""
    experts, first = linears(4), nn.Linear(8, 8)
    params = [*experts.parameters(), *(first.parameters() if trunk else [])]
    optimizer = torch.optim.SGD(params, lr=0.0)
    acc = accumkern.attach(optimizer, stats=True)
    truth = Truth(params)
    tokens = [float(1 + 31 * (n % 3 == 0)) for n in range(12)]
    for _ in range(2):
        truth.begin()
        for n in range(12):
            x = inputs(n, int(tokens[n]))
            loss = (experts[order(n)](first(x) if trunk else x) - 1).square().sum()
            truth.add(loss)
            loss.backward()
        assert_close(acc.noise_scale(tokens), truth, tokens)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("first_only", [True, False], ids=["in the first micro-batch", "in all micro-batches"])
def test_heads_by_turns(set_to_none: bool, every: int, first_only: bool) -> None:
    """A window trains one of several heads, and not every window is asked about."""
    trunk, heads = nn.Linear(8, 8), linears(3)
    params = [*trunk.parameters(), *heads.parameters()]
    optimizer = torch.optim.SGD(params, lr=0.0)
    acc = accumkern.attach(optimizer, stats=True)
    truth = Truth(params)
    for window in range(7):
        truth.begin()
        for n in range(4):
            y = torch.tanh(trunk(inputs(10 * window + n)))
            loss = y.square().mean()
            if n == 0 or not first_only:
                loss = loss + heads[window % 3](y).square().mean() * 5
            truth.add(loss)
            loss.backward()
        if window % every == every - 1:
            assert_close(acc.noise_scale(), truth)
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)


@pytest.mark.parametrize("ends", ["step", "zero_grad", "both"])
def test_windows_that_nobody_asks_about_cost_nothing_later(ends: str) -> None:
    """Gradients are zeroed in place. The record of squares does not grow."""
    layer = nn.Linear(8, 8)
    params = list(layer.parameters())
    optimizer = torch.optim.SGD(params, lr=0.0)
    acc = accumkern.attach(optimizer, stats=True)
    truth = Truth(params)
    for window in range(20):
        truth.begin()
        for n in range(4):
            loss = layer(inputs(10 * window + n)).square().sum()
            truth.add(loss)
            loss.backward()
        if window == 19:
            assert_close(acc.noise_scale(), truth)
        if ends in ("step", "both"):
            optimizer.step()
        if ends in ("zero_grad", "both"):
            optimizer.zero_grad(set_to_none=False)
        else:
            layer.zero_grad()
        assert len(acc._rooms.noise_scale.squares._squares) <= 4


def test_the_last_backward_pass_of_a_window_may_be_in_the_steps_closure() -> None:
    layer = nn.Linear(8, 8)
    params = list(layer.parameters())
    optimizer = torch.optim.SGD(params, lr=0.0)
    acc = accumkern.attach(optimizer, stats=True)
    truth = Truth(params)
    for window in range(3):
        truth.begin()

        def closure(n: int) -> Tensor:
            loss = layer(inputs(n)).square().sum()
            truth.add(loss)
            loss.backward()
            return loss

        for n in range(3):
            closure(10 * window + n)
        optimizer.step(lambda: closure(10 * window + 3))  # noqa: B023
        assert_close(acc.noise_scale(), truth)
        optimizer.zero_grad()


class Kinds(nn.Module):
    """Parameters whose gradients torch adds by itself, and one whose gradient is folded."""

    def __init__(self) -> None:
        super().__init__()
        self.sparse = nn.Embedding(10, 4, sparse=True)
        self.wide = nn.Parameter(torch.ones(4, dtype=torch.float64))
        self.turning = nn.Parameter(torch.ones(4, dtype=torch.complex64))
        self.plain = nn.Parameter(torch.ones(4))

    def forward(self, n: int) -> Tensor:
        rows = self.sparse(torch.tensor([n % 10, (n * 3 + 1) % 10])).sum(0)
        x = rows * self.plain + self.wide.float() * inputs(n)[0, :4]
        return (x * (self.turning * (1 + n)).abs()).square().sum()


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("unused", [[], ["plain"], ["sparse"]], ids=str)
def test_gradients_that_torch_adds_count_too(scale: float, unused: list[str]) -> None:
    model = Kinds()
    for name in unused:
        getattr(model, name).requires_grad_(False)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(params, lr=0.0)
    acc = accumkern.attach(optimizer, stats=True)
    acc.scale = scale
    for _ in range(2):
        squares, sums = [], [torch.zeros(p.shape, dtype=torch.complex128) for p in params]
        for n in range(5):
            loss = model(n)
            grads = [
                g.to_dense().to(torch.complex128) * scale for g in torch.autograd.grad(loss, params, retain_graph=True)
            ]
            squares.append(sum(float(g.abs().square().sum()) for g in grads))
            sums = [total + g for total, g in zip(sums, grads, strict=True)]
            loss.backward()
        wanted = estimate(squares, float(sum(x.abs().square().sum() for x in sums)), [1.0] * 5)
        found = acc.noise_scale().window
        assert found.trace == pytest.approx(wanted.trace, rel=1e-4)
        assert found.squared_gradient == pytest.approx(wanted.squared_gradient, rel=1e-3)
        optimizer.zero_grad()


@pytest.mark.parametrize("frozen", [True, False], ids=["all else frozen", "trainable around"])
def test_passes_inside_a_pass_belong_to_its_micro_batch(frozen: bool) -> None:
    """Reentrant checkpoints, each a pass inside; the one around brings no gradient where all else is frozen."""
    first, blocks, last = nn.Linear(8, 8), linears(3), nn.Linear(8, 8)
    params = [*blocks.parameters()]
    if frozen:
        first.requires_grad_(False)
        last.requires_grad_(False)
    else:
        params += [*first.parameters(), *last.parameters()]
    optimizer = torch.optim.SGD(params, lr=0.0)
    acc = accumkern.attach(optimizer, stats=True)
    truth = Truth(params)

    def loss(n: int, reentrant: bool) -> Tensor:
        x = first(inputs(n)).requires_grad_()
        for block in blocks:
            x = checkpoint(block, x, use_reentrant=True) if reentrant else block(x)
        return last(torch.tanh(x)).square().sum()

    for window in range(3):
        truth.begin()
        for n in range(4):
            truth.add(loss(10 * window + n, reentrant=False))
            loss(10 * window + n, reentrant=True).backward()
        assert_close(acc.noise_scale(), truth)
        if window != 1:
            optimizer.step()
        optimizer.zero_grad()


def test_two_gradients_in_one_pass_are_not_taken_for_one() -> None:
    layer, around = nn.Linear(8, 8), nn.Linear(8, 8)
    optimizer = torch.optim.SGD([*layer.parameters(), *around.parameters()], lr=0.0)
    acc = accumkern.attach(optimizer, stats=True)
    for n in range(3):
        x = inputs(n).requires_grad_()
        for _ in range(2):
            x = checkpoint(layer, x, use_reentrant=True)
        around(x).square().sum().backward()
    with pytest.raises(RuntimeError, match=r"unknown: a parameter got more than one gradient.*use_reentrant=False"):
        acc.noise_scale()


def test_each_backward_pass_is_a_micro_batch() -> None:
    """Two losses of one micro-batch are two: tokens for as many as there were batches do not fit."""
    layer = nn.Linear(8, 8)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    acc = accumkern.attach(optimizer, stats=True)
    for n in range(3):
        out = layer(inputs(n))
        out.square().sum().backward(retain_graph=True)
        out.cos().sum().backward()
    with pytest.raises(ValueError, match=r"window's 6 micro-batches.*backward\(\) once"):
        acc.noise_scale([8, 8, 8])
    assert acc.noise_scale().micro_batches == 6


def test_a_step_ends_a_window_also_where_nobody_zeroes() -> None:
    layer = nn.Linear(8, 8)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    acc = accumkern.attach(optimizer, stats=True)
    for _ in range(2):
        for n in range(2):
            layer(inputs(n)).square().sum().backward()
        optimizer.step()
    with pytest.raises(RuntimeError, match=r"unknown: \.grad was changed"):
        acc.noise_scale()
    assert acc._rooms.noise_scale.squares._index == 1


def test_a_pass_that_failed_spoils_its_window_alone() -> None:
    layer = nn.Linear(8, 8)
    params = list(layer.parameters())
    optimizer = torch.optim.SGD(params, lr=0.0)
    acc = accumkern.attach(optimizer, stats=True)
    truth = Truth(params)
    layer(inputs(0)).square().sum().backward()
    with pytest.raises(ArithmeticError):
        (nn.functional.linear(inputs(1), Fails()(layer.weight)) + layer.bias).square().sum().backward()
    layer(inputs(2)).square().sum().backward()
    with pytest.raises(RuntimeError, match="a backward pass of the window has failed"):
        acc.noise_scale()
    optimizer.zero_grad()
    for n in range(3):
        loss = layer(inputs(n)).square().sum()
        truth.add(loss)
        loss.backward()
    assert_close(acc.noise_scale(), truth)


def test_after_loading_a_state_in_the_middle_of_a_window_the_next_one_is_right() -> None:
    layer = nn.Linear(8, 8)
    params = list(layer.parameters())
    optimizer = torch.optim.SGD(params, lr=0.0)
    acc = accumkern.attach(optimizer, stats=True)
    truth = Truth(params)

    def micro_batch(n: int, factor: float = 1.0) -> None:
        loss = layer(inputs(n)).square().sum() * factor
        truth.add(loss)
        loss.backward()

    micro_batch(0)
    micro_batch(1)
    state = copy.deepcopy(acc.state_dict())
    micro_batch(2, 1000.0)
    acc.load_state_dict(state)
    with pytest.raises(RuntimeError, match="the window has no micro-batch"):
        acc.noise_scale()
    micro_batch(3)
    micro_batch(4)
    with pytest.raises(RuntimeError, match=r"unknown: \.grad was changed"):
        acc.noise_scale()
    optimizer.step()
    optimizer.zero_grad()
    truth.begin()
    for n in range(3):
        micro_batch(n)
    assert_close(acc.noise_scale(), truth)


def test_a_state_of_no_gradients_begins_a_window() -> None:
    layer = nn.Linear(8, 8)
    params = list(layer.parameters())
    acc = accumkern.attach(torch.optim.SGD(params, lr=0.0), stats=True)
    empty: dict[str, Any] = copy.deepcopy(acc.state_dict())
    truth = Truth(params)
    for n in range(2):
        layer(inputs(n)).square().sum().backward()
    acc.load_state_dict(empty)
    for n in range(3):
        loss = layer(inputs(n)).square().sum()
        truth.add(loss)
        loss.backward()
    assert_close(acc.noise_scale(), truth)


@pytest.mark.parametrize("experts", [[0, 1], [0, 1, 0], [0, 1, 2], [0, 0, 1]])
def test_where_the_end_of_a_micro_batch_cannot_be_told_it_says_so(experts: list[int]) -> None:
    """Experts inside reentrant checkpoints, and nothing trained around them that would come first."""
    layers, head = linears(3), nn.Linear(8, 8).requires_grad_(False)
    optimizer = torch.optim.SGD(layers.parameters(), lr=0.0)
    acc = accumkern.attach(optimizer, stats=True)
    for n, expert in enumerate(experts):
        x = inputs(n).requires_grad_()
        head(checkpoint(layers[expert], x, use_reentrant=True)).square().sum().backward()
    with pytest.raises(RuntimeError, match=r"noise scale is un(known: its backward passes bring|defined: the window)"):
        acc.noise_scale()


def test_a_window_that_is_not_finite_is_left_out_of_the_average() -> None:
    layer = nn.Linear(8, 8)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    acc = accumkern.attach(optimizer, stats=True)
    for window in range(3):
        for n in range(3):
            loss = layer(inputs(n)).square().sum()
            (loss * (float("inf") if window == 1 and n == 1 else 1.0)).backward()
        found = acc.noise_scale()
        assert math.isfinite(found.window.trace) == (window != 1)
        assert math.isfinite(found.noise_scale)
        assert found.windows == (1, 1, 2)[window]
        optimizer.zero_grad()


def test_groups_are_those_of_the_window() -> None:
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    optimizer = torch.optim.SGD([{"params": first.parameters()}, {"params": second.parameters()}], lr=0.0)
    acc = accumkern.attach(optimizer, stats=True)
    truth = Truth(list(second.parameters()))
    for window in range(2):
        truth.begin()
        for n in range(3):
            loss = second(first(inputs(n))).square().sum()
            truth.add(loss)
            loss.backward()
        assert_close(acc.noise_scale(group=1 - window), truth)
        optimizer.step()
        optimizer.zero_grad()
        if window == 0:
            del optimizer.param_groups[0]
            accumkern.accumulator_of(optimizer)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_a_gradient_with_a_graph_in_the_middle_of_a_window(at: int) -> None:
    layer = nn.Linear(8, 8)
    params = list(layer.parameters())
    optimizer = torch.optim.SGD(params, lr=0.0)
    acc = accumkern.attach(optimizer, stats=True)
    truth = Truth(params)
    for n in range(4):
        loss = layer(inputs(n)).square().sum()
        truth.add(loss)
        loss.backward(create_graph=n == at)
    assert_close(acc.noise_scale(), truth)
    optimizer.zero_grad()
