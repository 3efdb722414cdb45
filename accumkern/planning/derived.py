"""The setup function of whatever was named: a function, a thing of a framework, or a function that returns one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from accumkern.planning.frameworks import from_lightning, from_model, from_trainer, is_lightning, is_trainer
from accumkern.planning.protocol import Setup, SetupFunction
from accumkern.planning.samples import is_faking
from accumkern.torch_private import tree_leaves

_THINGS = (
    "a function that returns model, optimizer, make_batch and loss, or a Trainer of transformers, a LightningModule, "
    "alone or in a tuple with its DataLoader or LightningDataModule, a tuple of model, optimizer and DataLoader, or a "
    "function that returns one of these"
)


def setup_of(thing: Any, *, in_place: bool = False) -> SetupFunction:
    """Return the function for ``plan()`` and ``sweep()`` that makes a setup of something, each time a new one.

    A function is called each time, and should make what it returns anew. Of anything else copies are made
    (``copy.deepcopy`` of model and optimizer), all with the weights that it has now.

    Args:
        thing: a function that returns what :class:`Setup` has; or, itself or returned by a function, a ``Trainer`` of
            transformers (:func:`from_trainer`), a LightningModule or a tuple of what :func:`from_lightning` takes, or a
            tuple of what :func:`from_model` takes.
        in_place: the first call that is no prediction's hands out the thing itself, so that its memory is not taken
            twice: for ``plan()``, which puts everything back.

    Raises:
        TypeError: it is none of these.
    """
    derive = _deriver(thing)
    if derive is None and (not callable(thing) or isinstance(thing, nn.Module)):
        raise TypeError(f"what is to be planned for is a {type(thing).__name__}; it must be {_THINGS}")
    is_taken = not in_place

    def setup() -> Any:
        nonlocal is_taken
        seed = torch.initial_seed()
        if derive is None:
            made: Any = thing()
        elif is_taken or is_faking():
            made = _copied(thing)
        else:
            made, is_taken = thing, True
        derive_made = _deriver(made)
        if derive_made is None:
            return made
        derived = derive_made(seed)
        if torch.initial_seed() != seed:  # a Trainer seeds with a number of its own
            torch.manual_seed(seed)
        return derived

    return setup


def _deriver(thing: Any) -> Callable[[int], Setup] | None:
    """Return what makes a setup of a thing of a framework, given a seed; None where it is none."""
    parts = thing if isinstance(thing, tuple) and not isinstance(thing, Setup) else (thing,)
    if isinstance(thing, Setup) or not parts:
        return None
    if is_trainer(thing):
        return lambda seed: from_trainer(thing, seed=seed)
    if is_lightning(parts[0]):
        return lambda seed: from_lightning(*parts, seed=seed)
    is_plain = len(parts) == 3 or (len(parts) == 4 and isinstance(parts[2], (DataLoader, Dataset)))
    if is_plain and isinstance(parts[0], nn.Module):
        return lambda seed: from_model(*parts, seed=seed)
    return None


def _copied(thing: Any) -> Any:
    """Return a thing with a model and an optimizer of its own; data is not copied."""
    try:
        if isinstance(thing, tuple):
            count = 2 if len(thing) > 1 and isinstance(thing[1], Optimizer) else 1
            copied = copy.deepcopy(thing[:count], _fakes(thing[0], *thing[1:count]))
            _check_optimizer(thing[1], copied[1]) if count == 2 else None
            return copied + thing[count:]
        if isinstance(thing, nn.Module):
            return copy.deepcopy(thing, _fakes(thing))
        trainer = copy.copy(thing)
        trainer.model, trainer.optimizer = copy.deepcopy(
            (thing.model, thing.optimizer), _fakes(thing.model, thing.optimizer)
        )
        trainer.model_wrapped = trainer.model
        _check_optimizer(thing.optimizer, trainer.optimizer)
        return trainer
    except Exception as error:
        raise RuntimeError(
            f"the model or its optimizer cannot be copied ({type(error).__name__}: {error}); name a function instead "
            "that makes them anew"
        ) from error


def _fakes(model: nn.Module, optimizer: Optimizer | None = None) -> dict[int, Any]:
    """Return what ``deepcopy`` is to take for a model's tensors: fake ones, where what is made now is fake."""
    if not is_faking():
        return {}
    held = [leaf for module in model.modules() for leaf in tree_leaves(vars(module))]
    held += tree_leaves([] if optimizer is None else list(optimizer.state.values()))
    fakes: dict[int, Any] = {}
    for tensor in held:
        if isinstance(tensor, Tensor):
            fake = tensor.detach().clone()
            fakes[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
    return fakes


def _check_optimizer(optimizer: Optimizer | None, copied: Optimizer | None) -> None:
    """Raise where an optimizer has attributes of its own that a copy lacks: torch copies its state and groups alone."""
    if optimizer is None or copied is None:
        return
    missing = sorted(name for name in vars(optimizer).keys() - vars(copied).keys() if not name.startswith("_"))
    if missing and missing != ["step"]:  # which learning-rate schedulers wrap
        raise RuntimeError(f"a copy of {type(optimizer).__name__} has no {', '.join(missing)}")
