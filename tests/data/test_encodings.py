"""Walks that are kept: a step of one group is what it was, and of several what is stated."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.problems import GaussianPair, SampleOnly
from helpers.toys import VAE, Ladder, flat, ladder_prior, same, stir, weights
from torch import Tensor, nn
from torch.distributions import Independent, Normal, TransformedDistribution

from ncprior import Group, NCETrainer, NCPrior, SingleGroup, fit
from ncprior.bases.rebase import rebase
from ncprior.data.device_loader import Loader
from ncprior.data.encodings import CachedEncodings, CachedGroupsSource, epochs_to_cache
from ncprior.data.stream import Stream
from ncprior.heads.networks import MLPHead
from ncprior.source import WrappedSource, contrastive_pairs, posterior_of, sample_posterior
from ncprior.training import FitSettings

QUIET: dict[str, Any] = {"progress": False}


def flat_prior(vae: VAE, **options: Any) -> NCPrior:
    torch.manual_seed(5)
    return NCPrior(flat(vae, **options), MLPHead((2,), width=8, depth=1))


# --- one group ---


@pytest.mark.parametrize("memory", [4.0, 0.0])
def test_with_one_group_training_is_what_it_was(memory: float) -> None:
    vae, x = VAE(), torch.randn(600, 3)
    options = {"steps": 30, "batch_size": 32, "eval_every": 15, **QUIET}
    kept, fresh = flat_prior(vae), flat_prior(vae)
    torch.manual_seed(1)
    a = fit(fresh, x, settings=FitSettings(cache_epochs=None), **options)
    torch.manual_seed(1)
    settings = FitSettings(cache_epochs=math.inf, cache_memory=memory)
    b = fit(kept, x, settings=settings, **options)
    for one, two in zip(fresh.parameters(), kept.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    assert a.best_loss == pytest.approx(b.best_loss, abs=1e-5)


class Counting(nn.Module):
    """A VAE whose encoder counts the rows that it has seen."""

    def __init__(self, *, noise: float = 0.0) -> None:
        super().__init__()
        self.layer, self.noise, self.rows = nn.Linear(3, 2), noise, 0
        self.eval()

    def posterior(self, x: Tensor) -> Independent:
        """N(W x, 1), maybe of noisy x."""
        self.rows += len(x)
        x = x + self.noise * torch.randn_like(x)
        return Independent(Normal(self.layer(x), 1.0, validate_args=False), 1)

    def source(self) -> SingleGroup:
        """As one group."""
        base = Independent(Normal(torch.zeros(2), 1.0), 1)
        return SingleGroup(base, self.posterior, nn.Linear(2, 3).eval(), module=self)


STEPS, HELD_OUT = 20 * 32, 3 * 10  # rows seen at all steps, and by the three held-out losses


@pytest.mark.parametrize(
    ("case", "rows"),
    [
        ("auto", 200 + 2 * 2),  # two rows are tried twice
        ("never", STEPS + HELD_OUT),
        ("an encoder with noise", STEPS + HELD_OUT + 2 * 2),
        ("less than two epochs", STEPS + HELD_OUT),
        ("a list", STEPS + HELD_OUT),
        ("a list, asked for", 7 * 32 + 10),
    ],
)
def test_the_encoder_sees_every_row_once_where_that_changes_nothing(case: str, rows: int) -> None:
    vae = Counting(noise=0.1 * ("noise" in case))
    prior = NCPrior(vae.source(), MLPHead((2,), width=8))
    options: dict[str, Any] = {"steps": 20, "batch_size": 32, "eval_every": 10, **QUIET}
    x: Any = torch.randn(200, 3)  # ten of them are held out
    if "epochs" in case:
        x, options["held_out"] = torch.randn(400, 3), torch.randn(10, 3)
    if "list" in case:
        x, options["held_out"] = list(torch.randn(7 * 32, 3).split(32)), torch.randn(10, 3)
    if case == "never":
        options["settings"] = FitSettings(cache_epochs=None)
    if "asked" in case:
        options["settings"] = FitSettings(cache_epochs=math.inf)
    fit(prior, x, **options)
    assert vae.rows == rows


def test_a_posterior_of_unknown_type_is_not_kept_unasked() -> None:
    class Own(Independent):
        pass

    vae = Counting()
    base = Independent(Normal(torch.zeros(2), 1.0), 1)
    source = SingleGroup(base, lambda x: Own(Normal(x[:, :2], 1.0), 1), vae.layer)
    assert epochs_to_cache(source, torch.randn(200, 3), "auto", rows_drawn=3200) is None
    # Its encoding is x itself: kept when asked for, to no use and no harm.
    walks = CachedEncodings(source, torch.randn(200, 3), batch_size=32, seed=0)
    assert walks[0:2].posterior.shape == (2, 3)


def test_a_base_of_ones_own_is_kept_with_its_source() -> None:
    problem = GaussianPair(1.0)
    source = rebase(problem.source(), SampleOnly(problem.prior))
    walks = CachedEncodings(source, problem.data(50), batch_size=16, seed=0)
    state = walks.source.start(4, walks[torch.arange(4)])
    assert walks.source.group(state).prior.sample().shape == (4, 2)
    assert walks.source.num_groups == 1


def test_an_iterator_cannot_be_walked_twice() -> None:
    prior, settings = flat_prior(VAE()), FitSettings(cache_epochs=1)
    with pytest.raises(TypeError, match="cache_epochs need data that can be read again"):
        fit(prior, iter([torch.randn(4, 3)]), steps=1, settings=settings, **QUIET)


# --- several groups ---


def test_a_kept_walk_is_a_walk_of_the_vae() -> None:
    """Each group's prior, posterior and context are those behind one z_<k ~ q(z_<k | x)."""
    source, x = Ladder(3), torch.randn(10, 3)
    walks = CachedEncodings(source, x, batch_size=4, seed=3)
    torch.manual_seed(3)
    states = []
    for part in x.split(4):
        state, row = source.start(len(part), source.encode(part)), []
        for _ in range(3):
            group = source.group(state)
            row.append(group)
            if len(row) < 3:
                state = source.advance(state, posterior_of(group).sample())
        states.append(row)
    picked = torch.tensor([9, 0, 5])
    state = walks.source.start(3, walks.source.encode(walks[picked]))
    for k in range(3):
        group = walks.source.group(state)
        for name, kept in (("prior", group.prior), ("posterior", group.posterior)):
            true = [getattr(row[k], name) for row in states]
            assert torch.equal(kept.mean, torch.cat([law.mean for law in true])[picked])
            assert torch.equal(kept.stddev, torch.cat([law.stddev for law in true])[picked])
        assert torch.equal(group.context, torch.cat([row[k].context for row in states])[picked])
        state = walks.source.advance(state, group.prior.sample())


def test_z_is_new_at_every_step_and_contexts_are_for_some_epochs() -> None:
    walks = CachedEncodings(Ladder(2), torch.randn(40, 3), batch_size=8, seed=0)
    renew = walks.renewal(2)
    assert renew is not None
    seen = []
    for batch in range(25):  # five batches make an epoch
        renew(batch)
        pairs = list(contrastive_pairs(walks.source, walks[0:8]))
        seen.append((walks.number, pairs[1][0], pairs[1][1].context))
    assert [number for number, _, _ in seen] == [0] * 10 + [1] * 10 + [2] * 5
    for (n, z, c), (n_2, z_2, c_2) in pairwise(seen):
        assert not torch.equal(z, z_2)
        assert torch.equal(c, c_2) == (n == n_2)
    walks.renew(1)
    assert torch.equal(walks[0:8][1]["context"], seen[12][2])  # by its number alone


def test_a_vae_in_training_mode_is_refused_before_a_walk_changes_it() -> None:
    prior = ladder_prior(2)
    ladder = prior.source.train()
    before = {name: t.clone() for name, t in ladder.state_dict().items()}
    settings = FitSettings(cache_epochs=2)
    with pytest.raises(ValueError, match="evaluation mode"):
        fit(prior, torch.randn(40, 3), settings=settings, steps=2, batch_size=8, **QUIET)
    assert all(torch.equal(t, before[name]) for name, t in ladder.state_dict().items())


def test_a_walk_depends_on_its_number_alone() -> None:
    """NumPy's randomness in the data and a loader's own generator included."""

    class Noisy(torch.utils.data.Dataset[Tensor]):
        def __len__(self) -> int:
            return 12

        def __getitem__(self, row: int) -> Tensor:
            return torch.full((3,), float(row)) + np.random.rand()

    generator = torch.Generator().manual_seed(3)
    data = torch.utils.data.DataLoader(Noisy(), 4, shuffle=True, generator=generator)
    numpys = np.random.get_state()[1].copy()
    walks = CachedEncodings(Ladder(2), data, batch_size=4, seed=1)
    first = [walks[torch.arange(12)]]
    walks.renew(1)
    walks.renew(0)
    first.append(walks[torch.arange(12)])
    for one, two in zip(*map(torch.utils._pytree.tree_leaves, first), strict=True):
        assert torch.equal(one, two)
    assert (np.random.get_state()[1] == numpys).all()


def test_walks_leave_the_generators_alone() -> None:
    source, before = Ladder(2), torch.get_rng_state()
    CachedEncodings(source, torch.randn(8, 3, generator=torch.Generator()), batch_size=8, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_loss_of_kept_walks_is_that_of_fresh_ones_in_the_mean() -> None:
    prior, x = stir(ladder_prior(2), 0.3), torch.randn(64, 3)
    with torch.no_grad():
        fresh = torch.stack([prior.nce_loss(x) for _ in range(200)]).double()
        kept = []
        for number in range(200):
            walks = CachedEncodings(prior.source, x, batch_size=64, seed=10_000 + number)
            pairs = NCPrior(walks.source, prior.heads)
            kept.append(torch.stack([loss.nce for loss in pairs.group_losses(walks[0:64])]))
        difference = fresh.mean(0) - torch.stack(kept).double().mean(0)
        error = (fresh.var(0) / 200 + torch.stack(kept).double().var(0) / 200).sqrt()
    assert (difference.abs() < 4 * error).all()


@pytest.mark.parametrize("stop", [7, 13])
def test_an_interrupted_training_on_kept_walks_ends_as_if_it_had_not_been(
    stop: int, tmp_path: Path
) -> None:
    """Five batches make an epoch, of which two share a walk."""
    source, x = Ladder(2), torch.randn(43, 3)
    held_out = torch.randn(8, 3)
    options = {
        "held_out": held_out,
        "patience": None,
        "steps": 23,
        "batch_size": 8,
        "settings": FitSettings(cache_epochs=2),
        **QUIET,
    }

    def heads() -> NCPrior:
        torch.manual_seed(5)
        made = [MLPHead((2,), context_shape=(8,), width=8, depth=1) for _ in range(2)]
        return NCPrior(source, made)

    whole, parts = heads(), heads()
    torch.manual_seed(1)
    fit(whole, x, eval_every=12, **options)

    class Stopped(Exception):
        pass

    def interrupt(row: Any) -> None:
        if row.step >= stop:
            raise Stopped

    torch.manual_seed(1)
    path = tmp_path / "checkpoint"
    with pytest.raises(Stopped):
        fit(
            *(parts, x),
            eval_every=12,
            checkpoint=path,
            checkpoint_every=3,
            callback=interrupt,
            **options,
        )
    torch.manual_seed(77)
    fit(parts, x, eval_every=12, checkpoint=path, checkpoint_every=3, **options)
    assert same(weights(whole), weights(parts))


def test_a_group_without_known_parameters_is_named() -> None:
    class Unknown(WrappedSource):
        def group(self, state: Any) -> Group:
            group = self.source.group(state)
            return group._replace(posterior=TransformedDistribution(posterior_of(group), []))

    prior = NCPrior(Unknown(Ladder(2)), ladder_prior(2).heads)
    with pytest.raises(TypeError, match="group 0 has a Transformed.*cache_epochs=None"):
        settings = FitSettings(cache_epochs=1)
        fit(prior, torch.randn(20, 3), steps=2, batch_size=8, settings=settings, **QUIET)


def test_a_prior_without_known_parameters_is_cached_as_a_draw_per_row() -> None:
    source = rebase(Ladder(2), lambda k, group: SampleOnly(group.prior) if k else group.prior)
    cached = CachedEncodings(source, torch.randn(20, 3), batch_size=8, seed=0)
    state = cached.source.start(5, cached[:5])
    first = cached.source.group(cached.source.advance(state, torch.zeros(5, 2))).prior
    z = first.sample(torch.Size((3,)))
    assert z.shape[:2] == (3, 5)
    assert torch.equal(z[0], z[2])  # until the cache is renewed
    assert len(z[0].unique(dim=0)) == 5
    prior, settings = NCPrior(source, ladder_prior(2).heads), FitSettings(cache_epochs=1)
    fit(prior, torch.randn(20, 3), steps=2, batch_size=8, settings=settings, **QUIET)


def test_later_stages_of_several_groups_walk_anew() -> None:
    x = torch.randn(20, 3)
    assert epochs_to_cache(Ladder(2), x, 3, rows_drawn=800) == 3
    assert epochs_to_cache(Ladder(2), x, 3, rows_drawn=800, stage=2) is None
    assert epochs_to_cache(flat(), x, 3, rows_drawn=800, stage=2) == 3


def test_several_groups_are_not_kept_unasked() -> None:
    assert epochs_to_cache(Ladder(2), torch.randn(20, 3), "auto", rows_drawn=800) is None


def test_walks_train_the_heads_of_a_ladder() -> None:
    prior, x = ladder_prior(2), torch.randn(400, 3)
    options = {"steps": 200, "batch_size": 64, "learning_rate": 1e-2, **QUIET}
    history = fit(prior, x, settings=FitSettings(cache_epochs=2), **options)
    assert history.best_loss is not None
    assert max(history.best_loss) < 2 * math.log(2)
    assert isinstance(prior.source, Ladder)
    latents, _ = sample_posterior(prior.source, x)
    assert prior.log_ratio(latents).shape == (400, 2)
    cached = CachedGroupsSource(prior.source)
    assert cached.num_groups == 2
    with pytest.raises(NotImplementedError, match="Decode with the VAE's source"):
        cached.decode(cached.start(4))


# --- loading ---


@pytest.mark.parametrize("ahead", [False, True])
def test_a_loader_that_reads_ahead_gives_the_same_batches_and_places(ahead: bool) -> None:
    x = torch.arange(20)
    torch.manual_seed(1)
    plain = Stream(x, 4)
    expected = [next(plain) for _ in range(12)]
    torch.manual_seed(1)
    numbers: list[int] = []
    loader = Loader(Stream(x, 4), torch.device("cpu"), before=numbers.append)
    loader.is_ahead = ahead
    taken = [next(loader) for _ in range(7)]
    place = loader.state()
    again = Stream(x, 4)
    again.restore(place)
    rest = Loader(again, torch.device("cpu"), first=7, before=numbers.append)
    taken += [next(rest) for _ in range(5)]
    assert all(torch.equal(a, b) for a, b in zip(taken, expected, strict=True))
    assert numbers == [*range(7 + ahead), *range(7, 12)]


@pytest.mark.parametrize("ahead", [False, True])
def test_a_loader_stops_where_its_stream_does(ahead: bool) -> None:
    loader = Loader(Stream(iter([torch.zeros(2), torch.ones(2)]), 4), torch.device("cpu"))
    loader.is_ahead = ahead
    assert [float(next(loader)[0]) for _ in range(2)] == [0.0, 1.0]
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(loader)


def test_a_batch_of_fewer_rows_than_ranks_is_refused_by_all_of_them() -> None:
    x = torch.arange(9.0)
    for rank in range(2):
        loader = Loader(Stream(list(x.split(4)), 4), torch.device("cpu"), (rank, 2))
        assert [len(next(loader)) for _ in range(2)] == [2, 2]
        with pytest.raises(ValueError, match="a batch of 1 rows for 2 ranks.*drop_last"):
            next(loader)


def test_ranks_share_the_rows_of_a_batch() -> None:
    x, parts = torch.arange(20), []
    for rank in range(3):
        torch.manual_seed(1)
        parts.append(next(Loader(Stream((x, x)[0], 10), torch.device("cpu"), (rank, 3))))
    torch.manual_seed(1)
    whole = next(Stream(x, 10))
    assert [len(part) for part in parts] == [4, 3, 3]
    assert torch.equal(torch.cat(parts).sort().values, whole.sort().values)


# --- precision, and heads at once ---


def test_mixed_precision_moves_a_step_by_its_rounding_and_keeps_weights_in_float32() -> None:
    x, losses, gradients = torch.randn(64, 3), [], []
    for precision in (torch.float32, torch.bfloat16):
        torch.manual_seed(2)
        prior = stir(ladder_prior(2, width=32), 0.2)
        trainer = NCETrainer(prior, torch.optim.SGD(prior.parameters(), 0.0), precision=precision)
        losses.append(trainer.step(x).loss)
        gradients.append(torch.cat([p.grad.flatten() for p in prior.parameters()]))
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in prior.parameters())
    assert 0 < (losses[0] - losses[1]).abs().max() < 0.01
    assert 0 < (gradients[0] - gradients[1]).norm() < 0.05 * gradients[0].norm()


def test_log_r_has_more_than_the_digits_of_bfloat16() -> None:
    prior = stir(ladder_prior(1, width=32))
    with torch.no_grad():
        prior.heads[0].rescale(100.0, 0.0)
        z, c = torch.randn(1000, 4, 2), torch.randn(4, 8)
        log_r = prior.log_r(0, z, c, precision=torch.bfloat16)
    assert log_r.dtype == torch.float32
    assert not torch.equal(log_r, log_r.bfloat16().float())


def test_fit_in_mixed_precision_reaches_the_loss() -> None:
    vae, x, best = VAE(), torch.randn(400, 3), []
    for precision in (torch.float32, torch.bfloat16):
        prior = flat_prior(vae)
        torch.manual_seed(1)
        settings = FitSettings(precision=precision)
        history = fit(prior, x, steps=100, learning_rate=1e-2, settings=settings, **QUIET)
        assert history.best_loss is not None
        best.append(history.best_loss[0])
    assert best[0] != best[1]
    assert abs(best[0] - best[1]) < 0.01


def test_a_cache_of_one_group_is_renewed_where_the_encoder_draws() -> None:
    """As of a joint source: one draw per row was the only positive of a whole training."""

    class Drawing(WrappedSource):
        def encode(self, x: Tensor) -> Any:
            return super().encode(x + torch.randn_like(x))

    x, counts = torch.randn(40, 3), []
    for source in (flat(VAE()), Drawing(flat(VAE()))):
        cache = CachedEncodings(source, x, batch_size=20, seed=0)
        before = cache.renewal(1)
        counts.append(before is not None)
    assert counts == [False, True]
    first = cache[torch.arange(40)].posterior["Normal"]["loc"].clone()
    assert before is not None
    before(2)  # two batches are an epoch
    assert not torch.equal(first, cache[torch.arange(40)].posterior["Normal"]["loc"])
