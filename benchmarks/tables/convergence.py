"""Validation loss."""

from __future__ import annotations

from collections.abc import Callable

from tables.parts import SURE, Content, Result, design_name, grouped, millions, paragraph, side_of, table

COMPARED_WITH = "stock_fp32_masters"  # the design that the others' losses are compared with


def convergence_tables(content: Content) -> list[str]:
    """Return for each learning rate a table of losses and one of differences, and say where they differ."""
    to = _reference_label(content)
    lines = paragraph(
        "Validation loss after the same number of tokens, from the same FP32 weights, as far as a design can hold "
        "them, on the same text: the median over the seeds, with the least and the greatest. Then the difference to "
        f"the loss of {to} with the same seed: its median, and an interval that holds it with the confidence below."
    )
    for rate, results in grouped(content["results"], "learning_rate").items():
        lines += [f"**Learning rate {rate:g}: validation loss**", "", *_by_count(results, _loss)]
        lines += [f"**Learning rate {rate:g}: less that of {to}**", "", *_by_count(results, _difference)]
    return lines + _differences(content)


def convergence_summary(content: Content) -> list[str]:
    """Return the differences, and which of them can be told from zero."""
    results = content["results"]
    seeds = max(len(r.get("validation_loss", [])) for r in results)
    tokens = max(r["tokens"] for r in results)
    lines = paragraph(
        f"Validation loss of {_model(results[0])} after {tokens:,} tokens with N micro-batches in a window, less that "
        f"of {_reference_label(content)} with the same seed: median of {seeds} seeds and interval."
    )
    for rate, of_rate in grouped(results, "learning_rate").items():
        lines += _by_count(of_rate, _difference, f"learning rate {rate:g}")
    return lines + _differences(content)


def _model(result: Result) -> str:
    """Return what was trained; older files do not have its size."""
    return f"a GPT of {millions(result)}" if "parameters" in result else "a small GPT"


def _reference_label(content: Content) -> str:
    return next(str(r["label"]) for r in content["results"] if r["design"] == COMPARED_WITH)


def _by_count(results: list[Result], show: Callable[[Result], str], corner: str = "design") -> list[str]:
    """Return a table with a row for each design and a column for each N."""
    steps = {r["micro_batches"]: r["steps"] for r in results}
    rows = []
    for of_design in grouped(results, "design").values():
        found = {r["micro_batches"]: r.get("error") or show(r) for r in of_design}
        rows.append([design_name(of_design[0]), *(found[count] for count in steps)])
    return table([corner, *(f"N = {count}, {number} steps" for count, number in steps.items())], rows)


def _loss(result: Result) -> str:
    losses = result["validation_loss"]
    return f"{result['median_loss']:.4f} ({min(losses):.4f}-{max(losses):.4f})"


def _difference(result: Result) -> str:
    found = result.get("difference")
    if found is None:
        return f"its loss: {result['median_loss']:.4f}" if result["design"] == COMPARED_WITH else ""
    return f"{found['median']:+.5f} ({found['low']:+.5f} to {found['high']:+.5f})"


def _differences(content: Content) -> list[str]:
    """Say plainly where the loss of a design can be told from that of the reference, and where it cannot.

    Intervals of few seeds have too little confidence to tell anything, of any difference.
    """
    to = _reference_label(content)
    differences = [r for r in content["results"] if "difference" in r]
    compared = [r for r in differences if r["difference"]["confidence"] >= SURE]
    too_few = [r["difference"] for r in differences if r not in compared]
    lines = []
    if too_few:
        least = min(too_few, key=lambda found: float(found["confidence"]))
        lines += paragraph(
            f"So few seeds, {least['n']}, tell nothing of differences: an interval from the least to the greatest has "
            f"a confidence of {least['confidence']:.0%}."
        )
    for label, results in grouped(compared, "label").items():
        words = ("higher than", "lower than", "not to be told from")
        told: dict[str, dict[float, list[str]]] = {word: {} for word in words}
        for result in results:
            of_word = told[side_of(result["difference"], 0, *words)]
            of_word.setdefault(result["learning_rate"], []).append(str(result["micro_batches"]))
        said = [
            f"{word} that of {to} at "
            + " and ".join(f"N = {', '.join(counts)} (learning rate {rate:g})" for rate, counts in of_word.items())
            for word, of_word in told.items()
            if of_word
        ]
        lines += paragraph(f"{label}: the loss is {'; '.join(said)}.")
    if compared:
        confidence = min(r["difference"]["confidence"] for r in compared)
        by_chance = sum(1 - r["difference"]["confidence"] for r in compared)
        lines += paragraph(
            f"Each interval has a confidence of {confidence:.0%}: of {len(compared)}, about {by_chance:.0f} would "
            "leave out zero by chance where nothing differs."
        )
    return lines
