"""Ways to the Fisher matrix's eigenvalues: ours, other tools', and by hand.

Each takes a network, inputs, labels and a question (`trace`, `top 1`, `top 10`, `all`)
and returns numbers: the trace, or eigenvalues in descending order. A question that a
tool does not answer raises `NoRoute`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from lit_resnorm.measures.fisher import fisher_spectrum

TOP = {"top 1": 1, "top 10": 10}


class NoRoute(Exception):  # noqa: N818
    """The tool does not answer the question."""


def ours(net: nn.Module, x: Tensor, y: Tensor, question: str) -> list[float]:
    """Use `fisher_spectrum`, to 1e-3 where it iterates."""
    del y
    if question == "trace":
        return [fisher_spectrum(net, x, norm_mode="eval", num_eigenvalues=0).trace]
    found = fisher_spectrum(
        net,
        x,
        norm_mode="eval",
        num_eigenvalues=TOP.get(question),
        tol=1e-3,
        trace=False,
    )
    return found.eigenvalues.tolist()


def followed(net: nn.Module, x: Tensor, y: Tensor, question: str) -> list[float]:
    """Use `fisher_spectrum` after a small step from where it was last measured."""
    if question != "top 1":
        raise NoRoute
    state = net.__dict__.setdefault("followed", {})
    found = fisher_spectrum(
        net,
        x,
        norm_mode="eval",
        num_eigenvalues=1,
        tol=1e-3,
        trace=False,
        start=state.get("vectors"),
    )
    state["vectors"] = found.vectors
    del y
    return found.eigenvalues.tolist()


def curvlinops(net: nn.Module, x: Tensor, y: Tensor, question: str) -> list[float]:
    """Use curvlinops' Gauss-Newton operator with SciPy's Lanczos."""
    from curvlinops import GGNLinearOperator
    from scipy.sparse.linalg import eigsh

    if question not in TOP:
        raise NoRoute
    operator = GGNLinearOperator(
        net,
        nn.CrossEntropyLoss(),
        [p for p in net.parameters() if p.requires_grad],
        [(x, y)],
        check_deterministic=False,
    )
    values = eigsh(
        operator.to_scipy(), k=TOP[question], tol=1e-3, return_eigenvectors=False
    )
    return sorted(map(float, values), reverse=True)


def nngeometry(net: nn.Module, x: Tensor, y: Tensor, question: str) -> list[float]:
    """Use NNGeometry's diagonal for the trace."""
    from nngeometry.metrics import FIM
    from nngeometry.object import PMatDiag
    from torch.utils.data import DataLoader, TensorDataset

    if question != "trace":
        raise NoRoute
    loader = DataLoader(TensorDataset(x, y), batch_size=len(x))
    matrix = FIM(
        model=net, loader=loader, representation=PMatDiag, variant="classif_logits"
    )
    return [float(matrix.trace())]


def backpack(net: nn.Module, x: Tensor, y: Tensor, question: str) -> list[float]:
    """Use BackPACK's diagonal of the Gauss-Newton matrix for the trace."""
    from backpack import backpack as extended
    from backpack import extend
    from backpack.extensions import DiagGGNExact

    if question != "trace":
        raise NoRoute
    wrapped = extend(net, use_converter=not isinstance(net, nn.Sequential))
    loss = extend(nn.CrossEntropyLoss())(wrapped(x), y)
    with extended(DiagGGNExact()):
        loss.backward()
    return [sum(float(p.diag_ggn_exact.sum()) for p in wrapped.parameters())]


def pyhessian(net: nn.Module, x: Tensor, y: Tensor, question: str) -> list[float]:
    """Use PyHessian's power iteration: on the Hessian, which is another matrix."""
    from pyhessian import hessian

    if question not in TOP:
        raise NoRoute
    operator = hessian(net, nn.CrossEntropyLoss(), data=(x, y), cuda=False)
    values, _ = operator.eigenvalues(top_n=TOP[question], tol=1e-3)
    return [float(value) for value in values]


def by_hand(net: nn.Module, x: Tensor, y: Tensor, question: str) -> list[float]:
    """Use plain `torch.func`: every example's Jacobian, and the matrix J J^T."""
    del y
    parameters = {k: v.detach() for k, v in net.named_parameters()}

    def output(weights: dict[str, Tensor], row: Tensor) -> Tensor:
        return functional_call(net, weights, (row[None],))[0]

    jacobians = vmap(jacrev(output), (None, 0))(parameters, x)
    jacobian_NCP = torch.cat([j.flatten(2) for j in jacobians.values()], dim=2)
    with torch.no_grad():
        p_NC = net(x).softmax(dim=1)
    roots_NC = p_NC.sqrt()
    factor_NCC = torch.diag_embed(roots_NC) - p_NC[:, :, None] * roots_NC[:, None]
    rows_DP = (factor_NCC.mT @ jacobian_NCP).flatten(0, 1) / len(x) ** 0.5
    if question == "trace":
        return [float(rows_DP.square().sum())]
    values = torch.linalg.eigvalsh(rows_DP @ rows_DP.T).flip(0)
    return values[: TOP.get(question)].tolist()


ROUTES = {
    "lit_resnorm": ours,
    "lit_resnorm, followed": followed,
    "curvlinops": curvlinops,
    "nngeometry": nngeometry,
    "backpack": backpack,
    "pyhessian": pyhessian,
    "torch.func by hand": by_hand,
}
QUESTIONS = ("trace", "top 1", "top 10", "all")
