"""A batch that is split at run time."""

from __future__ import annotations

from tables.parts import Content, grouped, interval, paragraph, spread, table

CLOCKS = {"host": "host time", "done": "until the GPU has finished"}  # on a CPU there is one
LOOP = "loop"


def batch_tables(content: Content) -> list[str]:
    """Return a table for each regime: a window by hand, by ``acc.backward``, and under a limit of memory."""
    lines = paragraph(
        "Forward and backward passes of a window: a loop that divides the loss, `acc.backward` with the same "
        "micro-batches, and that with `memory=`, a limit that nothing exceeds."
    )
    for regime, results in grouped(content["results"], "regime").items():
        rows = []
        for result in results:
            name = result["variant"] if result["variant"] == LOOP else f"**{result['variant']}**"
            over = interval(result.get("over", {}).get(LOOP))
            clock = CLOCKS.get(result.get("clock", ""), "")
            rows.append([name, clock, over, result.get("error") or spread(result)])
        lines += [f"**{content['method'][str(regime)]}**", "", *table(["way", "clock", "time / loop", "time"], rows)]
    return lines


def batch_summary(content: Content) -> list[str]:
    """Return what the split costs as a sentence."""
    found = []
    for regime, results in grouped(content["results"], "regime").items():
        by_way = {r["variant"]: r for r in results if r.get("clock") == "host"}
        ratios = [f"{interval(r['over'][LOOP])} by `{way}`" for way, r in by_way.items() if LOOP in r.get("over", {})]
        if ratios:
            what = {"launch": "tiny micro-batches", "compute": "larger ones"}[str(regime)]
            found.append(f"{what}: {', '.join(ratios)}")
    return paragraph(f"Time of a window over a loop by hand, {'; '.join(found)}.") if found else []
