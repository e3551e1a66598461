"""What the packages export, and that it is imported only when it is used."""

import ast
import inspect
import re
import subprocess
import sys
from dataclasses import fields
from importlib import import_module, util
from pathlib import Path

import pytest
import shipped_quantities
import values_page

from lit_resnorm.measures import FisherOptions, fisher_spectrum
from lit_resnorm.measures.passes.untouched import identity
from lit_resnorm.quantities.explanations import EXPLANATIONS, reference

ROOT = Path(__file__).resolve().parents[1]

EXPORTED = {
    "lit_resnorm": [
        "FisherSpectrum",
        "Population",
        "RunHistory",
        "WandbHistory",
        "activation_rates",
        "empirical_fisher_spectrum",
        "fisher_spectrum",
        "read_offline_wandb",
        "read_run",
        "signal_and_noise",
    ],
    "lit_resnorm.measures": [
        "FisherOptions",
        "FisherSpectrum",
        "HessianSpectrum",
        "activation_rates",
        "batch_covariance_spectrum",
        "empirical_fisher_spectrum",
        "fisher_spectrum",
        "covariance_spectrum",
        "gradient_noise",
        "hessian_spectrum",
        "hutchinson_trace",
        "pathology",
        "propagate",
        "read_loss",
        "select",
        "separations",
        "signal_and_noise",
        "top_eigenpairs",
    ],
    "lit_resnorm.runs": [
        "ExactResume",
        "Run",
        "RunHistory",
        "WandbHistory",
        "read_offline_wandb",
        "read_run",
    ],
    "lit_resnorm.population": ["Population"],
    "lit_resnorm.data": [
        "CIFAR10",
        "CIFAR100",
        "MNIST",
        "DataModule",
        "Digits",
        "FashionMNIST",
        "Gaussian",
        "ImageNet",
        "StepSeed",
    ],
    "lit_resnorm_callbacks": [
        "ActivationRateMonitor",
        "Cadence",
        "FIMEigenvalueProbe",
        "GradientCovarianceProbe",
        "GradientMonitor",
        "HeadroomProbe",
        "HessianProbe",
        "IterativeInferenceMonitor",
        "MomentTracer",
        "NormPreservationMonitor",
        "Probe",
        "StabilityProbe",
    ],
}


@pytest.mark.parametrize("package", EXPORTED)
def test_a_package_exports_these_names_and_no_others(package):
    module = import_module(package)
    assert sorted(module.__all__) == sorted(EXPORTED[package])
    for name in EXPORTED[package]:
        assert getattr(module, name).__name__ == name
        # else the module would stand in its place once it is imported
        assert util.find_spec(f"{package}.{name}") is None


@pytest.mark.parametrize(
    "package", ["lit_resnorm", "lit_resnorm.measures", "lit_resnorm.runs"]
)
def test_what_is_exported_is_imported_when_it_is_used(package):
    code = (
        f"import sys, {package}; assert not {{'torch', 'lightning'}} & {{*sys.modules}}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_name_that_a_package_lacks_is_refused_as_of_any_module():
    with pytest.raises(AttributeError, match="has no attribute 'fisher_spectra'"):
        import_module("lit_resnorm.measures").fisher_spectra  # noqa: B018


def test_fisher_spectrum_takes_what_its_options_have_with_the_same_defaults():
    signature = inspect.signature(fisher_spectrum)
    said = {
        name: parameter.default
        for name, parameter in signature.parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    assert said == {
        "output": "softmax",
        "norm_mode": "frozen",
        "num_eigenvalues": None,
        "tol": 1e-5,
        "per_layer": False,
        "reduce": identity,
        "targets": None,
    }
    options = {field.name: field.default for field in fields(FisherOptions)}
    assert said.items() <= options.items()
    further = options.keys() - said.keys()
    assert all(f"`{name}`" in (fisher_spectrum.__doc__ or "") for name in further)


def test_the_page_of_values_explains_each_value_and_each_finding():
    text = values_page.PATH.read_text(encoding="utf-8")
    assert text == shipped_quantities.page(), "run tests/shipped_quantities.py"
    anchors = re.findall(r'<a id="([^"]+)">', text)
    assert len({*anchors}) == len(anchors)
    expected = {values_page.anchor(key) for key in shipped_quantities.rows()}
    assert {*anchors} == expected | EXPLANATIONS.keys()
    assert {*re.findall(r"\]\(#([^)]+)\)", text)} <= {*anchors}
    assert reference("signal") == "docs/values.md#signal"


def warnings_of_callbacks():
    """Each call that warns, by its place."""
    for path in sorted((ROOT / "callbacks/lit_resnorm_callbacks").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func).rpartition(".")[2]
                if name in ("_warn_once", "rank_zero_warn"):
                    yield f"{path.name}:{node.lineno}", ast.unparse(node)


def test_every_warning_of_a_callback_says_where_it_is_explained():
    found = dict(warnings_of_callbacks())
    assert len(found) > 4
    for place, call in found.items():
        names = {*re.findall(r"['\"](\w+)['\"]", call)} & EXPLANATIONS.keys()
        assert names or "reference(" in call or "{see}" in call, (
            f"{place}: name an entry of lit_resnorm/quantities/explanations.py"
        )


def names_of_findings():
    """Each finding that `diagnose` and `compare` make, by its place."""
    for path in sorted((ROOT / "lit_resnorm/diagnose").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = isinstance(node, ast.Call) and ast.unparse(node.func)
            if called in ("Finding", "measured.finding"):
                yield f"{path.name}:{node.lineno}", ast.unparse(node.args[0])
    path = ROOT / "lit_resnorm/compare/findings.py"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Yield) and isinstance(node.value, ast.Tuple):
            yield f"{path.name}:{node.lineno}", ast.unparse(node.value.elts[1])


def test_every_finding_is_explained():
    found = dict(names_of_findings())
    literal = {name.strip("'") for name in found.values() if name.startswith("'")}
    assert len(literal) > 20
    assert literal <= EXPLANATIONS.keys()
    # `exploding_activations` and its like are made of two words
    made = {name for name in found.values() if not name.startswith("'")}
    assert made <= {"name", "f'{how}_{what}'"}
    for how in ("exploding", "vanishing"):
        assert {f"{how}_activations", f"{how}_gradients"} <= EXPLANATIONS.keys()
