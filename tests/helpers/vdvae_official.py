"""Builds the published VDVAE models, small, and holds the adapter against them.

    python tests/helpers/vdvae_official.py FOLDER

prints one line of JSON per model. A process of its own: their modules have names such as `utils`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ncprior.adapters.vdvae import _NORMALISATION, VDVAESource
from ncprior.testing import check_source

SMALL = {"width": 8, "zdim": 2, "num_mixtures": 3, "bottleneck_multiple": 0.5}
CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "CIFAR-10, all 43 groups": ("cifar10", 32, {}),
    "ImageNet 32, all 78 groups": ("imagenet32", 32, {}),
    "ImageNet 64": (
        "imagenet64",
        64,
        {"dec_blocks": "1x1,4m1,8m4,64m8", "enc_blocks": "64x1,64d8,8d2,4d4,1x1"},
    ),
    "FFHQ 256, 5 bits, few biases": (
        "ffhq256",
        32,
        {
            "dec_blocks": "1x2,4m1,8m4,16m8,32m16",
            "enc_blocks": "32x1,32d2,16d2,8d2,4d4,1x1",
            "no_bias_above": 8,
        },
    ),
    "FFHQ 1024, widths": (
        "ffhq1024",
        32,
        {
            "dec_blocks": "1x2,4m1,8m4,32m8",
            "enc_blocks": "32x1,32d4,8d2,4d4,1x1",
            "custom_width_str": "1:16,4:16,8:12",
        },
    ),
}


def build(folder: str, name: str, size: int, options: dict[str, Any]) -> nn.Module:
    """A small model with every parameter random: untrained, many of them are 0."""
    sys.path.insert(0, folder)
    import hps
    import vae

    H = hps.Hyperparams()
    parser = hps.add_vae_arguments(argparse.ArgumentParser())
    hps.parse_args_and_update_hparams(H, parser, s=["--hps", name])
    H.update({**SMALL, **options, "image_size": size, "image_channels": 3})
    model = vae.VAE(H)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def official_pair(dataset: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """What VDVAE's loader makes of bytes: the encoder's input and the target."""
    shift, scale = _NORMALISATION[dataset]
    rounded = x // 8 * 8 if dataset == "ffhq_256" else x
    return (x.float() - shift) / scale, (rounded.float() - 127.5) / 127.5


def check(model: Any, x: Tensor) -> dict[str, Any]:
    """Holds the adapter against the model."""
    source = VDVAESource(model)
    pair = official_pair(model.H.dataset, x)
    differences = [source.self_check(x), source.self_check(pair)]
    check_source(source, x)
    with torch.no_grad():
        torch.manual_seed(1)
        features = model.decoder.forward_uncond(2)
        torch.manual_seed(1)
        state = source.start(2)
        for _ in range(source.num_groups):
            state = source.advance(state, source.group(state).prior.sample())
        walk = (source._final(state) - features).abs().max().item()
        theirs = -model.decoder.out_net.nll(features, pair[1][:2]) * x[0].numel()
        ours = source.likelihood(state).log_prob(x[:2])
    return {
        "groups": source.num_groups,
        "self_check": max(differences),
        "walk": walk,
        "log p(x|z)": [ours.tolist(), theirs.tolist()],
    }


def results(folder: str) -> Iterator[dict[str, Any]]:
    for case, (name, size, options) in CASES.items():
        torch.manual_seed(0)
        model = build(folder, name, size, options)
        x = torch.randint(256, (3, size, size, 3), dtype=torch.uint8)
        yield {"case": case, **check(model, x)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for result in results(sys.argv[1]):
        print(json.dumps(result), flush=True)
