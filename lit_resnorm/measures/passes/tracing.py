"""Finding the sites of a network by following one forward pass.

Modules are seen by hooks, functions by a torch function mode, so functional and
in-place activations and plain `h + f(h)` are found in any network as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor, nn
from torch.nn.modules import activation as activation_modules
from torch.utils import _pytree as pytree

from lit_resnorm.measures.passes.forward_walk import ACTIVATION_NAMES, Walk
from lit_resnorm.measures.passes.sites import Site, SiteKind, first_tensor

Origin = TypeVar("Origin")

NORM_MODULES = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)
_CHANNELS_SECOND = frozenset(
    [
        "conv1d",
        "conv2d",
        "conv3d",
        "conv_transpose1d",
        "conv_transpose2d",
        "conv_transpose3d",
        "batch_norm",
        "group_norm",
        "instance_norm",
    ]
)
_CHANNELS_LAST = frozenset(
    ["linear", "layer_norm", "rms_norm", "embedding", "multi_head_attention_forward"]
)
_REARRANGING = frozenset(
    [
        "permute",
        "transpose",
        "movedim",
        "moveaxis",
        "swapaxes",
        "reshape",
        "view",
        "flatten",
        "unflatten",
    ]
)


def trace(model: nn.Module, forward: Callable[[], Any]) -> tuple[Site, ...]:
    """Return the sites of one forward pass, in the order of execution.

    Args:
        model: Names are those of its submodules.
        forward: One pass of the model, on a few examples.
    """
    tracer = _Tracer(model)
    with tracer:
        forward()
    return tracer.sites()


class Provenance(Generic[Origin]):
    """What the tensors of one pass come from.

    Known by identity: each tensor is kept, so that its id stays its own.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[Tensor, Origin]] = {}

    def __contains__(self, tensor: Tensor) -> bool:
        return id(tensor) in self._known

    def __getitem__(self, tensor: Tensor) -> Origin:
        return self._known[id(tensor)][1]

    def __setitem__(self, tensor: Tensor, origin: Origin) -> None:
        self._known[id(tensor)] = tensor, origin

    def get(self, value: Any) -> Origin | None:
        """Return the origin of a value; None of what is no tensor of the pass."""
        known = self._known.get(id(value))
        return None if known is None else known[1]

    def items(self) -> Iterator[tuple[Tensor, Origin]]:
        """Return all tensors with their origins."""
        return iter(self._known.values())


@dataclass(frozen=True)
class _Ancestry:
    """What a tensor of the traced pass comes from.

    Attributes:
        ancestors: Bit set of the operations since the input, its own included.
        channel_dim: Dimension that counts channels, where an operation said so.
    """

    ancestors: int
    channel_dim: int | None


class _Tracer(Walk):
    """Finds the sites: which modules are leaves, which additions end a branch.

    Every tensor that derives from the input carries the set of operations that led to
    it; parameters and constants carry none. Two operands of an addition that share an
    operation parted there: a residual addition. A position embedding shares none.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._origins: Provenance[_Ancestry] = Provenance()
        self._num_operations = 0
        self._found: dict[int, dict[str, Any]] = {}
        self._parents: set[int] = set()
        own = [*model.parameters(), *model.buffers()]
        for tensor in own:
            self._origins[tensor] = _Ancestry(0, None)

    def sites(self) -> tuple[Site, ...]:
        kept = [
            (entry, fields)
            for entry, fields in sorted(self._found.items())
            if entry not in self._parents
        ]
        digits = max(3, len(str(len(kept) - 1)))
        return tuple(
            Site(
                name=f"{place:0{digits}d}.{fields.pop('path')}",
                entry=entry,
                **fields,
            )
            for place, (entry, fields) in enumerate(kept)
        )

    def entered(self, entry: int, args: Any, kwargs: Any) -> None:  # noqa: ARG002
        if len(self.frames) > 1 and not self._makes_weights(self.frames[-1][1]):
            self._parents.add(self.frames[-2][0])

    def left(
        self, entry: int, module: nn.Module, args: Any, kwargs: Any, output: Any
    ) -> None:
        ancestors = self._ancestors((args, kwargs))
        for leaf in pytree.tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf not in self._origins:
                self._note(leaf, ancestors, None)
        tensor = first_tensor(output)
        if tensor is None or self._makes_weights(module):
            return
        op = type(module).__name__.lower().removeprefix("parametrized")
        self._found[entry] = {
            "path": self._names[id(module)] or op,
            "kind": _module_kind(module, op),
            "op": op,
            "channel_dim": self._channel_dim(tensor),
            "module": module,
        }

    def applied(
        self, entry: int, op: str, func: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        self._ancestors((args, kwargs))
        before = [self._origins.get(value) for value in args[:2]]
        output = self.passed(op, func, args, kwargs)
        _, module, path = self.frames[-1] if self.frames else (0, None, "")
        fields: dict[str, Any] = {
            "path": f"{path}.{op}".strip("."),
            "op": op,
            "channel_dim": self._channel_dim(output),
        }
        if op != "add":
            # An activation module's own call is that module's site, not a second one.
            if not _is_activation(module):
                self._found[entry] = {**fields, "kind": "activation"}
        elif before[0] and before[1] and args[0].shape == args[1].shape:
            first, second = before[0].ancestors, before[1].ancestors
            if not first & second:
                return output
            alone = (first & ~second).bit_count(), (second & ~first).bit_count()
            skip = int(alone[1] < alone[0])
            self._found[entry] = {**fields, "kind": "addition", "skip": skip}
        return output

    def passed(
        self, name: str, func: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        ancestors = self._ancestors(_operands(name, args, kwargs))
        source = first_tensor(args)
        origin = self._origins.get(source)
        source_dim = None if origin is None else origin.channel_dim
        output = func(*args, **kwargs)
        if ancestors:
            self._num_operations += 1
            ancestors |= 1 << self._num_operations
        for leaf in pytree.tree_leaves(output):
            if isinstance(leaf, Tensor):
                same = source is not None and leaf.ndim == source.ndim
                inherited = source_dim if same and name not in _REARRANGING else None
                self._note(leaf, ancestors, _channel_dim_after(name, inherited))
        return output

    def _makes_weights(self, module: nn.Module) -> bool:
        # A parametrization is applied to the weights of its layer, not to the signal.
        return ".parametrizations." in f".{self._names[id(module)]}."

    def _ancestors(self, values: Any) -> int:
        ancestors = 0
        for leaf in pytree.tree_leaves(values):
            if isinstance(leaf, Tensor):
                if leaf not in self._origins:  # an input
                    self._num_operations += 1
                    self._note(leaf, 1 << self._num_operations, None)
                ancestors |= self._origins[leaf].ancestors
        return ancestors

    def _note(self, tensor: Tensor, ancestors: int, channel_dim: int | None) -> None:
        self._origins[tensor] = _Ancestry(ancestors, channel_dim)

    def _channel_dim(self, tensor: Tensor) -> int:
        origin = self._origins.get(tensor)
        if origin is not None and origin.channel_dim is not None:
            return origin.channel_dim
        return 1 if tensor.ndim >= 4 else -1


def _operands(name: str, args: Any, kwargs: Any) -> Any:
    """Return the arguments that a result's values, not only its shape, come from."""
    if name.endswith("_like") or name.startswith("new_"):
        return ()
    return args[:1] if name.endswith("_as") else (args, kwargs)


def _is_activation(module: nn.Module | None) -> bool:
    return (
        module is not None
        and type(module).__module__ == activation_modules.__name__
        and type(module).__name__.lower() in ACTIVATION_NAMES
    )


def _module_kind(module: nn.Module, op: str) -> SiteKind:
    if _is_activation(module) or op in ACTIVATION_NAMES:
        return "activation"
    return "norm" if isinstance(module, NORM_MODULES) else "module"


def _channel_dim_after(name: str, inherited: int | None) -> int | None:
    if name in _CHANNELS_SECOND:
        return 1
    return -1 if name in _CHANNELS_LAST else inherited
