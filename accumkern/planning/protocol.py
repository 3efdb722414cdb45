"""What a script has to provide: ``setup()`` returns a model, its optimizer, a maker of batches and a loss.

A script that can be planned for::

    def setup():
        model = GPT().to(torch.bfloat16)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        text = read_text()

        def make_batch(size):                  # `size` samples, in the first dimension of the batch's tensors
            return random_batch(text, size)

        def loss(model, batch):                # the mean loss over the batch, ready for backward()
            return model(batch)

        return model, optimizer, make_batch, loss

More can be said by returning a :class:`Setup` with its optional fields.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from inspect import Parameter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from accumkern.checks import describe, real
from accumkern.dtensor import computes_on, is_dtensor
from accumkern.fully_shard_private import mesh_of, sharded_groups, sharded_modules
from accumkern.out_of_memory import is_out_of_memory
from accumkern.ranks import RanksError
from accumkern.torch_private import NEEDS_VALUES, tree_leaves


class Setup(NamedTuple):
    """What ``setup()`` returns: the first four fields, as a plain tuple if you like; the others are optional.

    Attributes:
        model: in training mode, on the device to train on.
        optimizer: of the model's parameters.
        make_batch: takes a number of samples and returns a batch of so many, on the model's device: a tensor, or
            tensors in tuples, lists and dicts. The samples lie in their first dimension. It draws from torch's random
            numbers, or from a generator that was seeded with ``torch.initial_seed()``.
        loss: takes the model and a batch, and returns the mean loss of the batch: a floating 0-dim tensor.
        longest_batch: as ``make_batch``, with every sample as long as samples can get. What fits is tried with it. None
            says that ``make_batch`` makes such batches already.
        validation_batch: as ``make_batch``, with samples that are never trained on. A sweep measures the loss on it.
            None lets it draw other samples with ``make_batch``.
        tokens_per_sample: lets speed and progress be told in tokens too; a positive number.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    make_batch: Callable[[int], Any]
    loss: Callable[[nn.Module, Any], Tensor]
    longest_batch: Callable[[int], Any] | None = None
    validation_batch: Callable[[int], Any] | None = None
    tokens_per_sample: float | None = None

    @property
    def device(self) -> torch.device:
        """That computes with the model's first parameter."""
        return computes_on(next(self.model.parameters()))

    @property
    def is_sharded(self) -> bool:
        """Whether parameters are DTensors, of which each rank holds a part (``fully_shard``)."""
        return any(is_dtensor(param) for param in self.model.parameters())


SetupFunction = Callable[[], Any]

WANTED = "model, optimizer, make_batch and loss"


class SetupError(ValueError):
    """What was given cannot be made a setup of; it is told as it is."""


def run_setup(function: SetupFunction) -> Setup:
    """Call ``function`` and return what it returned, checked.

    Raises:
        TypeError: a part is of the wrong kind, or ``function`` is not one.
        ValueError: there are not four parts, a parameter of the optimizer is not of the model, nothing is trained, or
            the model is on several devices or spread over ranks by something else than ``fully_shard``.
        RuntimeError: ``function`` raised an error of its own.
        SetupError: it says why what it was made of cannot be planned for.
    """
    if not callable(function):
        raise TypeError(f"setup is a {type(function).__name__}; it must be a function that returns {WANTED}")
    try:
        returned = function()
    except SetupError:
        raise
    except (Exception, SystemExit) as error:
        raise RuntimeError(f"setup() raised {describe(error)}; run it by itself to see where") from error
    return check_setup(returned)


def check_setup(returned: Any) -> Setup:
    """Return what ``setup()`` returned as a :class:`Setup`, or raise as :func:`run_setup` says."""
    if not isinstance(returned, tuple):
        raise TypeError(f"setup() returned a {type(returned).__name__}; it must return {WANTED}, as a tuple")
    if not isinstance(returned, Setup) and len(returned) != 4:
        raise ValueError(f"setup() returned {len(returned)} things; it must return {WANTED}")
    setup = returned if isinstance(returned, Setup) else Setup(*returned)
    tokens = setup.tokens_per_sample
    parts = {
        "model": (isinstance(setup.model, nn.Module), "a torch.nn.Module"),
        "optimizer": (isinstance(setup.optimizer, torch.optim.Optimizer), "a torch.optim.Optimizer"),
        "make_batch": (callable(setup.make_batch), "a function"),
        "loss": (callable(setup.loss), "a function"),
        "longest_batch": (setup.longest_batch is None or callable(setup.longest_batch), "a function, or None"),
        "validation_batch": (setup.validation_batch is None or callable(setup.validation_batch), "a function, or None"),
    }
    for name, (is_right, kind) in parts.items():
        if not is_right:
            raise TypeError(f"{name} of setup() is a {type(getattr(setup, name)).__name__}; it must be {kind}")
    if tokens is not None:
        right = "it must be a positive number, or None"
        tokens = real("tokens_per_sample of setup()", tokens, right)
        if not 0 < tokens < float("inf"):
            raise ValueError(f"tokens_per_sample of setup() is {tokens}; {right}")
    for module in sharded_modules(setup.model):
        module.reshard()  # what a forward pass in setup() may have left gathered, such as the root's weights
    _check_parameters(setup)
    _check_step(setup.optimizer)
    return setup._replace(tokens_per_sample=tokens)


def _check_parameters(setup: Setup) -> None:
    of_model = set(setup.model.parameters())
    if not any(param.requires_grad for param in of_model):
        raise ValueError("model of setup() has no parameter that requires a gradient; there is nothing to train")
    of_optimizer = [param for group in setup.optimizer.param_groups for param in group["params"]]
    strange = sum(param not in of_model for param in of_optimizer)
    if strange:
        raise ValueError(
            f"{strange} of the optimizer's {len(of_optimizer)} parameters are not the model's; make the optimizer from "
            "model.parameters(), after the model was moved and cast"
        )
    devices = sorted({str(computes_on(param)) for param in of_model})
    if len(devices) > 1:
        raise ValueError(f"model of setup() is on several devices ({', '.join(devices)}); put it on one")
    if setup.device.type == "meta":
        raise ValueError("model of setup() is on the meta device, without memory; put it on the device to train on")
    meshes = {mesh_of(group) for group in sharded_groups(sharded_modules(setup.model))}
    for name, param in setup.model.named_parameters():
        spread: Any = param
        if is_dtensor(param) and spread.device_mesh not in meshes:
            raise ValueError(
                f"{name} of setup()'s model is spread over ranks as {spread.placements} by something else than "
                "fully_shard, such as tensor parallel: its ranks train on the same batch, and a plan takes each to "
                "have one of its own; plan the model without it"
            )


def _check_step(optimizer: torch.optim.Optimizer) -> None:
    # Of the class: a scheduler wraps that of the optimizer in a plain function, which is bound to it otherwise.
    parameters = list(inspect.signature(type(optimizer).step).parameters.values())[1:]
    named = [
        parameter for parameter in parameters if parameter.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    ]
    needed = [parameter.name for parameter in named if parameter.default is Parameter.empty]
    if needed:
        raise TypeError(
            f"optimizer of setup() is a {type(optimizer).__name__}, whose step() needs {', '.join(needed)}; memory and "
            "time are those of windows that end with step(), which has to work without arguments: let setup() return "
            "an optimizer whose step() does, or derive one whose step() gives them"
        )


def make_batch(setup: Setup, size: int, kind: str = "make_batch") -> Any:
    """Return a batch of ``size`` samples from the setup's function of the name ``kind``, checked.

    Raises:
        RuntimeError: the function raised an error of its own; running out of memory is passed on as it is.
        ValueError: no tensor of the batch has ``size`` samples in its first dimension.
        TypeError: there is no tensor in it.
    """
    function = getattr(setup, kind)
    if function is None:
        function, kind = setup.make_batch, "make_batch"
    advice = (
        f"; where there are fewer samples than {size}, or they have come to an end, let {kind} draw with replacement, "
        "or ask for smaller micro-batches"
    )
    batch = _called(f"{kind}({size})", function, size, advice=advice)
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    if not tensors:
        raise TypeError(f"{kind}({size}) of setup() returned a {type(batch).__name__} without a tensor in it")
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if not any(shape[:1] == (size,) for shape in shapes):
        raise ValueError(
            f"{kind}({size}) of setup() made tensors of shape {', '.join(map(str, shapes))}; the first dimension of "
            f"one of them must be {size}{advice}"
        )
    return batch


def compute_loss(setup: Setup, batch: Any) -> Tensor:
    """Return the setup's loss of a batch from :func:`make_batch`, checked.

    Raises:
        TypeError: it is not a floating tensor.
        ValueError: it is not of one element, or has no graph to go backward through.
        RuntimeError: the function raised an error of its own; running out of memory is passed on as it is.
    """
    loss = _called("loss", setup.loss, setup.model, batch)
    if not isinstance(loss, Tensor) or not loss.is_floating_point():
        found = f"{loss.dtype} tensor" if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(f"loss of setup() returned a {found}; it must return a floating tensor of one element")
    if loss.dim() != 0:
        raise ValueError(f"loss of setup() returned shape {tuple(loss.shape)}; it must be 0-dim: take the mean")
    if torch.is_grad_enabled() and not loss.requires_grad:
        raise ValueError(
            "loss of setup() returned a tensor without a graph; don't detach it, call item(), or use no_grad()"
        )
    return loss


def step(setup: Setup) -> None:
    """Step the setup's optimizer.

    Raises:
        RuntimeError: it raised an error of its own; running out of memory is passed on as it is.
    """
    _called("step() of the optimizer", setup.optimizer.step, advice="; it is called without arguments")


def _called(name: str, function: Callable[..., Any], *arguments: Any, advice: str = "") -> Any:
    try:
        return function(*arguments)
    except Exception as error:
        if is_out_of_memory(error) or isinstance(error, RanksError):
            raise
        if isinstance(error, NEEDS_VALUES):
            advice = ""  # a prediction adds its own
        raise RuntimeError(f"{name} of setup() raised {describe(error)}{advice}") from error
