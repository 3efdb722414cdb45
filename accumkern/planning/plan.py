"""``accumkern.plan``: measure what fits, what is fast and what helps training, and decide."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch.nn.parallel import DistributedDataParallel

from accumkern.out_of_memory import format_bytes, parse_bytes
from accumkern.planning.caveats import busy_warnings, cpu_warnings, load, rank_warnings
from accumkern.planning.fakes import PredictionError, fake_setup
from accumkern.planning.fit import find_fit, largest, verify
from accumkern.planning.link import Link, measure_link
from accumkern.planning.memory import available_bytes, check_margin, machine_of
from accumkern.planning.noise import accumulation_pays, best_way, costs, measure_noise, noise_problem, useful_batches
from accumkern.planning.options import check_bandwidth, check_ranks, check_sizes
from accumkern.planning.parts import parts_warnings
from accumkern.planning.plan_reasons import RANKS, plan_of, with_schedule
from accumkern.planning.plan_result import Plan
from accumkern.planning.precision import choose_buffer, choose_masters
from accumkern.planning.predict import DEVICES, Prediction, choose_device, no_fit, predict, smallest_size
from accumkern.planning.protocol import SetupFunction, run_setup
from accumkern.planning.scaling_laws import BatchLaws, law_batch, laws_of
from accumkern.planning.speed import Split, knee, measure_speeds, plain, sizes_to_time, split, split_by_size
from accumkern.planning.token_budget import check_budget
from accumkern.planning.trial import Preserved, Trial
from accumkern.ranks import Ranks

_NOISE_MICRO_BATCH = 4


Progress = Callable[[str, str], None]  # of (what is being done, what came of it)


def plan(
    setup: SetupFunction,
    *,
    effective_batch: int | None = None,
    ranks: int | None = None,
    bandwidth_gb_per_s: float | None = None,
    tokens: int | float | str | None = None,
    schedule: bool = False,
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
        effective_batch: samples between two optimizer steps, over all ranks. None chooses by the laws of
            :mod:`accumkern.planning.scaling_laws` where they cover the run, and else from speed and noise.
        ranks: that the run will have; None for those that there are. One process plans for any number.
        bandwidth_gb_per_s: of the link between them, 10^9 bytes that each rank sends per second while it receives as
            many, to tell what their exchange takes. None measures it where there are several ranks.
        tokens: that the run is to train with, or text such as ``"10B"``; needs ``tokens_per_sample`` of the setup.
        schedule: say when to raise the batch in such a run, too.
        memory: of the device, in bytes or as text such as ``"24GB"``. None takes what is available now.
        margin: the part of it to leave free, 0 to 1 (excluded).
        buffer: of :func:`accumkern.attach`; None chooses by the parameters' dtype.
        master_weights: of :func:`accumkern.attach`; ``"auto"`` is ``"split32"`` where the optimizer has bfloat16
            parameters and can be stepped on FP32 ones, or else None.
        largest_micro_batch: not to be exceeded, if memory allows more; 2^20 at most.
        noise_windows: windows to train for the noise scale, 4 to 10,000, or 0 to leave it out.
        measure: False predicts what fits on fake tensors, and uses neither the device nor its memory.
        device: that a prediction (``measure=False``) is for, ``"cuda"`` or ``"cpu"``. None predicts for a GPU, also
            where ``setup()`` puts the model on the CPU; see :func:`accumkern.planning.predict.predict`.
        progress: is called with what is being done and with what came of it.

    Raises:
        TypeError, ValueError: an argument or what ``setup()`` returned is wrong, or the limit is less than the
            parameters take.
        RuntimeError: ``setup()`` or one of its functions failed, memory leaks, no micro-batch fits, or another rank
            failed (:class:`accumkern.ranks.RanksError` says which one, in which phase, with what error).
        PredictionError: with ``measure=False``, the script does not run on fake tensors.
    """
    with Ranks() as group:
        with group.phase("arguments"):
            effective_batch, largest_micro_batch, noise_windows = check_sizes(
                effective_batch, largest_micro_batch, noise_windows
            )
            count = check_ranks(ranks, group.count)
            link = None if bandwidth_gb_per_s is None else Link(check_bandwidth(bandwidth_gb_per_s, count))
            tokens = check_budget(tokens, schedule)
            margin = check_margin(margin)
            limit = None if memory is None else parse_bytes(memory)
            if limit is None and not measure:
                raise ValueError("memory is None; a prediction (measure=False) needs it, such as memory='24GB'")
            if device is not None and measure:
                raise ValueError(f"device is {device!r}; what is measured (measure=True) is the device of the model")
            group.check_same(
                effective_batch=effective_batch,
                ranks=count,
                bandwidth_gb_per_s=bandwidth_gb_per_s,
                tokens=tokens,
                schedule=schedule,
                margin=margin,
                buffer=buffer,
                master_weights=master_weights,
                largest_micro_batch=largest_micro_batch,
                noise_windows=noise_windows,
                measure=measure,
                device=device,
            )
        if limit is not None and not measure:
            limit = min(group.gathered(limit))
            with group.phase("what would fit"):
                wanted = effective_batch, count, link, tokens, limit, margin, buffer, master_weights
                plan = _predicted_plan(setup, *wanted, largest_micro_batch, device, progress)
            return group.gathered(with_schedule(plan) if schedule else plan)[0]
        with group.phase("setup()"):
            made = run_setup(setup)
            if isinstance(made.model, DistributedDataParallel):
                made = made._replace(model=made.model.module)  # whose backward pass waits for no other rank
            laws = None if tokens is None else laws_of(made, tokens)
            buffer = choose_buffer(made, buffer)
            master_weights = choose_masters(made, master_weights)
            limit = min(group.gathered(limit or available_bytes(made.device)))
        at_most = largest_micro_batch
        if effective_batch is not None:
            at_most = min(at_most, max(1, math.ceil(effective_batch / count)))
        with Preserved(made, buffer, group, master_weights) as preserved:
            asked = effective_batch, count, link, laws, limit, margin, at_most, noise_windows
            caveats = [*rank_warnings(), *([] if memory is None else cpu_warnings(made, limit))]
            plan = _measured_plan(setup, preserved, *asked, caveats, progress)
        # Predictions, losses and the machine may differ.
        return group.gathered(with_schedule(plan) if schedule else plan)[0]


def _measured_plan(
    function: SetupFunction,
    preserved: Preserved,
    target: int | None,
    count: int,
    link: Link | None,
    laws: BatchLaws | None,
    limit: int,
    margin: float,
    at_most: int,
    noise_windows: int,
    caveats: list[str],
    progress: Progress,
) -> Plan:
    setup, ranks = preserved.setup, preserved.ranks
    allowed, load_before = int(limit * (1 - margin)), load()

    def tell(trial: Trial) -> None:
        outcome = f"{format_bytes(trial.peak_bytes)}, {'fits' if trial.fits else 'does not fit'}"
        if trial.problem is not None:
            outcome = trial.problem.partition(";")[0]  # what follows is advice
        progress("what fits", f"micro-batch {trial.micro_batch}: {outcome}")

    with ranks.phase("what fits"):
        fit = find_fit(preserved, allowed, at_most, tell)
    with ranks.phase("what is fast"):
        batch = target or law_batch(laws, count)
        shares = [] if batch is None else [max(1, round(batch / n)) for n in (count, *RANKS)]
        speeds = measure_speeds(
            preserved,
            sizes_to_time(fit.micro_batch, shares, fit.smallest),
            lambda speed: progress(
                "what is fast", f"micro-batch {speed.micro_batch}: {plain(speed.limit_per_second)} samples per second"
            ),
            needed=shares,
        )
    if link is None and ranks.count > 1:
        with ranks.phase("the link between ranks"):
            link = measure_link(setup, ranks)
            progress("the link between ranks", f"{plain(link.gb_per_s)} GB/s")
    noise, refusal = None, noise_problem(setup)
    if noise_windows and refusal is not None:
        caveats.append(refusal)
    elif noise_windows:
        with ranks.phase("what helps training"):
            progress("what helps training", f"gradient noise over {noise_windows} windows")
            size = min(fit.micro_batch, max(fit.smallest, _NOISE_MICRO_BATCH))
            noise = measure_noise(preserved, size, noise_windows)
            progress("what helps training", f"gradient noise scale {plain(noise.noise_scale)} samples")
    peaks = {trial.micro_batch: trial.peak_bytes for trial in fit.trials if trial.fits}
    powers = [size for size in sorted(peaks) if size & (size - 1) == 0 or size == max(peaks)]
    with ranks.phase("what would fit elsewhere"):
        predictions, problem = _predictions(function, powers, preserved, progress)

    by_size = {speed.micro_batch: speed for speed in speeds}
    sizes = list(by_size)

    def rate(micro_batch: int, accumulation_steps: float) -> float:
        return by_size[micro_batch].samples_per_second(accumulation_steps)

    def way_on(n: int, batch: int | None) -> Split:
        batch = batch or law_batch(laws, n)
        return best_way(n, sizes, rate, noise) if batch is None else split(batch, n, sizes, rate)

    with ranks.phase("the plan"):
        way = ranks.gathered(way_on(count, target))[0]
        progress("the plan", f"micro-batch {way.micro_batch}, accumulation steps {way.accumulation_steps}")
        caveats += parts_warnings(preserved, way, fit.micro_batch)
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
        if noise is None or noise.basis is None:
            return speed, None, None
        return speed, *useful_batches(way.ranks, sizes, rate, (noise.low, noise.noise_scale, noise.high))

    return plan_of(
        setup,
        way,
        lambda n: way_on(n, None if target is None else way.effective_batch),
        peaks,
        prospects,
        link,
        measured_ranks=ranks.count,
        target=target,
        laws=laws,
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
        speeds=speeds,
        knee=knee(sizes, rate),
        noise=noise,
        batches=costs(way, sizes, rate, noise),
        machine=machine_of(setup.device),
        warnings=[*caveats, *busy_warnings(setup, speeds, load_before)],
    )


def _predicted_plan(
    function: SetupFunction,
    target: int | None,
    count: int,
    link: Link | None,
    tokens: int | None,
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
    at_most = at_most if target is None else min(at_most, max(1, math.ceil(target / count)))
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
        most = largest(fits, at_most, smallest)
        peaks = dict.fromkeys(range(1, smallest), memory.total) | {size: of.memory.total for size, of in found.items()}
        laws = None if tokens is None else laws_of(setup, tokens)

        def way_on(ranks: int) -> Split:
            batch = target or law_batch(laws, ranks)
            way = Split(ranks, most, 1) if batch is None else split_by_size(batch, ranks, most)
            return way if way.micro_batch >= smallest else Split(ranks, smallest, 1)

        way = way_on(count)
        peak = predicted(way.micro_batch, min(2, way.accumulation_steps)).memory.total
        return plan_of(
            setup,
            way,
            way_on,
            peaks | {way.micro_batch: peak},
            lambda way: (None, None, None),
            link,
            target=target,
            laws=laws,
            buffer=buffer,
            master_weights=master_weights,
            memory_limit_bytes=limit,
            margin=margin,
            largest_micro_batch=most,
            is_limited_by_memory=most < at_most,
            predictions=tuple(found[size] for size in sorted(found)),
            machine=machine_of(None) | {"device": DEVICES[device]},
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
