r"""Composition of samplers: sequences and tempering.

Three settings sharpen or flatten samples, and each has its own meaning. ``NCPrior.strength`` α
targets r^α·p: it sets how far the prior is corrected, and :mod:`ncprior.diagnostics` fits it to a
sampler. The temperature T of :func:`at_temperature` targets (r·p)^(1/T): it sets how close draws
stay to the modes of the corrected prior. The temperature of a source or a base changes p itself,
and therefore the ratio r = q/p: heads must be trained at that temperature.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

from torch import Tensor

from ncprior.distributions import Sampleable
from ncprior.samplers.base import Draw, LogRatio, Sampler, checked_draw
from ncprior.samplers.identity import composition, describe
from ncprior.utils.require import require_callable, require_numbers


@composition
def sequence(first: Sampler, *then: Callable[..., Draw]) -> Sampler:
    """Sequence of samplers, each of which starts from the draw of the one before.

    For example, SIR followed by some steps of MALA: SIR finds the right region, and MALA then
    refines the draw below the resolution of M proposals.

    Arguments:
        first: A sampler.
        then: Samplers that take ``init``, such as ``partial(langevin, …)``.

    Returns:
        The sampler. The z of its draw is that of the last sampler; every other field is that of
        the last sampler that returned one.

    Raises:
        TypeError: If an argument is not a sampler, or one after the first takes no ``init``.

    Example:
        >>> from functools import partial
        >>> from ncprior import langevin, sir
        >>> sampler = sequence(
        ...     partial(sir, num_proposals=50),
        ...     partial(langevin, num_steps=10, step_size=0.1, adjusted=True),
        ... )
        >>> draw = prior.sample(4, sampler).draws[0]
        >>> draw.ess.shape, draw.acceptance.shape
        (torch.Size([4]), torch.Size([4]))
    """

    for part in (first, *then):
        require_callable("A sampler", part, _EXAMPLE)
    for step in then:
        if not _takes_init(step):
            raise TypeError(
                f"Samplers after the first start from init=, as langevin and independence do; got "
                f"{describe(step)}. Put it first."
            )

    def sampler(prior: Sampleable, log_ratio: LogRatio) -> Draw:
        draw = checked_draw(first(prior, log_ratio))
        for step in then:
            found = checked_draw(step(prior, log_ratio, init=draw.z))._asdict()
            draw = draw._replace(**{name: it for name, it in found.items() if it is not None})
        return draw

    return sampler


@composition
def at_temperature(sampler: Sampler, temperature: float) -> Sampler:
    r"""Tempered sampler: targets (r·p)^(1/T) instead of r·p.

    .. math::
        (r \cdot p)^{1/T} = p \cdot r_T, \qquad
        \log r_T = \tfrac{1}{T} \left( \log r + (1 - T) \log p \right).

    At T < 1 draws stay closer to the modes: fewer bad samples and less variety.

    Arguments:
        sampler: A sampler of r·p. Do not pass one of ``within_components``: it keeps the weights
            of the components, which a temperature should change.
        temperature: T > 0; T = 1 changes nothing.

    Returns:
        The sampler; ``log_mean_weight`` of its draws is that of r_T.

    Raises:
        ValueError: If T is not positive and finite.
        TypeError: If an argument has the wrong type; when drawing, if the prior has no density.

    Example:
        >>> from functools import partial
        >>> from ncprior import sir
        >>> cold = at_temperature(partial(sir, num_proposals=200), 0.25)
        >>> z = cold(Normal(torch.zeros(2000), 1.0), lambda z: 0 * z).z  # N(0, 1)⁴ ∝ N(0, 1/4)
        >>> round(z.std().item(), 1)
        0.5
    """
    require_callable("sampler", sampler, _EXAMPLE)
    require_numbers("(0, inf)", temperature=temperature)

    def tempered(prior: Sampleable, log_ratio: LogRatio) -> Draw:
        if temperature == 1:
            return sampler(prior, log_ratio)
        if not hasattr(prior, "log_prob"):
            raise TypeError(
                f"A temperature needs log p(z); the prior {type(prior).__name__} can only be "
                f"sampled. Draw at temperature 1."
            )

        def log_r_t(z: Tensor) -> Tensor:
            log_p: Tensor = prior.log_prob(z)
            return (log_ratio(z) + (1 - temperature) * log_p) / temperature

        return sampler(prior, log_r_t)

    return tempered


_EXAMPLE = "Pass a sampler, such as partial(sir, num_proposals=500)."


def _takes_init(sampler: Callable[..., Draw]) -> bool:
    try:
        known = inspect.signature(sampler).parameters.values()
    except ValueError:  # a builtin, which does not tell
        return True
    return any(it.name == "init" or it.kind is it.VAR_KEYWORD for it in known)
