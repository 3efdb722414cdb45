"""``accumkern.sweep``: train a setup at several effective batch sizes with equally many samples, and compare.

Every finished run is one JSON file, written at once or not at all, so a sweep that was killed goes on where it was.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accumkern.checks import integer, items, one_of, real
from accumkern.planning.memory import available_bytes, check_margin, is_out_of_memory, parse_bytes
from accumkern.planning.precision import accumulation, choose_buffer, choose_masters, masters_problem
from accumkern.planning.protocol import Setup, SetupFunction, compute_loss, make_batch, run_setup
from accumkern.planning.ranks import Ranks
from accumkern.planning.script import ScriptSetup
from accumkern.planning.sweep_result import Point, Run, Sweep, write_json
from accumkern.planning.trial import Preserved, RandomState, find_fit, train_window, verify
from accumkern.torch_private import tree_leaves

#: Factor of the learning rate for an effective batch that is ``ratio`` times the one it was chosen for.
LEARNING_RATE_RULES: dict[str, Callable[[float], float]] = {
    "none": lambda ratio: 1.0,
    "sqrt": math.sqrt,
    "linear": lambda ratio: ratio,
}

SETTINGS = "sweep.json"
RUNS = "runs"

VALIDATION_SEED = 2**31 - 1
_DIVERGED = 2.0  # times the first loss

Progress = Callable[[Run], None]


def sweep(
    setup: SetupFunction,
    effective_batches: Sequence[int],
    samples: int,
    folder: str | Path,
    *,
    rules: Sequence[str] = ("sqrt",),
    seeds: Sequence[int] = (0,),
    base_batch: int | None = None,
    micro_batch: int | None = None,
    memory: int | str | None = None,
    margin: float = 0.1,
    buffer: str | None = None,
    master_weights: str | None = "auto",
    target_loss: float | None = None,
    evaluations: int = 20,
    validation_samples: int = 256,
    progress: Progress = lambda run: None,
) -> Sweep:
    """Train at every effective batch, with every learning-rate rule and seed, each time with the same samples.

    Each run calls ``setup()`` anew, after seeding all random numbers. Its learning rate is multiplied by 1
    (``"none"``), by ``sqrt(B / base_batch)`` or by ``B / base_batch`` (``"linear"``); Adam's beta2 is raised to the
    power ``B / base_batch``, so that it forgets as many samples at every batch size (arXiv 2507.07101). The loss is
    measured on validation samples that are the same for all runs; their time, and that of making batches, does not
    count.

    A run that diverges (its loss is not finite, or more than twice the first) or runs out of memory is a result.

    Args:
        setup: a function that returns model, optimizer, make_batch and loss; see
            :class:`accumkern.planning.protocol.Setup`.
        effective_batches: samples between two optimizer steps.
        samples: to train with in each run; what is not a full window is left out.
        folder: for the results. One that holds the same sweep already is continued.
        rules: how the learning rate follows the effective batch.
        seeds: of the random numbers.
        base_batch: the effective batch that the setup's learning rate and beta2 are for; None takes the smallest.
        micro_batch: the largest to use; each run takes the largest divisor of its effective batch up to it. None finds
            what fits.
        memory: of the device, in bytes or as text; None takes what is available now.
        margin: the part of it to leave free.
        buffer: of :func:`accumkern.attach`; None chooses by the parameters' dtype.
        master_weights: of :func:`accumkern.attach`; ``"auto"`` is ``"split32"`` where the optimizer has bfloat16
            parameters and can be stepped on FP32 ones, or else None.
        target_loss: what to reach. None takes the lowest that every run with a finished end has reached.
        evaluations: of the loss, in each run, beside the one before it begins.
        validation_samples: to measure the loss on.
        progress: is called with each run that has ended.

    Raises:
        TypeError, ValueError: an argument is wrong, ``folder`` holds another sweep, or the setup returns the same model
            again or draws the same samples whatever the seed.
        RuntimeError: the setup or one of its functions failed.
    """
    settings = _checked_settings(
        effective_batches, samples, rules, seeds, base_batch, micro_batch, evaluations, validation_samples
    )
    margin = check_margin(margin)
    if target_loss is not None:
        target_loss = real("target_loss", target_loss, "it must be a number, or None")
    random_state = RandomState(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        _check_setup_is_new(setup)
        ranks = Ranks().count
        if ranks > 1:
            raise RuntimeError(
                f"a sweep trains in one process, and there are {ranks} ranks; start it without torchrun: an "
                "effective batch trains alike however many ranks share it"
            )
        made = _seeded_setup(setup, VALIDATION_SEED)
        limit = int((available_bytes(made.device) if memory is None else parse_bytes(memory)) * (1 - margin))
        masters = choose_masters(made, master_weights)
        settings |= {"buffer": choose_buffer(made, buffer), "master_weights": masters}
        settings["script_sha256"] = _source_hash(inspect.unwrap(setup))
        settings["script_arguments"] = setup.arguments if isinstance(setup, ScriptSetup) else []
        folder = Path(folder).expanduser()
        found = _claim(folder, settings)
        if micro_batch is None:
            if "micro_batch_found" not in found:
                with Preserved(made, settings["buffer"], master_weights=masters) as preserved:
                    fit = find_fit(preserved, limit, settings["effective_batches"][-1])
                found = settings | {"micro_batch_found": fit.micro_batch}
                write_json(folder / SETTINGS, found)
            settings["micro_batch"] = found["micro_batch_found"]
        validation = _validation(_seeded_setup(setup, VALIDATION_SEED), settings)
        runs = []
        for batch, rule, seed in _plan_of_runs(settings):
            path = folder / RUNS / f"batch-{batch}_{rule}_seed-{seed}.json"
            if path.is_file():
                run = Run.from_dict(json.loads(path.read_text()))
            else:
                run = _run(setup, batch, rule, seed, settings, validation, limit)
                write_json(path, run.to_dict())
            runs.append(run)
            progress(run)
        problem = masters_problem(made) if masters is None else None
        return Sweep(tuple(runs), target_loss, made.tokens_per_sample, settings["base_batch"], masters, problem)
    finally:
        random_state.put_back()


def _plan_of_runs(settings: dict[str, Any]) -> list[tuple[int, str, int]]:
    """Return (effective batch, rule, seed) of every run; at the base batch all rules are one."""
    return [
        (batch, rule, seed)
        for seed in settings["seeds"]
        for batch in settings["effective_batches"]
        for rule in (settings["rules"][:1] if batch == settings["base_batch"] else settings["rules"])
    ]


def _run(
    function: SetupFunction,
    batch: int,
    rule: str,
    seed: int,
    settings: dict[str, Any],
    validation: list[Any],
    limit_bytes: int,
) -> Run:
    """Train once: a trial for the memory, then the training itself with everything made anew."""
    micro_batch = max(size for size in range(1, min(settings["micro_batch"], batch) + 1) if batch % size == 0)
    accumulation_steps = batch // micro_batch
    setup = _scaled_setup(function, batch / settings["base_batch"], rule, seed)
    learning_rate = float(setup.optimizer.param_groups[0]["lr"])
    with Preserved(setup, settings["buffer"], master_weights=settings["master_weights"]) as preserved:
        trial = verify(preserved, micro_batch, accumulation_steps, limit_bytes)
    points: list[Point] = []
    status = "out of memory"
    if trial.fits:
        setup = _scaled_setup(function, batch / settings["base_batch"], rule, seed)
        try:
            for point in train(setup, micro_batch, accumulation_steps, settings, validation):
                points.append(point)
            status = "diverged" if _diverges(points[0], points[-1]) else "finished"
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
    return Run(
        effective_batch=batch,
        micro_batch=micro_batch,
        accumulation_steps=accumulation_steps,
        rule=rule,
        seed=seed,
        learning_rate=learning_rate,
        status=status,
        steps=points[-1].samples // batch if points else 0,
        seconds=points[-1].seconds if points else 0.0,
        peak_bytes=trial.peak_bytes,
        points=tuple(points),
    )


def train(
    setup: Setup, micro_batch: int, accumulation_steps: int, settings: dict[str, Any], validation: list[Any]
) -> Iterator[Point]:
    """Train; yield the validation loss at the beginning and at equal distances, until it diverges."""
    batch = micro_batch * accumulation_steps
    steps = settings["samples"] // batch
    marks = {round(steps * i / settings["evaluations"]) for i in range(1, 1 + settings["evaluations"])}
    seconds = 0.0
    first = Point(0, seconds, _validation_loss(setup, validation))
    yield first
    with accumulation(setup, settings["buffer"], accumulation_steps, settings["master_weights"]) as accumulator:
        for step in range(1, steps + 1):
            batches = (make_batch(setup, micro_batch) for _ in range(accumulation_steps))
            of_micro_batches, of_step = train_window(setup, batches, accumulation_steps, accumulator)
            seconds += sum(of_micro_batches) + of_step
            if step in marks:
                point = Point(step * batch, seconds, _validation_loss(setup, validation))
                yield point
                if _diverges(first, point):
                    return


def _diverges(first: Point, last: Point) -> bool:
    return not math.isfinite(last.loss) or (first.loss > 0 and last.loss > _DIVERGED * first.loss)


def _scaled_setup(function: SetupFunction, ratio: float, rule: str, seed: int) -> Setup:
    """Return a new setup with learning rate and beta2 for an effective batch ``ratio`` times the base batch."""
    setup = _seeded_setup(function, seed)
    for group in setup.optimizer.param_groups:
        group["lr"] = group["lr"] * LEARNING_RATE_RULES[rule](ratio)
        if "betas" in group:
            group["betas"] = (group["betas"][0], group["betas"][1] ** ratio)
    return setup


def _validation(setup: Setup, settings: dict[str, Any]) -> list[Any]:
    """Return the batches that every run measures its loss on."""
    size, total = settings["micro_batch"], settings["validation_samples"]
    return [make_batch(setup, min(size, total - first), "validation_batch") for first in range(0, total, size)]


def _validation_loss(setup: Setup, validation: list[Any]) -> float:
    """Return the mean loss over the validation samples, in evaluation mode."""
    training = [module for module in setup.model.modules() if module.training]
    setup.model.eval()
    with torch.no_grad():
        losses = [(compute_loss(setup, batch).item(), _samples_of(batch)) for batch in validation]
    for module in training:
        module.training = True
    return sum(loss * count for loss, count in losses) / sum(count for _, count in losses)


def _samples_of(batch: Any) -> int:
    return next(int(leaf.shape[0]) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim() > 0)


def _seeded_setup(function: SetupFunction, seed: int) -> Setup:
    torch.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)
    return run_setup(function)


def _check_setup_is_new(function: SetupFunction) -> None:
    """Check that every call makes another model, and that another seed draws other samples where it matters."""
    setups, batches = [], []
    for seed in (VALIDATION_SEED, VALIDATION_SEED - 1):
        setups.append(_seeded_setup(function, seed))
        batches.append(tree_leaves(make_batch(setups[-1], 2)))
    if set(setups[0].model.parameters()) & set(setups[1].model.parameters()):
        raise ValueError(
            "setup() returned the same model twice, so each run would go on with what the one before had learnt; make "
            "model and optimizer inside of setup()"
        )
    if setups[0].validation_batch is None and all(
        torch.equal(a, b) for a, b in zip(*batches, strict=True) if isinstance(a, Tensor)
    ):
        raise ValueError(
            "make_batch of setup() draws the same samples whatever the seed is, so the validation loss would be that "
            "of training samples; seed its generator with torch.initial_seed(), or return a Setup with validation_batch"
        )


def _claim(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Write the settings into a new folder, or return what is in one that holds the same sweep."""
    path = folder / SETTINGS
    (folder / RUNS).mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        write_json(path, settings)
        return settings
    found: dict[str, Any] = json.loads(path.read_text())
    for name, value in settings.items():
        if found.get(name) != value:
            raise ValueError(
                f"folder {str(folder)!r} holds another sweep: its {name} is {found.get(name)!r}, now it is {value!r}; "
                "choose another folder, or the settings that it was begun with"
            )
    return found


def _source_hash(function: SetupFunction) -> str | None:
    """Return a hash of the file that a setup comes from; None where there is none."""
    try:
        path = inspect.getsourcefile(function)
    except TypeError:
        return None
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path and Path(path).is_file() else None


def _checked_settings(
    effective_batches: Sequence[int],
    samples: int,
    rules: Sequence[str],
    seeds: Sequence[int],
    base_batch: int | None,
    micro_batch: int | None,
    evaluations: int,
    validation_samples: int,
) -> dict[str, Any]:
    """Return what makes a sweep another one, checked and in numbers of Python's own."""
    lists = {"effective_batches": effective_batches, "rules": rules, "seeds": seeds}
    lists = {name: items(name, values, "it must be a list") for name, values in lists.items()}
    for name, values in lists.items():
        if not values:
            raise ValueError(f"{name} is empty; name at least one")
    for rule in lists["rules"]:
        one_of("rules", rule, LEARNING_RATE_RULES)

    def whole(name: str, number: Any) -> int:
        return integer(name, number, "it must be a whole number of at least 1", 1)

    sizes = sorted({whole("effective_batches", size) for size in lists["effective_batches"]})
    settings: dict[str, Any] = {
        "samples": whole("samples", samples),
        "evaluations": whole("evaluations", evaluations),
        "validation_samples": whole("validation_samples", validation_samples),
        "base_batch": sizes[0] if base_batch is None else whole("base_batch", base_batch),
        "micro_batch": None if micro_batch is None else whole("micro_batch", micro_batch),
        "effective_batches": sizes,
        "rules": list(dict.fromkeys(lists["rules"])),
        "seeds": list(dict.fromkeys(integer("seeds", seed, "it must be a whole number") for seed in lists["seeds"])),
    }
    if settings["samples"] < sizes[-1]:
        raise ValueError(f"samples is {samples}, less than one window of {sizes[-1]}; raise it")
    return settings
