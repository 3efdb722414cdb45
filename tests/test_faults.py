"""What happens when something goes wrong: a clear error, and a state that is right or that zero_grad() repairs.

The list is in docs/faults.md. Other faults are tested where they belong: hooks and layers that raise in
test_failed_backward.py and test_stress.py, states that do not fit in test_state.py, extensions that are missing or of
another version in test_packaging.py, killed runs in test_resume.py.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch

import accumkern

ROOT = Path(__file__).resolve().parent.parent


def run(code: str, folder: Path = ROOT, **environment: str) -> str:
    """Run code with accumkern from `folder`; return what it prints."""
    env = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# ---- out of memory -----------------------------------------------------------------------------------------------

OUT_OF_MEMORY = """
import resource, torch, accumkern

def run(waits, before, average_over):
    if waits:
        accumkern.waiting.WAITING_DEVICE_TYPES = frozenset({"cpu"})
    accumkern.waiting.MAX_WAITING_NUMEL = 2**30
    params = [torch.nn.Parameter(torch.zeros(2**23, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = torch.optim.SGD(params, lr=1.0)
    accumulator = accumkern.attach(optimizer, average_over=average_over)
    x = torch.ones_like(params[0])

    def no_more_memory(_grad):  # both new gradients are there; what a fold allocates is next
        in_use = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize")) * 1024
        resource.setrlimit(resource.RLIMIT_AS, (in_use + 2**22, resource.RLIM_INFINITY))

    def backward(value):
        sum((param * (x * value)).sum() for param in params).backward()

    for _ in range(before):
        backward(1.0)
    grads = [param.grad for param in params]
    arrived = []
    for param in params:
        param.register_hook(lambda _grad: arrived.append(1))
        param.register_hook(lambda grad: no_more_memory(grad) if len(arrived) == 2 else None)
    try:
        backward(3.0)
    except RuntimeError as error:
        message = str(error)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert "can't allocate memory" in message, message

    # The one that came first is in if it was folded at once; otherwise both are as they were.
    found = [None if param.grad is None else accumulator.gradient(param)[0].item() for param in params]
    print(sorted(found, key=str))
    optimizer.zero_grad()
    for value in (1.0, 2.0**-9):
        backward(value)
    scale = 1 / (average_over or 1)
    assert all((accumulator.gradient(param)[0] - scale * (1 + 2.0**-9)).abs() < 2.0**-16 for param in params)

for case in CASES:
    run(*case)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits its address space as Linux does")
def test_out_of_memory_in_a_fold_leaves_the_gradient_as_it_was() -> None:
    """The allocation of a residual, or of the first sum, really fails: the address space is limited in between."""
    cases = {  # (waits, micro-batches before, average_over) -> what is left
        (False, 1, None): "[1.0, 4.0]",  # the first was folded when memory was there
        (False, 0, 4): "[0.75, None]",
        (True, 1, None): "[1.0, 1.0]",  # both wait for the end of the backward pass
        (True, 0, 4): "[None, None]",
    }
    # Every allocation comes from the system and goes back to it: none is served from what was freed before.
    found = run(f"CASES = {list(cases)}" + OUT_OF_MEMORY, MALLOC_MMAP_THRESHOLD_="65536")
    assert found.splitlines() == list(cases.values())


# ---- a backward pass that fails where nobody can put things back -------------------------------------------------


@pytest.mark.parametrize("set_to_none", [True, False])
def test_failure_between_the_two_hooks_of_a_parameter_is_repaired_by_zero_grad(set_to_none: bool) -> None:
    """A node pre-hook of the user raises when the running gradient is set aside: it may be gone."""
    params = [torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = torch.optim.SGD(params)
    accumulator = accumkern.attach(optimizer)
    x = torch.tensor([1.0, 2.0**-9, 2.0**-10], dtype=torch.bfloat16)

    def backward() -> None:
        sum((param * x).sum() for param in params).backward()

    def fail(_grads: Any) -> None:
        raise ArithmeticError

    backward()
    backward()
    node = torch.autograd.graph.get_gradient_edge(params[0]).node  # its hooks live as long as somebody holds it
    handle = node.register_prehook(fail)
    with pytest.raises(ArithmeticError):
        backward()
    handle.remove()
    optimizer.zero_grad(set_to_none=set_to_none)
    for _ in range(3):
        backward()
    for param in params:
        torch.testing.assert_close(accumulator.gradient(param), 3 * x.float(), rtol=2.0**-16, atol=0)


# ---- states ------------------------------------------------------------------------------------------------------


def attached() -> tuple[torch.nn.Parameter, accumkern.GradAccumulator]:
    param = torch.nn.Parameter(torch.zeros(1000, dtype=torch.bfloat16))
    accumulator = accumkern.attach(torch.optim.SGD([param]))
    for value in (1.0, 2.0**-9):
        (param * torch.full_like(param, value)).sum().backward()
    return param, accumulator


def test_a_file_that_was_half_written_is_refused_by_torch(tmp_path: Path) -> None:
    param, accumulator = attached()
    file = tmp_path / "state.pt"
    torch.save(accumulator.state_dict(), file)
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(RuntimeError, match="PytorchStreamReader failed"):
        accumulator.load_state_dict(torch.load(file, weights_only=True))
    assert (accumulator.gradient(param) == 1 + 2.0**-9).all()


def test_a_state_without_values_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    param, accumulator = attached()
    torch.save(accumulator.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True, map_location="meta")
    with pytest.raises(ValueError, match=r"sums\[0\] of state_dict is on the meta device"):
        accumulator.load_state_dict(state)
    assert (accumulator.gradient(param) == 1 + 2.0**-9).all()


# ---- installations -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"\x7fELF and no more"], ids=["empty", "cut short"])
def test_an_extension_that_does_not_load_is_named(content: bytes, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "accumkern", tmp_path / "accumkern", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    (tmp_path / "accumkern" / "backends" / f"_C{suffix}").write_bytes(content)
    out = run(
        "import accumkern, torch\n"
        "print(accumkern.available_backends()['cpu'])\n"
        "param = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))\n"
        "try: accumkern.attach(torch.optim.SGD([param]), backend='cpu')\n"
        "except RuntimeError as error: print(error)\n"
        "accumulator = accumkern.attach(torch.optim.SGD([param]))\n"
        "for g in (1.0, 2.0**-10): (param * g).sum().backward()\n"
        "print(accumulator.gradient(param)[0].item() == 1 + 2.0**-10)\n",
        tmp_path,
    ).splitlines()
    assert out[0].startswith("the extension accumkern.backends._C does not load:")
    assert out[1].startswith(
        "backend 'cpu' cannot run on device 'cpu': the extension accumkern.backends._C does not load:"
    )
    assert out[2] == "True"  # by the eager backend


@pytest.mark.parametrize("version", ["1.13.1", "2.9.1+cu128"])
def test_a_torch_below_the_floor_is_named(version: str) -> None:
    floor = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert floor is not None
    out = run(
        "import sys, types\n"
        "torch = sys.modules['torch'] = types.ModuleType('torch')\n"
        f"torch.__version__ = {version!r}\n"
        "try: import accumkern\n"
        "except ImportError as error: print(error)\n"
    )
    assert out == f"accumkern needs torch {floor.group(1)} or newer; torch {version} is installed"
