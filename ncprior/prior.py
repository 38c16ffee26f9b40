r"""The noise contrastive prior: a frozen VAE whose every group is reweighted by a ratio head.

.. math::
    p_{NCP}(z) \propto \prod_k r_k(z_k | z_{<k})^\alpha \, p(z_k | z_{<k})

Sampling is ancestral: each group is drawn from r_k p_k / Z_k(z_<k), that is, normalised locally.
This equals the paper's one global Z where every Z_k(z_<k) is constant, as at the NCE optimum.

References:
    | A Contrastive Learning Approach for Training Variational Autoencoder Priors
    | (Aneja et al., NeurIPS 2021)
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ncprior.heads.fast import prepare_head
from ncprior.heads.inputs import head_input
from ncprior.heads.probe import probe_heads
from ncprior.nce import nce_loss
from ncprior.samplers.base import Draw, LogRatio, Sampler
from ncprior.saving.heads import PretrainedHeads
from ncprior.source import (
    Group,
    LatentSource,
    contrastive_pairs,
    require_source,
    visit,
)
from ncprior.utils.errors import naming_group
from ncprior.utils.precision import at_least_float32, at_precision


class Sample(NamedTuple):
    """Images, latents and quality of the draws of :meth:`NCPrior.sample`.

    Attributes:
        x: The decoder's mean, with shape ``(B, ...)``.
        latents: One z_k per group, each with shape ``(B, *event)``.
        draws: One :class:`~ncprior.Draw` per group, with effective sample size and other
            diagnostics of the sampler.

    Example:
        >>> from functools import partial
        >>> from ncprior import sir
        >>> sample = prior.sample(8, partial(sir, num_proposals=100))
        >>> sample.x.shape, sample.latents[0].shape, sample.draws[0].ess.shape
        (torch.Size([8, 3]), torch.Size([8, 2]), torch.Size([8]))
    """

    x: Tensor
    latents: tuple[Tensor, ...]
    draws: tuple[Draw, ...]


class NCPrior(PretrainedHeads, nn.Module):
    """A frozen VAE with its prior reweighted, group by group, by ratio heads.

    The source is never registered, moved or changed: parameters and ``state_dict`` are those of the
    heads.

    Arguments:
        source: The VAE.
        heads: One ratio head per group, ``head(z, context=None) -> log_r``; for a single group,
            the head itself.

    Attributes:
        heads: The heads, an ``nn.ModuleList``.
        strength: α ≥ 0 of r^α: 1 is the trained prior, 0 the base.
        active: One bool per group: whether its head is used.
        precision: Precision of matrix products and convolutions in the heads during sampling:
            ``torch.float32``, or ``torch.bfloat16`` with sums in float32, see
            :func:`ncprior.heads.prepare_head`.

    Raises:
        ValueError: If the number of heads is not the number of groups.

    Example:
        >>> from ncprior.heads import MLPHead
        >>> prior = NCPrior(source, MLPHead((2,)))
        >>> prior.nce_loss(x)  # 2 log 2: the head is not trained yet
        tensor([1.3863], grad_fn=<StackBackward0>)
    """

    source: LatentSource[Any, Any]

    def __init__(
        self, source: LatentSource[Any, Any], heads: nn.Module | Iterable[nn.Module]
    ) -> None:
        require_source(source)
        super().__init__()
        if not isinstance(heads, nn.ModuleList):
            heads = nn.ModuleList([heads] if isinstance(heads, nn.Module) else heads)
        if len(heads) != source.num_groups:
            raise ValueError(
                f"One ratio head per latent group: the source has {source.num_groups} groups, "
                f"got {len(heads)} heads."
            )
        self.source = source
        self.heads = heads
        self.strength = 1.0
        self.active = [True] * source.num_groups
        self.precision = torch.float32
        self._disabled = False

    @classmethod
    def for_source(cls, source: LatentSource[Any, Any], x: Any, **options: Any) -> NCPrior:  # noqa: ANN401
        """Returns a prior with one new head per group, made for the shapes and scales of one batch.

        Arguments:
            source: The VAE.
            x: One batch, as the user's loader yields it; some tens of rows or more.
            options: Arguments of :func:`ncprior.heads.make_head`: ``width``, ``depth``,
                ``dropout``, ``kind``.

        Returns:
            The prior; it equals the base prior until it is trained.

        Raises:
            TypeError: If the decoder does not return one tensor with one row per row of x.

        Warns:
            UserWarning: If the reconstruction of a row is no closer to that row than to others.

        Example:
            >>> sum(p.numel() for p in NCPrior.for_source(source, x, width=8).parameters())
            369
        """
        return cls(source, probe_heads(source, x, **options))

    def forward(self, x: Any, noise_weight: float = 1.0, num_draws: int = 1) -> Tensor:  # noqa: ANN401
        """Returns :meth:`nce_loss`: for a single backward pass, and for plain DDP."""
        return self.nce_loss(x, noise_weight, num_draws)

    def nce_loss(self, x: Any, noise_weight: float = 1.0, num_draws: int = 1) -> Tensor:  # noqa: ANN401
        """Returns the NCE loss of each group, given z_<k drawn from the posterior.

        Arguments:
            x: One batch, as the user's loader yields it.
            noise_weight: ν, see :func:`ncprior.nce_loss`.
            num_draws: Draws of z_k per row, from posterior and prior each; z_<k of the next groups
                is the first draw from the posterior.

        Returns:
            The losses in nats, with shape ``(K,)``.

        References:
            Aneja et al. (2021), equation 4.

        Example:
            >>> prior.nce_loss(x).shape
            torch.Size([1])
        """
        return torch.stack(list(self.group_losses(x, noise_weight, num_draws)))

    def group_losses(
        self,
        x: Any,  # noqa: ANN401
        noise_weight: float = 1.0,
        num_draws: int = 1,
        *,
        precision: torch.dtype = torch.float32,
        groups: Container[int] | None = None,
    ) -> Iterator[Tensor]:
        """Yields the NCE loss of each group in turn, so that only one head's graph is in memory.

        Arguments:
            x: One batch, as the user's loader yields it.
            noise_weight: ν, see :func:`ncprior.nce_loss`.
            num_draws: Draws of z_k per row, from posterior and prior each.
            precision: Precision of the heads' matrix products.
            groups: Groups whose loss is computed; the loss of any other is 0. All by default.

        Returns:
            The losses in nats, scalars.

        Example:
            >>> for loss in prior.group_losses(x):
            ...     loss.backward()
        """
        for k, (z, context) in enumerate(contrastive_pairs(self.source, x, num_draws)):
            if groups is not None and k not in groups:
                yield z.new_zeros((), dtype=torch.float32)
                continue
            log_r = self.log_r(k, z, context, precision=precision)
            yield nce_loss(log_r[0], log_r[1], noise_weight)

    @torch.no_grad()
    def sample(self, batch_size: int, sampler: Sampler, *, condition: Any = None) -> Sample:  # noqa: ANN401
        """Draws latents group by group from the reweighted prior, and decodes them.

        A group whose head is off (``disabled``, ``strength`` 0 or not ``active``) is drawn by one
        ``prior.sample()``: the base's own draw, bit for bit under the same seed.

        Arguments:
            batch_size: B, the number of samples.
            sampler: ``sampler(prior, log_ratio) -> Draw``, such as
                ``partial(sir, num_proposals=500)``.
            condition: The condition of a conditional VAE, with B rows, or ``None``.

        Returns:
            The decoder's means, the latents and the draws.

        Raises:
            FloatingPointError: If log r is not finite; the message names the group.
            TypeError: If the sampler does not support a group's prior; the message names the group.

        Example:
            >>> from functools import partial
            >>> from ncprior import sir
            >>> prior.sample(8, partial(sir, num_proposals=100)).x.shape
            torch.Size([8, 3])
        """
        draws = []

        def choose(k: int, group: Group) -> Tensor:
            draws.append(self.draw(k, group, sampler))
            return draws[k].z

        start = self.source.start(batch_size, condition=condition)
        latents, state = visit(self.source, start, choose)
        return Sample(self.source.decode(state), latents, tuple(draws))

    def log_ratio(self, latents: Sequence[Tensor], condition: Any = None) -> Tensor:  # noqa: ANN401
        """Returns α log r_k(z_k | z_<k) of every group, as the sampler uses it.

        Arguments:
            latents: One z_k per group, each with shape ``(B, *event)``.
            condition: The condition of a conditional VAE, with B rows, or ``None``.

        Returns:
            The log-ratios in nats, with shape ``(B, K)``; 0 for groups whose head is off.

        Example:
            >>> prior.log_ratio([torch.randn(5, 2)]).shape
            torch.Size([5, 1])
        """
        if len(latents) != self.source.num_groups:
            raise ValueError(
                f"One z per latent group: the source has {self.source.num_groups} groups, "
                f"got {len(latents)} latents."
            )
        log_r = []

        def weigh(k: int, group: Group) -> Tensor:
            z = latents[k]
            if self.is_on(k):
                log_r.append(self.strength * self.log_r(k, z, group.context))
            else:
                log_r.append(torch.zeros(len(z), device=z.device))
            return z

        visit(self.source, self.source.start(len(latents[0]), condition=condition), weigh)
        return torch.stack(log_r, dim=1)

    def log_r(
        self,
        k: int,
        z: Tensor,
        context: Tensor | None,
        *,
        precision: torch.dtype = torch.float32,
    ) -> Tensor:
        """Returns log r_k(z, c) of head k, without α, in float32 or better, also under autocast.

        Arguments:
            k: The group, from 0.
            z: Latents of the group, with shape ``(*, B, *event)``.
            context: The group's context, with shape ``(B, ...)``, or ``None``.
            precision: Precision of the head's matrix products, see :mod:`ncprior.heads`.

        Returns:
            log r in nats, with shape ``(*, B)``, without ``strength`` and ``active``.

        Example:
            >>> prior.log_r(0, torch.randn(100, 5, 2), None).shape
            torch.Size([100, 5])
        """
        h = head_input(self.source, k, z)
        with at_precision(z.device.type, precision):
            log_r: Tensor = self.heads[k](
                at_least_float32(h), None if context is None else at_least_float32(context)
            )
        return at_least_float32(log_r)

    def is_on(self, k: int) -> bool:
        """Returns whether head k is used: it is ``active``, ``strength`` > 0, and not ``disabled``.

        Example:
            >>> prior.is_on(0)
            True
        """
        return self.active[k] and self.strength != 0 and not self._disabled

    @torch.no_grad()
    def draw(self, k: int, group: Group, sampler: Sampler) -> Draw:
        """Draws z_k of one group.

        Arguments:
            k: The group's number, from 0.
            group: The group.
            sampler: ``sampler(prior, log_ratio) -> Draw``.

        Returns:
            One draw per row; a draw of the base prior if the head is off.

        Raises:
            FloatingPointError: If log r is not finite; the message names the group.
            TypeError: If the sampler does not support the group's prior; the message names the group.

        Example:
            >>> from functools import partial
            >>> from ncprior import sir
            >>> prior.draw(0, source.group(source.start(4)), partial(sir, num_proposals=9)).z.shape
            torch.Size([4, 2])
        """
        if not self.is_on(k):
            return Draw(group.prior.sample())
        with naming_group(k):
            return sampler(group.prior, self._ratio(k, group.context))

    def _ratio(self, k: int, context: Tensor | None) -> LogRatio:
        """α log r_k(·, c), for many z of one context."""
        c = None if context is None else at_least_float32(context)
        log_r = prepare_head(self.heads[k], c, precision=self.precision)
        return lambda z: self.strength * log_r(at_least_float32(head_input(self.source, k, z)))

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """A context manager inside which this prior equals the base prior.

        Example:
            >>> with prior.disabled():
            ...     prior.log_ratio([torch.randn(2, 2)])
            tensor([[0.],
                    [0.]])
        """
        before, self._disabled = self._disabled, True
        try:
            yield
        finally:
            self._disabled = before

    def extra_repr(self) -> str:
        """Returns the part of ``print(prior)`` besides the heads."""
        off = [k for k, on in enumerate(self.active) if not on]
        return f"source={type(self.source).__name__}, strength={self.strength}, groups_off={off}"

    def __setattr__(self, name: str, value: Any) -> None:  # noqa: ANN401
        """Keeps the source unregistered, also if it is an ``nn.Module``."""
        if name == "source":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> NCPrior:
        """Returns a copy of the heads on the same source: the VAE is never copied."""
        from copy import deepcopy

        other = type(self)(self.source, deepcopy(self.heads, memo))
        other.strength, other.active = self.strength, list(self.active)
        other.precision = self.precision
        return other.train(self.training)
