"""Inputs for the kernels of a step, on the CPU, what must come out of them by the eager backend, and comparisons."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
from gradients import assert_same_bits
from kernel_cases import problem, rounds_once, values
from torch import Tensor

from accumkern import backends, updates
from accumkern.formats import Format, Start, encode
from accumkern.updates import Update, adam_coefficients, sgd_coefficients

WEIGHT_FORMATS = [Format.SPLIT24, Format.SPLIT32]
GRAD_FORMATS = [*WEIGHT_FORMATS, Format.MAIN_GRAD_BFLOAT16]
GRADS = [*[(format_, Start.CONTINUE) for format_ in GRAD_FORMATS], (Format.SPLIT24, Start.FROM_SUM)]

ALL_UPDATES = pytest.mark.parametrize("update", list(Update), ids=lambda u: u.name.lower())
ALL_WEIGHTS = pytest.mark.parametrize("weight_format", WEIGHT_FORMATS, ids=lambda f: f.name.lower())
ALL_GRADS = pytest.mark.parametrize(
    ("grad_format", "start"), GRADS, ids=[f"{f.name}-{s.name}".lower().replace("_", "-") for f, s in GRADS]
)

ADAM: dict[str, Any] = {
    "lr": 1e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0.1,
    "decoupled_weight_decay": True,
    "maximize": False,
}
SGD: dict[str, Any] = {
    "lr": 1e-2,
    "weight_decay": 0.1,
    "momentum": 0.9,
    "dampening": 0.1,
    "nesterov": False,
    "maximize": False,
}


def is_adam(update: Update) -> bool:
    return update in (Update.ADAM, Update.AMSGRAD)


def coefficients(update: Update, count: int, options: dict[str, Any] | None = None) -> Tensor:
    """Return rows of coefficients, those of neighbours different: by steps of 1, 2 and more, or first steps and others.

    Args:
        update: which one.
        count: of rows.
        options: what is not as in ADAM or SGD.
    """
    if is_adam(update):
        steps = torch.tensor([1.0, 2.0, 30.0, 1000.0, 100_000.0]).repeat(count // 5 + 1)[:count]
        return adam_coefficients(ADAM | (options or {}), steps)
    return sgd_coefficients(SGD | (options or {}), torch.arange(count) % 2 == 0)


@dataclass
class Step:
    """The arguments of a step."""

    update: Update
    weight_format: Format
    grad_format: Format
    start: Start
    weights: list[Tensor]
    weight_residuals: list[Tensor]
    grads: list[Tensor]
    grad_residuals: list[Tensor] | None
    states: list[list[Tensor]]
    coefficients: Tensor
    divisor: float | Tensor = 1.0
    factor: float | Tensor = 1.0
    skip: Tensor | None = None

    @property
    def written(self) -> list[list[Tensor]]:
        return [self.weights, self.weight_residuals, *self.states]

    @property
    def read(self) -> list[list[Tensor]]:
        return [self.grads, self.grad_residuals or [], [self.coefficients]]

    def to(self, device: torch.device | str) -> Step:
        """Return a copy, its tensors on a device and aligned."""
        return Step(**{name: _copied(value, device) for name, value in vars(self).items()})

    def run(self, backend: str) -> None:
        backends.kernels(backend).step(*vars(self).values())


def _copied(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, copy=True)
    return [_copied(item, device) for item in value] if isinstance(value, list) else value


def hard(
    update: Update, weight_format: Format, grad_format: Format, start: Start, sizes: list[int], **others: Any
) -> Step:
    """Return a step with any bits in all tensors: subnormals, infinities, NaN, and pairs that no kernel would leave."""
    weights = [problem(weight_format, numel)[1:] for numel in sizes]
    grads = [problem(grad_format, numel)[1:] for numel in sizes]
    step = Step(
        update,
        weight_format,
        grad_format,
        start,
        [weight for weight, _ in weights],
        [residual for _, residual in weights if residual is not None],
        [grad for grad, _ in grads],
        [residual for _, residual in grads if residual is not None] if start is Start.CONTINUE else None,
        [[values(numel) for numel in sizes] for _ in update.states],
        coefficients(update, len(sizes)),
    )
    return replace(step, **others)


def usual(update: Update, sizes: list[int], **others: Any) -> Step:
    """Return a step as training has it, of split32 weights and split24 gradients."""
    weights = [encode(Format.SPLIT32, 0.02 * torch.randn(numel)) for numel in sizes]
    grads = [encode(Format.SPLIT24, 1e-3 * torch.randn(numel)) for numel in sizes]
    moments = [[(1e-3 * torch.randn(numel)) ** (1 if k == 0 else 2) for numel in sizes] for k in range(3)]
    step = Step(
        update,
        Format.SPLIT32,
        Format.SPLIT24,
        Start.CONTINUE,
        [weight for weight, _ in weights],
        [residual for _, residual in weights if residual is not None],
        [grad for grad, _ in grads],
        [residual for _, residual in grads if residual is not None],
        moments[: len(update.states)],
        coefficients(update, len(sizes)),
    )
    return replace(step, **others)


def by_reference(step: Step, backend: str, device: torch.device) -> Step:
    """Return what the eager backend makes of a step, on the CPU; with rounded products where ``backend`` has those."""
    expected = step.to("cpu")
    with _rounding_as(backend, device):
        expected.run("eager")
    return expected


@contextmanager
def _rounding_as(backend: str, device: torch.device) -> Iterator[None]:
    if rounds_once(backend, device):
        yield
        return
    with mock.patch.object(updates, "fma", lambda a, b, c: a * b + c):
        yield


def assert_stepped(step: Step, expected: Step, what: object = "") -> None:
    """Compare bits; one NaN of a state is as good as another, since processors make different ones."""
    names = ["weight", "weight's residual", *step.update.states]
    for name, column, of_reference in zip(names, step.written, expected.written, strict=True):
        for i, (tensor, wanted) in enumerate(zip(column, of_reference, strict=True)):
            where = f"{name} {i} of {[len(weight) for weight in step.weights][:8]}, {what}"
            if name in step.update.states:
                tensor, wanted = (torch.where(x.isnan(), torch.nan, x) for x in (tensor, wanted))
            assert_same_bits(tensor, wanted, where)
    for column, unchanged in zip(step.read, expected.read, strict=True):
        for tensor, wanted in zip(column, unchanged, strict=True):
            assert_same_bits(tensor, wanted, f"only read, {what}")


def check(step: Step, backend: str, device: torch.device, what: object = "") -> None:
    """Run a step on a copy, and compare with the reference."""
    found = step.to(device)
    found.run(backend)
    assert_stepped(found, by_reference(step, backend, device), what)
