"""What a plug-in promises: only heads train, the base comes back, and the VAE is never touched.

The third promise, that a file holds only what was trained, is in `test_hub.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from helpers.problems import Codes
from helpers.toys import VAE, Ladder, everything, flat, weights
from torch import Tensor, nn
from torch.distributions import Categorical

from ncprior import Draw, NCETrainer, NCPrior, SingleGroup, fit, langevin, sir
from ncprior.testing import check_source

pytestmark = pytest.mark.filterwarnings("ignore:Reconstructions of a row")  # untrained toys

SIR = partial(sir, num_proposals=30)
ULA = partial(langevin, num_steps=4, step_size=0.2)
MALA = partial(langevin, num_steps=4, step_size=0.2, adjusted=True)


class CodesVAE(nn.Module):
    """A discrete VAE with networks."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(3, 4), nn.Embedding(4, 3)
        self.eval()

    def posterior(self, x: Tensor) -> Categorical:
        return Categorical(logits=self.encoder(x), validate_args=False)


class Case(NamedTuple):
    """A user's model, what wraps it, and samplers that suit it."""

    vae: nn.Module
    prior: NCPrior
    x: Tensor
    samplers: tuple[Callable[..., Draw], ...]


def flat_case(seed: int, dtype: torch.dtype = torch.float32) -> Case:
    torch.manual_seed(seed)
    vae = VAE().to(dtype)
    source = SingleGroup(
        flat().prior, lambda x: vae.posterior(x.to(dtype)), vae.decode, module=vae
    )
    x = torch.randn(64, 3)
    return Case(vae, NCPrior.for_source(source, x, width=16), x, (SIR, ULA, MALA))


def ladder_case(seed: int) -> Case:
    torch.manual_seed(seed)
    vae, x = Ladder(), torch.randn(64, 3)
    return Case(vae, NCPrior.for_source(vae, x, width=16), x, (SIR, ULA, MALA))


def codes_case(seed: int) -> Case:
    torch.manual_seed(seed)
    vae, x = CodesVAE(), torch.randn(64, 3)
    source = SingleGroup(Codes().prior, vae.posterior, vae.decoder, module=vae)
    return Case(vae, NCPrior.for_source(source, x, width=16), x, (SIR,))


CASES: dict[str, Callable[[int], Case]] = {
    "flat": flat_case,
    "bf16": partial(flat_case, dtype=torch.bfloat16),
    "a module of three groups": ladder_case,
    "codes": codes_case,
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param](0)


def base_walk(case: Case, seed: int) -> tuple[Tensor, ...]:
    """The VAE's own samples: nothing of ours but its source."""
    torch.manual_seed(seed)
    source = case.prior.source
    with torch.no_grad():
        state, latents = source.start(5), []
        for _ in range(source.num_groups):
            latents.append(source.group(state).prior.sample())
            state = source.advance(state, latents[-1])
        return (*latents, source.decode(state))


def drawn(case: Case, seed: int, sampler: Callable[..., Draw] = SIR) -> tuple[Tensor, ...]:
    torch.manual_seed(seed)
    sample = case.prior.sample(5, sampler)
    return (*sample.latents, sample.x)


def equal(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def use_everything(case: Case) -> None:
    """All that anybody does with a prior."""
    prior, x = case.prior, case.x
    trainer = NCETrainer(prior, torch.optim.AdamW(prior.parameters(), 1e-2))
    for _ in range(5):
        trainer.step(x)
    fit(prior, x, held_out=x, steps=5, eval_every=2, progress=False)
    prior.nce_loss(x).sum().backward()
    for sampler in case.samplers:
        sample = prior.sample(5, sampler)
    latents = [z.clone().requires_grad_(z.is_floating_point()) for z in sample.latents]
    if latents[0].requires_grad:
        torch.autograd.grad(prior.log_ratio(latents).sum(), latents)
    prior.train().eval()
    prior.zero_grad()
    check_source(prior.source, x)


def test_the_vae_is_never_touched(case: Case) -> None:
    """Weights, dtypes, storage, requires_grad, .grad, buffers, training flags and hooks."""
    some = next(p for p in case.vae.parameters() if p.requires_grad)
    some.grad = torch.ones_like(some)
    before = everything(case.vae)
    use_everything(case)
    assert everything(case.vae) == before


def test_only_heads_train(case: Case) -> None:
    prior = case.prior
    vae = {id(t) for t in (*case.vae.parameters(), *case.vae.buffers())}
    assert vae.isdisjoint({id(t) for t in (*prior.parameters(), *prior.buffers())})
    assert all(name.startswith("heads.") for name in prior.state_dict())
    before = weights(prior)
    use_everything(case)
    after = weights(prior)
    trained = {name for name, _ in prior.named_parameters()}
    assert {name for name in after if not torch.equal(after[name], before[name])} == trained
    assert before.keys() - trained == {n for n in before if n.endswith(("scale.mean", "scale.sd"))}


def test_the_base_comes_back_bit_for_bit(case: Case) -> None:
    """With trained heads, and through every switch: the draws are the VAE's own."""
    own = base_walk(case, seed=1)
    use_everything(case)
    prior = case.prior
    assert equal(base_walk(case, seed=1), own)
    if own[0].is_floating_point():  # codes may well be equal
        assert not equal(drawn(case, seed=1), own)
    for sampler in case.samplers:
        with prior.disabled():
            assert equal(drawn(case, 1, sampler), own)
        prior.strength = 0.0
        assert equal(drawn(case, 1, sampler), own)
        prior.strength = 1.0
        prior.active = [False] * prior.source.num_groups
        assert equal(drawn(case, 1, sampler), own)
        prior.active = [True] * prior.source.num_groups
