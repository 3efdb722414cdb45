"""Whatever autograd does besides adding: the hook gives FP32 sums there too, or behaves as stock PyTorch does.

FP32 truth is a sum of the micro-gradients that really arrived at the parameter, which a tensor hook records. Stock
truth is the same code, run once more on parameters that nothing is attached to.
"""

import copy
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from gradients import BF16, Raise, backward, fail, fp32_sum, micro_gradients, parameter, sgd
from torch import Tensor
from torch.nn import Parameter
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

import accumkern
from accumkern.formats import BUFFERS, decode, encode

pytestmark = pytest.mark.usefixtures("one_thread")

# ---- helpers -----------------------------------------------------------------------------------------------------


def record(param: Tensor) -> list[Tensor]:
    """Return a list to which every gradient is added that arrives at `param`."""
    arrived: list[Tensor] = []
    param.register_hook(lambda grad: arrived.append(grad.detach().clone()))
    return arrived


def assert_equal(found: Tensor | None, expected: Tensor | None) -> None:
    """Assert that two gradients are equal in values, dtype, layout and strides."""
    if expected is None or found is None:
        assert found is None
        assert expected is None
        return
    assert found.dtype is expected.dtype
    assert found.layout is expected.layout
    if found.layout is torch.strided:
        assert found.stride() == expected.stride()
    else:
        found, expected = found.to_dense(), expected.to_dense()
    assert torch.equal(found, expected), f"{found} is not {expected}"


def assert_fp32_sum(acc: accumkern.GradAccumulator, param: Tensor, arrived: list[Tensor], scale: float = 1) -> None:
    """Assert that .grad is the correctly rounded FP32 sum of what arrived."""
    assert arrived
    x = fp32_sum(arrived, scale)
    assert_equal(acc.gradient(param), x)
    assert param.grad is not None
    assert torch.equal((param.grad.double() - x.double()).abs(), (x.to(param.dtype).double() - x.double()).abs())


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(BF16)


@pytest.fixture(params=[None, 4], ids=["sum", "average"])
def average_over(request: pytest.FixtureRequest) -> int | None:
    return request.param


class Fails(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Raise.apply(x)


# ---- one parameter in many places --------------------------------------------------------------------------------


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


# ---- kinds of backward passes ------------------------------------------------------------------------------------


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


# ---- parameters that take part now and then ----------------------------------------------------------------------


def test_unused_parameters_keep_grad_none(average_over: int | None) -> None:
    used, unused = parameter(4), parameter(4)
    acc = accumkern.attach(sgd(used, unused), average_over=average_over)
    for _ in range(3):
        backward(used, 1.0)
        assert unused.grad is None
        assert acc.gradient(unused) is None


def test_parameters_used_in_some_micro_batches_only(average_over: int | None) -> None:
    often, rarely = parameter(4), parameter(4)
    acc = accumkern.attach(sgd(often, rarely), "split32", average_over=average_over)
    grads = micro_gradients(9, 4)
    for n, grad in enumerate(grads):
        loss = (often.float() * grad).sum()
        if n % 3 == 1:
            loss = loss + (rarely.float() * grad).sum()
        loss.backward()
    assert_fp32_sum(acc, often, grads, 1 / (average_over or 1))
    assert_fp32_sum(acc, rarely, grads[1::3], 1 / (average_over or 1))


class Nothing(torch.autograd.Function):
    """The identity of `x`, which uses `param` and has no gradient for it."""

    @staticmethod
    def forward(ctx, x, param):  # type: ignore[no-untyped-def]
        return x.clone()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad, None


def test_undefined_gradient_leaves_grad_alone(average_over: int | None) -> None:
    param, other = parameter(4), parameter(4)
    acc = accumkern.attach(sgd(param, other), "split32", average_over=average_over)
    grads = micro_gradients(4, 4)
    for grad in grads:
        Nothing.apply(other * 1, param).sum().backward()
        backward(param, grad)
        Nothing.apply(other * 1, param).sum().backward()
    assert_fp32_sum(acc, param, grads, 1 / (average_over or 1))
    param.grad = None
    Nothing.apply(other * 1, param).sum().backward()
    assert param.grad is None


def test_parameters_unfrozen_after_attach_and_frozen_again(average_over: int | None) -> None:
    param, other = parameter(4), parameter(4)
    param.requires_grad_(False)
    acc = accumkern.attach(sgd(param, other), "split32", average_over=average_over)
    assert not param.requires_grad
    grads = micro_gradients(8, 4)
    scale = 1 / (average_over or 1)

    def micro_batch(grad: Tensor) -> None:
        ((param + other).float() * grad).sum().backward()

    micro_batch(grads[0])
    assert param.grad is None
    param.requires_grad_(True)
    for grad in grads[1:4]:
        micro_batch(grad)
    assert_fp32_sum(acc, param, grads[1:4], scale)
    param.requires_grad_(False)
    micro_batch(grads[4])
    assert_fp32_sum(acc, param, grads[1:4], scale)
    param.requires_grad_(True)
    for grad in grads[5:]:
        micro_batch(grad)
    assert_fp32_sum(acc, param, grads[1:4] + grads[5:], scale)
    assert_fp32_sum(acc, other, grads, scale)


def test_parameter_frozen_between_forward_and_backward_keeps_its_grad() -> None:
    param, other = parameter(4), parameter(4)
    acc = accumkern.attach(sgd(param, other), "split32")
    grads = micro_gradients(4, 4)
    for grad in grads[:3]:
        backward(param, grad)
    loss = ((param + other).float() * 2).sum()
    param.requires_grad_(False)
    loss.backward()
    assert_fp32_sum(acc, param, grads[:3])
    param.requires_grad_(True)
    backward(param, grads[3])
    assert_fp32_sum(acc, param, grads)


def test_parameters_added_by_add_param_group(average_over: int | None) -> None:
    first, later = parameter(4), parameter(4)
    optimizer = sgd(first)
    acc = accumkern.attach(optimizer, "split32", average_over=average_over)
    grads = micro_gradients(6, 4)
    for n, grad in enumerate(grads):
        if n == 2:
            optimizer.add_param_group({"params": [later], "lr": 0.25})
        ((first + later).float() * grad).sum().backward()
        if n < 2:
            later.grad = None
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.25]
    assert_fp32_sum(acc, first, grads, 1 / (average_over or 1))
    assert_fp32_sum(acc, later, grads[2:], 1 / (average_over or 1))


def frozen_in_inference_mode() -> Parameter:
    with torch.inference_mode():
        return Parameter(torch.zeros(3, dtype=BF16), requires_grad=False)


@pytest.mark.parametrize(
    "make",
    [lambda: Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False), frozen_in_inference_mode],
    ids=["integer", "made in inference mode"],
)
def test_parameters_that_can_have_no_gradient_are_passed_over(make: Callable[[], Parameter]) -> None:
    param, never = parameter(4), make()
    acc = accumkern.attach(sgd(param, never), "split32")
    assert not never._post_accumulate_grad_hooks
    grads = micro_gradients(5, 4)
    for grad in grads:
        backward(param, grad)
    assert_fp32_sum(acc, param, grads)
    state = acc.state_dict()
    assert state["sums"]["1"] is None
    acc.load_state_dict(copy.deepcopy(state))
    assert_fp32_sum(acc, param, grads)


def test_attach_without_grad_mode() -> None:
    param, frozen = parameter(4), parameter(4)
    frozen.requires_grad_(False)
    with torch.no_grad():
        acc = accumkern.attach(sgd(param, frozen), "split32")
    frozen.requires_grad_(True)
    grads = micro_gradients(5, 4)
    for grad in grads:
        ((param + frozen).float() * grad).sum().backward()
    assert_fp32_sum(acc, param, grads)
    assert_fp32_sum(acc, frozen, grads)


# ---- gradients that are left to stock PyTorch --------------------------------------------------------------------


def embedding_loss(weight: Tensor, n: int) -> Tensor:
    tokens = torch.tensor([n % 5, 2, 2])
    return F.embedding(tokens, weight, sparse=True).float().mul(1 + n / 128).sum()


def sparse_then_dense_loss(weight: Tensor, n: int) -> Tensor:
    return embedding_loss(weight, n) if n % 2 == 0 else (weight.float() * (1 + n / 128)).sum()


def dense_then_sparse_loss(weight: Tensor, n: int) -> Tensor:
    return sparse_then_dense_loss(weight, n + 1)


STOCK: dict[str, tuple[torch.dtype, Callable[[Tensor, int], Tensor]]] = {
    "sparse bfloat16": (BF16, embedding_loss),
    "sparse float32": (torch.float32, embedding_loss),
    "sparse, then dense": (torch.float32, sparse_then_dense_loss),
    "dense, then sparse": (torch.float32, dense_then_sparse_loss),
    "complex64": (torch.complex64, lambda w, n: (w * (0.1 + n * 1j)).imag.sum() + (w.conj() * (1 + n / 3)).real.sum()),
    "complex128": (torch.complex128, lambda w, n: (w * (0.1 + n * 1j)).imag.sum()),
    "float64": (torch.float64, lambda w, n: (w * (0.1 + n / 3)).sum()),
}


def run(loss: Callable[[Tensor, int], Tensor], param: Parameter, scale: float, **arguments: bool) -> Iterator[Tensor]:
    for n in range(5):
        (loss(param, n) * scale).backward(**arguments)
        assert param.grad is not None
        yield param.grad


@pytest.mark.parametrize("case", STOCK)
def test_other_kinds_of_gradients_behave_as_stock(case: str, average_over: int | None) -> None:
    dtype, loss = STOCK[case]
    start = torch.ones(5, 3, dtype=dtype)
    param, other, stock = Parameter(start.clone()), parameter(4), Parameter(start.clone())
    optimizer, stock_optimizer = sgd(param, other), sgd(stock)
    acc = accumkern.attach(optimizer, average_over=average_over)
    for window in range(3):
        stock_run = run(loss, stock, 1 / (average_over or 1))
        for found, expected in zip(run(loss, param, 1), stock_run, strict=True):
            assert_equal(found, expected)
            backward(other, 1.0)
        for o in (optimizer, stock_optimizer):
            o.step()
            if window == 0:
                o.zero_grad()
            else:
                o.zero_grad(set_to_none=False)
        assert_equal(param, stock)
    assert acc.state_dict()["residuals"]["0"] is None


def test_gradient_of_a_complex_parameter_keeps_its_imaginary_part() -> None:
    param = parameter(3, dtype=torch.complex64)
    acc = accumkern.attach(sgd(param))
    for _ in range(2):
        (param * (1 + 2j)).real.sum().backward()
    assert (param.grad == 2 - 4j).all()
    assert_equal(acc.gradient(param), param.grad)


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
@pytest.mark.parametrize("buffer", BUFFERS)
@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=["bfloat16", "float32"])
def test_create_graph_gradients_behave_as_stock(dtype: torch.dtype, buffer: str, average_over: int | None) -> None:
    """A gradient penalty through .grad itself: the second micro-batch's sum must still carry its graph."""

    def loss(weight: Tensor, n: int) -> Tensor:
        return (weight.float() ** 3 * (1 + n / 128)).sum()

    start = seeded(4, 3).to(dtype)
    param, stock = Parameter(start.clone()), Parameter(start.clone())
    optimizer = sgd(param)  # it keeps the accumulator alive
    accumkern.attach(optimizer, buffer, average_over=average_over)
    penalties = []
    for p, scale in ((param, 1.0), (stock, 1 / (average_over or 1))):
        *_, grad = run(loss, p, scale, create_graph=True)
        assert grad.requires_grad
        penalties.append(torch.autograd.grad(grad.float().square().sum(), p)[0])
    assert_equal(param.grad, stock.grad)
    assert_equal(*penalties)
    param.grad = stock.grad = None  # gradient and parameter would keep each other alive


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
def test_window_that_mixes_create_graph_and_plain_backward_passes() -> None:
    param = Parameter(seeded(6))
    acc = accumkern.attach(sgd(param), "split32")
    arrived = record(param)
    for n in range(6):
        x = acc.gradient(param)
        (param.float() ** 2 * (1 + n / 128)).sum().backward(create_graph=n in (1, 4))
        g = arrived[-1]
        assert param.grad is not None
        if x is None:
            assert_equal(param.grad, g)
        elif n in (1, 4):
            assert param.grad.requires_grad
            x = x.to(BF16) + g  # torch's own addition
            assert_equal(param.grad.detach(), x)
            assert_equal(acc.gradient(param), x.float())
        else:
            assert_equal(acc.gradient(param), x + g.float())
    param.grad = None
    arrived.clear()
    for n in range(4):
        (param.float() ** 2 * (1 + n / 128)).sum().backward()
    assert_fp32_sum(acc, param, arrived)


def test_gradients_of_grad_dtype_are_summed_in_it() -> None:
    param = parameter(6)
    param.grad_dtype = torch.float32
    acc = accumkern.attach(sgd(param))
    grads = micro_gradients(6, 6)
    for grad in grads:
        backward(param, grad)
    assert param.grad is not None
    assert param.grad.dtype is torch.float32
    assert_equal(param.grad, fp32_sum(grads))
    assert_equal(acc.gradient(param), fp32_sum(grads))


def test_lazily_negated_gradients_of_the_imaginary_part_of_a_complex_number(average_over: int | None) -> None:
    param, seen = parameter(dtype=torch.float32), []
    acc = accumkern.attach(sgd(param), average_over=average_over)
    param.register_hook(lambda grad: seen.append(grad.is_neg()))
    for n in range(1, 4):
        (torch.complex(torch.zeros(()), param).conj() * (1j * n)).real.backward()
    assert any(seen)
    expected = 6 / (average_over or 1)
    assert param.grad == expected
    assert acc.gradient(param) == expected
    assert param.grad.resolve_neg().view(torch.int32).view(torch.float32) == expected


# ---- hooks of the user -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before attach", "after attach", "both"])
@pytest.mark.parametrize("shape", [(5,), (257, 256)], ids=["small", "large"])
def test_post_accumulate_hook_of_the_user_sees_the_sum(shape: tuple[int, ...], when: str) -> None:
    param, other = parameter(*shape), parameter(5)
    optimizer, seen = sgd(param, other), []

    def look(p: Tensor) -> None:
        assert p is param
        assert p.grad is not None
        seen.append(p.grad.clone())

    if when != "after attach":
        param.register_post_accumulate_grad_hook(look)
    acc = accumkern.attach(optimizer, "split32")
    if when != "before attach":
        param.register_post_accumulate_grad_hook(look)
    grads = micro_gradients(5, *shape)
    for n, grad in enumerate(grads, 1):
        ((param.float() * grad).sum() + other.float().sum()).backward()
        assert len(seen) == (2 if when == "both" else 1)
        for s in seen:
            assert_equal(s, param.grad)
        assert_fp32_sum(acc, param, grads[:n])
        seen.clear()


@pytest.mark.parametrize("when", ["before attach", "after attach"])
def test_order_of_the_users_hooks_stays_what_it_was(when: str) -> None:
    param, calls = parameter(3), []
    optimizer = sgd(param)
    if when == "after attach":
        accumkern.attach(optimizer)
    handles = [param.register_post_accumulate_grad_hook(lambda _, n=n: calls.append(n)) for n in range(3)]
    if when == "before attach":
        accumkern.attach(optimizer)
    backward(param, 1.0)
    assert calls == [0, 1, 2]
    handles[1].remove()
    backward(param, 1.0)
    assert calls == [0, 1, 2, 0, 2]


@pytest.mark.parametrize("when", ["before attach", "after attach"])
def test_optimizer_in_backward(when: str, average_over: int | None) -> None:
    """A hook that steps every other micro-batch and drops the gradient, as in torch's own tutorial."""
    params = [Parameter(seeded(5)), Parameter(seeded(70000))]
    start = [p.detach().clone() for p in params]
    optimizers = {p: sgd(p) for p in params}
    arrivals = {p: record(p) for p in params}

    def step(p: Parameter) -> None:
        if len(arrivals[p]) % 2 == 0:
            optimizers[p].step()
            p.grad = None

    if when == "before attach":
        for p in params:
            p.register_post_accumulate_grad_hook(step)
    for p in params:
        accumkern.attach(optimizers[p], "split32", average_over=average_over)
    if when == "after attach":
        for p in params:
            p.register_post_accumulate_grad_hook(step)
    for n in range(6):
        sum((p.float() ** 2).sum() * (1 + n / 64) for p in params).backward()
    for p, expected in zip(params, start, strict=True):
        assert p.grad is None
        for a, b in zip(arrivals[p][::2], arrivals[p][1::2], strict=True):
            scale = 1 / (average_over or 1)
            total = encode(BUFFERS["split32"][BF16], fp32_sum([a, b], scale))[0]
            expected.add_(total, alpha=-0.5)
        assert_equal(p.detach(), expected)


def test_tensor_hook_of_the_user_that_changes_the_gradient(average_over: int | None) -> None:
    params = [parameter(6), parameter(257, 256)]
    params[0].register_hook(lambda grad: grad * 3)
    acc = accumkern.attach(sgd(*params), "split32", average_over=average_over)
    params[1].register_hook(lambda grad: grad * 3)
    grads = [micro_gradients(5, *p.shape) for p in params]
    for micro_batch in zip(*grads, strict=True):
        sum((p.float() * g).sum() for p, g in zip(params, micro_batch, strict=True)).backward()
    for param, of_param in zip(params, grads, strict=True):
        assert_fp32_sum(acc, param, [grad * 3 for grad in of_param], 1 / (average_over or 1))


def test_tensor_hook_registered_later_does_not_see_the_sum() -> None:
    param, seen = parameter(6), []
    optimizer = sgd(param)  # it keeps the accumulator alive
    accumkern.attach(optimizer)
    param.register_hook(lambda grad: seen.append(grad.clone()))
    grads = micro_gradients(4, 6)
    for grad in grads:
        backward(param, grad)
    for found, grad in zip(seen, grads, strict=True):
        assert_equal(found, grad)


# ---- backward passes that fail -----------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batches_before", [0, 1, 3])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_repairs_what_a_failed_backward_left(
    set_to_none: bool, micro_batches_before: int, average_over: int | None
) -> None:
    params = [parameter(5), parameter(257, 256), parameter(2, 3)]
    optimizer = sgd(*params)
    acc = accumkern.attach(optimizer, "split32", average_over=average_over)
    arrived = record(params[0])
    for grad in micro_gradients(5, 5)[:micro_batches_before]:
        sum((p.float() * grad[0]).sum() for p in params).backward()
    fail(params[:2], late=params[2])
    assert (arrived[-1] == 3).all()  # it did fail in the middle
    optimizer.zero_grad(set_to_none=set_to_none)
    grads = [micro_gradients(4, *p.shape) for p in params]
    for _ in range(2):
        for micro_batch in zip(*grads, strict=True):
            sum((p.float() * g).sum() for p, g in zip(params, micro_batch, strict=True)).backward()
        for param, of_param in zip(params, grads, strict=True):
            assert_fp32_sum(acc, param, of_param, 1 / (average_over or 1))
        optimizer.zero_grad(set_to_none=set_to_none)


LOOKS: dict[str, Callable[[accumkern.GradAccumulator, Parameter], Tensor | None]] = {
    "gradient()": lambda acc, p: acc.gradient(p),
    "state_dict()": lambda acc, p: acc.state_dict()["sums"]["0"],
    "detach()": lambda acc, p: acc.detach(),  # type: ignore[func-returns-value]
}


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("set_to_none", [True, False])
def test_what_was_zeroed_after_a_failed_backward_stays_zero(set_to_none: bool, look: str) -> None:
    params = [parameter(5), parameter(2, 3)]
    optimizer = sgd(*params)
    acc = accumkern.attach(optimizer, "split32")
    for _ in range(3):
        sum(p.float().sum() for p in params).backward()
    fail(params[:1], late=params[1])
    optimizer.zero_grad(set_to_none=set_to_none)
    found = LOOKS[look](acc, params[0])
    assert found is None or not found.any()
    assert params[0].grad is None or not params[0].grad.any()


def test_failed_backward_without_zero_grad_counts_what_arrived_as_stock_does(average_over: int | None) -> None:
    sets = [[parameter(5), parameter(257, 256), parameter(2, 3)] for _ in range(2)]
    optimizer = sgd(*sets[0])  # it keeps the accumulator alive
    accumkern.attach(optimizer, average_over=average_over)
    for params, scale in zip(sets, (1, 1 / (average_over or 1)), strict=True):
        for p in params:
            if scale != 1:
                p.register_hook(lambda grad, scale=scale: grad * scale)
        sum(p.float().sum() for p in params).backward()
        fail(params[:2], late=params[2])
        sum(p.float().sum() for p in params).backward()
    for attached, stock in zip(*sets, strict=True):
        assert_equal(attached.grad, stock.grad)


def test_gradient_after_a_failed_backward_counts_what_arrived() -> None:
    params = [parameter(5), parameter(2, 3)]
    acc = accumkern.attach(sgd(*params))
    sum(p.float().sum() for p in params).backward()
    fail(params[:1], late=params[1])
    assert (acc.gradient(params[0]) == 4).all()
    assert (params[0].grad == 4).all()
    assert (acc.gradient(params[1]) == 1).all()


@pytest.mark.parametrize("when", ["before attach", "after attach"])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_post_accumulate_hook_that_raises(set_to_none: bool, when: str) -> None:
    param, fails = parameter(5), [False]
    optimizer = sgd(param)

    def raise_sometimes(_: Tensor) -> None:
        if fails[0]:
            raise ArithmeticError

    if when == "before attach":
        param.register_post_accumulate_grad_hook(raise_sometimes)
    acc = accumkern.attach(optimizer, "split32")
    if when == "after attach":
        param.register_post_accumulate_grad_hook(raise_sometimes)
    grads = micro_gradients(5, 5)
    for _ in range(2):
        for grad in grads:
            backward(param, grad)
        fails[0] = True
        with pytest.raises(ArithmeticError):
            backward(param, 100.0)
        fails[0] = False
        optimizer.zero_grad(set_to_none=set_to_none)
        for grad in grads:
            backward(param, grad)
        assert_fp32_sum(acc, param, grads)
        optimizer.zero_grad()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_tensor_hook_that_raises(set_to_none: bool) -> None:
    param, fails = parameter(5), [False]

    def raise_sometimes(_: Tensor) -> None:
        if fails[0]:
            raise ArithmeticError

    param.register_hook(raise_sometimes)
    optimizer = sgd(param)
    acc = accumkern.attach(optimizer, "split32")
    grads = micro_gradients(5, 5)
    for grad in grads[:3]:
        backward(param, grad)
    fails[0] = True
    with pytest.raises(ArithmeticError):
        backward(param, 100.0)
    fails[0] = False
    assert_fp32_sum(acc, param, grads[:3])  # nothing had happened to the parameter yet
    optimizer.zero_grad(set_to_none=set_to_none)
    for grad in grads:
        backward(param, grad)
    assert_fp32_sum(acc, param, grads)


# ---- several optimizers ------------------------------------------------------------------------------------------


@pytest.mark.integration("Several models and optimizers: a GAN loop")
def test_two_accumulators_in_a_gan_loop() -> None:
    """The generator's loss sends gradients through the discriminator, whose optimizer zeroes them."""
    generator = torch.nn.Linear(4, 6, dtype=BF16)
    discriminator = torch.nn.Sequential(torch.nn.Linear(6, 5, dtype=BF16), torch.nn.Tanh(), torch.nn.Linear(5, 1))
    discriminator.to(BF16)
    optimizers = [sgd(*generator.parameters()), sgd(*discriminator.parameters())]
    accs = [accumkern.attach(optimizers[0], "split32", average_over=4), accumkern.attach(optimizers[1], "split24")]
    arrived = {p: record(p) for p in (*generator.parameters(), *discriminator.parameters())}
    for _ in range(2):
        for n in range(4):
            noise, real = seeded(3, 4, seed=n), seeded(3, 6, seed=n + 9)
            F.softplus(-discriminator(generator(noise)).float()).sum().backward()
        for p in generator.parameters():
            assert_fp32_sum(accs[0], p, arrived[p], 1 / 4)
        optimizers[0].step()
        optimizers[0].zero_grad()
        optimizers[1].zero_grad(set_to_none=False)
        for grads in arrived.values():
            grads.clear()
        for n in range(4):
            noise, real = seeded(3, 4, seed=n), seeded(3, 6, seed=n + 9)
            out = discriminator(generator(noise).detach()).float(), discriminator(real).float()
            (F.softplus(out[0]) + F.softplus(-out[1])).sum().backward()
        for p in discriminator.parameters():
            format_ = BUFFERS["split24"][BF16]
            total, residual = encode(format_, arrived[p][0].float())
            for grad in arrived[p][1:]:
                total, residual = encode(format_, decode(format_, total, residual) + grad.float())
            assert_equal(p.grad, total)
            assert_equal(accs[1].gradient(p), decode(format_, total, residual))
        assert all(p.grad is None for p in generator.parameters())
        optimizers[1].step()
        optimizers[1].zero_grad()
        for grads in arrived.values():
            grads.clear()


# ---- a model that is moved or cast after attach ------------------------------------------------------------------


class Two(torch.nn.Module):
    """A small weight that is used several times, so that autograd adds its gradients before it delivers them."""

    def __init__(self) -> None:
        super().__init__()
        self.small = torch.nn.Linear(5, 4)
        self.large = Parameter(torch.ones(257, 256))

    def loss(self, n: int) -> Tensor:
        x, weight = torch.cos(torch.arange(5) + float(n)), self.small.weight
        used_thrice = self.small(x.to(weight.dtype)).square().sum() + (weight * 3).sum() + (weight * 0.7).sum()
        return used_thrice.float() + (self.large.float() * (1 + n / 64)).sum()


@pytest.mark.parametrize("casts_back", [False, True], ids=["once", "there and back"])
def test_model_cast_after_attach_accumulates(casts_back: bool, average_over: int | None) -> None:
    """A cast gives each parameter a new node in autograd's graph. Here the windows begin after it."""
    model = Two() if not casts_back else Two().bfloat16()
    optimizer = sgd(*model.parameters())
    acc = accumkern.attach(optimizer, "split32", average_over=average_over)
    if casts_back:
        for n in range(3):
            model.loss(n).backward()
        optimizer.zero_grad()
        model.float()
        model.loss(0).backward()
        optimizer.zero_grad()
    model.bfloat16()
    arrived = {p: record(p) for p in model.parameters()}
    for window in range(3):
        for n in range(4):
            model.loss(n).backward()
        for param, grads in arrived.items():
            assert len(grads) == 4
            assert_fp32_sum(acc, param, grads, 1 / (average_over or 1))
            grads.clear()
        optimizer.zero_grad(set_to_none=window != 1)


def test_model_cast_in_the_middle_of_a_sum_goes_on_from_the_cast_gradient() -> None:
    model = Two().bfloat16()
    optimizer = sgd(*model.parameters())
    acc = accumkern.attach(optimizer, "split32")
    for n in range(4):
        model.loss(n).backward()
    model.float()
    arrived = {p: record(p) for p in model.parameters()}
    before = {p: p.grad.clone() for p in model.parameters() if p.grad is not None}
    for param, grad in before.items():
        assert grad.dtype is torch.float32
        assert_equal(acc.gradient(param), grad)
    for n in range(4):
        model.loss(n).backward()
    for param, grads in arrived.items():
        assert_fp32_sum(acc, param, [before[param], *grads])


def test_gradient_of_a_model_cast_to_float64() -> None:
    model = Two().bfloat16()
    acc = accumkern.attach(sgd(*model.parameters()), "split32")
    for n in range(4):
        model.loss(n).backward()
    expected = {p: p.grad.float() for p in model.parameters() if p.grad is not None}
    model.double()
    for param, grad in expected.items():
        assert_equal(acc.gradient(param), grad)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_model_cast_in_the_middle_of_an_average_is_an_error_that_zero_grad_repairs(set_to_none: bool) -> None:
    model = Two().bfloat16()
    optimizer = sgd(*model.parameters())
    acc = accumkern.attach(optimizer, "split32", average_over=4)
    for n in range(2):
        model.loss(n).backward()
    model.float()
    with pytest.raises(RuntimeError, match=r"moved or cast in the middle of a window.*average_over.*zero_grad\(\)"):
        model.loss(2).backward()
    optimizer.zero_grad(set_to_none=set_to_none)
    arrived = {p: record(p) for p in model.parameters()}
    for n in range(4):
        model.loss(n).backward()
    for param, grads in arrived.items():
        assert_fp32_sum(acc, param, grads, 1 / 4)


def test_model_cast_while_its_parameters_are_frozen() -> None:
    model = Two().requires_grad_(False)
    acc = accumkern.attach(sgd(*model.parameters()), "split32")
    model.bfloat16()
    model.requires_grad_(True)
    arrived = {p: record(p) for p in model.parameters()}
    for n in range(4):
        model.loss(n).backward()
    for param, grads in arrived.items():
        assert_fp32_sum(acc, param, grads)


# ---- process groups ----------------------------------------------------------------------------------------------


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


# ---- threads -----------------------------------------------------------------------------------------------------


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
