"""Likelihoods, scores and log Z under bad arguments and bad data: an error of ours, or the result."""

from __future__ import annotations

import math
from collections import UserDict
from typing import Any

import pytest
import torch
from helpers.problems import GaussianPair
from helpers.vaebm_problems import LinearGaussian, Quadratic
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from ncprior import NCPrior, SingleGroup
from ncprior.evaluation.likelihood import log_likelihood
from ncprior.evaluation.normaliser import _take, log_normaliser
from ncprior.evaluation.ood import ood_score
from ncprior.heads.networks import MLPHead
from ncprior.source import WrappedSource
from ncprior.vaebm.model import VAEBM

PROBLEM = LinearGaussian()


class OfBatches(WrappedSource):
    """A source whose batches are mappings, as those of scVI."""

    def encode(self, x: Any) -> Any:
        return self.source.encode(x["image"])


def prior(source: Any = None) -> NCPrior:
    return NCPrior(PROBLEM.source() if source is None else source, MLPHead((2,), width=8)).eval()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("validates", [True, False])
def test_F15_a_row_that_is_not_finite_is_named(value: float, validates: bool) -> None:
    def posterior(x: Tensor) -> Independent:
        q = Normal(x @ PROBLEM.weight, 0.5 + x[:, :2].abs(), validate_args=validates)
        return Independent(q, 1, validate_args=False)

    base = PROBLEM.source().prior
    source = SingleGroup(base, posterior, PROBLEM.decode, likelihood=PROBLEM.likelihood)
    x = torch.randn(9, 3)
    x[6, 1] = value
    message = "x in batch 2 of the data must be finite; got NaN or infinity in 1 of 4 rows"
    with pytest.raises(ValueError, match=message):
        log_likelihood(source, x, num_samples=2, batch_size=4)
    with pytest.raises(ValueError, match=message):
        ood_score(VAEBM(source, Quadratic(3)), x, num_samples=2, batch_size=4)


def test_F15_a_weight_or_an_energy_that_is_nan_raises() -> None:
    x, bad = torch.randn(4, 3), prior()
    nn.init.constant_(bad.heads[0].out.bias, math.nan)  # type: ignore[arg-type]
    with pytest.raises(FloatingPointError, match="NaN or infinite for some rows. Look for NaN"):
        log_likelihood(bad, x, num_samples=2)
    with pytest.raises(FloatingPointError, match="The energy is NaN"):
        ood_score(VAEBM(PROBLEM.source(), lambda x: x.sum(1) * math.nan), x, num_samples=2)


@pytest.mark.parametrize("empty", [torch.zeros(0, 3), [], [torch.zeros(0, 3)]])
def test_F26_data_without_rows_raises(empty: Any) -> None:
    with pytest.raises(ValueError, match="must have 1 or more rows"):
        log_likelihood(prior(), empty, num_samples=2)
    with pytest.raises(ValueError, match="must have 1 or more rows"):
        ood_score(prior(), empty)


WRONG = [2.5, "3", None, True, math.nan, 1j]
COUNTS = {
    log_likelihood: ("num_samples", "num_pools", "batch_size", "chunk_size"),
    ood_score: ("num_samples", "batch_size", "chunk_size"),
    log_normaliser: ("num_particles", "num_temperatures", "replicates"),
}


@pytest.mark.parametrize(
    ("function", "name"), [(f, name) for f, names in COUNTS.items() for name in names]
)
def test_F26_F35_counts_are_whole_numbers(function: Any, name: str) -> None:
    data = () if function is log_normaliser else (torch.randn(3, 3),)
    options = {"num_samples": 2} if data else {}
    for value in WRONG:
        with pytest.raises(TypeError, match=f"{name} must be a whole number"):
            function(prior(), *data, **{**options, name: value})
    for value in (0, -1):
        with pytest.raises(ValueError, match=f"{name} must be a whole number"):
            function(prior(), *data, **{**options, name: value})


@pytest.mark.parametrize("step_size", [0, -1, math.inf, math.nan])
def test_F35_a_step_size_is_positive_and_finite(step_size: float) -> None:
    with pytest.raises(ValueError, match=r"step_size must be a number in \(0, inf\)"):
        log_normaliser(prior(), num_particles=10, num_temperatures=3, step_size=step_size)


def test_F36_objects_of_the_wrong_kind_are_named() -> None:
    source, x = PROBLEM.source(), torch.randn(3, 3)
    for wrong in (source, nn.Linear(1, 1), NCPrior, None):
        with pytest.raises(TypeError, match="prior must be of type NCPrior; got"):
            log_normaliser(wrong)  # type: ignore[arg-type]
    for wrong in (nn.Linear(1, 1), NCPrior, None, "vae"):
        with pytest.raises(TypeError, match="A source is a subclass of ncprior.LatentSource; got"):
            log_likelihood(wrong, x, num_samples=2)
        with pytest.raises(TypeError, match="A source is a subclass of ncprior.LatentSource; got"):
            ood_score(wrong, x)
    with pytest.raises(TypeError, match="log_z must be of type LogZ; got 0.3"):
        log_likelihood(prior(), x, num_samples=2, log_z=0.3)  # type: ignore[arg-type]


def test_exact_draws_are_checked() -> None:
    found, z = prior(), torch.randn(5, 2)
    for wrong in (z, 3, "z", [None]):
        with pytest.raises(TypeError, match="exact must be a list of one tensor z per group"):
            log_normaliser(found, num_particles=9, exact=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"exact\[0\] must be finite; got NaN or infinity in 5"):
        log_normaliser(found, num_particles=9, exact=[z * math.nan])
    with pytest.raises(ValueError, match=r"exact\[0\] must have shape .*; got the event \(3,\)"):
        log_normaliser(found, num_particles=9, exact=[torch.randn(5, 3)])


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_D3_C4_batches_may_be_mappings_with_a_number_for_all_rows(kind: Any) -> None:
    source, x = PROBLEM.source(), torch.randn(6, 3)
    batches = [kind(image=rows, temperature=torch.tensor(3.0)) for rows in x.split(3)]
    torch.manual_seed(1)
    expected = log_likelihood(source, list(x.split(3)), num_samples=8)["base"]
    torch.manual_seed(1)
    found = log_likelihood(OfBatches(source), batches, num_samples=8)["base"]
    assert torch.equal(found.lower, expected.lower)
    score = ood_score(VAEBM(OfBatches(source), Quadratic(3, h=0.4)), batches, num_samples=2)
    assert torch.allclose(score.energy, -0.4 * x.sum(1).double())


def test_a_likelihood_of_another_shape_is_named() -> None:
    source = PROBLEM.source(likelihood=lambda z: Normal(PROBLEM.decode(z), 1.0))
    with pytest.raises(
        ValueError, match=r"must have shape \(B,\), here \(3,\).*Independent\(p, 1"
    ):
        log_likelihood(source, torch.randn(3, 3), num_samples=2)
    with pytest.raises(ValueError, match=r"shape of p\(x \| z\), \(3, 3\); got \(3, 1\)"):
        source = PROBLEM.source()
        encoded = SingleGroup(
            source.prior,
            lambda x: Independent(Normal(x.expand(-1, 2), 1.0), 1),
            PROBLEM.decode,
            likelihood=PROBLEM.likelihood,
        )
        log_likelihood(encoded, torch.randn(3, 1), num_samples=2)


def test_a_VAE_in_training_mode_raises() -> None:
    vae = nn.Linear(1, 1)
    problem = GaussianPair()
    found = NCPrior(problem.source(), problem.head())
    found.source.module = vae
    for call in (
        lambda: log_normaliser(found, num_particles=9),
        lambda: log_likelihood(found, problem.data(3), num_samples=2),
    ):
        with pytest.raises(ValueError, match=r"must be in evaluation mode.*Call vae.eval"):
            call()


def test_GC1_states_are_indexed_by_rows_on_their_own_device() -> None:
    """On a GPU, z and log-weights are there, and a state without tensors of the VAE is not."""
    moved: list[torch.device] = []

    class Elsewhere(Tensor):
        def to(self, *args: Any, **kwargs: Any) -> Tensor:
            moved.append(args[0])
            return self.as_subclass(Tensor)

    rows = torch.tensor([2, 0]).as_subclass(Elsewhere)
    state = {"rows": torch.arange(3), "shared": torch.tensor(7.0), "name": "a"}
    taken = _take(state, rows)
    assert taken["rows"].tolist() == [2, 0] and taken["shared"] == 7.0
    assert moved == [torch.device("cpu")]


def test_a_gain_of_one_row_has_no_error_and_needs_the_same_rows() -> None:
    one = log_likelihood(prior(), torch.randn(1, 3), num_samples=8)["base"]
    assert math.isnan(one.gain_over(one).error) and "nan" in str(one)
    two = log_likelihood(prior(), torch.randn(2, 3), num_samples=8)["base"]
    with pytest.raises(ValueError, match="got 1 and 2 rows"):
        one.gain_over(two)
    with pytest.raises(TypeError, match="other must be of type Likelihood"):
        one.gain_over(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_dims must be"):
        one.bits_per_dim(0)
