"""Ratio heads in a LightningModule: Lightning's own loop, logging, early stopping and checkpoints.

    pip install -c constraints.txt '.[demo,integrations]'
    python examples/loops/with_lightning.py      # half a minute on one core

`prior(x)` is the NCE loss of every group, so that their sum is a loss like any other. The module holds
the heads alone: the VAE is not registered, not moved and not saved. Prints the held-out loss in nats
of the best heads; 2 log 2 = 1.386 is the loss without heads.
"""

import argparse
import logging
import tempfile

import lightning
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader
from your_vae import source_and_data

from ncprior import NCPrior


class Heads(lightning.LightningModule):
    def __init__(self, prior: NCPrior) -> None:
        super().__init__()
        self.prior = prior

    def training_step(self, x: Tensor) -> Tensor:
        loss = self.prior(x).sum()
        self.log("train", loss)
        return loss

    def validation_step(self, x: Tensor) -> None:
        self.log("held_out", self.prior(x, num_draws=20).sum(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.prior.parameters(), lr=1e-3, weight_decay=0.1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of everything")
    parser.add_argument("--epochs", type=int, default=40, help="most epochs")
    options = parser.parse_args()

    source, x_train, x_test = source_and_data(options.seed)
    prior = NCPrior.for_source(source, x_train[:256], dropout=0.1)
    heads = Heads(prior.train())  # Lightning trains in the mode that it finds
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        best = ModelCheckpoint(folder, monitor="held_out")
        trainer = lightning.Trainer(
            accelerator="cpu",  # where the VAE is
            max_epochs=options.epochs,
            callbacks=[best, EarlyStopping("held_out", patience=5)],
            logger=False,
            enable_model_summary=False,
        )
        loaders = DataLoader(x_train, 128, shuffle=True), DataLoader(x_test, 300)
        trainer.fit(heads, *loaders)
        heads.load_state_dict(torch.load(best.best_model_path)["state_dict"])
    print(f"held-out NCE loss {best.best_model_score:.3f} after {heads.current_epoch} epochs")


if __name__ == "__main__":
    main()
