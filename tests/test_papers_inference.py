"""Items of Jastrzebski et al. and of Arpit & Bengio: right nets pass, wrong fail."""

from dataclasses import replace

import pytest
from judging import judged
from torch import nn

from lit_resnorm.measures.iterative_inference import iterative_inference
from lit_resnorm.papers.arpit2019.norms import GRADIENT, HIDDEN
from lit_resnorm.papers.jastrzebski2018 import recipe, sharing
from lit_resnorm.papers.jastrzebski2018.blocks import COSINE
from lit_resnorm.papers.jastrzebski2018.sharing import SHARED, SHARING

NORMS = {"widths": [60, 400], "draws": 12, "num_examples": 10}


@pytest.mark.slow
@pytest.mark.parametrize("item", [HIDDEN, GRADIENT], ids=["hidden", "gradient"])
def test_norms_pass_with_weights_of_he_and_fail_with_smaller_ones(item, monkeypatch):
    assert all(check.passed for check in judged(item, **NORMS).values())
    plain = nn.init.kaiming_normal_

    def without_gain(weight, **options):
        return plain(weight, **(options | {"nonlinearity": "linear"}))

    monkeypatch.setattr(nn.init, "kaiming_normal_", without_gain)
    faulty = judged(item, **NORMS)
    assert not any(c.passed for name, c in faulty.items() if name.startswith("mean"))


@pytest.mark.slow
def test_cosines_pass_and_with_the_other_sign_fail(monkeypatch):
    negative = "cosine of trained blocks, mean over draws (training set)"
    assert judged(COSINE, draws=1)[negative].passed

    def other_sign(*args, **options):
        found = iterative_inference(*args, **options)
        blocks = (replace(block, cosine=-block.cosine) for block in found.blocks)
        return replace(found, blocks=tuple(blocks))

    monkeypatch.setattr(recipe, "iterative_inference", other_sign)
    assert not judged(COSINE, draws=1)[negative].passed


@pytest.mark.slow
def test_sharing_passes_and_with_shared_batch_norms_fails(monkeypatch):
    assert all(check.passed for check in judged(SHARING).values())
    shared = {**SHARED, "unshared": SHARED["naive"]}
    monkeypatch.setattr(sharing, "SHARED", shared)
    assert not any(check.passed for check in judged(SHARING).values())
