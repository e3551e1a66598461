"""What the probes of this package declare; run it to write that down.

`lit-resnorm compare` reads the file where a run holds no declarations; people read
`docs/values.md`.
"""

import json
from importlib import resources

import values_page

from lit_resnorm.compare.shipped import FILE
from lit_resnorm_callbacks import (
    ActivationRateMonitor,
    FIMEigenvalueProbe,
    GradientCovarianceProbe,
    GradientMonitor,
    HeadroomProbe,
    HessianProbe,
    IterativeInferenceMonitor,
    MomentTracer,
    NormPreservationMonitor,
    StabilityProbe,
)

PROBES = (
    FIMEigenvalueProbe,
    HessianProbe,
    GradientCovarianceProbe,
    MomentTracer,
    ActivationRateMonitor,
    StabilityProbe,
    GradientMonitor,
    HeadroomProbe,
    IterativeInferenceMonitor,
    NormPreservationMonitor,
)
PATH = resources.files("lit_resnorm.compare") / FILE


def rows():
    return {
        key: one.row() for probe in PROBES for key, one in probe().declared().items()
    }


def page():
    return values_page.page(
        {
            f"`{probe.__name__}`": {
                key: one.quantity for key, one in probe().declared().items()
            }
            for probe in PROBES
        }
    )


if __name__ == "__main__":
    PATH.write_text(json.dumps(rows(), indent=1) + "\n", encoding="utf-8")
    values_page.PATH.write_text(page(), encoding="utf-8")
