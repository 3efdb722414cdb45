"""Host time: of the hook, of training where launches decide, of the end of a window, and of a step."""

from __future__ import annotations

from tables.parts import NOT_MEASURED, Content, Result, grouped, interval, number, paragraph, spread, table

# Kinds of models whose backward pass is timed for each parameter.
MODELS = {
    "bare": "gradients by one autograd node",
    "eager": "transformer",
    "compiled": "transformer, `torch.compile`d",
}
TRAINING, FINISH = "Training with tiny micro-batches", "The end of a window of small tensors"
# Models whose step is timed: accumkern's of bfloat16 weights with masters, beside torch's of FP32 weights.
STEPS = {
    "step": "AdamW's step of small tensors, with masters in bfloat16 weights",
    "step, fully_shard": "The same under `fully_shard`",
}
CLOCKS = {"host": "host time", "done": "until the GPU has finished"}  # on a CPU there is one


def overhead_tables(content: Content) -> list[str]:
    """Return tables: of stock's time and what each backend adds, by model; of training, ``finish()`` and steps."""
    lines = paragraph(
        "Host time of `backward()`, in µs per parameter and micro-batch: stock, and what each backend of accumkern "
        "adds to it (median of the differences, 20th and 80th percentile in brackets; negative: faster than stock)."
    )
    by_model = grouped(content["results"], "model")
    for model, title in MODELS.items():
        results = by_model.get(model)
        if results is None:
            lines += paragraph(f"**{title}**: {NOT_MEASURED}.")
            continue
        variants = list(dict.fromkeys(r["variant"] for r in results if r["variant"] != "stock"))
        rows = []
        for count, of_count in grouped(results, "parameters").items():
            by_variant = {r["variant"]: r for r in of_count}
            stock = by_variant["stock"]
            shown = stock["error"] if "error" in stock else number(stock["us_per_parameter"])
            rows.append([f"{count:,}", shown, *(_over_stock(by_variant.get(v), True) for v in variants)])
        lines += [f"**{title}**", "", *table(["parameters", "stock", *variants], rows)]
    lines += _compared(by_model.get("training", []), TRAINING, ("stock",))
    lines += _compared(by_model.get("finish", []), FINISH, ("clip_grad_norm_", "_foreach_div_, clip_grad_norm_"))
    for model, title in STEPS.items():
        lines += _compared(by_model.get(model, []), title, ("foreach, FP32", "fused, FP32"))
    return lines


def overhead_summary(content: Content) -> list[str]:
    """Return what the backend that accumkern chooses adds to each kind of model, and its time in training."""
    backend = content["method"]["backend"]
    mine = [r for r in content["results"] if r["variant"] == backend]
    hook = [r for r in mine if r["model"] in MODELS]
    rows = []
    for count, results in grouped(hook, "parameters").items():
        by_model = {r["model"]: r for r in results}
        rows.append([f"{count:,}", *(_over_stock(by_model.get(model), False) for model in MODELS)])
    lines = paragraph(
        "Host time that accumkern adds to a backward pass of many small parameters, in µs per parameter and "
        "micro-batch (negative: faster than stock):"
    )
    lines += table(["parameters", *MODELS.values()], rows)
    training = [r for r in mine if r["model"] == "training" and "stock" in r.get("over", {})]
    ratios = [f"{interval(r['over']['stock'])} for a {timed}" for timed, r in _timed(training)]
    return lines + (paragraph(f"{TRAINING}: time over stock bf16 {', '.join(ratios)}.") if ratios else [])


def _compared(results: list[Result], title: str, references: tuple[str, ...]) -> list[str]:
    """Return a table of times, and of their ratios to those of the references in the same rounds."""
    if not results:
        return paragraph(f"{title}: {NOT_MEASURED}.")
    rows = []
    for timed, result in _timed(results):
        name = f"`{result['variant']}`" if result["variant"] in references else f"**{result['variant']}**"
        over = (interval(result.get("over", {}).get(reference)) for reference in references)
        rows.append([name, str(result["parameters"]), timed, result.get("error") or spread(result), *over])
    header = ["variant", "tensors", "timed", "time", *(f"/ `{reference}`" for reference in references)]
    return [f"**{title}**", "", *table(header, rows)]


def _timed(results: list[Result]) -> list[tuple[str, Result]]:
    """Return each result behind what was timed, and by which clock where there are two."""
    clocks = {r["clock"] for r in results if "clock" in r}
    return [
        (", ".join([r["stretch"], *([CLOCKS[r["clock"]]] if len(clocks) > 1 else [])]) if "clock" in r else "", r)
        for r in results
    ]


def _over_stock(result: Result | None, with_spread: bool) -> str:
    if result is None or "over_stock_us" not in result:
        return result.get("error", "") if result else ""
    text = f"{result['over_stock_us']:+.1f}"
    if with_spread:
        text += f" ({result['over_stock_p20_us']:+.1f} to {result['over_stock_p80_us']:+.1f})"
    return text
