"""The step."""

from __future__ import annotations

from collections.abc import Hashable

from tables.parts import (
    Content,
    Result,
    design_name,
    grouped,
    interval,
    number,
    number_of_tensors,
    paragraph,
    spread,
    table,
)

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
            cells = [design_name(results[0])]
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
                        f"{design_name(r)}, {r['bucket_bytes'] // 2**20} MiB",
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
            [design_name(of_design[0]), *times, f"{sum(size.values()) / of_design[0]['numel']:.1f}" if size else ""]
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
        rows.append([design_name(of_design[0]), *(cell for of_end in cells for cell in of_end)])
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
        rows.append([design_name(result), *(f"{size:.2f}" for size in [*sizes, sum(sizes), peak])])
    return [
        *paragraph(
            "Bytes for a weight that are held at the end of a window, and the most that any end of it allocates beyond "
            "that. The bucket is the FP32 weights and gradients of a step in buckets, which a CPU keeps for the next "
            "one:"
        ),
        *table(["design", *HELD.values(), "in all", "more at the peak"], rows),
    ]
