"""Training with every way of accumulating gradients: time, memory, error and loss, side by side.

``python benchmarks/bench_training.py [--device cpu|cuda] [--quick] [--model 10M|100M|1B|3B] [--regimes launch]
[--designs stock_bf16,split24] [--windows 20]``

A GPT learns the source text of Python's standard library with AdamW, gradients clipped to norm 1. The designs are those
of examples/designs.py. They begin with the same FP32 weights, as far as they can hold them, see the same text and take
turns, so that whatever else the machine does slows down all of them. What fails in a design is its result, and the
others go on. Writes ``benchmarks/results/<machine>/training.json`` after each regime.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # from a checkout, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import torch
from harness import parser, steps, write_growing
from paired import quantiles, summary
from regimes import MAX_NORM, MODELS, REGIMES, Regime, adapted, names_of
from timing import describe
from torch import Tensor, nn

from accumkern import backends
from designs import DESIGNS, LEARNING_RATE, StockBF16, StockFP32Masters
from measure import Memory, measure_error, measure_memory, run_micro_batches, timed
from train_gpt import GPT, random_batch, read_text

Returned = TypeVar("Returned")

MEMORY_MICRO_BATCHES = 2  # the first keeps the gradient, the second allocates what is missing
VALIDATION_SEQUENCES = 64
# What every design is compared with: the fastest, and the strongest that is exact and has masters.
REFERENCES = (StockBF16.key, StockFP32Masters.key)


@dataclass
class Outcome:
    """What was measured of one design in one regime.

    Attributes:
        micro_batch_over: by the key of a reference, the time of each second or later micro-batch over the reference's.
        window_over: the same of windows.
        error: what ended it.
    """

    memory: Memory | None = None
    micro_batch_ms: list[float] = field(default_factory=list)
    window_ms: list[float] = field(default_factory=list)
    micro_batch_over: dict[str, list[float]] = field(default_factory=dict)
    window_over: dict[str, list[float]] = field(default_factory=dict)
    validation_losses: list[float] = field(default_factory=list)
    relative_error: dict[str, float] | None = None
    error: str | None = None


def main() -> None:
    """Measure every regime and write the file."""
    options = parser(__doc__)
    options.add_argument("--model", choices=MODELS, help="weights where not launches decide (10M; on a GPU 1B)")
    options.add_argument("--regimes", type=names_of(REGIMES["cpu"]), default=[*REGIMES["cpu"]], help="default: all")
    options.add_argument("--designs", type=names_of(DESIGNS), default=[*DESIGNS], help="default: all of the regime")
    options.add_argument("--windows", type=int, help="timed windows for each seed")
    arguments = options.parse_args()
    device = torch.device(arguments.device)
    method = {
        "text": "source text of Python's standard library; its last twentieth is for validation",
        "optimizer": f"AdamW, lr {LEARNING_RATE}, gradients clipped to norm {MAX_NORM:g}",
        "order": "in every window designs take turns, a micro-batch each (launch: all of a window); who begins changes",
        "micro-batch": "forward, backward and accumulation, of the second and later micro-batches of a window",
        "window": "all micro-batches and the step, which clips",
        "ratio": "over the other design's time for the same micro-batch, or for the window of the same round: median, "
        "and an interval that holds it with the confidence that stands in the file",
        "memory": "GPU: torch's caching allocator; CPU: allocations that torch.profiler records",
        "held": "gradient bytes after the last backward pass",
        "at the peak": "by how much the peak of a window exceeds that of a window that throws every gradient away",
        "error": "against the FP64 sum of the micro-gradients of a window, from one checkpoint, before clipping",
        "loss": f"of {VALIDATION_SEQUENCES} validation sequences after the last window, for each seed",
        "backend": backends.choose(None, device),
    }
    write_growing(arguments, "training", method, measured(arguments, device))


def measured(arguments: argparse.Namespace, device: torch.device) -> Iterator[list[dict[str, Any]]]:
    """Measure each regime; yield all results until then."""
    text, results = read_text(), list[dict[str, Any]]()
    for name in arguments.regimes:
        if (regime := adapted(REGIMES[arguments.device][name], arguments)).designs:
            with steps(f"training, {name}") as on_step:
                more = Measurement(regime, text, device, on_step).results()
            yield (results := [*results, *({"regime": name, **result} for result in more)])


class Measurement:
    """Everything about one regime."""

    def __init__(self, regime: Regime, text: Tensor, device: torch.device, on_step: Callable[[int, int], None]) -> None:
        self.regime = regime
        self.device = device
        cut = len(text) - len(text) // 20
        self.text, held_out = text[:cut], text[cut:]
        generator = torch.Generator().manual_seed(0)
        self.validation = random_batch(held_out, VALIDATION_SEQUENCES, generator, regime.context).to(device)
        self.outcomes = {key: Outcome() for key in regime.designs}
        self.checkpoint: dict[str, Tensor] | None = None
        parameters = list(self.new_model(StockBF16.key, 0).parameters())
        self.numel, self.tensors = sum(param.numel() for param in parameters), len(parameters)
        self.on_step = on_step
        self.done = 0

    def new_model(self, key: str, seed: int, weights: dict[str, Tensor] | None = None) -> nn.Module:
        """Return the model as a design trains it, with given weights or those that belong to ``seed``."""
        regime = self.regime
        torch.manual_seed(seed)
        with self.device:
            model = GPT(regime.width, regime.layers, regime.heads, regime.context)
        if weights is not None:
            model.load_state_dict(weights)
        return DESIGNS[key].cast(model)

    def new_design(self, key: str, seed: int) -> StockBF16:
        """Return a design with a model of its own."""
        return DESIGNS[key](self.new_model(key, seed), max_norm=MAX_NORM)

    def draw(self, count: int, generator: torch.Generator) -> list[Tensor]:
        """Return micro-batches."""
        regime = self.regime
        return [
            random_batch(self.text, regime.batch_size, generator, regime.context).to(self.device) for _ in range(count)
        ]

    def results(self) -> list[dict[str, Any]]:
        """Measure, and return one result for each design."""
        without = self.measure_memory()
        for group in self.groups():
            for seed in range(self.regime.seeds):
                self.train(group, seed)
        self.measure_errors()
        return [self.result(key, without) for key in self.outcomes]

    # ---- what fails ----------------------------------------------------------------------------------------------

    def attempt(self, key: str, function: Callable[[], Returned]) -> Returned | None:
        """Call a function for a design and return what it returns; None, where it has failed and that is the result."""
        try:
            return function()
        except Exception as error:  # any design's any failure is a result
            self.outcomes[key].error = describe(error)
        self.tidy()
        return None

    def alive(self) -> list[str]:
        """Return the designs that have not failed."""
        return [key for key, outcome in self.outcomes.items() if outcome.error is None]

    def tidy(self) -> None:
        """Give back what designs that are gone have held."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def progress(self) -> None:
        """Move the progress bar on."""
        regime = self.regime
        self.done += 1
        self.on_step(self.done, len(self.outcomes) * (2 + regime.seeds * (regime.windows + 1)))

    # ---- memory --------------------------------------------------------------------------------------------------

    def measure_memory(self) -> Memory:
        """Measure each design alone; return what a window takes that throws gradients away."""
        batches = self.draw(MEMORY_MICRO_BATCHES, torch.Generator().manual_seed(0))
        without = measure_memory(partial(self.new_design, StockBF16.key, 0), batches, self.device, keep=False)
        for key, outcome in self.outcomes.items():
            measure = partial(measure_memory, partial(self.new_design, key, 0), batches, self.device)
            outcome.memory = self.attempt(key, measure)
            self.tidy()
            self.progress()
        return without

    def groups(self) -> Iterator[list[str]]:
        """Yield as many designs at a time as fit into memory, each time with the references."""
        memories = {key: memory for key in self.alive() if (memory := self.outcomes[key].memory)}
        references = [key for key in REFERENCES if key in memories]

        def needed(keys: list[str]) -> int:
            held = {key: memories[key].resident + memories[key].held for key in keys}
            return sum(held.values()) + max(memories[key].peak - held[key] for key in keys)

        limit = 0.9 * free_bytes(self.device)
        group = references
        for key in memories:
            if key in references:
                continue
            if len(group) > len(references) and needed([*group, key]) > limit:
                yield group
                group = references
            group = [*group, key]
        if group:
            yield group

    # ---- time and loss -------------------------------------------------------------------------------------------

    def train(self, group: list[str], seed: int) -> None:
        """Train designs side by side, and keep their times and their loss at the end."""
        regime = self.regime
        begun = {key: self.attempt(key, partial(self.begun, key, seed)) for key in group}
        designs = {key: design for key, design in begun.items() if design is not None}
        begun.clear()
        generator = torch.Generator().manual_seed(seed)
        for number in range(-1, regime.windows):
            order = list(designs)
            first = number % len(order) if order else 0
            micro_batch_ms, window_ms = self.run_window(designs, order[first:] + order[:first], generator)
            if number >= 0:  # the first allocates and compiles
                self.keep(micro_batch_ms, window_ms)
        for key, design in designs.items():
            with torch.no_grad():
                loss = self.attempt(key, partial(design.model, self.validation))
            if loss is not None:
                self.outcomes[key].validation_losses.append(loss.item())
            self.checkpoint = self.checkpoint or design.model.state_dict()
        designs.clear()
        self.tidy()

    def begun(self, key: str, seed: int) -> StockBF16:
        """Return a design that is ready to accumulate."""
        design = self.new_design(key, seed)
        design.begin()
        return design

    def run_window(
        self, designs: dict[str, StockBF16], order: list[str], generator: torch.Generator
    ) -> tuple[dict[str, list[float]], dict[str, float]]:
        """Run a window of every design, by turns; a design that fails is taken out.

        Returns:
            The milliseconds of each design's micro-batches, and of its whole window.
        """
        regime = self.regime
        batches = self.draw(regime.micro_batches, generator)
        micro_batch_ms: dict[str, list[float]] = {key: [] for key in order}
        for first in range(0, len(batches), regime.turn):
            numbers = range(first, min(first + regime.turn, len(batches)))
            for key in [key for key in order if key in designs]:
                ran = self.attempt(key, partial(run_micro_batches, designs[key], batches, numbers))
                if ran is None:
                    del designs[key]
                else:
                    micro_batch_ms[key] += ran[1]
        window_ms: dict[str, float] = {}
        for key in order:
            self.progress()
            if key not in designs:
                continue
            step_ms = self.attempt(key, partial(timed, designs[key].step, self.device))
            if step_ms is None:
                del designs[key]
            else:
                window_ms[key] = sum(micro_batch_ms[key]) + step_ms
        return micro_batch_ms, window_ms

    def keep(self, micro_batch_ms: dict[str, list[float]], window_ms: dict[str, float]) -> None:
        """Keep the times of a round."""
        for key, window in window_ms.items():
            outcome, later = self.outcomes[key], micro_batch_ms[key][1:]
            outcome.micro_batch_ms += later
            outcome.window_ms.append(window)
            for reference in REFERENCES:
                if reference in window_ms and reference != key:
                    pairs = zip(later, micro_batch_ms[reference][1:], strict=True)
                    outcome.micro_batch_over.setdefault(reference, []).extend(mine / other for mine, other in pairs)
                    outcome.window_over.setdefault(reference, []).append(window / window_ms[reference])

    # ---- error ---------------------------------------------------------------------------------------------------

    def measure_errors(self) -> None:
        """Measure how exact each design's sum is, all from the weights that the first design has reached."""
        batches = self.draw(self.regime.micro_batches, torch.Generator().manual_seed(self.regime.seeds))
        for key in self.alive():
            if DESIGNS[key].keeps_gradient:
                self.outcomes[key].relative_error = self.attempt(key, partial(self.error_of, key, batches))
                self.tidy()
            self.progress()

    def error_of(self, key: str, batches: list[Tensor]) -> dict[str, float]:
        """Return the error of a design's sum, and of what AdamW would read."""
        model = self.new_model(key, 0, self.checkpoint)
        errors, _ = measure_error(DESIGNS[key](model), batches, len(batches))
        return {name: errors[name] for name in ("sum", "optimizer")}

    # ---- the result ----------------------------------------------------------------------------------------------

    def result(self, key: str, without: Memory) -> dict[str, Any]:
        """Return what was measured of a design."""
        regime, design, outcome = self.regime, DESIGNS[key], self.outcomes[key]
        result: dict[str, Any] = {
            "what": regime.what,
            "design": key,
            "label": design.label,
            "masters": design.masters,
            "parameters": self.numel,
            "tensors": self.tensors,
            "layers": regime.layers,
            "width": regime.width,
            "context": regime.context,
            "batch_size": regime.batch_size,
            "micro_batches": regime.micro_batches,
        }
        if outcome.error is not None or outcome.memory is None:
            return result | {"error": outcome.error}
        memory = outcome.memory
        at_peak = (memory.peak - memory.resident) - (without.peak - without.resident)
        return result | {
            "micro_batch": quantiles(outcome.micro_batch_ms),
            "micro_batch_over": {other: summary(ratios) for other, ratios in outcome.micro_batch_over.items()},
            "window": quantiles(outcome.window_ms),
            "window_over": {other: summary(ratios) for other, ratios in outcome.window_over.items()},
            "resident_bytes": memory.resident,
            "peak_bytes": memory.peak,
            "gradient_bytes_per_parameter": {
                "held": memory.held / self.numel,
                "peak": at_peak / self.numel,
                "in_step": memory.peak_in_step / self.numel,
            },
            "relative_error": outcome.relative_error,
            "validation_loss": outcome.validation_losses,
        }


def free_bytes(device: torch.device) -> int:
    """Return how much memory of a device is free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
