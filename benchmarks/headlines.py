"""The lines of the README's table: one question each, and what the result files of a machine answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tables.convergence import COMPARED_WITH
from tables.kernels import STOCK
from tables.parts import (
    NOT_MEASURED,
    Content,
    Result,
    fastest,
    grouped,
    interval,
    millions,
    number,
    number_of_tensors,
    table,
)
from tables.step import ALONE

MICRO_BATCHES = 8  # of the losses that are shown: the middle of the three that are measured
# Designs whose losses and whose memory are shown, and what they are called.
LOSSES = {
    "stock_bf16": "stock bf16",
    "split24": "split24 sums alone",
    "split24_masters": "**master weights**",
    "autocast": "FP32 + autocast",
}
PEAKS = {
    "stock_bf16": "stock bf16",
    "split24": "split24 sums",
    "stock_fp32": "FP32 sums",
    "split24_masters": "**master weights**",
    COMPARED_WITH: "FP32 masters",
    "autocast": "FP32 + autocast",
}
# Designs of the step in one pass, and how they take mean and clipping.
STEPS = {"split24_masters": "`finish()`", "split24_masters_deferred": "`finish(defer=True)`"}
CLIPPED = "mean, clip, step"
# Regimes of training whose micro-batches are shown, and what they are.
REGIMES = {"paired": "large micro-batches", "launch": "tiny ones"}


@dataclass(frozen=True)
class Headline:
    """One line.

    Attributes:
        question: what was measured.
        benchmarks: whose result files answer.
        answer: makes the answer from the first file's content, or None, and others' if it takes them; None where no
            file has it.
    """

    question: str
    benchmarks: tuple[str, ...]
    answer: Callable[..., str | None]


def fold(content: Content) -> str | None:
    """Return how many times as fast as stock's FP32 addition a split24 fold of the largest tensor is."""
    single = [r for r in content["results"] if r["tensors"] == 1 and "error" not in r]
    largest = max((r["numel"] for r in single), default=0)
    mine, stock, compiled = (
        fastest([r for r in single if r["numel"] == largest and r["variant"] in variants])
        for variants in (
            (f"split24 {content['method']['backend']}",),
            STOCK["stock, fp32 sum"],
            STOCK["stock, fp32 sum, `torch.compile`d"],
        )
    )
    if mine is None or stock is None:
        return None
    said = f"**{number(stock['median_ms'] / mine['median_ms'])} times** as fast"
    if compiled is not None:
        said += f", {number(compiled['median_ms'] / mine['median_ms'])} where stock's is `torch.compile`d"
    return f"{said} ({mine['case']} elements)"


def loss(content: Content) -> str | None:
    """Return the median validation losses at one N, for each learning rate."""
    results = [r for r in content["results"] if r["micro_batches"] == MICRO_BATCHES and "error" not in r]
    said = []
    for rate, of_rate in grouped(results, "learning_rate").items():
        losses = {r["design"]: f"{r['median_loss']:.3f}" for r in of_rate}
        said.append(f"learning rate {rate:g}: {_each(LOSSES, losses)}")
    if results and "parameters" in results[0]:
        said[0] = f"{millions(results[0])}, {said[0]}"
    return "<br>".join(said) or None


def step(content: Content) -> str | None:
    """Return the time of a step with master weights over that with FP32 masters: alone, and with mean and clipping.

    These are of the faster of both ways to take them.
    """
    measured = [r for r in content["results"] if r["bucket_bytes"] is None and "over_fp32_masters" in r]
    alone = [r for r in measured if r["design"] == "split24_masters" and r["end"] == ALONE]
    if not alone:
        return None
    said = ", ".join(f"{_over_masters(r)} for weights in {number_of_tensors(r['tensors'])}" for r in alone)
    clipped = grouped([r for r in measured if r["design"] in STEPS and r["end"] == CLIPPED], "design")
    if not clipped:
        return said
    design, results = min(clipped.items(), key=lambda found: found[1][0]["median_ms"])
    ratios = ", ".join(map(_over_masters, results))
    return f"{said}; with mean and clipping by {STEPS[str(design)]} {ratios}"


def training_time(training: Content | None, overhead: Content | None = None) -> str | None:
    """Return the time of a micro-batch with split24 sums over that of stock bf16.

    Tiny micro-batches are also part of the benchmark of host time: its answer is taken where the other has none.
    """
    found = {
        r["regime"]: interval(r["micro_batch_over"].get("stock_bf16"))
        for r in (training["results"] if training else [])
        if r["design"] == "split24" and "error" not in r
    }
    if overhead and "launch" not in found:
        backend = overhead["method"]["backend"]
        of_backend = [r for r in overhead["results"] if r["model"] == "training" and r["variant"] == backend]
        by_clock = {
            r["clock"]: r["over"]["stock"] for r in of_backend if r.get("stretch") == "micro-batch" and "over" in r
        }
        if by_clock:
            found["launch"] = interval(by_clock.get("done") or by_clock["host"])
    return _each(REGIMES, found) if found else None


def training_window(content: Content) -> str | None:
    """Return the time of a whole window, its step included, with master weights over that with FP32 masters."""
    over = [
        r["window_over"].get(COMPARED_WITH)
        for r in content["results"]
        if (r["regime"], r["design"]) == ("compute", "split24_masters") and "error" not in r
    ]
    return interval(over[0]) if over and over[0] else None


def training_memory(content: Content) -> str | None:
    """Return all that is allocated at the peak of training."""
    results = [r for r in content["results"] if r["regime"] == "compute" and "error" not in r]
    if not results:
        return None
    peaks = {r["design"]: f"{r['peak_bytes'] / 1e6:,.0f} MB" for r in results}
    return f"{_each(PEAKS, peaks)} ({_millions(results[0])} weights)"


def _over_masters(result: Result) -> str:
    return f"{result['over_fp32_masters']['median']:.2f}"


def _each(names: Mapping[str, str], values: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {values.get(key) or NOT_MEASURED}" for key, name in names.items())


def _millions(result: Result) -> str:
    return f"{result['parameters'] / 1e6:,.0f} million"


HEADLINES = (
    Headline("**A fold** of a micro-gradient, against stock's addition to an FP32 sum", ("kernels",), fold),
    Headline(f"**Loss** of a small GPT, {MICRO_BATCHES} micro-batches", ("convergence",), loss),
    Headline("**Step** of AdamW, time with master weights / FP32 masters", ("step",), step),
    Headline(
        "**Training**, time of a micro-batch with split24 sums / stock bf16", ("training", "overhead"), training_time
    ),
    Headline("**Training**, time of a window with master weights / FP32 masters", ("training",), training_window),
    Headline("**Training**, memory at the peak", ("training",), training_memory),
)


def headlines(results: Mapping[str, Mapping[str, Content]]) -> list[str]:
    """Return the table of all lines: a column for each machine.

    Args:
        results: machine's folder -> benchmark -> content of its result file.
    """
    machines = [next(iter(benchmarks.values()))["provenance"]["machine"] for benchmarks in results.values()]
    rows = []
    for line in HEADLINES:
        contents = [[benchmarks.get(name) for name in line.benchmarks] for benchmarks in results.values()]
        answers = [line.answer(*of_machine) if any(of_machine) else None for of_machine in contents]
        rows.append([line.question, *(answer or NOT_MEASURED for answer in answers)])
    return table(["", *machines], rows, numbers=False)
