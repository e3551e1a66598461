"""What a probe says of each value that it logs, and how a run keeps it.

A probe declares its quantities once. From there come the list in its documentation,
the labels and scales of its figures, and, written beside a run's values, the columns,
charts and panels of `lit-resnorm compare`, which reads them without torch and without
knowing any probe.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

AxisScale = Literal["auto", "linear", "log"]
Better = Literal["high", "low"] | float | None
"""Which values are good: high or low ones, or those near a reference."""

SITE = "<site>"
"""Part of a quantity's name that stands for the site in the logged ones."""

SITE_KEY = re.compile(r"(?P<quantity>.+?)/(?P<site>\d{3,}\..+)")
"""A key `<probe>/<quantity>/<site>`."""

BY_DEPTH = "by_depth"
"""Name of a probe's table of values by site: columns `site`, `kind`, a quantity each,
and `worst`, which names the quantities whose worst value stands in the row."""

SITE_KIND, WORST = "kind", "worst"
"""Columns of that table that are no quantities."""

PLACES = {
    "first": "first site",
    "middle": "middle site",
    "last": "last site",
    WORST: "worst site",
}
"""What stands in a site's place where a quantity by site is summarised."""

_MARK = re.compile(r"<\w+>")
_MOST_QUANTITIES = 1_000
"""Quantities of one run that are read."""
_TEXTS = ("unit", "heading", "panel", "source")


@dataclass(frozen=True)
class Code:
    """A number that stands for a word.

    Attributes:
        number: As it is logged.
        word: The verdict that it is.
        told: The word in tables and charts, empty where it tells nothing; None: `word`.
    """

    number: int
    word: str
    told: str | None = None

    @property
    def shown(self) -> str:
        """The word in tables and charts."""
        return self.word if self.told is None else self.told


PATHOLOGIES = (
    Code(0, "none"),
    Code(1, "signal"),
    Code(2, "snr", told="noise"),
    Code(-1, "undetermined", told=""),
)
"""What may go wrong with depth, as `moments/pathology` logs it."""

OPTIMIZER_KINDS = (
    Code(0, "other"),
    Code(1, "gradient descent"),
)
"""What a learning rate is judged by, as `fim/optimizer_kind` logs it."""


@dataclass(frozen=True)
class Quantity:
    """What a logged value is.

    Attributes:
        name: Its name after the probe's. A part in angle brackets stands for whatever
            the probe puts there: `dead/<site>`, `top/<rank>`.
        title: A few words: title of its charts, label of its figures.
        unit: Its unit; empty: none.
        scale: Axis on which it is drawn; `auto` looks at the values.
        better: Which values are good, if that can be said: `high` or `low` ones, or
            those near a number. It says which site is the worst.
        detail: Whether it is left to tables unless a probe logs `all`.
        headline: Whether it has a column in tables, and a panel.
        heading: Of that column; empty: `title`.
        over_sites: What the column shows of a quantity by site: the `last`, or the
            `mean`.
        panel: Title of its panel in a W&B workspace, which quantities of one probe can
            share; empty: `title`, for a headline.
        codes: The words that its numbers stand for.
        form: A `value` a step, or a `spectrum` or `table` of several.
        source: The paper or measure behind it.
        meaning: A sentence that defines it, for the probe's documentation.
        advice: What to do by it, for `docs/values.md`; empty: nothing by itself.
    """

    name: str
    title: str
    unit: str = ""
    scale: AxisScale = "auto"
    better: Better = None
    detail: bool = False
    headline: bool = False
    heading: str = ""
    over_sites: Literal["last", "mean"] = "last"
    panel: str = ""
    codes: tuple[Code, ...] = ()
    form: Literal["value", "spectrum", "table"] = "value"
    source: str = ""
    meaning: str = ""
    advice: str = ""

    def __post_init__(self) -> None:
        """Refuse what can't be right."""
        if not self.name or not self.title:
            raise ValueError(
                f"a quantity needs a name and a title; it has {self.name!r} and"
                f" {self.title!r}"
            )
        for option, known in _CHOICES.items():
            if getattr(self, option) not in known:
                raise ValueError(
                    f"{option} of quantity {self.name!r} is {getattr(self, option)!r};"
                    f" it must be one of {', '.join(map(repr, known))}"
                )
        if self.by_site and self.stem in ("site", SITE_KIND, WORST):
            raise ValueError(
                f"a quantity by site can't be named {self.stem!r}: so is a column of"
                " the table by depth"
            )
        if not _is_better(self.better):
            raise ValueError(
                f"better of quantity {self.name!r} is {self.better!r}; it must be"
                " 'high', 'low', a number or None"
            )

    @property
    def by_site(self) -> bool:
        """Whether it has a value a site."""
        return self.name.endswith(f"/{SITE}")

    @property
    def stem(self) -> str:
        """The name without its site."""
        return self.name.removesuffix(f"/{SITE}")

    @property
    def label(self) -> str:
        """The title with the unit."""
        return f"{self.title} ({self.unit})" if self.unit else self.title

    @property
    def panel_title(self) -> str:
        """Title of its panel, with the words of its numbers; empty: it has none."""
        title = self.panel or (self.title if self.headline else "")
        words = [f"{c.number} {c.shown}" for c in self.codes if c.number and c.shown]
        return f"{title}: {', '.join(words)}" if title and words else title

    def badness(self, value: float) -> float:
        """Return how bad a value is, larger being worse; NaN where nothing says it.

        Distance from a reference is one of logarithms where the scale is `log`.
        """
        if self.better is None or math.isnan(value):
            return math.nan
        if self.better == "high":
            return -value
        if self.better == "low":
            return value
        reference = float(self.better)
        if self.scale == "log" and reference > 0:
            return abs(math.log(value / reference)) if value > 0 else math.inf
        return abs(value - reference)

    def worst(self, values: Mapping[str, float]) -> str | None:
        """Return the site whose value is worst, of equal ones the first.

        NaN counts only where there is nothing else; None where `better` is None, or
        there is no site.
        """
        if self.better is None or not values:
            return None
        bad = {site: self.badness(value) for site, value in values.items()}
        return max(bad, key=lambda s: -math.inf if math.isnan(bad[s]) else bad[s])


def _is_better(value: Any) -> bool:
    if value is None or value in ("high", "low"):
        return True
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


_CHOICES = {
    "scale": ("auto", "linear", "log"),
    "over_sites": ("last", "mean"),
    "form": ("value", "spectrum", "table"),
}


@dataclass(frozen=True)
class Declared:
    """A quantity of one probe of a run.

    Attributes:
        probe: The probe's name.
        prefix: First part of its logged names: the name, or `<name>_batch` where
            examples are coupled.
        section: Heading under which the probe's charts stand.
        quantity: What it declared.
    """

    probe: str
    prefix: str
    section: str
    quantity: Quantity

    @property
    def key(self) -> str:
        """Its name with the probe's, which may hold parts in angle brackets."""
        return f"{self.prefix}/{self.quantity.name}"

    @property
    def stem(self) -> str:
        """The same without its site."""
        return f"{self.prefix}/{self.quantity.stem}"

    @cached_property
    def pattern(self) -> re.Pattern[str] | None:
        """Of the names that the key stands for; None where it is a name or of sites."""
        is_open = not self.quantity.by_site and _MARK.search(self.key)
        return re.compile(name_pattern(self.key)) if is_open else None

    @property
    def identity(self) -> tuple[str, str]:
        """What is the same however the probe treats batch norm."""
        return self.probe, self.quantity.name

    def row(self) -> dict[str, Any]:
        """Return it as JSON can hold it, without what is as by default."""
        quantity = self.quantity
        row: dict[str, Any] = {"probe": self.probe, "section": self.section}
        plain = ("title", *_TEXTS, *_CHOICES, "better", "detail", "headline")
        defaults = Quantity("-", "-")
        row |= {
            option: getattr(quantity, option)
            for option in plain
            if getattr(quantity, option) != getattr(defaults, option)
        }
        if quantity.codes:
            row["codes"] = [[c.number, c.word, c.shown] for c in quantity.codes]
        return row


def declared_quantities(rows: Any) -> dict[str, Declared]:
    """Return the quantities of a run as they were written, by key.

    What has not the form of a declaration is left out: a config's `quantities` may be
    another project's, and a later version may say more.

    Args:
        rows: By key what `Declared.row` returns, as JSON or YAML gave it back.
    """
    items = [*rows.items()][:_MOST_QUANTITIES] if isinstance(rows, Mapping) else ()
    found = ((key, _declared(key, row)) for key, row in items)
    return {key: one for key, one in found if one is not None}


def _declared(key: Any, row: Any) -> Declared | None:
    is_row = isinstance(key, str) and isinstance(row, Mapping)
    prefix, _, name = key.partition("/") if is_row else ("", "", "")
    # two wildcards side by side would take a pattern the square of a name's length
    if any(len(_MARK.findall(part)) > 1 for part in name.split("/")):
        return None
    texts = (
        [row.get(option) for option in ("probe", "section", "title")] if name else []
    )
    if not texts or not all(isinstance(text, str) and text for text in texts):
        return None
    options = {o: row[o] for o in _TEXTS if isinstance(row.get(o), str)}
    options |= {
        o: row[o] for o, known in _CHOICES.items() if o in row and row[o] in known
    }
    if _is_better(row.get("better")):
        options["better"] = row.get("better")
    probe, section, title = map(str, texts)
    quantity = Quantity(
        name,
        title,
        detail=row.get("detail") is True,
        headline=row.get("headline") is True,
        codes=_codes(row.get("codes")),
        **options,
    )
    return Declared(probe, prefix, section, quantity)


def _codes(rows: Any) -> tuple[Code, ...]:
    if not isinstance(rows, Sequence) or isinstance(rows, str):
        return ()
    return tuple(
        Code(*row)
        for row in rows
        if isinstance(row, Sequence) and [*map(type, row)] == [int, str, str]
    )


def find_declared(
    quantities: Mapping[str, Declared], key: str, *, by_site: bool = False
) -> Declared | None:
    """Return what was declared of a logged value, None where nothing was.

    Of a quantity by site that is summarised (`<probe>/<quantity>/worst`) the title
    says which site it is of.

    Args:
        quantities: As `declared_quantities` returns them.
        key: A logged name; of a quantity by site, without the site.
        by_site: Whether it is one by site.
    """
    if by_site:
        return quantities.get(f"{key}/{SITE}")
    if key in quantities:
        return quantities[key]
    for one in quantities.values():
        if one.pattern is not None and one.pattern.fullmatch(key):
            return one
    stem, _, place = key.rpartition("/")
    whole = quantities.get(f"{stem}/{SITE}") if place in PLACES else None
    if whole is None:
        return None
    # charts by depth show it
    quantity = replace(
        whole.quantity,
        title=f"{whole.quantity.title}, {PLACES[place]}",
        headline=False,
        panel="",
    )
    return replace(whole, quantity=quantity)


def along_depth(sites: Iterable[str], kinds: Mapping[str, str]) -> list[str]:
    """Return the sites that stand on one axis, of one kind, in the order of execution.

    The additions where there are several (one a residual branch), else the
    activations, else all.

    Args:
        sites: Names of sites.
        kinds: Kinds by site, as `lit_resnorm.measures.passes.sites.Site.kind`; of a
            site that is not among them the name tells whether it is an addition.
    """
    ordered = sorted(sites)
    for kind in ("addition", "activation"):
        chosen = [site for site in ordered if _site_kind(site, kinds) == kind]
        if len(chosen) > 1:
            return chosen
    return ordered


def across(sites: Iterable[str], kinds: Mapping[str, str]) -> str:
    """Return what stands across where sites are drawn: `residual addition` ..."""
    found = {_site_kind(site, kinds) for site in sites}
    return _ACROSS.get(found.pop(), "site") if len(found) == 1 else "site"


_ACROSS = {
    "addition": "residual addition",
    "activation": "activation",
    "norm": "normalisation",
    "module": "layer",
}


def _site_kind(site: str, kinds: Mapping[str, str]) -> str:
    return kinds.get(site) or ("addition" if site.endswith(".add") else "")


def name_pattern(name: str) -> str:
    """Return a regular expression of what a name in angle brackets stands for."""
    return "[^/]+".join(map(re.escape, _MARK.split(name)))


def logs_section(name: str, quantities: Iterable[Quantity]) -> str:
    """Return the `Logs:` section of a probe's docstring.

    Args:
        name: The probe's name, first part of the logged ones.
        quantities: What it declares.
    """
    lines = ["Logs:"]
    for quantity in quantities:
        text = f"{name}/{quantity.name}: {quantity.meaning or f'{quantity.label}.'}"
        lines += textwrap.wrap(
            text, 80, initial_indent=" " * 4, subsequent_indent=" " * 8
        )
    return "\n".join(lines)
