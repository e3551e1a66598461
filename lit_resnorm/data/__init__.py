"""DataModules: images, from files or scikit-learn, and Gaussian inputs."""

from lit_resnorm.data.datamodule import DataModule
from lit_resnorm.data.gaussian import Gaussian
from lit_resnorm.data.imagenet import ImageNet
from lit_resnorm.data.images import Digits
from lit_resnorm.data.sampling import StepSeed
from lit_resnorm.data.torchvision_images import CIFAR10, CIFAR100, MNIST, FashionMNIST

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "MNIST",
    "DataModule",
    "Digits",
    "FashionMNIST",
    "Gaussian",
    "ImageNet",
    "StepSeed",
]
