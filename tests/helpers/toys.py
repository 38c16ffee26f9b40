"""Small pretend VAEs with networks, for the tests of the core and for their subprocesses."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from ncprior import Group, LatentSource, NCPrior, SingleGroup
from ncprior.heads.networks import MLPHead


class VAE(nn.Module):
    """An untrained VAE with what may go wrong: batch statistics, dropout, frozen parameters."""

    def __init__(self, features: int = 3, dim: int = 2, condition: int = 0) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(features + condition, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5)
        )
        self.to_posterior = nn.Linear(8, 2 * dim)
        self.decoder = nn.Sequential(
            nn.Linear(dim + condition, 8), nn.Tanh(), nn.Linear(8, features)
        )
        self.to_posterior.bias.requires_grad_(False)
        self.eval()

    def posterior(self, x: Tensor, c: Tensor | None = None) -> Independent:
        """q(z|x), or q(z|x, c)."""
        x = x if c is None else torch.cat([x, c.to(x)], -1)
        mean, log_var = self.to_posterior(self.encoder(x)).chunk(2, -1)
        return Independent(Normal(mean, (0.5 * log_var - 1).exp(), validate_args=False), 1)

    def decode(self, z: Tensor, c: Tensor | None = None) -> Tensor:
        """The mean of p(x|z), or of p(x|z, c)."""
        return self.decoder(z if c is None else torch.cat([z, c.to(z)], -1))


def base(dim: int = 2) -> Independent:
    """N(0, I) with an empty batch shape."""
    return Independent(Normal(torch.zeros(dim), torch.ones(dim), validate_args=False), 1)


def flat(vae: VAE | None = None, **options: Any) -> SingleGroup:
    """A `SingleGroup` around a `VAE`."""
    vae = VAE() if vae is None else vae
    return SingleGroup(base(), vae.posterior, vae.decode, module=vae, **options)


class Unfinished(LatentSource[Any, Any]):
    """A source to subclass where a test needs a part of the walk alone."""

    def encode(self, x: Any) -> Any:
        """Not needed."""
        raise NotImplementedError

    def decode(self, state: Any) -> Tensor:
        """Not needed."""
        raise NotImplementedError


class Rung(NamedTuple):
    """The state of a `Ladder`: its hidden vector, what it has of x, and z_<k."""

    h: Tensor  # (B, width)
    encoding: Tensor | None  # (B, width)
    latents: tuple[Tensor, ...]


class Ladder(nn.Module, LatentSource[Any, Any]):
    """A source of K groups that is itself an `nn.Module`: z_k moves a hidden vector h."""

    def __init__(
        self, num_groups: int = 3, dim: int = 2, width: int = 8, features: int = 3
    ) -> None:
        super().__init__()
        self.num_groups, self.dim = num_groups, dim
        self.encoder = nn.Sequential(
            nn.Linear(features, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Dropout(0.5)
        )
        self.h0 = nn.Parameter(0.5 * torch.randn(width))
        self.to_prior = nn.ModuleList(nn.Linear(width, dim) for _ in range(num_groups))
        self.to_posterior = nn.ModuleList(nn.Linear(2 * width, dim) for _ in range(num_groups))
        self.cells = nn.ModuleList(nn.Linear(width + dim, width) for _ in range(num_groups))
        self.decoder = nn.Linear(width, features)
        self.eval()

    def encode(self, x: Any) -> Tensor:
        """Features of x, or of the first item of a batch, with shape (B, width)."""
        return self.encoder(x[0] if isinstance(x, tuple | list) else x)

    def start(
        self, batch_size: int, encoding: Tensor | None = None, condition: None = None
    ) -> Rung:
        """Every row at h_0."""
        return Rung(self.h0.expand(batch_size, -1), encoding, ())

    def group(self, state: Rung) -> Group:
        """Normal prior and posterior, with h as the context."""
        k, q = len(state.latents), None
        mean = self.to_prior[k](state.h).float()
        p = Independent(Normal(mean, torch.ones_like(mean), validate_args=False), 1)
        if state.encoding is not None:
            both = torch.cat([state.h, state.encoding], -1)
            shifted = mean + self.to_posterior[k](both).float()
            scale = torch.full_like(mean, 0.3)
            q = Independent(Normal(shifted, scale, validate_args=False), 1)
        return Group(p, q, state.h.float())

    def advance(self, state: Rung, z: Tensor) -> Rung:
        """Moves h."""
        h = state.h + torch.tanh(
            self.cells[len(state.latents)](torch.cat([state.h, z.to(state.h)], -1))
        )
        return Rung(h, state.encoding, (*state.latents, z))

    def decode(self, state: Rung) -> Tensor:
        """Linear in h."""
        return self.decoder(state.h)


class KnownLadder(Ladder):
    """A `Ladder` with p(x | z) = N(decode(z), I)."""

    def likelihood(self, state: Rung) -> Independent:
        """p(x | z)."""
        return Independent(Normal(self.decode(state), 1.0, validate_args=False), 1)


def ladder_prior(
    num_groups: int = 3,
    *,
    width: int = 8,
    depth: int = 1,
    dropout: float = 0.0,
    kind: type[Ladder] = Ladder,
) -> NCPrior:
    """Small heads on a `Ladder`."""
    heads = [
        MLPHead((2,), context_shape=(8,), width=width, depth=depth, dropout=dropout)
        for _ in range(num_groups)
    ]
    return NCPrior(kind(num_groups), heads)


def stir(prior: NCPrior, scale: float = 0.5) -> NCPrior:
    """Moves every parameter, so that log r is no longer 0."""
    with torch.no_grad():
        for p in prior.parameters():
            p.add_(scale * torch.randn_like(p))
    return prior


def weights(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Equality of state dicts bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def everything(module: nn.Module) -> list[tuple[str, Any]]:
    """All that must stay as it was in a user's model, bit for bit."""
    state: list[tuple[str, Any]] = [(n, m.training) for n, m in module.named_modules()]
    for name, t in (*module.named_parameters(), *module.named_buffers()):
        grad = None if t.grad is None else t.grad.tolist()
        state.append((name, (t.tolist(), str(t.dtype), t.requires_grad, grad, t.data_ptr())))
    hooks = [len(m._forward_hooks) + len(m._backward_hooks) for m in module.modules()]
    return [*state, ("hooks", hooks)]


def exactly(mean: Tensor, cov: Tensor, count: int) -> Tensor:
    """Features whose sample mean and (unbiased) covariance are exactly these."""
    x = torch.randn(count, len(mean), dtype=torch.float64)
    x = x - x.mean(0)
    root = torch.linalg.cholesky(x.T @ x / (count - 1))
    white = torch.linalg.solve_triangular(root, x.T, upper=False)
    return mean + (torch.linalg.cholesky(cov) @ white).T


def within(values: Tensor, truth: float) -> bool:
    """Whether the mean of independent values is 4 standard errors from the truth at most."""
    return bool((values.mean() - truth).abs() < 4 * values.std() / math.sqrt(len(values)))
