"""A parser of plain options whose errors name what may have been meant."""

from __future__ import annotations

import argparse
from typing import NoReturn

from lit_resnorm.errors import UsageError, nearest, suggestion

UNRECOGNIZED = "unrecognized arguments: "


class CommandParser(argparse.ArgumentParser):
    """A parser that raises in place of leaving; a prefix is no option."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})  # pyright: ignore[reportArgumentType]

    def option_names(self) -> list[str]:
        """Return the options that there are, each with its dashes."""
        return [name for action in self._actions for name in action.option_strings]

    def error(self, message: str) -> NoReturn:
        """Raise UsageError, which names the command.

        Args:
            message: What argparse found.
        """
        command = self.prog.rpartition(" ")[2]
        if message.startswith(UNRECOGNIZED):
            word = message.removeprefix(UNRECOGNIZED).split()[0]
            name = word.partition("=")[0]
            message = f"there is no option {name}"
            if not name.startswith("-"):
                message = f"{name!r} is no option, and nothing takes it"
            message += suggestion(nearest(name, self.option_names()))
        raise UsageError(f"{command}: {message.removeprefix('argument ')}")
