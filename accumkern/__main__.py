"""The command line: ``accumkern doctor``, ``accumkern plan train.py:setup``, ``accumkern sweep train.py:setup``."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

from accumkern.formats import BUFFERS

_TARGET = "a script and a name in it, such as train.py:setup (see below)"
_PLAN = """\
Find the micro-batch and the accumulation steps to train with, and say why: what fits into memory, what is fast, and
which effective batches help training (by the gradient noise scale). It trains for that, seconds with a small model and
minutes with a large one, and puts everything back. With --predict it runs nothing on the device."""
_SWEEP = """\
Train with equally many samples at several effective batch sizes, learning-rate rules and seeds, and compare. A sweep
that was interrupted goes on where it was when the same command is given again."""
_EPILOG = """\
SCRIPT:NAME names a function that returns model, optimizer, make_batch and loss:

    def setup():
        model = GPT().to("cuda", torch.bfloat16)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        make_batch = lambda size: random_batch(data, size)    # samples in the first dimension, on the model's device
        loss = lambda model, batch: model(batch)              # the mean loss
        return model, optimizer, make_batch, loss

or it names, or is a function that returns, one of these: a transformers Trainer; a LightningModule, alone or in a tuple
with its DataLoader or LightningDataModule and, for its precision, a Lightning Trainer; (model, optimizer, DataLoader),
or (model, optimizer, DataLoader, loss) where the model does not return its loss.
The script is imported: keep what starts its training under `if __name__ == "__main__":`. What it prints goes to stderr.
Its own arguments, in sys.argv, go after --.

examples:
  {examples}

Exit status: 0; 1 where a sweep learnt nothing; 2 after an error; 130 after an interrupt.
More: docs/batch-size.md
"""
_PLAN_EXAMPLES = """\
accumkern plan train.py:setup --effective-batch 512 --output results
  accumkern plan train.py:setup --memory 24GB --predict
  accumkern plan train.py:setup --effective-batch 512 --ranks 8 --bandwidth 25
  accumkern plan train.py:trainer --json -- --width 256 --lr 1e-3 | python -m json.tool"""
_SWEEP_EXAMPLES = """\
accumkern sweep train.py:setup --effective-batches 32,128,512 --samples 100000 --output results
  accumkern sweep train.py:setup --effective-batches 32,512 --samples 9999 --rules none,sqrt --seeds 0,1 --output b"""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    end = given.index("--") if "--" in given else len(given)
    parser = _parser()
    args = parser.parse_args(given[:end])
    if args.command == "doctor":
        from accumkern.doctor import doctor

        if end < len(given):
            parser.error("doctor runs no script, so nothing can go after --")
        try:
            status = doctor()
            sys.stdout.flush()
        except BrokenPipeError:  # somebody has read enough, such as `head`; what is left goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return 1
        return status
    if args.command == "plan" and args.predict and args.memory is None:
        parser.exit(2, "accumkern plan: --predict needs --memory, such as --memory 24GB\n")
    try:
        from accumkern.planning import cli
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("accumkern"):
            raise
        missing = error.name.partition(".")[0]
        print(f"accumkern {args.command} needs {missing}: pip install 'accumkern[plan]'", file=sys.stderr)
        return 2
    try:
        return cli.run(args, given[end + 1 :])
    except KeyboardInterrupt:
        hint = "; the same command goes on where it was" if args.command == "sweep" else ""
        print(f"\naccumkern {args.command}: interrupted{hint}", file=sys.stderr)
        return 130
    finally:
        if arguments is None:  # what the script prints when the process ends is no result either
            sys.stdout.flush()
            os.dup2(2, 1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="accumkern", description="FP32 sums of gradients and FP32 master weights inside bfloat16 tensors."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("doctor", help="print versions, devices and backends, for people and for bug reports")

    plan = commands.add_parser(
        "plan",
        help="find the micro-batch and accumulation steps to train with, and say why",
        description=_PLAN,
        epilog=_EPILOG.format(examples=_PLAN_EXAMPLES),
        usage="accumkern plan SCRIPT:NAME [options] [-- arguments of the script]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    plan.add_argument("setup", metavar="SCRIPT:NAME", help=_TARGET)
    asked = plan.add_argument_group("what is planned")
    batch = "samples per optimizer step, over all ranks (default: chosen by speed and noise scale)"
    asked.add_argument("--effective-batch", type=_whole(1), metavar="N", help=batch)
    ranks = "ranks to plan for (default: those of torchrun, or one)"
    asked.add_argument("--ranks", type=_whole(1), metavar="N", help=ranks)
    link = "of the link between ranks, sent by each: what their exchange takes (default: measured under torchrun)"
    asked.add_argument("--bandwidth", dest="bandwidth_gb_per_s", type=_positive, metavar="GB/s", help=link)
    budget = "tokens of the whole run, such as 10B: what published laws say of the batch"
    asked.add_argument("--tokens", metavar="D", help=budget)
    asked.add_argument("--schedule", action="store_true", help="say when to raise the batch in a run of --tokens")
    most = "the largest micro-batch to try (default: 1024)"
    asked.add_argument("--largest-micro-batch", type=_whole(1), default=1024, metavar="N", help=most)
    windows = "windows to train for the noise scale, 4 or more, or 0 to leave it out (default: 32)"
    asked.add_argument("--noise-windows", type=_noise_windows, default=32, metavar="N", help=windows)
    predict = "predict what would fit into --memory, and run nothing on the device"
    asked.add_argument("--predict", action="store_true", help=predict)
    device = "what --predict is for: cuda or cpu (default: cuda)"
    asked.add_argument("--device", type=_one_of("cuda", "cpu"), metavar="NAME", help=device)

    sweep = commands.add_parser(
        "sweep",
        help="train at several effective batch sizes, and compare",
        description=_SWEEP,
        epilog=_EPILOG.format(examples=_SWEEP_EXAMPLES),
        usage="accumkern sweep SCRIPT:NAME --effective-batches N,N,… --samples N --output FOLDER [options]\n"
        "                       [-- arguments of the script]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sweep.add_argument("setup", metavar="SCRIPT:NAME", help=_TARGET)
    runs = sweep.add_argument_group("what is trained")
    batches = "samples per optimizer step, to compare"
    runs.add_argument("--effective-batches", type=_list(_whole(1)), required=True, metavar="N,N,…", help=batches)
    runs.add_argument("--samples", type=_whole(1), required=True, metavar="N", help="samples to train with in each run")
    rules = "how the learning rate follows the batch: none, sqrt, linear (default: sqrt)"
    runs.add_argument(
        "--rules", type=_list(_one_of("none", "sqrt", "linear")), default=["sqrt"], metavar="…", help=rules
    )
    seeds = "seeds of the random numbers; each is a run (default: 0)"
    runs.add_argument("--seeds", type=_list(_whole(0)), default=[0], metavar="N,N,…", help=seeds)
    decays = "how decoupled weight decay follows batch and learning rate: none, timescale (default: none)"
    runs.add_argument(
        "--weight-decay",
        dest="weight_decay_rules",
        type=_list(_one_of("none", "timescale")),
        default=["none"],
        metavar="…",
        help=decays,
    )
    start = "a file with the states of model and optimizer, to begin every run with"
    runs.add_argument("--from", dest="start", type=Path, metavar="CHECKPOINT", help=start)
    base = "the batch that the learning rate of script or checkpoint is for (default: the smallest)"
    runs.add_argument("--base-batch", type=_whole(1), metavar="N", help=base)
    runs.add_argument("--micro-batch", type=_whole(1), metavar="N", help="the largest to use (default: what fits)")
    at_once = "runs at once, each in a process and on a GPU or a share of the cores (default: 1)"
    runs.add_argument("--jobs", type=_whole(1), default=1, metavar="N", help=at_once)
    loss = sweep.add_argument_group("how it is compared")
    loss.add_argument("--target-loss", type=_number, metavar="X", help="loss to reach (default: what all runs reach)")
    evaluations = "times to measure the validation loss in each run (default: 20)"
    loss.add_argument("--evaluations", type=_whole(1, 10**6), default=20, metavar="N", help=evaluations)
    validation = "samples to measure that loss on (default: 256)"
    loss.add_argument("--validation-samples", type=_whole(1), default=256, metavar="N", help=validation)

    for command in (plan, sweep):
        how = command.add_argument_group("memory and precision")
        how.add_argument(
            "--memory", type=_memory, metavar="SIZE", help="limit, such as 24GB (default: what is available)"
        )
        margin = "the part of the memory to leave free, 0 to 1 (default: 0.1)"
        how.add_argument("--margin", type=_margin, default=0.1, metavar="X", help=margin)
        buffer = f"how gradients are summed: {', '.join(BUFFERS)} (default: by the weights' dtype)"
        how.add_argument("--buffer", type=_one_of(*BUFFERS), metavar="NAME", help=buffer)
        masters = "how FP32 masters of bfloat16 weights are kept: auto, split24, split32 or none (default: auto)"
        how.add_argument("--master-weights", type=_masters, default="auto", metavar="NAME", help=masters)
        results = command.add_argument_group("results")
        files = "for report.html, figures, JSON and CSV"
        if command is sweep:
            files += "; one that holds the same sweep is continued"
        results.add_argument("--output", type=Path, required=command is sweep, metavar="FOLDER", help=files)
        results.add_argument(
            "--json", action="store_true", help="print the result as JSON, and nothing else, to stdout"
        )
    return parser


# What options take. argparse puts the option's own spelling before a message.


def _whole(least: int, most: int = 2**63 - 1) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:  # too many digits, too
            number = least - 1
        if not least <= number <= most:
            right = f"from {least} to {most}" if number > most else f"of at least {least}"
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number {right}")
        return number

    return parse


def _noise_windows(text: str) -> int:
    number = _whole(0)(text)
    if 0 < number < 4:
        raise argparse.ArgumentTypeError(f"{text} is too few; it must be at least 4, or 0 to leave the noise scale out")
    return number


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return number


def _positive(text: str) -> float:
    number = _number(text)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def _margin(text: str) -> float:
    number = _number(text)
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 0 and less than 1")
    return number


def _memory(text: str) -> int:
    from accumkern.out_of_memory import parse_bytes

    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("memory is ")) from error


def _one_of(*names: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(names)}")
        return text

    return parse


def _masters(text: str) -> str | None:
    name = _one_of("auto", "split24", "split32", "none")(text)
    return None if name == "none" else name


def _list(parse: Callable[[str], object]) -> Callable[[str], list[object]]:
    return lambda text: [parse(part.strip()) for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
