"""A project that isn't ours: a small vision transformer, AdamW, bf16, its own loggers.

Run: `python tests/foreign/engineers_project.py FOLDER [PROBE...]`, with probes by their
names in `lit_resnorm_callbacks`, at their defaults. It uses nothing else of ours.
"""

import importlib
import importlib.util
import sys

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import VisionTransformer

STEPS = 100


class Classifier(L.LightningModule):
    def __init__(self, hidden_dim=32, num_layers=6, learning_rate=1e-3):
        super().__init__()
        self.save_hyperparameters()
        self.vit = VisionTransformer(
            image_size=16,
            patch_size=4,
            num_layers=num_layers,
            num_heads=4,
            hidden_dim=hidden_dim,
            mlp_dim=4 * hidden_dim,
            num_classes=10,
        )
        # torchvision begins with a head of zeros
        torch.nn.init.normal_(self.vit.heads.head.weight, std=0.02)

    def forward(self, images):
        return self.vit(images)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        logits = self(images)
        self.log("val_loss", F.cross_entropy(logits, labels))
        self.log("val_acc", (logits.argmax(1) == labels).float().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(
            self.parameters(), self.hparams.learning_rate, weight_decay=0.05
        )


class Pictures(L.LightningDataModule):
    """Noisy pictures of ten patterns."""

    def __init__(self, batch_size=32):
        super().__init__()
        self.save_hyperparameters()
        patterns = torch.randn(
            10, 3, 16, 16, generator=torch.Generator().manual_seed(0)
        )
        draws = torch.Generator().manual_seed(1)
        num = STEPS * batch_size // 2  # two epochs
        labels = torch.randint(10, (num + 512,), generator=draws)
        noise = torch.randn(num + 512, 3, 16, 16, generator=draws)
        self.images, self.labels = patterns[labels] + 2 * noise, labels

    def _loader(self, part, **options):
        rows = TensorDataset(self.images[part], self.labels[part])
        return DataLoader(rows, self.hparams.batch_size, **options)

    def train_dataloader(self):
        return self._loader(slice(512, None), shuffle=True, drop_last=True)

    def val_dataloader(self):
        return self._loader(slice(512))


def fit(folder, probes=(), *, hidden_dim=32, batch_size=32, loggers=True):
    """Train for 100 steps; return the Trainer."""
    L.seed_everything(1, verbose=False)
    trainer = L.Trainer(
        accelerator="cpu",
        precision="bf16-mixed",
        max_steps=STEPS,
        val_check_interval=STEPS // 2,
        log_every_n_steps=10,
        callbacks=[*probes],
        logger=_loggers(folder) if loggers else False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(hidden_dim), Pictures(batch_size))
    return trainer


def _loggers(folder):
    loggers = [
        CSVLogger(folder, name="csv", version=""),
        WandbLogger("vit", folder, offline=True, project="pictures"),
    ]
    if importlib.util.find_spec("tensorboard"):
        loggers.append(TensorBoardLogger(folder, name="tensorboard", version=""))
    return loggers


if __name__ == "__main__":
    place, *names = sys.argv[1:]
    package = importlib.import_module("lit_resnorm_callbacks")
    fit(place, [getattr(package, name)() for name in names])
