"""The accumulator that users hold: what it can be asked for, between micro-batches and at the end of a window."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from accumkern import any_batch, ddp, master_state, ops, state, whole_gradients
from accumkern.attachment import Attachment
from accumkern.checks import integer
from accumkern.finish import Finished, batches_of, measure, write
from accumkern.fold import Fold
from accumkern.fully_shard_private import sharded_modules
from accumkern.hooks import owner_of
from accumkern.lost_bits import LostBitsMeter, LostBitsReport
from accumkern.master_weights import MasterWeights, state_dict_of
from accumkern.memory import HeldMemory, storage_bytes, tensors_in
from accumkern.noise_scale import NoiseScale, NoiseScaleMeter
from accumkern.out_of_memory import parse_bytes
from accumkern.passes import BackwardPasses
from accumkern.rank_windows import window_of
from accumkern.slot import Parts, Slot
from accumkern.stepping import Stepping
from accumkern.whole_gradients import WholeGradients


@dataclass
class Rooms:
    """What a GradAccumulator is made of, beside its attachment: it may be made again of them."""

    fold: Fold
    passes: BackwardPasses
    noise_scale: NoiseScaleMeter | None
    lost_bits: LostBitsMeter | None
    stepping: Stepping | None  # of master weights
    finished_at: int = -1  # the backward passes that there had been at the last finish()
    micro_batch: int | None = None  # of backward(), that memory was enough for after it ran out
    whole: weakref.WeakSet[WholeGradients] = field(default_factory=weakref.WeakSet)  # of fully_shard, which holds them

    @property
    def masters(self) -> MasterWeights | None:
        """The FP32 masters of the weights."""
        return None if self.stepping is None else self.stepping.masters


class GradAccumulator:
    """Hooks on an optimizer's parameters that accumulate their gradients in FP32; made by :func:`attach`.

    Attributes:
        buffer: the ``buffer`` argument of :func:`attach`.
    """

    def __init__(self, attachment: Attachment) -> None:
        self._attachment = attachment
        self._optimizer = attachment.optimizer  # whose hooks end with it: not while this object is used
        self._rooms = rooms = attachment.rooms
        self._fold, self._passes = rooms.fold, rooms.passes
        self.buffer: str = rooms.fold.buffer
        attachment.face = weakref.ref(self)

    @property
    def scale(self) -> float | Tensor:
        """The factor of each micro-gradient, multiplied in the kernel: a number, or a floating 0-dim tensor.

        Set it before the backward pass of a micro-batch: to weigh that one, to ``1 / tokens`` when the window's tokens
        are known beforehand, or to ``1 / n`` for a short last window of n. A number must be one of FP32, and zero there
        only if it is zero. A tensor is read on the device when the gradients are folded, and not looked at before. It
        begins as ``1 / average_over``, or 1.
        """
        return self._fold.scale

    @scale.setter
    def scale(self, scale: float | Tensor) -> None:
        self._check_attached()
        scale = ops.check_scale("scale", scale)
        if isinstance(scale, Tensor) and scale.device not in (devices := self._attachment.devices):
            on = ", ".join(sorted(map(str, devices)))
            raise ValueError(f"scale is on {scale.device} and the parameters on {on}; move it there")
        self._passes.complete()
        self._fold.set_scale(scale)

    def backward(
        self,
        loss_fn: Callable[[Any], Any],
        batch: Any,
        micro_batch: int | str = "auto",
        *,
        count: Callable[[Any], Any] | None = None,
        reduction: str = "mean",
        model: torch.nn.Module | None = None,
        split: Callable[[Any, int, int], Any] | None = None,
        backward: Callable[[Tensor], Any] | None = None,
        memory: int | str | None = None,
        reduce_once: bool = False,
    ) -> Any:
        """Run forward and backward passes of a batch of any size, in micro-batches that fit; return its mean loss.

        ``.grad`` gets the gradient of the loss of the whole batch, added to what was there, as one ``loss.backward()``
        would: for parts of unequal size too. With ``c_i`` the ``count`` of part ``i``, each loss is multiplied by
        ``c_i / sum(c)`` before its backward pass, in FP32.

        With ``micro_batch="auto"`` the first try is the whole batch, or as many samples as fitted after memory ran out
        last (:attr:`micro_batch`). Where memory runs out, in a forward or a backward pass, gradients and random numbers
        go back to what they were before the call, and it begins again with half as many: what comes out is what
        calling with that number would have given. Parts are as equal as can be, so the batch need not divide.

        Of a retry, dropout draws the same random numbers as without it. Running statistics of BatchNorm go back where
        ``model`` is given, and have seen the samples of the failed try otherwise; BatchNorm normalises by the samples
        of a micro-batch, however large the batch is.

        Args:
            loss_fn: takes a micro-batch, runs the model, and returns its mean loss: a floating 0-dim tensor, or several
                in a tuple or a dictionary, whose sum is trained. A loss in FP32 keeps the weights exact.
            batch: a tensor, or tensors in tuples, lists, dictionaries, named tuples and dataclasses, with the samples
                in their first dimension; see :mod:`accumkern.splitting`.
            micro_batch: samples of a micro-batch at most, or ``"auto"``.
            count: takes a micro-batch and returns what its mean loss is a mean over, such as the tokens that are not
                padding: a number or a 0-dim tensor, or one for each loss. A part that counts 0 is left out. None counts
                samples. Numbers on a device are waited for, once in a window.
            reduction: ``"mean"``, or ``"sum"`` where ``loss_fn`` returns sums: then nothing is weighed.
            model: what is trained: lets a retry put its buffers back, and knows the gradients of parameters that
                belong to other optimizers. Needed where there are several ranks: what ``loss_fn`` calls, with its
                DistributedDataParallel.
            split: called as ``split(batch, start, stop)`` where a batch has to be taken apart in a way of its own;
                ``len(batch)`` is its samples then.
            backward: takes the loss and runs the backward pass: ``accelerator.backward``, ``self.manual_backward``, or
                ``lambda loss: scaler.scale(loss).backward()``. None calls ``loss.backward()``.
            memory: what weights, gradients, states, batch and activations may take together, in bytes or as text such
                as ``"24GB"``; None is what there is. On a CPU, where the system ends a program that takes too much,
                this is what makes memory run out; there it looks at each operation, which takes time.
            reduce_once: under ``fully_shard``, reduce gradients in the last part alone, and keep whole ones until then:
                split, after :meth:`reduce_in_fp32`, otherwise in ``reduce_dtype``, which must be float32. False reduces
                in each part, and keeps shards.

        Returns:
            The mean loss of the batch, FP32, on its device, without a graph; in a tuple or a dictionary where
            ``loss_fn`` returned several.

        Where ``model`` is (or has) a DistributedDataParallel or modules under ``fully_shard``, all ranks call this with
        batches of their own, and ``.grad`` gets the gradient of all of them as one. Memory may run out on any rank; see
        docs/distributed.md. The loss is weighted so that its mean over ranks is that of the whole.

        Raises:
            TypeError, ValueError: an argument or what a function returned is of the wrong kind or range, or the
                accumulator multiplies gradients itself (``average_over``, ``scale``).
            RuntimeError, MemoryError: what ``loss_fn`` raised; memory that ran out with a single sample, or with the
                ``micro_batch`` that was asked for; another rank's error, with its number
                (:class:`accumkern.ranks.RanksError`).

        After an error gradients and random numbers are what they were before the call. Gradients that were there
        before it are copied to the host's memory until it is over.
        """
        with window_of(model, reduce_once) as window:  # before what may be wrong on one rank alone
            self._check_parameters()
            self._passes.complete()
            limit = None if memory is None else parse_bytes(memory)
            how = count, split, reduction, backward, limit
            asked = any_batch.check_request(loss_fn, batch, micro_batch, self._rooms.micro_batch, *how)
            losses, found = any_batch.run(asked, self._attachment, model, window)
        if found is not None:
            self._rooms.micro_batch = found
        return losses

    @property
    def micro_batch(self) -> int | None:
        """Samples that :meth:`backward` begins with, because memory ran out with twice as many; None: with all.

        It does not grow by itself: set it to None, or to another number, where there is more memory.
        """
        return self._rooms.micro_batch

    @micro_batch.setter
    def micro_batch(self, samples: int | None) -> None:
        right = "it must be a positive number of samples, or None"
        self._rooms.micro_batch = None if samples is None else integer("micro_batch", samples, right, 1)

    def finish(
        self,
        divide_by: float | Tensor = 1.0,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        defer: bool = False,
    ) -> Finished:
        """Divide, clip and round all gradients; optional, once per window before ``optimizer.step()``.

        For every element, with ``x`` the accumulated FP32 value::

            norm  = ||x / divide_by||                           # of all gradients together
            grad  = round((x / divide_by) * min(1, max_norm / (norm + 1e-6)))

        Ties are rounded to even, also where the folds of a split buffer have rounded them away from zero; with neither
        ``divide_by`` nor ``max_norm`` ``.grad`` stays as it is. With
        ``attach(..., master_weights=...)`` the value is kept to the precision of ``buffer``, as after a fold: that is
        what the step reads; ``.grad`` is its rounding.

        The norm is always that of what is in memory, whoever wrote it: a pass that reads ``.grad`` and residuals before
        the one that writes. Nothing waits for the device, so it can be captured in a CUDA graph.

        Args:
            divide_by: a positive number, or a 0-dim tensor on the device of the gradients, such as the tokens of the
                window. A tensor on a GPU is not looked at: zero or NaN there comes out as ``found_nonfinite``.
            max_norm: clip the total norm to this; None does not clip. As with ``clip_grad_norm_``, infinity clips
                nothing but makes every gradient NaN where the norm is infinite.
            norm_type: 2 or any other positive number, or infinity, as in ``clip_grad_norm_``.
            error_if_nonfinite: raise where the norm is infinite or NaN. Waits for the device.
            defer: leave ``.grad`` as it is, and have the next ``optimizer.step()`` divide and clip what it reads, which
                saves a pass over all gradients; needs ``attach(..., master_weights=...)``. Leave the gradients alone
                until then. ``zero_grad()`` instead of a step takes this back.

        Returns:
            ``Finished(norm, clip_coefficient, found_nonfinite)``, 0-dim tensors on the device.

        Raises:
            TypeError, ValueError: an argument is of the wrong kind or range, or on another device; ``defer`` without
                ``master_weights``.
            RuntimeError: there are no gradients, ``finish`` was called already since the last backward pass, or the
                norm is not finite and ``error_if_nonfinite`` is set. ``.grad`` is untouched then.
        """
        self._check_parameters()
        self._passes.complete()
        slots, stepping = list(self._attachment.slots.values()), self._rooms.stepping
        if not isinstance(defer, bool):
            raise TypeError(f"defer is a {type(defer).__name__}; it must be True or False")
        if defer and stepping is None:
            raise ValueError("defer is True, and attached without master_weights: the step reads .grad as it is")
        batches = batches_of(slots)
        if not batches:
            raise RuntimeError("there is nothing to finish: no parameter has a gradient; call it after backward()")
        if self._rooms.finished_at == self._passes.count:
            raise RuntimeError("finish() was called already since the last backward pass; call it once per window")
        how = divide_by, max_norm, norm_type, error_if_nonfinite
        finished, scaling = measure(batches, *how, self._fold.kernels_on)
        if stepping is not None:
            stepping.deferred.forget()
            if defer:
                stepping.deferred.set(scaling, slots)
        if scaling.changes and not defer:
            write(batches, scaling, self._fold.kernels_on, keeps_residuals=stepping is not None)
        self._rooms.finished_at = self._passes.count
        return finished

    def reduce_in_fp32(self, model: torch.nn.Module) -> None:
        """Let DistributedDataParallel or ``fully_shard`` reduce the accumulated sums in FP32, and not their roundings.

        ``.grad`` is then the mean over ranks, rounded once, and the residual is what it lacks, so that :meth:`finish`
        and :meth:`gradient` see the mean to the precision of ``buffer``.

        DistributedDataParallel: registers a communication hook. Each rank adds its part of every bucket in FP32, in
        the order of ranks, while the backward pass goes on. Split sums travel to it, and the mean back, as they are
        stored: in 3 bytes for an element with ``buffer="split24"``, 4 with ``"split32"``, where bfloat16 has 2; one
        bucket at a time has memory for that. With ``"fp32"``, for float16, and between machines with several ranks
        each, FP32 values go through an all-reduce. float32 gradients are reduced as always.

        ``fully_shard``: also keeps the whole gradients that it adds up with ``set_requires_gradient_sync(False)`` as
        split sums: 3 bytes for each parameter of the model with ``buffer="split24"`` and gradients in bfloat16, 4 with
        the other buffers. They are reduced in FP32 whatever ``reduce_dtype`` says; one group of parameters at a time
        has a copy of 4 bytes per element. Each is multiplied by the ``scale`` of its own time.

        All ranks call it, at the same point of a window's beginning.

        Args:
            model: the wrapped model, with no other communication hook; or one that is, or has, modules under
                ``fully_shard``. When this accumulator is detached or gone, the model does what stock PyTorch does.

        Raises:
            TypeError: ``model`` is neither.
            RuntimeError: ``model`` has a communication hook already, of somebody else or of an accumulator that is
                attached still; or ``fully_shard`` keeps whole gradients that were not reduced.
            accumkern.ranks.RanksError: in a reduction under DistributedDataParallel, another rank is gone.
        """
        self._check_attached()
        if isinstance(model, torch.nn.parallel.DistributedDataParallel):
            ddp.reduce_in_fp32(model, ddp.Fp32Reduction(self._attachment.slots, self.buffer, self._fold.kernels_on))
            return
        modules = sharded_modules(model) if isinstance(model, torch.nn.Module) else []
        if not modules:
            raise TypeError(
                f"model is a {type(model).__name__}; it must be a DistributedDataParallel, or have modules under "
                "fully_shard (of a stage of a pipeline: the stage's module)"
            )
        self._rooms.whole.update(whole_gradients.reduce_in_fp32(modules, self._attachment.slots, self._fold))

    def mean_over_ranks(self, model: torch.nn.Module) -> None:
        """Take the mean over ranks of what has been accumulated so far, and let every rank go on from it.

        ::

            sum of each rank = (sum over ranks of the sums) / ranks

        For checkpoints in the middle of a window under DistributedDataParallel, where each rank has a sum of its own:
        after this all have the same state, which is saved once and can be loaded on another number of ranks. What the
        window's end gives is the same mean, whenever and however often this is called. In FP32, with residuals, after
        :meth:`reduce_in_fp32`; in the gradients' dtype otherwise. Under ``fully_shard`` sums are means already, and
        this sees that none is still to be reduced.

        All ranks have to call it together, outside of ``no_sync()``.

        Args:
            model: is or has a DistributedDataParallel, or modules under ``fully_shard``.

        Raises:
            TypeError: ``model`` is no module, or a gradient is sparse or of another dtype than its parameter.
            ValueError: inside of ``no_sync()``; ``fully_shard`` keeps gradients that it has not reduced; or the model
                reduces in a way that :meth:`backward` refuses.
            accumkern.ranks.RanksError: another rank has failed or is gone.
        """
        self._check_attached()
        with window_of(model, has_to_reduce=True) as window:
            self._check_parameters()
            self._passes.complete()
            window.reduce()
        if self._rooms.lost_bits is not None:
            self._rooms.lost_bits.reset()

    def noise_scale(
        self,
        tokens: Sequence[float] | Tensor | None = None,
        *,
        group: int | None = None,
        smoothing: float = 0.9,
    ) -> NoiseScale:
        """Return the gradient noise scale, a guide to the useful batch size; needs ``attach(..., stats=True)``.

        Call it once per window, after its last backward pass and before ``zero_grad()``. The estimator is unbiased for
        micro-batches of unequal size; see :mod:`accumkern.noise_scale` for the formula and docs/noise-scale.md for its
        limits. It waits for the device.

        Args:
            tokens: what each micro-batch of the window counts, where the losses are sums over so many tokens. None
                takes all as equal, and gives the noise scale in micro-batches instead of tokens.
            group: index of a parameter group of the optimizer, to estimate from it alone.
            smoothing: weight of the past in the average over windows, 0 to 1 (excluded).

        Raises:
            RuntimeError: ``stats`` is off, the window has fewer than two micro-batches, ``.grad`` was changed in the
                middle of it, it is over, or this was called in it already.
            TypeError: an argument is of the wrong kind.
            ValueError: ``tokens`` does not hold one positive number per micro-batch, or ``group`` or ``smoothing`` is
                out of range.
        """
        self._check_parameters()
        if self._rooms.noise_scale is None:
            raise RuntimeError("noise_scale() needs the squared norms that attach(..., stats=True) takes")
        self._passes.complete()
        return self._rooms.noise_scale.read(tokens, group, smoothing)

    def report(self) -> LostBitsReport:
        """Return how much stock accumulation would have lost in the last window; needs ``attach(..., report=True)``.

        Both sums are taken right after the last micro-batch of this rank: what ``finish``, clipping, a mean over ranks
        or ``zero_grad()`` make of ``.grad`` does not count. ``print(acc.report())`` shows it as plain text,
        ``rich.print`` as a table; its rows are plain data.

        Raises:
            RuntimeError: ``report`` is off, or no 16-bit gradient has been accumulated yet.
        """
        self._check_attached()
        if self._rooms.lost_bits is None:
            raise RuntimeError("report() needs the samples that attach(..., report=True) takes")
        self._passes.complete()
        return self._rooms.lost_bits.report(self._attachment.groups)

    def gradient(self, param: Tensor) -> Tensor | None:
        """Return the accumulated gradient of ``param`` as a new FP32 tensor of its shape; None where ``.grad`` is None.

        A complex gradient, which torch adds by itself, is returned as it is.

        Raises:
            ValueError: ``param`` is not a parameter of the attached optimizer.
        """
        slot = self._slot_of(param)
        return None if param.grad is None else slot.value(param.grad)

    def parts(self, param: Tensor) -> Parts | None:
        """Return the accumulated gradient of ``param`` as it is stored, without decoding it; None where ``.grad`` is.

        ``sum, residual, format = acc.parts(param)`` are the live tensors: ``sum`` is ``.grad`` itself (of a DTensor,
        the shard of this rank), ``residual`` what it lacks, of the same shape and strides; ``None`` counts as zero.
        :func:`accumkern.formats.decode` makes the FP32 value of the three.

        Raises:
            ValueError: ``param`` is not a parameter of the attached optimizer.
        """
        slot = self._slot_of(param)
        return None if param.grad is None else slot.parts()

    def master_weight(self, param: Tensor) -> Tensor:
        """Return the FP32 master weight of ``param`` as a new tensor of its shape; of another dtype, a copy.

        Raises:
            RuntimeError: attached without ``master_weights``.
            ValueError: ``param`` is not a parameter of the attached optimizer.
        """
        masters = self._masters("master_weight()")
        self._slot_of(param)
        return masters.value(param)

    def master_state_dict(self, model: torch.nn.Module) -> dict[str, Any]:
        """Return the state dict of ``model`` in FP32: master weights where there are, other 16-bit tensors cast.

        Masters may be of several accumulators, as of Muon and AdamW on one model. What a hook of the model has put in
        the place of a parameter is cast.

        What shares memory in the model shares it here: tied weights. The tensors are new, unless they are not of 16
        bits.

        Raises:
            RuntimeError: attached without ``master_weights``.
            TypeError: ``model`` is no module.
        """
        self._masters("master_state_dict()")
        if not isinstance(model, torch.nn.Module):
            raise TypeError(f"model is a {type(model).__name__}; it must be a torch.nn.Module")

        def masters_of(param: Tensor) -> MasterWeights | None:
            owner = owner_of(param)
            return None if owner is None else owner.rooms.masters

        return state_dict_of(model, masters_of)

    def memory(self) -> HeldMemory:
        """Return the bytes that are held between two micro-batches on this rank, by what they are for.

        They are counted from the tensors themselves, each piece of memory once: of the optimizer's parameters, with
        their gradients, residuals and states. ``print(acc.memory())`` shows them, and the bytes per parameter. Not in
        it are parameters and buffers that the optimizer does not have, activations, and what a step makes for a moment.
        It is most before a step: residuals come with a window's second micro-batch, ``zero_grad()`` lets gradients go.
        """
        self._check_attached()
        slots, stepping = self._attachment.slots.values(), self._rooms.stepping
        params = tensors_in(self._attachment.params)
        whole_sums, whole_residuals = whole_gradients.tensors_of(self._rooms.whole)
        residuals = [slot.residual for slot in slots if slot.residual is not None]
        return HeldMemory(
            weights=storage_bytes(params),
            master_residuals=0 if stepping is None else storage_bytes(stepping.masters.held_tensors()),
            gradients=storage_bytes([*tensors_in([slot.param.grad for slot in slots]), *whole_sums]),
            residuals=storage_bytes(residuals + whole_residuals),
            optimizer_state=storage_bytes(tensors_in(dict(getattr(self._optimizer, "state", {})))),
            bucket=0 if stepping is None else stepping.kept_bytes(),
            numel=sum(param.numel() for param in params),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs beside those of model and optimizer: sums and residuals, bit for bit.

        Those of gradients matter in the middle of a window, those of master weights always. Like an optimizer's, the
        tensors are the live ones: save or copy them before training goes on. ``state["sums"]["0"]`` is ``.grad`` of
        the optimizer's first parameter, ``state["residuals"]["0"]`` what lies beside it, each None where there is
        none. There is nothing but dictionaries, strings and tensors, so ``torch.load(weights_only=True)`` takes it.
        What belongs to a DTensor is a DTensor, laid out alike. With master weights, ``state["master_weights"]`` holds
        what the weights lack, and checksums of the weights that it belongs to; with DTensors, all ranks have to call
        this together then.

        Raises:
            RuntimeError: the gradient of a DTensor is a sum over ranks that is still to be taken (``Partial``, as of a
                norm under sequence parallelism), of which a checkpoint would keep one term; ``finish(defer=True)``
                waits for its step, which a checkpoint would not know; or there are whole gradients of
                :meth:`reduce_in_fp32` that were not reduced yet. Those that ``fully_shard`` adds up by itself are not
                seen, and not in the state.
        """
        self._check_parameters()
        self._check_reduced("state_dict()")
        self._passes.complete()
        if self._rooms.stepping is not None and self._rooms.stepping.deferred.waits():
            raise RuntimeError("finish(defer=True) waits for optimizer.step(); call state_dict() after it")
        params, masters = self._attachment.params, self._rooms.masters
        found = state.saved(params, self._attachment.slots, self.buffer)
        return found if masters is None else {**found, "master_weights": master_state.saved(params, masters)}

    def empty_state_dict(self) -> dict[str, Any]:
        """Return a state of zeros, for loaders that write into tensors which are there: torch.distributed.checkpoint.

        It has a sum for every parameter that requires a gradient, and every residual. What the checkpoint has not, is
        None after it was loaded. Give the result to :meth:`load_state_dict`.
        """
        self._check_parameters()
        params, masters = self._attachment.params, self._rooms.masters
        zeros = state.empty(params, self._attachment.slots, self.buffer)
        return zeros if masters is None else {**zeros, "master_weights": master_state.empty(params, masters)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put back what :meth:`state_dict` returned: ``.grad`` of every parameter, and the residuals, as copies.

        With master weights, load the states of model and optimizer before; with DTensors, all ranks have to call this
        together then.

        Raises:
            TypeError: ``state_dict`` is not such a dictionary, or holds a tensor of another dtype.
            ValueError: it was saved with another ``buffer`` or ``master_weights``, for other parameters, or master
                weights belong to other weights than the parameters are now.
            RuntimeError: there are whole gradients of :meth:`reduce_in_fp32` that were not reduced yet.

        After an error nothing has changed.
        """
        self._check_parameters()
        self._check_reduced("load_state_dict()")
        params, masters = self._attachment.params, self._rooms.masters
        sums = {} if masters is None else master_state.checksums_of_shards(params, masters)  # before one rank may raise
        of_gradients, of_masters = state.parts(state_dict, None if masters is None else masters.name)
        entries = state.checked(of_gradients, params, self.buffer)
        residuals = [] if masters is None else master_state.checked(of_masters, params, masters, sums)
        self._passes.complete()
        state.load(entries, params, self._attachment.slots)
        for param, residual in zip(params, residuals, strict=False):
            masters.load(param, residual)
        self._rooms.finished_at = -1
        if self._rooms.stepping is not None:
            self._rooms.stepping.deferred.forget()
        if self._rooms.noise_scale is not None:
            self._rooms.noise_scale.squares.reset()
        if self._rooms.lost_bits is not None:
            self._rooms.lost_bits.reset()

    def detach(self) -> None:
        """Remove every hook: stock behaviour from now on. ``.grad`` stays as it is; calling it again does nothing.

        What ``finish(defer=True)`` has left to the next step is done now.

        A communication hook (:meth:`reduce_in_fp32`) cannot be removed, but does what stock PyTorch does without one.
        Whole gradients that ``fully_shard`` has not reduced yet are put back into its own form in the next pass.
        """
        self._passes.complete()
        if self._rooms.stepping is not None and self._attachment.is_attached:
            deferred = self._rooms.stepping.deferred
            if deferred.waits():
                deferred.write(self._attachment.with_gradients())
            deferred.forget()
        self._attachment.detach()

    def __enter__(self) -> GradAccumulator:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.detach()

    def __repr__(self) -> str:
        attached = f"{len(self._attachment.slots)} parameters" if self._attachment.is_attached else "detached"
        stepping = self._rooms.stepping
        masters = "" if stepping is None else f"master_weights={stepping.masters.name!r}, step={stepping.how()!r}, "
        return f"GradAccumulator(buffer={self.buffer!r}, {masters}scale={self.scale!r}, {attached})"

    def __reduce__(self) -> Any:
        raise TypeError(
            "a GradAccumulator cannot be copied or pickled, because hooks of parameters cannot: save its state_dict(), "
            "and attach() to the optimizer of the copy"
        )

    def _check_attached(self) -> None:
        if not self._attachment.is_attached:
            raise RuntimeError("this accumulator is detached from its optimizer; attach() makes another one")

    def _check_parameters(self) -> None:
        self._check_attached()
        self._attachment.check_hooks()

    def _check_reduced(self, asked: str) -> None:
        if any(whole.are_pending for whole in self._rooms.whole):
            raise RuntimeError(
                "fully_shard keeps whole gradients that were not reduced (set_requires_gradient_sync(False)): they are "
                f"neither in .grad nor in a state; call {asked} after the backward pass that reduces them"
            )

    def _masters(self, asked: str) -> MasterWeights:
        self._check_attached()
        if self._rooms.masters is None:
            raise RuntimeError(f"{asked} needs the master weights of attach(..., master_weights='split32')")
        assert self._rooms.stepping is not None
        self._rooms.stepping.begin_masters()
        return self._rooms.masters

    def _slot_of(self, param: Tensor) -> Slot:
        self._check_attached()
        self._passes.complete()
        if not isinstance(param, Tensor) or param not in self._attachment.slots:
            self._check_parameters()  # it may have come by hand
        slot = self._attachment.slots.get(param) if isinstance(param, Tensor) else None
        if slot is None:
            raise ValueError("param is not a parameter of the attached optimizer")
        return slot
