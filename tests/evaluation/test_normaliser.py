"""log Z from below and from above, where log Z is known."""

import math
from typing import Any

import pytest
import torch
from helpers.problems import Codes, CorrelatedPair, ExactRatio, GaussianPair, SampleOnly
from helpers.toys import Unfinished
from torch import Tensor
from torch.distributions import Independent, Normal

from ncprior import NCPrior, SingleGroup
from ncprior.evaluation.normaliser import LogZ, _Particles, anneal, log_normaliser


def tilted(kl: float, scale: float = 1.0, dim: int = 2) -> tuple[NCPrior, float, Any]:
    """A Gaussian pair with `scale` · log r: the prior, its log Z, and exact draws of NCP."""
    problem = GaussianPair(kl=kl, dim=dim)
    log_z = kl * scale * (scale - 1)  # E_N(0,1) e^{s |mu| u - s kl}, kl = |mu|²/2

    def exact(rows: int) -> list[Tensor]:
        return [scale * problem.mean + torch.randn(rows, dim)]

    return NCPrior(problem.source(), problem.head(scale)), log_z, exact


def error(x: Tensor) -> float:
    return (x.std() / math.sqrt(len(x))).item()


@pytest.mark.parametrize("temperatures", [1, 4])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_forward_and_reverse_enclose_log_z(temperatures: int, scale: float) -> None:
    """And both are unbiased where they should be: E Ẑ = Z forward, E 1/Ẑ = 1/Z in reverse."""
    torch.manual_seed(0)
    prior, truth, exact = tilted(1.0, scale)
    z = log_normaliser(
        prior,
        num_particles=20,
        num_temperatures=temperatures,
        step_size=1.0,
        replicates=300,
        exact=exact(300),
    )
    assert z.exact
    assert z.lower < truth + 2 * error(z.forward)
    assert z.upper > truth - 2 * error(z.reverse)
    forward, reverse = (z.forward - truth).exp(), (truth - z.reverse).exp()
    assert abs(forward.mean() - 1) < 4 * error(forward)
    assert abs(reverse.mean() - 1) < 4 * error(reverse)


def test_importance_sampling_is_optimistic_at_kl_8_as_the_quadrature_says() -> None:
    """E log Ẑ = -1.178 with 500 draws, for log Z = 0 (design, section 6)."""
    torch.manual_seed(0)
    prior, _, _ = tilted(8.0)
    z = log_normaliser(prior, num_particles=500, replicates=400)
    exact = GaussianPair(kl=8.0).law.mean_log_z(500)
    assert exact == pytest.approx(-1.178, abs=1e-3)
    assert abs(z.lower - exact) < 4 * error(z.forward)


def test_annealing_repairs_it() -> None:
    torch.manual_seed(0)
    prior, truth, exact = tilted(8.0)
    z = log_normaliser(
        prior,
        num_particles=500,
        num_temperatures=50,
        step_size=1.0,
        replicates=10,
        exact=exact(10),
    )
    assert abs(z.lower - truth) < 0.1
    assert abs(z.upper - truth) < 0.1
    assert 0.5 < z.acceptance < 1


def test_more_particles_bring_the_ends_together() -> None:
    torch.manual_seed(0)
    prior, _, exact = tilted(3.0)
    widths = []
    for count in (20, 200, 2000):
        z = log_normaliser(prior, num_particles=count, replicates=100, exact=exact(100))
        widths.append(z.upper - z.lower)
    assert widths[0] > 2 * widths[1] > 4 * widths[2] > 0


def test_without_exact_draws_the_particles_supply_them() -> None:
    torch.manual_seed(0)
    prior, truth, _ = tilted(1.0)
    z = log_normaliser(prior, num_particles=5000, replicates=20)
    assert not z.exact
    assert z.lower - 3 * error(z.forward) < truth < z.upper + 3 * error(z.reverse)
    assert z.std < 0.1


class Steep(CorrelatedPair):
    """The correlated pair with other heads: e^{z_1/2}, and e^{c z_1 z_2}, whose Z depends on z_1."""

    def log_r(self, z: Tensor, context: Tensor) -> Tensor:
        return (z * context).squeeze(-1) * self.correlation

    def heads(self, scale: float = 1.0) -> list[ExactRatio]:
        return [ExactRatio(lambda z: 0.5 * z.squeeze(-1)), ExactRatio(self.log_r)]

    @property
    def covariance(self) -> Tensor:
        """That of NCP, whose precision is [[1, -c], [-c, 1]]."""
        return torch.tensor([[1.0, -self.correlation], [-self.correlation, 1.0]]).inverse()

    @property
    def log_z(self) -> float:
        """log E e^{z_1/2 + c z_1 z_2} for independent N(0, 1)."""
        return (0.5 * self.covariance.logdet() + 0.125 * self.covariance[0, 0]).item()

    def exact(self, rows: int) -> list[Tensor]:
        noise = torch.randn(rows, 2) @ torch.linalg.cholesky(self.covariance).mT
        z = 0.5 * self.covariance[0] + noise
        return [z[:, :1], z[:, 1:]]


@pytest.mark.parametrize(("temperatures", "replicates"), [(1, 1500), (3, 300)])
def test_a_hierarchy_has_one_global_normaliser(temperatures: int, replicates: int) -> None:
    """Resampling between the groups, with and without a retained draw, stays unbiased."""
    torch.manual_seed(0)
    problem = Steep(correlation=0.6)
    z = log_normaliser(
        NCPrior(problem, problem.heads()),
        num_particles=4,
        num_temperatures=temperatures,
        step_size=1.0,
        replicates=replicates,
        exact=problem.exact(replicates),
    )
    forward, reverse = (z.forward - problem.log_z).exp(), (problem.log_z - z.reverse).exp()
    assert abs(forward.mean() - 1) < 4 * error(forward)
    assert abs(reverse.mean() - 1) < 4 * error(reverse)
    assert z.lower < problem.log_z < z.upper


def test_the_particles_of_a_hierarchy_supply_draws_of_all_its_groups() -> None:
    """Their paths are those of NCP: with few particles the reverse estimate starts near enough."""
    torch.manual_seed(0)
    problem = Steep(correlation=0.6)
    prior = NCPrior(problem, problem.heads())
    paths = [_Particles(prior, 200, 1, 0.2, None).run(None)[1] for _ in range(400)]
    z = torch.cat([torch.cat(path, 1) for path in paths])
    mean = 0.5 * problem.covariance[0]
    assert torch.allclose(z.mean(0), mean, atol=4 * 1.25 / math.sqrt(400))
    assert torch.allclose(z.T.cov(), problem.covariance, atol=0.4)


def test_the_retained_draw_is_a_parent_like_any_other() -> None:
    """Where it outweighs all particles, all of the next group's particles are its children."""
    problem, seen = CorrelatedPair(), []

    def second(z: Tensor, context: Tensor) -> Tensor:
        seen.append(context)
        return torch.zeros_like(z.squeeze(-1))

    heads = [ExactRatio(lambda z: 20 * z.squeeze(-1)), ExactRatio(second)]
    particles = _Particles(NCPrior(problem, heads), 10, 1, 0.2, None)
    particles.run([torch.tensor([[9.0]]), torch.tensor([[0.0]])])
    assert torch.equal(torch.cat(seen), torch.full((10, 1), 9.0))


def test_groups_that_are_off_and_strength_are_those_of_the_sampler() -> None:
    prior, _, _ = tilted(1.0)
    prior.strength = 2.0
    torch.manual_seed(0)
    strong = log_normaliser(prior, num_particles=100)
    torch.manual_seed(0)
    assert torch.allclose(
        strong.forward, log_normaliser(tilted(1.0, 2.0)[0], num_particles=100).forward
    )
    prior.active = [False]
    off = log_normaliser(prior, num_particles=100)
    assert (off.lower, off.upper, off.std) == (0.0, 0.0, 0.0)


def test_discrete_latents_are_weighed_but_not_annealed() -> None:
    torch.manual_seed(0)
    problem = Codes()
    prior = NCPrior(problem.source(), problem.head())
    z = log_normaliser(prior, num_particles=500, replicates=50)
    assert z.lower < 3 * error(z.forward)
    assert abs(z.lower) < 0.02
    with pytest.raises(TypeError, match="discrete"):
        log_normaliser(prior, num_particles=10, num_temperatures=2)


def test_the_condition_of_one_row_is_everybodys() -> None:
    """p(z|c) = N(c, 1) and r = e^z: log Z = c + 1/2."""

    def prior_of(c: Tensor) -> Independent:
        return Independent(Normal(c, 1.0, validate_args=False), 1)

    class Source(Unfinished):
        num_groups = 1

        def start(self, batch_size: int, encoding: Any = None, condition: Any = None) -> Tensor:
            assert len(condition) == batch_size
            return condition

        def group(self, state: Tensor) -> Any:
            from ncprior import Group

            return Group(prior_of(state))

        def advance(self, state: Tensor, z: Tensor) -> Tensor:
            return state

    prior = NCPrior(Source(), ExactRatio(lambda z: z.sum(-1)))
    torch.manual_seed(0)
    for c in (0.0, 2.0):
        z = log_normaliser(prior, num_particles=20_000, condition=torch.tensor([[c]]))
        assert z.lower == pytest.approx(c + 0.5, abs=0.05)


def test_annealing_backwards_is_unbiased_for_one_over_z() -> None:
    torch.manual_seed(0)
    problem = GaussianPair(kl=2.0)
    run = anneal(
        problem.prior.expand((40_000,)),
        problem.log_r,
        num_temperatures=3,
        step_size=1.0,
        backwards_from=problem.target.sample((40_000,)),
    )
    w = (-run.log_w).exp()
    assert abs(w.mean() - 1) < 4 * error(w)
    assert error(w) < 0.02


def test_annealing_gives_weighted_draws_of_the_target() -> None:
    torch.manual_seed(0)
    problem = GaussianPair(kl=2.0)
    run = anneal(problem.prior.expand((20_000,)), problem.log_r, num_temperatures=5, step_size=0.5)
    w = run.log_w.softmax(0)
    assert torch.allclose(w @ run.z, problem.mean, atol=0.06)
    assert (run.acceptance > 0.7).float().mean() > 0.9


@pytest.mark.parametrize(
    ("name", "value"), [("num_particles", 1), ("num_temperatures", 0), ("replicates", 1)]
)
def test_numbers_that_are_too_small_are_refused(name: str, value: int) -> None:
    prior, _, _ = tilted(1.0)
    with pytest.raises(ValueError, match=f"{name} must be a whole number in"):
        log_normaliser(prior, **{name: value})  # type: ignore[arg-type]


def test_exact_draws_of_the_wrong_shape_are_refused() -> None:
    prior, _, exact = tilted(1.0)
    with pytest.raises(ValueError, match="5 rows each"):
        log_normaliser(prior, num_particles=10, exact=exact(4))


def test_a_sample_only_base_cannot_be_annealed() -> None:
    problem = GaussianPair()
    source = SingleGroup(SampleOnly(problem.prior), problem.source().encode, lambda z: z)  # type: ignore[arg-type]
    prior = NCPrior(source, problem.head())
    assert log_normaliser(prior, num_particles=1000).std < 0.5
    with pytest.raises(TypeError, match="can only be sampled"):
        log_normaliser(prior, num_particles=10, num_temperatures=2)


def test_a_bad_head_is_reported() -> None:
    source = GaussianPair().source()
    prior = NCPrior(source, ExactRatio(lambda z: z.sum(-1) / 0))
    with pytest.raises(FloatingPointError, match="not finite"):
        log_normaliser(prior, num_particles=10)


def test_the_line_says_what_it_is() -> None:
    z = LogZ(torch.zeros(3), torch.ones(3), False, 10, 1, math.nan)
    assert str(z) == (
        "log Z between 0.000 and 1.000 nats (standard errors 0.000 and 0.000, of 3 replicates)"
    )
