"""What makes a sweep another one: its settings, checked, the folder that belongs to them, and the runs they plan."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accumkern.checks import integer, items, one_of
from accumkern.planning.protocol import SetupFunction
from accumkern.planning.sweep_runs import Planned, write_json

#: Factor of the learning rate for an effective batch that is ``ratio`` times the one it was chosen for.
LEARNING_RATE_RULES: dict[str, Callable[[float], float]] = {
    "none": lambda ratio: 1.0,
    "sqrt": math.sqrt,
    "linear": lambda ratio: ratio,
}

#: Factor of the weight decay, where that of the learning rate is ``factor``. ``"timescale"`` keeps the samples over
#: which decay forgets, batch / (learning rate * weight decay), as they were (arXiv 2505.13738).
WEIGHT_DECAY_RULES: dict[str, Callable[[float, float], float]] = {
    "none": lambda ratio, factor: 1.0,
    "timescale": lambda ratio, factor: ratio / factor,
}

#: Draws the validation samples.
VALIDATION_SEED = 2**31 - 1

SETTINGS = "sweep.json"
RUNS = "runs"

_VERSION = 2  # of the way of training; a folder of another one is not continued
_MOST_SEED = 2**32 - 1  # numpy takes no more
_MOST_VALIDATION = 2**14  # samples, or as many as are trained with where that is more


def checked_settings(
    effective_batches: Sequence[int],
    samples: int,
    rules: Sequence[str],
    weight_decay_rules: Sequence[str],
    seeds: Sequence[int],
    base_batch: int | None,
    micro_batch: int | None,
    evaluations: int,
    validation_samples: int,
) -> dict[str, Any]:
    """Return the settings, checked and in numbers of Python's own, for JSON.

    Raises:
        TypeError, ValueError: an argument is wrong.
    """
    lists = {
        "effective_batches": effective_batches,
        "rules": rules,
        "weight_decay_rules": weight_decay_rules,
        "seeds": seeds,
    }
    lists = {name: items(name, values, "it must be a list") for name, values in lists.items()}
    for name, values in lists.items():
        if not values:
            raise ValueError(f"{name} is empty; name at least one")
    for rule in lists["rules"]:
        one_of("rules", rule, LEARNING_RATE_RULES)
    for rule in lists["weight_decay_rules"]:
        one_of("weight_decay_rules", rule, WEIGHT_DECAY_RULES)

    def whole(name: str, number: Any) -> int:
        return integer(name, number, "it must be a whole number of at least 1", 1)

    sizes = sorted({whole("effective_batches", size) for size in lists["effective_batches"]})
    settings: dict[str, Any] = {
        "version": _VERSION,
        "samples": whole("samples", samples),
        "evaluations": whole("evaluations", evaluations),
        "validation_samples": whole("validation_samples", validation_samples),
        "base_batch": sizes[0] if base_batch is None else whole("base_batch", base_batch),
        "micro_batch": None if micro_batch is None else whole("micro_batch", micro_batch),
        "effective_batches": sizes,
        "rules": list(dict.fromkeys(lists["rules"])),
        "weight_decay_rules": list(dict.fromkeys(lists["weight_decay_rules"])),
        "seeds": list(dict.fromkeys(_seed(seed) for seed in lists["seeds"])),
    }
    if settings["samples"] < sizes[-1]:
        raise ValueError(
            f"samples is {samples}, less than one window of {sizes[-1]}; raise it to {sizes[-1]} at least, better to "
            "many windows, or leave out the effective batches that are larger"
        )
    most = max(_MOST_VALIDATION, settings["samples"])
    if settings["validation_samples"] > most:
        raise ValueError(
            f"validation_samples is {validation_samples}, and every one is computed at each evaluation of each run; it "
            f"must be {most} at most: {_MOST_VALIDATION}, or as many as are trained with"
        )
    return settings


def _seed(seed: Any) -> int:
    right = f"it must be a whole number from 0 to {_MOST_SEED}"
    number = integer("seeds", seed, right)
    if number > _MOST_SEED:
        raise ValueError(f"seeds is {number}; {right}")
    if number == VALIDATION_SEED:
        raise ValueError(f"seeds is {number}, which draws the validation samples; choose another")
    return number


def planned_runs(settings: dict[str, Any]) -> list[Planned]:
    """Return all runs in their order; rules that say the same of a batch, as all do of the base batch, are one."""
    planned = []
    for seed in settings["seeds"]:
        for batch in settings["effective_batches"]:
            ratio, seen = batch / settings["base_batch"], set()
            for rule in settings["rules"]:
                for decay_rule in settings["weight_decay_rules"]:
                    factor = LEARNING_RATE_RULES[rule](ratio)
                    factors = factor, WEIGHT_DECAY_RULES[decay_rule](ratio, factor)
                    if factors not in seen:
                        seen.add(factors)
                        planned.append(Planned(batch, rule, decay_rule, seed))
    return planned


def claim(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Write the settings into a new folder, or return what is in one that holds the same sweep.

    Raises:
        ValueError: the folder holds another sweep, or its settings are damaged or gone.
    """
    path = folder / SETTINGS
    (folder / RUNS).mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        if any((folder / RUNS).glob("*.json")):
            raise ValueError(
                f"folder {str(folder)!r} holds runs, and no {SETTINGS} that says what they were trained with; choose "
                f"another folder, or delete {folder / RUNS} to train them again"
            )
        write_json(path, settings)
        return settings
    cure = "choose another folder, or delete this one to train all runs again"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        version = found.get("version")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not what a sweep writes ({error!r}); {cure}") from error
    if version != _VERSION:
        raise ValueError(f"{path} is of another version of accumkern, which trained differently; {cure}")
    for name, value in settings.items():
        if found.get(name) != value:
            raise ValueError(
                f"folder {str(folder)!r} holds another sweep: its {name} is {found.get(name)!r}, now it is {value!r}; "
                "choose another folder, or the settings that it was begun with"
            )
    return dict(found)


def source_hash(function: SetupFunction) -> str | None:
    """Return a hash of the file that a setup comes from; None where there is none."""
    try:
        path = inspect.getsourcefile(function)
    except TypeError:
        return None
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path and Path(path).is_file() else None
