"""One fold of a gradient."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from tables.parts import (
    NOT_MEASURED,
    Content,
    Result,
    fastest,
    grouped,
    host_time,
    number,
    on_cpu,
    paragraph,
    table,
    taken,
    times,
)

COPY = "bf16.copy_(bf16)"
MUL = "torch.mul(bf16, 1, out=bf16)"
# The cases that the summary shows, where they were measured.
SUMMARY_CASES = ("2^20", "2^25", "2^28", "GPT-2", "Llama-1B", "Llama-8B")
# What the summary shows of stock PyTorch, each by its fastest variant.
STOCK = {
    "stock, bf16 sum": ("bf16.add_(bf16)", "_foreach_add_(bf16, bf16)"),
    "stock, fp32 sum": ("fp32.add_(bf16)", "fp32.add_(bf16.float())", "_foreach_add_(fp32, bf16)"),
    "stock, fp32 sum, `torch.compile`d": ("torch.compile(fp32 += bf16)",),
    "`copy_`, which adds nothing": (COPY,),
    "`torch.mul` by 1, which adds nothing": (MUL,),
}


HOST = "host time of a call"


def kernels_tables(content: Content) -> list[str]:
    """Return a table for each case of the kernel benchmark."""
    lines = paragraph(
        "One fold of a tensor, or of all tensors of a model. The time is the median, with the 20th and 80th percentile "
        "in brackets. GB/s counts the bytes that the operation has to move, and the roof is a `copy_` of as many "
        "elements in one piece. Ratios are to split24, on the backend that accumkern chooses here, in its faster call."
    )
    columns = {name: show for name, (key, show) in MORE.items() if any(r.get(key) for r in content["results"])}
    missing = [
        name.removeprefix("of ") for name in MORE if name not in columns and not (name == HOST and on_cpu(content))
    ]
    lines += paragraph(f"Not measured here: {', '.join(missing)}.") if missing else []
    for case, results in grouped(content["results"], "case").items():
        tensors = results[0]["tensors"]
        elements = f"{results[0]['numel']:,} elements"
        lines += [f"**{case}**: {elements} in {tensors} tensors" if tensors > 1 else f"**{case}**: {elements}", ""]
        rows = []
        for result in results:
            name = _name(result) + (f", {result['called']}" if tensors > 1 else "")
            if "error" in result:
                rows.append([name, "", result["error"], "", "", *("" for _ in columns)])
                continue
            shown = [_over_split24(result), taken(result), number(result["gb_per_s"]), _of_copy(result)]
            rows.append([name, *shown, *(show(result) for show in columns.values())])
        lines += table(["operation", "time / split24", "time", "GB/s", "of `copy_` bandwidth", *columns], rows)
    return lines


def kernels_summary(content: Content) -> list[str]:
    """Return what it takes to add a micro-gradient, over split24."""
    cases = {case: results for case, results in grouped(content["results"], "case").items() if case in SUMMARY_CASES}
    single = [case for case, results in cases.items() if results[0]["tensors"] == 1]
    if not single:
        return []
    largest = single[-1]
    names = {
        f"**{buffer}**": (f"{buffer} {content['method']['backend']}",) for buffer in ("split24", "split32", "fp32")
    }
    best: dict[str, dict[Hashable, Result | None]] = {
        name: {case: fastest([r for r in results if r["variant"] in variants]) for case, results in cases.items()}
        for name, variants in (names | STOCK).items()
    }
    lines = []
    split24, stock_fp32, stock_bf16 = (best[n][largest] for n in ("**split24**", "stock, fp32 sum", "stock, bf16 sum"))
    if split24 and stock_fp32 and stock_bf16:
        lines += paragraph(
            f"A split24 fold of {split24['numel']:,} elements is **{number(times(stock_fp32, split24))} times** as "
            "fast as stock PyTorch's addition to an FP32 sum, takes "
            f"{number(times(split24, stock_bf16))} times as long as its addition in bf16, and reaches "
            f"**{_of_copy(split24)}** of `copy_` bandwidth. The table has times over split24's: above 1 is slower than "
            "split24, below 1 is faster."
            + (
                " A fraction above 1 says that `copy_` itself stays below what this memory gives."
                if split24.get("fraction_of_copy", 0) > 1
                else ""
            )
        )
    rows = []
    for name, by_case in best.items():
        if any(by_case.values()):
            cells = [*(_over_split24(found) for found in by_case.values()), _of_copy(by_case[largest])]
        else:
            cells = [NOT_MEASURED] * (len(by_case) + 1)
        rows.append([name, *cells])
    header = [str(case) + (" elements" if case in single else "") for case in cases]
    return lines + table(["to add a micro-gradient", *header, f"of `copy_` bandwidth, {largest}"], rows)


def _name(result: Result) -> str:
    return f"`{result['variant']}`" if result["buffer"] is None else f"**{result['variant']}**"


def _over_split24(result: Result | None) -> str:
    return number(result["time_over_split24"]) if result and "time_over_split24" in result else ""


def _of_copy(result: Result | None) -> str:
    return f"{result['fraction_of_copy']:.2f}" if result and "fraction_of_copy" in result else ""


def _of_mul(result: Result) -> str:
    return f"{result['fraction_of_mul']:.2f}" if "fraction_of_mul" in result else ""


# Columns that older files lack -> key of a result, and what is shown of it.
MORE: dict[str, tuple[str, Callable[[Result], str]]] = {
    "of `torch.mul` bandwidth": ("fraction_of_mul", _of_mul),
    HOST: ("host_ms", host_time),
}
