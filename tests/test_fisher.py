import pytest
import torch
from explicit_fisher import explicit_fisher, nonzero_eigenvalues
from fisher_cases import CASES, Residual, Transformer, case
from torch import nn
from torch.testing import assert_close

from lit_resnorm.measures.fisher import (
    FisherOptions,
    empirical_fisher_spectrum,
    fisher_spectrum,
)
from lit_resnorm.measures.fisher.gram import gram_matrix
from lit_resnorm.measures.fisher.measurement import measurement

EXACT = {"rtol": 1e-9, "atol": 0.0}
every_case = pytest.mark.parametrize("name", CASES)
every_mode = pytest.mark.parametrize("norm_mode", ["frozen", "eval", "train"])


def assert_same_spectrum(values, expected):
    assert len(values) == len(expected)
    # Small eigenvalues carry the rounding of the largest.
    assert_close(values, expected, rtol=1e-9, atol=1e-13 * float(expected[0]))


@every_mode
@every_case
def test_all_eigenvalues_and_the_trace_are_those_of_the_explicit_matrix(
    name, norm_mode
):
    model, x = case(name)
    expected = explicit_fisher(model, x, norm_mode=norm_mode)
    found = fisher_spectrum(model, x, norm_mode=norm_mode)
    assert_same_spectrum(found.eigenvalues, nonzero_eigenvalues(expected))
    assert found.trace == pytest.approx(float(expected.trace()), rel=1e-9)
    assert found.num_parameters == len(expected)
    assert found.num_examples == len(x)


@every_mode
@every_case
def test_trace_alone_and_each_layers_trace_are_those_of_the_explicit_matrix(
    name, norm_mode
):
    model, x = case(name)
    expected = explicit_fisher(model, x, norm_mode=norm_mode)
    found = fisher_spectrum(
        model, x, norm_mode=norm_mode, num_eigenvalues=0, per_layer=True
    )
    assert found.trace == pytest.approx(float(expected.trace()), rel=1e-9)
    assert found.mean == pytest.approx(
        float(expected.trace()) / len(expected), rel=1e-9
    )
    assert not found.eigenvalues.numel()
    diagonal = expected.diagonal()
    at = 0
    by_owner = {}
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            owner = parameter_name.rpartition(".")[0]
            part = float(diagonal[at : at + parameter.numel()].sum())
            by_owner[owner] = by_owner.get(owner, 0.0) + part
            at += parameter.numel()
    assert sorted(layer.trace for layer in found.layers.values()) == pytest.approx(
        sorted(by_owner.values()), rel=1e-9
    )


@pytest.mark.parametrize("name", ["residual", "transformer", "circular", "tied_words"])
@pytest.mark.parametrize("memory", [1, 10_000])
def test_little_memory_means_smaller_chunks_and_the_same_values(name, memory):
    model, x = case(name)
    expected = fisher_spectrum(model, x)
    found = fisher_spectrum(model, x, memory=memory)
    assert_same_spectrum(found.eigenvalues, expected.eigenvalues)


@pytest.mark.parametrize("positions", [1, 3, 24])
@pytest.mark.parametrize("width", [2, 12])
def test_every_way_to_a_layers_gram_matrix_gives_the_same(positions, width):
    # Positions and widths for which gradients, kept inputs and inner products win.
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(3, width),
        nn.Tanh(),
        nn.Linear(width, width),
        nn.Flatten(),
        nn.Linear(width * positions, 3),
    ).double()
    x = torch.randn(5, positions, 3).double()
    found = fisher_spectrum(net, x, per_layer=True, tol=1e-9)
    matrix = explicit_fisher(net, x)
    assert_same_spectrum(found.eigenvalues, nonzero_eigenvalues(matrix))
    at = 0
    for layer in found.layers.values():
        own = slice(at, at + layer.num_parameters)
        assert_same_spectrum(layer.eigenvalues, nonzero_eigenvalues(matrix[own, own]))
        at += layer.num_parameters
    assert at == len(matrix)


@pytest.mark.parametrize("norm_mode", ["frozen", "train"])
def test_each_layers_spectrum_is_that_of_its_own_block(norm_mode):
    model, x = case("residual")
    expected = explicit_fisher(model, x, norm_mode=norm_mode)
    found = fisher_spectrum(model, x, norm_mode=norm_mode, per_layer=True)
    names = [name.split(".", 1)[1] for name in found.layers]
    # The scale's owner is the net itself, named by the first site inside it.
    assert sorted(names) == ["again", "first", "head", "norm", "residual"]
    at = 0
    own = {}
    for name, parameter in model.named_parameters():
        places = torch.arange(at, at + parameter.numel())
        own.setdefault(name.rpartition(".")[0] or "residual", []).append(places)
        at += parameter.numel()
    for name, layer in found.layers.items():
        places = torch.cat(own[name.split(".", 1)[1]])
        block = expected[places][:, places]
        assert_same_spectrum(layer.eigenvalues, nonzero_eigenvalues(block))
        assert layer.num_parameters == len(places)


@pytest.mark.parametrize("norm_mode", ["frozen", "train"])
@pytest.mark.parametrize("name", ["residual", "circular", "transformer", "recurrent"])
def test_products_reach_the_largest_eigenvalues_cold_and_warm(
    name, norm_mode, monkeypatch
):
    monkeypatch.setattr(
        "lit_resnorm.measures.fisher.routes.matrix_is_cheaper", lambda *_: False
    )
    model, x = case(name)
    expected = nonzero_eigenvalues(explicit_fisher(model, x, norm_mode=norm_mode))
    options = {"norm_mode": norm_mode, "num_eigenvalues": 2, "tol": 1e-6}
    cold = fisher_spectrum(model, x, per_layer=True, **options)
    assert_close(cold.eigenvalues, expected[:2], rtol=1e-6, atol=0.0)
    assert cold.trace == pytest.approx(float(expected.sum()), rel=1e-9)
    for layer in cold.layers.values():
        assert 0 < float(layer.eigenvalues[0]) <= float(expected[0]) * (1 + 1e-6)
    warm = fisher_spectrum(model, x, start=cold.vectors, **options)
    assert_close(warm.eigenvalues, expected[:2], rtol=1e-6, atol=0.0)
    assert warm.num_products < cold.num_products
    for value, residual in zip(cold.eigenvalues, cold.residuals, strict=True):
        assert float((expected - value).abs().min()) <= float(residual) + 1e-12


@pytest.mark.parametrize("start", ["nan", "zero", "short", "flat", "other batch"])
def test_a_start_that_is_none_of_this_measurement_gives_the_same_values(
    start, monkeypatch
):
    monkeypatch.setattr(
        "lit_resnorm.measures.fisher.routes.matrix_is_cheaper", lambda *_: False
    )
    model, x = case("residual")
    options = {"num_eigenvalues": 2, "tol": 1e-6}
    cold = fisher_spectrum(model, x, **options)
    generator = torch.Generator().manual_seed(1)
    bad = {
        "nan": torch.full_like(cold.vectors, float("nan")),
        "zero": torch.zeros_like(cold.vectors),
        "short": cold.vectors[:-1],
        "flat": cold.vectors[:, 0],
        "other batch": torch.randn(
            cold.vectors.shape, generator=generator, dtype=torch.float64
        ),
    }[start]
    again = fisher_spectrum(model, x, start=bad, **options)
    assert_close(again.eigenvalues, cold.eigenvalues, rtol=1e-6, atol=0.0)
    if start != "other batch":
        assert again.num_products == cold.num_products


def test_products_in_chunks_of_rows_equal_products_on_kept_graphs(monkeypatch):
    model, x = case("circular")
    monkeypatch.setattr(
        "lit_resnorm.measures.fisher.routes.matrix_is_cheaper", lambda *_: False
    )
    kept = fisher_spectrum(model, x, num_eigenvalues=1, tol=1e-8)
    monkeypatch.setattr("lit_resnorm.measures.fisher.measurement.KEPT_GRAPHS", 0)
    chunked = fisher_spectrum(model, x, num_eigenvalues=1, tol=1e-8, memory=1)
    assert_close(chunked.eigenvalues, kept.eigenvalues, rtol=1e-8, atol=0.0)


@pytest.mark.parametrize(
    ("output", "features"), [("bernoulli", 1), ("bernoulli", 3), ("gaussian", 3)]
)
@pytest.mark.parametrize("norm_mode", ["frozen", "train"])
def test_bernoulli_and_gaussian_outputs_have_their_own_curvature(
    output, features, norm_mode
):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, features)
    ).double()
    x = torch.randn(8, 4).double()
    expected = explicit_fisher(net, x, output=output, norm_mode=norm_mode)
    found = fisher_spectrum(net, x, output=output, norm_mode=norm_mode)
    assert_same_spectrum(found.eigenvalues, nonzero_eigenvalues(expected))


def test_a_single_logit_may_come_without_a_class_dimension():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 1)).double()
    x = torch.randn(8, 4).double()
    flat = fisher_spectrum(
        net, x, output="bernoulli", forward=lambda m, x: m(x).squeeze(1)
    )
    assert_same_spectrum(
        flat.eigenvalues, fisher_spectrum(net, x, output="bernoulli").eigenvalues
    )


@pytest.mark.parametrize("norm_mode", ["frozen", "train"])
def test_token_outputs_count_each_position_whose_label_is_not_ignored(norm_mode):
    model, x = case("transformer")
    labels = torch.randint(0, 3, x.shape).masked_fill(x == 0, -100)
    weights = (labels != -100).double()
    expected = explicit_fisher(
        model, x, forward=Transformer.tokens, weights=weights, norm_mode=norm_mode
    )
    found = fisher_spectrum(
        model, x, forward=Transformer.tokens, weights=weights, norm_mode=norm_mode
    )
    assert_same_spectrum(found.eigenvalues, nonzero_eigenvalues(expected))
    assert found.num_examples == int(weights.sum())


def test_dense_outputs_count_classes_along_dimension_one_and_take_class_weights():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 1))
    net, x = net.double(), torch.randn(2, 2, 3, 4).double()
    labels = torch.randint(0, 3, (2, 3, 4))
    weights = torch.tensor([1.0, 2.0, 0.5]).double()[labels]
    expected = explicit_fisher(net, x, class_dim=1, weights=weights)
    found = fisher_spectrum(net, x, weights=weights)
    assert_same_spectrum(found.eigenvalues, nonzero_eigenvalues(expected))


@pytest.mark.parametrize("output", ["softmax", "bernoulli", "gaussian"])
def test_empirical_fisher_is_the_second_moment_of_loss_gradients(output):
    model, x = case("residual")
    if output == "softmax":
        y = torch.arange(len(x)) % 3
        losses = nn.CrossEntropyLoss(reduction="none")
    else:
        y = torch.rand(len(x), 3).double().round()
        losses = {
            "bernoulli": nn.BCEWithLogitsLoss(reduction="none"),
            "gaussian": lambda f, y: (f - y).square() / 2,
        }[output]
    model.eval()
    parameters = list(model.parameters())
    gradients = torch.stack(
        [
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
            for loss in (losses(model(row[None]), label[None]).sum()
            for row, label in zip(x, y, strict=True))
        ]
    )  # fmt: skip
    expected = gradients.T @ gradients / len(x)
    found = empirical_fisher_spectrum(model, x, y, output=output, norm_mode="eval")
    assert_same_spectrum(found.eigenvalues, nonzero_eigenvalues(expected))
    expectation = fisher_spectrum(model, x, output=output, norm_mode="eval")
    assert not torch.isclose(found.eigenvalues[0], expectation.eigenvalues[0], rtol=0.1)


@pytest.mark.parametrize("label", [255, -7, 3])
def test_labels_of_weight_zero_may_be_any_number(label):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 1))
    net, x = net.double(), torch.randn(3, 2, 4, 4).double()
    y = torch.randint(0, 3, (3, 4, 4))
    weights = torch.ones(3, 4, 4)
    weights[0, :2] = 0
    found = empirical_fisher_spectrum(
        net, x, y.masked_fill(weights == 0, label), weights=weights
    )
    expected = empirical_fisher_spectrum(net, x, y, weights=weights)
    assert_same_spectrum(found.eigenvalues, expected.eigenvalues)
    with pytest.raises(ValueError, match=rf"a label is {label}, .* 3 classes"):
        empirical_fisher_spectrum(net, x, y.masked_fill(weights == 0, label))


@pytest.mark.parametrize("output", ["bernoulli", "gaussian"])
def test_targets_of_weight_zero_may_be_nan(output):
    model, x = case("residual")
    y = torch.rand(len(x), 3).double()
    weights = (torch.arange(len(x)) != 2).double()
    missing = y.clone()
    missing[2] = float("nan")
    of = [
        empirical_fisher_spectrum(model, x, t, output=output, weights=weights)
        for t in (missing, y)
    ]
    assert_same_spectrum(of[0].eigenvalues, of[1].eigenvalues)


def test_linear_regressions_spectrum_is_that_of_the_inputs_second_moment():
    torch.manual_seed(0)
    net = nn.Linear(4, 3, bias=False).double()
    x = torch.randn(9, 4).double()
    moments = torch.linalg.eigvalsh(x.T @ x / 9).flip(0)
    found = fisher_spectrum(net, x, output="gaussian")
    assert_close(found.eigenvalues, moments.repeat_interleave(3), **EXACT)
    assert found.rate_bound == pytest.approx(2 / float(moments[0]), rel=1e-12)
    scaled = fisher_spectrum(net, x, output="gaussian", loss_scale=2 / 3)
    assert_close(scaled.eigenvalues, found.eigenvalues * 2 / 3, **EXACT)


def test_targets_make_the_empirical_matrix_by_either_name():
    model, x = case("circular")
    y = torch.arange(len(x)) % 2
    found = fisher_spectrum(model, x, targets=y)
    assert_close(
        found.eigenvalues, empirical_fisher_spectrum(model, x, y).eigenvalues, **EXACT
    )
    assert found.trace != pytest.approx(fisher_spectrum(model, x).trace, rel=1e-3)


def test_an_option_that_there_is_none_of_is_refused_by_name():
    model, x = case("circular")
    with pytest.raises(TypeError, match="num_eigenvectors"):
        fisher_spectrum(model, x, num_eigenvectors=3)


def test_gram_matrix_bounds_the_largest_eigenvalue_from_both_sides():
    model, x = case("circular")
    options = FisherOptions()
    with measurement(model, x, options) as measured:
        gram = gram_matrix(measured.sweep, options.memory)
    largest = fisher_spectrum(model, x).max
    assert gram.norm() ** 2 / gram.trace() <= largest <= gram.norm() <= gram.trace()
    with measurement(model, x, FisherOptions(norm_mode="train")) as measured:
        coupled = measured.products()(measured.units())
    found = fisher_spectrum(model, x, norm_mode="train")
    assert_close(torch.linalg.eigvalsh(coupled)[-1], found.eigenvalues[0], **EXACT)


def test_many_rows_and_few_parameters_go_through_the_parameters_own_matrix():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    x = torch.randn(200, 2).double()
    expected = explicit_fisher(net, x)
    for k in (None, 3):
        found = fisher_spectrum(net, x, num_eigenvalues=k, per_layer=True, tol=1e-9)
        assert_same_spectrum(found.eigenvalues, nonzero_eigenvalues(expected)[:k])
        first = nonzero_eigenvalues(expected[:9, :9])
        assert_same_spectrum(found.layers["000.0"].eigenvalues, first[:k])


def test_single_precision_keeps_four_digits_down_to_a_ten_thousandth_of_the_largest():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 10)
    )
    x = torch.randn(40, 20)
    found = fisher_spectrum(net, x)
    expected = nonzero_eigenvalues(explicit_fisher(net.double(), x.double()))
    large = expected[expected > 1e-4 * expected[0]]
    # The matrix itself is rounded, by epsilon times its largest eigenvalue.
    rounding = torch.finfo(torch.float32).eps * float(expected[0])
    assert_close(found.eigenvalues[: len(large)], large, rtol=1e-4, atol=rounding)
    assert found.trace == pytest.approx(float(expected.sum()), rel=1e-5)


def test_half_precision_models_are_measured_in_single_precision():
    torch.manual_seed(0)
    net = Residual().bfloat16()
    x = torch.randn(7, 6).bfloat16()
    found = fisher_spectrum(net, x)
    wide = fisher_spectrum(net.float(), x.float())
    assert_close(found.eigenvalues, wide.eigenvalues, rtol=1e-5, atol=1e-6)


def test_nested_batches_are_passed_on_to_the_forward_function():
    model, x = case("residual")
    batch = {"image": x, "more": [torch.arange(len(x))]}
    found = fisher_spectrum(model, batch, forward=lambda m, b: m(b["image"]))
    assert_same_spectrum(found.eigenvalues, fisher_spectrum(model, x).eigenvalues)


def test_parameters_that_nothing_depends_on_count_and_add_nothing():
    model, x = case("residual")
    before = fisher_spectrum(model, x, per_layer=True)
    model.unused = nn.Linear(3, 3).double()
    after = fisher_spectrum(model, x, per_layer=True)
    assert_same_spectrum(after.eigenvalues, before.eigenvalues)
    assert after.num_parameters == before.num_parameters + 12


def test_a_batch_of_one_and_more_eigenvalues_than_the_rank():
    model, x = case("weight_normed")
    expected = nonzero_eigenvalues(explicit_fisher(model, x[:1]))
    assert len(expected) == 2
    for k in (None, 10):
        found = fisher_spectrum(model, x[:1], num_eigenvalues=k)
        assert_close(found.eigenvalues, expected, **EXACT)


@pytest.mark.parametrize("num_eigenvalues", [None, 0, 2])
@pytest.mark.parametrize("norm_mode", ["frozen", "train"])
def test_weights_that_are_nan_give_nan_and_no_error(num_eigenvalues, norm_mode):
    model, x = case("residual")
    with torch.no_grad():
        model.first.weight.fill_(float("nan"))
    found = fisher_spectrum(
        model, x, num_eigenvalues=num_eigenvalues, norm_mode=norm_mode
    )
    assert torch.isnan(torch.tensor(found.trace))
    assert torch.isnan(torch.tensor(found.max))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": "poisson"}, "output is 'poisson'"),
        ({"norm_mode": "live"}, "norm_mode is 'live'"),
        ({"num_eigenvalues": -1}, "num_eigenvalues is -1"),
        ({"tol": 0.0}, "tol is 0.0"),
        ({"class_dim": 2}, "class_dim is 2"),
        ({"class_dim": 0}, "class_dim 0"),
        ({"weights": torch.ones(3)}, r"weights have shape \(3,\)"),
        ({"weights": -torch.ones(7)}, "weights go down to -1"),
        ({"weights": torch.zeros(7)}, "no position"),
        ({"forward": lambda m, x: (m(x), x)}, "is a tuple"),
        ({"forward": lambda m, x: m(x).argmax(1)}, "torch.int64"),
        ({"forward": lambda m, x: m(x)[:, :1]}, "bernoulli"),
        ({"forward": lambda m, x: m(x).detach()}, "does not depend"),
    ],
)
def test_what_can_not_be_right_is_refused_by_name_and_value(options, message):
    model, x = case("residual")
    with pytest.raises(ValueError, match=message):
        fisher_spectrum(model, x, **options)


def test_no_trainable_parameters_and_no_examples_are_refused():
    model, x = case("residual")
    with pytest.raises(ValueError, match="holds no example"):
        fisher_spectrum(model, x[:0])
    with pytest.raises(ValueError, match="no trainable parameter"):
        fisher_spectrum(model.requires_grad_(False), x)


def test_complex_parameters_and_torchscript_are_refused_by_name():
    model, x = case("residual")
    model.phase = nn.Parameter(torch.randn(2, dtype=torch.complex128))
    with pytest.raises(ValueError, match=r"parameter 'phase' is of torch\.complex128"):
        fisher_spectrum(model, x)
    with pytest.warns(FutureWarning):
        scripted = torch.jit.script(nn.Linear(6, 5).double())
    net = nn.Sequential(scripted, nn.ReLU(), nn.Linear(5, 3).double())
    with pytest.raises(ValueError, match="module '0' is TorchScript's"):
        fisher_spectrum(net, x)


def test_a_matrix_beyond_memory_is_refused_and_the_way_out_is_named(monkeypatch):
    model, x = case("residual")
    monkeypatch.setattr("lit_resnorm.measures.fisher.costs.free_memory", lambda _: 1000)
    with pytest.raises(ValueError, match="num_eigenvalues=10"):
        fisher_spectrum(model, x)


@every_mode
def test_a_measurement_leaves_the_model_and_the_random_state_as_they_were(norm_mode):
    model, x = case("residual")
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    fisher_spectrum(model, x, norm_mode=norm_mode, num_eigenvalues=1, per_layer=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.norm.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
