"""Leave everything as it was found: weights, gradients, optimizer state, random numbers, and the allocator's memory."""

from __future__ import annotations

import copy
import gc
import random
import sys
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from accumkern.planning.protocol import Setup


class Preserved:
    """A block in which a setup may be trained, and after which everything is as it was before; after errors too.

    That is: parameters, buffers and gradients, the modules' modes, the optimizer's state and settings, the random
    numbers of torch, Python and numpy. The tensors that were there are there again, with the values that they had.
    Copies are kept in the host's memory, so that the device's is free. Gradients are set aside: in the block ``.grad``
    begins as None.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        model, optimizer = setup.model, setup.optimizer
        self._modules = [(m, m.training, dict(m._parameters), dict(m._buffers)) for m in model.modules()]
        self._values = _Values([*model.parameters(), *model.buffers()])
        self._grads = [(param, param.grad) for param in model.parameters()]
        self._states = {param: _Values(state) for param, state in optimizer.state.items()}
        self._groups = [
            (group, _Values({key: value for key, value in group.items() if key != "params"}))
            for group in optimizer.param_groups
        ]
        self._random = RandomState(setup.device)

    def __enter__(self) -> Preserved:
        gc.collect()
        # What is there already is then left out when what trials leave behind is collected, which saves most of the
        # time of that. Somebody else's frozen objects would be thawed at the end, so they are left alone.
        self._froze = gc.get_freeze_count() == 0
        if self._froze:
            gc.freeze()
        for param, _ in self._grads:
            param.grad = None
        return self

    def rewind(self) -> None:
        """Put everything back but the gradients, which are None again."""
        optimizer = self._setup.optimizer
        for module, training, parameters, buffers in self._modules:
            module.training = training
            module._parameters.update(parameters)
            module._buffers.update(buffers)
        self._values.put_back()
        for param, _ in self._grads:
            param.grad = None
        optimizer.state.clear()
        optimizer.state.update({param: state.put_back() for param, state in self._states.items()})
        for group, settings in self._groups:
            params = group["params"]
            group.clear()
            group.update({"params": params} | settings.put_back())
        self._random.put_back()
        gc.collect()

    def __exit__(self, *_exception: object) -> None:
        self.rewind()
        for param, grad in self._grads:
            param.grad = grad
        if self._froze:
            gc.unfreeze()
        if self._setup.device.type == "cuda":
            torch.cuda.empty_cache()


class RandomState:
    """The random numbers of torch (on the CPU and one device), Python and numpy, as they are now."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._torch = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        self._python = random.getstate()
        self._numpy = sys.modules["numpy"].random.get_state() if "numpy" in sys.modules else None

    def put_back(self) -> None:
        """Go on from there again."""
        torch.set_rng_state(self._torch)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)


class _Values:
    """Tensors in lists and dicts, with copies of their values in the host's memory; other things are copied too."""

    def __init__(self, tree: Any) -> None:
        self._leaves, self._structure = tree_flatten(tree)
        self._saved = [
            leaf.detach().to("cpu", copy=True) if isinstance(leaf, Tensor) else copy.deepcopy(leaf)
            for leaf in self._leaves
        ]

    def put_back(self) -> Any:
        """Return the structure as it was, of the tensors that were there, with their values again."""
        leaves = []
        for leaf, saved in zip(self._leaves, self._saved, strict=True):
            if isinstance(leaf, Tensor):
                leaf.data.copy_(saved)  # .data: to autograd they never changed
            leaves.append(leaf if isinstance(leaf, Tensor) else saved)
        return tree_unflatten(leaves, self._structure)
