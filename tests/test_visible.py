"""What others see of ``.grad`` in the middle of a backward pass, and what their changes to it do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gradients import BF16, Fails, assert_equal, assert_fp32_sum, micro_gradients, parameter, record, sgd
from torch import Tensor
from torch.nn import Parameter
from torch.utils.checkpoint import checkpoint

import accumkern
from accumkern import backends

pytestmark = pytest.mark.usefixtures("one_thread", "waiting")


def arrive_in_order(first: Callable[[], Tensor], second: Callable[[], Tensor]) -> Tensor:
    """Return a loss of two parts: what was computed last sends its gradients first."""
    total = second() * 1
    return total + first()


def halve(param: Parameter) -> None:
    if param.grad is not None:
        param.grad.mul_(0.5)


def halve_in_another_tensor(param: Parameter) -> None:
    if param.grad is not None:
        param.grad = param.grad * 0.5


@pytest.mark.parametrize("edit", [halve, halve_in_another_tensor])
@pytest.mark.parametrize("micro_batches_before", [0, 1, 3])
def test_another_parameters_hook_edits_what_has_arrived(
    edit: Callable[[Parameter], None], micro_batches_before: int, average_over: int | None
) -> None:
    first, second = parameter(4), parameter(4)
    acc = accumkern.attach(sgd(first, second), "split32", average_over=average_over)
    for _ in range(micro_batches_before):
        arrive_in_order(lambda: first.float().sum() * 8, lambda: second.float().sum()).backward()
    before = 8.0 * micro_batches_before
    seen: list[Tensor] = []

    def hook(_: Tensor) -> None:
        assert first.grad is not None
        seen.append(first.grad.clone())
        edit(first)

    second.register_post_accumulate_grad_hook(hook)
    arrive_in_order(lambda: first.float().sum() * 8, lambda: second.float().sum()).backward()
    expected = torch.full((4,), (before + 8) / (average_over or 1))
    assert_equal(seen[0].float(), expected)
    assert_equal(acc.gradient(first), expected / 2)


@pytest.mark.parametrize("numel", [10, 70_000])
@pytest.mark.parametrize("drop", [True, False], ids=["takes .grad away", "reads .grad"])
def test_a_hook_on_the_node_sees_the_sum(numel: int, drop: bool, average_over: int | None) -> None:
    """As those of Horovod, and of libraries that move each gradient into a buffer of their own."""
    param = parameter(numel)
    optimizer = sgd(param)
    accumkern.attach(optimizer, "split32", average_over=average_over)
    main_grad = torch.zeros(numel)
    node = param.expand_as(param).grad_fn.next_functions[0][0]  # type: ignore[union-attr]

    def hook(*_: Any) -> None:
        assert param.grad is not None
        if drop:
            main_grad.add_(param.grad)
            param.grad = None
        else:
            main_grad.copy_(param.grad)

    node.register_hook(hook)
    for _ in range(4):
        (param.float() * 3).sum().backward()
    assert_equal(main_grad, torch.full((numel,), 12 / (average_over or 1)))


def test_a_callback_that_is_queued_after_the_gradient_came_sees_it(average_over: int | None) -> None:
    first, second = parameter(4), parameter(4)
    optimizer = sgd(first, second)
    accumkern.attach(optimizer, "split32", average_over=average_over)
    seen: list[Any] = []
    second.register_hook(
        lambda _: torch.autograd.Variable._execution_engine.queue_callback(
            lambda: seen.append(None if first.grad is None else first.grad.clone())
        )
    )
    for _ in range(2):
        arrive_in_order(lambda: first.float().sum() * 8, lambda: second.float().sum()).backward()
    assert_equal(seen[0], torch.full((4,), 8 / (average_over or 1), dtype=BF16))
    assert_equal(seen[1], torch.full((4,), 16 / (average_over or 1), dtype=BF16))


def test_hooks_of_the_parameter_see_the_running_sum(average_over: int | None) -> None:
    """Those that see its gradient come, whether they were there before attach() or not."""
    param, seen = parameter(4), []

    def look(_: Tensor) -> None:
        seen.append(None if param.grad is None else param.grad.clone())

    param.register_hook(look)
    optimizer = sgd(param)
    accumkern.attach(optimizer, "split32", average_over=average_over)
    param.register_hook(look)
    for _ in range(3):
        (param.float() * 4).sum().backward()
    sums = [None, None, 4.0, 4.0, 8.0, 8.0]
    for found, expected in zip(seen, sums, strict=True):
        assert_equal(found, None if expected is None else torch.full((4,), expected / (average_over or 1), dtype=BF16))


def test_an_edit_before_a_pass_inside_the_pass_loses_nothing(average_over: int | None) -> None:
    def edit(param: Parameter) -> None:
        if param.grad is not None:
            param.grad.mul_(1.0)

    first, second = parameter(4), parameter(4)
    acc = accumkern.attach(sgd(first, second), "split32", average_over=average_over)
    for _ in range(2):
        x = torch.ones(4, requires_grad=True)
        inner = checkpoint(lambda t: t * second.float(), x * 1, use_reentrant=True)
        inner.register_hook(lambda _: edit(first))
        (first.float().sum() + (inner * 1).sum()).backward()
    for param in (first, second):
        assert_equal(acc.gradient(param), torch.full((4,), 2 / (average_over or 1)))


def test_parameters_in_a_pass_and_in_the_one_inside_it(
    average_over: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their gradients of the inner pass may wait still when those of the outer one come."""
    params = [parameter(4) for _ in range(3)]
    acc = accumkern.attach(sgd(*params), "split32", average_over=average_over)
    arrived = [record(param) for param in params]
    many = acc._fold.many

    def fold(slots: list[Any], *others: Any) -> None:
        assert len(slots) == len(set(slots))  # the tensors of a launch are written at the same time
        many(slots, *others)

    def sum_of(*some: Parameter) -> Tensor:  # the last one's gradient comes first
        total = torch.zeros(())
        for n, param in enumerate(some):
            total = total + param.float().sum() * (1 + n)
        return total

    monkeypatch.setattr(acc._fold, "many", fold)
    for n in range(4):
        x = torch.full((4,), 1 + n / 64, requires_grad=True)
        inner = checkpoint(lambda t: t * sum_of(*params), x * 1, use_reentrant=True)
        (inner.sum() + sum_of(*params[:2])).backward()
    for param, grads in zip(params, arrived, strict=True):
        assert len(grads) == (4 if param is params[2] else 8)
        assert_fp32_sum(acc, param, grads, 1 / (average_over or 1))


def test_detach_between_the_two_hooks_of_a_parameter_keeps_its_sum() -> None:
    param = parameter(4)
    acc = accumkern.attach(sgd(param), "split32")
    for _ in range(2):
        (param.float() * 4).sum().backward()
    node = param.expand_as(param).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
    node.register_prehook(lambda _: acc.detach())  # type: ignore[union-attr]
    (param.float() * 4).sum().backward()
    assert_equal(param.grad, torch.full((4,), 12.0, dtype=BF16))


class RaisingKernels:
    """Kernels of which folds fail after some calls, without having written."""

    def __init__(self, kernels: backends.Kernels) -> None:
        self.successes = 1_000
        self.kernels = kernels._replace(
            fold=self.counted(kernels.fold),
            fold_into=lambda *place: self.counted(kernels.fold_into(*place)),
            fold_alike=self.counted(kernels.fold_alike),
        )

    def counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def fold(*arguments: Any) -> Any:
            self.successes -= 1
            if self.successes < 0:
                raise ArithmeticError
            return call(*arguments)

        return fold


@pytest.mark.parametrize("successes", [0, 1, 2])
def test_a_launch_that_fails_leaves_the_sums_as_they_were(
    successes: int, monkeypatch: pytest.MonkeyPatch, average_over: int | None
) -> None:
    monkeypatch.setattr(accumkern.waiting, "MAX_WAITING_NUMEL", 60_000)
    params = [parameter(4), parameter(5, dtype=torch.float32), parameter(70_000)]
    acc = accumkern.attach(sgd(*params), "split32", average_over=average_over)
    grads = [micro_gradients(3, *p.shape, dtype=p.dtype) for p in params]
    raising = RaisingKernels(acc._fold.kernels_on(torch.device("cpu")))
    monkeypatch.setattr(acc._fold, "kernels_on", lambda device: raising.kernels)

    def micro_batch(n: int) -> None:
        sum((p.float() * g[n]).sum() for p, g in zip(params, grads, strict=True)).backward()

    micro_batch(0)
    micro_batch(1)
    before = [acc.gradient(p) for p in params]
    raising.successes = successes
    with pytest.raises(ArithmeticError):
        micro_batch(2)
    raising.successes = 1_000
    unchanged = [torch.equal(acc.gradient(p), b) for p, b in zip(params, before, strict=True)]  # type: ignore[arg-type]
    assert sum(unchanged) >= len(params) - successes
    for param, of_param, is_unchanged in zip(params, grads, unchanged, strict=True):
        assert_fp32_sum(acc, param, of_param[: 2 if is_unchanged else 3], 1 / (average_over or 1))


def test_an_error_before_the_fold_leaves_the_running_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    param = parameter(4)
    acc = accumkern.attach(sgd(param), "split32", report=True)
    (param.float() * 8).sum().backward()
    (param.float() * 8).sum().backward()

    def fail(*_: Any) -> None:
        raise ArithmeticError

    monkeypatch.setattr(acc._rooms.lost_bits, "add", fail)
    with pytest.raises(ArithmeticError):
        (param.float() * 8).sum().backward()
    assert_equal(acc.gradient(param), torch.full((4,), 16.0))


def test_what_waits_in_a_pass_that_failed_is_not_taken_for_an_edit(average_over: int | None) -> None:
    """A pass inside another one begins after a failed pass: what zero_grad() left stays zero."""
    param, other = parameter(4), parameter(4)
    optimizer = sgd(param, other)
    acc = accumkern.attach(optimizer, "split32", average_over=average_over)
    param.register_hook(lambda _: None)
    (param.float() * 8).sum().backward()
    with pytest.raises(ArithmeticError):
        arrive_in_order(lambda: (param.float() * 8).sum(), lambda: Fails()(other.float()).sum()).backward()
    optimizer.zero_grad(set_to_none=False)
    x = torch.ones(4, requires_grad=True)
    checkpoint(lambda t: t * param.float(), x * 1, use_reentrant=True).sum().backward()
    assert_equal(acc.gradient(param), torch.full((4,), 1 / (average_over or 1)))


# ---- hooks that do more than look ------------------------------------------------------------------------------------


def test_a_backward_pass_inside_a_hook_of_the_parameter(average_over: int | None) -> None:
    """The hook was registered after attach(), so that the sum is set aside behind it, in both passes."""
    param = parameter(4)
    acc = accumkern.attach(sgd(param), "split32", average_over=average_over)
    arrived = record(param)
    busy: list[int] = []

    def hook(_: Tensor) -> None:
        if not busy:
            busy.append(1)
            with torch.enable_grad():
                (param.float() * (4 + 1 / 64)).sum().backward()

    for value in (8.0, 16.0):
        (param.float() * value).sum().backward()
    param.register_hook(hook)
    for value in (1 + 1 / 64, 32.0):
        (param.float() * value).sum().backward()
    assert len(arrived) == 5
    assert_fp32_sum(acc, param, arrived, 1 / (average_over or 1))


def detach(acc: accumkern.GradAccumulator, optimizer: torch.optim.Optimizer) -> None:
    acc.detach()


def leave(acc: accumkern.GradAccumulator, optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[0]["params"] = []
    accumkern.accumulator_of(optimizer)


@pytest.mark.parametrize("let_go", [detach, leave])
@pytest.mark.parametrize("where", ["hook", "node pre-hook"])
def test_a_parameter_that_is_let_go_in_a_hook_keeps_its_sum(
    let_go: Callable[[accumkern.GradAccumulator, torch.optim.Optimizer], None], where: str
) -> None:
    param = parameter(4)
    optimizer = sgd(param)
    acc = accumkern.attach(optimizer, "split32")
    (param.float() * 8).sum().backward()
    node: Any = param.expand_as(param).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
    register = param.register_hook if where == "hook" else node.register_prehook
    register(lambda _: let_go(acc, optimizer))
    (param.float() * 16).sum().backward()
    assert_equal(param.grad, torch.full((4,), 24.0, dtype=BF16))


def test_what_was_to_set_aside_in_a_failed_pass_does_nothing_later() -> None:
    param = parameter(4)
    optimizer = sgd(param)
    acc = accumkern.attach(optimizer, "split32")
    (param.float() * 8).sum().backward()
    graph = param.float().sum()  # keeps the node, and its hooks
    handle = param.register_hook(lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        (param.float() * 4).sum().backward()
    handle.remove()
    (param.float() * 1).sum().backward()
    assert_equal(acc.gradient(param), torch.full((4,), 9.0))
    acc.detach()
    graph.backward()
    assert_equal(param.grad, torch.full((4,), 10.0, dtype=BF16))


def test_autograd_grad_inside_a_node_pre_hook_loses_nothing() -> None:
    param = parameter(4)
    acc = accumkern.attach(sgd(param), "split32")
    (param.float() * 8).sum().backward()
    node: Any = param.expand_as(param).grad_fn.next_functions[0][0]  # type: ignore[union-attr]

    def look(_: Any) -> None:
        with torch.enable_grad():
            torch.autograd.grad((param * param).sum(), [param])

    node.register_prehook(look)
    (param.float() * 16).sum().backward()
    assert_equal(acc.gradient(param), torch.full((4,), 24.0))


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_post_accumulate_hooks_that_were_cleared_lose_no_sum(dtype: torch.dtype) -> None:
    param = parameter(4, dtype=dtype)
    optimizer = sgd(param)
    acc = accumkern.attach(optimizer)
    (param * 8).sum().backward()
    param._post_accumulate_grad_hooks.clear()  # type: ignore[attr-defined]
    (param * 16).sum().backward()
    assert_equal(param.grad, torch.full((4,), 24.0, dtype=dtype))
    if dtype is BF16:
        with pytest.raises(RuntimeError, match="had no hooks, and torch has accumulated"):
            optimizer.step()
        optimizer.zero_grad()
    (param * 1).sum().backward()
    acc.finish()


def test_a_hook_that_clears_the_others_and_one_that_was_moved_to_the_end() -> None:
    param = parameter(4)
    seen: list[float] = []
    param.register_hook(lambda _: param._backward_hooks.clear())  # type: ignore[union-attr]
    optimizer = sgd(param)
    accumkern.attach(optimizer, "split32")
    for value in (8.0, 16.0):
        (param.float() * value).sum().backward()
    assert_equal(param.grad, torch.full((4,), 24.0, dtype=BF16))
    other = parameter(4)
    optimizer = sgd(other)
    accumkern.attach(optimizer, "split32")
    (other.float() * 8).sum().backward()
    other.register_hook(lambda _: seen.append(other.grad[0].item()))  # type: ignore[index]
    other._backward_hooks.move_to_end(next(iter(other._backward_hooks)))  # type: ignore[union-attr,arg-type]
    (other.float() * 16).sum().backward()
    assert seen == [8.0]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_node_that_is_hooked_between_two_windows(set_to_none: bool) -> None:
    param = parameter(4)
    optimizer = sgd(param)
    accumkern.attach(optimizer, "split32")
    seen: list[float] = []
    (param.float() * 8).sum().backward()
    (param.float() * 8).sum().backward()
    node: Any = param.expand_as(param).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
    node.register_hook(lambda *_: seen.append(param.grad[0].item()))  # type: ignore[index]
    optimizer.zero_grad(set_to_none=set_to_none)
    (param.float() * 16).sum().backward()
    (param.float() * 4).sum().backward()
    assert seen == [16.0, 20.0]
