"""Places in a network, in the order of execution, and visits to them.

A *site* is an application of a leaf module, a functional activation, or the addition
that ends a residual branch. :func:`~lit_resnorm.measures.passes.tracing.trace` finds
them in one forward pass of any network; nothing is converted. :func:`visiting` calls a
:class:`Visitor` at each of them in later passes. All probes share these names, so that
their tables join.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lit_resnorm.measures.passes.forward_walk import Walk

SiteKind = Literal["activation", "norm", "addition", "module"]


@dataclass(frozen=True)
class Site:
    """A place in the network.

    Attributes:
        name: Place in the order of execution, a dot, the module's name
            (`017.net.blocks.3.act1`, `018.net.blocks.3.relu`, `019.net.blocks.3.add`).
        kind: `activation`, `norm`, `addition` (of a residual branch) or `module`.
        op: What is applied: `relu`, `batchnorm2d`, `add`, `conv2d` ...
        channel_dim: Dimension of the output that counts units: 1 for convolutional
            maps, -1 for vectors and tokens.
        entry: Which of the candidate places of a pass this is.
        skip: For an addition, which operand (0 or 1) is the skip connection: the one
            with fewer operations since the two parted.
        module: The applied module; None for functional sites.
    """

    name: str
    kind: SiteKind
    op: str
    channel_dim: int
    entry: int
    skip: int | None = None
    module: nn.Module | None = None


class Visitor:
    """What to do at each site; both methods do nothing unless overridden.

    `before` sees the arguments before an in-place operation overwrites them. What
    `after` returns, unless None, replaces the output.
    """

    def before(self, site: Site, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """See the arguments of a site's module or function."""

    def after(
        self, site: Site, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """See the output; the arguments may have been overwritten."""


def first_tensor(values: Any) -> Tensor | None:
    """Return the first tensor in a nest of arguments, or None."""
    for leaf in pytree.tree_leaves(values):
        if isinstance(leaf, Tensor):
            return leaf
    return None


def select(
    sites: Iterable[Site],
    pattern: str = "",
    *,
    kinds: Sequence[SiteKind] = (),
    ops: Iterable[str] = (),
) -> tuple[Site, ...]:
    """Return the sites whose name matches, of the given kinds and operations.

    Args:
        sites: As `trace` gives them.
        pattern: Regular expression searched in the names.
        kinds: Kinds to keep; all where empty.
        ops: Operations to keep; all where empty.

    Raises:
        ValueError: If the pattern is no regular expression, or if it matches none of
            the sites of these kinds; the message lists their names.
    """
    ops = frozenset(ops)
    fitting = [
        site
        for site in sites
        if (not kinds or site.kind in kinds) and (not ops or site.op in ops)
    ]
    try:
        chosen = tuple(site for site in fitting if re.search(pattern, site.name))
    except re.error as error:
        raise ValueError(
            f"sites is {pattern!r}, not a regular expression: {error}"
        ) from error
    if fitting and not chosen:
        names = ", ".join(site.name for site in fitting[:40])
        more = f" and {len(fitting) - 40} more" if len(fitting) > 40 else ""
        raise ValueError(f"sites is {pattern!r}, which matches none of {names}{more}")
    return chosen


def owner_name(parameter: str) -> str:
    """Return the name of the module that owns a parameter, as in its eager form."""
    owner = parameter.rpartition(".")[0].replace("_orig_mod.", "")
    return owner.removesuffix("_orig_mod").strip(".")


def owner_site(owner: str, root: str, sites: Sequence[Site]) -> str:
    """Return the site of a parameter-owning module: its first application.

    A module that is no site itself takes the number of the first site inside it (a
    vision transformer with its class token), or of the site that it is a part of (the
    output projection within an attention).

    Args:
        owner: The module's name; empty for the network itself.
        root: What the network itself is called.
        sites: Of a pass, in the order of execution.
    """
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
    return f"{numbered[-1][0] if numbered else '000'}.{owner or root}"


@contextmanager
def visiting(
    model: nn.Module, sites: Iterable[Site], visitor: Visitor
) -> Iterator[None]:
    """Call the visitor at the given sites in the one forward pass made inside.

    Raises:
        RuntimeError: If the pass takes another way than the traced one did.
    """
    walk = _Visit(model, {site.entry: site for site in sites}, visitor)
    with walk:
        yield
    walk.check()


class _Visit(Walk):
    def __init__(
        self, model: nn.Module, sites: dict[int, Site], visitor: Visitor
    ) -> None:
        super().__init__(model)
        self.sites = sites
        self.visitor = visitor
        self._visited = 0

    def _site(
        self, entry: int, op: str | None, module: nn.Module | None
    ) -> Site | None:
        site = self.sites.get(entry)
        if site is None:
            return None
        if site.module is not module or (op is not None and site.op != op):
            raise RuntimeError(
                f"the forward pass came to {op or self._names.get(id(module))} where"
                f" {site.name} was traced: its way depends on the data"
            )
        return site

    def check(self) -> None:
        if self._visited != len(self.sites):
            raise RuntimeError(
                f"the forward pass came to {self._visited} of {len(self.sites)} traced"
                " sites: its way depends on the data"
            )

    def entered(self, entry: int, args: Any, kwargs: Any) -> None:
        if site := self._site(entry, None, self.frames[-1][1]):
            self._before(site, args, kwargs)

    def left(
        self, entry: int, module: nn.Module, args: Any, kwargs: Any, output: Any
    ) -> Any:
        site = self._site(entry, None, module)
        if site is None:
            return None
        return self._after(site, args, kwargs, output)

    def applied(
        self, entry: int, op: str, func: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        site = self._site(entry, op, None)
        if site is None:
            return func(*args, **kwargs)
        self._before(site, args, kwargs)
        output = func(*args, **kwargs)
        replaced = self._after(site, args, kwargs, output)
        return output if replaced is None else replaced

    # What a visitor computes is no part of the pass: it is neither numbered nor seen.
    def _before(self, site: Site, args: Any, kwargs: Any) -> None:
        with torch._C.DisableTorchFunction():
            self.visitor.before(site, args, kwargs)

    def _after(self, site: Site, args: Any, kwargs: Any, output: Any) -> Any:
        self._visited += 1
        with torch._C.DisableTorchFunction():
            return self.visitor.after(site, args, kwargs, output)
