"""ImageNet, read from disk batch by batch."""

import os
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torchvision import datasets
from torchvision.datasets.folder import default_loader
from torchvision.models import ResNet18_Weights
from torchvision.transforms import v2

from lit_resnorm.data.datamodule import check_at_least
from lit_resnorm.data.labelled import LabelledData
from lit_resnorm.data.sampling import BatchKey, stream
from lit_resnorm.data.torchvision_images import data_root


class ImageFiles:
    """Images that are read from disk when a batch asks for them.

    Args:
        paths: Image files.
        y: Labels, shape `(N,)`, int64.
        transform: From an RGB PIL image to a tensor; may draw from torch's global
            generator, which then starts from (seed, epoch, example).
        seed: Non-negative seed.
        with_index: Whether batches are `(x, y, index)` rather than `(x, y)`.
    """

    def __init__(
        self,
        paths: Sequence[str],
        y: Tensor,
        transform: Callable[..., Tensor],
        *,
        seed: int,
        with_index: bool = False,
    ) -> None:
        self.paths, self.y, self.transform = paths, y, transform
        self.seed, self.with_index = seed, with_index

    def __len__(self) -> int:
        return len(self.paths)

    def _image(self, epoch: int, index: int) -> Tensor:
        try:
            image = default_loader(self.paths[index])
        except (OSError, SyntaxError) as error:
            raise ValueError(f"damaged image {self.paths[index]}: {error}") from error
        seed = stream("augment", self.seed, epoch, index).integers(2**63)
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which would seed the GPUs too.
            torch.default_generator.manual_seed(int(seed))
            return self.transform(image)

    def __getitem__(self, key: BatchKey) -> tuple[Tensor, ...]:
        index = torch.from_numpy(key.indices)
        x = torch.stack([self._image(key.epoch, i) for i in key.indices.tolist()])
        return (x, self.y[index], index) if self.with_index else (x, self.y[index])


class ImageNet(LabelledData):
    """ImageNet 2012 (ILSVRC), read from disk: 1,000 classes, `(3, size, size)`.

    The test set is the official validation set; the validation set is held out of the
    training images. Inputs are standardised with the usual statistics of ImageNet.

    Args:
        root: Folder with `train/`, `val/` and `meta.bin`, or with the three archives
            that torchvision makes them from; default `$LIT_RESNORM_DATA`, else `data`.
        image_size: Height and width of the inputs in pixels.
        augment: Whether training images are random resized crops, mirrored or not; else
            they are central crops, as the others.
        num_workers: Processes that load data; default one a core, at most 8.
        kwargs: Options of every `LabelledData`.
    """

    class_names = tuple(ResNet18_Weights.DEFAULT.meta["categories"])

    def __init__(
        self,
        *,
        root: str | None = None,
        image_size: int = 224,
        augment: bool = True,
        num_workers: int | None = None,
        **kwargs: Any,
    ) -> None:
        if num_workers is None:
            num_workers = min(8, os.cpu_count() or 1)
        super().__init__(num_workers=num_workers, **kwargs)
        check_at_least(1, image_size=image_size)
        self.root, self.augment = data_root(root), augment
        self.input_shape = (3, image_size, image_size)

    def _images(self, split: Literal["train", "val"]) -> datasets.ImageNet:
        hint = (
            "needs train/, val/ and meta.bin, or ILSVRC2012_img_train.tar, "
            "ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz from image-net.org"
        )
        if not self.root.is_dir():
            raise FileNotFoundError(f"data.root {str(self.root)!r}: no folder; {hint}")
        try:
            images = datasets.ImageNet(str(self.root), split)
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(
                f"data.root {str(self.root)!r}: {error}; {hint}"
            ) from error
        if len(images.wnids) != len(self.class_names):
            raise ValueError(
                f"data.root {str(self.root)!r}: {split}/ has {len(images.wnids)} class "
                f"folders, not {len(self.class_names)}"
            )
        return images

    def prepare_data(self) -> None:
        """Unpack the archives where that wasn't done."""
        self._images("train")
        self._images("val")

    def splits(self) -> tuple[ImageFiles, ImageFiles, ImageFiles]:
        """Return training, validation and test set."""
        pool, official = self._images("train"), self._images("val")
        chosen, labels = self.choose(
            torch.tensor(pool.targets), torch.tensor(official.targets)
        )
        size = self.input_shape[1]
        crop = [v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size)]
        random_crop = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()]
        held_out = official if self.num_val == 0 else pool
        made = []
        for i, images in enumerate((pool, held_out, official)):
            transform = v2.Compose(
                [
                    v2.PILToTensor(),
                    *(random_crop if self.augment and i == 0 else crop),
                    v2.ToDtype(torch.float32, scale=True),
                    v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
                ]
            )
            paths = [images.samples[j][0] for j in chosen[i].tolist()]
            made.append(
                ImageFiles(
                    paths,
                    labels[i],
                    transform,
                    seed=self.seed,
                    with_index=self.with_index,
                )
            )
        return made[0], made[1], made[2]
