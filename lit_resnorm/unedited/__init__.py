"""Probes in scripts that nobody edits, by an environment variable.

Lightning asks every installed package for callbacks (its entry point
`lightning.pytorch.callbacks_factory`) whenever a Trainer is made. Ours answers with
none unless `LIT_RESNORM_PROBES` names some, and imports nothing before.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from lit_resnorm.errors import one_line

if TYPE_CHECKING:
    from lightning.pytorch import Callback

VARIABLE = "LIT_RESNORM_PROBES"


def probes_for_trainer() -> list[Callback]:
    """Return the probes that the environment asks for, for one Trainer.

    A value that can't be right is one line on stderr, and no probes.
    """
    value = os.environ.get(VARIABLE, "").strip()
    if not value:
        return []
    from lit_resnorm.unedited.parsing import probes_named

    try:
        probes = probes_named(value)
    except (ValueError, TypeError, OSError) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            line = f"{VARIABLE}: {one_line(error)}; the script runs on without probes"
            print(line, file=sys.stderr)  # noqa: T201
        return []
    from lit_resnorm.unedited.history import ScriptHistory

    return [ScriptHistory(), *probes]
