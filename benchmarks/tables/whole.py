"""Whole gradients under fully_shard."""

from __future__ import annotations

from tables.parts import Content, grouped, paragraph, spread, table


def whole_tables(content: Content) -> list[str]:
    """Return the table of whole gradients."""
    method, results = content["method"], content["results"]
    rows = [
        [
            str(r["processes"]),
            r["variant"],
            f"{r['held_bytes_per_parameter']:.2f}",
            f"{r['error_of_grad']:.1e}",
            f"{r['adding_median_ms']:.1f} ms",
            spread(r),
        ]
        for group in grouped(results, "processes").values()
        for r in group
    ]
    return [
        *paragraph(
            f"Whole bf16 gradients of {results[0]['numel']:,} parameters under `fully_shard`, reduced in the last of "
            f"{method['micro_batches']} micro-batches ({method['backend']}): bytes held for each parameter of the "
            "model on every rank before that, relative L2 error of `.grad` against FP64, and the backward passes."
        ),
        *table(
            ["processes", "accumulation", "bytes", "error of `.grad`", "backward pass", "reducing backward pass"], rows
        ),
    ]


def whole_summary(content: Content) -> list[str]:
    """Return the sentence about the most processes."""
    results = content["results"]
    most = max(result["processes"] for result in results)
    of = {result["variant"]: result for result in results if result["processes"] == most}
    low, wide, mine = of["stock, bfloat16"], of["stock, float32"], of["split24, reduce_in_fp32"]
    return paragraph(
        f"`fully_shard` on {most} ranks that reduces once for {content['method']['micro_batches']} micro-batches: "
        f"**{mine['held_bytes_per_parameter']:.0f}** bytes of whole gradients for each parameter and an error of "
        f"{mine['error_of_grad']:.1e} with `split24` and `reduce_in_fp32`; by itself "
        f"{wide['held_bytes_per_parameter']:.0f} bytes and {wide['error_of_grad']:.1e} in float32, "
        f"{low['held_bytes_per_parameter']:.0f} bytes and {low['error_of_grad']:.1e} in bfloat16."
    )
