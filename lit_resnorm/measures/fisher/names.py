"""Names of the layers that own parameters, by site."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from lit_resnorm.measures.fisher.blocks import Block
from lit_resnorm.measures.passes.sites import Site
from lit_resnorm.measures.passes.tracing import trace


def layers_by_site(
    model: nn.Module, blocks: Sequence[Block], forward: Callable[[], Any]
) -> dict[str, tuple[Block, ...]]:
    """Return the blocks of each parameter-owning module, by site, in order.

    A module is named by its first application. One that is no site itself takes the
    number of the first site inside it (a vision transformer with its class token), or
    of the site that it is a part of (the output projection within an attention).

    Args:
        model: Its submodules own the parameters.
        blocks: All blocks; each belongs to the owner of its first parameter.
        forward: One pass of the model, on a few examples.
    """
    sites = trace(model, forward)
    owned: dict[str, list[Block]] = {}
    for block in blocks:
        owner = block.names[0].rpartition(".")[0].replace("_orig_mod.", "")
        owned.setdefault(owner.removesuffix("_orig_mod").strip("."), []).append(block)
    root = type(model).__name__.lower()
    named = {_site_name(owner, root, sites): tuple(b) for owner, b in owned.items()}
    return dict(sorted(named.items()))


def _site_name(owner: str, root: str, sites: Sequence[Site]) -> str:
    numbered = [site.name.split(".", 1) for site in sites]
    for number, path in numbered:
        if path == owner:
            return f"{number}.{path}"
    for number, path in numbered:
        if not owner or path.startswith(f"{owner}."):
            return f"{number}.{owner or root}"
    for number, path in numbered:
        if owner.startswith(f"{path}."):
            return f"{number}.{owner}"
    return f"{numbered[-1][0] if numbered else '000'}.{owner}"
