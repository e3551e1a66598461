"""The Fisher matrix of a torchvision net, against another library's operator."""

import pytest
import torch
import torchvision
from scipy.sparse.linalg import eigsh
from torch import nn

from lit_resnorm.measures.fisher import fisher_spectrum


@pytest.mark.slow
def test_resnet18_agrees_with_curvlinops_gauss_newton_matrix():
    # For softmax and cross entropy the two matrices are the same.
    curvlinops = pytest.importorskip("curvlinops", reason="the bench group is absent")
    torch.manual_seed(0)
    net = torchvision.models.resnet18(num_classes=10)
    x = torch.randn(16, 3, 32, 32)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    net.train()(x)  # running statistics of a batch; 0 and 1 would make logits explode
    net.eval()
    found = fisher_spectrum(net, x, norm_mode="eval", num_eigenvalues=1, tol=1e-6)
    batch = [(x, torch.arange(16) % 10)]
    operator = curvlinops.GGNLinearOperator(
        net,
        nn.CrossEntropyLoss(),
        list(net.parameters()),
        batch,
        check_deterministic=False,
    )
    (largest,) = eigsh(operator.to_scipy(), k=1, tol=1e-6, return_eigenvectors=False)
    assert found.max == pytest.approx(float(largest), rel=1e-4)
    # Its trace is the sum of squares of S^T J, with J's rows from curvlinops.
    transposed = curvlinops.TransposedJacobianLinearOperator(
        net, list(net.parameters()), batch, check_deterministic=False
    )
    p_NC = net(x).softmax(1).detach()
    trace = 0.0
    for row, p_C in enumerate(p_NC):
        factor_CC = p_C.sqrt().diag() - p_C[:, None] * p_C.sqrt()
        columns = torch.zeros(160, 10)
        columns[10 * row : 10 * row + 10] = factor_CC
        trace += float((transposed @ columns).double().square().sum()) / 16
    assert found.trace == pytest.approx(trace, rel=1e-4)
