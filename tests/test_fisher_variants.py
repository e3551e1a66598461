"""The Fisher matrix of every architecture variant, against explicit Jacobians."""

from pathlib import Path

import pytest
import torch
import yaml
from explicit_fisher import explicit_rows, nonzero_eigenvalues
from torch.testing import assert_close

from lit_resnorm import modules
from lit_resnorm.measures.fisher import fisher_spectrum

CONFIGS = Path(__file__).parent.parent / "configs" / "model"


def small_net(path):
    """Return the configured net with fewer and narrower blocks, and a batch."""
    config = yaml.safe_load(path.read_text())["model"]
    kind = getattr(modules, config["class_path"].rpartition(".")[2])
    args = config.get("init_args", {})
    if "stages" in args:
        args |= {"stages": [2, 2], "width": 2, "widths": None, "stem_width": None}
        args |= {"shared": 1} if "shared" in args else {}
    elif "depth" in args:
        args |= {"depth": 2, "width": 3}
    shape = (1, 28, 28) if "tiny" in path.stem else (1, 6, 6)
    torch.manual_seed(0)
    net = kind(in_shape=shape, num_classes=3, **args).net.double()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if parameter.requires_grad and not parameter.any():
                # A branch that starts at zero would hide what lies behind it.
                parameter.add_(0.3 if "bias" not in name else 0.1)
        net(torch.randn(8, *shape).double())  # running statistics for mode eval
    return net, torch.randn(4, *shape).double()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_variants_spectrum_is_that_of_the_explicit_matrix(path):
    net, x = small_net(path)
    for norm_mode in ("frozen", "eval", "train"):
        rows = explicit_rows(net, x, norm_mode=norm_mode)
        expected = nonzero_eigenvalues(rows @ rows.T)
        found = fisher_spectrum(net, x, norm_mode=norm_mode)
        assert len(found.eigenvalues) == len(expected)
        assert_close(
            found.eigenvalues, expected, rtol=1e-9, atol=1e-12 * float(expected[0])
        )
        assert found.trace == pytest.approx(float(rows.square().sum()), rel=1e-9)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_variant_in_single_precision_keeps_four_digits(path):
    net, x = small_net(path)
    for norm_mode in ("frozen", "eval"):
        found = fisher_spectrum(net.float(), x.float(), norm_mode=norm_mode)
        rows = explicit_rows(net.double(), x.float().double(), norm_mode=norm_mode)
        expected = nonzero_eigenvalues(rows @ rows.T)
        large = expected[expected > 1e-4 * expected[0]]
        # The matrix itself is rounded, by epsilon times its largest eigenvalue.
        rounding = torch.finfo(torch.float32).eps * float(expected[0])
        assert_close(found.eigenvalues[: len(large)], large, rtol=1e-4, atol=rounding)
