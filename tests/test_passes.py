"""Kinds of backward passes: the hook gives FP32 sums in each; what waits for the end of one."""

from __future__ import annotations

import copy
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from gradients import (
    BF16,
    Fails,
    assert_equal,
    assert_fp32_sum,
    assert_same_bits,
    backward_of_all,
    fp32_sum,
    gradient,
    micro_gradients,
    parameter,
    record,
    seeded,
    sgd,
    stored_sum,
)
from torch import Tensor
from torch.nn import Parameter
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

import accumkern
from accumkern.fold import Fold

pytestmark = pytest.mark.usefixtures("one_thread", "waiting")


# ---- one parameter in many places ----------------------------------------------------------------------------------


class Tied(torch.nn.Module):
    """An embedding whose weight is the output projection's too, and is used once more in between."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(11, 6, dtype=BF16)
        self.inner = torch.nn.Linear(6, 6, dtype=BF16)
        self.head = torch.nn.Linear(6, 11, bias=False, dtype=BF16)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for _ in range(3):
            x = torch.tanh(self.inner(x))
        return self.head(x) + F.linear(x, self.embedding.weight * 0.5)


def test_tied_weights_and_a_parameter_used_many_times(average_over: int | None) -> None:
    model = Tied()
    acc = accumkern.attach(sgd(*model.parameters()), "split32", average_over=average_over)
    arrived = {p: record(p) for p in model.parameters()}
    for n in range(6):
        tokens = torch.arange(n, n + 4)
        F.cross_entropy(model(tokens).float(), tokens).backward()
    for param, grads in arrived.items():
        assert len(grads) == 6
        assert_fp32_sum(acc, param, grads, 1 / (average_over or 1))


class Segments(torch.nn.Module):
    """One weight inside two checkpointed segments and outside of them, and one that is only inside."""

    def __init__(self, use_reentrant: bool, between: torch.nn.Module) -> None:
        super().__init__()
        self.shared = torch.nn.Linear(5, 5, dtype=BF16)
        self.inner = torch.nn.Linear(5, 5, dtype=BF16)
        self.large = Parameter(torch.full((257, 256), 1 / 64, dtype=BF16))
        self.use_reentrant = use_reentrant
        self.between = between

    def segment(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(self.shared(x))) + self.large[:4, :5] * self.large.sum().tanh()

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(x)
        for _ in range(2):
            x = self.between(checkpoint(self.segment, x, use_reentrant=self.use_reentrant))
        return self.shared(x)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointed_segments(use_reentrant: bool, average_over: int | None) -> None:
    model = Segments(use_reentrant, torch.nn.Identity())
    optimizer = sgd(*model.parameters())
    acc = accumkern.attach(optimizer, "split32", average_over=average_over)
    arrived = {p: record(p) for p in model.parameters()}
    for window in range(2):
        for n in range(3):
            model(seeded(4, 5, seed=n).requires_grad_()).float().square().sum().backward()
        for param, grads in arrived.items():
            assert_fp32_sum(acc, param, grads, 1 / (average_over or 1))
            grads.clear()
        optimizer.zero_grad(set_to_none=window == 0)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_backward_that_fails_between_checkpointed_segments(use_reentrant: bool, average_over: int | None) -> None:
    model = Segments(use_reentrant, torch.nn.Identity())
    optimizer = sgd(*model.parameters())
    acc = accumkern.attach(optimizer, "split32", average_over=average_over)
    arrived = {p: record(p) for p in model.parameters()}
    for set_to_none in (True, False):
        model.between = torch.nn.Identity()
        model(seeded(4, 5).requires_grad_()).float().square().sum().backward()
        model.between = Fails()
        with pytest.raises(ArithmeticError):
            model(seeded(4, 5).requires_grad_()).float().square().sum().backward()
        optimizer.zero_grad(set_to_none=set_to_none)
        model.between = torch.nn.Identity()
        for grads in arrived.values():
            grads.clear()
        for n in range(3):
            model(seeded(4, 5, seed=n).requires_grad_()).float().square().sum().backward()
        for param, grads in arrived.items():
            assert_fp32_sum(acc, param, grads, 1 / (average_over or 1))


# ---- kinds of backward passes --------------------------------------------------------------------------------------


def test_two_backward_passes_per_micro_batch(average_over: int | None) -> None:
    """The loss twice, with retain_graph, and then another loss on the same graph."""
    model = torch.nn.Sequential(torch.nn.Linear(5, 4, dtype=BF16), torch.nn.Linear(4, 3, dtype=BF16))
    acc = accumkern.attach(sgd(*model.parameters()), "split32", average_over=average_over)
    arrived = {p: record(p) for p in model.parameters()}
    for n in range(4):
        out = model(seeded(2, 5, seed=n)).float()
        loss = out.square().sum()
        loss.backward(retain_graph=True)
        loss.backward(retain_graph=True)
        out.cos().sum().backward()
    for param, grads in arrived.items():
        assert len(grads) == 12
        assert_fp32_sum(acc, param, grads, 1 / (average_over or 1))


def test_backward_for_some_inputs_leaves_the_others_alone(average_over: int | None) -> None:
    a, b, never = parameter(3), parameter(3), parameter(3)
    acc = accumkern.attach(sgd(a, b, never), "split32", average_over=average_over)
    grads = micro_gradients(5, 3)
    for n, grad in enumerate(grads):
        ((a + b + never).float() * grad).sum().backward(inputs=[a, b] if n % 2 else [a])
        assert (b.grad is None) == (n == 0)
        assert never.grad is None
    assert_fp32_sum(acc, a, grads, 1 / (average_over or 1))
    assert_fp32_sum(acc, b, grads[1::2], 1 / (average_over or 1))


def test_autograd_grad_between_micro_batches_leaves_grad_alone(average_over: int | None) -> None:
    params = [parameter(6), parameter(257, 256)]
    acc = accumkern.attach(sgd(*params), "split32", average_over=average_over)
    grads = [micro_gradients(5, *p.shape) for p in params]
    for micro_batch in zip(*grads, strict=True):
        loss = sum((p.float() * g).sum() for p, g in zip(params, micro_batch, strict=True))
        kept = [p.grad for p in params]
        versions = [None if g is None else g._version for g in kept]
        for found, g in zip(torch.autograd.grad(loss, params, retain_graph=True), micro_batch, strict=True):
            assert torch.equal(found, g)
        torch.autograd.grad(loss, params[:1], retain_graph=True)
        assert all(p.grad is g for p, g in zip(params, kept, strict=True))
        assert [None if g is None else g._version for g in kept] == versions
        loss.backward()
    for param, of_param in zip(params, grads, strict=True):
        assert_fp32_sum(acc, param, of_param, 1 / (average_over or 1))


def test_backward_from_several_roots_and_with_a_gradient_argument() -> None:
    a, b = parameter(7), parameter(7)
    acc = accumkern.attach(sgd(a, b), "split32")
    grads = micro_gradients(6, 7)
    for grad in grads:
        torch.autograd.backward([a * 1, b * 1, a * 1], [grad, grad, grad])
    assert_fp32_sum(acc, b, grads)
    assert_fp32_sum(acc, a, [grad * 2 for grad in grads])


def test_backward_straight_from_a_parameter() -> None:
    param = parameter(5)
    acc = accumkern.attach(sgd(param), "split32")
    grads = micro_gradients(6, 5)
    for grad in grads:
        param.backward(grad)
        kept = param.grad
        (found,) = torch.autograd.grad(param, [param], grad)
        assert_equal(found, grad)
        assert param.grad is kept
    assert_fp32_sum(acc, param, grads)
    assert_equal(grads[0], micro_gradients(6, 5)[0])  # the caller's tensor is not written


def test_backward_in_another_thread_and_with_anomaly_detection() -> None:
    params = [parameter(5), parameter(257, 256)]
    acc = accumkern.attach(sgd(*params), "split32")
    grads = [micro_gradients(6, *p.shape) for p in params]

    def micro_batch(n: int) -> None:
        sum((p.float() * of_param[n]).sum() for p, of_param in zip(params, grads, strict=True)).backward()

    for n in range(0, 6, 3):
        micro_batch(n)
        thread = threading.Thread(target=micro_batch, args=(n + 1,))
        thread.start()
        thread.join()
        with torch.autograd.set_detect_anomaly(True):
            micro_batch(n + 2)
    for param, of_param in zip(params, grads, strict=True):
        assert_fp32_sum(acc, param, of_param)


def test_backward_inside_a_backward_pass() -> None:
    """An autograd.Function that runs a whole backward pass of its own, on the same parameters."""
    param, other = parameter(4), parameter(4)
    acc = accumkern.attach(sgd(param, other), "split32")
    arrived, arrived_other = record(param), record(other)

    class Nested(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):  # type: ignore[no-untyped-def]
            return x.clone()

        @staticmethod
        def backward(ctx, grad):  # type: ignore[no-untyped-def]
            with torch.enable_grad():
                ((param + other).float() * 1.25).sum().backward()
            return grad

    for n in range(5):
        ((Nested.apply(param * 1) + param + other).float() * (1 + n / 64)).sum().backward()
    for p, grads in ((param, arrived), (other, arrived_other)):
        assert len(grads) == 10
        assert_fp32_sum(acc, p, grads)


# ---- small and large tensors ---------------------------------------------------------------------------------------


def test_large_tensors_are_folded_at_once_and_others_together(
    launches: list[list[int]], waiting: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accumkern.waiting, "MAX_WAITING_NUMEL", 65600)
    params = [parameter(65570), parameter(65601), parameter(10), parameter(90000), parameter(3, 4)]
    acc = accumkern.attach(sgd(*params), "split32")
    grads = [micro_gradients(4, *p.shape) for p in params]
    for micro_batch in zip(*grads, strict=True):
        launches.clear()
        backward_of_all(params, micro_batch)
    small = [[10, 12, 65570]] if waiting else [[10], [12], [65570]]
    assert sorted(map(sorted, launches)) == [*small, [65601], [90000]]
    for param, of_param in zip(params, grads, strict=True):
        assert_same_bits(acc.gradient(param), fp32_sum(of_param))


def test_gradients_wait_only_until_they_are_many(
    launches: list[list[int]], waiting: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Waiting gradients are memory that stock PyTorch would have freed."""
    monkeypatch.setattr(accumkern.waiting, "MAX_WAITING_NUMEL", 100)
    params = [parameter(30) for _ in range(10)]
    acc = accumkern.attach(sgd(*params), "split32")
    grads = [micro_gradients(4, 30) for _ in params]
    for micro_batch in zip(*grads, strict=True):
        launches.clear()
        backward_of_all(params, micro_batch)
    assert launches == ([[30] * 4, [30] * 4, [30] * 2] if waiting else [[30]] * 10)
    for param, of_param in zip(params, grads, strict=True):
        assert_same_bits(acc.gradient(param), fp32_sum(of_param))


def test_large_tensors_take_part_in_windows_and_averages(backend: str, device: torch.device) -> None:
    params = [parameter(257, 256, device=device), parameter(257, device=device)]
    optimizer = sgd(*params)
    acc = accumkern.attach(optimizer, "split24", average_over=4, backend=backend)
    for length in (3, 1):
        optimizer.zero_grad()
        grads = [micro_gradients(length, *p.shape, device=device) for p in params]
        for micro_batch in zip(*grads, strict=True):
            backward_of_all(params, micro_batch)
        for param, of_param in zip(params, grads, strict=True):
            total, x = stored_sum("split24", of_param, 1 / 4)
            assert_same_bits(param.grad, total)
            assert_same_bits(acc.gradient(param), x)


def test_parameters_of_several_dtypes_in_one_optimizer() -> None:
    params = [parameter(20, dtype=dtype) for dtype in (BF16, torch.float16, torch.float32, BF16)]
    acc = accumkern.attach(sgd(*params), "fp32")
    grads = [micro_gradients(5, 20, dtype=p.dtype) for p in params]
    for micro_batch in zip(*grads, strict=True):
        backward_of_all(params, micro_batch)
    for param, of_param in zip(params, grads, strict=True):
        assert_same_bits(acc.gradient(param), fp32_sum(of_param))


# ---- process groups ------------------------------------------------------------------------------------------------


@pytest.fixture
def process_group() -> Iterator[None]:
    if not torch.distributed.is_available():
        pytest.skip("torch is built without torch.distributed")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_with_a_process_group_every_gradient_is_folded_inside_the_backward_pass(average_over: int | None) -> None:
    """DistributedDataParallel sends .grad on as soon as it is there."""
    param, x, seen = parameter(5), parameter(5), []
    acc = accumkern.attach(sgd(param, x), "split32", average_over=average_over)
    grads = micro_gradients(5, 5)
    for grad in grads:
        y = (x + 1) * 1
        y.register_hook(lambda _: seen.append(None if param.grad is None else param.grad.clone()))
        ((y * param).float() * grad).sum().backward()
        assert_equal(seen[-1], param.grad)
    assert len(seen) == 5
    assert_fp32_sum(acc, param, grads, 1 / (average_over or 1))


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("bucket_view", [True, False], ids=["gradient_as_bucket_view", "buckets apart"])
def test_distributed_data_parallel(bucket_view: bool, average_over: int | None) -> None:
    """no_sync() for all micro-batches but the last of a window, on one process."""
    module = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 300, bias=False)).to(BF16)
    plain = copy.deepcopy(module)
    model = torch.nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=bucket_view)
    optimizers = [sgd(*module.parameters()), sgd(*plain.parameters())]
    accs = [accumkern.attach(optimizer, "split32", average_over=average_over) for optimizer in optimizers]
    for window in range(3):
        for n in range(4):
            x = seeded(3, 6, seed=n)
            plain(x).float().square().sum().backward()
            if n < 3:
                with model.no_sync():
                    model(x).float().square().sum().backward()
                    for a, b in zip(module.parameters(), plain.parameters(), strict=True):
                        assert_equal(accs[0].gradient(a), accs[1].gradient(b))
            else:
                model(x).float().square().sum().backward()
        for a, b in zip(module.parameters(), plain.parameters(), strict=True):
            assert_equal(a.grad, b.grad)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=window != 1)


# ---- threads -------------------------------------------------------------------------------------------------------


def test_backward_passes_in_two_threads_over_parameters_of_their_own() -> None:
    """As the threads that autograd has for several devices, only more at odds: their passes have other numbers."""
    params = [[parameter(40) for _ in range(10)] for _ in range(2)]
    acc = accumkern.attach(sgd(*params[0], *params[1]), "split32")
    grads = micro_gradients(60, 40)
    failures: list[BaseException] = []

    def work(mine: list[Parameter]) -> None:
        try:
            for grad in grads:
                sum((p.float() * grad).sum() for p in mine).backward()
        except BaseException as error:
            failures.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(mine,)) for mine in params]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failures
    for param in (*params[0], *params[1]):
        assert_fp32_sum(acc, param, grads)


def test_a_pass_ends_when_what_another_thread_folds_for_it_is_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    params = [[parameter(4), parameter(4)] for _ in range(2)]
    for _, late in params:
        late.register_hook(lambda _: time.sleep(0.002))
    optimizer = sgd(*params[0], *params[1])
    accumkern.attach(optimizer, "split32", average_over=2)
    many = Fold.many

    def slowly(*arguments: Any) -> None:
        time.sleep(0.004)
        many(*arguments)

    monkeypatch.setattr(Fold, "many", slowly)
    found: list[list[float]] = [[], []]

    def work(number: int) -> None:
        first, late = params[number]
        for _ in range(40):
            total = late.float().sum()  # whose gradient comes last
            (total + first.float().sum()).backward()
            found[number].append(float("nan") if first.grad is None else first.grad[0].item())

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[(1 + n) / 2 for n in range(40)]] * 2


def test_an_error_with_one_gradient_that_waits_leaves_the_others_in(
    monkeypatch: pytest.MonkeyPatch, waiting: bool
) -> None:
    if not waiting:
        pytest.skip("nothing waits")
    params = [parameter(2, 3, 4, 4) for _ in range(3)]
    acc = accumkern.attach(sgd(*params), "split32")
    for _ in range(2):
        sum(param.float().sum() for param in params).backward()  # type: ignore[union-attr]
    grad = params[1].grad
    assert grad is not None
    grad.data = grad.data.to(memory_format=torch.channels_last)

    def fail(*_: Any) -> None:
        raise MemoryError

    loss = sum(param.float().sum() for param in params)
    with monkeypatch.context() as patch:
        patch.setattr(Fold, "one", fail)
        with pytest.raises(MemoryError):
            loss.backward()  # type: ignore[union-attr]
    assert [gradient(acc, param).flatten()[0].item() for param in params] == [3.0, 2.0, 3.0]


@pytest.mark.parametrize("case", ["replaced", "with holes", "moved"])
def test_a_running_gradient_in_another_layout_keeps_its_low_bits(case: str) -> None:
    params = [parameter(2, 3, 4, 4), parameter(3)]
    acc = accumkern.attach(sgd(*params), "split32")

    def backward_of(value: float) -> None:
        ((params[0].float() * torch.full((2, 3, 4, 4), value)).sum() + params[1].float().sum()).backward()

    large = torch.full((2, 3, 4, 8), 256.0, dtype=BF16)
    if case == "replaced":
        params[0].grad = large[..., :4].contiguous(memory_format=torch.channels_last)
    elif case == "with holes":
        params[0].grad = large[..., ::2]
    else:
        backward_of(256.0)
        backward_of(0.0)
        grad = params[0].grad
        assert grad is not None
        params[0].data = params[0].data.to(memory_format=torch.channels_last)
        grad.data = grad.data.to(memory_format=torch.channels_last)
    for _ in range(6):
        backward_of(0.25)
    assert_equal(gradient(acc, params[0]).contiguous(), torch.full((2, 3, 4, 4), 257.5))


# ---- streams -------------------------------------------------------------------------------------------------------


class Stream:
    """A stub of a stream of a GPU, which there may not be."""

    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


@pytest.mark.parametrize(("made_on", "name"), [(0, "default"), (7, "external 7"), (5, None)])
def test_what_waits_is_folded_on_the_stream_that_made_it(
    made_on: int, name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever flushes, in whatever thread, waits for that stream. ExternalStream(0) would not be the default stream."""
    log: list[str] = []

    @contextmanager
    def stream(of: Stream) -> Iterator[None]:
        log.append(f"on {of.name}")
        yield
        log.append(f"off {of.name}")

    monkeypatch.setattr(accumkern.waiting, "current_raw_stream", lambda index: 5)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(log, f"current of {device}"))
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: Stream(log, "default"))
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda handle, device: Stream(log, f"external {handle}"))
    with accumkern.waiting._on_stream(torch.device("cuda", 1), made_on):
        log.append("fold")
    around = [f"on {name}"], [f"off {name}", f"current of cuda:1 waits for {name}"]
    assert log == (["fold"] if name is None else [*around[0], "fold", *around[1]])
