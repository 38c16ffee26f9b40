r"""Ratio heads: networks for log r(z, c), the logit of a binary classifier.

A head is any ``nn.Module`` called as ``head(z, context=None) -> log_r``: z of shape
``(*, B, *event)``, context of shape ``(B, ...)``, log r in nats of shape ``(*, B)``. The context is
embedded once and broadcast over the leading axes, the proposals. A ratio is a function of z alone:
heads use no batch statistics, so that log r(z) does not depend on the rest of the batch. log r of a
new head is exactly 0, which is the base prior.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange, reduce
from torch import Tensor, nn

from ncprior.heads.contexts import (
    MapContext,
    Standardise,
    VectorContext,
    check_rows,
    map_stem,
)
from ncprior.utils.precision import in_full
from ncprior.utils.require import (
    described,
    mask_of,
    require_counts,
    require_instance,
    require_numbers,
    require_shape,
)


def require_sizes(**config: Any) -> None:  # noqa: ANN401
    """Validates those arguments of a head that are numbers, as far as they are given."""
    given = {name: config[name] for name in ("width", "num_categories") if name in config}
    require_counts(**given)
    require_counts("[0, inf)", depth=config.get("depth", 0))
    require_numbers("[0, 1)", dropout=config.get("dropout", 0.0))


class Head(nn.Module):
    """Base class of the heads: their configuration, and the standardisation of their inputs."""

    event_shape: tuple[int, ...]
    scale: Standardise
    context: MapContext | VectorContext
    out: nn.Linear

    def __init__(self, **config: Any) -> None:  # noqa: ANN401
        require_sizes(**config)
        for name in ("event_shape", "context_shape"):
            if name == "event_shape" or config[name] is not None:
                config[name] = list(require_shape(name, config[name]))
        super().__init__()
        self.event_shape = tuple(config["event_shape"])
        counts = config.keys() & {"width", "depth", "num_categories"}
        self._config = config | {name: int(config[name]) for name in counts}

    def config(self) -> dict[str, Any]:
        """Returns the constructor's arguments, ready for JSON."""
        return dict(self._config)

    @torch.no_grad()
    def rescale(self, slope: float, offset: float) -> None:
        """Replaces log r by slope · log r + offset, in place; the offset is in nats."""
        require_numbers(slope=slope, offset=offset)
        self.out.weight.mul_(float(slope))
        self.out.bias.mul_(float(slope)).add_(float(offset))

    def check(self, z: Tensor, context: Tensor | None) -> None:
        """Validates the shape of the latents and the rows of the context."""
        check_rows(checked_event(z, self.event_shape), self.event_shape, context)

    def fit_scale(self, z: Tensor | None, context: Tensor | None) -> None:
        """Sets the standardisation from latents ``(B, *event)`` and context ``(B, ...)``."""
        if z is not None:
            self.scale.fit(z)
        if context is not None:
            self.context.scale.fit(context)


class MLPHead(Head):
    """Residual MLP with layer normalisation, for log r of a vector of latents.

    Arguments:
        event_shape: Shape of z without batch; more than one axis is flattened.
        context_shape: Shape of the context without batch, or ``None``.
        width: Features of the hidden layers.
        depth: Number of residual blocks of two layers each.
        dropout: Dropout probability inside the blocks, while training.

    Example:
        >>> head = MLPHead((16,), context_shape=(10,))
        >>> head(torch.randn(500, 4, 16), torch.randn(4, 10)).shape
        torch.Size([500, 4])
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        *,
        context_shape: Sequence[int] | None = None,
        width: int = 256,
        depth: int = 2,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(
            event_shape=event_shape,
            context_shape=context_shape,
            width=width,
            depth=depth,
            dropout=dropout,
        )
        width, depth = self._config["width"], self._config["depth"]
        self.scale = Standardise(self.event_shape)
        self.stem = nn.Linear(math.prod(self.event_shape), width)
        self.context = VectorContext(context_shape, width)
        self.blocks = nn.Sequential(*(_MLPBlock(width, dropout) for _ in range(depth)))
        self.out = _zero(nn.Linear(width, 1))
        self.norm = nn.LayerNorm(width)

    @torch.no_grad()
    def leave_out(self, latents: Tensor) -> None:
        """Hides some latents, such as collapsed ones, from a new head.

        The first layer gets the scale of the weights of a head for the other latents alone.

        Arguments:
            latents: A mask of event shape, not true everywhere.

        Raises:
            TypeError: If it is no mask.
            ValueError: If it has another shape, or leaves no latent.
        """
        latents = mask_of("latents", latents, self.event_shape).to(self.scale.sd.device)
        if latents.all():
            raise ValueError("latents must leave one latent or more; got all. Pass fewer.")
        self.scale.leave_out(latents)
        for weight in self.stem.parameters():
            weight.div_((~latents).float().mean().sqrt())

    def left_out(self) -> Tensor:
        """Returns the mask of the latents that are hidden from the head, of event shape."""
        return self.scale.left_out()

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Returns log r(z, c) in nats, with shape ``(*, B)``."""
        self.check(z, context)
        return self.log_r(z, self.context(context))

    def log_r(self, z: Tensor, embedded: Tensor | float) -> Tensor:
        """Returns log r(z, c) in nats, given the embedded context."""
        z = self.scale(z)
        lead = z.shape[: z.ndim - len(self.event_shape)]
        h = self.stem(z.reshape(*lead, self.stem.in_features))
        h = self.blocks(h + embedded)
        return in_full(self.out, nn.functional.silu(self.norm(h))).squeeze(-1)


class ConvHead(Head):
    """Residual convolutional network with squeeze-and-excitation, for log r of a feature map.

    A cell has two 3×3 convolutions with group normalisation and SiLU. Strided convolutions in front of
    the cells reduce maps larger than 8×8. Any spatial size from 1×1 is supported.

    Arguments:
        event_shape: Shape ``(C, H, W)`` of z without batch.
        context_shape: Shape of the context without batch: ``(C', H, W)`` is joined as a map,
            any other as a vector; or ``None``.
        width: Channels of the hidden layers, a multiple of 8.
        depth: Number of residual cells.
        dropout: Dropout probability inside the cells, while training.

    References:
        Aneja et al. (2021), section 5; squeeze-and-excitation (Hu et al., 2018).

    Example:
        >>> head = ConvHead((20, 4, 4), context_shape=(64, 4, 4))
        >>> head(torch.randn(5, 2, 20, 4, 4), torch.randn(2, 64, 4, 4)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        *,
        context_shape: Sequence[int] | None = None,
        width: int = 64,
        depth: int = 2,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(
            event_shape=event_shape,
            context_shape=context_shape,
            width=width,
            depth=depth,
            dropout=dropout,
        )
        width, depth = self._config["width"], self._config["depth"]
        if len(self.event_shape) != 3 or width % 8:
            raise ValueError(
                f"ConvHead needs an event shape (C, H, W) and a width that is a multiple of 8; "
                f"got {self.event_shape} and {width}."
            )
        self.scale = Standardise((self.event_shape[0], 1, 1))
        self.stem = map_stem(self.event_shape, width)
        if context_shape is not None and tuple(context_shape[1:]) == self.event_shape[1:]:
            self.context = MapContext(context_shape, width)
        else:
            self.context = VectorContext(context_shape, width, spatial=True)
        self.blocks = nn.Sequential(*(_ConvCell(width, dropout) for _ in range(depth)))
        self.norm = nn.GroupNorm(width // 8, width)
        self.out = _zero(nn.Linear(width, 1))

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Returns log r(z, c) in nats, with shape ``(*, B)``."""
        self.check(z, context)
        return self.log_r(z, self.context(context))

    def log_r(self, z: Tensor, embedded: Tensor | float) -> Tensor:
        """Returns log r(z, c) in nats, given the embedded context."""
        lead = z.shape[:-3]
        h = self.stem(self.scale(z).reshape(-1, *z.shape[-3:]))
        h = (h.reshape(*lead, *h.shape[-3:]) + embedded).reshape(h.shape)
        h = nn.functional.silu(self.norm(self.blocks(h)))
        return in_full(self.out, reduce(h, "n c h w -> n c", "mean")).reshape(lead)


class _MLPBlock(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Dropout(dropout),
            nn.Linear(width, width),
        )

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.layers(h)
        return h


class _ConvCell(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.GroupNorm(width // 8, width),  # 8 channels each: one alone would be 0 on 1×1
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(width // 8, width),
            nn.SiLU(),
            nn.Dropout(dropout),
            nn.Conv2d(width, width, 3, padding=1),
        )
        self.excite = nn.Sequential(
            nn.Linear(width, width // 4), nn.SiLU(), nn.Linear(width // 4, width), nn.Sigmoid()
        )

    def forward(self, h: Tensor) -> Tensor:
        update = self.layers(h)
        gate = self.excite(reduce(update, "n c h w -> n c", "mean"))
        h = h + update * rearrange(gate, "n c -> n c 1 1")
        return h


def _zero(linear: nn.Linear) -> nn.Linear:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def checked_event(z: Tensor, event_shape: tuple[int, ...]) -> Tensor:
    """Returns latents after a check of their kind and shape."""
    require_instance("z", z, Tensor, "Pass latents as a tensor.")
    if z.is_complex() or z.dtype == torch.bool:
        raise TypeError(f"The head takes z as real numbers or codes; got {described(z)}.")
    if z.ndim <= len(event_shape) or z.shape[z.ndim - len(event_shape) :] != event_shape:
        raise ValueError(
            f"The head takes z of shape (*, B, {', '.join(map(str, event_shape))}); "
            f"got {tuple(z.shape)}."
        )
    return z
