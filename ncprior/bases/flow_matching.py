r"""Flow matching on latents: a base prior that can be sampled, without a density.

A network v is fitted to the velocity of straight lines from noise z_0 ~ N(0, I) to latents z_1,

.. math::
    E \| v((1 - t) z_0 + t z_1, t) - (z_1 - z_0) \|^2, \qquad t \sim U(0, 1),

whose minimiser is the mean velocity at each place and time. The flow dz/dt = v maps the
distribution of the noise at t = 0 to the distribution of the latents at t = 1.

References:
    | Flow Matching for Generative Modeling (Lipman et al., ICLR 2023)
    | https://arxiv.org/abs/2210.02747
    | Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow
    | (Liu et al., ICLR 2023) https://arxiv.org/abs/2209.03003
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Size, Tensor, nn

from ncprior.bases.checks import own_floats, require_fit, size_of
from ncprior.data.parts import split
from ncprior.data.stream import Stream
from ncprior.utils.optimise import minimise, standardise
from ncprior.utils.require import (
    real_tensor,
    require_counts,
    require_finite,
    require_instance,
    require_positive,
)
from ncprior.utils.states import differences

_FREQUENCIES = 8  # of cosines and sines of the time

_MAKE = "Make a VelocityNet of D features."

_HELD_OUT_DRAWS = 2048  # least number of lines in the held-out loss


class VelocityNet(nn.Module):
    """Velocity v(z, t): a residual MLP, with the time as an input of every block.

    Arguments:
        features: D, the number of latents.
        width: Features of the hidden layers.
        depth: Number of residual blocks.

    Raises:
        TypeError: If a size is not a whole number.
        ValueError: If ``features`` or ``width`` is below 1, or ``depth`` below 0.

    Example:
        >>> network = VelocityNet(6, width=16, depth=1)
        >>> network(torch.randn(5, 6), torch.rand(5, 1)).shape
        torch.Size([5, 6])
    """

    def __init__(self, features: int, *, width: int = 256, depth: int = 3) -> None:
        require_counts(features=features, width=width)
        require_counts("[0, inf)", depth=depth)
        features, width, depth = int(features), int(width), int(depth)  # torch takes no others
        super().__init__()
        self.features, self.width, self.depth = features, width, depth
        self.stem = nn.Linear(features, width)
        self.time = nn.Sequential(nn.Linear(2 * _FREQUENCIES, width), nn.SiLU())
        self.blocks = nn.ModuleList(_Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, features)

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        """Returns the velocity of z, ``(N, D)``, at times t, ``(N, 1)``."""
        angle = math.pi * t * torch.arange(1, _FREQUENCIES + 1, device=t.device)
        time = self.time(torch.cat([angle.cos(), angle.sin()], dim=-1))
        h = self.stem(z)
        for block in self.blocks:
            h = block(h, time)
        velocity: Tensor = self.out(self.norm(h))
        return velocity


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.first, self.last = nn.Linear(width, width), nn.Linear(width, width)
        self.time = nn.Linear(width, width)

    def forward(self, h: Tensor, time: Tensor) -> Tensor:
        new: Tensor = self.first(self.norm(h)) + self.time(time)
        return h + self.last(nn.functional.silu(new))  # type: ignore[no-any-return]


class FlowMatching:
    """Base prior by flow matching: noise, integrated along dz/dt = v(z, t) from t = 0 to 1.

    The midpoint method integrates the equation, with an error of the order of the squared step.
    There is no density: samplers that need one, such as ``langevin``, raise an error.

    Arguments:
        network: v of flat, standardised latents; it is frozen.
        loc: Means of the latents, with shape ``(D,)``.
        scale: Standard deviations of the latents, with shape ``(D,)``.
        event_shape: Shape of z without batch, D numbers in all; ``(D,)`` if ``None``.
        num_steps: Steps of the midpoint method.

    Attributes:
        num_evaluations: Evaluations of the network per sample, two for each step.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the shapes do not fit, a value is not finite, a scale is not positive, or
            ``num_steps`` is below 1.

    Example:
        >>> base = FlowMatching(VelocityNet(6), torch.zeros(6), torch.ones(6), event_shape=(2, 3))
        >>> base.sample((5,)).shape, base.num_evaluations
        (torch.Size([5, 2, 3]), 40)
    """

    def __init__(
        self,
        network: VelocityNet,
        loc: Tensor,
        scale: Tensor,
        *,
        event_shape: Sequence[int] | None = None,
        num_steps: int = 20,
    ) -> None:
        require_instance("network", network, nn.Module, _MAKE)
        require_instance("network.features", getattr(network, "features", None), int, _MAKE)
        require_counts(num_steps=num_steps)
        loc, scale = own_floats("loc", loc), own_floats("scale", scale)
        event, d = (
            loc.shape if event_shape is None else size_of(event_shape, "event_shape"),
            network.features,
        )
        if loc.shape != (d,) or scale.shape != (d,) or math.prod(event) != d:
            raise ValueError(
                f"A velocity of {d} latents takes loc and scale of shape ({d},) and an event "
                f"shape of {d} numbers; got {tuple(loc.shape)}, {tuple(scale.shape)} and "
                f"{tuple(event)}."
            )
        require_finite("loc", loc)
        require_positive("scale", scale)
        self.network = network.eval().requires_grad_(False)
        self.loc, self.scale = loc, scale
        self.event_shape, self.num_steps = Size(event), int(num_steps)

    @property
    def num_evaluations(self) -> int:
        """Evaluations of the network per sample."""
        return 2 * self.num_steps

    @torch.no_grad()
    def sample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: B008
        """Draws z, with shape ``(*sample_shape, *event)``."""
        size = size_of(sample_shape)
        z = self.loc.new_empty(size.numel(), len(self.loc)).normal_()
        h = 1 / self.num_steps
        for i in range(self.num_steps):
            t = z.new_full((len(z), 1), i * h)
            halfway = z + 0.5 * h * self.network(z, t)
            z = z + h * self.network(halfway, t + 0.5 * h)
        return (self.loc + self.scale * z).reshape(size + self.event_shape)

    def config(self) -> dict[str, Any]:
        """Returns the configuration to save besides the tensors, ready for JSON."""
        return {
            "event_shape": list(self.event_shape),
            "num_steps": self.num_steps,
            "width": self.network.width,
            "depth": self.network.depth,
        }

    def tensors(self) -> dict[str, Tensor]:
        """Returns the tensors by name."""
        network = {f"network.{name}": t for name, t in self.network.state_dict().items()}
        return {"loc": self.loc, "scale": self.scale, **network}

    @classmethod
    def rebuild(cls, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> FlowMatching:
        """Builds the base from its :meth:`config` and :meth:`tensors`.

        Raises:
            KeyError: If a tensor or a setting is missing.
            ValueError: If a tensor of the network is missing, unknown or of another shape or dtype.
        """
        weights = {n.removeprefix("network."): t for n, t in tensors.items()}
        settings = dict(config)
        loc, scale = weights.pop("loc"), weights.pop("scale")
        width, depth = settings.pop("width"), settings.pop("depth")
        with torch.device("meta"):  # no memory before names and shapes are compared
            network = VelocityNet(len(loc), width=width, depth=depth)
        if wrong := differences(network.state_dict(), weights, "network."):
            raise ValueError(f"its tensors are others; {wrong}")
        network.load_state_dict(weights, assign=True)
        return cls(network, loc, scale, **settings)

    def to(self, device: torch.device | str) -> FlowMatching:
        """Returns the base with its tensors on a device."""
        network = copy.deepcopy(self.network).to(device)
        shape, steps = self.event_shape, self.num_steps
        loc, scale = self.loc.to(device), self.scale.to(device)
        return FlowMatching(network, loc, scale, event_shape=shape, num_steps=steps)


def fit_flow_matching(
    latents: Tensor | ArrayLike,
    *,
    width: int = 256,
    depth: int = 3,
    num_steps: int = 20,
    steps: int = 5000,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
    patience: int | None = 10,
    progress: bool = True,
) -> FlowMatching:
    """Base prior fitted to latents by flow matching on straight lines.

    5 % of the latents are held out for early stopping. The network keeps the moving average of the
    weights.

    Arguments:
        latents: z, with shape ``(N, *event)``, such as those of :func:`ncprior.bases.latents_of`:
            floating-point numbers, as a tensor, an array or a list.
        width: Features of the network's hidden layers.
        depth: Number of the network's residual blocks.
        num_steps: Steps of the midpoint method in sampling, with two evaluations each.
        steps: Number of optimizer steps.
        batch_size: Rows per batch.
        learning_rate: The first learning rate.
        patience: Held-out losses, one every 100 steps, without progress before it stops;
            ``None`` never stops early.
        progress: Whether to show a progress bar.

    Returns:
        The base, in float32, on the device of the latents.

    Raises:
        FloatingPointError: If a held-out loss is not finite.
        RuntimeError: Inside ``torch.inference_mode``.
        TypeError: If an argument has the wrong type, or latents are integers: codes of categories
            have no velocity.
        ValueError: If an argument is out of range, or there are too few latents, or some are not
            finite.

    References:
        | Flow Matching for Generative Modeling (Lipman et al., ICLR 2023), with the straight lines
        | of Flow Straight and Fast (Liu et al., ICLR 2023)

    Example:
        >>> z = 3 + torch.randn(500, 2)
        >>> base = fit_flow_matching(z, width=16, depth=1, steps=100, progress=False)
        >>> bool((base.sample((500,)).mean(0) - 3).abs().max() < 0.5)
        True
    """
    require_counts(width=width, num_steps=num_steps)
    require_counts("[0, inf)", depth=depth)
    require_fit(
        "fit_flow_matching",
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        patience=patience,
        progress=progress,
    )
    latents = real_tensor("latents", latents, integers=False)
    white, loc, scale = standardise(latents)
    network = VelocityNet(white.shape[1], width=width, depth=depth).to(white)
    base = FlowMatching(network, loc, scale, event_shape=latents.shape[1:], num_steps=num_steps)
    network.requires_grad_(True)
    train, held_out = split(white, 0.05, seed=int(torch.randint(2**31, ())))
    stream, fixed = Stream(train, int(batch_size)), _Lines(held_out, _HELD_OUT_DRAWS)
    minimise(
        lambda: _Lines(next(stream)).loss(network),
        lambda: fixed.loss(network),
        list(network.parameters()),
        steps=steps,
        learning_rate=learning_rate,
        patience=patience,
        name="velocity",
        progress=progress,
    )
    network.requires_grad_(False)
    return base


class _Lines:
    """Straight lines from noise to latents, with a random time on each."""

    def __init__(self, latents: Tensor, count: int = 1) -> None:
        self.end = latents.repeat(math.ceil(count / len(latents)), 1)
        self.start = torch.randn_like(self.end)
        self.t = torch.rand_like(self.end[:, :1])

    def loss(self, network: nn.Module) -> Tensor:
        """Mean squared error of a velocity on the lines, per latent."""
        z = (1 - self.t) * self.start + self.t * self.end
        error: Tensor = network(z, self.t) - (self.end - self.start)
        return error.square().mean()
