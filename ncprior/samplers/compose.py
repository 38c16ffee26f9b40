r"""Samplers made of samplers: one after the other, at another temperature, and told in words.

There are three temperatures, of different meaning. ``NCPrior.strength`` α draws from r^α·p: how far
the prior is corrected; :mod:`ncprior.diagnostics` finds the one that suits a sampler. A temperature T
here draws from (r·p)^{1/T}: how close to the modes of the corrected prior. A source's or base's own
temperature changes p, and with it what r is a ratio to.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from ncprior.distributions import Sampleable
from ncprior.samplers.base import Draw, LogRatio, Sampler


def sequence(first: Sampler, *then: Callable[..., Draw]) -> Sampler:
    """Makes a sampler that starts each of its parts from the draw of the part before.

    SIR followed by some steps of MALA finds the right region first, and then its shape, which M
    proposals are too coarse for.

    Arguments:
        first: A sampler.
        then: Samplers that take ``init``, such as ``partial(langevin, …)``.

    Returns:
        The sampler. Its draw has the last part's z, and of everything else what was found last.

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

    def sampler(prior: Sampleable, log_ratio: LogRatio) -> Draw:
        draw = first(prior, log_ratio)
        for part in then:
            found = part(prior, log_ratio, init=draw.z)._asdict()
            draw = draw._replace(**{name: it for name, it in found.items() if it is not None})
        return draw

    return sampler


def at_temperature(sampler: Sampler, temperature: float) -> Sampler:
    r"""Makes a sampler draw from (r·p)^{1/T} in place of r·p.

    .. math::
        (r \cdot p)^{1/T} = p \cdot r_T, \qquad
        \log r_T = \tfrac{1}{T} \left( \log r + (1 - T) \log p \right).

    Below 1, draws keep to the modes: fewer bad samples and less variety.

    Arguments:
        sampler: A sampler of the whole of r·p; ``within_components`` keeps the components' shares,
            which a temperature changes.
        temperature: T > 0; 1 changes nothing.

    Returns:
        The sampler; ``log_mean_weight`` of its draws is that of r_T.

    Raises:
        ValueError: If T is not positive and finite.
        TypeError: When drawing, if the prior has no density.

    Example:
        >>> from functools import partial
        >>> from ncprior import sir
        >>> cold = at_temperature(partial(sir, num_proposals=200), 0.25)
        >>> z = cold(Normal(torch.zeros(2000), 1.0), lambda z: 0 * z).z  # N(0, 1)⁴ ∝ N(0, 1/4)
        >>> round(z.std().item(), 1)
        0.5
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite; got {temperature}.")

    def tempered(prior: Sampleable, log_ratio: LogRatio) -> Draw:
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


def describe(sampler: Any) -> str:  # noqa: ANN401
    """Tells a sampler and its options in words that are the same in every process.

    Arguments:
        sampler: A sampler, as it is, configured by ``functools.partial``, or made of others.

    Returns:
        What it is: functions by their names and what they hold, which is told in turn, and a
        callable object by its type alone.

    Example:
        >>> from functools import partial
        >>> from ncprior import sir
        >>> describe(partial(sir, num_proposals=50))
        'sir(num_proposals=50)'
        >>> describe(at_temperature(partial(sir, num_proposals=50), 0.5))
        'at_temperature.tempered(sir(num_proposals=50), 0.5)'
    """
    return _told(sampler, ())


def _told(sampler: Any, inside: tuple[int, ...]) -> str:  # noqa: ANN401
    """What a sampler is, within functions that have been told already."""
    if id(sampler) in inside:
        return "..."  # of a function that calls itself
    tell = partial(_told, inside=(*inside, id(sampler)))
    if isinstance(sampler, partial):
        words = [tell(a) for a in sampler.args]
        words += [f"{name}={tell(a)}" for name, a in sorted(sampler.keywords.items())]
        return f"{tell(sampler.func)}({', '.join(words)})"
    if isinstance(sampler, tuple | list):
        return f"({', '.join(map(tell, sampler))})"
    if not callable(sampler):
        return repr(sampler)
    sampler = inspect.unwrap(sampler)
    name = str(getattr(sampler, "__qualname__", type(sampler).__qualname__))
    held = [cell.cell_contents for cell in getattr(sampler, "__closure__", None) or ()]
    name = name.replace(".<locals>", "")
    return f"{name}({', '.join(map(tell, held))})" if held else name
