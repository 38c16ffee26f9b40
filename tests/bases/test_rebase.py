"""Another base prior on the same VAE."""

from functools import partial
from typing import Any

import pytest
import torch
from helpers.problems import CorrelatedPair, GaussianPair, SampleOnly
from helpers.toys import VAE, Ladder, base, flat, ladder_prior, weights
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal

from ncprior import Group, NCPrior, SingleGroup, fit, langevin, sir
from ncprior.adapters.lars_snis import SNISPrior
from ncprior.bases.empirical import Empirical, NoPrior, stored_numbers
from ncprior.bases.latents import latents_of
from ncprior.bases.mixture_em import fit_gaussian, fit_mixture
from ncprior.bases.rebase import rebase
from ncprior.heads.networks import MLPHead
from ncprior.source import device_of, posterior_of, sample_posterior, visit
from ncprior.testing import check_source


def tempered(t: float) -> Any:
    def base(k: int, group: Group) -> Distribution:
        p: Any = group.prior
        return Independent(Normal(p.mean, t * p.stddev, validate_args=False), len(p.event_shape))

    return base


def test_a_rebased_source_keeps_the_laws() -> None:
    x = torch.randn(6, 3)
    check_source(rebase(flat(), fit_gaussian(torch.randn(100, 2))), x)
    check_source(rebase(Ladder(), tempered(0.7)), x)
    check_source(rebase(rebase(flat(), base()), base()), x)


def test_the_check_still_sees_the_vae() -> None:
    """A source that changes its VAE is caught behind another base too."""
    vae = VAE()

    def posterior(x: Tensor) -> Distribution:
        vae.to_posterior.weight.requires_grad_(False)
        return vae.posterior(x)

    source = rebase(SingleGroup(base(), posterior, vae.decode, module=vae), base())
    with pytest.raises(AssertionError, match="must stay as it was"):
        check_source(source, torch.randn(6, 3))


def test_prior_is_new_and_all_else_stays() -> None:
    source, x = flat(likelihood=lambda z: Normal(z, 1.0)), torch.randn(5, 3)
    closer = rebase(source, fit_gaussian(3 + 0.1 * torch.randn(500, 2)))
    draws = closer.group(closer.start(400)).prior.sample()
    assert (draws.mean(0) - 3).abs().max() < 0.1
    walks = []
    for s in (source, closer):
        torch.manual_seed(3)
        (z,), state = sample_posterior(s, x)
        walks.append((z, s.decode(state), s.likelihood(state).mean))
    assert all(torch.equal(a, b) for a, b in zip(*walks, strict=True))
    assert closer.fingerprint() == source.fingerprint()


def test_a_base_sees_group_and_context() -> None:
    seen: list[tuple[int, Any]] = []

    def base(k: int, group: Group) -> Any:
        seen.append((k, None if group.context is None else group.context.shape))
        return group.prior

    source = rebase(Ladder(), base)
    sample_posterior(source, torch.randn(4, 3))
    assert seen[-3:] == [(0, (4, 8)), (1, (4, 8)), (2, (4, 8))]


def test_a_function_may_give_a_prior_of_empty_batch_shape() -> None:
    fitted = fit_gaussian(torch.randn(100, 2))
    source = rebase(flat(), lambda k, group: fitted)
    assert source.group(source.start(7)).prior.sample().shape == (7, 2)


def test_a_prior_that_only_samples_will_do() -> None:
    source = rebase(flat(), SampleOnly(base()))
    check_source(source, torch.randn(6, 3))
    prior = NCPrior(source, MLPHead((2,)))
    assert prior.sample(5, partial(sir, num_proposals=10)).x.shape == (5, 3)


def test_a_prior_with_a_log_ratio_of_its_own_will_do() -> None:
    source = rebase(flat(), SNISPrior(2, num_proposals=4))
    assert source.group(source.start(5)).prior.sample().shape == (5, 2)


def test_a_base_may_have_heads_of_attention() -> None:
    prior = SampleOnly(base())
    prior.heads = 8  # type: ignore[attr-defined]
    source = rebase(flat(), prior)
    assert source.group(source.start(5)).prior.sample().shape[0] == 5


def test_one_prior_for_several_groups_is_refused() -> None:
    for wrong in (base(), [base(), base()]):
        with pytest.raises(ValueError, match=r"3 groups.*prior for each group in a list.*base\(k"):
            rebase(Ladder(), wrong)


class Shifted:
    """A conditional prior: N(c, 1) for the contexts c of the rows."""

    def given(self, context: Tensor) -> Distribution:
        return Independent(Normal(context, 1.0), 1)


def test_a_list_has_a_base_for_every_group() -> None:
    """Plain, sample-only and conditional ones; the last sees the context of its group."""
    source = Ladder()
    x = torch.randn(5, 3)
    groups: list[Group] = []

    def choose(k: int, group: Group) -> Tensor:
        groups.append(group)
        return posterior_of(group).sample()

    visit(source, source.start(5, source.encode(x)), choose)
    events = [group.posterior.event_shape for group in groups]  # type: ignore[union-attr]
    plain = [Independent(Normal(torch.zeros(e), 1.0), len(e)) for e in events]
    based = rebase(source, [plain[0], SampleOnly(plain[1]), plain[2]])
    check_source(based, x)
    assert based.prior is None
    assert based.shared_prior() is None
    assert NCPrior.for_source(based, x).sample(4, partial(sir, num_proposals=3)).x.shape[0] == 4


def test_a_conditional_base_sees_the_context() -> None:
    source = SingleGroup(
        base(),
        lambda x, c: Independent(Normal(x + c, 1.0), 1),
        lambda z, c: z,
        condition=lambda x: x,
    )
    based, c = rebase(source, Shifted()), torch.randn(4, 2)
    prior: Any = based.group(based.start(4, condition=c)).prior
    assert torch.equal(prior.mean, c)
    assert based.shared_prior() is None
    check_source(based, c, condition=c)


def test_what_is_no_conditional_base_is_refused() -> None:
    class Empty:
        def given(self, context: Tensor) -> None:
            return None

    source = rebase(flat(), Empty())  # type: ignore[arg-type]
    with pytest.raises(
        TypeError, match=r"Group 0: given\(context\) must return a prior .*got None"
    ):
        source.group(source.start(3))
    with pytest.raises(
        TypeError, match=r"base of a group must be a prior .*given\(context\).*got 3"
    ):
        rebase(flat(), [3])
    batch = Independent(Normal(torch.zeros(4, 2), 1.0), 1)
    with pytest.raises(ValueError, match=r"empty batch shape; got batch shape \(4,\)"):
        rebase(flat(), [batch])


def test_what_is_no_base_is_refused() -> None:
    with pytest.raises(TypeError, match=r"base must be a prior .*; got 3\."):
        rebase(flat(), 3)  # type: ignore[arg-type]


def test_a_base_of_another_shape_is_refused() -> None:
    source = rebase(flat(), fit_gaussian(torch.randn(100, 5)))
    with pytest.raises(ValueError, match=r"shape \(5,\).*\(2,\)"):
        source.group(source.start(3, source.encode(torch.randn(3, 3))))


def test_a_source_lacks_what_the_wrapped_one_lacks() -> None:
    source = rebase(CorrelatedPair(), tempered(1.0))
    assert source.fingerprint() is None
    with pytest.raises(ValueError, match=r"CorrelatedPair does not know p\(x \| z\)"):
        source.likelihood(source.start(3))


def test_a_model_without_a_prior_says_so_until_one_is_fitted() -> None:
    problem = GaussianPair(kl=1.0, dim=2)
    inner = problem.source()
    source = SingleGroup(NoPrior("It has none."), inner._posterior, inner._decoder)
    x = problem.data(2000)
    with pytest.raises(ValueError, match=r"It has none\. Fit one: rebase"):
        NCPrior.for_source(source, x)
    closer = rebase(source, fit_gaussian(latents_of(source, x)))
    history = fit(NCPrior.for_source(closer, x[:200]), x, steps=20, progress=False)
    assert len(history.best_step) == 1
    assert device_of(source).type == "cpu"


def test_latents_are_draws_of_the_aggregate_posterior_or_its_means() -> None:
    problem = GaussianPair(kl=1.0, dim=2)
    source, x = problem.source(), problem.data(5000)
    z = latents_of(source, x)
    target = problem.target
    assert z.shape == (5000, 2)
    assert ((z.mean(0) - target.mean).abs() < 4 * target.stddev / 5000**0.5).all()
    assert ((z.std(0) / target.stddev - 1).abs() < 4 / (2 * 5000) ** 0.5).all()
    means = latents_of(source, x, of="means")
    q = source.group(source.start(5000, source.encode(x))).posterior
    assert q is not None and torch.equal(means, q.mean)


def test_latents_of_a_later_group_come_after_those_before() -> None:
    problem = CorrelatedPair()
    source, x = problem, problem.data(4000)
    torch.manual_seed(0)
    z_2 = latents_of(source, x, k=1, batch_size=4000)
    torch.manual_seed(0)
    latents, _ = sample_posterior(source, x)
    assert torch.equal(z_2, latents[1])


@pytest.mark.parametrize("options", [{"k": 1}, {"k": -1}, {"of": "modes"}])
def test_latents_that_there_are_not_are_refused(options: Any) -> None:
    with pytest.raises(
        ValueError, match=r"k must be .* in \[0, 0\]|of must be one of 'samples', 'means'"
    ):
        latents_of(flat(), torch.randn(4, 3), **options)


def test_latents_are_read_from_any_data() -> None:
    x = torch.randn(10, 3)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=4)
    assert latents_of(flat(), loader).shape == latents_of(flat(), [x[:7], x[7:]]).shape == (10, 2)


def test_a_closer_base_leaves_less_to_correct() -> None:
    """On the target itself as base, NCE has nothing to learn: L* = 2 log 2."""
    problem = GaussianPair(kl=2.0, dim=2)
    source, x = problem.source(), problem.data(20_000)
    losses = []
    for s in (source, rebase(source, fit_mixture(latents_of(source, x), 2))):
        torch.manual_seed(0)
        prior = NCPrior.for_source(s, x[:500], width=32, depth=1)
        history = fit(prior, x, steps=300, progress=False)
        assert history.best_loss is not None
        losses += history.best_loss
    assert losses[0] < 0.9
    assert abs(losses[1] - 1.3863) < 0.01


def test_training_on_a_rebased_source_leaves_the_vae_alone() -> None:
    vae = VAE()
    before = weights(vae)
    source = rebase(flat(vae), fit_gaussian(torch.randn(100, 2)))
    fit(NCPrior(source, MLPHead((2,))), torch.randn(200, 3), steps=3, progress=False)
    assert all(torch.equal(before[name], t) for name, t in vae.state_dict().items())


def test_a_hierarchy_can_be_rebased() -> None:
    prior = ladder_prior()
    prior.source = rebase(prior.source, tempered(0.5))
    trained = fit(prior, torch.randn(200, 3), steps=3, progress=False)
    assert len(trained.best_step) == 3


def test_stored_latents_are_drawn_with_replacement_and_equally_often() -> None:
    z = torch.arange(10.0).reshape(5, 2, 1)
    draws = Empirical(z).sample((20, 1000))
    assert draws.shape == (20, 1000, 2, 1)
    assert ((draws[..., 1, 0] - draws[..., 0, 0]) == 1).all()  # whole rows
    counts = (draws[..., 0, 0] / 2).long().flatten().bincount()
    assert len(counts) == 5
    sd = (20_000 * 0.2 * 0.8) ** 0.5
    assert ((counts - 4000).abs() < 4 * sd).all()


def test_stored_latents_are_a_base_that_only_samples() -> None:
    source, x = flat(), torch.randn(200, 3)
    pool = Empirical(latents_of(source, x))
    closer = rebase(source, pool)
    check_source(closer, x[:6])
    prior = NCPrior(closer, MLPHead((2,)))
    (z,) = prior.sample(5, partial(sir, num_proposals=10)).latents
    assert (z[:, None] == pool.z).all(-1).any(1).all()
    with pytest.raises(TypeError, match="Empirical can only be sampled. Use sir"):
        langevin(closer.group(closer.start(2)).prior, lambda z: z[:, 0], num_steps=1, step_size=1)
    with pytest.raises(ValueError, match=r"shape \(3,\).*\(2,\)"):
        wrong = rebase(source, Empirical(x))
        wrong.group(wrong.start(6, wrong.encode(x[:6])))


def test_no_latents_are_no_distribution() -> None:
    with pytest.raises(ValueError, match=r"1 or more rows; got .*\(0, 2\)"):
        Empirical(torch.empty(0, 2))


def test_the_numbers_that_a_base_stores_are_counted() -> None:
    z = torch.randn(100, 2, 2)
    counts = {
        "full": stored_numbers(fit_mixture(z, 3)),  # 3 · (1 + 4 + 10)
        "diagonal": stored_numbers(fit_mixture(z, 3, covariance="diagonal")),  # 3 · (1 + 4 + 4)
        "N(0, I)": stored_numbers(base(4)),
        "pool": stored_numbers(Empirical(z)),
    }
    assert counts == {"full": 45, "diagonal": 27, "N(0, I)": 8, "pool": 400}
    with pytest.raises(
        TypeError, match="Cannot count the numbers that the base stores; got .*SampleOnly"
    ):
        stored_numbers(SampleOnly(base()))
