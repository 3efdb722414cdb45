"""The tables and sentences of every benchmark, in Markdown: each is a function of a result file's content.

docs/benchmarks.md shows them by :data:`SECTIONS`; the README's lines are in ``headlines.py``. To add a benchmark is to
add its section here, its schema in ``schemas/``, and a figure in ``figures.py`` if it has one. Nothing needs torch.
"""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

Content = dict[str, Any]  # of a result file: provenance, method, results
Result = dict[str, Any]


@dataclass(frozen=True)
class Section:
    """What is shown of a benchmark.

    Attributes:
        title: its heading in docs/benchmarks.md.
        full: all tables, for docs/benchmarks.md and the terminal.
        summary: the few lines at the head of the machine there; None leaves it out.
    """

    title: str
    full: Callable[[Content], list[str]]
    summary: Callable[[Content], list[str]] | None = None


# ---- what tables are made of -------------------------------------------------------------------------------------


def table(header: list[str], rows: list[list[str]], numbers: bool = True) -> list[str]:
    """Return a table and an empty line behind it; columns but the first stand to the right if they are numbers."""
    marks = ["---", *["---:" if numbers else "---"] * (len(header) - 1)]
    return [*("| " + " | ".join(cells) + " |" for cells in (header, marks, *rows)), ""]


def paragraph(text: str) -> list[str]:
    """Return prose as lines of the width that the repository keeps to, with an empty line behind it."""
    return [*textwrap.wrap(text, 120, break_long_words=False, break_on_hyphens=False), ""]


def number(value: float) -> str:
    """Return a number to two or three digits: ``1,234``, ``12.3``, ``1.23``, ``0.012``."""
    if value >= 100:
        return f"{value:,.0f}"
    if value >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if value >= 0.1 or value == 0 else f"{value:.2g}"


def spread(result: Result) -> str:
    """Return a result's median, and in brackets its 20th and 80th percentile, with their unit."""
    unit, scale = ("ms", 1.0) if result["median_ms"] >= 0.1 else ("µs", 1e3)
    median, low, high = (number(scale * result[key]) for key in ("median_ms", "p20_ms", "p80_ms"))
    return f"{median} {unit} ({low}-{high})"


def interval(found: Result | None) -> str:
    """Return a ratio's median, and in brackets the interval that holds it; nothing where there is none."""
    return f"{found['median']:.3f} ({found['low']:.3f}-{found['high']:.3f})" if found else ""


def number_of_tensors(number: Hashable) -> str:
    """Return a number of tensors in words."""
    return "1 tensor" if number == 1 else f"{number} tensors"


def fastest(results: list[Result]) -> Result | None:
    """Return the result of the smallest median, or None where none was measured."""
    return min((r for r in results if "median_ms" in r), key=lambda r: float(r["median_ms"]), default=None)


def grouped(results: list[Result], *keys: str) -> dict[Hashable, list[Result]]:
    """Return the results by their value of a key, or by the tuple of their values of several keys."""
    groups: dict[Hashable, list[Result]] = {}
    for result in results:
        values = tuple(result[key] for key in keys)
        groups.setdefault(values[0] if len(keys) == 1 else values, []).append(result)
    return groups


# ---- kernels -----------------------------------------------------------------------------------------------------

COPY = "bf16.copy_(bf16)"
# The cases that the summary shows, where they were measured.
SUMMARY_CASES = ("2^20", "2^25", "2^28", "GPT-2", "Llama-1B", "Llama-8B")
# What the summary shows of stock PyTorch, each by its fastest variant.
STOCK = {
    "stock, bf16 sum": ("bf16.add_(bf16)", "_foreach_add_(bf16, bf16)"),
    "stock, fp32 sum": ("fp32.add_(bf16)", "fp32.add_(bf16.float())", "_foreach_add_(fp32, bf16)"),
    "stock, fp32 sum, `torch.compile`d": ("torch.compile(fp32 += bf16)",),
    "`copy_`, which adds nothing": (COPY,),
}


def kernels_tables(content: Content) -> list[str]:
    """Return a table for each case of the kernel benchmark."""
    lines = paragraph(
        "One fold of a tensor, or of all tensors of a model. The time is the median, with the 20th and 80th percentile "
        "in brackets. GB/s counts the bytes that the operation has to move, and the roof is a `copy_` of as many "
        "elements in one piece. Ratios are to split24, on the backend that accumkern chooses here, in its faster call."
    )
    for case, results in grouped(content["results"], "case").items():
        tensors = results[0]["tensors"]
        elements = f"{results[0]['numel']:,} elements"
        lines += [f"**{case}**: {elements} in {tensors} tensors" if tensors > 1 else f"**{case}**: {elements}", ""]
        rows = []
        for result in results:
            name = _name(result) + (f", {result['called']}" if tensors > 1 else "")
            if "error" in result:
                rows.append([name, "", result["error"], "", ""])
            else:
                gb_per_s = number(result["gb_per_s"])
                rows.append([name, _over_split24(result), spread(result), gb_per_s, _of_copy(result)])
        lines += table(["operation", "time / split24", "time", "GB/s", "of `copy_` bandwidth"], rows)
    return lines


def kernels_summary(content: Content) -> list[str]:
    """Return what it takes to add a micro-gradient, over split24."""
    cases = {case: results for case, results in grouped(content["results"], "case").items() if case in SUMMARY_CASES}
    single = [case for case, results in cases.items() if results[0]["tensors"] == 1]
    if not single:
        return []
    largest = single[-1]
    names = {
        f"**{buffer}**": (f"{buffer} {content['method']['backend']}",) for buffer in ("split24", "split32", "fp32")
    }
    best: dict[str, dict[Hashable, Result | None]] = {
        name: {case: fastest([r for r in results if r["variant"] in variants]) for case, results in cases.items()}
        for name, variants in (names | STOCK).items()
    }
    lines = []
    split24, stock_fp32, stock_bf16 = (best[n][largest] for n in ("**split24**", "stock, fp32 sum", "stock, bf16 sum"))
    if split24 and stock_fp32 and stock_bf16:
        lines += paragraph(
            f"A split24 fold of {split24['numel']:,} elements is **{number(_ratio(stock_fp32, split24))} times** as "
            "fast as stock PyTorch's addition to an FP32 sum, takes "
            f"{number(_ratio(split24, stock_bf16))} times as long as its addition in bf16, and reaches "
            f"**{_of_copy(split24)}** of `copy_` bandwidth. The table has times over split24's: above 1 is slower than "
            "split24, below 1 is faster."
            + (
                " A fraction above 1 says that `copy_` itself stays below what this memory gives."
                if split24.get("fraction_of_copy", 0) > 1
                else ""
            )
        )
    rows = [
        [name, *(_over_split24(found) for found in by_case.values()), _of_copy(by_case[largest])]
        for name, by_case in best.items()
    ]
    header = [str(case) + (" elements" if case in single else "") for case in cases]
    return lines + table(["to add a micro-gradient", *header, f"of `copy_` bandwidth, {largest}"], rows)


def _name(result: Result) -> str:
    return f"`{result['variant']}`" if result["buffer"] is None else f"**{result['variant']}**"


def _ratio(result: Result, other: Result) -> float:
    return float(result["median_ms"] / other["median_ms"])


def _over_split24(result: Result | None) -> str:
    return number(result["time_over_split24"]) if result and "time_over_split24" in result else ""


def _of_copy(result: Result | None) -> str:
    return f"{result['fraction_of_copy']:.2f}" if result and "fraction_of_copy" in result else ""


# ---- the end of a window -----------------------------------------------------------------------------------------


def finish_tables(content: Content) -> list[str]:
    """Return a table for each size: the end of a window, and what a fold that measures costs."""
    lines = paragraph(
        "Mean, norm, clip and round of bf16 gradients by `finish()`; stock is `_foreach_div_` and `clip_grad_norm_`. "
        "And a split24 fold without, and with the squared norms that `stats=True` asks for (*measured*)."
    )
    for numel, results in grouped(content["results"], "numel").items():
        rows = []
        for result in results:
            name = result["variant"] if result["backend"] == "torch" else f"**{result['variant']}**"
            ratio = number(result["time_over_stock"]) if "time_over_stock" in result else ""
            rows.append([name, ratio, result["error"] if "error" in result else spread(result)])
        lines += [f"**{numel:,} elements**", "", *table(["operation", "time / stock", "time"], rows)]
    return lines


def finish_summary(content: Content) -> list[str]:
    """Return the end of a window as a sentence."""
    numel = max(result["numel"] for result in content["results"])
    of_size = {r["variant"]: r for r in content["results"] if r["numel"] == numel and "error" not in r}
    needed = [of_size.get(name) for name in ("stock", "finish split24", "fold split24", "fold split24, measured")]
    if None in needed:
        return []
    stock, finish, fold, measured = (result for result in needed if result)
    return paragraph(
        f"Mean, norm, clip and round of {numel:,} elements: `finish()` takes **{number(_ratio(finish, stock))}** of "
        "the time of `_foreach_div_` and `clip_grad_norm_`. A fold that takes squared norms, for `stats=True`, takes "
        f"{number(_ratio(measured, fold))} times as long as one that does not."
    )


# ---- host overhead -----------------------------------------------------------------------------------------------

MODELS = {
    "bare": "gradients by one autograd node",
    "eager": "transformer",
    "compiled": "transformer, `torch.compile`d",
}


def overhead_tables(content: Content) -> list[str]:
    """Return a table for each kind of model: stock's time, and what each backend adds."""
    lines = paragraph(
        "Host time of `backward()`, in µs per parameter and micro-batch: stock, and what each backend of accumkern "
        "adds to it (median of the differences, 20th and 80th percentile in brackets; negative: faster than stock)."
    )
    for model, results in grouped(content["results"], "model").items():
        variants = list(dict.fromkeys(r["variant"] for r in results if r["variant"] != "stock"))
        rows = []
        for count, of_count in grouped(results, "parameters").items():
            by_variant = {r["variant"]: r for r in of_count}
            stock = by_variant["stock"]
            shown = stock["error"] if "error" in stock else number(stock["us_per_parameter"])
            rows.append([f"{count:,}", shown, *(_over_stock(by_variant.get(v), True) for v in variants)])
        lines += [f"**{MODELS[str(model)]}**", "", *table(["parameters", "stock", *variants], rows)]
    return lines


def overhead_summary(content: Content) -> list[str]:
    """Return what the backend that accumkern chooses adds to each kind of model."""
    backend = content["method"]["backend"]
    mine = [r for r in content["results"] if r["variant"] == backend]
    models = list(grouped(mine, "model"))
    rows = []
    for count, results in grouped(mine, "parameters").items():
        by_model = {r["model"]: r for r in results}
        rows.append([f"{count:,}", *(_over_stock(by_model.get(model), False) for model in models)])
    return [
        *paragraph(
            "Host time that accumkern adds to a backward pass of many small parameters, in µs per parameter and "
            "micro-batch (negative: faster than stock):"
        ),
        *table(["parameters", *(MODELS[str(model)] for model in models)], rows),
    ]


def _over_stock(result: Result | None, with_spread: bool) -> str:
    if result is None or "over_stock_us" not in result:
        return result.get("error", "") if result else ""
    text = f"{result['over_stock_us']:+.1f}"
    if with_spread:
        text += f" ({result['over_stock_p20_us']:+.1f} to {result['over_stock_p80_us']:+.1f})"
    return text


# ---- accuracy ----------------------------------------------------------------------------------------------------

SUMMARY_MICRO_BATCHES = (8, 64, 512)


def accuracy_tables(content: Content) -> list[str]:
    """Return a table for each kind of gradients: the error of the sum that is kept, and of ``.grad``."""
    lines = paragraph(
        "Relative L2 error of the sum of N bf16 micro-gradients against their FP64 sum: of what is kept between "
        "micro-batches, and of `.grad`, which the optimizer reads and which bf16 cannot hold closer than 1.7e-03."
    )
    for ratio, results in grouped(content["results"], "mean_over_std").items():
        for key, what in (("error_of_sum", "the sum that is kept"), ("error_of_grad", "`.grad` in bf16")):
            lines += [f"**Mean / standard deviation of a gradient about {ratio:g}: {what}**", ""]
            lines += _errors(results, key, sorted({r["micro_batches"] for r in results}))
    return lines


def accuracy_summary(content: Content) -> list[str]:
    """Return the error of the sums that are kept."""
    lines = paragraph("Relative L2 error of the sum of N bf16 micro-gradients, against FP64:")
    results = [r for r in content["results"] if r["micro_batches"] in SUMMARY_MICRO_BATCHES]
    for ratio, of_ratio in grouped(results, "mean_over_std").items():
        counts = sorted({r["micro_batches"] for r in of_ratio})
        lines += _errors(of_ratio, "error_of_sum", counts, f"micro-gradients of mean / std {ratio:g}")
    return lines


def _errors(results: list[Result], key: str, counts: list[int], corner: str = "accumulator") -> list[str]:
    rows = []
    for accumulator, of_accumulator in grouped(results, "accumulator").items():
        errors = {r["micro_batches"]: r[key] for r in of_accumulator}
        rows.append([str(accumulator), *(f"{errors[count]:.0e}" for count in counts)])
    return table([corner, *(f"N = {count}" for count in counts)], rows)


# ---- training ----------------------------------------------------------------------------------------------------

SURE = 0.9  # intervals of less confidence prove nothing
OVER = {"stock_bf16": "/ stock bf16", "stock_fp32_masters": "/ stock fp32 + masters"}
STRETCHES = {"micro_batch": "micro-batch", "window": "window"}


def training_tables(content: Content) -> list[str]:
    """Return, for each regime, a table of time and one of memory, error and loss, and what the times prove."""
    lines = paragraph(
        "A GPT with bf16 weights, trained with every way of accumulating in one run, by turns. Designs with masters "
        "step FP32 weights, beside the bf16 ones or inside them, or instead of them (autocast): compare them with one "
        "another, and the others with one another. A "
        "micro-batch is forward, backward and accumulation; a window is all micro-batches and the step. Ratios are to "
        "the time of another design for the same micro-batch, or in the same round: the median, and an interval that "
        "holds it with 95 % confidence where there were enough rounds. MB is all that is allocated at the peak, bytes "
        "per weight are the gradients' share. In *error*, first the sum that is kept, then what AdamW reads."
    )
    for regime, results in grouped(content["results"], "regime").items():
        first = results[0]
        lines += paragraph(
            f"**{regime}**: {first['what']}. {first['parameters']:,} weights in {first['tensors']} tensors, "
            f"{first['micro_batches']} micro-batches of {first['batch_size']} x {first['context']} tokens."
        )
        measured = [r for r in results if "error" not in r]
        over = [key for key in OVER if any(key in r["window_over"] for r in measured)]
        time_rows, other_rows = [], []
        for result in sorted(results, key=lambda r: bool(r["masters"])):
            name = _design(result)
            if "error" in result:
                time_rows.append([name, result["error"], "", *("" for _ in range(2 * len(over)))])
                continue
            cells = [name]
            for stretch in STRETCHES:
                cells.append(spread(result[stretch]))
                cells += (interval(result[f"{stretch}_over"].get(key)) for key in over)
            time_rows.append(cells)
            size, error = result["gradient_bytes_per_parameter"], result["relative_error"]
            losses = result["validation_loss"]
            other_rows.append(
                [
                    name,
                    f"{result['peak_bytes'] / 1e6:,.0f}",
                    *(f"{size[key]:.2f}" for key in ("held", "peak", "in_step")),
                    f"{error['sum']:.0e}, {error['optimizer']:.0e}" if error else "keeps no gradient",
                    f"{statistics.median(losses):.4f} ({min(losses):.4f}-{max(losses):.4f})",
                ]
            )
        header = ["design"]
        for name in STRETCHES.values():
            header += [name, *(OVER[key] for key in over)]
        lines += table(header, time_rows)
        for key in over:
            for stretch in STRETCHES:
                lines += _verdict(measured, stretch, key)
        lines += table(
            ["design", "MB", "bytes / weight, held", "at the peak", "in the step", "error", "validation loss"],
            other_rows,
        )
    return lines


def training_summary(content: Content) -> list[str]:
    """Return the regime of the closest comparison: time over stock, memory and error."""
    results = [r for r in grouped(content["results"], "regime").get("paired", []) if "error" not in r]
    if not any("stock_bf16" in r["window_over"] for r in results):
        return []
    first = results[0]
    rows = [
        [
            _design(result),
            *(interval(result[f"{stretch}_over"].get("stock_bf16")) for stretch in STRETCHES),
            f"{result['gradient_bytes_per_parameter']['peak']:.2f}",
            f"{result['peak_bytes'] / 1e6:,.0f}",
            f"{result['relative_error']['sum']:.0e}",
        ]
        for result in results
    ]
    return [
        *paragraph(
            f"Training a GPT with {first['parameters']:,} bf16 weights, {first['micro_batches']} micro-batches of "
            f"{first['batch_size'] * first['context']:,} tokens and a step, by turns. Time over stock bf16 "
            "for the same micro-batch, and for the window; median and interval:"
        ),
        *table(
            [
                "design",
                "micro-batch / stock bf16",
                "window / stock bf16",
                "gradient bytes / weight",
                "MB in all",
                "error of the sum",
            ],
            rows,
        ),
    ]


def _design(result: Result) -> str:
    return f"**{result['label']}**" if result["label"].startswith("accumkern") else str(result["label"])


def _verdict(results: list[Result], stretch: str, reference: str) -> list[str]:
    """Say which designs of accumkern are slower than another design, which are faster, and which cannot be told."""
    slower, faster, neither = "slower than", "faster than", "not to be told from"
    told: dict[str, list[str]] = {slower: [], faster: [], neither: []}
    for result in results:
        found = result[f"{stretch}_over"].get(reference)
        if found and _design(result).startswith("**"):
            told[_side(found, 1, slower, faster, neither)].append(str(result["label"]))
    to = next(r["label"] for r in results if r["design"] == reference)
    said = "; ".join(f"{which} {to}: {', '.join(labels)}" for which, labels in told.items() if labels)
    return paragraph(f"By the {STRETCHES[stretch]}, {said}.") if said else []


def _side(found: Result, middle: float, above: str, below: str, neither: str) -> str:
    """Return which word fits an interval that lies above or below a number, or that does not tell."""
    if found["confidence"] < SURE or found["low"] <= middle <= found["high"]:
        return neither
    return above if found["low"] > middle else below


# ---- the step ----------------------------------------------------------------------------------------------------

#: Key of ``held_bytes`` -> its name.
HELD = {
    "weights": "weights",
    "masters": "masters",
    "gradients": "gradients",
    "residuals": "their residuals",
    "optimizer_state": "optimizer state",
    "bucket": "bucket",
}
ALONE = "step"  # the end of a window without mean and clipping


def step_tables(content: Content) -> list[str]:
    """Return tables of time and memory for weights in many tensors and in one, and one of the sizes of buckets."""
    lines = paragraph(
        "Everything between two windows of bf16 weights with AdamW. *step* is the step and zeroing alone: the mean was "
        "taken before, by dividing the loss or with `average_over`. *mean* and *clip* are by `_foreach_div_` and "
        "`clip_grad_norm_` (stock bf16 and other packages), inside the fused AdamW (stock fp32 + masters), and by "
        "`finish()` (accumkern), which leaves them to the step in one pass where it is *deferred*. Ratios are to stock "
        "fp32 + masters with the same end in the same round: median and interval. Compare ratios, not times: designs "
        "were measured some at a time, and a shared machine's memory is faster at some times than at others."
    )
    for of_weights in grouped(content["results"], "tensors").values():
        lines += [f"{_of_weights(of_weights[0])}, while `copy_` went at {of_weights[0]['copy_gb_per_s']:.0f} GB/s", ""]
        designs = grouped([r for r in of_weights if r["bucket_bytes"] is None], "design")
        ends = list(dict.fromkeys(r["end"] for r in of_weights))
        rows = []
        for results in designs.values():
            cells = [_design(results[0])]
            if "error" in results[0]:  # then in all ends
                cells += _only(results[0]["error"], 2 * len(ends))
            else:
                for result in results:
                    cells += [spread(result), interval(result.get("over_fp32_masters"))]
            rows.append(cells)
        lines += table(["design", *(cell for end in ends for cell in (end, "/ fp32 + masters"))], rows)
        lines += _bytes_moved(of_weights)
        lines += _bytes_held(of_weights)
        swept = [r for r in of_weights if r["bucket_bytes"] is not None]
        if swept:
            lines += paragraph("By bytes of a bucket, the step alone:")
            lines += table(
                ["bucket", "step", "/ fp32 + masters", "MB held of it", "MB more at the peak"],
                [
                    [
                        f"{_design(r)}, {r['bucket_bytes'] // 2**20} MiB",
                        *(
                            _only(r["error"], 4)
                            if "error" in r
                            else [
                                spread(r),
                                interval(r.get("over_fp32_masters")),
                                f"{r['held_bytes']['bucket'] / 1e6:,.1f}",
                                f"{r['peak_bytes'] / 1e6:,.1f}",
                            ]
                        ),
                    ]
                    for r in swept
                ],
            )
    return lines


def step_summary(content: Content) -> list[str]:
    """Return the time of a step over that of FP32 masters, and the bytes of a weight."""
    results = [r for r in content["results"] if r["bucket_bytes"] is None and r["end"] == ALONE]
    rows: list[list[str]] = []
    buckets: dict[Hashable, float] = {}
    for of_design in grouped(results, "design").values():
        times = [r.get("error") or interval(r.get("over_fp32_masters")) or spread(r) for r in of_design]
        sizes = {r["tensors"]: r["held_bytes"] for r in of_design if "error" not in r}
        size = next(({**held, "bucket": 0} for held in sizes.values()), None)
        rows.append(
            [_design(of_design[0]), *times, f"{sum(size.values()) / of_design[0]['numel']:.1f}" if size else ""]
        )
        buckets |= {n: held["bucket"] / of_design[0]["numel"] for n, held in sizes.items() if held["bucket"]}
    kept = " and ".join(f"{size:.2f} more where they are {number_of_tensors(n)}" for n, size in buckets.items())
    return [
        *paragraph(
            f"A step of AdamW on {results[0]['numel']:,} bf16 weights and `zero_grad()`: time over that with "
            "FP32 sums and FP32 masters, median and interval, for weights in many tensors and in one. And the bytes "
            "that are held for a weight, gradients and states of AdamW included"
            + (f"; what a CPU keeps of the FP32 weights and gradients of a step in buckets is {kept}:" if kept else ":")
        ),
        *table(["design", *(number_of_tensors(n) for n in grouped(results, "tensors")), "bytes / weight"], rows),
    ]


def _only(cell: str, columns: int) -> list[str]:
    """Return cells of which the first says something."""
    return [cell, *[""] * (columns - 1)]


def _of_weights(result: Result) -> str:
    return f"**{result['numel']:,} weights in {number_of_tensors(result['tensors'])}**"


def _bytes_moved(results: list[Result]) -> list[str]:
    """Return the table of the bytes that designs in one pass move, and at which bandwidth beside that of a fold."""
    moving = [r for r in results if "of_fold_bandwidth" in r]
    if not moving:
        return []
    by_design = grouped(moving, "design").values()
    ends = list(dict.fromkeys(r["end"] for r in moving))
    rows = []
    for of_design in by_design:
        cells = [(str(r["moved_bytes"]), number(r["gb_per_s"]), interval(r["of_fold_bandwidth"])) for r in of_design]
        rows.append([_design(of_design[0]), *(cell for of_end in cells for cell in of_end)])
    return [
        *paragraph(
            "What is stepped in one pass: bytes for a weight that all passes of an end have to read and write, their "
            "bandwidth, and that over the bandwidth of a split24 fold of the gradients in the same round, "
            f"{number(moving[0]['fold_gb_per_s'])} GB/s in the median:"
        ),
        *table(["design", *(c for end in ends for c in (f"{end}: bytes", "GB/s", "of a fold's bandwidth"))], rows),
    ]


def _bytes_held(results: list[Result]) -> list[str]:
    """Return the table of what each design holds for a weight at the end of a window, and what its step adds."""
    rows = []
    for of_design in grouped([r for r in results if r["bucket_bytes"] is None and "error" not in r], "design").values():
        result = next(r for r in of_design if r["end"] == ALONE)
        sizes = [result["held_bytes"][key] / result["numel"] for key in HELD]
        peak = max(r["peak_bytes"] for r in of_design) / result["numel"]
        rows.append([_design(result), *(f"{size:.2f}" for size in [*sizes, sum(sizes), peak])])
    return [
        *paragraph(
            "Bytes for a weight that are held at the end of a window, and the most that any end of it allocates beyond "
            "that. The bucket is the FP32 weights and gradients of a step in buckets, which a CPU keeps for the next "
            "one:"
        ),
        *table(["design", *HELD.values(), "in all", "more at the peak"], rows),
    ]


# ---- convergence -------------------------------------------------------------------------------------------------


COMPARED_WITH = "stock_fp32_masters"  # the design that the others' losses are compared with


def convergence_tables(content: Content) -> list[str]:
    """Return for each learning rate a table of losses and one of differences, and say where they differ."""
    to = _reference_label(content)
    lines = paragraph(
        "Validation loss after the same number of tokens, from the same FP32 weights, as far as a design can hold "
        "them, on the same text: the median over the seeds, with the least and the greatest. Then the difference to "
        f"the loss of {to} with the same seed: its median, and an interval that holds it with the confidence below."
    )
    for rate, results in grouped(content["results"], "learning_rate").items():
        lines += [f"**Learning rate {rate:g}: validation loss**", "", *_by_count(results, _loss)]
        lines += [f"**Learning rate {rate:g}: less that of {to}**", "", *_by_count(results, _difference)]
    return lines + _differences(content)


def convergence_summary(content: Content) -> list[str]:
    """Return the differences, and which of them can be told from zero."""
    results = content["results"]
    seeds = max(len(r.get("validation_loss", [])) for r in results)
    tokens = max(r["tokens"] for r in results)
    lines = paragraph(
        f"Validation loss of a small GPT after {tokens:,} tokens with N micro-batches in a window, less that of "
        f"{_reference_label(content)} with the same seed: median of {seeds} seeds and interval."
    )
    for rate, of_rate in grouped(results, "learning_rate").items():
        lines += _by_count(of_rate, _difference, f"learning rate {rate:g}")
    return lines + _differences(content)


def _reference_label(content: Content) -> str:
    return next(str(r["label"]) for r in content["results"] if r["design"] == COMPARED_WITH)


def _by_count(results: list[Result], show: Callable[[Result], str], corner: str = "design") -> list[str]:
    """Return a table with a row for each design and a column for each N."""
    steps = {r["micro_batches"]: r["steps"] for r in results}
    rows = []
    for of_design in grouped(results, "design").values():
        found = {r["micro_batches"]: r.get("error") or show(r) for r in of_design}
        rows.append([_design(of_design[0]), *(found[count] for count in steps)])
    return table([corner, *(f"N = {count}, {number} steps" for count, number in steps.items())], rows)


def _loss(result: Result) -> str:
    losses = result["validation_loss"]
    return f"{result['median_loss']:.4f} ({min(losses):.4f}-{max(losses):.4f})"


def _difference(result: Result) -> str:
    found = result.get("difference")
    if found is None:
        return f"its loss: {result['median_loss']:.4f}" if result["design"] == COMPARED_WITH else ""
    return f"{found['median']:+.5f} ({found['low']:+.5f} to {found['high']:+.5f})"


def _differences(content: Content) -> list[str]:
    """Say plainly where the loss of a design can be told from that of the reference, and where it cannot."""
    to = _reference_label(content)
    compared = [r for r in content["results"] if "difference" in r]
    lines = []
    for label, results in grouped(compared, "label").items():
        words = ("higher than", "lower than", "not to be told from")
        told: dict[str, dict[float, list[str]]] = {word: {} for word in words}
        for result in results:
            of_word = told[_side(result["difference"], 0, *words)]
            of_word.setdefault(result["learning_rate"], []).append(str(result["micro_batches"]))
        said = [
            f"{word} that of {to} at "
            + " and ".join(f"N = {', '.join(counts)} (learning rate {rate:g})" for rate, counts in of_word.items())
            for word, of_word in told.items()
            if of_word
        ]
        lines += paragraph(f"{label}: the loss is {'; '.join(said)}.")
    if compared:
        confidence = min(r["difference"]["confidence"] for r in compared)
        by_chance = sum(1 - r["difference"]["confidence"] for r in compared)
        lines += paragraph(
            f"Each interval has a confidence of {confidence:.0%}: of {len(compared)}, about {by_chance:.0f} would "
            "leave out zero by chance where nothing differs."
        )
    return lines


# ---- registers ---------------------------------------------------------------------------------------------------


def reduce_tables(content: Content) -> list[str]:
    """Return the table of the mean over ranks."""
    method, results = content["method"], content["results"]
    rows = [
        [
            str(r["processes"]),
            r["variant"],
            f"{r['error_of_grad']:.1e}",
            spread(r),
            f"{r['median_ms'] / of['median_ms']:.2f}",
        ]
        for group in grouped(results, "processes").values()
        for of in group
        if of["variant"] == "stock"
        for r in group
    ]
    return [
        *paragraph(
            f"Mean over ranks of {results[0]['numel']:,} bf16 gradient elements, each the sum of "
            f"{method['micro_batches']} micro-batches ({method['backend']}): relative L2 error against FP64, and the "
            "backward pass that reduces."
        ),
        *table(["processes", "accumulation", "error of `.grad`", "reducing backward pass", "time / stock"], rows),
    ]


def reduce_summary(content: Content) -> list[str]:
    """Return the sentence about the most processes."""
    results = content["results"]
    most = max(result["processes"] for result in results)
    of = {result["variant"]: result for result in results if result["processes"] == most}
    stock, mine = of["stock"], of["split24, reduce_in_fp32"]
    return paragraph(
        f"Mean over {most} ranks ({content['method']['backend']}): error of `.grad` {stock['error_of_grad']:.1e} with "
        f"stock DistributedDataParallel, **{mine['error_of_grad']:.1e}** with `reduce_in_fp32`, in "
        f"{mine['median_ms'] / stock['median_ms']:.2f} times the time of the reducing backward pass."
    )


def registers_tables(content: Content) -> list[str]:
    """Return a table of the registers that each GPU kernel takes."""
    rows = []
    for result in content["results"]:
        if "error" in result:
            rows.append([f"{result['backend']}, {result['architecture']}", result["error"], "", ""])
        else:
            name = f"{result['backend']}, {result['architecture']}: {result['kernel']}, {result['format']}"
            rows.append([name, *(str(result[key]) for key in ("registers", "stack_bytes", "spill_instructions"))])
    return [
        *paragraph(
            "The machine code of the GPU kernels, compiled ahead of time: registers of a thread, and what does not fit "
            "there (stack bytes of a thread, loads and stores of them)."
        ),
        *table(["kernel", "registers", "stack bytes", "spill instructions"], rows),
    ]


#: Benchmark, which is also the name of its result file -> what is shown of it, in this order.
SECTIONS = {
    "kernels": Section("One fold of a gradient", kernels_tables, kernels_summary),
    "accuracy": Section("Error of the sum", accuracy_tables, accuracy_summary),
    "finish": Section("The end of a window", finish_tables, finish_summary),
    "overhead": Section("Host time of the hook", overhead_tables, overhead_summary),
    "training": Section("Training", training_tables, training_summary),
    "step": Section("The step", step_tables, step_summary),
    "convergence": Section("Convergence", convergence_tables, convergence_summary),
    "reduce": Section("The mean over ranks", reduce_tables, reduce_summary),
    "registers": Section("Registers of the GPU kernels", registers_tables),
}
