"""Launch every kernel of a backend once for each format and start: a program for compute-sanitizer.

``PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/every_kernel.py cuda`` makes each
tensor an allocation of its own, beyond which nothing may be read or written. What the kernels compute is not compared:
the tests do that.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # from a checkout, installed or not

from kernel_cases import columns, problem
from step_cases import GRADS, WEIGHT_FORMATS, hard

from accumkern import backends
from accumkern.backends import Kernels
from accumkern.formats import BLOCK_NUMEL, PARTIALS, Format, Start, encode, partial_rows
from accumkern.updates import Update

# One alone, lists that begin and end anywhere in a vector and in a block, and more tensors than one launch takes.
LISTS = ([1], [BLOCK_NUMEL + 1], [0, 7, 4097, 3], [5] * 100)
RANKS = 3


class EveryKernel:
    """Calls kernels, and counts how often each is called."""

    def __init__(self, backend: str, device: str) -> None:
        self.device = device
        self.kernels = backends.kernels(backends.choose(backend, torch.device(device)))
        self.calls = dict.fromkeys(Kernels._fields, 0)

    def call(self, name: str, *arguments: Any) -> None:
        """Call a kernel."""
        getattr(self.kernels, name)(*arguments)
        self.calls[name] += 1

    def run(self) -> None:
        """Call all of them."""
        for sizes in LISTS:
            for format_ in Format:
                for start in Start:
                    self.of_format(format_, start, sizes)
            for update in Update:
                for weight_format in WEIGHT_FORMATS:
                    for grad_format, start in GRADS:
                        self.step(update, weight_format, grad_format, start, sizes)
        for format_ in (Format.SPLIT24, Format.SPLIT32):
            for numel in (1, 4097, 70_001):
                self.mean(format_, numel)
        for count in (0, 1, 1000):
            self.norm(count)

    def of_format(self, format_: Format, start: Start, sizes: list[int]) -> None:
        """Call what works on sums of a format."""
        rows = [problem(format_, numel) for numel in sizes]
        grads, sums, residuals = columns(rows, self.device)
        numbers: list[float | Tensor] = [0.5, torch.full((), 0.5, device=self.device)]
        partials = [torch.empty(partial_rows(n), PARTIALS, device=self.device) for n in sizes]
        for scale in numbers:
            self.call("fold", format_, start, grads, sums, residuals, scale, None)
            self.call("fold", format_, start, grads, sums, residuals, scale, partials)
        for grad, total, residual in zip(grads, sums, residuals or [None] * len(sums), strict=True):
            if total.numel():
                add = self.kernels.fold_into(format_, start, total, residual)
                assert add(grad, total, total._version, 0.5)
                self.calls["fold_into"] += 1
        if start is not Start.FROM_ZERO:
            blocks = sum(partial_rows(n) for n in sizes)
            self.call("squares", format_, start, sums, residuals, torch.empty(blocks, device=self.device))
            for divisor in numbers:
                self.call("finish", format_, start, sums, residuals, divisor, divisor)
                self.call("rescale", format_, start, sums, residuals, divisor, divisor)
        if start is Start.CONTINUE:
            values = [torch.empty(total.shape, device=self.device) for total in sums]
            if sums:
                assert self.kernels.fold_alike(format_, grads, sums, residuals, 0.5)
                self.calls["fold_alike"] += 1
            self.call("decode", format_, sums, residuals, values)
            for divisor in numbers:
                self.call("encode", format_, values, divisor, sums, residuals)

    def step(self, update: Update, weight_format: Format, grad_format: Format, start: Start, sizes: list[int]) -> None:
        """Call an optimizer's step, without and with a flag that skips it."""
        for skip in (None, torch.zeros(())):
            step = hard(update, weight_format, grad_format, start, sizes, skip=skip).to(self.device)
            self.call("step", *vars(step).values())

    def mean(self, format_: Format, numel: int) -> None:
        """Call the mean over ranks, from rows that begin anywhere."""
        sums, residuals = encode(format_, torch.randn(RANKS, numel + 1))
        assert residuals is not None
        rows = [tensor.to(self.device)[:, 1:] for tensor in (sums, residuals)]
        written = [torch.empty_like(row[0]) for row in rows]
        self.call("mean", format_, *rows, 3.0, *written)

    def norm(self, count: int) -> None:
        """Call the end of a norm, without and with a limit."""
        partials = torch.rand(count, device=self.device)
        for max_norm in (None, 1.0):
            results = torch.empty(2, device=self.device)
            self.call("norm", partials, 2.0, max_norm, results, torch.empty((), dtype=torch.bool, device=self.device))


def main() -> None:
    """Call every kernel of the backend that the command line names, and print how often."""
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/every_kernel.py cuda|triton|cpu")
    backend = sys.argv[1]
    torch.manual_seed(0)
    every = EveryKernel(backend, "cpu" if backend == "cpu" else "cuda")
    every.run()
    if every.device == "cuda":
        torch.cuda.synchronize()
    missing = [name for name, count in every.calls.items() if not count]
    assert not missing, f"not called: {missing}"
    print(f"{backend}: " + ", ".join(f"{name} {count}" for name, count in every.calls.items()))


if __name__ == "__main__":
    main()
