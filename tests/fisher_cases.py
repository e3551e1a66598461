"""Small networks of every kind, in float64, with a batch each."""

import torch
from torch import nn
from torch.nn import functional as F


class Residual(nn.Module):
    """Functional and in-place ReLUs, a module applied twice, a scalar multiplier."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.norm = nn.BatchNorm1d(5)
        self.again = nn.Linear(5, 5)
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        h = F.relu(self.norm(self.first(x)))
        h = h + self.scale * torch.relu_(self.again(h))
        h = h + F.relu(self.again(h), inplace=True)
        return self.head(h)


class Transformer(nn.Module):
    """Embedding with padding, positions, attention and layer norm; tokens or pooled."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4, padding_idx=0)
        self.position = nn.Parameter(torch.randn(5, 4) / 5)
        self.block = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens):
        return self.head(self.block(self.embed(tokens) + self.position).mean(dim=1))

    def tokens(self, tokens):
        return self.head(self.block(self.embed(tokens) + self.position))


class TiedWords(nn.Module):
    """One weight that embeds and reads out."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.mix = nn.Linear(4, 4)
        self.read = nn.Linear(4, 5, bias=False)
        self.read.weight = self.embed.weight

    def forward(self, tokens):
        return self.read(torch.tanh(self.mix(self.embed(tokens)))).mean(dim=1)


class TimeFirst(nn.Module):
    """Rows lie along the second dimension inside, where as many steps as rows are."""

    def __init__(self):
        super().__init__()
        self.step = nn.Linear(3, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.step(x.transpose(0, 1))).mean(dim=0))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.LSTM(3, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.cell(x)[0][:, -1])


def convolutional(channels=4, **options):
    return nn.Sequential(
        nn.Conv2d(2, channels, 3, **options),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels, 3, (1, 2), bias=False),
        nn.GroupNorm(3, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d((1, 2)),
        nn.Flatten(),
        nn.Linear(6, 3),
    )


def one_dimensional():
    return nn.Sequential(
        nn.Conv1d(2, 3, 3, padding=1, padding_mode="reflect"),
        nn.InstanceNorm1d(3, affine=True),
        nn.PReLU(),
        nn.Flatten(),
        nn.Linear(21, 3),
    )


def three_dimensional():
    return nn.Sequential(
        nn.Conv3d(2, 3, 2, stride=(1, 2, 1)),
        nn.Tanh(),
        nn.ConvTranspose3d(3, 2, 2),
        nn.Flatten(),
        nn.Linear(96, 3),
    )


def weight_normed():
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 5))
    return nn.Sequential(normed, nn.RMSNorm(5), nn.GELU(), nn.Linear(5, 3))


def frozen_backbone():
    net = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.ReLU(), nn.Linear(5, 3))
    net[0].requires_grad_(False)
    net[1].weight.requires_grad_(False)
    net[3].bias.requires_grad_(False)
    return net


def bias_alone():
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(90, 3))
    net[0].weight.requires_grad_(False)
    net[3].weight.requires_grad_(False)
    return net


def _images():
    return torch.randn(5, 2, 7, 8)


def _tokens():
    return torch.randint(0, 7, (6, 5))


CASES = {
    "residual": (Residual, lambda: torch.randn(7, 6)),
    "weight_normed": (weight_normed, lambda: torch.randn(6, 6)),
    "frozen_backbone": (frozen_backbone, lambda: torch.randn(6, 6)),
    "bias_alone": (bias_alone, _images),
    "transformer": (Transformer, _tokens),
    "tied_words": (TiedWords, lambda: torch.randint(0, 5, (6, 4))),
    "time_first": (TimeFirst, lambda: torch.randn(5, 5, 3)),
    "recurrent": (Recurrent, lambda: torch.randn(4, 5, 3)),
    "strided": (lambda: convolutional(stride=2, padding=1, dilation=2), _images),
    "circular": (lambda: convolutional(padding=1, padding_mode="circular"), _images),
    "grouped": (lambda: convolutional(padding="same", groups=2), _images),
    "one_dimensional": (one_dimensional, lambda: torch.randn(5, 2, 7)),
    "three_dimensional": (three_dimensional, lambda: torch.randn(4, 2, 4, 4, 4)),
}


def case(name):
    """Return the model and its batch."""
    make, batch = CASES[name]
    torch.manual_seed(0)
    model, x = make().double(), batch()
    return model, x.double() if x.is_floating_point() else x
