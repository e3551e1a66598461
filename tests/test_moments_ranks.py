"""Two processes measure what one does, to the rounding that the network multiplies."""

import pytest
import torch
from moment_references import (
    absolute_moment,
    branch_share,
    central_moment,
    effective_rank,
    identity_deviation,
    raw_moment,
)
from ranks import run_ranks, sum_over_ranks

from lit_resnorm.measures.moments import signal_and_noise
from lit_resnorm.nets import Style, stacked_net

QUANTITIES = ("mu2", "nu2", "mu4", "nu1", "effective_rank", "log_sensitivity", "delta")
pytestmark = pytest.mark.ddp


def share(x, rank, first):
    """The first `first` examples for rank 0, the others for rank 1."""
    return x[:first] if rank == 0 else x[first:]


def table(profile):
    """All values of a profile, one row a site; NaN where there is none."""
    rows = [
        [
            float("nan") if getattr(site, q) is None else getattr(site, q)
            for q in QUANTITIES
        ]
        for site in profile.sites
    ]
    return torch.tensor(rows, dtype=torch.float64)


def measured(rank, net, x, first, options):
    profile = signal_and_noise(
        net, share(x, rank, first), reduce=sum_over_ranks, **options
    )
    return table(profile)


@pytest.mark.parametrize("first", [16, 21, 32])
@pytest.mark.parametrize(
    ("depth", "dtype"),
    [
        (30, torch.float32),
        pytest.param(100, torch.float64, marks=pytest.mark.slow),
    ],
)
def test_a_deep_batch_norm_net_over_uneven_and_empty_shards(depth, dtype, first):
    torch.manual_seed(0)
    style = Style(norm="batch", eps=1e-3)
    net = stacked_net(
        (20,),
        10,
        depth=depth,
        width=24,
        style=style,
        residual=False,
        layers_per_block=1,
    ).to(dtype)
    x = torch.randn(32, 20, dtype=dtype)
    both = run_ranks(measured, 2, net, x, first, {})
    whole = table(signal_and_noise(net, x))
    # The network multiplies rounding by chi: no program can promise more than that.
    chi = whole[:, QUANTITIES.index("log_sensitivity")].exp()
    tolerance = 1e-6 + chi[:, None] * torch.finfo(dtype).eps
    known = ~whole.isnan()
    assert torch.equal(known, ~both[0].isnan())
    error = (both[0] - whole).abs() / whole.abs().clamp_min(1)
    assert (error <= tolerance)[known].all()
    torch.testing.assert_close(both[0], both[1], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("options", [{"norm_mode": "eval"}, {"num_directions": 2}])
@pytest.mark.parametrize("num_chunks", [1, 3])
def test_convolutions_in_chunks_over_ranks(options, num_chunks):
    torch.manual_seed(0)
    style = Style(norm="batch")
    net = stacked_net((3, 6, 6), 10, depth=3, width=8, kernel_size=3, style=style)
    x = torch.randn(11, 3, 6, 6)
    options = {**options, "num_chunks": num_chunks}
    both = run_ranks(measured, 2, net, x, 9, options)
    torch.testing.assert_close(
        both[0],
        table(signal_and_noise(net, x, **options)),
        rtol=1e-6,
        atol=1e-6,
        equal_nan=True,
    )


FUNCTIONS = {
    "raw": lambda x, reduce: raw_moment(x, 3, reduce=reduce),
    "absolute": lambda x, reduce: absolute_moment(x, reduce=reduce),
    "central": lambda x, reduce: central_moment(x, 4, reduce=reduce),
    "rank": lambda x, reduce: effective_rank(x, reduce=reduce),
    "share": lambda x, reduce: branch_share(x, x**2, reduce=reduce),
    "deviation": lambda x, reduce: identity_deviation(x, x**2, reduce=reduce),
}


def of_share(rank, name, x, first):
    return FUNCTIONS[name](share(x, rank, first), sum_over_ranks)


@pytest.mark.parametrize("first", [4, 9])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_moments_of_shards_are_those_of_the_whole(name, first):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(9, 12, dtype=torch.float64, generator=generator)
    here, there = run_ranks(of_share, 2, name, x, first)
    expected = FUNCTIONS[name](x, lambda t: t.clone())
    torch.testing.assert_close(here, expected, rtol=1e-9, atol=0)
    assert torch.equal(here, there)
