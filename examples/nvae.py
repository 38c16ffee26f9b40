"""NCP on NVAE: wrap a checkpoint, or train a small NVAE on MNIST here, and measure the hole closed.

    git clone https://github.com/NVlabs/NVAE      # its licence is non-commercial: it is not ours
    NCPRIOR_DATA=<folder> python examples/nvae.py --nvae NVAE --save small.pt   # 21 minutes' CPU time
    python examples/nvae.py --nvae NVAE --quick                          # to see it run
    python examples/nvae.py --nvae NVAE --checkpoint small.pt            # or a checkpoint of yours

Without a checkpoint, a small NVAE (10 groups of 2×4×4 latents) is trained on MNIST, then a ratio
head for every group on the frozen NVAE. Printed are every group's report, and which share of the
gap between the base prior and the posterior SIR closes, as a Fréchet distance on features of
a classifier of digits. With a checkpoint (of MNIST, CIFAR-10, or VAEBM's), heads are trained and
reported on its groups, and on MNIST the gap is measured.

What to expect (seed 0): the NVAE comes to a negative ELBO of 100 nats; NCP closes 39 % (29 to 48) of
the gap, with D 45 of the base prior, 32 of NCP and 11 of the posterior; with BatchNorm statistics
readjusted to what is drawn, 40 of the base prior and 24 of NCP. Half of the groups, of which the
NVAE makes no use, match their base.
"""

import argparse
import contextlib
import importlib.util
import io
import sys
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from ncprior import NCPrior, fit, sir
from ncprior.adapters.nvae import (
    NVAESource,
    load_checkpoint,
    on_cpu,
    readjust_batchnorm,
    without_cuda,
)
from ncprior.demo import ARMS, Classifier, Labelled, draw_arms, in_batches, read_images
from ncprior.diagnostics import diagnose
from ncprior.evaluation import frechet_distance, gap_closed
from ncprior.heads import ConvHead, MLPHead
from ncprior.training import FitSettings
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


def train_small(build: Build, utils: types.ModuleType, x: Tensor, steps: int) -> nn.Module:
    """Trains the small NVAE on binarised images, with the KL term warmed up."""
    args = argparse.Namespace(**SMALL)
    with without_cuda():
        vae: Any = build(args, utils.get_arch_cells(args.arch_instance))
    on_cpu(vae)
    beta = 0.0

    def negative_elbo(rows: Tensor, weight: float = 1.0) -> Tensor:
        logits, _, _, kl, _ = vae(x[rows])
        misfit = -vae.decoder_output(logits).log_prob(x[rows])[..., 2:30, 2:30].sum((1, 2, 3))
        return (misfit + weight * sum(kl)).mean()

    def loss(rows: Tensor) -> Tensor:
        nonlocal beta
        beta = min(1.0, beta + 3 / steps)
        return negative_elbo(rows, beta)

    train(vae, loss, len(x), steps=steps, batch_size=64, name="NVAE")
    with torch.no_grad():
        print(f"negative ELBO of training images: {negative_elbo(torch.arange(1000)):.1f} nats")
    return vae


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
    prior: NCPrior, x: Tensor, data: Labelled, test: Tensor, options: argparse.Namespace
) -> None:
    """Prints the gap closed, and what readjusted BatchNorm statistics would do by themselves."""
    classifier = Classifier(28, num_features=64)

    def misfit(rows: Tensor) -> Tensor:
        return cross_entropy(classifier(data.images[rows]), data.labels[rows])

    steps = 50 if options.quick else 900
    train(classifier, misfit, len(data.labels), steps=steps, batch_size=128, name="classifier")

    def features(images: Tensor) -> Tensor:
        return classifier.features(images[..., 2:30, 2:30].cpu())

    sampler = partial(sir, num_proposals=options.num_proposals)
    arms = partial(draw_arms, prior, sampler, x, features=features)
    reference = in_batches(classifier.features, test)
    drawn, first = arms(num_samples=700 if options.quick else 2000, generations=5)
    base, ours, posterior = (drawn[arm] for arm in ARMS)
    try:
        gap = gap_closed(reference, base=base, ours=ours, posterior=posterior)
    except ValueError as error:  # hardly any training leaves no hole
        print(error)
        return
    print(gap)
    print(f"D: base {gap.d_base:.1f}, NCP {gap.d_ours:.1f}, posterior {gap.d_post:.1f}")
    ess = first["NCP"].ess.mean(0)
    print(f"ESS of {options.num_proposals} proposals, by group: {ess.round().int().tolist()}")
    for name, disabled in (("base", prior.disabled()), ("NCP", contextlib.nullcontext())):
        with disabled, torch.no_grad():
            draw = partial(prior.sample, 64, sampler)
            with readjust_batchnorm(prior.source, draw, iterations=5 if options.quick else 100):
                images = torch.cat([prior.sample(500, sampler).x for _ in range(4)])
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
    parser.add_argument("--vae-steps", type=int, default=2500, help="steps of training of it")
    parser.add_argument("--trust-pickle", action="store_true", help="the checkpoint may run code")
    parser.add_argument("--steps", type=int, default=1500, help="steps of training of the heads")
    parser.add_argument("--num-proposals", type=int, default=50, help="M of SIR")
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
        x = torch.bernoulli(pad(data.images, (2, 2, 2, 2)))
        vae = train_small(build, utils, x, 20 if options.quick else options.vae_steps)
        if options.save is not None:
            args = argparse.Namespace(**SMALL)
            arch_instance = utils.get_arch_cells(args.arch_instance)
            contents = {"args": args, "arch_instance": arch_instance}
            torch.save({**contents, "state_dict": vae.state_dict()}, options.save)
    source = NVAESource(vae)
    device = next(vae.parameters()).device
    x, x_test = (as_taken(part.images, vae).to(device) for part in (data, test))
    difference = source.self_check(x[:8], tolerance=1e-6 if device.type == "cpu" else 1e-3)
    print(f"{source.num_groups} groups; from the model's own forward by {difference:.3g}")

    # On maps of 4×4 perceptrons do, and a walk costs more than they: several draws of every z_k.
    kind = MLPHead if dataset == "mnist" else ConvHead
    prior = NCPrior.for_source(source, x[:256], kind=kind, width=128).to(device)
    steps = 10 if options.quick else options.steps
    settings = FitSettings(num_draws=4)
    history = fit(
        prior, x, held_out=x_test[:500], steps=steps, learning_rate=2e-3, settings=settings
    )
    print(f"held-out loss, summed over groups: {sum(history.best_loss):.3f} nats")
    print(diagnose(prior, x_test[500:1500], train=x[:1000], num_draws=2000, fresh_steps=0))
    if dataset == "mnist":
        measure(prior, x, data, test.images, options)


if __name__ == "__main__":
    main()
