"""What the probes of this package declare; run it to write that down for `compare`.

`lit-resnorm compare` reads the file where a run holds no declarations.
"""

import json
from importlib import resources

from lit_resnorm.compare.shipped import FILE
from lit_resnorm_callbacks import (
    ActivationRateMonitor,
    FIMEigenvalueProbe,
    MomentTracer,
    StabilityProbe,
)

PROBES = (FIMEigenvalueProbe, MomentTracer, ActivationRateMonitor, StabilityProbe)
PATH = resources.files("lit_resnorm.compare") / FILE


def rows():
    return {
        key: one.row() for probe in PROBES for key, one in probe().declared().items()
    }


if __name__ == "__main__":
    PATH.write_text(json.dumps(rows(), indent=1) + "\n", encoding="utf-8")
