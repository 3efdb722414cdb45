"""Error of the sum."""

from __future__ import annotations

from tables.parts import Content, Result, grouped, paragraph, table

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
