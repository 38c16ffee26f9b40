"""VDVAE: the walk is the model's own to the last bit, wrong models and inputs are refused by name."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.equality import identical
from helpers.toys import everything
from helpers.vdvae_standin import images, vdvae
from torch import nn
from torch.distributions import Independent, Normal

from ncprior import NCETrainer, NCPrior, sir
from ncprior.adapters import vdvae as adapter
from ncprior.adapters.logistics import LogisticMixture
from ncprior.adapters.vdvae import ByteImages, VDVAESource
from ncprior.evaluation import log_likelihood
from ncprior.source import posterior_of, sample_posterior
from ncprior.testing import check_source
from ncprior.utils.random_state import random_state

KINDS: list[dict[str, Any]] = [
    {},
    {"no_bias_above": 4},
    {"no_bias_above": 1, "dataset": "ffhq_256"},
    {"widths": {1: 6, 4: 5}},
    {"blocks": ((8, None),), "dataset": "ffhq_1024"},
]


def drawn(source: VDVAESource, count: int = 4) -> VDVAESource.State:
    """The state behind the base prior's own draws."""
    state = source.start(count)
    for _ in range(source.num_groups):
        state = source.advance(state, source.group(state).prior.sample())
    return state


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_the_walk_is_the_models_own_and_keeps_the_laws_of_a_source(
    options: dict[str, Any],
) -> None:
    source = VDVAESource(vdvae(**options))
    x = images()
    assert source.self_check(x) < 1e-6  # 0 but for convolutions of repeated and expanded memory
    check_source(source, x)


def test_self_check_neither_uses_nor_moves_the_callers_generator() -> None:
    source, x = VDVAESource(vdvae(), temperature=0.5), images()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert source.self_check([x, torch.zeros(4)]) == 0.0
    assert torch.equal(torch.get_rng_state(), before)


def _without_mixin(patch: pytest.MonkeyPatch, source: VDVAESource) -> None:
    patch.setattr(adapter, "interpolate", lambda h, scale_factor: 0.0)


def _wrong_slice(patch: pytest.MonkeyPatch, source: VDVAESource) -> None:
    """Has the model's own posteriors, and them alone, have the two halves the other way round."""
    block: Any = source.module.decoder.dec_blocks[1]  # type: ignore[union-attr,index]
    forward = block.enc.forward
    patch.setattr(block, "forward", partial(_with_swapped, block, forward, block.forward))


def _with_swapped(block: Any, enc: Any, forward: Any, *args: Any) -> Any:
    with pytest.MonkeyPatch.context() as inside:
        inside.setattr(block.enc, "forward", lambda x: enc(x).roll(block.zdim, 1))
        return forward(*args)


def _without_the_final_gain(patch: pytest.MonkeyPatch, source: VDVAESource) -> None:
    patch.setattr(source, "_final", lambda state: state.features[8])


@pytest.mark.parametrize("breakage", [_without_mixin, _wrong_slice, _without_the_final_gain])
def test_self_check_refuses_another_walk(
    breakage: Callable[[pytest.MonkeyPatch, VDVAESource], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, x = VDVAESource(vdvae()), images()
    assert source.self_check(x) == 0.0
    breakage(monkeypatch, source)
    with pytest.raises(ValueError, match=r"forward and this walk disagree: .* by up to"):
        source.self_check(x)


def test_bytes_and_the_models_own_pair_are_one_encoding() -> None:
    source, x = VDVAESource(vdvae()), images()
    normalised, target = (x.float() - 120.63838) / 64.16736, (x.float() - 127.5) / 127.5
    expected = source.module.encoder(normalised)
    for batch in (x, [x], (x, torch.zeros(4)), (normalised, target)):
        for resolution, activation in source.encode(batch).activations.items():
            assert torch.allclose(activation, expected[resolution], atol=1e-5)


@pytest.mark.parametrize(
    ("dataset", "shift", "scale"),
    [
        ("cifar10", 120.63838, 64.16736),
        ("imagenet32", 116.2373, 69.37404),
        ("imagenet64", 115.92961967, 69.37404),
        ("ffhq_256", 112.8666757481, 69.84780273),
        ("ffhq_1024", 111.8685, 69.9465),
    ],
)
def test_bytes_are_normalised_as_in_the_training_of_each_model(
    dataset: str, shift: float, scale: float
) -> None:
    source, x, seen = VDVAESource(vdvae(dataset)), images(), []
    source.module.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    source.encode(x)
    assert torch.allclose(seen[0], (x.float() - shift) / scale, atol=1e-5)


def test_temperature_scales_every_prior_and_no_posterior() -> None:
    plain = VDVAESource(vdvae())
    tempered = VDVAESource(plain.module, temperature=0.7)
    x = images()
    states = [s.start(4, s.encode(x)) for s in (plain, tempered)]
    for _ in range(plain.num_groups):
        one, other = (s.group(state) for s, state in zip((plain, tempered), states, strict=True))
        assert torch.equal(other.prior.base_dist.loc, one.prior.base_dist.loc)
        assert torch.equal(other.prior.base_dist.scale, 0.7 * one.prior.base_dist.scale)
        assert torch.equal(other.posterior.base_dist.scale, one.posterior.base_dist.scale)
        z = posterior_of(one).sample()
        states = [s.advance(state, z) for s, state in zip((plain, tempered), states, strict=True)]


def test_priors_are_the_prior_networks_of_their_contexts() -> None:
    """But for group 0, of 1×1, whose context is the same for all rows and so is none."""
    source = VDVAESource(vdvae())
    state = source.start(4)
    for k in range(source.num_groups):
        group = source.group(state)
        assert (group.context is None) == (k == 0)
        h = state.h if k == 0 else group.context
        loc, log_scale = source.module.decoder.dec_blocks[k].prior(h)[:, :4].chunk(2, 1)
        expected = Independent(Normal(loc, log_scale.exp()), 3)
        z = group.prior.sample()
        assert torch.allclose(group.prior.log_prob(z), expected.log_prob(z), rtol=1e-5)
        state = source.advance(state, z)


def test_the_first_prior_is_learnt_and_the_same_for_all_rows() -> None:
    source = VDVAESource(vdvae())
    prior = source.group(source.start(3)).prior
    assert prior.event_shape == (2, 1, 1)
    assert prior.base_dist.loc.abs().min() > 0
    assert torch.equal(prior.base_dist.loc, prior.base_dist.loc[:1].expand(3, -1, -1, -1))


def test_likelihoods_are_of_bytes_in_nats_per_image() -> None:
    source, x = VDVAESource(vdvae()), images()
    state = drawn(source)
    parameters = source.module.decoder.out_net(source._final(state)).permute(0, 3, 1, 2)
    expected = LogisticMixture(parameters).log_prob(x.permute(0, 3, 1, 2) / 255)
    law = source.likelihood(state)
    assert torch.equal(law.log_prob(x), expected)
    assert torch.equal(law.log_prob(x.float()), expected)
    assert torch.equal(source.decode(state), law.mean) and law.mean.shape == x.shape
    assert 0 < law.mean.min() and 100 < law.mean.max() < 255


def test_ffhq_256_has_five_bits() -> None:
    """Bytes count as rounded down to multiples of 8, and draws are such."""
    source, x = VDVAESource(vdvae("ffhq_256")), images()
    state = drawn(source)
    parameters = source.module.decoder.out_net(source._final(state)).permute(0, 3, 1, 2)
    rounded = (x // 8 * 8).permute(0, 3, 1, 2) / 255
    expected = LogisticMixture(parameters, num_bits=5).log_prob(rounded)
    law = source.likelihood(state)
    assert torch.equal(law.log_prob(x), expected)
    draws = law.sample((50,))
    assert draws.dtype == torch.uint8 and draws.shape == (50, *x.shape)
    assert draws.max() == 248 and torch.equal(draws % 8, torch.zeros_like(draws))


@pytest.mark.parametrize(("num_bits", "last"), [(5, 248), (8, 255)])
def test_the_last_level_is_a_byte(num_bits: int, last: int) -> None:
    parameters = torch.zeros(1, 10, 2, 2)
    parameters[:, [1, 4, 7]] = 50.0  # every location far above the last level
    draws = ByteImages(LogisticMixture(parameters, num_bits=num_bits)).sample((5,))
    assert draws.unique().tolist() == [last]


@pytest.mark.parametrize("num_bits", [5, 8])
def test_draws_of_bytes_are_as_frequent_as_their_probability(num_bits: int) -> None:
    """Around the byte 144: it is the most probable multiple of 8, and was never drawn.

    Bins of 5 bits have a width of 2/31 in the published likelihood, and levels are 16/255 apart, so
    that probabilities are up to 3 % too large.
    """
    step = 256 // 2**num_bits
    parameters = torch.zeros(1, 10, 1, 1)
    parameters[:, [1, 4, 7]] = 2 * 144 / 255 - 1
    parameters[:, [2, 5, 8]] = -3.0 if num_bits == 5 else -5.0
    law = ByteImages(LogisticMixture(parameters, num_bits=num_bits))
    draws = law.sample((20_000,)).flatten()
    for byte in (144 - step, 144, 144 + step):
        x = torch.full((1, 1, 1, 3), byte, dtype=torch.uint8)
        p = math.exp(law.log_prob(x).item() / 3)  # the channels are alike, and independent
        error = math.sqrt(p / len(draws))
        assert (draws == byte).double().mean().item() == pytest.approx(p, abs=4 * error, rel=0.04)


def test_draws_of_bytes_have_the_mean() -> None:
    parameters = torch.zeros(1, 20, 1, 1)
    parameters[:, 2:].view(3, 3, 2)[:, 1] = -4.0
    law = ByteImages(LogisticMixture(parameters))
    draws = law.sample((20_000,)).double()
    error = draws.std(0) / 20_000**0.5
    assert ((draws.mean(0) - law.mean).abs() < 4 * error).all()
    assert law.support.check(law.sample()).all()


def test_half_precision_models_have_float32_laws() -> None:
    source = VDVAESource(vdvae().bfloat16())
    latents, state = sample_posterior(source, images())
    assert {z.dtype for z in latents} == {torch.float32}
    assert source.decode(state).dtype == torch.float32
    check_source(source, images())


def test_thirty_groups_train_in_one_walk_and_the_model_stays_bit_identical() -> None:
    blocks = ((1, None), (1, None), (4, 1), *[(4, None)] * 13, (8, 4), *[(8, None)] * 13)
    source = VDVAESource(vdvae(blocks=blocks))
    vae: Any = source.module
    vae.decoder.gain.requires_grad_(False)
    vae.decoder.bias.grad = torch.ones_like(vae.decoder.bias)
    x, calls = images(6), []
    prior = NCPrior.for_source(source, x, width=8)
    before = everything(vae)
    trainer = NCETrainer(prior, torch.optim.AdamW(prior.parameters(), lr=1e-2))
    encoder = vae.encoder.forward
    vae.encoder.forward = lambda x: calls.append(1) or encoder(x)
    losses = [trainer.step(x).loss for _ in range(8)]
    del vae.encoder.forward
    assert len(calls) == 8  # one walk per batch
    assert losses[-1].shape == (30,) and losses[-1].mean() < losses[0].mean()
    prior.sample(2, partial(sir, num_proposals=4))
    assert everything(vae) == before


def test_the_source_takes_a_wrapped_model_and_knows_it_by_its_weights() -> None:
    model = vdvae()
    source = VDVAESource(nn.DataParallel(model))
    assert source.module is model
    before = source.fingerprint()
    assert before == VDVAESource(model).fingerprint() and before.startswith("float32")
    model.decoder.gain.data.add_(1)
    assert source.fingerprint() != before


def test_the_source_takes_the_place_of_no_copy() -> None:
    """Of a deep copy, the blocks' own lambdas go on using the original; the walk does not."""
    from copy import deepcopy

    original = vdvae()
    copy = deepcopy(original)
    for p in copy.decoder.dec_blocks[0].z_proj.parameters():
        p.data.add_(1.0)
    z = torch.ones(1, 2, 1, 1)
    block = copy.decoder.dec_blocks[0]
    assert not torch.equal(block.z_fn(z), block.z_proj(z))  # the trap
    with pytest.raises(ValueError, match="disagree"):
        VDVAESource(copy).self_check(images())


# Errors


def _with(change: Callable[[Any], object], **options: Any) -> nn.Module:
    model = vdvae(**options)
    change(model)
    return model


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: vdvae().state_dict(),
            TypeError,
            "got an object of type OrderedDict, which lacks encoder.*state_dict",
        ),
        (
            lambda: nn.Linear(1, 1),
            TypeError,
            "got an object of type Linear, which lacks encoder, decoder, H",
        ),
        (
            lambda: _with(lambda m: delattr(m.decoder, "bias_xs")),
            TypeError,
            "lacks decoder.bias_xs",
        ),
        (
            lambda: _with(lambda m: delattr(m.decoder.dec_blocks[1], "z_proj")),
            TypeError,
            "lacks z_proj in a block",
        ),
        (
            lambda: _with(lambda m: m.H.pop("image_size")),
            ValueError,
            "image_size is None: set H.image_size and H.image_channels before",
        ),
        (lambda: vdvae("mnist"), ValueError, "one of cifar10, .*; got 'mnist'"),
    ],
)
def test_a_model_that_the_walk_would_not_fit_is_refused(
    make: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        VDVAESource(make())


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_temperatures_are_positive(temperature: float) -> None:
    with pytest.raises(ValueError, match=r"temperature must be a number in \(0, inf\)"):
        VDVAESource(vdvae(), temperature=temperature)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 3, 8, 8), r"\(B, 8, 8, 3\), channels last; got \(2, 3, 8, 8\)"),
        (torch.zeros(2, 8, 8, 1), r"got \(2, 8, 8, 1\)"),
        ("an image", "x must be a tensor or an array"),
        (torch.rand(2, 8, 8, 3), r"or the pair .*; got torch.float32"),
        ([torch.rand(2, 8, 8, 3), torch.zeros(2)], r"or the pair .*; got torch.float32"),
        (torch.zeros(2, 8, 8, 3, dtype=torch.int64), r"or the pair .*; got torch.int64"),
    ],
)
def test_wrong_images_are_refused(x: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        VDVAESource(vdvae()).encode(x)


@pytest.mark.parametrize("wrong", [None, 3, nn.Module])
def test_F32_what_is_no_model_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match="VDVAESource takes VDVAE's VAE; got"):
        VDVAESource(wrong)
    with pytest.raises(TypeError, match="mixture must be of type LogisticMixture"):
        ByteImages(wrong)


def test_F26_numbers() -> None:
    with pytest.raises(TypeError, match="tolerance must be a number"):
        VDVAESource(vdvae()).self_check(images(2), tolerance="1")
    with pytest.raises(TypeError, match="temperature must be a number"):
        VDVAESource(vdvae(), temperature="1")


def test_F25_arrays_are_images() -> None:
    source, x = VDVAESource(vdvae()), images(2)
    ours, theirs = source.encode(x.numpy()).activations, source.encode(x).activations
    assert all(torch.equal(ours[size], theirs[size]) for size in theirs)


def test_GS2_a_check_leaves_all_generators_as_they_were() -> None:
    """fork_rng of one device would leave those of others reseeded: `seeded` keeps all."""
    source, x, before = VDVAESource(vdvae()), images(2), random_state()
    seen: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.random, "fork_rng", lambda *_, **__: seen.append(1))
        assert source.self_check(x) == 0
    assert not seen
    assert identical(random_state(), before)


def test_a_model_in_training_is_refused() -> None:
    source = VDVAESource(vdvae().train())
    entrances: list[Callable[[], Any]] = [lambda: source.start(2), lambda: source.encode(images())]
    for entrance in entrances:
        with pytest.raises(ValueError, match="evaluation mode"):
            entrance()


def test_misplaced_steps_are_refused() -> None:
    source = VDVAESource(vdvae())
    state = source.start(2)
    with pytest.raises(ValueError, match=r"needs z of shape \(2, 2, 1, 1\); got \(2, 2\)"):
        source.advance(state, torch.zeros(2, 2))
    with pytest.raises(ValueError, match="in front of group 0 of 4"):
        source.decode(state)
    end = drawn(source, 2)
    with pytest.raises(ValueError, match="behind the last of 4 groups"):
        source.group(end)
    with pytest.raises(ValueError, match="needs z of shape none"):
        source.advance(end, torch.zeros(2, 2, 8, 8))
    with pytest.raises(ValueError, match="VDVAE has no condition"):
        source.start(2, condition=torch.zeros(2, 1))


# The published code


def test_the_walk_is_that_of_the_published_code() -> None:
    """Latents, KL terms, features and samples to the last bit; likelihoods to rounding."""
    if "NCPRIOR_VDVAE" not in os.environ:
        pytest.skip("NCPRIOR_VDVAE names the folder of a checkout")
    script = Path(__file__).parents[1] / "helpers" / "vdvae_official.py"
    command = [sys.executable, "-W", "ignore", str(script), os.environ["NCPRIOR_VDVAE"]]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [result["groups"] for result in results] == [43, 78, 4, 6, 5]
    for result in results:
        assert result["self_check"] == 0.0 and result["walk"] == 0.0, result
        ours, theirs = (torch.tensor(t) for t in result["log p(x|z)"])
        assert torch.allclose(ours, theirs, rtol=1e-5), result


@pytest.mark.parametrize("dataset", ["cifar10", "ffhq_256"])
def test_the_likelihood_of_the_models_own_pair_is_that_of_the_bytes(dataset: str) -> None:
    """It was that of the normalised image, hundreds of nats away."""
    source, x = VDVAESource(vdvae(dataset)), images()
    pair = (source._normalised(x), (x.float() - 127.5) / 127.5)
    assert torch.equal(source.observed(pair), x) and source.observed(x) is x
    found = []
    for batch in (x, pair):
        torch.manual_seed(0)
        found.append(log_likelihood(source, [batch], num_samples=2)["base"].lower)
    assert torch.allclose(*found, rtol=1e-5)


def test_the_mean_of_five_bits_is_no_higher_than_its_last_byte() -> None:
    parameters = torch.zeros(1, 10, 2, 2)
    parameters[:, [1, 4, 7]] = 50.0
    assert ByteImages(LogisticMixture(parameters, num_bits=5)).mean.max() == 248
