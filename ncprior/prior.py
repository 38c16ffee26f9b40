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
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from ncprior.heads.checks import (
    as_heads,
    checked_log_r,
    naming_parts,
    require_finite_groups,
    require_one_per_group,
    require_steady,
)
from ncprior.heads.contexts import require_context
from ncprior.heads.fast import prepare_input_head
from ncprior.heads.inputs import head_input
from ncprior.heads.losses import GroupLoss, group_loss
from ncprior.heads.probe import probe_heads, warn_if_not_finite
from ncprior.samplers.base import Draw, LogRatio, Sample, Sampler, checked_draw
from ncprior.samplers.setting import SamplerSetting, require_sampler, sample_x
from ncprior.saving.heads import PretrainedHeads
from ncprior.source import Group, LatentSource, contrastive_pairs, device_of, require_source, visit
from ncprior.utils.batches import own_batch
from ncprior.utils.errors import naming_group
from ncprior.utils.precision import at_least_float32, at_precision, check_precision
from ncprior.utils.require import require_counts, require_flags, require_instance, require_numbers
from ncprior.utils.visible import require_apart


class NCPrior(SamplerSetting, PretrainedHeads, nn.Module):
    """A frozen VAE with its prior reweighted, group by group, by ratio heads.

    The source is never registered, moved or changed: parameters and ``state_dict`` are the heads'.

    Arguments:
        source: The VAE.
        heads: One ratio head per group, ``head(z, context=None) -> log_r``; a single one as it is.

    Attributes:
        sampler: The sampler of ``prior.sample(64)``, or ``None``; saved with the heads.
        report: That of :func:`ncprior.improve`, or ``None``; not saved: ``report_on`` makes a new one.

    Raises:
        TypeError: If the source is no :class:`LatentSource`, or a head is no module.
        ValueError: If there is not one head per group, or a head shares parameters with the VAE.

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
        super().__init__()
        self.source = source
        self.heads = as_heads(heads, source.num_groups)
        require_apart(self.heads, source, "Heads")
        self.strength, self.precision = 1.0, torch.float32
        self.active = [True] * source.num_groups

    @classmethod
    def for_source(cls, source: LatentSource[Any, Any], x: Any, **options: Any) -> NCPrior:  # noqa: ANN401
        """Returns a prior with one new head per group, made for the shapes and scales of one batch.

        Arguments:
            source: The VAE.
            x: One batch, as the user's loader yields it; some tens of rows or more.
            options: ``width``, ``depth``, ``dropout``, ``kind`` of :func:`ncprior.heads.make_head`.

        Returns:
            The prior, in evaluation mode; it equals the base prior until it is trained.

        Raises:
            TypeError: If x is no batch, or the decoder does not return one row per row of x.
            ValueError: If x has no rows, or the posterior of a row is not finite.

        Warns:
            UserWarning: If reconstructions are no closer to their row than to others, or not finite.

        Example:
            >>> sum(p.numel() for p in NCPrior.for_source(source, x, width=8).parameters())
            369
        """
        return cls(source, probe_heads(source, x, **options)).eval()

    def forward(self, x: Any, noise_weight: float = 1.0, num_draws: int = 1) -> Tensor:  # noqa: ANN401
        """Returns :meth:`nce_loss`: for a single backward pass, and for plain DDP."""
        return self.nce_loss(x, noise_weight, num_draws)

    def nce_loss(self, x: Any, noise_weight: float = 1.0, num_draws: int = 1) -> Tensor:  # noqa: ANN401
        """Returns the NCE loss of each group, given z_<k drawn from the posterior.

        Arguments:
            x: One batch, as the user's loader yields it.
            noise_weight: ν, see :func:`ncprior.nce_loss`.
            num_draws: Draws of z_k per row, from posterior and prior each.

        Returns:
            The losses in nats, with shape ``(K,)``: equation 4 of Aneja et al. (2021).

        Raises:
            FloatingPointError: If a loss is not finite; the message names the group.

        Example:
            >>> prior.nce_loss(x).shape
            torch.Size([1])
        """
        losses = torch.stack(
            [loss.total for loss in self.group_losses(x, noise_weight, num_draws)]
        )
        require_finite_groups("The NCE loss", losses, "x")
        return losses

    def group_losses(
        self,
        x: Any,  # noqa: ANN401
        noise_weight: float = 1.0,
        num_draws: int = 1,
        *,
        score_weight: float = 0.0,
        precision: torch.dtype = torch.float32,
        groups: Container[int] | None = None,
    ) -> Iterator[GroupLoss]:
        """Yields the losses of each group in turn, so that only one head's graph is in memory.

        Autocast is off until the next loss is asked for, as gradients are in float32. With a score
        term and ``features=``, back-propagation reaches parameters of the VAE that require gradients.

        Arguments:
            x: One batch, as the user's loader yields it.
            noise_weight: ν, see :func:`ncprior.nce_loss`.
            num_draws: Draws of z_k per row.
            score_weight: Weight of the score term, see :func:`ncprior.nce.score_loss`.
            precision: Precision of the heads' matrix products.
            groups: Groups whose loss is computed; the loss of any other is 0. All by default.

        Returns:
            ``nce`` at ν = 1 in nats, and ``total``, to be minimised; scalars, NaN if a row of x is.

        Example:
            >>> for loss in prior.group_losses(x, score_weight=10):
            ...     loss.total.backward()
        """
        require_numbers("(0, inf)", noise_weight=noise_weight)
        require_counts(num_draws=num_draws)
        require_numbers("[0, inf)", score_weight=score_weight)
        check_precision(precision)
        x = own_batch(x, self._device())
        with naming_parts(self.source, self.heads):
            for k, (z, group) in enumerate(contrastive_pairs(self.source, x, num_draws)):
                if groups is not None and k not in groups:
                    zero = z.new_zeros((), dtype=torch.float32)
                    yield GroupLoss(zero, zero)
                    continue
                head = partial(self._log_r, k, context=group.context, precision=precision, lead=3)
                loss = group_loss(head, z, group, noise_weight, score_weight)
                with at_precision(z.device.type, torch.float32):  # the backward pass, too
                    yield loss

    @torch.no_grad()
    def sample(
        self,
        batch_size: int,
        sampler: Sampler | None = None,
        *,
        condition: Any = None,  # noqa: ANN401
        draw_x: bool = False,
    ) -> Sample:
        """Draws latents group by group from the reweighted prior, and decodes them.

        A group whose head is off (``disabled``, ``strength`` 0 or not ``active``) is drawn as by the
        base, bit for bit under the same seed.

        Arguments:
            batch_size: B, the number of samples.
            sampler: Such as ``partial(sir, num_proposals=500)``; by default ``prior.sampler``.
            condition: The condition of a conditional VAE, with B rows, or ``None``.
            draw_x: Whether x is drawn from p(x | z) of a source with a ``likelihood``, for data that
                a mean does not resemble, such as tables, text and counts.

        Returns:
            The decoder's means or draws of x, the latents and the draws of the sampler.

        Raises:
            FloatingPointError: If log r is not finite. All messages name the group.
            TypeError: If the sampler does not support a group's prior.
            ValueError: If there is no sampler, a head has dropout and is in training mode, or the
                source has no likelihood to draw x from.

        Warns:
            UserWarning: If the decoder returns NaN or infinity.

        Example:
            >>> from functools import partial
            >>> from ncprior import sir
            >>> prior.sample(8, partial(sir, num_proposals=100)).x.shape
            torch.Size([8, 3])
        """
        require_counts(batch_size=batch_size)
        require_flags(draw_x=draw_x)
        sampler, draws = self.chosen(sampler), []

        def choose(k: int, group: Group) -> Tensor:
            draws.append(self.draw(k, group, sampler))
            return draws[k].z

        with naming_parts(self.source, self.heads):
            start = self.source.start(batch_size, condition=self._own(condition))
            latents, state = visit(self.source, start, choose)
            x = sample_x(self.source, state) if draw_x else self.source.decode(state)
        warn_if_not_finite(x, "The decoder", 4)
        return Sample(x, latents, tuple(draws))

    def log_ratio(self, latents: Sequence[Tensor], condition: Any = None) -> Tensor:  # noqa: ANN401
        """Returns α log r_k(z_k | z_<k) of every group, as the sampler uses it.

        Gradients go through the VAE only if a latent requires them.

        Arguments:
            latents: One z_k per group, each with shape ``(B, *event)``.
            condition: The condition of a conditional VAE, with B rows, or ``None``.

        Returns:
            The log-ratios in nats, with shape ``(B, K)``; 0 for groups whose head is off.

        Raises:
            FloatingPointError: If a log-ratio is not finite; the message names the group.
            ValueError: If the number of latents is wrong, or a head in training mode has dropout.

        Example:
            >>> prior.log_ratio([torch.randn(5, 2)]).shape
            torch.Size([5, 1])
        """
        require_one_per_group(latents, self.source.num_groups)
        each = "Pass z of shape (B, *event) per group."
        own = self._own(list(latents), "latents")
        latents = [require_instance("A latent", z, Tensor, each) for z in own]
        log_r = [z.new_zeros(len(z), dtype=torch.float32) for z in latents]
        of_heads = torch.is_grad_enabled()
        of_vae = of_heads and any(z.requires_grad for z in latents)

        def weigh(k: int, group: Group) -> Tensor:
            if self.is_on(k):
                require_steady(k, self.heads[k])
                with torch.set_grad_enabled(of_heads):
                    log_r[k] = self.strength * self._log_r(k, latents[k], group.context, lead=1)
            return latents[k]

        with naming_parts(self.source, self.heads), torch.set_grad_enabled(of_vae):
            start = self.source.start(len(latents[0]), condition=self._own(condition))
            visit(self.source, start, weigh)
        ratios = torch.stack(log_r, dim=1)
        require_finite_groups("log r", ratios, "the latents")
        return ratios

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

        Raises:
            TypeError: If the head does not return a tensor of floats.
            ValueError: If log r has another shape, or the head has dropout and is in training mode.

        Example:
            >>> prior.log_r(0, torch.randn(100, 5, 2), None).shape
            torch.Size([100, 5])
        """
        require_counts(f"[0, {len(self.heads) - 1}]", k=k)
        require_instance("z", z, Tensor, "Pass latents of group k as a tensor.")
        require_context(context)
        check_precision(precision)
        require_steady(k, self.heads[k])
        return self._log_r(k, z, context, precision)

    def _log_r(
        self,
        k: int,
        z: Tensor,
        context: Tensor | None,
        precision: torch.dtype = torch.float32,
        lead: int | None = None,
    ) -> Tensor:
        """log r_k(z, c), also of a head in training mode; z has ``lead`` axes ``(*, B)``."""
        h = head_input(self.source, k, z)
        with at_precision(z.device.type, precision):
            log_r = self.heads[k](
                at_least_float32(h), None if context is None else at_least_float32(context)
            )
        return at_least_float32(checked_log_r(k, log_r, h, lead))

    @torch.no_grad()
    def draw(self, k: int, group: Group, sampler: Sampler | None = None) -> Draw:
        """Draws z_k of one group.

        Arguments:
            k: The group's number, from 0.
            group: The group.
            sampler: ``sampler(prior, log_ratio) -> Draw``; ``None`` takes the prior's own.

        Returns:
            One draw per row; a draw of the base prior if the head is off.

        Raises:
            FloatingPointError: If log r is not finite; the message names the group.
            TypeError: If the sampler does not support the group's prior, or returns no ``Draw``.
            ValueError: If there is no sampler, or the head has dropout and is in training mode.

        Example:
            >>> from functools import partial
            >>> from ncprior import sir
            >>> prior.draw(0, source.group(source.start(4)), partial(sir, num_proposals=9)).z.shape
            torch.Size([4, 2])
        """
        require_sampler(sampler)
        require_instance("group", group, Group, "Pass source.group(state).")
        if not self.is_on(k):
            return Draw(group.prior.sample())
        require_steady(k, self.heads[k])
        sampler, p = self.chosen(sampler), group.prior
        shape = p.batch_shape + p.event_shape if isinstance(p, Distribution) else None
        device_type = next((p.device.type for p in self.parameters()), "cpu")
        with naming_group(k), at_precision(device_type, torch.float32):
            draw = checked_draw(sampler(p, self._ratio(k, group.context)), shape)
        if not torch.isfinite(draw.z).all():
            raise FloatingPointError(f"Group {k}: the sampler has drawn z that are not finite.")
        return draw

    def _ratio(self, k: int, context: Tensor | None) -> LogRatio:
        """α log r_k(·, c), for many z of one context."""
        head, precision = self.heads[k], self.precision
        log_r = prepare_input_head(self.source, k, head, context, precision=precision)
        return lambda z: self.strength * log_r(z)

    def _device(self) -> torch.device:
        """The device of the heads, on which the VAE is as well."""
        own = next((p.device for p in self.parameters()), None)
        return device_of(self.source) if own is None else own

    def _own(self, tree: Any, name: str = "condition") -> Any:  # noqa: ANN401
        """A condition or latents on the device of the heads, with arrays as tensors."""
        return None if tree is None else own_batch(tree, self._device(), name)

    def __setattr__(self, name: str, value: Any) -> None:  # noqa: ANN401
        """Keeps source, sampler and report unregistered, also if they are an ``nn.Module``."""
        if name == "source":
            require_source(value)
            if "heads" in self._modules:
                as_heads(self.heads, value.num_groups)
        if name in ("source", "sampler", "report"):
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> NCPrior:
        """Returns a copy of the heads on the same source: the VAE is never copied."""
        other = type(self)(self.source, deepcopy(self.heads, memo))
        other.strength, other.active = self.strength, list(self.active)
        other.precision, other.sampler, other.report = self.precision, self.sampler, self.report
        return other.train(self.training)
