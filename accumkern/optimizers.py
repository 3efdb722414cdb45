"""Which optimizers can be stepped on FP32 stand-ins: a few parameters at a time, all at once, or not at all; and why.

``step()`` of torch's optimizers treats every parameter by itself, so that a few at a time come out as all at once do.
Others may count their steps in a parameter group (as optimi's and ScheduleFree's do) or look at all parameters
together (as Prodigy's do): those that are not in the table are stepped with all parameters at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from accumkern.torch_private import has_step_hooks

#: The ``step()`` of optimizers that treat every parameter by itself: module and qualified name.
STEPPED_IN_PARTS = frozenset(
    {
        "bitsandbytes.optim.optimizer.Optimizer8bit.step",  # of all its optimizers
        "torch.optim._adafactor.Adafactor.step",
        "torch.optim._muon.Muon.step",
        "torch.optim.adadelta.Adadelta.step",
        "torch.optim.adagrad.Adagrad.step",
        "torch.optim.adam.Adam.step",  # and of AdamW
        "torch.optim.adamax.Adamax.step",
        "torch.optim.asgd.ASGD.step",
        "torch.optim.nadam.NAdam.step",
        "torch.optim.radam.RAdam.step",
        "torch.optim.rmsprop.RMSprop.step",
        "torch.optim.rprop.Rprop.step",
        "torch.optim.sgd.SGD.step",
        "torch.optim.sparse_adam.SparseAdam.step",
        "torchao.optim.adam._AdamBase.step",
    }
)

#: Beginning of the module and name of an optimizer, or of what it derives from -> why it has no stand-ins.
REFUSED = {
    "flashoptim.": "it keeps by itself what its bfloat16 weights lack (master_weight_bits); leave master_weights out",
    "schedulefree.": (
        "its train() and eval() exchange the weights for averages that it keeps in its state, in the dtype of the "
        "weights"
    ),
    "torch.distributed.optim.zero_redundancy_optimizer.ZeroRedundancyOptimizer": (
        "each rank steps some of the parameters and gets the others from its neighbours, without what they lack; use "
        "torch.distributed.fsdp.fully_shard"
    ),
    "torch.optim.lbfgs.LBFGS": "it calls its closure several times in a step, with other weights each time",
    "torchao.optim.cpu_offload.": "it steps copies of the weights that it keeps on the host",
}

#: Option of a parameter group -> why it cannot be on.
REFUSED_OPTIONS = {
    "differentiable": "the weights that it writes are not those of the graph",
    "gradient_release": "its steps are hooks in the backward pass, and not step()",
}


def that_steps(optimizer: Any) -> Any:
    """Return the optimizer whose class has the ``step()`` that calls hooks: ``optimizer``, or what it stands for.

    Fabric's and Lightning's optimizers are of a class that derives from the other's, but hand ``step()`` on to it.
    """
    while not getattr(getattr(type(optimizer), "step", None), "hooked", False) and has_step_hooks(
        getattr(optimizer, "optimizer", None)
    ):
        optimizer = optimizer.optimizer
    return optimizer


def refusal(optimizer: Any) -> str | None:
    """Return why an optimizer cannot be stepped on FP32 stand-ins, or None."""
    if not has_step_hooks(optimizer):
        return "it has no step hooks (torch.optim.Optimizer.register_step_pre_hook)"
    for kind in type(optimizer).__mro__:
        name = f"{kind.__module__}.{kind.__qualname__}"
        for beginning, reason in REFUSED.items():
            if name.startswith(beginning):
                return reason
    if not getattr(type(optimizer).step, "hooked", False):
        return (
            "its step() calls no hooks: it has not called torch.optim.Optimizer.__init__(), or hands all on to another"
        )
    if any(vars(kind).get("__slots__") for kind in type(optimizer).__mro__):
        return "it has __slots__, which a stand-in of it cannot share"
    for option, reason in REFUSED_OPTIONS.items():
        if any(group.get(option) for group in optimizer.param_groups):
            return f"{option} is on: {reason}"
    manager = getattr(optimizer, "mng", None)  # of bitsandbytes
    if manager is not None:
        special = {id(getattr(module, name)) for module, name, _ in manager.module_weight_config_triple}
        special |= set(manager.pid2config)
        if any(id(param) in special for group in optimizer.param_groups for param in group["params"]):
            return "GlobalOptimManager has settings for single parameters, which it finds by the parameter's id"
    return None


def is_stepped_in_parts(optimizer: Any) -> bool:
    """Return whether an optimizer's ``step()`` may be called for a few of its parameters after the others."""
    step = raw_step(optimizer)
    name = f"{step.__module__}.{step.__qualname__}"
    if name not in STEPPED_IN_PARTS:
        return False
    kind = getattr(sys.modules[step.__module__], step.__qualname__.partition(".")[0])
    return _without_hooks(kind.step) is step  # and not what functools.wraps() has given its name


def raw_step(optimizer: Any) -> Callable[..., Any]:
    """Return the ``step()`` of an optimizer's class without what calls the step hooks."""
    return _without_hooks(type(optimizer).step)


def _without_hooks(step: Any) -> Callable[..., Any]:
    while getattr(step, "hooked", False) and hasattr(step, "__wrapped__"):
        step = step.__wrapped__
    return step
