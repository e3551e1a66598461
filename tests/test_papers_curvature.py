"""Items about curvature and gradient noise on small settings."""

import pandas as pd
import pytest
import torch
from judging import judged

from lit_resnorm.measures import gradient_covariance as covariance
from lit_resnorm.papers.jastrzebski2020.break_even import BREAK_EVEN, break_even
from lit_resnorm.papers.jastrzebski2020.noise import NOISE

QUICK = {
    "num_train": 128,
    "width": 16,
    "rates": [0.1, 0.2, 0.4],
    "every": 20,
    "loss": 1.5,
    "max_steps": 200,
    "num_batches": 4,
    "size_of_batches": 32,
    "draws": 1,
}


def test_the_break_even_point_of_a_series_is_its_record():
    values = [1.0, 2.0, 4.0, 3.9, 3.8, 3.7, 3.6, 3.5, 9.0]
    steps = range(0, 10 * len(values), 10)
    rows = pd.DataFrame({"step": steps, "lambda_max": values})
    assert break_even(rows) == 20
    assert break_even(rows[:3]) is None


@pytest.mark.slow
def test_a_covariance_that_is_not_centred_fails(monkeypatch):
    trace = "trace of K over the gradients' variance"
    assert judged(NOISE, **QUICK)[trace].passed

    def as_it_is(gram_DD, roots_D, num, num_parameters, batch_size):
        values = torch.linalg.eigvalsh(gram_DD).flip(0)[: num - 1].clamp_min(0)
        return covariance.GradientCovariance(
            values, float(gram_DD.trace()), num, batch_size
        )

    monkeypatch.setattr(covariance, "_centred", as_it_is)
    assert not judged(NOISE, **QUICK)[trace].passed


@pytest.mark.slow
def test_plain_descent_settles_where_its_rate_says():
    name = "plain descent: lambda_max over 2 / rate, at the end"
    assert judged(BREAK_EVEN, **QUICK)[name].passed
