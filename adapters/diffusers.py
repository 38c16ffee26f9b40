"""Autoencoders of diffusers as sources: anything with ``encode(x).latent_dist``.

The latents of such a model have one group, mostly a feature map ``(C, h, w)`` whose size follows
the image's. They are taken as ``encode`` gives them and as ``decode`` takes them: unscaled, without
``config.scaling_factor``, which belongs to diffusion models.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

from ncprior.bases.empirical import NoPrior
from ncprior.single_group import SingleGroup
from ncprior.utils.precision import at_least_float32, input_like
from ncprior.utils.require import floats_of_batch, require_instance
from ncprior.utils.visible import require_eval

_REFUSED = {
    "VQModel": (
        "decodes codes of a codebook. Wrap it in ncprior.adapters.vq.VQModelSource, for bases and heads "
        "on the codes. To model the features h in front of the quantiser, say how wide q(h | x) is to "
        "be, and wrap it in SingleGroup(prior, lambda x: Independent(Normal(model.encode(x).latents, "
        "noise), 3), lambda h: model.decode(h).sample, module=model) with a fitted base as prior"
    ),
    "AutoencoderKLTemporalDecoder": (
        "decodes the rows of a batch together, as the frames of a video. Wrap it in SingleGroup "
        "with a decoder of your own that says what is a row"
    ),
    "ConsistencyDecoderVAE": (
        "decodes by a diffusion that draws noise: it has no decoder's mean. Take the AutoencoderKL "
        "of the same latents"
    ),
}

_PIXELS = (-16.0, 16.0)  # pixels of any scaling are within; bytes are not


class DiffusersSource(SingleGroup):
    """An autoencoder of diffusers with Gaussian posterior, such as ``AutoencoderKL``.

    These models are trained with almost no weight on N(0, I), which is so far from their latents that
    heads could not learn the ratio. The prior must be fitted, or given, by ``rebase``; for wide
    latents use ``fit_gaussian(z, covariance="diagonal")``.

    A batch is x itself, ``(B, 3, H, W)`` in [-1, 1] for most models, or the first item of a tuple.
    The images of one source must be of one size. A model in half precision is given x and z in its
    own dtype; distributions and images come in float32.

    Arguments:
        model: The model, in evaluation mode, on the device where it is to stay.

    Raises:
        TypeError: If the model has no ``encode`` and ``decode``.
        ValueError: If it is a model that cannot be wrapped, or in training mode. ``encode`` raises
            it for bytes that have not been scaled.

    Example:
        >>> from diffusers import AutoencoderKL
        >>> from ncprior.bases import fit_gaussian, latents_of, rebase
        >>> model = AutoencoderKL(latent_channels=2, norm_num_groups=8, block_out_channels=(8,))
        >>> source, x = DiffusersSource(model.eval()), 2 * torch.rand(20, 3, 4, 4) - 1
        >>> z = latents_of(source, x)
        >>> source = rebase(source, fit_gaussian(z, covariance="diagonal"))
        >>> source.group(source.start(5)).prior.sample().shape
        torch.Size([5, 2, 4, 4])
    """

    module: Any

    def __init__(self, model: nn.Module) -> None:
        remedy = "Load one: AutoencoderKL.from_pretrained(...)."
        require_instance("model", model, nn.Module, remedy)
        name = type(model).__name__
        for part in type(model).__mro__:
            if part.__name__ in _REFUSED:
                raise ValueError(f"A {name} cannot be wrapped: it {_REFUSED[part.__name__]}.")
        if not (
            callable(getattr(model, "encode", None)) and callable(getattr(model, "decode", None))
        ):
            raise TypeError(
                f"DiffusersSource takes a model with encode(x).latent_dist and decode(z).sample; "
                f"got {name}. Wrap a model of your own in SingleGroup."
            )
        require_eval(model)
        self.module = model
        prior = NoPrior(
            f"{name} has no prior worth the name: N(0, I) had next to no weight in its training."
        )
        super().__init__(prior, self._q, self._reconstruct, module=model)

    def encode(self, x: Any) -> SingleGroup.Encoding:  # noqa: ANN401
        """Encodes one batch: the parameters of q(z | x).

        Raises:
            ValueError: If the size of the images does not fit, or x holds bytes.
        """
        remedy = "Scale images to [-1, 1]: x / 127.5 - 1 for bytes."
        return super().encode(
            floats_of_batch(type(self.module).__name__, x, remedy, _PIXELS, self.module)
        )

    def likelihood(self, state: SingleGroup.State) -> Distribution:
        """Raises an error, as the decoder defines no p(x | z).

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            f"{type(self.module).__name__} knows no p(x | z): such a decoder is trained on "
            f"perceptual and adversarial losses, which are no density of x."
        )

    def _q(self, x: Tensor) -> Distribution:
        x = x.to(input_like(self._part("encoder")))
        latent_dist = getattr(self.module.encode(x), "latent_dist", None)
        mean, std = getattr(latent_dist, "mean", None), getattr(latent_dist, "std", None)
        if mean is None or std is None or getattr(latent_dist, "deterministic", False):
            kind = (
                "no latent_dist"
                if latent_dist is None
                else f"a {type(latent_dist).__name__} without a spread"
            )
            raise ValueError(
                f"{type(self.module).__name__}.encode(x) gives {kind}. Say how wide q(z | x) is to "
                f"be, and wrap it in SingleGroup(prior, lambda x: Independent(Normal(code(x), "
                f"noise), 3), decoder, module=model), with code(x) what the model encodes."
            )
        self._check_size(x, mean)
        mean, std = at_least_float32(mean), at_least_float32(std)
        normal = Normal(mean, std, validate_args=False)
        return Independent(normal, mean.ndim - 1, validate_args=False)

    def _check_size(self, x: Tensor, z: Tensor) -> None:
        """Validates that no halving of the image size rounds down."""
        if x.ndim < 4:
            return
        for size, small in zip(x.shape[-2:], z.shape[-2:], strict=True):
            factor, rest = divmod(size, max(1, small))
            if rest or factor & (factor - 1):
                raise ValueError(
                    f"{type(self.module).__name__} halves images again and again, and would "
                    f"decode smaller ones: {tuple(x.shape[-2:])} pixels became "
                    f"{tuple(z.shape[-2:])} latents. Crop, pad or resize the images to multiples "
                    f"of its factor."
                )

    def _reconstruct(self, z: Tensor) -> Tensor:
        first = getattr(self.module, "post_quant_conv", None)  # of another dtype if it is upcast
        weight = input_like(first, self._part("decoder"))
        x: Tensor = self.module.decode(z.to(weight.dtype)).sample
        return at_least_float32(x)

    def _part(self, name: str) -> nn.Module:
        """Returns the encoder or the decoder, whose dtype may be of its own; else the model."""
        part: nn.Module = getattr(self.module, name, self.module)
        return part
