r"""Sampling within the components of a Gaussian mixture base, with the mixture weights unchanged.

A mixture draws z in two steps: a component j ~ π_j, then z ~ p_j(z). SIR over the whole mixture
moves probability mass away from the components where q and p_j differ most: good proposals are
rare there, so a proposal of an easier component is picked. Sampling within components draws each
row from

.. math::
    \sum_j \pi_j \, \frac{r(z) \, p_j(z)}{Z_j}, \qquad Z_j = E_{p_j}[r].

With the exact ratio r = q/p, Z_j = E_q[π_j p_j / p] / π_j. If π_j is the fraction of q that
component j is responsible for, then Z_j = 1 and this distribution is q itself. Every fixed point
of expectation-maximisation on encodings has this property. The number of proposals M must then
suit the average component instead of the hardest one.

Each component is reparametrised by noise: z = μ_j + L_j ε with ε ~ N(0, I). Chains move in ε, so
that directions in which a component is narrow need no smaller steps.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Independent, Normal

from ncprior.bases.mixture import GaussianMixture
from ncprior.distributions import Sampleable
from ncprior.samplers.base import Draw, LogRatio, Sampler, check_target, checked_draw
from ncprior.samplers.identity import composition
from ncprior.utils.batches import moved
from ncprior.utils.require import require_callable


@composition
def within_components(sampler: Sampler) -> Sampler:
    """Sampler that draws a component of the mixture base for each row, then z within it.

    Arguments:
        sampler: The sampler within a component, such as ``partial(sir, num_proposals=50)``. It
            draws the noise ε of the component: step sizes of chains are in squared units of ε.
            Each row has its own target, so the sampler must not share particles or proposals.

    Returns:
        The sampler; ``log_mean_weight`` of its draws estimates log Z_j of the row's component.

    Raises:
        TypeError: If ``sampler`` is not a function; when drawing, if the prior is no
            :class:`~ncprior.bases.GaussianMixture`.

    Example:
        >>> from functools import partial
        >>> from ncprior import sir
        >>> mixture = GaussianMixture(torch.zeros(2), torch.tensor([[-9.0], [9.0]]), torch.ones(2, 1))
        >>> sampler = within_components(partial(sir, num_proposals=20))
        >>> z = sampler(mixture.expand((4000,)), lambda z: 0.3 * z[..., 0]).z  # Z_2 ≫ Z_1
        >>> round((z > 0).float().mean().item(), 1)
        0.5
    """

    require_callable("sampler", sampler, "Pass one, such as partial(sir, num_proposals=50).")

    def within(prior: Sampleable, log_ratio: LogRatio) -> Draw:
        check_target(prior, log_ratio)
        if not isinstance(prior, GaussianMixture):
            raise TypeError(
                f"within_components needs a mixture base, such as rebase(source, "
                f"fit_mixture(latents_of(source, x))); got {type(prior).__name__}."
            )
        weights = prior.logits.softmax(0)
        place = _Places(prior, torch.multinomial(weights, prior.batch_shape[0], replacement=True))
        draw = sampler(place.noise, lambda noise: log_ratio(place(noise)))
        draw = checked_draw(draw, place.noise.batch_shape + place.noise.event_shape)
        return draw._replace(z=place(draw.z))

    return within


class _Places:
    """Map from noise to z for rows with given components: z = μ_j + L_j ε."""

    def __init__(self, mixture: GaussianMixture, labels: Tensor) -> None:
        self.mixture = mixture
        on_cpu = labels.cpu()
        rows = on_cpu.argsort(stable=True)
        counts = on_cpu.bincount().tolist()
        blocks = moved(rows, labels.device).split(counts)
        self.rows = [(j, block) for j, block in enumerate(blocks) if counts[j]]
        self.order = moved(rows.argsort(), labels.device)
        event = mixture.event_shape
        zeros = mixture.loc.new_zeros(len(labels), *event)
        self.noise = Independent(
            Normal(zeros, 1.0, validate_args=False), len(event), validate_args=False
        )

    def __call__(self, noise: Tensor) -> Tensor:
        """Maps noise to z, both with shape ``(*, B, *event)``; differentiable."""
        mixture = self.mixture
        rows_of_noise = noise.shape[: noise.ndim - len(mixture.event_shape)]
        flat = noise.reshape(*rows_of_noise, mixture.event_shape.numel())
        blocks = []
        for j, rows in self.rows:
            mean, factor, own = mixture.loc[j], mixture.scale[j], flat[..., rows, :]
            blocks.append(mean + (own @ factor.mT if mixture.is_full else own * factor))
        return torch.cat(blocks, dim=-2)[..., self.order, :].reshape(noise.shape)
