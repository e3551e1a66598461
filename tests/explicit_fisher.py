"""Fisher matrices from explicit Jacobians, row by row, in float64."""

from contextlib import nullcontext

import torch

from lit_resnorm.measures.passes.untouched import untouched


def explicit_fisher(model, x, **options):
    """Return the Fisher matrix, (P, P); options are those of `explicit_rows`."""
    rows_DP = explicit_rows(model, x, **options)
    return rows_DP.T @ rows_DP


def explicit_rows(
    model,
    x,
    *,
    output="softmax",
    norm_mode="frozen",
    class_dim=None,
    weights=None,
    forward=lambda model, x: model(x),
):
    """Return a root of the Fisher matrix, (N C, P), a backward pass an output.

    With `norm_mode` None the model runs as it is, in the mode that it is in.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    around = (
        nullcontext(lambda function: function())
        if norm_mode is None
        else untouched(model, norm_mode=norm_mode)
    )
    with around as run:
        outputs = run(lambda: forward(model, x))
        if outputs.ndim == 1:
            outputs = outputs[:, None]
        if class_dim is not None:
            outputs = outputs.movedim(class_dim, -1)
        elif output != "softmax":
            outputs = outputs.flatten(1)
        outputs_NC = outputs.flatten(0, -2)
        jacobian_NCP = torch.stack(
            [jacobian_row(value, parameters) for value in outputs_NC.flatten()]
        ).view(*outputs_NC.shape, -1)
    values_NC, vectors_NCC = torch.linalg.eigh(
        output_curvature(outputs_NC.detach(), output)
    )
    roots_NCC = vectors_NCC * values_NC.clamp_min(0).sqrt()[:, None, :]
    if weights is None:
        weights = torch.ones(len(outputs_NC))
    shares_N = weights.flatten().double() / weights.sum()
    scaled_NCC = roots_NCC * shares_N.sqrt()[:, None, None]
    return torch.einsum("ncr,ncp->nrp", scaled_NCC, jacobian_NCP).flatten(0, 1)


def jacobian_row(value, parameters):
    grads = torch.autograd.grad(
        value, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return torch.cat([grad.flatten() for grad in grads])


def output_curvature(outputs_NC, output):
    if output == "softmax":
        p = outputs_NC.softmax(-1)
        return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    if output == "bernoulli":
        p = outputs_NC.sigmoid()
        return torch.diag_embed(p * (1 - p))
    return torch.eye(outputs_NC.shape[1]).double().expand(len(outputs_NC), -1, -1)


def nonzero_eigenvalues(matrix):
    values = torch.linalg.eigvalsh(matrix).flip(0)
    return values[values > 1e-10 * values[0]]
