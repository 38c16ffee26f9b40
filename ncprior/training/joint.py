r"""A stage on all groups at once: one head for the joint distribution of z_1, …, z_K.

Heads of groups are trained one by one, and what each of them misses adds up along the walk. One more
head r contrasts whole walks: draws of q(z) = E_x Π_k q(z_k | z_<k, x) with draws of the trained prior,

.. math::
    p(z) \propto r(z) \, p_{NCP}(z), \qquad r(z) \approx q(z) / p_{NCP}(z).

Few proposals are enough, as little is left for it; each of them is a walk of its own.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.distributions import Distribution

from ncprior.distributions import PointMass
from ncprior.prior import NCPrior
from ncprior.samplers.base import Draw, Sampler
from ncprior.source import Group, LatentSource, num_rows, sample_posterior, visit
from ncprior.training.stages import Drawn
from ncprior.utils.random_state import seeded
from ncprior.utils.require import require_callable, require_counts, require_instance


class JointSource(LatentSource[Any, Any]):
    """All groups of a VAE as one group, whose base is the distribution that a trained prior draws.

    A latent of it is one row of numbers: z_1, …, z_K and the decoder's mean of x, which is all that
    the head sees. Samplers that need log p raise ``TypeError`` on it. Its heads are saved without the
    first prior, whose heads are a part of the fingerprint: to load them, load the first prior and make
    the source again.

    Arguments:
        prior: The trained prior of a VAE without conditions.
        sampler: The sampler of its draws; ``None`` takes the prior's own, ``sampler``.

    Raises:
        TypeError: If the latents or the means of x are not real numbers.
        ValueError: If there is no sampler.

    Example:
        >>> from functools import partial
        >>> from ncprior import sir
        >>> joint = JointSource(prior, partial(sir, num_proposals=7))
        >>> whole = NCPrior.for_source(joint, x)
        >>> whole.sample(4, partial(sir, num_proposals=3)).x.shape  # 3 walks of 7 evaluations each
        torch.Size([4, 3])
    """

    class State(NamedTuple):
        """The number of rows, an encoding or ``None``, and, behind the group, its latents."""

        batch_size: int
        encoding: Tensor | None
        z: Tensor | None

    num_groups = 1

    @torch.no_grad()
    def __init__(self, prior: NCPrior, sampler: Sampler | None = None) -> None:
        require_instance("prior", prior, NCPrior, "Pass a trained NCPrior.")
        if sampler is not None:
            require_callable(
                "sampler", sampler, "Pass one such as partial(sir, num_proposals=20)."
            )
        self.prior, self.sampler = prior, sampler
        vae = prior.source.module
        self.module = nn.ModuleList([prior.heads] if vae is None else [prior.heads, vae])
        with seeded(0):
            one = prior.sample(1, sampler)
        for t in (*one.latents, one.x):
            if not t.is_floating_point():
                raise TypeError(
                    f"A joint head needs latents and means of x that are real numbers; got {t.dtype}."
                )
        self._shapes = [tuple(z.shape[1:]) for z in one.latents]
        self._sizes = [math.prod(shape) for shape in self._shapes]
        self._x_shape = tuple(one.x.shape[1:])

    def encode(self, x: Any) -> Tensor:  # noqa: ANN401
        """Draws a walk z ~ q(z | x) for each row of x, with its decoded mean."""
        latents, state = sample_posterior(self.prior.source, x)
        with torch.no_grad():
            return _row(latents, self.prior.source.decode(state))

    def start(self, batch_size: int, encoding: Any = None, condition: Any = None) -> State:  # noqa: ANN401
        """Returns the state in front of the group.

        Raises:
            ValueError: If there is a condition, which the joint head would not see.
        """
        require_counts(batch_size=batch_size)
        if condition is not None:
            raise ValueError("A joint head does not see conditions. Pass condition=None.")
        return self.State(batch_size, encoding, None)

    def group(self, state: State) -> Group:
        """Returns what the trained prior draws, and the walk of the encoding."""
        posterior = None if state.encoding is None else PointMass(state.encoding)
        return Group(Drawn(partial(self._walk, state.batch_size)), posterior)

    def advance(self, state: State, z: Tensor) -> State:
        """Returns the state behind the group."""
        return state._replace(z=z)

    def decode(self, state: State) -> Tensor:
        """Returns the mean of p(x | z), which was decoded when z was drawn."""
        return self.features(0, _latents_of(state))

    def likelihood(self, state: State) -> Distribution:
        """Returns p(x | z) of the VAE."""
        latents = self.latents(_latents_of(state))
        source = self.prior.source
        start = source.start(num_rows(latents), condition=None)
        return source.likelihood(visit(source, start, lambda k, group: latents[k])[1])

    def features(self, k: int, z: Tensor) -> Tensor:
        """Returns the decoded means in z, with shape ``(*, B, *x_shape)``."""
        return z[..., sum(self._sizes) :].reshape(*z.shape[:-1], *self._x_shape)

    def _walk(self, batch_size: int) -> Draw:
        """Walks along the trained prior, one per row."""
        found = self.prior.sample(batch_size, self.sampler)
        return Draw(_row(found.latents, found.x))

    def latents(self, z: Tensor) -> tuple[Tensor, ...]:
        """Returns z_1, …, z_K of joint latents of shape ``(B, D)``."""
        parts = z[:, : sum(self._sizes)].split(self._sizes, dim=1)
        return tuple(part.reshape(-1, *s) for part, s in zip(parts, self._shapes, strict=True))


def _row(latents: tuple[Tensor, ...], x: Tensor) -> Tensor:
    """Latents of all groups, and the mean of x, as one row."""
    return torch.cat([rearrange(t, "b ... -> b (...)") for t in (*latents, x)], dim=1)


def _latents_of(state: JointSource.State) -> Tensor:
    if state.z is None:
        raise ValueError("The group must be visited before decoding: call advance(state, z).")
    return state.z
