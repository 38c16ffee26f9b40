from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from helpers.problems import Codes, CorrelatedPair, GaussianPair, SampleOnly
from helpers.toys import VAE, Ladder, Rung, base, everything, flat
from torch import Tensor, nn
from torch.distributions import (
    Bernoulli,
    Categorical,
    Distribution,
    Independent,
    Laplace,
    LowRankMultivariateNormal,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    OneHotCategorical,
)
from torch.utils._pytree import tree_leaves, tree_map_only

from ncprior import Group, LatentSource, NCPrior, SingleGroup
from ncprior.bases.latents import latents_of
from ncprior.bases.rebase import rebase
from ncprior.evaluation.likelihood import log_likelihood
from ncprior.heads.networks import MLPHead
from ncprior.source import device_of, num_rows, posterior_of, sample_posterior, visit
from ncprior.testing import check_source
from ncprior.utils.fingerprints import module_fingerprint
from ncprior.vaebm.gaussian_decoder import GaussianDecoder
from ncprior.vaebm.model import VAEBM


def mixture(rows: tuple[int, ...] = ()) -> MixtureSameFamily:
    """A distribution of a type that walks do not know."""
    component = Independent(Normal(torch.randn(*rows, 5, 2), 1.0, validate_args=False), 1)
    weight = Categorical(torch.ones(*rows, 5), validate_args=False)
    return MixtureSameFamily(weight, component, validate_args=False)


# --- SingleGroup walks ---


def test_a_walk_with_x_and_one_without() -> None:
    vae, x = VAE(), torch.randn(5, 3)
    source = flat(vae)
    state = source.start(5, source.encode(x))
    group = source.group(state)
    assert group.context is None
    assert (group.prior.batch_shape, group.prior.event_shape) == ((5,), (2,))
    expected = vae.posterior(x)
    assert torch.equal(posterior_of(group).mean, expected.mean)
    assert torch.equal(posterior_of(group).stddev, expected.stddev)
    z = torch.randn(5, 2)
    assert torch.equal(source.decode(source.advance(state, z)), vae.decode(z))
    free = source.start(5)
    assert source.group(free).posterior is None
    assert torch.equal(source.decode(source.advance(free, z)), vae.decode(z))


def test_of_a_tuple_or_list_x_is_the_first_item() -> None:
    source, x = flat(), torch.randn(5, 3)
    for batch in ((x, torch.arange(5)), [x, torch.arange(5)], (x,)):
        for a, b in zip(
            tree_leaves(source.encode(batch)), tree_leaves(source.encode(x)), strict=True
        ):
            assert a is b is None or torch.equal(a, b)


POSTERIORS: dict[str, tuple[Callable[[int], Distribution], Distribution]] = {
    "normal": (
        lambda n: Independent(Normal(torch.randn(n, 4), torch.rand(n, 4)), 1),
        Independent(Normal(torch.zeros(4), torch.ones(4)), 1),
    ),
    "normal of a scalar": (lambda n: Normal(torch.randn(n), 1.0), Normal(torch.tensor(0.0), 1.0)),
    "normal map": (
        lambda n: Independent(Normal(torch.randn(n, 3, 2, 2), 1.0), 3),
        Independent(Normal(torch.zeros(3, 2, 2), torch.ones(3, 2, 2)), 3),
    ),
    "nested independents": (
        lambda n: Independent(Independent(Normal(torch.randn(n, 3, 2), 1.0), 1), 1),
        Independent(Normal(torch.zeros(3, 2), torch.ones(3, 2)), 2),
    ),
    "laplace": (
        lambda n: Independent(Laplace(torch.randn(n, 4), torch.rand(n, 4)), 1),
        Independent(Laplace(torch.zeros(4), torch.ones(4)), 1),
    ),
    "multivariate normal": (
        lambda n: MultivariateNormal(torch.randn(n, 2), torch.tensor([[2.0, 0.5], [0.5, 1.0]])),
        MultivariateNormal(torch.zeros(2), torch.eye(2)),
    ),
    "bernoulli": (
        lambda n: Independent(Bernoulli(logits=torch.randn(n, 4)), 1),
        Independent(Bernoulli(probs=torch.full((4,), 0.3)), 1),
    ),
    "categorical": (
        lambda n: Categorical(logits=torch.randn(n, 7)),
        Categorical(probs=torch.arange(1.0, 8.0)),
    ),
    "grid of codes": (
        lambda n: Independent(Categorical(logits=torch.randn(n, 2, 3, 7)), 2),
        Independent(Categorical(logits=torch.zeros(2, 3, 7)), 2),
    ),
    "one-hot": (
        lambda n: OneHotCategorical(logits=torch.randn(n, 7)),
        OneHotCategorical(probs=torch.ones(7)),
    ),
}


@pytest.mark.parametrize("name", POSTERIORS)
def test_the_encoding_is_the_parameters_of_a_known_posterior(name: str) -> None:
    make, prior = POSTERIORS[name]
    calls = 0

    def posterior(x: Tensor) -> Distribution:
        nonlocal calls
        calls += 1
        torch.manual_seed(1)
        return make(len(x))

    source = SingleGroup(prior, posterior, lambda z: z.float())
    x = torch.randn(5, 3)
    expected = posterior(x)
    state = source.start(5, source.encode(x))
    for _ in range(3):
        group = source.group(state)
    q, p = posterior_of(group), group.prior
    assert calls == 2  # once here, once in encode
    assert (q.batch_shape, q.event_shape) == (expected.batch_shape, expected.event_shape)
    assert (p.batch_shape, p.event_shape) == ((5,), prior.event_shape)
    z = expected.sample()
    torch.testing.assert_close(q.log_prob(z), expected.log_prob(z))
    torch.testing.assert_close(p.log_prob(z), prior.log_prob(z))
    torch.manual_seed(2)
    a = q.sample()
    torch.manual_seed(2)
    assert torch.equal(a, expected.sample())
    assert len(tree_leaves(state)) > 1
    assert all(t is None or len(t) == 5 for t in tree_leaves(state))


@pytest.mark.parametrize("name", [name for name in POSTERIORS if "normal" in name])
def test_rows_of_a_prior_are_its_own_draws(name: str) -> None:
    """`expand(prior, B).sample()` is `prior.sample((B,))`, bit for bit under the same seed."""
    _, prior = POSTERIORS[name]
    source = SingleGroup(prior, lambda x: prior, lambda z: z)
    torch.manual_seed(3)
    ours = source.group(source.start(6)).prior.sample()
    torch.manual_seed(3)
    assert torch.equal(ours, prior.sample((6,)))


def test_the_encoding_is_the_batch_for_an_unknown_posterior() -> None:
    def posterior(x: Tensor) -> Distribution:
        component = Independent(Normal(torch.stack([x, -x], 1), 1.0, validate_args=False), 1)
        weight = Categorical(torch.ones(len(x), 2), validate_args=False)
        return MixtureSameFamily(weight, component, validate_args=False)

    source = SingleGroup(base(), posterior, lambda z: z)
    x = torch.randn(5, 2)
    encoding = source.encode((x, torch.zeros(5)))
    assert encoding.posterior is x
    q = posterior_of(source.group(source.start(5, encoding)))
    assert isinstance(q, MixtureSameFamily)
    z = torch.randn(5, 2)
    assert torch.equal(q.log_prob(z), posterior(x).log_prob(z))
    check_source(source, x)


def test_a_dict_is_a_batch_like_any_other() -> None:
    vae = VAE()
    source = SingleGroup(
        base(), lambda batch: vae.posterior(batch["image"]), vae.decode, module=vae
    )
    check_source(source, {"image": torch.randn(5, 3), "label": torch.arange(5)})


def test_an_unknown_prior_is_expanded() -> None:
    prior = mixture()
    source = SingleGroup(prior, lambda x: base().expand((len(x),)), lambda z: z)
    p = source.group(source.start(6)).prior
    assert isinstance(p, MixtureSameFamily)
    assert p.batch_shape == (6,)
    z = torch.randn(6, 2)
    torch.testing.assert_close(p.log_prob(z), prior.log_prob(z))


def test_a_prior_that_can_only_be_sampled() -> None:
    vae = VAE()
    source = SingleGroup(SampleOnly(base()), vae.posterior, vae.decode, module=vae)
    p = source.group(source.start(6)).prior
    assert p.sample().shape == (6, 2)
    assert p.sample(torch.Size((4, 3))).shape == (4, 3, 6, 2)
    check_source(source, torch.randn(5, 3))


def test_distributions_do_not_validate() -> None:
    source = SingleGroup(
        Independent(Normal(torch.zeros(2), torch.ones(2), validate_args=True), 1),
        lambda x: Independent(Normal(x, 1.0, validate_args=True), 1, validate_args=True),
        lambda z: z,
    )
    group = source.group(source.start(3, source.encode(torch.randn(3, 2))))
    nan = torch.full((3, 2), torch.nan)
    assert group.prior.log_prob(nan).isnan().all()
    assert posterior_of(group).log_prob(nan).isnan().all()


# --- conditions ---


def conditional() -> tuple[VAE, SingleGroup]:
    vae = VAE(condition=2)
    return vae, flat(vae, condition=lambda batch: batch[1])


def test_a_condition_reaches_posterior_decoder_and_context() -> None:
    vae, source = conditional()
    x, c, z = torch.randn(5, 3), torch.randn(5, 2), torch.randn(5, 2)
    state = source.start(5, source.encode((x, c)))
    group = source.group(state)
    assert group.context is c
    assert torch.equal(posterior_of(group).mean, vae.posterior(x, c).mean)
    assert torch.equal(source.decode(source.advance(state, z)), vae.decode(z, c))
    free = source.start(5, condition=c)
    assert source.group(free).context is c
    assert torch.equal(source.decode(source.advance(free, z)), vae.decode(z, c))
    check_source(source, (x, c), condition=c)


def test_a_missing_or_unexpected_condition_is_named() -> None:
    _, source = conditional()
    with pytest.raises(ValueError, match="needs a condition; got none"):
        source.start(5)
    with pytest.raises(ValueError, match="takes no condition; got one"):
        flat().start(5, condition=torch.zeros(5, 2))
    with pytest.raises(ValueError, match="5 rows; got 4 rows of condition"):
        source.start(5, condition=torch.zeros(4, 2))


def test_likelihood_sees_z_and_the_condition() -> None:
    vae = VAE(condition=2)

    def likelihood(z: Tensor, c: Tensor) -> Distribution:
        return Independent(Normal(vae.decode(z, c), 0.1), 1)

    source = flat(vae, condition=lambda batch: batch[1], likelihood=likelihood)
    c, z = torch.randn(4, 2), torch.randn(4, 2)
    state = source.advance(source.start(4, condition=c), z)
    assert torch.equal(source.likelihood(state).mean, vae.decode(z, c))
    with pytest.raises(
        ValueError, match="does not know p.x . z.. Make it with SingleGroup.likeli"
    ):
        flat().likelihood(state)


# --- errors ---


def test_a_prior_with_a_batch_shape_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"got batch shape \(2,\).*Independent\(prior, 1\)"):
        SingleGroup(Normal(torch.zeros(2), torch.ones(2)), VAE().posterior, VAE().decode)
    with pytest.raises(TypeError, match="needs a method `sample`; got 3"):
        SingleGroup(3, VAE().posterior, VAE().decode)  # type: ignore[arg-type]


def test_a_vae_in_training_mode_is_refused() -> None:
    vae = VAE()
    source = flat(vae)
    encoding = source.encode(torch.randn(4, 3))
    vae.encoder[1].train()
    for call in (lambda: source.encode(torch.randn(4, 3)), lambda: source.start(4, encoding)):
        with pytest.raises(ValueError, match=r"encoder\.1 is in training mode. Call vae.eval\(\)"):
            call()
    vae.train()
    with pytest.raises(ValueError, match="VAE is in training mode"):
        source.start(4)


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        (
            lambda x: (x, x),
            TypeError,
            r"must return a distribution; got an object of type tuple.*0.5 \* log_var",
        ),
        (
            lambda x: Normal(x[:, :2], 1.0),
            ValueError,
            r"batch shape \(4, 2\) and event shape \(\)",
        ),
        (
            lambda x: Independent(Normal(x, 1.0), 1),
            ValueError,
            r"latents of one shape; got \(2,\) from the prior and \(3,\) from q",
        ),
        (lambda x: base(), ValueError, r"got batch shape \(\)"),
    ],
)
def test_a_wrong_posterior_is_named(
    result: Callable[[Tensor], Any], error: type[Exception], message: str
) -> None:
    source = SingleGroup(base(), result, lambda z: z)
    with pytest.raises(error, match=message):
        source.encode(torch.randn(4, 3))


def test_wrong_rows_and_a_missing_z_are_named() -> None:
    source = flat()
    with pytest.raises(ValueError, match="The walk has 6 rows; got 5 rows of encoding"):
        source.start(6, source.encode(torch.randn(5, 3)))
    state = source.start(5)
    with pytest.raises(ValueError, match="The walk has 5 rows; got 4 rows of z"):
        source.advance(state, torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"Decoding needs z.*Call advance\(state, z\)"):
        source.decode(state)


def test_small_functions_refuse() -> None:
    with pytest.raises(ValueError, match="first axis of tensors; got an object of type tuple"):
        num_rows(("a", None, torch.tensor(1.0)))
    with pytest.raises(ValueError, match="its group has no posterior"):
        posterior_of(Group(base()))


# --- dtype ---


def test_a_bf16_vae_has_float32_latents() -> None:
    vae = VAE().bfloat16()
    source = SingleGroup(
        Independent(Normal(torch.zeros(2).bfloat16(), torch.ones(2).bfloat16()), 1),
        lambda x: vae.posterior(x.bfloat16()),
        vae.decode,
        module=vae,
    )
    x = torch.randn(16, 3)
    group = source.group(source.start(16, source.encode(x)))
    assert group.prior.sample().dtype == posterior_of(group).sample().dtype == torch.float32
    latents, state = sample_posterior(source, x)
    assert latents[0].dtype == torch.float32
    assert source.decode(state).dtype == torch.bfloat16
    check_source(source, x)


def test_a_bf16_vae_takes_a_float32_condition() -> None:
    vae = VAE(condition=2).bfloat16()
    source = SingleGroup(
        base(),
        lambda x, c: vae.posterior(x.bfloat16(), c),
        vae.decode,
        module=vae,
        condition=lambda batch: batch[1],
    )
    c = torch.randn(4, 2)
    check_source(source, (torch.randn(4, 3), c), condition=c)


def test_float64_stays_float64() -> None:
    vae = VAE().double()
    prior = Independent(Normal(torch.zeros(2).double(), torch.ones(2).double()), 1)
    source = SingleGroup(prior, vae.posterior, vae.decode, module=vae)
    latents, state = sample_posterior(source, torch.randn(4, 3).double())
    assert latents[0].dtype == source.decode(state).dtype == torch.float64


# --- fingerprint ---


def test_the_fingerprint_changes_with_any_weight_and_nothing_else() -> None:
    vae = VAE()
    source = flat(vae)
    before = source.fingerprint()
    assert before is not None and before.startswith("float32:") and len(before) == 8 + 64
    vae.requires_grad_(False).train().eval()
    vae.decode(torch.randn(3, 2))
    assert source.fingerprint() == before
    assert flat(vae).fingerprint() == before
    seen = {before}
    for tensor in vae.state_dict().values():  # parameters and buffers
        kept = tensor.clone()
        flat_view = tensor.reshape(-1)
        flat_view[-1] += 1 if not tensor.is_floating_point() else 1e-6 + 1e-6 * flat_view[-1].abs()
        changed = source.fingerprint()
        assert changed not in seen
        seen.add(changed)
        tensor.copy_(kept)
    assert source.fingerprint() == before
    assert module_fingerprint(vae.double()) not in seen
    assert flat().fingerprint() not in seen


def test_the_fingerprint_knows_names_and_shapes() -> None:
    a, b = nn.Linear(2, 3, bias=False), nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        b.weight.copy_(a.weight.reshape(2, 3))
    assert module_fingerprint(a) != module_fingerprint(b)
    assert module_fingerprint(nn.ModuleDict({"a": a})) != module_fingerprint(
        nn.ModuleDict({"b": a})
    )


def test_without_a_module_there_is_no_fingerprint() -> None:
    assert SingleGroup(base(), VAE().posterior, VAE().decode).fingerprint() is None


# --- sample_posterior ---


def test_sample_posterior_is_the_training_walk() -> None:
    source, x = Ladder(), torch.randn(6, 3)
    torch.manual_seed(5)
    latents, state = sample_posterior(source, x)
    torch.manual_seed(5)
    expected = source.start(6, source.encode(x))
    for z in latents:
        assert torch.equal(z, posterior_of(source.group(expected)).sample())
        expected = source.advance(expected, z)
    assert torch.equal(source.decode(state), source.decode(expected))
    assert not any(z.requires_grad for z in latents)


def test_a_visit_is_the_loop_written_out() -> None:
    """Also for choices that depend on the group's number and its context."""
    source, x = Ladder(), torch.randn(6, 3)
    start = source.start(6, source.encode(x))

    def choose(k: int, group: Group) -> Tensor:
        assert group.context is not None
        return group.prior.sample() + k * group.context[:, :2]

    torch.manual_seed(5)
    latents, state = visit(source, start, choose)
    torch.manual_seed(5)
    expected = start
    for k in range(3):
        z = choose(k, source.group(expected))
        assert torch.equal(z, latents[k])
        expected = source.advance(expected, z)
    assert torch.equal(source.decode(state), source.decode(expected))


def test_sample_posterior_draws_the_aggregate_posterior() -> None:
    problem = GaussianPair()
    n = 20_000
    latents, _ = sample_posterior(problem.source(), problem.data(n))
    error = (latents[0].mean(0) - problem.mean).abs()
    assert (error < 4 / n**0.5).all()  # unit variance: 4 standard errors
    assert ((latents[0].var(0) - 1).abs() < 4 * (2 / n) ** 0.5).all()


# --- check_source: good sources ---


GOOD: dict[str, tuple[Callable[[], LatentSource[Any, Any]], Callable[[], Any]]] = {
    "flat": (flat, lambda: torch.randn(5, 3)),
    "a module": (Ladder, lambda: torch.randn(5, 3)),
    "two rows": (Ladder, lambda: torch.randn(2, 3)),
    "one group": (lambda: Ladder(1), lambda: torch.randn(5, 3)),
    "float64": (lambda: Ladder().double(), lambda: torch.randn(5, 3).double()),
    "bf16": (lambda: Ladder().bfloat16(), lambda: torch.randn(5, 3).bfloat16()),
    "codes": (lambda: Codes().source(), lambda: Codes().data(8)),
    "pair": (CorrelatedPair, lambda: CorrelatedPair().data(8)),
}


@pytest.mark.parametrize("name", GOOD)
def test_check_source_accepts(name: str) -> None:
    make, data = GOOD[name]
    source, x = make(), data()
    before = torch.get_rng_state()
    check_source(source, x)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.is_grad_enabled()


def test_check_source_leaves_the_vae_as_it_was() -> None:
    source = Ladder()
    source.decoder.weight.grad = torch.ones_like(source.decoder.weight)
    before = everything(source)
    check_source(source, torch.randn(4, 3))
    assert everything(source) == before


# --- check_source: one broken source per law ---


class Batchwise(Ladder):
    def encode(self, x: Tensor) -> Tensor:
        return super().encode(x - x.mean(0))


class BatchwiseStep(Ladder):
    def advance(self, state: Rung, z: Tensor) -> Rung:
        return super().advance(state, z - z.mean(0))


class BatchwisePrior(Ladder):
    def group(self, state: Rung) -> Group:
        return super().group(state._replace(h=state.h + len(state.h)))


class BatchwiseDecoder(Ladder):
    def decode(self, state: Rung) -> Tensor:
        return super().decode(state) - state.h.mean()


class Detached(Ladder):
    def advance(self, state: Rung, z: Tensor) -> Rung:
        return super().advance(state, z.detach())


class DetachedDecoder(Ladder):
    def decode(self, state: Rung) -> Tensor:
        return super().decode(state).detach()


class NoGrad(Ladder):
    @torch.no_grad()
    def advance(self, state: Rung, z: Tensor) -> Rung:
        return super().advance(state, z)


class TurnsGradientsOff(Ladder):
    def decode(self, state: Rung) -> Tensor:
        torch.set_grad_enabled(False)
        return super().decode(state)


class TurnsGradientsOn(Ladder):
    def decode(self, state: Rung) -> Tensor:
        torch.set_grad_enabled(True)
        return super().decode(state)


class DrawsInGroup(Ladder):
    def group(self, state: Rung) -> Group:
        return super().group(state._replace(h=state.h + 0.1 * torch.randn_like(state.h)))


class WritesInGroup(Ladder):
    def start(
        self, batch_size: int, encoding: Tensor | None = None, condition: None = None
    ) -> Rung:
        state = super().start(batch_size, encoding)
        return state._replace(h=state.h.clone())

    def group(self, state: Rung) -> Group:
        group = super().group(state)
        state.h.mul_(1.01)
        return group._replace(context=None)


class WritesInAdvance(Ladder):
    def start(
        self, batch_size: int, encoding: Tensor | None = None, condition: None = None
    ) -> Rung:
        state = super().start(batch_size, encoding)
        return state._replace(h=state.h.clone())

    def advance(self, state: Rung, z: Tensor) -> Rung:
        new = super().advance(state, z)
        return new._replace(h=state.h.copy_(new.h))


class WritesZ(Ladder):
    def advance(self, state: Rung, z: Tensor) -> Rung:
        new = super().advance(state, z.clone())
        if not z.requires_grad:
            z.mul_(2)
        return new


class Caches(Ladder):
    """Shares one buffer among all new states."""

    buffer: Tensor | None = None

    def advance(self, state: Rung, z: Tensor) -> Rung:
        new = super().advance(state, z)
        if self.__dict__.get("cache") is None or self.__dict__["cache"].shape != new.h.shape:
            self.__dict__["cache"] = new.h.clone()
        if torch.is_grad_enabled() or len(new.latents) > 1:
            return new
        return new._replace(h=self.__dict__["cache"].copy_(new.h))


class Remembers(Ladder):
    """Keeps its place in the object instead of the state."""

    def advance(self, state: Rung, z: Tensor) -> Rung:
        self.__dict__["last"] = z.detach()
        return super().advance(state, z)

    def group(self, state: Rung) -> Group:
        group = super().group(state)
        last = self.__dict__.get("last")
        if last is None or last.shape != (len(state.h), self.dim):
            return group
        return group._replace(context=torch.cat([state.h, last], -1))


class PriorSeesX(Ladder):
    def group(self, state: Rung) -> Group:
        group = super().group(state)
        return group if group.posterior is None else group._replace(prior=group.posterior)


class ContextSeesX(Ladder):
    def group(self, state: Rung) -> Group:
        extra = torch.zeros_like(state.h) if state.encoding is None else state.encoding
        return super().group(state)._replace(context=state.h + extra)


class NoContextWithoutX(Ladder):
    def group(self, state: Rung) -> Group:
        group = super().group(state)
        return group._replace(context=None) if state.encoding is None else group


class DecoderSeesX(Ladder):
    def decode(self, state: Rung) -> Tensor:
        return super().decode(state) + (
            0 if state.encoding is None else state.encoding.mean(1, True)
        )


class PosteriorWithoutX(Ladder):
    def group(self, state: Rung) -> Group:
        group = super().group(state)
        return group._replace(posterior=group.posterior or group.prior)


class NoPosterior(Ladder):
    def group(self, state: Rung) -> Group:
        return super().group(state)._replace(posterior=None)


class PlainTuple(Ladder):
    def group(self, state: Rung) -> Group:
        return tuple(super().group(state))  # type: ignore[return-value]


class BatchOfOne(Ladder):
    def start(
        self, batch_size: int, encoding: Tensor | None = None, condition: None = None
    ) -> Rung:
        return super().start(batch_size, encoding)._replace(h=self.h0[None])

    def group(self, state: Rung) -> Group:
        rows = 1 if state.encoding is None else len(state.encoding)
        return super().group(state._replace(h=state.h.expand(rows, -1)))


class NotIndependent(Ladder):
    def group(self, state: Rung) -> Group:
        p, q, context = super().group(state)
        return Group(p.base_dist, q, context)  # type: ignore[attr-defined]


class HalfPrecision(Ladder):
    def group(self, state: Rung) -> Group:
        p, q, context = super().group(state)
        mean = p.mean.bfloat16()  # type: ignore[attr-defined]
        return Group(Independent(Normal(mean, torch.ones_like(mean)), 1), q, context)


class HalfContext(Ladder):
    def group(self, state: Rung) -> Group:
        return super().group(state)._replace(context=state.h.half())


class Validates(Ladder):
    """A prior on [0, ∞) that does not contain all draws of the posterior."""

    def group(self, state: Rung) -> Group:
        one = torch.ones(len(state.h), self.dim)
        prior = Independent(torch.distributions.Exponential(one, validate_args=True), 1)
        return super().group(state)._replace(prior=prior)


class Holder(NamedTuple):
    rung: Any


class OpaqueState(Ladder):
    def start(
        self, batch_size: int, encoding: Tensor | None = None, condition: None = None
    ) -> Rung:
        return Holder([super().start(batch_size, encoding), base()])  # type: ignore[return-value]

    def group(self, state: Holder) -> Group:  # type: ignore[override]
        return super().group(state.rung[0])

    def advance(self, state: Holder, z: Tensor) -> Holder:  # type: ignore[override]
        return Holder([super().advance(state.rung[0], z), base()])

    def decode(self, state: Holder) -> Tensor:  # type: ignore[override]
        return super().decode(state.rung[0])


class TransposedState(Ladder):
    """Rows last."""

    def start(
        self, batch_size: int, encoding: Tensor | None = None, condition: None = None
    ) -> Rung:
        state = super().start(batch_size, encoding)
        return state._replace(h=state.h.T)

    def group(self, state: Rung) -> Group:
        return super().group(state._replace(h=state.h.T))

    def advance(self, state: Rung, z: Tensor) -> Rung:
        new = super().advance(state._replace(h=state.h.T), z)
        return new._replace(h=new.h.T)

    def decode(self, state: Rung) -> Tensor:
        return super().decode(state._replace(h=state.h.T))


class OwnGenerator(Ladder):
    """Draws from a generator of its own, which no seed of the caller reaches."""

    generator = torch.Generator()

    def advance(self, state: Rung, z: Tensor) -> Rung:
        noise = torch.randn(z.shape, generator=self.generator)
        return super().advance(state, z + 0.1 * noise)


class DrawsAside(Ladder):
    """Draws, and forgets what it has drawn."""

    def group(self, state: Rung) -> Group:
        torch.randn(3)
        return super().group(state)


class DrawsInDecode(Ladder):
    def decode(self, state: Rung) -> Tensor:
        return Normal(super().decode(state), 1.0).sample()


class TwoOutputs(Ladder):
    def decode(self, state: Rung) -> Any:
        return super().decode(state), state.h


class OtherEvent(Ladder):
    def group(self, state: Rung) -> Group:
        group = super().group(state)
        if group.posterior is None:
            return group
        return group._replace(posterior=Independent(Normal(torch.zeros(5, 3), 1.0), 1))


class EncodingOnAxisOne(Ladder):
    def encode(self, x: Tensor) -> Tensor:
        return super().encode(x).T


class PopsFromAList(Ladder):
    """Keeps features in a list of the state, and takes the next one out of it."""

    def start(
        self, batch_size: int, encoding: Tensor | None = None, condition: None = None
    ) -> Any:
        return [super().start(batch_size, encoding, condition), [torch.zeros(batch_size)]]

    def group(self, state: Any) -> Group:
        return super().group(state[0])

    def advance(self, state: Any, z: Tensor) -> Any:
        features = state[1]
        return [super().advance(state[0], z), [features.pop()]]

    def decode(self, state: Any) -> Tensor:
        return super().decode(state[0])


class LikelihoodByPixel(Ladder):
    def likelihood(self, state: Rung) -> Normal:
        return Normal(self.decode(state), 1.0)


class BatchNormInTraining(Ladder):
    def encode(self, x: Tensor) -> Tensor:
        self.encoder[1].train()
        return super().encode(x)


class WritesABuffer(Ladder):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def decode(self, state: Rung) -> Tensor:
        self.calls += 1
        return super().decode(state)


class Thaws(Ladder):
    def decode(self, state: Rung) -> Tensor:
        self.h0.requires_grad_(False)
        return super().decode(state)


class Accumulates(Ladder):
    def decode(self, state: Rung) -> Tensor:
        with torch.enable_grad():
            self.decoder(state.h.detach()).sum().backward()
        return super().decode(state)


BROKEN = {
    Batchwise: "encode",
    BatchwiseStep: "depend on its company",
    BatchwisePrior: "Group 0: some rows alone differ",
    BatchwiseDecoder: "decode",
    Detached: "Group 0: no gradient reaches z",
    DetachedDecoder: "Group 2: no gradient reaches z from decode",
    NoGrad: "no gradient reaches z",
    TurnsGradientsOff: "turned gradients on or off",
    TurnsGradientsOn: "turned gradients on or off",
    DrawsInGroup: "it must show distributions, and draw nothing",
    DrawsAside: "it must show distributions, and draw nothing",
    DrawsInDecode: "must return the mean of p.x . z. and draw nothing",
    TwoOutputs: "decode.state. must return one tensor; got a tuple",
    OtherEvent: r"prior's event shape is \(2,\) and the posterior's \(3,\)",
    EncodingOnAxisOne: "x has 5 rows and its encoding 8",
    PopsFromAList: "fails when a state is used again .IndexError",
    LikelihoodByPixel: r"must have shape \(5,\); got \(5, 3\)",
    WritesInGroup: "has changed the state",
    WritesInAdvance: "stays usable",
    WritesZ: "has changed the state or z",
    Caches: "A second advance has changed the state of the first",
    Remembers: "has changed its group",
    PriorSeesX: "Group 0: prior and context must be the same with and without x",
    ContextSeesX: "Group 0: prior and context must be the same with and without x",
    NoContextWithoutX: "Group 0: prior and context must be the same with and without x",
    DecoderSeesX: "decode.state. must be the same with and without x",
    PosteriorWithoutX: "Group 0: without x the posterior must be None",
    PlainTuple: "group must return a Group; got",
    BatchOfOne: "first axis is the batch of 5 rows; got shape",
    NotIndependent: r"Group 0: the prior must have batch shape \(5,\) and event shape \(2,\)",
    HalfPrecision: "Group 0: the prior must be in float32 or better",
    HalfContext: "Group 0: the context must be in float32 or better",
    Validates: "draws of the posterior are outside of its support, which is bounded",
    OpaqueState: "got a Independent",
    TransposedState: r"first axis is the batch of 5 rows; got shape \(8, 5\)",
    OwnGenerator: "it must draw nothing",
    BatchNormInTraining: "stay as it was|depend on its company",
    WritesABuffer: "stay as it was; these changed: source.calls",
    Thaws: "stay as it was; these changed: source.h0.requires_grad",
    Accumulates: "stay as it was; these changed: source.decoder.weight.grad",
}


@pytest.mark.parametrize("broken", BROKEN, ids=lambda cls: cls.__name__)
def test_check_source_names_the_broken_law(broken: type[Ladder]) -> None:
    source, x = broken(), torch.randn(5, 3)
    with torch.set_grad_enabled(True), pytest.raises(AssertionError, match=BROKEN[broken]):
        check_source(source, x)


def test_check_source_refuses_what_cannot_be_walked() -> None:
    with pytest.raises(ValueError, match="has no posterior"):
        check_source(NoPosterior(), torch.randn(5, 3))
    with pytest.raises(AssertionError, match="at least 2 rows; got 1"):
        check_source(flat(), torch.randn(1, 3))
    for count in (0, True, 2.0, None):
        source = Ladder()
        source.num_groups = count  # type: ignore[assignment]
        with pytest.raises(AssertionError, match="must be an int of at least 1"):
            check_source(source, torch.randn(5, 3))


class DuckTyped:
    """All that a source has, but its base class."""

    num_groups = 1
    encode = start = group = advance = decode = lambda self, *_: torch.zeros(2, 2)


@pytest.mark.parametrize(
    "use",
    [
        lambda source: NCPrior(source, MLPHead((2,))),
        lambda source: NCPrior.for_source(source, torch.zeros(2, 2)),
        lambda source: VAEBM(source, MLPHead((2,))),
        lambda source: GaussianDecoder(source, 0.1),
        lambda source: rebase(source, base()),
        lambda source: latents_of(source, torch.zeros(2, 2)),
        lambda source: sample_posterior(source, torch.zeros(2, 2)),
        lambda source: log_likelihood(source, torch.zeros(2, 2), num_samples=1),
        lambda source: check_source(source, torch.zeros(2, 2)),
        device_of,
    ],
)
def test_what_is_not_derived_from_a_source_is_named(use: Callable[[Any], Any]) -> None:
    match = r"got an object of type DuckTyped\. Subclass it"
    with pytest.raises(TypeError, match=match):
        use(DuckTyped())


@pytest.mark.parametrize("name", ["encode", "start", "group", "advance", "decode"])
def test_a_source_without_a_step_of_the_walk_cannot_be_made(name: str) -> None:
    members = {k: getattr(Ladder, k) for k in ("encode", "start", "group", "advance", "decode")}
    del members[name]
    with pytest.raises(TypeError, match=f"abstract method '?{name}"):
        type("Short", (LatentSource,), {**members, "num_groups": 1})()


def test_members_that_a_source_leaves_out_have_defaults() -> None:
    source, z = Ladder(), torch.randn(4, 5, 2)
    assert source.module is None
    assert source.fingerprint() is None
    assert source.shared_prior() is None
    assert source.features(0, z) is z
    with pytest.raises(ValueError, match=r"Ladder does not know p\(x \| z\)\. Give it a method"):
        source.likelihood(source.start(4))


def test_check_source_needs_the_condition() -> None:
    _, source = conditional()
    batch = (torch.randn(5, 3), torch.randn(5, 2))
    with pytest.raises(ValueError, match="needs a condition"):
        check_source(source, batch)
    with pytest.raises(AssertionError, match="with and without x"):
        check_source(source, batch, condition=torch.randn(5, 2))


def test_check_source_sees_a_vae_in_training_mode_behind_an_adapter() -> None:
    """Not through the mode but through what it does: batch statistics and moved buffers."""
    vae = VAE()
    source = SingleGroup(base(), lambda x: vae.posterior(x), lambda z: vae.decode(z))
    source.net = vae  # type: ignore[attr-defined]
    vae.encoder[1].train()
    with pytest.raises(AssertionError, match="company|stay as it was"):
        check_source(source, torch.randn(5, 3))


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_training_mode_is_seen_behind_bound_methods_without_module(part: str) -> None:
    vae = VAE()
    whole = SingleGroup(base(), vae.posterior, lambda z: vae.decode(z))
    half = SingleGroup(base(), lambda x: vae.posterior(x), vae.decode)
    getattr(vae, part).train()
    for source in (whole, half):
        with pytest.raises(ValueError, match=f"{part}.* is in training mode. Call vae.eval"):
            source.encode(torch.randn(5, 3))


def test_a_state_can_be_indexed_by_rows() -> None:
    source, x = Ladder(), torch.randn(6, 3)
    state = source.start(6, source.encode(x))
    rows = tree_map_only(Tensor, lambda t: t[[4, 1]], state)
    mean = posterior_of(source.group(rows)).mean
    torch.testing.assert_close(mean, posterior_of(source.group(state)).mean[[4, 1]])


def test_groups_hold_low_rank_normals_too() -> None:
    """A type that walks do not know, with a density and a gradient."""

    def posterior(x: Tensor) -> Distribution:
        factor = torch.ones(len(x), 2, 1)
        return LowRankMultivariateNormal(x, factor, torch.ones(len(x), 2), validate_args=False)

    check_source(SingleGroup(base(), posterior, lambda z: 2 * z), torch.randn(5, 2))


def test_the_device_of_a_prior_given_c_is_that_of_its_parts() -> None:
    """Without a condition there is no draw, and without module= no parameter of the VAE."""
    net = nn.Linear(2, 4, device="meta")

    def posterior(x: Tensor, c: Tensor) -> Distribution:
        return Independent(Normal(x, 1.0), 1)

    source = SingleGroup(
        lambda c: Independent(Normal(net(c)[:, :2], 1.0), 1),
        posterior,
        net.forward,
        condition=lambda batch: batch[1],
    )
    assert device_of(source).type == "meta"
