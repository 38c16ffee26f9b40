"""A small VAE and priors on it, to be saved and loaded; also for clients in other processes."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from helpers.problems import around, standard_normal
from torch import Tensor, nn

from ncprior import NCPrior, SingleGroup, sir
from ncprior.heads.networks import MLPHead
from ncprior.saving.tensors import load_tensors, save_tensors

SIR = partial(sir, num_proposals=20)


def gaussian(seed: int = 0, base: Any = None) -> SingleGroup:
    """A VAE of two latents whose weights are drawn from a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = nn.Linear(2, 3).eval()
    return SingleGroup(standard_normal(2) if base is None else base, around(0.5), vae, module=vae)


def trained(source: Any, *heads: nn.Module) -> NCPrior:
    """A prior whose heads are anything but new, in training mode."""
    prior = NCPrior(source, heads or [MLPHead((2,), width=8, depth=1)])
    with torch.no_grad():
        for tensor in prior.state_dict().values():
            tensor.copy_(torch.rand_like(tensor) + 0.1)
    return prior.train()


def equal_draws(a: NCPrior, b: NCPrior, **condition: Tensor) -> bool:
    draws = []
    for prior in (a, b):
        torch.manual_seed(1)
        sample = prior.sample(8, SIR, **condition)
        draws.append((*sample.latents, sample.x, prior.log_ratio(sample.latents, **condition)))
    return all(torch.equal(x, y) for x, y in zip(*draws, strict=True))


def edit(file: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], object]) -> None:
    """Changes configuration and tensors of a file, checksum and all, as a determined person would."""
    tensors, config = load_tensors(file)
    change(config, tensors)
    save_tensors(file, tensors, config)
