"""The mean over ranks, simulated."""

from __future__ import annotations

from tables.parts import Content, Result, grouped, number, paragraph, table

RING, TREE = ("bf16 ring", "bf16"), ("bf16 tree", "bf16")
EXCHANGE, TWO_LEVELS = ("split24 all-to-all", "split24"), ("split24 two levels", "split24")
WITH_RESIDUAL = ("FP32", "split24")  # what the mean keeps a residual in begins with


def scale_tables(content: Content) -> list[str]:
    """Return tables of the errors of each kind of gradients, and of what is sent."""
    results = content["results"]
    lines = paragraph(
        "**Simulated**: the arithmetic is run, element by element in the formats; what is sent, and the time, is a "
        "model with the assumptions below. Relative L2 error against FP64 of the mean over ranks, each of which has a "
        f"sum of {content['method']['micro_batches']} micro-batches in bf16, as stock PyTorch, or in split24. Of two "
        "levels, within nodes and between them, there is this simulation alone: accumkern does not have them."
    )
    for ratio, of_ratio in grouped(flat(results), "mean_over_std").items():
        kept = [r for r in of_ratio if r["way"].startswith(WITH_RESIDUAL)]
        for key, shown, what in (
            ("error_of_grad", of_ratio, "`.grad` in bf16, which the optimizer reads"),
            ("error_of_step", kept, "`.grad` with its residual, where the mean has one"),
        ):
            lines += [f"**Mean / standard deviation of a gradient about {ratio:g}: {what}**", "", *_errors(shown, key)]
    lines += paragraph(
        "What a rank sends for an element of the gradient, in the mean over ranks, and in how many messages; what "
        "crosses the border of a node, for each of its network cards and for the node; and the modelled time of one "
        "bucket of DistributedDataParallel (25 MiB in bf16) and of a large gradient, in one collective, with the "
        "latency that is part of both. Messages are counted one after another, which a ring's hops are and those of an "
        "all-to-all exchange need not be; phases too, which two levels in buckets need not be. A flat all-to-all "
        "exchange sends up to 8 times as much across the border of a node of 8 as a ring of the same width, which "
        "enters a node once."
    )
    return lines + _wires(results)


def scale_summary(content: Content) -> list[str]:
    """Return the sentences about the most ranks."""
    most = max(r["ranks"] for r in content["results"])
    of = {(r["way"], r["held"]): r for r in content["results"] if r["ranks"] == most}
    ring, tree, mine, levels = of[RING], of[TREE], of[EXCHANGE], of[TWO_LEVELS]

    def errors(result: Result, key: str) -> str:
        return " and ".join(f"{error[key]:.1e}" for error in result["errors"])

    ratios = " and ".join(f"{error['mean_over_std']:g}" for error in ring["errors"])
    return paragraph(
        f"Mean over {most:,} ranks, simulated, micro-gradients of mean / std {ratios}: error of `.grad` "
        f"{errors(ring, 'error_of_grad')} after a ring in bf16, {errors(tree, 'error_of_grad')} after NCCL's tree in "
        f"bf16, {errors(mine, 'error_of_grad')} after an exchange of split24 that is added in FP32, and "
        f"{errors(mine, 'error_of_step')} of what the step reads there with the residual. Bytes that a rank sends for "
        f"an element: {number(ring['bytes_per_element'])} by ring or tree and {number(mine['bytes_per_element'])} by "
        f"the exchange; through its network card {number(ring['card_bytes_per_element'])} and "
        f"{number(mine['card_bytes_per_element'])}, and {number(levels['card_bytes_per_element'])} by an exchange on "
        "two levels."
    )


def flat(results: list[Result]) -> list[Result]:
    """Return a result for each kind of gradients."""
    return [result | error for result in results for error in result["errors"]]


def _errors(results: list[Result], key: str) -> list[str]:
    counts = sorted({r["ranks"] for r in results})
    rows = []
    for way, of_way in grouped(results, "way", "held").items():
        assert isinstance(way, tuple)
        errors = {r["ranks"]: r[key] for r in of_way}
        rows.append([way[0], way[1], *(f"{errors[count]:.1e}" for count in counts)])
    return table(["exchanged by", "sums", *(f"{count:,} ranks" for count in counts)], rows)


def _wires(results: list[Result]) -> list[str]:
    rows = []
    for of_way in grouped(results, "ranks", "way").values():
        r = of_way[0]
        sent = ("bytes_per_element", "messages", "card_bytes_per_element", "node_bytes_per_element")
        times = [number(ms) for ms in (r["latency_ms"], *r["modelled_ms"].values())]
        rows.append([f"{r['ranks']:,}", r["way"], *(number(r[key]) for key in sent), *times])
    numels = [f"{int(numel):,} elements, ms" for numel in results[0]["modelled_ms"]]
    header = ["ranks", "exchanged by", "bytes", "messages", "through a card", "out of a node", "latency, ms", *numels]
    return table(header, rows)
