"""A whole optimizer step of bfloat16 weights: stock, with FP32 masters beside the weights, and with masters in them.

``python benchmarks/bench_step.py [--device cpu|cuda] [--quick] [--weights 2^25]``

AdamW, fused. Every design accumulates the same window of micro-gradients, which is not timed, and then ends it: by the
step alone, by the mean and the step, or by the mean, clipping and the step; ``zero_grad()`` is part of all of them.
Weights are one tensor, or many. What each design holds at the end of a window is counted from its tensors, and what its
step allocates beyond that by the allocator. Writes ``benchmarks/results/<machine>/step.json``.
"""

from __future__ import annotations

import gc
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # from a checkout, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import torch
from bench_kernels import parse_size
from bench_training import quantiles
from harness import parser, steps, write_results
from paired import summary
from timing import describe
from torch import Tensor, nn

import accumkern
from accumkern import backends
from accumkern.memory import storage_bytes, tensors_in
from designs import Split24Masters, Split24Masters24, StockBF16, StockFP32Masters
from measure import AllocatorMeter, timed

WEIGHTS = {"cpu": "2^25", "cuda": "2^28"}
SIDE = 1024  # of each of many tensors
MICRO_BATCHES = 2  # of a window: the second leaves residuals
MAX_NORM = 1.0
BUCKETS_MIB = (2, 8, 32, 128)
REFERENCE = StockFP32Masters.key  # what the others are compared with

#: How a window ends -> (what the sums are divided by, what they are clipped to).
ENDS: dict[str, tuple[float, float | None]] = {
    "step": (1.0, None),
    "mean, step": (float(MICRO_BATCHES), None),
    "mean, clip, step": (float(MICRO_BATCHES), MAX_NORM),
}


class Weights(nn.Module):
    """Parameters, and nothing that uses them."""

    def __init__(self, shapes: list[tuple[int, ...]], device: torch.device) -> None:
        super().__init__()
        generator = torch.Generator(device).manual_seed(0)
        values = (torch.randn(shape, generator=generator, device=device) for shape in shapes)
        self.weights = nn.ParameterList(nn.Parameter(0.02 * value) for value in values)


class Design(Protocol):
    """One of the designs below."""

    key: str
    label: str
    params: list[nn.Parameter]

    def begin(self) -> None:
        """Make ready to accumulate."""

    def end(self, divide_by: float, max_norm: float | None) -> None:
        """Do what comes between two windows."""

    def held_bytes(self) -> dict[str, int]:
        """Return the bytes that are held, by what they are for."""


class InBF16(StockBF16):
    """Stock PyTorch: everything is in bfloat16."""

    def end(self, divide_by: float, max_norm: float | None) -> None:
        """Divide and clip ``.grad`` in passes of their own."""
        if divide_by != 1:
            torch._foreach_div_(self.sums(), divide_by)
        self.max_norm = max_norm
        self.clip()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def held_bytes(self) -> dict[str, int]:
        """Return the bytes that are held, by what they are for."""
        return held(self.params, gradients=self.sums(), optimizer_state=tensors_in(dict(self.optimizer.state)))


class BesideWeights(StockFP32Masters):
    """FP32 sums and FP32 masters; the fused AdamW takes the mean and clips as it steps."""

    @torch.no_grad()
    def end(self, divide_by: float, max_norm: float | None) -> None:
        """Step the masters, round them to the weights and zero the sums."""
        self.optimizer.grad_scale = None
        if max_norm is not None:
            norm = torch.linalg.vector_norm(self.flat) / divide_by
            self.optimizer.grad_scale = divide_by * torch.clamp((norm + 1e-6) / max_norm, min=1.0)
        elif divide_by != 1:
            self.optimizer.grad_scale = torch.full((), divide_by, device=self.flat.device)
        for weight, total in zip(self.fp32_weights, self.buffers, strict=True):
            weight.grad = total
        self.optimizer.step()
        torch._foreach_copy_([*self.params], [*self.fp32_weights])
        self.begin_window()

    def held_bytes(self) -> dict[str, int]:
        """Return the bytes that are held, by what they are for."""
        state = tensors_in(dict(self.optimizer.state))
        return held(self.params, masters=[*self.fp32_weights], gradients=[self.flat], optimizer_state=state)


class InsideWeights(Split24Masters):
    """Masters inside the weights; ``finish`` takes the mean and clips."""

    bucket: ClassVar[int | None] = None

    def attach(self) -> accumkern.GradAccumulator:
        """Attach to the optimizer, with masters of the weights."""
        return accumkern.attach(self.optimizer, self.buffer, master_weights=self.master_weights, bucket=self.bucket)

    def end(self, divide_by: float, max_norm: float | None) -> None:
        """Do what users do."""
        if divide_by != 1 or max_norm is not None:
            self.accumulator.finish(divide_by, max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def held_bytes(self) -> dict[str, int]:
        """Return the bytes that are held, by what they are for."""
        found = self.accumulator.memory()
        return {
            "weights": found.weights,
            "masters": found.master_residuals,
            "gradients": found.gradients,
            "residuals": found.residuals,
            "optimizer_state": found.optimizer_state,
            "bucket": found.bucket,
        }


class InsideWeights24(InsideWeights):
    """The same with masters of 24 bits."""

    key, label, master_weights = Split24Masters24.key, Split24Masters24.label, Split24Masters24.master_weights


DESIGNS: tuple[type[Any], ...] = (InBF16, BesideWeights, InsideWeights, InsideWeights24)


def held(
    params: list[nn.Parameter],
    gradients: list[Tensor],
    optimizer_state: list[Tensor],
    masters: list[Tensor] | None = None,
) -> dict[str, int]:
    """Return the bytes of tensors, by what they are for."""
    return {
        "weights": storage_bytes(params),
        "masters": storage_bytes(masters or []),
        "gradients": storage_bytes(gradients),
        "residuals": 0,
        "optimizer_state": storage_bytes(optimizer_state),
        "bucket": 0,
    }


@dataclass
class Outcome:
    """What was measured of a design and a way to end a window."""

    design: type[Any]
    end: str
    milliseconds: list[float] = field(default_factory=list)
    over: list[float] = field(default_factory=list)
    held_bytes: dict[str, int] | None = None
    peak_bytes: int = 0
    error: str | None = None


class Measurement:
    """The designs on weights of some shapes."""

    def __init__(self, shapes: list[tuple[int, ...]], designs: list[type[Any]], device: torch.device) -> None:
        self.shapes, self.device = shapes, device
        self.outcomes = {
            (place, end): Outcome(design, end)
            for place, design in enumerate(designs)
            for end in (ENDS if design.__dict__.get("bucket") is None else ["step"])
        }
        self.kinds = designs
        self.copy_gb_per_s: list[float] = []
        self.designs: dict[int, Any] = {}
        generator = torch.Generator(device).manual_seed(1)
        self.grads = [
            [(1e-3 * torch.randn(s, generator=generator, device=device)).bfloat16() for s in shapes]
            for _ in range(MICRO_BATCHES)
        ]

    def results(self, rounds: int, on_step: Callable[[int, int], None]) -> list[dict[str, Any]]:
        """Measure memory and then time, and return one result for each design and way to end a window."""
        for place, kind in enumerate(self.kinds):
            self.attempt(place, partial(self.make, place, kind))
        for key in self.outcomes:
            self.attempt(key[0], partial(self.measure_memory, key))
        for number in range(rounds):
            on_step(number, rounds)
            self.copy_gb_per_s.append(self.time_copy())
            order = list(self.outcomes) if number % 2 == 0 else list(self.outcomes)[::-1]
            milliseconds = {key: found for key in order if (found := self.attempt(key[0], partial(self.time, key)))}
            for key, found in milliseconds.items():
                self.outcomes[key].milliseconds.append(found)
                reference = milliseconds.get((self.place_of_reference(), key[1]))
                if reference and key[0] != self.place_of_reference():
                    self.outcomes[key].over.append(found / reference)
        return [self.result(outcome) for outcome in self.outcomes.values()]

    def place_of_reference(self) -> int:
        """Return which design the others are compared with."""
        return next(place for place, kind in enumerate(self.kinds) if kind.key == REFERENCE)

    def attempt(self, place: int, function: Callable[[], float | None]) -> float | None:
        """Call a function for a design and return what it returns; None, where the design fails now or has failed."""
        outcomes = [outcome for key, outcome in self.outcomes.items() if key[0] == place]
        if outcomes[0].error is not None:
            return None
        try:
            return function()
        except Exception as error:  # any design's any failure is a result
            for outcome in outcomes:
                outcome.error = describe(error)
        self.designs.pop(place, None)
        gc.collect()
        return None

    def make(self, place: int, kind: type[Any]) -> None:
        """Make a design, and have it do a window and a step, which allocate what it keeps."""
        design = kind(kind.cast(Weights(self.shapes, self.device)))
        design.begin()
        self.designs[place] = design
        self.accumulate(design)
        design.end(*ENDS["step"])

    def accumulate(self, design: Design) -> None:
        """Have a design accumulate a window."""
        for grads in self.grads:
            torch.autograd.backward(design.params, grads)

    def measure_memory(self, key: tuple[int, str]) -> None:
        """Note what a design holds at the end of a window, and what ending it takes beyond that."""
        design, outcome = self.designs[key[0]], self.outcomes[key]
        self.accumulate(design)
        design.end(*ENDS[key[1]])
        self.accumulate(design)
        outcome.held_bytes = design.held_bytes()
        with AllocatorMeter(self.device) as meter:
            design.end(*ENDS[key[1]])
        outcome.peak_bytes = meter.peak_bytes[-1]

    def time(self, key: tuple[int, str]) -> float:
        """Return the milliseconds of ending a window."""
        design = self.designs[key[0]]
        self.accumulate(design)
        return timed(partial(design.end, *ENDS[key[1]]), self.device)

    def time_copy(self) -> float:
        """Return how many GB/s a copy of an FP32 tensor reads and writes now: a shared machine's memory has moods."""
        source = torch.ones(sum(grad.numel() for grad in self.grads[0]), device=self.device)
        target = torch.zeros_like(source)
        return 2 * source.nbytes / 1e6 / timed(partial(target.copy_, source), self.device)

    def result(self, outcome: Outcome) -> dict[str, Any]:
        """Return what was measured of a design and a way to end a window."""
        made: dict[str, Any] = {
            "numel": sum(grad.numel() for grad in self.grads[0]),
            "tensors": len(self.shapes),
            "design": outcome.design.key,
            "label": outcome.design.label,
            "bucket_bytes": getattr(outcome.design, "bucket", None),
            "end": outcome.end,
            "copy_gb_per_s": statistics.median(self.copy_gb_per_s),
        }
        if outcome.error is not None:
            return made | {"error": outcome.error}
        made |= {**quantiles(outcome.milliseconds), "held_bytes": outcome.held_bytes, "peak_bytes": outcome.peak_bytes}
        return made | ({"over_fp32_masters": summary(outcome.over)} if outcome.over else {})


def with_bucket(mebibytes: int) -> type[InsideWeights]:
    """Return the design of masters inside the weights, with a bucket of its own size."""
    return type(f"Bucket{mebibytes}", (InsideWeights,), {"bucket": mebibytes * 2**20})


def main() -> None:
    """Measure weights in many tensors and in one, and write the file."""
    options = parser(__doc__)
    options.add_argument("--weights", help="how many, as 2^25, a multiple of 2^20 (default: 2^25; on a GPU 2^28)")
    arguments = options.parse_args()
    device = torch.device(arguments.device)
    rounds = 3 if arguments.quick else 21
    numel = parse_size(arguments.weights or ("2^21" if arguments.quick else WEIGHTS[arguments.device]))
    if numel % SIDE**2 or numel == SIDE**2:
        options.error(f"--weights is {numel}; it must be two or more times {SIDE**2}")
    results: list[dict[str, Any]] = []
    buckets = [with_bucket(mebibytes) for mebibytes in BUCKETS_MIB]
    many: list[tuple[int, ...]] = [(SIDE, SIDE)] * (numel // SIDE**2)
    cases: list[tuple[list[tuple[int, ...]], list[type[Any]]]] = [(many, buckets), ([(numel,)], [])]
    for shapes, more in cases:
        with steps(f"step, {len(shapes)} tensors") as on_step:
            results += Measurement(shapes, [*DESIGNS, *more], device).results(rounds, on_step)
    method = {
        "how": "all designs and ends by turns, one at a time, forwards and backwards; wall time of everything between "
        "two windows, on a GPU until it is done",
        "rounds": rounds,
        "optimizer": "torch.optim.AdamW(fused=True)",
        "window": f"{MICRO_BATCHES} bf16 micro-gradients, accumulated before the clock starts",
        "stock bf16": "_foreach_div_ for the mean, clip_grad_norm_, step, zero_grad",
        "stock fp32 + masters": "FP32 sums in one flat buffer, mean and clipping by grad_scale in the fused AdamW of "
        "FP32 copies, _foreach_copy_ to the weights, zeroing of the sums; no step hooks",
        "accumkern": "attach(master_weights=...), finish() where there is a mean or clipping, step, zero_grad",
        "ratio": "over stock fp32 + masters with the same end in the same round: median, and the interval that holds "
        "it with the confidence that stands in the file",
        "held": "at the end of a window, counted from tensors; a CPU keeps the bucket of FP32 weights and gradients "
        "from step to step",
        "peak": "the most that is allocated at any time from there until the next window, less what was held",
        "copy": "reads and writes of copy_ between two FP32 tensors of as many elements, once a round: median",
        "backend": backends.choose(None, device),
    }
    write_results(arguments, "step", method, results)


if __name__ == "__main__":
    main()
