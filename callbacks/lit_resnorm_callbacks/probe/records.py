"""A probe's values by depth and its spectra, kept for tables and figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lit_resnorm.figures import by_depth, spectrum
from lit_resnorm.quantities import (
    BY_DEPTH,
    SITE_KEY,
    SITE_KIND,
    WORST,
    Declared,
    across,
    along_depth,
    find_declared,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Table = tuple[list[str], list[list[Any]]]
"""Column names and rows."""

DepthCurves = tuple[list[str], dict[int, list[float]]]
"""Sites in the order of execution, and by optimizer step a value each, or NaN."""


class Records:
    """Values by site and spectra, by optimizer step.

    Holds at most `max_steps` steps: when full, every other one goes, so a long run
    costs no more memory or checkpoint than a short one and the steps stay even.

    Attributes:
        kinds: Kinds of sites, by name, as far as they are known.
    """

    def __init__(self, max_steps: int = 64) -> None:
        self.max_steps = max_steps
        self.kinds: dict[str, str] = {}
        self._by_site: dict[str, dict[str, dict[int, float]]] = {}
        self._spectra: dict[str, dict[int, list[float]]] = {}
        self._steps: list[int] = []

    def add(
        self, step: int, numbers: dict[str, float], series: dict[str, list[float]]
    ) -> None:
        """Take in one measurement; values without a site are left to the loggers."""
        if step not in self._steps[-1:]:
            self._steps.append(step)
        for key, value in numbers.items():
            if match := SITE_KEY.fullmatch(key):
                sites = self._by_site.setdefault(match["quantity"], {})
                sites.setdefault(match["site"], {})[step] = value
        for key, values in series.items():
            self._spectra.setdefault(key, {})[step] = values
        if len(self._steps) > self.max_steps:
            self._thin()

    def _thin(self) -> None:
        gone = set(self._steps[1::2])
        self._steps = self._steps[::2]
        curves: list[dict[int, Any]] = [*self._spectra.values()]
        curves += [c for sites in self._by_site.values() for c in sites.values()]
        for curve in curves:
            for step in gone & curve.keys():
                del curve[step]

    def by_site(self, quantity: str) -> dict[str, dict[int, float]]:
        """Return the values of a quantity by site and optimizer step."""
        return self._by_site.get(quantity, {})

    def tables(
        self,
        prefix: str,
        step: int,
        series: Mapping[str, list[float]],
        declared: Mapping[str, Declared],
    ) -> dict[str, Table]:
        """Return the tables of one step: all values by site, and each spectrum.

        Args:
            prefix: First part of the tables' names.
            step: The step.
            series: The spectra.
            declared: What the probe says of its quantities.
        """
        tables: dict[str, Table] = {}
        rows: dict[str, dict[str, float]] = {}
        for quantity, sites in self._by_site.items():
            for site, curve in sites.items():
                if step in curve:
                    rows.setdefault(site, {})[quantity] = curve[step]
        if rows:
            quantities = [*self._by_site]
            worst: dict[str | None, list[str]] = {}
            for quantity in quantities:
                values = {
                    site: row[quantity] for site, row in rows.items() if quantity in row
                }
                one = find_declared(declared, f"{prefix}/{quantity}", by_site=True)
                site = one.quantity.worst(values) if one else None
                worst.setdefault(site, []).append(quantity)
            data = [
                [
                    site,
                    self.kinds.get(site, ""),
                    *(rows[site].get(q) for q in quantities),
                    ", ".join(worst.get(site, ())),
                ]
                for site in sorted(rows)
            ]
            columns = ["site", SITE_KIND, *quantities, WORST]
            tables[f"{prefix}/{BY_DEPTH}"] = (columns, data)
        for key, values in series.items():
            tables[f"{prefix}/{key}"] = (
                ["index", key],
                [[i, v] for i, v in enumerate(values, 1)],
            )
        return tables

    def figures(
        self,
        prefix: str,
        declared: Mapping[str, Declared],
        theory: Mapping[str, float | list[float]] | None = None,
        *,
        detail: bool = True,
    ) -> dict[str, Figure]:
        """Return one figure a quantity: by depth, or by rank for a spectrum.

        By depth stand sites of one kind, see `along_depth`; those of other kinds have
        figures of their own where details are drawn.

        Args:
            prefix: First part of the figures' names.
            declared: What the probe says of its quantities: labels and scales.
            theory: By quantity what random weights should give: one value, or one a
                site; left out where the sites are others.
            detail: Whether quantities that are declared as details are drawn.
        """
        figures: dict[str, Figure] = {}
        for key, (sites, values) in self.depth_curves(prefix).items():
            one = find_declared(declared, key, by_site=True)
            if one and one.quantity.detail and not detail:
                continue
            expected = (theory or {}).get(key.removeprefix(f"{prefix}/"), ())
            if isinstance(expected, (int, float)):
                expected = [expected] * len(sites)
            for name, chosen in self._axes_of(key, sites, every=detail).items():
                places = [sites.index(site) for site in chosen]
                figures[name] = by_depth(
                    chosen,
                    {
                        step: [column[p] for p in places]
                        for step, column in values.items()
                    },
                    quantity=one.quantity.label if one else key,
                    title=f"{one.quantity.title} ({key})" if one else key,
                    scale=one.quantity.scale if one else "auto",
                    theory=[expected[p] for p in places]
                    if len(expected) == len(sites)
                    else (),
                    across=across(chosen, self.kinds),
                )
        for key, spectra in self._spectra.items():
            name = f"{prefix}/{key}"
            one = find_declared(declared, name)
            label = one.quantity.label if one else key
            title = f"{one.quantity.title} ({name})" if one else name
            figures[name] = spectrum(spectra, quantity=label, title=title)
        return figures

    def _axes_of(
        self, key: str, sites: list[str], *, every: bool
    ) -> dict[str, list[str]]:
        """Return by figure the sites on its axis."""
        first = along_depth(sites, self.kinds)
        found = {key: first}
        if every and len(first) < len(sites):
            for kind in dict.fromkeys(self.kinds.get(site, "") for site in sites):
                own = [site for site in sites if self.kinds.get(site, "") == kind]
                if own != first and len(own) > 1 and kind:
                    found[f"{key}/{kind}"] = own
        return found

    def depth_curves(self, prefix: str) -> dict[str, DepthCurves]:
        """Return each quantity by site, at every step that is kept."""
        found: dict[str, DepthCurves] = {}
        for quantity, curves in self._by_site.items():
            sites = sorted(curves)
            steps = sorted({step for curve in curves.values() for step in curve})
            values = {
                step: [curves[site].get(step, float("nan")) for site in sites]
                for step in steps
            }
            found[f"{prefix}/{quantity}"] = (sites, values)
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return the records as plain containers."""
        return {
            "by_site": {
                quantity: {site: {**curve} for site, curve in sites.items()}
                for quantity, sites in self._by_site.items()
            },
            "spectra": {key: {**curve} for key, curve in self._spectra.items()},
            "steps": [*self._steps],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the records of a checkpoint."""
        self._by_site = state_dict["by_site"]
        self._spectra = state_dict["spectra"]
        self._steps = state_dict["steps"]
