"""A setup whose tensors are fake: they have shapes but no memory."""

from __future__ import annotations

import re
import sysconfig
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode

from accumkern import backends
from accumkern.casting import set_cut_off_aside
from accumkern.out_of_memory import CpuLimit
from accumkern.planning.kernels import MissingKernels
from accumkern.planning.memory import available_bytes
from accumkern.planning.protocol import Setup, SetupFunction, make_batch, run_setup
from accumkern.random_state import RandomState
from accumkern.torch_private import (
    NEEDS_VALUES,
    FakeTensorMode,
    TorchDispatchMode,
    is_fake,
    is_flattened,
    tree_map,
    without_fake_tensors,
    without_rejection,
)


class PredictionError(RuntimeError):
    """A script cannot be run on fake tensors; measuring on the device still works."""


@contextmanager
def fake_setup(function: SetupFunction) -> Iterator[Setup]:
    """Call ``setup()``, let everything that it makes be fake, and stay in that mode for the block.

    First it runs in that mode, which needs no memory, so that a model may be larger than the machine. Where it needs
    values of tensors, it runs for real, with the memory of its model, and fakes take the places of parameters, buffers
    and optimizer state; afterwards these are there again. Batches are made for real, if they can be and there is memory
    for them, or else in that mode.

    Raises:
        PredictionError: ``setup()`` fails in both ways, or something in the block needs values of tensors (``item()``,
            shapes that depend on data), or something else that fake tensors don't have. It says where.
        TypeError, ValueError: ``setup()`` does not follow the protocol.
    """
    random_state = RandomState(torch.device("cuda" if torch.cuda.is_initialized() else "cpu"))
    put_cut_off_back = set_cut_off_aside()
    try:
        with warnings.catch_warnings(), ExitStack() as stack:
            # deepcopy() of a fake parameter, as TransformerEncoder does with its layers, asks for its address.
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor is deprecated", UserWarning)
            mode = _fake_mode()
            setup = _made_in(mode, function, stack) or _made_outside(mode, function, stack)
            for block in (mode, _RealArrays(), MissingKernels()):
                stack.enter_context(block)
            set_cut_off_aside()  # what is fake has no values to begin masters with
            yield setup
    except PredictionError:
        raise
    except RuntimeError as error:
        raise PredictionError(_explained(error)) from error
    finally:
        put_cut_off_back()
        random_state.put_back()


def _made_in(mode: Any, function: SetupFunction, stack: ExitStack) -> Setup | None:
    """Return what ``setup()`` makes in the mode, or None where it, or a batch, cannot be made there."""
    try:
        with mode, _RealArrays(), backends.without_kernels(), without_rejection():
            setup = _unwrapped(run_setup(function))
            if setup.device.type == "cuda" and not torch.cuda.is_available():
                return None  # outside of the mode torch says so
            stack.enter_context(_fakes_inside(mode, setup))
            setup = _with_fake_batches(mode, setup)
            make_batch(setup, 1, "longest_batch")
    except RuntimeError:
        stack.pop_all().close()
        return None
    return setup


def _made_outside(mode: Any, function: SetupFunction, stack: ExitStack) -> Setup:
    """Return what ``setup()`` makes for real, if there is memory for it, with fakes in it."""
    with CpuLimit(0, available_bytes(torch.device("cpu"))):
        setup = _unwrapped(run_setup(function))
    stack.enter_context(_fakes_inside(mode, setup))
    return _with_fake_batches(mode, setup)


def _unwrapped(setup: Setup) -> Setup:
    """Return a setup whose backward pass waits for no other rank; raise where that of a sharded model would."""
    if isinstance(setup.model, DistributedDataParallel):
        setup = setup._replace(model=setup.model.module)
    if setup.is_sharded or any(map(is_flattened, setup.model.parameters())):
        raise PredictionError(
            "memory cannot be predicted, because the model of setup() is sharded over ranks; measure it"
        )
    return setup


@contextmanager
def _fakes_inside(mode: Any, setup: Setup) -> Iterator[None]:
    """Let fakes take the places of a real model's parameters and buffers, and of its optimizer's state, for the block.

    The model stays the object that closures of the script know. Each tensor has one fake, wherever it stands.
    """
    fakes: dict[Tensor, Tensor] = {}

    def fake(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or is_fake(leaf):
            return leaf
        if leaf not in fakes and leaf.dim() == 0 and leaf.device.type == "cpu" and not leaf.requires_grad:
            with without_fake_tensors():
                value = leaf.item()
            with mode:
                fakes[leaf] = torch.tensor(value, dtype=leaf.dtype)  # optimizers read the steps that they have made
        elif leaf not in fakes:
            fakes[leaf] = mode.from_tensor(leaf)
            fakes[leaf].grad = None
        return fakes[leaf]

    optimizer = setup.optimizer
    modules = [(module, dict(module._parameters), dict(module._buffers)) for module in setup.model.modules()]
    groups = [(group, dict(group)) for group in optimizer.param_groups]
    states = dict(optimizer.state)
    try:
        for module, parameters, buffers in modules:
            _put_into(module, tree_map(fake, parameters), tree_map(fake, buffers))
        for group, settings in groups:
            group["params"] = [fake(param) for param in settings["params"]]
        optimizer.state.clear()
        optimizer.state.update({fake(param): tree_map(fake, state) for param, state in states.items()})
        yield
    finally:
        for module, parameters, buffers in modules:
            _put_into(module, parameters, buffers)
        for group, settings in groups:
            group.clear()
            group.update(settings)
        optimizer.state.clear()
        optimizer.state.update(states)


def _put_into(module: torch.nn.Module, parameters: dict[str, Any], buffers: dict[str, Any]) -> None:
    for name, param in parameters.items():
        if module._parameters[name] is not param:
            setattr(module, name, param)  # recurrent networks keep lists of their parameters up to date in it
    module._buffers.update(buffers)


def _with_fake_batches(mode: Any, setup: Setup) -> Setup:
    """Return the setup with functions, to be called in the mode, that make fake batches, of real ones if possible."""

    def fake(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or is_fake(leaf):
            return leaf
        if type(leaf) is not Tensor or leaf.layout is not torch.strided:
            return mode.from_tensor(leaf)
        # Of its own size, also where it is a part of a data set.
        fake = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=leaf.device)
        return fake.requires_grad_(leaf.requires_grad)

    def faked(function: Callable[[int], Any]) -> Callable[[int], Any]:
        def make(size: int) -> Any:
            with without_fake_tensors():
                try:
                    with CpuLimit(0, available_bytes(torch.device("cpu"))):
                        batch = function(size)
                except Exception:  # the mode's own error is told where both fail
                    batch = None
            return tree_map(fake, function(size) if batch is None else batch)

        return make

    longest = setup.longest_batch
    return setup._replace(make_batch=faked(setup.make_batch), longest_batch=None if longest is None else faked(longest))


class _RealArrays(TorchFunctionMode):
    """Lets numpy see the values of real tensors in the mode, where it would read memory that is not theirs."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        is_read = func in (Tensor.numpy, Tensor.__array__) and not is_fake(args[0])
        with without_fake_tensors() if is_read else nullcontext():
            return func(*args, **(kwargs or {}))


class StepValues(TorchDispatchMode):
    """Lets an optimizer's step read numbers of fake tensors that have none, such as norms: each is 1.

    How much memory a step needs does not depend on them, as it may in a loss. Truth values have no stand-in, since an
    ``if`` in a step may end it.
    """

    def __enter__(self) -> StepValues:
        self._is_stepping = False
        self._hooks = (
            register_optimizer_step_pre_hook(lambda *_: self._let_be(True)),
            register_optimizer_step_post_hook(lambda *_: self._let_be(False)),
        )
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for hook in self._hooks:
            hook.remove()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        try:
            return func(*args, **(kwargs or {}))
        except NEEDS_VALUES:
            is_number = func is torch.ops.aten._local_scalar_dense.default and args[0].dtype is not torch.bool
            if not (self._is_stepping and is_number):
                raise
            return 1.0 if args[0].dtype.is_floating_point else 1

    def _let_be(self, is_stepping: bool) -> None:
        self._is_stepping = is_stepping


def _fake_mode() -> Any:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    # Its memo holds weak references, and module.to(...) refuses to swap a parameter that has any
    # (https://github.com/pytorch/pytorch/pull/184976). What has to be converted once has a memo of its own.
    mode.fake_tensor_converter.set_tensor_memo = lambda tensor, fake: None
    return mode


# ---- why not -----------------------------------------------------------------------------------------------------


def _explained(error: BaseException) -> str:
    """Return what kept a script from being predicted, its line, and what can be done."""
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    reason = str(error).partition("\n")[0]  # torch adds advice that does not apply
    advice = "measure, without --predict, where the model is to train"
    if isinstance(cause, NEEDS_VALUES):
        advice = (
            "a prediction knows shapes and no values: leave out there what needs them (item(), tolist(), an if, shapes "
            f"that depend on data), or {advice}"
        )
    elif not torch.cuda.is_available() and re.search("cuda|nvidia", str(cause), re.IGNORECASE):
        advice = (
            "there is no GPU here: let setup() choose the CPU where torch.cuda.is_available() is False. A prediction "
            "for a GPU needs none"
        )
    elif isinstance(cause, TypeError):
        advice = f"does it run by itself? If not, that is what to mend; or {advice}"
    line = _line_of_script(cause)
    where = "" if line is None else f", at {line.filename}:{line.lineno}: {line.line}"
    return f"memory cannot be predicted, because the script does not run on fake tensors: {reason}{where}; {advice}"


def _line_of_script(error: BaseException) -> traceback.FrameSummary | None:
    """Return the last line that an error passed that is not of torch or another library."""
    own = {Path(__file__).parent.parent, Path(torch.__file__).parent}
    own |= {Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")}
    frames = traceback.extract_tb(error.__traceback__)
    found = [frame for frame in frames if not own & set(Path(frame.filename).parents)]
    return found[-1] if found else None
