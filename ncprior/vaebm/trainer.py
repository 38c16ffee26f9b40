r"""Training of VAEBM's energy: one step of contrastive maximum likelihood.

With p_E(x) ∝ p(x)·e^(-E(x)), p the VAE or NCP, the gradient of the likelihood is

.. math::
    - \nabla_\theta \, E_{p_{data}} [\log p_E(x)]
        = E_{p_{data}} [\nabla_\theta E(x)] - E_{p_E} [\nabla_\theta E(x)],

whose second mean is taken over the ends of short Langevin chains. Chains start from the VAE, from
NCP's own sampler, or from the ends of earlier chains. The energy is learnt together with the
chains: if the chains are too short to forget their start, the energy is steeper than
log p / p_data.

References:
    | VAEBM: A Symbiosis between Variational Autoencoders and Energy-based Models
    | (Xiao, Kreis, Kautz & Vahdat, ICLR 2021)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, NoReturn, get_args

import torch
from torch import Tensor

from ncprior.samplers.base import Sampler
from ncprior.samplers.target import Target
from ncprior.utils.distributed import average_over_ranks, fail_together, warn_of_equal_noise
from ncprior.utils.gradients import (
    check_parameters,
    reduce_and_clip,
    share_weights,
    zero_gradients,
)
from ncprior.utils.require import (
    described,
    require_callable,
    require_choice,
    require_instance,
    require_numbers,
)
from ncprior.utils.visible import require_eval
from ncprior.vaebm.gaussian_decoder import require_range
from ncprior.vaebm.model import VAEBM, Chains, run_unread
from ncprior.vaebm.replay import ReplayBuffer
from ncprior.vaebm.spectral import SpectralPenalty

Contrast = Literal["x", "mean"]


class EnergyMetrics(NamedTuple):
    """Metrics of one step, each a scalar.

    Attributes:
        gap: Mean E of the data minus mean E of the chains, in nats; about 0 if the chains follow
            the energy.
        energy: Mean E of the data, in nats.
        spectral: Sum of the largest singular values of all weights.
        grad_norm: Norm of the gradient before clipping.
    """

    gap: Tensor
    energy: Tensor
    spectral: Tensor
    grad_norm: Tensor


class VAEBMTrainer:
    """Single steps of energy training, for a loop of your own.

    The model's ``data_noise`` is added to the data, drawn anew in every step.

    When a process group exists, the energies start from rank 0's weights and their gradients are
    averaged over the ranks.

    Arguments:
        model: The model whose energy is trained; chains have its number of steps and its λ.
        optimizer: An optimizer of the energy's parameters.
        backward: Back-propagates a loss.
        sampler: Sampler of the NCP prior for the start of the chains; ``None`` takes the prior's
            own, and without one the base.
        contrast: Output of a chain that is contrasted with data: ``"x"``, with the noise of the
            decoder, or ``"mean"``, as in the published code on all data sets but CIFAR-10.
        buffer: Replay buffer of chains; ``None`` starts new chains at every step.
        spectral_weight: Weight of the spectral regularisation. The published code has 0.2, for
            larger networks; a weight that is too large for a small gap keeps a new network flat.
        max_grad_norm: Largest norm of the gradient; ``None`` does not clip.
        condition: Returns the chains' condition for a batch, if the source needs one.

    Raises:
        ValueError: If the optimizer holds parameters that are not the energy's, all parameters are
            frozen, an argument is out of range, or the options exclude each other. The message
            names the remedy.
        TypeError: If an argument has the wrong type, or the energy is no module with parameters.

    Example:
        >>> from ncprior.heads import MLPHead
        >>> model = VAEBM(source, MLPHead((3,)), num_steps=4)
        >>> trainer = VAEBMTrainer(model, torch.optim.Adam(model.parameters(), lr=1e-3))
        >>> for _ in range(3):
        ...     metrics = trainer.step(x)
        >>> metrics.gap.shape, trainer.steps
        (torch.Size([]), 3)
    """

    def __init__(
        self,
        model: VAEBM,
        optimizer: torch.optim.Optimizer,
        *,
        backward: Callable[[Tensor], Any] = Tensor.backward,
        sampler: Sampler | None = None,
        contrast: Contrast = "x",
        buffer: ReplayBuffer | None = None,
        spectral_weight: float = 0.002,
        max_grad_norm: float | None = 5.0,
        condition: Callable[[Any], Any] | None = None,
    ) -> None:
        require_trainable(model)
        require_instance(
            "optimizer", optimizer, torch.optim.Optimizer, "Pass torch.optim.Adam(…)."
        )
        require_callable("backward", backward, "Pass a function of the loss, or leave it out.")
        require_choice("contrast", contrast, get_args(Contrast))
        require_numbers("[0, inf)", spectral_weight=spectral_weight)
        require_numbers("(0, inf] or None", max_grad_norm=max_grad_norm)
        if buffer is not None:
            require_instance("buffer", buffer, ReplayBuffer, "Pass a ReplayBuffer, or None.")
        if condition is not None:
            require_callable("condition", condition, "Pass a function of a batch, or None.")
        sampler = model.start_sampler(sampler)
        if model.data_noise and contrast == "mean":
            raise ValueError(
                f"Means have no noise, and data of this model have σ = {model.data_noise:g}. Pass "
                f'contrast="x", or a model without data_noise.'
            )
        if condition is not None and buffer is not None:
            raise ValueError(
                "A replay buffer keeps chains without their conditions; got both a buffer and a "
                "condition. Leave out one of the two."
            )
        check_parameters(optimizer, model, "the energy's", "model.parameters()")
        self.model, self.optimizer, self.backward = model, optimizer, backward
        self.sampler, self.contrast, self.buffer = sampler, contrast, buffer
        self.spectral_weight, self.condition = spectral_weight, condition
        self.max_grad_norm = math.inf if max_grad_norm is None else max_grad_norm
        self.steps = 0
        share_weights(model)
        self.penalty = SpectralPenalty(model.energy)

    @torch.inference_mode(False)
    @torch.enable_grad()
    def step(self, x: Any) -> EnergyMetrics:  # noqa: ANN401
        """Takes one optimizer step on one batch, also under ``no_grad`` or ``inference_mode``.

        Arguments:
            x: One batch, as the user's loader yields it, with images ``(B, ...)``. If it is a
                tuple such as (image, label) or a mapping, the images are its first item.

        Returns:
            Energies in nats and gradient norm, averaged over the ranks.

        Raises:
            FloatingPointError: If a chain, the loss or a gradient is not finite. The energy and
                the buffer are then as they were before the step. Use a lower learning rate.
            ValueError: If data and chains have different shapes. Pass images as the VAE decodes
                them. Also if the energy has no gradient with respect to its parameters.
            TypeError: If the batch has no tensor of images.

        Example:
            >>> from ncprior.heads import MLPHead
            >>> model = VAEBM(source, MLPHead((3,)))
            >>> trainer = VAEBMTrainer(model, torch.optim.Adam(model.parameters()))
            >>> trainer.step(x).gap.item()  # a new net's energy is 0
            0.0
        """
        if self.steps == 0:
            warn_of_equal_noise(stacklevel=3)
        data, (chains, target, end) = self.model.source.observed(x), self._run(x)
        drawn = chains.x if self.contrast == "x" else chains.mean
        if data.shape != drawn.shape:
            raise ValueError(
                f"Data and images decoded by the VAE must have one shape; got "
                f"{tuple(data.shape)} and {tuple(drawn.shape)}. Pass images as the VAE decodes "
                f"them."
            )
        require_range(data, chains.mean)
        data = data.to(drawn)
        if self.model.data_noise:
            data = data + self.model.data_noise * torch.randn_like(data)
        zero_gradients(self.model)
        energy, energy_drawn = self.model(torch.cat([data, drawn])).chunk(2)
        if not energy.requires_grad:
            raise ValueError(
                "The energy has no gradient with respect to its parameters, and would learn nothing. "
                "Remove torch.no_grad, torch.inference_mode or detach() in the energy."
            )
        gap, spectral = energy.mean() - energy_drawn.mean(), self.penalty()
        self.backward(gap + self.spectral_weight * spectral)
        bad = target.first_bad_step(end) <= target.calls
        measured = [gap.detach(), energy.detach().mean(), spectral.detach()]
        measured.append(torch.where(bad, math.nan, 0.0).to(gap.dtype))
        norm = reduce_and_clip(self.model, self.max_grad_norm, rows=len(data))
        gap, mean, spectral, bad = average_over_ranks(torch.stack(measured), len(data))
        metrics = EnergyMetrics(gap, mean, spectral, norm)
        if not torch.isfinite(torch.stack([m.to(gap) for m in (*metrics, bad)])).all():
            self.optimizer.zero_grad()
            _fail_for_chains(target, end)
            self._raise_not_finite(metrics, data)
        self.optimizer.step()
        self.steps += 1
        if self.buffer is not None:
            self.buffer.push(chains.noise)
        return metrics

    @torch.no_grad()
    def chains(self, x: Any) -> Chains:  # noqa: ANN401
        """Draws the chains that a batch is contrasted with.

        Arguments:
            x: One batch, as for :meth:`step`.

        Returns:
            As many chains as the batch has rows, B.

        Raises:
            FloatingPointError: If the energy, log r or a gradient is not finite.
            ValueError: If the VAE is in training mode. Call ``eval()`` on it.

        Example:
            >>> from ncprior.heads import MLPHead
            >>> model = VAEBM(source, MLPHead((3,)))
            >>> trainer = VAEBMTrainer(model, torch.optim.Adam(model.parameters()))
            >>> trainer.chains(x).x.shape
            torch.Size([4, 3])
        """
        chains, target, end = self._run(x)
        target.raise_if_bad(int(target.first_bad_step(end)))
        return chains

    @torch.no_grad()
    def _run(self, x: Any) -> tuple[Chains, Target, Tensor]:  # noqa: ANN401
        """Chains of a batch, with their target and its last point, not read yet."""
        source = self.model.source
        require_eval(source, source.module)
        rows = len(source.observed(x))
        condition = None if self.condition is None else self.condition(x)
        noise = self.model.draw_noise(rows, sampler=self.sampler, condition=condition)
        if self.buffer is not None:
            noise = self.buffer.mix(noise)
        return run_unread(self.model, noise, condition=condition)

    def _raise_not_finite(self, metrics: EnergyMetrics, data: Tensor) -> NoReturn:
        bad = int((~torch.isfinite(data)).flatten(1).any(1).sum())
        remedy = "Take a lower learning rate."
        if bad:
            remedy = f"x has NaN or infinity in {bad} of {len(data)} rows; remove or mend them."
        raise FloatingPointError(
            f"The energy gap is {metrics.gap.item():.4g} with a gradient norm of "
            f"{metrics.grad_norm.item():.4g} at step {self.steps}. The energy is as it was "
            f"before this step. {remedy}"
        )


def _fail_for_chains(target: Target, end: Tensor) -> None:
    """Raises an error on all ranks if chains of one of them are not finite."""
    failure = None
    try:
        target.raise_if_bad(int(target.first_bad_step(end)))
    except FloatingPointError as error:
        failure = error
    fail_together(failure)


def require_trainable(model: Any) -> None:  # noqa: ANN401
    """Validates that a model's energy can be trained.

    Raises:
        TypeError: If the model is no :class:`VAEBM`, or its energy is no module with parameters.
        ValueError: If all parameters are frozen, or were made under ``torch.inference_mode``.
    """
    require_instance("model", model, VAEBM, "Pass VAEBM(source, energy).")
    parameters = list(model.parameters())
    if not parameters:
        raise TypeError(
            f"Only a network can be trained; got an energy without parameters, "
            f"{described(model.energy)}. Pass an nn.Module with parameters."
        )
    if not any(p.requires_grad for p in parameters) or any(p.is_inference() for p in parameters):
        raise ValueError(
            "The energy's parameters must be trainable; got frozen ones, or some that were made under "
            "torch.inference_mode. Call energy.requires_grad_(True), or make the energy outside."
        )
