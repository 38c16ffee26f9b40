"""Ratio heads trained by NCETrainer under Accelerate, in one process or several.

    pip install -c constraints.txt '.[demo,integrations]'
    python examples/loops/with_accelerate.py
    torchrun --nproc-per-node 2 examples/loops/with_accelerate.py   # or `accelerate launch`, on GPUs

NCETrainer back-propagates one group at a time, so that memory does not grow with their number, and
averages the gradients over the processes itself: prepare the optimizer and the loaders, not the
prior. Prints the held-out loss in nats; 2 log 2 = 1.386 is the loss without heads.
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from your_vae import source_and_data

from ncprior import NCETrainer, NCPrior


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of everything")
    parser.add_argument("--epochs", type=int, default=25, help="epochs")
    options = parser.parse_args()

    accelerator = Accelerator(cpu=True)  # where the VAE is
    source, x_train, x_test = source_and_data(options.seed)
    prior = NCPrior.for_source(source, x_train[:256], dropout=0.1)
    optimizer = torch.optim.AdamW(prior.parameters(), lr=1e-3, weight_decay=0.1)
    optimizer, loader, held_out = accelerator.prepare(
        optimizer, DataLoader(x_train, 64, shuffle=True), DataLoader(x_test, 50)
    )
    set_seed(options.seed, device_specific=True)  # other draws of z in every process

    trainer = NCETrainer(prior, optimizer, backward=accelerator.backward)
    for epoch in range(options.epochs):
        prior.train()
        for x in loader:
            metrics = trainer.step(x)
        loss = metrics.loss.sum().item()
        accelerator.print(f"epoch {epoch + 1}: NCE loss {loss:.3f} in the last batch")

    prior.eval()
    with torch.no_grad():
        losses = torch.stack([prior.nce_loss(x, num_draws=20).sum() for x in held_out])
    loss = accelerator.reduce(losses.mean(), "mean").item()
    accelerator.print(f"held-out NCE loss {loss:.3f} after {options.epochs} epochs")


if __name__ == "__main__":
    main()
