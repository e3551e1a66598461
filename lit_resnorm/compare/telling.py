"""Which config keys tell runs apart: those that may change what was trained."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lit_resnorm.compare.config import FLAT, differences
from lit_resnorm.compare.recorded import Recorded

DEFAULT_BY = tuple(key for key in FLAT if key != "seed")

CALLBACKS = "trainer.callbacks."

# Settings of a Trainer that change what is shown, kept or checked. All others count,
# those of the hardware too: they change the order of sums, or what a step averages.
_WATCHING = re.compile(
    r"trainer\.(log_every_n_steps|enable_\w+|profiler|barebones|detect_anomaly"
    r"|num_sanity_val_steps|limit_predict_batches|inference_mode|model_registry)(\..*)?"
)
# Callbacks that measure, show or save.
_WATCHERS = re.compile(
    r"(lit_resnorm|lit_resnorm_callbacks)\..*"
    r"|(lightning\.pytorch|pytorch_lightning)\.(.*\.)?(LearningRateMonitor"
    r"|DeviceStatsMonitor|ThroughputMonitor|\w*ModelSummary|\w*ProgressBar"
    r"|ModelCheckpoint|OnExceptionCheckpoint|BasePredictionWriter)"
)
_CALLBACK = re.compile(re.escape(CALLBACKS) + r"\w+(\.\d+)?")


def default_by(runs: Sequence[Recorded]) -> list[str]:
    """Return the keys by which runs are grouped unless a user says otherwise.

    The flat keys of `fit` but the seed, as far as a run has them, and what else of
    model, data or trainer tells runs apart that these don't, unless it only watches
    the training; in runs of other projects anything but seeds. So runs are averaged
    that differ in seeds alone.

    Args:
        runs: Runs of our command line, or of other projects.
    """
    configs = [run.config for run in runs]
    known = [key for key in DEFAULT_BY if any(c.get(key) is not None for c in configs)]
    foreign = any("variant" not in config for config in configs)
    # a callback that one run has alone tells it from the others
    own = {key for config in configs for key in config if key.startswith("trainer.")}
    for key in differences(configs, also=() if foreign else own):
        tells = len(_values(configs, [*known, key])) > len(_values(configs, known))
        if key not in known and tells and _counts(key, configs, foreign=foreign):
            known.append(key)
    return known


def _counts(key: str, configs: Sequence[Mapping[str, Any]], *, foreign: bool) -> bool:
    """Say whether a setting may change what is trained, and is no seed."""
    if "seed" in key.rpartition(".")[2]:
        return False
    if key.startswith("trainer."):
        return not _WATCHING.fullmatch(key) and not _watches(key, configs)
    return foreign or key.startswith(("model.", "data."))


def _watches(key: str, configs: Sequence[Mapping[str, Any]]) -> bool:
    """Say whether a key is of a callback that measures, shows or saves."""
    callback = _CALLBACK.match(key)
    if callback is None:
        return False
    classes = {str(c[callback[0]]) for c in configs if callback[0] in c}
    return bool(classes) and all(map(_WATCHERS.fullmatch, classes))


def _values(
    configs: Sequence[Mapping[str, Any]], keys: Sequence[str]
) -> set[tuple[Any, ...]]:
    return {tuple(config.get(key) for key in keys) for config in configs}
