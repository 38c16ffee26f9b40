"""The distributions of NVAE: clamped normals, normals behind flows, images inside a border."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Size, Tensor, nn
from torch.distributions import Bernoulli, Distribution, Independent, Normal, constraints

from ncprior.utils.precision import at_least_float32

Parameters: TypeAlias = tuple[Tensor, Tensor]  # location and scale, each (B, *event)

_Shape: TypeAlias = Size | list[int] | tuple[int, ...]


class BoundedNormal(Normal):
    """A normal whose scale has a lower bound, together with the scale without the bound.

    Arguments:
        loc: The location.
        scale: The bounded scale, of the density and of draws.
        drawn_scale: The scale without the bound, with which VAEBM's code draws x.
    """

    def __init__(self, loc: Tensor, scale: Tensor, drawn_scale: Tensor) -> None:
        super().__init__(loc, scale, validate_args=False)
        self.drawn_scale = drawn_scale


class FlowedNormal(Distribution):
    """NVAE's posterior with normalising flows: z_0 ~ N(loc, scale²), z = f_n(... f_1(z_0)).

    Draws are the outputs z of the flows. The density is known only for draws, by
    :meth:`sample_and_log_prob`, as the flows of NVAE are not inverted.

    Arguments:
        base: The normal of z_0.
        flows: Each maps ``(z, features)`` to the next z and its log-determinant by element.
        features: Features of x, an input of the flows, with shape ``(B, ...)``.
    """

    arg_constraints = {}  # noqa: RUF012 (torch's own name for it)
    has_rsample = True

    def __init__(self, base: Distribution, flows: Sequence[nn.Module], features: Tensor) -> None:
        self.base, self.flows, self.features = base, flows, features
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """All real vectors."""
        return constraints.independent(constraints.real, len(self.event_shape))

    def draw(self, sample_shape: _Shape = Size()) -> tuple[Tensor, Tensor, Tensor]:  # noqa: B008
        """Draws z_0 and z; with them the flows' log-determinant, all of one shape."""
        z_0 = self.base.rsample(Size(sample_shape))
        features = self.features.expand(*sample_shape, *self.features.shape)
        features = features.reshape(-1, *self.features.shape[1:])
        z = z_0.reshape(-1, *self.event_shape).to(features)
        log_det = torch.zeros_like(z)
        for flow in self.flows:
            z, step = flow(z, features)
            log_det = log_det + step
        return z_0, at_least_float32(z).view_as(z_0), at_least_float32(log_det).view_as(z_0)

    def rsample(self, sample_shape: _Shape = Size()) -> Tensor:  # noqa: B008
        """Draws z of shape ``(*sample_shape, B, *event)``."""
        return self.draw(sample_shape)[1]

    def sample_and_log_prob(self, sample_shape: _Shape = Size()) -> tuple[Tensor, Tensor]:  # noqa: B008
        """Draws z, and returns with it log q(z) in nats, of shape ``(*sample_shape, B)``."""
        z_0, z, log_det = self.draw(sample_shape)
        axes = tuple(range(-len(self.event_shape), 0))
        return z, self.base.log_prob(z_0) - log_det.sum(axes)

    def log_prob(self, value: Tensor) -> Tensor:
        """Raises an error, as the flows are not inverted.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            "The density of NVAE's posterior with normalising flows is known only for its own "
            "draws. Use z, log_q = posterior.sample_and_log_prob()."
        )


class InsideBorder(Distribution):
    """A distribution of images whose log-probability leaves out a border of pixels.

    Arguments:
        pixels: The distribution of pixels, with batch shape ``(B, C, H, W)``.
        border: Width of the border.
    """

    arg_constraints = {}  # noqa: RUF012

    def __init__(self, pixels: Bernoulli, *, border: int) -> None:
        self.pixels, self.border = pixels, border
        shape = pixels.batch_shape
        super().__init__(shape[:1], shape[1:], validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """The pixels' own."""
        return constraints.independent(self.pixels.support, 3)

    @property
    def mean(self) -> Tensor:
        """The mean of x, border included."""
        mean: Tensor = self.pixels.mean
        return mean

    def sample(self, sample_shape: _Shape = Size()) -> Tensor:  # noqa: B008
        """Draws x, border included."""
        x: Tensor = self.pixels.sample(Size(sample_shape))
        return x

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns the log-probability inside the border, in nats, with shape ``(*, B)``."""
        inside = slice(self.border, -self.border)
        log_prob: Tensor = self.pixels.log_prob(value)[..., inside, inside].sum((-3, -2, -1))
        return log_prob


def clamped(loc: Tensor, log_scale: Tensor) -> Parameters:
    """Returns location 5 tanh(loc / 5) and scale exp(5 tanh(log_scale / 5)) + 0.01."""
    loc, log_scale = (5 * torch.tanh(at_least_float32(t) / 5) for t in (loc, log_scale))
    return loc, log_scale.exp() + 0.01


def diagonal(loc: Tensor, scale: Tensor) -> Distribution:
    """Returns the diagonal normal of batch shape ``(B,)``."""
    return Independent(Normal(loc, scale, validate_args=False), loc.ndim - 1, validate_args=False)


def log_normal(z: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """Returns log N(z; loc, scale²) by element, in the order of NVAE's sums, to the last bit."""
    u = (z - loc) / scale
    return -0.5 * u * u - 0.5 * math.log(2 * math.pi) - scale.log()
