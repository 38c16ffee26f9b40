"""Gaussian mixtures fitted to latents by expectation-maximisation (EM), held to held-out rows."""

from __future__ import annotations

import math
import warnings

import torch
from numpy.typing import ArrayLike
from torch import Size, Tensor

from ncprior.bases.em import Components
from ncprior.bases.independent import looks_independent
from ncprior.bases.mixture import GaussianMixture
from ncprior.bases.mixture_fit import Fit, MixtureFit
from ncprior.utils.optimise import standardise
from ncprior.utils.require import (
    mask_of,
    real_tensor,
    require_choice,
    require_counts,
    require_numbers,
)
from ncprior.utils.supports import shown_by

COVARIANCES = ("full", "diagonal")

_STANDARD = 15.0  # of a χ² with 2 degrees of freedom: above, a latent is not N(0, 1)

_LEAST = 1e-6  # variance

_MOST_NUMBERS = 2**26  # of all covariances: 0.5 GB in float64, of which a few are needed

_WORSE, _ROUNDING = 3.0, 0.01  # standard errors, and nats

_FEW = 20  # held-out rows, which show nothing

_MANY_ROWS = 2000  # that show which latents are independent of the others


def fit_gaussian(
    z: Tensor | ArrayLike,
    *,
    covariance: str = "full",
    active: Tensor | ArrayLike | None = None,
    held_out: Tensor | ArrayLike | None = None,
) -> GaussianMixture:
    """Gaussian fitted to latents by its moments.

    The covariances are shrunk towards 0 as far as held-out latents become more likely.

    Arguments:
        z: Latents, with shape ``(N, *event)``, as for :func:`fit_mixture`.
        covariance: ``"full"`` or ``"diagonal"``.
        active: A mask of active latents, as for :func:`fit_mixture`.
        held_out: Latents of other rows, as for :func:`fit_mixture`.

    Returns:
        A mixture of one component.

    Raises:
        TypeError: If the latents are not floating-point numbers, or ``active`` is no mask.
        ValueError: If there are fewer than two rows, values that are not finite, or ``active`` has
            another shape.

    Example:
        >>> base = fit_gaussian(3 + torch.randn(10_000, 2))
        >>> (base.mean - 3).abs().max() < 0.1
        tensor(True)
    """
    return fit_mixture(z, 1, covariance=covariance, active=active, held_out=held_out, starts=1)


@torch.no_grad()
def fit_mixture(
    z: Tensor | ArrayLike,
    num_components: int = 10,
    *,
    covariance: str = "full",
    active: Tensor | ArrayLike | None = None,
    held_out: Tensor | ArrayLike | None = None,
    max_steps: int = 300,
    tolerance: float = 1e-4,
    regularisation: float = 1e-6,
    starts: int = 3,
) -> GaussianMixture:
    """Fits a Gaussian mixture to the active latents by expectation-maximisation, from k-means++.

    A tenth of the rows is held out, and up to a fifth of few rows. On these, starts are compared,
    the shrinkage of the covariances towards their mean is chosen, and EM is stopped; the last two
    steps are on all rows. Latents that are not active get a Gaussian of their own, independent of
    all others: N(0, 1) where the data agree with it.

    Arguments:
        z: Latents, with shape ``(N, *event)``, such as those of :func:`ncprior.bases.latents_of`:
            floating-point numbers, as a tensor, an array or a list.
        num_components: K.
        covariance: ``"full"`` or ``"diagonal"``.
        active: A mask of event shape, such as one of :func:`ncprior.bases.active_latents`: the
            latents that the mixture is fitted to. By default, those that are not independent
            Gaussians as far as the rows show; with fewer than 2,000 rows, these or all of them, as
            held-out rows prefer.
        held_out: Latents of rows that are not in ``z``, which are held out in place of a part of
            ``z``. Pass them if ``z`` has several draws of q(z|x) for each x: such draws say nothing
            about new rows.
        max_steps: Largest number of EM steps on all training rows.
        tolerance: Gain in mean log p(z), in nats per step, below which it stops.
        regularisation: Added to the variances, as a fraction of each latent's variance.
        starts: Number of random starts, run for a few steps each; the best one is continued.

    Returns:
        The mixture of all latents, in float32.

    Raises:
        TypeError: If an argument has the wrong type, or z are integers: codes of categories have
            no Gaussians.
        ValueError: If an argument is out of range, there are fewer rows than components, values
            that are not finite, or z are whole numbers, on a sphere or on a simplex.

    Warns:
        UserWarning: If held-out rows are less likely than under a single Gaussian or N(0, I).

    References:
        | Maximum Likelihood from Incomplete Data via the EM Algorithm (Dempster et al., 1977)
        | Choosing Starting Values for the EM Algorithm (Biernacki et al., 2003)
        | Bayesian Regularization for Normal Mixture Estimation (Fraley & Raftery, 2007)

    Example:
        >>> centres = torch.tensor([[-2.0, 0.0], [2.0, 0.0]])
        >>> z = centres[torch.randint(2, (2000,))] + 0.1 * torch.randn(2000, 2)
        >>> fit_mixture(z, 2).loc.sort(0).values.round()[:, 0]
        tensor([-2.,  2.])
    """
    require_choice("covariance", covariance, COVARIANCES)
    require_counts(num_components=num_components, max_steps=max_steps, starts=starts)
    require_numbers("[0, inf)", tolerance=tolerance, regularisation=regularisation)
    num_components = int(num_components)  # torch takes no others
    z = real_tensor("z", z, integers=False)
    if num_components >= len(z) or z.ndim < 2:
        raise ValueError(
            f"A mixture of {num_components} components needs z of shape (N, *event) with more "
            f"rows than components; got {tuple(z.shape)}."
        )
    _require_room(z)
    if covariance == "full" and is_too_wide(num_components, z.shape[1:]):
        raise ValueError(
            f"{num_components} full covariances of {z.shape[1:].numel()} latents each are more than "
            f'{_MOST_NUMBERS:,} numbers. Pass covariance="diagonal".'
        )
    if active is not None:
        active = mask_of("active", active, z.shape[1:])
    kept = z[:0] if held_out is None else _held_out_like(z, held_out)
    white, centre, spread = standardise(z.cpu() if z.device.type == "mps" else z)  # no float64
    whole = _Whole(num_components, white, centre, spread, is_full=covariance == "full")
    masks = _choices(active, white)
    order = torch.randperm(len(white), device=white.device) + len(kept)
    order = torch.cat([torch.arange(len(kept), device=white.device), order])
    white = torch.cat([(kept.flatten(1).to(white) - centre) / spread, white])
    fits: list[tuple[Tensor, Fit]] = []
    for latents in masks:
        fit = MixtureFit(
            white[:, latents],
            is_full=covariance == "full",
            max_steps=int(max_steps),
            tolerance=tolerance,
            regularisation=regularisation,
        ).fit(num_components, int(starts), order, len(kept))
        fits.append((latents, fit))
    if fits:
        latents, fit = max(fits, key=lambda found: _score(found[0], found[1], white))
        z_held = (white[fit.held_out].double() * spread + centre)[:, latents]
        _warn_if_worse(fit, num_components, z_held, spread[latents])
        whole.put(fit.mixture, latents)
    return whole.mixture(z.shape[1:]).to(z.device)


def _require_room(z: Tensor) -> None:
    """Validates that latents are not codes or on a surface, where a Gaussian has no draws."""
    if where := shown_by(z):
        raise ValueError(
            f"A Gaussian mixture draws from all of R^n, and z are {where}. Take a base of the same "
            f"set, such as Empirical(z), or keep the VAE's own prior."
        )


def is_too_wide(num_components: int, event_shape: Size) -> bool:
    """Returns whether full covariances of so many components and latents take too much memory."""
    return num_components * event_shape.numel() ** 2 > _MOST_NUMBERS


def _held_out_like(z: Tensor, held_out: Tensor | ArrayLike) -> Tensor:
    """Held-out latents, after a check of their type and shape."""
    kept = real_tensor("held_out", held_out, integers=False)
    if kept.shape[1:] != z.shape[1:]:
        raise ValueError(
            f"held_out must be latents of other rows, with shape (M, *event) for z of shape (N, "
            f"*event) = {tuple(z.shape)}; got {tuple(kept.shape)}."
        )
    return kept.to(z)


def _choices(active: Tensor | None, white: Tensor) -> list[Tensor]:
    """Masks of the latents that a mixture is fitted to: of few rows two, to choose from."""
    everything = torch.ones(white.shape[1], dtype=torch.bool, device=white.device)
    chosen = ~looks_independent(white) if active is None else active.flatten().to(white.device)
    masks = [chosen] if chosen.any() else []
    unsure = active is None and len(white) < _MANY_ROWS and not chosen.all()
    return [*masks, everything] if unsure else masks


def _score(latents: Tensor, fit: Fit, white: Tensor) -> float:
    """Mean log p of all held-out latents, with N(0, 1) for those that were left out."""
    rest = white[fit.held_out][:, ~latents]
    log_p = fit.log_p.sum() - 0.5 * (rest.square() + math.log(2 * math.pi)).sum()
    return log_p.item()


class _Whole:
    """The mixture of all latents: independent Gaussians, until components are put in."""

    def __init__(
        self, k: int, white: Tensor, centre: Tensor, spread: Tensor, *, is_full: bool
    ) -> None:
        self.centre, self.spread = centre.double(), spread.double()
        mean, variance = self.centre, white.double().var(0, correction=0) * self.spread.square()
        variance = torch.where(variance > 0, variance, _LEAST)  # of a constant
        far = len(white) * (variance - 1 - variance.log() + mean.square())
        standard = far < _STANDARD
        sd = torch.where(standard, 1.0, variance.sqrt())
        self.log_weight = centre.new_zeros(k, dtype=torch.float64)
        self.loc = torch.where(standard, 0.0, mean).repeat(k, 1)
        self.scale = sd.diag().repeat(k, 1, 1) if is_full else sd.repeat(k, 1)

    def put(self, mixture: Components, latents: Tensor) -> None:
        """Replaces the distribution of some latents, given as a mask."""
        spread = self.spread[latents]
        (places,) = latents.nonzero(as_tuple=True)
        self.log_weight = mixture.log_weight
        self.loc[:, places] = mixture.loc * spread + self.centre[latents]
        if self.scale.ndim == 3:
            self.scale[:, places[:, None], places] = mixture.scale * spread[:, None]
        else:
            self.scale[:, places] = mixture.scale * spread

    def mixture(self, event_shape: Size) -> GaussianMixture:
        tensors = (t.float() for t in (self.log_weight, self.loc, self.scale))
        return GaussianMixture(*tensors, event_shape=event_shape)


def _warn_if_worse(fit: Fit, k: int, z: Tensor, spread: Tensor) -> None:
    """Warns if held-out z are less likely than under a single Gaussian, or N(0, I)."""
    if len(z) < _FEW:
        return
    shift = spread.double().log().sum()
    standard = -0.5 * (z.square() + math.log(2 * math.pi)).sum(1) + shift
    others = {"a single Gaussian": fit.gaussian_log_p, "N(0, I)": standard}
    for name, log_p in others.items():
        gain = fit.log_p - log_p
        error = gain.std().item() / len(gain) ** 0.5
        if gain.mean().item() + _WORSE * error < -_ROUNDING:
            here, there = ((t.mean() - shift).item() for t in (fit.log_p, log_p))
            warnings.warn(
                f"The mixture of {k} does not generalise: held-out latents have mean log p(z) "
                f"{here:.2f} nats, and {there:.2f} under {name}. Take fewer components or more "
                f"data, or pass active=, see active_latents.",
                stacklevel=4,
            )
            return
