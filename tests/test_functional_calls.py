"""A model at other weights: every slot gets back the object that it held."""

import pytest
import torch
from explicit_fisher import explicit_rows
from torch import nn
from torch.nn.utils import parametrizations

from lit_resnorm.measures.fisher import fisher_spectrum
from lit_resnorm.measures.passes.functional_calls import with_weights


class SharedLayer(nn.Module):
    """One layer with a batch norm under three names, in lists and as an attribute."""

    def __init__(self):
        super().__init__()
        layer = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.blocks = nn.ModuleList([layer, layer])
        self.again = layer
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.again(self.blocks[1](self.blocks[0](x).tanh())))


class TiedWeights(nn.Module):
    """Two layers of one weight and, after the first pass, other slots."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Linear(4, 5), nn.Linear(5, 4, bias=False)
        self.out.weight = nn.Parameter(torch.randn(4, 5))
        self.embed.weight = nn.Parameter(torch.randn(5, 4))
        self.twin = nn.Linear(4, 5)
        self.twin.weight = self.embed.weight
        self.register_buffer("mean", torch.zeros(5))
        self.register_buffer("same", self.mean)

    def forward(self, x):
        return self.out(self.embed(x) + self.twin(x) - self.same)


class Restless(nn.Module):
    """Assigns, adds and deletes parameters and buffers in its forward pass."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)
        self.register_buffer("mean", torch.zeros(4))
        self.register_parameter("absent", None)

    def forward(self, x):
        h = self.first(x)
        self.mean = 0.9 * self.mean + h.detach().mean(0)
        self.first.scale = nn.Parameter(torch.ones(4))
        self.absent = nn.Parameter(torch.ones(1))
        bias = self.first.bias
        del self.first.bias
        self.first.bias = nn.Parameter(bias.detach())
        return self.second(h - self.mean)


def slots(model):
    """Names and objects of all parameters and buffers, in order."""
    return [
        [(name, id(tensor)) for name, tensor in store.items()]
        for module in model.modules()
        for store in (module._parameters, module._buffers)
    ]


def doubled(model):
    own = [*model.named_parameters(), *model.named_buffers()]
    return {n: t * 2 if t.is_floating_point() else t.clone() for n, t in own}


MODELS = {"shared": SharedLayer, "tied": TiedWeights, "restless": Restless}
every_model = pytest.mark.parametrize("kind", MODELS.values(), ids=MODELS)


@every_model
def test_slots_hold_their_own_objects_after_a_call_at_other_weights(kind):
    model = kind()
    before = slots(model)
    with with_weights(model, doubled(model)):
        model(torch.randn(6, 4))
    assert slots(model) == before


@every_model
def test_slots_hold_their_own_objects_after_a_call_that_raises(kind):
    model = kind()
    before = slots(model)

    def run():
        with with_weights(model, doubled(model)):
            model(torch.randn(6, 4))
            raise KeyError

    with pytest.raises(KeyError):
        run()
    assert slots(model) == before


@every_model
def test_slots_hold_their_own_objects_after_a_vectorised_call(kind):
    model = kind().eval()
    before = slots(model)
    x = torch.randn(6, 4)
    stacked = {n: torch.stack([t, t]) for n, t in doubled(model).items()}

    def one(weights):
        with with_weights(model, weights):
            return model(x)

    both = torch.func.vmap(one)(stacked)
    assert slots(model) == before
    with with_weights(model, doubled(model)):
        alone = model(x)
    torch.testing.assert_close(both, torch.stack([alone, alone]))


def test_a_weight_given_under_any_of_its_names_reaches_all_of_them():
    model, x = TiedWeights().double(), torch.randn(6, 4, dtype=torch.float64)
    model.same = model.mean  # which .double() has parted
    other = torch.ones(5, dtype=torch.float64)
    with torch.no_grad():
        model.embed.bias.zero_(), model.twin.bias.zero_()
    expected = (x @ (6 * model.embed.weight).T - other) @ model.out.weight.T
    for weight in ("embed.weight", "twin.weight"):
        for buffer in ("mean", "same"):
            given = {weight: 3 * model.embed.weight, buffer: other}
            with with_weights(model, given):
                found = model(x)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_updated_buffers_of_a_shared_layer_are_those_that_were_given():
    model = SharedLayer()
    given = {n: b.clone() for n, b in model.named_buffers()}
    own = {n: b.clone() for n, b in model.named_buffers()}
    with with_weights(model, given):
        model(torch.randn(6, 4))
    assert given["blocks.0.1.num_batches_tracked"] == 3
    assert all(torch.equal(b, own[n]) for n, b in model.named_buffers())


def test_two_values_for_one_tensor_and_unknown_names_are_refused_by_name():
    model = TiedWeights()
    two = {"embed.weight": torch.ones(5, 4), "twin.weight": torch.zeros(5, 4)}
    with pytest.raises(ValueError, match=r"'twin.weight' of TiedWeights"):
        with_weights(model, two).__enter__()
    with pytest.raises(ValueError, match=r"no parameter or buffer 'embed.scale'"):
        with_weights(model, {"embed.scale": torch.ones(5)}).__enter__()


def shared_conv():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    ends = nn.Conv2d(2, 4, 3), nn.Linear(4 * 16, 3)
    net = nn.Sequential(ends[0], conv, nn.Tanh(), conv, nn.Flatten(), ends[1])
    return net, torch.randn(5, 2, 6, 6)


def shared_with_norm():
    return SharedLayer(), torch.randn(9, 4)


def shared_under_weight_norm():
    layer = parametrizations.weight_norm(nn.Linear(4, 4))
    net = nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(4, 3))
    return net, torch.randn(9, 4)


@pytest.mark.parametrize(
    "made", [shared_conv, shared_with_norm, shared_under_weight_norm]
)
@pytest.mark.parametrize("norm_mode", ["frozen", "train"])
def test_products_with_a_shared_layer_keep_it_and_count_it_once(made, norm_mode):
    torch.manual_seed(0)
    model, x = made()
    model, x = model.double(), x.double()
    before = slots(model)
    rows = explicit_rows(model, x, norm_mode=norm_mode)
    largest = float(torch.linalg.eigvalsh(rows @ rows.T)[-1])
    size = sum(p.numel() for p in model.parameters())
    for num in (1, 3):
        found = fisher_spectrum(
            model, x, num_eigenvalues=num, tol=1e-12, norm_mode=norm_mode, memory=300
        )
        assert slots(model) == before
        assert found.num_parameters == size
        assert found.max == pytest.approx(largest, rel=1e-9)
