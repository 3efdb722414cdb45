"""One run of a sweep: seeds, scaled settings, a trial for the memory, and the training with its evaluations."""

from __future__ import annotations

import gc
import math
import random
import sys
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from accumkern.attachment import stepped_by
from accumkern.out_of_memory import is_out_of_memory
from accumkern.planning.checkpoint import Checkpoint
from accumkern.planning.fit import verify
from accumkern.planning.precision import accumulation
from accumkern.planning.protocol import Setup, SetupFunction, compute_loss, make_batch, run_setup
from accumkern.planning.sweep_runs import Planned, Point, Run
from accumkern.planning.sweep_settings import LEARNING_RATE_RULES, VALIDATION_SEED, WEIGHT_DECAY_RULES
from accumkern.planning.trial import Preserved, train_window
from accumkern.torch_private import tree_leaves

_DIVERGED = 2.0  # times the training loss at the beginning
_BEGINNING = 32  # samples at least: the loss of fewer is chance
_PATIENCE = 3  # evaluations in a row
_BATCHES = 2**31  # apart from a run's seed: what draws its batches, so that they are not the numbers of its weights

# Optimizers whose decay is decoupled from the gradient say so in a setting of their groups, or by name.
_DECOUPLED_FLAGS = ("decoupled_weight_decay", "decouple_wd", "decouple")
_DECOUPLED_NAMES = ("AdamW", "Adafactor", "Lion", "Muon", "SGDW")


class Runner:
    """Trains the runs of a sweep, one after another, in this process.

    Args:
        function: the setup.
        settings: of the sweep.
        start: where every run begins; None begins with what the setup makes.
        limit_bytes: of the device's memory.
        jobs: runs that train at once on this machine, this one included.
    """

    def __init__(
        self,
        function: SetupFunction,
        settings: dict[str, Any],
        start: Checkpoint | None,
        limit_bytes: int,
        jobs: int = 1,
    ) -> None:
        self._function, self._settings, self._start = function, settings, start
        self._limit_bytes, self._jobs = limit_bytes, jobs

    def run(self, planned: Planned) -> Run:
        """Train once: a trial for the memory, then the training itself with everything made anew."""
        settings, batch = self._settings, planned.effective_batch
        micro_batch = largest_divisor(batch, settings["micro_batch"])
        accumulation_steps = batch // micro_batch
        validation = self._validation  # before the run's own random numbers are seeded
        setup = self._scaled_setup(planned)
        learning_rate, weight_decay = float(setup.optimizer.param_groups[0]["lr"]), weight_decay_of(setup)
        with Preserved(setup, settings["buffer"], master_weights=settings["master_weights"]) as preserved:
            trial = verify(preserved, micro_batch, accumulation_steps, self._limit_bytes)
        points: list[Point] = []
        status = "out of memory"
        if trial.fits:
            del preserved, setup  # before there is another model
            gc.collect()
            setup = self._scaled_setup(planned)
            try:
                status = train(setup, micro_batch, accumulation_steps, settings, validation, points)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
        return Run(
            effective_batch=batch,
            micro_batch=micro_batch,
            accumulation_steps=accumulation_steps,
            rule=planned.rule,
            seed=planned.seed,
            learning_rate=learning_rate,
            status=status,
            steps=points[-1].samples // batch if points else 0,
            seconds=points[-1].seconds if points else 0.0,
            peak_bytes=trial.peak_bytes,
            points=tuple(points),
            weight_decay_rule=planned.weight_decay_rule,
            weight_decay=weight_decay,
            jobs=self._jobs,
        )

    @cached_property
    def _validation(self) -> list[Any]:
        """The batches that every run measures its loss on."""
        setup = seeded_setup(self._function, VALIDATION_SEED)
        size, total = self._settings["micro_batch"], self._settings["validation_samples"]
        return [make_batch(setup, min(size, total - first), "validation_batch") for first in range(0, total, size)]

    def _scaled_setup(self, planned: Planned) -> Setup:
        """Return a new setup with learning rate, weight decay and beta2 for the run's effective batch."""
        setup = seeded_setup(self._function, planned.seed)
        if self._start is not None:
            self._start.load(setup, self._settings["master_weights"])
        ratio = planned.effective_batch / self._settings["base_batch"]
        factor = LEARNING_RATE_RULES[planned.rule](ratio)
        decay_factor = WEIGHT_DECAY_RULES[planned.weight_decay_rule](ratio, factor)
        for group in setup.optimizer.param_groups:
            group["lr"] = group["lr"] * factor
            if _is_decoupled(setup, group):
                group["weight_decay"] = group["weight_decay"] * decay_factor
            if "betas" in group:
                first, second, *more = group["betas"]
                group["betas"] = (first, second**ratio, *more)
        return setup


def train(
    setup: Setup,
    micro_batch: int,
    accumulation_steps: int,
    settings: dict[str, Any],
    validation: list[Any],
    points: list[Point],
) -> str:
    """Train; append the losses at the beginning and at equal distances to ``points``; return how it ended.

    That is ``"finished"``, or early ``"diverged"``: the mean training loss since the evaluation before is not finite,
    or at three evaluations in a row it is more than twice that of the first window (or the first windows, up to 32
    samples). What is measured in evaluation mode does not count for that: running statistics, such as BatchNorm's, lag
    behind at first.
    """
    batch = micro_batch * accumulation_steps
    steps = settings["samples"] // batch
    evaluations = min(settings["evaluations"], steps)
    marks = {round(steps * i / evaluations) for i in range(1, 1 + evaluations)}
    first_steps = -(-_BEGINNING // batch)
    points.append(Point(0, 0.0, _validation_loss(setup, validation)))
    seconds, beginning, too_high, since = 0.0, math.inf, 0, 0
    of_beginning, total = torch.zeros(2, dtype=torch.float64, device=setup.device).unbind()
    with accumulation(setup, settings["buffer"], accumulation_steps, settings["master_weights"]) as accumulator:
        for step in range(1, steps + 1):
            batches = (make_batch(setup, micro_batch) for _ in range(accumulation_steps))
            losses: list[Tensor] = []
            of_micro_batches, of_step = train_window(setup, batches, accumulation_steps, accumulator, losses=losses)
            seconds += sum(of_micro_batches) + of_step
            loss = torch.stack(losses).mean(dtype=torch.float64)
            total += loss
            if step <= first_steps:
                of_beginning += loss
            if step == first_steps:
                beginning = of_beginning.item() / first_steps
            if step in marks:
                training_loss = total.item() / (step - since)
                points.append(Point(step * batch, seconds, _validation_loss(setup, validation), training_loss))
                too_high = too_high + 1 if 0 < _DIVERGED * beginning < training_loss else 0
                if not math.isfinite(training_loss) or too_high == _PATIENCE:
                    return "diverged"
                total.zero_()
                since = step
    return "finished"


def largest_divisor(number: int, at_most: int) -> int:
    """Return the largest divisor up to a number."""
    small = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return max(size for size in (*small, *(number // size for size in small)) if size <= at_most)


def seeded_setup(function: SetupFunction, seed: int) -> Setup:
    """Seed all random numbers, make a setup, and seed them again for its batches: it may have seeded them itself."""
    _seed_all(seed)
    setup = run_setup(function)
    _seed_all(seed ^ _BATCHES)
    return setup


def _seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)


def _is_decoupled(setup: Setup, group: dict[str, Any]) -> bool:
    if not isinstance(group.get("weight_decay"), (int, float)):
        return False
    flags = [bool(group[flag]) for flag in _DECOUPLED_FLAGS if flag in group]
    names = [kind.__name__ for kind in type(stepped_by(setup.optimizer)).__mro__]
    return flags[0] if flags else any(known in name for name in names for known in _DECOUPLED_NAMES)


def weight_decay_of(setup: Setup) -> float | None:
    """Return that of the optimizer's first group that has one."""
    decays = [float(group["weight_decay"]) for group in setup.optimizer.param_groups if "weight_decay" in group]
    return next((decay for decay in decays if decay != 0), decays[0] if decays else None)


def check_decay_rules(setup: Setup, settings: dict[str, Any]) -> None:
    """Check that there is a weight decay that the rules can scale.

    Raises:
        ValueError: there is none, or it is added to the gradient.
    """
    rules = [rule for rule in settings["weight_decay_rules"] if rule != "none"]
    if not rules:
        return
    name, groups = type(stepped_by(setup.optimizer)).__name__, setup.optimizer.param_groups
    if not weight_decay_of(setup):
        raise ValueError(f"weight_decay_rules has {rules[0]!r}, and {name} has no weight decay to scale; choose 'none'")
    if not any(_is_decoupled(setup, group) and group["weight_decay"] for group in groups):
        raise ValueError(
            f"weight_decay_rules has {rules[0]!r}, and {name} adds its weight decay to the gradient (L2), where it has "
            "no timescale of its own; choose 'none', or an optimizer with decoupled decay such as AdamW (one of your "
            "own says so by 'decoupled_weight_decay': True in its groups)"
        )


def check_setup(function: SetupFunction, seeds: int) -> bool:
    """Check that every call makes another model, and that another seed draws other samples where it matters.

    Returns:
        Whether the weights are the same whatever the seed.

    Raises:
        ValueError: it is not so.
    """
    setups, batches = [], []
    for seed in (VALIDATION_SEED, VALIDATION_SEED - 1):
        setups.append(seeded_setup(function, seed))
        batches.append(tree_leaves(make_batch(setups[-1], 2)))
    one, other = (list(setup.model.parameters()) for setup in setups)
    if set(one) & set(other):
        raise ValueError(
            "setup() returned the same model twice, so each run would go on with what the one before had learnt; make "
            "model and optimizer inside of setup()"
        )
    same_weights = _are_same(one, other)
    if _are_same(*batches):
        cause = (
            "make_batch of setup() draws the same samples whatever the seed is, although all random numbers were "
            "seeded again after setup() had returned: it draws from a generator that setup() makes and seeds with a "
            "constant (or with torch.initial_seed() after a manual_seed() of its own), or in a fixed order"
        )
        cure = "seed that generator with torch.initial_seed(), and call no manual_seed() before it in setup()"
        if setups[0].validation_batch is None:
            raise ValueError(
                f"{cause}; so the validation loss would be that of training samples: {cure}, or return a Setup with "
                "validation_batch"
            )
        if seeds > 1 and same_weights:
            raise ValueError(f"{cause}; the weights are the same too, so each seed's run would be a copy: {cure}")
    return same_weights


def _are_same(one: list[Any], other: list[Any]) -> bool:
    """Return whether two lists hold equal tensors; what is no tensor does not count."""
    tensors, others = ([leaf for leaf in leaves if isinstance(leaf, Tensor)] for leaves in (one, other))
    return len(tensors) == len(others) and all(map(torch.equal, tensors, others))


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
