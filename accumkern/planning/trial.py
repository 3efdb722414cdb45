"""Trials: windows that a setup trains before everything is put back, and the largest micro-batch that trains so.

All that is measured is measured on such windows: micro-batches, forward and backward, and an optimizer step.
"""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from accumkern.accumulator import GradAccumulator
from accumkern.casting import set_cut_off_aside
from accumkern.memory import storage_bytes
from accumkern.out_of_memory import format_bytes, is_out_of_memory
from accumkern.planning.memory import MemoryMeter, held_tensors
from accumkern.planning.precision import accumulation
from accumkern.planning.protocol import Setup, compute_loss, make_batch
from accumkern.random_state import RandomState
from accumkern.ranks import Ranks
from accumkern.torch_private import tree_flatten, tree_unflatten

# The optimizer's states appear in its first step, so only the second window needs all the memory that training needs.
_TRIAL_WINDOWS = 2
_TRIAL_MICRO_BATCHES = 2  # the residuals appear at the second
_VERIFY_WINDOWS = 4
_VERIFY_MICRO_BATCHES = 4
_LEAK_TRIALS = 4
_LEAK_FRACTION = 0.01  # of what a trial allocates


class Preserved:
    """A block in which a setup may be trained, and after which everything is as it was before; after errors too.

    That is: parameters, buffers and gradients, the modules' modes, the optimizer's state and settings, the random
    numbers of torch, Python and numpy. The tensors that were there are there again, with the values that they had.
    Copies are kept in the host's memory, so that the device's is free. Gradients are set aside: in the block ``.grad``
    begins as None. So is what :func:`accumkern.to_bfloat16` has cut off: in the block masters begin as the weights.

    Attributes:
        setup: what is trained.
        buffer: what its gradients are accumulated in; None leaves it to stock PyTorch.
        ranks: that train it together; None makes it one rank's.
        master_weights: how the masters of its weights are kept; None steps the weights themselves.
    """

    def __init__(
        self,
        setup: Setup,
        buffer: str | None = None,
        ranks: Ranks | None = None,
        master_weights: str | None = None,
    ) -> None:
        self.setup, self.buffer, self.ranks = setup, buffer, ranks or Ranks()
        self.master_weights = master_weights
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
        self._put_cut_off_back = set_cut_off_aside()
        return self

    def rewind(self) -> None:
        """Put everything back but the gradients, which are None again."""
        optimizer = self.setup.optimizer
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
        self._put_cut_off_back()
        if self._froze:
            gc.unfreeze()
        if self.setup.device.type == "cuda":
            torch.cuda.empty_cache()


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
        leaves = list(self._saved)
        for i, leaf in enumerate(self._leaves):
            if isinstance(leaf, Tensor):
                leaf.data.copy_(leaves[i])  # .data: to autograd they never changed
                leaves[i] = leaf
        return tree_unflatten(leaves, self._structure)


def accumulate(setup: Setup, batch: Any, micro_batches: int, accumulator: GradAccumulator | None) -> Tensor:
    """Run forward and backward on one of a window's ``micro_batches``; return its loss, on the device.

    ``accumulator`` is what the block of :func:`accumulation` gave: it averages, or else the loss is divided.
    """
    loss = compute_loss(setup, batch)
    (loss / micro_batches if accumulator is None else loss).backward()
    return loss.detach()


def train_window(
    setup: Setup, batches: Iterable[Any], micro_batches: int, accumulator: GradAccumulator | None
) -> tuple[list[float], float]:
    """Accumulate a window, step, and begin a new one; return the seconds of each micro-batch, and of the step.

    Making the batches is not timed: a data loader does that while the model trains.

    Raises:
        ValueError: no parameter of the optimizer got a gradient.
    """
    seconds = []
    for batch in batches:
        begin = now(setup)
        accumulate(setup, batch, micro_batches, accumulator)
        seconds.append(now(setup) - begin)
        del batch  # before the next one is made
    if all(param.grad is None for group in setup.optimizer.param_groups for param in group["params"]):
        raise ValueError(
            "loss of setup() gives no parameter of the optimizer a gradient; compute it with the model that it is given"
        )
    begin = now(setup)
    setup.optimizer.step()
    setup.optimizer.zero_grad()
    return seconds, now(setup) - begin


def now(setup: Setup) -> float:
    """Return the time in seconds, after the device has done all that it was given."""
    if setup.device.type == "cuda" and torch.cuda.is_initialized():  # predictions may have a device that is not there
        torch.cuda.synchronize(setup.device)
    return time.perf_counter()


@dataclass(frozen=True)
class Trial:
    """What happened when a micro-batch was tried.

    Attributes:
        micro_batch: samples in it.
        fits: whether it trained under the limit, on every rank.
        peak_bytes: the most memory that was allocated, the worst rank's; up to where it ran out if it did not fit.
    """

    micro_batch: int
    fits: bool
    peak_bytes: int


@dataclass(frozen=True)
class Fit:
    """What fits.

    Attributes:
        micro_batch: the largest that does, up to what was asked for.
        is_limited_by_memory: False where memory was not the reason to stop.
        limit_bytes: what was allowed, the safety margin taken off.
        held_bytes: what model and optimizer held before.
        trials: all that was tried, in order.
        verified: the last trial, of several windows.
    """

    micro_batch: int
    is_limited_by_memory: bool
    limit_bytes: int
    held_bytes: int
    trials: tuple[Trial, ...]
    verified: Trial


def find_fit(
    preserved: Preserved, limit_bytes: int, at_most: int, progress: Callable[[Trial], None] = lambda trial: None
) -> Fit:
    """Try micro-batches: one sample, doubled until memory runs out or ``at_most`` is reached, then a binary search.

    Each trial trains two windows of two micro-batches with the longest samples, steps included, from the same state.
    What was found is verified with more and longer windows, and made smaller until they pass. With a process group,
    all ranks try the same and agree: what does not fit on one does not fit.

    Raises:
        ValueError: the limit is less than what the model holds.
        RuntimeError: not even one sample fits, the setup leaks memory from trial to trial, or another rank failed.
            What the setup itself raises is passed on.
    """
    held = _held_bytes(preserved.setup)
    if held > limit_bytes:
        parameters = storage_bytes(preserved.setup.model.parameters())
        raise ValueError(
            f"the memory limit, {format_bytes(limit_bytes)} after the safety margin, is less than what the model and "
            f"its optimizer hold already, {format_bytes(held)} (parameters {format_bytes(parameters)}); raise the "
            "limit, or use a smaller model or dtype"
        )
    trials: list[Trial] = []

    def fits(micro_batch: int, windows: int = _TRIAL_WINDOWS, micro_batches: int = _TRIAL_MICRO_BATCHES) -> bool:
        trials.append(try_windows(preserved, micro_batch, windows, micro_batches, limit_bytes)[0])
        progress(trials[-1])
        return trials[-1].fits

    if not fits(1):
        raise RuntimeError(
            f"no micro-batch fits: one sample needs more than {format_bytes(limit_bytes)} after the safety margin "
            f"(model and optimizer held {format_bytes(held)}; it ran out at {format_bytes(trials[-1].peak_bytes)}); "
            "raise the limit, use activation checkpointing, shorter samples, or an optimizer with smaller states"
        )
    _check_leaks(preserved, limit_bytes)
    found = largest(fits, at_most)
    is_limited = found < at_most
    while not fits(found, _VERIFY_WINDOWS, _VERIFY_MICRO_BATCHES):
        is_limited = True
        if found == 1:
            raise RuntimeError(
                f"no micro-batch fits: one sample trained for {_TRIAL_WINDOWS} windows, but not for {_VERIFY_WINDOWS}; "
                "memory grows or fragments while it trains"
            )
        found -= max(1, found // 16)
    return Fit(found, is_limited, limit_bytes, held, tuple(trials), trials[-1])


def verify(preserved: Preserved, micro_batch: int, micro_batches: int, limit_bytes: int) -> Trial:
    """Try a micro-batch as :func:`find_fit` verifies, in windows of up to ``micro_batches``; return what happened."""
    count = min(micro_batches, _VERIFY_MICRO_BATCHES)
    return try_windows(preserved, micro_batch, _VERIFY_WINDOWS, count, limit_bytes)[0]


def largest(fits: Callable[[int], bool], at_most: int) -> int:
    """Return the largest size up to ``at_most`` that fits; 1 is known to."""
    fitting, size = 1, min(2, at_most)
    while size > fitting and fits(size):
        fitting, size = size, min(2 * size, at_most)
    while size - fitting > 1:
        middle = (fitting + size) // 2
        if fits(middle):
            fitting = middle
        else:
            size = middle
    return fitting


def try_windows(
    preserved: Preserved, micro_batch: int, windows: int, micro_batches: int, limit_bytes: int
) -> tuple[Trial, int]:
    """Train some windows of the longest samples; return what happened, and the bytes still there after the rewind."""
    setup = preserved.setup
    fits = True
    with MemoryMeter(setup.device, _held_bytes(setup), limit_bytes) as meter:
        try:
            with accumulation(setup, preserved.buffer, micro_batches, preserved.master_weights) as accumulator:
                for _ in range(windows):
                    batches = (make_batch(setup, micro_batch, "longest_batch") for _ in range(micro_batches))
                    train_window(setup, batches, micro_batches, accumulator)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            fits = False
        preserved.rewind()
    outcomes = preserved.ranks.gathered((fits and meter.peak_bytes <= limit_bytes, meter.peak_bytes))
    trial = Trial(micro_batch, all(fits for fits, _ in outcomes), max(peak for _, peak in outcomes))
    return trial, meter.left_bytes


def _check_leaks(preserved: Preserved, limit_bytes: int) -> None:
    """Try one sample several times more: caches may grow at first, but not again and again."""
    tried = [try_windows(preserved, 1, _TRIAL_WINDOWS, _TRIAL_MICRO_BATCHES, limit_bytes) for _ in range(_LEAK_TRIALS)]
    left = min(left_bytes for _, left_bytes in tried[1:])
    if left > _LEAK_FRACTION * (tried[-1][0].peak_bytes - _held_bytes(preserved.setup)):
        raise RuntimeError(
            f"setup() leaks memory: each of {_LEAK_TRIALS} equal trials left {format_bytes(left)} or more behind; look "
            "for losses or outputs that are kept without detach(), or batches kept in a list"
        )


def _held_bytes(setup: Setup) -> int:
    return storage_bytes(held_tensors(setup.model, setup.optimizer))
