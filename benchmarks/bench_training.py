"""Training with every way of accumulating gradients: time, memory, error and loss, side by side.

``python benchmarks/bench_training.py [--device cpu|cuda] [--quick] [--model 10M|100M|1B|3B] [--regimes compute,launch]``

A GPT with bfloat16 weights on the source text of Python's standard library; AdamW, gradients clipped to norm 1. Two
regimes: in ``compute`` the arithmetic of the model decides, in ``launch`` micro-batches are tiny and parameters small
and many. The designs are those of examples/designs.py. All train from the same weights on the same text and take turns,
so that whatever else the machine does slows down all of them. What fails in a design is its result, and the others go
on. Writes ``benchmarks/results/<machine>/training.json``.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]  # from a checkout, installed or not

import torch
from paired import summary
from provenance import machine, write_results
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from timing import describe, percentile
from torch import Tensor

from accumkern import backends
from designs import DESIGNS, LEARNING_RATE, StockBF16, StockBF16Masters, StockFP32Masters
from measure import Memory, measure_error, measure_memory, run_micro_batches, timed
from train_gpt import GPT, random_batch, read_text

MAX_NORM = 1.0
MEMORY_MICRO_BATCHES = 2  # the first keeps the gradient, the second allocates what is missing
VALIDATION_SEQUENCES = 64
REFERENCES = {False: StockBF16.key, True: StockFP32Masters.key}  # what designs without and with masters compare with


@dataclass(frozen=True)
class Regime:
    """What is trained.

    Attributes:
        batch_size: sequences of ``context`` bytes in a micro-batch.
        micro_batches: of a window.
        turn: micro-batches that a design runs until the next has its turn.
        windows: timed windows for each seed, after one that is not.
        seeds: of weights and text.
    """

    width: int
    layers: int
    heads: int
    context: int
    batch_size: int
    micro_batches: int
    turn: int
    windows: int
    seeds: int


# Weights -> width, layers, heads.
MODELS = {"10M": (320, 8, 5), "100M": (768, 14, 12), "1B": (2048, 20, 16), "3B": (2560, 38, 20)}
REGIMES = {
    "cpu": {
        "compute": Regime(*MODELS["10M"], context=64, batch_size=4, micro_batches=4, turn=1, windows=7, seeds=1),
        "launch": Regime(64, 16, 2, context=64, batch_size=1, micro_batches=8, turn=8, windows=4, seeds=3),
    },
    "cuda": {
        "compute": Regime(*MODELS["1B"], context=1024, batch_size=8, micro_batches=8, turn=1, windows=6, seeds=1),
        "launch": Regime(128, 24, 2, context=64, batch_size=1, micro_batches=8, turn=8, windows=4, seeds=3),
    },
}


@dataclass
class Outcome:
    """What was measured of one design in one regime.

    Attributes:
        window_over: by the key of another design, the time of each window over that of the other in the same round.
        error: what ended it.
    """

    memory: Memory | None = None
    micro_batch_ms: list[float] = field(default_factory=list)
    window_ms: list[float] = field(default_factory=list)
    window_over: dict[str, list[float]] = field(default_factory=dict)
    validation_losses: list[float] = field(default_factory=list)
    relative_error: dict[str, float] | None = None
    error: str | None = None


def main() -> None:
    """Measure every regime, print the tables and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--quick", action="store_true", help="a tiny model and few windows, to see that it runs")
    parser.add_argument("--model", choices=MODELS, help="weights in the compute regime (default: 10M; on a GPU 1B)")
    parser.add_argument("--regimes", default="compute,launch", help="default: compute,launch")
    parser.add_argument("--designs", default=",".join(DESIGNS), help=f"default: {','.join(DESIGNS)}")
    parser.add_argument("--batch-size", type=int, help="sequences in a micro-batch of the compute regime")
    parser.add_argument("--windows", type=int, help="timed windows for each seed")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    regimes = chosen_regimes(arguments)
    keys = arguments.designs.split(",")
    if unknown := set(keys) - set(DESIGNS):
        parser.error(f"--designs: {', '.join(sorted(unknown))} is unknown; there are {', '.join(DESIGNS)}")
    if unknown := set(arguments.regimes.split(",")) - set(regimes):
        parser.error(f"--regimes: {', '.join(sorted(unknown))} is unknown; there are {', '.join(REGIMES['cpu'])}")

    text = read_text()
    results: list[dict[str, Any]] = []
    console = Console(width=160)
    for name in arguments.regimes.split(","):
        of_regime = Measurement(regimes[name], keys, text, device).results(console)
        results += [{"regime": name, **result} for result in of_regime]
        console.print(table(name, regimes[name], device, results))
    method = {
        "regimes": {name: asdict(regimes[name]) for name in arguments.regimes.split(",")},
        "text": "source text of Python's standard library; its last twentieth is for validation",
        "optimizer": f"AdamW, lr {LEARNING_RATE}, gradients clipped to norm {MAX_NORM}",
        "order": "designs take turns of `turn` micro-batches in every window, in an order that changes each window",
        "micro_batch_ms": "forward, backward and accumulation; of the second and later micro-batches of a window",
        "window_ms": "all micro-batches and the step with clipping",
        "window_over": "time of a window over that of another design in the same round: median and its interval",
        "memory": "GPU: torch's caching allocator. CPU: allocations that torch.profiler records",
        "gradient_bytes_per_parameter": "held: after the last backward pass. peak: by how much the peak of a window "
        "exceeds that of a window that throws every gradient away. in_step: most after the last backward pass",
        "relative_error": "against the FP64 sum of the same micro-gradients over one window, from one checkpoint; "
        "sum: what is kept; optimizer: what AdamW would read, before clipping",
        "validation_loss": f"mean over {VALIDATION_SEQUENCES} sequences after all windows, one for each seed",
        "backend": backends.choose(None, device),
    }
    write_results(device, "training", method, results)


def chosen_regimes(arguments: argparse.Namespace) -> dict[str, Regime]:
    """Return the regimes of the device, with what the options change."""
    regimes = dict(REGIMES[arguments.device])
    if arguments.model:
        width, layers, heads = MODELS[arguments.model]
        regimes["compute"] = replace(regimes["compute"], width=width, layers=layers, heads=heads)
    if arguments.batch_size:
        regimes["compute"] = replace(regimes["compute"], batch_size=arguments.batch_size)
    if arguments.quick:
        tiny = {"width": 32, "layers": 2, "heads": 1, "context": 16, "windows": 2, "seeds": 1, "micro_batches": 4}
        regimes = {name: replace(regime, **tiny, turn=min(regime.turn, 4)) for name, regime in regimes.items()}
    if arguments.windows:
        regimes = {name: replace(regime, windows=arguments.windows) for name, regime in regimes.items()}
    return regimes


class Measurement:
    """Everything about one regime."""

    def __init__(self, regime: Regime, keys: list[str], text: Tensor, device: torch.device) -> None:
        self.regime = regime
        self.device = device
        cut = len(text) - len(text) // 20
        self.text, held_out = text[:cut], text[cut:]
        generator = torch.Generator().manual_seed(0)
        self.validation = random_batch(held_out, VALIDATION_SEQUENCES, generator, regime.context).to(device)
        self.outcomes = {key: Outcome() for key in dict.fromkeys([*REFERENCES.values(), *keys])}
        self.asked = keys
        parameters = list(self.new_model(0).parameters())
        self.numel, self.tensors = sum(param.numel() for param in parameters), len(parameters)

    def new_model(self, seed: int) -> GPT:
        """Return the model, with the weights that belong to ``seed``."""
        regime = self.regime
        torch.manual_seed(seed)
        with self.device:
            model = GPT(regime.width, regime.layers, regime.heads, regime.context)
        return model.to(torch.bfloat16)

    def new_design(self, key: str, seed: int) -> StockBF16:
        """Return a design with a model of its own."""
        return DESIGNS[key](self.new_model(seed), max_norm=MAX_NORM)

    def draw(self, count: int, generator: torch.Generator) -> list[Tensor]:
        """Return micro-batches."""
        regime = self.regime
        return [
            random_batch(self.text, regime.batch_size, generator, regime.context).to(self.device) for _ in range(count)
        ]

    def results(self, console: Console) -> list[dict[str, Any]]:
        """Measure, and return one result for each design."""
        regime = self.regime
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task("memory", total=len(self.outcomes) + 1)
            without = self.measure_memory(lambda: progress.advance(task))
            groups = list(self.groups())
            rounds = regime.seeds * (regime.windows + 1) * sum(map(len, groups))
            task = progress.add_task("training", total=rounds)
            checkpoint = None
            for group in groups:
                for seed in range(regime.seeds):
                    weights = self.train(group, seed, lambda: progress.advance(task))
                    checkpoint = checkpoint or weights
            task = progress.add_task("errors", total=len(self.outcomes))
            if checkpoint is not None:
                self.measure_errors(checkpoint, lambda: progress.advance(task))
        return [self.result(key, without) for key in self.asked]

    def alive(self) -> list[str]:
        """Return the designs that have not failed."""
        return [key for key, outcome in self.outcomes.items() if outcome.error is None]

    def attempt(self, key: str, action: Callable[[], None]) -> bool:
        """Do something with a design; its failure is its result. Return whether it went well."""
        try:
            action()
        except Exception as error:  # any design's any failure is a result
            self.outcomes[key].error = describe(error)
        else:
            return True
        self.tidy()
        return False

    def tidy(self) -> None:
        """Give back what designs that are gone held."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def measure_memory(self, advance: Callable[[], None]) -> Memory:
        """Measure each design alone; return what a window takes that throws gradients away."""
        batches = self.draw(MEMORY_MICRO_BATCHES, torch.Generator().manual_seed(0))
        without = measure_memory(lambda: self.new_design(StockBF16.key, 0), batches, self.device, keep=False)
        advance()
        for key, outcome in self.outcomes.items():

            def measure(key: str = key, outcome: Outcome = outcome) -> None:
                outcome.memory = measure_memory(lambda: self.new_design(key, 0), batches, self.device)

            self.attempt(key, measure)
            advance()
        self.tidy()
        return without

    def groups(self) -> Iterator[list[str]]:
        """Yield as many designs at a time as fit into memory, each time with the references."""
        memories = {key: memory for key in self.alive() if (memory := self.outcomes[key].memory)}
        references = [key for key in REFERENCES.values() if key in memories]

        def needed(keys: list[str]) -> int:
            held = sum(memories[key].resident + memories[key].held for key in keys)
            return held + max(memories[key].peak - memories[key].resident - memories[key].held for key in keys)

        limit = 0.9 * free_bytes(self.device)
        group = references
        for key in memories:
            if key in references:
                continue
            if len(group) > len(references) and needed([*group, key]) > limit:
                yield group
                group = references
            group = [*group, key]
        yield group

    def train(self, group: list[str], seed: int, advance: Callable[[], None]) -> dict[str, Tensor] | None:
        """Train designs side by side; return the weights that the first has reached, if it has."""
        regime = self.regime
        designs: dict[str, StockBF16] = {}
        for key in group:

            def begin(key: str = key) -> None:
                design = self.new_design(key, seed)
                design.begin()
                designs[key] = design

            self.attempt(key, begin)
        generator = torch.Generator().manual_seed(seed)
        for number in range(-1, regime.windows):
            batches = self.draw(regime.micro_batches, generator)
            order = list(designs)
            order = order[number % len(order) :] + order[: number % len(order)]
            times: dict[str, list[float]] = {key: [] for key in order}
            steps: dict[str, float] = {}
            for first in range(0, regime.micro_batches, regime.turn):
                numbers = range(first, min(first + regime.turn, regime.micro_batches))
                for key in order:
                    if key in designs:

                        def run(key: str = key, numbers: range = numbers) -> None:
                            times[key] += run_micro_batches(designs[key], batches, numbers)[1]

                        if not self.attempt(key, run):
                            del designs[key]
            for key in order:
                if key in designs:

                    def step(key: str = key) -> None:
                        steps[key] = timed(designs[key].step, self.device)

                    if not self.attempt(key, step):
                        del designs[key]
                advance()
            if number >= 0:  # the first allocates and compiles
                self.note({key: times[key] for key in designs}, steps)
        for key, design in designs.items():
            with torch.no_grad():
                self.outcomes[key].validation_losses.append(design.model(self.validation).item())
        weights = next(iter(designs.values())).model.state_dict() if designs else None
        designs.clear()
        self.tidy()
        return weights

    def note(self, times: dict[str, list[float]], steps: dict[str, float]) -> None:
        """Keep the times of a round."""
        windows = {key: sum(times[key]) + steps[key] for key in times}
        for key, window in windows.items():
            outcome = self.outcomes[key]
            outcome.micro_batch_ms += times[key][1:]
            outcome.window_ms.append(window)
            for reference in REFERENCES.values():
                if reference in windows and reference != key:
                    outcome.window_over.setdefault(reference, []).append(window / windows[reference])

    def measure_errors(self, checkpoint: dict[str, Tensor], advance: Callable[[], None]) -> None:
        """Measure how exact each design's sum is."""
        batches = self.draw(self.regime.micro_batches, torch.Generator().manual_seed(self.regime.seeds))
        for key in self.alive():

            def measure(key: str = key) -> None:
                model = self.new_model(0)
                model.load_state_dict(checkpoint)
                errors, _ = measure_error(DESIGNS[key](model), batches, len(batches))
                self.outcomes[key].relative_error = {name: errors[name] for name in ("sum", "optimizer")}

            if DESIGNS[key].keeps_gradient:
                self.attempt(key, measure)
                self.tidy()
            advance()

    def result(self, key: str, without: Memory) -> dict[str, Any]:
        """Return a design's result."""
        design, outcome = DESIGNS[key], self.outcomes[key]
        result = {
            "design": key,
            "label": design.label,
            "masters": design.masters,
            "parameters": self.numel,
            "tensors": self.tensors,
            "tokens_per_micro_batch": self.regime.batch_size * self.regime.context,
            "micro_batches": self.regime.micro_batches,
        }
        if outcome.error is not None or outcome.memory is None:
            return result | {"error": outcome.error}
        memory = outcome.memory
        beyond = (memory.peak - memory.resident) - (without.peak - without.resident)
        return result | {
            "micro_batch_ms": quantiles(outcome.micro_batch_ms),
            "window_ms": quantiles(outcome.window_ms),
            "window_over": {other: summary(ratios) for other, ratios in outcome.window_over.items()},
            "resident_bytes": memory.resident,
            "peak_bytes": memory.peak,
            "gradient_bytes_per_parameter": {
                "held": memory.held / self.numel,
                "peak": beyond / self.numel,
                "in_step": memory.peak_in_step / self.numel,
            },
            "relative_error": outcome.relative_error,
            "validation_loss": outcome.validation_losses,
        }


def free_bytes(device: torch.device) -> int:
    """Return the memory that is free on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def quantiles(values: list[float]) -> dict[str, float]:
    """Return median, 20th and 80th percentile and the number of values."""
    return {
        "median": statistics.median(values),
        "p20": percentile(values, 0.2),
        "p80": percentile(values, 0.8),
        "n": len(values),
    }


def table(name: str, regime: Regime, device: torch.device, results: list[dict[str, Any]]) -> Table:
    """Return the results of a regime as a table for the terminal."""
    shown = Table(
        title=f"{name}: {results[-1]['parameters']:,} weights in {results[-1]['tensors']} tensors, "
        f"{regime.micro_batches} micro-batches of {regime.batch_size} x {regime.context} tokens, {machine(device)}"
    )
    columns = ("design", "ms / micro-batch", "ms / window", "/ stock bf16", "/ stock fp32 + m.", "peak MB", "held B",
               "peak B", "step B", "sum off", "AdamW's off", "loss")  # fmt: skip
    for column in columns:
        shown.add_column(column, justify="left" if column == "design" else "right", no_wrap=column == "design")
    for result in results:
        if result["regime"] != name:
            continue
        if "error" in result:
            shown.add_row(result["label"], result["error"])
            continue
        size, error = result["gradient_bytes_per_parameter"], result["relative_error"]
        over = result["window_over"]
        shown.add_row(
            result["label"],
            f"{result['micro_batch_ms']['median']:.1f}",
            f"{result['window_ms']['median']:.1f}",
            *(
                f"{over[key]['median']:.3f} ({over[key]['low']:.3f}-{over[key]['high']:.3f})" if key in over else ""
                for key in REFERENCES.values()
            ),
            f"{result['peak_bytes'] / 1e6:,.0f}",
            *(f"{size[key]:.2f}" for key in ("held", "peak", "in_step")),
            *(f"{error[key]:.1e}" if error else "-" for key in ("sum", "optimizer")),
            f"{statistics.median(result['validation_loss']):.4f}",
        )
    return shown


if __name__ == "__main__":
    main()
