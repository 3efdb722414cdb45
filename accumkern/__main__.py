"""The command line: ``accumkern doctor``, ``accumkern plan script.py:setup``, ``accumkern sweep script.py:setup``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

_SETUP = "a script and a function in it that returns model, optimizer, make_batch and loss, such as train.py:setup"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    args = _parser().parse_args(arguments)
    if args.command == "doctor":
        from accumkern.doctor import doctor

        return doctor()
    try:
        from accumkern.planning import cli
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("accumkern"):
            raise
        missing = error.name.partition(".")[0]
        print(f"accumkern {args.command} needs {missing}: pip install 'accumkern[plan]'", file=sys.stderr)
        return 2
    return cli.run(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="accumkern", description="FP32 sums of gradients and FP32 master weights inside bfloat16 tensors."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="print versions, devices and backends, for people and for bug reports")

    plan = commands.add_parser("plan", help="find the micro-batch and accumulation steps to train with, and say why")
    plan.add_argument("setup", metavar="SCRIPT:FUNCTION", help=_SETUP)
    plan.add_argument("--effective-batch", type=int, metavar="N", help="samples per optimizer step, over all ranks")
    plan.add_argument("--tokens", metavar="D", help="of the run, such as 10B, for what published laws say")
    plan.add_argument("--schedule", action="store_true", help="say when to raise the batch in a run of --tokens")
    plan.add_argument("--predict", action="store_true", help="predict what would fit into --memory, and run nothing")
    plan.add_argument("--largest-micro-batch", type=int, default=1024, metavar="N", help="to try (default: 1024)")
    plan.add_argument("--noise-windows", type=int, default=32, metavar="N", help="to train (default: 32)")
    plan.add_argument("--output", type=Path, metavar="FOLDER", help="write report.html, figures, JSON and CSV there")

    sweep = commands.add_parser("sweep", help="train at several effective batch sizes, and compare")
    sweep.add_argument("setup", metavar="SCRIPT:FUNCTION", help=_SETUP)
    sweep.add_argument("--effective-batches", type=_numbers, required=True, metavar="N,N,…", help="to train with")
    sweep.add_argument("--samples", type=int, required=True, metavar="N", help="to train with in each run")
    sweep.add_argument("--rules", type=_words, default=["sqrt"], metavar="RULE,…", help="none, sqrt (default), linear")
    sweep.add_argument("--seeds", type=_numbers, default=[0], metavar="N,N,…", help="of random numbers (default: 0)")
    decays = "none (default), timescale: decoupled weight decay follows batch and learning rate"
    sweep.add_argument(
        "--weight-decay", dest="weight_decay_rules", type=_words, default=["none"], metavar="RULE,…", help=decays
    )
    base = "that the learning rate of the script or checkpoint is for (default: the smallest of --effective-batches)"
    sweep.add_argument("--base-batch", type=int, metavar="N", help=base)
    sweep.add_argument(
        "--from", dest="start", type=Path, metavar="CHECKPOINT", help="of model and optimizer, to begin every run with"
    )
    sweep.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at once, in N processes (default: 1)")
    sweep.add_argument("--micro-batch", type=int, metavar="N", help="the largest to use (default: what fits)")
    sweep.add_argument("--target-loss", type=float, metavar="X", help="to reach (default: what all runs reach)")
    sweep.add_argument("--evaluations", type=int, default=20, metavar="N", help="of the loss in a run (default: 20)")
    sweep.add_argument("--validation-samples", type=int, default=256, metavar="N", help="for it (default: 256)")
    sweep.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="of results; continues it")

    for command in (plan, sweep):
        command.add_argument("--memory", metavar="SIZE", help="limit, such as 24GB (default: what is available)")
        command.add_argument("--margin", type=float, default=0.1, metavar="X", help="to leave free (default: 0.1)")
        command.add_argument("--buffer", metavar="NAME", help="split24, split32 or fp32 (default: by dtype)")
        masters = "how FP32 masters of bfloat16 weights are kept: auto (default), split24, split32 or none"
        command.add_argument("--master-weights", type=_or_none, default="auto", metavar="NAME", help=masters)
        command.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers, such as 32,128") from error


def _or_none(text: str) -> str | None:
    return None if text == "none" else text


def _words(text: str) -> list[str]:
    return text.split(",")


if __name__ == "__main__":
    sys.exit(main())
