r"""VAEBM: a frozen VAE, reweighted in data space by an energy E(x), alone or on top of NCP.

.. math::
    p(x, z) \propto \prod_k r_k(z_k | z_{<k})^\alpha \, p(z_k | z_{<k}) \; p(x | z) \; e^{-E(x)},

with one global normaliser; without heads, r = 1, and the marginal is p_VAE(x)·e^{-E(x)} / Z. Chains
move by Langevin dynamics in the noise ε of all groups and of the decoder (see
:mod:`ncprior.vaebm`), where the VAE is N(0, I) and the target

.. math::
    \log \pi(\varepsilon) = - \tfrac{1}{2} |\varepsilon|^2
        + \alpha \sum_k \log r_k(z_k | z_{<k}) - E(x) + \text{const}.

NCP draws each group from r_k p_k / Z_k(z_<k), normalised locally; here nothing is.

References:
    | VAEBM: A Symbiosis between Variational Autoencoders and Energy-based Models
    | (Xiao, Kreis, Kautz & Vahdat, ICLR 2021)
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Size, Tensor, nn
from torch.distributions import Independent, Normal

from ncprior.prior import NCPrior
from ncprior.samplers.base import Sampler
from ncprior.samplers.langevin import langevin
from ncprior.source import LatentSource, device_of, require_eval, require_source
from ncprior.utils.precision import at_least_float32, at_precision, check_precision
from ncprior.vaebm.gaussian_decoder import gaussian_decoder_of
from ncprior.vaebm.noise import NoiseMap

LangevinTarget = Literal["exact", "official"]


class Chains(NamedTuple):
    """Where Langevin chains stand.

    Attributes:
        x: Images with the decoder's noise on them, which the energy has seen, ``(B, ...)``. They
            are not clamped.
        mean: The decoder's means, without the noise, ``(B, ...)``.
        latents: z_k of every group, each ``(B, *event)``.
        noise: Where to go on from: ε_k of every group (where its prior is not normal, what
            :mod:`ncprior.vaebm` walks in), and ε_x where the decoder has noise.
        acceptance: Share of accepted steps of every chain, ``(B,)``, when adjusted.
    """

    x: Tensor
    mean: Tensor
    latents: tuple[Tensor, ...]
    noise: tuple[Tensor, ...]
    acceptance: Tensor | None = None


class VAEBM(nn.Module):
    """A frozen VAE with an energy on its images, over its own prior or an NCP prior.

    Neither the VAE nor the ratio heads are registered, moved or changed: the parameters are the
    energy's. "Energy" is the network alone; the option that the paper's code makes one think of is
    called ``langevin_target``.

    Arguments:
        prior: The VAE as a source, or an :class:`~ncprior.NCPrior` on it, whose log-ratios join the
            target. The source needs ``likelihood``: a normal one brings ε_x; any other, such as a
            Bernoulli, works with its mean. :class:`~ncprior.vaebm.GaussianDecoder` gives one
            to a source without.
        energy: E: maps x, with shape ``(B, ...)``, to nats, ``(B,)``.
        num_steps: Langevin steps of a chain; the paper's is 16.
        step_size: λ of the steps, in squared units of ε. An energy trained by short chains fits
            the λ and the number of steps that it was trained with. The published code takes 3e-6
            to 8e-5 for NVAEs of 10⁵ dimensions, with the gradient of each chain on its own.
        langevin_target: ``"exact"``, or ``"official"`` for what the published code samples: with
            -log p(z) - log p(x | z) in place of ½|ε|², see :class:`~ncprior.vaebm.NoiseMap`.
            (Its clamping of x to [0, 1] is left out.)
        data_noise: σ of normal noise on data that this is a model of, 0 for data as they are. With
            the σ of a decoder of one σ, data are as noisy as what is drawn: without it an energy
            tells them apart by the noise, which short chains cannot take away, and grows steep.
            Training puts it on data, scores are means over it, and it is saved with the energy.
        precision: Of products and convolutions in VAE, heads and energy while chains move and the
            energy is trained: ``torch.float32``, or ``torch.bfloat16``, which is faster where
            there are units for it. Noise, nats and weights stay in float32, and the last images are
            decoded without it.

    Raises:
        TypeError: If a group's prior has no density on all of R^n, naming the group.
        ValueError: If the source does not know p(x | z), the VAE is in training mode, or a number
            makes no sense.

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
        if num_steps < 0 or not 0 < step_size < math.inf:
            raise ValueError(
                f"num_steps must be at least 0 and step_size positive and finite; "
                f"got {num_steps} and {step_size}."
            )
        if langevin_target not in get_args(LangevinTarget):
            raise ValueError(
                f"langevin_target is one of {', '.join(get_args(LangevinTarget))}; "
                f"got {langevin_target!r}."
            )
        if not 0 <= data_noise < math.inf:
            raise ValueError(f"data_noise must be finite and at least 0; got {data_noise}.")
        check_precision(precision)
        heads, source = (prior, prior.source) if isinstance(prior, NCPrior) else (None, prior)
        require_source(source)
        object.__setattr__(self, "prior", heads)  # nn.Module would register them
        object.__setattr__(self, "source", source)
        self.energy = energy
        self.num_steps, self.step_size = num_steps, step_size
        self.langevin_target, self.precision = langevin_target, precision
        self.data_noise = float(data_noise)
        self.decoder_noise = self._probe()

    def forward(self, x: Tensor) -> Tensor:
        """Returns E(x) in nats, with shape ``(B,)``, in float32 or better, also under autocast.

        Products are in the model's ``precision``, whatever is outside.

        Example:
            >>> VAEBM(source, lambda x: x.sum(1))(torch.ones(4, 3))
            tensor([3., 3., 3., 3.])
        """
        with at_precision(x.device.type, self.precision):
            energy: Tensor = at_least_float32(self.energy(at_least_float32(x)))
        if energy.shape != x.shape[:1]:
            raise ValueError(
                f"The energy must map x of shape {tuple(x.shape)} to shape ({len(x)},); "
                f"got {tuple(energy.shape)}."
            )
        return energy

    @torch.no_grad()
    def sample(
        self,
        batch_size: int,
        *,
        sampler: Sampler | None = None,
        condition: Any = None,  # noqa: ANN401
        **options: Any,  # noqa: ANN401
    ) -> Chains:
        """Draws from the VAE, or from NCP, and moves the draws by Langevin dynamics.

        Arguments:
            batch_size: B, the number of chains.
            sampler: How the chains' starts are drawn from an NCP prior, such as ``partial(sir,
                num_proposals=100)``; ``None`` starts from the base.
            condition: What the source needs when there is no x, or ``None``.
            options: ``num_steps``, ``step_size`` and ``adjusted``, see :meth:`walk_on`.

        Returns:
            The chains.

        Raises:
            FloatingPointError: If the energy, log r or a gradient is not finite on the way.
            ValueError: If a sampler is given and there are no heads.

        Example:
            >>> chains = VAEBM(prior, lambda x: x.square().sum(1)).sample(8, num_steps=4)
            >>> chains.x.shape, chains.latents[0].shape, chains.noise[1].shape
            (torch.Size([8, 3]), torch.Size([8, 2]), torch.Size([8, 3]))
        """
        noise = self.draw_noise(batch_size, sampler=sampler, condition=condition)
        return self.walk_on(noise, condition=condition, **options)

    @torch.no_grad()
    def draw_noise(
        self,
        batch_size: int,
        *,
        sampler: Sampler | None = None,
        condition: Any = None,  # noqa: ANN401
    ) -> tuple[Tensor, ...]:
        """Draws where chains start; the arguments are those of :meth:`sample`.

        Example:
            >>> [tuple(part.shape) for part in VAEBM(source, lambda x: x.sum(1)).draw_noise(5)]
            [(5, 2), (5, 3)]
        """
        if sampler is not None and self.prior is None:
            raise ValueError("A sampler draws from ratio heads; this VAEBM has none.")
        return self._walk(condition).draw(batch_size, sampler).noise

    @torch.no_grad()
    def walk_on(
        self,
        noise: Sequence[Tensor],
        *,
        num_steps: int | None = None,
        step_size: float | None = None,
        adjusted: bool = False,
        condition: Any = None,  # noqa: ANN401
    ) -> Chains:
        """Moves chains on from given noise: one step is ε ← ε + ½λ ∇log π(ε) + √λ N(0, I).

        Arguments:
            noise: Where the chains stand, as :class:`Chains` has it.
            num_steps: Number of steps; ``None`` takes the model's.
            step_size: λ; ``None`` takes the model's.
            adjusted: Whether to correct each step after Metropolis and Hastings (MALA).
            condition: What the source needs when there is no x, or ``None``.

        Returns:
            The chains.

        Raises:
            FloatingPointError: If the energy, log r or a gradient is not finite on the way.

        Example:
            >>> model = VAEBM(source, lambda x: x.square().sum(1))
            >>> model.walk_on(model.draw_noise(4), adjusted=True).acceptance.shape
            torch.Size([4])
        """
        walk, precise = self._walk(condition, self.precision), self._walk(condition)
        shapes = [part.shape for part in noise]
        u = torch.cat([part.reshape(len(part), -1) for part in noise], dim=1)

        def log_weight(u: Tensor) -> Tensor:
            walked = walk(_parts(u, shapes))
            energy: Tensor = self(walked.x)
            return walked.log_weight - energy

        draw = langevin(
            Independent(Normal(torch.zeros_like(u), 1.0, validate_args=False), 1),
            log_weight,
            num_steps=self.num_steps if num_steps is None else num_steps,
            step_size=self.step_size if step_size is None else step_size,
            adjusted=adjusted,
            init=u,
        )
        end = precise(_parts(draw.z, shapes))
        return Chains(end.x, end.mean, end.latents, end.noise, draw.acceptance)

    def save_pretrained(self, directory: str | os.PathLike[str], **card: Any) -> None:  # noqa: ANN401
        """Saves the energy and nothing else.

        Arguments:
            directory: Where to; made if missing.
            card: ``base_model`` and ``card_data``, see :func:`ncprior.vaebm.save_pretrained`.

        Example:
            >>> import tempfile
            >>> from ncprior.heads import MLPHead
            >>> VAEBM(source, MLPHead((3,))).save_pretrained(tempfile.mkdtemp())
        """
        from ncprior.vaebm import saved as energy_hub

        energy_hub.save_pretrained(self, directory, **card)

    @classmethod
    def from_pretrained(
        cls,
        prior: NCPrior | LatentSource[Any, Any],
        path_or_repo: str | os.PathLike[str],
        **options: Any,  # noqa: ANN401
    ) -> VAEBM:
        """Puts a saved energy on the VAE, or the NCP prior, that it was trained on.

        Arguments:
            prior: The VAE or the NCP prior, set up as it was in training.
            path_or_repo: A directory of :meth:`save_pretrained`, or a Hugging Face Hub repository.
            options: ``revision``, ``energy`` and ``check_fingerprint``, see
                :func:`ncprior.vaebm.from_pretrained`.

        Returns:
            The model, in evaluation mode.

        Raises:
            FileNotFoundError: If there is no such directory or repository.
            ValueError: If the file is damaged, or does not fit.

        Example:
            >>> import tempfile
            >>> from ncprior.heads import MLPHead
            >>> directory = tempfile.mkdtemp()
            >>> VAEBM(source, MLPHead((3,))).save_pretrained(directory)
            >>> VAEBM.from_pretrained(source, directory).langevin_target
            'exact'
        """
        from ncprior.vaebm import saved as energy_hub

        return energy_hub.from_pretrained(prior, path_or_repo, **options)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:  # noqa: ANN401
        """Saves to the Hugging Face Hub what :meth:`save_pretrained` writes, as one commit.

        Arguments:
            repo_id: The repository, such as ``"user/my-energy"``; made if missing.
            options: See :func:`ncprior.vaebm.push_to_hub`.

        Returns:
            The URL of the commit.

        Example:
            >>> model.push_to_hub("user/my-energy", private=True)  # doctest: +SKIP
            'https://huggingface.co/user/my-energy/commit/0f3c...'
        """
        from ncprior.vaebm import saved as energy_hub

        return energy_hub.push_to_hub(self, repo_id, **options)

    def extra_repr(self) -> str:
        """Tells what ``print(model)`` shows besides the energy."""
        of = "" if self.prior is None else f"{len(self.prior.heads)} ratio heads on "
        noisy = gaussian_decoder_of(self.source)
        name = type(self.source).__name__ if noisy is None else repr(noisy)
        on_data = f"; noise on data: σ = {self.data_noise:g}" if self.data_noise else ""
        return (
            f"{of}{name}, {self.num_steps} steps of {self.step_size:g}, "
            f"{self.langevin_target}; decoder noise: {self.decoder_noise}{on_data}"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> VAEBM:
        """Copies the energy and shares VAE and heads."""
        from copy import copy, deepcopy

        other = copy(self)
        other._modules = {name: deepcopy(m, memo) for name, m in self._modules.items()}
        return other

    def _walk(self, condition: Any, precision: torch.dtype = torch.float32) -> NoiseMap:  # noqa: ANN401
        official = self.langevin_target == "official"
        return NoiseMap(self.source, self.prior, condition, official, precision)

    @torch.no_grad()
    def _probe(self) -> str:
        """Tells the decoder's noise from one walk, which refuses what cannot be walked in."""
        require_eval(self.source, self.source.module)
        device = device_of(self.source)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            try:
                self.source.start(1)
            except ValueError:
                return "that of p(x | z), under a condition"
            walked = NoiseMap(self.source).draw(1)
        if len(walked.noise) > self.source.num_groups:
            return "location and scale of p(x | z)"
        return "none, as p(x | z) is not normal: x is its mean"


def _parts(u: Tensor, shapes: Sequence[Size]) -> tuple[Tensor, ...]:
    """Splits flat noise, ``(B, D)``, into that of groups and decoder."""
    flat = u.split([math.prod(shape[1:]) for shape in shapes], dim=1)
    return tuple(part.reshape(shape) for part, shape in zip(flat, shapes, strict=True))
