"""What skip connections and normalisation do to the training of deep networks."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_resnorm.measures import (
        FisherSpectrum,
        activation_rates,
        empirical_fisher_spectrum,
        fisher_spectrum,
        signal_and_noise,
    )
    from lit_resnorm.population import Population
    from lit_resnorm.runs import RunHistory, WandbHistory, read_offline_wandb, read_run

__all__ = [
    "FisherSpectrum",
    "Population",
    "RunHistory",
    "WandbHistory",
    "activation_rates",
    "empirical_fisher_spectrum",
    "fisher_spectrum",
    "read_offline_wandb",
    "read_run",
    "signal_and_noise",
]


def exported(package: str, places: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a package's `__getattr__`, which imports what it exports where it is used.

    Args:
        package: The package's name.
        places: By exported name the module in the package that defines it.
    """

    def get(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{places[name]}"), name)

    return get


__getattr__ = exported(
    __name__,
    {
        "FisherSpectrum": "measures",
        "Population": "population",
        "RunHistory": "runs",
        "WandbHistory": "runs",
        "activation_rates": "measures",
        "empirical_fisher_spectrum": "measures",
        "fisher_spectrum": "measures",
        "read_offline_wandb": "runs",
        "read_run": "runs",
        "signal_and_noise": "measures",
    },
)
