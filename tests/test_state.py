"""Checkpoints in the middle of a window: who continues has the bits of who was never interrupted."""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Callable
from typing import Any

import gradients
import pytest
import torch
from gradients import BF16, assert_same_bits, fail, micro_gradients, parameter
from gradients import backward_of_all as backward
from torch import Tensor
from torch.nn import Parameter

import accumkern
from accumkern.formats import BUFFERS

pytestmark = pytest.mark.usefixtures("one_thread")

sgd = functools.partial(gradients.sgd, momentum=0.5)


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# ---- checkpoints ---------------------------------------------------------------------------------------------------


class Net(torch.nn.Module):
    """Small and large parameters, channels_last, one that is never used, one that is used now and then."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.out = torch.nn.Linear(4, 20)
        self.large = Parameter(torch.ones(257, 256))
        self.unused = Parameter(torch.ones(3))
        self.now_and_then = Parameter(torch.ones(20))
        self.to(dtype)

    def loss(self, n: int) -> Tensor:
        x = torch.cos(torch.arange(54) + float(n)).view(2, 3, 3, 3).to(self.unused.dtype)
        x = self.out(torch.tanh(self.conv(x).flatten(1)))
        if n % 4 == 1:
            x = x * self.now_and_then
        return (x.float().square().mean() + self.large.float().square().mean()) * (1 + n / 8)


class Run:
    """A training run: windows of `WINDOW` micro-batches, a step after each."""

    WINDOW = 6

    def __init__(self, buffer: str, average_over: float | None, dtype: torch.dtype) -> None:
        self.model = Net(dtype)
        self.optimizer = sgd(*self.model.parameters())
        self.acc = accumkern.attach(self.optimizer, buffer, average_over=average_over)
        self.done = 0

    def micro_batches(self, count: int) -> None:
        for _ in range(count):
            self.model.loss(self.done).backward()
            self.done += 1
            if self.done % self.WINDOW == 2:
                torch.nn.utils.clip_grad_norm_(self.model.conv.parameters(), 1e-3)
            if self.done % self.WINDOW == 0:
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=self.done % 12 == 0)

    def save(self) -> dict[str, Any]:
        parts = {"model": self.model, "optimizer": self.optimizer, "accumulator": self.acc}
        return {name: part.state_dict() for name, part in parts.items()}

    def load(self, state: dict[str, Any], done: int) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.acc.load_state_dict(state["accumulator"])
        self.done = done

    def assert_same(self, other: Run) -> None:
        for a, b in zip(self.model.parameters(), other.model.parameters(), strict=True):
            assert_same_bits(a, b)
            assert_same_bits(a.grad, b.grad)
            assert a.grad is None or b.grad is None or a.grad.stride() == b.grad.stride()
            assert_same_bits(self.acc.gradient(a), other.acc.gradient(b))


@pytest.mark.parametrize("average_over", [None, 6, 7], ids=["sum", "over-6", "over-7"])
@pytest.mark.parametrize(
    ("buffer", "dtype"),
    [
        pytest.param(buffer, dtype, id=f"{buffer}-{str(dtype)[6:]}")
        for buffer, formats in BUFFERS.items()
        for dtype in formats
        if dtype is not torch.float32 or buffer == "fp32"
    ],
)
def test_checkpoint_in_the_middle_of_a_window_is_bit_exact(
    buffer: str, dtype: torch.dtype, average_over: float | None
) -> None:
    for done in (0, 1, 2, 3, 6, 8):  # of windows of six, each edited after its second micro-batch
        uninterrupted, resumed = Run(buffer, average_over, dtype), Run(buffer, average_over, dtype)
        uninterrupted.micro_batches(done)
        resumed.load(through_a_file(uninterrupted.save()), done)
        resumed.assert_same(uninterrupted)
        for count in (1, 1, 4):
            uninterrupted.micro_batches(count)
            resumed.micro_batches(count)
            resumed.assert_same(uninterrupted)


def test_state_holds_only_strings_lists_and_tensors() -> None:
    run = Run("split24", None, BF16)
    run.micro_batches(3)
    state = run.acc.state_dict()
    assert set(state) == {"buffer", "sums", "residuals"}
    assert state["buffer"] == "split24"
    for name in ("sums", "residuals"):
        assert list(state[name]) == [str(i) for i, _ in enumerate(run.model.parameters())]
        assert all(
            entry is None or (type(entry) is Tensor and not entry.requires_grad) for entry in state[name].values()
        )


def test_state_has_no_residual_where_grad_was_edited() -> None:
    run = Run("split32", None, BF16)
    run.micro_batches(4)
    weight = run.model.out.weight
    place = [p is weight for p in run.model.parameters()].index(True)
    assert run.acc.state_dict()["residuals"][str(place)] is not None
    assert weight.grad is not None
    weight.grad.mul_(0.7)
    state = through_a_file(run.save())
    assert state["accumulator"]["residuals"][str(place)] is None
    resumed = Run("split32", None, BF16)
    resumed.load(state, run.done)
    resumed.assert_same(run)
    run.micro_batches(2)
    resumed.micro_batches(2)
    resumed.assert_same(run)


def test_loaded_state_is_a_copy() -> None:
    run, other = Run("split24", None, BF16), Run("split24", None, BF16)
    run.micro_batches(3)
    state = run.acc.state_dict()
    other.model.load_state_dict(run.model.state_dict())
    for _ in range(2):
        other.acc.load_state_dict(state)
        other.done = run.done
        other.assert_same(run)
        before = copy.deepcopy(state)
        other.micro_batches(2)
        for name in ("sums", "residuals"):
            for entry, kept in zip(state[name].values(), before[name].values(), strict=True):
                assert_same_bits(entry, kept)


def test_loading_replaces_the_window_that_was_under_way() -> None:
    run = Run("split32", 6, BF16)
    empty = copy.deepcopy(run.acc.state_dict())
    run.micro_batches(3)
    middle = copy.deepcopy(run.acc.state_dict())
    run.micro_batches(2)
    run.acc.load_state_dict(middle)
    run.done = 3
    other = Run("split32", 6, BF16)
    other.micro_batches(3)
    run.assert_same(other)
    run.acc.load_state_dict(empty)
    assert all(p.grad is None for p in run.model.parameters())
    assert all(run.acc.gradient(p) is None for p in run.model.parameters())


def test_loading_drops_what_a_failed_backward_left() -> None:
    params = [parameter(5), parameter(4)]
    acc = accumkern.attach(sgd(*params), "split32")
    grads = [micro_gradients(6, *p.shape) for p in params]
    for micro_batch in list(zip(*grads, strict=True))[:3]:
        backward(params, list(micro_batch))
    state = copy.deepcopy(acc.state_dict())
    fail(params[:1], late=params[1])
    acc.load_state_dict(state)
    for micro_batch in list(zip(*grads, strict=True))[3:]:
        backward(params, list(micro_batch))
    for param, of_param in zip(params, grads, strict=True):
        total = of_param[0].float()
        for grad in of_param[1:]:
            total = total + grad.float()
        assert_same_bits(acc.gradient(param), total)


@pytest.mark.parametrize("grad_dtype", [torch.float32, None], ids=["float32", "any"])
def test_checkpoint_of_gradients_of_another_dtype(grad_dtype: torch.dtype | None) -> None:
    """Parameters whose .grad may be FP32 although they are bfloat16: torch's Tensor.grad_dtype."""
    accs, params = [], []
    for _ in range(2):
        param = parameter(5)
        param.grad_dtype = grad_dtype
        params.append(param)
        accs.append(accumkern.attach(sgd(param)))
    params[0].grad = torch.zeros(5)
    for grad in micro_gradients(4, 5):
        backward(params[:1], [grad])
    accs[1].load_state_dict(through_a_file(accs[0].state_dict()))
    for acc, param in zip(accs, params, strict=True):
        backward([param], [torch.full((5,), 2.0**-7)])
        assert_same_bits(param.grad, params[0].grad)
        assert_same_bits(acc.gradient(param), accs[0].gradient(params[0]))


def test_checkpoint_of_sparse_gradients() -> None:
    runs = []
    for _ in range(2):
        embedding = torch.nn.Embedding(7, 3, sparse=True, dtype=BF16)
        runs.append((embedding, accumkern.attach(torch.optim.SparseAdam(embedding.parameters()))))

    def micro_batch(embedding: torch.nn.Embedding, n: int) -> None:
        embedding(torch.tensor([n, 2])).float().sum().backward()

    for n in range(3):
        micro_batch(runs[0][0], n)
    runs[1][1].load_state_dict(through_a_file(runs[0][1].state_dict()))
    for embedding, _ in runs:
        micro_batch(embedding, 4)
    first, second = (embedding.weight.grad for embedding, _ in runs)
    assert first is not None
    assert second is not None
    assert second.is_sparse
    assert_same_bits(second.to_dense(), first.to_dense())


def test_checkpoint_of_gradients_with_holes_in_their_memory() -> None:
    accs, params = [], []
    for _ in range(2):
        param = parameter(4, 5)
        params.append(param)
        accs.append(accumkern.attach(sgd(param), "split32"))
    params[0].grad = torch.zeros(4, 10, dtype=BF16)[:, ::2]
    grads = micro_gradients(6, 4, 5)
    for grad in grads[:4]:
        backward(params[:1], [grad])
    accs[1].load_state_dict(through_a_file(accs[0].state_dict()))
    for grad in grads[4:]:
        for param in params:
            backward([param], [grad])
    assert_same_bits(params[1].grad, params[0].grad)
    assert_same_bits(accs[1].gradient(params[1]), accs[0].gradient(params[0]))


BAD_STATES: dict[str, tuple[Callable[[dict[str, Any]], object], type[Exception], str]] = {
    "None": (lambda s: None, TypeError, "state_dict is NoneType; it must be what .*state_dict"),
    "list": (lambda s: list(s), TypeError, "state_dict is list; it must be what"),
    "empty": (lambda s: {}, TypeError, r"state_dict is \[\]; it must be what"),
    "key missing": (lambda s: {"buffer": s["buffer"], "sums": s["sums"]}, TypeError, "state_dict is .*buffer.*sums"),
    "an optimizer's": (lambda s: sgd(parameter(1)).state_dict(), TypeError, "state_dict is .*param_groups"),
    "other buffer": (lambda s: s | {"buffer": "fp32"}, ValueError, "buffer='fp32'; this accumulator has 'split24'"),
    "too few": (
        lambda s: s | {"sums": {"0": s["sums"]["0"]}, "residuals": {"0": s["residuals"]["0"]}},
        ValueError,
        "sums of state_dict are of 1 parameters; the optimizer has 2",
    ),
    "too few residuals": (
        lambda s: s | {"residuals": {}},
        ValueError,
        "residuals .* 0 parameters; the optimizer has 2",
    ),
    "other keys": (lambda s: s | {"sums": dict(enumerate(s["sums"].values()))}, ValueError, "sums .* no entry '0'"),
    "sums of another kind": (lambda s: s | {"sums": 5}, TypeError, "sums of state_dict is .*int"),
    "residuals of another kind": (
        lambda s: s | {"residuals": None},
        TypeError,
        "residuals of state_dict is .*NoneType",
    ),
    "sum of another kind": (
        lambda s: s | {"sums": s["sums"] | {"1": "x"}},
        TypeError,
        r"sums\[1\] of state_dict is .*str",
    ),
    "residual of another kind": (
        lambda s: s | {"residuals": s["residuals"] | {"1": 1.5}},
        TypeError,
        r"residuals\[1\] of state_dict is .*float",
    ),
    "sum of another shape": (
        lambda s: s | {"sums": s["sums"] | {"1": s["sums"]["1"].flatten()}},
        ValueError,
        r"sums\[1\] of state_dict has shape \(6,\); parameter 1 has \(2, 3\)",
    ),
    "sum of another dtype": (
        lambda s: s | {"sums": s["sums"] | {"1": s["sums"]["1"].float()}},
        TypeError,
        r"sums\[1\] of state_dict is torch.float32; parameter 1 is torch.bfloat16",
    ),
    "residual of another dtype": (
        lambda s: s | {"residuals": s["residuals"] | {"1": s["residuals"]["1"].short()}},
        TypeError,
        r"residuals\[1\] of state_dict is torch.int16, .*'split24'",
    ),
    "a sparse sum beside a residual": (
        lambda s: s | {"sums": s["sums"] | {"1": s["sums"]["1"].to_sparse()}},
        TypeError,
        r"sums\[1\] of state_dict is of layout torch.sparse_coo beside a residual; it must be a dense tensor",
    ),
    "a nested tensor": (
        lambda s: (
            s
            | {
                "sums": s["sums"]
                | {"1": torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged)}
            }
        ),
        TypeError,
        r"sums\[1\] of state_dict is a nested tensor; it must be a dense tensor",
    ),
    "residual of another shape": (
        lambda s: s | {"residuals": s["residuals"] | {"1": s["residuals"]["1"][1:]}},
        ValueError,
        r"residuals\[1\] of state_dict has shape \(1, 3\); it must be that of the sum, \(2, 3\)",
    ),
    "residual without sum": (
        lambda s: s | {"sums": s["sums"] | {"1": None}},
        ValueError,
        "state_dict holds a residual but no sum for parameter 1",
    ),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_loading_refuses_a_state_that_does_not_fit_and_changes_nothing(case: str) -> None:
    params = [parameter(4), parameter(2, 3)]
    acc = accumkern.attach(sgd(*params))
    for grad in micro_gradients(4, 1):
        backward(params, [grad.expand(4), grad.expand(2, 3)])
    good = copy.deepcopy(acc.state_dict())
    backward(params, [torch.ones(4), torch.ones(2, 3)])
    kept = [(p.grad, p.grad._version, acc.gradient(p)) for p in params if p.grad is not None]
    change, error, message = BAD_STATES[case]
    with pytest.raises(error, match=message):
        acc.load_state_dict(change(good))  # type: ignore[arg-type]
    for param, (grad, version, x) in zip(params, kept, strict=True):
        assert param.grad is grad
        assert grad._version == version
        assert_same_bits(acc.gradient(param), x)


# ---- where a state goes ------------------------------------------------------------------------------------------


def convolution(buffer: str) -> tuple[torch.nn.Module, torch.optim.Optimizer, accumkern.GradAccumulator]:
    torch.manual_seed(0)
    model = torch.nn.Conv2d(4, 8, 3, dtype=BF16).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    return model, optimizer, accumkern.attach(optimizer, buffer)


def micro_batch(model: torch.nn.Module, n: int) -> None:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(n)).to(BF16)
    model(x.contiguous(memory_format=torch.channels_last)).float().square().mean().backward()


@pytest.mark.parametrize("buffer", ["split24", "split32", "fp32"])
@pytest.mark.parametrize("which", ["sums", "residuals", "both"])
def test_a_state_may_be_saved_in_another_order_of_memory(buffer: str, which: str) -> None:
    """As by savers that take contiguous tensors only."""
    model, _, acc = convolution(buffer)
    for n in range(4):
        micro_batch(model, n)
    state = acc.state_dict()
    assert state["residuals"]["0"].stride() == state["sums"]["0"].stride() == (36, 1, 12, 4)
    for key in ("sums", "residuals") if which == "both" else (which,):
        state[key] = {i: tensor.clone(memory_format=torch.contiguous_format) for i, tensor in state[key].items()}
    other, _, loaded = convolution(buffer)
    loaded.load_state_dict(state)
    for param, of_other in zip(model.parameters(), other.parameters(), strict=True):
        assert_same_bits(loaded.gradient(of_other), acc.gradient(param))
    for m in (model, other):
        micro_batch(m, 4)
    for param, of_other in zip(model.parameters(), other.parameters(), strict=True):
        assert_same_bits(loaded.gradient(of_other), acc.gradient(param))


@pytest.mark.parametrize("buffer", ["split24", "split32", "fp32"])
def test_a_state_is_loaded_in_inference_mode_and_from_its_tensors(buffer: str) -> None:
    model, optimizer, acc = convolution(buffer)
    for n in range(4):
        micro_batch(model, n)
    with torch.inference_mode():
        state = copy.deepcopy(acc.state_dict())
        other, other_optimizer, loaded = convolution(buffer)
    other, other_optimizer, loaded = convolution(buffer)
    with torch.inference_mode():
        loaded.load_state_dict(state)
    for _ in range(2):
        for m in (model, other):
            micro_batch(m, 4)
        for param, of_other in zip(model.parameters(), other.parameters(), strict=True):
            assert_same_bits(loaded.gradient(of_other), acc.gradient(param))
        optimizer.zero_grad(set_to_none=False)
        other_optimizer.zero_grad(set_to_none=False)


def test_a_state_that_memory_does_not_hold_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, acc = convolution("split24")
    for n in range(3):
        micro_batch(model, n)
    state = copy.deepcopy(acc.state_dict())
    micro_batch(model, 3)
    before = [acc.gradient(param) for param in model.parameters()]
    made: list[int] = []
    original = torch.empty_strided

    def out_of_memory(*arguments: Any, **options: Any) -> Tensor:
        made.append(1)
        if len(made) == 2:
            raise torch.OutOfMemoryError
        return original(*arguments, **options)

    monkeypatch.setattr(torch, "empty_strided", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        acc.load_state_dict(state)
    monkeypatch.undo()
    for param, value in zip(model.parameters(), before, strict=True):
        assert_same_bits(acc.gradient(param), value)


def test_finish_may_be_called_again_after_a_rollback() -> None:
    model, _, acc = convolution("split32")
    for n in range(3):
        micro_batch(model, n)
    state = copy.deepcopy(acc.state_dict())
    norm = acc.finish(divide_by=2.0).norm
    acc.load_state_dict(state)
    assert torch.equal(acc.finish(divide_by=2.0).norm, norm)
    with pytest.raises(RuntimeError, match="finish\\(\\) was called already"):
        acc.finish()
