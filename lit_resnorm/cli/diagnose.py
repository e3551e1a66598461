"""`lit-resnorm diagnose`: what goes wrong with a network, before it is trained."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import Progress as Bar

from lit_resnorm.cli.arguments import CommandParser
from lit_resnorm.errors import PATHOLOGICAL, SUCCESS, UsageError
from lit_resnorm.runs.files import CHECKPOINTS, CONFIG
from lit_resnorm.runs.reading import read_yaml

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

    from lit_resnorm.cli.model_and_data import ModelAndData
    from lit_resnorm.diagnose import Diagnosis
    from lit_resnorm.diagnose.subject import Progress

_DESCRIPTION = """\
Say what goes wrong with a network before it is trained, or at a checkpoint: signal or
noise pathology, exploding or vanishing activations and gradients, dead layers, a
learning rate that is too high; with the numbers behind it and what the papers advise.
Nothing is trained but copies, at rates that are tried, and nothing but --json written.

All options of `lit-resnorm fit` are taken too, for example

  lit-resnorm diagnose --config configs/quickstart.yaml --model.init_args.depth 50
  lit-resnorm diagnose --model LitVanillaNet --model.depth 50 --model.width 128
  lit-resnorm diagnose --checkpoint runs/quickstart/NAME/checkpoints/last.ckpt

Exit status: 0 healthy or undetermined, 3 a pathology found, 2 wrong use, 1 failure."""


def diagnose_command(args: Sequence[str]) -> int:
    """Run `lit-resnorm diagnose` and return its exit status.

    Args:
        args: The words after `diagnose`.

    Returns:
        0 where no pathology was found, else 3.

    Raises:
        UsageError: On an option that can't be right, files that aren't there, or a
            network that can't be diagnosed on this data.
    """
    parser = _parser()
    options, rest = parser.parse_known_args(args)
    _check_numbers_and_file(options)
    found = _found_config(options, rest)
    files = [str(found)] if found else options.config or []
    fit_options = [*(word for file in files for word in ("--config", file)), *rest]
    if options.seed is not None:
        fit_options += ["--seed_everything", str(options.seed)]
    from lit_resnorm.cli.model_and_data import model_and_data
    from lit_resnorm.cli.trust import Trust

    trust = None
    if found is not None and not options.trust:
        trust = Trust(f"--checkpoint {options.checkpoint}: {found}", rest)
    made = model_and_data(fit_options, parser.option_names(), trust)
    if options.checkpoint is not None:
        _load_checkpoint(made.module, options.checkpoint)
    with _told_progress() as progress:
        diagnosis = _diagnosis(made, options, progress)
    if options.json is not None:
        options.json.write_text(diagnosis.to_json(), encoding="utf-8")
    from lit_resnorm.diagnose.printing import show

    show(diagnosis)
    return PATHOLOGICAL if diagnosis.status == "pathological" else SUCCESS


@contextmanager
def _told_progress() -> Iterator[Progress]:
    """Show progress: a bar in a terminal, else a line now and then."""
    from lit_resnorm.cli.display import StageLines

    console = Console(stderr=True)
    if not console.is_terminal:
        yield StageLines()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("diagnose", total=None)
        yield lambda stage, done, total: bar.update(
            task, description=stage, completed=done, total=total
        )


def _diagnosis(
    made: ModelAndData, options: argparse.Namespace, progress: Progress
) -> Diagnosis:
    """Return the diagnosis.

    Raises:
        UsageError: If the network can't be diagnosed on this data.
    """
    from lit_resnorm.diagnose import diagnose

    try:
        return diagnose(
            made.module,
            made.data,
            num_examples=options.num_examples,
            output=options.output,
            loss_scale=options.loss_scale,
            check_rate=options.check_rate,
            seed=options.seed or 0,
            progress=progress,
        )
    except ValueError as error:
        raise UsageError(" ".join(str(error).split())) from error


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="lit-resnorm diagnose",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config",
        action="append",
        metavar="FILE",
        help="a config file of fit; several stack, the later one wins",
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="take the weights from there, and without --config the config.yaml of its"
        " run",
    )
    parser.add_argument(
        "--trust",
        action="store_true",
        help="import what that config.yaml names, also outside lit_resnorm, torch,"
        " torchvision and Lightning: it runs the code there",
    )
    parser.add_argument(
        "--check-rate",
        "--check_rate",
        action="store_true",
        help="train copies for 60 full-batch steps at rates around the bound, and say"
        " the largest that is stable",
    )
    parser.add_argument(
        "--num_examples",
        "--num-examples",
        type=int,
        default=128,
        metavar="N",
        help="size of the batch that is measured on (default: 128)",
    )
    parser.add_argument(
        "--output",
        choices=("auto", "softmax", "bernoulli", "gaussian"),
        default="auto",
        help="distribution of the output that the loss belongs to (default: by the"
        " module's loss, or output and target)",
    )
    parser.add_argument(
        "--loss_scale",
        "--loss-scale",
        type=float,
        metavar="X",
        help="the loss over the mean of the negative log-likelihoods, such as 2 / C for"
        " a mean over C squared errors (default: by the module's loss, else 1)",
    )
    parser.add_argument(
        "--seed", type=int, metavar="N", help="of weights and noise (default: 0)"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the whole report there"
    )
    return parser


def _check_numbers_and_file(options: argparse.Namespace) -> None:
    if options.num_examples < 1:
        raise UsageError(f"--num_examples {options.num_examples}: it must be 1 or more")
    if options.seed is not None and options.seed < 0:
        raise UsageError(f"--seed {options.seed}: it must be 0 or more")
    path = options.json
    if path is None:
        return
    folder = path.resolve().parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UsageError(f"--json {path}: no file can be written there")


def _found_config(options: argparse.Namespace, rest: Sequence[str]) -> Path | None:
    """Return the config beside the checkpoint, None where another stands for it.

    Raises:
        UsageError: If neither it nor another is there, or it can't be read.
    """
    path = options.checkpoint
    found = None
    if path is not None and not options.config:
        folder = path.resolve().parent
        run = folder.parent if folder.name == CHECKPOINTS else folder
        if not path.is_file():
            raise UsageError(f"--checkpoint {path}: there is no such file")
        if (run / CONFIG).is_file():
            found = run / CONFIG
        elif not _names_model(rest):
            raise UsageError(
                f"--checkpoint {path}: there is no {CONFIG} of its run; give --config"
            )
    if options.trust and found is None:
        raise UsageError("--trust: there is no config beside a checkpoint to trust")
    if not options.config and not found and not _names_model(rest):
        raise UsageError("diagnose: give --config, --checkpoint or --model")
    if found is not None:
        try:
            # before the parser, which knows no bounds
            read_yaml(found)
        except (OSError, ValueError) as error:
            raise UsageError(f"--checkpoint {path}: {found}: {error}") from error
    return found


def _names_model(rest: Sequence[str]) -> bool:
    return any(word.partition("=")[0] == "--model" for word in rest)


def _load_checkpoint(module: LightningModule, path: Path) -> None:
    """Give the module a checkpoint's weights.

    Raises:
        UsageError: If it isn't of this module.
    """
    from lit_resnorm.runs.checkpoints import check_checkpoint, load_checkpoint

    try:
        check_checkpoint(path, module)
        checkpoint: dict[str, Any] = load_checkpoint(path)
        module.load_state_dict(checkpoint["state_dict"])
    except (ValueError, RuntimeError) as error:
        words = " ".join(str(error).split()).replace("--ckpt_path", "--checkpoint")
        raise UsageError(words) from error
