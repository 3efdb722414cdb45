"""What is trained where training is timed: models, and micro-batches of a window."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from designs import DESIGNS, Split24, Split32, StockBF16

MAX_NORM = 1.0  # that gradients are clipped to


@dataclass(frozen=True)
class Regime:
    """What is trained.

    Attributes:
        what: what it is for.
        width, layers, heads, context: of the GPT.
        batch_size: sequences of ``context`` bytes in a micro-batch.
        micro_batches: of a window.
        turn: micro-batches that a design runs until the next has its turn.
        windows: timed windows for each seed, after one that is not.
        seeds: of weights and text.
        designs: which take part, by their keys.
    """

    what: str
    width: int
    layers: int
    heads: int
    context: int
    batch_size: int
    micro_batches: int
    turn: int
    windows: int
    seeds: int
    designs: tuple[str, ...] = tuple(DESIGNS)


# Weights -> width, layers, heads.
MODELS = {"10M": (320, 8, 5), "100M": (768, 14, 12), "1B": (2048, 20, 16), "3B": (2560, 38, 20)}
COMPUTE = "the arithmetic of the model decides"
LAUNCH = "tiny micro-batches, many small parameters"
PAIRED = "larger micro-batches, few designs and more windows, to tell small differences"
FEW = (StockBF16.key, Split24.key, Split32.key)
REGIMES = {
    "cpu": {
        "compute": Regime(COMPUTE, *MODELS["10M"], 64, batch_size=4, micro_batches=4, turn=1, windows=3, seeds=1),
        "paired": Regime(PAIRED, *MODELS["10M"], 64, batch_size=8, micro_batches=4, turn=1, windows=8, seeds=1,
                         designs=FEW),
        "launch": Regime(LAUNCH, 64, 16, 2, 64, batch_size=1, micro_batches=8, turn=8, windows=3, seeds=3),
    },
    "cuda": {
        "compute": Regime(COMPUTE, *MODELS["1B"], 1024, batch_size=4, micro_batches=4, turn=1, windows=4, seeds=1),
        "paired": Regime(PAIRED, *MODELS["1B"], 1024, batch_size=8, micro_batches=8, turn=1, windows=12, seeds=1,
                         designs=FEW),
        "launch": Regime(LAUNCH, 128, 24, 2, 64, batch_size=1, micro_batches=8, turn=8, windows=4, seeds=3),
    },
}  # fmt: skip
TINY: dict[str, Any] = {
    "width": 32,
    "layers": 2,
    "heads": 1,
    "context": 16,
    "micro_batches": 4,
    "windows": 2,
    "seeds": 1,
}


def names_of(known: Collection[str]) -> Callable[[str], list[str]]:
    """Return what reads an option that names some of what is known."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: there are {', '.join(known)}")
        return names

    return parse


def adapted(regime: Regime, arguments: argparse.Namespace) -> Regime:
    """Return a regime with what the options change."""
    regime = replace(regime, designs=tuple(key for key in regime.designs if key in arguments.designs))
    if arguments.model and regime.what is not LAUNCH:
        width, layers, heads = MODELS[arguments.model]
        regime = replace(regime, width=width, layers=layers, heads=heads)
    if arguments.quick:
        regime = replace(regime, **TINY)
    if arguments.windows:
        regime = replace(regime, windows=arguments.windows)
    return regime
