"""`fit` on importance resamples: EM with heads, caches, checkpoints, and what is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.linear_gaussian import LinearGaussian, Quadratic
from helpers.toys import VAE as VAEWithCondition
from helpers.toys import KnownLadder, base, exactly, flat, ladder_prior, same, stir, weights
from torch import Tensor
from torch.distributions import Independent, Normal
from torch.utils.data import TensorDataset

from ncprior import NCPrior, SingleGroup, fit
from ncprior.distributions import PointMass
from ncprior.heads import MLPHead
from ncprior.training import FitSettings, ResampledPosterior
from ncprior.training.history import Row
from ncprior.training.importance import CachedParticles, epochs_of_particles

VAE = LinearGaussian(dim=1)
QUIET: dict[str, Any] = {"progress": False}
SHORT: dict[str, Any] = {"steps": 20, "batch_size": 50, "eval_every": 5, "checkpoint_every": 3}


def settings(**options: Any) -> FitSettings:
    return FitSettings(**{"importance_samples": 4, **options})


def heads_on(source: Any, x: Tensor) -> NCPrior:
    return stir(NCPrior.for_source(source, x, width=8, depth=1), 0.1)


# --- EM ---


def test_calls_of_fit_approach_the_prior_of_highest_likelihood() -> None:
    """Each call is a step of EM. Without it, heads learn the aggregate of q, 0.03 nats below.

    log r is quadratic, so that the new prior is normal and its likelihood known. EM's error falls to a
    third in each step, and the gap to a ninth; heads are trained for 60 steps.
    """
    x = exactly(torch.tensor([1.0]).double(), torch.tensor([[0.75]]).double(), 1000).float()

    def gap(samples: int | None, calls: int) -> float:
        torch.manual_seed(1)
        head = Quadratic(1)
        prior = NCPrior(VAE.source(), head)
        for _ in range(calls):
            options = settings(importance_samples=samples, ema_decay=0.9, weight_decay=0.0)
            loop: dict[str, Any] = {"steps": 60, "batch_size": 500, "learning_rate": 0.1}
            loop |= {"patience": None, "eval_every": 15, "held_out": x, "settings": options}
            fit(prior, x, **loop, **QUIET)
        return VAE.gap(*head.normal(), x)

    assert gap(None, 1) > 0.02
    assert 0 <= gap(32, 4) < 2e-3


def test_the_target_stays_that_of_the_beginning_during_a_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Particles of all renewals are weighted by heads with the weights of before."""
    x = torch.randn(120, 1)
    prior = heads_on(VAE.source(), x)
    before, seen = weights(prior.heads), []
    encode = ResampledPosterior.encode

    def spy(self: ResampledPosterior, batch: Any) -> Any:
        assert self.prior is not None
        seen.append(same(weights(self.prior.heads), before))
        return encode(self, batch)

    monkeypatch.setattr(ResampledPosterior, "encode", spy)
    fit(prior, x, held_out=x[:40], settings=settings(cache_epochs=3), **SHORT, **QUIET)
    assert len(seen) > 3 * 4  # the first look, the held-out rows, and 20 steps in epochs of 2
    assert all(seen)
    assert not same(weights(prior.heads), before)


@pytest.mark.parametrize("cache_epochs", ["auto", 2, None])
def test_several_groups_learn_the_aggregate_of_the_particles(cache_epochs: Any) -> None:
    """The encoder overlooks that the decoder's means are 2 too high; the weights do not."""
    torch.manual_seed(2)
    source, x = KnownLadder(2), torch.randn(400, 3)
    with torch.no_grad():
        source.decoder.bias += 2.0
    losses = []
    for samples in (None, 8):
        torch.manual_seed(3)
        trained = NCPrior(source, ladder_prior(2, width=16).heads)
        resampled = ResampledPosterior(trained, 8)
        options = settings(importance_samples=samples, cache_epochs=cache_epochs)
        loop: dict[str, Any] = {"steps": 60, "batch_size": 100, "learning_rate": 1e-2}
        fit(trained, x, held_out=x, settings=options, **loop, **QUIET)
        measured = NCPrior(resampled, trained.heads)
        losses.append(measured.nce_loss(x, num_draws=20).sum().item())
    assert losses[1] < losses[0] - 0.1


# --- caches ---


def test_particles_are_cached_for_as_many_epochs_as_are_effective() -> None:
    x = torch.randn(100, 3)
    assert epochs_of_particles(x, "auto", 6.7, rows_drawn=200) == 6
    assert epochs_of_particles(x, "auto", 0.9999, rows_drawn=200) == 1
    assert epochs_of_particles(x, "auto", 6.7, rows_drawn=199) is None  # a pass would be dearer
    assert epochs_of_particles([x], "auto", 6.7, rows_drawn=1e9) is None
    assert epochs_of_particles([x], 3, 6.7, rows_drawn=10) == 3
    assert epochs_of_particles(x, None, 6.7, rows_drawn=1e9) is None


@pytest.mark.parametrize("kind", ["one group", "groups"])
def test_a_cache_has_all_particles_and_is_renewed(kind: str, tmp_path: Path) -> None:
    source = (
        KnownLadder(2)
        if kind == "groups"
        else flat(likelihood=lambda z: unit(z @ torch.ones(2, 3)))
    )
    x = torch.randn(30, 3)
    resampled = ResampledPosterior(source, 4)
    caches = [
        CachedParticles(
            resampled, x, batch_size=8, seed=5, budget=b, folder=tmp_path, progress=False
        )
        for b in (2**30, 0)
    ]
    rows = torch.tensor([7, 0, 7])
    first, on_disk = (cache[rows] for cache in caches)
    assert all(map(torch.equal, first.latents, on_disk.latents))
    assert [z.shape[:2] for z in first.latents] == [(3, 4)] * source.num_groups
    before = caches[0].renewal(2)
    assert before is not None
    before(5)  # 30 // 8 = 3 batches per epoch
    assert torch.equal(caches[0][rows].log_w, first.log_w)
    before(6)
    assert not torch.equal(caches[0][rows].log_w, first.log_w)
    assert caches[0].renewal(float("inf")) is None
    state = caches[0].source.start(3, first)
    for k in range(source.num_groups):
        z = caches[0].source.group(state).posterior.sample()
        assert (first.latents[k] == z[:, None]).flatten(2).all(2).any(1).all()
        state = caches[0].source.advance(state, z)


def unit(mean: Tensor) -> Independent:
    return Independent(Normal(mean, 1.0, validate_args=False), 1)


def test_a_pass_shows_a_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    x = torch.randn(30, 1)
    for progress in (False, True):
        CachedParticles(
            ResampledPosterior(VAE.source(), 4), x, batch_size=8, seed=0, progress=progress
        )
        assert ("particles: 100%" in capsys.readouterr().err) == progress


# --- checkpoints ---


class Stop(Exception):
    pass


def crash_at(step: int) -> Callable[[Row], None]:
    def callback(row: Row) -> None:
        if row.step == step:
            raise Stop

    return callback


@pytest.mark.parametrize("cache_epochs", [3, None])
def test_a_resumed_step_of_em_equals_the_uninterrupted_one(
    cache_epochs: float | None, tmp_path: Path
) -> None:
    """Also if the heads with which the call resumes are not those with which it began."""
    x = torch.randn(150, 3)
    source = KnownLadder(2)
    options: dict[str, Any] = {**SHORT, **QUIET, "held_out": x[:40]}
    options["settings"] = settings(cache_epochs=cache_epochs)

    def new() -> NCPrior:
        torch.manual_seed(1)
        return NCPrior(source, stir(ladder_prior(2, dropout=0.2)).heads)

    whole = new()
    expected = fit(whole, x, **options)
    path, parts = tmp_path / "checkpoint", new()
    with pytest.raises(Stop):
        fit(parts, x, checkpoint=path, callback=crash_at(15), **options)
    torch.manual_seed(9)
    history = fit(stir(parts), x, checkpoint=path, **options)
    assert same(weights(parts), weights(whole))
    assert history.best_loss == expected.best_loss
    assert history.ess == expected.ess


def test_a_checkpoint_of_another_prior_or_of_other_samples_is_refused(tmp_path: Path) -> None:
    x = torch.randn(150, 1)
    prior = heads_on(VAE.source(), x)
    options: dict[str, Any] = {**SHORT, **QUIET, "held_out": x[:40]}
    options |= {"checkpoint": tmp_path / "checkpoint"}
    fit(prior, x, settings=settings(), **options)
    with pytest.raises(ValueError, match="importance_samples=4; got importance_samples=None"):
        fit(prior, x, settings=settings(importance_samples=None), **options)
    prior.strength = 0.5
    with pytest.raises(ValueError, match="strength=1.0; got strength=0.5"):
        fit(prior, x, settings=settings(), **options)
    prior.strength, prior.active = 1.0, [False]
    with pytest.raises(ValueError, match="active"):
        fit(prior, x, settings=settings(), **options)


def test_heads_of_the_beginning_are_checked_before_they_are_taken(tmp_path: Path) -> None:
    from ncprior.saving.codec import pack, unpack
    from ncprior.saving.tensors import load_tensors, save_tensors

    x = torch.randn(150, 1)
    prior = heads_on(VAE.source(), x)
    path = tmp_path / "checkpoint"
    options: dict[str, Any] = {**SHORT, **QUIET, "held_out": x[:40], "settings": settings()}
    with pytest.raises(Stop):
        fit(prior, x, checkpoint=path, callback=crash_at(10), **options)
    tensors, metadata = load_tensors(path)
    whole = unpack(metadata["state"], tensors)
    for damaged in (
        None,
        {**whole["begun"], "0.more": torch.zeros(1)},
        {n: t * torch.nan for n, t in whole["begun"].items()},
    ):
        tree, saved = pack({**whole, "begun": damaged})
        save_tensors(path, saved, {**metadata, "state": tree})
        before = weights(prior)
        with pytest.raises(ValueError, match="its begun cannot be used"):
            fit(prior, x, checkpoint=path, **options)
        assert same(weights(prior), before)


# --- numbers, and what is refused ---


def test_the_history_has_the_effective_sample_size() -> None:
    x = torch.randn(300, 1)
    prior = NCPrior.for_source(VAE.source(), x, width=8, depth=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        history = fit(prior, x, held_out=x, settings=settings(), **SHORT, **QUIET)
    # q(z | x) is the posterior under N(0, 1): all weights are equal
    assert history.ess == pytest.approx(4, abs=1e-3)
    assert str(history).endswith("; 4.0 effective importance samples")
    plain = fit(prior, x, held_out=x, **SHORT, **QUIET)
    assert plain.ess is None
    assert "effective" not in str(plain)


def test_too_few_samples_are_warned_of() -> None:
    x = torch.randn(300, 20)
    prior = NCPrior.for_source(LinearGaussian(20, scale_factor=2.0).source(), x, width=8, depth=1)
    with pytest.warns(UserWarning, match="Of 8 importance samples per row, 1.* are effective"):
        history = fit(
            prior, x, held_out=x, settings=settings(importance_samples=8), **SHORT, **QUIET
        )
    assert history.ess is not None
    assert 1 <= history.ess < 2


def test_what_cannot_be_resampled_is_refused_before_the_training() -> None:
    x = torch.randn(200, 1)
    with pytest.raises(ValueError, match="Pass score_weight=0"):
        FitSettings(importance_samples=4, score_weight=1.0)
    with pytest.raises(ValueError, match=r"\[2, inf\)"):
        FitSettings(importance_samples=1)
    whole = VAE.source()
    point = SingleGroup(whole.prior, lambda x: PointMass(x), lambda z: z, likelihood=VAE.decoded)
    equal = SingleGroup(
        whole.prior, lambda x: PointMass(x, x[:, 0]), lambda z: z, likelihood=VAE.decoded
    )
    silent = SingleGroup(whole.prior, VAE.encoded, lambda z: z)
    for source, error, message in (
        (point, TypeError, "the posterior of group 0, .* A point of real z has none"),
        (equal, ValueError, "draws that are all equal"),
        (silent, ValueError, r"does not know p\(x \| z\)"),
        (ResampledPosterior(whole, 4), TypeError, "the posterior of group 0, a Particles"),
    ):
        prior = NCPrior(source, MLPHead((1,), width=8, depth=1)).eval()
        before = weights(prior)
        with pytest.raises(error, match=message):
            fit(prior, x, settings=settings(), **SHORT, **QUIET)
        assert same(weights(prior), before)
        assert not prior.training
    prior = heads_on(whole, x)
    with pytest.raises(TypeError, match="importance samples"):
        fit(prior, iter(x.split(50)), held_out=x, settings=settings(), **SHORT, **QUIET)


def test_data_in_batches_and_stages_go_along() -> None:
    x = torch.randn(200, 1)
    prior = heads_on(VAE.source(), x)
    for data, options in ((list(x.split(50)), {}), (x, {"stages": 2}), (x, {"num_draws": 3})):
        loop = dict(options)
        chosen = settings(num_draws=loop.pop("num_draws", 1), num_cached_proposals=500)
        history = fit(prior, data, held_out=x[:50], settings=chosen, **SHORT, **loop, **QUIET)
        assert history.ess is not None


def test_conditions_and_heads_in_float64_go_along() -> None:
    vae = VAEWithCondition(condition=4)
    source = SingleGroup(
        *(base(), vae.posterior, vae.decode),
        module=vae,
        condition=lambda batch: batch[1],
        likelihood=lambda z, c: unit(vae.decode(z, c)),
    )
    data = TensorDataset(torch.randn(200, 3), torch.eye(4)[torch.randint(4, (200,))])
    for cache_epochs in (2, None):
        head = MLPHead((2,), context_shape=(4,), width=8, depth=1)
        prior = NCPrior(source, head).double()
        chosen = settings(importance_samples=16, cache_epochs=cache_epochs)
        with torch.inference_mode():
            history = fit(prior, data, held_out=data, settings=chosen, **SHORT, **QUIET)
        assert history.ess is not None
        assert history.best_loss is not None
        assert history.best_loss[0] < 1.3863
