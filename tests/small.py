"""Small modules and data that several tests share; none of the project's own."""

import lightning as L
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


class FunctionalNet(L.LightningModule):
    """A residual net with batch norm, dropout and functional, partly in-place ReLUs."""

    def __init__(self, lr=1e-2):
        super().__init__()
        self.lr = lr
        self.first = nn.Linear(8, 16)
        self.norm = nn.BatchNorm1d(16)
        self.second = nn.Linear(16, 16)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        h = F.relu(self.norm(self.first(x)))
        h = h + torch.relu_(self.second(h))
        return self.head(self.drop(h))

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val", F.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch, batch_idx):
        self.log("test", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), self.lr)


def vectors(num=64, dim=8, num_classes=3, seed=0):
    """Random vectors and labels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num, dim, generator=generator)
    return TensorDataset(x, torch.randint(num_classes, (num,), generator=generator))


def loaders(num=64, batch_size=8, num_workers=0):
    """A shuffling training loader and a validation loader."""
    train = DataLoader(vectors(num), batch_size, shuffle=True, num_workers=num_workers)
    return train, DataLoader(vectors(40, seed=1), batch_size)


def quiet_trainer(**options):
    """Return a CPU trainer that prints and logs nothing unless told to."""
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    }
    return L.Trainer(**(defaults | options))
