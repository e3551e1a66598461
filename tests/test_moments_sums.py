"""Moments of tensors against closed forms, in one piece, in chunks, over ranks."""

import math

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

from lit_resnorm.measures.moments import ChannelSums, NoiseSums

EXACT = {"rtol": 1e-9, "atol": 1e-12}
SMALL = torch.tensor([[1.0, 10.0], [2.0, 10.0], [6.0, 10.0]], dtype=torch.float64)


def maps(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=generator, dtype=torch.float64) ** 3


def test_raw_moments_are_means_of_powers():
    assert raw_moment(SMALL, 1) == pytest.approx(39 / 6)
    assert raw_moment(SMALL, 2) == pytest.approx(341 / 6)
    assert absolute_moment(-SMALL) == pytest.approx(39 / 6)


def test_central_moments_are_about_each_channels_own_mean():
    assert central_moment(SMALL, 2) == pytest.approx((4 + 1 + 9) / 6)
    assert central_moment(SMALL, 4) == pytest.approx((16 + 1 + 81) / 6)
    assert central_moment(SMALL, 1) == pytest.approx(0)


def test_positions_count_as_examples():
    x = maps(5, 3, 4, 4)
    rows = x.movedim(1, -1).flatten(0, 2)
    for p in (2, 3, 4):
        torch.testing.assert_close(central_moment(x, p), central_moment(rows, p))
    torch.testing.assert_close(effective_rank(x), effective_rank(rows))
    torch.testing.assert_close(
        effective_rank(x.movedim(1, -1), channel_dim=-1), effective_rank(rows)
    )


def test_effective_rank_of_known_variances():
    # Orthogonal columns of variances 3, 2, 1: (3 + 2 + 1) / 3.
    signs = torch.tensor([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1.0]])
    x = signs.double() * torch.tensor([3.0, 2.0, 1.0]).double().sqrt() + 5
    torch.testing.assert_close(effective_rank(x), torch.tensor(2.0).double(), **EXACT)


@pytest.mark.parametrize("shape", [(6, 40), (40, 6), (7, 7), (3, 8, 2, 2), (2, 600)])
def test_effective_rank_from_gram_and_from_covariance_agree(shape):
    x = maps(*shape)
    rows = x.movedim(1, -1).flatten(0, -2)
    values = torch.linalg.eigvalsh(torch.cov(rows.T, correction=0))
    expected = values.sum() / values[-1]
    torch.testing.assert_close(effective_rank(x), expected, **EXACT)
    # A reduce that is not `identity` always takes the covariance of the channels.
    over_ranks = effective_rank(x, reduce=lambda t: t.clone())
    torch.testing.assert_close(over_ranks, expected, **EXACT)
    assert 1 <= effective_rank(x) <= min(len(rows) - 1, rows.shape[1])


def test_a_line_has_effective_rank_one_and_a_point_has_none():
    line = torch.outer(torch.arange(5.0), torch.arange(1.0, 4.0)).double() + 1
    torch.testing.assert_close(effective_rank(line), torch.ones(()).double(), **EXACT)
    assert effective_rank(torch.full((5, 3), 0.1)).isnan()
    assert effective_rank(torch.full((1, 3), 0.1)).isnan()


@pytest.mark.parametrize("num_chunks", [1, 3, 7])
@pytest.mark.parametrize("shape", [(23, 5), (23, 50), (9, 4, 6, 6)])
def test_sums_over_chunks_give_the_moments_of_the_whole(num_chunks, shape):
    x = maps(*shape) + torch.arange(float(shape[1])).view(-1, *[1] * (len(shape) - 2))
    sums = ChannelSums(fourth=True, covariance=True)
    for chunk in x.tensor_split(num_chunks):
        sums.add(chunk)
    moments = sums.finish()
    expected = {
        "mu2": central_moment(x, 2),
        "nu2": raw_moment(x, 2),
        "mu4": central_moment(x, 4),
        "nu1": absolute_moment(x),
        "effective_rank": effective_rank(x),
    }
    for name, value in expected.items():
        torch.testing.assert_close(getattr(moments, name), value, **EXACT)
    assert moments.count == x.numel() / x.shape[1]


def test_sums_do_not_depend_on_the_memory_format():
    x = maps(4, 6, 5, 5).float()
    results = []
    for layout in (x, x.contiguous(memory_format=torch.channels_last)):
        sums = ChannelSums(fourth=True, covariance=True)
        sums.add(layout)
        results.append(sums.finish())
    torch.testing.assert_close(results[0].mu4, results[1].mu4)
    torch.testing.assert_close(results[0].effective_rank, results[1].effective_rank)


def test_a_large_mean_cancels_no_digits():
    x = maps(64, 4)
    shifted = x.float() + 2.0**12  # exact to 2**-11 of the data's unit
    sums = ChannelSums()
    sums.add(shifted)
    exact = central_moment(shifted, 2)
    torch.testing.assert_close(sums.finish().mu2, exact, rtol=1e-12, atol=0)


def test_constant_channels_have_variance_zero_exactly():
    sums = ChannelSums(fourth=True)
    sums.add(torch.full((1000, 3), 0.1))
    moments = sums.finish()
    assert moments.mu2 == 0
    assert moments.mu4 == 0


def test_noise_sums_join_powers_of_different_exponents():
    dx = maps(12, 4)
    sums = NoiseSums()
    sums.add(dx[:5] * 2.0**-300, exponent=300)
    sums.add(dx[5:] * 2.0**-290, exponent=290)
    expected = (dx**2).mean().log()
    torch.testing.assert_close(sums.finish(), expected, **EXACT)


def test_noise_power_beyond_float64_is_finite_as_a_log():
    sums = NoiseSums()
    sums.add(torch.ones(3), exponent=5000)
    assert float(sums.finish()) == pytest.approx(10000 * math.log(2))


def test_branch_share_and_identity_deviation_of_known_powers():
    skip = torch.tensor([[2.0, 0.0], [-2.0, 0.0]])
    branch = torch.tensor([[0.0, 1.0], [0.0, -1.0]])
    assert branch_share(branch, skip) == pytest.approx(1 / 5)
    assert identity_deviation(branch, skip) == pytest.approx(1 / 2)
    assert branch_share(torch.zeros(2, 2), skip) == 0
    assert branch_share(torch.zeros(2, 2), torch.zeros(2, 2)).isnan()


def test_moments_of_nothing_are_refused():
    with pytest.raises(ValueError, match="empty on every rank"):
        raw_moment(torch.empty(0, 3), 2)
    with pytest.raises(ValueError, match="no example"):
        effective_rank(torch.empty(0, 3))
    with pytest.raises(ValueError, match="p is 0"):
        central_moment(SMALL, 0)


def test_an_empty_first_chunk_costs_no_digits():
    x = 1e6 + maps(32, 3)
    x[:, 1] = 0.1
    after, alone = ChannelSums(), ChannelSums()
    after.add(x[:1], empty=True)
    for sums in (after, alone):
        sums.add(x)
    assert after.finish().mu2 == alone.finish().mu2
    constant = ChannelSums()
    constant.add(x[:1], empty=True)
    constant.add(x[:, 1:2].repeat(1, 3))
    assert constant.finish().mu2 == 0
