"""EM as matrix products: the density, the M-step and its shrinkage, and k-means."""

from functools import partial

import pytest
import torch
from torch.distributions import MultivariateNormal

from ncprior.bases.em import Components, Rows, kmeans
from ncprior.bases.mixture_fit import MixtureFit


def some(k: int = 3, d: int = 4) -> Components:
    factor = 0.3 * torch.randn(k, d, d, dtype=torch.float64).tril()
    factor.diagonal(dim1=1, dim2=2).exp_()
    weights = torch.randn(k, dtype=torch.float64).log_softmax(0)
    return Components(weights, torch.randn(k, d, dtype=torch.float64), factor)


def test_the_density_is_that_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    p, z = some(), torch.randn(50, 4, dtype=torch.float64)
    joint = MultivariateNormal(p.loc, scale_tril=p.scale).log_prob(z[:, None]) + p.log_weight
    rows = Rows(z, is_full=True)
    assert torch.allclose(rows.log_prob(p), joint.logsumexp(1))
    diagonal = p._replace(scale=p.scale.diagonal(dim1=1, dim2=2))
    full = p._replace(scale=diagonal.scale.diag_embed())
    for kept in (2**24, 0):
        monkeypatch.setattr("ncprior.bases.em._KEPT", kept)
        theirs = Rows(z, is_full=False)
        assert torch.allclose(theirs.log_prob(diagonal), rows.log_prob(full))
        labels = torch.arange(50) % 2
        new = theirs.maximise(theirs.hard_sums(labels, 2), 0.0, 0.0)
        assert torch.allclose(new.scale[1], z[1::2].std(0, correction=0))


@pytest.mark.parametrize("kept", [2**24, 0])
def test_the_steps_are_weighted_moments(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one component at a time, too, where statistics are not kept."""
    monkeypatch.setattr("ncprior.bases.em._KEPT", kept)
    monkeypatch.setattr("ncprior.bases.em._BLOCK", 256)
    p, z = some(), torch.randn(200, 4, dtype=torch.float64)
    joint = MultivariateNormal(p.loc, scale_tril=p.scale).log_prob(z[:, None]) + p.log_weight
    weight = joint.softmax(1)
    rows = Rows(z, is_full=True)
    sums, mean = rows.sums(p)
    new = rows.maximise(sums, 0.0, 0.0)
    close = partial(torch.allclose, rtol=1e-5, atol=1e-5 if rows.is_wide else 1e-9)
    assert rows.is_wide == (kept == 0)
    assert mean == pytest.approx(joint.logsumexp(1).mean().item())
    assert close(rows.log_prob(p), joint.logsumexp(1))
    assert close(new.log_weight.exp(), weight.mean(0))
    for j in range(3):
        exact = z.T.cov(correction=0, aweights=weight[:, j])
        assert close(new.scale[j] @ new.scale[j].T, exact)
        assert close(new.loc[j], weight[:, j] @ z / weight[:, j].sum())
    labels = torch.arange(200) % 2
    split = rows.maximise(rows.hard_sums(labels, 2), 0.0, 0.0)
    assert close(split.loc[1], z[1::2].mean(0))


def test_shrinkage_goes_to_the_mean_covariance_and_its_diagonal() -> None:
    z = torch.randn(90, 3, dtype=torch.float64) @ torch.tensor(
        [[1.0, 0.5, 0.0], [0.0, 1.0, 0.3], [0.0, 0.0, 0.7]], dtype=torch.float64
    )
    labels = torch.arange(90) % 2
    rows, nu = Rows(z, is_full=True), 30.0
    new = rows.maximise(rows.hard_sums(labels, 2), nu, 0.0)
    own = torch.stack([z[labels == j].T.cov(correction=0) for j in range(2)])
    pooled = own.mean(0)
    shared = (90 * pooled + nu * pooled.diagonal().diag()) / (90 + nu)
    assert torch.allclose(new.scale @ new.scale.mT, (45 * own + nu * shared) / (45 + nu))


def test_few_rows_are_shrunk_and_many_are_not() -> None:
    """300 rows of one Gaussian with few correlations: 10 components overfit without shrinkage."""
    z, new = torch.randn(300, 12), torch.randn(2000, 12)
    fresh = Rows(new, is_full=True)
    options = {"is_full": True, "max_steps": 100, "tolerance": 1e-4, "regularisation": 1e-6}
    order = torch.randperm(300)
    fit = MixtureFit(z, **options).fit(10, 1, order, 0)
    truth = MultivariateNormal(torch.zeros(12), torch.eye(12)).log_prob(new).mean()
    assert fresh.log_prob(fit.mixture).mean() > truth - 1.5
    rows = Rows(z, is_full=True)
    mixture = fit.mixture
    for _ in range(20):
        mixture = rows.maximise(rows.sums(mixture)[0], 0.0, 1e-6)
    assert fresh.log_prob(mixture).mean() < truth - 2.5
    assert torch.equal(fit.held_out, order[:60])


def test_k_means_finds_clusters() -> None:
    centres = 10 * torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    truth = torch.arange(300) % 3
    labels = kmeans(centres[truth] + torch.randn(300, 2), 3)
    found = {(int(a), int(b)) for a, b in zip(truth, labels, strict=True)}
    assert len(found) == 3
