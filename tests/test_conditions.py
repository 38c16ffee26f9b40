"""Conditions of any kind, and priors that depend on them: labels, sequences, learned p(z | c)."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.problems import ExactRatio, SIRLaw
from helpers.recipe import make_quick
from torch import Tensor, nn
from torch.distributions import Independent, Normal
from torch.nn.functional import one_hot
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence
from torch.utils.data import DataLoader, TensorDataset

from ncprior import Group, LatentSource, NCPrior, SingleGroup, fit, improve, langevin, sir
from ncprior.bases import Rebased, fit_gaussian, latents_of, rebase
from ncprior.diagnostics import diagnose
from ncprior.evaluation import log_likelihood
from ncprior.heads import MLPHead
from ncprior.jobs import read_parts, sample_parts
from ncprior.recipe.base import choose_base
from ncprior.recipe.parts import parts_of
from ncprior.recipe.record import Record
from ncprior.testing import check_source


def batches(rows: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(*(part.split(200) for part in rows), strict=True))


def normal(mean: Tensor, sd: float | Tensor) -> Independent:
    return Independent(Normal(mean, sd, validate_args=False), 1)


class Learned:
    """p(z | c) = N(2 c, 1) and, exactly, q(z | c) = N(2 c + 1, 0.5²), of one latent.

    c ~ N(0, 3²), x | c ~ N(2 c + 1, 0.5² - 0.1²) and q(z | x) = N(x, 0.1²). A head that sees z - 2 c
    can be exact: log r = log N(u; 1, 0.25) - log N(u; 0, 1).
    """

    @staticmethod
    def batch(n: int) -> tuple[Tensor, Tensor]:
        c = 3 * torch.randn(n, 1)
        return 2 * c + 1 + math.sqrt(0.24) * torch.randn(n, 1), c

    @staticmethod
    def source(**options: Any) -> SingleGroup:
        parts: dict[str, Any] = {
            "prior": lambda c: normal(2 * c, 1.0),
            "posterior": lambda x, c: normal(x, 0.1),
            "decoder": lambda z, c: z,
            "condition": lambda batch: batch[1],
            "likelihood": lambda z, c: normal(z, 0.3),
        }
        return SingleGroup(**{**parts, **options})

    @staticmethod
    def log_r(z: Tensor, c: Tensor) -> Tensor:
        u = z - 2 * c
        return normal(torch.ones_like(u), 0.5).log_prob(u) - normal(
            torch.zeros_like(u), 1.0
        ).log_prob(u)

    @staticmethod
    def law() -> SIRLaw:
        """Exact law of SIR on u = z - 2 c."""
        u = np.arange(-8.0, 8.0, 0.02)
        weight = np.exp(-0.5 * u**2)
        log_r = Learned.log_r(torch.from_numpy(u)[:, None], torch.zeros(1, 1).double())
        return SIRLaw(u, weight / weight.sum(), log_r.numpy())


# --- priors that are functions of the condition


def test_a_learned_prior_keeps_the_rules() -> None:
    x, c = Learned.batch(16)
    check_source(Learned.source(), (x, c), condition=c)
    check_source(Learned.source(features=lambda z: torch.cat([z, z**2], 1)), (x, c), condition=c)


def test_features_of_a_learned_prior_need_no_walk_before() -> None:
    source = Learned.source(features=lambda z: torch.cat([z, z**2], 1))
    prior = NCPrior(source, MLPHead((2,), context_shape=(1,))).eval()
    assert prior.log_r(0, torch.randn(7, 5, 1), torch.randn(5, 1)).shape == (7, 5)


def test_sir_on_a_learned_prior_has_its_exact_law() -> None:
    prior = NCPrior(Learned.source(), ExactRatio(Learned.log_r)).eval()
    _, c = Learned.batch(40_000)
    u = (prior.sample(40_000, partial(sir, num_proposals=6), condition=c).latents[0] - 2 * c)[:, 0]
    for power in (1, 2):
        values, nodes = u.double() ** power, Learned.law().nodes ** power
        exact = Learned.law().mean(nodes, 6)
        assert abs(values.mean().item() - exact) < 4.5 * values.std().item() / 200


def test_langevin_on_a_learned_prior() -> None:
    prior = NCPrior(Learned.source(), ExactRatio(Learned.log_r)).eval()
    _, c = Learned.batch(4000)
    chains = partial(langevin, num_steps=30, step_size=0.2, adjusted=True)
    u = prior.sample(4000, chains, condition=c).latents[0] - 2 * c
    assert abs(u.mean().item() - 1) < 4.5 * 0.5 / math.sqrt(4000)


def test_a_head_learns_the_ratio_given_the_condition() -> None:
    source, batch = Learned.source(), Learned.batch(3000)
    prior = NCPrior.for_source(source, (batch[0][:256], batch[1][:256]), width=32, depth=1)
    fit(
        prior,
        batches(batch),
        held_out=[batches(batch)[0]],
        steps=100,
        learning_rate=1e-2,
        progress=False,
    )
    x, c = Learned.batch(500)
    z = x + 0.1 * torch.randn_like(x)
    pairs = torch.stack([prior.log_ratio([z], condition=c)[:, 0], Learned.log_r(z, c)])
    assert torch.corrcoef(pairs)[0, 1] > 0.85


@pytest.mark.filterwarnings("ignore:The file has no fingerprint")
def test_a_learned_prior_is_diagnosed_saved_and_loaded(tmp_path: Path) -> None:
    source, batch = Learned.source(), Learned.batch(200)
    prior = NCPrior.for_source(source, batch, width=8)
    fit(prior, TensorDataset(*batch), steps=5, progress=False)
    report = diagnose(prior, TensorDataset(*batch), num_draws=200, fresh_steps=0)
    assert len(report.groups) == 1
    prior.save_pretrained(tmp_path)
    again = NCPrior.from_pretrained(Learned.source(), tmp_path)
    z, c = torch.randn(5, 1), torch.randn(5, 1)
    assert torch.equal(again.log_ratio([z], condition=c), prior.log_ratio([z], condition=c))


def test_the_likelihood_uses_the_learned_prior() -> None:
    """p(x | c) = N(2 c, 1 + 0.3²)."""
    x, c = Learned.batch(50)
    source = Learned.source(
        posterior=lambda x, c: normal((x / 0.09 + 2 * c) / (1 / 0.09 + 1), 0.2873)
    )
    found = log_likelihood(source, TensorDataset(x, c), num_samples=1)["base"].lower
    exact = normal(2 * c, math.sqrt(1.09)).log_prob(x)
    assert (found - exact).abs().max() < 1e-2  # the posterior is exact up to four digits


@pytest.mark.parametrize(
    ("prior", "kind", "words"),
    [
        (
            lambda c: c,
            TypeError,
            r"prior\(c\) must return a distribution p\(z \| c\); got a tensor",
        ),
        (lambda c: Normal(c, 1.0), ValueError, r"batch shape \(4,\).*got batch shape \(4, 1\)"),
        (
            lambda c: normal(c[:1], 1.0),
            ValueError,
            r"one row per row of c.*got batch shape \(1,\)",
        ),
        (lambda c: normal(c.expand(4, 3), 1.0), ValueError, r"shape of q\(z \| x\), \(1,\)"),
    ],
)
def test_a_wrong_prior_of_the_condition_is_named(prior: Any, kind: Any, words: str) -> None:
    source = Learned.source(prior=prior)
    with pytest.raises(kind, match=words):
        source.group(source.start(4, source.encode(Learned.batch(4))))


def test_functions_of_the_condition_need_one() -> None:
    with pytest.raises(ValueError, match="A prior that is a function needs a condition c"):
        Learned.source(condition=None)
    with pytest.raises(ValueError, match="context= needs a condition c"):
        SingleGroup(
            normal(torch.zeros(1), 1.0), nn.Identity(), nn.Identity(), context=nn.Identity()
        )
    with pytest.raises(TypeError, match=r"or, with condition=, a function of c"):
        Learned.source(prior=3)


def test_networks_of_prior_and_context_must_be_in_evaluation_mode() -> None:
    class Networks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = nn.Dropout()

        def prior(self, c: Tensor) -> Independent:
            return normal(self.dropout(c), 1.0)

        def context(self, c: Tensor) -> Tensor:
            return c

    for name in ("prior", "context"):
        with pytest.raises(ValueError, match="evaluation mode"):
            Learned.source(**{name: getattr(Networks(), name)}).encode(Learned.batch(4))


# --- conditions of every kind


class Labelled(nn.Module):
    """A VAE whose networks embed integer labels themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.encoder, self.decoder = nn.Linear(7, 4), nn.Linear(5, 4)

    def posterior(self, x: Tensor, label: Tensor) -> Independent:
        mean, log_sd = self.encoder(torch.cat([x, self.embedding(label)], 1)).chunk(2, 1)
        return normal(mean, log_sd.exp())

    def decode(self, z: Tensor, label: Tensor) -> Tensor:
        return self.decoder(torch.cat([z, self.embedding(label)], 1))

    def source(self, **options: Any) -> SingleGroup:
        parts: dict[str, Any] = {"condition": lambda batch: batch[1], "module": self}
        parts["context"] = lambda label: one_hot(label, 5).float()
        base = normal(torch.zeros(2), torch.ones(2))
        return SingleGroup(base, self.posterior, self.decode, **{**parts, **options})


@pytest.mark.filterwarnings("ignore:Reconstructions of a row")
def test_integer_labels_with_a_context() -> None:
    source, label = Labelled().eval().source(), torch.arange(60) % 5
    x = torch.randn(60, 4)
    check_source(source, (x, label), condition=label)
    prior = NCPrior.for_source(source, (x, label), width=8)
    fit(prior, TensorDataset(x, label), steps=3, progress=False)
    sampler = partial(sir, num_proposals=4)
    for condition in (label[:8], label[:8].numpy(), label[:8].tolist()):
        assert prior.sample(8, sampler, condition=condition).x.shape == (8, 4)


def test_labels_without_a_context_are_refused_with_the_remedy() -> None:
    source = Labelled().eval().source(context=None)
    with pytest.raises(ValueError, match=r"context=.*one_hot\(c, num_classes\)"):
        source.encode((torch.randn(5, 4), torch.arange(5)))


@pytest.mark.parametrize("label", [torch.arange(4.0), torch.full((4,), 7)], ids=["float", "7"])
def test_labels_that_the_context_cannot_take_are_named(label: Tensor) -> None:
    source = Labelled().eval().source()
    with pytest.raises(ValueError, match=r"context\(c\) failed on a condition, a tensor of"):
        source.group(source.start(4, condition=label))


def test_data_without_the_condition_are_named() -> None:
    prior = NCPrior(Labelled().eval().source(), MLPHead((2,), context_shape=(5,)))
    with pytest.raises(ValueError, match=r"got 4 rows for 2 of x.*TensorDataset\(x, c\)"):
        fit(prior, torch.randn(30, 4), held_out=torch.randn(30, 4), steps=2, progress=False)


@pytest.mark.filterwarnings("ignore:Reconstructions of a row")
def test_a_job_draws_every_row_under_its_own_condition(tmp_path: Path) -> None:
    """Parts and batches cut a dict of padded sequences by rows."""
    source, batch = Sequences().eval().source(), next(iter(loader(16)))
    prior = NCPrior.for_source(source, batch, width=8)
    prior.active = [False]
    sampler = partial(sir, num_proposals=1)
    options: dict[str, Any] = {"part_size": 6, "batch_size": 4, "progress": False}
    sample_parts(prior, tmp_path, num_samples=16, sampler=sampler, condition=batch[1], **options)
    z, found = (torch.cat([part[name] for part in read_parts(tmp_path)]) for name in ("z_0", "x"))
    state = source.start(16, condition=batch[1])
    assert torch.allclose(source.decode(source.advance(state, z)), found, atol=1e-5)


@pytest.mark.parametrize(
    ("context", "words"),
    [
        (lambda label: one_hot(label, 5)[:1].float(), r"each of the 4 rows of c; got .*\(1, 5\)"),
        (lambda label: label.tolist(), "one tensor of real numbers"),
    ],
)
def test_a_wrong_context_is_named(context: Any, words: str) -> None:
    source = Labelled().eval().source(context=context)
    with pytest.raises(ValueError, match=words):
        source.group(source.start(4, condition=torch.arange(4)))


def test_texts_must_be_embedded() -> None:
    source = Labelled().eval().source(condition=lambda batch: ["a cat"] * len(batch[0]))
    with pytest.raises(TypeError, match=r"one row per row of the batch; got .*list. Embed texts"):
        source.encode((torch.randn(5, 4), torch.arange(5)))


def test_every_tensor_of_a_condition_has_the_rows_of_the_walk() -> None:
    source = Sequences().eval().source()
    with pytest.raises(ValueError, match="The walk has 3 rows; got 2 rows of condition"):
        source.start(3, condition={"past": torch.zeros(3, 4, 2), "length": torch.ones(2).long()})


class Sequences(nn.Module):
    """A VAE of the next two numbers, given sequences of different lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(2, 6, batch_first=True)
        self.encoder, self.decoder, self.to_prior = (
            nn.Linear(8, 4),
            nn.Linear(8, 2),
            nn.Linear(6, 4),
        )

    def embed(self, c: dict[str, Tensor]) -> Tensor:
        packed = pack_padded_sequence(
            c["past"], c["length"].cpu(), batch_first=True, enforce_sorted=False
        )
        return self.gru(packed)[1][0]  # type: ignore[no-any-return]

    def prior(self, c: dict[str, Tensor]) -> Independent:
        mean, log_sd = self.to_prior(self.embed(c)).chunk(2, 1)
        return normal(mean, log_sd.exp())

    def posterior(self, x: Tensor, c: dict[str, Tensor]) -> Independent:
        mean, log_sd = self.encoder(torch.cat([x, self.embed(c)], 1)).chunk(2, 1)
        return normal(mean, log_sd.exp())

    def decode(self, z: Tensor, c: dict[str, Tensor]) -> Tensor:
        return self.decoder(torch.cat([z, self.embed(c)], 1))

    def source(self) -> SingleGroup:
        return SingleGroup(
            *(self.prior, self.posterior, self.decode),
            module=self,
            condition=lambda batch: batch[1],
            context=self.embed,
        )


def collate(rows: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The last step of each sequence, and the steps before, padded to the longest of the batch."""
    pasts, lengths = [row[:-1] for row in rows], torch.tensor([len(row) - 1 for row in rows])
    x = torch.stack([row[-1] for row in rows])
    return x, {"past": pad_sequence(pasts, batch_first=True), "length": lengths}


class Lengths(torch.utils.data.Dataset[Tensor]):
    """Random walks of 3 to 9 steps."""

    def __init__(self, count: int) -> None:
        self.rows = [torch.randn(int(n), 2).cumsum(0) for n in torch.randint(3, 10, (count,))]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Tensor:
        return self.rows[i]


def loader(count: int) -> DataLoader[Any]:
    return DataLoader(Lengths(count), batch_size=16, collate_fn=collate)


@pytest.mark.filterwarnings("ignore:Reconstructions of a row")
def test_sequences_of_different_lengths() -> None:
    """Batches have different numbers of steps; padding does not change a row."""
    source, data = Sequences().eval().source(), loader(64)
    batch = next(iter(data))
    check_source(source, batch, condition=batch[1])
    prior = NCPrior.for_source(source, batch, width=8)
    fit(prior, data, held_out=loader(32), steps=6, progress=False)
    sample = prior.sample(16, partial(sir, num_proposals=4), condition=batch[1])
    assert sample.x.shape == (16, 2)
    longer = {**batch[1], "past": nn.functional.pad(batch[1]["past"], (0, 0, 0, 3))}
    z = sample.latents
    ours, padded = (prior.log_ratio(z, condition=c) for c in (batch[1], longer))
    assert torch.allclose(ours, padded, atol=1e-6)
    diagnose(prior, loader(32), num_draws=100, fresh_steps=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Reconstructions of a row")
def test_improve_takes_sequences_of_different_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    make_quick(monkeypatch, steps=10)
    source = Sequences().eval().source()
    prior = improve(source, loader(64), held_out=loader(64), budget=4, seed=0, progress=False)
    c = next(iter(loader(16)))[1]
    assert prior.sample(16, condition=c).x.shape == (16, 2)


class Steps(LatentSource[Any, Any]):
    """A latent for each of three time steps, of sequences that end earlier; as of a VRNN.

    p(z_t) = N(0, 1) and q(z_t | x) = N(x_t, 0.1²), but q = p behind the end.
    """

    num_groups = 3

    def encode(self, x: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return x

    def start(self, batch_size: int, encoding: Any = None, condition: Any = None) -> Any:
        x, length = (None, condition) if encoding is None else encoding
        return torch.empty(batch_size, 0), x, length

    def group(self, state: Any) -> Group:
        drawn, x, length = state
        t = drawn.shape[1]
        alive = (t < length).float()[:, None]
        q = None
        if x is not None:
            q = normal(alive * x[:, t : t + 1], 1 - 0.9 * alive)
        return Group(normal(torch.zeros(len(drawn), 1), 1.0), q, torch.cat([drawn, alive], 1))

    def advance(self, state: Any, z: Tensor) -> Any:
        return torch.cat([state[0], z], 1), *state[1:]

    def decode(self, state: Any) -> Tensor:
        return state[0]  # type: ignore[no-any-return]


def test_steps_behind_the_end_of_a_sequence_have_the_prior() -> None:
    """x_t ~ N(2, 0.1²): the exact head is on for rows that go on, and 0 for those that have ended."""
    length = torch.arange(4000) % 3 + 1
    x = 2 + 0.1 * torch.randn(4000, 3)
    source = Steps()
    check_source(source, (x[:9], length[:9]), condition=length[:9])

    def log_r(z: Tensor, context: Tensor) -> Tensor:
        q = normal(torch.full_like(z, 2.0), 0.02**0.5).log_prob(z)
        return context[:, -1] * (q - normal(torch.zeros_like(z), 1.0).log_prob(z))

    prior = NCPrior(source, [ExactRatio(log_r) for _ in range(3)]).eval()
    latents = prior.sample(4000, partial(sir, num_proposals=400), condition=length).latents
    for t, z in enumerate(latents):
        on, off = z[length > t], z[length <= t]
        assert abs(on.mean().item() - 2) < 0.05  # a bias of 1/ESS besides the error
        assert t == 0 or abs(off.mean().item()) < 4.5 / len(off) ** 0.5


# --- bases


def search(source: SingleGroup, batch: tuple[Tensor, Tensor]) -> tuple[Any, Any]:
    record = Record(progress=False, max_seconds=None)
    parts = parts_of(TensorDataset(*batch), None, 0)
    return choose_base(source, parts, record), record.choices[0]


def test_improve_keeps_a_prior_that_knows_more_than_a_mixture() -> None:
    """p(z | c) of held-out encodings has -1.92 nats, and their Gaussian of variance 36.25 -3.21."""
    source = Learned.source()
    chosen, choice = search(source, Learned.batch(1200))
    assert chosen is source
    assert choice.chosen == "the VAE's own prior"
    own, gaussian = choice.candidates[:2]
    assert own.low < -0.5 * (math.log(2 * math.pi) + 1.25) < own.high
    assert gaussian.low < -0.5 * (math.log(2 * math.pi * 36.25) + 1) < gaussian.high


def test_improve_takes_a_mixture_where_the_prior_knows_less() -> None:
    """N(0, 1) is far from N(1, 6²); what the condition says is left to the head."""
    source = Learned.source(prior=normal(torch.zeros(1), torch.ones(1)))
    chosen, choice = search(source, Learned.batch(400))
    assert isinstance(chosen, Rebased)
    assert "Gaussian" in choice.chosen or "mixture" in choice.chosen
    group = chosen.group(chosen.start(4, condition=torch.zeros(4, 1)))
    assert group.context is not None


def test_a_prior_without_a_density_is_kept() -> None:
    class Sampler:
        def __init__(self, c: Tensor) -> None:
            self.c = c

        def sample(self, sample_shape: Any = ()) -> Tensor:
            return 2 * self.c + torch.randn(*sample_shape, *self.c.shape)

    source = Learned.source(prior=lambda c: Sampler(c))
    chosen, choice = search(source, Learned.batch(100))
    assert chosen is source
    assert "has no density" in choice.reason
    assert source.group(source.start(4, condition=torch.ones(4, 1))).prior.sample().shape == (4, 1)


def test_a_base_on_a_learned_prior_keeps_the_context() -> None:
    batch = Learned.batch(300)
    source = Learned.source()
    closer = rebase(source, fit_gaussian(latents_of(source, TensorDataset(*batch))))
    check_source(closer, (batch[0][:8], batch[1][:8]), condition=batch[1][:8])

    def shifted(k: int, group: Any) -> Independent:
        return normal(group.prior.mean + 1, 0.5 * group.prior.stddev)

    exact = rebase(source, shifted)  # q(z | c) itself
    check_source(exact, (batch[0][:8], batch[1][:8]), condition=batch[1][:8])
    prior = NCPrior.for_source(exact, batch, width=8)
    u = (
        prior.sample(300, partial(sir, num_proposals=2), condition=batch[1]).latents[0]
        - 2 * batch[1]
    )
    assert abs(u.mean().item() - 1) < 4.5 * 0.5 / math.sqrt(300)


# --- rules of check_source


def test_a_condition_that_changes_nothing_is_named() -> None:
    x, c = Learned.batch(8)
    base = normal(torch.zeros(1), torch.ones(1))
    source = Learned.source(prior=base, context=lambda c: torch.zeros(len(c), 1))
    with pytest.raises(AssertionError, match="The condition changes nothing"):
        check_source(source, (x, c), condition=c)


def test_a_head_must_see_the_condition_of_its_prior() -> None:
    x, c = Learned.batch(8)
    source = Learned.source(context=lambda c: torch.zeros(len(c), 1))
    with pytest.raises(AssertionError, match=r"Group 0: the prior depends on the condition, and"):
        check_source(source, (x, c), condition=c)


def test_rows_of_a_condition_belong_to_rows_of_a_batch() -> None:
    x, c = Learned.batch(8)
    source = Learned.source(prior=lambda c: normal(2 * c - c.mean(0), 1.0))
    with pytest.raises(AssertionError, match="some rows alone differ"):
        check_source(source, (x, c), condition=c)


def test_a_context_that_is_no_tensor_is_named() -> None:
    class Pair(SingleGroup):
        def group(self, state: Any) -> Any:
            group = super().group(state)
            return group._replace(context=(group.context, group.context))

    x, c = Learned.batch(8)
    source = Pair(
        lambda c: normal(2 * c, 1.0),
        lambda x, c: normal(x, 0.1),
        lambda z, c: z,
        condition=lambda batch: batch[1],
    )
    with pytest.raises(
        AssertionError, match=r"the context must be one tensor of shape \(B, \.\.\.\)"
    ):
        check_source(source, (x, c), condition=c)
