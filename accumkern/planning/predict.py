"""What would fit elsewhere: peak memory by category, from a window on fake tensors, which have shapes but no memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from accumkern import backends
from accumkern.casting import set_cut_off_aside
from accumkern.planning.precision import accumulation
from accumkern.planning.protocol import Setup, SetupFunction, make_batch, run_setup
from accumkern.planning.trial import RandomState, accumulate, train_window
from accumkern.torch_private import FakeTensor, FakeTensorMode, memory_tracker, pop_mode_temporarily, tree_leaves


class PredictionError(RuntimeError):
    """A script cannot be run on fake tensors; measuring on the device still works."""


@dataclass(frozen=True)
class Memory:
    """Bytes at the moment of the peak, by what they are for.

    Attributes:
        parameters: with buffers.
        gradients: ``.grad``, and a new gradient that is just being folded.
        residuals: what accumkern keeps beside ``.grad``.
        master_residuals: what it keeps beside the weights.
        optimizer_state: with what its step needs for a moment, such as FP32 weights and gradients of a bucket.
        activations: with the batch, gradients of activations, and what operations need for a moment.
    """

    parameters: int
    gradients: int
    residuals: int
    master_residuals: int
    optimizer_state: int
    activations: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class Prediction:
    """What a micro-batch needs, from fake tensors.

    Attributes:
        micro_batch: samples in it.
        memory: at the peak, by category.
    """

    micro_batch: int
    memory: Memory


@contextmanager
def fake_setup(function: SetupFunction) -> Iterator[Setup]:
    """Call ``setup()`` so that everything it makes is fake, and stay in that mode for the block.

    Raises:
        PredictionError: in ``setup()`` or in the block something needed values of tensors (``item()``, shapes that
            depend on data), or something else that fake tensors don't have.
        TypeError, ValueError: ``setup()`` does not follow the protocol.
    """
    random_state = RandomState(torch.device("cpu"))
    put_cut_off_back = set_cut_off_aside()
    try:
        with _fake_mode():
            with backends.without_kernels():
                setup = run_setup(function)
            set_cut_off_aside()  # what is fake has no values to begin masters with
            # Training a real model in this mode would leave fake gradients and states in it.
            if not all(isinstance(param, FakeTensor) for param in setup.model.parameters()):
                raise RuntimeError("setup() returned a model that was made before it was called")
            yield setup
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]  # torch adds advice that does not apply
        raise PredictionError(
            f"memory cannot be predicted, because the script does not run on fake tensors: {reason}; measure it on the "
            "device instead (and without a GPU, let setup() choose the CPU: tensors are as large there)"
        ) from error
    finally:
        put_cut_off_back()
        random_state.put_back()


def predict_memory(
    setup: Setup, micro_batch: int, buffer: str | None, micro_batches: int = 2, master_weights: str | None = None
) -> Memory:
    """Return the peak memory of training with a micro-batch, without having that memory.

    Two windows run, with the optimizer's step; the peak is of the second. Tensors on a GPU count as its allocator
    rounds them, to 512 bytes. What a kernel needs inside itself, and what CUDA keeps apart from tensors, is not in it.

    Args:
        setup: of the block of :func:`fake_setup`, and inside it.
        micro_batch: samples in a micro-batch, of the longest.
        buffer: of :func:`accumkern.attach`; None accumulates as stock PyTorch does.
        micro_batches: in a window; 1 accumulates nothing.
        master_weights: of :func:`accumkern.attach`.
    """
    tracker, kinds = memory_tracker()

    def batch_beside_tracker() -> object:
        # The batch counts, but not the data that it is cut from, which was there before.
        tracker.reset_mod_stats()  # it takes a model that is called again for an error otherwise
        with pop_mode_temporarily():
            batch = make_batch(setup, micro_batch, "longest_batch")
        tracker.track_external(*(leaf for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor)))
        return batch

    # The hooks run, and allocate what they do in training; fake tensors have nothing that kernels could read.
    with (
        backends.without_kernels(),
        accumulation(setup, buffer, micro_batches, master_weights, backend="eager") as accumulator,
    ):
        for _ in range(micro_batches):
            accumulate(setup, make_batch(setup, micro_batch, "longest_batch"), micro_batches, accumulator)
        with tracker:
            setup.optimizer.step()  # what a step keeps for the next one counts from here on
        state = {} if accumulator is None else accumulator.state_dict()
        setup.optimizer.zero_grad()
        tracker.track_external(*state.get("residuals", {}).values())
        residuals = tracker.get_tracker_snapshot().get(setup.device, {}).get(kinds.OTH, 0)
        tracker.track_external(*state.get("master_weights", {}).get("residuals", {}).values())
        kept = tracker.get_tracker_snapshot().get(setup.device, {}).get(kinds.OTH, 0)
        tracker.track_external(setup.model, setup.optimizer)
        del state  # which holds gradients
        with tracker:
            train_window(setup, (batch_beside_tracker() for _ in range(micro_batches)), micro_batches, accumulator)
    peak = tracker.get_tracker_snapshot("peak")[setup.device]
    return Memory(
        parameters=peak[kinds.PARAM] + peak[kinds.BUFFER],
        gradients=peak[kinds.GRAD],
        residuals=residuals,
        master_residuals=kept - residuals,
        optimizer_state=peak[kinds.OPT],
        activations=peak[kinds.ACT] + peak[kinds.TEMP] + peak[kinds.OTH] - kept,
    )


@contextmanager
def _fake_mode() -> Iterator[None]:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    # Its memo holds weak references, and module.to(...) refuses to swap a parameter that has any
    # (https://github.com/pytorch/pytorch/pull/184976). Nothing here is converted twice.
    mode.fake_tensor_converter.set_tensor_memo = lambda tensor, fake: None
    with mode:
        yield
