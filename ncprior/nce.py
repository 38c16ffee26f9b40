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

With K groups there are K such problems, each under the same z_<k ~ q(z_<k):
log r_k(z_k | z_<k) = log q(z_k | z_<k) - log p(z_k | z_<k).

References:
    | Noise-contrastive estimation (Gutmann et al., 2010)
    | A Contrastive Learning Approach for Training Variational Autoencoder Priors
    | (Aneja et al., NeurIPS 2021), equations 3 and 4
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
