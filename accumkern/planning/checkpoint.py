"""A checkpoint that a script has saved, as the place where training branches: weights and the optimizer's state."""

from __future__ import annotations

import copy
import hashlib
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from accumkern.checks import describe
from accumkern.optimizer_state import Fp32State
from accumkern.planning.protocol import Setup

# What scripts call them: plain PyTorch, its tutorials, and Lightning, which keeps a list of optimizers.
_MODEL = ("model", "model_state_dict", "state_dict", "model_state")
_OPTIMIZER = ("optimizer", "optimizer_state_dict", "optimizer_states", "optimizer_state")
_WANTED = (
    "save a dictionary with the state dicts under 'model' and 'optimizer', or model_state_dict and "
    "optimizer_state_dict, or state_dict and optimizer_states as Lightning does"
)


class Checkpoint:
    """Weights and the optimizer's state from a file, kept in the host's memory.

    Attributes:
        path: of the file.
        sha256: of the file.
    """

    def __init__(self, path: str | Path) -> None:
        """Read the file; only tensors and plain data are loaded (``weights_only=True``).

        Raises:
            TypeError: ``path`` is no path.
            FileNotFoundError: there is no such file.
            ValueError: it cannot be loaded so, or has no state of a model and one optimizer under a name that is known.
        """
        if not isinstance(path, (str, Path)):
            raise TypeError(f"start is a {type(path).__name__}; it must be the path of a checkpoint, or None")
        self.path = Path(path).expanduser()
        if not self.path.is_file():
            raise FileNotFoundError(f"start is {str(path)!r}, and there is no such file")
        self.sha256 = _sha256(self.path)
        try:
            found = torch.load(self.path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(
                f"start is {str(path)!r}, which torch.load(weights_only=True) does not load: "
                f"{describe(error).partition(chr(10))[0]}; {_WANTED}, with nothing but tensors and plain data"
            ) from error
        if not isinstance(found, Mapping):
            raise ValueError(f"start is {str(path)!r}, which holds a {type(found).__name__}; {_WANTED}")
        model, optimizer = (next((found[key] for key in keys if key in found), None) for keys in (_MODEL, _OPTIMIZER))
        if isinstance(optimizer, (list, tuple)) and len(optimizer) == 1:
            optimizer = optimizer[0]
        if not isinstance(model, Mapping) or not (isinstance(optimizer, Mapping) and "param_groups" in optimizer):
            keys = ", ".join(repr(key) for key in list(found)[:10])
            raise ValueError(
                f"start is {str(path)!r}, whose keys are {keys}{', …' if len(found) > 10 else ''}; there is no state "
                f"of a model and of one optimizer under names that are known: {_WANTED}"
            )
        self._model, self._optimizer = dict(model), dict(optimizer)

    def load(self, setup: Setup, master_weights: str | None = None) -> None:
        """Put weights, buffers, and the optimizer's state and settings into what ``setup()`` made.

        Weights may have been saved under a prefix that all of them share, as by DistributedDataParallel,
        ``torch.compile``, or a LightningModule that holds the model. States of bfloat16 weights stay in FP32 where the
        step is one of ``master_weights``; else they become bfloat16, as torch has it.

        Raises:
            ValueError: the model or the optimizer of the setup is another one than was saved.
        """
        try:
            setup.model.load_state_dict(_without_prefix(self._model, set(setup.model.state_dict())))
        except RuntimeError as error:
            raise ValueError(f"start is {str(self.path)!r}, whose model is not that of setup(): {error}") from error
        keeper = None
        if master_weights is not None:
            keeper = Fp32State(setup.optimizer, lambda param: param.dtype is torch.bfloat16)
        try:
            setup.optimizer.load_state_dict(copy.deepcopy(self._optimizer))  # it takes tensors as they are
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"start is {str(self.path)!r}, whose optimizer is not that of setup(): {describe(error)}"
            ) from error
        finally:
            if keeper is not None:
                keeper.remove(keep_fp32=True)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _without_prefix(state: Mapping[str, Tensor], wanted: set[str]) -> Mapping[str, Tensor]:
    """Return a state dict without the first parts of its names that all share, where it then has the names wanted."""
    shorter = state
    while shorter.keys() != wanted:
        if len({key.partition(".")[0] for key in shorter}) != 1 or any("." not in key for key in shorter):
            return state
        shorter = {key.partition(".")[2]: value for key, value in shorter.items()}
    return shorter
