"""``accumkern.sweep``: train a setup at several effective batch sizes with equally many samples, and compare.

Every finished run is one JSON file, written at once or not at all, so a sweep that was killed goes on where it was.
"""

from __future__ import annotations

import dataclasses
import gc
import inspect
import math
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from accumkern.checks import integer, real
from accumkern.out_of_memory import parse_bytes
from accumkern.planning.checkpoint import Checkpoint
from accumkern.planning.fit import find_fit
from accumkern.planning.memory import available_bytes, check_margin
from accumkern.planning.precision import choose_buffer, choose_masters, masters_problem
from accumkern.planning.protocol import Setup, SetupFunction
from accumkern.planning.script import Script, ScriptSetup
from accumkern.planning.sweep_jobs import Work, portable, run_at_once, shares
from accumkern.planning.sweep_result import Sweep
from accumkern.planning.sweep_runs import Planned, Run, plain, read_run, write_json
from accumkern.planning.sweep_settings import (
    RUNS,
    SETTINGS,
    VALIDATION_SEED,
    checked_settings,
    claim,
    planned_runs,
    source_hash,
)
from accumkern.planning.sweep_training import Runner, check_decay_rules, check_setup, seeded_setup, weight_decay_of
from accumkern.planning.trial import Preserved
from accumkern.random_state import RandomState
from accumkern.ranks import Ranks

Progress = Callable[[Run], None]


def sweep(
    setup: SetupFunction | str,
    effective_batches: Sequence[int],
    samples: int,
    folder: str | Path,
    *,
    rules: Sequence[str] = ("sqrt",),
    weight_decay_rules: Sequence[str] = ("none",),
    seeds: Sequence[int] = (0,),
    base_batch: int | None = None,
    start: str | Path | None = None,
    jobs: int = 1,
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
    """Train at every effective batch, with every rule and seed, each time with the same samples, and compare.

    Each run calls ``setup()`` anew, after seeding all random numbers, and seeds them again before the first batch, so
    that a ``setup()`` that seeds them itself begins with the same weights whatever the seed, and draws other batches.
    For an effective batch that is r times ``base_batch``, the learning rate is multiplied by f: 1 (``"none"``),
    ``sqrt(r)`` or r (``"linear"``). Decoupled weight decay stays (``"none"``) or is multiplied by ``r / f``
    (``"timescale"``, arXiv 2505.13738); Adam's beta2 is raised to the power r, so that it forgets as many samples at
    every batch size (arXiv 2507.07101). The loss is measured on validation samples that are the same for all runs;
    their time, and that of making batches, does not count.

    A run that diverges or runs out of memory is a result. It diverges where its mean training loss since the
    evaluation before is not finite, or at three evaluations in a row more than twice that at the beginning.

    Args:
        setup: a function that returns model, optimizer, make_batch and loss; see
            :class:`accumkern.planning.protocol.Setup`. Or where it is found, such as ``"train.py:setup"``.
        effective_batches: samples between two optimizer steps.
        samples: to train with in each run; what is not a full window is left out.
        folder: for the results. One that holds the same sweep already is continued.
        rules: how the learning rate follows the effective batch.
        weight_decay_rules: how the weight decay follows them both.
        seeds: of the random numbers.
        base_batch: the effective batch that the learning rate, weight decay and beta2 of the setup, or of the
            checkpoint, are for; None takes the smallest of ``effective_batches``.
        start: path of a checkpoint with the state dicts of model and optimizer, where every run begins; see
            :class:`accumkern.planning.checkpoint.Checkpoint`. None begins with what ``setup()`` makes.
        jobs: runs to train at once, each in a process of its own: on GPUs each has one, on a CPU they share threads
            and memory. With more than 1, other processes must be able to import ``setup``.
        micro_batch: the largest to use; each run takes the largest divisor of its effective batch up to it. None finds
            what fits.
        memory: of the device, in bytes or as text; None takes what is available now.
        margin: the part of it to leave free.
        buffer: of :func:`accumkern.attach`; None chooses by the parameters' dtype.
        master_weights: of :func:`accumkern.attach`; ``"auto"`` is ``"split32"`` where the optimizer has bfloat16
            parameters and can be stepped on FP32 ones, or else None.
        target_loss: what to reach. None takes the lowest that every run with a finished end has reached.
        evaluations: of the loss, in each run, beside the one before it begins; one a step at most.
        validation_samples: to measure the loss on.
        progress: is called with each run that has ended.

    Raises:
        TypeError, ValueError: an argument is wrong, ``folder`` holds another sweep or a damaged file, or the setup
            returns the same model again or draws the same samples whatever the seed.
        FileNotFoundError: there is no such checkpoint or script.
        RuntimeError: the setup or one of its functions failed.
    """
    settings = checked_settings(
        effective_batches,
        samples,
        rules,
        weight_decay_rules,
        seeds,
        base_batch,
        micro_batch,
        evaluations,
        validation_samples,
    )
    jobs = integer("jobs", jobs, "it must be a whole number of at least 1", 1)
    margin = check_margin(margin)
    if target_loss is not None:
        target_loss = real("target_loss", target_loss, "it must be a number, or None")
        if not math.isfinite(target_loss):
            raise ValueError(f"target_loss is {target_loss}; it must be finite, or None")
    checkpoint = None if start is None else Checkpoint(start)
    function = ScriptSetup(Script(setup), in_place=False) if isinstance(setup, str) else setup
    random_state = RandomState(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        same_weights = check_setup(function, len(settings["seeds"]))
        ranks = Ranks().count
        if ranks > 1:
            raise RuntimeError(
                f"a sweep trains in one process, and there are {ranks} ranks; start it without torchrun: an "
                "effective batch trains alike however many ranks share it"
            )
        made = seeded_setup(function, VALIDATION_SEED)
        masters = choose_masters(made, master_weights)
        if checkpoint is not None:
            checkpoint.load(made, masters)
        check_decay_rules(made, settings)
        limit = int((available_bytes(made.device) if memory is None else parse_bytes(memory)) * (1 - margin))
        if jobs > 1:
            words, (threads, devices) = portable(function, jobs), shares(jobs, made.device)
            limit = limit if devices else limit // jobs
        settings |= {"buffer": choose_buffer(made, buffer), "master_weights": masters}
        settings |= {"script_sha256": source_hash(inspect.unwrap(function))}
        settings |= {"script_arguments": function.arguments if isinstance(function, ScriptSetup) else []}
        settings |= {"start_sha256": None if checkpoint is None else checkpoint.sha256}
        settings |= plain({"learning_rate": _learning_rate(made), "weight_decay": weight_decay_of(made)})
        folder = Path(folder).expanduser()
        settings["micro_batch"] = _claimed_micro_batch(folder, settings, made, limit)
        result = Sweep(
            runs=(),
            asked_target_loss=target_loss,
            tokens_per_sample=made.tokens_per_sample,
            base_batch=settings["base_batch"],
            master_weights=masters,
            master_problem=masters_problem(made) if masters is None else None,
            learning_rate=_learning_rate(made),
            start_sha256=settings["start_sha256"],
            same_weights=same_weights,
        )
        del made  # which takes memory of the device
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        planned = planned_runs(settings)
        paths = {one: folder / RUNS / one.file_name for one in planned}
        runs = {one: read_run(path, one) for one, path in paths.items() if path.is_file()}
        for run in runs.values():
            progress(run)
        left = [one for one in planned if one not in runs]
        if jobs == 1:
            made_runs = _one_by_one(left, paths, Runner(function, settings, checkpoint, limit))
        else:
            path = None if checkpoint is None else checkpoint.path.resolve()
            work = Work(words, settings, path, limit, folder / RUNS, min(jobs, len(left)), threads, devices)
            made_runs = run_at_once(left, work)
        with closing(made_runs):
            for run in made_runs:
                runs[run.planned] = run
                progress(run)
        return dataclasses.replace(result, runs=tuple(runs[one] for one in planned))
    finally:
        random_state.put_back()


def _learning_rate(setup: Setup) -> float:
    return float(setup.optimizer.param_groups[0]["lr"])


def _claimed_micro_batch(folder: Path, settings: dict[str, Any], made: Setup, limit_bytes: int) -> int:
    """Claim the folder; return the largest micro-batch to use: the one asked for, or what fits, found once."""
    found = claim(folder, settings)
    if settings["micro_batch"] is None and "micro_batch_found" not in found:
        with Preserved(made, settings["buffer"], master_weights=settings["master_weights"]) as preserved:
            fit = find_fit(preserved, limit_bytes, settings["effective_batches"][-1])
        found |= {"micro_batch_found": fit.micro_batch}
        write_json(folder / SETTINGS, found)
    micro_batch: int = settings["micro_batch"] or found["micro_batch_found"]
    return micro_batch


def _one_by_one(planned: Sequence[Planned], paths: dict[Planned, Path], runner: Runner) -> Generator[Run, None, None]:
    for one in planned:
        run = runner.run(one)
        write_json(paths[one], run.to_dict())
        yield run
