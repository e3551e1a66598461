"""What flows where between the measured sites of a network.

One traced forward pass tells, for each site, from which sites its input comes, and
whether its output is the only tensor that the rest of the pass depends on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lit_resnorm.measures.passes.batches import leaves
from lit_resnorm.measures.passes.forward_walk import Walk
from lit_resnorm.measures.passes.sites import Site
from lit_resnorm.measures.passes.tracing import Provenance

INPUT = "input"


@dataclass(frozen=True)
class Flow:
    """How the measured sites of a network hang together.

    Attributes:
        sites: The sites that depend on the network's input, in order of execution.
        sources: By site, the names of the nearest sites upstream of its arguments;
            `INPUT` among them where the network's input is nearer.
        cuts: Names of the sites after which nothing but their output is used: there a
            noise may be rescaled.
        inputs: Which leaves of the batch the network uses.
        embeddings: Which of the pass's embedding look-ups take their indices from the
            input.
    """

    sites: tuple[Site, ...]
    sources: dict[str, frozenset[str]]
    cuts: frozenset[str]
    inputs: frozenset[int]
    embeddings: frozenset[int]


def follow(
    model: nn.Module, batch: Any, forward: Callable[[], Any], sites: Sequence[Site]
) -> Flow:
    """Return the flow between sites of one forward pass.

    Args:
        model: The network that `sites` were traced on.
        batch: What the pass takes its input from.
        forward: One pass of the model on that batch, of a few examples.
        sites: The sites to measure.
    """
    follower = _Follower(model, leaves(batch), sites)
    with follower:
        forward()
    return follower.flow()


@dataclass
class _Life:
    """Of a tensor: its nearest measured sites, when it was made, and used last."""

    sources: frozenset[str]
    born: int
    used: int


class _Follower(Walk):
    """Notes, for each tensor, its nearest measured sites and when it was last used."""

    def __init__(
        self, model: nn.Module, leaves: list[Any], sites: Iterable[Site]
    ) -> None:
        super().__init__(model)
        self._wanted = {site.entry: site for site in sites}
        self._clock = 0
        self._lives: Provenance[_Life] = Provenance()
        self._unseen = 0  # when a tensor of unknown origin last came up
        self._reached: dict[str, tuple[Site, int, int]] = {}
        self._sources: dict[str, frozenset[str]] = {}
        self._embeddings: list[bool] = []
        self._leaves = leaves
        for tensor in [*model.parameters(), *model.buffers()]:
            self._lives[tensor] = _Life(frozenset(), 0, 0)
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                self._lives[leaf] = _Life(frozenset([INPUT]), 0, 0)

    def flow(self) -> Flow:
        used = frozenset(
            index
            for index, leaf in enumerate(self._leaves)
            if isinstance(leaf, Tensor) and self._lives[leaf].used
        )
        return Flow(
            sites=tuple(site for site, _, _ in self._reached.values()),
            sources=self._sources,
            cuts=self._cuts(),
            inputs=used,
            embeddings=frozenset(i for i, fed in enumerate(self._embeddings) if fed),
        )

    def _cuts(self) -> frozenset[str]:
        """Return the sites whose output is all that is used afterwards."""
        dependent = sorted(
            (life.born, life.used, id(tensor))
            for tensor, life in self._lives.items()
            if life.sources
        )
        cuts = set()
        latest: list[tuple[int, int]] = []  # the two that are used longest: (used, id)
        place = 0
        for name, (_, time, output) in self._reached.items():
            while place < len(dependent) and dependent[place][0] <= time:
                _, used, key = dependent[place]
                latest = sorted([*latest, (used, key)])[-2:]
                place += 1
            others = [used for used, key in latest if key != output]
            if max([*others, self._unseen]) <= time:
                cuts.add(name)
        return frozenset(cuts)

    def entered(self, entry: int, args: Any, kwargs: Any) -> None:
        if site := self._wanted.get(entry):
            self._sources[site.name] = self._use((args, kwargs))

    def left(
        self,
        entry: int,
        module: nn.Module,  # noqa: ARG002
        args: Any,
        kwargs: Any,
        output: Any,
    ) -> None:
        for leaf in pytree.tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf not in self._lives:
                # Made by what no mode sees, a custom autograd function say.
                self._make(leaf, self._use((args, kwargs)))
        if site := self._wanted.get(entry):
            self._reach(site, output)

    def applied(
        self, entry: int, op: str, func: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        site = self._wanted.get(entry)
        if site is not None:
            self._sources[site.name] = self._use((args, kwargs))
        output = self.passed(op, func, args, kwargs)
        if site is not None:
            self._reach(site, output)
        return output

    def passed(
        self, name: str, func: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        self._clock += 1
        sources = self._use((args, kwargs))
        if name == "embedding":
            self._embeddings.append(bool(sources))
        output = func(*args, **kwargs)
        for leaf in pytree.tree_leaves(output):
            if isinstance(leaf, Tensor):
                self._make(leaf, sources)
        return output

    def _use(self, values: Any) -> frozenset[str]:
        sources: frozenset[str] = frozenset()
        for leaf in pytree.tree_leaves(values):
            if not isinstance(leaf, Tensor):
                continue
            if leaf not in self._lives:
                # Made where nobody looks: anything may have gone into it until now.
                self._unseen = self._clock
                self._make(leaf, frozenset())
            life = self._lives[leaf]
            life.used = self._clock
            sources |= life.sources
        return sources

    def _make(self, tensor: Tensor, sources: frozenset[str]) -> None:
        known = self._lives.get(tensor)
        born = self._clock if known is None else known.born
        self._lives[tensor] = _Life(sources, born, self._clock)

    def _reach(self, site: Site, output: Any) -> None:
        tensors = [x for x in pytree.tree_leaves(output) if isinstance(x, Tensor)]
        if not tensors or not self._lives[tensors[0]].sources:
            self._sources.pop(site.name, None)
            return
        self._make(tensors[0], frozenset([site.name]))
        self._reached[site.name] = (site, self._clock, id(tensors[0]))
