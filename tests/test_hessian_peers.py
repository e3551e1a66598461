"""The Hessian of a torchvision net, against another library's power iteration."""

import warnings

import pytest
import torch
import torchvision
from torch import nn

from lit_resnorm.measures import hessian_spectrum


@pytest.mark.slow
def test_resnet18_agrees_with_pyhessian():
    pyhessian = pytest.importorskip("pyhessian", reason="the bench group is absent")
    torch.manual_seed(0)
    net = torchvision.models.resnet18(num_classes=10)
    x, y = torch.randn(4, 3, 16, 16), torch.arange(4)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    net.train()(x)  # running statistics of a batch; 0 and 1 would make logits explode
    net.eval()
    found = hessian_spectrum(
        net, (x, y), norm_mode="eval", smallest_tol=None, num_trace_vectors=0
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it backpropagates with create_graph
        peer = pyhessian.hessian(net, nn.CrossEntropyLoss(), (x, y), cuda=False)
        # it stops at two alike estimates: much less than what is judged
        (largest,), _ = peer.eigenvalues(maxIter=200, tol=3e-5, top_n=1)
    assert found.max == pytest.approx(largest, rel=1e-3)
