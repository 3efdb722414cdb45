"""What outlives a backward pass: checkpoints in mid-window, detaching, copies, memory; and random sequences.

A checkpoint is right if the run that continues from it has the bits of the run that was never interrupted.
"""

import copy
import functools
import gc
import io
import pickle
import tracemalloc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradients
import pytest
import torch
from gradients import BF16, assert_same_bits, assert_stock, fail, micro_gradients, parameter
from gradients import backward_of_all as backward
from torch import Tensor
from torch.nn import Parameter
from torch.nn import functional as F  # noqa: N812

import accumkern
from accumkern.formats import BUFFERS, decode, encode, fma

pytestmark = pytest.mark.usefixtures("one_thread")

sgd = functools.partial(gradients.sgd, momentum=0.5)


# ---- helpers -----------------------------------------------------------------------------------------------------


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def is_hooked(param: Tensor) -> bool:
    return bool(param._post_accumulate_grad_hooks)


def assert_attached(param: Parameter) -> None:
    """Assert that additions lose nothing."""
    param.grad = None
    for grad in (256.0, 1.0, 1.0):
        backward([param], [torch.full_like(param, grad)])
    assert param.grad is not None
    assert (param.grad == 258).all()


# ---- checkpoints -------------------------------------------------------------------------------------------------


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

    def assert_same(self, other: "Run") -> None:
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
    "residual of another shape": (
        lambda s: s | {"residuals": s["residuals"] | {"1": s["residuals"]["1"][1:]}},
        ValueError,
        r"residuals\[1\] of state_dict has shape \(5,\); it must be \(6,\)",
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


# ---- copies ------------------------------------------------------------------------------------------------------


def model_and_optimizer() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(2)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2)).to(BF16)
    return model, sgd(*model.parameters())


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, windows: int = 2) -> None:
    for _ in range(windows):
        for n in range(8):
            F.mse_loss(model(torch.full((3, 4), 1 + n / 8, dtype=BF16)), torch.ones(3, 2, dtype=BF16)).backward()
        optimizer.step()
        optimizer.zero_grad()


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def saved(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("middle_of_window", [False, True], ids=["between windows", "in a window"])
@pytest.mark.parametrize("make", [copy.deepcopy, pickled, saved], ids=["deepcopy", "pickle", "torch.save"])
def test_copies_of_model_and_optimizer_train_as_stock(make: Callable[[Any], Any], middle_of_window: bool) -> None:
    model, optimizer = model_and_optimizer()
    accumkern.attach(optimizer, "split32")
    train(model, optimizer)
    if middle_of_window:
        for n in range(3):
            model(torch.full((3, 4), 1 + n / 8, dtype=BF16)).sum().backward()
    twin, twin_optimizer = make((model, optimizer))
    if middle_of_window:
        twin_optimizer.zero_grad()
    assert not any(is_hooked(p) for p in twin.parameters())
    assert "add_param_group" not in vars(twin_optimizer)
    assert type(twin_optimizer).add_param_group is torch.optim.Optimizer.add_param_group
    stock, stock_optimizer = model_and_optimizer()
    stock.load_state_dict(model.state_dict())
    stock_optimizer.load_state_dict(optimizer.state_dict())
    for m, o in ((twin, twin_optimizer), (stock, stock_optimizer)):
        o.add_param_group({"params": [parameter(3)]})
        assert not is_hooked(o.param_groups[1]["params"][0])
        train(m, o)
    for a, b in zip(twin.parameters(), stock.parameters(), strict=True):
        assert_same_bits(a, b)
    assert all(is_hooked(p) for p in model.parameters())


def test_state_dicts_of_model_and_optimizer_are_those_of_stock() -> None:
    model, optimizer = model_and_optimizer()
    stock, stock_optimizer = model_and_optimizer()
    accumkern.attach(optimizer)
    train(model, optimizer)
    train(stock, stock_optimizer)
    assert list(model.state_dict()) == list(stock.state_dict())
    ours, theirs = optimizer.state_dict(), stock_optimizer.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    assert {k: list(v) for k, v in ours["state"].items()} == {k: list(v) for k, v in theirs["state"].items()}
    assert all(not vars(p) for p in model.parameters())
    assert [vars(m).keys() for m in model.modules()] == [vars(m).keys() for m in stock.modules()]
    through_a_file({"model": model.state_dict(), "optimizer": ours})


@pytest.mark.parametrize("first", ["attach", "scheduler"])
def test_learning_rate_schedulers_work_as_with_stock(first: str) -> None:
    rates = []
    for attached in (True, False):
        model, optimizer = model_and_optimizer()
        if attached and first == "attach":
            accumkern.attach(optimizer)
        schedulers = [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3),
            torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
        ]
        scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, schedulers, milestones=[3])
        if attached and first == "scheduler":
            accumkern.attach(optimizer)
        rates.append([])
        for _ in range(6):
            train(model, optimizer, windows=1)
            scheduler.step()
            rates[-1].append(optimizer.param_groups[0]["lr"])
        if attached:
            assert_attached(parameter_of(model))
    assert rates[0] == rates[1]


def parameter_of(model: torch.nn.Module) -> Parameter:
    return next(iter(model.parameters()))


# ---- detaching ---------------------------------------------------------------------------------------------------


def test_detach_restores_stock_behaviour() -> None:
    params = [parameter(4), parameter(300, 300)]
    optimizer = sgd(*params)
    acc = accumkern.attach(optimizer)
    for param in params:
        assert_attached(param)
    acc.detach()
    assert "add_param_group" not in vars(optimizer)
    assert optimizer.add_param_group.__func__ is torch.optim.Optimizer.add_param_group
    added = parameter(4)
    optimizer.add_param_group({"params": [added]})
    for param in (*params, added):
        assert_stock(param)
    acc.detach()
    for param in params:
        assert_stock(param)


WHEN_DETACHED: dict[str, Callable[[accumkern.GradAccumulator, Tensor], object]] = {
    "finish": lambda acc, p: acc.finish(),
    "gradient": lambda acc, p: acc.gradient(p),
    "noise_scale": lambda acc, p: acc.noise_scale(),
    "report": lambda acc, p: acc.report(),
    "reduce_in_fp32": lambda acc, p: acc.reduce_in_fp32(p),  # type: ignore[arg-type]
    "scale": lambda acc, p: setattr(acc, "scale", torch.tensor(0.5)),
    "state_dict": lambda acc, p: acc.state_dict(),
    "empty_state_dict": lambda acc, p: acc.empty_state_dict(),
    "load_state_dict": lambda acc, p: acc.load_state_dict({}),
}


@pytest.mark.parametrize("method", WHEN_DETACHED)
def test_what_is_detached_says_so(method: str) -> None:
    param = parameter(4)
    acc = accumkern.attach(sgd(param), stats=True, report=True)
    backward([param], [torch.ones(4)])
    acc.detach()
    assert "detached" in repr(acc)
    with pytest.raises(
        RuntimeError, match=r"this accumulator is detached from its optimizer; attach\(\) makes another"
    ):
        WHEN_DETACHED[method](acc, param)
    assert param.grad is not None
    assert (param.grad == 1).all()


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, pickle.dumps], ids=["copy", "deepcopy", "pickle"])
def test_an_accumulator_cannot_be_copied_and_says_what_can(way: Callable[[object], object]) -> None:
    acc = accumkern.attach(sgd(parameter(4)))
    with pytest.raises(TypeError, match=r"cannot be copied or pickled.*state_dict\(\), and attach\(\)"):
        way(acc)


def test_attach_in_inference_mode() -> None:
    params = [parameter(4), parameter(4).requires_grad_(False)]
    with torch.inference_mode():
        acc = accumkern.attach(sgd(*params))
    assert [p.requires_grad for p in params] == [True, False]
    params[1].requires_grad_(True)
    for param in params:
        assert_attached(param)
    acc.detach()


@pytest.mark.parametrize("notices", ["step", "finish"])
def test_parameters_that_were_given_another_tensor_are_noticed_and_hooked_again(notices: str) -> None:
    model = torch.nn.Linear(3, 2).to(BF16)
    optimizer = sgd(*model.parameters())
    acc = accumkern.attach(optimizer, average_over=2)
    model(torch.ones(1, 3, dtype=BF16)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.ones(1, 3)).sum().backward()
    with pytest.raises(RuntimeError, match=r"2 parameters, the first of shape \(2, 3\), have lost their hooks"):
        optimizer.step() if notices == "step" else acc.finish()
    assert all(map(torch.equal, before, model.parameters()))
    optimizer.zero_grad()
    for factor in (1.0, 3.0):
        (model(torch.ones(1, 3)) * factor).sum().backward()
    acc.finish()
    for p in model.parameters():
        assert p.grad is not None
        assert (p.grad == 2).all()
    optimizer.step()
    for p, old in zip(model.parameters(), before, strict=True):
        assert not torch.equal(p, old)


def test_detach_in_the_middle_of_a_window_leaves_grad_to_stock_additions() -> None:
    param = parameter(4)
    acc = accumkern.attach(sgd(param), "split32")
    for grad in (256.0, 1.0, 1.0, 0.5):
        backward([param], [torch.full((4,), grad)])
    grad = param.grad
    acc.detach()
    assert param.grad is grad
    assert grad is not None
    assert (grad == 258).all()
    backward([param], [torch.ones(4)])
    assert param.grad is grad
    assert (grad == 260).all()  # 259, rounded to even in bfloat16


def test_detach_frees_the_residuals() -> None:
    param = parameter(12343)
    acc = accumkern.attach(sgd(param))

    def residuals() -> int:
        gc.collect()
        return sum(type(o) is Tensor and o.dtype is torch.int8 and o.numel() == 12343 for o in gc.get_objects())

    assert_attached(param)
    assert residuals() == 1
    acc.detach()
    assert residuals() == 0


def test_context_manager_detaches() -> None:
    param = parameter(4)
    optimizer = sgd(param)
    with accumkern.attach(optimizer, "split32") as acc:
        assert isinstance(acc, accumkern.GradAccumulator)
        assert_attached(param)
    assert_stock(param)
    with pytest.raises(ArithmeticError), accumkern.attach(optimizer):
        raise ArithmeticError
    assert_stock(param)
    with accumkern.attach(optimizer) as acc:
        acc.detach()
    assert_stock(param)


def test_attach_again_after_detach() -> None:
    param = parameter(4)
    optimizer = sgd(param)
    for buffer in (*BUFFERS, "split24"):
        acc = accumkern.attach(optimizer, buffer)
        assert_attached(param)
        with pytest.raises(ValueError, match="is attached already"):
            accumkern.attach(optimizer)
        acc.detach()
        assert_stock(param)


def test_detach_leaves_an_add_param_group_of_someone_else_in_place() -> None:
    param, calls = parameter(4), []
    optimizer = sgd(param)
    acc = accumkern.attach(optimizer)
    ours = optimizer.add_param_group

    def theirs(param_group: dict[str, Any]) -> None:
        calls.append(param_group)
        ours(param_group)

    optimizer.add_param_group = theirs  # type: ignore[method-assign]
    attached, stock = parameter(4), parameter(4)
    optimizer.add_param_group({"params": [attached]})
    assert_attached(attached)
    acc.detach()
    assert optimizer.add_param_group is theirs
    optimizer.add_param_group({"params": [stock]})
    assert len(calls) == 2
    assert len(optimizer.param_groups) == 3
    for p in (param, attached, stock):
        assert_stock(p)


def test_detach_keeps_the_hooks_of_the_user() -> None:
    param, calls = parameter(4), []
    before = param.register_post_accumulate_grad_hook(lambda _: calls.append("before"))
    acc = accumkern.attach(sgd(param))
    after = param.register_post_accumulate_grad_hook(lambda _: calls.append("after"))
    acc.detach()
    backward([param], [torch.ones(4)])
    assert calls == ["before", "after"]
    before.remove()
    after.remove()
    assert_stock(param)


# ---- lifetime ----------------------------------------------------------------------------------------------------


def test_accumulator_lives_as_long_as_its_optimizer() -> None:
    param = parameter(4)
    optimizer = sgd(param)
    accumkern.attach(optimizer, "split32")
    gc.collect()
    assert_attached(param)
    gc.collect()
    assert_attached(param)
    del optimizer
    gc.collect()
    param.grad = None
    for grad in (256.0, 1.0, 1.0):  # nobody accumulates any more
        backward([param], [torch.full((4,), grad)])
    assert param.grad is not None
    assert (param.grad == 256).all()


def test_attach_again_after_the_first_optimizer_is_gone() -> None:
    """What a dropped accumulator left on the parameter must not slow the next one down either."""
    param = parameter(4)
    for _ in range(3):
        optimizer = sgd(param)
        acc = accumkern.attach(optimizer, "split32")
        assert_attached(param)
        assert len(param._post_accumulate_grad_hooks) == 1
        del optimizer, acc
        gc.collect()


@pytest.mark.parametrize("how", ["in a window", "detached", "after a failed backward", "frozen", "with a graph alive"])
def test_nothing_outlives_model_and_optimizer(how: str) -> None:
    params = [parameter(4), parameter(300, 300), parameter(3)]
    params[2].requires_grad_(how != "frozen")
    optimizer = sgd(*params)
    acc = accumkern.attach(optimizer, average_over=4)
    for _ in range(3):
        backward(params[:2], [torch.ones(4), torch.ones(300, 300)])
    if how == "detached":
        acc.detach()
    if how == "after a failed backward":
        fail(params[:2], late=params[2])
    if how == "with a graph alive":
        loss = sum(p.float().sum() for p in params)
        optimizer.step()
        del loss
    references = [weakref.ref(o) for o in (*params, *(p.grad for p in params[:2]), optimizer, acc)]
    del params, optimizer, acc
    gc.collect()
    assert [r() for r in references] == [None] * len(references)


def test_model_may_outlive_the_accumulator_and_a_graph_may_outlive_both() -> None:
    params = [parameter(4), parameter(4)]
    optimizer = sgd(*params)
    accumkern.attach(optimizer)
    losses = [sum((p.float() * n).sum() for p in params) for n in (256, 1, 1)]
    losses.pop(0).backward()
    del optimizer
    gc.collect()
    for loss in losses:
        loss.backward()
    assert all((p.grad == 256).all() for p in params)  # as stock adds


def test_a_thousand_windows_leave_nothing_behind() -> None:
    params = [parameter(5), parameter(3, 4), parameter(7, dtype=torch.float32)]
    optimizer = sgd(*params)
    acc = accumkern.attach(optimizer, average_over=3)
    grads = [torch.ones_like(p) for p in params]

    def windows(count: int) -> None:
        for n in range(count):
            for _ in range(3):
                backward(params, grads)
            acc.gradient(params[0])
            optimizer.step()
            optimizer.zero_grad(set_to_none=n % 2 == 0)
            if n % 50 == 0:
                fail(params[:2], late=params[2])
                optimizer.zero_grad()
        optimizer.zero_grad()

    def alive() -> tuple[int, int]:
        gc.collect()
        objects = gc.get_objects()
        return len(objects), sum(type(o) in (Tensor, Parameter) for o in objects)

    windows(51)
    tracemalloc.start()
    try:
        windows(51)
        objects, tensors = alive()
        bytes_before, _ = tracemalloc.get_traced_memory()
        windows(1000)
        objects_after, tensors_after = alive()
        bytes_after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert tensors_after <= tensors
    assert objects_after - objects < 100
    assert bytes_after - bytes_before < 50_000  # less than the smallest object a window


def test_casting_a_model_again_and_again_leaves_nothing_behind() -> None:
    model, optimizer = model_and_optimizer()
    accumkern.attach(optimizer)

    def casts(count: int) -> int:
        for n in range(count):
            model.to(torch.float32 if n % 2 else BF16)
            model(torch.ones(3, 4, dtype=parameter_of(model).dtype)).sum().backward()
            optimizer.zero_grad()
        gc.collect()
        return len(gc.get_objects())

    casts(20)
    before = casts(20)
    assert casts(200) - before < 100


# ---- random sequences --------------------------------------------------------------------------------------------


class Expected:
    """What .grad and the residual must hold, by the formats, whatever happens."""

    def __init__(self, buffer: str, average_over: float | None, params: list[Parameter]) -> None:
        self.formats = [BUFFERS[buffer][p.dtype] for p in params]
        self.scale = 1 / average_over if average_over else None
        self.sums: list[Tensor | None] = [None] * len(params)
        self.residuals: list[Tensor | None] = [None] * len(params)

    def micro_batch(self, i: int, grad: Tensor) -> None:
        total = self.sums[i]
        if total is not None:
            x = fma(self.scale or 1.0, grad, decode(self.formats[i], total, self.residuals[i]))
        elif self.scale is not None:
            x = grad.float() * torch.tensor(self.scale)
        else:
            self.sums[i], self.residuals[i] = grad.clone(), None
            return
        self.sums[i], self.residuals[i] = encode(self.formats[i], x)

    def edited(self, i: int, param: Parameter, keeps_residual: bool = False) -> None:
        """Take over a .grad that somebody changed."""
        self.sums[i] = None if param.grad is None else param.grad.resolve_neg().clone()
        if not keeps_residual:
            self.residuals[i] = None

    def assert_matches(self, params: list[Parameter], acc: accumkern.GradAccumulator) -> None:
        for i, param in enumerate(params):
            total = self.sums[i]
            assert_same_bits(param.grad, total)
            x = None if total is None else decode(self.formats[i], total, self.residuals[i])
            assert_same_bits(acc.gradient(param), x)


SPECIAL = torch.tensor([0.0, -0.0, 2.0**-133, -(2.0**-126), 1.0, 2.0**-9, 3e38, -3e38, torch.inf, torch.nan])


def random_gradient(param: Parameter, seed: int) -> Tensor:
    """Return values of very different sizes, now and then special ones."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(param.shape, generator=generator)
    if seed % 3:
        values = values * 2.0 ** torch.randint(-12, 13, param.shape, generator=generator)
    if seed % 7 == 0:
        special = SPECIAL[torch.randint(len(SPECIAL), param.shape, generator=generator)]
        values = torch.where(torch.rand(param.shape, generator=generator) < 0.3, special, values)
    return values.to(param.dtype)


EDITS: dict[str, Callable[[Parameter], object]] = {
    "mul_": lambda p: p.grad.mul_(0.7),
    "fill_": lambda p: p.grad.fill_(1.25),
    "other tensor": lambda p: setattr(p, "grad", p.grad * 2),
    "None": lambda p: setattr(p, "grad", None),
    "with holes": lambda p: setattr(p, "grad", torch.stack([p.grad, p.grad], -1)[..., 0]),
    "transposed": lambda p: setattr(p, "grad", p.grad.mT.contiguous().mT if p.dim() == 2 else p.grad.clone()),
    "negated lazily": lambda p: setattr(p, "grad", torch._neg_view(p.grad)),
}


@pytest.mark.parametrize(
    ("buffer", "average_over"),
    [("split24", None), ("split24", 3), ("split32", None), ("split32", 8), ("fp32", 3)],
    ids=str,
)
def test_random_sequences_of_everything_a_loop_may_do(buffer: str, average_over: float | None, tmp_path: Path) -> None:
    hypothesis = pytest.importorskip("hypothesis")
    hypothesis.configuration.set_hypothesis_home_dir(tmp_path)
    st = pytest.importorskip("hypothesis.strategies")
    which = st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True)
    seed = st.integers(0, 10**6)
    one = st.integers(0, 3)
    operations = st.one_of(
        st.tuples(st.just("backward"), which, seed),
        st.tuples(st.just("backward"), which, seed),
        st.tuples(st.just("backward"), which, seed),
        st.tuples(st.just("two losses"), which, seed),
        st.tuples(st.just("autograd.grad"), which, seed),
        st.tuples(st.just("failed backward"), which, st.booleans()),
        st.tuples(st.just("zero_grad"), st.booleans()),
        st.tuples(st.just("edit"), one, st.sampled_from(list(EDITS))),
        st.tuples(st.just("silent edit"), one, st.sampled_from([0.0, 0.7, -3.0, 2.0**-5])),
        st.tuples(st.just("freeze"), one, st.booleans()),
        st.tuples(st.just("save and load")),
        st.tuples(st.just("attach again")),
    )

    @hypothesis.settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @hypothesis.given(st.lists(operations, min_size=3, max_size=25))
    def run(sequence: list[tuple[Any, ...]]) -> None:
        transposed = Parameter(torch.zeros(3, 2, dtype=BF16).t())
        params = [parameter(5), parameter(2, 3), transposed, parameter(4, dtype=torch.float32)]
        expected = Expected(buffer, average_over, params)
        optimizer = sgd(*params)
        acc = accumkern.attach(optimizer, buffer, average_over=average_over)
        for operation, *arguments in sequence:
            if operation in ("backward", "two losses", "autograd.grad"):
                chosen = [i for i in arguments[0] if params[i].requires_grad]
                if not chosen:
                    continue
                grads = {i: random_gradient(params[i], arguments[1] + i) for i in chosen}
                loss = sum((params[i].float() * grad.float()).sum() for i, grad in grads.items())
                if operation == "autograd.grad":
                    torch.autograd.grad(loss, [params[i] for i in chosen])
                    continue
                for last in (False, True)[operation == "backward" :]:
                    loss.backward(retain_graph=not last)
                    for i, grad in grads.items():
                        expected.micro_batch(i, grad)
            elif operation == "failed backward":
                chosen = [i for i in arguments[0] if params[i].requires_grad]
                if len(chosen) > 1:
                    fail([params[i] for i in chosen[1:]], late=params[chosen[0]])
                    optimizer.zero_grad(set_to_none=arguments[1])
                    for i, param in enumerate(params):
                        assert param.grad is None or not param.grad.any()
                        expected.edited(i, param)
            elif operation == "zero_grad":
                optimizer.zero_grad(set_to_none=arguments[0])
                for i, param in enumerate(params):
                    assert param.grad is None or not param.grad.any()
                    expected.edited(i, param)
            elif operation in ("edit", "silent edit"):
                i, how = arguments
                param = params[i]
                if param.grad is None:
                    continue
                if operation == "silent edit":
                    param.grad.data.mul_(how)
                else:
                    EDITS[how](param)
                expected.edited(i, param, keeps_residual=operation == "silent edit")
            elif operation == "freeze":
                params[arguments[0]].requires_grad_(not arguments[1])
            else:
                state = through_a_file(acc.state_dict())
                acc.detach()
                optimizer = sgd(*params)
                if operation == "save and load":
                    optimizer.zero_grad()
                acc = accumkern.attach(optimizer, buffer, average_over=average_over)
                if operation == "save and load":
                    acc.load_state_dict(state)
                else:
                    expected.residuals = [None] * len(params)
            expected.assert_matches(params, acc)

    run()
