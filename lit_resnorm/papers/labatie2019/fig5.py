"""Power law of the sensitivity in ResNets with batch norm (Figure 5)."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lit_resnorm.modules import LitBNResNet
from lit_resnorm.papers.contents import said_of
from lit_resnorm.papers.drawing import STYLES, legend, measured, panels, theory
from lit_resnorm.papers.item import (
    Cell,
    Check,
    Item,
    Row,
    Settings,
    between,
    grid,
    near,
)
from lit_resnorm.papers.labatie2019.propagation import (
    block_index,
    kind_of,
    profile,
    random_net,
    scales,
    sites_of,
    stored_value,
)
from lit_resnorm.papers.summaries import curve, where
from lit_resnorm.theory import power_exponent, residual_share

__all__ = ["FIG5"]

CHI = {
    5: (2.256, 0.07),
    50: (8.16, 0.41),
    100: (12.6, 0.7),
    250: (22.5, 1.4),
    500: (35.1, 2.2),
}
STEP = 1.2320


def run(settings: Settings, cell: Cell, seed: int) -> list[Row]:
    """Return sensitivity and growth by unit in one random net."""
    draw = cell["draw"]
    module = random_net(LitBNResNet, settings, draw, seed)
    units = settings["units"]
    before = sites_of((unit - 2 for unit in units if unit > 1), "add")
    chosen = sites_of((unit - 1 for unit in units), "norm1|act1|norm2|act2|add")
    found = profile(settings, module, draw, seed, sites=f"{chosen}|{before}")
    rows: dict[int, Row] = {unit: {"unit": unit, "log_inner": 0.0} for unit in units}
    for site in found.sites[1:]:
        row = rows.get(block_index(site.name) + 1)
        if row is None:
            continue
        if site.kind == "addition":
            row["log_chi"] = float(site.log_sensitivity)
            if site.branch_share is not None:
                row["share"] = float(site.branch_share)
        elif site.kind == "norm" and site.delta_bn is not None:
            row["log_inner"] += float(site.delta_bn.log()) / 2
            row.setdefault("delta_bn", float(site.delta_bn))
            row.setdefault("mu4", float("nan") if site.mu4 is None else float(site.mu4))
        elif site.delta_phi is not None:
            row["log_inner"] += float(site.delta_phi.log()) / 2
            row.setdefault("delta_phi", float(site.delta_phi))
            if site.effective_rank is not None:
                row.setdefault("rank", float(site.effective_rank))
    return list(rows.values())


def log_slope(part: pd.DataFrame, depth: int) -> float:
    """Return the slope of log chi over log of the unit in the second half."""
    half = part[part.unit >= depth / 2]
    return float(np.polyfit(np.log(half.unit), half.log_chi, 1)[0])


def inner_step(curves: pd.DataFrame, beyond: float = 5) -> float:
    """Return the growth through one inner layer, the mean of logs beyond a unit."""
    return float(np.exp(np.mean(curves[curves.unit > beyond].log_inner)))


def share_check(curves: pd.DataFrame, settings: Settings) -> Check:
    """Return the check of the branch's share in the last unit up to the 100th."""
    unit = max(u for u in settings["units"] if u <= 100)
    share = float(np.mean(where(curves, unit=unit).share))
    expected = residual_share("res_bn", unit)
    name = f"share of branch {unit} in the variance"
    return near(name, share, expected, 0.2, "D", relative=True)


def checks(curves: pd.DataFrame, settings: Settings) -> list[Check]:
    """Judge Figure 5."""
    depth = settings["depth"]
    draws = [one for _, one in curves.groupby("draw")]
    slopes = [log_slope(one, depth) for one in draws]
    step = inner_step(curves)
    found = [
        stored_value(
            "log-log slope of chi in the second half (4 standard errors)",
            slopes,
            0.6396,
            0.0198,
        ),
        near("growth d through an inner layer", step, STEP, 0.01, "P"),
        near(
            "log-log slope against tau = (d^4 - 1)/2 of the measured d",
            float(np.mean(slopes)),
            power_exponent(step),
            0.03,
            "D",
        ),
    ]
    for unit, (value, deviation) in CHI.items():
        part = where(curves, unit=unit)
        if unit <= depth and len(part):
            chi = np.exp(part.log_chi)
            name = f"chi after {unit} units (4 standard errors)"
            found.append(stored_value(name, chi, value, deviation))
    found.append(share_check(curves, settings))
    deep = curves[curves.unit == max(settings["units"])]
    rank = float(np.mean(deep["rank"]))
    found.append(between("r_eff after ReLU at the last unit", rank, 5.0, None, "P"))
    return found


def figure(curves: pd.DataFrame, settings: Settings) -> Figure:
    """Draw Figure 5."""
    drawing, axes = panels(
        1,
        3,
        title=f"ResNets with batch norm, {kind_of(settings)}width {settings['width']}: "
        f"the sensitivity is a power of depth ({settings['draws']} draws)",
        size=(11.4, 4.2),
    )
    logs = curve(curves, "unit", "log_chi")
    chi = np.exp(logs.mean)
    one = axes[0]
    blue, green, orange = (STYLES[name] for name in ("res2", "res1", "mlp"))
    label = "measured (mean, 1 sd)"
    measured(one, logs.x, chi, blue, error=chi * logs.deviation, label=label)
    tau = power_exponent(inner_step(curves))
    middle = len(chi) // 2
    line = chi[middle] * (logs.x / logs.x[middle]) ** tau
    theory(one, logs.x, line, orange, rf"theory: $l^{{{tau:.2f}}}$")
    if settings["kernel_size"] is None:
        stored = [value for value, _ in CHI.values()]
        one.plot(list(CHI), stored, "kx", label="author's stored data (paper)")
    one.set(xscale="log", yscale="log", ylabel=r"sensitivity $\chi^l$")
    steps = (("delta_phi", blue, r"\phi"), ("delta_bn", green, "{BN}"))
    for name, look, symbol in steps:
        values = curve(curves, "unit", name)
        label = rf"$\delta_{symbol}$, measured"
        measured(axes[1], values.x, values.mean, look, line=True, label=label)
    axes[1].set(xscale="log", ylabel="growth in the unit's first layer")
    shares = curve(curves, "unit", "share")
    label = "branch share, measured"
    measured(axes[2], shares.x, shares.mean, STYLES["res2_bn"], label=label)
    expected = [residual_share("res_bn", int(unit)) for unit in shares.x]
    theory(axes[2], shares.x, expected, orange, "theory: $1/(l+1)$")
    axes[2].set(xscale="log", yscale="log", ylabel="branch share of the variance")
    for other in axes:
        other.set_xlabel("residual unit $l$")
    legend(drawing, axes, columns=4)
    return drawing


UNITS = [1, 2, 3, 5, 8, 12, 18, 25, 35, 50, 70, 100, 125, 150, 200, 250, 300]
FIG5 = Item(
    **said_of("labatie2019.fig5"),
    claim="Skip connections dilute each unit's growth of the sensitivity by 1/(l+1), "
    "so that it grows as a power of depth, and nets stay well-behaved.",
    differs="Fully connected nets; small: 300 units, 64 digits a batch, 6 draws, 17 "
    "units measured; full: 500 units on CIFAR-10.",
    scales=scales(
        {"depth": 300, "units": UNITS, "draws": 6},
        {"depth": 500, "units": [*UNITS, 350, 400, 450, 500], "draws": 1000},
    ),
    cells=lambda settings: grid(draw=range(settings["draws"])),
    run=run,
    checks=checks,
    figure=figure,
    data=("CIFAR10",),
)
