"""NCP on NVAE: wrap a checkpoint, or train a small NVAE on MNIST here, and measure the hole closed.

    git clone https://github.com/NVlabs/NVAE      # its licence is non-commercial: it is not ours
    NCPRIOR_DATA=<folder> python examples/nvae.py --nvae NVAE --save small.pt --heads heads   # 3.5 hours
    python examples/nvae.py --nvae NVAE --quick                          # to see it run
    python examples/nvae.py --nvae NVAE --checkpoint small.pt            # or a checkpoint of yours

Without a checkpoint, a small NVAE (10 groups of 2×4×4 latents) is trained on MNIST; then `improve`
makes a better prior for the frozen NVAE. Printed are its choices, and which share of the gap
between the base prior and the posterior it closes, as a Fréchet distance on features of a classifier
of digits. With a checkpoint (of MNIST, CIFAR-10, or VAEBM's), the prior of its groups is improved, and
on MNIST the gap is measured.

What to expect, on one core: the NVAE comes to a negative ELBO of 95 nats in 75 minutes, and the new
prior takes two hours. It closes 80 % (77 to 83) of the gap, with D 46.7 of the base prior, 13.3 of
NCP and 4.9 of the posterior; with BatchNorm statistics readjusted to what is drawn, 39.4 of the base
prior and 13.2 of NCP. Its report says that the widest group needs 591 proposals: 50 are too few.
"""

import argparse
import contextlib
import importlib.util
import io
import math
import sys
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from ncprior import NCPrior, improve
from ncprior.adapters.nvae import (
    NVAESource,
    load_checkpoint,
    on_cpu,
    readjust_batchnorm,
    without_cuda,
)
from ncprior.demo import ARMS, Classifier, Labelled, draw_arms, in_batches, read_images
from ncprior.evaluation import frechet_distance, gap_closed
from ncprior.utils import train

SMALL = {
    "dataset": "mnist",
    "arch_instance": "res_bnswish",
    "num_latent_scales": 1,
    "num_groups_per_scale": 10,
    "num_latent_per_group": 2,
    "num_channels_enc": 8,
    "num_channels_dec": 8,
    "num_preprocess_blocks": 3,  # from 32×32 to 4×4
    "num_preprocess_cells": 1,
    "num_cell_per_cond_enc": 1,
    "num_postprocess_blocks": 3,
    "num_postprocess_cells": 1,
    "num_cell_per_cond_dec": 1,
    "num_mixture_dec": 10,
    "num_x_bits": 8,
    "num_nf": 0,
    "res_dist": True,
    "use_se": True,
    "ada_groups": False,
    "min_groups_per_scale": 1,
}
Build = Callable[[argparse.Namespace, object], nn.Module]


def import_nvae(folder: Path) -> tuple[Build, types.ModuleType]:
    """How to build the AutoEncoder of a checkout of NVAE or VAEBM, and the checkout's utils."""
    variants = {"nvae_model.py": "nvae_model", "model.py": "model"}
    name = next((variants[file] for file in variants if (folder / file).is_file()), None)
    if name is None:
        raise SystemExit(f"{folder} holds neither NVAE's model.py nor VAEBM's nvae_model.py.")
    if importlib.util.find_spec("tensorboardX") is None:  # its utils log with it; we do not
        stub: Any = types.ModuleType("tensorboardX")
        stub.SummaryWriter = None
        sys.modules["tensorboardX"] = stub
    sys.path.insert(0, str(folder))
    model, utils = importlib.import_module(name), importlib.import_module("utils")

    def build(args: argparse.Namespace, arch_instance: object) -> nn.Module:
        with contextlib.redirect_stdout(io.StringIO()):
            vae: nn.Module = model.AutoEncoder(args, None, arch_instance)
        return vae

    return build, utils


def learning_rate(steps: int, step: int) -> float:
    """A hundred steps of warm-up, then a cosine to a hundredth, as a factor."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return min(1.0, (step + 1) / 100) * (0.99 * cosine + 0.01)


def train_small(build: Build, utils: types.ModuleType, images: Tensor, steps: int) -> nn.Module:
    """Trains the small NVAE on images that are binarised anew at every step; the KL is warmed up."""
    args = argparse.Namespace(**SMALL)
    with without_cuda():
        vae: Any = build(args, utils.get_arch_cells(args.arch_instance))
    on_cpu(vae)
    optimizer = torch.optim.Adamax(vae.parameters(), lr=3e-3, eps=1e-3)  # as NVAE's own training
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(learning_rate, steps))
    average = 0.0
    for step in range(steps):
        x = torch.bernoulli(images[torch.randint(len(images), (64,))])
        logits, _, _, kl, _ = vae(x)
        misfit = -vae.decoder_output(logits).log_prob(x)[..., 2:30, 2:30].sum((1, 2, 3))
        loss = (misfit + min(1.0, 3 * (step + 1) / steps) * sum(kl)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 200.0)
        optimizer.step()
        schedule.step()
        elbo = (misfit + sum(kl)).mean().item()
        average = elbo if step == 0 else 0.98 * average + 0.02 * elbo
        if (step + 1) % 500 == 0 or step + 1 == steps:
            print(f"NVAE, step {step + 1}: negative ELBO {average:.1f} nats", flush=True)
    return vae.eval()


def read(dataset: str, part: str) -> Labelled:
    """MNIST or CIFAR-10, shuffled."""
    if dataset not in ("mnist", "cifar10"):
        raise SystemExit(f"No data of {dataset} here: put your own into `read` of this script.")
    data = read_images("ylecun/mnist" if dataset == "mnist" else "uoft-cs/cifar10", part)
    return data.rows(torch.randperm(len(data.labels)))


def as_taken(images: Tensor, model: nn.Module) -> Tensor:
    """Images as the model takes them: MNIST's padded and binarised, others on the model's levels."""
    if model.crop_output:
        return torch.bernoulli(pad(images, (2, 2, 2, 2)))
    bits = model.num_bits
    return (255 * images).round().div(2 ** (8 - bits), rounding_mode="floor") / (2**bits - 1)


def measure(
    source: NVAESource,
    prior: NCPrior,
    x: Tensor,
    data: Labelled,
    test: Tensor,
    options: argparse.Namespace,
) -> None:
    """Prints the gap closed, and what readjusted BatchNorm statistics would do by themselves."""
    classifier = Classifier(28, num_features=64)

    def misfit(rows: Tensor) -> Tensor:
        return cross_entropy(classifier(data.images[rows]), data.labels[rows])

    steps = 50 if options.quick else 900
    train(classifier, misfit, len(data.labels), steps=steps, batch_size=128, name="classifier")

    def features(images: Tensor) -> Tensor:
        return classifier.features(images[..., 2:30, 2:30].cpu())

    arms = partial(draw_arms, prior, prior.sampler, x, features=features, base=source)
    reference = in_batches(classifier.features, test)
    drawn, _ = arms(num_samples=700 if options.quick else 2000, generations=5)
    base, ours, posterior = (drawn[arm] for arm in ARMS)
    try:
        gap = gap_closed(reference, base=base, ours=ours, posterior=posterior)
    except ValueError as error:  # hardly any training leaves no hole
        print(error)
        return
    print(gap)
    print(f"D: base {gap.d_base:.1f}, NCP {gap.d_ours:.1f}, posterior {gap.d_post:.1f}")
    own = NCPrior.for_source(source, x[:256])
    own.active, own.sampler = [False] * source.num_groups, prior.sampler  # the NVAE's own prior
    for name, one in (("base", own), ("NCP", prior)):
        with torch.no_grad():
            draw = partial(one.sample, 64)
            with readjust_batchnorm(source, draw, iterations=5 if options.quick else 100):
                images = torch.cat([one.sample(500).x for _ in range(4)])
        distance = frechet_distance(in_batches(features, images), reference)
        print(f"D of {name} with BatchNorm readjusted to it: {distance:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nvae", type=Path, help="folder of a checkout of NVAE or VAEBM; needed")
    parser.add_argument(
        "--checkpoint", type=Path, help="a checkpoint.pt of it; else one is trained"
    )
    parser.add_argument("--save", type=Path, help="where to save the NVAE that is trained here")
    parser.add_argument("--vae-steps", type=int, default=6000, help="steps of training of it")
    parser.add_argument("--trust-pickle", action="store_true", help="the checkpoint may run code")
    parser.add_argument("--heads", type=Path, help="folder in which training of heads is saved")
    parser.add_argument("--budget", type=int, default=50, help="evaluations per head and sample")
    parser.add_argument("--max-seconds", type=float, help="time for the new prior")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="hardly any training: to see it run")
    options = parser.parse_args()
    if options.nvae is None:
        parser.error(
            "--nvae is needed: NVAE's code is under a licence that does not let us ship it. "
            "git clone https://github.com/NVlabs/NVAE, and give the folder"
        )
    torch.manual_seed(options.seed)
    build, utils = import_nvae(options.nvae)
    dataset, vae = "mnist", None
    if options.checkpoint is not None:
        vae = load_checkpoint(options.checkpoint, build, trust_pickle=options.trust_pickle)
        dataset = vae.dataset
        vae = vae.cuda() if torch.cuda.is_available() else on_cpu(vae).model
    data, test = read(dataset, "train"), read(dataset, "test")
    if vae is None:
        images = pad(data.images, (2, 2, 2, 2))
        vae = train_small(build, utils, images, 20 if options.quick else options.vae_steps)
        if options.save is not None:
            args = argparse.Namespace(**SMALL)
            arch_instance = utils.get_arch_cells(args.arch_instance)
            contents = {"args": args, "arch_instance": arch_instance}
            torch.save({**contents, "state_dict": vae.state_dict()}, options.save)
    source = NVAESource(vae)
    device = next(vae.parameters()).device
    x = as_taken(data.images, vae).to(device)
    difference = source.self_check(x[:8], tolerance=1e-6 if device.type == "cpu" else 1e-3)
    print(f"{source.num_groups} groups; from the model's own forward by {difference:.3g}")

    prior = improve(
        *(source, x),
        budget=options.budget,
        max_seconds=60 if options.quick else options.max_seconds,
        seed=options.seed,
        checkpoint=options.heads,
    )
    print(prior.report)
    if dataset == "mnist":
        measure(source, prior, x, data, test.images, options)


if __name__ == "__main__":
    main()
