"""Small images in the files of torchvision's data sets."""

import os
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchvision import datasets
from torchvision.datasets.utils import check_integrity

from lit_resnorm.data.images import ImagesInMemory

CIFAR10_NAMES = "airplane automobile bird cat deer dog frog horse ship truck"
CIFAR100_NAMES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy
bridge bus butterfly camel can castle caterpillar cattle chair chimpanzee clock
cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion
lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange
orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper
snail snake spider squirrel streetcar sunflower sweet_pepper table tank
telephone television tiger tractor train trout tulip turtle wardrobe whale
willow_tree wolf woman worm
"""


def data_root(root: str | None) -> Path:
    """Return the folder that holds the data sets, the default where none is given."""
    return Path(root or os.environ.get("LIT_RESNORM_DATA") or "data").expanduser()


def check_files(root: Path, files: Mapping[str, str], hint: str) -> None:
    """Check that a data set's files are there and undamaged.

    Args:
        root: Folder that holds the data sets.
        files: MD5 sums by path relative to `root`.
        hint: How to get the files.

    Raises:
        FileNotFoundError: If a file isn't there; says how to get it.
        ValueError: If a file's MD5 sum is another one.
    """
    for name, md5 in files.items():
        path = root / name
        if not path.is_file():
            absent = path if root.is_dir() else root
            raise FileNotFoundError(f"data.root {str(root)!r}: no {absent}; {hint}")
        if not check_integrity(str(path), md5):
            raise ValueError(
                f"data.root {str(root)!r}: {path} is damaged (its MD5 isn't {md5}); "
                f"remove it, then {hint}"
            )


class TorchvisionImages(ImagesInMemory):
    """Images in the files of one of torchvision's data sets.

    Args:
        root: Folder with the data sets; default `$LIT_RESNORM_DATA`, else `data`.
        download: Whether files that are missing are downloaded.
        kwargs: Options of every `ImagesInMemory`.
    """

    source: ClassVar[Any]  # the class in torchvision.datasets

    def __init__(
        self, *, root: str | None = None, download: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.root, self.download = data_root(root), download

    @property
    @abstractmethod
    def files(self) -> Mapping[str, str]:
        """MD5 sums of the files by path relative to `root`."""

    def prepare_data(self) -> None:
        """Download what is missing, if asked to.

        Raises:
            FileNotFoundError: If that fails.
        """
        if not self.download:
            return
        try:
            self.source(str(self.root), download=True)
        except (OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise FileNotFoundError(
                f"data.download: {self.source.__name__} can't be downloaded to "
                f"{self.root} ({reason}); put {', '.join(self.files)} there by hand"
            ) from error

    def load(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return images and labels of the pool, then of the test set.

        Raises:
            FileNotFoundError: If a file isn't there.
            ValueError: If a file is damaged.
        """
        folder = Path(next(iter(self.files))).parent
        hint = f"pass --data.download true, or put the files into {self.root / folder}"
        check_files(self.root, self.files, hint)
        tensors = []
        for train in (True, False):
            images = self.source(str(self.root), train=train)
            x = torch.as_tensor(images.data)
            x = x.unsqueeze(1) if x.ndim == 3 else x.permute(0, 3, 1, 2).contiguous()
            tensors += [x, torch.as_tensor(images.targets)]
        return tensors[0], tensors[1], tensors[2], tensors[3]


class MNIST(TorchvisionImages):
    """MNIST's 60,000 + 10,000 digits, `(1, 28, 28)`; augmentation: up to 2 pixels."""

    source = datasets.MNIST
    image_shape = (1, 28, 28)
    shift = 2
    class_names = tuple("0123456789")
    md5: ClassVar[tuple[str, str, str, str]] = (
        "6bbc9ace898e44ae57da46a324031adb",
        "a25bea736e30d166cdddb491f175f624",
        "2646ac647ad5339dbf082846283269ea",
        "27ae3e4e09519cfbb04c329615203637",
    )

    @property
    def files(self) -> Mapping[str, str]:
        """MD5 sums of the four unpacked files."""
        names = (
            "train-images-idx3-ubyte",
            "train-labels-idx1-ubyte",
            "t10k-images-idx3-ubyte",
            "t10k-labels-idx1-ubyte",
        )
        folder = f"{self.source.__name__}/raw"
        return {
            f"{folder}/{name}": md5 for name, md5 in zip(names, self.md5, strict=True)
        }


class FashionMNIST(MNIST):
    """Fashion-MNIST's 60,000 + 10,000 clothes, `(1, 28, 28)`.

    Augmentation: shifts by up to 2 pixels, mirroring.
    """

    source = datasets.FashionMNIST
    flip = True
    class_names = tuple(datasets.FashionMNIST.classes)
    md5 = (
        "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "9018921c3c673c538a1fc5bad174d6f9",
        "8181f5470baa50b63fa0f6fddb340f0a",
        "15d484375f8d13e6eb1aabb0c3f46965",
    )


class CIFAR10(TorchvisionImages):
    """CIFAR-10's 50,000 + 10,000 photographs of 10 kinds of things, `(3, 32, 32)`.

    Augmentation: shifts by up to 4 pixels, mirroring.
    """

    source = datasets.CIFAR10
    image_shape = (3, 32, 32)
    shift = 4
    flip = True
    class_names = tuple(CIFAR10_NAMES.split())

    @property
    def files(self) -> Mapping[str, str]:
        """MD5 sums of the unpacked files, as torchvision checks them."""
        meta = self.source.meta["filename"], self.source.meta["md5"]
        listed = [*self.source.train_list, *self.source.test_list, meta]
        return {f"{self.source.base_folder}/{name}": md5 for name, md5 in listed}


class CIFAR100(CIFAR10):
    """CIFAR-100's 50,000 + 10,000 photographs of 100 kinds of things, `(3, 32, 32)`.

    Augmentation: shifts by up to 4 pixels, mirroring.
    """

    source = datasets.CIFAR100
    class_names = tuple(CIFAR100_NAMES.split())
