"""Data of items: what `full` reads from disk is checked before anything runs."""

from __future__ import annotations

from collections.abc import Sequence

import lit_resnorm.data as data_modules
from lit_resnorm.errors import UsageError

__all__ = ["check_data"]


def check_data(item: str, names: Sequence[str]) -> None:
    """Check that data sets can be read.

    Args:
        item: The item's name.
        names: Classes of `lit_resnorm.data`.

    Raises:
        UsageError: Where one isn't there; says which, where it was looked for and how
            to get it.
    """
    for name in names:
        module = getattr(data_modules, name)()
        missing = [path for path in module.files if not (module.root / path).is_file()]
        if missing:
            raise UsageError(
                f"reproduce {item} --scale full needs {name}, which isn't in "
                f"{module.root} (no {missing[0]}): set LIT_RESNORM_DATA to the folder "
                f"that has it, or run `lit-resnorm fit --model LitMLP --model.depth 1 "
                f"--model.width 8 --data {name} --data.download true` once"
            )
