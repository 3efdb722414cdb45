"""Registers and spills of the GPU kernels, from their machine code.

``python benchmarks/bench_registers.py [--device cpu|cuda] [--quick]``

The kernels are compiled ahead of time for this GPU, or for sm_90 where there is none: Triton brings its own assembler,
and CUDA's nvcc must be on PATH. Writes ``benchmarks/results/<machine>/registers.json``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # from a checkout, installed or not

from harness import parser, steps, write_results
from timing import describe

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURE = 90


def main() -> None:
    """Compile for both backends and write the file."""
    arguments = parser(__doc__).parse_args()
    architecture = ARCHITECTURE
    if arguments.device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        architecture = 10 * major + minor
    backends = ("cuda",) if arguments.quick else ("triton", "cuda")
    results: list[dict[str, Any]] = []
    with steps("registers") as on_step:
        for done, backend in enumerate(backends):
            on_step(done, len(backends))
            label = {"backend": backend, "architecture": f"sm_{architecture}"}
            try:
                results += [label | result for result in measure(backend, architecture)]
            except (OSError, RuntimeError, ValueError) as error:  # no compiler, or it fails: a result
                results.append(label | {"error": describe(error)})
    method = {
        "how": "tests/compile_kernels.py: triton.compile and nvcc ahead of time, read with cuobjdump",
        "registers": "of a thread",
        "stack_bytes": "local memory of a thread, where registers are spilled to",
        "spill_instructions": "loads and stores of local memory",
    }
    write_results(arguments, "registers", method, results)


def measure(backend: str, architecture: int) -> list[dict[str, Any]]:
    """Return one result for each kernel of a backend.

    Raises:
        RuntimeError: it does not compile.
    """
    # A program of its own, since triton compiles only outside of its interpreter.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(ROOT / "tests" / "compile_kernels.py"), backend, str(architecture)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError((done.stderr.strip().splitlines() or ["it failed without a word"])[-1])
    report = json.loads(done.stdout)
    named = {(kernel, name): counts for kernel, formats in report.items() for name, counts in formats.items()}
    return [
        {
            "kernel": kernel,
            "format": format_ or "any",
            "registers": counts["REG"],
            "stack_bytes": counts["STACK"],
            "spill_instructions": sum(n for name, n in counts.items() if name.startswith(("LDL", "STL"))),
        }
        for (kernel, format_), counts in sorted(named.items())
    ]


if __name__ == "__main__":
    main()
