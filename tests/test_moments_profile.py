"""Signal and noise by depth, against Jacobian-vector products and closed forms."""

import gc
import math
import weakref
from queue import SimpleQueue

import pytest
import torch
from moment_references import central_moment, raw_moment
from small import FunctionalNet
from torch import nn
from torch.autograd.functional import jvp
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision.models import VisionTransformer

from lit_resnorm.measures.moments import flow_between_sites, recorder, signal_and_noise
from lit_resnorm.measures.moments.noise import example_noise

EXACT = {"rtol": 1e-9, "atol": 1e-12}


class Stack(nn.Module):
    """Blocks one after the other, `h -> h + block(h)` where residual."""

    def __init__(self, blocks, residual=False):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.residual = residual

    def forward(self, h):
        for block in self.blocks:
            h = h + block(h) if self.residual else block(h)
        return h


def he(module):
    """Give every weight layer variance 2 / fan-in and no bias."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return module


def vanilla(depth, width):
    return he(
        Stack([nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(depth)])
    )


def batch_norm_stack(depth, width):
    blocks = [
        nn.Sequential(
            nn.Linear(width, width, bias=False),
            nn.BatchNorm1d(width, affine=False),
            nn.ReLU(),
        )
        for _ in range(depth)
    ]
    return he(Stack(blocks))


def batch_norm_residual(depth, width, *, conv=False):
    def block():
        weights = (
            nn.Conv2d(width, width, 3, padding=1) if conv else nn.Linear(width, width)
        )
        norm = nn.BatchNorm2d(width) if conv else nn.BatchNorm1d(width)
        return nn.Sequential(norm, nn.ReLU(), weights)

    return he(Stack([block() for _ in range(depth)], residual=True))


def small_vit():
    vit = VisionTransformer(
        image_size=8, patch_size=4, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=16
    )
    nn.init.normal_(vit.heads.head.weight)
    return vit


def group_norm_net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 4, 3), nn.Tanh()
    )


def examples(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


def frozen_to_its_batch(net, x):
    """Set running statistics to the batch's, one norm after the other."""

    def calibrate(norm, args):
        dims = [d for d in range(args[0].ndim) if d != 1]
        norm.running_mean = args[0].detach().mean(dims)
        norm.running_var = args[0].detach().var(dims, correction=0)

    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    handles = [norm.register_forward_pre_hook(calibrate) for norm in norms]
    net.eval()(x)
    for handle in handles:
        handle.remove()
    return net


def entering_noise(x, seed=0):
    return example_noise(x, x, seed=seed) * central_moment(x, 2, channel_dim=1).sqrt()


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: batch_norm_residual(3, 6), (9, 6)),
        (lambda: batch_norm_residual(2, 4, conv=True), (5, 4, 6, 6)),
        (small_vit, (3, 3, 8, 8)),
        (group_norm_net, (3, 3, 8, 8)),
    ],
)
def test_noise_is_the_jacobian_vector_product_at_every_module(make, shape):
    torch.manual_seed(0)
    net = make().double()
    x = examples(*shape, dtype=torch.float64)
    profile = signal_and_noise(net, x, sites=".")
    frozen_to_its_batch(net, x)

    # The oracle differentiates backwards twice; the measure never does.
    names = [name for name, m in net.named_modules() if not [*m.children()]]

    def outputs(x):
        kept = {}
        handles = [
            net.get_submodule(name).register_forward_hook(
                lambda m, args, output, name=name: kept.update({name: output})
            )
            for name in names
        ]
        output = net(x)
        for handle in handles:
            handle.remove()
        tensors = {k: v for k, v in kept.items() if isinstance(v, torch.Tensor)}
        order[:] = tensors
        return (*tensors.values(), output)

    order = []
    with sdpa_kernel(SDPBackend.MATH):  # others have no second derivative
        signals, noises = jvp(outputs, x, entering_noise(x))
    by_name = {site.name.split(".", 1)[1]: site for site in profile.sites[1:]}
    assert len(order) > 4
    for name, signal, noise in zip(order, signals, noises, strict=False):
        site = by_name[name]
        torch.testing.assert_close(site.noise_power, raw_moment(noise, 2), **EXACT)
        torch.testing.assert_close(site.nu2, raw_moment(signal, 2), **EXACT)


def test_a_linear_net_multiplies_noise_by_its_mean_square_gain():
    net = nn.Linear(5, 3, bias=False).double()
    x = examples(400, 5, dtype=torch.float64)
    profile = signal_and_noise(net, x, sites=".", num_directions=50)
    gain = net.weight.square().sum(1).mean()
    noise = profile.sites[-1].noise_power / profile.sites[0].noise_power
    # 20,000 draws of a mean of three quadratic forms: relative error below 1/100.
    assert noise.item() == pytest.approx(gain.item(), rel=4 / 100)


def test_each_of_several_directions_is_another_noise():
    x = examples(4, 6)
    rows = x.repeat_interleave(3, 0)
    noise = example_noise(rows, rows, seed=0, copies=3)
    assert torch.unique(noise, dim=0).shape == (12, 6)
    torch.testing.assert_close(noise[::3], example_noise(x, x, seed=0), rtol=0, atol=0)


def test_noise_of_an_example_does_not_depend_on_its_place():
    x = examples(6, 4)
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    shuffled = example_noise(x[order], x[order], seed=1)
    torch.testing.assert_close(shuffled, example_noise(x, x, seed=1)[order])
    assert not torch.equal(example_noise(x, x, seed=2), example_noise(x, x, seed=1))


def test_increments_of_relu_and_of_norm_follow_from_their_points():
    torch.manual_seed(0)
    net = batch_norm_stack(4, 16)
    profile = signal_and_noise(net, examples(64, 16))
    norms, activations = profile.of_kind("norm"), profile.of_kind("activation")
    for norm, activation, previous in zip(
        norms, activations, [profile.sites[0], *activations], strict=False
    ):
        torch.testing.assert_close(
            norm.delta_bn, norm.sensitivity / previous.sensitivity
        )
        torch.testing.assert_close(
            activation.delta_phi, activation.sensitivity / norm.sensitivity
        )
        assert activation.delta_phi == activation.delta


def test_relu_after_batch_norm_has_the_papers_increment():
    # delta_phi^2 = 1 / (1 - nu_1^2 / 2): noise halves, and so does the second moment.
    torch.manual_seed(0)
    net = batch_norm_stack(1, 512)
    profile = signal_and_noise(net, examples(512, 512))
    (norm,), (relu,) = profile.of_kind("norm"), profile.of_kind("activation")
    expected = (1 - norm.nu1**2 / 2) ** -0.5
    assert relu.delta_phi.item() == pytest.approx(expected.item(), rel=0.01)


def test_additions_have_share_and_deviation_of_their_branch():
    torch.manual_seed(0)
    net = batch_norm_residual(1, 8).double()
    x = examples(32, 8, dtype=torch.float64)
    (addition,) = signal_and_noise(net, x).of_kind("addition")
    branch = net.train()(x) - x
    added, kept = central_moment(branch, 2), central_moment(x, 2)
    torch.testing.assert_close(addition.branch_share, added / (added + kept), **EXACT)
    ratio = (branch.norm() / x.norm()).detach()
    torch.testing.assert_close(addition.identity_deviation, ratio, **EXACT)


def test_a_scaled_to_zero_branch_leaves_everything_as_it_is():
    net = batch_norm_residual(3, 8)
    for layer in net.modules():
        if isinstance(layer, nn.Linear):
            nn.init.zeros_(layer.weight)
    additions = signal_and_noise(net, examples(16, 8)).of_kind("addition")
    for addition in additions:
        assert addition.branch_share == 0
        assert addition.identity_deviation == 0
        assert addition.delta == 1


class Functional(nn.Module):
    """A ReLU that only a function mode can see."""

    def __init__(self, inplace):
        super().__init__()
        self.inplace = inplace

    def forward(self, h):
        return F.relu(h, inplace=self.inplace)


@pytest.mark.parametrize("inplace", [False, True])
def test_functional_and_in_place_activations_are_the_module(inplace):
    torch.manual_seed(0)
    net = batch_norm_stack(2, 8)
    x = examples(16, 8)
    expected = signal_and_noise(net, x)
    for block in net.blocks:
        block[2] = Functional(inplace)
    profile = signal_and_noise(net, x)
    for site, other in zip(profile.sites, expected.sites, strict=True):
        assert site.sensitivity == other.sensitivity
        assert (
            site.effective_rank is None or site.effective_rank == other.effective_rank
        )


@pytest.mark.parametrize("norm_mode", ["eval", "frozen"])
@pytest.mark.parametrize("num_chunks", [3, 7, 20])
def test_chunks_give_the_same_profile(norm_mode, num_chunks):
    torch.manual_seed(0)
    net = batch_norm_stack(3, 12).double()
    x = examples(17, 12, dtype=torch.float64)
    whole = signal_and_noise(net, x, norm_mode=norm_mode, num_directions=2)
    parts = signal_and_noise(
        net, x, norm_mode=norm_mode, num_directions=2, num_chunks=num_chunks
    )
    for site, other in zip(parts.sites, whole.sites, strict=True):
        for name in ("mu2", "nu2", "mu4", "effective_rank", "log_sensitivity", "delta"):
            torch.testing.assert_close(getattr(site, name), getattr(other, name))


def test_rescaling_the_noise_changes_no_digit(monkeypatch):
    torch.manual_seed(0)
    net = batch_norm_stack(40, 16)
    x = examples(32, 16)
    rescaled = signal_and_noise(net, x)
    monkeypatch.setattr(recorder, "_FAR", 10**6)
    plain = signal_and_noise(net, x)
    growth = rescaled.sites[-1].log_noise_power
    assert growth > 2 * 8 * math.log(2)  # more than one rescaling
    torch.testing.assert_close(
        growth, plain.sites[-1].log_noise_power, rtol=1e-12, atol=0
    )


def test_a_thousand_layers_give_finite_numbers():
    torch.manual_seed(0)
    profile = signal_and_noise(vanilla(1000, 32), examples(16, 32))
    assert len(profile.sites) == 1001
    assert all(site.log_sensitivity.isfinite() for site in profile.sites)
    assert all(site.effective_rank.isfinite() for site in profile.sites[1:])
    assert profile.sites[-1].effective_rank == pytest.approx(1, abs=1e-3)


def test_noise_beyond_the_range_of_float32_is_followed():
    torch.manual_seed(0)
    profile = signal_and_noise(batch_norm_stack(600, 32), examples(32, 32))
    assert profile.sites[-1].log_sensitivity > 100
    assert profile.sites[-1].log_sensitivity.isfinite()


def test_a_signal_beyond_the_range_of_float32_is_followed_in_float64():
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.ReLU(), nn.Linear(16, 16)) for _ in range(400)]
    net = he(Stack(blocks, residual=True))
    weight = net.blocks[0][1].weight
    profile = signal_and_noise(net, examples(8, 16))
    assert profile.sites[-1].nu2 > 1e80
    assert profile.sites[-1].log_sensitivity.isfinite()
    assert net.blocks[0][1].weight is weight
    assert weight.dtype == torch.float32


def test_memory_does_not_grow_with_depth():
    alive, counts = [], SimpleQueue()  # what a hook has in a list is put back

    def watch(module, args, output):
        alive[:] = [ref for ref in alive if ref() is not None] + [weakref.ref(output)]
        counts.put(len(alive))

    net = batch_norm_residual(30, 8)
    for module in net.modules():
        if not [*module.children()]:
            module.register_forward_hook(watch)
    flow = flow_between_sites(net, examples(16, 8))
    gc.collect()
    before = counts.qsize()
    signal_and_noise(net, examples(16, 8), sites=flow)
    seen = [counts.get() for _ in range(counts.qsize())][before:]
    assert 1 <= max(seen) <= 3


class Tokens(nn.Module):
    """Two embeddings, of the tokens and of their places, and a layer on the sum."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(11, 6)
        self.places = nn.Embedding(4, 6)
        self.layer = nn.TransformerEncoderLayer(6, 2, 12, batch_first=True)

    def forward(self, batch):
        places = torch.arange(batch["ids"].shape[1])
        return self.layer(self.tokens(batch["ids"]) + self.places(places))


def test_noise_of_tokens_begins_at_their_embedding_alone():
    torch.manual_seed(0)
    ids = torch.randint(11, (7, 4))
    net = Tokens().double()
    profile = signal_and_noise(net, {"ids": ids, "name": "a batch"}, sites=".")
    by_name = {site.name.split(".", 1)[1]: site for site in profile.sites[1:]}
    assert by_name["tokens"].log_sensitivity == 0
    assert "places" not in by_name
    x = net.tokens(ids)
    scale = net.tokens.weight.var(0, correction=0).mean().sqrt()
    noise = example_noise(x, ids, seed=0) * scale
    layer = net.layer.eval()
    places = net.places(torch.arange(4))
    with sdpa_kernel(SDPBackend.MATH):
        _, expected = jvp(lambda x: layer(x + places), x, noise)
    torch.testing.assert_close(
        by_name["layer.norm2"].noise_power, raw_moment(expected, 2), **EXACT
    )


class Distances(nn.Module):
    """A branch through an operation that has no forward-mode rule."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(5, 4)

    def forward(self, x):
        h = F.relu(self.first(x))
        far = torch.tanh(self.second(torch.cdist(h, torch.ones(5, 4))))
        return far, torch.sigmoid(h)


def test_an_operation_without_a_rule_is_named_and_the_rest_is_measured():
    profile = signal_and_noise(Distances(), examples(6, 4))
    assert profile.without_rule == ("cdist",)
    relu, tanh, sigmoid = profile.sites[1:]
    assert relu.log_sensitivity.isfinite()
    assert sigmoid.log_sensitivity.isfinite()
    assert tanh.log_sensitivity.isnan()
    assert tanh.mu2 > 0


class Doubling(torch.autograd.Function):
    """A function of a user's own, without `jvp`."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


class Doubled(nn.Module):
    def forward(self, x):
        return Doubling.apply(x)


def test_a_module_without_a_rule_is_named_and_left_as_it_was():
    net = nn.Sequential(nn.ReLU(), Doubled(), nn.Tanh())
    profile = signal_and_noise(net, examples(6, 4))
    assert profile.without_rule == ("1",)
    assert profile.sites[1].log_sensitivity.isfinite()
    assert profile.sites[2].log_sensitivity.isnan()
    assert profile.sites[2].nu2 > 0
    assert "forward" not in vars(net[1])


def test_fused_attention_and_recurrence_are_measured():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(4, 4, batch_first=True)
            self.norm = nn.LayerNorm(4)

        def forward(self, x):
            h, _ = self.lstm(F.scaled_dot_product_attention(x, x, x))
            return self.norm(h)

    profile = signal_and_noise(Mixed(), examples(3, 5, 4))
    assert profile.without_rule == ()
    assert profile.sites[-1].log_sensitivity.isfinite()


def test_the_model_the_examples_and_the_random_state_are_left_alone():
    net = FunctionalNet().train()
    x = examples(16, 8)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    kept, rng = x.clone(), torch.get_rng_state()
    signal_and_noise(net, x, num_chunks=2, num_directions=2)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert torch.equal(x, kept)
    assert torch.equal(rng, torch.get_rng_state())
    assert all(module.training for module in net.modules())
    assert all(p.grad is None for p in net.parameters())


def test_measuring_twice_gives_the_same_bits():
    net = FunctionalNet()
    first = signal_and_noise(net, examples(16, 8))
    second = signal_and_noise(net, examples(16, 8))
    assert [s.log_sensitivity for s in first.sites] == [
        s.log_sensitivity for s in second.sites
    ]


def test_a_collapsed_batch_has_infinite_sensitivity():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    x = torch.ones(8, 4)
    site = signal_and_noise(net, x).sites[-1]
    assert site.mu2 == 0
    assert site.sensitivity == torch.inf
    assert site.effective_rank.isnan()


def test_a_batch_of_one_has_no_variance():
    site = signal_and_noise(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), examples(1, 4))
    assert site.sites[-1].sensitivity == torch.inf


def test_a_dead_layer_has_infinite_sensitivity_and_no_rank():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh())
    nn.init.constant_(net[0].bias, -100.0)
    relu, tanh = signal_and_noise(net, examples(8, 4)).sites[1:]
    assert relu.mu2 == 0
    assert relu.noise_power == 0
    assert relu.sensitivity == torch.inf
    assert tanh.sensitivity == torch.inf


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_gives_values_that_are_not(value):
    net = nn.Sequential(nn.ReLU(), nn.Linear(4, 4), nn.Tanh())
    net[1].weight.data[0, 0] = value
    first, second = signal_and_noise(net, examples(8, 4)).sites[1:]
    assert first.log_sensitivity.isfinite()
    assert second.log_sensitivity.isnan()
    assert second.effective_rank.isnan()


def test_a_pattern_that_matches_nothing_names_the_sites():
    with pytest.raises(ValueError, match=r"'nowhere'.*000\.0"):
        signal_and_noise(nn.Sequential(nn.ReLU()), examples(4, 4), sites="nowhere")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_directions": 0}, "num_directions is 0"),
        ({"num_chunks": 0}, "num_chunks is 0"),
        ({"num_chunks": 2, "norm_mode": "train"}, "couples all examples"),
        ({"norm_mode": "other"}, "norm_mode is 'other'"),
    ],
)
def test_options_that_cannot_be_right_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        signal_and_noise(nn.ReLU(), examples(4, 4), **options)


def test_no_example_at_all_is_refused():
    with pytest.raises(ValueError, match="no example"):
        signal_and_noise(nn.ReLU(), torch.empty(0, 4))


def test_train_mode_differentiates_through_the_batch_statistics():
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm1d(4)).double()
    x = examples(8, 4, dtype=torch.float64)
    site = signal_and_noise(net, x, norm_mode="train").sites[-1]
    _, expected = jvp(nn.BatchNorm1d(4).double().train(), x, entering_noise(x))
    torch.testing.assert_close(site.noise_power, raw_moment(expected, 2), **EXACT)


def test_noise_is_rescaled_only_where_nothing_else_is_alive():
    net = batch_norm_residual(3, 8)
    flow = flow_between_sites(net, examples(4, 8))
    assert {site.kind for site in flow.sites if site.name in flow.cuts} == {"addition"}
    assert len(flow.cuts) == 3
    stack = batch_norm_stack(3, 8)
    assert len(flow_between_sites(stack, examples(4, 8)).cuts) == 6


def test_a_norm_is_compared_with_what_its_weights_saw():
    class Shortcut(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.ReLU()
            self.branch = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
            self.shortcut = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))

        def forward(self, x):
            h = self.act(x)
            return self.branch(h) + self.shortcut(h)

    profile = signal_and_noise(Shortcut(), examples(16, 8))
    relu, first, second, _ = profile.sites[1:]
    for norm in (first, second):
        torch.testing.assert_close(norm.delta_bn, norm.sensitivity / relu.sensitivity)


def test_effective_ranks_can_be_left_out_or_kept_to_some_sites():
    net, x = batch_norm_stack(3, 8), examples(16, 8)
    without = signal_and_noise(net, x, effective_rank=False)
    assert all(site.effective_rank is None for site in without.sites)
    some = signal_and_noise(net, x, effective_rank=r"blocks\.1\.")
    (ranked,) = [site for site in some.sites if site.effective_rank is not None]
    whole = signal_and_noise(net, x)[ranked.name]
    assert ranked.name.endswith("blocks.1.2")
    assert ranked.effective_rank == whole.effective_rank
