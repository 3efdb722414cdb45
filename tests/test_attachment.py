"""Who holds whom: optimizer, accumulator and hooks; what is attached to an optimizer; what cannot be watched."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import accumkern
from accumkern import torch_private
from accumkern.formats import Format, decode


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Only what nobody refers to goes away."""
    torch.optim.SGD([parameter(1)], lr=1.0)  # torch's first optimizer leaves circles of its own
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def parameter(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Parameter:
    return Parameter(torch.zeros(shape, dtype=dtype))


def backward(param: Tensor, value: float) -> None:
    (param.float() * value).sum().backward()


def is_averaged(param: Tensor) -> bool:
    """Return whether average_over=2 is at work."""
    param.grad = None
    backward(param, 4.0)
    assert param.grad is not None
    averaged = bool((param.grad == 2).all())
    assert averaged or bool((param.grad == 4).all())
    param.grad = None
    return averaged


# ---- who holds whom ----------------------------------------------------------------------------------------------


def test_hooks_live_as_long_as_the_optimizer_and_no_longer(no_collector: None) -> None:
    param = parameter(4)
    optimizer = torch.optim.SGD([param], lr=1.0)
    accumkern.attach(optimizer, average_over=2)
    assert is_averaged(param)
    del optimizer
    assert not is_averaged(param)
    assert not param._post_accumulate_grad_hooks


def test_an_accumulator_that_is_kept_keeps_the_optimizer(no_collector: None) -> None:
    param = parameter(4)
    acc = accumkern.attach(torch.optim.SGD([param], lr=1.0), average_over=2)
    assert is_averaged(param)
    assert acc.gradient(param) is None
    del acc
    assert not is_averaged(param)


def test_nothing_is_left_in_a_circle(no_collector: None) -> None:
    """With the noise scale, the report and a step, whatever was made goes away with its last reference."""
    param = parameter(4)
    optimizer = torch.optim.SGD([param], lr=1.0)
    acc = accumkern.attach(optimizer, stats=True, report=True)
    for _ in range(2):
        backward(param, 1.0)
    acc.noise_scale()
    acc.finish()
    optimizer.step()
    gone = [weakref.ref(x) for x in (acc, optimizer, acc._attachment, acc._passes, acc._attachment.slots[param])]
    del acc, optimizer
    assert [reference() for reference in gone] == [None] * 5


@pytest.mark.parametrize("kept", [False, True], ids=["result dropped", "result kept"])
def test_a_cell_that_is_run_again(no_collector: None, kept: bool) -> None:
    """The optimizer and its accumulator have the same names; the second replaces the first."""
    param = parameter(4)
    names: dict[str, object] = {}
    for _ in range(2):
        names["optimizer"] = optimizer = torch.optim.SGD([param], lr=1.0)
        if kept and names.get("acc") is not None:
            with pytest.raises(ValueError, match=r"accumulator_of\(optimizer\)"):
                accumkern.attach(optimizer, average_over=2)
            earlier = accumkern.accumulator_of(optimizer)
            assert earlier is names["acc"]
            assert earlier is not None
            earlier.detach()
        acc = accumkern.attach(optimizer, average_over=2)
        if kept:
            names["acc"] = acc
        assert is_averaged(param)
        del acc, optimizer


def test_an_optimizer_in_a_circle_is_looked_for_before_a_refusal(no_collector: None) -> None:
    class Trainer:
        def __init__(self, param: Tensor) -> None:
            self.optimizer = torch.optim.SGD([param], lr=1.0)
            self.me = self

    param = parameter(4)
    for _ in range(2):
        accumkern.attach(Trainer(param).optimizer, average_over=2)


def test_copies_of_an_optimizer_have_nothing_of_ours() -> None:
    param = parameter(4)
    optimizer = torch.optim.SGD([param], lr=1.0)
    accumkern.attach(optimizer)
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert accumkern.accumulator_of(other) is None
        assert "add_param_group" not in vars(other)


# ---- accumulator_of ----------------------------------------------------------------------------------------------


def test_accumulator_of_returns_what_is_attached() -> None:
    param = parameter(4)
    optimizer = torch.optim.SGD([param], lr=1.0)
    assert accumkern.accumulator_of(optimizer) is None
    acc = accumkern.attach(optimizer)
    assert accumkern.accumulator_of(optimizer) is acc
    acc.detach()
    assert accumkern.accumulator_of(optimizer) is None


def test_accumulator_of_finds_one_whose_result_was_dropped(no_collector: None) -> None:
    """It goes on where it was: scale, window, and the count that lets finish() be called once."""
    param = parameter(4)
    optimizer = torch.optim.SGD([param], lr=1.0)
    accumkern.attach(optimizer, "split32", average_over=2)
    backward(param, 1.0)
    backward(param, 2.0)
    acc = accumkern.accumulator_of(optimizer)
    assert acc is not None
    assert (acc.buffer, acc.scale) == ("split32", 0.5)
    assert (acc.gradient(param) == 1.5).all()
    acc.finish()
    del acc
    again = accumkern.accumulator_of(optimizer)
    assert again is not None
    with pytest.raises(RuntimeError, match="already since the last backward pass"):
        again.finish()
    again.detach()
    assert not is_averaged(param)


def test_accumulator_of_a_wrapper_and_of_what_it_wraps() -> None:
    class Wrapper:
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer
            self.param_groups = optimizer.param_groups

        def add_param_group(self, group: dict[str, object]) -> None:
            self.optimizer.add_param_group(group)

    optimizer = torch.optim.SGD([parameter(4)], lr=1.0)
    wrapper = Wrapper(optimizer)
    acc = accumkern.attach(wrapper)  # type: ignore[arg-type]
    assert accumkern.accumulator_of(wrapper) is acc  # type: ignore[arg-type]
    assert accumkern.accumulator_of(optimizer) is acc


@pytest.mark.parametrize("wrong", [None, 3, [parameter(4)]], ids=["None", "number", "list"])
def test_accumulator_of_refuses_what_is_no_optimizer(wrong: object) -> None:
    with pytest.raises(TypeError, match=r"optimizer is a .*; it must be a torch\.optim\.Optimizer"):
        accumkern.accumulator_of(wrong)  # type: ignore[arg-type]


# ---- what cannot be watched --------------------------------------------------------------------------------------


class Slotted:
    """A wrapper without room for another attribute."""

    __slots__ = ("optimizer",)

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> list[dict[str, object]]:
        return self.optimizer.param_groups

    def add_param_group(self, group: dict[str, object]) -> None:
        self.optimizer.add_param_group(group)


class ReadOnly(torch.optim.SGD):
    def __setattr__(self, name: str, value: object) -> None:
        if name == "add_param_group":
            raise AttributeError("read only")
        super().__setattr__(name, value)


@pytest.mark.parametrize("kind", [Slotted, ReadOnly], ids=["__slots__", "read only"])
def test_a_refused_optimizer_leaves_no_hooks(kind: type) -> None:
    param = parameter(4)
    optimizer = Slotted(torch.optim.SGD([param], lr=1.0)) if kind is Slotted else ReadOnly([param], lr=1.0)
    with pytest.raises(TypeError, match=f"optimizer is a {kind.__name__}, whose add_param_group cannot be watched"):
        accumkern.attach(optimizer, average_over=2)  # type: ignore[arg-type]
    assert not is_averaged(param)


# ---- parts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("buffer", "format_"),
    [("split24", Format.SPLIT24), ("split32", Format.SPLIT32), ("fp32", Format.MAIN_GRAD_BFLOAT16)],
    ids=["split24", "split32", "fp32"],
)
def test_parts_are_what_is_stored(buffer: str, format_: Format) -> None:
    param = Parameter(torch.zeros(3, 5, 2, 2, dtype=torch.bfloat16).to(memory_format=torch.channels_last))
    acc = accumkern.attach(torch.optim.SGD([param], lr=1.0), buffer)
    assert acc.parts(param) is None
    backward(param, 1.0)
    first = acc.parts(param)
    assert first is not None
    assert first.residual is None  # the first gradient is kept as it came
    for n in range(3):
        backward(param, 1 / (n + 3))
    parts = acc.parts(param)
    assert parts is not None
    assert parts.sum is param.grad
    assert parts.format is format_
    assert parts.residual is not None
    assert (parts.residual.shape, parts.residual.stride()) == (param.grad.shape, param.grad.stride())
    assert torch.equal(decode(parts.format, parts.sum, parts.residual), acc.gradient(param))
    param.grad.mul_(2)  # an edit: the residual counts as zero
    edited = acc.parts(param)
    assert edited is not None
    assert edited.residual is None


def test_parts_of_what_torch_adds_by_itself_have_no_format() -> None:
    param = Parameter(torch.zeros(4, dtype=torch.complex64))
    acc = accumkern.attach(torch.optim.SGD([param], lr=1.0))
    param.real.sum().backward()
    parts = acc.parts(param)
    assert parts is not None
    assert parts.sum is param.grad
    assert (parts.residual, parts.format) == (None, None)
    with pytest.raises(ValueError, match="not a parameter of the attached optimizer"):
        acc.parts(torch.zeros(1))


# ---- memory that grows -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("buffer", ["split24", "split32", "fp32"])
@pytest.mark.parametrize("sizes", [((8, 4), (700, 400)), ((700, 400), (8, 4))], ids=["grows", "shrinks"])
def test_a_parameter_of_another_size_gets_a_residual_of_that_size(
    buffer: str, sizes: tuple[tuple[int, int], tuple[int, int]]
) -> None:
    """``set_`` leaves the hooks where they are; a kernel must not write beyond the memory that there was."""
    before, after = sizes
    param = parameter(*before)
    acc = accumkern.attach(torch.optim.SGD([param], lr=1.0), buffer)
    for _ in range(2):
        backward(param, 1.0)
    acc.finish(max_norm=1e9)  # folds leave partial sums from now on
    param.grad = None
    with torch.no_grad():
        param.set_(torch.zeros(after, dtype=torch.bfloat16))
    for value in (1.0, 2.0**-9, 2.0**-9):
        backward(param, value)
    parts = acc.parts(param)
    assert parts is not None
    assert parts.residual is not None
    assert parts.residual.shape == after
    assert (acc.gradient(param) == 1 + 2.0**-8).all()
    count = param.numel()
    torch.testing.assert_close(acc.finish().norm, torch.tensor((1 + 2.0**-8) * count**0.5))


@pytest.mark.parametrize("size", [2, 90000])
def test_a_sum_that_is_replaced_while_it_waits_is_not_written_beyond(size: int) -> None:
    first, second = parameter(8), parameter(8)
    optimizer = torch.optim.SGD([first, second], lr=1.0)
    accumkern.attach(optimizer, "split32")
    for _ in range(2):
        (first.float() + second.float()).sum().backward()

    arrived: list[Parameter] = []

    def arrive(param: Parameter) -> None:
        for waiting in arrived:  # small gradients wait for the end of the backward pass
            assert waiting.grad is not None
            waiting.grad.data = torch.zeros(size, dtype=torch.bfloat16)
        arrived.append(param)

    for param in (first, second):
        param.register_hook(lambda _, param=param: arrive(param))
    with pytest.raises(ValueError, match="given another size in the middle of a backward pass"):
        (first.float() + second.float()).sum().backward()


# ---- torch -------------------------------------------------------------------------------------------------------


def test_a_torch_without_a_private_name_is_refused_at_attach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_private, "_missing", ["torch._C._current_graph_task_id"])
    param = parameter(4)
    with pytest.raises(RuntimeError, match=r"torch .* has no torch\._C\._current_graph_task_id, which accumkern needs"):
        accumkern.attach(torch.optim.SGD([param], lr=1.0), average_over=2)
    assert not is_averaged(param)


def test_a_name_that_torch_lacks_is_noted() -> None:
    missing = list(torch_private._missing)
    assert missing == []
    try:
        assert torch_private._find("_C._no_such_name") is None
        assert torch_private._missing == ["torch._C._no_such_name"]
    finally:
        torch_private._missing[:] = missing
