"""Trials: windows that a setup trains before everything is put back.

All that is measured is measured on such windows: micro-batches, forward and backward, and an optimizer step.
"""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from accumkern.accumulator import GradAccumulator
from accumkern.casting import set_cut_off_aside
from accumkern.checks import describe
from accumkern.fsdp_window import Meeting
from accumkern.fully_shard_private import forget_failed_pass as forget_pass_of_shards
from accumkern.fully_shard_private import sharded_groups, sharded_modules
from accumkern.memory import storage_bytes, tensors_in
from accumkern.out_of_memory import forget_failed_pass, is_out_of_memory
from accumkern.planning.memory import MemoryMeter, held_tensors
from accumkern.planning.precision import accumulation
from accumkern.planning.protocol import Setup, compute_loss, make_batch, step
from accumkern.random_state import RandomState
from accumkern.ranks import Ranks, RanksError
from accumkern.torch_private import tree_flatten, tree_unflatten


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
        for module in sharded_modules(self.setup.model):
            forget_pass_of_shards(module)  # or it would take its shards for the weights that it had gathered
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


class Stopwatch:
    """Times pieces of work, and adds up what they took.

    Attributes:
        seconds: of all pieces.
        cpu_seconds: that the process spent in them, all threads together.
    """

    def __init__(self) -> None:
        self.seconds = self.cpu_seconds = 0.0

    def start(self, setup: Setup) -> None:
        """Begin a piece."""
        self._begin, self._cpu_begin = now(setup), cpu_now()

    def stop(self, setup: Setup) -> float:
        """Return the seconds of the piece."""
        seconds = now(setup) - self._begin
        self.seconds += seconds
        self.cpu_seconds += cpu_now() - self._cpu_begin
        return seconds


def train_window(
    setup: Setup,
    batches: Iterable[Any],
    micro_batches: int,
    accumulator: GradAccumulator | None,
    watch: Stopwatch | None = None,
    losses: list[Tensor] | None = None,
) -> tuple[list[float], float]:
    """Accumulate a window, step, and begin a new one; return the seconds of each micro-batch, and of the step.

    Making the batches is not timed: a data loader does that while the model trains. ``watch`` adds all of it up. The
    micro-batches' losses are appended to ``losses``, on the device.

    Raises:
        ValueError: no parameter of the optimizer got a gradient.
    """
    seconds, watch = [], watch or Stopwatch()
    for batch in batches:
        watch.start(setup)
        loss = accumulate(setup, batch, micro_batches, accumulator)
        seconds.append(watch.stop(setup))
        if losses is not None:
            losses.append(loss)
        del batch, loss  # before the next one is made
    if all(param.grad is None for group in setup.optimizer.param_groups for param in group["params"]):
        raise ValueError(
            "loss of setup() gives no parameter of the optimizer a gradient; compute it with the model that it is given"
        )
    watch.start(setup)
    step(setup)
    setup.optimizer.zero_grad()
    return seconds, watch.stop(setup)


def now(setup: Setup) -> float:
    """Return the time in seconds, after the device has done all that it was given."""
    if setup.device.type == "cuda" and torch.cuda.is_initialized():  # predictions may have a device that is not there
        torch.cuda.synchronize(setup.device)
    return time.perf_counter()


def cpu_now() -> float:
    """Return the seconds that this process has had of all cores."""
    return time.process_time()


@dataclass(frozen=True)
class Trial:
    """What happened when a micro-batch was tried.

    Attributes:
        micro_batch: samples in it.
        fits: whether it trained under the limit, on every rank.
        peak_bytes: the most memory that was allocated, the worst rank's; up to where it ran out if it did not fit.
        problem: what kept it from training that was not memory, on some rank; None where there was nothing.
    """

    micro_batch: int
    fits: bool
    peak_bytes: int
    problem: str | None = None


def try_windows(
    preserved: Preserved,
    micro_batch: int,
    windows: int,
    micro_batches: int,
    limit_bytes: int,
    tolerated: Literal["none", "batches", "all"] = "none",
) -> tuple[Trial, int]:
    """Train some windows of the longest samples; return what happened, and the bytes still there after the rewind.

    Running out of memory is an outcome. Other errors are raised, unless they are ``tolerated``: those of making a
    batch, which one rank may have alone, or all that every rank has alike.
    """
    setup = preserved.setup
    fits, is_making = True, False
    failure: Exception | None = None

    def batch() -> Any:
        nonlocal is_making
        is_making = True
        made = make_batch(setup, micro_batch, "longest_batch")
        is_making = False
        return made

    with MemoryMeter(setup.device, held_bytes(setup), limit_bytes) as meter:
        try:
            with (
                together(preserved),
                accumulation(setup, preserved.buffer, micro_batches, preserved.master_weights) as accumulator,
            ):
                for _ in range(windows):
                    train_window(setup, (batch() for _ in range(micro_batches)), micro_batches, accumulator)
        except Exception as error:
            fits = False
            if isinstance(error, RanksError):
                raise
            if not is_out_of_memory(error):
                if tolerated == "none" or (tolerated == "batches" and not is_making):
                    raise
                failure = error
        if not fits:
            meter.lift_limit()
            forget_failed_pass()  # or the next trial would seem to need less, by what it lets go
        preserved.rewind()
    own = None
    if failure is not None:
        own = str(failure) if is_making else describe(failure.__cause__ or failure)
    outcomes = preserved.ranks.gathered((fits and meter.peak_bytes <= limit_bytes, meter.peak_bytes, own))
    all_fit, peaks, problems = zip(*outcomes, strict=True)
    if failure is not None and not is_making and any(problem != own for problem in problems):
        raise failure
    failure = None  # which holds this frame, and tensors with it
    problem = next((problem for problem in problems if problem is not None), None)
    return Trial(micro_batch, all(all_fit), max(peaks), problem), meter.left_bytes


@contextmanager
def together(preserved: Preserved) -> Iterator[None]:
    """Return a block of passes that all ranks run, or leave together, where ``fully_shard`` makes them wait for others.

    Before each collective of it they meet, so it is not for what is timed. One that raises ends the block on all.

    Raises:
        OutOfMemoryElsewhereError: another rank has raised.
        RanksError: another rank is gone.
    """
    groups = sharded_groups(sharded_modules(preserved.setup.model))
    if not groups:
        yield
        return
    meeting = Meeting(preserved.ranks)
    with meeting.before_collectives(groups):
        try:
            yield
            meeting()
        except Exception as error:
            if meeting.news is None:
                preserved.ranks.meet_out_of_memory(error)
            raise


def held_bytes(setup: Setup) -> int:
    """Return the bytes that a setup's model and optimizer hold of the device that computes.

    What fully_shard keeps in host memory (CPUOffloadPolicy) takes none of a GPU's.
    """
    held = held_tensors(setup.model, setup.optimizer)
    return storage_bytes(tensor for tensor in tensors_in(held) if tensor.device.type == setup.device.type)
