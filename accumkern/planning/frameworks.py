"""Setups derived from what frameworks train with: transformers' Trainer, Lightning's modules, models with data loaders.

None of these libraries is imported: who has such a thing has imported its library. What trains there trains here: each
framework makes model, optimizer and precision ready itself, as for its own training, and is stopped before that begins.
"""

from __future__ import annotations

import inspect
import logging
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from accumkern.planning.protocol import Setup, SetupError
from accumkern.planning.samples import Samples, is_faking, moved
from accumkern.wiring import accumulator_of

_LIGHTNING = ("lightning.pytorch", "pytorch_lightning")  # the same code, published twice
_NO_SIDE_EFFECTS = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
_TAKEN_OVER = ("precision", "max_epochs", "max_steps", "accumulate_grad_batches")


def is_trainer(thing: Any) -> bool:
    """Return whether a thing is a Trainer of transformers."""
    return _is_a(thing, "Trainer", "transformers.trainer")


def is_lightning(thing: Any) -> bool:
    """Return whether a thing is a LightningModule."""
    return _is_a(thing, "LightningModule", *_LIGHTNING)


def _is_a(thing: Any, name: str, *modules: str) -> bool:
    """Return whether a thing is of a class of modules that may not have been imported."""
    kinds = [getattr(sys.modules[module], name) for module in modules if module in sys.modules]
    return isinstance(thing, tuple(kinds))


# ---- a model and a data loader -----------------------------------------------------------------------------------


def from_model(
    model: nn.Module,
    optimizer: Optimizer,
    data: Any,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    *,
    validation: Any = None,
    seed: int | None = None,
) -> Setup:
    """Return a setup of a model, its optimizer and a data loader.

    Args:
        model: in training mode, on the device to train on.
        optimizer: of its parameters.
        data: a DataLoader, or a data set whose samples torch's ``default_collate`` makes batches of;
            see :class:`accumkern.planning.samples.Samples`. Batches are moved to the model's device.
        loss: takes the model and a batch. None calls ``model(**batch)`` where a batch is a mapping, ``model(*batch)``
            where it is a tuple or list, else ``model(batch)``; what comes of it is a scalar, or has it as ``loss``.
        validation: as ``data``, of samples that are never trained on.
        seed: of the samples that are drawn; None takes ``torch.initial_seed()``.

    Raises:
        SetupError: a part is of the wrong kind, or the model is in evaluation mode.
    """
    for name, value, kind in (("model", model, nn.Module), ("optimizer", optimizer, Optimizer)):
        if not isinstance(value, kind):
            raise SetupError(f"the {name} is a {type(value).__name__}; it must be a torch {kind.__name__}")
    if not model.training:
        raise SetupError(f"the model, a {type(model).__name__}, is in evaluation mode; call its train()")
    if loss is not None and not callable(loss):
        raise SetupError(
            f"the loss is a {type(loss).__name__}; it must be a function of the model and a batch, or None"
        )

    def prepared(batch: Any) -> Any:
        return _to(batch, next(model.parameters()).device)

    return Setup(
        model, _detached(optimizer), loss=loss or _loss_of_outputs, **_batches(data, validation, prepared, seed)
    )


def _loss_of_outputs(model: nn.Module, batch: Any) -> Tensor:
    if isinstance(batch, Mapping):
        output = model(**batch)
    else:
        output = model(*batch) if isinstance(batch, (tuple, list)) else model(batch)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", output)
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        found = f"tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(output).__name__
        raise TypeError(
            f"{type(model).__name__} returned a {found}, which is no loss; let it return a scalar or something with a "
            "loss, or add a function of model and batch after the data"
        )
    return loss


def _batches(data: Any, validation: Any, prepared: Callable[[Any], Any], seed: int | None) -> dict[str, Any]:
    """Return the fields of a setup that make batches."""
    seed = torch.initial_seed() if seed is None else seed
    samples = Samples("training data", data, seed)
    makers: dict[str, Any] = {
        "make_batch": lambda size: prepared(samples.draw(size)),
        "longest_batch": lambda size: prepared(samples.longest(size)),
    }
    if validation is not None:
        held_out = Samples("validation data", validation, seed)
        makers["validation_batch"] = lambda size: prepared(held_out.draw(size))
    return makers


def _to(batch: Any, device: torch.device) -> Any:
    """Return a batch on a device; in a prediction, where only what is made anew is fake, always a copy."""
    copy = is_faking()
    return moved(batch, lambda tensor: tensor.to(device, copy=copy))


def _detached(optimizer: Optimizer) -> Optimizer:
    """Return an optimizer without the script's own accumulator: a plan attaches the one that it is asked for."""
    accumulator = accumulator_of(optimizer)
    if accumulator is not None:
        accumulator.detach()
    return optimizer


def _unscheduled(optimizer: Optimizer) -> Optimizer:
    """Return an optimizer with the learning rates that its schedule is relative to: a warm-up begins with next to 0."""
    for group in _detached(optimizer).param_groups:
        group["lr"] = group.get("max_lr", group.get("initial_lr", group["lr"]))  # the first is OneCycleLR's
    return optimizer


# ---- transformers ------------------------------------------------------------------------------------------------


class _ReadyError(Exception):
    """Raised by a callback when a framework is about to train; ``args`` is what it is ready with."""


class _StopTrainer:
    """A callback of transformers' Trainer that stops it when everything is ready."""

    def on_train_begin(self, _args: Any, _state: Any, _control: Any, **ready: Any) -> None:
        raise _ReadyError(ready)


def from_trainer(trainer: Any, *, seed: int | None = None) -> Setup:
    """Return a setup of a ``Trainer`` of transformers: what its ``train()`` would train with.

    ``train()`` is called, and stopped before its first micro-batch, and before any other callback hears of it. So
    optimizer, activation checkpointing, autocast and compilation are those of its arguments; the learning rate is the
    one that its schedule is relative to, and gradients are not clipped. The loss is that of ``compute_loss``, the mean
    over a micro-batch's tokens. Samples come from its training data set, through its collator; validation samples from
    its evaluation data set, the first if there are several.

    Args:
        trainer: before or after training.
        seed: of the samples that are drawn; None takes ``torch.initial_seed()``, which is the Trainer's after it was
            made: :func:`setup_of` takes the one from before.

    Raises:
        SetupError: it would train with DataParallel, DeepSpeed or FSDP, or it cannot begin to train.
    """
    args = trainer.args
    if args.n_gpu > 1:
        raise SetupError(
            f"the Trainer would train on {args.n_gpu} GPUs of one process, which is not planned for; make one visible "
            "(CUDA_VISIBLE_DEVICES=0), or start a process for each with torchrun"
        )
    for name in ("is_deepspeed_enabled", "is_fsdp_enabled"):
        if getattr(trainer, name, False):
            raise SetupError(f"the Trainer has {name}; a plan is of a model that is whole on its device: turn it off")
    stop = _StopTrainer()
    trainer.callback_handler.callbacks.insert(0, stop)
    try:
        trainer.train()
        raise SetupError("the Trainer came to its end without training; look at its arguments")
    except _ReadyError as error:
        ready = error.args[0]
    finally:
        trainer.callback_handler.callbacks.remove(stop)
        trainer.is_in_train = False
        # The accelerator would keep every model and optimizer that it has prepared.
        trainer.accelerator.free_memory()
    model, optimizer = trainer.model_wrapped, trainer.optimizer  # compiled, where that was asked for
    optimizer = _unscheduled(getattr(optimizer, "optimizer", optimizer))  # without Accelerate's wrapper
    model.train()
    set_mode = getattr(optimizer, "train", None)  # of a schedule-free one
    if callable(set_mode):
        set_mode()

    shared = vars(trainer.accelerator.state)  # by all Accelerators
    state = dict(shared)

    def loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        if not shared:  # TrainingArguments empty it, and the Trainer that would fill it again was never made
            shared.update(state)
        batch = dict(batch)  # labels are taken out of it
        # Of several ranks it would be counted over all, with a collective; a mean of each does without.
        count = trainer.get_batch_samples(iter([batch]), 1, args.device)[1] if args.world_size == 1 else None
        with trainer.compute_loss_context_manager():
            found: Tensor = trainer.compute_loss(model, batch, num_items_in_batch=count)
        return found

    held_out = trainer.eval_dataset
    if held_out is not None:
        held_out = trainer.get_eval_dataloader(next(iter(held_out)) if isinstance(held_out, dict) else None)
        held_out = _without_sampler(held_out)
    data = _without_sampler(ready["train_dataloader"])
    return Setup(model, optimizer, loss=loss, **_batches(data, held_out, lambda batch: _to(batch, args.device), seed))


def _without_sampler(loader: Any) -> DataLoader[Any]:
    """Return a loader of the same data set; samplers that group by length belong to one size of a batch."""
    return DataLoader(loader.dataset, collate_fn=loader.collate_fn)


# ---- Lightning ---------------------------------------------------------------------------------------------------


def from_lightning(module: Any, data: Any = None, trainer: Any = None, *, seed: int | None = None) -> Setup:
    """Return a setup of a LightningModule: what ``Trainer.fit`` would train with, on one device.

    ``fit`` of a Trainer without loggers and checkpoints is called, and stopped before its first micro-batch. The loss
    is that of ``training_step``, with the batch index 0; ``self.log`` does nothing there, and ``self.trainer`` is not
    attached. The learning rate is the one that a schedule is relative to, and gradients are not clipped. A validation
    loss is that of ``training_step`` too, in evaluation mode.

    Args:
        module: whose ``configure_optimizers`` returns one optimizer, in any of the forms that Lightning takes.
        data: a DataLoader or a LightningDataModule; None takes the module's own ``train_dataloader``.
        trainer: whose precision, accelerator and number of epochs or steps are taken; None takes Lightning's defaults.
        seed: of the samples that are drawn; None takes ``torch.initial_seed()``.

    Raises:
        SetupError: it optimizes manually, with several optimizers or with none, or its training data is no single
            DataLoader.
        Exception: what Lightning or the module raises.
    """
    if not module.automatic_optimization:
        raise SetupError(
            f"{type(module).__name__} has automatic_optimization = False: its training_step steps by itself, which "
            "cannot be planned for; write a setup() for it"
        )
    library = next(sys.modules[name] for name in _LIGHTNING if _is_a(module, "LightningModule", name))
    ready = _started(library, module, data, trainer)
    if not isinstance(ready["loader"], DataLoader):
        raise SetupError(
            f"{type(module).__name__} trains with a {type(ready['loader']).__name__}; it must be one DataLoader"
        )
    precision, device = ready["precision"], ready["device"]
    takes_index = len(inspect.signature(module.training_step).parameters) > 1

    def hook(name: str, batch: Any, *others: Any) -> Any:
        source = data if isinstance(data, library.LightningDataModule) and _has_own(library, data, name) else module
        return getattr(source, name)(batch, *others, 0)

    def prepared(batch: Any) -> Any:
        batch = hook("on_before_batch_transfer", precision.convert_input(batch))
        return hook("on_after_batch_transfer", _to(hook("transfer_batch_to_device", batch, device), device))

    def loss(model: nn.Module, batch: Any) -> Tensor:
        with precision.train_step_context(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="You are trying to `self.log")  # which then does nothing
            output = model.training_step(batch, *[0] * takes_index)  # type: ignore[operator]
        found: Tensor = output["loss"] if isinstance(output, Mapping) else output
        return found

    return Setup(module, ready["optimizer"], loss=loss, **_batches(ready["loader"], ready["held_out"], prepared, seed))


def _has_own(library: Any, thing: Any, name: str) -> bool:
    """Return whether a module or data module has a method of its own under a name of Lightning's."""
    base = library.LightningModule if isinstance(thing, library.LightningModule) else library.LightningDataModule
    return getattr(getattr(thing, name), "__func__", None) is not getattr(base, name)


def _started(library: Any, module: Any, data: Any, like: Any) -> dict[str, Any]:
    """Let a Lightning Trainer make everything ready, and return what it would train with."""
    source = data if isinstance(data, library.LightningDataModule) else module
    is_given = not (data is None or source is data)

    def stop(_callback: Any, trainer: Any, _module: Any) -> None:
        held_out = source.val_dataloader() if _has_own(library, source, "val_dataloader") else None
        raise _ReadyError(
            {
                "optimizers": trainer.optimizers,
                "loader": data if is_given else source.train_dataloader(),
                "held_out": held_out[0] if isinstance(held_out, (list, tuple)) and held_out else held_out,
                "precision": trainer.precision_plugin,
                "device": trainer.strategy.root_device,
            }
        )

    settings: dict[str, Any] = dict.fromkeys(_NO_SIDE_EFFECTS, False)
    settings["max_epochs"] = 1000  # Lightning's default, which it would warn of
    settings["callbacks"] = [type("Stop", (library.Callback,), {"on_fit_start": stop})()]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if like is not None:
        settings |= {name: value for name in _TAKEN_OVER if (value := getattr(like, name)) is not None}
        device = like.strategy.root_device
    settings |= {"accelerator": "gpu" if device.type == "cuda" else device.type, "devices": 1}
    if device.type == "cuda":
        settings["devices"] = [int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index]
    log = logging.getLogger(library.__name__)
    level = log.level
    log.setLevel(logging.WARNING)  # not which devices there are, each time
    try:
        # Of a loader it needs the length alone, for schedulers; going through one takes random numbers with values.
        library.Trainer(**settings).fit(module, range(len(data)) if is_given and hasattr(data, "__len__") else data)
        raise SetupError(
            "Lightning's Trainer came to its end without training; look at the numbers of epochs and steps"
        )
    except _ReadyError as error:
        ready: dict[str, Any] = error.args[0]
    finally:
        log.setLevel(level)
        module.trainer = None
    optimizers = ready.pop("optimizers")
    trained = [param for of in optimizers for group in of.param_groups for param in group["params"]]
    if len(optimizers) != 1 or set(module.parameters()).isdisjoint(trained):
        raise SetupError(f"configure_optimizers of {type(module).__name__} must return one optimizer of its parameters")
    module.to(ready["device"])  # from where the stopped Trainer has put it
    if optimizers[0].state:
        optimizers[0].load_state_dict(optimizers[0].state_dict())
    return ready | {"optimizer": _unscheduled(optimizers[0])}
