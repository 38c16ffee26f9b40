r"""Noise contrastive estimation of the ratio between a posterior and a prior.

A classifier D(z) separates z ~ q(z) (label 1) from noise z ~ p(z) (label 0), whose term has
weight ν. It minimises

.. math::
    \mathcal{L}(D) = - E_{q(z)} [\log D(z)] - \nu E_{p(z)} [\log (1 - D(z))],

whose integrand -q log D - ν p log(1 - D) has its minimum over D, for every z, at

.. math::
    D^*(z) = \frac{q(z)}{q(z) + \nu p(z)} = \sigma(\log r(z) - \log \nu),
    \qquad r(z) = \frac{q(z)}{p(z)}.

A head therefore returns log r itself, and D = σ(log r - log ν) is never formed: with
-log σ(a) = softplus(-a), both terms are softplus functions of the logit, finite for any log r.
At ν = 1 the minimum of the loss is L* = 2 log 2 - 2 JSD(q, p), so that JSD = log 2 - L*/2 nats.
The minimiser is the same for every ν. As ν grows, the gradient tends to that of maximum likelihood
for r·p, which gives more weight to regions where r is large.

*The score term.* More is known of a posterior sample than its label. For every x that may have led
to z, the gradient of log q(z | x) with respect to z is known, and its mean given z is that of log q:

.. math::
    \nabla \log q(z) = E_{q(x | z)} [\nabla \log q(z | x)].

The gradient of log r is therefore a regression function, and :func:`score_loss` is its squared error,

.. math::
    \mathcal{S}(r) = E_{q(x, z)} \Big[ \frac{1}{d} \sum_j w_j
    \Big( \partial_j \log r(z) - \partial_j \log \frac{q(z | x)}{p(z)} \Big)^2 \Big],
    \qquad w_j^{-1} = E [(\partial_j \log q(z | x))^2].

It has the same minimiser as the NCE loss, apart from a constant that the NCE loss finds, and it
does not vanish where the classifier is already sure, as in wide gaps.

With K groups there are K such problems, each under the same z_<k ~ q(z_<k):
log r_k(z_k | z_<k) = log q(z_k | z_<k) - log p(z_k | z_<k).

References:
    | Noise-contrastive estimation (Gutmann et al., 2010)
    | A Contrastive Learning Approach for Training Variational Autoencoder Priors
    | (Aneja et al., NeurIPS 2021), equations 3 and 4
    | A Connection between Score Matching and Denoising Autoencoders (Vincent, 2011)
    | Classification Diffusion Models (Yadin et al., NeurIPS 2024), which join both kinds of loss
"""

import math

from torch import Tensor
from torch.nn.functional import softplus

from ncprior.utils.require import described, require_instance, require_numbers


def nce_loss(log_r_posterior: Tensor, log_r_prior: Tensor, noise_weight: float = 1.0) -> Tensor:
    """NCE loss E_q[softplus(-(log r - log ν))] + ν E_p[softplus(log r - log ν)].

    Arguments:
        log_r_posterior: log r(z) in nats at z ~ q(z), of any shape.
        log_r_prior: log r(z) in nats at z ~ p(z), of any shape.
        noise_weight: ν > 0, the weight of the noise; 1 is plain NCE.

    Returns:
        The loss in nats, a scalar.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If ν is not positive and finite, or there are no draws.

    References:
        Aneja et al. (2021), equation 3, at ν = 1.

    Example:
        >>> import torch
        >>> nce_loss(torch.zeros(8), torch.zeros(8))  # r = 1: 2 log 2
        tensor(1.3863)
    """
    loss_q, loss_p = nce_terms(log_r_posterior, log_r_prior, noise_weight)
    return loss_q.mean() + loss_p.mean()


def nce_terms(
    log_r_posterior: Tensor, log_r_prior: Tensor, noise_weight: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The two terms of the NCE loss, one value per draw; :func:`nce_loss` adds their means.

    Arguments:
        log_r_posterior: log r(z) in nats at z ~ q(z), of any shape.
        log_r_prior: log r(z) in nats at z ~ p(z), of any shape.
        noise_weight: ν > 0.

    Returns:
        softplus(-(log r - log ν)) and ν softplus(log r - log ν) in nats, with the shapes of
        log r.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If ν is not positive and finite, or there are no draws.

    Example:
        >>> import torch
        >>> nce_terms(torch.zeros(2), torch.zeros(1))
        (tensor([0.6931, 0.6931]), tensor([0.6931]))
    """
    require_numbers("(0, inf)", noise_weight=noise_weight)
    for name, log_r in (("log_r_posterior", log_r_posterior), ("log_r_prior", log_r_prior)):
        require_instance(name, log_r, Tensor, "Pass log r(z) in nats as a tensor of floats.")
        if not log_r.is_floating_point() or log_r.numel() == 0:
            raise ValueError(
                f"{name} must be a tensor of floats with 1 or more draws; got {described(log_r)}."
            )
    log_nu = math.log(noise_weight)
    loss_q = softplus(-(log_r_posterior - log_nu))
    return loss_q, noise_weight * softplus(log_r_prior - log_nu)


def score_loss(slope: Tensor, posterior_score: Tensor, prior_score: Tensor) -> Tensor:
    """Score term: squared error of ∇ log r(z) as an estimate of ∇ log q(z | x) - ∇ log p(z).

    Arguments:
        slope: ∇ log r(z) at z ~ q(z | x), with shape ``(S, B, *event)``: S draws for each of B rows.
        posterior_score: ∇ log q(z | x), of the same shape.
        prior_score: ∇ log p(z), of the same shape.

    Returns:
        The mean over draws and latents, a scalar without unit. It is 1 where slope and ∇ log p
        are 0, as every latent is divided by the variance of its score.

    Raises:
        TypeError: If an argument is no tensor of floats.
        ValueError: If the shapes differ, or there are no draws.

    Example:
        >>> import torch
        >>> z = torch.randn(500, 8, 3)  # q(z | x) = N(0, 1)
        >>> score_loss(torch.zeros_like(z), -z, torch.zeros_like(z))
        tensor(1.)
    """
    gradients = {"slope": slope, "posterior_score": posterior_score, "prior_score": prior_score}
    for name, gradient in gradients.items():
        require_instance(name, gradient, Tensor, _GRADIENT)
        if not gradient.is_floating_point():
            raise TypeError(f"{name}: {_GRADIENT} Got {described(gradient)}.")
        if gradient.shape != slope.shape or gradient.ndim < 2 or gradient.numel() == 0:
            raise ValueError(
                f"{name} must have the shape (S, B, *event) of slope, with 1 or more draws; got "
                f"{described(gradient)} and {described(slope)}."
            )
    weight = posterior_score.square().mean((0, 1)).clamp(min=_TINY).reciprocal()
    return (weight * (slope - (posterior_score - prior_score)).square()).mean()


_TINY = 1e-30

_GRADIENT = "Pass a gradient in z as a tensor of floats."
