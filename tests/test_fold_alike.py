"""Kernels.fold_alike: the fold of a list that is looked at and folded in one call, or left alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from gradients import assert_same_bits
from torch import Tensor

from accumkern import backends
from accumkern.formats import Format, Start, encode

SIZES = (3, 70, 0, 4097)


class Subclass(Tensor):
    """A tensor that may do anything."""


def lists(format_: Format, device: torch.device) -> tuple[list[Tensor], list[Tensor], list[Tensor] | None]:
    """Return (gradients, sums, residuals)."""
    pairs = [encode(format_, torch.randn(numel)) for numel in SIZES]
    sums = [total.to(device) for total, _ in pairs]
    residuals = None if format_.residual_dtype is None else [low.to(device) for _, low in pairs if low is not None]
    return [torch.randn(numel).to(total) for numel, total in zip(SIZES, sums, strict=True)], sums, residuals


@pytest.mark.parametrize("format_", list(Format), ids=lambda format_: format_.name.lower())
def test_it_does_what_fold_does(backend: str, device: torch.device, format_: Format) -> None:
    kernels = backends.kernels(backend)
    grads, sums, residuals = lists(format_, device)
    wanted = [total.clone() for total in sums]
    wanted_low = None if residuals is None else [low.clone() for low in residuals]
    kernels.fold(format_, Start.CONTINUE, grads, wanted, wanted_low, 0.3, None)
    assert kernels.fold_alike(format_, grads, sums, residuals, 0.3) is True
    for found, right in zip(sums + (residuals or []), wanted + (wanted_low or []), strict=True):
        assert_same_bits(found, right)


#: What is unusual -> (0 for gradients, 1 for sums, 2 for residuals; what the second of them becomes).
UNUSUAL: dict[str, tuple[int, Callable[[Tensor], object]]] = {
    "gradient of another size": (0, lambda x: x[:69].clone()),
    "gradient of another dtype": (0, lambda x: x.float()),
    "gradient with holes": (0, lambda x: torch.stack([x, x], 1)[:, 0]),
    "gradient of a subclass": (0, lambda x: x.as_subclass(Subclass)),
    "sparse gradient": (0, lambda x: x.to_sparse()),
    "sum of another size": (1, lambda x: x[:69].clone()),
    "sum of another dtype": (1, lambda x: x.float()),
    "sum with holes": (1, lambda x: torch.stack([x, x], 1)[:, 0]),
    "sum of a subclass": (1, lambda x: x.as_subclass(Subclass)),
    "residual of another size": (2, lambda x: x[:69].clone()),
    "residual of another dtype": (2, lambda x: x.int()),
    "no residual": (2, lambda x: None),
}


@pytest.mark.parametrize(("column", "change"), UNUSUAL.values(), ids=UNUSUAL.keys())
@pytest.mark.parametrize("at", [0, 1], ids=["first", "second"])
def test_what_is_unusual_is_left_alone(
    backend: str, device: torch.device, column: int, change: Callable[[Tensor], Tensor], at: int
) -> None:
    columns = lists(Format.SPLIT24, device)
    assert columns[2] is not None
    columns[column][at] = change(columns[column][1])  # type: ignore[index]
    if at == 0:  # all others of that tensor are of its size
        for other in {0, 1, 2} - {column}:
            columns[other][0] = columns[other][1].clone()  # type: ignore[index]
    before = [None if x is None else x.clone() for x in (*columns[1], *columns[2])]
    assert backends.kernels(backend).fold_alike(Format.SPLIT24, *columns, 1.0) is False
    for found, right in zip((*columns[1], *columns[2]), before, strict=True):
        assert (found is None) == (right is None)
        if right is not None:
            assert_same_bits(found, right)


@pytest.mark.parametrize("column", [0, 1], ids=["gradient", "sum"])
def test_what_is_lazily_negated_is_left_alone(backend: str, device: torch.device, column: int) -> None:
    columns = lists(Format.PLAIN32, device)
    columns[column][1] = torch._neg_view(columns[column][1])  # type: ignore[index]
    assert backends.kernels(backend).fold_alike(Format.PLAIN32, *columns, 1.0) is False
