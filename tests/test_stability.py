"""Stability of ridge regression, where leaving one out is a closed form."""

import copy
import math

import pytest
import torch

from lit_resnorm.measures.copies.copies import Copies
from lit_resnorm.measures.copies.influence import conjugate_gradients, influence_copies
from lit_resnorm.measures.copies.optimizer import StackedOptimizer, clip_by_norm
from lit_resnorm.measures.copies.stability import stability
from lit_resnorm.measures.copies.twins import Share, Twins
from lit_resnorm.measures.losses import Reduction

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    "dampening": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, dampening=0.2),
    "maximize": lambda p: torch.optim.SGD(p, 0.1, maximize=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, amsgrad=True),
    "nadam": lambda p: torch.optim.NAdam(p, 0.01),
    "radam": lambda p: torch.optim.RAdam(p, 0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01),
    "adadelta": lambda p: torch.optim.Adadelta(p, 0.1),
    "adamax": lambda p: torch.optim.Adamax(p, 0.01),
}


def ridge(x, y, decay):
    """Minimiser of the mean of (x w - y)^2 / 2 plus decay |w|^2 / 2."""
    gram = x.T @ x / len(x) + decay * torch.eye(x.shape[1], dtype=x.dtype)
    return torch.linalg.solve(gram, x.T @ y / len(x))


def regression(num, dim, seed=0, noise=1.0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, truth = draw(num, dim), draw(dim, 1)
    return x, x @ truth + noise * draw(num, 1)


def squared(output, target):
    return (output - target).square().sum(1) / 2


def losses(model, batch):
    return squared(model(batch[0]), batch[1])


def linear(dim):
    torch.manual_seed(0)
    return torch.nn.Linear(dim, 1, bias=False, dtype=torch.float64)


def test_twins_trained_to_the_end_are_the_closed_form_without_their_example():
    x, y = regression(12, 3)
    model = linear(3)
    decay = 0.2
    optimizer = torch.optim.SGD(model.parameters(), 0.2, weight_decay=decay)
    twins = Twins(model, optimizer, losses, 12)
    for k in range(12):
        twins.fork(k, optimizer)
    rows = torch.stack([torch.arange(12)[torch.arange(12) != k] for k in range(12)])
    weights = torch.full((12, 11), 1 / 11, dtype=torch.float64)
    for _ in range(300):
        twins.accumulate((x, y), Share([*range(12)], weights, rows))
        twins.step(lambda grads: None)
    for k in range(12):
        exact = ridge(x[rows[k]], y[rows[k]], decay).T
        torch.testing.assert_close(twins.weights(k)["weight"], exact, rtol=0, atol=1e-9)


def test_replacing_one_example_costs_the_generalization_gap_in_expectation():
    # With z_i replaced by a fresh draw, E[l(A(S^i); z_i) - l(A(S); z_i)] is the gap:
    # z_i is to A(S^i) what a test example is to A(S).
    differences = []
    for seed in range(400):
        x, y = regression(10 + 10 + 200, 4, seed)
        train, fresh, test = (slice(0, 10), slice(10, 20), slice(20, None))
        weights = ridge(x[train], y[train], 0.1)
        own = squared(x[train] @ weights, y[train])
        held_out = squared(x[test] @ weights, y[test])
        twin_own, twin_test = [], []
        for i in range(10):
            x_i, y_i = x[train].clone(), y[train].clone()
            x_i[i], y_i[i] = x[fresh][i], y[fresh][i]
            twin = ridge(x_i, y_i, 0.1)
            twin_own.append(squared(x[i : i + 1] @ twin, y[i : i + 1]))
            twin_test.append(squared(x[test] @ twin, y[test]))
        result = stability(held_out, torch.stack(twin_test), own, torch.cat(twin_own))
        differences.append(result.replace_signed - (held_out.mean() - own.mean()))
    differences = torch.stack(differences)
    stderr = differences.std() / math.sqrt(len(differences))
    assert abs(differences.mean()) < 3 * stderr
    assert stderr < 0.05


def test_stability_is_means_and_maximum_by_hand_with_errors_over_removals():
    test = torch.tensor([1.0, 2.0])
    twins = torch.tensor([[1.5, 2.0], [1.0, 1.0], [4.0, 2.0]])
    own, twin_own = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([1.5, 0.8, 2.0])
    result = stability(test, twins, own, twin_own)
    by_removal = torch.tensor([0.25, 0.5, 1.5], dtype=torch.float64)
    assert result.eps_hyp == pytest.approx(0.75)
    assert result.eps_hyp_stderr == pytest.approx(by_removal.std() / math.sqrt(3))
    assert result.eps_point == pytest.approx((0.5 + 0.2 + 1.0) / 3)
    assert result.replace_signed == pytest.approx((0.5 - 0.2 + 1.0) / 3)
    assert result.eps_unif == 3.0
    jackknife = [3.0, 3.0, 1.0]
    mean = sum(jackknife) / 3
    expected = math.sqrt(2 / 3 * sum((value - mean) ** 2 for value in jackknife))
    assert result.eps_unif_stderr == pytest.approx(expected)


def test_diverged_twins_are_censored_and_never_averaged():
    test, own = torch.ones(2), torch.ones(3)
    twins = torch.tensor([[1.5, 1.5], [math.nan, 1.0], [2.0, 2.0]])
    result = stability(test, twins, own, torch.tensor([1.0, 1.0, math.inf]))
    assert result.finite.tolist() == [True, False, False]
    assert result.eps_hyp == 0.5
    assert result.eps_unif == 0.5
    gone = stability(test, twins * math.nan, own, own)
    assert all(v.isnan() for v in (gone.eps_hyp, gone.eps_unif, gone.eps_point))


def test_losses_of_other_shapes_are_refused_with_both_shapes():
    with pytest.raises(ValueError, match=r"\(3, 2\) and \(3,\); they have \(2, 2\)"):
        stability(torch.ones(2), torch.ones(2, 2), torch.ones(3), torch.ones(3))


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_stacked_optimizer_steps_as_one_of_its_own_for_each_copy(make):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    originals = [torch.nn.Parameter(draw(3, 2)), torch.nn.Parameter(draw())]
    optimizer = make([{"params": originals[:1]}, {"params": originals[1:], "lr": 0.05}])
    for _ in range(3):
        for p in originals:
            p.grad = draw(*p.shape)
        optimizer.step()
    stacks = {p: torch.stack([p.detach()] * 3) for p in originals}
    together = StackedOptimizer(optimizer, stacks)
    singles = []
    for k in range(3):
        together.fork(k, optimizer)
        own = [torch.nn.Parameter(p.detach().clone()) for p in originals]
        groups = [{"params": own[:1]}, {"params": own[1:], "lr": 0.05}]
        singles.append((own, make(groups)))
        singles[-1][1].load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(6):
        # One copy sits out a step, after which its step count is behind.
        members = {0, 1, 2} if step != 3 else {0, 2}
        if step == 3:
            together.split()
        grads = {p: draw(3, *p.shape) for p in originals}
        together.follow(optimizer)
        together.step(grads, members)
        for k in members:
            own, single = singles[k]
            for p, original in zip(own, originals, strict=True):
                p.grad = grads[original][k]
            single.step()
    for k, (own, _) in enumerate(singles):
        for p, original in zip(own, originals, strict=True):
            torch.testing.assert_close(stacks[original][k], p.data, rtol=0, atol=1e-10)


def test_gradients_are_clipped_as_torch_clips_those_of_each_copy():
    torch.manual_seed(0)
    grads = {"a": torch.randn(3, 4, 2), "b": torch.randn(3)}
    for k, scale in enumerate((0.01, 1.0, 100.0)):
        for grad in grads.values():
            grad[k] *= scale
    expected = {name: grad.clone() for name, grad in grads.items()}
    clip_by_norm(grads, 0.5)
    for k in range(3):
        own = [torch.nn.Parameter(torch.zeros_like(g[k])) for g in expected.values()]
        for p, grad in zip(own, expected.values(), strict=True):
            p.grad = grad[k].clone()
        torch.nn.utils.clip_grad_norm_(own, 0.5)
        for p, grad in zip(own, grads.values(), strict=True):
            torch.testing.assert_close(grad[k], p.grad)


def weighted_ridge(x, y, shares, decay):
    """Minimiser of the weighted sum of (x w - y)^2 / 2 plus decay |w|^2 / 2."""
    matrix = (x * shares[:, None]).T @ x + decay * torch.eye(x.shape[1]).double()
    return torch.linalg.solve(matrix, (x * shares[:, None]).T @ y)


REDUCTIONS = {
    "mean": (None, False),
    "weighted mean": (torch.linspace(0.5, 2.0, 40, dtype=torch.float64), False),
    "sum": (None, True),
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_influence_on_ridge_is_exact_where_its_matrix_is_that_of_the_others(name):
    # The loss is a quadratic, so one step of Newton's method ends at its minimum.
    num, decay = 40, 0.2
    weights_N, summed = REDUCTIONS[name]
    x, y = regression(num, 3)
    w = torch.ones(num, dtype=torch.float64) if weights_N is None else weights_N
    keep = torch.arange(num) != 7
    # Nothing takes the place of an example that lacks in a sum.
    shares = w / num if summed else w / w.sum()
    without = shares[keep] if summed else w[keep] / w[keep].sum()
    weights = weighted_ridge(x, y, shares, decay)
    exact = weighted_ridge(x[keep], y[keep], without, decay).T
    model = linear(3)
    with torch.no_grad():
        model.weight.copy_(weights.T)
    copies = influence_copies(
        model,
        lambda module, batch: module(batch[0]),
        lambda output, batch: squared(output, batch[1]),
        ["weight"],
        (x[keep], y[keep], w[keep]),
        (x[7:8], y[7:8], w[7:8]),
        [1],
        2,
        num_train=num,
        reduction=None if name == "mean" else lambda batch: Reduction(batch[2], summed),
        decay=decay,
        tol=1e-12,
    )
    torch.testing.assert_close(copies.weights(1)["weight"], exact, rtol=0, atol=1e-9)
    assert (exact - weights.T).norm() > 1e-3
    assert copies.forked == {1}


def test_influence_of_an_example_without_weight_is_none():
    x, y = regression(8, 3)
    model = linear(3)
    copies = influence_copies(
        model,
        lambda module, batch: module(batch[0]),
        lambda output, batch: squared(output, batch[1]),
        ["weight"],
        (x, y, torch.ones(8).double()),
        (x[:1], y[:1], torch.zeros(1).double()),
        [0],
        1,
        num_train=8,
        reduction=lambda batch: Reduction(batch[2]),
        damping=0.1,
    )
    assert torch.equal(copies.weights(0)["weight"], model.weight)


def test_conjugate_gradients_solve_a_positive_definite_system():
    torch.manual_seed(0)
    root = torch.randn(8, 8, dtype=torch.float64)
    matrix = root @ root.T + torch.eye(8, dtype=torch.float64)
    b = torch.randn(8, dtype=torch.float64)
    found = conjugate_gradients(lambda v: matrix @ v, b, tol=1e-10, max_products=50)
    torch.testing.assert_close(found, torch.linalg.solve(matrix, b))


def test_copy_that_is_not_forked_is_the_model_at_distance_zero():
    model = linear(3)
    copies = Copies(model, ["weight"], 2)
    with torch.no_grad():
        model.weight += 1
    assert torch.equal(copies.weights(1)["weight"], model.weight)
    assert copies.distances().tolist() == [0.0, 0.0]
