"""The end of a window."""

from __future__ import annotations

from tables.parts import Content, grouped, host_time, number, on_cpu, paragraph, table, taken, times


def finish_tables(content: Content) -> list[str]:
    """Return a table for each size: the end of a window, and what a fold that measures costs."""
    lines = paragraph(
        "Mean, norm, clip and round of bf16 gradients by `finish()`; stock is `_foreach_div_` and `clip_grad_norm_`. "
        "And a split24 fold without, and with the squared norms that `stats=True` asks for (*measured*)."
    )
    with_host = any(r.get("host_ms") for r in content["results"])
    if not with_host and not on_cpu(content):
        lines += paragraph("Not measured here: host time of a call.")
    for numel, results in grouped(content["results"], "numel").items():
        header = ["operation", "time / stock", "time", *["host time of a call"] * with_host]
        rows = []
        for result in results:
            name = result["variant"] if result["backend"] == "torch" else f"**{result['variant']}**"
            ratio = number(result["time_over_stock"]) if "time_over_stock" in result else ""
            shown = result["error"] if "error" in result else taken(result)
            rows.append([name, ratio, shown, *[host_time(result)] * with_host])
        lines += [f"**{numel:,} elements**", "", *table(header, rows)]
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
        f"Mean, norm, clip and round of {numel:,} elements: `finish()` takes **{number(times(finish, stock))}** of "
        "the time of `_foreach_div_` and `clip_grad_norm_`. A fold that takes squared norms, for `stats=True`, takes "
        f"{number(times(measured, fold))} times as long as one that does not."
    )
