import math

import pytest
import torch

from lit_resnorm.data.gaussian import gaussian_inputs
from lit_resnorm.measures.passes.untouched import untouched
from lit_resnorm.modules import LitMLP, LitResNet, LitResNetBN
from lit_resnorm.theory import (
    averaged_maxima,
    eigenvalue_bounds,
    fisher_theory,
    forward_power,
    max_eigenvalue_asymptote,
    mean_eigenvalue,
    relu_kernel,
    step_kernel,
)

CLASSES = {"mlp": LitMLP, "res2": LitResNet, "res2_bn": LitResNetBN}


def jacobian(model, x_ND):
    """Gradients of the first output over the blocks' weights, (N, P), frozen norms."""
    weights = [p for name, p in model.named_parameters() if "blocks" in name]
    with untouched(model) as run:
        output_N = run(lambda: model(x_ND))[:, 0]
        grads = torch.autograd.grad(
            output_N, weights, torch.eye(len(x_ND)).double(), is_grads_batched=True
        )
    return torch.cat([grad.flatten(1) for grad in grads], 1)


def random_net(variant, depth, width, seed):
    torch.manual_seed(seed)
    return CLASSES[variant](depth, width, (width,), 1).double()


@pytest.mark.parametrize("c", [-1.0, -0.3, 0.0, 0.7, 1.0])
def test_the_kernels_are_the_moments_of_rectified_gaussian_pairs(c):
    # Gauss-Hermite over (u, v) with v = c u + sqrt(1 - c^2) w, by polar angle: u and v
    # are both positive on an arc of pi - arccos(c); the radius integrates exactly.
    angle = math.acos(c)
    phi = torch.linspace(angle - math.pi / 2, math.pi / 2, 20001, dtype=torch.float64)
    products = phi.cos() * (phi - angle).cos()
    second = torch.trapezoid(products, phi) / math.pi  # E r^2 = 2 over 2 pi
    torch.testing.assert_close(relu_kernel(c) / 2, second, rtol=1e-7, atol=1e-9)
    arc = (math.pi - angle) / (2 * math.pi)
    torch.testing.assert_close(
        step_kernel(c) / 2, torch.tensor(arc, dtype=torch.float64), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("variant", CLASSES)
@pytest.mark.parametrize("depth", [1, 2, 7])
def test_the_mean_eigenvalue_of_one_example_is_the_closed_form(variant, depth):
    one = torch.ones(1, 1)
    theory = fisher_theory(variant, one, depth, 40, population=True)
    assert theory.mean == pytest.approx(mean_eigenvalue(variant, depth, 40), rel=1e-12)
    powers = [float(k) for k in theory.kernels]
    expected = [forward_power(variant, index) for index in range(depth + 1)]
    assert powers == pytest.approx(expected, rel=1e-12)


def test_batch_norms_backward_kernel_is_the_published_product():
    theory = fisher_theory("res2_bn", torch.ones(1, 1), 6, 10, population=True)
    expected = [(6 + 2) / (index + 2) for index in range(7)]
    assert [float(b) for b in theory.backward] == pytest.approx(expected, rel=1e-12)


def test_the_largest_eigenvalue_tends_to_its_asymptote():
    # Of many orthogonal inputs only the off-diagonal entries of Theta count; all are
    # equal, so two inputs show them. 0.22 of res2 is a rounded fit at depths of tens.
    eye = torch.eye(2)
    ratios = [
        float(fisher_theory("mlp", eye, depth, 10).theta[0, 1])
        / max_eigenvalue_asymptote("mlp", depth, 10)
        for depth in (30, 300, 3000)
    ]
    errors = [abs(ratio - 1) for ratio in ratios]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.02
    res2 = float(fisher_theory("res2", eye, 20, 10).theta[0, 1])
    assert res2 == pytest.approx(max_eigenvalue_asymptote("res2", 20, 10), rel=0.1)


@pytest.mark.parametrize("variant", CLASSES)
def test_bounds_enclose_the_largest_eigenvalue(variant):
    (x_ND,) = gaussian_inputs("gauss_mean", [30], 50, 1)
    theory = fisher_theory(variant, x_ND @ x_ND.T / 50, 4, 50)
    bounds = eigenvalue_bounds(theory.theta)
    assert bounds.lower <= theory.max <= bounds.frobenius <= bounds.trace
    assert bounds.uniform <= theory.max


@pytest.mark.parametrize("variant", CLASSES)
def test_the_recursion_predicts_measured_nets_at_width_100(variant):
    depth, width, num, draws = 3, 100, 30, 12
    (x_ND,) = gaussian_inputs("gauss", [num], width, 0)
    theory = fisher_theory(variant, x_ND @ x_ND.T / width, depth, width)
    means, maxima = [], []
    for seed in range(draws):
        jac_NP = jacobian(random_net(variant, depth, width, seed), x_ND)
        gram = jac_NP @ jac_NP.T / num
        means.append(float(gram.trace()) / jac_NP.shape[1])
        maxima.append(float(torch.linalg.eigvalsh(gram)[-1]))
    assert jac_NP.shape[1] == theory.num_parameters
    for measured, expected in ((means, theory.mean), (maxima, theory.max)):
        values = torch.tensor(measured, dtype=torch.float64) / expected
        error = float(values.std()) / math.sqrt(draws)
        # four standard errors, and corrections of relative order L / D
        assert abs(float(values.mean()) - 1) < 4 * error + 2 * depth / width


@pytest.mark.parametrize("variant", ["mlp", "res2"])
def test_weight_averaged_maxima_are_those_of_random_nets(variant):
    # By symmetry a top eigenvector of each matrix's block reads the sum of a unit's
    # inputs; its Rayleigh quotient is an unbiased estimate, unlike eigenvalues of a
    # sampled average.
    depth, width, num, draws = 2, 32, 16, 150
    estimates = []
    for seed in range(draws):
        (x_ND,) = gaussian_inputs("gauss", [num], width, seed)
        jac_NP = jacobian(random_net(variant, depth, width, seed), x_ND)
        grads = jac_NP.view(num, -1, width, width)
        estimates.append((grads.sum(3) ** 2 / width).mean((0, 2)))
    measured = torch.stack(estimates)
    expected = torch.tensor(averaged_maxima(variant, depth, width)).double()
    error = measured.std(0) / math.sqrt(draws) / expected
    # four standard errors, and corrections of relative order L / D
    assert bool(
        ((measured.mean(0) / expected - 1).abs() < 4 * error + depth / width).all()
    )


def test_a_batch_without_degrees_of_freedom_is_refused():
    with pytest.raises(ValueError, match="effective degrees of freedom"):
        fisher_theory("res2_bn", torch.eye(2), 1, 10)


def test_another_variant_is_refused_by_name():
    with pytest.raises(ValueError, match="'res3'"):
        fisher_theory("res3", torch.eye(4), 1, 10)
