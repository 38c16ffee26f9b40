"""A small world that each call gets anew: a VAE, a source, a prior, data, files; and its state."""

from __future__ import annotations

import random
import shutil
import tempfile
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo  # the first optimizer imports it: seconds that count for no call
from helpers.toys import VAE, base, stir
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

from ncprior import NCPrior, SingleGroup, sir
from ncprior.heads import MLPHead


class Energy(nn.Module):
    """A user's energy E(x), with shape (B,)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        """E(x)."""
        return self.linear(x)[..., 0]


class World:
    """What a user has before a call; everything is made from seed 0, and the same every time."""

    def __init__(self) -> None:
        torch.set_grad_enabled(True)  # a call that was stopped may have left it off
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        self.vae = VAE()
        self.vae.decoder[0].weight.grad = torch.ones(8, 2)
        self.x = torch.randn(24, 3)
        self.base = base()
        self.source = SingleGroup(
            self.base,
            self.vae.posterior,
            self.vae.decode,
            module=self.vae,
            likelihood=self.likelihood,
        )
        self.prior = stir(NCPrior(self.source, MLPHead((2,), width=4, depth=1))).eval()
        self.z = torch.randn(24, 2)
        self.sampler = partial(sir, num_proposals=5)
        self.generators = self.generators_now()

    def likelihood(self, z: Tensor) -> Distribution:
        """p(x | z)."""
        return Independent(Normal(self.vae.decode(z), 1.0, validate_args=False), 1)

    def log_ratio(self, z: Tensor) -> Tensor:
        """log r(z) = z_1, with shape (*, B)."""
        return z[..., 0]

    @cached_property
    def folder(self) -> Path:
        """A folder with a file of the user's."""
        folder = Path(tempfile.mkdtemp(prefix="ncprior-fuzz-"))
        (folder / "mine.txt").write_text("mine")
        return folder

    @cached_property
    def model(self) -> Any:
        """A VAEBM over the prior."""
        from ncprior.vaebm import VAEBM

        return VAEBM(self.prior, Energy(), num_steps=2)

    def files(self) -> dict[str, bytes | None] | None:
        """The content of the folder by name, if a call had one."""
        if "folder" not in vars(self):
            return None
        found = sorted(self.folder.rglob("*"))
        return {
            str(path.relative_to(self.folder)): path.read_bytes() if path.is_file() else None
            for path in found
        }

    def close(self) -> None:
        """Removes the folder."""
        if "folder" in vars(self):
            shutil.rmtree(self.folder, ignore_errors=True)

    @staticmethod
    def generators_now() -> tuple[Any, Any, Any]:
        """The states of the global generators."""
        return torch.get_rng_state(), np.random.get_state(), random.getstate()

    def generators_moved(self) -> bool:
        """Whether a global generator has moved since the world was made."""
        torch_state, numpy_state, python_state = self.generators
        now = np.random.get_state()
        return not (
            torch.equal(torch.get_rng_state(), torch_state)
            and random.getstate() == python_state
            and now[2] == numpy_state[2]
            and np.array_equal(now[1], numpy_state[1])
        )


def switches() -> tuple[Any, ...]:
    """What torch has for the whole process."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_autocast_enabled("cpu"),
    )


def settings_of(prior: NCPrior) -> tuple[Any, ...]:
    """The settings of a prior besides its weights."""
    on = [prior.is_on(k) for k in range(len(prior.heads))] if len(prior.active) else []
    grads = [p.requires_grad for p in prior.parameters()]
    return (prior.strength, list(prior.active), prior.precision, on, grads)


def modes_of(prior: NCPrior) -> list[bool]:
    """Whether each module of a prior is in training mode."""
    return [module.training for module in prior.modules()]
