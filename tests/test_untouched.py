"""Passes that leave a model as it was, and what batch norm does in them."""

import pytest
import torch
import torchvision
from small import FunctionalNet
from torch import nn
from torch.nn import functional as F

from lit_resnorm.measures.passes.batches import num_rows, occupied, take_rows
from lit_resnorm.measures.passes.untouched import check_norm_mode, untouched


class Twice(nn.Module):
    """Applies one batch norm twice, on inputs of different scale."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4, affine=False, eps=0.0)

    def forward(self, x):
        return self.norm(10 * self.norm(x) + 3)


def batch_norm_in_formulas(x):
    return (x - x.mean(0)) / x.var(0, correction=0).sqrt()


def test_frozen_statistics_are_those_of_the_first_pass_at_each_application():
    x = torch.randn(12, 4, dtype=torch.float64)
    net = Twice().double()
    first = batch_norm_in_formulas(x)
    expected = batch_norm_in_formulas(10 * first + 3)
    with untouched(net) as run:
        whole = run(lambda: net(x))
        rows = run(lambda: net(x[:3]))
    torch.testing.assert_close(whole, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rows, expected[:3], rtol=1e-12, atol=1e-12)


def test_frozen_statistics_are_constants_and_train_mode_differentiates_through_them():
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    norm = nn.BatchNorm1d(4, affine=False).double()
    for norm_mode, alone in (("frozen", True), ("train", False)):
        with untouched(norm, norm_mode=norm_mode) as run:
            (grad,) = torch.autograd.grad(run(lambda: norm(x))[0].sum(), x)
        assert (grad[1:] == 0).all().item() is alone
    deviation = (x.var(0, correction=0) + norm.eps).sqrt()
    with untouched(norm) as run:
        (grad,) = torch.autograd.grad(run(lambda: norm(x))[0].sum(), x)
    torch.testing.assert_close(grad[0], 1 / deviation, rtol=1e-12, atol=0)


def test_eval_mode_uses_the_running_statistics():
    net = FunctionalNet()
    net(torch.randn(16, 8))
    x = torch.randn(5, 8)
    with untouched(net, norm_mode="eval") as run:
        measured = run(lambda: net(x))
    net.eval()
    torch.testing.assert_close(measured, net(x), rtol=0, atol=0)


def test_recalibrating_takes_the_statistics_of_a_reference_batch():
    x, reference = torch.randn(8, 4), torch.randn(8, 4) * 5 + 2
    norm = nn.BatchNorm1d(4, affine=False)
    with untouched(norm) as run:
        run(lambda: norm(x))
        run(lambda: norm(reference), recalibrate=True)
        measured = run(lambda: norm(x))
    expected = F.batch_norm(
        x, reference.mean(0), reference.var(0, correction=0), eps=norm.eps
    )
    torch.testing.assert_close(measured, expected)


def test_functional_batch_norm_is_frozen_too():
    x = torch.randn(8, 4, dtype=torch.float64)
    model = nn.Identity()
    with untouched(model) as run:
        out = run(lambda: F.batch_norm(x, None, None, training=True, eps=0.0))
    torch.testing.assert_close(out, batch_norm_in_formulas(x), rtol=1e-12, atol=1e-12)


def test_passes_that_differ_from_the_first_are_refused():
    norm = nn.BatchNorm1d(4)
    x = torch.randn(8, 4)
    with untouched(norm) as run:
        run(lambda: norm(norm(x)))
        for other in (lambda: norm(x), lambda: norm(norm(norm(x)))):
            with pytest.raises(ValueError, match="different ways through BatchNorm1d"):
                run(other)


def test_a_pass_that_raises_leaves_everything_as_it_was():
    net = FunctionalNet()
    net.norm.eval()
    modes = [m.training for m in net.modules()]
    torch.manual_seed(5)
    state = torch.get_rng_state()

    def disturb():
        with untouched(net) as run:
            run(lambda: net(torch.randn(4, 8)))
            net.norm.running_mean.add_(1)
            raise KeyError

    with pytest.raises(KeyError):
        disturb()
    assert [m.training for m in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert (net.norm.running_mean == 0).all()


def test_replaced_buffers_come_back():
    net = FunctionalNet()
    buffer = net.norm.running_var
    with untouched(net):
        net.norm.running_var = torch.zeros(16)
    assert net.norm.running_var is buffer


def test_gradients_can_be_taken_under_inference_mode():
    net = FunctionalNet()
    with torch.inference_mode(), untouched(net) as run:
        loss = run(lambda: net(torch.ones(4, 8))).sum()
        grads = torch.autograd.grad(loss, [*net.parameters()])
    assert all(g.isfinite().all() for g in grads)


def test_bf16_models_with_and_without_affine_norms_run_frozen():
    x = torch.randn(8, 3, 32, 32)
    for affine in (True, False):
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=affine))
        with untouched(net) as run:
            exact = run(lambda net=net: net(x))
        net.bfloat16()
        with untouched(net) as run:
            half = run(lambda net=net: net(x.bfloat16()))
        # bf16 keeps 8 bits: the weights alone are off by 2^-9 of their size.
        torch.testing.assert_close(half.float(), exact, rtol=0.05, atol=0.1)


def test_frozen_resnet_equals_its_train_mode_on_the_same_batch():
    net = torchvision.models.resnet18(num_classes=5).double()
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    with untouched(net) as run:
        frozen = run(lambda: net(x))
    # Only rounding differs, which a deep stack of norms multiplies.
    torch.testing.assert_close(frozen, net.train()(x), rtol=1e-9, atol=1e-9)


def test_unknown_norm_mode_is_named_with_the_choices():
    with pytest.raises(ValueError, match=r"'frosty'.*frozen, eval, train"):
        check_norm_mode("frosty")


def test_rows_are_cut_from_every_tensor_of_full_length():
    batch = {"x": torch.arange(6).reshape(3, 2), "scale": torch.ones(()), "name": "a"}
    cut = take_rows(batch, slice(1, None))
    assert num_rows(cut) == 2
    assert cut["scale"].ndim == 0
    assert cut["name"] == "a"


def test_empty_batch_gets_a_dummy_row_and_says_so():
    filled, empty = occupied((torch.ones(0, 3), torch.ones(0, dtype=torch.long)))
    assert empty
    assert filled[0].shape == (1, 3)
    assert filled[1].dtype == torch.long
    kept, empty = occupied(torch.ones(2, 3))
    assert not empty
    assert kept.shape == (2, 3)


def test_batch_without_tensors_is_refused():
    with pytest.raises(ValueError, match="holds no tensor"):
        num_rows({"a": 1})
