"""Hooks on gradients are the run's: no part of what is measured, and left alone."""

import functools

import lightning as L
import pytest
import torch
from explicit_fisher import explicit_fisher
from small import FunctionalNet, loaders, quiet_trainer
from torch import nn

from lit_resnorm.measures.fisher import fisher_spectrum
from lit_resnorm.measures.passes.untouched import untouched
from lit_resnorm_callbacks import (
    ActivationRateMonitor,
    FIMEigenvalueProbe,
    MomentTracer,
    StabilityProbe,
)

INFLUENCE = functools.partial(StabilityProbe, method="influence")
PROBES = [
    *(ActivationRateMonitor, FIMEigenvalueProbe, MomentTracer, INFLUENCE),
    functools.partial(FIMEigenvalueProbe, num_eigenvalues=1),
]


def hooked(net, note=lambda: None):
    """Halve gradients in each way that there is; return the handles."""

    def halved(*grads):
        note()
        return grads[0] * 0.5

    def each_halved(module, *grads):
        note()
        return tuple(None if g is None else g * 0.5 for g in grads[0])

    last = [m for m in net.modules() if isinstance(m, nn.Linear)][-1]
    return [
        *(parameter.register_hook(halved) for parameter in net.parameters()),
        last.register_full_backward_hook(each_halved),
        last.register_full_backward_pre_hook(each_halved),
    ]


@pytest.mark.parametrize("num_eigenvalues", [0, 1, None])
def test_the_fisher_matrix_is_that_of_the_network_without_hooks(num_eigenvalues):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x = torch.randn(6, 4, dtype=torch.float64)
    expected = float(explicit_fisher(net, x).trace())
    hooked(net)
    found = fisher_spectrum(net, x, num_eigenvalues=num_eigenvalues)
    assert found.trace == pytest.approx(expected, rel=1e-9)


def test_hooks_run_again_afterwards_and_can_be_removed():
    net, calls = nn.Linear(4, 3), []
    x = torch.randn(2, 4, requires_grad=True)
    handles = hooked(net, lambda: calls.append(1))
    with untouched(net) as run:
        run(lambda: net(x)).sum().backward()
    assert not calls
    net(x).sum().backward()
    assert len(calls) == len(handles)
    for handle in handles:
        handle.remove()
    net(x).sum().backward()
    assert len(calls) == len(handles)


@pytest.mark.parametrize("probe", PROBES)
def test_hooks_run_as_often_as_without_the_probe(probe):
    def calls(probes):
        L.seed_everything(7, verbose=False)
        made, module = [], FunctionalNet()
        hooked(module, lambda: made.append(1))
        trainer = quiet_trainer(max_steps=4, callbacks=probes)
        trainer.fit(module, *loaders())
        return len(made), module.state_dict()

    (probed, weights), (bare, own) = calls([probe(cadence=2)]), calls([])
    assert probed == bare
    assert all(torch.equal(value, own[name]) for name, value in weights.items())
