"""A whole optimizer step of bfloat16 weights: stock, with masters beside the weights or in them, and others' ways.

``python benchmarks/bench_step.py [--device cpu|cuda] [--quick] [--weights 2^25]``

AdamW. Every design (``step_designs.py``) accumulates the same window of micro-gradients, which is not timed, and then
ends it: by the step alone, by the mean and the step, or by the mean, clipping and the step; ``zero_grad()`` is part of
all of them. Weights are one tensor, or many. What each design holds at the end of a window is counted from its tensors,
and what its step allocates beyond that by the allocator. A fold of the same gradients is timed in each round, whose
bandwidth that of a step in one pass is compared with. Writes ``benchmarks/results/<machine>/step.json`` whenever some
designs are done, those of torch and accumkern alone first.
"""

from __future__ import annotations

import gc
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # from a checkout, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import torch
from bench_kernels import parse_size
from harness import parser, steps, write_growing
from paired import quantiles, summary
from provenance import version_of
from step_designs import DESIGNS, BesideWeights, Design, is_installed, package_of, stored_bytes, with_bucket
from timing import describe
from torch import nn

from accumkern import backends
from accumkern.formats import Format, Start
from measure import AllocatorMeter, timed

WEIGHTS = {"cpu": "2^25", "cuda": "2^28"}
ROUNDS = {"cpu": 21, "cuda": 11}  # times on a GPU vary less
SIDE = 1024  # of each of many tensors
MICRO_BATCHES = 2  # of a window: the second leaves residuals
MAX_NORM = 1.0
BUCKETS_MIB = (2, 8, 32, 128)
REFERENCE = BesideWeights.key  # what the others are compared with
AT_A_TIME = 4  # designs that hold their memory beside that of the reference
# What has taken this time is left out of further rounds, after MIN_ROUNDS.
SECONDS_EACH = {"cpu": 4.0, "cuda": 1.0}
MIN_ROUNDS = 6  # the fewest that give an interval of 95 %
#: By what they need beside torch, designs are measured in this order: whatever ends the script takes what matters less.
PACKAGES = (None, "flashoptim", "bf16_fused_adam", "bitsandbytes", "torchao")
COMPILED = "torchao"  # its steps take long to compile, and are slow: no more than MIN_ROUNDS of them

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


@dataclass
class Outcome:
    """What was measured of a design and a way to end a window."""

    design: type[Any]
    end: str
    milliseconds: list[float] = field(default_factory=list)
    over: list[float] = field(default_factory=list)
    of_fold: list[float] = field(default_factory=list)
    moved_bytes: int | None = None
    held_bytes: dict[str, int] | None = None
    peak_bytes: int = 0
    error: str | None = None

    def has_had_its_time(self, seconds: float) -> bool:
        """Return whether it is not measured any more, where each has so many seconds."""
        return len(self.milliseconds) >= MIN_ROUNDS and sum(self.milliseconds) > 1e3 * seconds


class Measurement:
    """The designs on weights of some shapes."""

    def __init__(self, shapes: list[tuple[int, ...]], designs: list[type[Any]], device: torch.device) -> None:
        self.shapes, self.device = shapes, device
        self.numel = sum(prod(shape) for shape in shapes)
        self.outcomes = {
            (place, end): Outcome(design, end)
            for place, design in enumerate(designs)
            for end in (ENDS if design.__dict__.get("bucket") is None else ["step"])
        }
        self.kinds = designs
        self.copy_gb_per_s: list[float] = []
        self.fold_gb_per_s: list[float] = []
        self.designs: dict[int, Any] = {}
        generator = torch.Generator(device).manual_seed(1)
        self.grads = [
            [(1e-3 * torch.randn(s, generator=generator, device=device)).bfloat16() for s in shapes]
            for _ in range(MICRO_BATCHES)
        ]

    def measure(self, rounds: int, on_step: Callable[[int, int], None]) -> list[Outcome]:
        """Measure memory and then time, and return an outcome for each design and way to end a window."""
        for place, kind in enumerate(self.kinds):
            self.attempt(place, partial(self.make, place, kind))
        for key in self.outcomes:
            self.attempt(key[0], partial(self.measure_memory, key))
        for number in range(rounds):
            on_step(number, rounds)
            self.copy_gb_per_s.append(self.time_copy())
            self.fold_gb_per_s.append(self.time_fold())
            seconds = SECONDS_EACH[self.device.type]
            order = [key for key, outcome in self.outcomes.items() if not outcome.has_had_its_time(seconds)]
            order = order if number % 2 == 0 else order[::-1]
            milliseconds = {key: found for key in order if (found := self.attempt(key[0], partial(self.time, key)))}
            for key, found in milliseconds.items():
                self.note_time(self.outcomes[key], found)
                reference = milliseconds.get((self.place_of_reference(), key[1]))
                if reference and key[0] != self.place_of_reference():
                    self.outcomes[key].over.append(found / reference)
        return list(self.outcomes.values())

    def note_time(self, outcome: Outcome, milliseconds: float) -> None:
        """Note the time of an end, and its bandwidth over that of this round's fold."""
        outcome.milliseconds.append(milliseconds)
        if outcome.moved_bytes is not None:
            outcome.of_fold.append(outcome.moved_bytes * self.numel / 1e6 / milliseconds / self.fold_gb_per_s[-1])

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
        outcome.moved_bytes = design.moved_bytes(*ENDS[key[1]])
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
        source = torch.ones(self.numel, device=self.device)
        target = torch.zeros_like(source)
        return 2 * source.nbytes / 1e6 / timed(partial(target.copy_, source), self.device)

    def time_fold(self) -> float:
        """Return how many GB/s a split24 fold of all gradients in one call reads and writes now."""
        fold = backends.kernels(backends.choose(None, self.device)).fold
        sums = [torch.zeros_like(grad) for grad in self.grads[0]]
        residuals = [torch.zeros_like(grad, dtype=Format.SPLIT24.residual_dtype) for grad in self.grads[0]]
        run = partial(fold, Format.SPLIT24, Start.CONTINUE, self.grads[0], sums, residuals, 1.0, None)
        run()  # compiles, and maps the memory
        moved = self.grads[0][0].element_size() + 2 * stored_bytes("split24")
        return moved * self.numel / 1e6 / timed(run, self.device)

    def result(self, outcome: Outcome) -> dict[str, Any]:
        """Return what was measured of a design and a way to end a window."""
        made: dict[str, Any] = {
            "numel": self.numel,
            "tensors": len(self.shapes),
            "design": outcome.design.key,
            "label": outcome.design.label,
            "bucket_bytes": getattr(outcome.design, "bucket", None),
            "end": outcome.end,
            "copy_gb_per_s": statistics.median(self.copy_gb_per_s),
            "fold_gb_per_s": statistics.median(self.fold_gb_per_s),
        }
        if outcome.error is not None:
            return made | {"error": outcome.error}
        made |= {**quantiles(outcome.milliseconds), "held_bytes": outcome.held_bytes, "peak_bytes": outcome.peak_bytes}
        if outcome.moved_bytes is not None:
            made["moved_bytes"] = outcome.moved_bytes
            made["gb_per_s"] = outcome.moved_bytes * self.numel / 1e6 / made["median_ms"]
            made["of_fold_bandwidth"] = summary(outcome.of_fold)
        return made | ({"over_fp32_masters": summary(outcome.over)} if outcome.over else {})


@dataclass(frozen=True)
class Case:
    """Weights, and the designs that are measured on them."""

    shapes: list[tuple[int, ...]]
    designs: list[type[Any]]

    def groups(self, package: str | None) -> Iterator[list[type[Any]]]:
        """Yield the designs that need a package, as many as are measured at a time, without the reference."""
        of_package = [d for d in self.designs if package_of(d) == package and d.key != REFERENCE]
        for first in range(0, len(of_package), AT_A_TIME):
            yield of_package[first : first + AT_A_TIME]

    def measured(
        self, group: list[type[Any]], device: torch.device, rounds: int, on_step: Callable[[int, int], None]
    ) -> dict[type[Any], list[dict[str, Any]]]:
        """Measure some designs beside the one that they are compared with; return the results of each."""
        reference = next(design for design in self.designs if design.key == REFERENCE)
        measurement = Measurement(self.shapes, [reference, *group], device)
        found: dict[type[Any], list[dict[str, Any]]] = {}
        for outcome in measurement.measure(rounds, on_step):
            found.setdefault(outcome.design, []).append(measurement.result(outcome))
        return found


def measured(
    cases: list[Case], device: torch.device, rounds: int, on_step: Callable[[int, int], None]
) -> Iterator[list[dict[str, Any]]]:
    """Measure the designs of all cases, some at a time, in the order of their packages.

    Yields:
        All results until then, in the order of cases and designs, whenever there are more.
    """
    packages = dict.fromkeys([*PACKAGES, *(package_of(design) for case in cases for design in case.designs)])
    groups = [(case, group) for package in packages for case in cases for group in case.groups(package)]
    found: list[dict[type[Any], list[dict[str, Any]]]] = [{} for _ in cases]
    for number, (case, group) in enumerate(groups):
        is_compiled = package_of(group[0]) == COMPILED

        def tell(done: int, of: int, before: int = number) -> None:
            on_step(before * of + done, len(groups) * of)

        more = case.measured(group, device, min(rounds, MIN_ROUNDS) if is_compiled else rounds, tell)
        place = cases.index(case)
        found[place] = more | found[place]  # the reference's results are those beside the first group
        yield [r for case, of in zip(cases, found, strict=True) for kind in case.designs for r in of.get(kind, [])]


def says(design: type[Design]) -> str:
    """Return what a design does, and the version of the package that it is of."""
    package = package_of(design)
    return design.what if package is None else f"of {package} {version_of(package) or ''}: {design.what}"


def main() -> None:
    """Measure weights in many tensors and in one, and write the file."""
    options = parser(__doc__)
    options.add_argument("--weights", help="how many, as 2^25, a multiple of 2^20 (default: 2^25; on a GPU 2^28)")
    arguments = options.parse_args()
    device = torch.device(arguments.device)
    rounds = 3 if arguments.quick else ROUNDS[arguments.device]
    numel = parse_size(arguments.weights or ("2^21" if arguments.quick else WEIGHTS[arguments.device]))
    if numel % SIDE**2 or numel == SIDE**2:
        options.error(f"--weights is {numel}; it must be two or more times {SIDE**2}")
    designs = [design for design in DESIGNS if is_installed(design)]
    left_out = sorted({str(package_of(design)) for design in DESIGNS if not is_installed(design)})
    buckets = [with_bucket(mebibytes) for mebibytes in BUCKETS_MIB]
    many: list[tuple[int, ...]] = [(SIDE, SIDE)] * (numel // SIDE**2)
    cases = [Case(many, [*designs, *buckets]), Case([(numel,)], designs)]
    method = {
        "how": f"{AT_A_TIME} designs beside the one that they are compared with, and their ends, by turns, one at a "
        "time, forwards and backwards; wall time of everything between two windows, on a GPU until it is done",
        "rounds": rounds,
        "fewer rounds": f"{MIN_ROUNDS} or more of what has taken {SECONDS_EACH[device.type]:g} seconds, and of "
        f"what {COMPILED} compiles",
        "optimizer": "torch.optim.AdamW(fused=True) where no other one is named",
        "window": f"{MICRO_BATCHES} bf16 micro-gradients, accumulated before the clock starts",
        **{design.label: says(design) for design in designs},
        "not installed": ", ".join(left_out) or "nothing that is compared",
        "ratio": "over stock fp32 + masters with the same end in the same round: median, and the interval that holds "
        "it with the confidence that stands in the file",
        "held": "at the end of a window, counted from tensors; a CPU keeps the bucket of FP32 weights and gradients "
        "from step to step",
        "of a fold's bandwidth": "bytes that the passes of an end have to read and write, over its time; and the same "
        "of a split24 fold of the gradients in one call, once in each round",
        "peak": "the most that is allocated at any time from there until the next window, less what was held",
        "copy": "reads and writes of copy_ between two FP32 tensors of as many elements, once a round: median",
        "backend": backends.choose(None, device),
    }
    with steps("step") as on_step:
        write_growing(arguments, "step", method, measured(cases, device, rounds, on_step))


if __name__ == "__main__":
    main()
