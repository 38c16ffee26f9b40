"""Conditional flows p(z | c): densities of each context, their fit, all groups of a VAE."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import zuko
from helpers.hub_problems import equal_draws, trained
from helpers.toys import Ladder
from torch import Tensor
from torch.distributions import Independent, Normal

from ncprior import NCPrior, SingleGroup, langevin, sir
from ncprior.bases.flow import Conditional, Flow
from ncprior.bases.flow_fit import fit_flow, fit_flows
from ncprior.bases.rebase import rebase
from ncprior.heads import MLPHead
from ncprior.testing import check_source


def bent(features: int = 1, context: int = 1) -> Flow:
    """A conditional spline flow of random weights, far from the identity."""
    torch.manual_seed(3)
    flow = zuko.flows.NSF(features, context, transforms=2, hidden_features=(16,), passes=2)
    with torch.no_grad():
        for w in flow.parameters():
            w.mul_(1.5)
    loc, scale = torch.full((features,), 0.5), torch.full((features,), 2.0)
    return Flow(Conditional(flow, context), loc, scale, context_shape=(context,))


def test_the_density_of_each_context_integrates_to_one_and_is_that_of_its_draws() -> None:
    contexts = torch.tensor([[-1.5], [0.3], [2.0]])
    p = bent().given(contexts)
    z = (torch.linspace(-20, 21, 40_001) + 1e-4)[:, None, None].expand(-1, 3, 1)
    density = p.log_prob(z).double().exp()
    assert density.shape == (40_001, 3)
    mass = torch.trapezoid(density, z[:, 0, 0].double(), dim=0)
    torch.testing.assert_close(mass, torch.ones(3, dtype=torch.float64), atol=1e-3, rtol=0)
    torch.manual_seed(0)
    draws = p.sample((20_000,)).double()
    for power in (1, 2):
        values = z.double() ** power
        mean = torch.trapezoid(values[..., 0] * density, z[:, 0, 0].double(), dim=0)
        found = draws[..., 0] ** power
        error = found.std(0) / math.sqrt(len(found))
        assert ((found.mean(0) - mean).abs() < 4 * error + 1e-3).all()
    assert (mean[0] - mean[2]).abs() > 0.5  # contexts make a difference


def test_rows_have_their_own_context() -> None:
    p, contexts = bent(2, 3), torch.randn(4, 3)
    z = torch.randn(5, 4, 2)
    rows = [p.given(c[None]).log_prob(z[:, i : i + 1]) for i, c in enumerate(contexts)]
    torch.testing.assert_close(p.given(contexts).log_prob(z), torch.cat(rows, 1))
    same = p.given(contexts).expand((4,))
    assert torch.equal(same.log_prob(z), p.given(contexts).log_prob(z))


@pytest.mark.parametrize("shift", [0.0, 1000.0])
def test_the_fit_finds_a_line(shift: float) -> None:
    """z = 2 c + noise of standard deviation 1/2: within 0.05 nats of its entropy on new rows."""
    torch.manual_seed(0)
    c = torch.randn(3000, 1, 1)
    z = Normal(2 * c.flatten(1), 0.5).sample()
    p = fit_flow(z, context=shift + c, steps=200, learning_rate=5e-3, progress=False)
    fresh = torch.randn(2000, 1, 1)
    truth = Normal(2 * fresh.flatten(1), 0.5)
    z = truth.sample()
    missed = (truth.log_prob(z)[:, 0] - p.given(shift + fresh).log_prob(z)).mean()
    assert -0.01 < missed < 0.05
    by_rows = fit_flow(z, context=lambda rows: fresh[rows], steps=1, progress=False)
    assert by_rows.context_shape == (1, 1)


def test_labels_are_contexts_of_one_number() -> None:
    torch.manual_seed(0)
    labels = torch.randint(2, (1000,))
    z = 3.0 * labels[:, None] + 0.5 * torch.randn(1000, 1)
    p = fit_flow(z, context=labels, steps=200, learning_rate=5e-3, progress=False)
    assert p.context_shape == ()
    draws = p.given(torch.tensor([0, 1, 1])).sample((2000,))[..., 0]
    torch.testing.assert_close(draws.mean(0), torch.tensor([0.0, 3.0, 3.0]), atol=0.15, rtol=0)


def test_a_conditional_mixture_of_zuko() -> None:
    torch.manual_seed(0)
    c = torch.randint(2, (2000, 1)).float()
    z = torch.where(c > 0, torch.randn(2000, 1) + 4, 0.5 * torch.randn(2000, 1) - 2)
    gmm = zuko.mixtures.GMM(1, 1, components=2, hidden_features=(16,))
    p = fit_flow(z, gmm, context=c, steps=300, learning_rate=1e-2, progress=False)
    draws = p.given(torch.tensor([[0.0], [1.0]])).sample((4000,))[..., 0]
    torch.testing.assert_close(draws.mean(0), torch.tensor([-2.0, 4.0]), atol=0.15, rtol=0)
    torch.testing.assert_close(draws.std(0), torch.tensor([0.5, 1.0]), atol=0.15, rtol=0)
    assert p.config() is None


class Chain(Ladder):
    """Two groups, the second of which follows the first; the VAE's own prior does not know."""

    def __init__(self) -> None:
        super().__init__(2, dim=1, features=1)

    def group(self, state: Any) -> Any:
        z = state.latents[0] if state.latents else torch.zeros(len(state.h), 1)
        group = super().group(state)
        q = Independent(Normal(z, torch.full_like(z, 0.3)), 1) if group.posterior else None
        return group._replace(
            prior=Independent(Normal(torch.zeros_like(z), 1.0), 1), posterior=q, context=z
        )


def relative() -> Flow:
    """A flow of (z - μ) / σ, with one latent and one number of context."""
    p = bent()
    return Flow(p.flow, p.loc, p.scale, context_shape=(1,), is_relative=True)


def own_prior(z: Tensor) -> Independent:
    """The second group's own prior in Chain."""
    return Independent(Normal(torch.zeros_like(z), 1.0), 1)


def test_flows_of_all_groups() -> None:
    """q(z_2 | z_1) = N(z_1, 0.3²), which a flow given z_1 finds within 0.1 nats."""
    torch.manual_seed(0)
    source = Chain()
    bases = fit_flows(source, torch.randn(2000, 1), steps=200, learning_rate=5e-3, progress=False)
    context = 0.3 * torch.randn(1000, 1)
    truth = Normal(context, 0.3)
    z = truth.sample()
    missed = truth.log_prob(z)[:, 0] - bases[1].given(context, own_prior(context)).log_prob(z)
    assert -0.02 < missed.mean() < 0.1
    closer = rebase(source, bases)
    prior = NCPrior(closer, [MLPHead((1,), context_shape=(1,), width=8, depth=1) for _ in bases])
    z1, z2 = prior.eval().sample(2000, partial(sir, num_proposals=1)).latents
    assert (z2 - z1).std() < 0.36


class Narrow(Chain):
    """The own prior N(20 z_1, (0.01 exp(z_1))²) is right, and a flow of z would have to learn it."""

    def group(self, state: Any) -> Any:
        group = super().group(state)
        z = group.context
        if not state.latents:
            return group
        p = Independent(Normal(20 * z, 0.01 * z.exp()), 1)
        return group._replace(prior=p, posterior=p if group.posterior else None)


def test_flows_start_from_the_own_prior_of_each_row() -> None:
    """After five steps, log p' is that of a narrow own prior but for the flow's random start.

    The spread of z over all rows is 600 times that of the prior of one: a flow of z would be
    wrong by log 600 = 6.4 nats.
    """
    torch.manual_seed(0)
    source = Narrow()
    bases = fit_flows(source, torch.randn(2000, 1), steps=5, progress=False)
    assert bases[1].is_relative
    c = 0.3 * torch.randn(1000, 1)
    p = Independent(Normal(20 * c, 0.01 * c.exp()), 1)
    z = p.sample()
    ours = bases[1].given(c, p)
    missed = p.log_prob(z) - ours.log_prob(z)
    assert missed.abs().mean() < 0.6
    u = (ours.sample((50,)) - 20 * c) / (0.01 * c.exp())
    assert abs(u.mean()) < 0.5 and abs(u.std() - 1) < 0.5
    assert ours.to("cpu").log_prob(z).equal(ours.log_prob(z))
    closer = rebase(source, bases)
    state = closer.start(50, source.encode(torch.randn(50, 1)))
    state = closer.advance(state, closer.group(state).posterior.sample())
    group = closer.group(state)
    z = group.posterior.sample()
    assert (group.prior.log_prob(z) - group.posterior.log_prob(z)).abs().mean() < 0.6


def test_every_group_gets_a_flow_of_its_own() -> None:
    """A mixture given z_1, as exact as the spline flow."""
    torch.manual_seed(0)
    sizes = []

    def mixture(d: int, c: int) -> zuko.mixtures.GMM:
        sizes.append((d, c))
        return zuko.mixtures.GMM(d, c, components=2)

    options = {"steps": 200, "learning_rate": 5e-3, "progress": False}
    bases = fit_flows(Chain(), torch.randn(2000, 1), mixture, **options)
    assert sizes == [(1, 1), (1, 1)]
    assert len({id(base.flow) for base in bases}) == 2
    context = 0.3 * torch.randn(1000, 1)
    truth = Normal(context, 0.3)
    z = truth.sample()
    missed = truth.log_prob(z)[:, 0] - bases[1].given(context, own_prior(context)).log_prob(z)
    assert -0.02 < missed.mean() < 0.1
    free = SingleGroup(
        Independent(Normal(torch.zeros(2), torch.ones(2)), 1),
        lambda x: Independent(Normal(x, 0.1), 1),
        lambda z: z,
    )
    fit_flows(free, torch.randn(40, 2), mixture, steps=1, progress=False)
    assert sizes[2:] == [(2, 0)]


@pytest.mark.filterwarnings("ignore:Reconstructions of a row")  # of a VAE that is not trained
def test_it_is_a_base_with_a_density() -> None:
    source = rebase(Ladder(2), fit_flows(Ladder(2), torch.randn(60, 3), steps=1, progress=False))
    check_source(source, torch.randn(6, 3))
    prior = NCPrior.for_source(source, torch.randn(20, 3), width=8).eval()
    sample = prior.sample(5, lambda base, r: langevin(base, r, num_steps=2, step_size=0.01))
    assert sample.x.shape == (5, 3)


@pytest.mark.filterwarnings("ignore:The file has no fingerprint")
def test_groups_are_saved_with_the_heads_and_come_back_bit_for_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = Ladder(2)
    bases = fit_flows(source, torch.randn(60, 3), steps=2, progress=False)
    heads = [MLPHead((2,), context_shape=(8,), width=8, depth=1) for _ in bases]
    prior = trained(rebase(source, bases), *heads)
    prior.save_pretrained(tmp_path)
    loaded = NCPrior.from_pretrained(source, tmp_path)
    assert equal_draws(prior.eval(), loaded)


def test_a_vae_with_a_condition_has_one_flow() -> None:
    """Its context is the condition."""
    conditional = Ladder(1)
    (base,) = fit_flows(conditional, torch.randn(40, 3), steps=1, progress=False)
    assert base.context_shape == (8,) and base.needs_context
    free = SingleGroup(
        Independent(Normal(torch.zeros(2), torch.ones(2)), 1),
        lambda x: Independent(Normal(x, 0.1), 1),
        lambda z: z,
    )
    (base,) = fit_flows(free, torch.randn(40, 2), steps=1, progress=False)
    assert base.context_shape is None and base.sample((3,)).shape == (3, 2)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: bent().sample((2,)), ValueError, r"Take base.given\(context\)"),
        (lambda: bent().given(None), ValueError, r"fitted with a context.*\(1,\); got None"),
        (lambda: bent().given(torch.zeros(2, 3)), ValueError, r"\(1,\); got \(3,\)"),
        (lambda: bent().given([1.0]), TypeError, "context must be a tensor"),  # type: ignore[arg-type]
        (
            lambda: bent().given(torch.zeros(2, 1)).log_prob(torch.zeros(3, 1)),
            ValueError,
            "a row for each of the 2 contexts",
        ),
        (
            lambda: bent().given(torch.zeros(2, 1)).expand((3,)),
            ValueError,
            "2 rows of its context",
        ),
        (
            lambda: fit_flow(torch.randn(50, 2), zuko.flows.MAF(2), context=torch.zeros(50, 3)),
            ValueError,
            "2 features, with context=3",
        ),
        (
            lambda: fit_flow(torch.randn(50, 2), context=torch.zeros(40, 3)),
            ValueError,
            "one row for each row of latents; got 40 rows for 50",
        ),
        (
            lambda: fit_flow(torch.randn(50, 2), context=torch.full((50, 3), math.nan)),
            ValueError,
            "context must be finite",
        ),
        (lambda: fit_flows(Ladder(2), torch.zeros(0, 3)), ValueError, "The data have no rows"),
        (
            lambda: relative().given(torch.zeros(4, 1)),
            TypeError,
            r"relative to the VAE's own prior.*got None. Pass group.prior",
        ),
        (
            lambda: relative().given(torch.zeros(4, 1), own_prior(torch.zeros(4, 2))),
            ValueError,
            r"must have the shape of z, \(4, 1\); got \(4, 2\)",
        ),
        (
            lambda: (
                relative()
                .given(torch.zeros(4, 1), own_prior(torch.zeros(4, 1)))
                .log_prob(torch.zeros(5, 1))
            ),
            ValueError,
            "z must have a row for each of the 4 contexts",
        ),
        (
            lambda: (
                relative().given(torch.zeros(4, 1), own_prior(torch.zeros(4, 1))).log_prob([0.0])
            ),
            TypeError,
            "z must be a tensor of real numbers; got an object of type list",
        ),
        (
            lambda: Flow(zuko.flows.NSF(2), torch.zeros(2), torch.ones(2), is_relative=True),
            ValueError,
            "needs contexts; got none",
        ),
        (
            lambda: fit_flows(Ladder(2), torch.randn(9, 3), zuko.flows.NSF(2, 8)),
            TypeError,
            "Every group needs a flow of its own.*Pass lambda d, c: NSF",
        ),
        (
            lambda: fit_flows(Ladder(2), torch.randn(9, 3), context=torch.randn(9, 3)),
            TypeError,
            "takes the contexts from the source",
        ),
    ],
)
def test_errors(make: Any, error: Any, match: str) -> None:
    with pytest.raises(error, match=match):
        make()
