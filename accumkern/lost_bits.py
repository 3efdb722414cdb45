"""What stock accumulation would have lost: a sample of each gradient, accumulated in its own dtype and in FP64."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from accumkern.formats import Format, decode, to_fp64

_SAMPLE_NUMEL = 1024


@dataclass(frozen=True)
class LostBits:
    """What one parameter's accumulation lost in the last window, measured on a sample of its elements.

    Attributes:
        name: the parameter's name where the optimizer has names, else its place in the optimizer.
        shape: of the parameter.
        micro_batches: gradients accumulated, since the window began or somebody has changed ``.grad``.
        stock_error: relative L2 error of accumulating in the parameter's dtype, against FP64.
        error: the same of accumkern's sum, right after the last of them was folded.
    """

    name: str
    shape: tuple[int, ...]
    micro_batches: int
    stock_error: float
    error: float


@dataclass(frozen=True)
class LostBitsReport:
    """What accumulation lost in the last window, per 16-bit parameter and in total.

    Attributes:
        parameters: a row for each parameter that had a gradient.
        stock_error: the relative L2 error of stock accumulation over all parameters, each sample weighted by the
            elements it stands for.
        error: the same of accumkern's sums.
    """

    parameters: list[LostBits]
    stock_error: float
    error: float

    def _rows(self) -> list[tuple[str, str, str, str, str]]:
        rows = [
            (row.name, "x".join(map(str, row.shape)), str(row.micro_batches), _show(row.stock_error), _show(row.error))
            for row in self.parameters
        ]
        return [*rows, ("all", "", "", _show(self.stock_error), _show(self.error))]

    def __str__(self) -> str:
        rows = [_HEADER, *self._rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADER))]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table(title="relative error of the accumulated gradient, last window")
        for i, column in enumerate(_HEADER):
            table.add_column(column, justify="left" if i < 2 else "right")
        for i, row in enumerate(self._rows()):
            table.add_row(*row, end_section=i == len(self.parameters) - 1)
        return table


_HEADER = ("parameter", "shape", "micro-batches", "stock", "accumkern")


def _show(error: float) -> str:
    return "-" if math.isnan(error) else f"{error:.1e}"


@dataclass
class _Sums:
    """What one parameter's sample adds up to: as stock PyTorch adds, in FP64, and in accumkern."""

    stock: Tensor
    truth: Tensor
    micro_batches: int
    ours: Tensor | None = None


class _Sample:
    """Some elements of one parameter's gradient, in memory order."""

    def __init__(self, grad: Tensor) -> None:
        numel = grad.numel()
        generator = torch.Generator().manual_seed(numel)  # leaves torch's own random numbers alone
        chosen = torch.randperm(numel, generator=generator)[:_SAMPLE_NUMEL].sort().values
        self.indices = chosen.to(grad.device)
        self.sums: _Sums | None = None
        self.next: _Sums | None = None  # with a micro-gradient that is being folded
        self.first: tuple[Callable[[], Any], int] = (lambda: None), 0  # a window's first gradient, and its version

    def of(self, tensor: Tensor) -> Tensor:
        return tensor.detach().flatten().index_select(0, self.indices)


class LostBitsMeter:
    """Samples of all 16-bit gradients."""

    def __init__(self) -> None:
        self._samples: dict[Tensor, _Sample] = {}

    def reset(self) -> None:
        """Begin afresh: what is in ``.grad`` comes from elsewhere, such as a state that was loaded."""
        self._samples.clear()

    def add(
        self,
        param: Tensor,
        grad: Tensor,
        scale: float | Tensor,
        running: Tensor | None = None,
        value: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Add a micro-gradient to its sample; :meth:`folded` has to follow, else it does not count.

        Args:
            param: whose gradient it is.
            grad: the micro-gradient.
            scale: its factor; stock accumulation gets it from the loss, so it is applied before the sum.
            running: ``.grad`` before; None begins a window.
            value: of ``running``, with its residual, if nobody has changed it since the last fold. A change counts for
                stock PyTorch too.
        """
        if not _is_sampled(grad) or (running is not None and not _is_sampled(running)):
            self._samples.pop(param, None)
            return
        sample = self._samples.get(param)
        if sample is None or sample.indices.device != grad.device:
            sample = self._samples[param] = _Sample(grad)
        new = sample.of(grad)
        exact = to_fp64(new) * (to_fp64(scale.to(new.device)) if isinstance(scale, Tensor) else scale)
        rounded = exact.to(grad.dtype).to(new.device)
        if running is None:
            sample.next = _Sums(rounded, exact, 1)
            sample.first = weakref.ref(grad), grad._version
            return
        continues = value is not None or (sample.first[0]() is running and sample.first[1] == running._version)
        sums = sample.sums if continues else None
        if sums is None:
            begun = running if value is None else value(running)
            sums = _Sums(sample.of(running), to_fp64(sample.of(begun)), 0)
        sample.next = _Sums(sums.stock + rounded, sums.truth + exact, sums.micro_batches + 1)

    def folded(self, param: Tensor, total: Tensor, residual: Tensor | None, format_: Format | None) -> None:
        """Look at accumkern's sum, now that a micro-gradient is folded.

        Args:
            param: whose gradient it is.
            total: ``.grad``, or its value.
            residual: what belongs to ``total``, whose elements it has in the same order, or None.
            format_: how the two make one number.
        """
        sample = self._samples.get(param)
        if sample is None or sample.next is None:
            return
        sample.sums, sample.next = sample.next, None
        sample.sums.ours = sample.of(total)
        if residual is not None and format_ is not None:
            sample.sums.ours = decode(format_, sample.sums.ours, sample.of(residual))

    def report(self, groups: list[dict[str, Any]]) -> LostBitsReport:
        """Return the errors of the last window.

        Args:
            groups: of the optimizer.
        """
        rows, totals = [], [0.0, 0.0, 0.0]
        for g, group in enumerate(groups):
            names = group.get("param_names")
            for i, param in enumerate(group["params"]):
                sample = self._samples.get(param)
                sums = None if sample is None else sample.sums
                if sample is None or sums is None or sums.ours is None:
                    continue
                truth = sums.truth
                errors = [(to_fp64(found) - truth).square().sum().item() for found in (sums.stock, sums.ours)]
                square = truth.square().sum().item()
                stands_for = param.numel() / len(sample.indices)
                for j, value in enumerate((*errors, square)):
                    totals[j] += value * stands_for
                name = names[i] if names and i < len(names) else f"group {g}, parameter {i}"
                stock_error, error = (_relative(value, square) for value in errors)
                rows.append(LostBits(name, tuple(param.shape), sums.micro_batches, stock_error, error))
        if not rows:
            raise RuntimeError("there is nothing to report: no bfloat16 or float16 gradient has been accumulated yet")
        return LostBitsReport(rows, _relative(totals[0], totals[2]), _relative(totals[1], totals[2]))


def _is_sampled(grad: Tensor) -> bool:
    return grad.dtype in (torch.bfloat16, torch.float16) and grad.layout is torch.strided and grad.numel() > 0


def _relative(error: float, square: float) -> float:
    return math.sqrt(error / square) if square > 0 else (0.0 if error == 0 else math.nan)
