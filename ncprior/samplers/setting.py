"""The sampler that belongs to a prior, and draws of x given z."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor

from ncprior.distributions import Sampleable
from ncprior.heads.settings import HeadSettings
from ncprior.samplers.base import Draw, LogRatio, Sampler
from ncprior.samplers.identity import describe
from ncprior.source import LatentSource, num_rows
from ncprior.utils.require import described, require_callable, require_instance

_REMEDY = "Pass one such as partial(sir, num_proposals=500), or .sampler of what recommend_sampler returns."


class SamplerSetting(HeadSettings):
    """Settings of a prior's heads and its sampler, validated when they are set."""

    _sampler: Sampler | None = None

    report: Any = None
    """Report on how the prior was made; any object. It is not saved."""

    @property
    def sampler(self) -> Sampler | None:
        """Sampler of ``prior.sample(64)``, saved with the heads; ``None`` until it is set."""
        return self._sampler

    @sampler.setter
    def sampler(self, sampler: Sampler | None) -> None:
        require_sampler(sampler)
        object.__setattr__(self, "_sampler", sampler)  # not as a part, should it be a module

    def chosen(self, sampler: Sampler | None) -> Sampler:
        """Returns the given sampler, or else the prior's own; one of the base if no head is on.

        Raises:
            TypeError: If the given one is no sampler.
            ValueError: If there is neither; the message names the remedy.
        """
        require_sampler(sampler)
        sampler = self._sampler if sampler is None else sampler
        if sampler is None and not any(map(self.is_on, range(len(self.active)))):
            return base_draw
        if sampler is None:
            raise ValueError(
                "This prior has no sampler yet. Pass one, such as partial(sir, num_proposals=500), or "
                "set it once: prior.sampler = "
                "recommend_sampler(diagnose(prior, held_out), budget=50).sampler."
            )
        return sampler

    def extra_repr(self) -> str:
        """Returns the part of ``print(prior)`` besides the heads."""
        off = [k for k, on in enumerate(self.active) if not on]
        sampler = "None" if self.sampler is None else describe(self.sampler)
        return (
            f"source={type(self.source).__name__}, strength={self.strength}, groups_off={off}, "
            f"sampler={sampler}"
        )


def base_draw(prior: Sampleable, log_ratio: LogRatio) -> Draw:
    """Sampler that draws from the base prior."""
    return Draw(prior.sample())


def require_sampler(sampler: Any) -> None:  # noqa: ANN401
    """Raises an error for an object other than ``None`` that is no ``sampler(prior, log_ratio)``.

    Raises:
        TypeError: If it is no function, a class, a prior, or needs further arguments.
    """
    if sampler is None:
        return
    require_callable("sampler", sampler, _REMEDY)
    if isinstance(sampler, HeadSettings):
        raise TypeError(f"sampler must draw for a prior; got {described(sampler)}. {_REMEDY}")
    try:
        inspect.signature(sampler).bind(None, None)
    except ValueError:
        return  # the signature of a builtin is not known
    except TypeError as error:
        raise TypeError(
            f"sampler must take (prior, log_ratio) alone; {describe(sampler)} does not: {error}. "
            f"{_REMEDY}"
        ) from error


def sample_x(source: LatentSource[Any, Any], state: Any) -> Tensor:  # noqa: ANN401
    """Draws x ~ p(x | z), by ``sample`` of the source's likelihood.

    Arguments:
        source: The VAE.
        state: The state after all groups, of B rows.

    Returns:
        One x per row, with shape ``(B, ...)``.

    Raises:
        TypeError: If the likelihood cannot be sampled.
        ValueError: If the source has no likelihood, or its draw has another number of rows.
    """
    likelihood = source.likelihood(state)
    if not callable(getattr(likelihood, "sample", None)):
        raise TypeError(
            f"likelihood(state) must return p(x | z), a distribution with a method sample; got "
            f"{described(likelihood)}."
        )
    remedy = "Return one x per row from likelihood(state).sample()."
    x = require_instance("A draw of p(x | z)", likelihood.sample(), Tensor, remedy)
    if x.shape[:1] != (rows := num_rows(state),):
        raise ValueError(f"A draw of p(x | z) must have {rows} rows; got {described(x)}. {remedy}")
    return x
