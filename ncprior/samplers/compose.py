r"""Composition of samplers: sequences, tempering, and a description as text.

Three settings sharpen or flatten samples, and each has its own meaning. ``NCPrior.strength`` α
targets r^α·p: it sets how far the prior is corrected, and :mod:`ncprior.diagnostics` fits it to a
sampler. The temperature T of :func:`at_temperature` targets (r·p)^(1/T): it sets how close draws
stay to the modes of the corrected prior. The temperature of a source or a base changes p itself,
and therefore the ratio r = q/p: heads must be trained at that temperature.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator
from functools import partial, wraps
from types import CodeType
from typing import Any, ParamSpec

import numpy as np
from torch import Tensor, nn

from ncprior.distributions import Sampleable
from ncprior.samplers.base import Draw, LogRatio, Sampler, checked_draw
from ncprior.utils.fingerprints import module_fingerprint
from ncprior.utils.require import require_callable, require_numbers

P = ParamSpec("P")


class Composition:
    """Sampler made of samplers, which keeps the call that made it, to be described and saved.

    Attributes:
        made_by: The call, such as ``partial(at_temperature, sampler, 0.5)``.
    """

    def __init__(self, made_by: partial[Sampler], sampler: Sampler) -> None:
        self.made_by, self._sampler = made_by, sampler

    def __call__(self, prior: Sampleable, log_ratio: LogRatio) -> Draw:
        """Draws z."""
        return self._sampler(prior, log_ratio)

    def __reduce__(self) -> tuple[partial[Sampler], tuple[()]]:
        return self.made_by, ()

    def __repr__(self) -> str:
        return describe(self)


def composition(function: Callable[P, Sampler]) -> Callable[P, Sampler]:
    """Decorator of functions that return a sampler; they then return a :class:`Composition`."""

    @wraps(function)
    def compose(*args: P.args, **keywords: P.kwargs) -> Sampler:
        sampler = function(*args, **keywords)
        given = inspect.signature(function).bind(*args, **keywords)
        return Composition(partial(compose, *given.args), sampler)

    return compose


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


def describe(sampler: Any) -> str:  # noqa: ANN401
    """Description of a sampler and its options as text, the same in every process.

    Arguments:
        sampler: A sampler function, a ``functools.partial`` of one, or a composition of samplers.

    Returns:
        The description: functions by name, with their options and the values in their closures;
        other callable objects by their type alone.

    Example:
        >>> from functools import partial
        >>> from ncprior import sir
        >>> describe(partial(sir, num_proposals=50))
        'sir(num_proposals=50)'
        >>> describe(at_temperature(partial(sir, num_proposals=50), 0.5))
        'at_temperature(sir(num_proposals=50), 0.5)'
    """
    return _described(sampler, (), _name)


def identity_of(sampler: Any) -> str:  # noqa: ANN401
    """Description of a sampler that differs for functions of one name with another code.

    It is the same in every process of one version of Python. Functions of this package are known by
    their names. A callable object is known by its type alone, unless it is a module.
    """
    return _described(sampler, (), _name_with_code)


def _name(function: Any, _: Any = None) -> str:  # noqa: ANN401
    name = str(getattr(function, "__qualname__", type(function).__qualname__))
    return name.replace(".<locals>", "")


def _name_with_code(function: Any, describe: Callable[[Any], str]) -> str:  # noqa: ANN401
    if isinstance(function, nn.Module):
        return f"{_name(function)}#{module_fingerprint(function)}"
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    if code is None or str(getattr(function, "__module__", "")).partition(".")[0] == "ncprior":
        return _name(function)
    given = [*enumerate(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).items()]
    defaults = sorted(f"{name}={describe(value)}" for name, value in given)
    text = "\n".join([*_parts(code, function.__doc__), *defaults])
    return f"{_name(function)}#{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _parts(code: CodeType, doc: str | None = None) -> Iterator[str]:
    """The instructions, names and constants of a function and of the functions in it."""
    yield f"{code.co_code!r} {code.co_names}"
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _parts(constant)
        elif isinstance(constant, frozenset):  # without an order of its own
            yield str(sorted(map(repr, constant)))
        elif constant != doc or doc is None:
            yield repr(constant)


def _described(sampler: Any, inside: tuple[int, ...], name_of: Callable[..., str]) -> str:  # noqa: ANN401
    """Description of a sampler inside functions that are being described already."""
    if id(sampler) in inside:
        return "..."  # a function that calls itself
    describe_inner = partial(_described, inside=(*inside, id(sampler)), name_of=name_of)
    if isinstance(sampler, Composition):
        sampler = sampler.made_by
    if isinstance(sampler, partial):
        words = [describe_inner(a) for a in sampler.args]
        words += [f"{name}={describe_inner(a)}" for name, a in sorted(sampler.keywords.items())]
        return f"{describe_inner(sampler.func)}({', '.join(words)})"
    if isinstance(sampler, tuple | list):
        return f"({', '.join(map(describe_inner, sampler))})"
    if not callable(sampler):
        return repr(sampler.item() if isinstance(sampler, np.generic) else sampler)
    sampler = inspect.unwrap(sampler)
    held = [cell.cell_contents for cell in getattr(sampler, "__closure__", None) or ()]
    name = name_of(sampler, describe_inner)
    return f"{name}({', '.join(map(describe_inner, held))})" if held else name
