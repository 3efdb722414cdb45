"""A weight's gradient and its accumulation."""

from __future__ import annotations

from tables.parts import Content, Result, host_time, number, on_cpu, paragraph, table, taken

PRODUCT = "product"


def product_tables(content: Content) -> list[str]:
    """Return the table of all ways."""
    first, with_host = content["results"][0], not on_cpu(content)
    rows = []
    for result in content["results"]:
        name = result["variant"]
        if result["backend"] != "torch":
            name = f"**{name}, {result['backend']}**"
        if "error" in result:
            rows.append([name, result["error"], "", "", *[""] * with_host])
        else:
            rows.append([name, taken(result), *_beyond(result), *[host_time(result)] * with_host])
    return [
        *paragraph(
            f"The gradient of a weight of {first['rows']} x {first['columns']}, a product in bf16 over "
            f"{first['inner']:,} tokens, and its addition to a sum: by torch, by a split24 fold, or within the product "
            "(`torch.addmm(sum, a, b, out_dtype=torch.float32, out=sum)`), which takes a linear layer of its own. "
            "*More* is the time beyond that of the product."
        ),
        *table(["operation", "time", "more", "/ product", *["host time of a call"] * with_host], rows),
    ]


def product_summary(content: Content) -> list[str]:
    """Return the times over that of the product as a sentence."""
    measured = [r for r in content["results"] if "over_product" in r]
    backend = content["method"]["backend"]
    shown = [r for r in measured if r["backend"] in ("torch", backend)]
    if not any(r["backend"] == backend for r in shown):
        return []
    first = content["results"][0]
    ways = "; ".join(f"{r['variant'].removeprefix('product, ')} {r['over_product']:.2f}" for r in shown)
    return paragraph(
        f"The gradient of a weight of {first['rows']} x {first['columns']} over {first['inner']:,} tokens and its "
        f"addition to a sum, over the time of the product alone: {ways}."
    )


def _beyond(result: Result) -> list[str]:
    if "more_ms" not in result:
        return ["", ""]
    sign = "-" if result["more_ms"] < 0 else ""
    return [f"{sign}{number(1e3 * abs(result['more_ms']))} µs", f"{result['over_product']:.3f}"]
