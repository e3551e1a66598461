"""Many random networks: side by side, over draws, and the laws they follow."""

import math

import pytest
import torch
from torch import nn

from lit_resnorm.measures.copies.side_by_side import side_by_side
from lit_resnorm.measures.moments import propagate, signal_and_noise
from lit_resnorm.nets import Style, stacked_net

NORMED = Style(norm="batch", eps=1e-3)
FAMILIES = {
    "vanilla": {"style": Style(), "residual": False, "layers_per_block": 1},
    "bn_ff": {"style": NORMED, "residual": False, "layers_per_block": 1},
    "res": {"style": Style(), "order": "pre"},
    "bn_res": {"style": NORMED, "order": "pre"},
}


def family(name, depth, width, in_shape=(20,), **options):
    return stacked_net(
        in_shape, 10, depth=depth, width=width, **{**FAMILIES[name], **options}
    )


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("in_shape", "kernel"), [((20,), None), ((2, 5, 5), 3)])
def test_networks_side_by_side_give_what_each_gives_alone(name, in_shape, kernel):
    torch.manual_seed(0)
    nets = [family(name, 3, 6, in_shape, kernel_size=kernel).double() for _ in range(3)]
    inputs = [torch.randn(8, *in_shape, dtype=torch.float64) for _ in nets]
    joined = side_by_side(nets)
    outputs = torch.cat([net(x) for net, x in zip(nets, inputs, strict=True)], 1)
    torch.testing.assert_close(joined(torch.cat(inputs, 1)), outputs)

    together = signal_and_noise(joined, torch.cat(inputs, 1), num_nets=3)
    for place, (net, x) in enumerate(zip(nets, inputs, strict=True)):
        alone = signal_and_noise(net, x)
        for site, own in zip(together.sites, alone.sites, strict=True):
            torch.testing.assert_close(site.mu2[place], own.mu2)
            if own.effective_rank is not None:
                torch.testing.assert_close(
                    site.effective_rank[place], own.effective_rank
                )


def test_a_layer_that_cannot_stand_side_by_side_is_named():
    nets = [nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(2)]
    with pytest.raises(ValueError, match="1 is a LayerNorm"):
        side_by_side(nets)


def draw():
    return family("bn_ff", 4, 16), torch.randn(32, 20)


def test_a_draw_does_not_depend_on_how_draws_share_passes():
    quantities = ("mu2", "effective_rank")
    alone = propagate(draw, 5, quantities=quantities)
    together = propagate(draw, 5, quantities=quantities, nets_at_once=3)
    assert alone.sites == together.sites
    for quantity in quantities:
        torch.testing.assert_close(
            alone.samples[quantity],
            together.samples[quantity],
            rtol=1e-4,
            atol=0,
            equal_nan=True,
        )


def test_draws_differ_and_the_random_state_is_left_alone():
    state = torch.get_rng_state()
    result = propagate(draw, 3)
    assert torch.equal(state, torch.get_rng_state())
    last = result.samples["log_sensitivity"][:, -1]
    assert len(set(last.tolist())) == 3
    again = propagate(draw, 2)
    assert torch.equal(again.samples["delta"][:, -1], result.samples["delta"][:2, -1])
    other = propagate(draw, 2, seed=1)
    assert not torch.equal(other.samples["nu2"], again.samples["nu2"])


def test_a_network_may_be_filled_anew_each_draw():
    net, _ = draw()
    weights = [p for p in net.parameters() if p.ndim == 2]

    def refill():
        for weight in weights:
            nn.init.normal_(weight)
        return net, torch.randn(32, 20)

    samples = propagate(refill, 3).samples["log_sensitivity"]
    assert len(set(samples[:, -1].tolist())) == 3


def test_means_spreads_and_quantiles_are_those_of_the_samples():
    result = propagate(draw, 4, quantities=("mu2", "delta_phi"))
    samples = result.samples["mu2"]
    assert samples.shape == (4, len(result.sites))
    torch.testing.assert_close(result.mean("mu2"), samples.mean(0))
    torch.testing.assert_close(result.deviation("mu2"), samples.std(0))
    torch.testing.assert_close(result.quantile("mu2", 0.5), samples.quantile(0.5, 0))
    assert result.at("delta_phi", "activation").shape == (4, 4)
    assert result.at("delta_phi", "activation").isfinite().all()
    assert result.at("delta_phi", "norm").isnan().all()
    assert result.at("mu2", ending="act1").shape == (4, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"num_draws": 0}, "num_draws is 0"), ({"nets_at_once": 0}, "nets_at_once is 0")],
)
def test_counts_below_one_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        propagate(draw, **{"num_draws": 1, **arguments})


# Fixed seeds and generous bands about the values that Labatie (2019) stored.


def test_batch_norm_feed_forward_grows_by_a_fifth_a_layer():
    result = propagate(
        lambda: (family("bn_ff", 40, 128, (200,)), torch.randn(64, 200)),
        3,
        quantities=("log_sensitivity",),
        nets_at_once=3,
    )
    log_chi = result.at("log_sensitivity", "activation").mean(0)
    slope = (log_chi[-1] - log_chi[9]) / 30
    assert 0.19 < slope < 0.22


def test_a_branch_with_batch_norm_has_a_share_of_one_over_its_place():
    result = propagate(
        lambda: (family("bn_res", 30, 128, (200,)), torch.randn(64, 200)),
        3,
        quantities=("branch_share",),
        nets_at_once=3,
    )
    shares = result.at("branch_share", "addition").mean(0)
    for unit in (5, 10, 20, 30):
        assert shares[unit - 1].item() == pytest.approx(1 / (unit + 1), rel=0.2)


def test_a_branch_without_batch_norm_has_a_share_of_one_half():
    # Once the examples lie on a line; before, ReLU shrinks the variance of the branch.
    result = propagate(
        lambda: (family("res", 60, 64, (200,)), torch.randn(64, 200)),
        4,
        quantities=("branch_share",),
        nets_at_once=4,
    )
    shares = result.at("branch_share", "addition").mean(0)
    assert shares[-20:].mean().item() == pytest.approx(1 / 2, rel=0.2)
    assert shares[0] < shares[-20:].mean()


def test_the_second_moment_of_a_collapsed_vanilla_net_is_log_normal():
    # Mean -5 l / 2D and variance 5 l / D once the batch lies on a line, 0 and 0 of the
    # logarithm before: between half of either and the whole at l = 50.
    width, layers, num_draws = 32, 50, 40
    result = propagate(
        lambda: (family("vanilla", layers, width), torch.randn(8, 20)),
        num_draws,
        quantities=("nu2",),
        sites=r"blocks\.49\.act1",
        nets_at_once=40,
    )
    log_nu2 = result.at("nu2", "activation").log()
    variance = 5 * layers / width
    standard_error = math.sqrt(variance / num_draws)
    assert -variance / 2 - 4 * standard_error < log_nu2.mean()
    assert log_nu2.mean() < -variance / 4 + 4 * standard_error
    spread = variance * math.sqrt(2 / num_draws)
    assert variance / 2 - 4 * spread < log_nu2.var() < variance + 4 * spread
