"""Training with every way of accumulating."""

from __future__ import annotations

import statistics

from tables.parts import Content, Result, design_name, grouped, interval, paragraph, side_of, spread, table

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
            name = design_name(result)
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
                lines += verdict(measured, stretch, key)
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
            design_name(result),
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


def verdict(results: list[Result], stretch: str, reference: str) -> list[str]:
    """Say which designs of accumkern are slower than another design, which are faster, and which cannot be told."""
    slower, faster, neither = "slower than", "faster than", "not to be told from"
    told: dict[str, list[str]] = {slower: [], faster: [], neither: []}
    for result in results:
        found = result[f"{stretch}_over"].get(reference)
        if found and design_name(result).startswith("**"):
            told[side_of(found, 1, slower, faster, neither)].append(str(result["label"]))
    to = next(r["label"] for r in results if r["design"] == reference)
    said = "; ".join(f"{which} {to}: {', '.join(labels)}" for which, labels in told.items() if labels)
    return paragraph(f"By the {STRETCHES[stretch]}, {said}.") if said else []
