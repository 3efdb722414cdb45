"""Memory as plans predict it, and as it is."""

from __future__ import annotations

from tables.parts import Content, Result, grouped, on_cpu, paragraph, table


def plan_tables(content: Content) -> list[str]:
    """Return the table of peaks, and that of the micro-batches that plans choose."""
    is_gpu, by_kind = not on_cpu(content), grouped(content["results"], "kind")
    elsewhere = "; by plans with the model on the GPU, and with it on the CPU, as on a machine without a GPU"
    lines = paragraph(
        "The most memory that a window takes, predicted on fake tensors without running anything, and measured in "
        f"training{elsewhere if is_gpu else ''}."
    )
    header = ["model", "micro-batch", "measured", *_predicted(is_gpu), *(["reserved"] if is_gpu else [])]
    lines += table(header, [_peaks(rows, is_gpu) for rows in _by(by_kind.get("peak", []), "micro_batch")])
    lines += paragraph("The micro-batch that a plan chooses for a limit of memory, and the largest that trains in it.")
    header = ["model", "limit", "chosen", *(["chosen without a GPU"] if is_gpu else []), "largest"]
    lines += table(header, [_choices(rows, is_gpu) for rows in _by(by_kind.get("choice", []), "limit_bytes")])
    for failed in by_kind.get("model", []):
        lines += paragraph(f"{failed['model']}: {failed['error']}")
    return lines


def plan_summary(content: Content) -> list[str]:
    """Return how far predictions are off, as a sentence."""
    found = [result for result in content["results"] if "error_of_prediction" in result]
    worst = {name: max(of, key=_error) for name, of in grouped(found, "model").items()}
    said = ", ".join(f"{name} {_off(of)}" for name, of in worst.items())
    return (
        paragraph(f"Peak memory of training, predicted over measured, the worst of each model: {said}.") if said else []
    )


def _by(results: list[Result], key: str) -> list[dict[str, Result]]:
    """Return for each model and value of a key the results by where the plan was made."""
    return [{of["planned_on"]: of for of in group} for group in grouped(results, "model", key).values()]


def _predicted(is_gpu: bool) -> list[str]:
    return ["predicted", "off by", *(["without a GPU", "off by"] if is_gpu else [])]


def _peaks(rows: dict[str, Result], is_gpu: bool) -> list[str]:
    one = next(iter(rows.values()))
    cells = [f"{one['model']}, {one['parameters'] / 1e6:.3g} M weights", str(one["micro_batch"])]
    cells.append(one.get("error") or _size(one["measured_bytes"]))
    for on in ("cuda", "cpu") if is_gpu else ("cpu",):
        of = rows.get(on)
        cells += ["", ""] if of is None else [_size(of["predicted_bytes"]), _off(of)]
    return [*cells, *([_size(one["reserved_bytes"]) if "reserved_bytes" in one else ""] if is_gpu else [])]


def _choices(rows: dict[str, Result], is_gpu: bool) -> list[str]:
    one = next(iter(rows.values()))
    chosen = [str(rows[on]["chosen"]) if on in rows else "" for on in (("cuda", "cpu") if is_gpu else ("cpu",))]
    return [one["model"], _size(one["limit_bytes"]), *chosen, one.get("error") or str(one["largest"])]


def _error(result: Result) -> float:
    return abs(float(result["error_of_prediction"]))


def _off(result: Result) -> str:
    return f"{100 * result['error_of_prediction']:+.1f} %" if "error_of_prediction" in result else ""


def _size(size: float) -> str:
    return f"{size / 1e6:,.0f} MB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
