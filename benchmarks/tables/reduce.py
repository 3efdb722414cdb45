"""The mean over ranks."""

from __future__ import annotations

from tables.parts import Content, grouped, paragraph, spread, table


def reduce_tables(content: Content) -> list[str]:
    """Return the table of the mean over ranks."""
    method, results = content["method"], content["results"]
    rows = [
        [
            str(r["processes"]),
            r["variant"],
            f"{r['bytes_sent_per_element']:.2g}",
            f"{r['error_of_grad']:.1e}",
            f"{r['error_of_sum']:.1e}",
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
            f"{method['micro_batches']} micro-batches ({method['backend']}): bytes that a rank sends for an "
            "element, relative L2 error against FP64 of what the optimizer reads and of sum and residual together, and "
            "the backward pass that reduces."
        ),
        *table(
            [
                "processes",
                "accumulation",
                "bytes sent",
                "error of `.grad`",
                "with residual",
                "reducing backward pass",
                "time / stock",
            ],
            rows,
        ),
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
