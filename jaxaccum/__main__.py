"""The command line: `python -m jaxaccum plan module:task --target-batch-size 512`."""

import argparse
import importlib
from collections.abc import Sequence
from types import ModuleType

from jaxaccum._choosing.planner import plan
from jaxaccum._choosing.planner.result import Plan


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command and prints its result."""
    parser = argparse.ArgumentParser(prog="python -m jaxaccum")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    about = "Prints the largest micro-batch of a task that fits on one device, as jaxaccum.plan finds it."
    command = commands.add_parser("plan", help=about, description=about)
    command.add_argument("task", metavar="MODULE:TASK", help="a Task, or a function that returns one")
    command.add_argument(
        "--batch",
        default="batch",
        metavar="NAME",
        help="an example batch in MODULE, or a function that returns one (default: %(default)s)",
    )
    command.add_argument(
        "--target-batch-size",
        type=int,
        default=512,
        metavar="N",
        help="the examples of a window (default: %(default)s)",
    )
    command.add_argument(
        "--memory-limit", type=float, metavar="BYTES", help="by default that of the device; 16e9 is valid"
    )
    command.add_argument("--alternatives", action="store_true", help="also compile other options")
    command.add_argument("--measure", action="store_true", help="also time windows, and choose the fastest size")
    command.set_defaults(run=_plan)
    args = parser.parse_args(arguments)
    print(args.run(args, command))


def _plan(args: argparse.Namespace, parser: argparse.ArgumentParser) -> Plan:
    module, _, name = args.task.partition(":")
    try:
        members = vars(importlib.import_module(module))
    except (ModuleNotFoundError, ValueError) as error:
        parser.error(f"the task must be MODULE:TASK, got {args.task!r}: {error}")
    has = ", ".join(x for x, value in members.items() if not (x.startswith("_") or isinstance(value, ModuleType)))
    if name not in members:
        parser.error(f"the task must be MODULE:TASK, got {args.task!r}; {module} has: {has}")
    if args.batch not in members:
        parser.error(f"--batch must be a name in {module}, got {args.batch!r}; {module} has: {has}")
    found = (members[name], members[args.batch])
    task, batch = (value() if callable(value) else value for value in found)
    options = {"alternatives": args.alternatives, "measure": args.measure}
    return plan(task, None, batch, None, args.target_batch_size, None, args.memory_limit, **options)


if __name__ == "__main__":
    main()
