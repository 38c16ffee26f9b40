r"""VAEBM: a frozen VAE with an energy E(x) in data space, alone or on top of NCP.

.. math::
    p(x, z) \propto \prod_k r_k(z_k | z_{<k})^\alpha \, p(z_k | z_{<k}) \; p(x | z) \; e^{-E(x)},

with one global partition function. Without heads r = 1, and the marginal is p_VAE(x)·e^(-E(x)) /
Z. Chains move by Langevin dynamics in the noise ε of all groups and of the decoder
(:mod:`ncprior.vaebm.noise`), in which the VAE is N(0, I) and the target is

.. math::
    \log \pi(\varepsilon) = - \tfrac{1}{2} |\varepsilon|^2
        + \alpha \sum_k \log r_k(z_k | z_{<k}) - E(x) + \text{const}.

NCP draws each group from r_k p_k / Z_k(z_<k), with local normalisation; VAEBM is normalised
globally.

References:
    | VAEBM: A Symbiosis between Variational Autoencoders and Energy-based Models
    | (Xiao, Kreis, Kautz & Vahdat, ICLR 2021)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy, deepcopy
from typing import Any, NamedTuple, get_args

import torch
from torch import Size, Tensor, nn
from torch.distributions import Independent, Normal

from ncprior.prior import NCPrior
from ncprior.samplers.base import Sampler
from ncprior.samplers.langevin import run_chains
from ncprior.samplers.setting import require_sampler
from ncprior.samplers.target import Target
from ncprior.source import LatentSource, device_of, require_source
from ncprior.utils.batches import own_batch
from ncprior.utils.precision import at_least_float32, at_precision, check_precision
from ncprior.utils.require import (
    described,
    real_tensor,
    require_callable,
    require_choice,
    require_counts,
    require_flags,
    require_numbers,
)
from ncprior.utils.visible import require_apart
from ncprior.vaebm.checks import require_gradients, require_one_device, require_steady_energy
from ncprior.vaebm.gaussian_decoder import gaussian_decoder_of
from ncprior.vaebm.noise import LangevinTarget, NoiseMap, described_noise, shapes_of
from ncprior.vaebm.saved import PretrainedEnergy


class Chains(NamedTuple):
    """State of Langevin chains.

    Attributes:
        x: Images with the decoder's noise, the inputs of the energy, ``(B, ...)``; not clamped.
        mean: The decoder's means, without the noise, ``(B, ...)``.
        latents: z_k of every group, each ``(B, *event)``.
        noise: Start of further steps: ε_k of every group (z_k or u_k if its prior is not normal,
            see :mod:`ncprior.vaebm.noise`), and ε_x if the decoder has noise.
        acceptance: Acceptance rate of every chain, ``(B,)``, when adjusted.
    """

    x: Tensor
    mean: Tensor
    latents: tuple[Tensor, ...]
    noise: tuple[Tensor, ...]
    acceptance: Tensor | None = None


class VAEBM(PretrainedEnergy, nn.Module):
    """VAEBM: a frozen VAE with an energy on its images, over its own prior or an NCP prior.

    VAE and ratio heads are not registered as submodules, moved or changed: the parameters of the
    model are those of the energy.

    Arguments:
        prior: The VAE as a source, or an :class:`~ncprior.NCPrior` on it, whose log-ratios are
            added to the target. The source needs ``likelihood``. A normal likelihood has noise
            ε_x; for any other, such as a Bernoulli, x is its mean.
            :class:`~ncprior.vaebm.GaussianDecoder` adds a normal likelihood to a source.
        energy: Maps x, with shape ``(B, ...)``, to E(x) in nats, ``(B,)``.
        num_steps: Langevin steps of a chain; 16 in the paper.
        step_size: λ of the steps, in squared units of ε. An energy trained with short chains
            suits the λ and the number of steps of its training. The published code uses 3e-6 to
            8e-5 for NVAEs of 10⁵ dimensions, with a separate gradient for each chain.
        langevin_target: ``"exact"``, or ``"official"`` for the target of the published code, which
            has -log p(z) - log p(x | z) instead of ½|ε|².
            Its clamping of x to [0, 1] is left out.
        data_noise: σ of the normal noise on the data that are modelled; 0 for data without noise.
            With the σ of a :class:`~ncprior.vaebm.GaussianDecoder`, data are as noisy as samples.
            Otherwise the energy separates data from samples by the noise, which short chains
            cannot remove, and grows steep. The noise is added to data in training, scores are
            means over it, and σ is saved with the energy.
        precision: Precision of products and convolutions in VAE, heads and energy, in sampling and
            training: ``torch.float32``, or ``torch.bfloat16``, which is faster on most GPUs.
            Noise, log-densities and weights stay in float32, and the final images are decoded in
            float32.

    Raises:
        TypeError: If the prior of a group has no density on all of R^n, where the message names the
            group, or an argument has the wrong type.
        ValueError: If the source has no method ``likelihood``, the VAE is in training mode, an
            argument is out of range, or the energy has parameters of the VAE or the heads, or is on
            another device.

    Example:
        >>> model = VAEBM(source, lambda x: 0.5 * x.square().sum(1))
        >>> model.sample(4).x.shape
        torch.Size([4, 3])
        >>> print(model)
        VAEBM(SingleGroup, 16 steps of 0.01, exact; decoder noise: location and scale of p(x | z))
    """

    source: LatentSource[Any, Any]
    prior: NCPrior | None

    def __init__(
        self,
        prior: NCPrior | LatentSource[Any, Any],
        energy: Any,  # noqa: ANN401
        *,
        num_steps: int = 16,
        step_size: float = 0.01,
        langevin_target: LangevinTarget = "exact",
        data_noise: float = 0.0,
        precision: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        require_counts("[0, inf)", num_steps=num_steps)
        require_numbers("(0, inf)", step_size=step_size)
        require_choice("langevin_target", langevin_target, get_args(LangevinTarget))
        require_numbers("[0, inf)", data_noise=data_noise)
        check_precision(precision)
        heads, source = (prior, prior.source) if isinstance(prior, NCPrior) else (None, prior)
        require_source(source)
        require_callable("energy", energy, "Pass a network, or a function that maps x to E(x).")
        if isinstance(energy, nn.Module):
            require_apart(energy, (source, getattr(heads, "heads", None)), "The energy")
        require_one_device(energy, source, heads)
        self.prior, self.source = heads, source
        self.energy = energy
        self.num_steps, self.step_size = int(num_steps), float(step_size)
        self.langevin_target, self.precision = langevin_target, precision
        self.data_noise = float(data_noise)
        self.decoder_noise = described_noise(source)
        self._has_gradients = False  # not yet checked

    def forward(self, x: Tensor) -> Tensor:
        """Energy of images, with products in the model's ``precision``, also under autocast.

        Arguments:
            x: Images, with shape ``(B, ...)``.

        Returns:
            E(x) in nats, with shape ``(B,)``, in float32 or better.

        Raises:
            TypeError: If x or the result of the energy is no tensor of real numbers.
            ValueError: If the energy does not return shape ``(B,)``.

        Example:
            >>> VAEBM(source, lambda x: x.sum(1))(torch.ones(4, 3))
            tensor([3., 3., 3., 3.])
        """
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.is_meta:
            x = real_tensor("x", x)
        with at_precision(x.device.type, self.precision):
            energy: Tensor = self.energy(at_least_float32(x))
        if not isinstance(energy, Tensor) or not energy.is_floating_point():
            raise TypeError(f"The energy must return a tensor of floats; got {described(energy)}.")
        if energy.shape != x.shape[:1]:
            raise ValueError(
                f"The energy must map x of shape {tuple(x.shape)} to shape ({len(x)},); "
                f"got {tuple(energy.shape)}."
            )
        return at_least_float32(energy)

    @torch.no_grad()
    def sample(
        self,
        batch_size: int,
        *,
        sampler: Sampler | None = None,
        num_steps: int | None = None,
        step_size: float | None = None,
        adjusted: bool = False,
        condition: Any = None,  # noqa: ANN401
    ) -> Chains:
        """Draws samples of the VAE or of NCP, and moves them by Langevin dynamics.

        Arguments:
            batch_size: B, the number of chains.
            sampler: Sampler of the NCP prior for the start of the chains, such as ``partial(sir,
                num_proposals=100)``; ``None`` takes the prior's own, and without one the base.
            num_steps: Number of steps; ``None`` takes the model's.
            step_size: λ; ``None`` takes the model's.
            adjusted: Whether to correct each step by Metropolis-Hastings (MALA).
            condition: Condition of the source, such as labels, or ``None``.

        Returns:
            The chains.

        Raises:
            FloatingPointError: If the energy, log r or a gradient is not finite.
            ValueError: If a sampler is given without ratio heads, or the energy is in training mode.

        Example:
            >>> chains = VAEBM(prior, lambda x: x.square().sum(1)).sample(8, num_steps=4)
            >>> chains.x.shape, chains.latents[0].shape, chains.noise[1].shape
            (torch.Size([8, 3]), torch.Size([8, 2]), torch.Size([8, 3]))
        """
        _check_options(num_steps, step_size, adjusted)  # before anything is drawn
        require_steady_energy(self.energy)
        noise = self.draw_noise(batch_size, sampler=sampler, condition=condition)
        return self.run_chains(
            noise,
            num_steps=num_steps,
            step_size=step_size,
            adjusted=adjusted,
            condition=condition,
        )

    @torch.no_grad()
    def draw_noise(
        self,
        batch_size: int,
        *,
        sampler: Sampler | None = None,
        condition: Any = None,  # noqa: ANN401
    ) -> tuple[Tensor, ...]:
        """Draws the noise at the start of chains.

        Arguments:
            batch_size: B, the number of chains.
            sampler: Sampler of the NCP prior, see :meth:`sample`.
            condition: Condition of the source, such as labels, or ``None``.

        Returns:
            The noise of every group, each ``(B, *event)``, and of a normal decoder, ``(B, ...)``.

        Raises:
            ValueError: If a sampler is given without ratio heads. Pass ``sampler=None``.

        Example:
            >>> [tuple(part.shape) for part in VAEBM(source, lambda x: x.sum(1)).draw_noise(5)]
            [(5, 2), (5, 3)]
        """
        require_counts(batch_size=batch_size)
        return self._walk(condition).draw(batch_size, self.start_sampler(sampler)).noise

    def start_sampler(self, sampler: Sampler | None) -> Sampler | None:
        """Returns the sampler of the start of chains: the given one, or else the NCP prior's own.

        Raises:
            TypeError: If it is not a function. Pass ``partial(sir, num_proposals=100)``.
            ValueError: If it is given without ratio heads. Pass ``sampler=None``.
        """
        if sampler is None:
            return None if self.prior is None else self.prior.sampler
        require_sampler(sampler)
        if self.prior is None:
            raise ValueError(
                "A sampler needs ratio heads, which this VAEBM does not have. Pass sampler=None."
            )
        return sampler

    @torch.no_grad()
    def run_chains(
        self,
        noise: Sequence[Tensor],
        *,
        num_steps: int | None = None,
        step_size: float | None = None,
        adjusted: bool = False,
        condition: Any = None,  # noqa: ANN401
    ) -> Chains:
        """Runs Langevin chains from given noise; one step is ε ← ε + ½λ ∇log π(ε) + √λ N(0, I).

        Arguments:
            noise: Start of the chains: ``noise`` of :class:`Chains`, or of :meth:`draw_noise`.
            num_steps: Number of steps; ``None`` takes the model's.
            step_size: λ; ``None`` takes the model's.
            adjusted: Whether to correct each step by Metropolis-Hastings (MALA).
            condition: Condition of the source, such as labels, or ``None``.

        Returns:
            The chains.

        Raises:
            FloatingPointError: If the energy, log r or a gradient is not finite. Use a smaller
                ``step_size``.
            ValueError: If the noise is not one tensor per group and, for a normal decoder, one
                more. Pass that of :meth:`draw_noise` or of other chains. Also, at the first chains,
                if the gradient of the energy, the decoder or the heads is cut, as by
                ``torch.no_grad``.
            TypeError: If the noise is not a list of tensors, or an argument has the wrong type.

        Example:
            >>> model = VAEBM(source, lambda x: x.square().sum(1))
            >>> model.run_chains(model.draw_noise(4), adjusted=True).acceptance.shape
            torch.Size([4])
        """
        _check_options(num_steps, step_size, adjusted)
        shapes_of(noise)
        found, target, u = run_unread(self, noise, num_steps, step_size, adjusted, condition)
        target.raise_if_bad(int(target.first_bad_step(u)))
        return found

    def extra_repr(self) -> str:
        """Returns the settings in ``print(model)``, besides the energy."""
        of = "" if self.prior is None else f"{len(self.prior.heads)} ratio heads on "
        noisy = gaussian_decoder_of(self.source)
        name = type(self.source).__name__ if noisy is None else repr(noisy)
        on_data = f"; noise on data: σ = {self.data_noise:g}" if self.data_noise else ""
        return (
            f"{of}{name}, {self.num_steps} steps of {self.step_size:g}, "
            f"{self.langevin_target}; decoder noise: {self.decoder_noise}{on_data}"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> VAEBM:
        """Copies the energy; VAE and heads are shared."""
        other = copy(self)
        own = {name: copy(part) for name, part in vars(self).items() if isinstance(part, dict)}
        vars(other).update(own)  # hooks too
        other._modules = {name: deepcopy(m, memo) for name, m in self._modules.items()}
        return other

    def __setattr__(self, name: str, value: Any) -> None:  # noqa: ANN401
        """Sets an attribute; VAE and heads stay unregistered, and belong to the model for good.

        Raises:
            AttributeError: If a model would get another prior or VAE.
        """
        if name not in ("prior", "source"):
            super().__setattr__(name, value)
        elif name in vars(self):
            raise AttributeError(
                f"A VAEBM keeps the {name} that it was made with. Make another one around the same "
                f"energy: VAEBM(prior, model.energy)."
            )
        else:
            object.__setattr__(self, name, value)

    def _walk(
        self,
        condition: Any,  # noqa: ANN401
        precision: torch.dtype = torch.float32,
    ) -> NoiseMap:
        c = None if condition is None else own_batch(condition, device_of(self.source))
        return NoiseMap(self.source, self.prior, c, self.langevin_target == "official", precision)


@torch.no_grad()
def run_unread(
    model: VAEBM,
    noise: Sequence[Tensor],
    num_steps: int | None = None,
    step_size: float | None = None,
    adjusted: bool = False,
    condition: Any = None,  # noqa: ANN401
) -> tuple[Chains, Target, Tensor]:
    """Chains unchecked, without a wait for a GPU, with their target and its last point."""
    shapes = [part.shape for part in noise]
    walk, precise = model._walk(condition, model.precision), model._walk(condition)
    u = torch.cat([part.reshape(len(part), -1) for part in noise], dim=1)

    def log_weight(u: Tensor) -> Tensor:
        parts = _unflatten(u, shapes)
        walked = walk(parts)
        energy: Tensor = model(walked.x)
        if not model._has_gradients:
            require_gradients(walk, model, parts, walked, energy)
            model._has_gradients = True
        return walked.log_weight - energy

    normal = Normal(torch.zeros_like(u), torch.ones_like(u), validate_args=False)
    target = Target(Independent(normal, 1), log_weight)
    num_steps = model.num_steps if num_steps is None else num_steps
    step_size = model.step_size if step_size is None else step_size
    u, acceptance = run_chains(target, u, num_steps, step_size, adjusted=adjusted)
    end = precise(_unflatten(u, shapes))
    return Chains(end.x, end.mean, end.latents, end.noise, acceptance), target, u


def _check_options(num_steps: Any, step_size: Any, adjusted: Any) -> None:  # noqa: ANN401
    require_counts("[0, inf) or None", num_steps=num_steps)
    require_numbers("(0, inf) or None", step_size=step_size)
    require_flags(adjusted=adjusted)


def _unflatten(u: Tensor, shapes: Sequence[Size]) -> tuple[Tensor, ...]:
    """Splits flat noise, ``(B, D)``, into the noise of groups and decoder."""
    flat = u.split([math.prod(shape[1:]) for shape in shapes], dim=1)
    return tuple(part.reshape(shape) for part, shape in zip(flat, shapes, strict=True))
