"""What ``acc.backward(loss_fn, batch)`` costs over a loop by hand, and what a limit of memory on a CPU costs.

``python benchmarks/bench_batch.py [--device cpu|cuda] [--quick] [--seconds 40]``

A window of a small GPT in split24 by three ways that take turns: a loop that divides the loss, ``acc.backward`` with
the same micro-batches, and that under a limit that nothing exceeds (``memory=``). Two regimes: tiny micro-batches,
where the host's time shows, and larger ones. Writes ``benchmarks/results/<machine>/batch.json``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # from a checkout, installed or not

from harness import parser, steps, write_results
from overhead_training import new_model
from regimes import REGIMES, TINY, Regime
from turns import MAX_ROUNDS, MIN_ROUNDS, Budget, Clocked, by_turns, clocked, compared

import accumkern

SECONDS = 40.0
CASES = ("launch", "compute")
LOOP, BACKWARD, LIMITED = "loop", "acc.backward", "acc.backward, memory="
LIMIT = "1TB"


def main() -> None:
    """Measure both regimes within the time and write the file."""
    options = parser(__doc__)
    options.add_argument("--seconds", type=float, default=SECONDS, help=f"for everything (default: {SECONDS:g})")
    arguments = options.parse_args()
    device = torch.device(arguments.device)
    regimes = {name: REGIMES[device.type][name] for name in CASES}
    if arguments.quick:
        regimes = {name: replace(regime, **TINY) for name, regime in regimes.items()}
    budget = Budget(0.0 if arguments.quick else arguments.seconds, [1] * len(regimes))
    results: list[dict[str, Any]] = []
    with steps("batch") as on_step:
        for number, (name, regime) in enumerate(regimes.items()):
            on_step(number, len(regimes))
            makers = {way: partial(make_window, way, regime, device) for way in (LOOP, BACKWARD, LIMITED)}
            results += [{"regime": name, **result} for result in compared(by_turns(makers, budget.share), [LOOP])]
    method = {name: f"{described(regime)}: {regime.what}" for name, regime in regimes.items()} | {
        "timed": "forward and backward passes of a window, and zero_grad(); no step",
        "order": "the ways take turns in every round; the order is reversed from round to round",
        "clock": "host: until Python goes on; done: until the GPU has finished, which had nothing to do before",
        "over": "ratio to the loop of the same round: median, and an interval that holds it with the confidence that "
        "stands in the file",
        "rounds": f"{MIN_ROUNDS} to {MAX_ROUNDS}, as many as its share of the time allows a regime",
        "buffer": "split24",
        "threads": f"{torch.get_num_threads()}",
    }
    write_results(arguments, "batch", method, results)


def described(regime: Regime) -> str:
    """Return model and micro-batches in words."""
    return (
        f"a GPT of width {regime.width} with {regime.layers} layers, {regime.micro_batches} micro-batches of "
        f"{regime.batch_size} x {regime.context} tokens"
    )


def make_window(way: str, regime: Regime, device: torch.device) -> Callable[[], Clocked]:
    """Return a function that runs a window in one of the ways, and returns its time."""
    model = new_model(regime, device).to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters())
    acc = accumkern.attach(optimizer)
    samples = regime.batch_size * regime.micro_batches
    batch = torch.randint(256, (samples, regime.context + 1), device=device)
    memory = LIMIT if way == LIMITED else None

    def by_hand() -> None:
        for part in batch.split(regime.batch_size):
            (model(part) / regime.micro_batches).backward()
        optimizer.zero_grad()

    def at_once() -> None:
        acc.backward(model, batch, regime.batch_size, model=model, memory=memory)
        optimizer.zero_grad()

    def run_window() -> Clocked:
        times = clocked(by_hand if way == LOOP else at_once, device)
        return {("window", clock): [milliseconds] for clock, milliseconds in times.items()}

    run_window()  # allocates
    return run_window


if __name__ == "__main__":
    main()
