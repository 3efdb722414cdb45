"""``accumkern.plan``: measure what fits, what is fast and what helps training, and decide."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from accumkern.checks import integer
from accumkern.planning.fakes import PredictionError, fake_setup
from accumkern.planning.memory import available_bytes, check_margin, format_bytes, parse_bytes
from accumkern.planning.noise import accumulation_pays, best_batch, costs, measure_noise, useful_batches
from accumkern.planning.plan_result import Choice, Plan, explain
from accumkern.planning.precision import choose_buffer, choose_masters, masters_problem, step_bytes, with_masters
from accumkern.planning.predict import DEVICES, Prediction, choose_device, no_fit, predict, smallest_size
from accumkern.planning.protocol import Setup, SetupFunction, run_setup
from accumkern.planning.ranks import Ranks
from accumkern.planning.speed import Split, knee, measure_speeds, sizes_to_time, split, split_by_size
from accumkern.planning.trial import Preserved, Trial, find_fit, largest, verify
from accumkern.torch_private import BatchNorm
from accumkern.version import __version__

_RANKS = (1, 2, 4, 8)
_NOISE_MICRO_BATCH = 4


Progress = Callable[[str, str], None]  # of (what is being done, what came of it)


def plan(
    setup: SetupFunction,
    *,
    effective_batch: int | None = None,
    memory: int | str | None = None,
    margin: float = 0.1,
    buffer: str | None = None,
    master_weights: str | None = "auto",
    largest_micro_batch: int = 1024,
    noise_windows: int = 32,
    measure: bool = True,
    device: str | None = None,
    progress: Progress = lambda stage, detail: None,
) -> Plan:
    """Find the micro-batch and the accumulation steps to train with, and say why.

    It tries what fits, times what fits, estimates the gradient noise scale, and predicts memory without using it; see
    ``docs/batch-size.md`` for how, and for what can be relied on. The setup's model, optimizer and gradients, and all
    random numbers, are afterwards as ``setup()`` made them. With a process group, call it on every rank: they get the
    same plan, or all of them raise.

    Args:
        setup: a function that returns model, optimizer, make_batch and loss; see
            :class:`accumkern.planning.protocol.Setup`.
        effective_batch: samples between two optimizer steps, over all ranks. None chooses from speed and noise.
        memory: of the device, in bytes or as text such as ``"24GB"``. None takes what is available now.
        margin: the part of it to leave free, 0 to 1 (excluded).
        buffer: of :func:`accumkern.attach`; None chooses by the parameters' dtype.
        master_weights: of :func:`accumkern.attach`; ``"auto"`` is ``"split32"`` where the optimizer has bfloat16
            parameters and can be stepped on FP32 ones, or else None.
        largest_micro_batch: not to be exceeded, if memory allows more.
        noise_windows: windows to train for the noise scale, 4 or more, or 0 to leave it out.
        measure: False predicts what fits on fake tensors, and uses neither the device nor its memory.
        device: that a prediction (``measure=False``) is for, ``"cuda"`` or ``"cpu"``. None predicts for a GPU, also
            where ``setup()`` puts the model on the CPU; see :func:`accumkern.planning.predict.predict`.
        progress: is called with what is being done and with what came of it.

    Raises:
        TypeError, ValueError: an argument or what ``setup()`` returned is wrong, or the limit is less than the
            parameters take.
        RuntimeError: ``setup()`` or one of its functions failed, memory leaks, no micro-batch fits, or another rank
            failed (:class:`accumkern.planning.ranks.RanksError` says which one, in which phase, with what error).
        PredictionError: with ``measure=False``, the script does not run on fake tensors.
    """
    with Ranks() as ranks:
        with ranks.phase("arguments"):
            if effective_batch is not None:
                effective_batch = _whole("effective_batch", effective_batch, 1)
            largest_micro_batch = _whole("largest_micro_batch", largest_micro_batch, 1)
            noise_windows = _whole("noise_windows", noise_windows, 0)
            if 0 < noise_windows < 4:
                raise ValueError(
                    f"noise_windows is {noise_windows}; it must be at least 4, or 0 to leave the noise scale out"
                )
            margin = check_margin(margin)
            limit = None if memory is None else parse_bytes(memory)
            if limit is None and not measure:
                raise ValueError("memory is None; a prediction (measure=False) needs it, such as memory='24GB'")
            if device is not None and measure:
                raise ValueError(f"device is {device!r}; what is measured (measure=True) is the device of the model")
            ranks.check_same(
                effective_batch=effective_batch,
                margin=margin,
                buffer=buffer,
                master_weights=master_weights,
                largest_micro_batch=largest_micro_batch,
                noise_windows=noise_windows,
                measure=measure,
                device=device,
            )
        if limit is not None and not measure:
            limit = min(ranks.gathered(limit))
            with ranks.phase("what would fit"):
                asked = effective_batch, limit, margin, buffer, master_weights, largest_micro_batch, device
                plan = _predicted_plan(setup, *asked, progress)
            return ranks.gathered(plan)[0]
        with ranks.phase("setup()"):
            made = run_setup(setup)
            if isinstance(made.model, DistributedDataParallel):
                made = made._replace(model=made.model.module)  # whose backward pass waits for no other rank
            buffer = choose_buffer(made, buffer)
            master_weights = choose_masters(made, master_weights)
            limit = min(ranks.gathered(limit or available_bytes(made.device)))
        at_most = largest_micro_batch
        if effective_batch is not None:
            at_most = min(at_most, max(1, math.ceil(effective_batch / ranks.count)))
        with Preserved(made, buffer, ranks, master_weights) as preserved:
            plan = _measured_plan(setup, preserved, effective_batch, limit, margin, at_most, noise_windows, progress)
        return ranks.gathered(plan)[0]  # predictions, losses and the machine may differ


def _measured_plan(
    function: SetupFunction,
    preserved: Preserved,
    target: int | None,
    limit: int,
    margin: float,
    at_most: int,
    noise_windows: int,
    progress: Progress,
) -> Plan:
    setup, ranks = preserved.setup, preserved.ranks
    allowed = int(limit * (1 - margin))

    def tell(trial: Trial) -> None:
        outcome = "fits" if trial.fits else "does not fit"
        progress("what fits", f"micro-batch {trial.micro_batch}: {format_bytes(trial.peak_bytes)}, {outcome}")

    with ranks.phase("what fits"):
        fit = find_fit(preserved, allowed, at_most, tell)
    with ranks.phase("what is fast"):
        speeds = measure_speeds(
            preserved,
            sizes_to_time(fit.micro_batch, None if target is None else target // ranks.count),
            lambda speed: progress(
                "what is fast", f"micro-batch {speed.micro_batch}: {speed.limit_per_second:.4g} samples per second"
            ),
        )
    noise = None
    if noise_windows:
        with ranks.phase("what helps training"):
            progress("what helps training", f"gradient noise over {noise_windows} windows")
            noise = measure_noise(preserved, min(fit.micro_batch, _NOISE_MICRO_BATCH), noise_windows)
            progress("what helps training", f"gradient noise scale {noise.noise_scale:.3g} samples")
    peaks = {trial.micro_batch: trial.peak_bytes for trial in fit.trials if trial.fits}
    powers = [size for size in sorted(peaks) if size & (size - 1) == 0 or size == max(peaks)]
    with ranks.phase("what would fit elsewhere"):
        predictions, problem = _predictions(function, powers, preserved, progress)

    by_size = {speed.micro_batch: speed for speed in speeds}
    sizes = list(by_size)

    def rate(micro_batch: int, accumulation_steps: int) -> float:
        return by_size[micro_batch].samples_per_second(accumulation_steps)

    with ranks.phase("the plan"):
        batch = target or best_batch(ranks.count, sizes, rate, math.inf if noise is None else noise.noise_scale)
        way = ranks.gathered(split(batch, ranks.count, sizes, rate))[0]
        progress("the plan", f"micro-batch {way.micro_batch}, {way.accumulation_steps} accumulation steps")
        verified = verify(preserved, way.micro_batch, way.accumulation_steps, allowed)
        if not verified.fits:
            raise RuntimeError(
                f"a micro-batch of {way.micro_batch} fitted before and does not now "
                f"({format_bytes(verified.peak_bytes)}); other programs take memory, or the setup's use of it changes: "
                "leave a larger margin"
            )
    peaks[verified.micro_batch] = verified.peak_bytes

    def prospects(way: Split) -> tuple[float, float | None, float | None]:
        speed = way.samples_per_second(rate)
        if noise is None:
            return speed, None, None
        return speed, *useful_batches(way.ranks, sizes, rate, (noise.low, noise.noise_scale, noise.high))

    return _plan_of(
        setup,
        way,
        lambda n: split(way.effective_batch, n, sizes, rate),
        peaks,
        prospects,
        target=target,
        buffer=preserved.buffer,
        master_weights=preserved.master_weights,
        accumulation_pays=accumulation_pays(way, sizes, rate, noise),
        memory_limit_bytes=limit,
        margin=margin,
        largest_micro_batch=fit.micro_batch,
        is_limited_by_memory=fit.is_limited_by_memory,
        fit=fit,
        predictions=predictions,
        prediction_problem=problem,
        speeds=tuple(speeds),
        knee=knee(speeds).micro_batch,
        noise=noise,
        batches=costs(way, sizes, rate, noise),
        machine=_machine(setup.device),
    )


def _predicted_plan(
    function: SetupFunction,
    target: int | None,
    limit: int,
    margin: float,
    buffer: str | None,
    master_weights: str | None,
    at_most: int,
    device: str | None,
    progress: Progress,
) -> Plan:
    """Plan from memory alone, without running anything."""
    allowed = int(limit * (1 - margin))
    at_most = at_most if target is None else min(at_most, target)
    found: dict[int, Prediction] = {}
    with fake_setup(function) as setup:
        buffer, master_weights = choose_buffer(setup, buffer), choose_masters(setup, master_weights)
        device = choose_device(setup, device)

        def predicted(micro_batch: int, micro_batches: int = 2) -> Prediction:
            return predict(setup, micro_batch, buffer, micro_batches, master_weights, device)

        def fits(micro_batch: int) -> bool:
            prediction = found[micro_batch] = predicted(micro_batch)
            total = prediction.memory.total
            progress("what would fit", f"micro-batch {micro_batch}: {format_bytes(total)} predicted")
            return total <= allowed

        smallest = smallest_size(fits, at_most)
        memory = found[smallest].memory
        if memory.total > allowed:
            raise ValueError(no_fit(found[smallest], limit, margin))
        most = largest(lambda size: size <= smallest or fits(size), at_most)
        peaks = dict.fromkeys(range(1, smallest), memory.total) | {size: of.memory.total for size, of in found.items()}

        def way_on(batch: int, ranks: int) -> Split:
            way = split_by_size(batch, ranks, most)
            return way if way.micro_batch >= smallest else Split(ranks, smallest, 1)

        way = way_on(target or most, 1)
        peak = predicted(way.micro_batch, min(2, way.accumulation_steps)).memory.total
        return _plan_of(
            setup,
            way,
            lambda n: way_on(way.effective_batch, n),
            peaks | {way.micro_batch: peak},
            lambda way: (None, None, None),
            target=target,
            buffer=buffer,
            master_weights=master_weights,
            memory_limit_bytes=limit,
            margin=margin,
            largest_micro_batch=most,
            is_limited_by_memory=most < at_most,
            predictions=tuple(found[size] for size in sorted(found)),
            machine=_machine(None) | {"device": DEVICES[device]},
        )


def _plan_of(
    setup: Setup,
    way: Split,
    way_on: Callable[[int], Split],
    peaks: dict[int, int],
    prospects: Callable[[Split], tuple[float | None, float | None, float | None]],
    **known: Any,
) -> Plan:
    """Return a plan with its reasons; ``prospects`` gives samples per second of a way, and its useful batches."""
    gradient_bytes = sum(p.numel() * p.element_size() for p in setup.model.parameters() if p.requires_grad)

    def choice(of: Split) -> Choice:
        buckets = gradient_bytes if of.ranks > way.ranks == 1 else 0  # of DistributedDataParallel
        memory = _interpolated(peaks, of.micro_batch) + buckets
        return Choice(of.ranks, of.micro_batch, of.accumulation_steps, of.effective_batch, memory, *prospects(of))

    return explain(
        Plan(
            choice=choice(way),
            by_ranks=tuple(choice(way if n == way.ranks else way_on(n)) for n in sorted({*_RANKS, way.ranks})),
            attach=known["buffer"] is not None and (way.accumulation_steps > 1 or known["master_weights"] is not None),
            master_problem=masters_problem(setup) if known["master_weights"] is None else None,
            bfloat16_numel=sum(param.numel() for param in with_masters(setup)),
            step_bytes=step_bytes(setup),
            warnings=_warnings(setup, way.micro_batch),
            tokens_per_sample=setup.tokens_per_sample,
            gradient_bytes=gradient_bytes,
            adam="betas" in setup.optimizer.param_groups[0],
            **known,
        )
    )


def _predictions(
    function: SetupFunction, sizes: Sequence[int], preserved: Preserved, progress: Progress
) -> tuple[tuple[Prediction, ...], str | None]:
    """Return predictions for the sizes, and why there are none."""
    try:
        with fake_setup(function) as setup:
            how = preserved.buffer, 2, preserved.master_weights
            predictions = tuple(predict(setup, size, *how) for size in sizes)
    except PredictionError as error:
        progress("what would fit elsewhere", str(error))
        return (), str(error)
    progress("what would fit elsewhere", f"{format_bytes(predictions[-1].memory.total)} predicted for {sizes[-1]}")
    return predictions, None


def _interpolated(peaks: dict[int, int], micro_batch: int) -> int:
    """Return the peak of a size: memory grows in a straight line between those that are known."""
    if micro_batch in peaks:
        return peaks[micro_batch]
    low = max(size for size in peaks if size < micro_batch)
    high = min(size for size in peaks if size > micro_batch)
    part = (micro_batch - low) / (high - low)
    return round(peaks[low] + part * (peaks[high] - peaks[low]))


def _warnings(setup: Setup, micro_batch: int) -> tuple[str, ...]:
    names = [name for name, module in setup.model.named_modules() if isinstance(module, BatchNorm) and module.training]
    if not names:
        return ()
    return (
        f"the model has BatchNorm ({names[0] or 'the model itself'}{' and others' if len(names) > 1 else ''}): its "
        f"statistics are those of a micro-batch of {micro_batch}, not of the effective batch, however many are "
        "accumulated; keep the micro-batch that it was tuned for, or use GroupNorm or LayerNorm, or SyncBatchNorm over "
        "ranks",
    )


def _machine(device: torch.device | None) -> dict[str, str]:
    name = "none: predicted on fake tensors"
    if device is not None:
        name = (
            torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        )
    return {
        "device": name,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "accumkern": __version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _whole(name: str, number: int, least: int) -> int:
    return integer(name, number, f"it must be an int of at least {least}", least)
