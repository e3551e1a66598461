"""Sites: found in any network, named in the order of execution."""

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from lit_resnorm.measures.passes.sites import Visitor, select, visiting
from lit_resnorm.measures.passes.tracing import trace
from lit_resnorm.measures.passes.untouched import untouched


def sites_of(net, *inputs):
    with untouched(net) as run, torch.no_grad():
        return run(lambda: trace(net, lambda: net(*inputs)))


def names(net, *inputs):
    return [site.name for site in sites_of(net, *inputs)]


class Mixed(nn.Module):
    """Modules, functions, in-place forms, one module applied twice, two additions."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Parameter(torch.ones(4))
        self.first = nn.Linear(4, 4)
        self.again = nn.ReLU(inplace=True)
        self.bend = nn.Sequential(nn.Linear(4, 4), nn.Tanh())

    def forward(self, x):
        x = x + self.embed.expand_as(x)  # both operands, but no common ancestor
        h = self.again(self.first(x))
        h = h + self.bend(h)
        h = self.again(h)
        h = F.silu(h).relu_()
        return torch.add(torch.clamp(h, min=0), x)


def test_sites_come_in_the_order_of_execution_and_name_every_application():
    assert names(Mixed(), torch.randn(2, 4)) == [
        "000.first",
        "001.again",
        "002.bend.0",
        "003.bend.1",
        "004.add",
        "005.again",
        "006.silu",
        "007.relu",
        "008.add",
    ]


def test_the_skip_is_the_operand_nearer_to_where_the_two_parted():
    class Swapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.a, self.b = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            h = x + self.a(x)
            h = self.a(h) + h
            return self.b(F.relu(self.a(h))) + self.down(h)

    skips = [s.skip for s in sites_of(Swapped(), torch.randn(2, 4)) if s.op == "add"]
    assert skips == [0, 1, 1]


def test_units_are_counted_along_channels_of_maps_and_last_of_tokens():
    def channel_dims(net, x):
        return [s.channel_dim for s in sites_of(net, x) if s.kind == "activation"]

    maps = nn.Sequential(nn.Conv1d(2, 3, 3), nn.ReLU())
    assert channel_dims(maps, torch.randn(2, 2, 9)) == [1]
    tokens = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    assert channel_dims(tokens, torch.randn(2, 9, 4)) == [-1]
    convnext = torchvision.models.convnext_tiny()
    found = sites_of(convnext, torch.randn(2, 3, 32, 32))
    assert {s.channel_dim for s in found if s.op == "gelu"} == {-1}
    assert {s.channel_dim for s in found if s.op == "conv2d"} == {1}


@pytest.mark.parametrize(
    ("net", "image", "additions", "activations"),
    [
        (torchvision.models.resnet18, 32, 8, 17),
        (torchvision.models.densenet121, 32, 0, 121),
        (lambda: torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32), 32, 4, 2),
    ],
    ids=["resnet18", "densenet121", "vit"],
)
def test_residual_additions_and_activations_of_known_nets(
    net, image, additions, activations
):
    found = sites_of(net(), torch.randn(2, 3, image, image))
    assert sum(s.kind == "addition" for s in found) == additions
    assert sum(s.kind == "activation" for s in found) == activations


def test_transformer_layer_is_seen_inside_though_eval_mode_would_fuse_it():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    found = names(layer, torch.randn(2, 5, 16))
    assert any(name.endswith(".relu") for name in found)
    assert sum(name.endswith(".add") for name in found) == 2


def test_parametrized_layers_are_leaves_and_their_parametrizations_no_sites():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    (site,) = sites_of(nn.Sequential(layer), torch.randn(2, 4))
    assert (site.name, site.op) == ("000.0", "linear")


def test_deep_nets_get_as_many_digits_as_are_needed():
    net = nn.Sequential(*(nn.Identity() for _ in range(1001)))
    found = names(net, torch.ones(2, 1))
    assert found[0] == "0000.0"
    assert found == sorted(found)


class Count(Visitor):
    def __init__(self):
        self.seen = []

    def before(self, site, args, kwargs):
        self.seen.append(site.name)


def test_visits_come_to_the_traced_sites_and_change_nothing():
    net = Mixed()
    x = torch.randn(3, 4)
    count = Count()
    with torch.no_grad(), untouched(net) as run:
        sites = trace(net, lambda: net(x[:1]))
        chosen = select(sites, kinds=("activation",))
        plain = run(lambda: net(x))
        with visiting(net, chosen, count):
            visited = net(x)
    assert torch.equal(plain, visited)
    assert count.seen == [site.name for site in chosen]
    assert not any(m._forward_hooks for m in net.modules())


def test_what_a_visitor_computes_is_no_part_of_the_pass():
    class Busy(Count):
        def before(self, site, args, kwargs):
            super().before(site, args, kwargs)
            F.relu(args[0] + args[0])

    net = Mixed()
    x = torch.randn(3, 4)
    busy, count = Busy(), Count()
    sites = sites_of(net, x)
    for visitor in (busy, count):
        with torch.no_grad(), visiting(net, sites, visitor):
            net(x)
    assert busy.seen == count.seen == [site.name for site in sites]


def test_visitor_can_replace_an_output():
    class Double(Visitor):
        def after(self, site, args, kwargs, output):
            return 2 * output

    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    x = torch.randn(3, 4)
    sites = sites_of(net, x)
    with visiting(net, select(sites, "relu|1"), Double()):
        assert torch.equal(net(x), 2 * F.relu(net[0](x)))


def test_pass_that_takes_another_way_is_told():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.ReLU(), nn.Tanh()

        def forward(self, x):
            return self.a(x) if x.sum() > 0 else self.b(x)

    net = Branching()
    sites = sites_of(net, torch.ones(1, 2))
    with (
        pytest.raises(RuntimeError, match="depends on the data"),
        visiting(net, sites, Visitor()),
    ):
        net(-torch.ones(1, 2))
    assert not any(m._forward_hooks for m in net.modules())


def test_pattern_is_searched_and_a_bad_one_named():
    sites = sites_of(Mixed(), torch.randn(2, 4))
    assert [s.name for s in select(sites, r"bend\.\d")] == ["002.bend.0", "003.bend.1"]
    with pytest.raises(ValueError, match=r"'nope', which matches none of 000\.first"):
        select(sites, "nope")
    with pytest.raises(ValueError, match=r"'\(', not a regular expression"):
        select(sites, "(")


def test_sites_of_one_example_are_those_of_several_where_positions_are_added():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.place = nn.Parameter(torch.randn(1, 4, 6))
            self.layer = nn.Linear(6, 6)

        def forward(self, x):
            h = x + self.place
            return h + torch.relu(self.layer(h))

    net = Positions()
    batches = torch.randn(1, 4, 6), torch.randn(3, 4, 6)
    one, three = (trace(net, lambda x=x: net(x)) for x in batches)
    assert one == three
    assert [site.name for site in one] == ["000.layer", "001.relu", "002.add"]
