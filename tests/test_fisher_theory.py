"""Measured Fisher matrices of random nets beside the theory's recursion."""

import pytest
import torch

from lit_resnorm.measures.fisher import fisher_spectrum
from lit_resnorm.nets import stacked_net
from lit_resnorm.nets.layers import Style
from lit_resnorm.theory.fisher import fisher_theory

SWITCHES = {
    "mlp": {"residual": False, "layers_per_block": 1},
    "res2": {},
    "res2_bn": {"norm": "batch"},
}


def gaussian_inputs(num, dim):
    """Centred per feature, each sample rescaled to norm sqrt(D)."""
    x = torch.randn(num, dim)
    x = x - x.mean(dim=0)
    return x * dim**0.5 / x.norm(dim=1, keepdim=True)


def block_spectrum(kind, depth, width, x):
    style_keys = Style.__annotations__
    switches = SWITCHES[kind]
    style = Style(**{k: v for k, v in switches.items() if k in style_keys})
    others = {k: v for k, v in switches.items() if k not in style_keys}
    net = stacked_net((width,), 1, depth=depth, width=width, style=style, **others)
    blocks = {n for n, _ in net.named_parameters() if "blocks" in n}
    for name, parameter in net.named_parameters():
        # The theory counts the blocks' weights, without affine parameters.
        parameter.requires_grad_(name in blocks and parameter.ndim == 2)
    return fisher_spectrum(net, x, output="gaussian", num_eigenvalues=1, tol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("depth", [2, 5])
@pytest.mark.parametrize("kind", SWITCHES)
def test_mean_and_largest_eigenvalue_are_those_of_the_kernel_recursion(kind, depth):
    torch.manual_seed(0)
    width, num, draws = 300, 60, 40
    x = gaussian_inputs(num, width)
    found = [block_spectrum(kind, depth, width, x) for _ in range(draws)]
    theory = fisher_theory(kind, x.double() @ x.double().T / width, depth, width)
    for measured, expected in (
        (torch.tensor([f.mean for f in found]), theory.mean),
        (torch.tensor([f.max for f in found]), theory.max),
    ):
        error = float(measured.std()) / draws**0.5
        # The theory's own error at this width is below 2 %.
        assert float(measured.mean()) == pytest.approx(
            expected, abs=0.02 * expected + 3 * error
        )
