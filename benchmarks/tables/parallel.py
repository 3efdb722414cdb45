"""One global batch, divided by ranks and by time."""

from __future__ import annotations

from tables.parts import Content, Result, number, paragraph, table


def parallel_tables(content: Content) -> list[str]:
    """Return the table of ways to divide a batch."""
    method, results = content["method"], content["results"]
    backend = method["backend"].partition(",")[0]
    return [
        *paragraph(
            f"Training {method['model']}, with one global batch of {method['global_batch']}, divided among four ranks "
            f"({backend}): data-parallel parts x micro-batches that each accumulates x samples of a micro-batch. MB "
            "of the rank that has the most: at the end of a window, and at its peak with activations and all that "
            "exchange needs. Errors are of the whole gradient against one process in FP32."
        ),
        *table(
            [
                "way",
                "global batch",
                "weights + masters",
                "`.grad` + residual",
                "AdamW",
                "in all",
                "peak",
                "error, FP32",
                "error, bf16",
            ],
            [_row(result) for result in results],
        ),
    ]


def _row(result: Result) -> list[str]:
    most = max(result["ranks"], key=lambda rank: sum(rank["held_bytes"].values()))["held_bytes"]
    peak = max(rank["peak_bytes"] for rank in result["ranks"])
    parts = (most["weights"] + most["master_residuals"], most["gradients"] + most["residuals"], most["optimizer_state"])
    return [
        result["way"],
        f"{result['data_parallel']} x {result['accumulation_steps']} x {result['micro_batch']}",
        *(number(size / 1e6) for size in (*parts, sum(parts), peak)),
        f"{result['error_fp32']:.0e}" if result["error_fp32"] else "0",
        f"{result['error_bf16']:.1e}",
    ]


def parallel_summary(content: Content) -> list[str]:
    """Return the sentence about the least and the most memory, and about the gradient."""
    results = content["results"]
    peaks = {result["way"]: max(rank["peak_bytes"] for rank in result["ranks"]) for result in results}
    least, most = min(peaks, key=lambda way: peaks[way]), max(peaks, key=lambda way: peaks[way])
    error = max(result["error_fp32"] for result in results)
    return paragraph(
        f"One global batch, divided in {len(results)} ways by accumulation, data, tensor and pipeline parallelism: the "
        f"gradient is that of one process (relative error in FP32 up to {error:.0e}). A rank's memory peaks at "
        f"{number(peaks[least] / 1e6)} MB ({least}) to {number(peaks[most] / 1e6)} MB ({most})."
    )
