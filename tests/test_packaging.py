"""The package as it is built and installed: what is in it, and what it does where something is missing."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from accumkern import optimizers
from accumkern.__main__ import main

ROOT = Path(__file__).resolve().parent.parent
# Looking for the module pip, before Python 3.12, makes setuptools refuse to be imported later, as inductor does.
INSTALLED = {distribution.name for distribution in importlib.metadata.distributions()}
needs_build_tools = pytest.mark.skipif(
    not {"pybind11", "setuptools", "pip"} <= INSTALLED,
    reason="pip, setuptools and pybind11 are needed to build",
)


def run(*command: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=env | environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


# An editable install has a finder of its own, which would find the checkout's extension for another accumkern.
ALONE = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
DOCTOR = "from accumkern.__main__ import main\nmain(['doctor'])\n"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unpacked source distribution, beside a torch that cannot be imported."""
    folder = tmp_path_factory.mktemp("sdist")
    copy = folder / "checkout"
    ignored = shutil.ignore_patterns(".venv", ".git", "build", "dist", "*.so", "*.egg-info", "__pycache__", "demo")
    shutil.copytree(ROOT, copy, ignore=ignored)
    run(sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", folder, cwd=copy, ACCUMKERN_BUILD="0")
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    (folder / "no-torch").mkdir()
    (folder / "no-torch" / "torch.py").write_text("raise ImportError('building must not need torch')")
    return next(path for path in folder.glob("accumkern-*") if path.is_dir())


def wheel(source: Path, folder: Path, **environment: str) -> Path:
    copy = shutil.copytree(source, folder / "source")  # a build leaves files behind
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", folder, copy]
    run(*command, cwd=folder, PYTHONPATH=str(source.parent / "no-torch"), **environment)
    return next(folder.glob("*.whl"))


@needs_build_tools
def test_source_distribution_holds_what_a_build_needs(source: Path) -> None:
    files = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    for path in (ROOT / "csrc").iterdir():
        assert f"csrc/{path.name}" in files
    assert {"LICENSE", "README.md", "pyproject.toml", "setup.py", "accumkern/py.typed"} <= files
    assert not any(name.endswith((".so", ".pyc")) for name in files)


@needs_build_tools
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_wheel_builds_without_torch_and_its_backend_runs(source: Path, tmp_path: Path) -> None:
    built = wheel(source, tmp_path, ACCUMKERN_BUILD="cpu")
    names = zipfile.ZipFile(built).namelist()
    assert sum(name.startswith("accumkern/backends/_C.") for name in names) == 1
    assert "accumkern/py.typed" in names
    assert all(name.startswith(("accumkern/", "accumkern-")) for name in names)
    assert not any(name.endswith((".cpp", ".cu", ".h")) for name in names)
    zipfile.ZipFile(built).extractall(tmp_path / "site")
    doctor = run(sys.executable, "-c", ALONE + DOCTOR, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site")).stdout
    assert "cpu tensors are folded by backend 'cpu'" in doctor
    assert "no CUDA" in doctor


@needs_build_tools
@pytest.mark.parametrize("how", ["no compiler", "not wanted"])
def test_installs_and_works_without_its_extension(source: Path, tmp_path: Path, how: str) -> None:
    if how == "no compiler":
        # An nvcc that setup.py finds by itself ends at once, too.
        nvcc = {"CUDA_HOME": "", "NVCC_PREPEND_FLAGS": "--no-such-option"}
        built = wheel(source, tmp_path, CC="/nonexistent/cc", CXX="/nonexistent/c++", PATH="/usr/bin", **nvcc)
    else:
        built = wheel(source, tmp_path, ACCUMKERN_BUILD="0")
    assert not any("_C" in name for name in zipfile.ZipFile(built).namelist())
    zipfile.ZipFile(built).extractall(tmp_path / "site")
    code = (
        ALONE + "import accumkern, torch\n"
        "p = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))\n"
        "acc = accumkern.attach(torch.optim.SGD([p]))\n"
        "for g in (1.0, 2.0**-10): (p * g).sum().backward()\n"
        "print(acc.gradient(p)[0].item() == 1 + 2.0**-10, accumkern.available_backends()['cpu'])\n"
    )
    out = run(sys.executable, "-c", code + DOCTOR, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site")).stdout
    assert out.startswith("True the extension accumkern.backends._C was not built")
    _, doctor = out.split("\n", 1)
    assert "was not built (install accumkern where there is a C++ compiler)" in doctor
    assert "cpu tensors are folded by backend 'eager'" in doctor


@needs_build_tools
def test_a_wrong_choice_of_build_is_refused(tmp_path: Path) -> None:
    env = os.environ | {"ACCUMKERN_BUILD": "gpu"}
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0
    assert "ACCUMKERN_BUILD is 'gpu'; it must be cpu, cuda, 0 or unset" in done.stderr


@needs_build_tools
def test_an_old_setuptools_is_named() -> None:
    code = "import runpy, setuptools; setuptools.__version__ = '76.1.0'; runpy.run_path('setup.py')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "setuptools is 76.1.0; accumkern is built with 77 or newer" in done.stderr


def test_import_needs_and_loads_nothing_optional() -> None:
    code = (
        "import sys\n"
        "missing = 'triton', 'numpy', 'rich', 'matplotlib', 'pybind11', 'accumkern.backends._C'\n"
        "sys.modules.update(dict.fromkeys(missing))\n"
        "import accumkern\n"
        "print(accumkern.__version__)\n"
    )
    assert run(sys.executable, "-c", code, cwd=ROOT, PYTHONPATH=str(ROOT)).stdout.strip()
    code = "import sys, torch\nbefore = set(sys.modules)\nimport accumkern\nprint(sorted(set(sys.modules) - before))\n"
    loaded = run(sys.executable, "-c", code, cwd=ROOT, PYTHONPATH=str(ROOT)).stdout
    assert "triton" not in loaded
    assert "accumkern.backends._C" not in loaded


def test_the_extension_includes_no_torch_header() -> None:
    for path in (ROOT / "csrc").iterdir():
        text = path.read_text()
        assert "#include <torch" not in text
        assert "#include <ATen" not in text
        assert ("#include <pybind11" in text) == (path.name == "bindings.cpp")


def test_a_stale_extension_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import accumkern
    from accumkern import backends

    if accumkern.available_backends()["cpu"] is not None:
        pytest.skip(f"backend cpu: {accumkern.available_backends()['cpu']}")
    monkeypatch.setattr(backends.problems, "__version__", "99.0")
    backends.extension_problem.cache_clear()
    try:
        reason = accumkern.available_backends()["cpu"]
    finally:
        backends.extension_problem.cache_clear()
    assert reason is not None
    assert "of version 0." in reason
    assert "the package of 99.0: install it again" in reason


def test_an_extension_of_other_sources_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import accumkern
    from accumkern import backends, version

    if accumkern.available_backends()["cpu"] is not None:
        pytest.skip(f"backend cpu: {accumkern.available_backends()['cpu']}")

    def reason() -> str | None:
        backends.extension_problem.cache_clear()
        return accumkern.available_backends()["cpu"]

    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    monkeypatch.setattr(version, "SOURCES", tmp_path / "csrc")
    try:
        assert reason() is None
        (tmp_path / "csrc" / "notes.txt").write_text("not compiled")
        assert reason() is None
        with (tmp_path / "csrc" / "step_math.h").open("a") as file:
            file.write("// changed\n")
        assert "was built from other sources than those in" in (reason() or "")
        shutil.rmtree(tmp_path / "csrc")  # as in an installed package
        assert reason() is None
    finally:
        monkeypatch.undo()
        backends.extension_problem.cache_clear()


def test_doctor_tells_which_optimizers_can_have_master_weights(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    _, _, told = capsys.readouterr().out.partition("master weights: ")
    in_parts = next(line for line in told.splitlines() if "a few weights at a time" in line)
    for name in optimizers.STEPPED_IN_PARTS:
        assert re.search(rf"\b{name.split('.')[-2]}\b", in_parts), name
    assert "bitsandbytes Optimizer8bit; torch " in in_parts
    assert "in one pass: torch.optim Adam, AdamW, SGD themselves" in told
    assert "all weights at once: all others" in told
    assert f"not torch.LBFGS: {optimizers.REFUSED['torch.optim.lbfgs.LBFGS']}" in told
    assert f"not schedulefree: {optimizers.REFUSED['schedulefree.']}" in told
    for option, reason in optimizers.REFUSED_OPTIONS.items():
        assert f"not with {option}: {reason}" in told
    assert len(told.splitlines()) == 4 + len(optimizers.REFUSED) + len(optimizers.REFUSED_OPTIONS)


def test_doctor_ends_quietly_where_nobody_reads_on() -> None:
    command = [sys.executable, "-m", "accumkern", "doctor"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


def test_doctor_says_why_a_backend_that_is_set_cannot_run() -> None:
    env = os.environ | {"ACCUMKERN_BACKEND": "nonsense", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "accumkern", "doctor"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "ACCUMKERN_BACKEND is 'nonsense'; it must be one of" in done.stdout
