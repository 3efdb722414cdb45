"""What accumkern costs on the host: the hook, training where launches decide, the end of a window, and the step.

``python benchmarks/bench_overhead.py [--device cpu|cuda] [--quick] [--parameters 10,300,3000] [--backends cuda,eager]
[--seconds 40]``

The hook: ``backward()`` of a micro-batch that is added to earlier ones, over stock accumulation, for many tiny bfloat16
parameters in three kinds of models: *bare*, whose gradients one autograd node makes, so that little is timed beside
accumulation; a stack of transformer blocks; and the same with its blocks ``torch.compile``d. On a GPU that is the time
until Python goes on, not until the GPU has finished. Then micro-batches and windows of a small GPT
(``overhead_training.py``), ``finish()`` beside torch's clipping (``overhead_finish.py``), and AdamW's step with and
without masters, also under ``fully_shard`` (``overhead_step.py``).

Writes ``benchmarks/results/<machine>/overhead.json``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # from a checkout, installed or not

import overhead_finish
import overhead_hook
import overhead_step
import overhead_training
from harness import backends_on, parser, steps, write_results
from regimes import REGIMES, TINY, Regime
from turns import MAX_ROUNDS, MIN_ROUNDS, Budget

from accumkern import backends

PARAMETERS = (10, 300)
SLOW = "eager"  # a backend that takes tens of times as long as the others: measured when it is asked for
SECONDS = 40.0
# What torch.compile takes is known before the others have their shares; a round of training takes the longest.
ORDER = ("compiled", "training", "bare", "eager", "finish", *overhead_step.MODELS)
WEIGHTS = {"training": 3}


def main() -> None:
    """Measure all cases within the time and write the file."""
    begin = time.perf_counter()
    options = parser(__doc__)
    options.add_argument("--parameters", type=numbers, default=[*PARAMETERS], help="multiples of ten, as 10,300,3000")
    options.add_argument("--backends", help=f"default: all that run on the device but {SLOW}")
    options.add_argument("--seconds", type=float, default=SECONDS, help="for everything, torch.compile's time included")
    arguments = options.parse_args()
    device = torch.device(arguments.device)
    chosen, others = chosen_backends(options, arguments.backends, device)
    torch.set_num_threads(1)  # the hook's time is Python's; torch's threads would add their waits for one another
    regime = REGIMES[device.type]["launch"]
    if arguments.quick:
        regime = replace(regime, **TINY)

    cases: list[tuple[str, Callable[..., list[dict[str, Any]]]]] = [
        *((m, partial(overhead_hook.measure, m, n)) for m in overhead_hook.MODELS for n in arguments.parameters),
        *(("finish", partial(overhead_finish.measure, n)) for n in overhead_finish.COUNTS),
        *((model, partial(overhead_step.measure, model)) for model in overhead_step.MODELS),
        ("training", partial(overhead_training.measure, regime)),
    ]
    cases.sort(key=lambda case: ORDER.index(case[0]))
    budget = Budget(0.0 if arguments.quick else arguments.seconds, [WEIGHTS.get(name, 1) for name, _ in cases])
    results: list[dict[str, Any]] = []
    with steps("overhead") as on_step:
        for number, (_, measure) in enumerate(cases):
            on_step(number, len(cases))
            results += measure(device, chosen, budget.share)
    taken = f"{time.perf_counter() - begin:.0f} in all, of {arguments.seconds:g} that were to be used"
    not_asked_for = [*(f"the {name} backend" for name in others), *left_out(arguments.parameters)]
    method = {
        **how(regime),
        "seconds": taken,
        "left_out": f"{', '.join(not_asked_for)}: only where asked for" if not_asked_for else "nothing",
        "backend": backends.choose(None, device),
    }
    write_results(arguments, "overhead", method, results)


def how(regime: Regime) -> dict[str, str]:
    """Return how it is measured."""
    numel = overhead_hook.BARE_NUMEL
    return {
        "timed": "hook: backward() on the host, second and later micro-batches of a window",
        "order": "stock and each backend take turns in every round; the order is reversed from round to round",
        "over_stock": "median over rounds of the difference to stock of the same round, divided by the parameters",
        "models": f"bare: parameters of {numel} elements, all gradients by one autograd node; "
        f"transformer: blocks of width {overhead_hook.HIDDEN}, {overhead_hook.TOKENS} tokens; "
        "compiled: each block by torch.compile",
        "training": f"a GPT of width {regime.width} with {regime.layers} layers, {regime.micro_batches} micro-batches "
        f"of {regime.batch_size} x {regime.context} tokens, clip_grad_norm_ and AdamW; a round is a window of each",
        "finish": f"of {overhead_finish.MICRO_BATCHES} micro-batches, parameters of {numel} elements",
        "step": f"of AdamW, parameters of {numel} elements: FP32 ones by torch, bfloat16 ones with "
        f"{overhead_step.MASTERS} masters by accumkern; fully_shard: of one rank, in a process of its own",
        "clock": "host: until Python goes on; done: until the GPU has finished, which had nothing to do before",
        "over": "ratio to the same micro-batch, or window, of the same round: median, and an interval that holds it "
        "with the confidence that stands in the file",
        "rounds": f"{MIN_ROUNDS} to {MAX_ROUNDS}, as many as its share of the time allows a case",
        "threads": "one",
        "buffer": "split24",
    }


def numbers(text: str) -> list[int]:
    """Return the numbers of parameters that the command line names."""
    counts = [int(part) for part in text.split(",")]
    if wrong := [count for count in counts if count <= 0 or count % 10]:
        raise argparse.ArgumentTypeError(f"{', '.join(map(str, wrong))}: a block has ten parameters; use multiples")
    return counts


def left_out(counts: list[int]) -> list[str]:
    """Return which numbers of parameters were not asked for."""
    return [] if max(counts) >= 3000 else ["3,000 parameters"]


def chosen_backends(
    options: argparse.ArgumentParser, asked: str | None, device: torch.device
) -> tuple[list[str], list[str]]:
    """Return the backends that are measured, and those that run here and are not."""
    there = backends_on(device)
    chosen = asked.split(",") if asked else [name for name in there if name != SLOW] or there
    if missing := [name for name in chosen if name not in there]:
        options.error(f"--backends has {', '.join(missing)}; on {device.type} there are {', '.join(there)}")
    return chosen, [name for name in there if name not in chosen]


if __name__ == "__main__":
    main()
