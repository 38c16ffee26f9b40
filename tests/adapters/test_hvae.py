"""The hierarchical VAE of our own."""

import math
from typing import Any

import pytest
import torch
from helpers.toys import everything
from torch import Tensor

from ncprior import NCETrainer, NCPrior
from ncprior.adapters.hvae import HVAE, HVAESource, train_hvae
from ncprior.evaluation import log_likelihood
from ncprior.source import posterior_of, sample_posterior
from ncprior.testing import check_source


def small(num_groups: int = 3) -> HVAE:
    """A VAE whose every weight does something."""
    vae = HVAE(num_groups=num_groups, latents=2, width=16, hidden=8)
    with torch.no_grad():
        for p in vae.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return vae.eval()


@pytest.fixture
def x() -> Tensor:
    return torch.rand(6, 1, 28, 28).bernoulli()


@pytest.mark.parametrize("name", ["num_groups", "latents", "width", "hidden"])
def test_F32_sizes_of_the_vae_are_whole_numbers_from_1(name: str) -> None:
    for wrong in (0, -1):
        with pytest.raises(ValueError, match=f"{name} must be a whole number"):
            HVAE(**{name: wrong})
    for wrong in (2.0, "2", None):
        with pytest.raises(TypeError, match=f"{name} must be a whole number"):
            HVAE(**{name: wrong})


@pytest.mark.parametrize("wrong", [None, 3, HVAE, torch.nn.Linear(1, 1)])
def test_F32_what_is_no_hvae_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match="model must be of type HVAE; got .*SingleGroup"):
        HVAESource(wrong)
    with pytest.raises(TypeError, match="vae must be of type HVAE"):
        train_hvae(wrong, torch.rand(4, 1, 28, 28), epochs=1)


def test_F32_bytes_are_refused(x: Tensor) -> None:
    source = HVAESource(small())
    for wrong in (255 * x, (255 * x).byte(), x.long(), x - 0.5):
        with pytest.raises(ValueError, match="An HVAE takes x .* Divide bytes by 255"):
            source.encode(wrong)
    with pytest.raises(TypeError, match="x must be a tensor"):
        source.encode("x")
    assert torch.equal(source.encode(x.double().numpy()), source.encode(x))


def test_F26_arguments_of_training(x: Tensor) -> None:
    for wrong in ({"epochs": 1.5}, {"batch_size": None}, {"learning_rate": "1"}):
        with pytest.raises(TypeError, match="must be a"):
            train_hvae(small(), x, **{"epochs": 1, "progress": False, **wrong})
    for wrong in (
        {"epochs": 0},
        {"batch_size": len(x) + 1, "epochs": 3},
        {"learning_rate": math.nan},
    ):
        with pytest.raises(ValueError, match="must be a"):
            train_hvae(small(), x, **{"epochs": 1, "progress": False, **wrong})


def test_it_keeps_the_laws_of_a_source(x: Tensor) -> None:
    check_source(HVAESource(small()), x)
    check_source(HVAESource(small().bfloat16()), x.bfloat16())


def test_groups_and_contexts_have_their_shapes(x: Tensor) -> None:
    source = HVAESource(small())
    state = source.start(6, source.encode(x))
    shapes = []
    for _ in range(3):
        group = source.group(state)
        shapes.append(None if group.context is None else tuple(group.context.shape))
        z = posterior_of(group).sample()
        assert z.shape == (6, 2, 4, 4)
        state = source.advance(state, z)
    assert shapes == [None, (6, 16, 4, 4), (6, 16, 4, 4)]
    assert source.decode(state).shape == source.likelihood(state).sample().shape == x.shape


def test_its_elbo_is_that_of_the_walk(x: Tensor) -> None:
    """log p(x|z) + Σ log p_k - log q_k along the walk has the ELBO as its mean."""
    vae = small()
    source = HVAESource(vae)
    walked, direct = [], []
    with torch.no_grad():
        for _ in range(200):
            state = source.start(6, source.encode(x))
            log_w = torch.zeros(6)
            for _ in range(3):
                group = source.group(state)
                q = posterior_of(group)
                z = q.sample()
                log_w += group.prior.log_prob(z) - q.log_prob(z)  # type: ignore[attr-defined]
                state = source.advance(state, z)
            walked.append(log_w + source.likelihood(state).log_prob(x))
            direct.append(-vae.negative_elbo(x))
    a, b = torch.stack(walked), torch.stack(direct)
    error = ((a.var(0) + b.var(0)) / 200).sqrt()
    assert ((a.mean(0) - b.mean(0)).abs() < 4 * error).all()


def test_its_walk_goes_where_its_forward_goes(x: Tensor) -> None:
    """The same seed gives the same latents, and so the same log p(x | z)."""
    vae = small()
    torch.manual_seed(0)
    misfit, _ = vae._misfit_and_kl(x)
    torch.manual_seed(0)
    source = HVAESource(vae)
    _, state = sample_posterior(source, x)
    assert torch.allclose(source.likelihood(state).log_prob(x), -misfit, rtol=1e-5)


def test_a_new_posterior_is_the_prior(x: Tensor) -> None:
    """What the posterior's network gives is added to the prior's parameters."""
    vae = HVAE(num_groups=3, width=16, hidden=8).eval()
    with torch.no_grad():
        for rung in vae.rungs:
            rung.prior[-1].bias.normal_()  # type: ignore[union-attr, operator]
    _, kl = vae._misfit_and_kl(x)
    assert kl.abs().max() < 1e-5


def test_warm_up_weighs_the_divergences_by_beta_on_average(x: Tensor) -> None:
    vae = small()
    losses = {}
    for beta in (0.0, 0.5, 1.0):
        torch.manual_seed(0)
        losses[beta] = vae.warm_up_loss(x, beta).mean().item()
    torch.manual_seed(0)
    assert math.isclose(losses[1.0], vae.negative_elbo(x).mean().item(), rel_tol=1e-6)
    assert losses[0.0] < losses[0.5] < losses[1.0]


def test_warm_up_spares_groups_that_say_little(x: Tensor) -> None:
    """At β = 0.5 the gradient of a small KL is weighted less than that of a large one."""
    vae = small()
    torch.manual_seed(0)
    misfit, kl = vae._misfit_and_kl(x)
    mean = kl.mean(1)
    torch.manual_seed(0)
    loss = vae.warm_up_loss(x, 0.5)
    weight = 0.5 * (mean + 0.1) / (mean + 0.1).mean()
    assert torch.allclose(loss, misfit + weight @ kl, rtol=1e-5)
    assert weight[mean.argmin()] < 0.5 < weight[mean.argmax()]


def test_thirty_groups_train_in_one_walk_and_leave_the_vae_alone(x: Tensor) -> None:
    vae = small(30)
    before = everything(vae)
    calls = []
    hook = vae.encoder.register_forward_hook(lambda *_: calls.append(1))
    prior = NCPrior.for_source(HVAESource(vae), x, width=8, depth=1)
    calls.clear()
    trainer = NCETrainer(prior, torch.optim.Adam(prior.parameters()))
    prior.train()
    for _ in range(3):
        metrics = trainer.step(x)
    hook.remove()
    assert len(calls) == 3  # one walk per batch
    assert metrics.loss.shape == (30,)
    assert everything(vae) == before


def test_wrong_input_is_refused(x: Tensor) -> None:
    source = HVAESource(small())
    with pytest.raises(
        ValueError, match=r"must have shape \(B, 1, 28, 28\); got \(6, 1, 32, 32\)"
    ):
        source.encode(torch.rand(6, 1, 32, 32))
    with pytest.raises(ValueError, match="takes no condition"):
        source.start(3, condition=torch.zeros(3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="evaluation mode"):
        HVAESource(small().train()).encode(x)


def test_a_tuple_of_a_loader_is_its_first_item(x: Tensor) -> None:
    source = HVAESource(small())
    labels = torch.zeros(6)
    assert torch.equal(source.encode((x, labels)), source.encode(x))
    latents, _ = sample_posterior(source, [x, labels])
    assert len(latents) == 3


def test_grey_images_have_no_likelihood() -> None:
    source = HVAESource(small())
    with pytest.raises(ValueError, match=r"of binary images; got grey ones"):
        log_likelihood(source, torch.full((2, 1, 28, 28), 0.5), num_samples=2)
