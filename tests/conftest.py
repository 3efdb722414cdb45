"""What all tests share: a fixed seed, triton's interpreter where there is no GPU, and who skips with which reason."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch
from compatibility import Recorder

if TYPE_CHECKING:
    from ranks import Ranks

# Without a GPU the triton kernels run in triton's interpreter, which must be chosen before triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-compatibility",
        action="store_true",
        help="write what the tests marked integration show to docs/compatibility.json and .md",
    )


def pytest_configure(config: pytest.Config) -> None:
    # Who is started in the background ignores SIGINT, and so would all that tests start and interrupt.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.getoption("--write-compatibility"):
        if config.getoption("numprocesses", default=None):
            raise pytest.UsageError("--write-compatibility needs all tests in one process; leave -n out")
        config.pluginmanager.register(Recorder())


@pytest.hookimpl(tryfirst=True)  # before pytest chooses by -m
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):  # of pytest-xdist: files that take long go first, so that all end together
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    if torch.cuda.is_available():
        for item in items:  # what runs on the CPU elsewhere is a test of the GPU here
            params = getattr(item, "callspec", None)
            backend = params.params.get("backend") if params else None
            if backend in ("triton", "cuda") or (backend == "eager" and item.get_closest_marker("eager_on_gpu")):
                item.add_marker(pytest.mark.gpu)
        return
    from accumkern import available_backends

    reasons = {name: reason for name, reason in available_backends().items() if name in ("triton", "cuda")}
    reasons["triton"] = reasons["triton"] or "torch finds no GPU"
    for item in items:
        if item.get_closest_marker("gpu"):
            params = getattr(item, "callspec", None)
            backend = params.params.get("backend") if params else None
            item.add_marker(pytest.mark.skip(reason=f"needs a GPU: {reasons.get(str(backend)) or reasons['cuda']}"))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Only what nobody refers to goes away."""
    torch.optim.SGD([torch.zeros(1)], lr=1.0)  # torch's first optimizer leaves circles of its own
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tiny models, whose threads would mostly wait for each other, and for sums in one order in every process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["cpu", "cuda", "triton", "eager"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend that can run here on `device`, the cpu one with two threads; the others skip with their reason."""
    from accumkern import available_backends, backends

    name: str = request.param
    reason = available_backends()[name]
    if reason is None:
        on = "cpu" if name == "cpu" else DEVICE
        reason = backends.refusal(name, on)
    if reason is not None:
        pytest.skip(f"backend {name}: {reason}")
    threads = torch.get_num_threads()
    torch.set_num_threads(2 if name == "cpu" else threads)
    yield name
    torch.set_num_threads(threads)


@pytest.fixture
def device(backend: str) -> torch.device:
    """Where the backend's tensors are."""
    return torch.device("cpu" if backend == "cpu" else DEVICE)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Record each launch of a kernel: the numbers of elements of its tensors."""
    from accumkern import backends

    recorded: list[list[int]] = []
    original = backends.kernels

    def kernels(name: str) -> Any:
        found = original(name)

        def fold_and_record(format_, start, grads, *others):  # type: ignore[no-untyped-def]
            recorded.append([grad.numel() for grad in grads])
            found.fold(format_, start, grads, *others)

        def fold_alike_and_record(format_, grads, *others):  # type: ignore[no-untyped-def]
            is_folded = found.fold_alike(format_, grads, *others)
            if is_folded:
                recorded.append([grad.numel() for grad in grads])
            return is_folded

        def fold_into_and_record(*place):  # type: ignore[no-untyped-def]
            add = found.fold_into(*place)

            def add_and_record(grad, *others):  # type: ignore[no-untyped-def]
                is_folded = add(grad, *others)
                if is_folded:
                    recorded.append([grad.numel()])
                return is_folded

            return add_and_record

        return found._replace(fold=fold_and_record, fold_into=fold_into_and_record, fold_alike=fold_alike_and_record)

    monkeypatch.setattr(backends, "kernels", kernels)
    return recorded


@pytest.fixture(params=[False, True], ids=["at once", "waiting"])
def waiting(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether small gradients wait for the end of the backward pass, as on a GPU."""
    from accumkern import waiting

    if request.param:
        monkeypatch.setattr(waiting, "WAITING_DEVICE_TYPES", frozenset({"cpu", "cuda"}))
    return request.param


@pytest.fixture(params=[None, 4], ids=["sum", "average"])
def average_over(request: pytest.FixtureRequest) -> int | None:
    return request.param


@pytest.fixture(scope="session", params=["gloo", pytest.param("nccl", marks=pytest.mark.gpu)])
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    """Processes that can be the ranks of a process group."""
    from ranks import Ranks

    if not torch.distributed.is_available():
        pytest.skip("torch is built without torch.distributed")
    if request.param == "nccl" and not torch.distributed.is_nccl_available():
        pytest.skip("torch is built without NCCL")
    processes = Ranks(request.param)
    yield processes
    processes.stop()
