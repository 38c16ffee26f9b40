"""NCP on VDVAE: wrap a published model, train a ratio head for every group, and report on each.

    git clone https://github.com/openai/vdvae     # and its checkpoint cifar10-seed1-*-model-ema.th
    NCPRIOR_DATA=<folder> python examples/vdvae.py --vdvae vdvae --checkpoint FILE --images 2000
    python examples/vdvae.py --vdvae vdvae --demo    # about 1 minute on a CPU, to see it run

The CIFAR-10 model has 43 groups, of 1×1 to 32×32 pixels, and 39 million parameters: on a CPU its
walk takes seconds per image, so take few images and steps, or a GPU. ``--demo`` builds a tiny model
with random weights from the checkout instead: its groups and shapes are real, its images are not.
Printed are the check against the model's own forward, the held-out loss and the report of every
group, and the bits per dimension of p(x | z) at posterior samples.
"""

import argparse
import importlib
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ncprior import NCPrior, fit, sir
from ncprior.adapters.vdvae import VDVAESource
from ncprior.demo import read_images
from ncprior.diagnostics import diagnose
from ncprior.source import sample_posterior

TINY = {
    "width": 16,
    "zdim": 4,
    "num_mixtures": 3,
    "dec_blocks": "1x1,4m1,4x1,8m4,16m8,32m16",
    "enc_blocks": "32x1,32d2,16d2,8d2,4d4,1x1",
}


def import_vdvae(folder: Path, options: dict[str, Any]) -> nn.Module:
    """Builds the CIFAR-10 model of a checkout, but for the options."""
    if not (folder / "vae.py").is_file():
        raise SystemExit(f"{folder} does not hold VDVAE's vae.py.")
    sys.path.insert(0, str(folder))
    hps, vae = importlib.import_module("hps"), importlib.import_module("vae")
    settings = hps.Hyperparams()
    parser = hps.add_vae_arguments(argparse.ArgumentParser())
    hps.parse_args_and_update_hparams(settings, parser, s=["--hps", "cifar10"])
    settings.update(options, image_size=32, image_channels=3)
    model: nn.Module = vae.VAE(settings)
    return model


def load(model: nn.Module, path: Path) -> None:
    """Fills the model with a checkpoint, with or without the prefix of distributed training."""
    weights = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict({name.removeprefix("module."): t for name, t in weights.items()})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vdvae", type=Path, help="folder of a checkout of VDVAE; needed")
    parser.add_argument("--checkpoint", type=Path, help="weights of the CIFAR-10 model, *-ema.th")
    parser.add_argument("--demo", action="store_true", help="a tiny model with random weights")
    parser.add_argument("--images", type=int, default=1000, help="images to train heads on")
    parser.add_argument("--steps", type=int, default=100, help="steps of training of the heads")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="5 steps: to see it run")
    options = parser.parse_args()
    if options.vdvae is None or (options.checkpoint is None) != options.demo:
        parser.error("--vdvae is needed, and with it either --checkpoint FILE or --demo")
    torch.manual_seed(options.seed)
    model = import_vdvae(options.vdvae, TINY if options.demo else {})
    if not options.demo:
        load(model, options.checkpoint)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = VDVAESource(model.to(device).eval())

    images = read_images("uoft-cs/cifar10", "train").images  # (N, 3, 32, 32) in [0, 1]
    images = images[torch.randperm(len(images))[: options.images + 200]]
    x = (255 * images).round().to(device, torch.uint8).permute(0, 2, 3, 1).contiguous()
    held_out, x = x[:200], x[200:]
    difference = source.self_check(x[:2], tolerance=1e-6 if device == "cpu" else 1e-3)
    print(f"{source.num_groups} groups; from the model's own forward by {difference:.3g}")
    with torch.no_grad():
        _, state = sample_posterior(source, held_out[:16])
        nats = -source.likelihood(state).log_prob(held_out[:16]).mean().item()
    print(f"-log p(x | z), z ~ q(z | x): {nats / held_out[0].numel() / math.log(2):.3f} bits/dim")

    prior = NCPrior.for_source(source, x[:64], width=32).to(device)
    steps, size = (5 if options.quick else options.steps), options.batch_size
    history = fit(
        prior,
        x,
        held_out=held_out[:100],
        steps=steps,
        batch_size=size,
        eval_every=max(steps // 4, 1),
    )
    print(f"held-out loss, summed over groups: {sum(history.best_loss or []):.3f} nats")
    print(
        diagnose(
            prior,
            held_out[100:],
            num_draws=100,
            num_proposals=(10, 50),
            fresh_steps=0,
            batch_size=size,
        )
    )
    sample = prior.sample(4, partial(sir, num_proposals=50))
    print(f"drew images of shape {tuple(sample.x.shape)} by SIR with 50 proposals per group")


if __name__ == "__main__":
    main()
