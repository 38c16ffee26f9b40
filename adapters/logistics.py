r"""The discretised mixture of logistics, in which NVAE and VDVAE express p(x | z) of RGB images.

A mixture component chosen per pixel gives red, green and blue in turn: each channel is a logistic
variable, clipped to [-1, 1] and rounded to the nearest level, whose location is shifted linearly by
the channels before it,

.. math::
    m_G = \mu_G + c_0 x_R, \qquad m_B = \mu_B + c_1 x_R + c_2 x_G.

References:
    PixelCNN++ (Salimans et al., ICLR 2017), equations 2 and 3
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Size, Tensor
from torch.distributions import Distribution, constraints
from torch.nn.functional import logsigmoid, softplus

from ncprior.utils.require import described, floats, require_counts, require_instance

_Shape: TypeAlias = Size | list[int] | tuple[int, ...]


class LogisticMixture(Distribution):
    """A discretised mixture of logistics over RGB images in [0, 1].

    The probability of a level is the logistic mass of its whole bin; the first and the last bin
    take the tails, so that all levels together have probability 1. (NVAE's code takes 254 for
    a last bin as well as 255.)

    Arguments:
        parameters: Output of the decoder's last layer, with shape ``(B, 10 M, H, W)`` for M
            components: M logits, then for each colour M locations, M log-scales and M coefficients.
        num_bits: Bits of a channel: x takes the values 0, 1/(2^n - 1), ..., 1.

    Raises:
        TypeError: If the parameters are no tensor, or the bits no whole number.
        ValueError: If the number of parameters of a pixel is not ten per component, or there are
            fewer than 1 or more than 16 bits.

    Example:
        >>> mixture = LogisticMixture(torch.randn(4, 10 * 5, 8, 8))
        >>> x = mixture.sample()
        >>> x.shape, mixture.log_prob(x).shape, mixture.mean.shape
        (torch.Size([4, 3, 8, 8]), torch.Size([4]), torch.Size([4, 3, 8, 8]))
    """

    arg_constraints = {}  # noqa: RUF012 (torch's own name for it)
    support = constraints.independent(constraints.unit_interval, 3)

    def __init__(self, parameters: Tensor, *, num_bits: int = 8) -> None:
        require_instance("parameters", parameters, Tensor, "Pass the decoder's output.")
        parameters = floats("parameters", parameters)
        require_counts("[1, 16]", num_bits=num_bits)
        if parameters.ndim != 4 or parameters.shape[1] == 0 or parameters.shape[1] % 10:
            raise ValueError(
                f"A mixture of logistics over RGB images has 10 parameters per component and "
                f"pixel; got parameters of shape {tuple(parameters.shape)}."
            )
        count, channels, height, width = parameters.shape
        components = channels // 10
        logits, rest = parameters.split([components, 9 * components], dim=1)
        rest = rest.reshape(count, 3, 3 * components, height, width)
        loc, log_scale, coefficient = rest.chunk(3, dim=2)  # each (B, 3, M, H, W)
        self.log_weight = logits.log_softmax(1)  # (B, M, H, W)
        self.loc, self.coefficient = loc, coefficient.tanh()
        self.scale = log_scale.clamp(min=-7.0).exp()
        self.levels = 2**num_bits - 1
        super().__init__(Size((count,)), Size((3, height, width)), validate_args=False)

    @property
    def mean(self) -> Tensor:
        """The mean of x, component by component, with shape ``(B, 3, H, W)``.

        Clipping of a channel is exact. The channels that shift it enter by their means: this is exact
        for red, and for green and blue if no clipping occurs.
        """
        loc, scale, (c0, c1, c2) = (
            self.loc.unbind(1),
            self.scale.unbind(1),
            self.coefficient.unbind(1),
        )
        red = _clipped_mean(loc[0], scale[0])
        green = _clipped_mean(loc[1] + c0 * red, scale[1])
        blue = _clipped_mean(loc[2] + c1 * red + c2 * green, scale[2])
        means = torch.stack([red, green, blue], dim=1)
        mean: Tensor = ((self.log_weight.exp().unsqueeze(1) * means).sum(2) + 1) / 2
        return mean

    @torch.no_grad()
    def sample(self, sample_shape: _Shape = Size()) -> Tensor:  # noqa: B008
        """Draws images on the levels, with shape ``(*sample_shape, B, 3, H, W)``."""
        return self._draw(Size(sample_shape), 1 / self.levels)

    @torch.no_grad()
    def _draw(self, sample_shape: _Shape, spacing: float) -> Tensor:
        """Draws images whose levels have another spacing: 0, spacing, 2 · spacing, …, all in [0, 1]."""
        log_weight = self.log_weight.expand(*sample_shape, *self.log_weight.shape)
        race = torch.empty_like(log_weight, memory_format=torch.contiguous_format).exponential_()
        chosen = (log_weight - race.log()).argmax(-3, keepdim=True).unsqueeze(-4)
        loc, scale, coefficient = (
            t.expand(*sample_shape, *t.shape)
            .gather(-3, chosen.expand(*sample_shape, *t.shape[:2], 1, *t.shape[3:]))
            .squeeze(-3)
            for t in (self.loc, self.scale, self.coefficient)
        )
        u = torch.rand_like(loc)
        loc = loc + scale * (u.log() - torch.log1p(-u))
        (red, green, blue), (c0, c1, c2) = loc.unbind(-3), coefficient.unbind(-3)
        red = self._on_level(red, spacing)
        green = self._on_level(green + c0 * red, spacing)
        blue = self._on_level(blue + c1 * red + c2 * green, spacing)
        return (torch.stack([red, green, blue], dim=-3) + 1) / 2

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns the log-probability of whole images in nats, with shape ``(*, B)``.

        Arguments:
            value: Images in [0, 1], with shape ``(*, B, 3, H, W)``.

        Raises:
            TypeError: If they are no numbers.
            ValueError: If they have another shape.
        """
        value, shape = floats("value", value), self._batch_shape + self._event_shape
        if value.shape[-4:] != shape:
            raise ValueError(
                f"value must have shape (*, {', '.join(map(str, shape))}); got {described(value)}."
            )
        y = (2 * value.to(self.loc.dtype) - 1).unsqueeze(-3)  # (*, B, 3, 1, H, W)
        red, green, _ = y.unbind(-4)
        (loc_r, loc_g, loc_b), (c0, c1, c2) = self.loc.unbind(1), self.coefficient.unbind(1)
        loc_g, loc_b = loc_g + c0 * red, loc_b + c1 * red + c2 * green
        loc = torch.stack([loc_r.expand_as(loc_g), loc_g, loc_b], dim=-4)
        # With a - b the width of a bin, σ(a) - σ(b) = σ(a) σ(-b) (1 - exp(b - a)): no cancellation.
        upper = logsigmoid((y - loc + 1 / self.levels) / self.scale)
        lower = logsigmoid((loc - y + 1 / self.levels) / self.scale)
        inside = upper + lower + torch.log(-torch.expm1(-2 / self.levels / self.scale))
        end = 1 - 1 / self.levels  # beyond are the lowest and the highest level
        mass = torch.where(y < -end, upper, torch.where(y > end, lower, inside))
        return torch.logsumexp(mass.sum(-4) + self.log_weight, dim=-3).sum((-2, -1))

    def _on_level(self, y: Tensor, spacing: float) -> Tensor:
        level = ((y.clamp(-1, 1) + 1) / 2 / spacing).round().clamp(max=self.levels)
        y = 2 * level * spacing - 1
        return y


def _clipped_mean(loc: Tensor, scale: Tensor) -> Tensor:
    """Returns E[clip(y, -1, 1)] of logistic y: the integral of P(y > t) over [-1, 1], less 1."""
    return scale * (softplus((loc + 1) / scale) - softplus((loc - 1) / scale)) - 1
