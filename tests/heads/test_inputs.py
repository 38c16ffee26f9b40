"""Heads that see features of z, such as the decoder's first layers."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from helpers.problems import CorrelatedPair, GaussianPair, SampleOnly
from torch import Tensor, nn
from torch.distributions import Independent, Normal
from torch.utils.checkpoint import checkpoint

from ncprior import NCETrainer, NCPrior, SingleGroup, fit, langevin, sir
from ncprior.bases.latents import latents_of
from ncprior.bases.mixture_em import fit_gaussian
from ncprior.bases.rebase import rebase
from ncprior.data.encodings import CachedEncodings
from ncprior.heads.inputs import head_input
from ncprior.heads.networks import MLPHead
from ncprior.recipe.score_term import has_scores
from ncprior.testing import check_source


class MapVAE(nn.Module):
    """Latents that a linear layer makes a feature map of."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(6, 8 * 4 * 4), nn.Unflatten(1, (8, 4, 4)))
        self.last = nn.Sequential(nn.SiLU(), nn.Flatten(), nn.Linear(128, 10))
        self.encoder = nn.Linear(10, 6)

    def decode(self, z: Tensor) -> Tensor:
        x: Tensor = self.last(self.first(z))
        return x

    def source(self, *, with_features: bool = True) -> SingleGroup:
        def posterior(x: Tensor) -> Independent:
            mean = self.encoder(x)
            return Independent(Normal(mean, torch.full_like(mean, 0.3)), 1)

        base = Independent(Normal(torch.zeros(6), 1.0), 1)
        features = self.first if with_features else None
        return SingleGroup(base, posterior, self.decode, module=self, features=features)


@pytest.fixture
def vae() -> MapVAE:
    torch.manual_seed(0)
    return MapVAE().eval()


def data(count: int = 300) -> Tensor:
    return torch.randn(count, 10) + 1


@pytest.mark.filterwarnings("ignore:Reconstructions")
def test_the_head_is_made_for_the_features_and_sees_them(vae: MapVAE) -> None:
    source = vae.source()
    prior = NCPrior.for_source(source, data(64), width=8)
    head = prior.heads[0]
    assert isinstance(head, MLPHead)
    assert head.event_shape == (8, 4, 4)
    nn.init.normal_(head.out.weight)
    z = torch.randn(5, 3, 6)
    by_hand = head(torch.stack([vae.first(row) for row in z]))
    assert torch.allclose(prior.log_r(0, z, None), by_hand, atol=1e-5)
    assert by_hand.std() > 0.01
    assert torch.equal(prior.log_ratio([z[0]])[:, 0], prior.log_r(0, z[0], None))


@pytest.mark.filterwarnings("ignore:Reconstructions")
def test_the_vae_gets_no_gradient_and_z_does(vae: MapVAE) -> None:
    prior = NCPrior.for_source(vae.source(), data(64), width=8)
    nn.init.normal_(prior.heads[0].out.weight)
    prior.nce_loss(data()).sum().backward()
    assert all(p.grad is None for p in vae.parameters())
    assert any(p.grad is not None for p in prior.parameters())
    z = torch.randn(4, 6, requires_grad=True)
    (slope,) = torch.autograd.grad(prior.log_r(0, z, None).sum(), z)
    step = 1e-3 * torch.randn_like(z)
    with torch.no_grad():
        change = prior.log_r(0, z + step, None) - prior.log_r(0, z - step, None)
    assert torch.allclose(change, 2 * (slope * step).sum(1), rtol=0.05, atol=1e-5)
    draw = prior.sample(4, partial(langevin, num_steps=3, step_size=0.1))
    assert torch.isfinite(draw.x).all()
    assert all(p.grad is None for p in vae.parameters())


def test_trained_on_features_the_ratio_is_that_of_the_latents() -> None:
    problem = GaussianPair()
    dims = problem.prior.event_shape[0]
    turn = torch.linalg.qr(torch.randn(dims, dims, generator=torch.Generator().manual_seed(1)))[0]
    plain = problem.source()
    source = SingleGroup(
        problem.prior, plain._posterior, plain._decoder, features=lambda z: 3 * z @ turn + 1
    )
    torch.manual_seed(0)
    x = problem.data(4000)
    prior = NCPrior.for_source(source, x[:256], kind=MLPHead, width=64, depth=1)
    fit(prior, x, steps=600, learning_rate=3e-3, progress=False)
    z = torch.cat([problem.prior.sample((500,)), latents_of(source, x[:500])])
    error = prior.log_r(0, z, None) - problem.log_r(z)
    assert error.square().mean().sqrt() < 0.35 * problem.log_r(z).std()


@pytest.mark.filterwarnings("ignore:Reconstructions")
def test_another_base_and_saved_heads_keep_the_features(vae: MapVAE, tmp_path: object) -> None:
    source = vae.source()
    closer = rebase(source, fit_gaussian(latents_of(source, data())))
    prior = NCPrior.for_source(closer, data(64), width=8)
    nn.init.normal_(prior.heads[0].out.weight)
    prior.save_pretrained(str(tmp_path))
    again = NCPrior.from_pretrained(closer, str(tmp_path))
    z = torch.randn(5, 6)
    assert torch.equal(again.log_r(0, z, None), prior.log_r(0, z, None))
    assert prior.sample(3, partial(sir, num_proposals=20)).x.shape == (3, 10)
    without = NCPrior.from_pretrained(
        vae.source(with_features=False), str(tmp_path), check_fingerprint=False
    )
    with pytest.raises(ValueError, match=r"takes z of shape \(\*, B, 8, 4, 4\)"):
        without.sample(2, partial(sir, num_proposals=5))


def test_features_draw_nothing_whatever_the_prior_is(vae: MapVAE) -> None:
    plain = vae.source()
    base = SampleOnly(Independent(Normal(torch.zeros(6), 1.0), 1))
    source = SingleGroup(base, plain._posterior, vae.decode, features=vae.first)
    z, before = torch.randn(3, 2, 6), torch.get_rng_state()
    assert torch.equal(source.features(0, z), plain.features(0, z))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (lambda k, z: z.mean(-1).mean(-1, keepdim=True), "leading axes"),
        (lambda k, z: z - z.mean(-2, keepdim=True), "must not depend on its company"),
        (lambda k, z: z + torch.rand(()), "draws"),
    ],
)
def test_check_source_looks_at_features(features: Any, message: str) -> None:
    source = CorrelatedPair()
    check_source(SeenPair(), source.data(8))
    wrong = SeenPair()
    object.__setattr__(wrong, "features", features)  # a frozen dataclass
    with pytest.raises(AssertionError, match=message):
        check_source(wrong, source.data(8))


def test_a_source_without_features_shows_z_itself(vae: MapVAE) -> None:
    z = torch.randn(2, 6)
    assert head_input(vae.source(with_features=False), 0, z) is z
    assert head_input(vae.source(), 0, z).shape == (2, 8, 4, 4)
    assert not head_input(vae.source(), 0, z).requires_grad


@pytest.mark.filterwarnings("ignore:Reconstructions")
def test_cached_encodings_show_the_features_too(vae: MapVAE) -> None:
    prior = NCPrior.for_source(vae.source(), data(64), width=8)
    walks = CachedEncodings(prior.source, data(8), batch_size=4, seed=0)
    z = torch.randn(2, 6)
    assert torch.equal(head_input(walks.source, 0, z), vae.first(z))


class SeenPair(CorrelatedPair):
    """Two groups, of whose latents heads see something else."""

    def features(self, k: int, z: Tensor) -> Tensor:
        return k + 2 * z


def test_walks_of_several_groups_keep_the_features() -> None:
    source = SeenPair()
    walks = CachedEncodings(source, source.data(8), batch_size=4, seed=0)
    z = torch.randn(3, 1)
    assert torch.equal(head_input(walks.source, 1, z), 1 + 2 * z)


@pytest.mark.filterwarnings("ignore:Reconstructions of a row")
@pytest.mark.parametrize("score_weight", [0.0, 10.0])
def test_the_vae_gets_no_gradients_from_training(vae: MapVAE, score_weight: float) -> None:
    source = vae.source()
    prior = NCPrior.for_source(source, data(), width=8)
    optimizer = torch.optim.AdamW(prior.parameters())
    NCETrainer(prior, optimizer, score_weight=score_weight).step(data())
    assert has_scores(prior, data())
    assert all(p.grad is None and p.requires_grad for p in vae.parameters())
    assert any(p.grad.any() for p in prior.parameters() if p.grad is not None)


@pytest.mark.filterwarnings("ignore:Reconstructions of a row")
def test_a_vae_that_nobody_names_gets_no_gradients(vae: MapVAE) -> None:
    """`features=` is a function of one's own, and there is no `module=`."""
    given = vae.source()
    hidden = {"decoder": lambda z: vae.decode(z), "features": lambda z: vae.first(z)}
    source = SingleGroup(given.prior, lambda x: given._posterior(x), **hidden)
    prior = NCPrior.for_source(source, data(), width=8)
    assert has_scores(prior, data())
    trainer = NCETrainer(prior, torch.optim.AdamW(prior.parameters()), score_weight=10)
    for _ in range(2):
        trainer.step(data())
    assert all(p.grad is None and p.requires_grad for p in vae.parameters())
    assert any(p.grad.any() for p in prior.parameters() if p.grad is not None)
    kept = [known() for known in trainer._vae or ()]
    weights = {id(p) for p in vae.first.parameters()}
    assert {id(t) for t in kept if t is not None} == weights  # and no draws of z


@pytest.mark.filterwarnings("ignore:Reconstructions of a row")
def test_a_head_that_the_owner_of_the_features_holds_is_trained(vae: MapVAE) -> None:
    """Its parameters are seen in the source, and are no parameters of the VAE."""
    prior = NCPrior.for_source(vae.source(), data(), width=8)
    source = SingleGroup(
        vae.source().prior,
        vae.source()._posterior,
        vae.decode,
        features=_Owner(vae, prior).features,
    )
    prior = NCPrior(source, prior.heads)
    optimizer = torch.optim.AdamW(prior.parameters())
    metrics = NCETrainer(prior, optimizer, score_weight=10).step(data())
    assert metrics.grad_norm.item() > 0
    assert all(p.grad is None for p in vae.parameters())


class _Owner:
    def __init__(self, vae: MapVAE, prior: NCPrior) -> None:
        self.vae, self.head = vae, prior.heads[0]

    def features(self, z: Tensor) -> Tensor:
        return self.vae.first(z)


@pytest.mark.filterwarnings("ignore:Reconstructions of a row")
def test_features_may_be_recomputed_in_the_backward_pass(vae: MapVAE) -> None:
    source = vae.source()
    source._features = partial(checkpoint, vae.first, use_reentrant=False)
    prior = NCPrior.for_source(source, data(), width=8)
    NCETrainer(prior, torch.optim.AdamW(prior.parameters()), score_weight=10).step(data())
    assert all(p.grad is None for p in vae.parameters())
