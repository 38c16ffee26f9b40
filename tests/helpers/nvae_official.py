"""Builds the published NVAE or VAEBM models, small, and holds the adapter against them.

    python tests/helpers/nvae_official.py FOLDER

prints one line of JSON per model. A process of its own: their modules have names such as `utils`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ncprior.adapters.nvae.checkpoints import on_cpu, without_cuda
from ncprior.adapters.nvae.source import NVAESource
from ncprior.testing import check_source

DEFAULTS: dict[str, Any] = {
    "dataset": "mnist",
    "use_se": True,
    "res_dist": True,
    "num_x_bits": 8,
    "num_latent_scales": 1,
    "num_groups_per_scale": 3,
    "num_latent_per_group": 2,
    "ada_groups": False,
    "min_groups_per_scale": 1,
    "num_channels_enc": 4,
    "num_channels_dec": 4,
    "num_preprocess_blocks": 2,
    "num_preprocess_cells": 2,
    "num_cell_per_cond_enc": 1,
    "num_postprocess_blocks": 2,
    "num_postprocess_cells": 2,
    "num_cell_per_cond_dec": 1,
    "num_mixture_dec": 10,
    "num_nf": 0,
    "arch_instance": "res_mbconv",
    "batch_size": 4,
}
TWO_SCALES = {"num_latent_scales": 2, "num_groups_per_scale": 2}
CASES: dict[str, dict[str, Any]] = {
    "ten groups": {
        "num_groups_per_scale": 10,
        "num_preprocess_blocks": 3,
        "num_postprocess_blocks": 3,
    },
    "q not relative to p": {"res_dist": False},
    "one flow": {"num_nf": 1},
    "two flows": {"num_nf": 2},
    "two scales, adaptive": {**TWO_SCALES, "num_groups_per_scale": 4, "ada_groups": True},
    "two scales, flow": {**TWO_SCALES, "num_nf": 1, "res_dist": False},
    "vanilla": {"num_groups_per_scale": 1},
    "vanilla, flow": {"num_groups_per_scale": 1, "num_nf": 1},
    "mixture": {"dataset": "cifar10"},
    "mixture, 5 bits": {"dataset": "cifar10", "num_x_bits": 5, "num_nf": 1},
    "gaussian": {"dataset": "cifar10", "num_mixture_dec": 1},
    "gaussian, flow": {"dataset": "cifar10", "num_mixture_dec": 1, "num_nf": 1},
    "three scales of 64×64": {
        "dataset": "celeba_64",
        "num_latent_scales": 3,
        "ada_groups": True,
        "num_mixture_dec": 1,
        "num_nf": 1,
    },
    **{
        f"architecture {name}": {
            "arch_instance": name,
            "num_groups_per_scale": 2,
            "num_channels_enc": 8,  # mbconv_den has convolutions of 8 groups
            "num_channels_dec": 8,
        }
        for name in (
            *("res_bnelu", "res_bnswish", "mbconv_sep", "mbconv_sep11", "res53_mbconv"),
            *("res35_mbconv", "res55_mbconv", "mbconv_res", "mbconv_den"),
        )
    },
}


def modules(folder: str) -> tuple[Any, Any]:
    """Imports the checkout's `AutoEncoder` and its `utils`."""
    stub: Any = types.ModuleType("tensorboardX")
    stub.SummaryWriter = object
    sys.modules["tensorboardX"] = stub
    sys.path.insert(0, folder)
    import utils

    if (Path(folder) / "nvae_model.py").is_file():
        import nvae_model as model
    else:
        import model
    return model, utils


def build(folder: str, options: dict[str, Any]) -> nn.Module:
    """A small model with random weights and BatchNorm statistics, in evaluation mode."""
    model, utils = modules(folder)
    args = argparse.Namespace(**{**DEFAULTS, **options})
    with without_cuda(), contextlib.redirect_stdout(io.StringIO()):
        vae = model.AutoEncoder(args, None, utils.get_arch_cells(args.arch_instance))
    with torch.no_grad():
        for layer in vae.modules():
            if isinstance(layer, _BatchNorm):
                layer.running_mean.normal_(std=0.3)
                layer.running_var.uniform_(0.5, 2.0)
                if layer.affine:
                    layer.weight.uniform_(0.5, 1.5)
                    layer.bias.normal_(std=0.3)
    return vae.eval()


def images(options: dict[str, Any], count: int = 3) -> Tensor:
    """Random images on the model's levels."""
    options = {**DEFAULTS, **options}
    if options["dataset"] == "mnist":
        return torch.rand(count, 1, 32, 32).round()
    size = 64 if options["dataset"] == "celeba_64" else 32
    levels = 2 ** options["num_x_bits"] - 1
    x = (levels * torch.rand(count, 3, size, size)).round()
    return x.masked_fill(x == 254, 255) / levels  # NVAE counts 254 as a last level too


def check(vae: nn.Module, x: Tensor) -> dict[str, Any]:
    """Holds the adapter against the model."""
    with on_cpu(vae), torch.no_grad():
        source = NVAESource(vae)
        difference = source.self_check(x)
        check_source(source, x)
        state = source.start(len(x), source.encode(x))
        for _ in range(source.num_groups):
            state = source.advance(state, source.group(state).posterior.sample())
        logits = source._logits(state)
        official = vae.decoder_output(logits)
        theirs = official.log_prob(x)
        if vae.crop_output:
            theirs = theirs[:, :, 2:30, 2:30]
        ours = source.likelihood(state).log_prob(x)
        return {
            "groups": source.num_groups,
            "self_check": difference,
            "log p(x|z)": [ours.tolist(), theirs.flatten(1).sum(1).tolist()],
            "numel": x[0].numel(),
            "gaussian": logits.shape[1] == 6,
            "walk": same_samples(vae, source),
        }


def same_samples(vae: nn.Module, source: NVAESource) -> float:
    """The largest difference between the model's own samples and ours under one seed."""
    worst = 0.0
    for temperature in (1.0, 0.7):
        source = NVAESource(vae, temperature=temperature)
        torch.manual_seed(1)
        with without_cuda():
            theirs = vae.sample(2, temperature)
        theirs = theirs[0] if isinstance(theirs, tuple) else theirs
        torch.manual_seed(1)
        state = source.start(2)
        for _ in range(source.num_groups):
            state = source.advance(state, source.group(state).prior.sample())
        worst = max(worst, (source._logits(state) - theirs).abs().max().item())
    return worst


def results(folder: str) -> Iterator[dict[str, Any]]:
    for name, options in CASES.items():
        torch.manual_seed(0)
        vae = build(folder, options)
        yield {"case": name, **check(vae, images(options))}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for result in results(sys.argv[1]):
        print(json.dumps(result), flush=True)
