"""The front door: what accumulate_ does with good arguments, and that it refuses bad ones before it writes anything."""

import mmap
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from accumkern import accumulate_, available_backends, backends
from accumkern.formats import Format, Start, decode

BF16 = torch.bfloat16


def good() -> dict[str, Any]:
    return {
        "grads": [torch.ones(4, 3, dtype=BF16), torch.ones(5, dtype=BF16)],
        "sums": [torch.ones(4, 3, dtype=BF16), torch.ones(5, dtype=BF16)],
        "residuals": [torch.ones(4, 3, dtype=torch.int8), torch.ones(5, dtype=torch.int8)],
    }


def test_formats_and_devices_may_be_mixed(backend: str, device: torch.device) -> None:
    dtypes = [(BF16, torch.int8), (BF16, torch.int16), (torch.float16, torch.float32), (BF16, torch.float32)]
    grads = [torch.full((3, 2), 2.0**-12, dtype=d, device=device) for d, _ in dtypes]
    sums = [torch.ones(3, 2, dtype=d, device=device) for d, _ in dtypes]
    residuals = [torch.zeros(3, 2, dtype=r, device=device) for _, r in dtypes]
    residuals[2] += 1
    residuals[3] += 1
    for _ in range(4):
        accumulate_(grads, sums, residuals, 0.5, backend=backend)
    for total, residual, (sum_dtype, residual_dtype) in zip(sums, residuals, dtypes, strict=True):
        format_ = next(f for f in Format if (f.sum_dtype, f.residual_dtype) == (sum_dtype, residual_dtype))
        assert (decode(format_, total, residual) == 1 + 2.0**-11).all()


def test_float32_needs_no_residual(backend: str, device: torch.device) -> None:
    grads, sums = [torch.full((7,), 0.25, device=device)], [torch.ones(7, device=device)]
    accumulate_(grads, sums, scale=2, backend=backend)
    assert (sums[0] == 1.5).all()


def test_any_dense_order_of_dimensions(backend: str, device: torch.device) -> None:
    def laid_out(dtype: torch.dtype, fill: float) -> Tensor:
        return torch.full((2, 3, 4, 5), fill, dtype=dtype, device=device).to(memory_format=torch.channels_last)

    total, residual = laid_out(BF16, 1), laid_out(torch.int16, 0)
    grad = laid_out(BF16, 0)
    grad[1, 2, 3, 4] = 2.0**-10
    accumulate_([grad], [total], [residual], backend=backend)
    value = decode(Format.SPLIT32, total, residual)
    assert value[1, 2, 3, 4] == 1 + 2.0**-10
    assert value.sum() == 120 + 2.0**-10
    flat = torch.zeros(120, dtype=torch.int16, device=device)
    total = laid_out(BF16, 1)
    accumulate_([grad], [total], [flat], backend=backend)
    assert torch.equal(flat, residual.permute(0, 2, 3, 1).flatten())


def test_counts_as_an_in_place_change() -> None:
    arguments = good()
    versions = [total._version for total in arguments["sums"]]
    accumulate_(**arguments)
    assert all(total._version > v for total, v in zip(arguments["sums"], versions, strict=True))


def test_nothing_to_do() -> None:
    accumulate_([], [], [])
    accumulate_([], [])


def changed(name: str, i: int, make: Callable[[Tensor], Any]) -> Callable[[dict[str, Any]], None]:
    def change(arguments: dict[str, Any]) -> None:
        arguments[name][i] = make(arguments[name][i])

    return change


def set_to(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda arguments: arguments.update({name: value})


def overlapping(arguments: dict[str, Any]) -> None:
    arguments["sums"] = [torch.ones(12, dtype=BF16)]
    arguments["sums"] = [arguments["sums"][0][:12].view(4, 3), arguments["sums"][0][7:12]]


def overlapping_grad(arguments: dict[str, Any]) -> None:
    arguments["grads"][1] = arguments["sums"][1]


def overlapping_residual(arguments: dict[str, Any]) -> None:
    arguments["residuals"][1] = arguments["sums"][0].view(torch.int8).flatten()[:5]


def inference(tensor: Tensor) -> Tensor:
    with torch.inference_mode():
        return tensor.clone()


# case -> (change of good arguments, exception, words that the message must hold)
BAD: dict[str, tuple[Callable[[dict[str, Any]], None], type[Exception], str]] = {
    "grads is a tensor": (set_to("grads", torch.ones(3)), TypeError, "grads is a Tensor; it must be a list"),
    "grads is None": (set_to("grads", None), TypeError, "grads is a NoneType"),
    "an entry is no tensor": (
        changed("sums", 1, lambda t: 3.0),
        TypeError,
        r"sums\[1\] is a float; it must be a tensor",
    ),
    "sparse": (changed("grads", 1, lambda t: t.to_sparse()), TypeError, r"grads\[1\] has layout torch.sparse_coo"),
    "fewer sums": (lambda a: a["sums"].pop(), ValueError, "sums holds 1 tensors and grads 2"),
    "fewer residuals": (lambda a: a["residuals"].pop(), ValueError, "residuals holds 1 tensors and grads 2"),
    "float64 sum": (
        changed("sums", 1, lambda t: t.double()),
        TypeError,
        r"sums\[1\] is torch.float64; it must be torch.bf",
    ),
    "no residuals": (
        set_to("residuals", None),
        TypeError,
        r"residuals\[0\] is None .* must be torch.int8 or torch.int16",
    ),
    "uint8 residual": (changed("residuals", 1, lambda t: t.byte()), TypeError, r"residuals\[1\] is torch.uint8"),
    "fp16 with int8": (
        changed("sums", 0, lambda t: t.half()),
        TypeError,
        r"sums\[0\] of torch.float16; .* torch.float32",
    ),
    "fp32 with int8": (
        changed("sums", 0, lambda t: t.float()),
        TypeError,
        r"sums\[0\] of torch.float32; it must be None",
    ),
    "other grad dtype": (
        changed("grads", 1, lambda t: t.float()),
        TypeError,
        r"grads\[1\] is torch.float32 and sums\[1\]",
    ),
    "other shape": (
        changed("grads", 0, lambda t: t.t()),
        ValueError,
        r"grads\[0\] has shape \(3, 4\) and sums\[0\] \(4, 3\)",
    ),
    "broadcast": (
        changed("grads", 1, lambda t: t[:1]),
        ValueError,
        r"grads\[1\] has shape \(1,\) and sums\[1\] \(5,\)",
    ),
    "other strides": (
        changed("grads", 0, lambda t: t.t().contiguous().t()),
        ValueError,
        r"grads\[0\] has strides \(1, 4\)",
    ),
    "holes": (
        changed("sums", 1, lambda t: torch.ones(10, dtype=BF16)[::2]),
        ValueError,
        r"sums\[1\] .* strides \(2,\)",
    ),
    "expanded": (changed("sums", 1, lambda t: t[:1].expand(5)), ValueError, r"sums\[1\] .* strides \(0,\)"),
    "residual shape": (changed("residuals", 1, lambda t: t[:4]), ValueError, r"residuals\[1\] has shape \(4,\)"),
    "residual strides": (
        changed("residuals", 0, lambda t: t.t().contiguous().t()),
        ValueError,
        r"residuals\[0\] .* strides \(1, 4\)",
    ),
    "meta device": (
        changed("grads", 1, lambda t: t.to("meta")),
        ValueError,
        r"grads\[1\] is on meta and sums\[1\] on cpu",
    ),
    "negated view": (changed("grads", 1, torch._neg_view), ValueError, r"grads\[1\] is a lazily negated view"),
    "inference tensor": (changed("sums", 1, inference), ValueError, r"sums\[1\] was made in inference mode"),
    "sums overlap": (overlapping, ValueError, r"sums\[0\] and sums\[1\] overlap"),
    "grad is a sum": (overlapping_grad, ValueError, r"grads\[1\] and sums\[1\] overlap"),
    "residual in a sum": (overlapping_residual, ValueError, r"sums\[0\] and residuals\[1\] overlap"),
    "scale is a string": (set_to("scale", "2"), TypeError, "scale is a str; it must be a number or a floating 0-dim"),
    "scale is infinite in FP32": (set_to("scale", 1e300), ValueError, r"scale is 1e\+300; it must be finite in FP32"),
    "scale is NaN": (set_to("scale", float("nan")), ValueError, "scale is nan; it must be finite"),
    "scale is a vector": (set_to("scale", torch.ones(2)), ValueError, r"scale is a tensor of shape \(2,\)"),
    "scale is integer": (set_to("scale", torch.tensor(2)), ValueError, "scale is a tensor .* torch.int64"),
    "scale elsewhere": (set_to("scale", torch.ones((), device="meta")), ValueError, "scale is on meta and"),
    "unknown backend": (
        set_to("backend", "tritton"),
        ValueError,
        "backend is 'tritton'; it must be one of cuda, triton",
    ),
}


@pytest.mark.parametrize("case", BAD, ids=lambda case: case.replace(" ", "-"))
def test_bad_arguments_are_refused_and_nothing_is_written(case: str) -> None:
    change, error, words = BAD[case]
    arguments = good()
    change(arguments)
    tensors = [
        t
        for name in ("grads", "sums", "residuals")
        for t in (arguments[name] if isinstance(arguments[name], list) else [])
        if isinstance(t, Tensor) and t.layout is torch.strided and t.device.type == "cpu"
    ]
    before = [t.clone() for t in tensors]
    with pytest.raises(error, match=words):
        accumulate_(**arguments)
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))


def test_grads_may_overlap_each_other() -> None:
    arguments = good()
    arguments["grads"][1] = arguments["grads"][0].flatten()[2:7]
    accumulate_(**arguments)
    assert (arguments["sums"][1] == 2).all()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks the Linux kernel")
@pytest.mark.skipif(available_backends()["cpu"] is not None, reason=f"backend cpu: {available_backends()['cpu']}")
@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
def test_read_only_memory_is_refused() -> None:
    pages = mmap.mmap(-1, 4096, prot=mmap.PROT_READ)
    read_only = torch.frombuffer(pages, dtype=BF16, count=5)
    arguments = good()
    arguments["sums"][1] = read_only
    before = arguments["sums"][0].clone()
    with pytest.raises(ValueError, match=r"sums\[1\] lies in read-only memory; pass a clone"):
        accumulate_(**arguments)
    assert torch.equal(arguments["sums"][0], before)
    arguments = good()
    arguments["grads"][1] = read_only  # reading it is fine
    accumulate_(**arguments)
    assert (arguments["sums"][1] == 1).all()


@pytest.mark.parametrize("name", ["triton", "cuda", "cpu"])
def test_a_backend_asked_for_runs_or_says_why_not(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "accumkern.backends.unavailable", lambda wanted, _=None: "the moon is full" if wanted == name else None
    )
    with pytest.raises(RuntimeError, match=f"backend '{name}' cannot run on device 'cpu': the moon is full"):
        accumulate_(**good(), backend=name)
    accumulate_(**good(), backend="eager")
    accumulate_(**good())  # left to choose, another one runs


def test_of_the_backends_of_a_gpu_cuda_comes_first_where_it_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each GPU is asked for itself: the second is of an architecture that the extension was not built for."""
    monkeypatch.delenv("ACCUMKERN_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    missing = {("cuda", second)}
    monkeypatch.setattr(backends, "unavailable", lambda name, device=None: "no" if (name, device) in missing else None)
    assert [backends.choose(None, device) for device in (first, second)] == ["cuda", "triton"]
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run on device 'cuda:1': no"):
        backends.choose("cuda", second)
    missing |= {("triton", second)}
    assert backends.choose(None, second) == "eager"


@pytest.mark.skipif(available_backends()["cpu"] is not None, reason=f"backend cpu: {available_backends()['cpu']}")
def test_a_gpu_is_asked_whether_the_kernels_load(monkeypatch: pytest.MonkeyPatch) -> None:
    from accumkern.backends import problems

    asked: list[int] = []

    def cuda_problem(index: int) -> str:
        asked.append(index)
        return "no kernel image" if index == 1 else ""

    monkeypatch.setattr(backends, "_C", SimpleNamespace(cuda_targets="sm_90", cuda_problem=cuda_problem), raising=False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    problems._load_problem.cache_clear()
    try:
        for device in (None, torch.device("cuda"), torch.device("cuda", 0), torch.device("cpu")):
            assert backends.unavailable("cuda", device) is None
        reason = backends.unavailable("cuda", torch.device("cuda", 1))
        assert reason == "built for sm_90, and the kernels do not load on cuda:1: no kernel image"
        assert asked == [0, 1]
    finally:
        problems._load_problem.cache_clear()


def test_a_backend_refuses_tensors_of_another_device() -> None:
    meta = {name: [t.to("meta") for t in tensors] for name, tensors in good().items()}
    if available_backends()["cpu"] is None:
        with pytest.raises(RuntimeError, match="backend 'cpu' cannot run on device 'meta': it takes cpu tensors only"):
            accumulate_(**meta, backend="cpu")


def test_the_environment_sets_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCUMKERN_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="ACCUMKERN_BACKEND is 'nonsense'; it must be one of"):
        accumulate_(**good())
    accumulate_(**good(), backend="eager")  # an argument goes before it
    monkeypatch.setenv("ACCUMKERN_BACKEND", "eager")
    used = []
    original = backends.kernels
    monkeypatch.setattr(backends, "kernels", lambda name: used.append(name) or original(name))
    accumulate_(**good())
    assert used == ["eager"]


def test_without_kernels_nothing_is_written() -> None:
    arguments = good()
    before = [t.clone() for t in arguments["sums"] + arguments["residuals"]]
    accumulate_(**good(), backend="eager")  # its kernels are loaded
    with backends.without_kernels():
        with backends.without_kernels():
            accumulate_(**arguments, backend="eager")
        accumulate_(**arguments, backend="eager")
        # Fake tensors have shapes but no memory.
        with FakeTensorMode():
            sums = [torch.empty(4, dtype=BF16) for _ in range(3)]
            residuals = [torch.empty(4, dtype=torch.int8)]
            for name in backends.BACKENDS:
                kernels = backends.kernels(name)
                kernels.fold(Format.SPLIT24, Start.CONTINUE, sums[:1], sums[1:2], residuals, 1.0, None)
                kernels.finish(Format.SPLIT24, Start.CONTINUE, sums[:1], residuals, 2.0, 1.0)
                kernels.rescale(Format.SPLIT24, Start.CONTINUE, sums[:1], residuals, 2.0, 1.0)
                kernels.decode(Format.SPLIT24, sums[:1], residuals, sums[1:2])
                kernels.encode(Format.SPLIT24, sums[:1], 1.0, sums[1:2], residuals)
    assert all(torch.equal(t, b) for t, b in zip(arguments["sums"] + arguments["residuals"], before, strict=True))
    accumulate_(**arguments, backend="eager")
    assert (arguments["sums"][0] == 2).all()
