"""The problems with known answers: quadratures and pretend VAEs against numbers and identities."""

import math

import numpy as np
import pytest
from helpers.exact import RARE, chi_square_p_value, standard_error
from helpers.problems import (
    Codes,
    GaussianPair,
    Ring,
)


@pytest.mark.parametrize(
    ("kl", "mean", "log_z"),
    [
        (1, (0.9087, 0.9868, 0.9985), (-0.051, -0.006, -0.001)),
        (4, (0.677, 0.852, 0.945), (-0.705, -0.228, -0.061)),
        (8, (0.521, 0.686, 0.805), (-2.347, -1.178, -0.564)),
        (12, (0.4375, 0.5833, 0.6956), (-4.443, -2.654, -1.575)),
    ],
)
def test_the_quadrature_gives_the_published_table(
    kl: float, mean: tuple[float, ...], log_z: tuple[float, ...]
) -> None:
    pair = GaussianPair(kl)
    law = pair.law
    digits = 4 if kl in (1, 12) else 3
    for m, expected_mean, expected_log_z in zip((50, 500, 5000), mean, log_z, strict=True):
        # Half a unit of the last digit, and a hundredth of that for a tie.
        assert abs(law.mean(law.nodes, m) / pair.shift - expected_mean) < 0.51 * 10**-digits
        assert abs(law.mean_log_z(m) - expected_log_z) < 0.51e-3


@pytest.mark.parametrize("problem", [GaussianPair(1), GaussianPair(12), Ring(), Codes()])
def test_the_quadrature_is_exact_where_the_answer_is_known(
    problem: GaussianPair | Ring | Codes,
) -> None:
    law = problem.law
    assert abs(law.weight @ np.exp(law.log_r) - 1) < 1e-12
    for m in (1, 3, 1000):
        assert abs(law.probabilities(m).sum() - 1) < 1e-12
    # One proposal is a draw from the base, and its log-weight is log r.
    assert np.abs(law.probabilities(1) - law.weight).max() < 1e-12
    assert abs(law.mean_log_z(1) - law.weight @ law.log_r) < 1e-9
    # L* = 2 log 2 - 2 JSD.
    loss = law.weight @ (
        np.exp(law.log_r) * np.logaddexp(0, -law.log_r) + np.logaddexp(0, law.log_r)
    )
    assert abs(loss - (2 * math.log(2) - 2 * law.jsd)) < 1e-12


@pytest.mark.parametrize("problem", [GaussianPair(1.0), Ring(), Codes()])
def test_a_pretend_vae_has_the_stated_base_and_aggregate_posterior(
    problem: GaussianPair | Ring | Codes,
) -> None:
    n, law, source = 50_000, problem.law, problem.source()
    group = source.group(source.start(n, source.encode(problem.data(n))))
    assert group.posterior is not None
    z_q, z_p = group.posterior.sample(), group.prior.sample()
    assert chi_square_p_value(problem.project(z_p), law.nodes, law.weight) > RARE
    assert (
        chi_square_p_value(problem.project(z_q), law.nodes, law.weight * np.exp(law.log_r)) > RARE
    )
    # E_q[D] + E_p[D] = 1 with D = sigmoid(log r) holds for the exact ratio, in every dimension.
    balance = problem.log_r(z_q).sigmoid() + problem.log_r(z_p).sigmoid() - 1
    assert abs(balance.mean()) < 4 * standard_error(balance)
