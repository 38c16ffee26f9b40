"""What checkpoints and jobs compare besides the weights: they are not taken up on something else."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.problems import CorrelatedPair, ExactRatio, GaussianPair
from helpers.toys import ladder_prior, stir
from torch import nn
from torch.distributions import Independent, Normal

from ncprior import NCPrior, SingleGroup, fit, sir
from ncprior.bases import JointSource
from ncprior.heads import MLPHead
from ncprior.jobs import sample_parts
from ncprior.samplers.identity import describe, identity_of
from ncprior.saving.identity import as_text, source_facts
from ncprior.source import WrappedSource
from ncprior.training import AmortisedSource, FitSettings, ResampledPosterior, nested
from ncprior.vaebm import GaussianDecoder

FIVE, TWO = partial(sir, num_proposals=5), partial(sir, num_proposals=2)
QUIET: dict[str, Any] = {"steps": 4, "eval_every": 2, "progress": False}


def decoder() -> SingleGroup:
    """A decoder with a likelihood, whose encoder is to be told apart."""
    prior = Independent(Normal(torch.zeros(2), torch.ones(2)), 1)
    posterior = lambda x: Independent(Normal(x, 0.1 + 0 * x), 1)
    return SingleGroup(prior, posterior, lambda z: z, module=nn.Linear(1, 1).eval())


def encoder(bias: float) -> nn.Module:
    net = nn.Linear(2, 4)
    nn.init.zeros_(net.weight)
    nn.init.constant_(net.bias, bias)
    return net.eval()


def first() -> NCPrior:
    """The first prior of a joint head; the same at every call."""
    problem = CorrelatedPair()
    prior = NCPrior(problem, problem.heads()).eval()
    prior.sampler = FIVE
    return prior


def weaker() -> NCPrior:
    prior = first()
    prior.strength = 0.5
    return prior


def off() -> NCPrior:
    prior = first()
    prior.active = [True, False]
    return prior


def drawn_by(sampler: Any) -> NCPrior:
    prior = first()
    prior.sampler = sampler
    return prior


DECODER = decoder()

OTHERS: dict[str, tuple[Any, Any]] = {
    "encoder": tuple(AmortisedSource(DECODER, encoder(bias)) for bias in (0.0, 1.0)),
    "sampler of the first prior": (JointSource(first()), JointSource(drawn_by(TWO))),
    "strength of the first prior": (JointSource(first()), JointSource(weaker())),
    "groups of the first prior": (JointSource(first()), JointSource(off())),
    "nested sampler": (nested(first(), FIVE), nested(first(), TWO)),
    "nested prior": (nested(first(), FIVE), nested(weaker(), FIVE)),
    "particles": tuple(ResampledPosterior(first(), n) for n in (4, 8)),
    "prior that weighs": (ResampledPosterior(first(), 4), ResampledPosterior(weaker(), 4)),
    "sigma": tuple(GaussianDecoder(DECODER, s) for s in (0.1, 0.2)),
    "below a wrapper": tuple(
        WrappedSource(JointSource(drawn_by(sampler))) for sampler in (FIVE, TWO)
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_facts_of_a_source_tell_it_from_another(name: str) -> None:
    one, other = OTHERS[name]
    assert source_facts(one) == source_facts(one) != source_facts(other)
    assert source_facts(one)["vae"] == source_facts(other)["vae"]
    assert json.loads(as_text(source_facts(one))) == source_facts(one)


def test_a_training_is_not_resumed_on_another_source(tmp_path: Path) -> None:
    x, path = torch.randn(60, 2), tmp_path / "c"
    one, other = OTHERS["encoder"]
    fit(NCPrior(one, MLPHead((2,), width=8)), x, checkpoint=path, **QUIET)
    with pytest.raises(ValueError, match=r"belongs to a training with source=.*encoder"):
        fit(NCPrior(other, MLPHead((2,), width=8)), x, checkpoint=path, **QUIET)
    fit(NCPrior(one, MLPHead((2,), width=8)), x, checkpoint=path, **QUIET)


@pytest.mark.filterwarnings("ignore:Of 2 importance samples")
@pytest.mark.parametrize("weighs", [False, True])
def test_sigma_is_a_term_of_a_training_that_it_weighs(tmp_path: Path, weighs: bool) -> None:
    x, path, source = torch.randn(60, 2), tmp_path / "c", decoder()
    settings = FitSettings(importance_samples=2 if weighs else None)

    def train(sigma: float) -> None:
        prior = NCPrior(GaussianDecoder(source, sigma), MLPHead((2,), width=8))
        fit(prior, x, checkpoint=path, settings=settings, **QUIET)

    train(0.1)
    with pytest.raises(ValueError, match="sigma") if weighs else nullcontext():
        train(0.2)


def test_a_later_stage_is_of_the_groups_that_are_on(tmp_path: Path) -> None:
    problem, path = GaussianPair(kl=12.0), tmp_path / "c"
    x = problem.data(200)
    options = {"stages": 2, "checkpoint": path, "learning_rate": 1e-2, "progress": False}
    options |= {"steps": 40, "eval_every": 20, "checkpoint_every": 20, "batch_size": 32}
    torch.manual_seed(0)
    prior = NCPrior.for_source(problem.source(), x, width=8)
    fit(prior, x, callback=lambda row: row.stage == 2, **options)
    prior.active = [False]
    with pytest.raises(ValueError, match="training with heads so far="):
        fit(prior, x, **options)


@contextmanager
def another_strength(prior: NCPrior) -> Iterator[None]:
    prior.strength = 0.5
    yield


CHANGES: dict[str, Callable[[NCPrior], Any]] = {
    "disabled": lambda prior: prior.disabled(),
    "strength": another_strength,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_job_is_not_continued_with_other_draws(change: str, tmp_path: Path) -> None:
    prior = stir(ladder_prior(2)).eval()
    job: dict[str, Any] = {"num_samples": 4, "part_size": 2, "sampler": FIVE, "progress": False}
    sample_parts(prior, tmp_path, parts=[0], **job)
    with CHANGES[change](prior), pytest.raises(ValueError, match="another job"):
        sample_parts(prior, tmp_path, **job)


def test_a_job_is_not_continued_with_another_sigma(tmp_path: Path) -> None:
    source, head = decoder(), MLPHead((2,), width=8)
    job: dict[str, Any] = {"num_samples": 4, "part_size": 2, "draw_x": True, "progress": False}
    one, other = (NCPrior(GaussianDecoder(source, s), head).eval() for s in (0.1, 5.0))
    sample_parts(one, tmp_path, parts=[0], sampler=FIVE, **job)
    with pytest.raises(ValueError, match="another job"):
        sample_parts(other, tmp_path, sampler=FIVE, **job)


def same_name(number: int) -> tuple[Any, Any]:
    """Two functions that differ in one number alone."""

    def sampler(prior: Any, log_ratio: Any, m: int = number) -> Any:
        return sir(prior, log_ratio, num_proposals=m)

    return sampler, lambda p, r: sir(p, r, num_proposals=number)


def test_samplers_of_one_name_are_told_apart_by_their_code() -> None:
    five = lambda p, r: sir(p, r, num_proposals=5)
    two = lambda p, r: sir(p, r, num_proposals=2)
    again = lambda p, r: sir(p, r, num_proposals=5)
    assert describe(five) == describe(two)
    assert identity_of(five) == identity_of(again) != identity_of(two)
    for one, other in zip(same_name(5), same_name(2), strict=True):
        assert identity_of(one) != identity_of(other)
        assert identity_of(partial(one, m=1)) != identity_of(partial(other, m=1))
    assert identity_of(FIVE) == describe(FIVE)  # a function of the package is known by its name
    assert identity_of(ExactRatio(lambda z: z)) == identity_of(ExactRatio(lambda z: z))
    one, other = nn.Linear(1, 1), nn.Linear(1, 1)
    assert identity_of(one) == identity_of(one) != identity_of(other)


FUNCTION = """
from ncprior import sir
from ncprior.samplers.identity import identity_of

def mine(prior, log_ratio, inner=sir):
    {doc}
    name = "alpha"
    return inner(prior, log_ratio, num_proposals=3 if name in {{"alpha", "beta", "gamma"}} else 2)

print(identity_of(mine))
"""


def test_the_identity_of_a_function_is_the_same_in_every_process() -> None:
    """The order of a set and the address of a function are not; its docstring does not count."""
    found = set()
    for seed, doc in (("1", '"One."'), ("2", '"Another."'), ("3", '"One."')):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", FUNCTION.format(doc=doc)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        found.add(done.stdout)
    assert len(found) == 1


def test_facts_are_plain_or_named() -> None:
    class Told(SingleGroup):
        def __init__(self, fact: Any) -> None:
            super().__init__(DECODER.prior, None, lambda z: z)
            self.fact = fact

        def facts(self) -> dict[str, Any]:
            return {"vae": self.fact}  # a name that is taken, but not here

    numbers = Told([np.float32(0.5), np.int64(3), (True, None), {"a": 0.25}])
    assert source_facts(numbers)["facts"] == {"vae": [0.5, 3, [True, None], {"a": 0.25}]}
    assert source_facts(numbers)["vae"] is None
    for wrong in (torch.ones(2), torch.float32, math.nan, {"a": object()}):
        with pytest.raises(TypeError, match=r"Facts of a source are .*; vae.* is "):
            source_facts(Told(wrong))


def test_sigma_and_encoders_play_no_part_in_means_of_x(tmp_path: Path) -> None:
    head = MLPHead((2,), width=8)
    job: dict[str, Any] = {"num_samples": 4, "part_size": 2, "sampler": FIVE, "progress": False}
    for name, (one, other) in {name: OTHERS[name] for name in ("sigma", "encoder")}.items():
        sample_parts(NCPrior(one, head).eval(), tmp_path / name, parts=[0], **job)
        assert len(sample_parts(NCPrior(other, head).eval(), tmp_path / name, **job)) == 2
