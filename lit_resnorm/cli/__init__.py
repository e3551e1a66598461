"""The command line: which command runs, its errors in one line, its exit status."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from importlib import metadata

from lit_resnorm.errors import (
    FAILURE,
    INTERRUPTED,
    PATHOLOGICAL,
    SUCCESS,
    WRONG_USE,
    UsageError,
    nearest,
    one_line,
    printable,
    suggestion,
)
from lit_resnorm.runs.files import RUN_DIR

PROGRAM = "lit-resnorm"

_COMMANDS = {
    "fit": "train a model on data, in a run directory of its own",
    "validate": "one pass over the validation set",
    "test": "one pass over the test set",
    "predict": "what the model says of the data",
    "compare": "runs side by side: a table, what is pathological, one HTML page",
    "diagnose": "a network before it is trained: will it train, and at what rate?",
    "reproduce": "figures and tables of papers, with verdicts",
}


def _help() -> str:
    commands = "".join(f"  {name:<11} {does}\n" for name, does in _COMMANDS.items())
    return f"""\
usage: {PROGRAM} [--help] [--version] COMMAND ...

What skip connections and normalisation do to the training of deep networks.

{commands}
Each has options of its own: {PROGRAM} COMMAND --help. Those of fit, validate, test
and predict are LightningCLI's: models, data and callbacks by class name, configs that
stack, --print_config.

  --traceback  where an error arose, below its line

Exit status: 0 success, 1 failure, 2 wrong use, 3 a diverged run or a pathology, 130
interrupted.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit status.

    Args:
        argv: The words after the program's name; None: those of this process.

    Returns:
        0 success, 1 failure, 2 wrong use, 3 a diverged run, 130 interrupted.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    show_traceback = "--traceback" in args
    args = [arg for arg in args if arg != "--traceback"]
    if args == ["--version"]:
        sys.stdout.write(f"{PROGRAM} {metadata.version('lit-resnorm')}\n")
        return SUCCESS
    if args[:1] in (["-h"], ["--help"]):
        sys.stdout.write(_help())
        return SUCCESS
    status = FAILURE
    try:
        status = _run(args)
    except SystemExit as error:
        status = _status_of_exit(error)
    except KeyboardInterrupt:
        status = INTERRUPTED
    except Exception as error:
        status = WRONG_USE if isinstance(error, UsageError) else FAILURE
        if show_traceback:
            for line in traceback.format_exc().splitlines():
                sys.stderr.write(printable(line) + "\n")
        sys.stderr.write(f"{PROGRAM}: error{_rank_in_words()}: {one_line(error)}\n")
    finally:
        os.environ.pop(RUN_DIR, None)
        _finish_wandb(status)
        if "lit_resnorm.cli.run" in sys.modules:
            from lit_resnorm.cli.run import let_go

            let_go()
    return status


def _finish_wandb(status: int) -> None:
    """End the W&B run that is open; say so where its own process has died."""
    wandb = sys.modules.get("wandb")
    try:
        if wandb is not None and wandb.run is not None:
            wandb.finish(exit_code=status)
    except Exception as error:
        sys.stderr.write(f"{PROGRAM}: the W&B run is incomplete: {one_line(error)}\n")


def _run(args: list[str]) -> int:
    _check_command(args)
    # Lightning and torch take seconds to import: only what needs them waits for them
    command, words = args[:1], args[1:]
    if command == ["compare"]:
        from lit_resnorm.cli.compare import compare

        return compare(words)
    if command == ["diagnose"]:
        from lit_resnorm.cli.diagnose import diagnose_command

        return diagnose_command(words)
    if command == ["reproduce"]:
        from lit_resnorm.cli.reproduce import reproduce

        return reproduce(words)
    from lit_resnorm.cli.fit import ResNormCLI

    cli = ResNormCLI(args)
    return PATHOLOGICAL if cli.subcommand == "fit" and cli.diverged else SUCCESS


def _check_command(args: list[str]) -> None:
    if not args:
        raise UsageError(f"no command; there are {', '.join(_COMMANDS)}")
    first = args[0]
    if first in _COMMANDS or (first.startswith("-") and {*args} & {*_COMMANDS}):
        return
    if not first.startswith("-"):
        close = suggestion(nearest(first, _COMMANDS))
        known = ", ".join(_COMMANDS)
        raise UsageError(f"there is no command {first!r}, only {known}{close}")
    close = suggestion(nearest(first, ("--help", "--version", "--traceback")))
    after = f"{first.partition('=')[0]} comes after a command, one of"
    raise UsageError(f"{after} {', '.join(_COMMANDS)}{close}")


def _status_of_exit(error: SystemExit) -> int:
    # Lightning leaves by SystemExit after Ctrl-C, and on SIGTERM by a kind of it
    if (
        isinstance(error.__context__, KeyboardInterrupt)
        or type(error) is not SystemExit
    ):
        return INTERRUPTED
    return error.code if isinstance(error.code, int) else SUCCESS


def _rank_in_words() -> str:
    if "lightning" not in sys.modules:
        return ""
    from lit_resnorm.cli.run import rank

    return f" [rank {rank()}]" if rank() else ""
