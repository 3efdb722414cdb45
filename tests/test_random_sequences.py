"""Random sequences of everything that a loop may do."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradients
import pytest
import torch
from gradients import BF16, assert_same_bits, fail, parameter
from torch import Tensor
from torch.nn import Parameter

import accumkern
from accumkern.formats import BUFFERS, decode, encode, fma

pytestmark = pytest.mark.usefixtures("one_thread")

sgd = functools.partial(gradients.sgd, momentum=0.5)


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# ---- random sequences ----------------------------------------------------------------------------------------------


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
