r"""A stage on all groups at once: one head for the joint distribution of z_1, …, z_K.

Heads of groups are trained one by one, and what each of them misses adds up along the walk. One more
head r contrasts whole walks: draws of q(z) = E_x Π_k q(z_k | z_<k, x) with draws of the trained prior,

.. math::
    p(z) \propto r(z) \, p_{NCP}(z), \qquad r(z) \approx q(z) / p_{NCP}(z).

Few proposals are enough, as little is left for it; each of them is a walk of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.distributions import Distribution

from ncprior.bases.drawn import Drawn
from ncprior.distributions import PointMass
from ncprior.source import Group, LatentSource, num_rows, sample_posterior, visit
from ncprior.utils.random_state import seeded
from ncprior.utils.require import require_counts, require_instance
from ncprior.utils.switches import is_switched_off

_BATCH = 256  # rows


@runtime_checkable
class NCPrior(Protocol):
    """The part of :class:`ncprior.NCPrior` that is needed here, under the name that errors show."""

    @property
    def heads(self) -> nn.Module:
        """The heads of the groups."""

    @property
    def source(self) -> LatentSource[Any, Any]:
        """The VAE."""

    @property
    def sampler(self) -> Any:  # noqa: ANN401
        """The sampler of its draws."""

    @property
    def active(self) -> Sequence[bool]:
        """Whether the head of each group is used."""

    def sample(self, batch_size: int) -> Any:  # noqa: ANN401
        """Draws latents of all groups and the mean of x."""

    def disabled(self) -> AbstractContextManager[None]:
        """A context manager inside which the heads are off."""


class JointSource(LatentSource[Any, Any]):
    """All groups of a VAE as one group, whose base is the distribution that a trained prior draws.

    A latent of it is one row of numbers: z_1, …, z_K and the decoder's mean of x, which is all that
    the head sees. Samplers that need log p raise ``TypeError`` on it. Its head is saved with the
    trained prior, and loaded with the VAE as the source.

    Arguments:
        prior: The trained prior of a VAE without conditions, with a sampler, ``prior.sampler``.

    Attributes:
        bytes_per_row: Bytes of a latent.

    Raises:
        TypeError: If the latents or the means of x are not real numbers.
        ValueError: If the prior has no sampler.

    Example:
        >>> from functools import partial
        >>> from ncprior import NCPrior, sir
        >>> prior.sampler = partial(sir, num_proposals=7)
        >>> whole = NCPrior.for_source(JointSource(prior), x)
        >>> whole.sample(4, partial(sir, num_proposals=3)).x.shape  # 3 walks of 7 evaluations each
        torch.Size([4, 3])
    """

    class State(NamedTuple):
        """An encoding or ``None`` and, behind the group, its latents."""

        rows: Tensor  # (B, 0): carries the batch size
        encoding: Tensor | None
        z: Tensor | None

    num_groups = 1

    @torch.no_grad()
    def __init__(self, prior: NCPrior) -> None:
        require_instance("prior", prior, NCPrior, "Pass a trained NCPrior.")
        self.prior = prior
        vae = prior.source.module
        self.module = nn.ModuleList([prior.heads] if vae is None else [prior.heads, vae])
        with seeded(0):
            one = prior.sample(1)
        for t in (*one.latents, one.x):
            if not t.is_floating_point():
                raise TypeError(
                    f"A joint head needs latents and means of x that are real numbers; got {t.dtype}."
                )
        self._dtypes, self._x_dtype = [z.dtype for z in one.latents], one.x.dtype
        self._shapes = [tuple(z.shape[1:]) for z in one.latents]
        self._sizes = [math.prod(shape) for shape in self._shapes]
        self._x_shape = tuple(one.x.shape[1:])
        self.bytes_per_row = _row(one.latents, one.x).nbytes

    def encode(self, x: Any) -> Tensor:  # noqa: ANN401
        """Draws a walk z ~ q(z | x) for each row of x, with its decoded mean."""
        latents, state = sample_posterior(self.prior.source, x)
        with torch.no_grad():
            return _row(latents, self.prior.source.decode(state))

    def start(self, batch_size: int, encoding: Any = None, condition: Any = None) -> State:  # noqa: ANN401
        """Returns the state in front of the group.

        Raises:
            ValueError: If there is a condition, which the joint head would not see, or another number
                of rows of encoding.
        """
        require_counts(batch_size=batch_size)
        if condition is not None:
            raise ValueError("A joint head does not see conditions. Pass condition=None.")
        if encoding is not None and len(encoding) != batch_size:
            raise ValueError(
                f"The walk has {batch_size} rows; got {len(encoding)} rows of encoding."
            )
        rows = torch.empty(batch_size, 0, device=None if encoding is None else encoding.device)
        return self.State(rows, encoding, None)

    def group(self, state: State) -> Group:
        """Returns what the trained prior draws, and the walk of the encoding."""
        posterior = None if state.encoding is None else PointMass(state.encoding)
        return Group(Drawn(lambda: (self._walk(len(state.rows)), None)), posterior)

    def advance(self, state: State, z: Tensor) -> State:
        """Returns the state behind the group."""
        if len(z) != len(state.rows):
            raise ValueError(f"The walk has {len(state.rows)} rows; got {len(z)} rows of z.")
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
        x = z[..., sum(self._sizes) :].to(self._x_dtype)
        return x.reshape(*z.shape[:-1], *self._x_shape)

    def _walk(self, batch_size: int) -> Tensor:
        """Walks along the trained prior, one per row; the decoder sees a batch at a time."""
        counts = [min(_BATCH, batch_size - first) for first in range(0, batch_size, _BATCH)]
        off = self.prior.disabled() if is_switched_off(self) else nullcontext()
        with off:
            found = [self.prior.sample(count) for count in counts]
        return torch.cat([_row(one.latents, one.x) for one in found])

    def latents(self, z: Tensor) -> tuple[Tensor, ...]:
        """Returns z_1, …, z_K of joint latents of shape ``(B, D)``."""
        parts = z[:, : sum(self._sizes)].split(self._sizes, dim=1)
        kinds = zip(parts, self._shapes, self._dtypes, strict=True)
        return tuple(part.reshape(-1, *shape).to(dtype) for part, shape, dtype in kinds)


def _row(latents: tuple[Tensor, ...], x: Tensor) -> Tensor:
    """Latents of all groups, and the mean of x, as one row."""
    return torch.cat([rearrange(t, "b ... -> b (...)") for t in (*latents, x)], dim=1)


def _latents_of(state: JointSource.State) -> Tensor:
    if state.z is None:
        raise ValueError("The group must be visited before decoding: call advance(state, z).")
    return state.z
