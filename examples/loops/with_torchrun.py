"""Ratio heads under plain DistributedDataParallel, in a loop as for any other network.

    pip install -c constraints.txt '.[demo]'
    torchrun --nproc-per-node 2 examples/loops/with_torchrun.py

`prior(x)` is the NCE loss of every group: one loss and one backward pass, which is all that DDP asks
for. The VAE is frozen and is not part of the module, so that every process has its own. (`ncprior.fit`
can be called under torchrun as well, and needs no DDP.) Prints the held-out loss in nats;
2 log 2 = 1.386 is the loss without heads.
"""

import argparse

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from your_vae import source_and_data

from ncprior import NCPrior


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of everything")
    parser.add_argument("--epochs", type=int, default=25, help="epochs")
    options = parser.parse_args()

    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    source, x_train, x_test = source_and_data(options.seed)
    prior = NCPrior.for_source(source, x_train[:256], dropout=0.1)
    ddp = DistributedDataParallel(prior)
    optimizer = torch.optim.AdamW(prior.parameters(), lr=1e-3, weight_decay=0.1)
    sampler = DistributedSampler(x_train, seed=options.seed)
    loader = DataLoader(x_train, 128 // ranks, sampler=sampler)
    torch.manual_seed(options.seed + rank)  # other draws of z in every process

    for epoch in range(options.epochs):
        sampler.set_epoch(epoch)
        ddp.train()
        for x in loader:
            optimizer.zero_grad()
            loss = ddp(x).sum()
            loss.backward()
            optimizer.step()
        if rank == 0:
            print(f"epoch {epoch + 1}: NCE loss {loss.item():.3f} in the last batch")

    prior.eval()
    with torch.no_grad():
        loss = prior.nce_loss(x_test[rank::ranks], num_draws=20).sum()
    dist.all_reduce(loss)
    if rank == 0:
        print(f"held-out NCE loss {loss.item() / ranks:.3f} after {options.epochs} epochs")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
