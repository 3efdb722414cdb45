"""Run everything that only a GPU can show, within a given time: tests, checks of memory accesses, benchmarks.

``python benchmarks/gpu.py [--end 540] [--parts tests,kernels] [--output gpu-run]``

Every part is a process of its own with a time limit of its own, so that one that fails, hangs or breaks the GPU's
context does not end the others. Tests and checks go first, all of them side by side; what is timed has the machine for
itself, and plans and losses, which are not timed, have it for themselves, the most valuable first. ``--end`` is the
number of seconds after which no part goes on. Logs lie in ``<output>/logs`` and result files in ``<output>/results``,
each as soon as its part has it; a summary comes last. Needs torch, pytest, rich, nvcc and compute-sanitizer; uses
pytest-xdist and pytest-timeout where they are.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable
KILL_AFTER = 10  # seconds between the request to end and the end
LEAST = 10  # seconds: with less than this left a part does not begin
CHECKS = "checks"  # tests and checks of memory accesses
UNTIMED = "untimed"  # benchmarks that tests would slow down all the same

# Test files that share a process: an illegal access ends no other group, and what waits does not hold up what computes.
# Group -> (files, processes of pytest-xdist, which tests).
TESTS: dict[str, tuple[tuple[str, ...], int, str | None]] = {
    "folds": (("kernels", "fold", "fold_into", "layouts", "triton_launch", "slot", "finish", "norm_kernel"), 5, None),
    "steps": (("step_kernels", "mean_kernel", "training", "optimizers", "master_weights"), 5, None),
    "ranks": (("ddp", "backward_ranks", "fsdp", "fsdp_whole", "master_ranks", "elastic", "master_checkpoint"), 6, None),
    "meshes": (
        ("bucket_mean", "pipeline", "plan_ranks", "plan_link", "plan_sharded", "tensor_parallel", "meshes",
         "distributed_checkpoint", "bench_parallel", "token_means", "split_backward", "lost_rank", "host_shards"),
        4, None),
    "graphs": (("gpu", "cuda_graphs"), 0, "captured or graphs"),
    "gpu": (("gpu",), 2, "not captured"),
    "product": (("product_kernels",), 0, None),
}  # fmt: skip
REST = "rest"  # of the files, 2 processes
# What is trained with 10^9 weights.
TRAINED = ["stock_bf16", "stock_fp32", "stock_fp32_masters", "compiled_masters", "autocast"]
TRAINED += ["split24", "split32", "split24_masters", "split24_masters24"]


@dataclass(frozen=True)
class Part:
    """A process.

    Attributes:
        name: of its log.
        command: what is run, from the root of the checkout.
        limit: seconds after which it is ended.
        beside: the name of a group whose parts run side by side; None has the machine for itself.
        environment: variables that it has beside those of this process.
    """

    name: str
    command: list[str]
    limit: int
    beside: str | None = None
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Run:
    """A part that has begun; times are seconds since the beginning of all."""

    part: Part
    process: subprocess.Popen[bytes]
    log: Path
    begun: float
    deadline: float
    was_asked: bool = False  # to end

    @property
    def name(self) -> str:
        """Return the part's name."""
        return self.part.name


BUILD = Part(
    "build", [PYTHON, "setup.py", "--quiet", "build_ext", "--inplace"], 300, environment={"ACCUMKERN_BUILD": "cuda"}
)


# ---- the parts ---------------------------------------------------------------------------------------------------


def parts(results: Path) -> list[Part]:
    """Return all parts, the most valuable first; ``results`` is where benchmarks write."""
    doctor = Part("doctor", [PYTHON, "-m", "accumkern", "doctor"], 60, CHECKS)
    return [doctor, *tests(), *sanitizers(), *benchmarks(results, gpus())]


def tests() -> list[Part]:
    """Return the tests that need a GPU, in groups."""
    grouped = {name for files, _, _ in TESTS.values() for name in files}
    rest = sorted(path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py"))
    groups = TESTS | {REST: (tuple(name for name in rest if name not in grouped), 2, None)}
    # References are computed on the CPU, by many processes at once.
    environment = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONUTF8": "1"}
    return [
        Part(f"tests {group}", pytest_command(files, processes, which), 170, CHECKS, environment)
        for group, (files, processes, which) in groups.items()
    ]


def pytest_command(files: tuple[str, ...], processes: int, which: str | None) -> list[str]:
    """Return what runs the GPU tests of some files."""
    command = [PYTHON, "-m", "pytest", "-m", "gpu", "--override-ini", "addopts=", "-p", "no:cacheprovider", "-q"]
    command += ["--tb=short", "-rfEs", "--durations=8"]
    if is_there("pytest_timeout"):
        command += ["--timeout=90"]
    if processes and is_there("xdist"):
        command += ["-n", str(processes), "--dist", "load"]
    if which is not None:
        command += ["-k", which]
    return [*command, *(f"tests/test_{name}.py" for name in files)]


def sanitizers() -> list[Part]:
    """Return checks of the memory accesses of every kernel."""
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"}  # each tensor is an allocation
    return [
        Part(
            f"{tool} {backend}",
            [sanitizer, "--tool", tool, "--error-exitcode", "9", "--print-limit", "20", PYTHON,
             "tests/every_kernel.py", backend],
            170,
            CHECKS,
            environment,
        )
        for tool in ("memcheck", "racecheck", "initcheck")
        for backend in ("cuda", "triton")
    ]  # fmt: skip


def benchmarks(results: Path, gpus: int) -> list[Part]:
    """Return the benchmarks of a machine with so many GPUs, the most valuable first."""

    def part(name: str, limit: int, *arguments: str, beside: str | None = None) -> Part:
        script = f"benchmarks/bench_{name}.py"
        return Part(name, [PYTHON, script, "--device", "cuda", "--results", str(results), *arguments], limit, beside)

    found = [
        part("step", 90),
        # Both fit into the memory of one GPU, and on 16 cores.
        part("plan", 110, "--seconds", "70", beside=UNTIMED),
        part("convergence", 110, "--seconds", "90", "--workers", "10", beside=UNTIMED),
        part("product", 45),
        part("finish", 30),
        part("batch", 40, "--seconds", "20"),
        part("kernels", 120, "--sizes", "2^20,2^24,2^26,2^28,2^30", "--models", "GPT-2,Llama-1B"),
        part("overhead", 80, "--seconds", "36"),
        part("training", 120, "--regimes", "compute,paired", "--windows", "6", "--designs", ",".join(TRAINED)),
        part("accuracy", 30),
    ]
    if gpus > 1:
        found += [part(name, 120) for name in ("reduce", "whole", "parallel")]
    return found


def side_by_side(chosen: list[Part]) -> list[list[Part]]:
    """Return the parts of each group, and each that has the machine for itself, in the order of the first of each."""
    groups: dict[str | tuple[str], list[Part]] = {}
    for part in chosen:
        groups.setdefault(part.beside or (part.name,), []).append(part)
    return list(groups.values())


def is_there(module: str) -> bool:
    """Return whether a module can be imported."""
    return importlib.util.find_spec(module) is not None


def gpus() -> int:
    """Return how many GPUs the driver lists."""
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True)
    return len(listed.stdout.splitlines()) if listed.returncode == 0 else 0


# ---- running -----------------------------------------------------------------------------------------------------


class Driver:
    """Runs parts, and says what came of them."""

    def __init__(self, output: Path, end: float) -> None:
        self.begun = time.monotonic()
        self.end = end
        self.logs = output / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        self.outcomes: dict[str, str] = {}
        self.failed: list[str] = []

    def now(self) -> float:
        """Return the seconds since the beginning."""
        return time.monotonic() - self.begun

    def run(self, together: list[Part]) -> bool:
        """Run parts side by side, each until its limit or the end; return whether all of them succeeded."""
        runs = [run for part in together if (run := self.start(part)) is not None]
        waiting = list(runs)
        while waiting:
            time.sleep(0.1)
            for run in list(waiting):
                if run.process.poll() is not None:
                    signal_all(run.process, signal.SIGKILL)  # what it has left behind
                    waiting.remove(run)
                    self.note(run)
                elif self.now() > run.deadline:
                    signal_all(run.process, signal.SIGKILL if run.was_asked else signal.SIGINT)
                    run.was_asked, run.deadline = True, self.now() + KILL_AFTER
        return len(runs) == len(together) and not any(run.process.returncode for run in runs)

    def start(self, part: Part) -> Run | None:
        """Start a part, if there is time for it."""
        if self.end - self.now() < LEAST:
            self.leave_out(part, "left out: no time")
            return None
        log = self.logs / f"{part.name.replace(' ', '-')}.txt"
        python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        try:
            with log.open("wb") as file:
                process = subprocess.Popen(
                    part.command,
                    cwd=ROOT,
                    env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": python_path, **part.environment},
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # a group, with which all that it starts is ended
                )
        except OSError as error:
            self.leave_out(part, f"cannot be started: {error}")
            return None
        return Run(part, process, log, self.now(), min(self.now() + part.limit, self.end))

    def leave_out(self, part: Part, why: str) -> None:
        """Note, and print, why a part has not begun."""
        self.outcomes[part.name] = why
        self.failed.append(part.name)
        print(f"== {part.name} (at {self.now():.0f} s): {why}", flush=True)

    def note(self, run: Run) -> None:
        """Note, and print, what came of a part."""
        code = run.process.returncode
        how = "ended by its limit" if run.was_asked else f"rc {code}"
        outcome = f"{how}, {self.now() - run.begun:.0f} s: {last_line(run.log)}"
        self.outcomes[run.name] = outcome
        if code != 0 or run.was_asked:
            self.failed.append(run.name)
        print(f"== {run.name} (at {self.now():.0f} s): {outcome}", flush=True)

    def summary(self) -> None:
        """Print what came of every part, and the tests that failed."""
        print(f"\n======== summary, at {self.now():.0f} s")
        for log in sorted(self.logs.glob("tests-*.txt")):
            failures = [line for line in log.read_text(errors="replace").splitlines() if is_failure(line)]
            for line in failures[:12]:
                print(f"{log.stem}: {line[:200]}")
            if len(failures) > 12:
                print(f"{log.stem}: and {len(failures) - 12} more")
        for name, outcome in self.outcomes.items():
            print(f"{name:18s} {outcome[:150]}")


def signal_all(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Send a signal to a process and to all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def last_line(log: Path) -> str:
    """Return the last line of a log that says something."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip(" =-\r")]
    return lines[-1] if lines else ""


def is_failure(line: str) -> bool:
    """Return whether a line of pytest's summary names a test that failed."""
    return re.match(r"(FAILED|ERROR) ", line) is not None


def needs_build() -> bool:
    """Return whether the CUDA kernels are missing, asked in another process; neither takes time to import torch."""
    asked = "import sys; sys.path.insert(0, 'accumkern/backends'); import _C; sys.exit(_C.cuda_targets is None)"
    return subprocess.run([PYTHON, "-c", asked], cwd=ROOT, capture_output=True).returncode != 0


def main() -> None:
    """Run the parts that the command line names, or all."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored, by parts too
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--end", type=float, default=1800, help="seconds after which nothing goes on (default: 1800)")
    options.add_argument("--parts", help="names or first words of names, as tests,memcheck,kernels; default: all")
    options.add_argument("--output", type=Path, default=ROOT / "gpu-run", help="folder of logs and results")
    arguments = options.parse_args()
    if not os.environ.get("ACCUMKERN_COMMIT") and not (ROOT / ".git").exists():
        options.error("there is no git history here: set ACCUMKERN_COMMIT to the commit, which result files need")
    output = arguments.output.resolve()
    known = parts(output / "results")
    chosen = known
    if arguments.parts:
        names = arguments.parts.split(",")
        unknown = [name for name in names if not any(is_named(part, name) for part in known)]
        if unknown:
            options.error(f"--parts has {', '.join(unknown)}; there are {', '.join(part.name for part in known)}")
        chosen = [part for part in known if any(is_named(part, name) for name in names)]
    driver = Driver(output, arguments.end)
    if needs_build():
        driver.run([BUILD])
    for together in side_by_side(chosen):
        driver.run(together)
    driver.summary()
    sys.exit(bool(driver.failed))


def is_named(part: Part, name: str) -> bool:
    """Return whether a name is a part's, or its first word."""
    return name in (part.name, part.name.split()[0])


if __name__ == "__main__":
    main()
