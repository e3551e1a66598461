"""DataModules: what is in each set, in which order, and how bad options are refused."""

import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch.testing import assert_close
from torchvision import datasets

from lit_resnorm.data import (
    CIFAR10,
    CIFAR100,
    MNIST,
    Digits,
    FashionMNIST,
    Gaussian,
    ImageNet,
)
from lit_resnorm.data.examples import ShiftAndFlip
from lit_resnorm.data.gaussian import powerlaw_factor
from lit_resnorm.data.images import pca_whitening
from lit_resnorm.data.sampling import BatchKey, stream
from lit_resnorm.data.torchvision_images import CIFAR10_NAMES, CIFAR100_NAMES

ROOT = os.environ.get("LIT_RESNORM_DATA")


def set_up(data):
    data.prepare_data()
    data.setup("fit")
    return data


def pixels(data, examples):
    """Return the images before standardising, as rows of whole numbers."""
    # Digits' lowest value is 0 and its step is one unit: both can be read off.
    x = examples.x.flatten(1).double()
    values = torch.cat([data.train_set.x, data.val_set.x, data.test_set.x]).unique()
    unit = (values.max() - values.min()) / 16
    return ((x - values.min()) / unit).round().int()


def rows(tensor):
    return [tuple(row) for row in tensor.tolist()]


def digit_of_row():
    images, targets = load_digits(return_X_y=True)
    return {
        tuple(map(int, image)): int(y) for image, y in zip(images, targets, strict=True)
    }


def test_digits_are_split_into_three_sets_that_share_nothing():
    data = set_up(Digits(seed=3))
    assert data.input_shape == (1, 8, 8)
    assert data.num_classes == 10
    sets = (data.train_set, data.val_set, data.test_set)
    assert [len(examples) for examples in sets] == [1294, 143, 360]
    found = sorted(row for examples in sets for row in rows(pixels(data, examples)))
    images, _ = load_digits(return_X_y=True)
    assert found == sorted(tuple(map(int, image)) for image in images)


def test_digits_are_standardised_with_the_training_sets_statistics():
    data = set_up(Digits(num_train=200))
    x = data.train_set.x.double()
    assert data.train_set.x.dtype == torch.float32
    # Float32 inputs: rounding of 1e-7 a value.
    assert_close(x.mean(), torch.tensor(0.0).double(), rtol=0, atol=1e-6)
    assert_close(x.std(correction=0), torch.tensor(1.0).double(), rtol=1e-6, atol=0)
    assert abs(data.test_set.x.mean()) > 1e-4


def test_splits_depend_on_the_seed_alone():
    one, same, other = (set_up(Digits(seed=seed)) for seed in (1, 1, 2))
    for name in ("train_set", "val_set", "test_set"):
        assert_close(getattr(one, name).x, getattr(same, name).x, rtol=0, atol=0)
        assert_close(getattr(one, name).y, getattr(same, name).y, rtol=0, atol=0)
    assert rows(pixels(one, one.val_set)) != rows(pixels(other, other.val_set))
    assert rows(pixels(one, one.test_set)) == rows(pixels(other, other.test_set))


def test_a_smaller_training_set_is_part_of_a_larger_one():
    small, large = (set_up(Digits(num_train=n)) for n in (50, 500))
    of_small, of_large = (rows(pixels(data, data.train_set)) for data in (small, large))
    assert of_small == of_large[:50]
    assert rows(pixels(small, small.val_set)) == rows(pixels(large, large.val_set))


def test_without_validation_examples_the_test_set_is_the_validation_set():
    data = set_up(Digits(num_val=0, num_test=100))
    assert len(data.train_set) == 1437
    assert_close(data.val_set.x, data.test_set.x, rtol=0, atol=0)
    assert len(data.test_set) == 100


def test_classes_are_numbered_in_the_order_given():
    data = Digits(classes=[7, "2"])
    assert data.num_classes == 2
    set_up(data)
    digits = digit_of_row()
    for examples in (data.train_set, data.val_set, data.test_set):
        expected = [digits[row] for row in rows(pixels(data, examples))]
        assert [[7, 2][label] for label in examples.y.tolist()] == expected


def test_label_noise_changes_the_stated_share_of_training_labels_only():
    clean, noisy = (set_up(Digits(label_noise=share)) for share in (0.0, 0.3))
    changed = clean.train_set.y != noisy.train_set.y
    assert int(changed.sum()) == round(0.3 * 1294)
    assert_close(clean.train_set.x, noisy.train_set.x, rtol=0, atol=0)
    assert_close(clean.val_set.y, noisy.val_set.y, rtol=0, atol=0)
    assert_close(clean.test_set.y, noisy.test_set.y, rtol=0, atol=0)
    again = set_up(Digits(label_noise=0.3))
    assert_close(again.train_set.y, noisy.train_set.y, rtol=0, atol=0)


def test_full_label_noise_is_uniform_over_the_other_classes():
    data = Gaussian(num_train=9000, dim=4, num_classes=10)
    noisy = Gaussian(num_train=9000, dim=4, num_classes=10, label_noise=1.0)
    offset = (set_up(noisy).train_set.y - set_up(data).train_set.y) % 10
    counts = offset.bincount(minlength=10)
    assert counts[0] == 0
    # Binomial(9000, 1/9): standard deviation 30; five of them.
    assert ((counts[1:] - 1000).abs() < 5 * math.sqrt(9000 * 8 / 81)).all()


def test_whitened_training_inputs_are_uncorrelated_with_unit_variance():
    data = set_up(Digits(whiten=True, classes=[3, 5]))
    assert data.input_shape == (64,)
    x_ND = data.train_set.x.double()
    covariance = x_ND.T @ x_ND / len(x_ND)
    rank = int((covariance.diagonal() > 0.5).sum())
    assert 0 < rank < 64  # some pixels are always blank
    expected = torch.diag((torch.arange(64) < rank).double())
    # Float32 inputs: rounding of 6e-8 a product, random over the sum.
    assert_close(covariance, expected, rtol=0, atol=1e-6)
    assert_close(x_ND.mean(0), torch.zeros(64).double(), rtol=0, atol=1e-6)
    assert not data.train_set.x[:, rank:].any()


@pytest.mark.parametrize("shape", [(50, 8), (8, 50)])
def test_pca_whitening_gives_the_identity_on_the_span_of_the_examples(shape):
    x_ND = torch.randn(shape, generator=torch.manual_seed(0), dtype=torch.float64) + 3
    mean_D, map_DD = pca_whitening(x_ND)
    white = (x_ND - mean_D) @ map_DD
    rank = min(shape[0] - 1, shape[1])
    expected = torch.diag((torch.arange(shape[1]) < rank).double())
    assert_close(white.T @ white / shape[0], expected, rtol=0, atol=1e-9)


def test_pca_whitening_of_independent_features_divides_by_their_deviations():
    signs = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]]).double()
    mean_D, map_DD = pca_whitening(signs * torch.tensor([1.0, 4.0]) + 2)
    assert_close(mean_D, torch.tensor([2.0, 2.0]).double(), rtol=0, atol=1e-12)
    expected = torch.tensor([[0.0, 1.0], [0.25, 0.0]]).double()
    assert_close(map_DD.abs(), expected, rtol=0, atol=1e-12)


def all_shifts(image_CHW, shift, background_C, flip):
    height, width = image_CHW.shape[1:]
    padded = background_C[:, None, None].repeat(
        1, height + 2 * shift, width + 2 * shift
    )
    padded[:, shift : shift + height, shift : shift + width] = image_CHW
    found = []
    for top in range(2 * shift + 1):
        for left in range(2 * shift + 1):
            crop = padded[:, top : top + height, left : left + width]
            found += [crop, crop.flip(2)] if flip else [crop]
    return torch.stack(found)


@pytest.mark.parametrize("flip", [False, True])
def test_augmentation_shifts_and_mirrors_and_reaches_every_place(flip):
    x = torch.randn(1, 2, 5, 4, generator=torch.manual_seed(0))
    background_C = torch.tensor([-1.5, 0.25])
    augment = ShiftAndFlip(600, 1, flip=flip, background_C=background_C, seed=0)
    key = BatchKey(0, np.arange(600))
    made = augment(x.expand(600, -1, -1, -1), key)
    candidates = all_shifts(x[0], 1, background_C, flip)
    same = (made[:, None] == candidates).flatten(2).all(2)
    assert (same.sum(1) == 1).all()
    # 600 draws of 9 or 18 equally likely places: each within five deviations.
    share = 1 / len(candidates)
    deviation = math.sqrt(600 * share * (1 - share))
    assert ((same.sum(0) - 600 * share).abs() < 5 * deviation).all()


def test_augmentation_is_a_function_of_seed_epoch_and_example():
    data, same, other = (
        set_up(Digits(augment=True, seed=seed)).train_set for seed in (4, 4, 5)
    )
    batch = data[BatchKey(2, np.array([9, 400, 3]))][0]
    same[BatchKey(1, np.array([1, 2]))]
    alone = same[BatchKey(2, np.array([3]))][0]
    assert_close(batch[2:], alone, rtol=0, atol=0)
    everything = np.arange(len(data))
    epochs = [data[BatchKey(epoch, everything)][0] for epoch in (0, 1)]
    assert not torch.equal(*epochs)
    draws = [examples.augment._draws(0) for examples in (data, other)]
    assert not np.array_equal(*draws)


def test_evaluation_images_are_never_augmented():
    plain, augmented = (set_up(Digits(augment=augment)) for augment in (False, True))
    for name in ("val_dataloader", "test_dataloader", "probe_dataloader"):
        for one, other in zip(
            getattr(plain, name)(), getattr(augmented, name)(), strict=True
        ):
            assert_close(one[0], other[0], rtol=0, atol=0)


def test_the_probe_loader_gives_the_validation_set_in_order():
    data = set_up(Digits(with_index=True, num_workers=2))
    x, y, index = (
        torch.cat(parts) for parts in zip(*data.probe_dataloader(), strict=True)
    )
    assert index.tolist() == list(range(len(data.val_set)))
    assert_close(x, data.val_set.x, rtol=0, atol=0)
    assert_close(y, data.val_set.y, rtol=0, atol=0)
    assert data.probe_dataloader().num_workers == 0


def test_loaders_draw_nothing_from_the_global_random_state():
    data = set_up(Digits(augment=True))
    before = torch.get_rng_state()
    for loader in (data.train_dataloader(), data.val_dataloader()):
        next(iter(loader))
    assert torch.equal(torch.get_rng_state(), before)


def test_gauss_inputs_have_norm_sqrt_dim_and_are_nearly_centred():
    data = set_up(Gaussian(kind="gauss", dim=50, num_train=400))
    x_ND = data.train_set.x
    assert data.input_shape == (50,)
    assert_close(x_ND.norm(dim=1), torch.full((400,), 50**0.5), rtol=1e-6, atol=0)
    # Centred before the norms are set: what is left is the spread of the norms
    # (deviation 1/10 at this width) over the root of the number of examples.
    assert x_ND.mean(0).abs().max() < 5 * 0.1 / math.sqrt(400)


def test_gauss_mean_inputs_correlate_by_a_fifth():
    dim, num = 2000, 100
    data = set_up(Gaussian(kind="gauss_mean", dim=dim, num_train=num))
    x_ND = data.train_set.x.double()
    assert_close(x_ND.norm(dim=1), torch.full((num,), dim**0.5).double())
    correlation = x_ND @ x_ND.T / dim
    off = correlation[~torch.eye(num, dtype=torch.bool)].mean()
    # |m|^2/(4 D) varies by sqrt(2/D)/4 = 0.008 around 1/4, and so the mean correlation
    # by 0.8^2 of that.
    assert abs(off - 0.2) < 5 * 0.64 * math.sqrt(2 / dim) / 4


def test_powerlaw_covariance_has_eigenvalues_in_proportion_to_one_over_k():
    factor = powerlaw_factor(30, stream("test"))
    eigenvalues = np.linalg.eigvalsh(factor @ factor.T)[::-1]
    expected = 1 / np.arange(1, 31)
    np.testing.assert_allclose(eigenvalues / eigenvalues[0], expected, rtol=1e-9)
    np.testing.assert_allclose(eigenvalues.sum(), 30, rtol=1e-12)


def test_powerlaw_inputs_have_that_covariance():
    dim, num = 5, 20_000
    x_ND = set_up(Gaussian(kind="powerlaw", dim=dim, num_train=num)).train_set.x
    factor = powerlaw_factor(dim, stream("shared", 0))
    covariance = (x_ND.T @ x_ND / num).double()
    # Entries of a sample covariance deviate by at most sqrt(2/N) times the largest
    # variance.
    bound = 5 * math.sqrt(2 / num) * np.diag(factor @ factor.T).max()
    assert_close(covariance, torch.from_numpy(factor @ factor.T), rtol=0, atol=bound)


def test_the_linear_teachers_outputs_are_the_real_targets_and_give_the_classes():
    options = {"dim": 40, "num_classes": 3, "num_train": 500}
    real = set_up(Gaussian(targets="real", **options))
    classes = set_up(Gaussian(**options))
    assert real.train_set.y.shape == (500, 3)
    assert real.train_set.y.dtype == torch.float32
    assert_close(real.train_set.y.argmax(1), classes.train_set.y, rtol=0, atol=0)
    solution = torch.linalg.lstsq(real.train_set.x, real.train_set.y).solution
    residual = real.test_set.x @ solution - real.test_set.y
    assert residual.abs().max() < 1e-4  # float32 least squares of 40 unknowns


def test_gaussian_evaluation_sets_do_not_depend_on_num_train():
    one, other = (set_up(Gaussian(kind="gauss_mean", num_train=n)) for n in (100, 1000))
    assert_close(one.test_set.x, other.test_set.x, rtol=0, atol=0)
    assert_close(one.val_set.y, other.val_set.y, rtol=0, atol=0)


needs_data = pytest.mark.skipif(ROOT is None, reason="LIT_RESNORM_DATA is not set")


@needs_data
@pytest.mark.parametrize(
    ("kind", "shape", "train_zeros", "test_zeros", "sizes"),
    [
        (MNIST, (1, 28, 28), 5923, 980, (54_000, 6000, 10_000)),
        (FashionMNIST, (1, 28, 28), 6000, 1000, (54_000, 6000, 10_000)),
        pytest.param(
            CIFAR10,
            (3, 32, 32),
            5000,
            1000,
            (45_000, 5000, 10_000),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_torchvision_sets_are_whole(kind, shape, train_zeros, test_zeros, sizes):
    data = kind()
    if not (data.root / next(iter(data.files))).exists():
        pytest.skip(f"no {kind.__name__} in LIT_RESNORM_DATA")
    assert data.input_shape == shape
    assert data.num_classes == 10
    set_up(data)
    sets = (data.train_set, data.val_set, data.test_set)
    assert tuple(len(examples) for examples in sets) == sizes
    zeros = [int((examples.y == 0).sum()) for examples in sets]
    assert zeros[0] + zeros[1] == train_zeros
    assert zeros[2] == test_zeros
    assert data.train_set.x.shape[1:] == shape
    std_C, mean_C = torch.std_mean(data.train_set.x, (0, 2, 3), correction=0)
    # A float32 sum over some 4e7 values.
    assert_close(mean_C, torch.zeros(shape[0]), rtol=0, atol=1e-4)
    assert_close(std_C, torch.ones(shape[0]), rtol=1e-4, atol=0)
    x, y = next(iter(data.train_dataloader()))
    assert x.shape == (64, *shape)
    assert y.dtype == torch.int64


@needs_data
def test_a_whitened_pair_of_classes_has_the_papers_sizes():
    data = MNIST(classes=[3, 5], num_train=1000, num_test=1000, whiten=True)
    if not (data.root / "MNIST").exists():
        pytest.skip("no MNIST in LIT_RESNORM_DATA")
    set_up(data)
    assert data.input_shape == (784,)
    assert data.num_classes == 2
    assert len(data.train_set) == len(data.test_set) == 1000
    assert set(data.train_set.y.tolist()) == {0, 1}


def test_the_cifar_sets_name_their_classes():
    assert len(CIFAR10_NAMES.split()) == 10
    names = CIFAR100_NAMES.split()
    assert len(names) == 100
    assert names == sorted(set(names))


@pytest.fixture(scope="module")
def tiny_imagenet(tmp_path_factory):
    """A folder laid out as ImageNet with two images a class, links to one file."""
    root = tmp_path_factory.mktemp("imagenet")
    noise = np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    Image.fromarray(noise).save(root / "image.JPEG")
    wnids = [f"n{i:08d}" for i in range(1000)]
    for wnid in wnids:
        for split, count in (("train", 2), ("val", 1)):
            folder = root / split / wnid
            folder.mkdir(parents=True)
            for i in range(count):
                (folder / f"{i}.JPEG").hardlink_to(root / "image.JPEG")
    torch.save(({wnid: (wnid,) for wnid in wnids}, wnids), root / "meta.bin")
    return root


def test_imagenet_is_read_from_disk_and_augmented_by_seed_epoch_and_example(
    tiny_imagenet,
):
    options = {"root": str(tiny_imagenet), "image_size": 32, "num_workers": 0}
    data = set_up(ImageNet(batch_size=8, num_train=40, **options))
    assert data.input_shape == (3, 32, 32)
    assert data.num_classes == 1000
    sizes = [len(part) for part in (data.train_set, data.val_set, data.test_set)]
    assert sizes == [40, 200, 1000]
    assert not set(data.train_set.paths) & set(data.val_set.paths)
    assert data.test_set.y.tolist() == list(range(1000))
    before = torch.get_rng_state()
    x, y = data.train_set[BatchKey(1, np.array([5, 6]))]
    assert torch.equal(torch.get_rng_state(), before)
    assert x.shape == (2, 3, 32, 32)
    assert y.shape == (2,)
    again, _ = data.train_set[BatchKey(1, np.array([6, 7]))]
    assert_close(again[0], x[1], rtol=0, atol=0)
    assert not torch.equal(data.train_set[BatchKey(2, np.array([6]))][0][0], x[1])
    plain, _ = data.val_set[BatchKey(0, np.array([0, 1]))]
    assert_close(plain[0], plain[1], rtol=0, atol=0)


def test_imagenet_takes_classes_by_name_and_number(tiny_imagenet):
    data = ImageNet(root=str(tiny_imagenet), classes=["goldfish", 0])
    assert data.num_classes == 2
    set_up(data)
    assert len(data.test_set) == 2
    assert data.test_set.y.tolist() == [1, 0]


def test_a_damaged_image_is_named(tiny_imagenet, tmp_path):
    data = set_up(ImageNet(root=str(tiny_imagenet), num_workers=0))
    broken = tmp_path / "broken.JPEG"
    broken.write_bytes((tiny_imagenet / "image.JPEG").read_bytes()[:200])
    data.train_set.paths = [str(broken)]
    with pytest.raises(ValueError, match=r"damaged image .*broken\.JPEG"):
        data.train_set[BatchKey(0, np.array([0]))]


def test_an_imagenet_folder_without_its_parts_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data.root.*no folder.*image-net"):
        ImageNet(root=str(tmp_path / "absent")).prepare_data()
    with pytest.raises(FileNotFoundError, match="ILSVRC2012_devkit"):
        ImageNet(root=str(tmp_path)).prepare_data()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Digits(batch_size=0), "batch_size must be at least 1, got 0"),
        (lambda: Digits(num_workers=-1), "num_workers must be at least 0, got -1"),
        (lambda: Digits(seed=-2), "seed must be at least 0, got -2"),
        (lambda: Digits(num_train=0), "num_train must be at least 1, got 0"),
        (lambda: Digits(num_val=-1), "num_val must be at least 0, got -1"),
        (lambda: Digits(label_noise=1.5), "label_noise .* got 1.5"),
        (lambda: Digits(label_noise=float("nan")), "label_noise .* got nan"),
        (lambda: Digits(classes=[]), "classes: the list is empty"),
        (lambda: Digits(classes=[3, 11]), "classes: unknown class 11"),
        (lambda: Digits(classes=[-1]), "classes: unknown class -1"),
        (lambda: CIFAR10(classes=["dgo"]), "classes: unknown class 'dgo'"),
        (lambda: Digits(classes=[3, "3"]), "classes: a class is named twice"),
        (lambda: Digits(classes=[1], label_noise=0.1), "label_noise 0.1 needs two"),
        (lambda: Digits(whiten=True, augment=True), "whiten and augment"),
        (lambda: ImageNet(image_size=0), "image_size must be at least 1, got 0"),
        (lambda: Gaussian(kind="cauchy"), "kind must be one of gauss, .* 'cauchy'"),
        (lambda: Gaussian(targets="ranks"), "targets must be .* 'ranks'"),
        (lambda: Gaussian(dim=0), "dim must be at least 1, got 0"),
        (lambda: Gaussian(targets="real", label_noise=0.1), "label_noise 0.1 needs"),
        (
            lambda: set_up(Digits(num_train=1400)),
            "num_train 1400 is more than the 1294",
        ),
        (lambda: set_up(Digits(num_val=1437)), "num_val 1437 leaves no training"),
        (lambda: set_up(Digits(num_val=9999)), "num_val 9999 leaves no training"),
        (lambda: set_up(Digits(num_test=361)), "num_test 361 is more than the 360"),
    ],
)
def test_a_bad_option_is_named_with_its_value(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [MNIST, FashionMNIST, CIFAR10, CIFAR100])
def test_an_absent_data_set_says_how_to_get_it(kind, tmp_path):
    for root in (tmp_path / "absent", tmp_path):
        with pytest.raises(FileNotFoundError) as caught:
            set_up(kind(root=str(root)))
        message = str(caught.value)
        assert message.startswith(f"data.root {str(root)!r}: no ")
        assert "--data.download true" in message
        assert "\n" not in message


@pytest.mark.parametrize("kind", [MNIST, CIFAR10])
def test_a_damaged_file_is_named(kind, tmp_path):
    data = kind(root=str(tmp_path))
    first = tmp_path / next(iter(data.files))
    first.parent.mkdir(parents=True)
    first.write_bytes(b"not an image")
    with pytest.raises(ValueError, match=f"{re.escape(str(first))} is damaged"):
        set_up(data)


class Unreachable(datasets.MNIST):
    mirrors = ("file:///no/such/mirror/",)


class UnreachableMNIST(MNIST):
    source = Unreachable


def test_a_download_that_fails_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="Unreachable can't be downloaded") as e:
        UnreachableMNIST(root=str(tmp_path), download=True).prepare_data()
    assert "\n" not in str(e.value)
    assert "train-images-idx3-ubyte" in str(e.value)


def test_the_data_root_is_taken_from_the_environment(monkeypatch):
    monkeypatch.setenv("LIT_RESNORM_DATA", "/somewhere")
    assert MNIST().root == Path("/somewhere")
    assert MNIST(root="elsewhere").root == Path("elsewhere")
    monkeypatch.delenv("LIT_RESNORM_DATA")
    assert MNIST().root == Path("data")
