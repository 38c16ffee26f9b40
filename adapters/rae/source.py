"""The RAE paper's models as latent sources: the walk of NCP's Table 1.

For both models, the paper fits a mixture of ten Gaussians to the codes of the training set:

    source = RAESource(vae)
    closer = rebase(source, fit_mixture(latents_of(source, x, of="means"), 10))
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal

from ncprior.adapters.rae.models import RAE, VAE
from ncprior.bases.empirical import NoPrior
from ncprior.distributions import Sampleable
from ncprior.single_group import SingleGroup
from ncprior.utils.precision import at_least_float32
from ncprior.utils.require import described, floats_of_batch, require_flags, require_numbers


class RAESource(SingleGroup):
    """A :class:`VAE` or a :class:`RAE` as a latent source.

    The prior of a VAE is N(0, I). A RAE has none: fit one and :func:`~ncprior.bases.rebase`. Its
    codes are deterministic, so that no ratio of densities exists; ``noise`` is added to them.

    Arguments:
        model: The VAE or RAE, in evaluation mode when it is used.
        noise: Standard deviation of q(z | x) around a RAE's code, in units of z; a tenth of the
            codes' own standard deviation is little for the decoder. A VAE takes none.
        maps: Whether the input of the ratio heads is the 8×8 feature map of the decoder's first
            layer in place of z. On CIFAR-10's 128 latents heads then learn much faster.

    Raises:
        TypeError: If the model is neither.
        ValueError: If a RAE comes without noise, or a VAE with it.

    Example:
        >>> from ncprior.adapters.rae import RAE, pad_to_32
        >>> from ncprior.bases import fit_mixture, latents_of, rebase
        >>> source = RAESource(RAE("mnist", width=0.05).eval(), noise=0.1)
        >>> z = latents_of(source, pad_to_32(torch.rand(50, 1, 28, 28)))
        >>> closer = rebase(source, fit_mixture(z, 2))
        >>> closer.group(closer.start(5)).prior.sample().shape
        torch.Size([5, 16])
    """

    def __init__(
        self, model: VAE | RAE, *, noise: float | None = None, maps: bool = False
    ) -> None:
        prior: Sampleable
        posterior: Callable[[Tensor], Distribution]
        likelihood: Callable[[Tensor], Distribution]
        require_flags(maps=maps)
        if isinstance(model, VAE):
            if noise is not None:
                raise ValueError(
                    f"noise is for codes without any; the VAE's posterior has its own. Got {noise}."
                )
            prior, posterior, likelihood = model.prior(), model.posterior, model.likelihood
        elif isinstance(model, RAE):
            prior = NoPrior("A RAE has no prior of its own.", (model.latents,))
            posterior, likelihood = partial(_around_code, model, _checked(noise)), _refuse
        else:
            raise TypeError(
                f"RAESource takes a VAE or a RAE of ncprior.adapters.rae; got {described(model)}. "
                f"Wrap another VAE in SingleGroup."
            )
        self.noise = None if noise is None else float(noise)
        super().__init__(
            *(prior, posterior, model.decode),
            module=model,
            likelihood=likelihood,
            features=model.decoder[:2] if maps else None,
        )

    def facts(self) -> dict[str, Any]:
        """Returns the noise on codes."""
        return {"RAESource.noise": self.noise}

    def encode(self, x: Any) -> SingleGroup.Encoding:  # noqa: ANN401
        """Encodes one batch of images in [0, 1]: the parameters of q(z | x)."""
        return super().encode(
            floats_of_batch("RAESource", x, "Divide bytes by 255.", (0, 1), self.module)
        )


def _around_code(model: RAE, noise: float, x: Tensor) -> Distribution:
    code = at_least_float32(model.encode(x))
    scale = torch.full_like(code, noise)
    return Independent(Normal(code, scale, validate_args=False), 1)


def _checked(noise: float | None) -> float:
    require_numbers("(0, inf) or None", noise=noise)
    if noise is None:
        raise ValueError(
            "A RAE's codes have no noise, and NCE needs a density q(z | x): pass noise=, the "
            "standard deviation of q(z | x) in units of z. Try a tenth of model.encode(x).std()."
        )
    return noise


def _refuse(_: Tensor) -> NoReturn:
    raise ValueError(
        "A RAE is no probability model: its squared error has no scale, so that p(x | z) is not "
        "known. Likelihoods need a VAE."
    )
