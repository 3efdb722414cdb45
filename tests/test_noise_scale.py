"""The gradient noise scale: the formula, what the folds measure, and a problem whose answer is known."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import accumkern
from accumkern.noise_scale import Estimate, Smoother, estimate


def exact(micro: list[list[Tensor]], tokens: list[float]) -> Estimate:
    """The estimates from the micro-gradients themselves, in FP64."""
    flat = [torch.cat([g.double().flatten() for g in grads]) for grads in micro]
    squares = [float(g.square().sum()) for g in flat]
    return estimate(squares, float(torch.stack(flat).sum(0).square().sum()), tokens)


def close(found: Estimate, wanted: Estimate, rtol: float = 1e-4) -> bool:
    scale = abs(wanted.trace) + abs(wanted.squared_gradient)
    return math.isclose(found.trace, wanted.trace, rel_tol=rtol, abs_tol=rtol * scale) and math.isclose(
        found.squared_gradient, wanted.squared_gradient, rel_tol=rtol, abs_tol=rtol * scale
    )


def backward(params: list[nn.Parameter], grads: list[Tensor | None]) -> None:
    torch.stack([(p * g).sum().float() for p, g in zip(params, grads, strict=True) if g is not None]).sum().backward()


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(n, dtype=dtype)) for n in (3, 700, 70_000)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("scale", [1.0, 0.25, "tensor"], ids=str)
@pytest.mark.parametrize("count", [2, 3, 8])
def test_measures_what_the_micro_gradients_say(dtype: torch.dtype, scale: Any, count: int) -> None:
    params = parameters(dtype)
    acc = accumkern.attach(torch.optim.SGD(params), "split32", stats=True)
    factor = torch.tensor(0.5) if scale == "tensor" else scale
    acc.scale = factor
    tokens = [float(1 + i % 3) for i in range(count)]
    for window in range(3):
        micro = [[(0.3 + torch.randn(p.shape)).to(dtype) for p in params] for _ in range(count)]
        for grads in micro:
            backward(params, grads)
        found = acc.noise_scale(tokens)
        wanted = exact([[g * float(factor) for g in grads] for grads in micro], tokens)
        assert close(found.window, wanted)
        assert found.micro_batches == count
        assert found.windows == window + 1
        for p in params:
            p.grad = None


def test_default_device_is_not_asked() -> None:
    params = parameters(torch.bfloat16)
    acc = accumkern.attach(torch.optim.SGD(params), stats=True)
    for factor in (1.0, 3.0):
        backward(params, [torch.full_like(p, factor) for p in params])
    with torch.device("meta"):
        found = acc.noise_scale()
    squares = [sum(p.numel() for p in params) * factor**2 for factor in (1.0, 3.0, 4.0)]
    assert close(found.window, estimate(squares[:2], squares[2], [1.0, 1.0]))


def test_zero_filled_gradients_begin_a_window_too() -> None:
    params = parameters(torch.bfloat16)
    optimizer = torch.optim.SGD(params)
    acc = accumkern.attach(optimizer, "split32", stats=True)
    for _ in range(3):
        micro = [[torch.randn(p.shape).bfloat16() for p in params] for _ in range(4)]
        for grads in micro:
            backward(params, grads)
        assert close(acc.noise_scale().window, exact(micro, [1.0] * 4))
        optimizer.zero_grad(set_to_none=False)


def test_parameters_that_are_used_once_or_never() -> None:
    params = [nn.Parameter(torch.zeros(50, dtype=torch.bfloat16)) for _ in range(3)]
    acc = accumkern.attach(torch.optim.SGD(params), "split32", stats=True)
    for _ in range(2):
        micro = []
        for i in range(3):
            grads = [torch.randn(50).bfloat16(), torch.randn(50).bfloat16() if i == 1 else None, None]
            backward(params, grads)
            micro.append([torch.zeros(50) if g is None else g for g in grads])
        assert close(acc.noise_scale().window, exact(micro, [1.0] * 3))
        for p in params:
            p.grad = None


def test_parameter_groups() -> None:
    params = parameters(torch.bfloat16)
    optimizer = torch.optim.SGD([{"params": params[:1]}, {"params": params[1:]}])
    acc = accumkern.attach(optimizer, "split32", stats=True)
    micro = [[torch.randn(p.shape).bfloat16() for p in params] for _ in range(4)]
    for grads in micro:
        backward(params, grads)
    assert close(acc.noise_scale(group=0).window, exact([g[:1] for g in micro], [1.0] * 4))
    assert close(acc.noise_scale(group=1).window, exact([g[1:] for g in micro], [1.0] * 4))
    assert close(acc.noise_scale().window, exact(micro, [1.0] * 4))


def test_checkpointed_segments_count_as_one_micro_batch() -> None:
    from torch.utils.checkpoint import checkpoint

    layers = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(3))
    for reentrant in (False, True):
        acc = accumkern.attach(torch.optim.SGD(layers.parameters()), stats=True)
        micro = []
        for _ in range(3):
            x = torch.randn(4, 8, requires_grad=True)
            inputs = x.detach()

            def run(x: Tensor, wrap: Callable[..., Tensor]) -> Tensor:
                for layer in layers:
                    x = wrap(layer, x)
                return x.square().sum()

            micro.append(list(torch.autograd.grad(run(inputs, lambda f, x: f(x)), list(layers.parameters()))))
            run(x, lambda f, x, r=reentrant: checkpoint(f, x, use_reentrant=r)).backward()
        found = acc.noise_scale()
        assert found.micro_batches == 3
        assert close(found.window, exact(micro, [1.0] * 3))
        acc.detach()
        layers.zero_grad()


def test_mean_over_many_windows_finds_a_known_noise_scale() -> None:
    """Gradients of one token are G + noise with a known trace, so that B_simple is known."""
    numel, sigma, tokens = 400, 2.0, [1.0, 5.0, 2.0, 8.0]
    direction = torch.randn(numel)
    direction *= 1.5 / direction.norm()
    true_trace, true_square = sigma**2 * numel, 1.5**2
    param = nn.Parameter(torch.zeros(numel))
    acc = accumkern.attach(torch.optim.SGD([param]), stats=True)
    found: Any = None
    traces, squares = [], []
    for _ in range(3000):
        for count in tokens:
            noise = torch.randn(numel) * sigma * math.sqrt(count)
            (param * (direction * count + noise)).sum().backward()
        found = acc.noise_scale(tokens, smoothing=0.9995)
        traces.append(found.window.trace)
        squares.append(found.window.squared_gradient)
        param.grad = None
    spread = torch.tensor(squares).std() / math.sqrt(len(squares))
    assert abs(sum(traces) / len(traces) / true_trace - 1) < 0.01
    assert abs(sum(squares) / len(squares) - true_square) < 4 * spread
    assert min(squares) < 0  # single windows are that noisy
    mean_ratio = (sum(traces) / len(traces)) / (sum(squares) / len(squares))
    assert abs(mean_ratio / (true_trace / true_square) - 1) < 4 * spread / true_square + 0.01


def test_agrees_with_per_example_gradients() -> None:
    """tr(Sigma) and |G|^2 of a small network, from every example's own gradient by torch.func."""
    net = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 1)).double()
    x, y = torch.randn(4096, 6).double(), torch.randn(4096, 1).double()
    values = {name: p.detach() for name, p in net.named_parameters()}

    def loss(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return (functional_call(net, values, (x,)) - y).square().sum()

    per_example = vmap(grad(loss), in_dims=(None, 0, 0))(values, x, y)
    rows = torch.cat([g.flatten(1) for g in per_example.values()], 1)
    wanted = Estimate(float(rows.var(0).sum()), float(rows.mean(0).square().sum()))

    net = net.float()
    acc = accumkern.attach(torch.optim.SGD(net.parameters()), stats=True)
    traces, squares = [], []
    order = torch.randperm(4096)
    for window in range(64):  # each example once: the mean is over all of them
        chosen = order[64 * window : 64 * (window + 1)]
        sizes = [5, 20, 9, 30]
        for part in chosen.split(sizes):
            (net(x[part].float()) - y[part].float()).square().sum().backward()
        result = acc.noise_scale([float(n) for n in sizes]).window
        traces.append(result.trace)
        squares.append(result.squared_gradient)
        net.zero_grad()
    spread = torch.tensor(traces).std() / 8
    assert abs(sum(traces) / 64 - wanted.trace) < 4 * spread
    spread = torch.tensor(squares).std() / 8
    assert abs(sum(squares) / 64 - wanted.squared_gradient) < 4 * spread


def test_estimates_are_smoothed_apart_and_divided_after() -> None:
    smoother = Smoother()
    assert smoother.add(Estimate(4.0, 2.0), 0.9) == pytest.approx(Estimate(4.0, 2.0))  # type: ignore[comparison-overlap]
    second = smoother.add(Estimate(8.0, -1.0), 0.9)
    weight = 0.1 * 0.9 + 0.1
    assert second.trace == pytest.approx((0.09 * 4 + 0.1 * 8) / weight)
    assert second.squared_gradient == pytest.approx((0.09 * 2 - 0.1) / weight)
    assert second.noise_scale == pytest.approx(second.trace / second.squared_gradient)


def test_ratios_that_make_no_sense_are_infinite_or_zero() -> None:
    assert Estimate(1.0, -0.5).noise_scale == math.inf
    assert Estimate(1.0, 0.0).noise_scale == math.inf
    assert Estimate(-1.0, 0.5).noise_scale == 0.0
    assert Estimate(3.0, 2.0).noise_scale == 1.5


def test_stats_change_no_gradient() -> None:
    results = []
    for stats in (False, True):
        torch.manual_seed(7)
        params = parameters(torch.bfloat16)
        acc = accumkern.attach(torch.optim.SGD(params), "split32", stats=stats, average_over=3)
        for _ in range(5):
            backward(params, [torch.randn(p.shape).bfloat16() for p in params])
        results.append([acc.gradient(p) for p in params])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ---- bad input ---------------------------------------------------------------------------------------------------


def attached(count: int, **options: Any) -> tuple[accumkern.GradAccumulator, list[nn.Parameter]]:
    params = parameters(torch.bfloat16)
    acc = accumkern.attach(torch.optim.SGD(params), **{"stats": True, **options})
    for _ in range(count):
        backward(params, [torch.randn(p.shape).bfloat16() for p in params])
    return acc, params


@pytest.mark.parametrize(
    ("count", "options", "arguments", "error", "words"),
    [
        (3, {"stats": False}, {}, RuntimeError, r"attach\(..., stats=True\)"),
        (0, {}, {}, RuntimeError, "undefined: the window has no micro-batch"),
        (1, {}, {}, RuntimeError, "undefined: the window has one micro-batch"),
        (3, {}, {"tokens": [1, 2]}, ValueError, "one positive number for each of the window's 3 micro-batches"),
        (3, {}, {"tokens": [1, 0, 2]}, ValueError, "tokens is"),
        (3, {}, {"tokens": [1, math.nan, 2]}, ValueError, "tokens is"),
        (3, {}, {"tokens": 3}, TypeError, "tokens is a int; it must hold one positive number"),
        (3, {}, {"tokens": "abc"}, TypeError, "tokens is a str"),
        (3, {}, {"tokens": [1, "a", 2]}, TypeError, r"tokens\[1\] is a str"),
        (3, {}, {"tokens": torch.ones(3, 1)}, ValueError, r"tokens is a Tensor of shape \(3, 1\)"),
        (3, {}, {"group": 1}, ValueError, "group is 1; it must be None or the index of one of the optimizer's 1 param"),
        (3, {}, {"group": "a"}, TypeError, "group is a str"),
        (3, {}, {"group": 0.5}, TypeError, "group is a float"),
        (3, {}, {"smoothing": "x"}, TypeError, "smoothing is a str"),
        (3, {}, {"smoothing": 1.0}, ValueError, "smoothing is 1.0"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) and value else "",
)
def test_bad_calls_say_so_and_change_nothing(
    count: int, options: dict[str, Any], arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    acc, params = attached(count, **options)
    before = [acc.gradient(p) for p in params]
    with pytest.raises(error, match=words):
        acc.noise_scale(**arguments)
    for p, value in zip(params, before, strict=True):
        after = acc.gradient(p)
        assert (after is None and value is None) or torch.equal(after, value)  # type: ignore[arg-type]


def test_a_window_counts_once_for_each_group() -> None:
    acc, params = attached(2)
    found = acc.noise_scale()
    with pytest.raises(RuntimeError, match=r"noise_scale\(\) was called already in this window"):
        acc.noise_scale()
    assert acc.noise_scale(group=0).window == found.window
    for p in params:
        p.grad = None
    for _ in range(2):
        backward(params, [torch.randn(p.shape).bfloat16() for p in params])
    assert acc.noise_scale().windows == acc.noise_scale(group=0).windows == 2


def test_changed_gradients_in_the_middle_of_a_window_are_noticed() -> None:
    acc, params = attached(2)
    nn.utils.clip_grad_norm_(params, 0.1)
    backward(params, [torch.randn(p.shape).bfloat16() for p in params])
    with pytest.raises(RuntimeError, match=r"\.grad was changed in the middle of the window"):
        acc.noise_scale()
    acc, params = attached(1)
    params[1].grad.mul_(2)  # type: ignore[union-attr]
    backward(params, [torch.randn(p.shape).bfloat16() for p in params])
    with pytest.raises(RuntimeError, match=r"\.grad was changed"):
        acc.noise_scale()


def test_gradients_that_were_there_before_are_noticed() -> None:
    params = parameters(torch.bfloat16)
    acc = accumkern.attach(torch.optim.SGD(params), stats=True)
    params[0].grad = torch.ones_like(params[0])
    for _ in range(3):
        backward(params, [torch.randn(p.shape).bfloat16() for p in params])
    with pytest.raises(RuntimeError, match=r"\.grad was changed"):
        acc.noise_scale()


def test_a_parameter_that_leaves_its_group_before_its_first_gradient() -> None:
    params = [nn.Parameter(torch.zeros(4)) for _ in range(2)]
    optimizer = torch.optim.SGD(params, lr=1.0)
    acc = accumkern.attach(optimizer, stats=True)
    optimizer.param_groups[0]["params"].pop()
    for _ in range(2):
        sum(param.sum() for param in params).backward()
    assert all((param.grad == 2).all() for param in params)
    assert acc.noise_scale(group=0).micro_batches == 2
