"""Peers of equal_budget.py, each in several sizes; latent diffusion and an energy by MCMC are here.

Not a benchmark itself. `fit_diffusion` is LSGM's way on frozen latents: a variance-preserving
diffusion with a network that predicts v, drawn by Heun's method along the probability flow.
`fit_energy` trains the energy of Pang et al. (2020) on frozen latents: log r by maximum likelihood,
whose gradient needs samples of r·p at every step, by short-run or persistent Langevin dynamics.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from hole_cases import Case
from hole_methods import images_of_rows, on_images, tempered
from torch import Size, Tensor, nn
from torch.distributions import Independent, Normal
from torch.optim.swa_utils import AveragedModel

from ncprior import LatentSource
from ncprior.bases import (
    VelocityNet,
    fit_flow,
    fit_flow_matching,
    fit_flows,
    fit_mixture,
    fit_vamp,
    rebase,
)
from ncprior.heads import MLPHead
from ncprior.samplers import langevin
from ncprior.utils import train

Draws = Callable[[int], Tensor]
Fit = Callable[..., LatentSource]  # fit(case, steps=…, learning_rate=…): the VAE with a new prior
LOOP = {"patience": None, "progress": False}
DECAY = 0.999  # of the moving average of weights, per step
STEP = 0.16  # of the Langevin dynamics, λ, as in Pang et al.
CHAINS = 10_000  # that are kept, if they persist
RENEWED = 0.05  # of them, at every step
SMALL = (1e-4, 3e-5, 3e-4)  # learning rates; with larger ones, chains diverge


def averaged(network: nn.Module) -> AveragedModel:
    """A moving average of the weights with a warm-up, as all fits of the package have."""

    def move(mean: Tensor, new: Tensor, step: Tensor | int) -> Tensor:
        return mean + (1 - min(DECAY, (1 + int(step)) / (10 + int(step)))) * (new - mean)

    return AveragedModel(network, avg_fn=move)


class Drawn:
    """A base that is a function from a count to as many latents; its loss, if any, is comparable."""

    def __init__(self, draw: Draws, loss: Callable[[Tensor], Tensor] | None = None) -> None:
        self.draw, self.loss = draw, loss

    def sample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: B008
        return self.draw(sample_shape.numel()).unflatten(0, sample_shape)


def fit_diffusion(
    z: Tensor, *, width: int, steps: int, learning_rate: float = 1e-3, num_steps: int = 25
) -> Drawn:
    """A diffusion prior: with z_φ = cos φ z + sin φ ε, the network predicts v = cos φ ε - sin φ z."""
    loc, scale = z.mean(0), z.std(0)
    white = (z - loc) / scale
    network = VelocityNet(z.shape[1], width=width)
    average = averaged(network)

    def misfit(net: nn.Module, data: Tensor) -> Tensor:
        noise, t = torch.randn_like(data), torch.rand(len(data), 1)
        cos, sin = (t * math.pi / 2).cos(), (t * math.pi / 2).sin()
        error: Tensor = net(cos * data + sin * noise, t) - (cos * noise - sin * data)
        return error.square().mean()

    def loss(rows: Tensor) -> Tensor:
        average.update_parameters(network)
        return misfit(network, white[rows])

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

    return Drawn(draw, lambda z: misfit(found, (z - loc) / scale))


def fit_energy(
    z: Tensor,
    *,
    width: int,
    steps: int,
    learning_rate: float = 1e-3,
    persistent: bool = False,
    num_steps: int = 20,
) -> Drawn:
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
    return Drawn(lambda count: loc + scale * run(found, torch.randn(count, z.shape[1]), length))


class Peer(NamedTuple):
    """A method, and its sizes by name, the least first; `has_steps`: the number of steps is free."""

    name: str
    sizes: Mapping[str, Fit]
    has_steps: bool = True
    rates: tuple[float, ...] = (
        1e-3,
        3e-4,
        3e-3,
    )  # of learning; the first one is that of the sizes


def sized(fit: Fit, **options: tuple[float, ...]) -> dict[str, Fit]:
    """A fit in several sizes, by name."""
    choices = zip(*options.values(), strict=True)
    named = [dict(zip(options, choice, strict=True)) for choice in choices]
    return {", ".join(f"{k} {v}" for k, v in one.items()): partial(fit, **one) for one in named}


def peers(case: Case) -> list[Peer]:
    """All peers of a case."""
    return flat_peers() if case.source.num_groups == 1 else conditional_peers()


def flat_peers() -> list[Peer]:
    """Peers that are fitted to the encodings."""
    import zuko

    def spline(z: Tensor, *, transforms: int, width: int, **loop: Any) -> Any:  # noqa: ANN401
        sizes = {"transforms": transforms, "hidden_features": (width, width), "bins": 8}
        flow = zuko.flows.NSF(z.shape[1], passes=2, randperm=True, **sizes)
        return fit_flow(z, flow, **loop, **LOOP)

    def masked(z: Tensor, *, transforms: int, width: int, **loop: Any) -> Any:  # noqa: ANN401
        flow = zuko.flows.MAF(z.shape[1], transforms=transforms, hidden_features=(width, width))
        return fit_flow(z, flow, **loop, **LOOP)

    def mixture(z: Tensor, *, components: int) -> Any:  # noqa: ANN401
        return fit_mixture(z, components)

    def matching(z: Tensor, *, width: int, **loop: Any) -> Any:  # noqa: ANN401
        flow = fit_flow_matching(z, width=width, **loop, **LOOP)

        def loss(z: Tensor) -> Tensor:
            end, start, t = (z - flow.loc) / flow.scale, torch.randn_like(z), torch.rand(len(z), 1)
            error = flow.network((1 - t) * start + t * end, t) - (end - start)
            return error.square().mean()

        return Drawn(lambda count: flow.sample(Size((count,))), loss)

    def vamp(case: Case, *, components: int, **loop: Any) -> LatentSource:  # noqa: ANN401
        images, _ = images_of_rows(case)
        found = fit_vamp(on_images(case), images, components, **loop, **LOOP)
        return rebase(case.source, found)

    def on_encodings(fit: Callable[..., Any]) -> Fit:
        def fitted(case: Case, **options: Any) -> LatentSource:  # noqa: ANN401
            return rebase(case.source, fit(case.encodings, **options))

        return fitted

    flows = {"transforms": (4, 8, 6), "width": (128, 128, 256)}
    widths, narrow = {"width": (256, 512)}, {"width": (128, 256)}
    components, inputs = (
        {"components": numbers} for numbers in ((10, 30, 100, 300, 1000), (100, 500))
    )
    persistent = partial(fit_energy, persistent=True)
    return [
        Peer("mixture", sized(on_encodings(mixture), **components), has_steps=False),
        Peer("VampPrior", sized(vamp, **inputs)),
        Peer("VampPrior, not trained", sized(partial(vamp, steps=0), **inputs), has_steps=False),
        Peer("spline flow", sized(on_encodings(spline), **flows)),
        Peer("masked autoregressive flow", sized(on_encodings(masked), **flows)),
        Peer("flow matching", sized(on_encodings(matching), **widths)),
        Peer("diffusion", sized(on_encodings(fit_diffusion), **widths)),
        Peer("energy, short-run MCMC", sized(on_encodings(fit_energy), **narrow), rates=SMALL),
        Peer("energy, persistent MCMC", sized(on_encodings(persistent), **narrow), rates=SMALL),
    ]


def conditional_peers() -> list[Peer]:
    """Peers for several groups: p'(z_k | c_k), and lower or higher temperatures."""
    import zuko

    def flows(case: Case, flow: Callable[[int, int], nn.Module], loop: Any) -> LatentSource:  # noqa: ANN401
        return rebase(case.source, fit_flows(case.source, case.data, flow, **loop, **LOOP))

    def spline(case: Case, *, transforms: int, width: int, **loop: Any) -> LatentSource:  # noqa: ANN401
        sizes = {"transforms": transforms, "hidden_features": (width, width), "bins": 8}
        make = partial(zuko.flows.NSF, passes=2, randperm=True, **sizes)
        return flows(case, make, loop)

    def mixture(case: Case, *, components: int, width: int, **loop: Any) -> LatentSource:  # noqa: ANN401
        sizes = {"components": components, "hidden_features": (width, width)}
        make = partial(zuko.mixtures.GMM, covariance_type="diagonal", **sizes)
        return flows(case, make, loop)

    def colder(case: Case, *, temperature: float) -> LatentSource:
        return rebase(case.source, partial(tempered, temperature))

    return [
        Peer("own prior", sized(colder, temperature=(0.8, 0.9, 0.95, 1.0, 1.05)), has_steps=False),
        Peer("mixture given z_<k", sized(mixture, components=(10, 50), width=(256, 256))),
        Peer("spline flow given z_<k", sized(spline, transforms=(2, 4), width=(128, 128))),
    ]
