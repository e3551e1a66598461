"""Items of papers run in one go, at changed settings."""

import pandas as pd


def judged(item, **changes):
    """Return the item's checks by name, at its small settings with changes."""
    settings = {**item.scales["small"], **changes}
    rows = [
        {**cell, **row}
        for cell in item.cells(settings)
        for row in item.run(settings, cell, 0)
    ]
    curves = pd.DataFrame(rows)
    item.figure(curves, settings)
    checks = item.checks(curves, settings)
    assert len({check.name for check in checks}) == len(checks)
    return {check.name: check for check in checks}
