"""Peers of equal_budget.py that the package does not have: latent diffusion and an energy by MCMC.

Not a benchmark itself. `fit_diffusion` is LSGM's way on frozen latents: a variance-preserving
diffusion with a network that predicts v, drawn by Heun's method along the probability flow.
`fit_energy` trains the energy of Pang et al. (2020) on frozen latents: log r by maximum likelihood,
whose gradient needs samples of r·p at every step, by short-run or persistent Langevin dynamics.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal
from torch.optim.swa_utils import AveragedModel

from ncprior.bases import VelocityNet
from ncprior.heads import MLPHead
from ncprior.samplers import langevin
from ncprior.utils import train

Draws = Callable[[int], Tensor]
DECAY = 0.999  # of the moving average of weights, per step
STEP = 0.16  # of the Langevin dynamics, λ, as in Pang et al.
CHAINS = 10_000  # that are kept, if they persist
RENEWED = 0.05  # of them, at every step


def averaged(network: nn.Module) -> AveragedModel:
    """A moving average of the weights with a warm-up, as all fits of the package have."""

    def move(mean: Tensor, new: Tensor, step: Tensor | int) -> Tensor:
        return mean + (1 - min(DECAY, (1 + int(step)) / (10 + int(step)))) * (new - mean)

    return AveragedModel(network, avg_fn=move)


def fit_diffusion(
    z: Tensor, *, width: int, steps: int, learning_rate: float = 1e-3, num_steps: int = 25
) -> Draws:
    """A diffusion prior: with z_φ = cos φ z + sin φ ε, the network predicts v = cos φ ε - sin φ z."""
    loc, scale = z.mean(0), z.std(0)
    white = (z - loc) / scale
    network = VelocityNet(z.shape[1], width=width)
    average = averaged(network)

    def loss(rows: Tensor) -> Tensor:
        data, noise = white[rows], torch.randn(len(rows), z.shape[1])
        t = torch.rand(len(rows), 1)
        cos, sin = (t * math.pi / 2).cos(), (t * math.pi / 2).sin()
        error = network(cos * data + sin * noise, t) - (cos * noise - sin * data)
        average.update_parameters(network)
        return error.square().mean()

    options = {"learning_rate": learning_rate, "name": "diffusion"}
    train(network, loss, len(z), steps=steps, batch_size=256, **options)
    found = average.module.eval().requires_grad_(False)

    def draw(count: int) -> Tensor:
        u, h = torch.randn(count, z.shape[1]), 1 / num_steps
        for i in range(num_steps):
            t = u.new_full((count, 1), 1 - i * h)
            first = found(u, t)  # dz/dφ = v
            step = h * math.pi / 2
            then = found(u - step * first, t - h)
            u = u - step * (first + then) / 2
        return loc + scale * u

    return draw


def fit_energy(
    z: Tensor,
    *,
    width: int,
    steps: int,
    learning_rate: float = 1e-3,
    persistent: bool = False,
    num_steps: int = 20,
) -> Draws:
    """An energy prior r·N(0, I) on whitened latents, log r by maximum likelihood with Langevin dynamics."""
    loc, scale = z.mean(0), z.std(0)
    white = (z - loc) / scale
    head = MLPHead((z.shape[1],), width=width, depth=2)
    average = averaged(head)
    chains = torch.randn(CHAINS, z.shape[1])

    def base(count: int) -> Independent:
        return Independent(Normal(torch.zeros(count, z.shape[1]), 1.0), 1)

    def run(energy: nn.Module, start: Tensor, length: int) -> Tensor:
        move = partial(langevin, num_steps=length, step_size=STEP, init=start)
        return move(base(len(start)), energy).z

    def loss(rows: Tensor) -> Tensor:
        start, where = torch.randn(len(rows), z.shape[1]), torch.randint(CHAINS, (len(rows),))
        if persistent:
            fresh = torch.rand(len(rows), 1) < RENEWED
            start = torch.where(fresh, start, chains[where])
        drawn = run(head, start, num_steps)
        chains[where] = drawn
        average.update_parameters(head)
        return head(drawn).mean() - head(white[rows]).mean()

    options = {"learning_rate": learning_rate, "max_grad_norm": 1.0, "name": "energy by MCMC"}
    train(head, loss, len(z), steps=steps, batch_size=256, **options)
    found = average.module.eval()
    length = 10 * num_steps if persistent else num_steps  # chains of 200 steps reach r·p
    return lambda count: loc + scale * run(found, torch.randn(count, z.shape[1]), length)
