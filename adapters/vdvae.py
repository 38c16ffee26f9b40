r"""VDVAE as a latent source: tens of groups of Gaussian latents, on features of every resolution.

    from ncprior.adapters.vdvae import VDVAESource

Each decoder block is a group. Its input are the features h of its resolution, the context c(z_<k).
Its prior network returns p(z_k | z_<k) and an update of h that does not depend on z_k; then z_k is
added to h. The first groups have 1×1 pixel.

References:
    Very Deep VAEs Generalize Autoregressive Models (Child, ICLR 2021)
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Size, Tensor, nn
from torch.distributions import Distribution, Independent, Normal, constraints
from torch.nn.functional import interpolate

from ncprior.adapters.logistics import LogisticMixture
from ncprior.source import Group, LatentSource, num_rows, posterior_of
from ncprior.utils.precision import at_least_float32, input_like
from ncprior.utils.random_state import seeded
from ncprior.utils.require import (
    described,
    require_counts,
    require_instance,
    require_numbers,
    tensor_of_batch,
)
from ncprior.utils.visible import require_eval

# Shift and scale of bytes, as the training of each data set's model normalised them.
_NORMALISATION = {
    "cifar10": (120.63838, 64.16736),
    "imagenet32": (116.2373, 69.37404),
    "imagenet64": (115.92961967, 69.37404),
    "ffhq_256": (112.8666757481, 69.84780273),
    "ffhq_1024": (0.4387 * 255, 0.2743 * 255),
}

_LOW_BIT = ("ffhq_256",)  # trained on bytes rounded down to multiples of 8

_BLOCK = ("base", "mixin", "zdim", "enc", "prior", "z_proj", "resnet")

Parameters: TypeAlias = tuple[Tensor, Tensor]  # location and log-scale, each (B, *event)

Features: TypeAlias = dict[int, Tensor]  # by resolution, each (B, C, H, W)

_Shape: TypeAlias = Size | list[int] | tuple[int, ...]


class VDVAESource(LatentSource[Any, Any]):
    """VDVAE's ``VAE``: K groups of Gaussian latents, one per block of the decoder.

    Images are bytes, ``(B, H, W, 3)``, as ``uint8``; or batches are the pair that VDVAE's own
    loader makes, (normalised, target): the first is encoded, the second is the x of p(x | z). A model has no BatchNorm:
    there are no statistics to readjust.

    With ``temperature`` t, the scale of every prior is multiplied by t. Train the heads at 1; to
    sample at t, put them on another source: ``NCPrior(VDVAESource(vae, temperature=t), heads)``.

    Arguments:
        model: The ``VAE`` of VDVAE, in evaluation mode; it may be wrapped in
            DistributedDataParallel. It is never copied (a copy would go on using the original's
            projections of z), moved or changed.
        temperature: t, greater than 0.

    Attributes:
        module: The model, unwrapped.
        num_groups: K, such as 43 for CIFAR-10.

    Raises:
        TypeError: If the model is no module of VDVAE's layout.
        ValueError: If its image size is not set, or the temperature is not positive.

    Example:
        >>> from helpers.vdvae_standin import vdvae  # a small model of VDVAE's layout, in the tests
        >>> from ncprior.source import sample_posterior
        >>> source = VDVAESource(vdvae())
        >>> x = torch.randint(256, (4, 8, 8, 3), dtype=torch.uint8)
        >>> latents, state = sample_posterior(source, x)
        >>> source.decode(state).shape, source.likelihood(state).log_prob(x).shape
        (torch.Size([4, 8, 8, 3]), torch.Size([4]))
    """

    class Encoding(NamedTuple):
        """Encoder features of x at every resolution."""

        activations: Features

    class State(NamedTuple):
        """The state before group ``k``, or after all groups (``prior is None``).

        Attributes:
            k: The group.
            features: The decoder's features of every resolution after group k - 1.
            h: Input features of the block.
            moved: h with the update of the prior network, to which z_k is added.
            prior: Location and log-scale, at temperature 1.
            posterior: Location and log-scale, or ``None`` without an x.
            activations: As in the encoding.
        """

        k: int
        features: Features
        h: Tensor | None
        moved: Tensor | None
        prior: Parameters | None
        posterior: Parameters | None
        activations: Features | None

    def __init__(self, model: nn.Module, *, temperature: float = 1.0) -> None:
        require_numbers("(0, inf)", temperature=temperature)
        self.module: nn.Module = _checked(model)
        self.temperature = float(temperature)
        self._blocks: list[Any] = list(self._model.decoder.dec_blocks)
        self.num_groups = len(self._blocks)

    @property
    def _model(self) -> Any:  # noqa: ANN401 (its attributes are checked)
        return self.module

    def facts(self) -> dict[str, Any]:
        """Returns the temperature of the prior."""
        return {"temperature": self.temperature}

    def encode(self, x: Any) -> Encoding:  # noqa: ANN401
        """Returns the features of the encoder.

        Raises:
            ValueError: If x is not as the model takes it.
        """
        require_eval(self.module)
        return self.Encoding(self._model.encoder(self._normalised(x)))

    def start(
        self, batch_size: int, encoding: Encoding | None = None, condition: None = None
    ) -> State:
        """Returns the state before group 0, whose prior is learnt and the same for all rows."""
        require_eval(self.module)
        require_counts(batch_size=batch_size)
        if condition is not None:
            raise ValueError("VDVAE has no condition; got one. Leave it out.")
        biases = self._model.decoder.bias_xs
        features = {b.shape[2]: b.expand(batch_size, *b.shape[1:]) for b in biases}
        activations = None if encoding is None else encoding.activations
        return self._front(0, batch_size, features, activations)

    def group(self, state: State) -> Group:
        """Returns p(z_k | z_<k), the context and, given an x, q(z_k | z_<k, x)."""
        if state.prior is None or state.h is None:
            raise ValueError(f"The walk is behind the last of {self.num_groups} groups.")
        posterior = None if state.posterior is None else _diagonal(state.posterior, 1.0)
        context = (
            at_least_float32(state.h) if state.k > 0 else None
        )  # the first h is the same for every row
        return Group(_diagonal(state.prior, self.temperature), posterior, context)

    def advance(self, state: State, z: Tensor) -> State:
        """Returns the state before the next block, given z_k with shape ``(B, zdim, H, W)``."""
        if state.prior is None or state.moved is None or z.shape != state.prior[0].shape:
            needs = "none" if state.prior is None else tuple(state.prior[0].shape)
            raise ValueError(f"The walk needs z of shape {needs}; got {tuple(z.shape)}.")
        block = self._blocks[state.k]
        h = block.resnet(state.moved + block.z_proj(z.to(state.moved)))
        features = {**state.features, block.base: h}
        return self._front(state.k + 1, len(z), features, state.activations)

    def decode(self, state: State) -> Tensor:
        """Returns the mean of p(x | z) in [0, 255], with shape ``(B, H, W, 3)``."""
        return self.likelihood(state).mean

    def likelihood(self, state: State) -> Distribution:
        """Returns p(x | z) over images of bytes, ``(B, H, W, 3)``; nats per image, not per pixel."""
        parameters = at_least_float32(self._model.decoder.out_net(self._final(state))).permute(
            0, 3, 1, 2
        )
        low_bit = self._model.H.dataset in _LOW_BIT
        return ByteImages(LogisticMixture(parameters, num_bits=5 if low_bit else 8))

    @torch.no_grad()
    def self_check(self, x: Any, *, tolerance: float = 1e-6) -> float:  # noqa: ANN401
        """Compares this source with the model's own decoder under the same seed.

        Arguments:
            x: One batch, as the user's loader yields it.
            tolerance: Largest allowed difference, relative to the largest value. On a CPU the two
                are equal; on a GPU, or under autocast, use 1e-3.

        Returns:
            The largest difference between the latents, their KL terms and the last features,
            absolute.

        Raises:
            ValueError: If the two disagree: the model is not of the layout known here.

        Example:
            >>> from helpers.vdvae_standin import vdvae
            >>> x = torch.randint(256, (2, 8, 8, 3), dtype=torch.uint8)
            >>> VDVAESource(vdvae()).self_check(x)
            0.0
        """
        require_numbers("[0, inf)", tolerance=tolerance)
        encoding = self.encode(x)
        with seeded(0):
            features, blocks = self._model.decoder(dict(encoding.activations), get_latents=True)
        with seeded(0):
            state, pairs = self.start(num_rows(encoding), encoding), []
            for k, block in enumerate(blocks):
                z = posterior_of(self.group(state)).sample()
                kl = _kl(state.posterior, state.prior)
                pairs += [(f"z_{k}", z, block["z"]), (f"the KL of group {k}", kl, block["kl"])]
                state = self.advance(state, z)
            pairs.append(("the last features", self._final(state), features))
        worst = 0.0
        for name, ours, theirs in pairs:
            difference = (ours - theirs).abs().max().item()
            if not difference <= tolerance * max(1.0, theirs.abs().max().item()):
                raise ValueError(
                    f"The model's forward and this walk disagree: {name} by up to "
                    f"{difference:.3g}. It is not the layout of VDVAE that ncprior knows."
                )
            worst = max(worst, difference)
        return worst

    def _front(
        self, k: int, batch_size: int, features: Features, activations: Features | None
    ) -> State:
        """The state in front of block k."""
        if k == self.num_groups:
            return self.State(k, features, None, None, None, None, None)
        block = self._blocks[k]
        h = features.get(block.base)
        if h is None:  # a resolution without a learnt start
            size = (batch_size, block.z_proj.out_channels, block.base, block.base)
            h = next(iter(features.values())).new_zeros(size)
        if block.mixin is not None:
            coarse = features[block.mixin][:, : h.shape[1]]
            h = h + interpolate(coarse, scale_factor=block.base // block.mixin)
        loc, log_scale, shift = block.prior(h).split([block.zdim, block.zdim, h.shape[1]], dim=1)
        posterior = None
        if activations is not None:
            q = block.enc(torch.cat([h, activations[block.base]], dim=1))
            posterior = (
                at_least_float32(q[:, : block.zdim]),
                at_least_float32(q[:, block.zdim :]),
            )
        prior = (at_least_float32(loc), at_least_float32(log_scale))
        return self.State(k, features, h, h + shift, prior, posterior, activations)

    def _final(self, state: State) -> Tensor:
        if state.k < self.num_groups:
            raise ValueError(
                f"Decoding needs every z; this walk stands in front of group {state.k} of "
                f"{self.num_groups}. Call advance(state, z)."
            )
        final: Tensor = self._model.decoder.final_fn(state.features[self._model.H.image_size])
        return final

    def observed(self, batch: Any) -> Tensor:  # noqa: ANN401
        """Returns the bytes of a batch, those of the target in VDVAE's own pair."""
        self._normalised(batch)  # raises
        first, *others = batch if isinstance(batch, tuple | list) else (batch,)
        images = tensor_of_batch(first)
        if images.dtype == torch.uint8:
            return images
        target: Tensor = others[0]
        return (127.5 * target + 127.5).round().clamp(0, 255).to(torch.uint8)

    def _normalised(self, x: Any) -> Tensor:  # noqa: ANN401
        """Returns the encoder's input for bytes or for VDVAE's own pair."""
        first, *others = x if isinstance(x, tuple | list) and len(x) > 0 else (x,)
        paired = [getattr(other, "shape", None) for other in others] == [
            getattr(first, "shape", 0)
        ]
        size, parameter = self._model.H.image_size, input_like(self.module)
        images = tensor_of_batch(first)
        if images.ndim != 4 or images.shape[1:] != (size, size, 3):
            raise ValueError(
                f"This VDVAE expects images of shape (B, {size}, {size}, 3), channels last; "
                f"got {tuple(images.shape)}. From channels first: x.permute(0, 2, 3, 1)."
            )
        if images.dtype == torch.uint8:
            shift, scale = _NORMALISATION[self._model.H.dataset]
            return (images.to(parameter) - shift) * (1 / scale)
        if not (paired and images.is_floating_point()):
            raise ValueError(
                f"VDVAE expects bytes (uint8), or the pair (normalised, target) that its own loader "
                f"makes; got {images.dtype}. From images in [0, 1]: (255 * x).round().to(torch.uint8)."
            )
        return images.to(parameter)


class ByteImages(Distribution):
    """A mixture of logistics over images of bytes, channels last.

    With 5 bits, bytes are rounded down to multiples of 8, as VDVAE does for FFHQ-256. The density is the
    published one then, whose levels together do not have probability 1: it compares with the paper.

    Arguments:
        mixture: The distribution of the images in [0, 1], channels first.

    Example:
        >>> images = ByteImages(LogisticMixture(torch.randn(4, 10 * 5, 8, 8)))
        >>> x = images.sample()
        >>> x.shape, x.dtype, images.log_prob(x).shape
        (torch.Size([4, 8, 8, 3]), torch.uint8, torch.Size([4]))
    """

    arg_constraints = {}  # noqa: RUF012 (torch's own name for it)
    support = constraints.independent(constraints.integer_interval(0, 255), 3)

    def __init__(self, mixture: LogisticMixture) -> None:
        require_instance("mixture", mixture, LogisticMixture, "Pass LogisticMixture(parameters).")
        self.mixture = mixture
        self._step = 256 // (mixture.levels + 1)
        channels, height, width = mixture.event_shape
        super().__init__(mixture.batch_shape, Size((height, width, channels)), validate_args=False)

    @property
    def mean(self) -> Tensor:
        """The mean of x, in [0, 255], or [0, 248] with 5 bits."""
        mean: Tensor = 255 * self.mixture.mean.movedim(-3, -1)
        return mean.clamp(max=self._step * self.mixture.levels)

    def sample(self, sample_shape: _Shape = Size()) -> Tensor:  # noqa: B008
        """Draws bytes, with shape ``(*sample_shape, B, H, W, 3)``."""
        x = 255 * self.mixture._draw(Size(sample_shape), self._step / 255).movedim(-3, -1)
        return x.round().to(torch.uint8)

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns the log-probability of whole images of bytes in nats, with shape ``(*, B)``."""
        x = torch.div(value, self._step, rounding_mode="floor") * self._step
        return self.mixture.log_prob(x.movedim(-1, -3) / 255)


def _checked(model: Any) -> nn.Module:  # noqa: ANN401
    if not hasattr(model, "decoder") and isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    decoder = getattr(model, "decoder", None)
    names = ("encoder", "decoder", "H")  # torch's own tensor.H raises
    missing = [n for n in names if isinstance(model, Tensor) or not hasattr(model, n)]
    parts = ("dec_blocks", "bias_xs", "out_net", "final_fn")
    missing += [f"decoder.{name}" for name in parts if not hasattr(decoder, name)]
    for block in getattr(decoder, "dec_blocks", ()):
        missing += [f"{name} in a block" for name in _BLOCK if not hasattr(block, name)]
    if missing or not isinstance(model, nn.Module):
        raise TypeError(
            f"VDVAESource takes VDVAE's VAE; got {described(model)}, which lacks "
            f"{', '.join(missing[:3])}. Give the model itself, not its state_dict."
        )
    H: Any = model.H
    if H.image_size is None:
        raise ValueError(
            "H.image_size is None: set H.image_size and H.image_channels before VAE(H)."
        )
    if H.dataset not in _NORMALISATION:
        raise ValueError(
            f"H.dataset must be one of {', '.join(_NORMALISATION)}; got {H.dataset!r}. It says "
            f"how bytes are normalised."
        )
    return model


def _diagonal(parameters: Parameters, temperature: float) -> Distribution:
    loc, log_scale = parameters
    normal = Normal(loc, temperature * log_scale.exp(), validate_args=False)
    return Independent(normal, loc.ndim - 1, validate_args=False)


def _kl(q: Parameters | None, p: Parameters | None) -> Tensor:
    """KL(q, p) by element, in the order of VDVAE's sums, to the last bit."""
    (loc_q, log_q), (loc_p, log_p) = q, p  # type: ignore[misc]
    ratio = (log_q.exp() ** 2 + (loc_q - loc_p) ** 2) / (log_p.exp() ** 2)
    kl: Tensor = -0.5 + log_p - log_q + 0.5 * ratio
    return kl
