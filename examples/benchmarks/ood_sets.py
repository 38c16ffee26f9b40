"""Images that are not of a data set, for the AUROC table of vaebm.py.

Not a benchmark itself. What the Hugging Face Hub or $NCPRIOR_DATA has not got is left out.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ncprior.demo import digits, read_images

# The paper's: of the Hub, with their part and the column of the classes. (CelebA's images do not fit
# into memory as read_images reads them.)
_HUB = {
    "MNIST": ("ylecun/mnist", "test", "label"),
    "SVHN": ("ufldl-stanford/svhn", "cropped_digits/test", "label"),
    "CIFAR-100": ("uoft-cs/cifar100", "test", "fine_label"),
}


def outside(name: str, inside: Tensor, count: int) -> dict[str, Tensor]:
    """Sets of `count` images of the shape of `inside`, test images of the data set of this name."""
    torch.manual_seed(0)
    like = inside[torch.randperm(len(inside))[:count]]
    found = {
        "interpolations": 0.5 * (like + like.roll(1, 0)),
        "uniform noise": torch.rand_like(like),
        "constants": torch.rand(len(like), like.shape[1], 1, 1).expand_as(like).contiguous(),
    }
    if name != "digits":
        found["digits"] = _shown(digits().images, like)
    if name == "cifar10":
        sets = {key: _read(*where) for key, where in _HUB.items()}
        found |= {key: _shown(images, like) for key, images in sets.items() if images is not None}
    return {key: images[: len(like)] for key, images in found.items()}


def _shown(images: Tensor, like: Tensor) -> Tensor:
    """Images of another set in the size of these, and where these are in colour, in colours."""
    images = images[torch.randperm(len(images))[: len(like)]]
    if images.shape[-1] != like.shape[-1]:
        images = interpolate(images, like.shape[-2:], mode="bilinear").clamp(0, 1)
    if images.shape[1] == like.shape[1]:
        return images
    ink, paper = torch.rand(2, len(images), like.shape[1], 1, 1)
    return images * ink + (1 - images) * paper


def _read(repo: str, part: str, label: str) -> Tensor | None:
    try:
        return read_images(repo, part, label).images
    except FileNotFoundError as error:
        print(f"left out: {error}", flush=True)
        return None
