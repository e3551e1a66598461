"""What theory says of a stack of blocks at initialisation, by depth."""

from __future__ import annotations

from itertools import accumulate
from operator import mul

from lit_resnorm.nets.layers import Style
from lit_resnorm.theory.moments import (
    activation_step,
    residual_share,
    residual_step,
)

__all__ = ["DepthTheory", "stack_theory"]

DepthTheory = dict[str, float | list[float]]
"""By quantity of `MomentTracer`: one value for all sites, or one a site that has it;
`growth` is chi along the net, by layer or unit."""


def stack_theory(
    style: Style, *, depth: int, residual: bool, order: str, layers_per_block: int
) -> DepthTheory:
    """Return what `MomentTracer` should see in a wide net with random weights.

    Empty where the theory says nothing: it holds for ReLU nets with He's variances
    and unscaled branches.

    Source: Labatie (2019), arXiv 1811.03087: effective ranks fall to 1 without batch
    norm, growth through an activation with it [P]; shares of branches, and chi as the
    product of those growths for Gaussian pre-activations, derived [D].

    Args:
        style: Norm, activation, weights and scale of the layers.
        depth: Number of blocks.
        residual: Whether blocks have skip connections.
        order: `post` or `pre`.
        layers_per_block: Weight layers in a block.
    """
    usual = ("relu", "plain", "unscaled", 1.0)
    if (style.activation, style.weight, style.scale, style.gain) != usual:
        return {}
    units = range(1, depth + 1)
    theory: DepthTheory = {}
    if style.norm == "none":
        theory["effective_rank"] = 1.0
        if residual and layers_per_block == 2:
            theory["branch_share"] = [residual_share("res", unit) for unit in units]
    elif style.norm == "batch":
        step = activation_step()
        theory["delta_phi"] = step
        if residual and order == "pre":
            theory["branch_share"] = [residual_share("res_bn", unit) for unit in units]
            steps = [residual_step(step, unit, layers_per_block) for unit in units]
            theory["growth"] = [*accumulate(steps, mul)]
        elif not residual:
            num_layers = depth * layers_per_block
            theory["growth"] = [step**layer for layer in range(1, num_layers + 1)]
    return theory
