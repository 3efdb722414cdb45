"""A weight's gradient and its accumulation."""

from __future__ import annotations

from itertools import groupby

from tables.parts import Content, Result, host_time, number, on_cpu, paragraph, table, taken

PRODUCT = "product"


def product_tables(content: Content) -> list[str]:
    """Return a table of all ways for each shape."""
    with_host = not on_cpu(content)
    lines = paragraph(
        "The gradient of a weight, a product in bf16, and its addition to a sum: by torch, by a split24 fold, or "
        "within the product (`torch.addmm(sum, a, b, out_dtype=torch.float32, out=sum)`, and on CUDA a kernel in "
        "Triton, `benchmarks/product_kernels.py`), which takes a linear layer of its own. *More* is the time beyond "
        "that of the product."
    )
    for shape, results in _by_shape(content):
        rows = []
        for result in results:
            name = result["variant"]
            if result["backend"] != "torch":
                name = f"**{name}, {result['backend']}**"
            if "tile" in result:
                name = f"{name} ({result['tile']})"
            if "error" in result:
                rows.append([name, result["error"], "", "", *[""] * with_host])
            else:
                rows.append([name, taken(result), *_beyond(result), *[host_time(result)] * with_host])
        headings = [f"operation, {shape}", "time", "more", "/ product", *["host time of a call"] * with_host]
        lines += table(headings, rows)
    return lines


def product_summary(content: Content) -> list[str]:
    """Return the times over that of the product as a sentence for each shape; of several tiles, the fastest one's."""
    backend = content["method"]["backend"]
    lines = []
    for shape, results in _by_shape(content):
        fastest: dict[str, Result] = {}
        for result in results:
            if "over_product" in result and (result["backend"] in ("torch", backend) or "tile" in result):
                name = result["variant"].removeprefix("product, ")
                fastest[name] = min(result, fastest.get(name, result), key=lambda r: float(r["over_product"]))
        if any(r["backend"] == backend for r in fastest.values()):
            ways = "; ".join(f"{name} {r['over_product']:.2f}" for name, r in fastest.items())
            lines += paragraph(
                f"The gradient of a weight of {shape} and its addition to a sum, over the time of the product alone: "
                f"{ways}."
            )
    return lines


def _by_shape(content: Content) -> list[tuple[str, list[Result]]]:
    """Return (a shape in words, its results) for each shape."""
    found = groupby(content["results"], lambda r: f"{r['rows']} x {r['columns']} over {r['inner']:,} tokens")
    return [(shape, list(results)) for shape, results in found]


def _beyond(result: Result) -> list[str]:
    if "more_ms" not in result:
        return ["", ""]
    sign = "-" if result["more_ms"] < 0 else ""
    return [f"{sign}{number(1e3 * abs(result['more_ms']))} µs", f"{result['over_product']:.3f}"]
