import math

import pytest
import torch

from lit_resnorm.data.gaussian import gaussian_inputs
from lit_resnorm.modules import LitMLP, LitResNet
from lit_resnorm.theory import (
    GAUSSIAN_NU1,
    activation_step,
    angle_asymptote,
    angles,
    coactivation,
    collapsed_log_power,
    contraction,
    fisher_theory,
    kernel_angles,
    layer_maps,
    least_squares_loss,
    log_pl_bound,
    log_pl_constant,
    pl_ratio,
    power_exponent,
    residual_step,
)


@pytest.mark.parametrize("variant", ["mlp", "res2", "res2_bn"])
def test_angles_are_those_of_the_kernel_recursion(variant):
    gram = torch.tensor([[1.0, 0.3], [0.3, 1.0]], dtype=torch.float64)
    theory = fisher_theory(variant, gram, 5, 10, population=True)
    expected = [kernel_angles(kernel)[0, 1] for kernel in theory.kernels]
    path = angles(variant, math.acos(0.3), 5)
    torch.testing.assert_close(path, torch.stack(expected), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variant", ["mlp", "res2"])
def test_angles_tend_to_their_asymptote(variant):
    path = angles(variant, math.pi / 2, 5000)
    ratios = path[[50, 500, 5000]] / angle_asymptote(
        variant, torch.tensor([50.0, 500.0, 5000.0])
    )
    errors = (ratios - 1).abs()
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.02


def test_batch_norm_keeps_angles_longer_than_a_skip_and_a_skip_longer_than_none():
    last = [float(angles(v, 1.5, 10)[-1]) for v in ("mlp", "res2", "res2_bn")]
    assert last == sorted(last)
    with pytest.raises(ValueError, match="res2_bn"):
        angle_asymptote("res2_bn", 10)


def test_coactivation_is_the_share_of_units_active_for_both():
    width = 200_000
    generator = torch.Generator().manual_seed(0)
    u, w = torch.randn(2, width, generator=generator, dtype=torch.float64)
    angle = 1.1
    v = math.cos(angle) * u + math.sin(angle) * w
    expected = float(coactivation(angle))
    error = math.sqrt(expected * (1 - expected) / width)
    assert float(((u > 0) & (v > 0)).double().mean()) == pytest.approx(
        expected, abs=4 * error
    )


def linear_net(variant, num_weights, width, gain, seed):
    torch.manual_seed(seed)
    if variant == "mlp":
        options = {"layers_per_block": 1}
    else:
        options = {"layers_per_block": 1 if variant == "res1" else 2}
    kind = LitMLP if variant == "mlp" else LitResNet
    return kind(
        num_weights // options["layers_per_block"],
        width,
        (width,),
        width,
        activation="linear",
        gain=gain,
        train_head=False,
        **options,
    ).double()


@pytest.mark.parametrize("variant", ["mlp", "res1", "res2"])
def test_layer_maps_multiply_to_the_linear_net(variant):
    model = linear_net(variant, 4, 6, 1.0, 0)
    weights = [p for n, p in model.named_parameters() if "blocks" in n]
    x = torch.randn(5, 6, dtype=torch.float64)
    h = x
    for a in layer_maps(variant, weights):
        h = h @ a.T
    head = model.net.head.fc.weight
    torch.testing.assert_close(model(x), h @ head.T, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("variant", ["mlp", "res1", "res2"])
@pytest.mark.parametrize("gain", [0.3, 1.0])
@pytest.mark.parametrize("num_examples", [5, 40])
def test_the_pl_constant_is_below_the_measured_ratio(variant, gain, num_examples):
    width = 10
    for seed in range(4):
        model = linear_net(variant, 6, width, gain, seed)
        weights = [p for n, p in model.named_parameters() if "blocks" in n]
        (x_ND,) = gaussian_inputs("powerlaw", [num_examples], width, seed)
        generator = torch.Generator().manual_seed(seed)
        teacher = torch.randn(width, width, generator=generator, dtype=torch.float64)
        y_ND = x_ND @ teacher + 0.1
        h = x_ND
        for index in range(len(model.net.blocks)):
            h = model.net.blocks[index](h)
        loss = (h - y_ND).square().sum() / (2 * num_examples)
        grads = torch.autograd.grad(loss, weights)
        squared = sum(float(g.square().sum()) for g in grads)
        rho = pl_ratio(squared, loss.item(), float(least_squares_loss(x_ND.T, y_ND.T)))
        covariance = x_ND.T @ x_ND / num_examples
        log_mu = float(log_pl_constant(variant, weights, covariance))
        assert math.isfinite(log_mu)
        assert log_mu <= math.log(rho)


@pytest.mark.parametrize("variant", ["mlp", "res1", "res2"])
def test_equal_diagonal_weights_attain_the_bound_from_norms(variant):
    # W = -tau I (tau I for mlp, +tau and -tau in res2) has all the extreme values.
    num, width, tau = 6, 3, 0.4
    eye = torch.eye(width, dtype=torch.float64)
    signs = [1.0] if variant == "mlp" else [-1.0]
    if variant == "res2":
        signs = [1.0, -1.0]
    weights = [signs[k % len(signs)] * tau * eye for k in range(num)]
    bound = log_pl_bound(variant, num, tau, tau)
    log_mu = float(log_pl_constant(variant, weights, eye))
    assert log_mu == pytest.approx(bound, abs=1e-12)


def test_two_singular_maps_leave_no_pl_constant_and_one_does():
    eye = torch.eye(2, dtype=torch.float64)
    singular = torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert float(log_pl_constant("mlp", [singular, eye], eye)) == 0
    assert float(log_pl_constant("mlp", [singular, singular], eye)) == -math.inf


def test_least_squares_loss_is_what_no_linear_map_explains():
    x = torch.tensor([[1.0, 1.0]], dtype=torch.float64)
    y = torch.tensor([[1.0, 3.0]], dtype=torch.float64)
    assert float(least_squares_loss(x, y)) == pytest.approx(0.5, abs=1e-12)


def test_contraction_of_a_perfectly_conditioned_loss_is_zero():
    assert contraction(math.log(2.0), 2.0) == pytest.approx(0, abs=1e-12)
    assert contraction(math.log(0.5), 2.0) == pytest.approx(0.75, abs=1e-12)


def test_the_gaussian_activation_step_is_that_of_a_rectified_gaussian():
    # z Gaussian: mu_2(relu z) = 1/2 - 1/(2 pi), half of the noise passes.
    assert activation_step() ** 2 == pytest.approx(0.5 / (0.5 - 0.5 / math.pi))
    assert pytest.approx(math.sqrt(2 / math.pi)) == GAUSSIAN_NU1


def test_unit_steps_multiply_to_the_power_law():
    step = 1.1
    logs = {}
    log_chi = 0.0
    for index in range(1, 40001):
        log_chi += math.log(residual_step(step, index))
        logs[index] = log_chi
    slope = (logs[40000] - logs[20000]) / math.log(2)
    assert slope == pytest.approx(power_exponent(step), rel=1e-3)


def test_collapsed_log_power_has_the_published_histograms_moments():
    theory = collapsed_log_power(200, 128)
    assert theory.mean == pytest.approx(-3.91, abs=0.005)
    assert theory.variance == pytest.approx(7.81, abs=0.005)


def test_a_collapsed_net_multiplies_its_power_as_predicted():
    # One direction through He layers: the power's log is a sum of independent terms.
    width, depth, draws = 64, 10, 400
    torch.manual_seed(0)
    h = torch.randn(draws, width, dtype=torch.float64).relu()
    start = h.square().mean(1).log()
    for _ in range(depth):
        weights = torch.randn(draws, width, width, dtype=torch.float64)
        h = torch.einsum("bij,bj->bi", weights * math.sqrt(2 / width), h).relu()
    change = h.square().mean(1).log() - start
    theory = collapsed_log_power(depth, width)
    error = math.sqrt(theory.variance / draws)
    # the next order is 1/D of the leading one a layer
    assert float(change.mean()) == pytest.approx(
        theory.mean, abs=4 * error + 5 * abs(theory.mean) / width
    )
    ratio = float(change.var()) / theory.variance
    assert ratio == pytest.approx(1, abs=4 * math.sqrt(2 / draws) + 10 / width)
