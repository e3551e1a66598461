import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch.testing import assert_close

from lit_resnorm import modules
from lit_resnorm.nets import Net, stacked_net
from lit_resnorm.nets.initialization import activation_gain
from lit_resnorm.nets.layers import Style
from lit_resnorm.nets.staged import staged_net
from lit_resnorm.nets.tiny import tiny_net

CONFIGS = Path(__file__).parent.parent / "configs" / "model"
POST_TAPS = [
    "in",
    "pre1",
    "norm1",
    "act1",
    "pre2",
    "branch_raw",
    "branch",
    "skip",
    "out",
]


def split(switches: dict) -> tuple[Style, dict]:
    """Separate the switches of the blocks' style from the others."""
    style = {k: v for k, v in switches.items() if k in Style.__annotations__}
    return Style(**style), {k: v for k, v in switches.items() if k not in style}


def fully_connected(
    depth: int = 3, width: int = 16, seed: int = 0, features: int = 16, **kwargs
) -> Net:
    style, others = split(kwargs)
    torch.manual_seed(seed)
    return stacked_net((features,), 10, depth=depth, width=width, style=style, **others)


def taps(net: Net, x: torch.Tensor) -> list[tuple[int, str, torch.Tensor]]:
    seen = []
    with torch.no_grad():
        net(x, lambda *record: seen.append(record))
    return seen


def tapped(net: Net, x: torch.Tensor, name: str) -> list[torch.Tensor]:
    return [value for _, n, value in taps(net, x) if n == name]


@pytest.mark.parametrize(
    ("switches", "expected", "tolerance"),
    [
        ({"residual": False, "layers_per_block": 1}, lambda _: 1.0, 0.10),
        ({}, lambda level: 2.0**level, 0.15),
        ({"norm": "batch"}, lambda level: 1 + level / 2, 0.05),
    ],
    ids=["mlp", "res2", "res2_bn"],
)
def test_second_moments_grow_with_depth_as_the_theory_says(
    switches, expected, tolerance
):
    width, depth, draws = 400, 3, 20
    moments = torch.zeros(depth)
    for seed in range(draws):
        net = fully_connected(depth, width, seed, features=width, **switches)
        x = torch.randn(100, width)
        x = x / x.norm(dim=1, keepdim=True) * math.sqrt(width)
        moments += torch.stack([h.square().mean() for h in tapped(net, x, "out")])
    for level, moment in enumerate(moments / draws, 1):
        assert moment.item() == pytest.approx(expected(level), rel=tolerance)


def test_variants_built_after_one_seed_share_tensors_of_equal_name_and_shape():
    plain = fully_connected().state_dict()
    for switches in (
        {"norm": "batch", "affine": True},
        {"scale": "skipinit", "bias": True},
        {"residual": False, "layers_per_block": 1},
        {"order": "pre", "layers_per_block": 1},
    ):
        other = fully_connected(**switches).state_dict()
        assert "blocks.2.w1.weight" in other
        for name in plain.keys() & other.keys():
            assert torch.equal(plain[name], other[name]), name


def test_building_any_variant_advances_the_global_generator_alike():
    fully_connected()
    state = torch.get_rng_state()
    fully_connected(depth=7, width=20, norm="batch")
    assert torch.equal(state, torch.get_rng_state())


def test_weights_differ_between_seeds_and_between_layers():
    net, other = fully_connected(seed=0), fully_connected(seed=1)
    w = [block.weights()[0].weight for block in net.blocks]
    assert not torch.equal(w[0], w[1])
    assert not torch.equal(w[0], other.blocks[0].weights()[0].weight)


def test_taps_come_once_an_application_in_order_of_execution():
    net = fully_connected(depth=2, norm="batch")
    seen = taps(net, torch.randn(8, 16))
    assert [(i, name) for i, name, _ in seen] == [
        (i, name) for i in range(2) for name in POST_TAPS
    ]
    records = {(i, name): value for i, name, value in seen}
    assert torch.equal(records[0, "out"], records[1, "in"])
    assert torch.equal(records[0, "out"], records[0, "skip"] + records[0, "branch"])
    assert torch.equal(records[0, "act1"], records[0, "norm1"].relu())
    assert_close(
        records[0, "norm1"], F.batch_norm(records[0, "pre1"], None, None, training=True)
    )


def test_plain_nets_have_no_skip_and_their_branch_is_their_output():
    net = fully_connected(depth=1, residual=False, layers_per_block=1)
    records = {name: value for _, name, value in taps(net, torch.randn(8, 16))}
    assert "skip" not in records
    assert torch.equal(records["branch"], records["out"])


def test_tied_blocks_are_tapped_by_depth_and_own_one_weight():
    net = fully_connected(depth=4, shared=4, order="pre", layers_per_block=1)
    indices = [i for i, name, _ in taps(net, torch.randn(2, 16)) if name == "pre1"]
    assert indices == [0, 1, 2, 3]
    in_blocks = [n for n, _ in net.blocks.named_parameters()]
    assert in_blocks == ["0.w1.weight"]


@pytest.mark.parametrize("scale", ["skipinit", "rezero", "fixup"])
def test_branches_that_start_at_zero_make_every_block_the_identity(scale):
    net = fully_connected(scale=scale, bias=True)
    x = torch.randn(8, 16)
    for before, after in zip(tapped(net, x, "in"), tapped(net, x, "out"), strict=True):
        assert torch.equal(before, after)


def test_fixup_starts_as_the_zero_function_with_scaled_first_layers():
    depth, width = 9, 200
    net = fully_connected(depth, width, scale="fixup", features=width)
    assert net(torch.randn(8, width)).count_nonzero() == 0
    std = net.blocks[0].weights()[0].weight.std().item()
    assert std == pytest.approx(math.sqrt(2 / width) * depth**-0.5, rel=0.02)
    for parameter in net.blocks.parameters():
        assert parameter.requires_grad


@pytest.mark.parametrize(
    ("switches", "factor"),
    [
        ({"scale": "scaled", "beta": 0.25}, 9**-0.25),
        ({"scale": "half"}, math.sqrt(0.5)),
        ({"scale": "skipinit", "alpha": 0.3}, 0.3),
        ({"scale": "nf"}, 0.2),
    ],
)
def test_branch_is_the_raw_branch_times_its_multiplier(switches, factor):
    net = fully_connected(depth=9, **switches)
    x = torch.randn(8, 16)
    raw, branch = tapped(net, x, "branch_raw")[4], tapped(net, x, "branch")[4]
    assert_close(branch, raw * factor)
    skip, before = tapped(net, x, "skip")[4], tapped(net, x, "in")[4]
    assert_close(skip, before * (factor if switches["scale"] == "half" else 1.0))


def test_normalisation_free_branches_see_inputs_of_unit_variance():
    depth, width = 8, 400
    net = fully_connected(depth, width, features=width, scale="nf", order="pre")
    for block, h in zip(
        net.blocks, tapped(net, torch.randn(64, width), "norm1"), strict=True
    ):
        assert h.square().mean().item() == pytest.approx(1, rel=0.1)
        weight = block.w1.weight
        assert_close(weight.mean(1), torch.zeros(width), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "switches",
    [
        {},
        {"order": "pre"},
        {"layers_per_block": 1},
        {"layers_per_block": 3},
        {"activation": "linear"},
        {"activation": "gelu"},
        {"activation": "tanh", "order": "pre"},
        {"activation": "leaky_relu", "layers_per_block": 1},
    ],
    ids=str,
)
def test_normalisation_free_branches_have_variance_one_in_every_order(switches):
    depth, width = 8, 512
    net = fully_connected(depth, width, features=width, scale="nf", **switches)
    x = torch.randn(256, width)
    branches = torch.stack([b.var() for b in tapped(net, x, "branch_raw")])
    # one layer's variance differs by sqrt(2 / width) = 6 % from draw to draw, and
    # three layers and eight blocks share that out
    assert branches.mean().item() == pytest.approx(1, rel=0.1)
    *_, state = tapped(net, x, "out")
    assert state.var().item() == pytest.approx(1 + depth * 0.2**2, rel=0.1)


def test_gain_of_standardised_weights_multiplies_them():
    plain, doubled = (
        fully_connected(scale="nf", gain=gain).blocks[0].w1.weight for gain in (1, 2)
    )
    assert torch.equal(doubled, 2 * plain)


def test_activation_gains_are_the_closed_forms():
    relu = activation_gain(torch.nn.ReLU())
    assert relu == math.sqrt(2 / (1 - 1 / math.pi))
    assert activation_gain(torch.nn.Identity()) == 1
    # the same, from the rule that serves the others; its error at a kink is 1e-8
    assert activation_gain(torch.nn.LeakyReLU(0.0)) == pytest.approx(relu, rel=1e-8)
    slope = 0.01
    mean, square = (1 - slope) / math.sqrt(2 * math.pi), (1 + slope**2) / 2
    leaky = activation_gain(torch.nn.LeakyReLU(slope))
    assert leaky == pytest.approx((square - mean**2) ** -0.5, rel=1e-8)


def test_weight_norm_starts_with_rows_of_their_he_norm():
    net = fully_connected(weight="weight_norm").double()
    for block in net.blocks:
        for k, variance in (("w1", 2.0), ("w2", 1.0)):
            norms = block.get_submodule(k).weight.norm(dim=1)
            expected = torch.full_like(norms, math.sqrt(variance))
            assert_close(norms, expected, rtol=1e-6, atol=0)


def test_smooth_weights_have_the_gaussian_kernel_in_depth():
    depth, width, length = 20, 200, 0.1
    net = modules.LitSmoothResNet(depth, width, correlation_length=length).net
    weights = torch.stack([b.w1.weight.detach().flatten() for b in net.blocks])
    covariance = weights.double() @ weights.double().T / width
    times = torch.arange(depth, dtype=torch.float64) / depth
    kernel = torch.exp(-((times[:, None] - times) ** 2) / (2 * length**2))
    # Each entry is a mean of width^2 products of variance at most 2.
    assert (covariance - kernel).abs().max() < 5 * math.sqrt(2) / width


@pytest.mark.parametrize(
    ("unshare", "per_tied_block"), [("none", 0), ("stats", 0), ("stats+affine", 2)]
)
def test_tied_blocks_keep_of_their_norms_what_is_asked(unshare, per_tied_block):
    torch.manual_seed(0)
    style = Style(norm="batch", affine=True, gamma_init=0.1)
    net = staged_net(
        (1, 8, 8),
        10,
        stages=[4],
        widths=[4],
        style=style,
        shared=3,
        unshare_bn=unshare,
    )
    first, _, third = net.blocks[1:]
    assert first.w1 is third.w1
    assert (first.norm1 is third.norm1) == (unshare == "none")
    assert (first.norm1.weight is third.norm1.weight) == (per_tied_block == 0)
    assert_close(third.norm1.weight.detach(), torch.full((4,), 0.1))
    norms = {n for n, _ in net.blocks.named_parameters() if "norm" in n}
    assert len(norms) == 2 * 4 + 2 * 2 * per_tied_block
    net(torch.randn(4, 1, 8, 8))
    tracked = {block.norm1.num_batches_tracked.item() for block in net.blocks[1:]}
    assert tracked == ({3} if unshare == "none" else {1})


def test_modified_shortcut_adds_a_scaled_average_and_no_parameter():
    nets = []
    for modified in (False, True):
        torch.manual_seed(0)
        nets.append(
            staged_net(
                (3, 8, 8),
                10,
                stages=[1, 1],
                widths=[4, 9],
                style=Style(norm="batch", affine=True),
                shortcut_of="activation",
                shortcut_mod=modified,
            ).double()
        )
    plain, modified = (dict(net.state_dict()) for net in nets)
    assert plain.keys() == modified.keys()
    for name, value in plain.items():
        assert torch.equal(value, modified[name]), name
    x = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    of_plain, of_modified = (tapped(net, x, "skip")[1] for net in nets)
    o = tapped(nets[1], x, "act1")[1]
    expected = torch.zeros_like(of_plain)
    blocks = o.unflatten(2, (4, 2)).unflatten(4, (4, 2))
    expected[:, 3:7] = 2 * blocks.mean((3, 5))
    assert_close(of_modified - of_plain, expected, rtol=0, atol=1e-12)


def test_tiny_net_averages_with_seven_channels_in_front():
    torch.manual_seed(0)
    net = tiny_net(
        (1, 28, 28), 10, skips="pooled", style=Style(norm="batch", affine=True)
    )
    x = torch.randn(3, 1, 28, 28)
    skip, o = tapped(net, x, "skip")[1], tapped(net, x, "act1")[1]
    identity = (skip - net.blocks[1].shortcut.conv(o)).detach()
    assert identity.shape == (3, 20, 4, 4)
    assert identity[:, :7].abs().max() < 1e-6
    assert identity[:, 12:].abs().max() < 1e-6
    assert_close(identity[:, 7:12], 3 * F.avg_pool2d(o, 3), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "trainable", "total"),
    [
        ("resnet110", 1_734_666, 1_742_762),
        ("avgpool_resnet", 12_183_010, 12_201_310),
        ("wide", 45_711_050, 45_732_842),
    ],
)
def test_published_parameter_counts_come_out(name, trainable, total):
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["model"]
    kind = getattr(modules, config["class_path"].rpartition(".")[2])
    net = kind(in_shape=(3, 32, 32), num_classes=10, **config["init_args"]).net
    assert sum(p.numel() for p in net.parameters()) == trainable
    running = sum(b.numel() for n, b in net.named_buffers() if "running" in n)
    assert trainable + running == total


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_variant_runs_in_float32_and_under_bf16_autocast(path):
    config = yaml.safe_load(path.read_text())["model"]
    kind = getattr(modules, config["class_path"].rpartition(".")[2])
    args = config.get("init_args", {})
    # The smallest net of each kind: same switches, fewer and narrower blocks.
    if "stages" in args:
        args |= {"stages": [2, 2], "width": 4, "widths": None, "stem_width": None}
        args |= {"shared": 1} if "shared" in args else {}
    elif "depth" in args:
        args |= {"depth": 2, "width": 4}
    shape = (1, 28, 28) if "tiny" in path.stem else (2, 8, 8)
    net = kind(in_shape=shape, num_classes=3, **args).net
    x = torch.randn(4, *shape)
    net(x).sum().backward()
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)
    with torch.autocast("cpu", torch.bfloat16):
        out = net(x)
    assert out.shape == (4, 3)
    assert out.isfinite().all()
    assert net.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "switches",
    [
        {"norm": "batch", "shared": 2, "unshare_bn": "stats"},
        {"scale": "fixup", "activation": "gelu"},
        {"weight": "weight_norm"},
        {"scale": "nf", "order": "pre", "kernel_size": 3},
    ],
    ids=lambda s: next(iter(s.values())),
)
def test_nets_compile_to_one_graph_with_the_same_output(switches):
    style, others = split(switches)
    net = stacked_net((1, 4, 4), 10, depth=2, width=16, style=style, **others)
    x = torch.randn(4, 1, 4, 4)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    assert_close(compiled(x), net(x))


def test_periodic_convolutions_commute_with_shifts_and_zero_padded_ones_do_not():
    def shift_error(boundary):
        style = Style(boundary=boundary)
        net = stacked_net(
            (1, 8, 8), 10, depth=2, width=4, style=style, kernel_size=3
        ).double()
        x = torch.randn(3, 1, 8, 8, dtype=torch.float64)
        return (net(x) - net(x.roll((2, 3), (2, 3)))).abs().max().item()

    torch.manual_seed(0)
    assert shift_error("periodic") < 1e-12
    assert shift_error("zero_padding") > 1e-3


def test_inputs_of_the_nets_width_have_no_stem_and_others_a_frozen_projection():
    assert not list(fully_connected(features=16).stem.parameters())
    (projection,) = fully_connected(features=400, width=100).stem.parameters()
    assert not projection.requires_grad
    assert projection.std().item() == pytest.approx(1 / 20, rel=0.02)


def test_linear_activation_gives_the_product_of_the_layer_maps():
    net = fully_connected(depth=2, activation="linear", layers_per_block=1).double()
    x = torch.randn(5, 16, dtype=torch.float64)
    maps = [torch.eye(16) + block.w1.weight for block in net.blocks]
    expected = x @ (net.head.fc.weight @ maps[1] @ maps[0]).T
    assert_close(net(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        ({"depth": 0}, "depth must be at least 1; got 0"),
        ({"depth": -3}, "depth must be at least 1; got -3"),
        ({"width": 0}, "width must be at least 1; got 0"),
        ({"layers_per_block": 0}, "layers_per_block must be at least 1; got 0"),
        (
            {"norm": "instance"},
            "norm must be one of none, batch, layer; got 'instance'",
        ),
        ({"activation": "cube"}, "activation must be one of relu, .*got 'cube'"),
        ({"boundary": "torus"}, "boundary must be one of .*got 'torus'"),
        ({"scale": "big"}, "scale must be one of unscaled, .*got 'big'"),
        ({"weight": "ternary"}, "weight must be one of .*got 'ternary'"),
        ({"order": "mid"}, "order must be one of post, pre; got 'mid'"),
        ({"stem": "none"}, "stem must be one of auto, projection; got 'none'"),
        ({"unshare_bn": "all"}, "unshare_bn must be one of .*got 'all'"),
        ({"shared": 4}, "shared must be between 0 and the 3 blocks; got 4"),
        ({"kernel_size": 3}, r"need in_shape \(channels, height, width\); got \(16,\)"),
        ({"kernel_size": 4}, "kernel_size must be odd and positive; got 4"),
        ({"scale": "half", "residual": False}, "'half' needs a skip connection"),
        ({"gamma_init": 0.1}, "gamma_init=0.1 needs a norm"),
        ({"correlation_length": 0.0}, "correlation_length must be positive"),
        ({"scale": "nf", "weight": "weight_norm"}, "needs weight='plain'"),
    ],
)
def test_what_can_not_be_is_refused_by_name_and_value(switches, message):
    with pytest.raises(ValueError, match=message):
        fully_connected(**switches)


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        ({"stages": [2, 0]}, "stages must be at least 1; got 0"),
        ({"stages": []}, "one number a stage"),
        ({"widths": [4]}, "one number a stage"),
        ({"widths": [4, 0]}, "widths must be at least 1; got 0"),
        ({"downsampling": "max"}, "downsampling must be one of .*got 'max'"),
        ({"shortcut_of": "out"}, "shortcut_of must be one of .*got 'out'"),
        ({"shared": 2}, "shared blocks need weights of equal shapes"),
    ],
)
def test_stages_that_can_not_be_are_refused(switches, message):
    options = {"stages": [2, 2], "widths": [4, 8], "style": Style()} | switches
    with pytest.raises(ValueError, match=message):
        staged_net((1, 8, 8), 10, **options)


def test_symmetric_boundaries_refuse_kernels_that_replication_would_change():
    style = Style(boundary="symmetric")
    stacked_net((1, 8, 8), 10, depth=1, width=4, style=style, kernel_size=3)
    with pytest.raises(ValueError, match="boundary='symmetric' takes kernels up to 3"):
        stacked_net((1, 8, 8), 10, depth=1, width=4, style=style, kernel_size=5)
