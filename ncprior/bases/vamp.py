r"""VampPrior of a pretrained VAE: the mixture of its posteriors at learnt pseudo-inputs.

.. math::
    p(z) = \frac{1}{K} \sum_k q(z | u_k)

The best prior of a VAE is its aggregate posterior: this mixture over all training data. A
VampPrior approximates it with K pseudo-inputs u_k. They start at training data and are optimised
through the frozen encoder, to maximise E_q[log p(z)].

References:
    | VAE with a VampPrior (Tomczak & Welling, AISTATS 2018) https://arxiv.org/abs/1705.07120
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Size, Tensor

from ncprior.bases.checks import require_fit
from ncprior.bases.latents import latents_of
from ncprior.bases.mixture import GaussianMixture
from ncprior.data.parts import with_held_out
from ncprior.data.stream import Stream
from ncprior.distributions import parameters
from ncprior.source import LatentSource, device_of, num_rows, posterior_of, require_source
from ncprior.utils.batches import to_device
from ncprior.utils.optimise import minimise
from ncprior.utils.require import (
    require_counts,
    require_finite,
    require_numbers,
)

_ROWS = 4096  # latents per batch of the density


def fit_vamp(
    source: LatentSource[Any, Any],
    data: Any,  # noqa: ANN401
    num_components: int = 500,
    *,
    held_out: Any = None,  # noqa: ANN401
    bounds: tuple[float, float] | None = None,
    steps: int = 2000,
    batch_size: int = 256,
    learning_rate: float = 1e-2,
    patience: int | None = 10,
    progress: bool = True,
) -> GaussianMixture:
    """VampPrior: the mixture of a VAE's posteriors q(z | u_k) at learnt pseudo-inputs u_k.

    Gradients flow through the encoder to the pseudo-inputs alone; the VAE does not change. Each
    step encodes one batch and all pseudo-inputs. The pseudo-inputs with the highest mean of log
    p(z) over held-out data are kept.

    Arguments:
        source: The VAE, with one group of latents, no condition, and Gaussian posteriors.
        data: A tensor or map-style dataset of x; or a ``DataLoader`` or list of batches, which
            needs ``held_out``. If a batch is a tuple such as (image, label), x is the first item.
        num_components: K, the number of pseudo-inputs.
        held_out: Data of the same kind for early stopping; by default 5 % of the data.
        bounds: Least and largest value of pseudo-inputs. ``None`` takes 0 and 1 if all training
            data at which they start lie between, else no bounds.
        steps: Number of optimizer steps; with 0, the pseudo-inputs are random rows of the data.
        batch_size: Rows per batch, where batches are made here.
        learning_rate: The first learning rate, in standard deviations of x.
        patience: Held-out losses, one every 100 steps, without progress before it stops;
            ``None`` never stops early.
        progress: Whether to show a progress bar.

    Returns:
        The mixture, with equal weights and diagonal covariances, without the pseudo-inputs.

    Raises:
        FloatingPointError: If the held-out mean of log p(z) is not finite.
        RuntimeError: Inside ``torch.inference_mode``.
        TypeError: If the posterior is not a diagonal Gaussian, x is not a floating-point tensor,
            or another argument has the wrong type.
        ValueError: If an argument is out of range, the source has several groups or a condition,
            the encoder blocks gradients, data are not finite, or there are fewer rows of data than
            pseudo-inputs.

    References:
        Tomczak & Welling (2018), equation 9.

    Example:
        >>> base = fit_vamp(source, torch.randn(100, 3), 5, steps=20, progress=False)
        >>> base.loc.shape, base.is_full
        (torch.Size([5, 2]), False)
    """
    require_source(source)
    require_counts(num_components=num_components)
    _check_bounds(bounds)
    require_fit(
        "fit_vamp",
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        patience=patience,
        progress=progress,
    )
    train, held_out = with_held_out("A VampPrior", data, held_out)
    fixed, stream = latents_of(source, held_out), Stream(train, int(batch_size))
    _gaussian(source, next(stream))  # validates the VAE first
    pseudo = _PseudoInputs(source, _first_rows(train, int(num_components)), bounds)
    minimise(
        lambda: pseudo.loss(latents_of(source, [next(stream)])),
        lambda: pseudo.loss(fixed),
        [pseudo.u],
        steps=steps,
        learning_rate=learning_rate * pseudo.spread,
        patience=patience,
        project=pseudo.project,
        name="VampPrior",
        progress=progress,
    )
    with torch.no_grad():
        learnt = pseudo.mixture()
    tensors = {name: t.detach().clone() for name, t in learnt.tensors().items()}
    return GaussianMixture.rebuild(tensors, learnt.config())


class _PseudoInputs:
    """The pseudo-inputs u, with the mixture of their posteriors."""

    def __init__(
        self, source: LatentSource[Any, Any], rows: Tensor, bounds: tuple[float, float] | None
    ) -> None:
        self.source = source
        self.u = rows.to(device_of(source), copy=True).requires_grad_()
        if bounds is None:
            inside = bool(rows.amin() >= 0 and rows.amax() <= 1)
            bounds = (0.0, 1.0) if inside else (-math.inf, math.inf)
        self.bounds = bounds
        self.project()
        self.spread = rows.std(correction=0).item() or 1.0
        self._check_gradient()

    def mixture(self) -> GaussianMixture:
        loc, scale, event_shape = _gaussian(self.source, self.u)
        weights = loc.new_zeros(len(loc))
        return GaussianMixture(weights, loc.flatten(1), scale.flatten(1), event_shape=event_shape)

    def loss(self, z: Tensor) -> Tensor:
        """Mean of -log p(z), in nats."""
        p = self.mixture()
        return -torch.cat([p.log_prob(some) for some in z.split(_ROWS)]).mean()

    @torch.enable_grad()
    def _check_gradient(self) -> None:
        p = self.mixture()
        total = p.loc.sum() + p.scale.sum()
        reaches = total.requires_grad
        if reaches:
            reaches = any(
                g is not None for g in torch.autograd.grad(total, self.u, allow_unused=True)
            )
        if not reaches:
            raise ValueError(
                "The encoder blocks gradients, which a VampPrior needs with respect to its "
                "pseudo-inputs. Look for no_grad or detach in posterior(x)."
            )

    @torch.no_grad()
    def project(self) -> None:
        self.u.clamp_(*self.bounds)


def _check_bounds(bounds: Any) -> None:  # noqa: ANN401
    if bounds is None:
        return
    if not isinstance(bounds, tuple | list) or len(bounds) != 2:
        raise TypeError(f"bounds must be a pair (least, largest) or None; got {bounds!r}.")
    least, largest = bounds
    require_numbers("[-inf, inf]", least=least, largest=largest)
    if not least < largest:
        raise ValueError(f"bounds must be (least, largest), least < largest; got {bounds!r}.")


def _gaussian(source: LatentSource[Any, Any], x: Any) -> tuple[Tensor, Tensor, Size]:  # noqa: ANN401
    """Mean and standard deviation of q(z | x), and the event shape of z."""
    if source.num_groups != 1:
        raise ValueError(
            f"A VampPrior needs one group of latents; the source has {source.num_groups}. Take "
            f"another base, such as fit_mixture(latents_of(source, x, k=0)) for the first group."
        )
    encoding = source.encode(to_device(x, device_of(source)))
    group = source.group(source.start(num_rows(encoding), encoding))
    if group.context is not None:
        raise ValueError(
            "A VampPrior needs a VAE without conditions; the group of this source has a context. "
            "Fit one VampPrior per condition, to a source without it, or take another base."
        )
    q = posterior_of(group)
    tensors = (parameters(q) or {}).get("Normal")
    if tensors is None:
        raise TypeError(
            f"A VampPrior is a mixture of diagonal Gaussians, with q(z | x) an "
            f"Independent(Normal(mean, std), n); got {type(getattr(q, 'base_dist', q)).__name__}. Take another base."
        )
    return tensors["loc"], tensors["scale"], q.event_shape


def _first_rows(data: Any, count: int) -> Tensor:  # noqa: ANN401
    """Random rows of x if the data can be shuffled, else the first rows."""
    rows: list[Tensor] = []
    for batch in Stream(data, count).loader:
        x = batch[0] if isinstance(batch, tuple | list) else batch
        if not isinstance(x, Tensor) or not x.is_floating_point():
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(
                f"Pseudo-inputs are optimised like x, which must be a floating-point tensor; got "
                f"{kind}. Pass x as floats."
            )
        require_finite("x", x)
        rows.append(x)
        if sum(map(len, rows)) >= count:
            return torch.cat(rows)[:count].detach()
    raise ValueError(
        f"{count} pseudo-inputs start at as many rows of the data, which has only "
        f"{sum(map(len, rows))}. Pass a smaller num_components or more data."
    )
