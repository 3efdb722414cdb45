"""Host time of the hook."""

from __future__ import annotations

from tables.parts import Content, Result, grouped, number, paragraph, table

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
