"""Configs of runs: flat, without what tells nothing, and where they differ."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from lit_resnorm.quantities import Declared, declared_quantities
from lit_resnorm.runs.reading import check_size

FLAT = ("variant", "depth", "width", "data", "optimizer", "lr", "batch_size", "seed")
"""Keys that every run of `fit` has."""

# The same values at their place in the nested config.
_TWINS = {
    "model": "variant",
    "model.depth": "depth",
    "model.width": "width",
    "data": "data",
    "model.optimizer": "optimizer",
    "model.optimizer.lr": "lr",
    "data.batch_size": "batch_size",
    "seed_everything": "seed",
}
# What says where and under which name a run was made, not what it is.
_LEFT_OUT = re.compile(
    r"(run|experiment|ckpt_path|config|resumed_from_step|weights_only|trainer\.(logger|default_root_dir)"
    r"|trainer\.callbacks\.(StepSeed|ExactResume|ModelCheckpoint|\w*ProgressBar|RunReport)"
    r"|.*\b(dirpath|save_dir|root|run_name|run_id|_instantiator|_class_path))(\..*)?"
    r"|_.*"
)
MOST_SETTINGS = 5_000
"""Settings of one run that are compared."""

# beyond it no number of JSON's is read as it was written
_LARGEST = 2**63 - 1
_ABSOLUTE = re.compile(r"/[^/]|[A-Za-z]:[\\/]|~/")


def flat_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's config flat: dotted keys, scalars; lists as JSON text.

    A component counts under its place (`model.optimizer`) with its options below
    (`model.optimizer.lr`); callbacks go by their class. Left out are names of runs,
    paths of this machine, loggers, and second copies of the keys in `FLAT`.

    Args:
        config: As loggers got it: nested under `config` beside flat keys, or another
            project's, nested or flat.

    Raises:
        ValueError: If it holds too much, or too deep.
    """
    check_size(config)
    nested = config.get("config")
    ours = isinstance(nested, Mapping) and "variant" in config
    flat = {key: _setting_value(config[key]) for key in FLAT if ours and key in config}
    for key, value in _nested_settings(nested if ours else config):
        second = ours and _TWINS.get(key) in flat
        path = isinstance(value, str) and _ABSOLUTE.match(value)
        if not second and not path and not _LEFT_OUT.fullmatch(key):
            flat[key] = value
    if len(flat) > MOST_SETTINGS:
        raise ValueError(f"its config has more than {MOST_SETTINGS} settings")
    return flat


def parted_config(
    config: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, Declared]]:
    """Return a run's config, and apart from it what the run's probes declared there.

    `quantities` that are another project's setting stay in the config.
    """
    declared = declared_quantities(config.get("quantities"))
    rest = {k: v for k, v in config.items() if k != "quantities" or not declared}
    return rest, declared


def _nested_settings(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        dot = f"{prefix}." if prefix else ""
        if isinstance(value.get("class_path"), str) and prefix:
            yield prefix, value["class_path"]
            yield from _nested_settings(value.get("init_args") or {}, prefix)
            return
        for key, inner in value.items():
            yield from _nested_settings(inner, f"{dot}{key}")
    elif (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and _holds_components(value)
    ):
        seen: dict[str, int] = {}
        for part in value:
            name = part["class_path"].rpartition(".")[2]
            seen[name] = number = seen.get(name, 0) + 1
            place = f"{prefix}.{name}" + (f".{number}" if number > 1 else "")
            yield from _nested_settings(part, place)
    else:
        yield prefix, _setting_value(value)


def _holds_components(value: Sequence[Any]) -> bool:
    """Say whether a list is one of components."""
    return bool(value) and all(
        isinstance(part, Mapping) and isinstance(part.get("class_path"), str)
        for part in value
    )


def _setting_value(value: Any) -> Any:
    if isinstance(value, int) and abs(value) > _LARGEST:
        return hex(value)
    if value is None or isinstance(value, str | bool | int | float):
        return value
    return json.dumps(value, default=str)


_NAMES_ELSEWHERE: dict[str, tuple[str, ...]] = {
    "variant": ("arch", "architecture", "model_name", "backbone", "network", "model"),
    "depth": ("depth", "num_layers", "n_layers", "num_blocks", "n_blocks"),
    "optimizer": ("optimizer", "optimizer_name", "optim", "opt"),
    "lr": ("lr", "learning_rate"),
}
"""What settings that every run of `fit` has may be called in other projects."""

_ONE_WORD = re.compile(r"[\w.-]{1,80}")


def told_setting(config: Mapping[str, Any], key: str) -> Any:
    """Return a setting of `FLAT`, of another project's config where it can be told.

    That is where one value alone stands under a usual name: `num_layers`,
    `learning_rate`, `optimizer.class_path`; None elsewhere.

    Args:
        config: A flat config.
        key: `variant`, `depth`, `optimizer` or `lr`.
    """
    if "variant" in config:
        return config.get(key)
    if (own := _as_setting(key, config.get(key))) is not None:
        return own
    for name in _NAMES_ELSEWHERE[key]:
        values = [
            value for other, value in config.items() if other.split(".")[-1] == name
        ]
        found = {
            one for value in values if (one := _as_setting(key, value)) is not None
        }
        if found:
            return found.pop() if len(found) == 1 else None
    return None


def _as_setting(key: str, value: Any) -> Any:
    """Return a value as that of a key; None where it can't be one."""
    if key in ("variant", "optimizer"):
        is_word = isinstance(value, str) and _ONE_WORD.fullmatch(value)
        return value.rpartition(".")[2] or None if is_word else None
    kinds = int if key == "depth" else (int, float)
    return value if isinstance(value, kinds) and not isinstance(value, bool) else None


def known_key(key: str) -> str:
    """Return the key of the flat config that a user may mean.

    `model.init_args.depth`, `config.model.init_args.depth` and `model.depth` are all
    `depth`.
    """
    short = key.removeprefix("config.").replace(".init_args", "")
    short = short.removesuffix(".class_path")
    return _TWINS.get(short, short)


def differences(
    configs: Sequence[Mapping[str, Any]], also: Collection[str] = ()
) -> dict[str, list[Any]]:
    """Return the keys whose values differ, the best known first.

    A key that some runs lack differs where the others' values do, or where every run
    of `fit` has it.

    Args:
        configs: Flat configs.
        also: Further keys that differ where some runs lack them.

    Returns:
        By key, a value a run; None where a run lacks it.
    """
    found = {}
    for key in _setting_names(configs):
        values = [config[key] for config in configs if key in config]
        lacking = len(values) < len(configs) and (key in FLAT or key in also)
        if lacking or any(value != values[0] for value in values[1:]):
            found[key] = [config.get(key) for config in configs]
    return found


def same(configs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what is equal in all configs."""
    return {
        key: configs[0][key]
        for key in _setting_names(configs)
        if all(key in c and c[key] == configs[0].get(key) for c in configs)
    }


def _setting_names(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    keys = dict.fromkeys(key for config in configs for key in config)
    flat = [key for key in FLAT if key in keys]
    return [*flat, *sorted(key for key in keys if key not in FLAT)]
