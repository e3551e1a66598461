"""The help of `fit` and its kin: options in groups, in words without markup."""

from __future__ import annotations

import argparse
import re

from lit_resnorm.cli.options import OptionParser

_MARKUP = (
    (r":\w+:`~?([^`<]*?)\s*<[^`>]*>`", r"\1"),  # :ref:`text <label>`
    (r":\w+:`~(?:[\w.]+\.)?(\w+)`", r"\1"),  # :class:`~a.b.Name`
    (r":\w+:`([^`]*)`", r"\1"),
    (r"`([^`<]*?)\s*<\s*(http[^`>]*)>`_+", r"\1 (\2)"),
    (r"``([^`]*)``", r"\1"),
    (r"(?<!\w)\*\*(\w[^*]*)\*\*(?!\w)", r"\1"),
    # of Lightning's docstrings, and again in the parentheses that follow
    (r"\s*Defaults? (?:to|is|:)?:? ?[^\s]+?\.(?=\s*$)", ""),
)

_GROUPS = (
    ("", "Run", None),
    (
        "model",
        "Model",
        "A class, and the options that it has: --model LitResNetBN --model.depth 20"
        " --model.optimizer Adam --model.optimizer.lr 0.001; --model.help LitResNetBN"
        " lists them.",
    ),
    (
        "data",
        "Data",
        "Likewise: --data MNIST --data.batch_size 64; --data.help MNIST lists them.",
    ),
    ("ckpt_path", "Start from", None),
    (
        "trainer",
        "Trainer",
        "Options of Lightning's Trainer. --trainer.callbacks+=NAME adds a callback,"
        " --trainer.callbacks.OPTION sets an option of the one before;"
        " --trainer.callbacks.help NAME lists them.",
    ),
)
"""What a group's first option begins with, its title, and what is said of it."""

_HELP_OF_OPTIONS = {
    "config": "A file of options in YAML; several stack, the later one wins.",
    "print_config": "Print all options as a config file and leave.",
    "seed_everything": "Seed of weights, noise and the order of data; true draws one.",
    "model": "The model: name or path of a class, or a file.",
    "data": "The data: name or path of a class, or a file.",
    "ckpt_path": "Checkpoint to start from: a file, or the last or best of --run.",
    "weights_only": "Whether to refuse checkpoints that could run code; null: refuse.",
}


def make_readable(parser: OptionParser, command: str) -> None:
    """Group a parser's options, and take the markup out of what is said of them.

    Args:
        parser: The parser of a command.
        command: Its name.
    """
    parser.usage = (
        f"lit-resnorm {command} [--config FILE ...] [--model CLASS]"
        " [--model.OPTION VALUE ...]\n"
        "       [--data CLASS] [--data.OPTION VALUE ...] [--trainer.OPTION VALUE ...]"
    )
    for action in parser._actions:
        if isinstance(action.help, str) and action.help != argparse.SUPPRESS:
            action.help = _HELP_OF_OPTIONS.get(action.dest, without_markup(action.help))
    order = {beginning: place for place, (beginning, _, _) in enumerate(_GROUPS)}
    for group in parser._action_groups:
        beginning = _beginning(group)
        if beginning in order:
            _, group.title, group.description = _GROUPS[order[beginning]]
    groups = parser._action_groups
    parser._action_groups = sorted(groups, key=lambda g: order.get(_beginning(g), 0))


def _beginning(group: argparse._ArgumentGroup) -> str:
    names = [action.dest.partition(".")[0] for action in group._group_actions]
    known = {beginning for beginning, _, _ in _GROUPS}
    return next((name for name in names if name in known), "")


def without_markup(text: str) -> str:
    """Return what a docstring says without reStructuredText's roles and quotes."""
    for pattern, words in _MARKUP:
        text = re.sub(pattern, words, text)
    return text
