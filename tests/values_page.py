"""The page that says of each logged value what it means, and what to do.

It is made of what probes declare and of `lit_resnorm.quantities.explanations`; running
`tests/shipped_quantities.py` writes it.
"""

import re
from pathlib import Path

from lit_resnorm.quantities.explanations import EXPLANATIONS, VALUES_PAGE

PATH = Path(__file__).parents[1] / VALUES_PAGE

BEGINNING = """\
# Logged values: what they mean, and what to do

Warnings of probes, the findings of `lit-resnorm compare` and of `lit-resnorm diagnose`
refer to this page. First what may be found, then every value that a probe logs. The
page is written by `tests/shipped_quantities.py`, from what probes declare and from
`lit_resnorm/quantities/explanations.py`.

A value's step is the number of optimizer steps that the weights had taken. `<site>` is
a place in the network, in the order of execution: `017.net.blocks.3.act`. Our modules
also log `train/loss`, `val/loss`, `val/accuracy` and `generalization_gap`, the
validation loss less the training loss.

## What may be found
"""


def anchor(key):
    """Return the anchor of a logged name: letters, digits, dashes."""
    return re.sub(r"[^\w]+", "-", key).strip("-")


def linked(text):
    """Return text in which what it says to see is a link."""
    names = "|".join(sorted(EXPLANATIONS, key=len, reverse=True))
    return re.sub(
        rf"\bsee ((?:{names})(?:, (?:{names}))*)\b",
        lambda match: re.sub(names, r"[\g<0>](#\g<0>)", match[0]),
        text,
        flags=re.IGNORECASE,
    )


def page(declared):
    """Return the page.

    Args:
        declared: By heading, one a probe, its quantities by logged name.
    """
    lines = [BEGINNING]
    for one in EXPLANATIONS.values():
        title = one.title[0].upper() + one.title[1:]
        lines += [f'### <a id="{one.name}"></a>{title}', "", one.meaning, ""]
        lines += [f"**What to do.** {linked(one.advice)}", ""]
    lines.append("## What probes log")
    for heading, quantities in declared.items():
        lines += ["", f"### {heading}", ""]
        lines += ["| value | what it means | what to do |", "|---|---|---|"]
        for key, quantity in quantities.items():
            meaning = quantity.meaning or f"{quantity.label}."
            advice = linked(quantity.advice) or "Nothing by itself."
            name = f'<a id="{anchor(key)}"></a>`{key}`'
            lines.append(f"| {name} | {meaning[0].upper()}{meaning[1:]} | {advice} |")
    return "\n".join(lines) + "\n"
