"""Settings of energy training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from ncprior.training.settings import OptimizerSettings
from ncprior.utils.require import require_choice, require_counts, require_numbers
from ncprior.vaebm.trainer import Contrast


@dataclass(frozen=True, kw_only=True)
class EnergySettings(OptimizerSettings):
    """The rarely used settings of :func:`fit_vaebm`; immutable.

    Arguments:
        weight_decay: L2 penalty of Adam.
        max_grad_norm: Largest norm of the gradient; ``None`` does not clip.
        ema_decay: Decay per step of the weights' moving average, reached after a warm-up.
        contrast: ``"x"`` or ``"mean"``, see :class:`VAEBMTrainer`.
        buffer_size: Number of chains kept in the replay buffer; 0 starts new chains at every step.
        replay_fraction: Probability that a new chain continues a kept one.
        spectral_weight: Weight of the spectral regularisation.
        max_gap: Largest absolute energy gap of a row, in nats; with a larger one, training has
            diverged.

    Raises:
        ValueError: If a number is out of range. The message names it and its range.
        TypeError: If a number has the wrong type.

    Example:
        >>> from ncprior.heads import MLPHead
        >>> from ncprior.vaebm import VAEBM, fit_vaebm
        >>> model, settings = VAEBM(source, MLPHead((3,))), EnergySettings(buffer_size=100)
        >>> x = torch.randn(100, 3)
        >>> fit_vaebm(model, x, steps=3, settings=settings, progress=False).stopped
        'all 3 steps taken'
    """

    weight_decay: float = 3e-5
    ema_decay: float = 0.99
    contrast: Contrast = "x"
    buffer_size: int = 0
    replay_fraction: float = 0.6
    spectral_weight: float = 0.002
    max_gap: float = 100.0

    def __post_init__(self) -> None:
        """Validates the numbers."""
        super().__post_init__()
        require_choice("contrast", self.contrast, get_args(Contrast))
        require_counts("[0, inf)", buffer_size=self.buffer_size)
        require_numbers("[0, 1]", replay_fraction=self.replay_fraction)
        require_numbers("[0, inf)", spectral_weight=self.spectral_weight)
        require_numbers("(0, inf]", max_gap=self.max_gap)
