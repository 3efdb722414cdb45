"""Regenerates the README's tables from the committed result files.

``python benchmarks/report.py`` writes them into README.md between the markers; ``--check`` says whether they are there
already, and exits with 1 if not. Every result file must say where it comes from.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
PROVENANCE = {"machine", "torch", "triton", "python", "accumkern", "commit", "date", "command"}


def load_results(folder: Path = ROOT / "benchmarks" / "results") -> dict[str, dict[str, dict[str, Any]]]:
    """Return machine -> benchmark -> content of every result file.

    Raises:
        ValueError: a file is no JSON, or does not say where it comes from.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for path in sorted(folder.glob("*/*.json")):
        content = json.loads(path.read_text())
        missing = PROVENANCE - {key for key, value in content.get("provenance", {}).items() if value is not None}
        if missing or "results" not in content:
            raise ValueError(f"{path.parent.name}/{path.name} lacks {sorted(missing) or 'results'}")
        found.setdefault(content["provenance"]["machine"], {})[path.stem] = content
    return found


def kernels_table(content: dict[str, Any]) -> list[str]:
    """Return the table of a machine's kernel benchmark at its largest size."""
    numel = max(result["numel"] for result in content["results"])
    lines = [
        f"One tensor of {numel:,} elements: median, and in brackets the 20th and 80th percentile.",
        "",
        "| operation | ms | GB/s | of `copy_` bandwidth | time / split24 |",
        "|---|---|---|---|---|",
    ]
    for result in content["results"]:
        if result["numel"] != numel:
            continue
        name = f"`{result['variant']}`" if result["buffer"] is None else f"**{result['variant']}**"
        if "error" in result:
            lines.append(f"| {name} | {result['error']} | | | |")
            continue
        digits = 0 if result["gb_per_s"] >= 10 else 1
        lines.append(
            f"| {name} | {_spread(result)} | {result['gb_per_s']:.{digits}f} | {result['fraction_of_copy']:.2f} | "
            f"{result['time_over_split24']:.2f} |"
        )
    return lines


def overhead_table(content: dict[str, Any]) -> list[str]:
    """Return the table of a machine's host overhead."""
    variants = list(dict.fromkeys(r["variant"] for r in content["results"] if r["variant"] != "stock"))
    lines = [
        "Host time of the hook over stock PyTorch, in µs per parameter and micro-batch (negative: faster than stock).",
        "",
        "| parameters | stock | " + " | ".join(variants) + " |",
        "|---|---|" + "---|" * len(variants),
    ]
    for count in sorted({result["parameters"] for result in content["results"]}):
        of_count = {r["variant"]: r for r in content["results"] if r["parameters"] == count}
        cells = [f"{of_count[v]['over_stock_us']:+.1f}" if v in of_count else "" for v in variants]
        lines.append(f"| {count:,} | {of_count['stock']['us_per_parameter']:.1f} | " + " | ".join(cells) + " |")
    return lines


def accuracy_table(content: dict[str, Any]) -> list[str]:
    """Return the table of errors against FP64."""
    counts = sorted({result["micro_batches"] for result in content["results"]})
    lines = [
        "Relative L2 error of the sum of N bfloat16 micro-gradients, against FP64:",
        "",
        "| accumulator | mean / std | " + " | ".join(f"N = {count}" for count in counts) + " |",
        "|---|---|" + "---|" * len(counts),
    ]
    rows: dict[tuple[str, float], dict[int, float]] = {}
    for result in content["results"]:
        key = (result["accumulator"], result["mean_over_std"])
        rows.setdefault(key, {})[result["micro_batches"]] = result["error_of_sum"]
    for (accumulator, ratio), errors in sorted(rows.items(), key=lambda item: -item[0][1]):
        lines.append(f"| {accumulator} | {ratio:g} | " + " | ".join(f"{errors[n]:.0e}" for n in counts) + " |")
    return lines


def finish_table(content: dict[str, Any]) -> list[str]:
    """Return the table of the end of a window, and of what measuring costs."""
    numel = max(result["numel"] for result in content["results"])
    of_size = {result["variant"]: result for result in content["results"] if result["numel"] == numel}
    lines = [
        f"Mean, norm, clip and round of {numel:,} gradient elements; and a fold that leaves squared norms behind.",
        "",
        "| operation | ms | time / stock |",
        "|---|---|---|",
    ]
    names = {"stock": "`_foreach_div_` + `clip_grad_norm_`", "finish split24": "**finish, split24**"}
    names |= {"finish split32": "**finish, split32**"}
    for variant, name in names.items():
        lines.append(f"| {name} | {_spread(of_size[variant])} | {of_size[variant]['time_over_stock']:.2f} |")
    fold, measured = of_size["fold split24"], of_size["fold split24, measured"]
    cost = measured["median_ms"] / fold["median_ms"] - 1
    lines += ["", f"A split24 fold takes {_spread(fold)} ms, with squared norms {_spread(measured)} ms ({cost:+.0%})."]
    return lines


def _spread(result: dict[str, Any]) -> str:
    return f"{result['median_ms']:.2f} ({result['p20_ms']:.2f}-{result['p80_ms']:.2f})"


TABLES = {"accuracy": accuracy_table, "kernels": kernels_table, "finish": finish_table, "overhead": overhead_table}


def render(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Return the generated part of the README."""
    lines = ["## Measured", ""]
    for machine, benchmarks in results.items():
        first = next(iter(benchmarks.values()))["provenance"]
        commits = sorted({content["provenance"]["commit"][:9] for content in benchmarks.values()})
        lines += [
            f"**{machine}**, torch {first['torch']}, {first['date'][:10]}, commit {', '.join(commits)}.",
            "",
        ]
        for name, table in TABLES.items():
            if name in benchmarks:
                lines += [*table(benchmarks[name]), ""]
    if not any(machine.startswith("NVIDIA") for machine in results):
        lines += ["On a GPU: not measured.", ""]
    return "\n".join(lines)


def main() -> int:
    """Write the tables, or check them; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if the README is out of date")
    arguments = parser.parse_args()
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    text = f"{before}{BEGIN}\n{render(load_results())}{END}{after}"
    if arguments.check:
        if readme.read_text() == text:
            return 0
        print("README.md does not show the committed results; run python benchmarks/report.py", file=sys.stderr)
        return 1
    readme.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
