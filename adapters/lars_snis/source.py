"""The MNIST VAEs of LARS and SNIS as latent sources: the walks of NCP's Table 2.

source = EIMSource(vae)
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from torch.distributions import Distribution

from ncprior.adapters.lars_snis.priors import diagonal_normal
from ncprior.adapters.lars_snis.vae import EIMVAE, ConvEIMVAE
from ncprior.distributions import expand
from ncprior.single_group import SingleGroup
from ncprior.source import Group, LatentSource
from ncprior.utils.require import require_counts, require_instance
from ncprior.utils.visible import require_eval


class EIMSource(SingleGroup):
    """An :class:`EIMVAE` as a latent source, with any of its priors.

    Arguments:
        model: The VAE, in evaluation mode when it is used.

    Raises:
        TypeError: If it is no :class:`EIMVAE`.

    Example:
        >>> from ncprior.source import sample_posterior
        >>> vae = EIMVAE(torch.full((1, 28, 28), 0.5)).eval()
        >>> latents, state = sample_posterior(EIMSource(vae), torch.ones(4, 1, 28, 28))
        >>> latents[0].shape
        torch.Size([4, 50])
    """

    def __init__(self, model: EIMVAE) -> None:
        require_instance("model", model, EIMVAE, "Two groups: ConvEIMSource(ConvEIMVAE(...)).")
        super().__init__(
            *(model.prior_distribution(), model.posterior, model.decode),
            module=model,
            likelihood=model.likelihood,
        )


class ConvEIMSource(LatentSource[Any, Any]):
    """A :class:`ConvEIMVAE` as a latent source: z_2, then z_1 with context z_2.

    Arguments:
        model: The VAE, in evaluation mode when it is used.

    Raises:
        TypeError: If it is no :class:`ConvEIMVAE`.

    Example:
        >>> from ncprior.source import sample_posterior
        >>> source = ConvEIMSource(ConvEIMVAE(torch.full((1, 28, 28), 0.5)).eval())
        >>> (z_2, z_1), state = sample_posterior(source, torch.ones(4, 1, 28, 28))
        >>> source.decode(state).shape
        torch.Size([4, 1, 28, 28])
    """

    num_groups = 2

    def __init__(self, model: ConvEIMVAE) -> None:
        remedy = "One group: EIMSource(EIMVAE(...))."
        self.module: ConvEIMVAE = require_instance("model", model, ConvEIMVAE, remedy)

    class Encoding(NamedTuple):
        """Loc and scale of q(z_2 | x), and features of x."""

        loc: Tensor
        scale: Tensor
        features: Tensor

    class State(NamedTuple):
        """The latents so far, and loc and scale of the next posterior and, if Gaussian, prior."""

        rows: Tensor  # (B, 0): carries the batch size
        latents: tuple[Tensor, ...]
        prior: tuple[Tensor, Tensor] | None
        posterior: tuple[Tensor, Tensor] | None
        features: Tensor | None

    def encode(self, x: Any) -> Encoding:  # noqa: ANN401
        """Encodes binary images, ``(B, 1, 28, 28)``, the first item of a batch that is a tuple."""
        require_eval(self.module)
        return self.Encoding(*self.module.encode(x))

    def start(
        self, batch_size: int, encoding: Encoding | None = None, condition: None = None
    ) -> State:
        """Returns the state before z_2, for ``batch_size`` rows."""
        require_eval(self.module)
        if condition is not None:
            raise ValueError("This source takes no condition; got one.")
        require_counts(batch_size=batch_size)
        rows = self.module.mean.new_empty(batch_size, 0)
        if encoding is None:
            return self.State(rows, (), None, None, None)
        if len(encoding.loc) != batch_size:
            raise ValueError(
                f"The walk has {batch_size} rows; got {len(encoding.loc)} rows of encoding."
            )
        return self.State(rows, (), None, (encoding.loc, encoding.scale), encoding.features)

    def group(self, state: State) -> Group:
        """Returns p(z_2), or p(z_1 | z_2) with context z_2, and, given an x, the posterior."""
        q = None if state.posterior is None else diagonal_normal(*state.posterior)
        if state.prior is None:
            return Group(expand(self.module.prior_distribution(), len(state.rows)), q)
        return Group(diagonal_normal(*state.prior), q, state.latents[0])

    def advance(self, state: State, z: Tensor) -> State:
        """Returns the state with z_2, then z_1, each with shape ``(B, 50)``."""
        if len(z) != len(state.rows):
            raise ValueError(f"The walk has {len(state.rows)} rows; got {len(z)} rows of z.")
        latents = (*state.latents, z)
        if state.latents:
            return state._replace(latents=latents)
        prior, posterior = self.module.prior_of_z_1(z), None
        if state.features is not None:
            posterior = self.module.posterior_of_z_1(z, state.features)
        return state._replace(latents=latents, prior=prior, posterior=posterior)

    def decode(self, state: State) -> Tensor:
        """Returns the mean of p(x | z_1, z_2), ``(B, 1, 28, 28)``."""
        return self.likelihood(state).mean

    def likelihood(self, state: State) -> Distribution:
        """Returns p(x | z_1, z_2), over binary images.

        Raises:
            ValueError: If the state does not hold both.
        """
        if len(state.latents) != 2:
            raise ValueError(
                f"Decoding needs z_2 and z_1; this walk has {len(state.latents)} of 2 latents. "
                f"Call advance(state, z)."
            )
        return self.module.likelihood(*state.latents)
