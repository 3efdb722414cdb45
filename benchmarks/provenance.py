"""Where a benchmark's numbers come from, and the name of the folder that they are kept in."""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import accumkern

ROOT = Path(__file__).resolve().parent.parent
# How OpenMP's threads wait for one another moves the time of small operations by a factor.
STEERS_THREADS = ("OMP_", "GOMP_", "KMP_", "MKL_")


def provenance(device: torch.device) -> dict[str, Any]:
    """Return what a reader needs to place and repeat a measurement: machine, versions, commit, date, command.

    Neither the name of the machine in its network nor any path of it is in there.

    Args:
        device: the device that was measured.
    """
    commit, dirty = _commit()
    return {
        "machine": machine(device),
        "driver": _driver() if device.type == "cuda" else None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "python": platform.python_version(),
        "accumkern": accumkern.__version__,
        "backends": [name for name, reason in accumkern.available_backends().items() if reason is None],
        "cpu_threads": torch.get_num_threads(),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(STEERS_THREADS)},
        "commit": commit,
        "uncommitted_changes": dirty,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *_options_but_results()]),
    }


def machine(device: torch.device) -> str:
    """Return the name of the GPU, or of the CPU with its number of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {_cpu_model()}, {os.cpu_count()} cores"


def folder_name(machine_name: str) -> str:
    """Return the name of a machine's folder of results: ``nvidia-h100-80gb-hbm3`` is one."""
    return re.sub(r"[^a-z0-9]+", "-", machine_name.lower()).strip("-")


def version_of(package: str) -> str | None:
    """Return the version of a package that is installed, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _options_but_results() -> list[str]:
    """Return the options of this run without ``--results``, a path that says nothing of the measurement."""
    where = argparse.ArgumentParser(add_help=False)
    where.add_argument("--results")
    return where.parse_known_args()[1]


def _cpu_model() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", information.read_text(), re.MULTILINE)
        if found:
            return re.sub(r"\((R|TM)\)|\bProcessor\b", "", found.group(1)).strip()
    return platform.processor() or platform.machine()


@cache  # nvidia-smi takes its time, and files are written again and again
def _driver() -> str | None:
    """Return the version of the NVIDIA driver, where nvidia-smi tells it."""
    output = _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return output.splitlines()[0].strip() if output else None


def _commit() -> tuple[str | None, bool | None]:
    """Return (git commit, whether files other than results, and those that are made from them, have changed since).

    ``ACCUMKERN_COMMIT`` goes first, for copies of the tree without its history; a ``-dirty`` at its end, as
    ``git describe --always --dirty --abbrev=40`` writes it, tells of changes.
    """
    given = os.environ.get("ACCUMKERN_COMMIT")
    if given:
        return given.removesuffix("-dirty"), given.endswith("-dirty")
    commit = _output_of("git", "-C", str(ROOT), "rev-parse", "HEAD")
    if not commit:
        return None, None
    changes = _output_of(
        "git",
        "-C",
        str(ROOT),
        "status",
        "--porcelain",
        "--",
        ".",
        ":(exclude)benchmarks/results",
        ":(exclude)README.md",
        ":(exclude)docs/benchmarks.md",
        ":(exclude)docs/figures",
    )
    return commit.strip(), None if changes is None else bool(changes.strip())


def _output_of(*command: str) -> str | None:
    """Return what a program prints, or None where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    finished = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return finished.stdout if finished.returncode == 0 else None
